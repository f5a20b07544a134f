"""The thread between the server and its engine, driven with a fake engine."""

from __future__ import annotations

import asyncio
import logging

import pytest

from athanor.core.errors import RequestError
from athanor.serve.worker import DeadlineError, EngineFailedError, Idle, QueueFullError, StoppingError, Worker
from athanor.types import Request, SamplingParams


def request(name, max_tokens=128):
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens))


async def read(stream):
    """Text and finish reason of each request of a stream."""
    text = {r.id: "" for r in stream.requests}
    reason = {}
    async for chunk in stream:
        text[chunk.request_id] += chunk.content
        if chunk.completion is not None:
            assert chunk.request_id not in reason
            reason[chunk.request_id] = chunk.completion.finish_reason
    return text, reason


def drive(engine, scenario, **options):
    """Run the coroutine `scenario(worker)` beside a worker, which is stopped at the end."""

    async def main():
        worker = Worker(engine, **options)
        worker.start()
        try:
            return await asyncio.wait_for(scenario(worker), 60)
        finally:
            worker.stop()
            await asyncio.to_thread(worker.join)
            assert not worker.alive

    return asyncio.run(main())


def test_every_request_gets_its_own_text(fake):
    engine = fake(lambda r: f"I am {r.id}.")

    async def scenario(worker):
        streams = await asyncio.gather(*(worker.submit([request(f"r{i}"), request(f"s{i}", 3)]) for i in range(20)))
        return await asyncio.gather(*map(read, streams))

    for i, (text, reason) in enumerate(drive(engine, scenario)):
        assert text == {f"r{i}": f"I am r{i}.", f"s{i}": "I a"}
        assert reason == {f"r{i}": "stop", f"s{i}": "length"}


def test_closing_a_stream_aborts_and_ends_its_reader(fake):
    engine = fake(lambda r: "x" * 10**6)

    async def scenario(worker):
        stream = await worker.submit([request("long", 10**6)])
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        stream.close()
        stream.close()
        text, reason = await reader
        assert reason == {}
        assert len(text["long"]) < 10**6
        await read(await worker.submit([request("next", 2)]))

    drive(engine, scenario)
    assert engine.aborted == ["long"]
    assert not engine.has_work


