"""Scaled rotary positions against transformers' and against float64; what is refused; sequences of different lengths."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from athanor.core.errors import ConfigError
from athanor.nn.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope, _lengths, rotary, scaling

K, THETA = 16, 10_000.0
SHORT, LONG = tuple(1 + i / 4 for i in range(8)), tuple(2.0**i for i in range(8))
SCALINGS = {
    "linear": LinearRope(2.5),
    "dynamic": DynamicRope(2.0, 32),
    "yarn": YarnRope(4.0, 32),
    "yarn-attention": YarnRope(4.0, 512, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0),
    "yarn-mscale": YarnRope(40.0, 64, mscale=1.0, mscale_all_dim=0.8),
    "yarn-one-mscale": YarnRope(40.0, 64, mscale=0.7),
    "yarn-real-ends": YarnRope(4.0, 32, truncate=False),
    "yarn-flat": YarnRope(4.0, 32, beta_fast=1.0, beta_slow=1.0, truncate=False),
    "llama3": Llama3Rope(8.0, 1.0, 4.0, 32),
    "llama3-far": Llama3Rope(32.0, 1.0, 4.0, 8192),
    "longrope": LongRope(SHORT, LONG, 32),
    "longrope-attention": LongRope(SHORT, LONG, 32, attention_factor=1.3),
    "longrope-factor": LongRope(SHORT, LONG, 32, factor=4.0),
}
each = pytest.mark.parametrize("by", SCALINGS.values(), ids=SCALINGS.keys())


def theirs(by, positions):
    """cos and sin (1, T, K) of transformers."""
    fields = by.to_hf() | {"rope_theta": THETA}
    shape = {"hidden_size": 2 * K, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32, "pad_token_id": 0}
    longest = 32 if isinstance(by, DynamicRope) else 64
    if isinstance(by, LongRope):
        original = {"original_max_position_embeddings": by.original_max_position_embeddings}
        table = Phi3RotaryEmbedding(Phi3Config(**shape, max_position_embeddings=longest, rope_parameters=fields, **original))
    else:
        table = LlamaRotaryEmbedding(LlamaConfig(**shape, max_position_embeddings=longest, rope_parameters=fields))
    return table(torch.zeros(1), positions), table.inv_freq


def ours(by, positions):
    cos, sin = rotary(K, 64, THETA, by).at(positions, int(positions.max()) + 1)
    return cos.squeeze(2), torch.cat((-sin[..., : K // 2], sin[..., K // 2 :]), -1).squeeze(2)


@each
@pytest.mark.parametrize("length", [1, 20, 32, 33, 50, 64])
def test_cos_and_sin_are_theirs_at_every_length(by, length):
    positions = torch.arange(length).unsqueeze(0)
    expected, _ = theirs(by, positions)
    for mine, yours in zip(ours(by, positions), expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - yours).abs().max() <= 5e-6


@each
def test_frequencies_are_theirs_but_for_rounding(by):
    _, expected = theirs(by, torch.arange(4).unsqueeze(0))
    torch.testing.assert_close(by.frequencies(K, THETA), expected.double(), rtol=1e-6, atol=0)


@each
def test_far_out_the_tables_are_those_of_float64(by):
    far = torch.tensor([[16_384, 40_001, 130_000]])
    table = rotary(K, 131_072, THETA, by).to(torch.bfloat16)
    frequencies = by.frequencies(K, THETA)
    if hasattr(by, "frequencies_of"):
        frequencies = by.frequencies_of(K, THETA, torch.tensor(130_001))
        far = torch.cat((torch.arange(2).unsqueeze(0), far), 1)  # one sequence from its start
    angle = far.double()[..., None] * frequencies
    cos, sin = table.at(far, 130_001)
    magnitude = by.magnitude(131_072)
    assert cos.dtype == torch.float32
    for mine, exact in ((cos, angle.cos()), (sin, angle.sin())):
        assert (mine[0, :, 0, K // 2 :].double() - exact[0] * magnitude).abs().max() <= 1.5e-7


@pytest.mark.parametrize("by", [DynamicRope(2.0, 32), LongRope(SHORT, LONG, 32)])
def test_sequences_side_by_side_have_the_frequencies_of_their_own_length(by):
    table = rotary(K, 64, THETA, by)
    alone = [table.at(torch.arange(n).unsqueeze(0), n) for n in (10, 50, 64)]
    packed = table.at(torch.cat([torch.arange(n) for n in (10, 50, 64)]).unsqueeze(0), 64)
    for whole, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=0, atol=1e-6)
    mask = torch.tensor([[0] * 54 + [1] * 10, [1] * 64, [1] * 50 + [0] * 14])
    padded = table.at((mask.cumsum(1) - 1).clamp(min=0), 64)
    for row, n in ((0, 10), (1, 64), (2, 50)):
        for both, one in zip(padded, alone[{10: 0, 50: 1, 64: 2}[n]], strict=True):
            torch.testing.assert_close(both[row][mask[row].bool()], one[0], rtol=0, atol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_lengths_of_packed_sequences(sizes):
    positions = torch.cat([torch.arange(n) for n in sizes]).unsqueeze(0)
    assert _lengths(positions).tolist() == [[n for n in sizes for _ in range(n)]]


@pytest.mark.parametrize("by", [DynamicRope(2.0, 32), LongRope(SHORT, LONG, 32)])
def test_what_a_cache_holds_never_meets_other_frequencies(by):
    table = rotary(K, 64, THETA, by)
    table.at(torch.tensor([[31], [5]]), 32, cached=True)
    message = (
        f"position 32 is beyond original_max_position_embeddings (32): there {by.rope_type} scaling changes the frequencies of"
        " all positions, those in the cache too: keep what is read and generated within it"
    )
    more = ", or let short_factor be long_factor, so that one set serves all lengths" if isinstance(by, LongRope) else ""
    with pytest.raises(ConfigError, match=f"^{re.escape(message + more)}$"):
        table.at(torch.tensor([[5], [32]]), 33, cached=True)


def test_one_set_for_all_lengths_knows_no_border():
    table = rotary(K, 64, THETA, LongRope(LONG, LONG, 32))
    whole = table.at(torch.arange(50).unsqueeze(0), 50)
    for row, step in zip(whole, table.at(torch.tensor([[40]]), 41, cached=True), strict=True):
        assert torch.equal(row[:, 40:41], step)


@each
def test_fields_are_written_and_read(by):
    fields = by.to_hf()
    assert fields["rope_type"] == by.rope_type
    if isinstance(by, DynamicRope):
        fields["original_max_position_embeddings"] = by.original_max_position_embeddings
    assert scaling(fields) == by
    assert scaling(fields | {"attention_factor": fields.get("attention_factor")}) == by  # null is absent
    hash(by)


def test_plain_frequencies_have_no_scaling():
    assert scaling({"rope_type": "default"}) is None
    assert scaling({}) is None
    assert rotary(K, 64, THETA, None).magnitude == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_type": "yarm"},
            "rope_type ('yarm') must be one of default, linear, dynamic, yarn, llama3, longrope; did you mean 'yarn'?",
        ),
        ({"rope_type": "linear"}, "linear rotary scaling lacks factor: copy the config again"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "llama3 rotary scaling lacks low_freq_factor and high_freq_factor and original_max_position_embeddings: copy",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]},
            "mrope_section ([1]) is no field of linear rotary scaling, which has factor",
        ),
        ({"rope_type": "default", "factor": 2.0}, "factor (2.0) is no field of default rotary scaling, which has none"),
        ({"rope_type": "linear", "factor": 0.5}, "factor (0.5) of linear scaling must be a number from 1 on: 2 is usual"),
        ({"rope_type": "linear", "factor": "2"}, "factor ('2') of linear scaling must be a number from 1 on: 2 is usual"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor (nan) of linear scaling must be a number"),
        ({"rope_type": "linear", "factor": True}, "factor (True) of linear scaling must be a number"),
    ],
)
def test_fields_that_describe_no_scaling_are_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        scaling(fields)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DynamicRope(2.0, 1),
            "original_max_position_embeddings (1) of dynamic scaling must be a whole number from 2 on: it",
        ),
        (lambda: YarnRope(4.0, 32.5), "original_max_position_embeddings (32.5) of yarn scaling must be a whole number from 2 on"),
        (lambda: YarnRope(4.0, 32, attention_factor=-1), "attention_factor (-1) of yarn scaling must be a number from 0 on"),
        (
            lambda: YarnRope(4.0, 32, beta_fast=1, beta_slow=2),
            "beta_fast (1) of yarn scaling must not be below beta_slow (2): 32 and 1",
        ),
        (lambda: YarnRope(4.0, 32, truncate=1), "truncate (1) of yarn scaling must be true or false: true is usual"),
        (
            lambda: Llama3Rope(8.0, 4.0, 4.0, 32),
            "high_freq_factor (4) of llama3 scaling must be above low_freq_factor (4): 4 and 1 are usual",
        ),
        (
            lambda: LongRope((1.0, 0.0), (1.0, 1.0), 32),
            "short_factor of longrope scaling must be positive numbers, one for each pair of a head: (1.0, 0.0)",
        ),
        (lambda: LongRope((1.0,), "no", 32), "long_factor of longrope scaling must be positive numbers, one for each pair"),
        (
            lambda: LongRope((1.0,) * 8, (1.0,), 32).check(16, THETA, 64),
            "long_factor of longrope scaling has 1 numbers and must have 8, one for each pair of the 16 entries of a head that"
            " are turned: copy the config again",
        ),
        (lambda: DynamicRope(2.0, 32).check(2, THETA, 64), "head_dim (2) must be at least 4 for dynamic scaling: 64 is usual"),
        (
            lambda: DynamicRope(2.5, 33).check(16, THETA, 64),
            "max_positions (64) must be factor times original_max_position_embeddings of dynamic scaling (2.5 x 33): use 82",
        ),
        (lambda: YarnRope(4.0, 32).check(16, 1.0, 64), "rope_theta (1) must be above 1 for yarn scaling: 10000 is usual"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build()
