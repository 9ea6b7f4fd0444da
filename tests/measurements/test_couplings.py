"""Couplings between modes against dense references, and what is remembered of them."""

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import ShellFluxEstimator, ToeplitzDiagnostic
from spectralshell.measurements.cache import Measurement, measure_each
from spectralshell.measurements.couplings import (
    CouplingSettings,
    known_couplings,
    measure_couplings,
)
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.operators import build_kernel_derivative
from tests.device import place_snapshot

# Two float64 routes to one matrix.
TOLERANCE = 1e-10
NO_CACHE = joblib.Memory(None)
MOTION = {"direction", "derivative", "step", "random_seed"}
OWN = {"block_size", "n_random"}


def settings(**options):
    """The settings of a measurement, each option where it belongs."""
    motion = {name: value for name, value in options.items() if name in MOTION}
    own = {name: value for name, value in options.items() if name in OWN}
    kernel = {name: options[name] for name in options.keys() - MOTION - OWN}
    return CouplingSettings(KernelSettings(**kernel), MotionSettings(**motion), **own)


def brier(**options):
    return settings(**{"residual": "brier", "solver": "exact", "block_size": 0, **options})


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
    return measure_couplings(snapshot, brier())


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
    chosen = brier(solver="lanczos", n_steps=18, block_size=3)
    krylov = measure_couplings(snapshot, chosen)
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
    chosen = brier(solver="lanczos", n_steps=3, block_size=2)
    krylov = measure_couplings(snapshot, chosen)
    assert krylov.eigenvalues.size == 6
    assert not krylov.converged.all()
    assert 0.5 * (krylov.amplitudes**2).sum() == pytest.approx(krylov.total, rel=TOLERANCE)


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_random_directions_follow_the_seed(snapshot, solver):
    moves = {"solver": solver, "n_steps": 4, "block_size": 2, "n_random": 2, "random_seed": 3}
    chosen = brier(**moves)
    first, again = measure_couplings(snapshot, chosen), measure_couplings(snapshot, chosen)
    other = measure_couplings(snapshot, brier(**moves | {"random_seed": 4}))
    np.testing.assert_array_equal(first.random_couplings, again.random_couplings)
    assert not np.allclose(first.random_couplings, other.random_couplings)
    assert not np.allclose(*first.random_couplings)


def test_difference_is_close_to_the_exact_derivative(snapshot, exact):
    difference = measure_couplings(snapshot, brier(derivative="difference"))
    scale = abs(exact.couplings).max()
    np.testing.assert_allclose(difference.couplings, exact.couplings, atol=1e-8 * scale)


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_linear_model_has_a_frozen_kernel(derivative):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    still = place_snapshot(model, torch.randn(5, 4).double(), torch.randn(5, 2).double())
    chosen = settings(solver="exact", derivative=derivative, n_random=1)
    couplings = measure_couplings(still, chosen)
    assert couplings.frozen
    assert "frozen kernel" in couplings.status
    assert not couplings.random_couplings.any()


def test_no_error_is_a_status(snapshot):
    outputs = snapshot.model(snapshot.inputs).detach()
    solved = place_snapshot(snapshot.model, snapshot.inputs, outputs)
    for solver in ("exact", "lanczos"):
        couplings = measure_couplings(solved, settings(solver=solver, n_steps=3))
        assert "zero error" in couplings.status
        assert np.isfinite(couplings.couplings).all()


def test_direction_may_follow_from_the_snapshot(snapshot, exact):
    later = classifier(seed=1)
    given = measure_couplings(snapshot, brier(direction=later))
    found = measure_couplings(snapshot, brier(direction=lambda s: later))
    np.testing.assert_array_equal(found.couplings, given.couplings)
    assert not given.dynamics_exact
    assert not np.allclose(given.couplings, exact.couplings)


def test_couplings_are_known_down_to_the_first_that_is_rounding():
    V, rates = np.diag([0.5, 8.0, 16.0]), np.array([1.0, 8.0, 16.0])
    assert known_couplings(V, rates, 1.0).tolist() == [False, True, True]
    assert known_couplings(V, rates, 0.0).all()
    assert known_couplings(0.0 * V, rates, 1.0).all()


def test_gates_are_in_the_status_whatever_the_number_of_directions():
    held = measure_couplings(classifier(activation=nn.ReLU), brier(n_random=3))
    assert held.status == "gates held: relu"
    assert held.held_gates == ("relu",)


def remembered(snapshot, memory=NO_CACHE, **options):
    return measure_each([snapshot], Measurement(measure_couplings, brier(**options)), memory=memory)


def test_couplings_are_remembered_by_their_settings(snapshot, tmp_path):
    cached = joblib.Memory(tmp_path, verbose=0)
    (first,) = remembered(snapshot, cached)
    assert remembered(snapshot)[0].couplings is first.couplings
    (moved,) = remembered(snapshot, direction=classifier(seed=1))
    (again,) = remembered(snapshot, direction=classifier(seed=2))
    assert not np.allclose(moved.couplings, again.couplings)
    (stored,) = remembered(classifier(), cached)
    np.testing.assert_array_equal(stored.couplings, first.couplings)
    assert (stored.tau, stored.batch) == (2.0, "b")


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
def test_unusable_parameters_are_named(snapshot, changes, name):
    with pytest.raises((ValueError, TypeError), match=name):
        ToeplitzDiagnostic(**changes).fit([snapshot])


def test_what_the_exact_solver_ignores_is_not_in_its_settings():
    few, many = (
        ToeplitzDiagnostic(solver="exact", n_steps=n, block_size=n)._gather() for n in (5, 9)
    )
    assert few == many
    more = ToeplitzDiagnostic(solver="exact", n_null=21)._gather()
    assert few != more
    # Without a null nothing is drawn, either.
    few, many = (
        ShellFluxEstimator(solver="exact", n_steps=n, random_state=n)._gather() for n in (5, 9)
    )
    assert few == many
