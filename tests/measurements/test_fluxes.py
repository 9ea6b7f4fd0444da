"""Fluxes from three Lanczos runs on planted kernels: what is resolved, and that it is right."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import gauss, lanczos
from spectralshell.measurements.fluxes import (
    TOLERANCE,
    FrozenErrorRuns,
    JacobiRun,
)
from spectralshell.shells import ShellPartition, SoftShells
from spectralshell.statuses import NOT_CONVERGED, STEP_TOO_LONG
from tests.device import make_tensor, place

SHELLS = SoftShells(ShellPartition.covering(1e-3, 1.0, q=2.0))
LAMBDA = np.logspace(-4, 0, 300)
ERROR = place(torch.ones(300, dtype=torch.float64))
H = 1e-5
# Of the largest flux, against the same difference of exact energies after half as many steps as
# there are modes.
ENOUGH = 1e-4


def moved(amount):
    """The kernel after a step: rates drift in waves over the spectrum."""
    return LAMBDA * (1.0 + amount * np.sin(3.0 * np.log(LAMBDA)))


def run_in(rates, n_steps):
    diagonal = make_tensor(rates)
    result = lanczos(lambda v: diagonal * v, ERROR, n_steps)
    return result, JacobiRun.of(result)


def runs_of(n_steps, h=H):
    here, _ = run_in(LAMBDA, n_steps)
    nodes, shares, _ = gauss(here.alpha, here.beta)
    amplitudes = here.norm * shares**0.5
    return FrozenErrorRuns(
        eigenvalues=nodes,
        amplitudes=amplitudes,
        error_rates=-nodes * amplitudes,
        pairs=tuple(
            (run_in(moved(step), n_steps)[1], run_in(moved(-step), n_steps)[1])
            for step in (h, h / 2)
        ),
        amount=h,
        total=150.0,
        total_rate=-float(LAMBDA.sum()),
        exhausted=here.exhausted,
        n_matvecs=5 * n_steps,
    )


def exact_flux():
    ends = [SHELLS.below(moved(sign * H)) @ np.full(300, 0.5) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * H)


@pytest.mark.parametrize("n_steps", [8, 12, 16, 24, 32, 48])
def test_edges_that_the_last_steps_change_are_not_resolved(n_steps):
    runs = runs_of(n_steps)
    balance, faults = runs.balance(SHELLS, runs.total_rate)
    converged = np.array(faults) == "ok"
    assert set(faults) == {"ok", NOT_CONVERGED}
    expected = exact_flux()
    error = np.abs(balance.flux_down - expected) / np.abs(expected).max()
    assert 0 < converged.sum() < converged.size
    assert error[converged].max() < TOLERANCE
    assert error[~converged].max() > TOLERANCE


def test_enough_steps_resolve_every_edge():
    runs = runs_of(150)
    balance, faults = runs.balance(SHELLS, runs.total_rate)
    assert set(faults) == {"ok"}
    scale = np.abs(balance.flux_down).max()
    np.testing.assert_allclose(balance.flux_down, exact_flux(), rtol=0, atol=ENOUGH * scale)
    assert balance.dissipation.sum() == pytest.approx(LAMBDA.sum())


@pytest.mark.parametrize(("h", "far"), [(0.03, False), (0.1, False), (0.3, True), (0.6, True)])
def test_edges_that_half_the_step_changes_are_not_resolved(h, far):
    runs = runs_of(150, h)
    balance, faults = runs.balance(SHELLS, runs.total_rate)
    expected = exact_flux()
    error = np.abs(balance.flux_down - expected) / np.abs(expected).max()
    near = np.array(faults) == "ok"
    assert error[near].max(initial=0.0) < TOLERANCE
    assert (STEP_TOO_LONG in faults) == far


def test_a_short_rule_is_that_of_a_short_run():
    _, long = run_in(LAMBDA, 20)
    _, short = run_in(LAMBDA, 7)
    np.testing.assert_allclose(long.rule(7).nodes, short.rule(99).nodes, rtol=1e-12)
    assert long.rule(7).energies.sum() == pytest.approx(150.0)
