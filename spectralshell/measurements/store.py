"""Measures on disk: each in a file with its key and a checksum, so that none is read for another.

An entry is checked before it is unpickled. The checksum finds accidents, not forgers: who can write
to the folder can run code where it is read.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Memory

_MAGIC = b"spectralshell measure 1\n"

_CHECKSUM_LENGTH = hashlib.sha256().digest_size

_FOLDER, _FILE = "spectralshell-measures", "output.pkl"
"""Names that joblib's ``Memory.clear`` and ``reduce_size`` find, in folders of 32 hex digits."""


@dataclass(frozen=True)
class Recalled:
    """A result, and what is to be said of the entry that should have held it."""

    result: Any
    complaint: str | None = None


@dataclass(frozen=True)
class MeasureStore:
    """A folder of results by key."""

    folder: str

    @classmethod
    def of(cls, memory: Memory) -> MeasureStore:
        """Return the store in a cache of joblib that has a folder."""
        return cls(os.path.join(memory.store_backend.location, _FOLDER))

    def recall(self, key: str, measure: Callable[[], Any]) -> Recalled:
        """Return what is stored under a key, or what ``measure`` gives, which is then stored.

        ValueError, before anything is measured, where it could not be stored.
        """
        file = self._file_of(key)
        complaint = None
        try:
            return Recalled(_unpacked(file.read_bytes(), key))
        except (FileNotFoundError, NotADirectoryError):
            self._check_writable(file)
        except Exception as error:  # whatever reading or unpickling a broken file raises
            complaint = (
                f"memory: the entry {str(file)!r} is not what was stored there ({error}), so its "
                "snapshot is measured anew."
            )
        result = measure()
        try:
            _write(file, _packed(result, key))
        except OSError as error:
            complaint = f"memory: the entry {str(file)!r} could not be written ({error})."
        return Recalled(result, complaint)

    def _file_of(self, key: str) -> Path:
        return Path(self.folder, hashlib.sha256(key.encode()).hexdigest()[:32], _FILE)

    def _check_writable(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=file.parent)
            os.close(descriptor)
            os.unlink(name)
        except OSError as error:
            raise unwritable(self.folder, error) from error


def unwritable(folder: str, error: OSError) -> ValueError:
    """Return the error of a cache in which nothing can be stored."""
    return ValueError(
        f"memory: the cache folder {folder!r} cannot be written to ({error}); pass a folder with "
        "room in which you may write, or memory=None."
    )


def _packed(result: Any, key: str) -> bytes:
    name = key.encode()
    content = len(name).to_bytes(8, "little") + name + pickle.dumps(result, protocol=5)
    return _MAGIC + hashlib.sha256(content).digest() + content


def _unpacked(entry: bytes, key: str) -> Any:
    content = entry[len(_MAGIC) + _CHECKSUM_LENGTH :]
    if entry[: -len(content) or None] != _MAGIC + hashlib.sha256(content).digest():
        raise ValueError("its checksum is another")
    end = 8 + int.from_bytes(content[:8], "little")
    if content[8:end] != key.encode():
        raise ValueError("it is that of another snapshot or setting")
    return pickle.loads(content[end:])


def _write(file: Path, entry: bytes) -> None:
    """Write a file so that who reads it at any time sees all of it or what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(entry)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
