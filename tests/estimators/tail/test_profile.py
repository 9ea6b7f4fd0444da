"""The tail fit is the global minimum of its own criterion, or says that it may not be."""

import numpy as np
import pytest

from spectralshell.estimators.tail import profile
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from spectralshell.estimators.tail.models import (
    COMPARED,
    EXPONENTIAL,
    FREE_POWER,
    LOGNORMAL,
    TEMPLATE,
)
from spectralshell.estimators.tail.profile import profile_at, profile_fit
from spectralshell.estimators.tail.solve import TailParameters, shell_grid, solve
from studies.tail.data import EDGES, SLOPES, noise, template
from studies.tail.optimum import Definition

# Bounded Brent compares squares, so its b is good to the root of their rounding.
AGREEMENT = 1e-6
# Squares of two solutions of one problem.
SQUARES = 1e-9
# Template and seed of fits whose profile has two minima of nearly the same depth.
COMPETING = ((1.15, 9), (1.2, 9))
GRID = shell_grid(EDGES[:-1], EDGES[1:])
DEFINITION = Definition(EDGES[:-1], EDGES[1:])


def sample(b, seed):
    """Ln densities and weights of the mean of a template's batches, and of each left out."""
    data = template(b, *noise(seed)).energies
    data = data.reshape(6, -1, len(EDGES) - 1).transpose(1, 0, 2)
    sums = np.concatenate([data.sum(0)[None], data.sum(0) - data])
    counts = np.append(len(data), np.full(len(data), len(data) - 1.0))[:, None, None]
    weights = 1.0 / data.var(axis=0).clip(1e-300) * data.mean(axis=0) ** 2
    return np.log(sums / counts / np.diff(EDGES)), np.broadcast_to(weights * counts, sums.shape)


def agrees(fit, replicate, data, weights):
    """b of the definition; where two minima tie, either."""
    found = DEFINITION.minima(data[replicate], weights[replicate])
    tied = [m.b for m in found if m.squares <= found[0].squares * (1 + SQUARES)]
    gap = min(abs(fit.theta[replicate] - b) for b in tied)
    return gap <= AGREEMENT and fit.sse[replicate] <= found[0].squares * (1 + AGREEMENT)


@pytest.mark.parametrize(("b", "replicates"), [(0.85, (0, 5)), (1.15, (2,))])
def test_fit_is_the_optimum_of_its_definition(b, replicates):
    data, weights = sample(b, seed=3)
    fit = profile_fit(TEMPLATE, data, weights, GRID)
    assert all(agrees(fit, r, data, weights) for r in replicates)
    assert fit.converged.all()


@pytest.mark.slow
@pytest.mark.parametrize("b", SLOPES)
def test_fits_and_replicates_are_the_optimum_of_their_definition(b):
    met = []
    for seed in range(5):
        data, weights = sample(b, seed)
        fit = profile_fit(TEMPLATE, data, weights, GRID)
        met += [agrees(fit, r, data, weights) for r in range(len(data))]
    assert np.mean(met) >= 0.99


@pytest.mark.parametrize("model", [*COMPARED, FREE_POWER], ids=lambda model: model.kind)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("b", [0.85, 1.2, 1.6])
def test_no_point_of_a_dense_grid_undercuts_the_fit(model, shared, b):
    ratios = np.arange(6.0) if shared and model is not LOGNORMAL else None
    data, weights = (array[:2] for array in sample(b, seed=1))
    fit = profile_fit(model, data, weights, GRID, ratios)
    theta = np.linspace(*model.bounds, 300)
    for r in range(2):
        dense = profile_at(model, theta, data[r : r + 1], weights[r : r + 1], GRID, ratios)
        assert dense.converged.all()
        assert fit.sse[r] <= dense.sse.min() * (1 + SQUARES)
    assert fit.converged.all()


@pytest.mark.parametrize("model", [TEMPLATE, EXPONENTIAL, LOGNORMAL, FREE_POWER])
@pytest.mark.parametrize("theta", [-0.6, 0.4, 2.2])
def test_gradient_is_the_difference_quotient_of_the_profile(model, theta):
    data, weights = (array[:1] for array in sample(1.3, seed=0))
    step = 1e-4
    around = np.array([theta - step, theta, theta + step])
    below, at, above = profile_at(model, around, data, weights, GRID).sse
    gradient = profile_at(model, around[1:2], data, weights, GRID).gradient[0]
    # The quotient is off by a third derivative times step², and by the squares' rounding.
    assert gradient == pytest.approx((above - below) / 2 / step, rel=1e-4, abs=1e-9 * at / step)


@pytest.mark.parametrize(
    ("squares", "slopes", "doubtful"),
    [
        ([3.0, 2.0, 2.5, 3.0], [-1.0, -1.0, 1.0, 1.0], []),  # the sign changes: no doubt
        ([2.0, 3.0, 2.5, 3.0], [1.0, 1.0, 1.0, 1.0], [1]),  # falls between slopes that rise
        ([3.0, 2.0, 2.5, 1.0], [-1.0, -1.0, -1.0, -1.0], [1]),  # rises between slopes that fall
        ([3.0, 2.0, 2.1, 9.0], [-1.0, 1.0, 9.0, 9.0], [1]),  # the cubic dips
    ],
)
def test_neighbours_that_hide_a_minimum_are_looked_at_again(squares, slopes, doubtful):
    theta, n = np.arange(4.0), np.zeros(4)
    coefficient, mean = np.zeros((4, 1)), np.zeros((4, 1, 1))
    points = TailParameters(
        theta, n, coefficient, coefficient, np.array(squares), mean, np.array(slopes), n == 0
    )
    zero = np.zeros(4, dtype=int)
    assert profile._Profiles(zero, zero, points).doubtful().tolist() == doubtful


def test_start_does_not_matter():
    data, weights = (array[:1] for array in sample(1.15, seed=2))
    theta = np.array([1.2])
    results = [
        solve(TEMPLATE, theta, np.zeros(1), np.full((1, 6), c), data, weights, GRID, ratios=None)
        for c in (0.0, 0.3, 50.0)
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.coefficient, results[0].coefficient, atol=1e-8)


def test_competing_minima_are_said():
    """Two minima within an AIC of 2 of each other, or a batch that decides between them."""
    competing = [_status(b, seed) for b, seed in COMPETING]
    assert all("minima compete in" in status for status in competing)
    assert any("another minimum at b" in status for status in competing)


def test_root_that_is_not_reached_is_said(monkeypatch):
    monkeypatch.setattr(profile, "MAX_ROOT_STEPS", 1)
    assert "fit not converged: power law and power law, template cutoff" in _status(1.3, 0)


def _status(b, seed):
    made = template(b, *noise(seed))
    fitter = GRSDTailFitter(window=(EDGES[0], EDGES[-1]), edges=EDGES)
    return fitter.fit(made.energies, tau=made.tau, batch=made.batch).status_
