"""Soft shells: a partition of unity, its slopes and its divided differences."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.shells import ShellPartition, SoftShells, SpectralMeasure

# Sums of up to a dozen numbers in [0, 1].
UNITY = 1e-15
# Twelve Gauss-Legendre nodes, and erfc to a few eps.
QUOTIENT_RTOL = 1e-12

PARTITION = ShellPartition(q=2.0, lambda_0=1.0, first=-4, n_shells=8)
RATES = st.one_of(st.floats(-1.0, 0.0), st.floats(-30.0, 6.0).map(np.exp))


@settings(max_examples=50, deadline=None)
@given(st.lists(RATES, min_size=1, max_size=20), st.floats(0.01, 3.0), st.floats(1.05, 10.0))
def test_weights_add_up_to_one(rates, softness, q):
    shells = SoftShells(ShellPartition(q=q, lambda_0=1.0, first=-3, n_shells=5), softness)
    weights = shells.weights(rates)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=0, atol=UNITY)
    # The two sides are rounded apart.
    both = shells.below(rates) + shells.above(rates)
    np.testing.assert_allclose(both, 1.0, rtol=0, atol=UNITY)


@pytest.mark.parametrize("place", [-2.5, -0.3, 0.3, 2.5])
def test_small_weights_keep_their_digits(place):
    shells = SoftShells(PARTITION)
    lo, hi = shells.edges[3:5]
    rate = float(np.exp(place) * np.sqrt(lo * hi))
    with mpmath.workdps(80):
        scale = mpmath.sqrt(2) * mpmath.mpf(shells.sigma)
        cumulative = [
            mpmath.erfc((mpmath.log(rate) - mpmath.log(edge)) / scale) / 2 for edge in (lo, hi)
        ]
        expected = float(cumulative[1] - cumulative[0])
    assert shells.weights([rate])[4, 0] == pytest.approx(expected, rel=1e-11, abs=0)


def test_sharp_shells_count_as_hard_ones():
    rates = np.exp(np.random.default_rng(0).uniform(-4, 3, 50))
    energies = np.random.default_rng(1).random(50)
    sharp = SoftShells(PARTITION, softness=1e-9).weights(rates) @ energies
    measure = SpectralMeasure(rates, energies, energies.sum(), rates.max(), 0.0, 0.0)
    np.testing.assert_allclose(sharp, measure.energies(PARTITION.edges), rtol=1e-12)


@pytest.mark.parametrize("softness", [0.05, 0.25, 1.0])
def test_slopes_are_those_of_the_weights(softness):
    shells = SoftShells(PARTITION, softness)
    rates = np.exp(np.linspace(-3, 2, 41))
    h = 1e-5 * rates
    difference = (shells.below(rates + h) - shells.below(rates - h)) / (2 * h)
    # The third derivative goes with 1/σ³.
    atol = 1e-10 * 3 / shells.sigma**3
    np.testing.assert_allclose(shells.slope_below(rates), difference, rtol=0, atol=atol / rates[0])
    assert (shells.slope_below([0.0, -1.0]) == 0).all()


def exact_quotient(edge, sigma, u, v):
    """The divided difference in 80-digit arithmetic."""
    with mpmath.workdps(80):
        u, v, scale = mpmath.mpf(u), mpmath.mpf(v), mpmath.sqrt(2) * mpmath.mpf(sigma)

        def below(x):
            return mpmath.erfc((mpmath.log(x) - mpmath.log(mpmath.mpf(edge))) / scale) / 2

        if u == v:
            z = (mpmath.log(u) - mpmath.log(mpmath.mpf(edge))) / scale
            return float(-mpmath.exp(-(z**2)) / (u * sigma * mpmath.sqrt(2 * mpmath.pi)))
        return float((below(u) - below(v)) / (u - v))


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-3, 0.1, 0.19, 0.3, 3.0])
@pytest.mark.parametrize("place", [-2.0, -0.5, 0.0, 0.4, 2.0])
def test_divided_differences_against_long_arithmetic(gap, place):
    shells = SoftShells(PARTITION)
    edge, sigma = 3, shells.sigma
    u = float(shells.edges[edge] * np.exp(place))
    v = u * (1 + gap)
    expected = exact_quotient(shells.edges[edge], sigma, u, v)
    for pair in ([u], [v]), ([v], [u]):
        assert shells.difference_below(edge, *pair)[0] == pytest.approx(
            # Far in the tails, one eps of ln λ is |z| of them.
            expected,
            rel=QUOTIENT_RTOL * (1 + (place / sigma) ** 2),
            abs=0,
        )


@settings(max_examples=50, deadline=None)
@given(RATES, RATES, st.integers(0, 7))
def test_divided_differences_are_symmetric_and_never_positive(u, v, edge):
    shells = SoftShells(PARTITION)
    forth, back = shells.difference_below(edge, [u, v], [v, u])
    assert forth == back
    assert forth <= 0.0


def test_null_rates_do_not_differ():
    shells = SoftShells(PARTITION)
    assert shells.difference_below(0, [-1.0, -1e-20, 0.0], [-0.5, 0.0, 0.0]).tolist() == [0, 0, 0]
    step = shells.difference_below(0, [-1.0], [1.0])
    assert step[0] == pytest.approx(-0.5, rel=1e-9)


def test_density_is_how_the_energy_below_an_edge_grows():
    rng = np.random.default_rng(2)
    rates, energies = np.exp(rng.uniform(-3, 2, 30)), rng.random(30)
    shells = SoftShells(PARTITION)
    h = 1e-6
    # Weights depend on ln(λ/edge), so rates that move down are edges that move up.
    up, down = (shells.below(rates / (1.0 + shift)) @ energies for shift in (h, -h))
    expected = (up - down) / (2 * h * shells.edges)
    np.testing.assert_allclose(shells.density_at_edges(rates, energies), expected, rtol=1e-7)


@pytest.mark.parametrize("softness", [0.0, -1.0, np.nan, True, "soft"])
def test_softness_is_checked(softness):
    with pytest.raises((ValueError, TypeError), match="softness"):
        SoftShells(PARTITION, softness)


@pytest.mark.parametrize("rates", [[np.nan], [np.inf], [[1.0]]])
def test_rates_are_checked(rates):
    with pytest.raises(ValueError, match="finite rates in one dimension"):
        SoftShells(PARTITION).weights(rates)
