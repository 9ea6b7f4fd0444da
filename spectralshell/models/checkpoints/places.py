"""Paths of checkpoints, kept inside their folder: nothing outside is read."""

from __future__ import annotations

import os
from pathlib import Path

_HUB_FOLDER = "models--"
"""How the folders of models in the cache of the hub begin."""


def find_path(given: str) -> str:
    """Return the absolute path of a file or folder that exists; ``~`` is the user's folder."""
    path = os.path.abspath(given if os.path.exists(given) else os.path.expanduser(given))
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise FileNotFoundError(
            f"state: there is no checkpoint file at {path!r}, and no folder; check the path."
        )
    return path


def file_inside(folder: str, name: object, source: str) -> str:
    """Return the path of a file that a folder names; ValueError if it lies outside the folder.

    In the cache of the hub the files are links into the blobs of the same model.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"state: {source} names a file {name!r}, which is no file name.")
    path = os.path.join(folder, name)
    real = Path(os.path.realpath(path))
    if os.path.isabs(name) or ".." in Path(name).parts or not _within(real, folder):
        raise ValueError(
            f"state: {source} names {name!r}, which lies outside its folder, so it is not read. "
            "Put the file itself into the folder."
        )
    if not real.is_file():
        raise ValueError(
            f"state: {source} has no file {name!r}; the copy may be incomplete. Copy the whole "
            "folder again."
        )
    return path


def has_file(folder: str, name: str) -> bool:
    """Tell whether a folder has an entry of a name, wherever a link may lead."""
    return os.path.lexists(os.path.join(folder, name))


def stamp_of(files: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """Return size and time of each file, which change when one is written again."""
    return tuple((path, status.st_size, status.st_mtime_ns) for path, status in _statuses(files))


def _statuses(files: tuple[str, ...]) -> list[tuple[str, os.stat_result]]:
    return [(path, os.stat(path)) for path in files]


def _within(real: Path, folder: str) -> bool:
    root = Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return True
    model = root.parent.parent
    in_cache = root.parent.name == "snapshots" and model.name.startswith(_HUB_FOLDER)
    return in_cache and real.is_relative_to(model / "blobs")
