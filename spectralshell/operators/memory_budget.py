"""How much memory a measurement may take."""

from __future__ import annotations

import re
from numbers import Integral

import psutil
import torch

FREE_SHARE = 0.5
"""Part of the free memory that is taken where no limit was given."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_META_BYTES = 2**40


def resolve_max_memory(max_memory: int | str | None, device: torch.device) -> int:
    """Return the bytes of working memory that a measurement may take.

    Parameters
    ----------
    max_memory : int, str or None
        Bytes, or a number with a unit (``"1GB"``, ``"512 MiB"``); None takes half of what is free
        on the device.
    device : torch.device

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If it is not positive, or the string is not a size.
    TypeError
        If it has another type.

    Examples
    --------
    >>> resolve_max_memory("1.5 GB", torch.device("cpu"))
    1500000000
    >>> resolve_max_memory(2**20, torch.device("cpu"))
    1048576
    """
    if max_memory is None:
        return int(FREE_SHARE * _free_bytes(device))
    size = parse_bytes(max_memory)
    if size <= 0:
        raise ValueError(f"max_memory must be positive, got {max_memory!r}.")
    return size


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes; see :func:`resolve_max_memory`."""
    if isinstance(size, Integral) and not isinstance(size, bool):
        return int(size)
    if not isinstance(size, str):
        raise TypeError(
            f"max_memory must be None, a number of bytes or a string such as '1GB', got "
            f"{type(size).__name__}."
        )
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"max_memory must be a number of bytes or a string such as '1GB' or '512 MiB', got "
            f"{size!r}."
        )
    return int(float(match[1]) * unit)


def format_bytes(size: float) -> str:
    """Return a size for a message.

    Examples
    --------
    >>> format_bytes(1_500_000_000), format_bytes(512)
    ('1.5 GB', '512 B')
    """
    for unit in ("GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{int(size)} B"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "meta":
        return _META_BYTES
    return int(psutil.virtual_memory().available)
