"""The sides of `bench/infer.py`: the engine, and transformers' ways to generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training.sides import our_model

from athanor.compress.apply import compress
from athanor.core.errors import VerificationError
from athanor.infer.engine import Engine
from athanor.models import io, llama
from athanor.types import Request, SamplingParams
from inference.requests import Ask

TOLERANCE = 0.1  # of the spread of the logits, in bfloat16
CACHE = 64 * 528  # tokens: 64 of the longest mixed requests


class NoText:
    """A vocabulary for requests of whose text nobody reads a word."""

    bos_id = end_id = think_id = end_think_id = None

    def pieces(self, before: Sequence[int]) -> NoText:
        return self

    def push(self, id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def models(config: llama.Config, folder: Path) -> tuple[llama.Model, Any, dict[str, Any]]:
    """The model in bfloat16, transformers' with the same weights, and ours by kind: bf16, int8, int4."""
    from transformers import AutoModelForCausalLM

    whole = our_model(config).eval()
    io.save(whole, folder / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    kinds = {"bf16": whole} | {f"int{bits}": compress(whole, bits) for bits in (8, 4)}
    for model in kinds.values():
        to_bfloat16(model)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        mine, other = whole(ids).float(), theirs(ids).logits.float()
    if not float((mine - other).abs().max()) <= TOLERANCE * float(other.std()):
        raise VerificationError("both sides must give the same logits for their speeds to be comparable: see tests/models")
    return whole, theirs, kinds


def to_bfloat16(model: torch.nn.Module) -> None:
    """Weights in bfloat16; scales of whole numbers stay as they are."""
    for p in model.parameters():
        p.data = p.data.bfloat16()


class Ours:
    """The engine over one model."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.vocab_size = model.config.vocab_size
        self.engine = Engine(model, NoText(), precision="bf16", cache_tokens=CACHE, **options)  # type: ignore[arg-type]  # all that is asked of it
        self.waste = 0.0
        self._number = 0

    def _request(self, ask: Ask) -> Request:
        self._number += 1
        return Request(str(self._number), ask.prompt, SamplingParams(temperature=0, max_tokens=ask.new, ignore_eos=True))

    def single(self, prompt: Sequence[int], new: int) -> float:
        """Tokens per second of one answer, the prompt's time included."""
        self.engine.forget()
        start = time.perf_counter()
        self.engine.generate([self._request(Ask(list(prompt), new))])
        return new / (time.perf_counter() - start)

    def mixed(self, asks: Sequence[Ask]) -> float:
        """Tokens per second of all answers together."""
        self.engine.forget()
        held = filled = 0
        start = time.perf_counter()
        for ask in asks:
            self.engine.add(self._request(ask))
        while self.engine.has_work:
            self.engine.step(stream=False)
            for s in self.engine.scheduler.running:
                held += len(s.table) * self.engine.scheduler.blocks.size
                filled += s.computed
        self.waste = 1 - filled / held
        return sum(ask.new for ask in asks) / (time.perf_counter() - start)

    def first(self, prompt: Sequence[int]) -> float:
        """Seconds to the first token."""
        start = time.perf_counter()
        self.engine.generate([self._request(Ask(list(prompt), 1))])
        return time.perf_counter() - start


class Theirs:
    """transformers' model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Answers of `new` tokens to prompts that are padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
        )
        assert out.shape == (len(prompts), longest + new)

    def single(self, prompt: Sequence[int], new: int) -> float:
        """Tokens per second of one answer."""
        start = time.perf_counter()
        self.generate([prompt], new)
        return new / (time.perf_counter() - start)


class Static:
    """Batches of one size of requests of like length; every batch runs to the longest of its answers."""

    def __init__(self, theirs: Theirs, size: int) -> None:
        self._theirs, self._size = theirs, size

    def mixed(self, asks: Sequence[Ask]) -> float:
        """Useful tokens per second."""
        ordered = sorted(asks, key=lambda ask: ask.new)
        start = time.perf_counter()
        for first in range(0, len(ordered), self._size):
            some = ordered[first : first + self._size]
            self._theirs.generate([ask.prompt for ask in some], max(ask.new for ask in some))
        return sum(ask.new for ask in asks) / (time.perf_counter() - start)


def continuous(theirs: Theirs, asks: Sequence[Ask]) -> float:
    """Useful tokens per second of transformers' continuous batching, where it gives all answers."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = theirs.model
    # Room for all requests at once: left to itself it takes nine tenths of the machine's free memory.
    room = ContinuousBatchingConfig()
    room.num_blocks = sum(-(-(len(ask.prompt) + ask.new) // room.page_size) for ask in asks)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), continuous_batching_config=room
    )
    manager.start()
    try:
        start = time.perf_counter()
        for i, ask in enumerate(asks):
            manager.add_request(ask.prompt, request_id=f"r{i}", max_new_tokens=ask.new)
        got = 0
        while got < len(asks):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise VerificationError("transformers' continuous batching stopped before all requests were answered")
                continue
            if result.is_finished():
                got += 1
        return sum(ask.new for ask in asks) / (time.perf_counter() - start)
    finally:
        manager.stop(block=True)
        model.set_attn_implementation("sdpa")
