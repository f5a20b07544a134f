"""Remove every occurrence of a letter from a string: number the letters, strike those out, read what is left."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    target, *letters = rng.sample(ascii_lowercase, rng.randint(4, 7))
    # Each gap takes the letter once at most: a repeat in a row leaves nothing to tell one from the other.
    for gap in sorted(rng.sample(range(len(letters)), rng.randint(1, 3)), reverse=True):
        letters.insert(gap, target)
    struck = [f"{i}{'_' if letter == target else letter}" for i, letter in enumerate(letters, 1)]
    shown = " ".join(letters)
    return Problem(
        key=f"{target} from {''.join(letters)}",
        question={
            "en": (f"Remove every {target} from {shown}.", f"Delete all {target} in {shown}."),
            "zh": (f"从 {shown} 中删去所有 {target} 。", f"去掉每个 {target} ： {shown}"),
        },
        reasoning=f"{target}: {''.join(struck)}",
        answer=" ".join(letter for letter in letters if letter != target),
    )
