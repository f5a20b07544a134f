"""The models of one server, by name, each with its engine and the thread that drives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from athanor.core.errors import ConfigError, RequestError, nearest
from athanor.serve.metrics import Metrics
from athanor.serve.shapes import Model, model_body
from athanor.serve.worker import Idle, Worker
from athanor.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from athanor.infer.engine import Engine
    from athanor.lm import LM


class UnknownModelError(RequestError):
    """A request names a model that is not served (the server answers 404)."""


@dataclass(frozen=True)
class Served:
    """A model and what it can do.

    engine  None where it generates no text; nothing else may use it while the server runs
    lm      for vectors; None where it gives none
    start   tokens that answers begin with, where the prompt is a source of its own (encoder-decoders)
    """

    name: str
    tokenizer: Vocabulary
    engine: Engine | None
    lm: LM | None = None
    start: int | None = None

    @classmethod
    def of(cls, lm: LM, **options: Any) -> Served:
        """A model as `athanor.load` gives it, with an engine if it generates; `options` are of `LM.engine`.

        Raises ConfigError where it has no tokenizer, or for options out of range.
        """
        generates = lm.model.kind in ("decoder", "encoder_decoder") and lm.model.task == "lm"
        engine = lm.engine(**options) if generates else None
        start = len(lm.model.token_ids.start) if lm.model.kind == "encoder_decoder" else None
        return cls(lm.name, lm.tokenizer, engine, lm, start)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together at most."""
        if self.engine is not None:
            return self.engine.max_len
        assert self.lm is not None
        positions: int = self.lm.config.max_positions
        return positions

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows."""
        if self.engine is not None:
            return self.engine.vocab_size
        assert self.lm is not None
        size: int = self.lm.config.vocab_size
        return size

    def prompt(self, text: str) -> list[int]:
        """A text with the control tokens that belong to it."""
        return self.tokenizer.prompt(text) if self.lm is None else self.lm.prompt_ids(text)

    def room(self, prompt: int) -> int:
        """How many tokens an answer to a prompt of so many may have: none, where the prompt itself is too long."""
        if self.start is None or prompt > self.context:
            return self.context - prompt
        return self.context - self.start

    @property
    def think(self) -> tuple[int, int] | None:
        """The ids between which reasoning stands."""
        begin, end = self.tokenizer.think_id, self.tokenizer.end_think_id
        return None if begin is None or end is None else (begin, end)


class Running:
    """A served model and its worker."""

    def __init__(self, served: Served, worker: Worker, created: int) -> None:
        self.served, self.worker, self._created = served, worker, created

    @property
    def body(self) -> Model:
        """What GET /v1/models says of it."""
        return model_body(self.served.name, self._created, self.served.context)


class Models:
    """All models of a server, in the order in which they were given.

    Raises ConfigError when there is none, or when two have one name.
    """

    def __init__(self, served: Iterable[Served], metrics: Metrics, max_queue: int) -> None:
        created = int(time.time())
        self._by_name: dict[str, Running] = {}
        for one in served:
            if one.name in self._by_name:
                raise ConfigError(f"two models have the name {one.name!r}, by which clients choose: rename a folder")
            worker = Worker(one.engine or Idle(), max_queue=max_queue, watch=metrics.of(one.name))
            self._by_name[one.name] = Running(one, worker, created)
        if not self._by_name:
            raise ConfigError("no model is given: name a run folder or a checkpoint")

    @property
    def all(self) -> list[Running]:
        return list(self._by_name.values())

    def find(self, name: str | None) -> Running:
        """The model of that name; of None, the first. Raises UnknownModelError."""
        if name is None:
            return self.all[0]
        if name not in self._by_name:
            known = ", ".join(map(repr, self._by_name))
            raise UnknownModelError(
                f"no model {name[:80]!r}{nearest(name[:80], self._by_name)}: this server has {known}", "model"
            )
        return self._by_name[name]

    @property
    def alive(self) -> bool:
        """Whether every engine works."""
        return all(model.worker.alive for model in self.all)

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return sum(model.worker.unfinished for model in self.all)

    def start(self) -> None:
        """Start all threads."""
        for model in self.all:
            model.worker.start()

    def stop(self) -> None:
        """Take no more requests and fail those in flight."""
        for model in self.all:
            model.worker.stop()

    async def join(self) -> None:
        """Wait until all threads have ended."""
        for model in self.all:
            await asyncio.to_thread(model.worker.join)
