"""One recorder at a time writes to a directory."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


class DirectoryLock:
    """A lock on a folder that ends with its process, however that ends."""

    def __init__(self, directory: Path) -> None:
        self._handle: int | None = None
        if fcntl is None:
            return
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"directory: another recorder is writing to {str(directory)!r}; give each run a "
                "directory of its own, or end the other one."
            ) from None
        except OSError:
            os.close(handle)  # a file system without locks
            return
        self._handle = handle
        _HELD.add(self)

    def release(self) -> None:
        """Let others write."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _forget_in_a_fork() -> None:
    """Workers of data loaders may outlive a killed run, and would keep its lock."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_a_fork)
