"""`athanor verify`: a table, JSON for programs, and a clear message when a law is broken."""

import json

import pytest
import torch

from athanor import cli
from athanor.compress.apply import compress
from athanor.core.errors import VerificationError
from athanor.lm import LM, load
from athanor.models import llama
from athanor.models.base import TokenIds
from athanor.nn import paged
from athanor.recipes import verify

LAWS = ["L1", "L1", "L2", "L2", "L2", "L3", "L3", "L4", "L5", "L6", "L7", "L7"]
NOT_ASKED = "it starts processes: ask with --parallel"


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    return lm.save(tmp_path_factory.mktemp("run") / "base")


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command line, without what a terminal's width does to them."""
    status = cli.main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


def test_a_sound_model(folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    status, out, err = run(capsys, folder)
    assert (status, err) == (0, "")
    assert "The laws of the house on" in out and f"{folder.parent.name}/base" in out
    assert out.count("holds") == len(LAWS) - 1 and "BROKEN" not in out
    assert out.count("skipped") == 1 and "ask with --parallel" in " ".join(out.replace("│", " ").split())
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_json_for_programs(folder, capsys):
    status, out, _ = run(capsys, folder.parent, "--checkpoint", "base", "--json")
    report = json.loads(out)
    assert status == 0 and report["passed"] is True
    assert [f["law"] for f in report["findings"]] == LAWS
    for finding in report["findings"]:
        assert finding.keys() == {"law", "compared", "value", "tolerance", "skipped", "passed"}
        if finding["law"] == "L5":
            assert finding["passed"] and finding["skipped"] == NOT_ASKED
        else:
            assert finding["passed"] and 0 <= finding["value"] <= finding["tolerance"]
    by_law = {f["law"]: f for f in report["findings"]}
    assert "transformers" in by_law["L7"]["compared"]
    assert by_law["L4"]["tolerance"] == 0


def test_several_processes_are_started_when_asked_for(folder, capsys):
    status, out, err = run(capsys, folder, "--parallel", "--json")
    assert status == 0, err
    findings = [f for f in json.loads(out)["findings"] if f["law"] == "L5"]
    assert [f["compared"].split(" ")[0] for f in findings] == ["ddp=2", "fsdp=2", "tp=2", "pp=2"]
    assert all(not f["skipped"] and 0 < f["value"] <= f["tolerance"] == 1e-4 for f in findings)


def test_a_broken_model_fails_with_a_clear_message(folder, capsys, monkeypatch):
    true_attention = paged.attend_rows
    monkeypatch.setattr(paged, "attend_rows", lambda *args, **kw: true_attention(*args, **kw) * 1.05)
    status, out, err = run(capsys, folder)
    assert status == 1
    assert out.count("BROKEN") == 3
    assert f"{folder} breaks 3 of 12 checks (L2, cached and uncached: log-probabilities of" in err
    assert "; L6, rollout and trainer: log-probabilities of" in err and "and at most 0.0001 is allowed" in err
    assert err.endswith("copy it again or reinstall athanor, and report it if that does not help")
    status, out, _ = run(capsys, folder, "--json")
    assert status == 1 and json.loads(out)["passed"] is False


def test_an_export_that_only_we_can_read_is_seen(folder, monkeypatch):
    """Our own round trip is sound: the fault is in what others read."""
    true_to, true_from = llama.Config.to_hf, llama.Config.from_hf.__func__
    double = {"rope_theta": 20_000.0, "rope_parameters": {"rope_theta": 20_000.0, "rope_type": "default"}}
    lm = load(folder)
    monkeypatch.setattr(llama.Config, "to_hf", lambda self: true_to(self) | double)
    halve = {"rope_parameters": {"rope_theta": 10_000.0}}
    monkeypatch.setattr(llama.Config, "from_hf", classmethod(lambda cls, fields: true_from(cls, {**fields, **halve})))
    broken = [f for f in verify.verify(lm) if not f.passed]
    assert [f.compared.split(":")[0] for f in broken] == ["ours and transformers"]


def test_a_save_that_loses_bits_is_seen(folder, monkeypatch):
    lm = load(folder)
    true_to = llama.Model.to_hf
    monkeypatch.setattr(llama.Model, "to_hf", lambda self, state: {k: v.half().float() for k, v in true_to(self, state).items()})
    broken = [f.compared.split(":")[0] for f in verify.verify(lm) if not f.passed]
    assert "saved and loaded again" in broken


def test_without_transformers_the_export_is_skipped_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(verify.laws, "find_spec", lambda name: None)
    findings = verify.verify(load(folder))
    assert [f.law for f in findings] == LAWS and all(f.passed for f in findings)
    assert findings[-1].skipped == "transformers is not installed"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_not_trained_and_says_so(tiny, tokenizer, tmp_path, capsys, bits):
    LM(compress(tiny(), bits), tokenizer).save(tmp_path / "small")
    status, out, err = run(capsys, tmp_path / "small", "--json")
    assert status == 0, err
    findings = json.loads(out)["findings"]
    assert [f["law"] for f in findings] == LAWS
    reasons = {(f["law"], f["skipped"]) for f in findings if f["skipped"]}
    quantised = "the model is quantised: "
    assert reasons == {
        ("L3", quantised + "it answers and is not trained"),
        ("L4", quantised + "it answers and is not trained"),
        ("L5", quantised + "it answers and is not trained"),
        ("L7", quantised + "other programs round otherwise"),
    }
    assert all(f["value"] is None for f in findings if f["skipped"])


def test_a_bfloat16_model_is_verified_in_float32_and_saved_as_it_is(tiny, tokenizer, tmp_path):
    LM(tiny().to(torch.bfloat16), tokenizer).save(tmp_path / "half")
    lm = load(tmp_path / "half")
    assert lm.model.output_weight.dtype == torch.bfloat16
    assert all(f.passed for f in verify.verify(lm))
    assert lm.model.output_weight.dtype == torch.bfloat16


def test_findings_that_are_not_numbers_are_told_in_json():
    assert verify._plain(verify.Finding("L7", "x", float("inf")))["value"] == "inf"
    assert verify._plain(verify.Finding("L7", "x", float("nan")))["value"] == "nan"


def test_the_error_is_of_its_own_kind(folder, monkeypatch):
    monkeypatch.setattr(verify, "verify", lambda lm, parallel: [verify.Finding("L4", "resumed", 3.0)])
    with pytest.raises(VerificationError, match=r"breaks 1 of 1 checks \(L4, resumed: 3, and at most 0 is allowed\)"):
        verify.main(verify.Config(folder))


@pytest.mark.parametrize("case", [("bert", "tiny"), ("t5", "tiny"), ("rnn_lm", "tiny"), ("mixtral", "tiny")], ids="-".join)
def test_other_families_are_asked_what_can_be_asked_of_them(tmp_path, case, capsys):
    """Without a tokenizer: files, packing, and training where the family is a decoder."""
    from athanor.core import plugins
    from athanor.models import io

    model = io.build(case[0], plugins.load("models", case[0]).PRESETS[case[1]], seed=0)
    folder = LM(model.eval(), None).save(tmp_path / "model")
    status, out, err = run(capsys, folder, "--json")
    assert status == 0, err
    findings = {(f["law"], f["compared"].split(":")[0]): f for f in json.loads(out)["findings"]}
    assert findings["L1", "our ids and those of the saved template"]["skipped"] == "the tokenizer is not ours"
    assert not findings["L7", "saved and loaded again"]["skipped"]
    assert bool(findings["L7", "ours and transformers"]["skipped"]) == (case[0] == "rnn_lm")
    assert not findings["L3", "packed and separate"]["skipped"]
    if case[0] in ("bert", "t5"):
        assert findings["L6", "rollout and trainer"]["skipped"] == f"the model is of the kind {model.kind!r}"
        assert findings["L5", "several processes and one"]["skipped"] == f"the model is of the kind {model.kind!r}"
    else:
        assert findings["L2", "cached and uncached"]["skipped"] == "the model has no tokenizer"
        assert any(f["law"] == "L4" and not f["skipped"] for f in findings.values())


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "sequence"),
        ("bert", "question"),
        ("roberta", "token"),
        ("gpt2", "sequence"),
        ("bart", "sequence"),
        ("t5", "token"),
        ("bart", None),
    ],
)
def test_classifiers_and_bare_models_are_compared(tmp_path, family, task):
    from athanor.models import heads, io
    from tests.models.reference import config_of

    model = io.build(family, config_of((family, "tiny")), seed=0)
    model.token_ids = TokenIds(0, (2,), 1, 3)
    if task is None:
        model.fields = {"architectures": [heads.class_of(model, "Model")]}
        model.behead()
    else:
        model = heads.attach(model, task, 2, generator=torch.Generator().manual_seed(0))
    findings = verify.verify(load(LM(model.eval(), None).save(tmp_path / "model")))
    assert all(f.passed for f in findings)
    assert [(f.compared.split(":")[0], f.skipped) for f in findings if f.law in ("L3", "L7")] == [
        ("packed and separate", ""),
        ("saved and loaded again", ""),
        ("ours and transformers", ""),
    ]


