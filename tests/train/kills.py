"""The driver of a run that is killed again and again: starts a command, kills it, counts what it was doing, looks for orphans."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import alive, environment, until

PROGRAM = Path(__file__).with_name("killed.py")
PHASES = "SUVEWMPADd"  # letters of killed.py


def program(out, steps, *options, ranks=1):
    """The command that runs killed.py, under torchrun where `ranks` are more than one."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(PROGRAM), str(out), str(steps), *options]


@dataclass
class Tally:
    """Kills so far, and how often each phase (main thread, writer of process 0) was hit."""

    kills: int = 0
    phases: Counter = field(default_factory=Counter)


def finish(command, out, tally=None, most=0, target="launcher", delay=1.0, chance=None):
    """Start `command` until it is through, killing it up to `most` times with SIGKILL at random moments of its training.

    Every second kill waits, besides, for a phase drawn at random: some are over in a millisecond and would hardly be hit.

    Args:
        command: trains into `out`, as killed.py does.
        out: its folder.
        tally: counts the kills.
        most: kills, at most; the run may be through before.
        target: "launcher", the process that was started, or "worker", one of those that torchrun started.
        delay: seconds, the longest time from the first step to the kill.
        chance: source of the random moments.
    """
    chance = chance or random.Random()
    while True:
        kill = tally is not None and tally.kills < most
        letter = chance.choice(PHASES) if kill and tally.kills % 2 else ""
        letters = _life(command, out, target, chance.uniform(0, delay) if kill else None, letter, chance)
        if letters is None:
            assert (out / "done.json").is_file()
            return
        tally.kills += 1
        tally.phases[letters] += 1


def _life(command, out, target, delay, letter, chance):
    """One life: killed `delay` seconds after its first step and in the phase `letter`, then what it was doing.

    None when it was through before.
    """
    env, phase = environment(), out / "phase-0"
    phase.unlink(missing_ok=True)
    with (out.parent / f"{out.name}.txt").open("w+") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            if delay is not None:
                until(lambda: process.poll() is not None or _read(phase)[0] != "R", "its first step")
                _wait(process, delay)
                while letter not in _read(phase) and process.poll() is None:  # without a pause: it may be over at once
                    pass
            victims = [] if delay is None or process.poll() is not None else [process.pid]
            if victims and target == "worker":
                victims = alive(env, worker=True)
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                process.wait(120)
                until(lambda: not alive(env), "no process left behind", 30)
                return _read(phase)
            process.wait(300)
            said.seek(0)
            assert process.returncode == 0, said.read()[-4000:]
            assert not alive(env), "a process left behind"
            return None
        finally:
            for pid in alive(env):
                os.kill(pid, signal.SIGKILL)
            process.wait(60)


def _wait(process, seconds):
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _read(phase):
    """The letters of process 0; it has not begun where there are none."""
    return (phase.read_bytes().decode() if phase.is_file() else "") or "R-"
