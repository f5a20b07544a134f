"""Compression: model -> smaller model."""
