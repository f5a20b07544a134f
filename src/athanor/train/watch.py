"""What a training stage shows and logs while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from athanor.core.track import ConsoleTracker, JsonlTracker, Tracker, Trackers
from athanor.train.state import StateStore


@contextmanager
def watching(run: Path, stage: str, steps: int, store: StateStore) -> Iterator[Tracker]:
    """Progress on the console and a record per step in `logs/<stage>.jsonl`, from the step at which `store` resumes."""
    start = store.steps()[-1] if store.steps() else 0
    log = JsonlTracker(run / "logs" / f"{stage}.jsonl", last_step=start)
    with closing(Trackers([ConsoleTracker(stage, steps, "step", start=start), log])) as tracker:
        yield tracker
