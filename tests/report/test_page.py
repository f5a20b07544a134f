from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from athanor.core.errors import CheckpointError
from athanor.report import page
from athanor.report.data import RUNGS

VOID = {"meta", "br", "wbr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "formaction", "background", "ping", "manifest"}


class Page(HTMLParser):
    """What the tests ask of a page: balanced tags, elements with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("th", "td", "p", "small", "li", "caption"):
            self.data.append((tag, " "))

    def handle_data(self, data: str) -> None:
        self.data.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        shown = "".join(data for tag, data in self.data if tag != "style")
        return re.sub(r"\s+", " ", shown.replace("\u202f", " "))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def section(source: str, name: str) -> str:
    """The text of one section."""
    (found,) = re.findall(rf'<section aria-labelledby="{name}">.*?\n</section>', source, re.DOTALL)
    return Page(found).text


def test_tags_are_balanced_and_ids_are_used_once(report: dict[str, Any]) -> None:
    found = Page(page.render(report))
    ids = Counter(attributes["id"] for _, attributes in found.elements if "id" in attributes)
    assert [name for name, times in ids.items() if times > 1] == []
    referred = {attributes["aria-labelledby"] for attributes in found.all("section")}
    referred |= {str(attributes["href"])[1:] for attributes in found.all("use")}
    referred |= {str(a["clip-path"])[5:-1] for _, a in found.elements if "clip-path" in a}
    assert referred <= set(ids)


def test_a_strict_html5_parser_accepts_it(report: dict[str, Any]) -> None:
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(page.render(report))  # raises ParseError


def test_it_loads_nothing(report: dict[str, Any]) -> None:
    source = page.render(report)
    found = Page(source)
    loaded = [v for _, attributes in found.elements for k, v in attributes.items() if k in LOADING and not str(v).startswith("#")]
    assert loaded == []
    assert {tag for tag, _ in found.elements}.isdisjoint(
        {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form"}
    )
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert set(re.findall(r"https?://[^\"'<> )]+", source)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)


NASTY = (
    "</style></p></details><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' {{ 7 * 7 }} {% raw %} &amp; 中文"
)


def test_every_text_of_the_report_is_escaped(report: dict[str, Any]) -> None:
    """A text placed wherever the schema has one arrives as that text, and the page has the elements it had before."""
    plain = Page(page.render(report))
    report["athanor"] = report["created"] = NASTY
    report["plan"][NASTY] = report["machine"][NASTY] = report["machine"]["cpu"] = NASTY
    report["stages"][2] |= {"name": NASTY, NASTY: NASTY}
    report["corpus"]["dropped"][NASTY] = 5
    report["samples"][0] |= {"prompt": NASTY, "skill": NASTY, "language": NASTY, "expected": NASTY}
    report["samples"][0]["answers"]["rl"] = {"reasoning": NASTY, "content": NASTY, "correct": True}
    report["lineage"]["rl"]["weights"] = NASTY
    for rung in report["ladder"].values():
        rung["skills"][NASTY] = rung["skills"]["sort"]
        rung["languages"][NASTY] = rung["languages"]["en"]
    report["curves"]["grpo"][3][NASTY] = 5
    report["curves"]["grpo"][4][NASTY] = 6
    found = Page(page.render(report, run=NASTY))
    assert found.text.count(NASTY) >= 20
    tags = Counter(tag for tag, _ in found.elements)
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements}
    assert tags["details"] == Counter(tag for tag, _ in plain.elements)["details"]
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]


def test_a_checkpoint_of_any_name_is_escaped(curveless: dict[str, Any]) -> None:
    name = "<b>dpo</b> & 'x' $y_1$"
    curveless["ladder"][name] = curveless["ladder"]["rl"]
    curveless["lineage"][name] = {**curveless["lineage"]["rl"], "parent": "sft"}
    curveless["samples"][0]["answers"][name] = curveless["samples"][0]["answers"]["rl"]
    source = page.render(curveless)
    assert "<b>dpo" not in source
    assert f"sft → {name}" in section(source, "changes")
    for where in ("ladder", "skills", "samples", "lineage"):
        assert name in section(source, where)


def test_text_that_cannot_be_stored_is_made_visible(curveless: dict[str, Any], tmp_path: Path) -> None:
    text = Page(page.render(curveless)).text
    assert "\u2400\u27e8U+202E\u27e9tpircs & \ufffd" in text
    (tmp_path / "report.json").write_text(json.dumps(curveless), encoding="utf-8")
    page.write(tmp_path).read_text(encoding="utf-8")


def test_every_skill_language_stage_and_sample_appears(curveless: dict[str, Any]) -> None:
    source = page.render(curveless)
    skills, time, samples = (section(source, name) for name in ("skills", "time", "samples"))
    for name, score in curveless["ladder"]["int4"]["skills"].items():
        assert name in skills
        assert f"{100 * score['low']:.0f}–{100 * score['high']:.0f}" in skills
    assert all(language in skills for language in ("en", "zh"))
    for stage in curveless["stages"]:
        assert stage["name"] in time
    assert "between the stages" in time
    for sample in curveless["samples"]:
        assert sample["prompt"] in samples
        assert all(
            answer["reasoning"] is None or answer["reasoning"].split()[0] in samples for answer in sample["answers"].values()
        )
    assert all(name in section(source, "ladder") for name in RUNGS)


def test_the_heat_map_has_a_cell_for_every_skill_and_checkpoint(curveless: dict[str, Any]) -> None:
    del curveless["ladder"]["sft"]["skills"]["sort"]
    curveless["ladder"]["sft"]["skills"]["only_here"] = curveless["ladder"]["sft"]["skills"]["reverse"]
    source = page.render(curveless)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', source.split('<table class="heat">')[1].split("</table>")[0])
    assert len(rows) == 9 + 2
    cells = {name.replace("<wbr>", ""): [("cell" in cell) for cell in re.findall("<td.*?</td>", row)] for name, row in rows}
    assert cells["sort"] == [True, False, True, True, True]
    assert cells["only_here"] == [False, True, False, False, False]
    assert "asked of only one of the two (sort, only_here)" in section(source, "changes")


def test_what_each_stage_changed_is_said_honestly(curveless: dict[str, Any]) -> None:
    def score(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.04, "high": value + 0.04, "n": 480}

    for name, value in zip(RUNGS, (0.05, 0.6, 0.65, 0.65, 0.5), strict=True):
        curveless["ladder"][name]["accuracy"] = score(value)
        curveless["ladder"][name]["skills"] = {"one": score(value), "two": score(0.5)}
    text = section(page.render(curveless), "changes")
    apart, overlap = "the intervals are apart.", "the intervals overlap, so this may be chance."
    assert f"Accuracy rose from 5.0 % to 60.0 % (+55.0 points); {apart} Skills: 1 better (one); 1 undecided." in text
    assert f"Accuracy rose from 60.0 % to 65.0 % (+5.0 points); {overlap} Skills: all 2 undecided." in text
    assert "Accuracy stayed at 65.0 %." in text
    assert f"Accuracy fell from 65.0 % to 50.0 % (\u221215.0 points); {apart} Skills: 1 worse (one); 1 undecided." in text


@pytest.mark.parametrize(("value", "said"), [(0.61, "no, below it"), (0.62, "yes"), (0.70, "yes"), (0.71, "no, above it")])
def test_whether_a_copy_lies_in_the_interval_of_its_original(curveless: dict[str, Any], value: float, said: str) -> None:
    curveless["ladder"]["rl"]["accuracy"] = {"value": 0.66, "low": 0.62, "high": 0.70, "n": 480}
    curveless["ladder"]["int8"] |= {
        "accuracy": {"value": value, "low": 0.0, "high": 1.0, "n": 480},
        "bytes": 500,
        "tokens_per_second": 300.0,
    }
    curveless["ladder"]["rl"] |= {"bytes": 1000, "tokens_per_second": 200.0}
    text = section(page.render(curveless), "compression")
    row = text.split("int8")[1].split("int4")[0]
    assert row.strip().endswith(said)
    assert "÷ 2.00" in row
    assert "× 1.50" in row


def test_facts_of_the_run(curveless: dict[str, Any]) -> None:
    found = Page(page.render(curveless, run="runs/first"))
    text = found.text
    assert (
        "From 24.3 MB of text to an assistant of 3.4 million parameters in 9 min 43 s, on AMD Ryzen 7 7840U (8 threads)." in text
    )
    assert "xz, the best of three compressors, needs 1.64." in text
    assert "duplicate 41 empty 17 not text 3" in text
    assert "athanor chat runs/first" in text
    assert "athanor serve runs/first" in text
    assert "Asked for 10 min, used 9 min 43 s." in text
    weights = hashlib.sha256(repr(("weights", "int4")).encode()).hexdigest()
    assert weights in [attributes["title"] for attributes in found.all("abbr")]
    assert weights[:8] in text
    assert "Every checkpoint carries the same tokenizer and the same chat template." in text


def test_a_lineage_of_two_tokenizers_is_told_and_an_unknown_one_is_not_called_the_same(curveless: dict[str, Any]) -> None:
    curveless["lineage"]["rl"]["tokenizer"] = None
    text = section(page.render(curveless), "lineage")
    assert "differ" not in text
    assert "same" not in text
    curveless["lineage"]["rl"]["tokenizer"] = "other"
    assert "Checkpoints differ in their tokenizer." in section(page.render(curveless), "lineage")
    curveless["lineage"]["rl"]["template"] = "other"
    assert "Checkpoints differ in their tokenizer and their chat template." in section(page.render(curveless), "lineage")


def test_a_gpu_is_named_before_the_cpu(curveless: dict[str, Any]) -> None:
    curveless["machine"]["gpu"] = "NVIDIA H200"
    assert "in 9 min 43 s, on NVIDIA H200." in Page(page.render(curveless)).text


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [
        ("corpus", "corpus", "This run recorded no facts of its corpus."),
        ("tokenizer", "corpus", "This run recorded no facts of its tokenizer."),
        ("samples", "samples", "This run kept no samples."),
        ("lineage", "lineage", "This run recorded no lineage."),
        ("curves", "learning", "No curve: the stage was left out, or too short to log two steps."),
    ],
)
def test_a_missing_part_is_left_out_with_a_word(report: dict[str, Any], name: str, where: str, said: str) -> None:
    if name != "curves":
        report["curves"] = None
        assert said not in Page(page.render(report)).text
    report[name] = None
    assert said in section(page.render(report), where)
    del report[name]
    assert said in section(page.render(report), where)


def test_a_short_stage_shows_what_it_logged(report: dict[str, Any]) -> None:
    report["curves"]["grpo"] = [{"step": 0, "reward": 0.25}]
    text = section(page.render(report), "learning")
    assert "No curve: the stage was left out, or too short to log two steps. Logged once: reward 0.25." in text


def test_the_smallest_report(curveless: dict[str, Any]) -> None:
    rung = curveless["ladder"]["base"] | {"bits_per_byte": None, "tokens_per_second": None, "skills": {}, "languages": {}}
    least = {key: curveless[key] for key in ("athanor", "created", "minutes", "seconds", "seed")}
    least |= {"plan": {"parameters": 951}, "machine": {}, "stages": [{"name": "plan", "seconds": 0}], "ladder": {"base": rung}}
    found = Page(page.render(least))
    assert "From raw text to an assistant of 951 parameters in 9 min 43 s, on a machine without a name." in found.text
    assert "There is a single checkpoint, so there is nothing to compare." in found.text
    assert "This run made no compressed checkpoint." in found.text
    assert "No skill was scored on its own." in found.text


def test_it_can_be_read_aloud(report: dict[str, Any]) -> None:
    found = Page(page.render(report))
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attributes["role"] == "img" and len(str(attributes["aria-label"])) > 40 for attributes in found.all("svg"))
    assert len(found.all("svg")) > 10
    assert all("scope" in attributes for attributes in found.all("th"))
    assert found.all("html") == [{"lang": "en"}]
    assert {"lang": "zh"} in found.all("div")


def test_many_samples_are_folded_and_none_is_lost(curveless: dict[str, Any]) -> None:
    curveless["samples"] = [curveless["samples"][i % 4] | {"prompt": f"prompt number {i}."} for i in range(20)]
    text = section(page.render(curveless), "samples")
    assert "20 prompts;" in text
    assert "12 more" in text
    assert all(f"prompt number {i}." in text for i in range(20))


def test_a_long_answer_is_folded_and_nothing_of_it_is_lost(curveless: dict[str, Any]) -> None:
    words = [f"w{i}" for i in range(400)]
    for name, content in (("base", " ".join(words)), ("sft", "\n".join(words))):
        curveless["samples"][0]["answers"][name]["content"] = content
        head, rest = page.split_long(content)
        assert head + rest == content
        assert len(head) <= 400
        assert head.count("\n") < 8
        text = section(page.render(curveless), "samples")
        assert " ".join(head.split()) + " …" in text
        assert f"the other {len(rest):,} characters" in text
        assert " ".join(rest.split()) in text
    assert page.split_long("short\n") == ("short", "")


def test_answers_stand_in_the_order_of_the_work(curveless: dict[str, Any]) -> None:
    curveless["samples"] = [curveless["samples"][0] | {"answers": dict(sorted(curveless["samples"][0]["answers"].items()))}]
    assert re.findall(r"<h4><span>(\w+)</span>", page.render(curveless)) == ["base", "sft", "rl"]


def test_time_outside_of_the_report_is_not_hidden(curveless: dict[str, Any]) -> None:
    curveless["stages"], curveless["seconds"] = [{"name": "pretrain", "seconds": 30}, {"name": "sft", "seconds": 30}], 80
    text = section(page.render(curveless), "time")
    assert "pretrain 30 s 37.5 % sft 30 s 37.5 % between the stages 20 s 25.0 %" in text
    curveless["seconds"] = 50  # stages that overlap, or a clock that was set: shares are of the stages' sum
    text = section(page.render(curveless), "time")
    assert "pretrain 30 s 50.0 % sft 30 s 50.0 %" in text
    assert "between" not in text


def test_write_reads_the_json_and_writes_the_page_beside_it(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "my first"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    target = page.write("runs/my first")
    assert target == Path("runs/my first/report.html")
    source = target.read_text(encoding="utf-8")
    assert "athanor chat 'runs/my first'" in Page(source).text
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "report.json"]
    assert len(source) < 300_000


def test_write_of_a_run_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"report\.json"):
        page.write(tmp_path)
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="athanor is missing"):
        page.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_same_report_gives_the_same_page_in_another_process(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    script = (
        "import sys, json, pathlib; from athanor.report import page;"
        "page.write('.'); assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.render(report, run=".")
