"""Spectral-shell measurements of how neural networks learn."""
