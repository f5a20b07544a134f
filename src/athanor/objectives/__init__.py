"""Objectives, one file each: `loss(model, batch) -> (sum, count, metrics)`."""
