"""`athanor chat`: piped, one-shot and on a terminal."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import athanor
from athanor.core.errors import RequestError
from athanor.recipes import chat
from athanor.serve.terminal import Screen, interrupts, lines
from athanor.types import Completion


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def thinker(fake):
    """An engine that thinks the first half of what it says."""

    class Thinker(fake):
        def step(self):
            chunks = super().step()
            for chunk in chunks:
                c = chunk.completion
                if c is None:
                    chunk.content, chunk.reasoning = "", chunk.content
                else:
                    chunk.completion = Completion(c.request_id, c.prompt_ids, c.ids, c.logprobs, c.text[-1:], c.text[:-1], "stop")
            return chunks

    return Thinker


@pytest.fixture
def talk(tokenizer, monkeypatch):
    """Run the recipe over an engine with given standard streams; gives exit status, output and errors."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def run(engine, stdin="", stdout=io.StringIO, stderr=io.StringIO, **options):
        def load(path, checkpoint):
            assert (path, checkpoint) == (Path("runs/first"), options.get("checkpoint"))
            return SimpleNamespace(name="first/rl", tokenizer=tokenizer, engine=lambda max_batch: engine)

        monkeypatch.setattr(athanor, "load", load)
        streams = (io.StringIO(stdin) if isinstance(stdin, str) else stdin), stdout(), stderr()
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        status = chat.main(chat.Config(Path("runs/first"), **options))
        return status, streams[1].getvalue(), streams[2].getvalue()

    return run


def test_one_shot(fake, talk):
    engine = fake(lambda r: "42")
    status, out, err = talk(
        engine,
        prompt="/help me",
        checkpoint="int8",
        system="Be brief.",
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=4,
        max_tokens=7,
    )
    assert (status, out) == (0, "42\n")
    assert err.startswith("[2 tokens, ")
    assert err.endswith(" tokens/s]\n")
    params = engine.seen[0].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 3, 4, 7)


def test_one_shot_that_does_not_fit_is_an_error(fake, talk):
    with pytest.raises(RequestError, match="the message make"):
        talk(fake(max_len=10), prompt="long " * 50)


def test_piped_lines_are_prompts_and_output_has_the_answers_alone(thinker, talk):
    engine = thinker(lambda r: f"hm{len(engine.seen)}")
    status, out, err = talk(engine, "first\n\n  second\n/reset\nfirst")
    assert (status, out) == (0, "1\n2\n3\n")
    assert "\x1b" not in out + err
    assert [line for line in err.splitlines() if not line.startswith("[")] == ["hm", "hm", "hm"]
    assert engine.seen[2].prompt_ids == engine.seen[0].prompt_ids
    assert len(engine.seen[1].prompt_ids) > len(engine.seen[0].prompt_ids)
    assert engine.seen[0].params.seed != engine.seen[1].params.seed


def test_on_a_terminal_reasoning_is_dim_and_the_answer_is_not(thinker, talk):
    status, out, err = talk(thinker(lambda r: "hm!"), "hi", stdout=Terminal)
    assert (status, err) == (0, "")
    assert out.startswith("\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m\x1b[2m\n\x1b[0m!\n\x1b[2m[3 tokens")


