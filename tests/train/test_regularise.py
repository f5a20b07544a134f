"""Dropout by hooks: transformers' own masks, and what it must not change."""

import re

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.models import io
from athanor.train.regularise import dropout
from tests.models.reference import config_of, inputs, logits, theirs_of
from tests.train.every_model import cases, hidden, random_model

# What transformers calls the same dropout, and the ones of scores and activations, which there are none of here.
THEIRS = {
    "bert": (("hidden_dropout_prob",), ("attention_probs_dropout_prob",)),
    "gpt2": (("embd_pdrop", "resid_pdrop"), ("attn_pdrop",)),
    "bart": (("dropout",), ("attention_dropout", "activation_dropout")),
}


@pytest.mark.parametrize("family", THEIRS)
def test_with_the_same_seed_it_is_that_of_transformers(family, tmp_path):
    config = config_of((family, "tiny"))
    theirs_of(config).save_pretrained(tmp_path)
    ours = io.load(tmp_path).train()
    same, none = THEIRS[family]
    options = dict.fromkeys(same, 0.3) | dict.fromkeys(none, 0.0)
    theirs = type(theirs_of(config)).from_pretrained(tmp_path, **options).train()
    dropout(ours, 0.3)
    given = inputs(config, ours.kind)
    torch.manual_seed(3)
    expected = theirs(**given).logits
    torch.manual_seed(3)
    found = logits(ours, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(ours, given), atol=0.1)  # the next masks are others


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_every_architecture(case):
    model = random_model(case)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def compute(seed=0):
        torch.manual_seed(seed)
        with torch.no_grad():
            return hidden(model)

    plain = compute()
    dropout(model, 0.0)
    assert torch.equal(compute(), plain)
    remove = dropout(model, 0.2)
    dropped = compute()
    assert not torch.allclose(dropped, plain)
    assert torch.equal(dropped, compute())  # torch's global generator is all it draws from
    assert not torch.allclose(dropped, compute(seed=1))
    assert model.state_dict().keys() == state.keys()
    model.eval()
    in_evaluation = compute()
    remove()
    assert torch.equal(compute(), in_evaluation)
    model.train()
    assert torch.equal(compute(), plain)


@pytest.mark.parametrize("case", [("llama", "tiny"), ("t5", "tiny"), ("mixtral", "tiny")], ids="-".join)
def test_every_branch_and_every_stack_drops_a_share_and_keeps_the_mean(case):
    model = random_model(case)
    dropout(model, 0.25)
    seen = {}

    def look(name, at_input):
        def hook(module, args, out=None):
            seen.setdefault(name, []).append(args[0] if at_input else out)

        return hook

    decoder = model.decoder if model.kind == "encoder_decoder" else model
    stacks = [model.encoder, model.decoder] if model.kind == "encoder_decoder" else [model]
    for i, stack in enumerate(stacks):
        stack.blocks[0].register_forward_pre_hook(look(f"embeddings {i}", at_input=True))
    for name in ("attention", "feed_forward", "cross"):
        branch = getattr(decoder.blocks[1], name, None)
        if branch is not None:
            branch.register_forward_hook(look(name, at_input=False))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(30):
            hidden(model)
    expected = 3 + (model.kind == "encoder_decoder") * 2
    assert len(seen) == expected
    for name, tensors in seen.items():
        zeros = torch.cat([(t == 0).flatten() for t in tensors]).double().mean()
        assert abs(zeros - 0.25) < 0.02, name
    model.eval()
    with torch.no_grad():
        hidden(model)
    inner = torch.stack(seen["embeddings 0"][:-1]).double()
    exact = seen["embeddings 0"][-1].double()
    kept = inner != 0
    torch.testing.assert_close(inner[kept], (exact / 0.75).expand_as(inner)[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_values_out_of_range_are_refused(p):
    with pytest.raises(ConfigError, match=re.escape(f"dropout ({p}) must lie in [0, 1): 0.1 is usual")):
        dropout(random_model(("llama", "tiny")), p)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="has no blocks"):
        dropout(torch.nn.Linear(2, 2), 0.1)
