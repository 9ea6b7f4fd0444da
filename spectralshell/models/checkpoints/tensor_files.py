"""Single files of tensors: safetensors and pickles of tensors; no code in them is run."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from spectralshell.models.checkpoints.contents import tensors_of
from spectralshell.models.checkpoints.messages import listed, unreadable

_HEADER_LENGTH = 8
"""Bytes of the length at the beginning of a safetensors file."""

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorFile:
    """One file of tensors: safetensors, or what ``torch.save`` wrote; recognised by content."""

    path: str
    key: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the checkpoint {self.path!r}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return (self.path,)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Return the tensors by name; on the meta device no values are read.

        Cheap there, but for files of torch's format before 1.6.
        """
        return tensors_of(self.content(device), self.label, self.key)

    def content(self, device: str) -> Any:
        """Return all that the file holds."""
        try:
            with open(self.path, "rb") as stream:
                head = stream.read(_HEADER_LENGTH + 1)
        except OSError as error:
            raise ValueError(
                f"state: {self.label} cannot be read ({error}); check its rights."
            ) from error
        if not head:
            raise ValueError(
                f"state: {self.label} is empty; the run that wrote it may have been stopped."
            )
        read = _reader_of(self.path, head, self.label)
        if read is _read_safetensors and self.key is not None:
            raise ValueError(
                f"state: {self.label} is a safetensors file, which holds names and tensors alone; "
                f"leave key={self.key!r} out, or use prefix=."
            )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pickle protocol.*")  # an error follows
                return read(self.path, device)
        except Exception as error:  # whatever a reader raises on a file that is not what it seems
            raise unreadable(self.label, error) from error


def read_tensor(record: bytes, source: str) -> Any:
    """Return what ``torch.save`` wrote into a part of a file, read as a whole file is."""
    check_archive(io.BytesIO(record), len(record), source)
    try:
        return torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise unreadable(source, error) from error


def _reader_of(path: str, head: bytes, source: str) -> Callable[[str, str], Any]:
    if head.startswith(_ZIP):
        check_archive(path, os.path.getsize(path), source)
        return _read_archive
    if head[_HEADER_LENGTH:] == b"{" or Path(path).suffix == ".safetensors":
        return _read_safetensors
    if head.startswith(_PICKLE):
        return _read_pickle
    raise ValueError(
        f"state: {source} is not a readable checkpoint: it begins with {head[:4]!r}, as neither "
        "safetensors files do nor those of torch.save; save model.state_dict() with either."
    )


def _read_safetensors(path: str, device: str) -> dict[str, Tensor]:
    if device == "cpu":
        return load_file(path, device="cpu")
    with safe_open(path, framework="pt"):  # checks lengths, offsets and shapes
        pass
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(_HEADER_LENGTH), "little")))
    return {
        name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        for name, entry in header.items()
        if name != "__metadata__"
    }


def check_archive(file: Any, size: int, source: str) -> None:
    """Raise ValueError for an archive that torch.save does not write: packed, cut off, of code."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    # A RuntimeError is what zipfile raises for versions and methods that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"state: {source} is not a readable checkpoint ({error}); it may be corrupt or "
            "incomplete."
        ) from error
    if any(Path(member.filename).name == "constants.pkl" for member in members):
        raise ValueError(
            f"state: {source} is a program of torch.jit, not a state; load it and save its "
            "state_dict()."
        )
    unpacked = sum(member.file_size for member in members)
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed or unpacked > size:
        raise ValueError(
            f"state: {source} holds packed entries ({listed(packed) or 'larger than the file'}), "
            "which torch.save does not write and which may fill the memory; save it again."
        )


def _read_archive(path: str, device: str) -> Any:
    if Path(path).suffix == ".safetensors":  # by that name torch reads it as what it is not
        with open(path, "rb") as stream:
            return torch.load(stream, map_location=device, weights_only=True)
    # Mapped, so that no values are read where none are asked for.
    return torch.load(path, map_location=device, weights_only=True, mmap=device == "meta")


def _read_pickle(path: str, device: str) -> Any:
    return torch.load(path, map_location=device, weights_only=True)
