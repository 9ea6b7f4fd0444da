"""The history on disk: whole blocks are read, whatever a kill left behind them."""

import time

import numpy as np
import pytest

from spectralshell.runs.history import COLUMNS, ROW, HistoryFile, history_frame, read_rows
from spectralshell.warning_categories import RunWarning

FAST = 2.0
"""Seconds in which 10^6 steps open."""


def _rows(steps):
    rows = np.zeros(len(steps), dtype=ROW)
    rows["step"] = steps
    rows["tau"] = 0.1 * np.asarray(steps)
    return rows


def _written(path, *blocks):
    history = HistoryFile(path)
    history.create()
    for steps in blocks:
        history.append(_rows(steps))
    return history


def test_blocks_are_read_as_one_frame(tmp_path):
    _written(tmp_path / "h", [1, 2, 3], [], [4])
    frame = history_frame(read_rows(tmp_path / "h"))
    assert frame["step"].tolist() == [1, 2, 3, 4]
    assert list(frame) == list(COLUMNS)


def test_a_row_is_completed_by_a_later_one(tmp_path):
    history = _written(tmp_path / "h", [1, 2])
    row = _rows([2, 3])
    row["loss"] = 5.0
    history.append(row)
    frame = history_frame(read_rows(tmp_path / "h"))
    assert frame["step"].tolist() == [1, 2, 3]
    assert frame["loss"].tolist() == [0.0, 5.0, 5.0]


@pytest.mark.parametrize("cut", [1, 5, 20, 200])
def test_a_torn_block_is_left_out(tmp_path, cut):
    _written(tmp_path / "h", [1, 2], [3, 4])
    blob = (tmp_path / "h").read_bytes()
    (tmp_path / "h").write_bytes(blob[:-cut])
    assert read_rows(tmp_path / "h")["step"].tolist() in ([1, 2], [])
    history = HistoryFile(tmp_path / "h")
    history.resume(1)
    history.append(_rows([2]))
    assert read_rows(tmp_path / "h")["step"].tolist() in ([1, 2], [2])


@pytest.mark.parametrize("place", [0, 40, -30])
def test_damage_is_told(tmp_path, place):
    _written(tmp_path / "h", [1, 2], [3, 4])
    blob = bytearray((tmp_path / "h").read_bytes())
    blob[place] ^= 0xFF
    (tmp_path / "h").write_bytes(blob)
    with pytest.warns(RunWarning, match="is damaged after"):
        rows = read_rows(tmp_path / "h")
    assert rows["step"].tolist() == ([1, 2] if place == -30 else [])


def test_steps_that_go_back_are_an_error(tmp_path):
    _written(tmp_path / "h", [1, 2, 3], [2, 3])
    with pytest.raises(ValueError, match="goes back from step 3 to 2, as where two recorders"):
        read_rows(tmp_path / "h")


def test_going_on_drops_later_rows(tmp_path):
    history = _written(tmp_path / "h", [1, 2, 3], [4, 5])
    history.resume(3)
    history.append(_rows([4]))
    assert read_rows(tmp_path / "h")["step"].tolist() == [1, 2, 3, 4]
    assert history.n_bytes == (tmp_path / "h").stat().st_size


def test_what_a_failed_write_left_is_written_over(tmp_path):
    history = _written(tmp_path / "h", [1, 2])
    with open(tmp_path / "h", "ab") as stream:
        stream.write(b"SSH1 and a part of a block")
    history.append(_rows([3]))
    assert read_rows(tmp_path / "h")["step"].tolist() == [1, 2, 3]


def test_a_million_steps_open_fast(tmp_path):
    _written(tmp_path / "h", *np.split(np.arange(1, 1_000_001), 4000))
    began = time.process_time()
    frame = history_frame(read_rows(tmp_path / "h"))
    assert time.process_time() - began < FAST
    assert len(frame) == 1_000_000
