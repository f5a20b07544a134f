"""The documentation is true: links lead somewhere, commands parse, examples run, the two languages say the same."""

import contextlib
import itertools
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F
import uvicorn

import athanor
from athanor import cli
from athanor.align.outcome import Outcome
from athanor.core import plugins
from athanor.core.errors import NoTargetsError
from athanor.evals import lessons, skill
from athanor.models import io as models
from athanor.report.data import validate
from athanor.serve.app import create_app
from athanor.train import plan as planning
from athanor.types import IGNORE, Batch, Message
from tests.test_families import byte_level, made

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "athanor"
README, README_ZH, CONTRIBUTING = ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md"
LIFE, LIFE_ZH = ROOT / "docs" / "life.md", ROOT / "docs" / "life.zh-CN.md"
MODELS, MODELS_ZH = ROOT / "docs" / "models.md", ROOT / "docs" / "models.zh-CN.md"
DOCS = ROOT / "docs"
PAIRS = [
    (README, README_ZH), (LIFE, LIFE_ZH), (MODELS, MODELS_ZH),
    *((DOCS / f"{name}.md", DOCS / f"{name}.zh-CN.md") for name in ("training", "support", "serving")),
]  # fmt: skip
# Decisions and the log are records: what they name may be gone, but their links must work.
RECORDS = [ROOT / "docs" / "log.md", *sorted((ROOT / "docs" / "adr").glob("*.md"))]
LIVING = [README, README_ZH, CONTRIBUTING, *(p for p in sorted((ROOT / "docs").glob("*.md")) if p not in RECORDS)]


def by_name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """(language, code) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page):
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(page):
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def headings(page):
    return re.findall(r"^(#+) (.+)$", prose(page), re.M)


def anchors(page):
    """What GitHub makes of the headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(page)}


def rows(page):
    """Cells of each table row, without blanks around them."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", prose(page), re.M)]


def contributed():
    """{path: code} of the files that CONTRIBUTING.md shows whole."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    return dict(re.findall(r"`([\w/]+\.py)`[^`\n]*:\n\n```python\n(.*?)^```$", text, re.M | re.S))


# Links and names.


@pytest.mark.parametrize("page", [*LIVING, *RECORDS, ROOT / "CHANGELOG.md"], ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{target}: {path or page.name} has no such heading"


@pytest.mark.parametrize("page", LIVING, ids=by_name)
def test_files_that_are_named_exist(page):
    for span in spans(page):
        if re.fullmatch(r"[\w./-]+\.(py|md|svg|toml)|Makefile|\.ci/run", span):
            assert (ROOT / span).exists() or (SOURCE / span).exists() or span in contributed(), span


@pytest.mark.parametrize("page", [README, README_ZH], ids=by_name)
def test_the_map_shows_every_room_and_no_other(page):
    shown = [span for span in spans(page) if re.fullmatch(r"\w+/", span)]
    rooms = [f"{path.parent.name}/" for path in SOURCE.glob("*/__init__.py")]
    assert sorted(shown) == sorted(rooms)


# Commands and options.


def commands(page):
    """Command lines of code blocks and of inline code, as words, beginning with `athanor` or `make`."""
    lines = [line for language, code in blocks(page) if language == "bash" for line in re.sub(r"\\\n", " ", code).splitlines()]
    found = []
    for line in [*lines, *spans(page)]:
        words = shlex.split(line, comments=True) if "<" not in line else []
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] in ("athanor", "make"):
            found.append(" ".join(map(shlex.quote, words)))
    return found


def parses(words, capsys):
    """Whether `athanor` takes these words: everything is read and checked, nothing is run. Capital letters stand for values."""
    if not words or (len(words) == 1 and words[0] in cli._commands()):
        return True  # the name alone
    status = cli.main([*(re.sub(r"^[A-Z]+$", "1", word) for word in words), "--print-config"])
    assert status == 0, capsys.readouterr().err
    return True


@pytest.mark.parametrize(
    "line", sorted({line for page in LIVING for line in commands(page)}), ids=lambda line: line.replace("/", "|")
)
def test_commands_are_understood(line, capsys):
    program, *words = shlex.split(line)
    if program == "athanor":
        assert parses(words, capsys)
        return
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    for word in words:
        name, assigned, value = word.partition("=")
        assert name in (("ARGS", "PYTHON", "TORCH") if assigned else phony), word
        assert name != "ARGS" or parses(["run", *shlex.split(value)], capsys)


@cache
def options(command):
    """{option: its default} of a command."""
    recipe = cli._load(cli._commands()[command][0])
    return {"--" + ".".join(o.path).replace("_", "-"): o.default for o in cli._options(recipe.Config)}


@pytest.mark.parametrize("page", LIVING, ids=by_name)
def test_options_that_are_named_exist(page):
    known = {option for command in cli._commands() for option in options(command)} | {"--config", "--print-config", "--help"}
    for span in spans(page):
        if span.startswith("--"):
            option = span.split()[0]
            # Fields of a table, such as --options.rate, are those of what the table is for.
            assert option in known or option.partition(".")[0] in known, span


@pytest.mark.parametrize("page", [LIFE, LIFE_ZH], ids=by_name)
def test_defaults_are_those_of_the_commands(page):
    shown = [(*cells[0].strip("`").split(" "), cells[1]) for cells in rows(page) if re.match(r"`\w+ --", cells[0])]
    assert len(shown) == 10
    for command, option, default in shown:
        assert str(options(command)[option]) == default, option


@pytest.mark.parametrize("page", [LIFE, LIFE_ZH], ids=by_name)
def test_the_plans_constants_are_those_of_the_planner(page, monkeypatch):
    constants = {cells[0].strip("`"): cells[1] for cells in rows(page) if re.fullmatch("`[A-Z_]+`", cells[0])}
    assert len(constants) == 8
    assert constants == {name: str(getattr(planning, name)) for name in constants}
    monkeypatch.setattr(planning, "speed", lambda *args: 20_000.0)
    short, usual = (planning.make(minutes, torch.device("cpu")) for minutes in (1, 10))
    plan_fields = [cells for cells in rows(page) if cells[0].strip("`") in {f.name for f in fields(planning.Plan)}]
    assert len(plan_fields) == 5
    for name, *values in plan_fields:
        assert values == [str(getattr(plan, name.strip("`"))) for plan in (short, usual)], name


@pytest.mark.parametrize("page", [LIFE, LIFE_ZH], ids=by_name)
def test_every_skill_is_told(page):
    assert set(skill.names()) <= set(spans(page))


@pytest.mark.parametrize("page", [LIFE, LIFE_ZH], ids=by_name)
def test_the_report_shown_fits_the_schema(page):
    (shown,) = [json.loads(code) for language, code in blocks(page) if language == "json"]
    validate(shown)


# Two languages.


@pytest.mark.parametrize(("page", "other"), PAIRS, ids=["README", "life", "models", "training", "support", "serving"])
def test_both_languages_have_the_same_sections_code_and_tables(page, other):
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(other)]
    assert blocks(page) == blocks(other)
    assert [len(cells) for cells in rows(page)] == [len(cells) for cells in rows(other)]
    assert set(spans(page)) == set(spans(other))

    def links(p):
        outside = [t for t in re.findall(r"\]\(([^)\s#]+)", prose(p)) if not t.endswith(p.name)]
        return sorted(t.replace(".zh-CN", "") for t in outside)

    assert links(page) == links(other)


