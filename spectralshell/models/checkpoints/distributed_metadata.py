"""The plan of a folder of ``torch.distributed.checkpoint``, unpickled without calling anything.

The file ``.metadata`` is a pickle. Its few classes are read as inert records made for one reading,
so that nothing of torch is called or changed by what a file says.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectralshell.models.checkpoints.messages import objects_inside

_METADATA, _FILES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)

_RECORDS = frozenset(
    (
        *(
            (_METADATA, name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        (_FILES, "_StorageInfo"),
        *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
        *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
        ("torch.serialization", "_get_layout"),
    )
)
"""The names that such a file may hold beside sizes and types of numbers."""

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it begins, how large it is, and which bytes of a file hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the folder: its path in the nested state, shape, type, and pieces."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def read_metadata(path: str, source: str) -> list[Entry]:
    """Return the tensors that a ``.metadata`` file plans; ValueError for what is not one."""
    try:
        record = _unpickled(Path(path).read_bytes(), source)
        return _entries(record, source)
    except _Refused:
        raise
    except Exception as error:  # whatever a file that is not what it seems leads to
        raise ValueError(
            f"state: {source} has a '.metadata' that is not what torch.distributed.checkpoint "
            f"writes ({type(error).__name__}: {str(error)[:100]}); it may be corrupt or incomplete."
        ) from error


class _Refused(ValueError):
    """An error that has its words already."""


class _Record:
    """What stands for an object of a file: its attributes, and what it was made with."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


def _unpickled(content: bytes, source: str) -> Any:
    _check_operations(content)
    made: dict[tuple[str, str], Any] = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("torch", "Size"):
                return tuple
            if module == "torch" and name in _DTYPES:
                return _DTYPES[name]
            if (module, name) not in _RECORDS:
                raise _Refused(str(objects_inside(source, f"GLOBAL {module}.{name}")))
            # Of its own for each reading: a pickle can write attributes to a class.
            return made.setdefault((module, name), type(name, (_Record,), {}))

    return Reader(io.BytesIO(content)).load()


def _check_operations(content: bytes) -> None:
    """Raise ValueError for places in the memo beyond the file, for which memory would be taken."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("LONG_BINPUT", "PUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("a place in the memo beyond the file")


def _entries(record: Any, source: str) -> list[Entry]:
    paths = record["planner_data"] or {}
    places: dict[tuple[str, tuple[int, ...] | None], _Record] = {}
    for index, place in record["storage_data"].items():
        offset = index.state.get("offset")
        places[index["fqn"], offset if offset is None else _sizes(offset)] = place
    entries = [
        _entry(name, _path(paths, name), plan, places, source)
        for name, plan in record["state_dict_metadata"].items()
        if type(plan).__name__ == "TensorStorageMetadata"
    ]
    taken = {entry.path for entry in entries}
    if len(taken) < len(entries) or any(
        entry.path[:n] in taken for entry in entries for n in range(1, len(entry.path))
    ):
        raise ValueError("two tensors in one place")
    return entries


def _entry(
    name: str,
    path: tuple[str, ...],
    plan: Any,
    places: Mapping[tuple[str, tuple[int, ...] | None], Any],
    source: str,
) -> Entry:
    shape, dtype = _sizes(plan["size"]), plan["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} has no type of numbers")
    pieces = []
    for chunk in plan["chunks"]:
        offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
        place = places.get((name, offsets)) or places[name, None]
        if place.state.get("transform_descriptors"):
            raise _Refused(
                f"state: {source} was written through an extension, which may pack its bytes and "
                "is not known here; save it without."
            )
        pieces.append(
            Piece(
                offsets, sizes, place["relative_path"], *_sizes((place["offset"], place["length"]))
            )
        )
    _check_pieces(name, shape, pieces)
    return Entry(path, shape, dtype, tuple(pieces))


def _path(paths: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the keys from outside to inside, or the name alone where they are not told."""
    path = tuple(paths.get(name, (name,)))
    if not path or not all(isinstance(part, (str, int)) for part in path):
        raise TypeError("a path that is no keys")
    return tuple(map(str, path))


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if any(type(size) is not int or not 0 <= size < 2**62 for size in sizes):
        raise ValueError("a size that is no number")
    return sizes


def _check_pieces(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    for piece in pieces:
        if not len(shape) == len(piece.offsets) == len(piece.sizes) or any(
            start + size > length
            for start, size, length in zip(piece.offsets, piece.sizes, shape, strict=True)
        ):
            raise ValueError(f"a piece of {name!r} lies outside it")
    if sum(_product(piece.sizes) for piece in pieces) != _product(shape):
        raise ValueError(f"the pieces of {name!r} are not all of it")


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
