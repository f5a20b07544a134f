"""A tiny random model of every architecture and a loss that reaches all of its blocks, for tests of what is done to models."""

import torch

from athanor.core import plugins
from athanor.models import io
from athanor.nn.context import Bidirectional, Memory, Packed, WithMemory
from athanor.nn.moe import MixtureOfExperts

LENGTHS = (9, 23, 1, 15)


def cases():
    """(architecture, name of preset) of every tiny preset."""
    found = []
    for name in plugins.names("models"):
        module = plugins.require("models", name, "Model", "PRESETS")
        found += [(name, preset) for preset in module.PRESETS if preset.startswith("tiny")]
    return found


def random_model(case):
    """Every weight random, so that every block changes the loss."""
    name, preset = case
    model = io.build(name, plugins.load("models", name).PRESETS[preset], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.15, generator=generator)
    return model.train()


def hidden(model, seed=2):
    """Final hidden states of sequences laid end to end, (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (1, sum(LENGTHS)), generator=generator)
    lengths = torch.tensor(LENGTHS)
    if model.kind == "encoder_decoder":
        answers = torch.randint(3, model.config.vocab_size, (1, 12), generator=generator)
        memory = Memory(model.encode(ids, Packed(lengths, causal=False)), lengths)
        return model.hidden(answers, WithMemory(Packed(torch.tensor([3, 4, 2, 3])), memory))[0]
    if model.kind == "tagger":
        return model.hidden(ids.view(4, -1), Bidirectional(4, ids.numel() // 4, ids.device)).flatten(0, 1)
    return model.hidden(ids, Packed(lengths, causal=model.kind == "decoder"))[0]


def loss(model):
    """A scalar of all hidden states; of mixtures with their balancing losses."""
    out = hidden(model)
    weights = torch.linspace(-1.0, 1.0, out.numel()).view_as(out)
    total = (out.float() * weights).sum()
    added = model.router_loss()
    return total if added is None else total + added


def gradients(model):
    """The loss and all gradients by name, and what experts counted; random numbers begin at 7."""
    torch.manual_seed(7)
    model.zero_grad()
    value = loss(model)
    value.backward()
    found = {"loss": value.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for i, m in enumerate(m for m in model.modules() if isinstance(m, MixtureOfExperts)):
        found |= {f"load.{i}": m.load.clone(), f"dropped.{i}": m.dropped.clone()}
        m.reset()
    return found
