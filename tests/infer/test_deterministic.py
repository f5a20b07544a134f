"""The deterministic engine: bit for bit the same, whoever else is answered and whatever is in the cache."""

from dataclasses import replace

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.infer.engine import BLOCK, Engine
from athanor.models import deepseek_v3, gemma, gpt2, io, llama, mixtral, qwen3_moe
from athanor.nn import native
from athanor.nn.experts import Experts
from athanor.nn.moe import MixtureOfExperts
from athanor.types import Request, SamplingParams
from tests.infer.test_paths import GENERATING, Letters, random_model
from tests.models.reference import config_of

COUNT = 20
CONFIGS = {
    "llama": llama.Config(512, 192, 2, 6, 2, 500, max_positions=256),
    "gpt2": gpt2.Config(512, 192, 2, 6, 256, 768),
    "gemma": gemma.Config(512, 192, 2, 6, 2, 512, max_positions=256, version=2, head_dim=32, window=24, attention_softcap=30.0),
    "mixtral": mixtral.Config(512, 192, 2, 6, 2, 256, max_positions=256, n_experts=6),
    "qwen3_moe": qwen3_moe.Config(512, 192, 2, 6, 2, 256, max_positions=256, n_experts=20, top_k=4, d_expert=64, head_dim=32),
    "deepseek_v3": deepseek_v3.Config(
        512,
        192,
        2,
        6,
        d_ff=256,
        max_positions=256,
        n_experts=8,
        top_k=3,
        d_expert=64,
        n_groups=2,
        top_groups=1,
        first_dense=1,
        query_rank=32,
        latent_rank=32,
        head_dim=16,
        nope_dim=16,
        value_dim=16,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=[(n, p) for n in CONFIGS for p in DTYPES], ids="-".join)
def case(request):
    """An engine maker, prompts that begin alike, and what the engine answers to each alone."""
    name, precision = request.param
    model = random_model(name, CONFIGS[name], std=0.1)
    if not all(m.steady(DTYPES[precision]) for m in model.modules() if isinstance(m, Experts)):
        # PyTorch's products change with the rows of an expert: then such an engine is refused, which another test asks.
        pytest.skip(f"experts are steady in C++ alone, and for {precision} there is none here")
    draw = torch.Generator().manual_seed(1)

    def text(n):
        return torch.randint(3, 512, (n,), generator=draw).tolist()

    def make(**options):
        return Engine(model, Letters(512), precision=precision, deterministic=True, **options)

    shared = text(2 * BLOCK + 3)
    prompts = [[*shared, *text(5)], text(4), [*shared, *text(9)], text(BLOCK), shared[: BLOCK + 1], text(70)]
    return make, prompts, [answers(make(), [prompt])[0] for prompt in prompts]


def answers(engine, prompts):
    """What comes out of each, greedy or drawn. The longest asks for log-probabilities of its prompt."""
    params = [SamplingParams(temperature=t, seed=i, max_tokens=COUNT) for i, t in enumerate((0, 1, 0.7))]
    told = {70: 0}  # by the length of a prompt
    requests = [Request(str(i), p, replace(params[len(p) % 3], prompt_logprobs=told.get(len(p)))) for i, p in enumerate(prompts)]
    return [(a.ids, a.logprobs, [t and t.logprob for t in a.prompt_logprobs or ()]) for a in engine.generate(requests)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 3},
        {"step_tokens": 7, "max_batch": 4},
        {"share": False},
        {"cache_tokens": 8 * BLOCK, "max_len": 8 * BLOCK - 1},
    ],
    ids=str,
)
def test_batched_is_alone_and_cached_is_cold(case, options):
    make, prompts, alone = case
    engine = make(**options)
    assert answers(engine, prompts) == alone
    assert answers(engine, prompts[::-1])[::-1] == alone
    stats = engine.stats()
    assert stats.prefix_hits > 0 or not engine.scheduler.blocks.share
    assert stats.preemptions > 0 or "cache_tokens" not in options


@pytest.mark.parametrize(
    ("name", "why"), [("t5", "reads a source"), ("rnn_lm", "keeps recurrent states"), ("mixtral", "sends tokens")]
)
def test_families_that_are_not(name, why, monkeypatch):
    monkeypatch.setattr(native, "fits", lambda *_: False)  # PyTorch's products depend on how many rows an expert has
    model = io.build(name, config_of(next(case for case in GENERATING if case[0] == name)), seed=0)
    if name == "t5":
        model.token_ids = replace(model.token_ids, decoder_start=1)
    with pytest.raises(
        ConfigError, match=f"a {name} {why}.*so that what is computed beside may change its last bits: leave `deterministic` out"
    ):
        Engine(model, Letters(model.config.vocab_size), deterministic=True)


def test_not_compiled_too(model, tokenizer):
    with pytest.raises(ConfigError, match="compiled or deterministic: leave one of `compile` and `deterministic` out"):
        Engine(model, tokenizer, compile=True, deterministic=True)


def test_experts_with_a_capacity_are_not(monkeypatch):
    """Whom they compute depends on who is there."""
    monkeypatch.setattr(native, "fits", lambda *_: True)
    model = random_model("mixtral", CONFIGS["mixtral"])
    Engine(model, Letters(512), deterministic=True)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.capacity = 3
    with pytest.raises(ConfigError, match="a mixtral sends tokens to experts, so that what is computed beside may change"):
        Engine(model, Letters(512), deterministic=True)
