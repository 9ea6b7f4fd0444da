"""Callbacks of training libraries: thin adapters over the recorder, each in a module of its own."""
