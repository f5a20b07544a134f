import pytest

from athanor.core import io
from athanor.core.errors import CheckpointError, ConfigError
from athanor.core.stage import Stage, require


def test_a_stage_is_done_once_and_keeps_its_figures(tmp_path):
    run = tmp_path / "run"
    first = Stage(run, "corpus", {"seed": 0})
    assert first.record is None
    first.finish(seconds_before=10.0, documents=3)
    again = Stage(run, "corpus", {"seed": 0})
    assert again.record is not None
    assert again.record["documents"] == 3
    assert again.record["seconds"] >= 10.0
    assert require(run, "corpus") == again.record


def test_other_settings_are_refused_by_name(tmp_path):
    Stage(tmp_path / "run", "corpus", {"seed": 0, "deep": {"lr": 1}}).finish()
    with pytest.raises(ConfigError, match=r"already has stage 'corpus', done with other deep\.lr"):
        Stage(tmp_path / "run", "corpus", {"seed": 0, "deep": {"lr": 2}})


def test_a_missing_stage_names_its_command(tmp_path):
    with pytest.raises(CheckpointError, match="run `athanor pretrain"):
        require(tmp_path, "pretrain")


def test_foreign_folders_and_versions_are_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        Stage(tmp_path, "corpus", {})
    io.write_json(tmp_path / "other" / "run.json", {"format": 99})
    with pytest.raises(CheckpointError, match="another version of athanor"):
        Stage(tmp_path / "other", "corpus", {})