def test_colours_can_be_turned_off(thinker, talk, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in talk(thinker(lambda r: "hm!"), "hi", stdout=Terminal)[1]


def test_an_answer_cannot_command_the_terminal(fake, talk):
    evil = "a\x1b[2J\r\x9b\x7f\tb\n"
    assert "a␛[2J␍\ufffd␡\tb\n" in talk(fake(lambda r: evil), "hi", stdout=Terminal)[1]
    assert talk(fake(lambda r: evil), "hi")[1] == evil + "\n"


def test_system_and_params(fake, talk, tokenizer):
    engine = fake()
    status, _, err = talk(
        engine,
        "one\n/system Be brief.\n/params temperature=0 top_k=5\ntwo\n/system\n/params top_k=\nthree\n/params",
        temperature=1.5,
    )
    assert status == 0
    assert "Be brief." in tokenizer.decode(engine.seen[1].prompt_ids)
    assert "one" not in tokenizer.decode(engine.seen[1].prompt_ids)
    assert "Be brief." not in tokenizer.decode(engine.seen[2].prompt_ids)
    assert [(r.params.temperature, r.params.top_k) for r in engine.seen] == [(1.5, 0), (0.0, 5), (0.0, 0)]
    assert err.splitlines()[-1] == "temperature=0.0 top_p=1.0 top_k=0 max_tokens=auto seed=auto"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlp", "no command '/hlp'; did you mean '/help'?; there are /reset, /system, /params, /help, /quit"),
        ("/params temprature=1", "no parameter 'temprature'; did you mean 'temperature'?; there are temperature, top_p"),
        ("/params top_k=many", "top_k is 'many', but must be a number (int)"),
        ("x" * 2000, "the message make"),
    ],
)
def test_what_cannot_be_understood_is_said_and_the_next_line_is_read(fake, talk, line, message):
    status, out, err = talk(fake(), f"{line}\nhi")
    assert message in err
    assert (status, out) == (1, "hello\n")
    assert talk(fake(), Terminal(f"{line}\nhi"))[0] == 0  # who sees the message needs no exit status


def test_help_and_quit(fake, talk):
    status, out, err = talk(fake(), "/help\n/quit\nhi")
    assert (status, out, err) == (0, "", chat.HELP + "\n")
    assert all(command in chat.HELP for command in chat.COMMANDS)


def test_turns_that_are_dropped_are_told(fake, talk):
    engine = fake(max_len=60)
    _, out, err = talk(engine, "one\ntwo\nthree\nfour\nfive\n")
    assert out == "hello\n" * 5
    assert "[the context is full: the oldest 2 messages are forgotten]\n" in err


def test_an_answer_that_was_cut_says_so(fake, talk):
    assert "cut: that was the limit]" in talk(fake(), "hi", max_tokens=2)[2]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(fake, talk):
    def script(request):
        engine.fail_add.clear()
        return "x" * 500

    engine = fake(script)
    step = engine.step

    def step_and_press():
        if len(engine.seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    engine.step = step_and_press
    before = signal.getsignal(signal.SIGINT)
    status, out, err = talk(engine, "one\ntwo")
    assert status == 0
    assert out.splitlines() == ["x", "x" * 500]
    assert err.splitlines()[0] == "[stopped]"
    assert signal.getsignal(signal.SIGINT) is before
    assert talk(_pressing(fake()), prompt="one")[0] == 130


def _pressing(engine):
    step = engine.step
    engine.step = lambda: (os.kill(os.getpid(), signal.SIGINT), step())[1]
    return engine


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), interrupts() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)


def test_typing(monkeypatch):
    """At the prompt Ctrl-C gives a new line and Ctrl-D leaves."""
    screen = Screen(Terminal(), io.StringIO())
    monkeypatch.setattr(sys, "stdout", Terminal())
    typed = iter([" one ", KeyboardInterrupt(), "two", EOFError()])

    def read(prompt):
        assert prompt == "> "
        if isinstance(item := next(typed), BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    assert list(lines(Terminal(), screen)) == ["one", "two"]


def test_ctrl_c_at_a_pipe_interrupts():
    class Pipe(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(lines(Pipe(), Screen(io.StringIO(), io.StringIO())))


def test_typed_lines_with_the_answers_going_to_a_file(fake, talk):
    assert talk(fake(), Terminal("hi\n"))[1] == "hello\n"


def test_input_that_is_not_utf8():
    source = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    with pytest.raises(RequestError, match=r"standard input is not UTF-8 .*convert it first"):
        list(lines(source, Screen(io.StringIO(), io.StringIO())))
