"""Compressing a whole model: what changes, what does not, and that batched stays alone (law L2)."""

import pytest
import torch
from torch import nn

from athanor.compress.apply import compress, weight_error
from athanor.compress.linear import QuantLinear
from athanor.core.errors import ConfigError
from athanor.infer.engine import Engine
from athanor.types import Request, SamplingParams

kinds = pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32)])


def quantised(model):
    return {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def close(a, b):
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@kinds
def test_every_matrix_of_the_blocks_and_nothing_else(tiny, bits, group):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = compress(model, bits, group)
    names = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
    assert quantised(small) == {f"blocks.{i}.{name}" for i in range(2) for name in names}
    assert isinstance(small.head, nn.Linear)
    assert small.config == model.config and not small.training
    # The given model keeps its weights, and shares none of them with the new one.
    assert not quantised(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for x in (*small.parameters(), *small.buffers()):
            x.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_rest_is_rounded_to_bfloat16_and_stays_float32(tiny):
    model = tiny()
    small = compress(model, 8)
    for name, p in small.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, model.get_parameter(name).bfloat16().float()), name


@kinds
@torch.no_grad()
def test_it_computes_what_a_plain_model_with_the_rounded_weights_computes(tiny, tokenizer, bits, group):
    model = tiny()
    small = compress(model, bits, group)
    for name, p in model.named_parameters():
        layer = small.get_submodule(name.rpartition(".")[0])
        p.copy_(layer.dequantised() if isinstance(layer, QuantLinear) else small.get_parameter(name))
    ids = torch.randint(tokenizer.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    assert close(small(ids), model(ids))


@kinds
@torch.no_grad()
def test_batched_is_alone(tiny, tokenizer, bits, group):
    small = compress(tiny(), bits, group)
    ids = torch.randint(tokenizer.vocab_size, (70, 12), generator=torch.Generator().manual_seed(0))
    together = small(ids)
    for i in (0, 1, 69):
        assert close(small(ids[i : i + 1]), together[i : i + 1])


@kinds
def test_the_engine_gives_the_same_answers_whatever_else_is_in_the_batch(tiny, tokenizer, bits, group):
    small = compress(tiny(), bits, group)
    requests = [
        Request(str(i), [tokenizer.bos_id, *range(20, 21 + i)], SamplingParams(temperature=0, max_tokens=8)) for i in range(20)
    ]
    together = Engine(small, tokenizer).generate(requests)
    for i in (0, 7, 19):
        alone = Engine(small, tokenizer).generate([requests[i]])[0]
        assert alone.ids == together[i].ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-5)
        # cached = uncached
        ids = torch.tensor([[*requests[i].prompt_ids, *alone.ids]])
        with torch.no_grad():
            logprobs = small(ids).log_softmax(-1)[0, -len(alone.ids) - 1 : -1].gather(1, ids[:, -len(alone.ids) :].t())
        assert logprobs.flatten().tolist() == pytest.approx(alone.logprobs, abs=1e-4)


def test_patterns_leave_matrices_out(tiny):
    small = compress(tiny(), 4, skip=("blocks.0.*", "*.down"))
    names = ("attention.qkv", "attention.out", "feed_forward.gate_up")
    assert quantised(small) == {f"blocks.1.{name}" for name in names}


def test_the_error_is_that_of_the_weights(tiny):
    model = tiny()
    small = compress(model, 4, skip=("blocks.0.*",))
    errors = torch.cat(
        [
            (model.get_submodule(name).weight.detach() - small.get_submodule(name).dequantised()).abs().flatten()
            for name in sorted(quantised(small))
        ]
    )
    largest, mean = weight_error(model, small)
    assert largest == pytest.approx(float(errors.max()))
    assert mean == pytest.approx(float(errors.mean()), rel=1e-5)


def test_a_bfloat16_model_stays_one(tiny, tokenizer):
    model = tiny().to(torch.bfloat16)
    small = compress(model, 8)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = small(torch.arange(16).view(1, 16))
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_a_quantised_model_is_not_quantised_again(tiny):
    with pytest.raises(ConfigError, match="the model is quantised to 4 bits already: start from the checkpoint that it was made"):
        compress(compress(tiny(), 4), 8)


def test_a_pattern_that_matches_nothing_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"skip pattern 'blocks.0.down' matches no matrix; did you mean 'blocks.0.*; there are"):
        compress(tiny(), 8, skip=("blocks.0.down",))


def test_leaving_everything_out_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"nothing is left to quantise: skip \(\*\) leaves out every matrix; name fewer"):
        compress(tiny(), 8, skip=("*",))


def test_bits_groups_and_widths_that_cannot_be_are_refused(tiny):
    with pytest.raises(ConfigError, match="bits is 16 but must be 8 or 4"):
        compress(tiny(), 16)
    with pytest.raises(ConfigError, match="group is 8 but must be 32, 64 or 128"):
        compress(tiny(), 4, 8)
    with pytest.raises(ConfigError, match=r"group \(64\) must divide the 32 columns of blocks\.0\.attention\.qkv: use group 32"):
        compress(tiny(), 4, 64)
    with pytest.raises(
        ConfigError, match=r"group \(32\) must divide the 40 columns of .*feed_forward\.down: none of 32, 64, 128"
    ):
        compress(tiny(d_ff=40), 4)


def test_weights_that_are_not_finite_are_refused(tiny):
    model = tiny()
    with torch.no_grad():
        model.blocks[1].attention.out.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="the weights hold inf or nan"):
        compress(model, 8)
