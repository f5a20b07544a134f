"""What a model costs: against published counts, and against PyTorch's own counter of FLOPs on models that are run."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.compress.apply import compress
from athanor.core import plugins
from athanor.core.errors import ConfigError
from athanor.models import io
from athanor.models._head_names import names_of
from athanor.models._profile import _numbers, profile
from athanor.models.base import EncoderDecoder, TokenIds
from athanor.models.heads import HEADS, attach
from athanor.nn.context import Bidirectional
from athanor.nn.moe import MixtureOfExperts
from athanor.nn.paged import PagedCache

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
    """PyTorch's counter knows neither grouped products nor recurrent kernels."""
    cases = []
    for name in plugins.names("models"):
        module = plugins.load("models", name)
        if module.Model.kind != "tagger" and name != "rnn_lm":
            models = {p: io.build(name, config) for p, config in module.PRESETS.items() if p.startswith("tiny")}
            cases += [(name, p) for p, m in models.items() if not any(isinstance(x, MixtureOfExperts) for x in m.modules())]
    return cases


@pytest.mark.parametrize("case", countable(), ids="-".join)
def test_flops_are_those_that_pytorch_counts(case):
    name, preset = case
    model = io.build(name, plugins.load("models", name).PRESETS[preset], seed=0).eval()
    found = profile(model, TIME)
    ran = counted(model, lambda ids: model(ids, ids) if isinstance(model, EncoderDecoder) else model(ids))
    assert found.flops_forward * TIME == pytest.approx(ran, rel=1e-9)
    assert found.flops_backward == 2 * found.flops_forward


TIME = 16


def counted(model, call):
    """FLOPs of a call as PyTorch counts them: whole rectangles of scores, masked or not, which is put right here."""
    ids = torch.randint(3, 300, (1, TIME))
    ids[0, [1, -1]] = 2  # an end of text, and the separator after a question of one token
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(ids)
    visible = _pairs(model, TIME)
    hidden = sum(m.per_pair * (TIME - visible(path, m)) for path, m in model.named_modules() if hasattr(m, "per_pair"))
    return counter.get_total_flops() - hidden * TIME


def headed():
    """Families of which transformers has a head, and its task."""
    for name, preset in countable():
        trunk = io.build(name, plugins.load("models", name).PRESETS[preset])
        for task in HEADS if preset == "tiny" else ():
            with contextlib.suppress(ConfigError):
                names_of(trunk, task)
                yield (name, preset), task


@pytest.mark.parametrize(("case", "task"), list(headed()))
def test_flops_of_a_head_are_those_that_pytorch_counts(case, task):
    """A head that pools runs once for a sequence, and the decoder of an encoder-decoder stays causal."""
    name, preset = case
    trunk = io.build(name, plugins.load("models", name).PRESETS[preset], seed=0)
    model = attach(trunk, task, generator=torch.Generator().manual_seed(0)).eval()
    model.token_ids = TokenIds(eos=(2,), decoder_start=0)
    found = profile(model, TIME)
    assert found.flops_forward * TIME == pytest.approx(counted(model, model), rel=1e-9)


@pytest.mark.parametrize("architecture", ["BertForNextSentencePrediction", "BertForPreTraining"])
def test_berts_pooler_runs_once_or_not_at_all(architecture):
    model = io.build("bert", plugins.load("models", "bert").PRESETS["tiny"])
    model.become(architecture, lambda name: True)
    model = model.to_empty(device="cpu").eval()
    pairs = model.task == "following"
    found = profile(model, TIME)
    whole = Bidirectional(1, TIME, torch.device("cpu"))
    ran = counted(model, lambda ids: model.next_sentence(model.hidden(ids, whole)[:, 0]) if pairs else model(ids))
    assert found.flops_forward * TIME == pytest.approx(ran, rel=1e-9)
    unused = 0 if pairs else sum(p.numel() for m in (model.pooler, model.following) for p in m.parameters())
    assert found.active == found.parameters - unused


@pytest.mark.parametrize(("who", "unused"), [("none", ("query_global", "kv_global")), ("first", ())])
def test_longformer_runs_what_its_global_tokens_need(who, unused):
    model = io.build("longformer", plugins.load("models", "longformer").PRESETS["tiny"], seed=0).eval()
    model.global_tokens = who
    found = profile(model, TIME)
    assert found.flops_forward * TIME == pytest.approx(counted(model, model), rel=1e-9)
    named = [(name.split("."), p.numel()) for name, p in model.named_parameters()]
    assert found.active == found.parameters - sum(n for name, n in named if not set(unused).isdisjoint(name))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_matrices_count_as_those_that_they_stand_for(tiny, bits):
    model = tiny()
    small = compress(model, bits, 32 if bits == 4 else None)
    whole, found = profile(model, TIME), profile(small, TIME)
    for name in ("parameters", "active", "flops_forward", "training_bytes", "cache_per_token"):
        assert getattr(found, name) == getattr(whole, name)
    assert [(p.name, p.parameters, p.flops, p.inside) for p in found.parts] == [
        (p.name, p.parameters, p.flops, p.inside) for p in whole.parts
    ]
    assert small.n_parameters() == model.n_parameters()
    assert found.weights_bytes == sum(x.numel() * x.element_size() for x in small.state_dict().values()) < whole.weights_bytes


def test_what_generation_keeps_is_what_an_engine_keeps(tiny):
    for model in (tiny(), tiny().bfloat16()):
        layers = model.cache_layers()
        kept = profile(model, 64).cache_per_token
        assert kept == PagedCache.bytes_per_token(layers, torch.float32) == 2 * PagedCache.bytes_per_token(layers, torch.bfloat16)


def _pairs(model, time):
    """Of a module, how many keys a query sees on average: counted one by one."""

    first = getattr(getattr(model, "trunk", model), "global_tokens", "none") != "none"  # is seen from anywhere

    def visible(path, module):
        window = module.scoring.window
        causal = model.kind == "decoder" or (
            model.kind == "encoder_decoder" and "decoder" in path.split(".") and "cross" not in path
        )
        seen = 0
        for q in range(time):
            for k in range(time):
                back = q - k
                inside = window is None or (back < window if causal else abs(back) <= window) or (first and k == 0)
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
    assert wide.cache_per_token == 2 * 2 * 2 * 8 * 4 == narrow.cache_per_token  # layers, keys and values, heads, width, float32
    assert wide.inference_bytes == wide.weights_bytes + 64 * wide.cache_per_token
    assert wide.training_bytes == narrow.training_bytes == 16 * model.n_parameters()
    assert profile(model).context == 128


@pytest.mark.parametrize(
    ("at", "words"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([1, 3], "1, 3"), ([0, 1, 3, 4], "0-1, 3-4"), (list(range(0, 12, 2)), "0, 2, 4 ... 10")],
)
def test_numbers_of_layers(at, words):
    assert _numbers(at) == words
