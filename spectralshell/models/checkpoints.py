"""Checkpoint files read as tensors by name; nothing in a file is executed or followed."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

_NESTED_KEYS = ("model_state_dict", "state_dict", "model")

_MAX_NAMES = 5

_LONGEST = 160
"""Letters of another library's message that are passed on."""

_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")
"""Beginnings of lines that tell how to run the code of a file."""

_HEADER_LENGTH = 8
"""Bytes of the length at the beginning of a safetensors file."""

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"

_OBJECTS = ("Unsupported global", "Unsupported class", "GLOBAL", "not an allowed global")
"""What torch says of a pickle that needs more than tensors."""

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


def find_checkpoint(state: str | os.PathLike[str]) -> str:
    """Return the absolute path of a checkpoint file that exists; ``~`` is the user's folder."""
    given = os.fspath(state)
    path = os.path.abspath(given if os.path.exists(given) else os.path.expanduser(given))
    if os.path.isdir(path):
        raise ValueError(
            f"state: {path!r} is a folder; pass the path of the checkpoint file inside it."
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"state: there is no checkpoint file at {path!r}; check the path.")
    return path


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickled one that holds nothing but tensors, onto the CPU.

    Recognised by content; weights may be nested under a usual key of a pickled checkpoint.
    """
    return _read(find_checkpoint(path), "cpu")


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of a checkpoint as tensors of the meta device.

    Cheap: values are not read, but from files of torch's format before 1.6.
    """
    return _read(find_checkpoint(path), "meta")


def _read(path: str, device: str) -> dict[str, Tensor]:
    source = f"the checkpoint {path!r}"
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEADER_LENGTH + 1)
    except OSError as error:
        raise ValueError(f"state: {source} cannot be read ({error}); check its rights.") from error
    if not head:
        raise ValueError(f"state: {source} is empty; the run that wrote it may have been stopped.")
    read = _reader_of(path, head, source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pickle protocol.*")  # an error follows
            content = read(path, device)
    except Exception as error:  # whatever a reader raises on a file that is not what it seems
        raise ValueError(_fault(source, error)) from error
    return tensors_of(content, source)


def _reader_of(path: str, head: bytes, source: str) -> Callable[[str, str], Any]:
    if head.startswith(_ZIP):
        _check_archive(path, source)
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


def _check_archive(path: str, source: str) -> None:
    """Raise ValueError for an archive that torch.save does not write: packed, cut off, of code."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # zipfile raises the last for versions and methods that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
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
    if packed or unpacked > os.path.getsize(path):
        raise ValueError(
            f"state: {source} holds packed entries ({listed(packed) or 'larger than the file'}), "
            "which torch.save does not write and which may fill the memory; save it again."
        )


def _read_archive(path: str, device: str) -> Any:
    # Mapped, so that no values are read where none are asked for.
    return torch.load(path, map_location=device, weights_only=True, mmap=device == "meta")


def _read_pickle(path: str, device: str) -> Any:
    return torch.load(path, map_location=device, weights_only=True)


def _fault(source: str, error: Exception) -> str:
    text = str(error)
    if any(phrase in text for phrase in _OBJECTS):
        return (
            f"state: {source} holds Python objects besides tensors, and loading them could run any "
            "code, so it is refused. Save model.state_dict() alone, or a safetensors file. "
            f"({_telling_line(text)})"
        )
    return (
        f"state: {source} is not a readable checkpoint ({_telling_line(text)}); it may be corrupt "
        "or incomplete, or from another tool; save model.state_dict() again."
    )


def _telling_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_ADVICE)]
    telling = [line for line in lines if "GLOBAL" in line or line.startswith("WeightsUnpickler")]
    line = (telling or lines or ["no further detail"])[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def tensors_of(content: Any, source: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may lie under a usual key; ValueError for others.

    ``source`` names where it comes from.
    """
    nested = _without_shells(content)
    if not isinstance(nested, Mapping) or not nested:
        raise ValueError(
            f"state: {source} holds no mapping of names to tensors; save model.state_dict()."
        )
    tensors = {
        str(name): value
        for name, value in nested.items()
        if isinstance(value, Tensor) or not str(name).endswith("_extra_state")
    }
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        holders = [name for name in foreign if _holds_tensors(nested.get(name))]
        remedy = (
            f"pass what lies under {holders[0]!r} as a mapping"
            if holders
            else "save model.state_dict() alone"
        )
        raise ValueError(
            f"state: {source} holds entries that are not tensors: {listed(foreign)}; {remedy}."
        )
    return tensors


def _without_shells(content: Any) -> Any:
    passed: list[int] = []
    while isinstance(content, Mapping) and id(content) not in passed:  # a file can hold a circle
        passed.append(id(content))
        inner = (content.get(key) for key in _NESTED_KEYS)
        content = next((value for value in inner if isinstance(value, Mapping)), content)
    return content


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
