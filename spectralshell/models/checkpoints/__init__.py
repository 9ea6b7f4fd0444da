"""Checkpoints as people have them, read as tensors by name; nothing in them is executed."""
