"""Rotary positions against transformers and against float64."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from athanor.nn.positions import Rotary, rotate, sinusoids


def theirs(x, positions, theta):
    k = x.shape[-1]
    config = LlamaConfig(
        hidden_size=k * x.shape[2],
        num_attention_heads=x.shape[2],
        max_position_embeddings=64,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    turned, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    return turned.transpose(1, 2)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_forward_and_gradient(theta):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 64, (2, 7), generator=generator)
    data, weights = torch.randn(2, 2, 7, 3, 16, generator=generator)
    results = []
    for turn in (lambda x: rotate(x, *Rotary(16, 64, theta).at(positions, 64)), lambda x: theirs(x, positions, theta)):
        x = data.clone().requires_grad_()
        y = turn(x)
        (y * weights).sum().backward()
        results.append((y.detach(), x.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=5e-6)


def test_position_0_changes_nothing_and_lengths_are_kept():
    x = torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, *Rotary(8, 9).at(torch.arange(9).unsqueeze(0), 9))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(2)).expand(2, 1, 40, 1, 32)
    cos, sin = Rotary(32, 1000).at(torch.arange(900, 940).unsqueeze(0), 940)
    scores = rotate(query, cos, sin)[0, :, 0] @ rotate(key, cos, sin)[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_the_tables_are_those_of_float64_far_out_even_in_a_bfloat16_model():
    positions = torch.tensor([[16_000, 20_000, 20_479]])
    rotary = Rotary(64, 20_480).to(torch.bfloat16)
    frequency = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angle = positions.double()[..., None] * frequency
    cos, sin = rotary.at(positions, 20_480)
    for table, exact in ((cos, angle.cos()), (sin, angle.sin())):
        assert table.shape == (1, 3, 1, 64)
        assert (table[..., 32:].squeeze(2).double() - exact).abs().max() <= 1e-7
    # bfloat16 keys are turned by float32 tables: only the result is rounded.
    x = torch.randn(1, 3, 2, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    exact_turn = rotate(x.double(), cos.double(), sin.double())
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert ((turned.double() - exact_turn).abs() <= 0.004 * exact_turn.abs() + 1e-6).all()


def test_tables_are_real_in_a_model_without_a_device():
    with torch.device("meta"):
        rotary = Rotary(8, 16)
    at = torch.arange(16).unsqueeze(0)
    for ours, theirs in zip(rotary.at(at, 16), Rotary(8, 16).at(at, 16), strict=True):
        assert torch.equal(ours, theirs)
    assert "cos" not in rotary.state_dict()
    assert rotary.to("meta").cos.is_meta


def test_tables_grow_with_what_is_asked_for_even_while_generating():
    rotary = Rotary(8, 100_000)
    assert rotary.cos.numel() == 0
    with torch.inference_mode():
        rotary.at(torch.tensor([[5]]), 6)
    few = rotary.cos.shape[0]
    rotary.at(torch.tensor([[5000]]), 5001)
    assert few < 5001 <= rotary.cos.shape[0] < 100_000
    x = torch.randn(1, 1, 1, 8, requires_grad=True)
    rotate(x, *rotary.at(torch.tensor([[5]]), 6)).sum().backward()
    assert x.grad is not None


def test_only_the_first_entries_of_wider_heads_are_turned():
    x = torch.randn(1, 5, 2, 12, generator=torch.Generator().manual_seed(4))
    table = Rotary(8, 5).at(torch.arange(5).unsqueeze(0), 5)
    turned = rotate(x, *table)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8], *table))


def test_magnitude_is_a_factor():
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(4))
    at = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(rotate(x, *Rotary(8, 5, magnitude=1.5).at(at, 5)), 1.5 * rotate(x, *Rotary(8, 5).at(at, 5)))


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoids_are_those_of_the_paper(interleaved):
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos of the same (Vaswani et al. 2017), side by side or in halves."""
    table = sinusoids(50, 12, interleaved)
    for t in range(50):
        for i in range(6):
            angle = t / 10_000 ** (2 * i / 12)
            sine, cosine = (2 * i, 2 * i + 1) if interleaved else (i, 6 + i)
            assert table[t, sine].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, cosine].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert table.dtype == torch.float32 and table.device.type == "cpu"
