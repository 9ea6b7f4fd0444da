"""The history of a run on disk: blocks of rows with a checksum, appended one after the other.

A block is a header (magic, number of rows, checksum) and its rows. A kill leaves at most the last
block torn. The last row of a step counts, so that a row can be completed later.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.runs.atomic_files import replace_file
from spectralshell.warning_categories import RunWarning

HISTORY = "history.bin"
"""Its name in the directory of a run."""

COLUMNS = (
    "step",
    "tau",
    "tau_weight_decay",
    "lr",
    "loss",
    "grad_norm",
    "tokens",
    "seconds",
)
"""What users read of a row."""

ROW = np.dtype(
    [("step", "<i8")]
    + [(name, "<f8") for name in COLUMNS[1:]]
    # Of the first parameter group, to go on from this row: its steps, and its buffer's share.
    + [("n_steps", "<i8"), ("share", "<f8")]
)

_MAGIC = b"SSH1"
_HEADER = struct.Struct("<4sII")

Rows = NDArray[np.void]


class HistoryFile:
    """The history that a recorder appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0

    def create(self) -> None:
        """Begin an empty history."""
        replace_file(self.path, lambda target: target.write_bytes(b""))
        self._end = 0

    def resume(self, after_step: int) -> None:
        """Drop the rows of later steps, and whatever a kill left torn."""
        rows = read_rows(self.path)
        kept = rows[rows["step"] <= after_step]
        blob = _block(kept) if len(kept) else b""
        replace_file(self.path, lambda target: target.write_bytes(blob))
        self._end = len(blob)

    def append(self, rows: Rows, *, durable: bool = False) -> None:
        """Append rows as one block; after an OSError the file is as before, at the next attempt."""
        if not len(rows):
            return
        blob = _block(rows)
        with open(self.path, "r+b") as stream:
            stream.truncate(self._end)  # what a full disk left of an earlier attempt
            stream.seek(self._end)
            stream.write(blob)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        self._end += len(blob)

    @property
    def n_bytes(self) -> int:
        """Length of the file."""
        return self._end


def read_rows(path: Path) -> Rows:
    """Return all whole rows, the last one of each step; steps that go back are a ValueError."""
    blob = path.read_bytes()
    view = memoryview(blob)
    blocks: list[memoryview] = []
    position = 0
    while position + _HEADER.size <= len(blob):
        magic, n_rows, checksum = _HEADER.unpack_from(blob, position)
        start, end = position + _HEADER.size, position + _HEADER.size + n_rows * ROW.itemsize
        if magic == _MAGIC and end > len(blob):
            break  # torn by a kill
        if magic != _MAGIC or zlib.crc32(view[start:end]) != checksum:
            warnings.warn(
                f"the history {str(path)!r} is damaged after {position} of {len(blob)} bytes; the "
                "rows before are read.",
                RunWarning,
                stacklevel=3,
            )
            break
        blocks.append(view[start:end])
        position = end
    rows = np.frombuffer(b"".join(blocks), dtype=ROW)
    repeated = np.flatnonzero(np.diff(rows["step"]) == 0)
    if len(repeated):
        rows = np.delete(rows, repeated)
    _check_order(rows["step"], path)
    return rows


def history_frame(rows: Rows) -> pd.DataFrame:
    """Return the rows as users read them."""
    return pd.DataFrame({name: rows[name] for name in COLUMNS}, columns=list(COLUMNS))


def _block(rows: Rows) -> bytes:
    payload = np.ascontiguousarray(rows, dtype=ROW).tobytes()
    return _HEADER.pack(_MAGIC, len(rows), zlib.crc32(payload)) + payload


def _check_order(steps: NDArray[np.int64], path: Path) -> None:
    back = np.flatnonzero(np.diff(steps) <= 0)
    if len(back):
        row = int(back[0])
        raise ValueError(
            f"the history {str(path)!r} goes back from step {steps[row]} to {steps[row + 1]}, as "
            "where two recorders wrote to one directory; give each run a directory of its own."
        )
