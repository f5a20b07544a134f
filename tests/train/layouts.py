"""A run of some steps under any layout, in processes that are there already: `serve` takes one layout after another."""

import dataclasses
import os
import queue
import traceback
from functools import cache
from unittest import mock

import torch
import torch.distributed as td

from athanor.core import plugins
from athanor.data import pairs
from athanor.data.pack import join, pack, select
from athanor.models import io as models
from athanor.nn.context import Packed
from athanor.objectives import next_token
from athanor.objectives._pretraining import choose, generator
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import Rendered
from athanor.train import support
from athanor.train.parallel import pipeline
from athanor.train.parallel.base import ALONE, local
from athanor.train.parallel.distributed import Distributed
from athanor.train.parallel.layout import parse
from athanor.train.parallel.pipeline import Pipelined
from athanor.train.state import Progress, StateStore
from athanor.train.step import train_step
from athanor.types import IGNORE, Batch

VOCAB = 160
LOSS, WEIGHT = 1e-5, 1e-4  # largest distances of mean losses and of weights


def config(arch="llama", **fields):
    shape = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_positions": 64}
    if arch == "deepseek_v3":
        return plugins.load("models", arch).PRESETS["tiny"]
    kind = plugins.load("models", arch).Config
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in shape.items() if k in known} | fields)


def ragged(step, sequences=10):
    """Micro-batches of a step: sequences of 3 to 24 tokens, a third of the labels masked."""
    out = []
    for part in range(2):
        generator = torch.Generator().manual_seed(1000 * step + part)
        lengths = torch.randint(3, 25, (sequences,), generator=generator)
        ids, labels = torch.randint(0, VOCAB, (2, int(lengths.sum())), generator=generator)
        labels[torch.rand(len(labels), generator=generator) < 0.33] = IGNORE
        labels[torch.cumsum(lengths, 0) - lengths] = 7  # every sequence has a target
        out.append(Batch(ids, labels, lengths, origin=f"step {step} part {part}"))
    return out


def answers(strategy, model):
    """Logits of eight sequences, by their first token, wherever they were computed."""
    found, sizes = {}, {first: first + 1 for first in range(5, 13)}

    def objective(model, batch):
        hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths))
        for ids, logits in zip(*(x.split(batch.lengths.tolist()) for x in (batch.ids, model.logits(hidden)[0])), strict=True):
            if len(ids) == sizes.get(int(ids[0])):  # else it fills the batch up
                found[int(ids[0])] = logits.float().clone()
        return hidden.sum(), 1, {}

    ids = torch.cat([torch.arange(first, first + n) for first, n in sizes.items()])
    strategy.evaluate(model.eval(), objective, [Batch(ids, ids, torch.tensor(list(sizes.values())))], "fp32")
    return found


def reload(strategy, folder, arch="llama", fields=(), optim="adamw"):
    """Resume a checkpoint under this layout: the step, logits, this process's parts of the first moments."""
    model = strategy.place(models.build(arch, config(arch, **dict(fields)), seed=99))
    optimizers = build(model, OptimConfig(name=optim))
    progress = StateStore(folder, {"run": 1}).resume(model, optimizers, strategy=strategy)
    names = {id(p): name for name, p in model.named_parameters()}
    moments = []
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            moments.append((names[id(p)], strategy.held(names[id(p)], p), local(state["exp_avg"]).clone()))
    return progress.step, answers(strategy, model), moments


def uneven(step):
    """A long sequence, and one too short for what lies further ahead than its next token."""
    ids = torch.arange(11) + 5 + step
    return [Batch(ids, ids + 1, torch.tensor([10, 1]), origin=f"step {step}")]


def joined(step):
    """The micro-batches of a step as one batch."""
    return [join(ragged(step))]


def even(step):
    """Sequences of one length, so that what is compiled for a shape serves them all."""
    generator = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(0, VOCAB, (2, 2, 128), generator=generator)
    return [Batch(i, y, torch.full((8,), 16), origin=f"step {step}") for i, y in zip(ids, labels, strict=True)]


def single(step):
    """Every sequence of a step as a batch of its own."""
    return [select(batch, [i]) for batch in ragged(step) for i in range(len(batch.lengths))]


TEXTS = (
    "The athanor keeps one steady heat. It burns for days, through every stage.",
    "12 + 30 = 42, and 7 < 9.",
    "def heat(stage):\n    return stage * 1.5\n",
    "Nothing is lost in it. The furnace stands, the vessel too.",
    "你好，世界。天地玄黄。",
    "Heat.",
    "Is it so? It is!",
)


@cache
def tokenizer():
    """With a mask and sentinels; no more ids than tiny presets have."""
    return Tokenizer.train(TEXTS * 4, 320, noise=24)


def _texts(step):
    """Two micro-batches of texts, in another order at every step, and of pairs of them."""
    generator = torch.Generator().manual_seed(step)
    for part in range(2):
        order = torch.randperm(len(TEXTS), generator=generator).tolist()
        ids = [[tokenizer().bos_id, *tokenizer().encode(TEXTS[i])[:40], tokenizer().end_id] for i in order]
        yield pack([Rendered(text, [True] * len(text)) for text in ids], f"step {step} part {part}"), ids


def prepared(arch, name, fields=(), options=()):
    """A tiny model, the loss of an objective and the micro-batches of a step, as recipes make them."""
    model = models.build(arch, dataclasses.replace(support.small(arch, name), **dict(fields)), seed=1)
    chosen = choose(name, model, dict(options), tokenizer(), 48)

    def batches(step):
        out = []
        for part, (batch, ids) in enumerate(_texts(step)):
            if name == "seq2seq":
                batch = pairs.pack(list(zip(ids, ids[1:] + ids[:1], strict=True)), chosen.vocabulary.start, batch.origin)
            out.append(chosen.prepare(batch, generator(0, step, part)))
        return out

    return model, chosen.loss, batches


