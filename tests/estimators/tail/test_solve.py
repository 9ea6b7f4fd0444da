"""Each model from its own integrals, and the solver against general optimisers."""

import numpy as np
import pytest
from scipy.optimize import least_squares, nnls

from spectralshell.estimators.tail.models import (
    EXPONENTIAL,
    FREE_POWER,
    LOGNORMAL,
    POWER_LAW,
    TEMPLATE,
)
from spectralshell.estimators.tail.profile import likelihood_interval, profile_at, profile_fit
from spectralshell.estimators.tail.solve import (
    box_cox,
    box_cox_derivative,
    shell_grid,
    solve,
)
from tests.estimators.tail.energies import exact_energies

EDGES = np.geomspace(0.01, 10.0, 11)
# Gauss-Legendre in ln λ with 10 nodes per e-fold, exponents up to 12 within a shell.
QUADRATURE = 1e-4
# The general optimiser ends where the squares change by 1e-12, so θ is good to its root.
CONVERGENCE = 1e-5
# Replicates and samples of their own end in the same root of the profile's derivative.
ROOT = 1e-8


def log_densities(slope, cutoffs, power, edges=EDGES):
    energies = [exact_energies(slope, cutoff, power, edges) for cutoff in cutoffs]
    return np.log(np.array(energies) / np.diff(edges))[None]


def fit(model, log_density, edges=EDGES, ratios=None):
    grid = shell_grid(edges[:-1], edges[1:])
    return profile_fit(model, log_density, np.ones_like(log_density), grid, ratios)


@pytest.mark.parametrize("b", [0.6, 0.9, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("ratio", [1.3, 2.0, 4.0])
def test_template_is_recovered_from_its_integrals(b, ratio):
    edges = 0.01 * ratio ** np.arange(9)
    # Suppression by at most e^12 keeps the densities within what a measurement resolves.
    cutoffs = (
        np.array([0.25, 0.5, 1.0]) * 12.0 * max(edges[-1] ** (b - 1), edges[0] ** (b - 1)) ** -1
    )
    found = fit(TEMPLATE, log_densities(b, cutoffs, b - 1, edges), edges).theta[0]
    assert found == pytest.approx(b, abs=2e-3)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.5])
def test_exponential_is_recovered(s):
    result = fit(EXPONENTIAL, log_densities(s, [0.1, 0.5, 2.0], 1.0))
    assert result.theta[0] == pytest.approx(s, abs=QUADRATURE)


def test_free_power_is_recovered_with_its_slope():
    result = fit(FREE_POWER, log_densities(1.5, [0.5, 1.0, 2.0], 0.8))
    assert result.theta[0] == pytest.approx(0.8, abs=1e-2)
    assert result.slope[0] == pytest.approx(1.5, abs=1e-2)


def test_lognormal_is_recovered():
    edges = np.geomspace(0.01, 10.0, 201)  # narrow shells: the mean is the midpoint
    x = 0.5 * np.log(edges[1:] * edges[:-1])
    data = np.stack([-1.2 * x - 0.3 * x**2, -0.7 * x - 0.3 * x**2])[None]
    assert fit(LOGNORMAL, data, edges).theta[0] == pytest.approx(0.3, abs=1e-3)


def test_shared_cutoff_is_proportional_to_tau():
    taus = np.array([0.0, 1.0, 3.0])
    result = fit(TEMPLATE, log_densities(1.7, 0.6 * taus, 0.7), ratios=taus)
    assert result.theta[0] == pytest.approx(1.7, abs=1e-3)
    assert result.coefficient[0, 2] == pytest.approx(3 * result.coefficient[0, 1])


def test_width_of_shells_is_divided_out():
    """Unequal shells: forgetting their widths would move the slope by about −1."""
    edges = np.array([1.0, 1.5, 4.0, 5.0, 20.0, 21.0, 60.0])
    result = fit(POWER_LAW, log_densities(1.4, [0.0], 1.0, edges), edges)
    assert result.theta[0] == pytest.approx(1.4, abs=QUADRATURE)


def noisy(seed, n_taus=3):
    rng = np.random.default_rng(seed)
    data = log_densities(1.6, np.geomspace(0.2, 2.0, n_taus), 0.6)
    return data + rng.normal(0, 0.1, data.shape), rng.uniform(0.5, 2.0, data.shape)


