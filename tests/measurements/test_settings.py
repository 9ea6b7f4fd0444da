"""Settings gathered from parameters, and the line on the plan that all estimators write."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import (
    JacobianBlockDiagnostic,
    ShellEnergyEstimator,
    ShellFluxEstimator,
    Snapshot,
    ToeplitzDiagnostic,
)
from spectralshell.measurements.settings import probe_seed
from spectralshell.measurements.solver import PLAN_COLUMNS

ESTIMATORS = {
    "energy": ShellEnergyEstimator,
    "flux": ShellFluxEstimator,
    "toeplitz": lambda **k: ToeplitzDiagnostic(n_null=1, min_modes=1, **k),
    "blocks": lambda **k: JacobianBlockDiagnostic(n_null=2, **k),
}
anything = pytest.mark.parametrize("kind", ESTIMATORS)


@pytest.fixture
def snapshot():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return Snapshot(
            model, torch.randn(5, 3).double(), torch.arange(5) % 2, tau=1.5, batch=7, name="run"
        )


@anything
def test_the_line_on_a_plan_is_the_same_for_all(kind, snapshot, capsys):
    ESTIMATORS[kind](verbose=1).fit([snapshot])
    lines = [line for line in capsys.readouterr().err.split("\n") if "predicted cost" in line]
    (line,) = lines
    said = "snapshot of run at tau=1.5, batch=7: exact (n = 10; predicted cost: exact "
    assert line.split("\r")[-1].startswith(said)
    assert "; memory: exact " in line
    assert ("lanczos" in line) == (kind != "blocks")
    ESTIMATORS[kind](verbose=0, chunk_size=3).fit([snapshot])
    assert capsys.readouterr().err == ""


@anything
def test_a_fit_says_what_it_cost(kind, snapshot):
    other = Snapshot(snapshot.model, snapshot.inputs, snapshot.targets, tau=2.0)
    estimator = ESTIMATORS[kind]().fit([snapshot, other])
    assert list(estimator.plan_) == ["tau", "batch", *PLAN_COLUMNS]
    assert estimator.plan_["tau"].tolist() == [1.5, 2.0]
    assert set(estimator.plan_["solver"]) == {estimator.solver_} == {"exact"}
    assert estimator.n_matvecs_ == 0
    assert estimator.dynamics_exact_
    assert estimator.plan_["lanczos_cost"].isna().all() == (kind == "blocks")


@pytest.mark.parametrize("kind", ["energy", "flux", "toeplitz"])
def test_what_does_not_fit_has_one_message(kind, snapshot):
    with pytest.raises(ValueError, match=r"max_memory: 2 KB do not hold solver='auto' for n = 10"):
        ESTIMATORS[kind](max_memory="2 KB").fit([snapshot])


@anything
def test_measures_in_snapshots_are_named_by_their_function(kind, snapshot):
    ESTIMATORS[kind]().fit([snapshot])
    (key,) = snapshot.measures
    names = {"energy": "spectrum", "flux": "fluxes", "toeplitz": "couplings", "blocks": "blocks"}
    assert key.split(" ")[0] == f"measure_{names[kind]}"


def test_estimators_of_one_snapshot_do_not_share_measures(snapshot):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in ESTIMATORS.values():
            make().fit([snapshot])
    assert len(snapshot.measures) == len(ESTIMATORS)


def test_no_random_state_is_a_fixed_seed():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert probe_seed(None) == 0
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert probe_seed(3) == probe_seed(3) == probe_seed(np.random.RandomState(3))
