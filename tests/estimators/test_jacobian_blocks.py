"""JacobianBlockDiagnostic: the contract, its frames, and what it accepts."""

from dataclasses import replace
from functools import wraps

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spectralshell import JacobianBlockDiagnostic
from spectralshell.estimators import jacobian_blocks
from tests.device import place_snapshot
from tests.estimators.contract import SnapshotEstimatorContract

FOUR = {"^0.weight": "in", "^0.bias": "shift", "^2.weight": "out", "^2.bias": "level"}


class TestContract(SnapshotEstimatorContract):
    estimator_class = JacobianBlockDiagnostic
    cheap = {"blocks": FOUR, "n_null": 9}


@pytest.fixture(scope="module")
def fitted(measured_trajectory):
    return JacobianBlockDiagnostic(blocks=FOUR, n_null=9).fit(measured_trajectory)


def test_frames_fit_together(fitted, measured_trajectory):
    n, L = len(measured_trajectory), 4
    scalars = fitted.transform(measured_trajectory)
    assert fitted.block_names_ == ["in", "shift", "out", "level"]
    assert len(fitted.coherence_) == n * L * L
    assert len(fitted.blocks_) == n * L
    assert len(fitted.trajectory_) == n
    assert len(fitted.null_) == 3 * n
    assert len(fitted.windows_) == n
    assert len(fitted.suprema_) == 4
    pd.testing.assert_frame_equal(fitted.coherence_frame(measured_trajectory), fitted.coherence_)
    pd.testing.assert_frame_equal(fitted.block_frame(measured_trajectory), fitted.blocks_)
    norms = fitted.trajectory_.set_index(["tau", "batch"])
    pd.testing.assert_series_equal(norms["jacobian_rate"], scalars["jacobian_rate"])
    sums = fitted.blocks_.groupby(["tau", "batch"])["coherence_sum"].max()
    pd.testing.assert_series_equal(sums, scalars["coherence_sum"], check_index=True)
    assert (scalars["jacobian_norm"] ** 2 <= scalars["coherence_sum"]).all()
    np.testing.assert_allclose(
        fitted.blocks_.groupby(["tau", "batch"])["trace_share"].sum(), 1.0, rtol=1e-12
    )


def test_suprema_are_the_largest_along_each_batch(fitted):
    for _, row in fitted.suprema_.iterrows():
        mine = fitted.trajectory_[fitted.trajectory_["batch"] == row["batch"]]
        assert row["n_snapshots"] == 3
        assert row["jacobian_norm"] == mine["jacobian_norm"].max()
        at = mine.loc[mine["tau"] == row["tau_of_rate"], "jacobian_rate"]
        assert at.item() == row["jacobian_rate"]


def test_profile_is_the_mean_of_the_pairs(fitted):
    pairs = fitted.coherence_.groupby("distance")
    np.testing.assert_allclose(fitted.profile_["normalized"], pairs["normalized"].mean())
    np.testing.assert_array_equal(fitted.profile_["coherence_max"], pairs["coherence"].max())
    assert fitted.profile_["n_pairs"].tolist() == [48, 36, 24, 12]


def test_band_and_null_cost_no_measurement(measured_trajectory, monkeypatch):
    wide = JacobianBlockDiagnostic(blocks=FOUR, n_null=9)
    wide.fit(measured_trajectory)

    @wraps(jacobian_blocks.measure_blocks)
    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(jacobian_blocks, "measure_blocks", fail)
    other = JacobianBlockDiagnostic(blocks=FOUR, n_null=3, band=3, window_blocks=2)
    frame = other.fit(measured_trajectory).transform(measured_trajectory)
    # A band over all blocks explains everything, in any order.
    np.testing.assert_allclose(frame["change_within_band"], 1.0, rtol=1e-12)
    np.testing.assert_allclose(frame["change_within_band_p_value"], 1.0)
    assert len(other.windows_) == 3 * len(measured_trajectory)


def test_score_rewards_what_distance_predicts(measured_trajectory, monkeypatch):
    """Coherence planted by distance is predicted, and misleads where it rises instead."""
    apart = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    planted = {0: np.exp(-0.5 * apart), 1: np.exp(-0.55 * apart), 2: np.exp(0.5 * apart - 2.0)}
    measure = jacobian_blocks.measure_blocks

    def plant(snapshot, *settings):
        coherence = planted[snapshot.batch] * 4.0
        np.fill_diagonal(coherence, 4.0)
        found = measure(snapshot, *settings)
        return replace(found, coherence=coherence, norms=np.full(4, 2.0))

    monkeypatch.setattr(jacobian_blocks, "measure_blocks", plant)
    first, near, other = [fresh_copy(s) for s in measured_trajectory[:3]]
    diagnostic = JacobianBlockDiagnostic(blocks=FOUR, n_null=0).fit([first])
    assert diagnostic.score([first]) == pytest.approx(1.0)
    assert 0.9 < diagnostic.score([near]) < 1.0
    assert diagnostic.score([other]) < 0.0


