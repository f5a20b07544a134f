"""What a model costs: against published counts, and against PyTorch's own counter of FLOPs on models that are run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.core import plugins
from athanor.models import io
from athanor.models._profile import _numbers, profile
from athanor.models.base import EncoderDecoder
from athanor.nn.moe import MixtureOfExperts

# Parameters, and those of one token where these are fewer, as the authors or Hugging Face's pages give them.
PUBLISHED = {
    ("gpt2", "gpt2"): (124_439_808, None),
    ("llama", "llama-2-7b"): (6_738_415_616, None),
    ("llama", "llama-3-8b"): (8_030_261_248, None),
    ("mistral", "mistral-7b-v0.1"): (7_241_732_096, None),
    ("qwen2", "qwen2.5-0.5b"): (494_032_768, None),
    ("mixtral", "mixtral-8x7b"): (46_702_792_704, 12_879_925_248),
    ("qwen3_moe", "qwen3-30b-a3b"): (30_532_122_624, 3_353_032_704),
    ("t5", "t5-small"): (60_506_624, None),
    ("bart", "bart-large"): (406_291_456, None),
}


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_published_sizes(case):
    found = profile(io.build(case[0], plugins.load("models", case[0]).PRESETS[case[1]]))
    parameters, active = PUBLISHED[case]
    assert found.parameters == parameters == sum(part.parameters for part in found.parts)
    assert found.active == (active or parameters)


def countable():
    """PyTorch's counter knows neither grouped products nor recurrent kernels, and blocks of a band are padded."""
    cases = []
    for name in plugins.names("models"):
        module = plugins.load("models", name)
        if module.Model.kind != "tagger" and name not in ("rnn_lm", "longformer"):
            models = {p: io.build(name, config) for p, config in module.PRESETS.items() if p.startswith("tiny")}
            cases += [(name, p) for p, m in models.items() if not any(isinstance(x, MixtureOfExperts) for x in m.modules())]
    return cases


@pytest.mark.parametrize("case", countable(), ids="-".join)
def test_flops_are_those_that_pytorch_counts(case):
    """PyTorch counts whole rectangles of scores, masked or not: that is put right here."""
    name, preset = case
    model = io.build(name, plugins.load("models", name).PRESETS[preset], seed=0).eval()
    time = 16
    found = profile(model, time)
    ids = torch.randint(0, 300, (1, time))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, ids) if isinstance(model, EncoderDecoder) else model(ids)
    counted = counter.get_total_flops()
    visible, whole = _pairs(model, time), time
    pairs = sum(m.per_pair * (whole - visible(path, m)) for path, m in model.named_modules() if hasattr(m, "per_pair"))
    assert found.flops_forward * time + pairs * time == pytest.approx(counted, rel=1e-9)
    assert found.flops_backward == 2 * found.flops_forward


def _pairs(model, time):
    """Of a module, how many keys a query sees on average: counted one by one."""

    def visible(path, module):
        window = module.scoring.window
        causal = model.kind == "decoder" or (
            model.kind == "encoder_decoder" and path.startswith("decoder") and "cross" not in path
        )
        seen = 0
        for q in range(time):
            for k in range(time):
                back = q - k
                inside = window is None or (back < window if causal else abs(back) <= window)
                seen += inside and (back >= 0 or not causal)
        return seen / time

    return visible


def test_a_mixture_computes_its_chosen_experts():
    presets = plugins.load("models", "mixtral").PRESETS
    config = presets["tiny"]
    found = profile(io.build("mixtral", config), 8)
    dense = 2 * config.d_model * (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    experts = config.top_k * 3 * 2 * config.d_model * config.d_ff
    router = 2 * config.n_experts * config.d_model
    scores = 4 * config.n_heads * config.head_dim * 4.5  # keys that a query sees, on average of eight
    output = 2 * config.vocab_size * config.d_model
    assert found.flops_forward == config.n_layers * (dense + experts + router + scores) + output


def test_recurrent_models_keep_a_state_and_no_tokens():
    config = plugins.load("models", "rnn_lm").PRESETS["tiny"]
    found = profile(io.build("rnn_lm", config))
    assert found.cache_per_token == 0 and found.cache_per_sequence == 4 * 2 * config.d_hidden * config.n_layers
    gates = 2 * 4 * config.d_hidden * (config.d_hidden + config.d_hidden)
    assert found.flops_forward == config.n_layers * gates + 2 * config.vocab_size * config.d_embedding


def test_memory_goes_by_dtype_and_context(tiny):
    model = tiny()
    wide, narrow = profile(model, 64), profile(model.bfloat16(), 64)
    assert wide.weights_bytes == 4 * model.n_parameters() == 2 * narrow.weights_bytes
    assert wide.cache_per_token == 2 * 2 * 2 * 8 * 4 == 2 * narrow.cache_per_token  # layers, keys and values, heads, width
    assert wide.inference_bytes == wide.weights_bytes + 64 * wide.cache_per_token
    assert wide.training_bytes == narrow.training_bytes == 16 * model.n_parameters()
    assert profile(model).context == 128


@pytest.mark.parametrize(
    ("at", "words"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([1, 3], "1, 3"), ([0, 1, 3, 4], "0-1, 3-4"), (list(range(0, 12, 2)), "0, 2, 4 ... 10")],
)
def test_numbers_of_layers(at, words):
    assert _numbers(at) == words
