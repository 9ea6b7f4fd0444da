"""CumulativeBounds: agreement with Radau rules, invariants, degenerate measures, errors."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.krylov import CumulativeBounds, gauss, lanczos, radau_matrix
from tests.device import make_tensor
from tests.krylov.zoo import random_case

# The rules are those of matrices within a few eps, and the points keep away from Ritz values.
AGREEMENT = 1e-10


def lanczos_bounds(values, amplitudes, depth, noise=0.0):
    diagonal = make_tensor(values)
    run = lanczos(lambda v: diagonal * v, make_tensor(amplitudes), depth)
    bounds = CumulativeBounds.from_lanczos(
        run.alpha, run.beta, run.beta_last, 0.5 * run.norm**2, noise, run.exhausted
    )
    return run, bounds


@pytest.mark.parametrize("depth", [1, 2, 5, 20])
def test_unwidened_bounds_are_those_of_the_radau_rules(depth):
    rng = np.random.default_rng(depth)
    run, bounds = lanczos_bounds(rng.uniform(0, 1, 40), rng.standard_normal(40), depth)
    for point in rng.uniform(-0.1, 1.1, 20):
        below, at, above, _ = (part[0] for part in bounds.quadrature_at([point]))
        # The rule with m + 1 points, whatever its modified entry.
        alpha, beta = radau_matrix(run.alpha, run.beta, run.beta_last, point)
        if len(alpha) == depth:
            continue
        nodes, weights, _ = gauss(alpha, beta)
        own = np.abs(nodes - point).argmin()
        expected = weights[:own].sum(), weights[own], weights[own + 1 :].sum()
        np.testing.assert_allclose((below, at, above), expected, atol=AGREEMENT)


def test_bounds_tighten_with_depth():
    rng = np.random.default_rng(3)
    values, amplitudes = rng.uniform(0, 1, 60), rng.standard_normal(60)
    edges = np.linspace(0.05, 0.95, 50)
    widths = []
    for depth in (5, 15, 30, 60):
        lower, upper = lanczos_bounds(values, amplitudes, depth)[1].at(edges)
        widths.append((upper - lower).mean())
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1e-8 * widths[0]


def test_edge_on_an_atom_brackets_both_sides_of_it():
    bounds = CumulativeBounds.from_spectrum([1.0, 2.0, 3.0], [0.2, 0.3, 0.5], 0.0)
    lower, upper = bounds.at([2.0, np.nextafter(2.0, 3.0)])
    np.testing.assert_allclose(lower, 0.2, rtol=1e-9)
    np.testing.assert_allclose(upper, 0.5, rtol=1e-9)


def test_tiny_energies_keep_relative_accuracy_in_an_exact_spectrum():
    # Seventeen decades in energy; no cancellation against the total may swallow the small ones.
    bounds = CumulativeBounds.from_spectrum([1e-3, 1.0], [1e-17, 1.0], 0.0)
    lower, upper = bounds.at([0.1])
    assert 0.99e-17 < lower[0] <= 1e-17 <= upper[0] < 1.01e-17


def test_noise_widens_and_never_narrows():
    # On an exact spectrum, where every shift is tried; a Lanczos measure tries an estimated one.
    rng = np.random.default_rng(0)
    values, energies = rng.uniform(0, 1, 40), rng.uniform(0, 1, 40)
    edges = np.geomspace(1e-3, 1, 30)
    narrow = CumulativeBounds.from_spectrum(values, energies, 0.0).at(edges)
    wide = CumulativeBounds.from_spectrum(values, energies, 1e-6).at(edges)
    assert (wide[0] <= narrow[0]).all()
    assert (wide[1] >= narrow[1]).all()
    assert (wide[1] - wide[0]).sum() > (narrow[1] - narrow[0]).sum()


def test_cluster_of_ritz_values_at_rounding_keeps_its_weight():
    # Poles a few ulp apart: a midpoint between them rounds, distances do not.
    nodes = 0.5 + np.spacing(0.5) * np.array([0.0, 5.0, 11.0])
    nodes = np.concatenate([[1e-3], nodes, [1.0]])
    weights = np.array([0.9, 1e-8, 1e-6, 0.0999, 1e-4 - 1.01e-6])
    couplings = np.array([1e-16, 1e-9, -1e-10, 1e-12, 0.1])
    bounds = CumulativeBounds(nodes, weights, couplings, 1.0, 0.0)
    below, at, above, _ = bounds.quadrature_at([0.1, 0.2, 0.3])
    # The cluster lies above, whole: what is not in the lowest node or at the point is there.
    np.testing.assert_allclose(below, 0.9, rtol=1e-13)
    np.testing.assert_allclose(at + above, 0.1, rtol=1e-12)
    np.testing.assert_allclose(_sum_above(nodes, weights, couplings, 0.2), above[1], rtol=1e-9)


def _sum_above(nodes, weights, couplings, point):
    """Weight above the point from a dense arrowhead."""
    matrix = np.diag(np.append(nodes, point - (couplings**2 / (point - nodes)).sum()))
    matrix[-1, :-1] = matrix[:-1, -1] = couplings
    values, vectors = np.linalg.eigh(matrix)
    shares = (np.sqrt(weights) @ vectors[:-1]) ** 2
    return shares[values > point + 1e-9].sum()


def test_exhausted_run_adds_its_neglected_coupling_to_the_noise():
    bounds = CumulativeBounds.from_lanczos([1.0], [], 1e-6, 1.0, 1e-9, True)
    assert bounds.noise == pytest.approx(1e-6 + 1e-9)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (CumulativeBounds.from_lanczos([], [], 0.0, 0.0, 0.0, True), (0.0, 0.0)),
        (CumulativeBounds.from_lanczos([], [], 0.0, 2.0, 0.0, False), (0.0, 2.0)),
        (CumulativeBounds.from_spectrum([], [], 0.0), (0.0, 0.0)),
        (CumulativeBounds.from_spectrum([1.0], [0.0], 0.0), (0.0, 0.0)),
        (CumulativeBounds.from_spectrum([0.0, 0.0], [1.0, 1.0], 0.0), (2.0, 2.0)),
        (CumulativeBounds.from_lanczos([0.0], [], 0.0, 2.0, 0.0, True), (2.0, 2.0)),
    ],
    ids=["empty", "depth 0", "empty spectrum", "no energy", "zero operator", "zero by Lanczos"],
)
def test_degenerate_measures(bounds, expected):
    lower, upper = bounds.at([0.5])
    np.testing.assert_allclose((lower[0], upper[0]), expected, rtol=1e-12)


def test_shape_order_and_infinite_edges():
    bounds = CumulativeBounds.from_spectrum([1.0, 3.0], [1.0, 1.0], 0.0)
    edges = np.array([[np.inf, 2.0], [-np.inf, 0.5], [2.0, 4.0]])
    lower, upper = bounds.at(edges)
    expected = np.array([[2.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    np.testing.assert_allclose(lower, expected, atol=1e-12)
    np.testing.assert_allclose(upper, expected, atol=1e-12)
    assert bounds.at(2.0)[0].shape == ()
    assert bounds.at([])[0].shape == (0,)


def test_pickle_round_trip():
    case = random_case(0)
    bounds = CumulativeBounds.from_spectrum(case.eigenvalues, case.energies, 1e-12)
    again = pickle.loads(pickle.dumps(bounds))
    np.testing.assert_array_equal(again.at([0.1, 1.0]), bounds.at([0.1, 1.0]))


def test_long_rules_stay_within_their_work_arrays():
    # Several chunks of work, hundreds of edges, twice the same answer.
    rng = np.random.default_rng(0)
    _, bounds = lanczos_bounds(10.0 ** rng.uniform(-8, 0, 400), rng.standard_normal(400), 200)
    edges = np.geomspace(1e-9, 2, 300)
    together = np.array(bounds.at(edges))
    apart = np.concatenate([np.array(bounds.at(part)) for part in np.split(edges, 3)], axis=1)
    np.testing.assert_allclose(together, apart, atol=1e-12 * bounds.mass)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: CumulativeBounds.from_spectrum([1.0], [-1.0], 0.0), "weights non-negative"),
        (lambda: CumulativeBounds.from_spectrum([1.0], [1.0, 2.0], 0.0), "must both have shape"),
        (lambda: CumulativeBounds.from_spectrum([np.nan], [1.0], 0.0), "must be finite"),
        (lambda: CumulativeBounds.from_spectrum([1.0], [1.0], -1.0), "noise must be finite"),
        (lambda: CumulativeBounds.from_lanczos([1.0], [], 0.0, -1.0, 0.0, True), "mass must be"),
        (lambda: CumulativeBounds.from_lanczos([1.0], [1.0], 0.0, 1.0, 0.0, True), "alpha must"),
        (lambda: CumulativeBounds.from_spectrum([1.0], [1.0], 0.0).at([np.nan]), "edges must not"),
    ],
)
def test_wrong_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@settings(deadline=None, max_examples=30)
@given(
    # η must not underflow: the smallest scale leaves it a normal number.
    values=st.lists(st.just(0.0) | st.floats(1e-100, 1), min_size=1, max_size=12),
    depth=st.integers(1, 13),
    edges=st.lists(st.floats(-1, 2), min_size=1, max_size=8),
    power=st.floats(-2, 2),
)
def test_invariants_on_diagonal_operators(values, depth, edges, power):
    values = np.array(values)
    amplitudes = (values + 1e-3) ** power
    noise = 4e-15 * max(values.max(), 1e-300)
    _, bounds = lanczos_bounds(values, amplitudes, depth, noise)
    edges = np.concatenate([edges, values, bounds.nodes])
    lower, upper = bounds.at(edges)
    energies = 0.5 * amplitudes**2
    truth = np.array([energies[values < edge].sum() for edge in edges])
    assert (lower <= truth * (1 + 1e-14)).all()
    assert (upper * (1 + 1e-14) >= truth).all()
    order = np.argsort(edges, kind="stable")
    assert (np.diff(lower[order]) >= 0).all()
    assert (np.diff(upper[order]) >= 0).all()
