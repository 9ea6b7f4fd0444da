"""Every kind of checkpoint gives what the state in memory gives, to the last bit."""

import os
import pickle

import joblib
import pandas as pd
import pytest
import torch

from spectralshell import ShellEnergyEstimator, Snapshot
from spectralshell.models.checkpoints.opened import as_checkpoint, open_checkpoint
from tests.models.checkpoints.kinds import KINDS, OF_LANGUAGE_MODELS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a kind once, in a cache of the hub that lies beside it."""
    kinds = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

        def make(name):
            if name not in kinds:
                kinds[name] = KINDS[name](tmp_path_factory.mktemp("kind"))
            return kinds[name]

        hub = tmp_path_factory.mktemp("hub")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        yield make


def frames_of(kind, state):
    snapshot = Snapshot(kind.model, *kind.batch, state=state)
    estimator = ShellEnergyEstimator(residual=kind.residual, solver="exact")
    return estimator.fit_transform([snapshot]), estimator.shells_


# A language model takes seconds to set up: one of them at every run, the others in the slow ones.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in OF_LANGUAGE_MODELS[1:] else [])
        for name in KINDS
    ],
)
def test_the_frames_are_those_of_the_state_in_memory(made, name):
    kind = made(name)
    for found, expected in zip(
        frames_of(kind, kind.state), frames_of(kind, kind.expected), strict=True
    ):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.parametrize("name", KINDS)
def test_the_state_is_that_in_memory_and_after_pickling(made, name):
    kind = made(name)
    state = Snapshot(kind.model, *kind.batch, state=kind.state).state
    expected = Snapshot(kind.model, *kind.batch, state=kind.expected).load_state()
    for loaded in (state, pickle.loads(pickle.dumps(state))):
        found = loaded.load(kind.model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[part]) for part, tensor in found.items())
    again = Snapshot(kind.model, *kind.batch, state=kind.state).state
    assert joblib.hash(state) == joblib.hash(again)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("hub", "Lightning")])
def test_a_file_that_is_written_again_is_an_error(made, name):
    """Lightning's and the hub's are single files, as of tests/test_snapshots.py."""
    kind = made(name)
    snapshot = Snapshot(kind.model, *kind.batch, state=kind.state)
    before = joblib.hash(snapshot.state)
    asked = as_checkpoint(kind.state)
    for file in open_checkpoint(str(asked.path), asked.key).files:
        status = _touched(file)
        again = Snapshot(kind.model, *kind.batch, state=kind.state)
        with pytest.raises(ValueError, match="was changed after the snapshot was made"):
            snapshot.load_state()
        assert joblib.hash(again.state) != before
        _put_back(file, status)
    snapshot.load_state()


def _touched(file):
    status = os.stat(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    return status


def _put_back(file, status):
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
