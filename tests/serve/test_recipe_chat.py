"""`athanor chat`: piped, one-shot and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import athanor
from athanor.core.errors import RequestError
from athanor.recipes import chat
from athanor.serve.dialogue import Parameters
from athanor.serve.terminal import Entry, Screen, entries, history_file, interrupts
from athanor.tokenizer.chat import render
from athanor.types import Message


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def thinker(fake):
    """An engine that thinks the first half of what it says."""

    class Thinker(fake):
        def step(self):
            return [self.thought(chunk) for chunk in super().step()]

        @staticmethod
        def thought(chunk):
            c = chunk.completion
            if c is None:
                return replace(chunk, content="", reasoning=chunk.content)
            return replace(chunk, completion=replace(c, text=c.text[-1:], reasoning=c.text[:-1]))

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
    assert err.splitlines()[-1] == (
        "temperature=0.0 top_p=1.0 top_k=0 min_p=0.0 max_tokens=auto min_tokens=0 seed=auto repetition_penalty=1.0"
        " presence_penalty=0.0 frequency_penalty=0.0 stop=''"
    )


def test_every_parameter_reaches_the_engine(fake, talk):
    engine = fake()
    changed = {
        "temperature": 0.5, "top_p": 0.6, "top_k": 7, "min_p": 0.1, "max_tokens": 8, "min_tokens": 2, "seed": 9,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
    }  # fmt: skip
    words = " ".join(f"{name}={value}" for name, value in changed.items())
    assert talk(engine, f'/params {words} stop="the end"\none\n/params max_tokens= seed= stop=\ntwo')[0] == 0
    first, second = (request.params for request in engine.seen)
    assert {name: getattr(first, name) for name in changed} == changed
    assert (first.stop, second.stop) == (("the end",), ())
    assert second.max_tokens > 100
    assert second.seed != 9
    assert set(changed) | {"stop"} == set(Parameters().values())


@pytest.mark.parametrize("words", ["top_k=3 colour=1", "top_k=3 seed=x", 'top_k=3 stop="x'])
def test_a_line_of_parameters_counts_as_a_whole_or_not_at_all(words):
    params = Parameters(top_k=5)
    with pytest.raises(RequestError):
        params.set(words)
    assert params.values()["top_k"] == 5


def test_lines_that_go_on(fake, talk, tokenizer):
    engine = fake()
    said = 'one\\\n  two \\\nthree\n"""\n  def f():\n\n    pass\n"""\n"""/quit"""\n"""a\nb""" \nlast\\\n'
    assert talk(engine, said)[0] == 0
    expected = ["one\n  two\nthree", "  def f():\n\n    pass", "/quit", "a\nb", "last"]
    messages = []
    assert len(engine.seen) == len(expected)
    for request, text in zip(engine.seen, expected, strict=True):
        messages.append(Message("user", text))
        assert request.prompt_ids == render(tokenizer, messages, generation_prompt=True).ids
        messages.append(Message("assistant", "hello"))


def test_quotes_without_an_end_are_an_error(fake, talk):
    with pytest.raises(RequestError, match='a text that begins with """ has no end: put """ after its last line'):
        talk(fake(), 'one\n"""two\nthree\n')


def test_save_and_load(thinker, talk, tmp_path, tokenizer):
    path = tmp_path / "kept" / "talk.json"
    engine = thinker(lambda r: "hm四2")
    said = f"/system Be brief.\n/params temperature=0.25 seed=3\none\ntwo\n/save {path}\n"
    status, _, err = talk(engine, said)
    assert (status, err.splitlines()[-1]) == (0, f"[5 messages in {path}]")
    kept = json.loads(path.read_text("utf-8"))
    assert kept["model"] == "first/rl"
    assert kept["parameters"]["temperature"] == 0.25
    assert [m["role"] for m in kept["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert kept["messages"][2] == {"role": "assistant", "content": "2", "reasoning_content": "hm四"}

    again = thinker(lambda r: "hm四2")
    status, _, err = talk(again, f"/load {path}\nthree")
    assert (status, err.splitlines()[0]) == (0, "[5 messages]")
    assert (again.seen[0].params.temperature, again.seen[0].params.seed) == (0.25, 3)
    assert talk(engine, said + "three")[0] == 0
    assert again.seen[0].prompt_ids == engine.seen[-1].prompt_ids

    path.write_text(json.dumps({"messages": kept["messages"], "model": "other"}))
    assert talk(thinker(), f"/load {path}")[2] == "[5 messages, of other]\n"
    empty = tmp_path / "empty.json"
    assert talk(thinker(), f"/save {empty}\n/load {empty}")[2] == f"[0 messages in {empty}]\n[0 messages]\n"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "holds no conversation: it needs 'messages', as /save writes them"),
        ({"parameters": {}}, "holds no conversation"),
        ({"messages": [], "parameters": 1}, "holds no conversation"),
        ({"messages": "hello"}, "messages must be a list of messages"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "the last of the messages is a question: add its answer, or leave it out",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "messages[0].role is 'assistant', but 'user' comes next: correct it",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "a"}]},
            "messages[1].role is 'system', but 'user' comes next",
        ),
        ({"messages": [], "parameters": {"colour": 1}}, "no parameter 'colour'"),
        ({"messages": [], "parameters": {"top_k": None}}, "top_k is 'None', but must be a number (int)"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(fake, talk, tmp_path, found, message):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(found))
    engine = fake()
    status, _, err = talk(engine, f"one\n/load {path}\ntwo")
    assert status == 1
    assert message in err
    if "parameters" not in found:
        assert len(engine.seen[1].prompt_ids) > len(engine.seen[0].prompt_ids)


