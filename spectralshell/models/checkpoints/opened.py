"""From what is asked for to what is read: a file, a folder, or a model of the hub."""

from __future__ import annotations

import os
from typing import Any

from spectralshell.models.checkpoints.folders import Source, open_file, open_folder
from spectralshell.models.checkpoints.places import find_path, stamp_of
from spectralshell.models.checkpoints.request import Checkpoint


def as_checkpoint(state: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Return the request that a path alone stands for."""
    return state if isinstance(state, Checkpoint) else Checkpoint(state)


def open_checkpoint(path: str, key: str | None = None) -> Source:
    """Return how the file or folder at a path is read; only indexes and plans are read now."""
    found = find_path(path)
    return open_folder(found, key) if os.path.isdir(found) else open_file(found, key)


def stamp(source: Source) -> tuple[Any, ...]:
    """Return what changes when any file that a state is read from is written again."""
    return stamp_of(source.files)
