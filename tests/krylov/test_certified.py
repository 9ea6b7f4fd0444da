"""The certified bounds contain the dense truth: always, at every edge, in both precisions."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import CumulativeBounds, eigenmeasure, lanczos
from tests.device import make_tensor
from tests.krylov.zoo import edges_of, random_case

N_CASES = 500
# Design value of η / λ_max for products in each precision.
NOISE = {torch.float64: 4e-15, torch.float32: 6e-7}
# The truth is a float64 sum of at most 40 energies, the mass another one.
SUMMATION = 1e-14
# Acceptance: what widening for rounding may add, as a share of the total energy.
MEDIAN_ADDED_WIDTH = 1e-4


def bounds_of(case, dtype):
    run = lanczos(case.product(dtype), make_tensor(case.start), case.depth)
    mass = 0.5 * run.norm**2
    noise = NOISE[dtype] * case.lambda_max
    return CumulativeBounds.from_lanczos(
        run.alpha, run.beta, run.beta_last, mass, noise, run.exhausted
    )


def assert_contains(bounds, case, edges):
    lower, upper = bounds.at(edges)
    truth = case.truth(edges)
    assert (lower <= truth * (1 + SUMMATION)).all()
    # Near the top the truth is the mass less very little: judge that in units of the mass.
    assert (upper * (1 + SUMMATION) >= truth).all()
    assert (lower >= 0).all()
    assert (upper <= bounds.mass).all()
    order = np.argsort(edges)
    assert (np.diff(lower[order]) >= 0).all()
    assert (np.diff(upper[order]) >= 0).all()
    return lower, upper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_lanczos_bounds_contain_the_truth_in_all_cases(dtype):
    added = []
    for seed in range(N_CASES):
        case = random_case(seed)
        bounds = bounds_of(case, dtype)
        edges = edges_of(case, bounds.nodes, np.random.default_rng(seed + 1))
        lower, upper = assert_contains(bounds, case, edges)
        inside = (edges >= 1e-9 * case.lambda_max) & (edges <= 0.1 * case.lambda_max)
        undecided = bounds.quadrature_at(edges)[1]
        added.extend(((upper - lower) / bounds.mass - undecided)[inside])
    assert len(added) > 10 * N_CASES
    if dtype == torch.float64:
        assert np.median(added) <= MEDIAN_ADDED_WIDTH


@pytest.mark.parametrize("seed", range(60))
def test_dense_bounds_contain_the_truth(seed):
    case = random_case(seed)
    noise = NOISE[torch.float64]
    spectrum = eigenmeasure(make_tensor(case.matrix), make_tensor(case.start), noise)
    edges = edges_of(case, spectrum.eigenvalues, np.random.default_rng(seed))
    assert_contains(spectrum.bounds(), case, edges)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_recurrence_is_exact_for_an_operator_within_the_noise(dtype):
    # The premise of the widening: ‖M Q - Q T - β q eᵀ‖ <= η in wide arithmetic.
    for seed in range(60):
        case = random_case(seed)
        run = lanczos(case.product(dtype), make_tensor(case.start), case.depth)
        basis = run.basis.cpu().numpy().astype(np.longdouble)
        tridiagonal = np.diag(run.alpha) + np.diag(run.beta, 1) + np.diag(run.beta, -1)
        defect = case.matrix.astype(np.longdouble) @ basis - basis @ tridiagonal
        # The direction after the last is orthogonal to the basis, apart from it all is rounding.
        last = defect[:, -1] - basis @ (basis.T @ defect[:, -1])
        defect[:, -1] -= last
        assert abs(np.linalg.norm(last.astype(float)) - run.beta_last) <= (
            NOISE[dtype] * case.lambda_max
        )
        assert np.linalg.norm(defect.astype(float), 2) <= NOISE[dtype] * case.lambda_max
