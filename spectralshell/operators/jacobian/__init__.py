"""Linearisations of a model, and the ladder that chooses one."""
