"""`athanor attend`: a picture and a page of what a model looks at."""

import base64
import json
import re
from pathlib import Path

import html5lib
import numpy as np
import pytest
import torch

import athanor
from athanor import cli
from athanor.models._attention import attention_maps
from athanor.report import attention
from athanor.report.svg import DARK, LIGHT
from tests.test_families import byte_level, made, unigram, word_pieces


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        capsys.readouterr()
        status = cli.main(["attend", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


def data_of(page):
    """What the page shows, read as a browser reads it."""
    document = html5lib.parse(page, treebuilder="etree", namespaceHTMLElements=False)
    (script,) = [s for s in document.iter("script") if s.get("id") == "data"]
    return document, json.loads(script.text)


def test_a_decoder(run, lm, tmp_path):
    folder = lm.save(tmp_path / "run" / "base")
    status, out, err = run(folder, "The heat", "--out", "seen")
    assert (status, err) == (0, "")
    ids = lm.prompt_ids("The heat")
    assert f"run/base: {len(ids)} tokens, 2 layers of 4 heads" in out
    assert (tmp_path / "seen" / "attention.png").read_bytes().startswith(b"\x89PNG")
    document, panels = data_of((tmp_path / "seen" / "attention.html").read_text(encoding="utf-8"))
    assert document.find(".//h1").text == "What run/base looks at"
    (panel,) = panels
    assert panel["rows"] == panel["columns"] == [lm.tokenizer.token(i) for i in ids] and panel["rows"][0] == "<|bos|>"
    assert panel["layers"] == [0, 1] and panel["heads"] == 4
    expected = attention_maps(lm.model, torch.tensor(ids))["attention"].numpy()
    assert np.abs(shares_of(panel) - expected).max() <= 0.5 / 65535 + 1e-6
    (slider,) = [e for e in document.iter("input") if e.get("id") == "layer"]
    assert slider.get("value") == "0"  # without one a browser begins in the middle of 0 to 100, which is the last layer


def shares_of(panel):
    """What the page's script reads of a panel: (L, H, T, S)."""
    shape = len(panel["layers"]), panel["heads"], len(panel["rows"]), len(panel["columns"])
    return np.frombuffer(base64.b64decode(panel["weights"]), "<u2").reshape(shape) / 65535


def test_shares_of_a_row_sum_to_one_in_long_texts(tmp_path):
    shares = np.random.default_rng(0).dirichlet(np.full(512, 0.5), (2, 2, 512)).astype(np.float32)
    shares[0, 0] = 1 / 512
    words = [f"w{i}" for i in range(512)]
    attention.write("long", [attention.Panel("what", words, words, [0, 1], shares)], tmp_path / "long.html")
    _, (panel,) = data_of((tmp_path / "long.html").read_text(encoding="utf-8"))
    assert np.abs(shares_of(panel).sum(-1) - 1).max() < 0.01


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_a_share_of_everything_is_legible(theme):
    """Contrast of ink on the strongest shade, by WCAG 2.2."""

    def luminance(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    ink, accent, paper = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (theme.ink, theme.accent, theme.paper))
    behind = [attention.SHADE * a + (1 - attention.SHADE) * p for a, p in zip(accent, paper, strict=True)]
    dark, light = sorted((luminance(ink), luminance(behind)))
    assert (light + 0.05) / (dark + 0.05) >= 4.5
    page = (Path(attention.__file__).parent / "attention.html.j2").read_text()
    assert "calc({{ shade }} * var(--w, 0))" in page and ".tokens small { color: inherit;" in page


def test_chosen_layers_and_json(run, lm, tmp_path):
    folder = lm.save(tmp_path / "base")
    status, out, _ = run(folder, "The heat of it", "--layers", 1, "--json")
    (found,) = json.loads(out)
    assert status == 0 and found["layers"] == [1] and found["heads"] == 4
    assert [m["token"] for m in found["most"]] == found["tokens"]
    assert all(found["tokens"][m["place"]] == m["looks_at"] and m["place"] <= i for i, m in enumerate(found["most"]))
    assert (tmp_path / "attention" / "attention.html").is_file()
    _, out, _ = run(folder, "The heat of it", "--layers", 1, "--layers", 0, "--json")
    assert json.loads(out)[0]["layers"] == [1, 0]


def test_an_encoder(run, tmp_path):
    made(("bert", "tiny"), tmp_path / "bert", word_pieces)
    assert run("bert", "the heat")[0] == 0
    _, (panel,) = data_of((tmp_path / "attention" / "attention.html").read_text(encoding="utf-8"))
    assert panel["rows"] == ["[CLS]", "the", "heat", "[SEP]"]


def test_an_encoder_decoder(run, tmp_path):
    made(("t5", "tiny"), tmp_path / "t5", unigram, eos_token_id=1, decoder_start_token_id=0)
    status, out, err = run("t5", "the heat", "--answer", "hat")
    assert (status, err) == (0, "") and (
        "encoder 2 layers of 4 heads, decoder 2 layers of 4 heads, cross 2 layers of 4 heads" in out
    )
    document, panels = data_of((tmp_path / "attention" / "attention.html").read_text(encoding="utf-8"))
    assert [p["title"].split(":")[0] for p in panels] == ["encoder", "decoder", "cross"]
    assert panels[2]["rows"] == panels[1]["rows"] and panels[2]["columns"] == panels[0]["rows"]
    assert [o.text for o in document.iter("option")] == [p["title"] for p in panels]
    assert run("t5", "the heat")[0] == 0  # its own answer
    _, own = data_of((tmp_path / "attention" / "attention.html").read_text(encoding="utf-8"))
    lm = athanor.load("t5")
    assert len(own[1]["rows"]) == 1 + len(lm.complete("the heat", temperature=0, max_tokens=32).ids)


ATTACK = "</script><img src=x onerror=alert(1)> \"'&<!--"


def test_a_text_cannot_become_a_part_of_the_page(run, lm, tmp_path):
    folder = lm.save(tmp_path / "base")
    assert run(folder, ATTACK)[0] == 0
    page = (tmp_path / "attention" / "attention.html").read_text(encoding="utf-8")
    document, (panel,) = data_of(page)
    assert "".join(panel["rows"][1:]) == ATTACK
    assert not list(document.iter("img")) and len(list(document.iter("script"))) == 2
    assert not re.search(r"(src|href)\s*=|https?://", page)  # one file, no network


def test_a_page_of_many_tokens_has_no_labels_in_its_picture(tmp_path):
    weights = np.full((1, 2, 60, 60), 1 / 60)
    words = [f"w{i}" for i in range(60)]
    attention.draw("many", [attention.Panel("what", words, words, [0], weights)], tmp_path / "many.svg")
    text = (tmp_path / "many.svg").read_text()
    assert "w59" not in text and "layer 0" in text
    assert "Tokens are written up to 48 of them; here there are more," in text and "by the square root of the share" in text
    attention.draw("few", [attention.Panel("what", words[:4], words[:4], [0], weights[:, :, :4, :4])], tmp_path / "few.svg")
    few = (tmp_path / "few.svg").read_text()
    assert "w3" in few and "here there are more" not in few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", ""], "text is empty: give a few words to look at"),
        (["llama", "the heat", "--layers", "2"], "layers names 2, and there are layers 0 to 1: choose among these"),
        (["headed", "the heat"], "has no language-model head and writes no answer of its own: give one with --answer"),
        (["llama", "the heat", "--answer", "x"], "answer ('x') is for encoder-decoders, and"),
        (["llama", "the " * 200], "tokens and at most 128 are shown: shorten it"),
        (["bare", "the heat"], "has no tokenizer, so it takes and gives token ids only"),
        (["t5", "the heat"], "does not say what its answers begin with: add decoder_start_token_id to config.json"),
    ],
)
def test_refused(run, tmp_path, arguments, message):
    made(("llama", "tiny"), tmp_path / "llama", byte_level)
    made(("llama", "tiny"), tmp_path / "bare")
    made(("bart", "tiny"), tmp_path / "t5", unigram)
    made(("t5", "tiny"), tmp_path / "headed", unigram, eos_token_id=1, decoder_start_token_id=0)
    named = json.loads((tmp_path / "headed" / "config.json").read_text()) | {"architectures": ["T5Model"]}
    (tmp_path / "headed" / "config.json").write_text(json.dumps(named))
    fields = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(fields | {"decoder_start_token_id": None}))
    status, _, err = run(*arguments)
    assert status == 1 and message in err, err


def test_too_large_for_a_page(run, lm, tmp_path, monkeypatch):
    from athanor.recipes import attend

    monkeypatch.setattr(attend, "LARGEST", 100)
    status, _, err = run(lm.save(tmp_path / "base"), "The heat of it")
    assert status == 1 and "probabilities are too many for a page: name fewer layers with --layers" in err
