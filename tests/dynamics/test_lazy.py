"""A frozen kernel: discrete sums, densities, shell energies by quadrature, the tie at s = 2."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from spectralshell.dynamics import (
    lazy_density,
    lazy_loss,
    lazy_shell_energies,
    template_density,
    template_shell_average,
)

QUADRATURE = 1e-10


@pytest.mark.parametrize("s", [-0.5, 0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("tau", [0.0, 0.7, 40.0])
def test_shell_energies_against_quadrature(s, tau):
    edges = np.array([0.05, 0.2, 1.0, 3.0])
    energies = lazy_shell_energies(edges, tau, 2.0, s)
    for energy, lo, hi in zip(energies, edges[:-1], edges[1:], strict=True):
        scale = float(lazy_density(lo, tau, 2.0, s))
        value, _ = quad(
            lambda lam, scale=scale: lazy_density(lam, tau, 2.0, s) / scale,
            *(lo, hi),
            epsabs=0.0,
            epsrel=1e-12,
            limit=200,
        )
        assert energy == pytest.approx(value * scale, rel=QUADRATURE)


def test_discrete_loss_at_many_times():
    times = np.array([[0.0, 1.0]])
    loss = lazy_loss([0.0, 0.5], [1.0, 2.0], times)
    np.testing.assert_allclose(loss, 1.0 + 2.0 * np.exp(-times), rtol=1e-15)
    assert lazy_loss([], [], 1.0) == 0.0


def test_many_modes_reach_the_continuum():
    rng = np.random.default_rng(0)
    lam = rng.uniform(1.0, 2.0, 200_000)
    loss = lazy_loss(lam, lam**-1.5 / lam.size, 0.4)
    expected = lazy_shell_energies([1.0, 2.0], 0.4, 1.0, 1.5)[0]
    assert loss == pytest.approx(expected, rel=5e-3)  # sampling error of 200,000 modes


def test_a_frozen_kernel_on_slope_two_is_the_template():
    edges, tau = np.geomspace(0.1, 10.0, 7), 0.8
    lam = np.geomspace(0.1, 10.0, 5)
    np.testing.assert_allclose(
        lazy_density(lam, tau, 3.0, 2.0), template_density(lam, 3.0, 2.0, 2 * tau), rtol=1e-14
    )
    np.testing.assert_allclose(
        lazy_shell_energies(edges, tau, 3.0, 2.0) / np.diff(edges),
        3.0 * template_shell_average(edges, 2.0, 2 * tau),
        rtol=1e-13,
    )


def test_parameters_broadcast():
    energies = lazy_shell_energies([1.0, 2.0, 4.0], [[0.0], [1.0]], [1.0, 2.0, 3.0], 1.0)
    assert energies.shape == (2, 3, 2)
    np.testing.assert_allclose(energies[0, 2], 3.0 * math.log(2.0), rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lazy_loss([1.0], [1.0, 2.0], 0.0), "energies must"),
        (lambda: lazy_loss([[1.0]], [1.0], 0.0), "eigenvalues must"),
        (lambda: lazy_loss([math.nan], [1.0], 0.0), "eigenvalues must"),
        (lambda: lazy_density(-1.0, 0.0, 1.0, 1.0), "lam must"),
        (lambda: lazy_density(1.0, -1.0, 1.0, 1.0), "tau must"),
        (lambda: lazy_shell_energies([1.0, 2.0], 0.0, -1.0, 1.0), "amplitude must"),
        (lambda: lazy_shell_energies([2.0, 1.0], 0.0, 1.0, 1.0), "edges must"),
    ],
)
def test_wrong_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
