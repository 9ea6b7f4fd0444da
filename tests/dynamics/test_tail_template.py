"""Template averages, their derivatives and the window's loss against extended-precision sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.dynamics import (
    frontier,
    log_shell_average,
    log_shell_average_gradient,
    log_template_shell_average,
    log_template_shell_average_slopes,
    template_density,
    template_loss,
    template_shell_average,
)

QUADRATURE = 1e-10  # the contract for the loss
PANELS = 1e-13  # of an integral with more panels than it needs, which all rows of a table have
_X, _W = (values.astype(np.longdouble) for values in np.polynomial.legendre.leggauss(24))


def reference(lo, hi, b, kappa, power):
    """ln of the shell average, by 700 graded panels in extended precision."""
    lo, hi, b, kappa, power = map(np.longdouble, (lo, hi, b, kappa, power))
    length = np.log(hi / lo)
    graded = np.concatenate([[0.0], np.geomspace(1e-8, 0.5, 200), np.linspace(0, 1, 301)])
    ends = length * np.unique(np.concatenate([graded, 1.0 - graded]).astype(np.longdouble))
    widths = np.diff(ends)[:, None]
    u = ends[:-1, None] + widths * (_X + 1) / 2
    with np.errstate(over="ignore"):
        log_f = (1 - b) * u - kappa * lo**power * np.expm1(power * u)
    peak = log_f.max()
    total = np.log((np.exp(log_f - peak) * _W * widths / 2).sum()) + peak
    return (1 - b) * np.log(lo) - kappa * lo**power + total - np.log(hi - lo)


@given(
    lo=st.floats(-4, 3).map(lambda x: 10.0**x),
    ratio=st.floats(-3, 1).map(lambda x: math.exp(10.0**x)),
    b=st.floats(-1, 5) | st.sampled_from([1.0, 2.0, 1.0 + 1e-9]),
    cutoff=st.just(0.0) | st.floats(-8, 4).map(lambda x: 10.0**x),
    power=st.none() | st.floats(-2, 3),
)
@settings(deadline=None, max_examples=150)
def test_log_average_is_accurate_everywhere(lo, ratio, b, cutoff, power):
    hi = lo * ratio
    power = b - 1.0 if power is None else power
    kappa = cutoff / lo**power
    expected = float(reference(lo, hi, b, kappa, power))
    actual = log_shell_average([lo, hi], b, kappa, power)[0]
    # rounding of ln λ and of κλ^p, which no method avoids
    conditioning = 2e-14 + 1e-15 * (abs(expected) + kappa * lo**power)
    conditioning += 4e-16 / math.log(ratio)
    assert abs(actual - expected) <= conditioning


def test_averages_broadcast_over_parameters():
    edges, b, kappa = (
        np.geomspace(0.1, 10.0, 6),
        np.array([[0.7], [2.0]]),
        np.array([0.0, 1.0, 9.0]),
    )
    table = template_shell_average(edges, b, kappa)
    assert table.shape == (2, 3, 5)
    np.testing.assert_allclose(table[1, 2], template_shell_average(edges, 2.0, 9.0), rtol=PANELS)
    np.testing.assert_allclose(table[1, 0], 1.0 / (edges[:-1] * edges[1:]), rtol=PANELS)


def test_large_cutoffs_underflow_but_keep_their_logarithm():
    edges = [1.0, 2.0]
    assert template_shell_average(edges, 2.0, 1e5)[0] == 0.0
    expected = -1e5 - math.log(1e5)  # Laplace: the average of e^(−κλ)/λ² over a unit width
    assert log_template_shell_average(edges, 2.0, 1e5)[0] == pytest.approx(expected, abs=1e-4)
    assert log_shell_average([10.0, 20.0], 1.0, 1.0, 400.0)[0] == -math.inf


def test_the_widest_window_does_not_overflow():
    average = log_shell_average([1e-300, 1e300], 1.0, [0.0, 1e-5], 1.0)[:, 0]
    late = -np.euler_gamma + math.log(1e5) + 300.0 * math.log(10.0)
    expected = np.log([600.0 * math.log(10.0), late]) - 300.0 * math.log(10.0)
    np.testing.assert_allclose(average, expected, rtol=1e-14)


def test_wide_windows_with_a_late_cutoff():
    """The integrand is flat in ln λ over thirty decades and then falls off a cliff."""
    lo, hi, kappa = 1e-30, 1e6, 1e-3
    average = log_shell_average([lo, hi], 1.0, kappa, 1.0)[0]
    exact = -np.euler_gamma - math.log(kappa * lo)  # E1 at κ lo, and nothing is left at κ hi
    assert average == pytest.approx(math.log(exact / hi), abs=1e-13)


@pytest.mark.parametrize(("b", "power"), [(-1.0, 1.0), (0.2, 0.4), (3.0, -1.0), (2.0, -0.25)])
def test_a_peak_inside_a_wide_window_is_a_gamma_function(b, power):
    kappa, order = 0.7, (1.0 - b) / power
    window = [1e-40, 1e30] if power > 0 else [1e-30, 1e40]
    average = log_shell_average(window, b, kappa, power)[0]
    exact = math.lgamma(order) - math.log(abs(power)) - order * math.log(kappa)
    assert average == pytest.approx(exact - math.log(window[1]), abs=2e-13)


@pytest.mark.parametrize("b", [0.6, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("kappa", [1e-6, 0.8, 60.0])
def test_derivatives_match_differences(b, kappa):
    edges = np.geomspace(0.2, 8.0, 5)
    value, d_b, d_kappa = log_template_shell_average_slopes(edges, b, kappa)
    assert value.tolist() == log_template_shell_average(edges, b, kappa).tolist()
    h, k = 1e-5, 1e-5 * kappa
    by_b = log_template_shell_average(edges, [b + h, b - h], kappa)
    by_kappa = log_template_shell_average(edges, b, [kappa + k, kappa - k])
    np.testing.assert_allclose(d_b, (by_b[0] - by_b[1]) / (2 * h), rtol=1e-7, atol=1e-7)
    rounding = 1e-15 * (1 + np.abs(value)) / k  # of the difference itself
    assert (np.abs(d_kappa - (by_kappa[0] - by_kappa[1]) / (2 * k)) <= 1e-7 + 20 * rounding).all()


def test_derivative_by_the_free_power():
    edges, h = np.geomspace(0.2, 8.0, 5), 1e-5
    gradient = log_shell_average_gradient(edges, 1.5, 0.7, 1.2)
    shifted = log_shell_average(edges, 1.5, 0.7, [1.2 + h, 1.2 - h])
    expected = (shifted[0] - shifted[1]) / (2 * h)
    np.testing.assert_allclose(gradient.d_power, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kappa", [0.0, 1e-9, 0.3, 5.0, 200.0])
@pytest.mark.parametrize("b", [-0.5, 0.5, 0.99, 1.0 - 5e-5, 1.0, 1.00011, 1.6, 2.0, 3.5])
@pytest.mark.parametrize("window", [(0.01, 20.0), (0.5, 3.0), (1.0, 1.001)])
def test_loss_against_quadrature(window, b, kappa):
    average = reference(*window, b, kappa, b - 1.0)
    expected = float(3.0 * np.exp(average) * (window[1] - window[0]))
    assert template_loss(window, 3.0, b, kappa) == pytest.approx(
        expected, rel=QUADRATURE, abs=1e-290
    )


def test_loss_is_the_sum_of_shell_energies():
    edges = np.geomspace(0.1, 10.0, 12)
    for b in (0.7, 1.0, 1.8):
        kappa = np.array([0.0, 0.4, 30.0])
        shells = template_shell_average(edges, b, kappa) * np.diff(edges)
        loss = template_loss((edges[0], edges[-1]), 2.0, b, kappa)
        np.testing.assert_allclose(loss, 2.0 * shells.sum(axis=-1), rtol=1e-12)


def test_frontier():
    assert frontier(4.0, 2.0) == pytest.approx(0.25, rel=1e-15)
    assert frontier(4.0, 3.0) == pytest.approx(0.5, rel=1e-15)
    assert frontier(4.0, 0.5) == pytest.approx(16.0, rel=1e-14)
    assert frontier(0.0, 1.5) == math.inf
    assert frontier(0.0, 0.5) == 0.0
    assert math.isnan(frontier(1.0, 1.0))
    cut = template_density(frontier(0.3, 1.6), 1.0, 1.6, [0.0, 0.3])
    assert cut[1] / cut[0] == pytest.approx(math.exp(-1.0), rel=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: template_density(0.0, 1.0, 2.0, 0.0), ValueError, "lam must"),
        (lambda: template_density(1.0, -1.0, 2.0, 0.0), ValueError, "amplitude must"),
        (lambda: template_density(1.0, 1.0, math.nan, 0.0), ValueError, "b must"),
        (lambda: frontier(-1.0, 2.0), ValueError, "kappa must"),
        (lambda: template_shell_average([1.0], 2.0, 0.0), ValueError, "edges must"),
        (lambda: template_shell_average([2.0, 1.0], 2.0, 0.0), ValueError, "edges must"),
        (lambda: template_shell_average([0.0, 1.0], 2.0, 0.0), ValueError, "edges must"),
        (lambda: template_shell_average([1.0, 2.0], 2.0, -1.0), ValueError, "kappa must"),
        (lambda: template_shell_average([1.0, 2.0], math.inf, 1.0), ValueError, "b must"),
        (lambda: template_loss((2.0, 1.0), 1.0, 2.0, 0.0), ValueError, "window"),
        (lambda: template_loss(None, 1.0, 2.0, 0.0), TypeError, "window"),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
