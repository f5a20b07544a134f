"""Feedback: what is kept, what is refused, and which pairs come of it."""

from __future__ import annotations

import json
import sqlite3
import threading

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from athanor import cli
from athanor.core.errors import CheckpointError, RequestError
from athanor.serve import feedback, guard
from athanor.serve.body import read
from athanor.serve.feedback import Opinion, Row, Store, pair
from athanor.tokenizer.chat import messages_from, render
from athanor.types import Message, Pair
from tests.serve.talker import Talker

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 30 = ?"}]


def opinion(request_id="req-1", **fields):
    base = {"model": "first/rl", "messages": QUESTION, "parameters": {"temperature": 0.5, "seed": 3}, "answer": "42"}
    return {"request_id": request_id, **base, "finish_reason": "stop", "rating": "up", **fields}


@pytest.fixture
def http(tmp_path):
    app = Talker().app
    feedback.install(app, tmp_path / feedback.FILE)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / feedback.FILE)


def test_an_opinion_is_kept_whole(http, store):
    sent = opinion(note="Right.", reasoning="12 and 30", answer="四十二 42\n")
    assert http.post("/feedback", json=sent).json() == {"request_id": "req-1", "rating": "up", "note": "Right."}
    (row,) = store.rows()
    assert (row.model, row.answer, row.reasoning, row.finish_reason) == ("first/rl", "四十二 42\n", "12 and 30", "stop")
    assert (row.rating, row.note) == ("up", "Right.")
    assert json.loads(row.messages) == QUESTION
    assert json.loads(row.parameters) == {"temperature": 0.5, "seed": 3}
    assert row.time.endswith("+00:00")


def test_a_second_opinion_replaces_the_first_and_can_be_taken_back(http, store):
    for rating, note in (("up", ""), ("down", "wrong"), (None, "")):
        assert http.post("/feedback", json=opinion(rating=rating, note=note)).status_code == 200
        (row,) = store.rows()
        assert (row.rating, row.note) == (rating, note)