def train(
    strategy, *, arch="llama", steps=50, save=None, optim="adamw", clip=0.5, precision="fp32", lr=2e-3, fields=(),
    batches=ragged, change=None, objective=None, options=(),
):  # fmt: skip
    """Losses, gradient norms and this process's parts of the final weights: [(name, held, tensor)].

    With an `objective` and its `options` of batches of texts, prepared alike on every process.
    """
    if objective is None:
        loss, model = next_token.loss, models.build(arch, config(arch, **dict(fields)), seed=1)
    else:
        model, loss, made = prepared(arch, objective, fields, options)
        batches = made if batches is ragged else batches
    if change is not None:
        change(model)
    model = strategy.place(model).train()
    optimizers = build(model, OptimConfig(name=optim, lr=lr))
    schedule = warmup_cosine(steps, min(5, steps), 0.1)
    losses, norms = [], []
    for step in range(steps):
        result = train_step(
            model, loss, batches(step), optimizers,
            lr_factor=schedule(step), clip=clip, precision=precision, strategy=strategy,
        )  # fmt: skip
        losses.append(result.loss)
        norms.append(result.grad_norm)
    if save is not None:
        store = StateStore(save, {"run": 1})
        store.save(Progress(steps), model, optimizers, strategy=strategy)
        store.close()
    parts = []
    for name, p in model.named_parameters():
        parts.append((name, strategy.held(name, p), local(p.detach()).clone()))
    return losses, norms, parts


def whole(parts_of_ranks):
    """The weights, of the parts of all processes."""
    out, seen = {}, {}
    for parts in parts_of_ranks:
        for name, held, tensor in parts:
            full = out.setdefault(name, torch.full(held.shape, float("nan")))
            assert full.shape == held.shape
            for piece in held.pieces:
                inside = tuple(slice(a, a + n) for a, n in zip(piece.local, piece.size, strict=True))
                there = tuple(slice(a, a + n) for a, n in zip(piece.whole, piece.size, strict=True))
                if held.writes:
                    assert full[there].isnan().all(), f"{name} is written twice"
                    full[there] = tensor[inside]
            assert sum(torch.Size(piece.size).numel() for piece in held.pieces) == tensor.numel(), name
            seen[name] = True
    for name, full in out.items():
        assert not full.isnan().any(), f"{name} is not covered"
    return out


def strategy_of(layout):
    return (Pipelined if layout.pp > 1 else Distributed)(layout, torch.device("cpu"))


def serve(rank, jobs, results, folder):
    torch.set_num_threads(1)
    while True:
        job = jobs[rank].get()
        if job is None:
            return
        number, text, options = job
        layout = parse(text)
        if rank >= layout.world:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(layout.world)}
        td.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=layout.world)
        try:
            work = {"train": train, "reload": reload}[options.pop("work", "train")]
            with mock.patch.dict(vars(pipeline), options.pop("pipeline", {})):
                results.put((number, rank, work(strategy_of(layout), **options)))
        except BaseException:
            results.put((number, rank, traceback.format_exc()))
        finally:
            td.destroy_process_group()


class Crew:
    """Four processes that run layouts one after another."""

    def __init__(self, folder, size=4):
        self.folder, self.size, self.count = str(folder), size, 0
        self._start()

    def _start(self):
        context = torch.multiprocessing.get_context("spawn")
        self.jobs = [context.Queue() for _ in range(self.size)]
        self.results = context.Queue()
        arguments = (self.jobs, self.results, self.folder)
        self.processes = [context.Process(target=serve, args=(rank, *arguments), daemon=True) for rank in range(self.size)]
        for process in self.processes:
            process.start()

    def run(self, text, seconds=120, **options):
        """What each process returned; AssertionError with what went wrong in one of them."""
        self.count += 1
        world = parse(text).world
        for jobs in self.jobs:
            jobs.put((self.count, text, options))
        found, broken = {}, []
        while len(found) < world and seconds > 0:
            try:
                number, rank, result = self.results.get(timeout=1)
            except queue.Empty:
                seconds -= 1
                continue
            assert number == self.count
            found[rank] = result
            if isinstance(result, str):
                broken.append(f"process {rank}:\n{result}")
                seconds = min(seconds, 3)  # the others answer soon, or wait for this one for ever
        if len(found) < world:
            broken.append(f"no answer of processes {sorted(set(range(world)) - set(found))}")
            self.close(kill=True)
            self._start()
        assert not broken, f"{text}: " + "\n".join(broken)
        return [found[rank] for rank in range(world)]

    def close(self, kill=False):
        for jobs, process in zip(self.jobs, self.processes, strict=True):
            jobs.put(None)
            if kill:
                process.kill()
            process.join(10)
            process.kill()


class Alone:
    """Runs of one plain process, by their options; each computed once."""

    def __init__(self):
        self.known = {}

    def __call__(self, **options):
        key = tuple(sorted((k, str(v)) for k, v in options.items()))
        if key not in self.known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            self.known[key] = train(ALONE, **options)
            torch.set_num_threads(threads)
        return self.known[key]


def compare(results, single, clip=0.5):
    """Assert that several processes gave what one gave: losses, norms, weights."""
    losses, norms, parts = single
    assert min(norms) > clip, "clipping is not active, so a wrong norm would go unseen"
    for theirs, their_norms, _ in results:
        assert theirs == results[0][0]  # all processes say the same
        assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) <= LOSS
        assert max(abs(a - b) / a for a, b in zip(norms[:5], their_norms[:5], strict=True)) <= 1e-5
    expected, found = whole([parts]), whole([parts for *_, parts in results])
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).abs().max()) <= WEIGHT, name
