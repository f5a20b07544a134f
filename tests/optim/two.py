"""Two processes that train one model, for tests of tensors that are spread over them; run by torch.multiprocessing."""

import os
import socket

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from athanor.optim.build import OptimConfig, build
from athanor.optim.ema import EMA
from athanor.optim.sharded import local, part, whole

# Rows and columns that do not come out even, a batch of matrices, a vector; how two processes hold each.
SHAPES = {
    "blocks.0.up.weight": ((7, 6), [Shard(0)]),
    "blocks.0.down.weight": ((6, 7), [Shard(1)]),
    "blocks.1.up.weight": ((7, 6), [Shard(0)]),
    "blocks.1.down.weight": ((6, 7), [Replicate()]),
    "blocks.1.experts.weight": ((3, 6, 4), [Shard(1)]),
    "blocks.1.norm.weight": ((5,), [Shard(0)]),
    "blocks.1.plain.weight": ((6, 6), None),
    "embedding.weight": ((9, 6), [Shard(0)]),
}


def model_of(spread, dtype=torch.float32):
    """A model of parameters with these names; `spread` says how a parameter of a name is made of its value."""
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    for name, (shape, _) in SHAPES.items():
        *path, leaf = name.split(".")
        at = root
        for key in path:
            if key not in dict(at.named_children()):
                at.add_module(key, nn.Module())
            at = getattr(at, key)
        value = torch.randn(shape, generator=generator).to(dtype)
        at.register_parameter(leaf, nn.Parameter(spread(name, value)))
    return root


def train(config, spread, dtype=torch.float32, steps=3):
    """Weights by name after some steps with gradients that depend on the step alone, and their averages."""
    model = model_of(spread, dtype)
    optimizers = build(model, config)
    ema = EMA(model, 0.8)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step + 1)
        for name, p in model.named_parameters():
            p.grad = spread(name, torch.randn(SHAPES[name][0], generator=generator).to(dtype))
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
    params = dict(model.named_parameters())
    states = {n: [v for o in optimizers for v in o.state.get(p, {}).values()] for n, p in params.items()}
    averages = {n: whole(local(a), a) for n, a in ema.averages.items()}
    return {n: whole(local(p).detach(), p) for n, p in params.items()}, averages, states


def one(rank, port, configs, results):
    """A process: sharded beside whole, of every optimiser."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    td.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def spread(name, value):
        placements = SHAPES[name][1]
        return value if placements is None else distribute_tensor(value, mesh, placements, src_data_rank=None)

    found = {}
    for config, dtype in configs:
        ours, averages, states = train(config, spread, dtype)
        expected, expected_averages, _ = train(config, lambda _, value: value, dtype)
        gaps = [float((ours[n] - expected[n]).abs().max()) for n in expected]
        gaps += [float((averages[n] - expected_averages[n]).abs().max()) for n in expected_averages]
        held = local(spread("blocks.0.up.weight", torch.empty(7, 6))).shape
        momenta = [local(v).shape == held for v in states["blocks.0.up.weight"]]
        found[config.name, str(dtype)] = max(gaps), any(momenta)
    value = torch.arange(42.0).view(7, 6)
    like = spread("blocks.0.up.weight", value)
    found["inverse"] = torch.equal(part(value, like), local(like)) and torch.equal(whole(local(like), like), value)
    results.put((rank, found))
    td.destroy_process_group()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


CONFIGS = [(OptimConfig(name, lr=0.01, weight_decay=0.1), torch.float32) for name in ("muon", "adamw", "sgd", "adafactor")]
CONFIGS.append((OptimConfig("muon", lr=0.01), torch.bfloat16))
