"""Evaluation: skills that are examples, metric and reward at once; likelihood; scores with their uncertainty."""
