"""Truncated answers of both solvers against constructed spectra."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import compress, dense_pairs, lanczos, ritz_pairs
from tests.device import DEVICE, make_tensor, place
from tests.krylov.zoo import KINDS, random_case

# Eigenvalues and products are good to the float64 noise of the design, relative to the norm.
NOISE = 4e-15
# Columns of LAPACK's solvers and of the twice orthogonalised basis.
ORTHONORMAL = 1e-13
# A pair converged to this has its vector to about this over the gap.
CONVERGED = 1e-12


def planted(values, seed=0):
    values = make_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    square = place(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    basis = torch.linalg.qr(square).Q
    matrix = (basis * values) @ basis.T
    return 0.5 * (matrix + matrix.T), basis


def assert_orthonormal(vectors):
    gram = (vectors.T @ vectors).cpu().numpy()
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=ORTHONORMAL)


def true_norms(matrix, pairs):
    defects = matrix @ pairs.vectors - pairs.vectors * make_tensor(pairs.eigenvalues)
    return torch.linalg.vector_norm(defects, dim=0).cpu().numpy()


@pytest.mark.parametrize("k", [0, 1, 3, 10, 40, 45], ids="k={}".format)
@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_dense_pairs_are_the_top_of_the_spectrum(seed, k):
    case = random_case(seed)
    matrix, n = make_tensor(case.matrix), len(case.matrix)
    pairs = dense_pairs(matrix, k)
    kept = min(k, n)
    expected = np.sort(case.eigenvalues)[::-1][:kept]
    scale = case.lambda_max
    np.testing.assert_allclose(pairs.eigenvalues, expected, atol=10 * NOISE * scale)
    assert pairs.vectors.shape == (n, kept)
    assert_orthonormal(pairs.vectors)
    np.testing.assert_allclose(pairs.residual_norms, true_norms(matrix, pairs), atol=NOISE * scale)
    assert pairs.status == ("ok" if k <= n else f"{n} of {k} pairs")


@pytest.mark.parametrize("k", [0, 1, 3, 45], ids="k={}".format)
@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_residual_norms_of_ritz_pairs_hold(seed, k):
    case = random_case(seed)
    run = lanczos(case.product(), make_tensor(case.start), case.depth)
    pairs = ritz_pairs(run, k)
    kept = min(k, len(run.alpha))
    assert pairs.vectors.shape == (len(case.start), kept)
    assert (np.diff(pairs.eigenvalues) <= 0).all()
    assert_orthonormal(pairs.vectors)
    actual = true_norms(make_tensor(case.matrix), pairs)
    # The allowance covers the rounding of the check itself only up to a factor.
    assert (actual <= pairs.residual_norms + 4 * NOISE * case.lambda_max).all()
    distances = np.abs(case.eigenvalues[:, None] - pairs.eigenvalues).min(axis=0)
    assert (distances <= pairs.residual_norms + 4 * NOISE * case.lambda_max).all()


def test_converged_ritz_pairs_are_eigenpairs_and_the_others_have_large_norms():
    rates = np.concatenate([[100.0, 60.0, 30.0], np.linspace(1.0, 2.0, 57)])
    matrix, basis = planted(np.sort(rates))
    start = basis.sum(dim=1)
    pairs = ritz_pairs(lanczos(lambda v: matrix @ v, start, 14), 6)
    dense = dense_pairs(matrix, 6)
    good = pairs.converged(CONVERGED)
    assert good.tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(
        pairs.eigenvalues[good], dense.eigenvalues[good], atol=CONVERGED * 100
    )
    overlap = (pairs.vectors * dense.vectors).sum(dim=0).abs().cpu().numpy()
    np.testing.assert_allclose(overlap[good], 1.0, atol=CONVERGED)
    assert (pairs.residual_norms[~good] > 1e-3).all()
    assert dense.converged(CONVERGED).all()


def test_allowance_for_products_in_float32():
    matrix, basis = planted(np.geomspace(1e-4, 1.0, 30))
    noise = 6e-7
    run = lanczos(lambda v: matrix.float() @ v.float(), basis.sum(dim=1), 30)
    pairs = ritz_pairs(run, 5, noise=noise)
    assert (true_norms(matrix, pairs) <= pairs.residual_norms).all()
    assert (pairs.residual_norms >= noise).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], [3.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 5.0], [5.0, 0.0, 0.0]),
        ([2.0, 2.0, 1.0], [2.0, 2.0, 1.0]),
        ([-4.0, 1.0, 2.0], [2.0, 1.0, -4.0]),
    ],
    ids=["one", "zero", "rank one", "repeated", "negative"],
)
def test_degenerate_spectra(values, expected):
    matrix, basis = planted(values)
    dense = dense_pairs(matrix, 3)
    n = len(values)
    np.testing.assert_allclose(dense.eigenvalues, expected[:n], atol=1e-14)
    assert dense.converged(1e-14).all()
    run = lanczos(lambda v: matrix @ v, basis.sum(dim=1), 3)
    ritz = ritz_pairs(run, n)
    found = sorted(set(expected[:n]), reverse=True)  # one direction of each eigenspace
    np.testing.assert_allclose(ritz.eigenvalues, found, atol=1e-14)
    assert ritz.converged(1e-13).all()
    assert (f"{len(found)} of {n} pairs" in ritz.status) == (len(found) < n)


def test_zero_start_gives_no_pair_and_a_status():
    pairs = ritz_pairs(lanczos(lambda v: v, torch.zeros(4, device=DEVICE), 3), 2)
    assert pairs.vectors.shape == (4, 0)
    assert pairs.status == "zero start vector; 0 of 2 pairs"
    assert pairs.converged(0.0).shape == (0,)
    assert compress(lambda V: V, pairs.vectors).shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compress_is_the_slice(dtype):
    matrix, _ = planted(np.linspace(1.0, 2.0, 12))
    other, _ = planted(np.linspace(-1.0, 1.0, 12), seed=1)
    pairs = dense_pairs(matrix, 4)
    eps = torch.finfo(dtype).eps
    slice_ = compress(lambda V: other.to(dtype) @ V.to(dtype), pairs.vectors)
    expected = pairs.vectors.T @ other @ pairs.vectors
    np.testing.assert_allclose(slice_.cpu().numpy(), expected.cpu().numpy(), atol=20 * eps)
    assert torch.equal(slice_, slice_.T)
    own = compress(lambda V: matrix @ V, pairs.vectors)
    np.testing.assert_allclose(own.cpu().numpy(), np.diag(pairs.eigenvalues), atol=20 * NOISE)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: dense_pairs(np.eye(2), 1), TypeError, "matrix must be a torch tensor"),
        (lambda: dense_pairs(torch.ones(2, 3), 1), ValueError, "matrix must have shape"),
        (lambda: dense_pairs(torch.eye(2) / 0, 1), ValueError, "matrix must be finite"),
        (lambda: dense_pairs(torch.eye(2), -1), ValueError, "k must be"),
        (lambda: dense_pairs(torch.eye(2), 1.5), TypeError, "k must be an integer"),
        (lambda: dense_pairs(torch.eye(2), 1, noise=-1.0), ValueError, "noise must be"),
        (lambda: compress(lambda V: V, torch.ones(3)), ValueError, "vectors must have shape"),
        (lambda: compress(lambda V: V[:1], torch.ones(3, 2)), ValueError, "matmat must return"),
        (lambda: compress(lambda V: V / 0, torch.ones(3, 2)), ValueError, "finite products"),
        (lambda: dense_pairs(torch.eye(2), 1).converged(-1.0), ValueError, "tolerance must be"),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
