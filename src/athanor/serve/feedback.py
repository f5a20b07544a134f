"""What people think of answers: kept in SQLite beside the run, exported as preference pairs.

    POST /feedback   {request_id, model, messages, parameters, answer, reasoning, finish_reason, rating, note}

One row an answer, known by the id of its request; a second opinion on it replaces the first.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from athanor.core.errors import CheckpointError, RequestError
from athanor.serve import guard
from athanor.serve.body import Strict, read
from athanor.types import Message, Pair

FILE = "feedback.db"
MAX_STORE = 2**30  # bytes of the file
MAX_NOTE = 4000  # characters
MAX_MESSAGES = 1000
_PAGE = 4096  # bytes, SQLite's own default, on which MAX_STORE is reckoned
_WAIT = 5.0  # seconds for another process that writes

_TABLE = """
CREATE TABLE IF NOT EXISTS feedback (
    request_id    TEXT PRIMARY KEY,
    time          TEXT NOT NULL,  -- of the last opinion, UTC, ISO 8601
    model         TEXT NOT NULL,
    messages      TEXT NOT NULL,  -- JSON, what was asked
    parameters    TEXT NOT NULL,  -- JSON, what the client set
    answer        TEXT NOT NULL,
    reasoning     TEXT,
    finish_reason TEXT,           -- NULL when the answer broke off
    rating        TEXT CHECK (rating IN ('up', 'down')),
    note          TEXT NOT NULL
)
"""


class _Said(Strict):
    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str | None = None


_Parameter = bool | int | float | Annotated[str, Field(max_length=200)] | None


class Opinion(Strict):
    """The body of POST /feedback. `rating` is null where it was taken back."""

    request_id: str = Field(min_length=1, max_length=100)
    model: str = Field(min_length=1, max_length=500)
    messages: list[_Said] = Field(min_length=1, max_length=MAX_MESSAGES)
    parameters: dict[Annotated[str, Field(max_length=100)], _Parameter] = Field(max_length=50)
    answer: str
    reasoning: str | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    rating: Literal["up", "down"] | None = None
    note: str = Field("", max_length=MAX_NOTE)


class Store:
    """The table of opinions in the SQLite file `path`, which comes into being with the first one.

    Each call opens the file anew, so any thread may make it, and other processes may read and write meanwhile.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_STORE) -> None:
        self.path, self._max_bytes = path, max_bytes

    def put(self, opinion: Opinion) -> None:
        """Keep `opinion`, on the disk when this returns.

        Raises:
            RequestError: another answer is known under its request id.
            guard.ApiError: 507 when the file is as large as it may get.
        """
        row = {
            "request_id": opinion.request_id,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": opinion.model,
            "messages": json.dumps([m.model_dump(exclude_none=True) for m in opinion.messages], ensure_ascii=False),
            "parameters": json.dumps(opinion.parameters, ensure_ascii=False, sort_keys=True),
            "answer": opinion.answer,
            "reasoning": opinion.reasoning,
            "finish_reason": opinion.finish_reason,
            "rating": opinion.rating,
            "note": opinion.note,
        }
        with self._open() as db:
            db.execute(f"PRAGMA max_page_count = {self._max_bytes // _PAGE}")
            known = "SELECT model, messages, answer FROM feedback WHERE request_id = ?"
            try:
                with db:
                    db.execute("BEGIN IMMEDIATE")
                    db.execute(_TABLE)
                    found = db.execute(known, (opinion.request_id,)).fetchone()
                    if found is not None and found != (row["model"], row["messages"], row["answer"]):
                        raise RequestError(
                            f"request_id ({opinion.request_id!r}) is that of another answer: send the id of this one",
                            "request_id",
                        )
                    fields = ", ".join(row)
                    db.execute(f"INSERT OR REPLACE INTO feedback ({fields}) VALUES (:{', :'.join(row)})", row)
            except sqlite3.OperationalError as error:
                if "is full" not in str(error):
                    raise
                raise guard.ApiError(
                    507,
                    f"no room for more feedback (the file may have {self._max_bytes:,} bytes, and the disk has to hold them):"
                    " export it and move the file away",
                    code="feedback_full",
                ) from error

    def rows(self) -> list[Row]:
        """All opinions, oldest first. Raises CheckpointError when the file is missing or is no such table."""
        if not self.path.is_file():
            raise CheckpointError(f"no feedback in {str(self.path.parent)!r} (it has no {self.path.name}): rate answers first")
        fields = ", ".join(Row.__slots__)
        try:
            with self._open() as db:
                return [Row(*row) for row in db.execute(f"SELECT {fields} FROM feedback ORDER BY time, request_id")]
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{str(self.path)!r} is no feedback that this version reads ({error}): restore a copy"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)) as db:
            yield db


@dataclass(frozen=True, slots=True)
class Row:
    """One opinion as it is stored; see `_TABLE`."""

    request_id: str
    time: str
    model: str
    messages: str
    parameters: str
    answer: str
    reasoning: str | None
    finish_reason: str | None
    rating: str | None
    note: str


@dataclass(frozen=True, slots=True)
class Paired:
    """Preference pairs, and what became of every answer: `counts` sums to the number of rows.

    paired      answers that stand in at least one pair
    alone       rated, but no answer to the same prompt was rated the other way
    unrated     a note at most
    unfinished  stopped, cut off or broken: its end would teach a model to stop there
    repeated    the same text in answer to the same prompt, rated the same way before
    disputed    the same text in answer to the same prompt is rated up and down
    """

    pairs: list[Pair]
    counts: Counter[str]
    prompts: int


def pair(rows: list[Row]) -> Paired:
    """Every answer rated up with every one rated down to the same messages, whichever model gave them."""
    counts: Counter[str] = Counter()
    by_prompt: dict[str, dict[str, dict[Message, None]]] = defaultdict(lambda: {"up": {}, "down": {}})
    for row in rows:
        if row.rating is None:
            counts["unrated"] += 1
        elif row.finish_reason != "stop":
            counts["unfinished"] += 1
        else:
            answers = by_prompt[row.messages][row.rating]
            message = Message("assistant", row.answer, row.reasoning)
            counts["repeated"] += message in answers
            answers[message] = None
    pairs, prompts = [], 0
    for messages, rated in by_prompt.items():
        both = rated["up"].keys() & rated["down"].keys()
        chosen, rejected = ([m for m in rated[way] if m not in both] for way in ("up", "down"))
        counts["disputed"] += 2 * len(both)
        counts["paired" if chosen and rejected else "alone"] += len(chosen) + len(rejected)
        prompts += bool(chosen and rejected)
        prompt = tuple(Message(m["role"], m["content"], m.get("reasoning_content")) for m in json.loads(messages))
        pairs += [Pair(prompt, good, bad) for good, bad in itertools.product(chosen, rejected)]
    assert sum(counts.values()) == len(rows)
    return Paired(pairs, counts, prompts)


def install(app: FastAPI, path: Path) -> None:
    """Give `app` the route that keeps opinions in the file `path`."""
    store = Store(path)

    @app.post("/feedback", include_in_schema=False)
    async def feedback(request: Request) -> JSONResponse:
        opinion = read(await guard.read_body(request), Opinion)
        await asyncio.to_thread(store.put, opinion)
        return JSONResponse({"request_id": opinion.request_id, "rating": opinion.rating, "note": opinion.note})