# Examples.


@pytest.fixture
def first(tmp_path, monkeypatch, lm):
    """A working folder with a run `runs/first`, of a tiny model."""
    for name in ("base", "rl"):
        lm.save(tmp_path / "runs" / "first" / name)
    monkeypatch.chdir(tmp_path)
    return athanor.load("runs/first")


def python(page, word):
    (code,) = [code for language, code in blocks(page) if language == "python" and word in code]
    return code


def test_the_python_example_of_the_readme(first, capsys):
    names = {}
    exec(python(README, 'load("runs/first")'), names)
    assert names["lm"].path == first.path
    assert names["logits"].shape[0] == 1 and names["logits"].dtype == torch.float32
    assert capsys.readouterr().out
    exec(python(README, "from transformers"), names)
    ids = [names["lm"].tokenizer.encode("import os")]
    torch.testing.assert_close(names["model"](torch.tensor(ids)).logits, names["logits"], atol=1e-4, rtol=0)
    assert names["tokenizer"].encode("import os") == ids[0]
    made(("qwen3", "tiny"), Path("runs", "qwen"), byte_level)
    exec(python(README, "runs/qwen"), names)
    assert names["vectors"].shape == (2, 32)


@contextlib.contextmanager
def serving(app):
    """The address of a running server."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(100)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"


def test_the_server_examples_of_the_readme(first, capsys):
    (curl,) = [code for language, code in blocks(README) if code.startswith("curl")]
    _, url, *arguments = shlex.split(curl.replace("\\\n", " "))
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    written = "http://127.0.0.1:8000"
    with serving(create_app(first.engine(), first.tokenizer, first.name)) as address:
        headers = dict([given["-H"].split(": ")])
        answer = httpx.post(url.replace(written, address), headers=headers, content=given["-d"], timeout=60)
        assert answer.status_code == 200, answer.text
        asked = json.loads(given["-d"])
        assert answer.json()["choices"][0]["message"]["content"] == first.generate(asked["messages"], temperature=0.0)
        code = python(README, "import OpenAI")
        names = {}
        exec(code.replace(written, address), names)
        names["client"].close()
    question = re.search(r'"content": "(.+)"', code)[1]
    assert capsys.readouterr().out == first.generate([{"role": "user", "content": question}], temperature=0.0)


def test_the_examples_of_the_page_on_models(tmp_path, monkeypatch, capsys):
    made(("gpt2", "tiny"), tmp_path / "runs" / "gpt2", byte_level)
    monkeypatch.chdir(tmp_path)
    names = {}
    for word in ("import athanor\n", "import attach"):
        exec(python(MODELS, word), names)
    assert names["vectors"].shape == (2, 32) and names["logits"].shape[2] == 320 and names["count"] == 1
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", [MODELS, MODELS_ZH], ids=by_name)
def test_every_family_is_in_the_table(page):
    shown = [cells for cells in rows(page) if cells[0].strip("`") in plugins.names("models")]
    assert {cells[0].strip("`") for cells in shown} == set(plugins.names("models"))
    for family, _, types, _ in shown:
        module = plugins.load("models", family.strip("`"))
        told = {t.strip() for t in types.split(",")}
        assert told >= set(getattr(module, "MODEL_TYPES", ())) and all(models.architecture(t) is module for t in told), family


# Files of CONTRIBUTING.md.


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of plugins with the files of CONTRIBUTING.md."""
    for path, code in contributed().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
    monkeypatch.setenv("ATHANOR_PLUGINS", str(tmp_path))
    yield tmp_path
    skill.skill.cache_clear()
    for name in [n for n in sys.modules if n.startswith("athanor_plugins.")]:
        del sys.modules[name]


