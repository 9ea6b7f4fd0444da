"""Files that are there whole or not at all: written beside, flushed, and put in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
"""End of the name of a file that is being written; a kill may leave one."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file beside ``path``, and put it there in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        write(beside)
        with open(beside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed writer left half-written."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders
    try:
        os.fsync(handle)
    except OSError:
        pass  # as on some network file systems
    finally:
        os.close(handle)
