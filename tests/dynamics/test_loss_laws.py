"""Loss exponents against simulated slopes, and the model v = c0 λ/t against an ODE solver."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from spectralshell.dynamics import (
    log_drift_characteristic,
    log_drift_density,
    log_drift_frontier,
    log_drift_loss_exponent,
    loss_exponent,
)

SLOPE = 0.02  # the contract
ODE = 1e-9


def simulated_slope(relative_velocity, a, start, times):
    """Integrate modes λ(t) with ε0 ∝ λ^(a−1) on (0, 1] and fit ln L against ln t at the end."""
    x, w = np.polynomial.legendre.leggauss(300)
    log_lam = 15.0 * (x - 1.0)  # down to e^−30, below every rate that matters
    weights = 15.0 * w * np.exp(a * log_lam)

    def right_side(log_t, state):
        t = math.exp(log_t)
        lam = np.exp(state[: x.size])
        return t * np.concatenate([relative_velocity(lam, t) + 0.0 * lam, 2.0 * lam])

    solution = solve_ivp(
        right_side,
        (math.log(start), math.log(times[-1])),
        np.concatenate([log_lam, np.zeros(x.size)]),
        t_eval=np.log(times),
        method="LSODA",
        rtol=1e-8,
        atol=1e-10,
    )
    losses = weights @ np.exp(-solution.y[x.size :])
    return np.polyfit(np.log(times), np.log(losses), 1)[0]


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (0.8, 1.0, 1.0),
        (0.8, 1.5, 1.0),
        (0.7, 2.0, 1.0),
        (1.5, 2.0, 2.5),
        (0.6, 2.0, 0.5),
        (0.7, 3.0, 1.0),
        (1.2, 4.0, 0.5),
    ],
)
def test_exponent_against_simulated_slopes(a, b, c):
    times = np.geomspace(1e7, 1e8, 5)
    slope = simulated_slope(lambda lam, t: -c * lam ** (b - 1.0), a, 1e-6, times)
    assert -slope == pytest.approx(loss_exponent(a, b, c), abs=SLOPE)


@pytest.mark.parametrize(("a", "c0"), [(0.8, -0.5), (0.7, 0.0), (0.6, 0.5), (1.0, 1.0)])
def test_log_drift_exponent_against_simulated_slopes(a, c0):
    times = np.geomspace(1e4, 1e5, 5)
    slope = simulated_slope(lambda lam, t: c0 / t, a, 1.0, times)
    assert -slope == pytest.approx(log_drift_loss_exponent(a, c0), abs=SLOPE)


def test_frozen_kernel_has_the_exponent_of_the_data():
    assert [loss_exponent(1.3, b, 0.0) for b in (0.5, 2.0, 3.0)] == [1.3] * 3


@pytest.mark.parametrize("c0", [-0.6, 0.0, 0.8])
def test_log_drift_density_against_an_ode_solver(c0):
    lambda_0, t0, t = 0.7, 0.5, 2.5

    def velocity(time, state):
        lam = math.exp(state[0])
        return [c0 / time, -c0 / time - 2.0 * lam]

    start = [math.log(lambda_0), math.log(lambda_0**0.4)]
    solution = solve_ivp(velocity, (t0, t), start, method="DOP853", rtol=1e-12, atol=1e-13)
    lam, density = np.exp(solution.y[:, -1])
    assert log_drift_characteristic(lambda_0, t, c0=c0, t0=t0) == pytest.approx(lam, rel=ODE)
    actual = log_drift_density(lam, t, lambda x: x**0.4, c0=c0, t0=t0)
    assert actual == pytest.approx(density, rel=ODE)


@pytest.mark.parametrize("c0", [-0.5, 0.0, 2.0])
def test_log_drift_frontier_is_where_the_density_falls_by_e(c0):
    t, t0 = 3.0, 1e-12 ** (1.0 / (1.0 + c0))
    lam = log_drift_frontier(t, c0=c0)
    density = log_drift_density([lam, lam * 1e-9], t, np.ones_like, c0=c0, t0=t0)
    assert density[0] / density[1] == pytest.approx(math.exp(-1.0), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: loss_exponent(0.0, 2.0, 1.0), "a must"),
        (lambda: loss_exponent(1.0, 2.0, -1.0), "c must"),
        (lambda: log_drift_loss_exponent(1.0, -1.0), "c0 must"),
        (lambda: log_drift_frontier(0.0, c0=1.0), "t must"),
        (lambda: log_drift_density(1.0, 0.5, np.ones_like, c0=1.0, t0=1.0), "t must be >= t0"),
        (lambda: log_drift_characteristic(-1.0, 0.5, c0=1.0, t0=1.0), "lam must"),
    ],
)
def test_wrong_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
