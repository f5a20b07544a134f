"""What is said to be looked at is what transformers' own attention looks at, for every family that has attention."""

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.models import io
from athanor.models._attention import attention_maps
from athanor.models.heads import attach
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, WithMemory
from athanor.nn.watch import Watched
from tests.models.reference import answered, cases, config_of, greatest, inputs, logits, ours_of, random_ids, theirs_of


@pytest.mark.parametrize(
    "case", [c for c in cases("decoder", "encoder", "encoder_decoder") if c[0] != "longformer"], ids="-".join
)
def test_maps_are_those_of_transformers(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config, "eager")
    ours = ours_of(theirs, tmp_path)
    given = inputs(config, ours.kind, rows=1)
    with torch.no_grad():
        found = theirs(**given, output_attentions=True)
    both = ours.kind == "encoder_decoder"
    maps = attention_maps(ours, given["input_ids"][0], answered(given)[0] if both else None)
    names = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
    expected = {name: found[field] for name, field in (names if both else {"attention": "attentions"}).items()}
    assert maps.keys() == expected.keys()
    for name, layers in expected.items():
        assert maps[name].shape[0] == len(layers)
        assert greatest(maps[name].sum(-1), torch.ones(())) <= 1e-5
        for mine, theirs_ in zip(maps[name], layers, strict=True):
            assert greatest(mine, theirs_[0]) <= 1e-5


def test_longformer_looks_through_its_window(tmp_path):
    ours = ours_of(theirs_of(config_of(("longformer", "tiny"))), tmp_path)
    maps = attention_maps(ours, random_ids(ours.config, 40))["attention"]
    for layer, window in enumerate(ours.config.windows):
        far = (torch.arange(40)[:, None] - torch.arange(40)).abs() > window // 2
        assert not maps[layer][:, far].any()
    assert greatest(maps.sum(-1), torch.ones(())) <= 1e-5


@pytest.mark.parametrize("case", [("gpt2", "tiny"), ("gemma", "tiny-2"), ("bert", "tiny"), ("t5", "tiny")], ids="-".join)
def test_a_watched_model_computes_the_same_bits(case):
    config = config_of(case)
    model = io.build(case[0], config, seed=0).eval()
    given = inputs(config, model.kind)
    ids = given["input_ids"]
    with torch.no_grad():
        if model.kind == "encoder_decoder":
            memory = Memory(model.encode(ids, Watched(Bidirectional(*ids.shape))))
            answer = given["decoder_input_ids"]
            found = model.logits(model.hidden(answer, Watched(WithMemory(Causal(*answer.shape), memory))))
        else:
            plain = Causal(*ids.shape) if model.kind == "decoder" else Bidirectional(*ids.shape)
            found = model.logits(model.hidden(ids, Watched(plain)))
        assert torch.equal(found, logits(model, given))


def test_padded_and_packed_sequences_look_at_themselves():
    config = config_of(("bert", "tiny"))
    model = io.build("bert", config, seed=0).eval()
    ids = random_ids(config, 12)
    with torch.no_grad():
        packed = Watched(Packed(torch.tensor([5, 7]), causal=False))
        model.hidden(ids[None], packed)
        mask = torch.tensor([[0, 0] + [1] * 5, [1] * 7])
        padded = Watched(Padded(mask, causal=False))
        model.hidden(torch.stack((torch.cat((ids[:2], ids[:5])), ids[5:])), padded)
    whole, first, second = packed.maps[0][0], padded.maps[0][0], padded.maps[0][1]
    assert not whole[:, :5, 5:].any() and not whole[:, 5:, :5].any() and not first[:, 2:, :2].any()
    assert greatest(whole[:, :5, :5], first[:, 2:, 2:]) <= 1e-6 and greatest(whole[:, 5:, 5:], second) <= 1e-6


def test_a_model_with_a_head_is_looked_into(tmp_path):
    model = io.build("bert", config_of(("bert", "tiny")), seed=0).eval()
    ids = random_ids(model.config, 6)
    expected = attention_maps(model, ids)["attention"]
    headed = attach(model, "token", 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attention_maps(headed, ids)["attention"], expected)


def test_refused():
    ids = torch.tensor([4, 5, 6])
    with pytest.raises(ConfigError, match="a rnn_lm has no attention, so there is nothing to see: take a Transformer"):
        attention_maps(io.build("rnn_lm", config_of(("rnn_lm", "tiny")), seed=0), ids)
    with pytest.raises(ConfigError, match="a t5 reads a source and an answer: give both"):
        attention_maps(io.build("t5", config_of(("t5", "tiny")), seed=0), ids)
    with pytest.raises(ConfigError, match="a llama reads one text: leave the answer out"):
        attention_maps(io.build("llama", config_of(("llama", "tiny")), seed=0), ids, ids)