def test_cancelling_a_submission_that_waits_aborts_it(fake):
    engine = fake()
    engine.gate.clear()

    async def scenario(worker):
        first = await worker.submit([request("first")])  # the thread is now held in a step, so nothing is admitted
        waiting = asyncio.create_task(worker.submit([request("second")]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        engine.gate.set()
        return await read(first)

    assert drive(engine, scenario, max_queue=2)[0] == {"first": "hello"}
    assert engine.aborted == ["second"]
    assert not engine.has_work


def test_a_failing_step_fails_what_is_in_flight_and_nothing_else(fake, caplog):
    engine = fake()
    engine.gate.clear()

    async def scenario(worker):
        one = await worker.submit([request("one")])
        engine.fail.append(ZeroDivisionError("secret detail"))
        engine.gate.set()
        with pytest.raises(EngineFailedError) as error:
            await read(one)
        assert "secret" not in str(error.value)
        assert worker.alive
        return await read(await worker.submit([request("two")]))

    with caplog.at_level(logging.ERROR, "athanor.serve"):
        text, _ = drive(engine, scenario)
    assert text == {"two": "hello"}
    assert "requests in flight: one" in caplog.text
    assert "secret detail" in caplog.text


def test_an_engine_that_fails_for_ever_does_not_spin(fake, caplog):
    engine = fake()
    engine.abort = lambda request_id: engine.aborted.append(request_id)  # leaves has_work True
    engine.fail += [ValueError("broken")] * 3

    async def scenario(worker):
        for name in ("a", "b", "c"):
            with pytest.raises(EngineFailedError):
                await read(await worker.submit([request(name)]))

    drive(engine, scenario)
    assert engine.fail == []  # each failure met a request: three requests, three steps
    assert engine.aborted == ["a", "b", "c"]


def test_a_failing_abort_is_logged_and_survived(fake, caplog):
    engine = fake()

    def abort(request_id):
        del engine.live[request_id]
        raise KeyError(request_id)

    engine.abort = abort
    engine.gate.clear()

    async def scenario(worker):
        (await worker.submit([request("gone")])).close()
        engine.gate.set()
        return await read(await worker.submit([request("next")]))

    assert drive(engine, scenario)[0] == {"next": "hello"}
    assert "failed to abort gone" in caplog.text


def test_a_refused_request_raises_before_the_stream_and_takes_its_siblings_along(fake):
    engine = fake()

    async def scenario(worker):
        too_long = Request("long", list(range(5000)))
        with pytest.raises(RequestError, match="too long") as error:
            await worker.submit([request("ok"), too_long])
        assert error.value.param == "messages"
        for _ in range(3):  # the slots came back
            await read(await worker.submit([request("a"), request("b")]))

    drive(engine, scenario, max_queue=2)
    assert engine.aborted == ["ok"]


def test_an_engine_that_breaks_on_add_is_a_failure_of_that_request(fake, caplog):
    engine = fake()
    engine.fail_add.append(MemoryError("big"))

    async def scenario(worker):
        with pytest.raises(EngineFailedError):
            await worker.submit([request("one")])
        return await read(await worker.submit([request("two")]))

    assert drive(engine, scenario)[0] == {"two": "hello"}
    assert "failed to take one" in caplog.text


def test_queue_limit(fake):
    engine = fake()
    engine.gate.clear()

    async def scenario(worker):
        one = await worker.submit([request("one")])
        with pytest.raises(QueueFullError, match="takes 3 requests at once, and 1 are in flight already: retry later"):
            await worker.submit([request(f"many{i}") for i in range(3)])
        engine.gate.set()
        await read(one)
        # All three slots are free again, also the two that the refused submission had taken.
        three = await worker.submit([request(f"three{i}") for i in range(3)])
        with pytest.raises(RequestError, match="4 answers are asked for, and this server takes 3 at once") as error:
            await worker.submit([request(f"four{i}") for i in range(4)])  # would never fit
        assert error.value.param == "n"
        return await read(three)

    text, _ = drive(engine, scenario, max_queue=3)
    assert set(text.values()) == {"hello"}


def test_stop_fails_what_is_in_flight_and_refuses_the_rest(fake):
    engine = fake()
    engine.gate.clear()

    async def scenario(worker):
        stream = await worker.submit([request("one")])
        worker.stop()
        with pytest.raises(StoppingError, match="shutting down"):
            await worker.submit([request("two")])
        engine.gate.set()
        with pytest.raises(StoppingError):
            await read(stream)

    drive(engine, scenario)
    assert not engine.has_work


def test_a_reader_whose_event_loop_is_closed_is_dropped(fake, caplog):
    engine = fake(lambda r: "x" * 1000)
    engine.gate.clear()
    worker = Worker(engine)
    worker.start()
    asyncio.run(worker.submit([request("lost", 1000)]))
    engine.gate.set()

    async def again():
        return await read(await worker.submit([request("found", 2)]))

    text, _ = asyncio.run(again())
    worker.stop()
    worker.join()
    assert text == {"found": "xx"}
    assert engine.aborted == ["lost"]
    assert "nobody is left to read the answer of lost" in caplog.text


def test_a_worker_whose_thread_dies_fails_its_requests(fake, monkeypatch):
    engine = fake()

    class Bug(BaseException):
        pass

    engine.fail.append(Bug())  # not an Exception: nothing in the worker expects it
    monkeypatch.setattr("threading.excepthook", lambda args: None)

    async def scenario(worker):
        with pytest.raises(StoppingError):
            await read(await worker.submit([request("one")]))
        assert not worker.alive
        with pytest.raises(StoppingError):
            await worker.submit([request("two")])

    drive(engine, scenario)


def test_a_deadline_aborts_what_is_unfinished(fake):
    engine = fake(lambda r: "x" * 10**7)

    async def scenario(worker):
        stream = await worker.submit([request("slow", 10**7)], 0.05)
        with pytest.raises(DeadlineError, match=r"the answer took longer than the 0\.05 s that this server gives one"):
            await read(stream)
        return await read(await worker.submit([request("next", 2)], 60))

    assert drive(engine, scenario)[0] == {"next": "xx"}
    assert engine.aborted == ["slow"]


def test_a_deadline_counts_while_a_request_waits_to_be_taken(fake):
    engine = fake()
    engine.gate.clear()

    async def scenario(worker):
        first = await worker.submit([request("first")])
        assert await asyncio.to_thread(engine.stepping.wait, 60)  # the thread is now held in a step
        with pytest.raises(DeadlineError):
            await worker.submit([request("second")], 0.05)
        engine.gate.set()
        text, _ = await read(first)
        return text, await read(await worker.submit([request("third")])), worker.unfinished

    text, (third, _), unfinished = drive(engine, scenario)
    assert (text, third, unfinished) == ({"first": "hello"}, {"third": "hello"}, 0)
    assert engine.aborted == ["second"]


def test_a_call_runs_in_the_thread_of_the_engine_and_takes_a_slot(fake):
    engine = fake()

    async def scenario(worker):
        before = await worker.submit([request("before")])
        first = await worker.call(lambda: (engine._own(), worker.unfinished))  # `_own` checks the thread
        await read(before)
        second = await worker.call(lambda: worker.unfinished)
        return first[1], second, worker.unfinished

    first, second, after = drive(engine, scenario)
    assert first in (1, 2)  # the request before may be done already
    assert (second, after) == (1, 0)


def test_what_a_call_raises(fake, caplog):
    def refuse():
        raise RequestError("no such thing", "input")

    async def scenario(worker):
        with pytest.raises(RequestError, match="no such thing"):
            await worker.call(refuse)
        with pytest.raises(EngineFailedError) as error:
            await worker.call(lambda: 1 / 0)
        assert "zero" not in str(error.value)
        assert worker.unfinished == 0
        worker.stop()
        with pytest.raises(StoppingError):
            await worker.call(lambda: 1)

    drive(fake(), scenario)
    assert "ZeroDivisionError" in caplog.text


def test_a_cancelled_call_is_not_made(fake):
    engine = fake()
    engine.gate.clear()
    made = []

    async def scenario(worker):
        first = await worker.submit([request("first")])
        waiting = asyncio.create_task(worker.call(lambda: made.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        engine.gate.set()
        await read(first)
        await worker.call(lambda: made.append(2))
        return worker.unfinished

    assert drive(engine, scenario) == 0
    assert made == [2]


def test_a_model_without_an_engine_refuses_to_generate():
    async def scenario(worker):
        with pytest.raises(RequestError, match="this model generates no text: ask for embeddings") as error:
            await worker.submit([request("one")])
        assert error.value.param == "model"
        assert Idle().step() == []
        return await worker.call(lambda: 7)

    assert drive(Idle(), scenario) == 7


def test_a_watch_hears_of_every_step_and_of_what_is_given_up(fake):
    heard = []

    class Ear:
        def stepped(self, chunks, stats):
            heard.append((len(chunks), stats.running))

        def dropped(self, request_ids):
            heard.append(list(request_ids))

    engine = fake(lambda r: "abc" if r.id != "left" else "x" * 10**7)

    async def scenario(worker):
        await read(await worker.submit([request("a")]))
        (await worker.submit([request("left", 10**7)])).close()
        await worker.call(lambda: None)

    drive(engine, scenario, watch=Ear())
    assert heard[:3] == [(1, 1), (1, 1), (1, 0)]
    assert ["left"] in heard
