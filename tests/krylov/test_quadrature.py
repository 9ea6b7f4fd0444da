"""Gauss and Gauss-Radau rules against moments, dense matrices and 60-digit arithmetic."""

import mpmath
import numpy as np
import pytest

from spectralshell.krylov import gauss, lanczos, radau_matrix, residual_norms
from spectralshell.krylov.secular import RadauFamily
from tests.device import make_tensor
from tests.krylov.zoo import random_case

# Rules of up to ten points reproduce moments of a measure on [0, 1] to some hundred eps.
MOMENTS = 1e-12
# Components of the eigenvectors of a tridiagonal matrix of norm 1 in float64.
COMPONENTS = 1e-14


def run_of(seed, n=30, depth=8):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(0.01, 1, n))
    amplitudes = rng.standard_normal(n)
    diagonal = make_tensor(values)
    run = lanczos(lambda v: diagonal * v, make_tensor(amplitudes), depth)
    shares = amplitudes**2 / (amplitudes @ amplitudes)
    return values, shares, run


def moments(nodes, weights, degree):
    return np.array([weights @ nodes**k for k in range(degree + 1)])


def test_gauss_rule_has_2m_moments():
    values, shares, run = run_of(0)
    nodes, weights, _ = gauss(run.alpha, run.beta)
    np.testing.assert_allclose(
        moments(nodes, weights, 15), moments(values, shares, 15), rtol=MOMENTS
    )
    assert abs(moments(nodes, weights, 16)[-1] / moments(values, shares, 16)[-1] - 1) > MOMENTS


@pytest.mark.parametrize("node", [0.0, 0.3, 0.77, 1.2])
def test_radau_rule_holds_the_node_and_the_moments(node):
    values, shares, run = run_of(1)
    alpha, beta = radau_matrix(run.alpha, run.beta, run.beta_last, node)
    nodes, weights, _ = gauss(alpha, beta)
    assert np.abs(nodes - node).min() <= COMPONENTS
    degree = 2 * len(alpha) - 2
    np.testing.assert_allclose(
        moments(nodes, weights, degree), moments(values, shares, degree), rtol=MOMENTS
    )


def test_radau_rule_near_ritz_values_keeps_a_tame_entry():
    _, _, run = run_of(2)
    for ritz in gauss(run.alpha, run.beta)[0]:
        for node in (ritz, ritz * (1 + 1e-12)):
            alpha, beta = radau_matrix(run.alpha, run.beta, run.beta_last, node)
            assert np.abs(alpha).max() < 10
            assert np.abs(gauss(alpha, beta)[0] - node).min() <= COMPONENTS


def test_residual_norms_are_those_of_the_ritz_pairs():
    case = random_case(5)
    run = lanczos(case.product(), make_tensor(case.start), 6)
    nodes, _, last = gauss(run.alpha, run.beta)
    jacobi = np.diag(run.alpha) + np.diag(run.beta, 1) + np.diag(run.beta, -1)
    vectors = run.basis.cpu().numpy() @ np.linalg.eigh(jacobi)[1]
    dense = np.linalg.norm(case.matrix @ vectors - vectors * nodes, axis=0)
    np.testing.assert_allclose(
        residual_norms(last, run.beta_last), dense, atol=1e-13 * case.lambda_max
    )


def test_gauss_of_graded_weights_keeps_absolute_accuracy():
    # Weights from 1 down to 1e-24: components of 1e-12 keep an absolute error of a few eps.
    values = np.linspace(0.1, 1, 10)
    amplitudes = np.logspace(-12, 0, 10)
    diagonal = make_tensor(values)
    run = lanczos(lambda v: diagonal * v, make_tensor(amplitudes), 10)
    nodes, weights, _ = gauss(run.alpha, run.beta)
    expected = np.interp(nodes, values, amplitudes / np.linalg.norm(amplitudes))
    last = len(nodes) - 4
    np.testing.assert_allclose(nodes[last:], values[-4:], atol=1e-14)
    np.testing.assert_allclose(np.sqrt(weights)[last:], expected[last:], atol=COMPONENTS)


def test_empty_and_wrong_shapes():
    assert [len(part) for part in gauss([], [])] == [0, 0, 0]
    with pytest.raises(ValueError, match="alpha must have shape"):
        gauss([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="alpha and beta must be finite"):
        gauss([1.0, np.nan], [1.0])
    with pytest.raises(ValueError, match="beta_last and node must be finite"):
        radau_matrix([1.0], [], 1.0, np.inf)


def wide_arrowhead(family, node):
    """Masses below, at and above the node in 60 digits, of the same arrowhead."""
    poles, border = (
        [mpmath.mpf(float(v)) for v in part] for part in (family.poles, family.couplings)
    )
    m, x = len(poles), mpmath.mpf(float(node)) / mpmath.mpf(family.scale)
    matrix = mpmath.diag(
        [*poles, x - sum(z * z / (x - p) for z, p in zip(border, poles, strict=True))]
    )
    for i, coupling in enumerate(border):
        matrix[i, m] = matrix[m, i] = coupling
    values, vectors = mpmath.eigsy(matrix)
    first = [mpmath.mpf(float(v)) for v in family.first]
    norm = sum(f * f for f in first)
    shares = [sum(f * vectors[i, j] for i, f in enumerate(first)) ** 2 / norm for j in range(m + 1)]
    own = min(range(m + 1), key=lambda j: abs(values[j] - x))
    below = sum(shares[j] for j in range(m + 1) if j != own and values[j] < x)
    above = sum(shares[j] for j in range(m + 1) if j != own and values[j] > x)
    return float(below), float(shares[own]), float(above)


@pytest.mark.parametrize("seed", range(12))
def test_secular_rules_agree_with_60_digits(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 9))
    nodes = np.sort(10.0 ** rng.uniform(-8, 0, m))
    weights = 10.0 ** rng.uniform(-14, 0, m)
    couplings = rng.choice([-1.0, 1.0], m) * 10.0 ** rng.uniform(-12, 0, m)
    family = RadauFamily.build(nodes, weights / weights.sum(), couplings)
    points = np.concatenate([10.0 ** rng.uniform(-9, 0.5, 4), nodes[:2] * 1.01, -nodes[:1]])
    masses = family.masses(points)
    with mpmath.workdps(60):
        for i, point in enumerate(points):
            # The rule through x and one through x ± eps ‖T‖ are the same rule to rounding.
            shift = 4 * np.finfo(float).eps * family.scale
            exact = np.array([wide_arrowhead(family, point + s) for s in (-shift, 0.0, shift)])
            spread = np.ptp(np.sqrt(exact), axis=0)
            got = np.sqrt([part[i] for part in masses[:3]])
            allowed = COMPONENTS + masses[3][i] + spread
            assert (np.abs(got - np.sqrt(exact[1])) <= allowed).all()
