"""Rewards, one file each: `reward(outcome) -> float`."""
