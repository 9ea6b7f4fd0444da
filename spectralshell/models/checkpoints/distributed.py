"""A folder that ``torch.distributed.checkpoint`` wrote: tensors in pieces, in files of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectralshell.models.checkpoints.contents import tensors_of
from spectralshell.models.checkpoints.distributed_metadata import Entry, Piece, read_metadata
from spectralshell.models.checkpoints.places import file_inside
from spectralshell.models.checkpoints.tensor_files import read_tensor

METADATA = ".metadata"


@dataclass(frozen=True)
class DistributedFolder:
    """The pieces of a state that ranks saved; no process group is needed to read them."""

    folder: str
    key: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the folder of torch.distributed.checkpoint {self.folder!r}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read: the plan, and those with pieces."""
        names = {piece.file for entry in self._entries for piece in entry.pieces}
        return tuple(
            file_inside(self.folder, name, self.label) for name in (METADATA, *sorted(names))
        )

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Return the tensors by name; what is not asked for, as an optimiser's, is not read."""
        plan: dict[str, Any] = {}
        entry_of: dict[int, Entry] = {}
        for entry in self._entries:
            stands = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            entry_of[id(stands)] = entry
            _put(plan, entry.path, stands)
        named = tensors_of(plan, self.label, self.key)
        if device == "meta":
            return named
        return {name: self._read(name, entry_of[id(t)]) for name, t in named.items()}

    @cached_property
    def _entries(self) -> list[Entry]:
        path = file_inside(self.folder, METADATA, self.label)
        return read_metadata(path, self.label)

    def _read(self, name: str, entry: Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        filled = torch.zeros(entry.shape, dtype=torch.bool)
        for piece in entry.pieces:
            value = self._read_piece(piece)
            if (
                not isinstance(value, Tensor)
                or value.shape != piece.sizes
                or value.dtype != entry.dtype
                or value.layout != torch.strided
            ):
                raise ValueError(
                    f"state: {self.label}: the piece of {name!r} in {piece.file!r} is not the "
                    "tensor that the plan says; the files are of different saves."
                )
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offsets, piece.sizes, strict=True)
            )
            tensor[place] = value
            filled[place] = True
        if not filled.all():
            raise ValueError(
                f"state: {self.label}: pieces of {name!r} overlap and leave others out; save again."
            )
        return tensor

    def _read_piece(self, piece: Piece) -> Any:
        path = file_inside(self.folder, piece.file, self.label)
        if piece.start + piece.length > os.path.getsize(path):
            raise ValueError(
                f"state: {self.label}: {piece.file!r} ends before byte "
                f"{piece.start + piece.length}, which its plan names; the copy may be incomplete."
            )
        with open(path, "rb") as stream:
            stream.seek(piece.start)
            return read_tensor(stream.read(piece.length), f"the file {path!r}")


def _put(plan: dict[str, Any], path: tuple[str, ...], value: Tensor) -> None:
    for part in path[:-1]:
        plan = plan.setdefault(part, {})
    plan[path[-1]] = value
