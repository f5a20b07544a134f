"""Skills, one file each: `problem(rng) -> Problem`, and `score(problem, answer) -> float` where exact match is not meant."""
