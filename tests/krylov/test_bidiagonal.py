"""Lanczos on J Jᵀ with its basis in the domain of J: the same measure, and bounds that hold."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import CumulativeBounds, bidiagonal_lanczos, gauss, lanczos
from tests.device import make_tensor
from tests.krylov.test_certified import NOISE, assert_contains
from tests.krylov.zoo import edges_of, random_case

N_CASES = 300

AGREEMENT = 1e-10
"""Of two float64 recurrences before orthogonality matters, relative to ‖M‖."""


def factor(n, rank, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, p, generator=generator, dtype=torch.float64)


def run_on(matrix, start, depth, dtype=torch.float64):
    narrow = matrix.to(dtype)
    return bidiagonal_lanczos(
        lambda u: narrow.T @ u.to(dtype), lambda v: narrow @ v.to(dtype), start, depth
    )


@pytest.mark.parametrize(("n", "p", "depth"), [(40, 12, 6), (40, 12, 1), (12, 40, 6), (5, 5, 3)])
def test_the_recurrence_is_that_of_lanczos(n, p, depth):
    j = factor(n, min(n, p), p)
    start = torch.ones(n, dtype=torch.float64)
    run = run_on(j, start, depth)
    expected = lanczos(lambda v: j @ (j.T @ v), start, depth)
    scale = float((j @ j.T).norm())
    assert np.abs(run.alpha - expected.alpha).max() <= AGREEMENT * scale
    assert np.abs(run.beta - expected.beta).max(initial=0.0) <= AGREEMENT * scale
    assert abs(run.beta_last - expected.beta_last) <= AGREEMENT * scale
    assert (run.status, run.exhausted) == (expected.status, expected.exhausted)
    assert run.norm == expected.norm
    assert run.basis.shape == (n, 0)


@pytest.mark.parametrize(("n", "p", "rank"), [(30, 8, 8), (30, 8, 3), (8, 30, 8), (6, 6, 6)])
def test_a_run_ends_where_the_space_does(n, p, rank):
    j = factor(n, rank, p)
    start = torch.ones(n, dtype=torch.float64)
    run = run_on(j, start, n + 5)
    assert run.exhausted
    assert len(run.alpha) <= min(n, rank + 1)
    nodes, weights, _ = gauss(run.alpha, run.beta)
    values, vectors = torch.linalg.eigh(j @ j.T)
    energies = (vectors.T @ start).square()
    # The measure's first moments, the null space counted.
    for power in (0, 1, 2):
        got = run.norm**2 * float((weights * nodes**power).sum())
        wanted = float((energies * values**power).sum())
        assert got == pytest.approx(wanted, rel=AGREEMENT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bounds_contain_the_truth_in_all_cases(dtype):
    for seed in range(N_CASES):
        case = random_case(seed)
        values, vectors = np.linalg.eigh(case.matrix)
        root = make_tensor(vectors * np.sqrt(np.maximum(values, 0.0)))
        run = run_on(root, make_tensor(case.start), case.depth, dtype)
        bounds = CumulativeBounds.from_lanczos(
            run.alpha,
            run.beta,
            run.beta_last,
            0.5 * run.norm**2,
            NOISE[dtype] * case.lambda_max,
            run.exhausted,
        )
        assert_contains(bounds, case, edges_of(case, bounds.nodes, np.random.default_rng(seed + 1)))


def test_a_zero_start_spends_no_product():
    def fail(vector):
        raise AssertionError

    run = bidiagonal_lanczos(fail, fail, torch.zeros(4), 3)
    assert run.status == "zero start vector"
    assert run.n_matvecs == 0


@pytest.mark.parametrize("wrong", ["pull", "push"])
def test_products_of_another_shape_are_named(wrong):
    j = factor(6, 3, 3)
    pull, push = (lambda u: j.T @ u), (lambda v: j @ v)
    if wrong == "push":
        push = pull
    else:
        pull = lambda u: torch.ones(3, dtype=torch.long)  # noqa: E731
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        bidiagonal_lanczos(pull, push, torch.ones(6), 2)


def test_products_that_are_not_finite_are_an_error():
    j = factor(6, 3, 3)
    with pytest.raises(ValueError, match="step 1"):
        bidiagonal_lanczos(lambda u: j.T @ u * torch.nan, lambda v: j @ v, torch.ones(6), 2)
