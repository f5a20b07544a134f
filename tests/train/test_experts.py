"""Mixtures of experts in training: what balances them counts, their biases move, and what they did is logged."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from athanor.core import plugins
from athanor.models import io
from athanor.nn.moe import MixtureOfExperts, after_step, aux_losses
from athanor.objectives import next_token
from athanor.types import Batch


def mixture(name, preset="tiny", **fields):
    from dataclasses import replace

    return io.build(name, replace(plugins.load("models", name).PRESETS[preset], **fields), seed=0)


def test_the_loss_is_that_of_transformers_with_router_logits(tmp_path):
    """For one row of one sequence: the losses that balance are means over tokens, and padding counts in theirs."""
    io.save(mixture("mixtral", balance_loss=0.5), tmp_path)
    ours = io.load(tmp_path).train()
    theirs = MixtralForCausalLM.from_pretrained(tmp_path, output_router_logits=True).train()
    assert MixtralConfig.from_pretrained(tmp_path).router_aux_loss_coef == 0.5
    ids = torch.randint(0, 320, (24,), generator=torch.Generator().manual_seed(1))
    # Their labels are not shifted, and the last of ours has nothing to predict.
    expected = theirs(ids[None], labels=ids[None])
    labels = torch.cat((ids[1:], torch.tensor([-100])))
    total, count, metrics = next_token.loss(ours, Batch(ids, labels, torch.tensor([24]), origin="one"))
    assert (total / count).item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (metrics["router_loss"] / count).item() == pytest.approx(0.5 * expected.aux_loss.item(), rel=1e-5)
    total.backward()
    expected.loss.backward()
    grad = ours.blocks[0].feed_forward.router.weight.grad / count
    wanted = theirs.model.layers[0].mlp.gate.weight.grad
    assert torch.allclose(grad, wanted, atol=1e-4 * float(wanted.abs().max()))
    ours.eval()
    plain, _, metrics = next_token.loss(ours, Batch(ids, labels, torch.tensor([24]), origin="one"))
    assert "router_loss" not in metrics and plain.item() < total.item()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_every_step_tells_what_experts_did(run, name):
    progress, _ = run(mixture(name), steps=4)
    for record in progress.history:
        assert 0 <= record["expert_load_min"] <= 1 <= record["expert_load_max"] and record["experts_dropped"] == 0
        assert ("router_loss" in record) == (name != "deepseek_v3")


def test_a_dense_model_says_nothing_of_experts(tiny, run):
    progress, _ = run(tiny(), steps=1)
    assert not {"expert_load_max", "router_loss"} & progress.history[0].keys() and after_step(tiny()) == {}
    dense = mixture("qwen3_moe", dense_layers=(0, 1))
    assert dense.router_loss() is None
    run(dense, steps=1)


def test_biases_of_routers_move_against_the_load(run):
    model = mixture("deepseek_v3")
    routers = [m.router for m in model.modules() if isinstance(m, MixtureOfExperts)]
    run(model, steps=3)
    moved = torch.stack([r.e_score_correction_bias for r in routers])
    assert moved.any() and float(moved.abs().max()) <= 3e-3 + 1e-9


def test_what_balances_does_balance(run):
    """A router that likes one expert, trained with a strong loss and with none."""

    def after(weight):
        model = mixture("mixtral", balance_loss=weight)
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, MixtureOfExperts):
                    m.router.weight[0] += 0.3
        progress, _ = run(model, steps=30, optim="adamw")
        return sum(r["expert_load_max"] for r in progress.history[-10:]) / 10, model

    heavy, model = after(10.0)
    assert heavy < after(0.0)[0]
    assert set(aux_losses(model)) == {"load_balance", "router_z"}
