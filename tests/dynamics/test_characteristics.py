"""Characteristics and exact density against an ODE solver, through b = 1, b = 2 and c = 0."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from spectralshell.dynamics import (
    characteristic,
    characteristic_origin,
    dissipation_action,
    exact_density,
    wall,
)

ODE = 1e-9  # the contract; the solver runs at 1e-12
SLOPES = [0.3, 0.9, 1.0 - 1e-9, 1.0, 1.0 + 1e-7, 1.4, 2.0 - 1e-8, 2.0, 2.0 + 1e-10, 2.7, 4.0]
SPEEDS = [-0.4, 0.0, 1e-9, 0.5, 1.0]


def initial_density(lam):
    return lam**0.7 * np.exp(-0.3 * lam)


def integrate(lambda_0, t, b, c):
    """Follow ln λ, Φ and ln(dλ/dλ0) along one characteristic."""

    def velocity(_, state):
        lam = np.exp(state[0])
        drift = -c * lam ** (b - 1.0)
        return [drift, 2.0 * lam, b * drift]

    start = [math.log(lambda_0), 0.0, 0.0]
    solution = solve_ivp(velocity, (0.0, t), start, method="DOP853", rtol=1e-12, atol=1e-13)
    log_lam, action, log_jacobian = solution.y[:, -1]
    return math.exp(log_lam), action, initial_density(lambda_0) * math.exp(-log_jacobian - action)


@pytest.mark.parametrize("c", SPEEDS)
@pytest.mark.parametrize("b", SLOPES)
def test_against_an_ode_solver(b, c):
    t = 0.6
    for lambda_0 in (0.4, 1.1):
        lam, action, density = integrate(lambda_0, t, b, c)
        assert characteristic(lambda_0, c * t, b) == pytest.approx(lam, rel=ODE)
        assert characteristic_origin(lam, c * t, b) == pytest.approx(lambda_0, rel=ODE)
        assert dissipation_action(lam, t, b=b, c=c) == pytest.approx(action, rel=ODE)
        assert exact_density(lam, t, initial_density, b=b, c=c) == pytest.approx(density, rel=ODE)


@pytest.mark.parametrize("b", [0.5, 1.0, 1.6, 2.0, 3.0])
def test_the_papers_formula_where_nothing_cancels(b):
    lam, t, c = 0.5, 0.8, 0.9
    origin = (
        math.exp(c * t) * lam if b == 1.0 else (lam ** (1 - b) - (b - 1) * c * t) ** (1 / (1 - b))
    )
    if b == 2.0:
        action = -2.0 / c * math.log(1.0 - lam * c * t)
    else:
        action = 2.0 / c * (origin ** (2 - b) - lam ** (2 - b)) / (2 - b)
    assert characteristic_origin(lam, c * t, b) == pytest.approx(origin, rel=1e-13)
    assert dissipation_action(lam, t, b=b, c=c) == pytest.approx(action, rel=1e-13)


@pytest.mark.parametrize("special", [1.0, 2.0])
def test_continuous_through_the_special_exponents(special):
    steps = np.array([0.0, 1e-15, -1e-15, 1e-12, -1e-12, 1e-8, -1e-8])
    values = [exact_density(0.7, 1.0, initial_density, b=special + h, c=0.8) for h in steps]
    assert np.abs(np.diff(values)).max() < 2e-8  # the derivative by b is of order one


def test_a_frozen_kernel_decays_every_rate_alone():
    lam, t = np.array([0.1, 1.0, 7.0]), np.array([[0.0], [2.0]])
    expected = initial_density(lam) * np.exp(-2.0 * lam * t)
    for b in SLOPES:
        actual = exact_density(lam, t, initial_density, b=b, c=0.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-13)


@pytest.mark.parametrize(("b", "s"), [(1.5, 0.7), (2.0, 0.5), (4.0, 2.0), (0.5, -0.7)])
def test_nothing_lies_beyond_the_wall(b, s):
    edge = wall(s, b)
    assert (b - 1.0) * edge ** (b - 1.0) * s == pytest.approx(1.0, rel=1e-13)
    outside, inside = (1.001, 0.9) if b > 1 else (0.999, 1.1)
    t = 0.5
    flat = exact_density(edge * np.array([outside, inside]), t, np.ones_like, b=b, c=s / t)
    assert flat[0] == 0.0
    assert flat[1] > 0.0
    assert characteristic_origin(edge * outside, s, b) == (math.inf if b > 1 else 0.0)


def test_where_there_is_no_wall():
    assert wall(1.0, 1.0) == math.inf
    assert wall(0.0, 2.0) == math.inf
    assert wall(1.0, 0.5) == 0.0


def test_rates_that_arrive_in_finite_drift():
    assert characteristic(1.0, 3.0, 0.5) == 0.0
    assert characteristic(1.0, -3.0, 1.5) == math.inf


def test_a_steep_initial_density_does_not_overflow():
    steep = exact_density(1.9999999, 0.5, lambda lam: np.exp(-np.minimum(lam, 700.0)), b=2.0, c=1.0)
    assert np.isfinite(steep)
    assert exact_density(1.0, 0.1, np.zeros_like, b=2.0, c=1.0) == 0.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: characteristic(0.0, 1.0, 2.0), "lambda must be positive"),
        (lambda: characteristic(1.0, math.nan, 2.0), "s must be finite"),
        (lambda: characteristic(1.0, 1.0, math.inf), "b must"),
        (lambda: dissipation_action(1.0, -1.0, b=2.0, c=1.0), "t must be >= 0"),
        (lambda: dissipation_action(1.0, 1.0, b=2.0, c=math.nan), "c must"),
        (lambda: exact_density(1.0, 0.1, lambda lam: -lam, b=2.0, c=1.0), "initial_density"),
        (lambda: exact_density([1.0], 0.1, lambda lam: 1.0, b=2.0, c=1.0), "initial_density"),
    ],
)
def test_wrong_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
