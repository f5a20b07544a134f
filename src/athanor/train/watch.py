"""What a training stage shows and logs while it runs, and what others can see of its state."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from athanor.core import dist, io
from athanor.core.track import Tracker, open_sinks
from athanor.train.state import StateStore

DEFAULT_SINKS = ("console", "jsonl")


@contextmanager
def watching(run: Path, stage: str, steps: int, store: StateStore, sinks: Sequence[str] = DEFAULT_SINKS) -> Iterator[Tracker]:
    """A tracker for `fit`: a record per step to each of `sinks` (see `track.open_sinks`), from the step at which `store` resumes.

    `logs/<stage>.state.json` says meanwhile, and afterwards, how it stands: `state` is "running", "finished", or "stopped" with
    the error's text in `why`; beside it the steps wanted, the store's identity as `settings`, and the process. A killed process
    leaves "running" behind, and its number, by which `athanor runs` knows.

    Raises as `track.open_sinks` does.
    """
    start = store.steps()[-1] if store.steps() else 0
    path = run / "logs" / f"{stage}.state.json"

    def say(state: str, **more: Any) -> None:
        if dist.is_main():
            about = {"state": state, "steps": steps, "host": platform.node(), "process": os.getpid()}
            io.write_json(path, about | more | {"settings": store.identity})

    with closing(open_sinks(sinks, run, stage, total=steps, start=start, settings=store.identity)) as tracker:
        say("running")
        try:
            yield tracker
        except BaseException as error:
            say("stopped", why=_why(error))
            raise
        say("finished")


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit) and error.code in {128 + s for s in signal.Signals}:  # see `train.interrupt`
        return f"stopped by {signal.Signals(int(error.code or 0) - 128).name}; its state is saved"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