def fresh_copy(snapshot):
    """The snapshot without what it remembers."""
    labels = {"tau": snapshot.tau, "batch": snapshot.batch, "state": snapshot.load_state()}
    return place_snapshot(snapshot.model, snapshot.inputs, snapshot.targets, **labels)


def test_one_pair_of_blocks_has_no_profile_to_learn(measured_trajectory):
    by_batch = [s for s in measured_trajectory if s.batch == 0]
    held_out = [s for s in measured_trajectory if s.batch == 1]
    two = JacobianBlockDiagnostic(blocks={"^0": "a", "": "b"}, n_null=0).fit(by_batch)
    # The mean at its distance is the mean of all.
    assert two.score(held_out) == 0.0


def test_a_random_state_instance_gives_one_null(measured_trajectory):
    X = measured_trajectory[:2]
    state = np.random.RandomState(3)
    diagnostic = JacobianBlockDiagnostic(blocks=FOUR, n_null=9, random_state=state).fit(X)
    frame = diagnostic.transform(X)
    for name, rows in diagnostic.null_.groupby("statistic"):
        np.testing.assert_array_equal(frame[f"{name}_p_value"], rows["p_value"])


def linear_snapshots():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return [
        place_snapshot(nn.Linear(3, 2), x, torch.zeros(4, 2), batch=batch) for batch in range(2)
    ]


def test_without_structure_there_are_statuses_and_no_exception():
    X = linear_snapshots()
    diagnostic = JacobianBlockDiagnostic().fit(X)
    assert diagnostic.block_names_ == ["weight"]
    assert diagnostic.trajectory_["status"].str.contains("one block").all()
    assert diagnostic.trajectory_["status"].str.contains("frozen kernel").all()
    assert (diagnostic.blocks_["status"] == "frozen kernel").all()
    frame = diagnostic.transform(X)
    assert (frame["jacobian_rate"] == 0.0).all()
    assert (frame["normalized_sum"] == 1.0).all()
    assert frame[["decay_rate", "change_within_band"]].isna().all().all()
    assert diagnostic.score(X) == 0.0


def test_names_become_an_index_level():
    X = linear_snapshots()
    named = [
        place_snapshot(s.model, s.inputs, s.targets, batch=s.batch, name=name)
        for s, name in zip(X, "ab", strict=True)
    ]
    diagnostic = JacobianBlockDiagnostic().fit(named)
    assert diagnostic.transform(named).index.names == ["tau", "batch", "name"]
    assert diagnostic.suprema_["name"].tolist() == ["a", "b"]
    assert diagnostic.coherence_.columns[2] == "name"


def test_snapshots_of_another_model_are_an_error():
    X = linear_snapshots()
    other = place_snapshot(
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        X[0].inputs,
        X[0].targets,
        batch=5,
    )
    with pytest.raises(ValueError, match=r"X\[2\] has the blocks \['0', '2'\], expected"):
        JacobianBlockDiagnostic().fit([*X, other])
    with pytest.raises(ValueError, match=r"X\[0\] has the blocks"):
        JacobianBlockDiagnostic().fit(X).transform([other])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"blocks": "depth"}, ValueError, "blocks"),
        ({"band": -1}, ValueError, "band"),
        ({"band": 1.5}, TypeError, "band"),
        ({"window_blocks": 1}, ValueError, "window_blocks"),
        ({"n_null": -1}, ValueError, "n_null"),
        ({"direction": "up"}, ValueError, "direction"),
        ({"direction": 3}, TypeError, "direction"),
        ({"derivative": "forward"}, ValueError, "derivative"),
        ({"step": 0.0}, ValueError, "step"),
        ({"residual": "l1"}, ValueError, "residual"),
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"max_memory": "lots"}, ValueError, "max_memory"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"verbose": -1}, ValueError, "verbose"),
        ({"parameters": 3}, TypeError, "parameters"),
    ],
)
def test_wrong_parameters_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        JacobianBlockDiagnostic(**changes).fit(linear_snapshots())
