"""How much memory one call needs, from the kernel's own account of this process (Linux)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def release() -> None:
    """Give freed memory back, so that it does not hide what comes next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Resident size now."""
    return _field("VmRSS")


def reset_peak() -> None:
    """Let :func:`peak_bytes` start anew."""
    _CLEAR.write_text(_RESET_PEAK)


def peak_bytes() -> int:
    """Largest resident size since :func:`reset_peak`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {name}.")