def test_profile_minimum_agrees_with_a_general_optimiser():
    data, weights = noisy(0)
    grid = shell_grid(EDGES[:-1], EDGES[1:])

    def residuals(p):
        b, rest = p[0], p[1:].reshape(2, -1)
        logs = -b * grid.x - rest[1][:, None, None] * box_cox(grid.x, np.array(b - 1.0))
        mean = rest[0][:, None] + np.log(np.exp(logs + grid.log_weights).sum(axis=-1))
        return (np.sqrt(weights[0]) * (data[0] - mean)).ravel()

    reference = least_squares(residuals, np.r_[1.5, data[0, :, -1], np.full(3, 0.3)], xtol=1e-12)
    result = profile_fit(TEMPLATE, data, weights, grid)
    assert result.sse[0] == pytest.approx(2 * reference.cost, rel=1e-6)
    assert result.theta[0] == pytest.approx(reference.x[0], abs=CONVERGENCE)


def test_linear_part_is_non_negative_least_squares():
    """With narrow shells the problem at fixed b is linear; convex data ask for κ < 0."""
    edges = np.geomspace(0.1, 10.0, 401)
    x = 0.5 * np.log(edges[1:] * edges[:-1])
    rng = np.random.default_rng(1)
    data = -1.5 * x + rng.normal(0, 0.05, x.size) - np.array([[0.4], [-0.4]]) * np.exp(0.5 * x)
    grid = shell_grid(edges[:-1], edges[1:])
    result = profile_at(TEMPLATE, np.array([1.5]), data[None], np.ones((1, *data.shape)), grid)
    design = np.stack([np.ones_like(x), -np.ones_like(x), -np.exp(0.5 * x)], axis=1)
    expected = [nnls(design, row + 1.5 * x)[0][2] for row in data]
    found = result.coefficient[0] / 0.5 * np.exp(-0.5 * grid.log_reference)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[1] == 0.0


def test_quadrature_weights_are_those_of_a_mean():
    grid = shell_grid(np.array([1.0, 2.0, 9.0]), np.array([2.0, 4.0, 9.5]))
    np.testing.assert_allclose(np.exp(grid.log_weights).sum(axis=1), 1.0)
    means = np.exp(grid.log_weights + grid.x + grid.log_reference).sum(axis=1)
    np.testing.assert_allclose(means, [1.5, 3.0, 9.25])


def test_replicates_agree_with_fits_of_their_own():
    data = np.concatenate([noisy(seed)[0] for seed in range(4)])
    together = fit(TEMPLATE, data)
    apart = [fit(TEMPLATE, data[k : k + 1]).theta[0] for k in range(4)]
    np.testing.assert_allclose(together.theta, apart, atol=ROOT)


def test_steps_never_increase_the_squares():
    data, weights = noisy(2)
    grid = shell_grid(EDGES[:-1], EDGES[1:])
    start = (np.array([1.6]), np.zeros(1), np.full((1, 3), 9.0))
    squares = [
        solve(TEMPLATE, *start, data, weights, grid, ratios=None, max_steps=n).sse[0]
        for n in range(12)
    ]
    assert (np.diff(squares) <= 0).all()
    assert squares[-1] < 0.1 * squares[0]


def test_likelihood_interval_brackets_and_meets_its_threshold():
    data, weights = noisy(3)
    grid = shell_grid(EDGES[:-1], EDGES[1:])
    result = profile_fit(TEMPLATE, data, weights, grid)
    lower, upper = likelihood_interval(TEMPLATE, result, data, weights, grid, None, 7, 0.95)
    assert lower < result.theta[0] < upper
    ends = profile_at(TEMPLATE, np.array([lower, upper]), data, weights, grid).sse
    assert ends == pytest.approx(ends.mean(), rel=1e-3)


@pytest.mark.parametrize("power", [-0.7, 0.0, 1e-7, 0.3, 2.0])
def test_box_cox_derivative_is_the_difference_quotient(power):
    x = np.linspace(-7.0, 0.0, 8)
    step = 1e-4
    quotient = (box_cox(x, np.array(power + step)) - box_cox(x, np.array(power - step))) / 2 / step
    exact = box_cox_derivative(x, np.array(power), box_cox(x, np.array(power)))
    np.testing.assert_allclose(exact, quotient, rtol=1e-5, atol=1e-6)