def test_a_wrong_head_is_found(tmp_path, monkeypatch):
    from athanor.models import heads, io
    from tests.models.reference import config_of

    model = heads.attach(io.build("bert", config_of(("bert", "tiny")), seed=0), "token", 3, generator=torch.Generator())
    folder = LM(model.eval(), None).save(tmp_path / "model")
    true = heads.Head.forward
    monkeypatch.setattr(heads.Head, "forward", lambda self, hidden: true(self, hidden) * 1.01)
    assert [f.compared.split(":")[0] for f in verify.verify(load(folder)) if not f.passed] == ["ours and transformers"]


def test_a_question_of_a_longformer_has_its_separators(tmp_path):
    from athanor.models import heads, io
    from tests.models.reference import config_of

    case = ("longformer", "tiny")
    model = heads.attach(io.build("longformer", config_of(case), seed=0), "question", generator=torch.Generator().manual_seed(0))
    found = verify.verify(load(LM(model.eval(), None).save(tmp_path / "model")))
    assert found[-1].compared.startswith("ours and transformers") and found[-1].passed and not found[-1].skipped


def test_a_model_with_a_tokenizer_of_its_own(tmp_path, capsys):
    from tests.test_families import byte_level, made

    made(("qwen3", "tiny"), tmp_path / "theirs", byte_level)
    status, out, err = run(capsys, tmp_path / "theirs", "--json")
    assert status == 0, err
    findings = json.loads(out)["findings"]
    assert [f["law"] for f in findings] == ["L1", "L2", "L2", "L2", "L3", "L3", "L4", "L5", "L6", "L7", "L7"]
    assert [f["law"] for f in findings if f["skipped"]] == ["L1", "L5"]


def test_a_wrong_packing_of_an_encoder_is_found(tmp_path, capsys, monkeypatch):
    from athanor.models import io
    from tests.models.reference import config_of

    folder = LM(io.build("bert", config_of(("bert", "tiny")), seed=0).eval(), None).save(tmp_path / "model")
    true = verify.laws.Packed
    monkeypatch.setattr(verify.laws, "Packed", lambda lengths, causal: true(lengths.flip(0), causal))
    status, _, err = run(capsys, folder)
    assert status == 1 and "L3, packed and separate: hidden states of" in err
