"""The cache on disk: broken, exchanged and half-written entries never change a table."""

import os
import signal
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Memory
from torch import nn

from spectralshell import ShellEnergyEstimator, make_snapshots
from spectralshell.measurements import store as module
from spectralshell.warning_categories import CacheWarning

N_SNAPSHOTS = 3
SHORT, LONG = 4, 100
"""Repetitions in the suite, and in the slow tests."""


def snapshots():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    draw = torch.randn(N_SNAPSHOTS, 6, 5, generator=generator, dtype=torch.float64)
    return make_snapshots(model, [(batch[:, :3], batch[:, 3:]) for batch in draw])


def table(folder):
    return ShellEnergyEstimator(memory=folder).fit(snapshots()).shells_


@pytest.fixture(scope="module")
def expected():
    return table(None)


@pytest.fixture
def filled(tmp_path):
    table(tmp_path)
    return tmp_path


def entries(folder):
    return sorted(folder.rglob("output.pkl"))


def check_mended(folder, expected, *, broken):
    """Fit: the table is right, each broken entry is named, and is mended."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = table(folder)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    named = [str(w.message) for w in caught if w.category is CacheWarning]
    assert len(named) == len(broken)
    assert all(any(str(file) in text for text in named) for file in broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_frame_equal(table(folder), expected, check_exact=True)


def flip_bits(folder, expected, n_flips):
    random = np.random.default_rng(0)
    for flip in range(n_flips):
        file = entries(folder)[flip % N_SNAPSHOTS]
        content = bytearray(file.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        file.write_bytes(content)
        check_mended(folder, expected, broken=[file])


def truncate(folder, expected, n_cuts):
    for cut in range(n_cuts):
        file = entries(folder)[cut % N_SNAPSHOTS]
        content = file.read_bytes()
        file.write_bytes(content[: cut * len(content) // n_cuts])
        check_mended(folder, expected, broken=[file])


def exchange(folder, expected, n_exchanges):
    for place in range(n_exchanges):
        one, other = (entries(folder)[(place + step) % N_SNAPSHOTS] for step in (0, 1))
        contents = one.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        one.write_bytes(contents[1])
        check_mended(folder, expected, broken=[one, other])


def begin(folder):
    """Fit in a process of its own, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that a fork does not carry over
        child = os.fork()
    if child == 0:
        try:
            table(folder)
        finally:
            os._exit(0)
    return child


def kill(folder, expected, n_kills):
    started = time.perf_counter()
    table(None)
    whole = time.perf_counter() - started
    random = np.random.default_rng(0)
    for number in range(n_kills):
        own = folder / f"killed {number}"
        child = begin(own)
        time.sleep(random.uniform(0.0, 1.5 * whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_mended(own, expected, broken=[])


def share(folder, expected, n_pairs):
    for number in range(n_pairs):
        own = folder / f"shared {number}"
        children = [begin(own), begin(own)]
        for child in children:
            os.waitpid(child, 0)
        check_mended(own, expected, broken=[])
        assert len(entries(own)) == N_SNAPSHOTS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share this one's memory")
@pytest.mark.parametrize("harm", [flip_bits, truncate, exchange, kill, share])
@pytest.mark.parametrize(
    "times", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_the_table_is_the_same(filled, expected, harm, times):
    harm(filled, expected, times)


def counted(monkeypatch):
    calls = []
    measure = module._packed
    monkeypatch.setattr(module, "_packed", lambda *args: calls.append(1) or measure(*args))
    return calls


@pytest.mark.parametrize("kind", ["file in its way", "no such device"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    tmp_path, monkeypatch, kind
):
    folder = tmp_path / "cache"
    if kind == "file in its way":
        folder.mkdir()
        (folder / "joblib").write_text("")
    else:
        folder = "/proc/no_such_folder"
    calls = counted(monkeypatch)
    with pytest.raises(ValueError, match=r"memory: the cache folder .* cannot be written to"):
        table(folder)
    assert calls == []


def test_an_empty_folder_without_rights_is_named(tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    memory = Memory(tmp_path, verbose=0)
    monkeypatch.setattr(module.tempfile, "mkstemp", refuse)
    calls = counted(monkeypatch)
    with pytest.raises(ValueError, match=r"snapshot tau=0, batch=0: memory: the cache folder .*"):
        table(memory)
    assert calls == []


def test_a_full_folder_without_rights_is_read(filled, expected, monkeypatch):
    monkeypatch.setattr(module.tempfile, "mkstemp", None)
    pd.testing.assert_frame_equal(table(filled), expected, check_exact=True)


def test_a_result_that_cannot_be_stored_is_not_lost(tmp_path, expected, monkeypatch):
    def fail(file, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", fail)
    with pytest.warns(CacheWarning, match=r"could not be written .*No space left"):
        found = table(tmp_path)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_joblib_clears_the_cache(filled):
    memory = Memory(filled, verbose=0)
    assert len(entries(filled)) == N_SNAPSHOTS
    memory.reduce_size(items_limit=1)
    assert len(entries(filled)) == 1
    memory.clear(warn=False)
    assert entries(filled) == []


def test_an_entry_that_is_no_file_is_told(filled, expected):
    file = entries(filled)[0]
    file.unlink()
    file.mkdir()
    with pytest.warns(CacheWarning, match="could not be written"):
        found = table(filled)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.slow
def test_processes_fill_one_cache_and_say_what_they_found(filled, expected):
    entries(filled)[1].write_bytes(b"")
    with pytest.warns(CacheWarning, match="is not what was stored there"):
        found = ShellEnergyEstimator(memory=filled, n_jobs=2).fit(snapshots()).shells_
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert len(entries(filled)) == N_SNAPSHOTS
