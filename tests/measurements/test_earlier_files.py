"""Caches and pickles written before the modules moved: measured anew, never read wrongly."""

import pickle
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from spectralshell import ShellEnergyEstimator, ToeplitzDiagnostic, make_snapshots

ARCHIVE = Path(__file__).parent / "written_by_flat_layout.tar.xz"
"""Four snapshots and the caches of all four estimators on them, by the last flat layout."""


@pytest.fixture
def earlier(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def snapshots():
    """The snapshots that the archive was written from, made in the same way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    made = []
    for tau in (0.5, 1.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        batches = [(torch.randn(6, 3), torch.randn(6, 2)) for _ in range(2)]
        made += make_snapshots(model, batches, tau=tau)
    return made


def _results(folder):
    return {path: path.read_bytes() for path in folder.rglob("output.pkl")}


# The archive has other batches at each tau under one label.
@pytest.mark.filterwarnings("ignore::spectralshell.warning_categories.SnapshotWarning")
@pytest.mark.parametrize(
    "estimator",
    [ShellEnergyEstimator(q=1.5), ToeplitzDiagnostic(n_null=2, min_modes=1)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_earlier_cache_is_measured_anew(earlier, snapshots, estimator):
    before = _results(earlier)
    cached = estimator.set_params(memory=str(earlier / "cache")).fit_transform(snapshots)
    after = _results(earlier)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + len(snapshots)
    for snapshot in snapshots:
        snapshot.measures.clear()
    fresh = estimator.set_params(memory=None).fit_transform(snapshots)
    pd.testing.assert_frame_equal(cached, fresh, check_exact=True)


def test_an_earlier_pickle_is_refused_by_name(earlier):
    written = (earlier / "snapshots.pkl").read_bytes()
    with pytest.raises(ModuleNotFoundError, match=r"spectralshell\.operators\.checkpoints"):
        pickle.loads(written)