def test_the_id_of_another_answer_is_refused(http, store):
    http.post("/feedback", json=opinion())
    refused = http.post("/feedback", json=opinion(answer="43"))
    assert refused.status_code == 400
    message = "request_id ('req-1') is that of another answer: send the id of this one"
    assert (refused.json()["error"]["message"], refused.json()["error"]["param"]) == (message, "request_id")
    assert [row.answer for row in store.rows()] == ["42"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rating": "good"}, "'rating' is 'good': input should be 'up' or 'down'"),
        ({"finish_reason": "tired"}, "'finish_reason' is 'tired': input should be 'stop', 'length' or 'abort'"),
        ({"note": "x" * 4001}, "'note' is 'xxx"),
        ({"messages": []}, "'messages' is []: list should have at least 1 item after validation, not 0"),
        ({"messages": [{"role": "boss", "content": ""}]}, "'messages[0].role' is 'boss': input should be 'system', 'user' or"),
        ({"colour": 1}, "unknown field 'colour': correct it or leave it out"),
        ({"notes": ""}, "unknown field 'notes'; did you mean 'note'?"),
        ({"answer": None}, "'answer' is missing: it is required"),
        ({"parameters": {"x": [1]}}, "'parameters.x"),
        ({"request_id": ""}, "'request_id' is '': string should have at least 1 character"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(http, tmp_path, fields, message):
    refused = http.post("/feedback", json=opinion(**fields))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(message)
    assert not (tmp_path / feedback.FILE).exists()


def test_the_guard_holds_here_too(http):
    assert http.post("/feedback", content=b"{}").status_code == 415
    assert http.post("/feedback", json=opinion(answer="x" * guard.MAX_BODY)).status_code == 413
    assert http.post("/feedback", content=b"[", headers={"content-type": "application/json"}).status_code == 400
    assert http.get("/feedback").status_code == 405


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_body_raises_anything_but_a_request_error(value):
    with pytest.raises(RequestError, match=r"^the body|^'.*' is missing|^unknown field"):
        read(json.dumps(value).encode(), Opinion)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(RequestError, match="the body is not JSON"):
        read(b'{"request_id": "\\ud800"}', Opinion)


def test_a_full_file_is_said_and_takes_no_more(tmp_path):
    store = Store(tmp_path / feedback.FILE, max_bytes=64 * 1024)
    with pytest.raises(guard.ApiError, match=r"no room for more feedback \(the file may have 65,536 bytes") as error:
        for i in range(1000):
            store.put(Opinion.model_validate(opinion(f"req-{i}", answer="x" * 2000)))
    assert error.value.status == 507
    assert 10 < len(store.rows()) == i
    assert store.path.stat().st_size <= 64 * 1024
    assert len(Store(store.path).rows()) == i


def test_a_folder_that_cannot_be_written_is_a_500_that_leaks_nothing(tmp_path):
    app = Talker().app
    feedback.install(app, tmp_path / "gone" / feedback.FILE)
    refused = TestClient(app, raise_server_exceptions=False).post("/feedback", json=opinion())
    assert refused.status_code == 500
    assert "gone" not in refused.text and "sqlite" not in refused.text


def test_many_threads_lose_nothing(store):
    def put(i):
        for j in range(10):
            store.put(Opinion.model_validate(opinion(f"req-{i}-{j}")))

    threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.rows()) == 40


def row(answer, rating, question="q", finish="stop", reasoning=None, request_id="r"):
    messages = json.dumps([{"role": "user", "content": question}])
    return Row(request_id, "2026-01-01T00:00:00+00:00", "m", messages, "{}", answer, reasoning, finish, rating, "")


def test_pairs_are_all_of_up_and_down_to_the_same_messages():
    found = pair([row("a", "up"), row("b", "down"), row("c", "down"), row("d", "up", "other"), row("e", "up", reasoning="hm")])
    prompt = (Message("user", "q"),)
    expected = [
        Pair(prompt, Message("assistant", good, thought), Message("assistant", bad))
        for good, thought in (("a", None), ("e", "hm"))
        for bad in "bc"
    ]
    assert found.pairs == expected
    assert +found.counts == {"paired": 4, "alone": 1}
    assert found.prompts == 1


def test_what_makes_no_pair_is_counted_by_its_reason():
    rows = [
        row("a", "up"),
        row("a", "up"),  # repeated
        row("b", "down", finish="length"),
        row("b", "down", finish=None),
        row("c", None),
        row("x", "up", "second"),
        row("x", "down", "second"),  # disputed
        row("y", "down", "second"),  # and so alone
    ]
    found = pair(rows)
    assert found.pairs == []
    assert +found.counts == {"alone": 2, "repeated": 1, "unfinished": 2, "unrated": 1, "disputed": 2}


_rows = st.builds(
    row, st.sampled_from("abc"), st.sampled_from(["up", "down", None]), st.sampled_from("pq"), st.sampled_from(["stop", "abort"])
)


@given(st.lists(_rows, max_size=30))
def test_every_answer_is_counted_once_and_pairs_are_what_was_said(rows):
    found = pair(rows)
    assert sum(found.counts.values()) == len(rows)
    said = {(r.messages, r.answer, r.rating) for r in rows if r.finish_reason == "stop"}
    expected = {
        (m, good, bad)
        for m, good, rating in said
        for n, bad, other in said
        if m == n and (rating, other) == ("up", "down") and (m, good, "down") not in said and (m, bad, "up") not in said
    }
    got = [
        (json.dumps([{"role": "user", "content": p.prompt[0].content}]), p.chosen.content, p.rejected.content)
        for p in found.pairs
    ]
    assert len(got) == len(set(got))
    assert set(got) == expected


@pytest.fixture
def go(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["feedback", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return run


def test_export_writes_pairs_that_render(go, http, tmp_path, tokenizer):
    for i, (answer, rating, question) in enumerate([("42", "up", 0), ("43", "down", 0), ("41", "down", 0), ("7", "up", 1)]):
        messages = [*QUESTION, {"role": "user", "content": "again"}][: 2 + question]
        thought = "12 and 30" if rating == "up" else None
        sent = opinion(f"r{i}", answer=answer, rating=rating, messages=messages, reasoning=thought)
        assert http.post("/feedback", json=sent).status_code == 200
    http.post("/feedback", json=opinion("cut", answer="4", rating="down", finish_reason="length"))
    status, out, err = go("export", tmp_path, "--out", "pairs.jsonl")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "pairs.jsonl: 2 pairs from 1 prompt",
        "5 answers: 3 paired, 1 alone (no answer to the same prompt is rated the other way),"
        " 1 unfinished (stopped, cut off or broken)",
    ]
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert [set(record) for record in records] == [{"prompt", "chosen", "rejected"}] * 2
    assert [(r["chosen"]["content"], r["rejected"]["content"]) for r in records] == [("42", "43"), ("42", "41")]
    assert records[0]["prompt"] == QUESTION
    assert records[0]["chosen"] == {"role": "assistant", "content": "42", "reasoning": "12 and 30"}
    assert records[0]["rejected"] == {"role": "assistant", "content": "43"}
    for record in records:
        prompt = messages_from(record["prompt"])
        for answer in ("chosen", "rejected"):
            whole = render(tokenizer, [*prompt, *messages_from([record[answer]])]).ids
            assert (
                whole[: len(render(tokenizer, prompt, generation_prompt=True).ids)]
                == render(tokenizer, prompt, generation_prompt=True).ids
            )


def test_show_lists_opinions(go, http, tmp_path):
    http.post("/feedback", json=opinion(answer="forty\x1b[2Jtwo", note="Right."))
    status, out, _ = go("show", tmp_path)
    assert status == 0
    assert "up" in out and "first/rl" in out and "Right." in out and "12 + 30 = ?" in out
    assert "\x1b[2J" not in out
    assert go("show", tmp_path / feedback.FILE)[1] == out


def test_errors_of_the_command(go, tmp_path, store):
    status, _, err = go("export", tmp_path)
    assert status == 1 and "no feedback in" in err and "rate answers first" in err
    store.put(Opinion.model_validate(opinion()))
    status, _, err = go("export", tmp_path)
    assert status == 1 and "out is missing: export writes the pairs to a file, such as --out pairs.jsonl" in err
    status, _, err = go("export", tmp_path, "--out", "x.jsonl")
    assert status == 1 and "no pair in 1 answer (1 alone" in err and not (tmp_path / "x.jsonl").exists()
    status, _, err = go("show", tmp_path, "--out", "x.jsonl")
    assert status == 1 and "out ('x.jsonl') is for export: leave it out" in err
    assert go("shout", tmp_path)[0] == 2


def test_a_file_that_is_no_feedback(tmp_path):
    path = tmp_path / feedback.FILE
    path.write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match="is no feedback that this version reads"):
        Store(path).rows()
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE feedback (x)").connection.close()
    with pytest.raises(CheckpointError, match=r"no such column.*restore a copy"):
        Store(path).rows()