def test_files_that_cannot_be_read_or_written(fake, talk, tmp_path):
    (tmp_path / "file").write_text("{")
    status, out, err = talk(fake(), f"/load {tmp_path}/none\n/load {tmp_path}/file\n/save {tmp_path}/file/x\n/save\n/load \nhi")
    assert (status, out) == (1, "hello\n")
    lines = err.splitlines()
    assert "none cannot be read" in lines[0] and "file is not JSON" in lines[1] and "File exists" in lines[2]
    assert lines[3:5] == ["/save needs a file: /save talk.json", "/load needs a file: /load talk.json"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlp", "no command '/hlp'; did you mean '/help'?; there are /reset, /system, /params, /save, /load, /help"),
        ("/params temprature=1", "no parameter 'temprature'; did you mean 'temperature'?; there are temperature, top_p"),
        ("/params top_k=many", "top_k is 'many', but must be a number (int)"),
        ("x" * 2000, "the message make"),
    ],
)
def test_what_cannot_be_understood_is_said_and_the_next_line_is_read(fake, talk, home, line, message):
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


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_typing(monkeypatch, home):
    """At the prompt Ctrl-C gives a new line, also in the middle of a text, and Ctrl-D leaves."""
    screen = Screen(Terminal(), io.StringIO())
    monkeypatch.setattr(sys, "stdout", Terminal())
    typed = iter([" one ", KeyboardInterrupt(), '"""', KeyboardInterrupt(), "two\\", "three", EOFError()])
    prompts = []

    def read(prompt):
        prompts.append(prompt)
        if isinstance(item := next(typed), BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    assert list(entries(Terminal(), screen)) == [Entry("one", False), Entry("two\nthree", False)]
    assert prompts == ["> ", "> ", "> ", "… ", "> ", "… ", "> "]


PROGRAM = """
import sys
from athanor.serve.terminal import Screen, entries
for entry in entries(sys.stdin, Screen(sys.stdout, sys.stderr), ("/reset", "/save", "/system")):
    print("got", ascii(entry.text), flush=True)
"""


class Typist:
    """PROGRAM on a terminal of its own."""

    def __init__(self, home):
        self.fd, own = pty.openpty()
        env = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=own, stdout=own, stderr=own, env=env)
        os.close(own)
        self.seen = b""
        self.wait(b"> ")

    def wait(self, text):
        while text not in self.seen:
            assert select.select([self.fd], [], [], 60)[0], f"{text} never came after {self.seen}"
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys, answer):
        os.write(self.fd, keys)
        self.wait(answer)
        self.wait(b"> ")

    def leave(self):
        os.write(self.fd, b"\x04")
        assert self.process.wait(60) == 0
        os.close(self.fd)


def test_a_real_terminal_edits_completes_and_remembers(home):
    pytest.importorskip("readline")
    first = Typist(home)
    first.type(b"hello wrld\x1b[D\x1b[D\x1b[Do\r", b"got 'hello world'")  # the cursor moves
    first.type(b"/sy\tBe brief.\r", b"got '/system Be brief.'")
    first.type(b"\x1b[A\x1b[A!\r", b"got 'hello world!'")
    first.leave()
    assert history_file() == home / "athanor" / "chat_history"
    assert history_file().stat().st_mode & 0o77 == 0  # nobody else's to read
    second = Typist(home)
    second.type(b"\x1b[A\r", b"got 'hello world!'")  # from the chat before
    second.leave()


def test_a_home_that_cannot_be_written_is_no_error(home):
    (home / "athanor").write_text("a file")
    typist = Typist(home)
    typist.type(b"hello\r", b"got 'hello'")
    typist.leave()


def test_ctrl_c_at_a_pipe_interrupts():
    class Pipe(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(entries(Pipe(), Screen(io.StringIO(), io.StringIO())))


def test_typed_lines_with_the_answers_going_to_a_file(fake, talk, home):
    assert talk(fake(), Terminal("hi\n"))[1] == "hello\n"


def test_input_that_is_not_utf8():
    source = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    with pytest.raises(RequestError, match=r"standard input is not UTF-8 .*convert it first"):
        list(entries(source, Screen(io.StringIO(), io.StringIO())))
