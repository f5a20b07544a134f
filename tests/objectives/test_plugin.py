"""An objective is one file in a folder of the user's: no list is edited, nothing is registered."""

import os
import subprocess
import sys

import pytest
import torch

from athanor.core import plugins
from athanor.core.errors import PluginError
from athanor.data.pack import pack
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.tokenizer.chat import render
from athanor.train.loop import fit

SMOOTHED = '''
"""Next-token prediction with smoothed labels."""

import torch

from athanor.nn.context import Packed
from athanor.types import IGNORE


def loss(model, batch):
    at = (batch.labels != IGNORE).nonzero().squeeze(1)
    logits = model.logits(model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths))[0, at])
    total = torch.nn.functional.cross_entropy(logits, batch.labels[at], reduction="sum", label_smoothing=0.1)
    return total, at.numel(), {"smoothed": total.detach()}
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "smoothed_labels.py").write_text(SMOOTHED)
    return tmp_path


def test_a_file_in_a_plugin_folder_trains_a_step(folder, monkeypatch, tiny, tokenizer):
    monkeypatch.setattr(plugins, "_folders", [])
    with pytest.raises(PluginError, match="no 'smoothed_labels' in 'objectives'"):
        plugins.require("objectives", "smoothed_labels", "loss")
    plugins.add_folder(folder)
    objective = plugins.require("objectives", "smoothed_labels", "loss").loss
    model = tiny()
    before = model.output_weight.detach().clone()
    batch = pack([render(tokenizer, [{"role": "user", "content": "heat?"}, {"role": "assistant", "content": "steady"}])])
    progress = fit(model, objective, lambda step: [batch], build(model, OptimConfig()), warmup_cosine(2, 0), steps=2)
    first, second = progress.history
    assert first["smoothed"] == pytest.approx(first["loss"], rel=1e-6)
    assert second["loss"] < first["loss"]
    assert not torch.equal(model.output_weight, before)


def test_the_environment_names_folders_too(folder):
    code = "from athanor.core import plugins; print(plugins.names('objectives'))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ATHANOR_PLUGINS": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smoothed_labels" in done.stdout and "next_token" in done.stdout
