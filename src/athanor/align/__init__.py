"""Alignment: rollouts and rewards become batches for the same training loop."""
