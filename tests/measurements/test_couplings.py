"""Couplings between modes against dense references, and what is remembered of them."""

from dataclasses import replace
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from spectralshell.measurements.couplings import couple_snapshot, measure_couplings
from spectralshell.measurements.settings import (
    CouplingConfig,
    check_coupling_parameters,
    coupling_config,
)
from spectralshell.operators import build_kernel_derivative
from tests.device import place_snapshot

# Two float64 routes to one matrix.
TOLERANCE = 1e-10
NO_CACHE = joblib.Memory(None)
BRIER = CouplingConfig(residual="brier", solver="exact", block_size=0)


def classifier(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
    inputs = torch.randn(6, 5, dtype=torch.float64)
    return place_snapshot(model, inputs, torch.arange(6) % 3, tau=2.0, batch="b")


@pytest.fixture
def snapshot():
    return classifier()


@pytest.fixture
def exact(snapshot):
    return couple_snapshot(snapshot, BRIER)


def in_entries(couplings, vectors):
    return vectors @ couplings @ vectors.T


def test_couplings_sum_up_to_the_derivative(snapshot, exact):
    dense = build_kernel_derivative(snapshot, "gradient-flow", residual="brier").to_dense()
    eigenvalues = np.linalg.eigvalsh(dense.cpu().numpy())
    np.testing.assert_allclose(
        np.linalg.eigvalsh(exact.couplings), eigenvalues, atol=TOLERANCE * abs(eigenvalues).max()
    )


def test_energy_and_its_rate_are_those_of_gradient_flow(exact):
    assert 0.5 * (exact.amplitudes**2).sum() == pytest.approx(exact.total, rel=TOLERANCE)
    decay = (exact.eigenvalues * exact.amplitudes**2).sum()
    assert exact.total_rate == pytest.approx(-decay, rel=TOLERANCE)
    np.testing.assert_allclose(
        exact.error_rates, -exact.eigenvalues * exact.amplitudes, atol=TOLERANCE
    )
    assert exact.dynamics_exact
    assert exact.direction == "gradient-flow"


def test_whole_krylov_space_gives_what_the_matrix_gives(snapshot, exact):
    config = replace(BRIER, solver="lanczos", n_steps=18, block_size=3)
    krylov = couple_snapshot(snapshot, config)
    assert krylov.solver == "lanczos"
    kept, all_ = krylov.resolved, exact.resolved
    np.testing.assert_allclose(krylov.eigenvalues[kept], exact.eigenvalues[all_], rtol=TOLERANCE)
    scale = abs(exact.couplings).max()
    for measure, chosen in ((krylov, kept), (exact, all_)):
        np.testing.assert_allclose(
            np.abs(measure.couplings[np.ix_(chosen, chosen)]),
            np.abs(exact.couplings[np.ix_(all_, all_)]),
            atol=1e-8 * scale,  # vectors, through gaps down to the floor
        )


def test_few_steps_leave_modes_unconverged(snapshot):
    config = replace(BRIER, solver="lanczos", n_steps=3, block_size=2)
    krylov = couple_snapshot(snapshot, config)
    assert krylov.eigenvalues.size == 6
    assert not krylov.converged.all()
    assert 0.5 * (krylov.amplitudes**2).sum() == pytest.approx(krylov.total, rel=TOLERANCE)


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_random_directions_follow_the_seed(snapshot, solver):
    config = replace(BRIER, solver=solver, n_steps=4, block_size=2, n_random=2, random_seed=3)
    first, again = couple_snapshot(snapshot, config), couple_snapshot(snapshot, config)
    other = couple_snapshot(snapshot, replace(config, random_seed=4))
    np.testing.assert_array_equal(first.random_couplings, again.random_couplings)
    assert not np.allclose(first.random_couplings, other.random_couplings)
    assert not np.allclose(*first.random_couplings)


def test_difference_is_close_to_the_exact_derivative(snapshot, exact):
    difference = couple_snapshot(snapshot, replace(BRIER, derivative="difference"))
    scale = abs(exact.couplings).max()
    np.testing.assert_allclose(difference.couplings, exact.couplings, atol=1e-8 * scale)


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_linear_model_has_a_frozen_kernel(derivative):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    still = place_snapshot(model, torch.randn(5, 4).double(), torch.randn(5, 2).double())
    config = CouplingConfig(solver="exact", derivative=derivative, n_random=1)
    couplings = couple_snapshot(still, config)
    assert couplings.frozen
    assert "frozen kernel" in couplings.status
    assert not couplings.random_couplings.any()


def test_no_error_is_a_status(snapshot):
    outputs = snapshot.model(snapshot.inputs).detach()
    solved = place_snapshot(snapshot.model, snapshot.inputs, outputs)
    for solver in ("exact", "lanczos"):
        couplings = couple_snapshot(solved, CouplingConfig(solver=solver, n_steps=3))
        assert "zero error" in couplings.status
        assert np.isfinite(couplings.couplings).all()


def test_direction_may_follow_from_the_snapshot(snapshot, exact):
    later = classifier(seed=1)
    given = couple_snapshot(snapshot, replace(BRIER, direction=later))
    found = couple_snapshot(snapshot, replace(BRIER, direction=lambda s: later))
    np.testing.assert_array_equal(found.couplings, given.couplings)
    assert not given.dynamics_exact
    assert not np.allclose(given.couplings, exact.couplings)


def test_gates_are_in_the_status_whatever_the_number_of_directions():
    held = couple_snapshot(classifier(activation=nn.ReLU), replace(BRIER, n_random=3))
    assert held.status == "gates held: relu"


def test_couplings_are_remembered_by_configuration(snapshot, tmp_path):
    cached = joblib.Memory(tmp_path, verbose=0)
    first = measure_couplings([snapshot], BRIER, memory=cached)[0]
    assert measure_couplings([snapshot], BRIER, memory=NO_CACHE)[0].couplings is first.couplings
    later = classifier(seed=1)
    moved = measure_couplings([snapshot], replace(BRIER, direction=later), memory=NO_CACHE)[0]
    other = classifier(seed=2)
    again = measure_couplings([snapshot], replace(BRIER, direction=other), memory=NO_CACHE)[0]
    assert not np.allclose(moved.couplings, again.couplings)
    fresh = classifier()
    stored = measure_couplings([fresh], BRIER, memory=cached)[0]
    np.testing.assert_array_equal(stored.couplings, first.couplings)
    assert stored.batch == "b"


def estimator(**changes):
    settings = {
        "residual": "mse", "solver": "exact", "n_steps": 5, "block_size": 2, "step": None,
        "direction": "gradient-flow", "derivative": "exact", "parameters": None,
        "chunk_size": None, "max_memory": None, "device": "auto", "dtype": None,
        "random_state": 0, "verbose": 0,
    }  # fmt: skip
    return SimpleNamespace(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"direction": "uphill"}, "direction"),
        ({"direction": 3}, "direction"),
        ({"direction": {"0.weight": [1.0]}}, "direction"),
        ({"derivative": "numeric"}, "derivative"),
        ({"step": 0.0}, "step"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_unusable_parameters_are_named(changes, name):
    with pytest.raises((ValueError, TypeError), match=name):
        check_coupling_parameters(estimator(**changes))


def test_what_the_exact_solver_ignores_is_not_in_its_configuration():
    few, many = estimator(n_steps=5, random_state=0), estimator(n_steps=9, random_state=1)
    assert coupling_config(few) == coupling_config(many)
    assert coupling_config(few, n_random=2) != coupling_config(many, n_random=2)
