import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from athanor.core import hub
from athanor.core.errors import CheckpointError


@pytest.mark.parametrize(
    "text",
    [
        "org/name",
        "Qwen/Qwen3-0.6B",
        "a/b",
        "meta-llama/Llama-3.2-1B",
        "o_r.g/n-a.m_e",
        "0x/1.5",
        "_a/b_",
        "org/a.-b",
        "o/" + "n" * 95,
    ],
)
def test_ids(text):
    assert hub.is_id(text)
    huggingface_hub.utils.validate_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "name", "org/", "/name", "org/name/", "org/name/more", "./name", "../name", "org/..", "org/.", "~/name"),
        *("org/na me", "org\\name", "org/name\n", "org/na\0me", "órg/name", "org/a--b", "org/a..b", "-org/name"),
        *("org/name-", "org/.name", "org/name.", "org/name@main", "https://huggingface.co/org/name", "o/" + "n" * 96),
    ],
)
def test_what_is_no_id(text):
    assert not hub.is_id(text)
    with pytest.raises(CheckpointError, match="is neither a folder here nor a model id of the form org/name: check the spelling"):
        hub.fetch(text)


@given(st.text("ab.-_/~A0 ", max_size=12))
def test_the_hubs_own_check_accepts_every_id(text):
    if hub.is_id(text):
        huggingface_hub.utils.validate_repo_id(text)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What was asked of the library, which "downloads" into an empty folder."""
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def wanted(options, files):
    """Which of `files` the library downloads, by its own filter."""
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(files, **patterns))


USEFUL = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "1_Pooling/config.json"),
]
USELESS = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.gguf"),
    *("README.md", ".gitattributes", "modeling_custom.py", "original/consolidated.00.pth", "consolidated.safetensors"),
    *("onnx/model.safetensors", "training_args.bin", "optimizer.bin", "fp16/pytorch_model.bin"),
]


def test_what_is_downloaded(calls, tmp_path):
    assert hub.fetch("org/name") == tmp_path
    assert hub.fetch("org/name", "v1", patterns=["*.md"]) == tmp_path
    (first, options), (second, others) = calls
    assert (first, options["revision"], second, others["revision"]) == ("org/name", None, "org/name", "v1")
    assert wanted(options, USEFUL + USELESS) == USEFUL
    assert wanted(others, USEFUL + USELESS) == ["README.md"]


def test_pickles_are_downloaded_only_when_asked_for_and_needed(calls, tmp_path):
    pickles = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
    hub.fetch("org/name", "v1", pickled=True)
    assert [wanted(options, USELESS) for _, options in calls] == [[], pickles]
    assert [options["revision"] for _, options in calls] == ["v1", "v1"]
    calls.clear()
    (tmp_path / "model.safetensors").touch()
    hub.fetch("org/name", pickled=True)
    assert [wanted(options, USELESS) for _, options in calls] == [[]]


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("403", response=RESPONSE),
            r"org/name at revision 'v1' is gated: accept its terms at https://huggingface.co/org/name, then log in with `hf auth",
        ),
        (
            errors.RepositoryNotFoundError("404", response=RESPONSE),
            r"the hub has no model org/name, or it is private: check the spelling, or log in with `hf auth login`",
        ),
        (
            errors.RevisionNotFoundError("404", response=RESPONSE),
            r"the hub has no org/name at revision 'v1': name a branch, tag or commit that the model has",
        ),
        (
            errors.LocalEntryNotFoundError("no network\nsecond line"),
            r"cannot reach the hub for org/name at revision 'v1' \(LocalEntryNotFoundError: no network\): try again, or download"
            r" the model elsewhere and give its folder",
        ),
        (errors.HfHubHTTPError("500 down", response=RESPONSE), r"cannot reach the hub for .* \(HfHubHTTPError: 500 down\)"),
        (ConnectionError(), r"cannot reach the hub for .* \(ConnectionError: ConnectionError\)"),
        (OSError(28, "No space left on device"), r"cannot reach the hub for .* \(OSError: .*No space left on device\)"),
    ],
)
def test_what_the_library_raises_becomes_clear(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.fetch("org/name", "v1")
    assert caught.value.__cause__ is error


FETCH = "import sys\nfrom athanor.core import hub\nprint(hub.fetch('org/name', pickled=False))"


def _offline(home):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", FETCH], capture_output=True, text=True, env=env)


def test_offline_with_an_empty_cache(tmp_path):
    done = _offline(tmp_path)
    assert done.returncode == 1
    assert "CheckpointError: cannot reach the hub for org/name (LocalEntryNotFoundError" in done.stderr


def test_offline_the_cache_answers(tmp_path):
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    done = _offline(tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == snapshot
