"""Blocks that every architecture is built from."""