def test_there_is_one_file_for_each_kind():
    assert [str(Path(path).parent) for path in contributed()] == ["evals/tasks", "align/rewards", "objectives", "models"]


def test_they_are_written_as_the_house_writes(mine):
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", ROOT / "pyproject.toml", mine]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_skill_draws_examples_and_scores(mine, tokenizer):
    assert "split_sum" in skill.names()
    examples = skill.heldout(["add", "split_sum"], 600, 0)
    own = [e for e in examples if e.skill == "split_sum"]
    assert len({e.problem.key for e in own}) == 300
    assert {e.language for e in own} == {"en", "zh"}
    trained = {e.problem.key for e in itertools.islice(skill.examples(["split_sum"], "train", 0), 3000)}
    assert not trained & {e.problem.key for e in own}
    for example in own:
        question, answer = example.conversation
        n = int(re.search(r"\d+", question.content)[0])
        a, b, difference = map(int, re.fullmatch(r"(\d+)-(\d+)=(\d+)", answer.reasoning).groups())
        assert (a, a - b) == (n, difference)
        assert skill.score(example, answer) == 1
        right, wrong = (f"2+{n - 2}", f" {n - 50} + 50 "), (f"{n}+0", str(n), f"{n}+1", f"1+1+{n - 2}", "", "1" * 5000 + "+1")
        assert [skill.score(example, Message("assistant", text)) for text in right] == [1, 1]
        assert [skill.score(example, Message("assistant", text)) for text in wrong] == [0] * 6
    assert lessons.batch(tokenizer, ["split_sum"], "chat", 0, 500).ids.numel() > 100


def test_the_reward_is_what_its_docstring_says(mine):
    assert "brief" in plugins.names("align.rewards")
    reward = plugins.require("align.rewards", "brief", "reward").reward
    assert [reward(Outcome(1.0, True, True, tokens)) for tokens in (1, 16, 32, 48, 96)] == [1, 1, 0.5, 0, 0]
    assert reward(Outcome(0.5, True, True, 32)) == 0.25


def test_the_objective_is_its_formula_over_separate_sequences(mine, tiny):
    loss = plugins.require("objectives", "focal", "loss").loss
    model = tiny()
    torch.manual_seed(0)
    lengths = torch.tensor([5, 9, 7])
    ids = torch.randint(0, model.config.vocab_size, (int(lengths.sum()),))
    labels = torch.randint(0, model.config.vocab_size, ids.shape)
    labels[::3] = IGNORE

    def plain():
        logits = torch.cat([model(part.unsqueeze(0)).squeeze(0) for part in ids.split(lengths.tolist())])
        logprobs = F.log_softmax(logits.float(), -1)[labels != IGNORE].gather(1, labels[labels != IGNORE, None])
        return -((1 - logprobs.exp()) ** 2 * logprobs).sum(), logprobs.exp().sum()

    total, count, metrics = loss(model, Batch(ids, labels, lengths, origin="test"))
    expected, confidence = plain()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(metrics["confidence"], confidence)
    assert count == int((labels != IGNORE).sum())
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(NoTargetsError, match="batch 'test': all 21 labels are masked"):
        loss(model, Batch(ids, torch.full_like(labels, IGNORE), lengths, origin="test"))
