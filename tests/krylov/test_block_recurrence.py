"""Block Lanczos: identities, planted spectra, rank loss, and couplings between modes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.krylov import (
    block_lanczos,
    block_lanczos_recurrence,
    block_ritz_pairs,
    compress,
    dense_pairs,
    lanczos,
    ritz_pairs,
)
from tests.device import CPU, DEVICE, make_tensor, place
from tests.krylov.zoo import KINDS, random_case

# The bound on the basis that the design sets; two passes give about 1e-14.
ORTHONORMAL = 1e-12
# The float64 noise of the design, with the sums over a block and the check's own products.
RECURRENCE = 4e-14
# A residual norm below this, relative to the largest eigenvalue, is convergence to rounding.
CONVERGED = 1e-11
TINY = 1e-140  # rates below are refused before: their squares have no digits
N = 24


def planted(values, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(values),) * 2))[0]
    matrix = (vectors * np.asarray(values, dtype=float)) @ vectors.T
    return make_tensor(0.5 * (matrix + matrix.T))


def block(n, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return place(torch.randn(n, width, generator=generator, dtype=torch.float64))


def run_on(matrix, start, steps):
    return block_lanczos(lambda V: matrix @ V, start, steps)


def largest(matrix):
    return max(float(torch.linalg.matrix_norm(matrix, 2)), 1e-300)


def assert_identities(matrix, start, run):
    basis, projected = run.basis.cpu().numpy(), run.projected
    m, last = len(projected), run.coupling_last.shape[1]
    scale = largest(matrix)
    np.testing.assert_allclose(basis.T @ basis, np.eye(m), atol=ORTHONORMAL)
    np.testing.assert_array_equal(projected, projected.T)
    rest = matrix.cpu().numpy() @ basis - basis @ projected
    assert np.abs(rest[:, : m - last]).max(initial=0.0) <= RECURRENCE * scale
    # Beyond the basis the products of the last block have R, in orthonormal columns.
    outside = rest[:, m - last :]
    np.testing.assert_allclose(
        outside.T @ outside,
        run.coupling_last.T @ run.coupling_last,
        atol=RECURRENCE * scale**2,
    )
    assert np.abs(basis.T @ rest).max(initial=0.0) <= RECURRENCE * scale
    if m:
        r = len(run.start_coefficients)
        norms = np.linalg.norm(start.cpu().numpy(), axis=0)
        defect = np.abs(basis[:, :r] @ run.start_coefficients - start.cpu().numpy())
        assert (defect <= ORTHONORMAL * norms).all()


def assert_pairs_hold(matrix, pairs):
    """Residual norms are those of the pairs, and eigenvalues lie within them."""
    scale = largest(matrix)
    defects = matrix @ pairs.vectors - pairs.vectors * make_tensor(pairs.eigenvalues)
    norms = torch.linalg.vector_norm(defects, dim=0).cpu().numpy()
    np.testing.assert_allclose(norms, pairs.residual_norms, atol=RECURRENCE * scale)
    exact = torch.linalg.eigvalsh(matrix).cpu().numpy()
    distances = np.abs(exact[:, None] - pairs.eigenvalues).min(axis=0)
    assert (distances <= pairs.residual_norms + RECURRENCE * scale).all()


@pytest.mark.parametrize("width", [1, 2, 5, 50])
@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_recurrence_and_ritz_pairs(seed, width):
    case = random_case(seed)
    matrix, n = make_tensor(case.matrix), len(case.start)
    start = torch.column_stack([make_tensor(case.start), block(n, width)[:, 1:]])
    run = run_on(matrix, start, max(case.depth // width, 1))
    assert_identities(matrix, start, run)
    assert_pairs_hold(matrix, block_ritz_pairs(run))


def test_the_error_vector_lies_in_the_basis():
    matrix, start = planted(np.geomspace(1e-6, 1, N)), block(N, 3)
    start[:, 0] *= 1e-3
    run = run_on(matrix, start, 3)
    error = start[:, 0]
    np.testing.assert_allclose(
        place(run.basis[:, 0] * run.start_coefficients[0, 0], CPU), place(error, CPU), rtol=1e-14
    )
    np.testing.assert_array_equal(run.start_coefficients[1:, 0], 0.0)
    amplitudes = block_ritz_pairs(run).vectors.T @ error
    np.testing.assert_allclose(float(amplitudes @ amplitudes), float(error @ error), rtol=1e-13)


def test_a_block_of_one_is_lanczos():
    matrix, start = planted(np.arange(1.0, N + 1)), block(N, 1)
    one = lanczos(lambda v: matrix @ v, start[:, 0], 7)
    run = run_on(matrix, start, 7)
    np.testing.assert_allclose(np.diag(run.projected), one.alpha, rtol=1e-12)
    np.testing.assert_allclose(np.diag(run.projected, 1), one.beta, rtol=1e-12)
    np.testing.assert_allclose(run.coupling_last, [[one.beta_last]], rtol=1e-12)
    pairs, reference = block_ritz_pairs(run), ritz_pairs(one, 7)
    np.testing.assert_allclose(pairs.residual_norms, reference.residual_norms, rtol=1e-9)


SPECTRA = {
    # name: eigenvalues, block width, steps, gap between the converged ones and the rest
    "separated": (np.r_[np.linspace(1, 2, 60), [30, 60, 100]], 3, 9),
    "clustered": (np.r_[np.linspace(1, 2, 60), [50 - 1e-7, 50, 50 + 1e-7], [100]], 4, 9),
    "repeated": (np.r_[np.linspace(1, 2, 60), [50, 50, 50], [100, 100]], 3, 10),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_converged_pairs_are_the_dense_ones_and_masked_ones_are_not(name):
    values, width, steps = SPECTRA[name]
    matrix = planted(values)
    n_top = int((values > 10).sum())
    pairs = block_ritz_pairs(run_on(matrix, block(len(values), width), steps))
    dense = dense_pairs(matrix, len(values))
    good, scale = pairs.converged(CONVERGED), values.max()
    assert good.tolist() == [True] * n_top + [False] * (len(good) - n_top)
    # All multiplicities are there, in order.
    np.testing.assert_allclose(
        pairs.eigenvalues[:n_top], dense.eigenvalues[:n_top], atol=CONVERGED * scale
    )
    # Vectors within a cluster are not unique, their span is: sin of its angle ≤ residual / gap.
    overlaps = pairs.vectors[:, :n_top].T @ dense.vectors[:, :n_top]
    cosines = torch.linalg.svdvals(overlaps).cpu().numpy()
    gap = 28.0
    np.testing.assert_allclose(cosines, 1.0, atol=n_top * CONVERGED * scale / gap)
    # No masked pair is an eigenpair.
    rest = pairs.vectors[:, n_top:]
    defects = matrix @ rest - rest * make_tensor(pairs.eigenvalues[n_top:])
    assert float(torch.linalg.vector_norm(defects, dim=0).min()) > CONVERGED * scale


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_multiplicity_is_found_up_to_the_width(width):
    values = np.r_[np.linspace(0, 1, 40), [9.0] * 3]
    pairs = block_ritz_pairs(run_on(planted(values), block(43, width), 11))
    found = np.abs(pairs.eigenvalues - 9.0) < 1e-9
    assert found.sum() == min(width, 3)
    assert pairs.converged(CONVERGED)[found].all()


DEGENERATE = {
    # name: eigenvalues, start columns, steps, columns of the basis, status
    "zero operator": (np.zeros(N), block(N, 3), 4, 3, "breakdown at step 1"),
    "identity": (np.ones(N), block(N, 3), 4, 3, "breakdown at step 1"),
    "rank one": (np.eye(N)[0], block(N, 3), 4, 4, "deflation at step 1; breakdown at step 2"),
    "two values": (np.repeat([1.0, 2.0], N // 2), block(N, 3), 4, 6, "breakdown at step 2"),
    "full space": (np.arange(1.0, N + 1), block(N, 4), 99, N, "exhaustion"),
    "odd width": (np.arange(1.0, N + 1), block(N, 7), 99, N, "exhaustion"),
    "wider than n": (
        np.arange(1.0, N + 1),
        block(N, N + 5),
        3,
        N,
        f"start block of rank {N}; exhaustion",
    ),
    "zero error": (
        np.arange(1.0, N + 1),
        torch.column_stack([torch.zeros(N, device=DEVICE), block(N, 2)]),
        3,
        6,
        "start block of rank 2",
    ),
    "equal columns": (
        np.arange(1.0, N + 1),
        block(N, 2)[:, [0, 1, 0, 1, 0]],
        3,
        6,
        "start block of rank 2",
    ),
    "an eigenvector": (
        np.arange(1.0, N + 1),
        torch.column_stack([torch.eye(N, dtype=torch.float64, device=DEVICE)[3], block(N, 2)]),
        3,
        7,
        "deflation at step 1",
    ),
    "no step": (np.ones(N), block(N, 2), 0, 0, "ok"),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_rank_loss_is_a_status(name):
    values, start, steps, columns, status = DEGENERATE[name]
    # A diagonal operator multiplies without rounding, so that ranks are clean.
    matrix = torch.diag(make_tensor(values))
    run = run_on(matrix, start, steps)
    assert (run.status, run.basis.shape) == (status, (N, columns))
    assert run.exhausted == ("breakdown" in status or "exhaustion" in status)
    assert_identities(matrix, start, run)
    pairs = block_ritz_pairs(run)
    assert_pairs_hold(matrix, pairs)
    if run.exhausted:
        assert pairs.converged(CONVERGED).all()


def test_a_column_that_ends_early_costs_the_others_nothing():
    values = np.arange(1.0, N + 1)
    matrix = torch.diag(make_tensor(values))
    others = block(N, 2)
    others[3] = 0.0
    start = torch.column_stack([torch.eye(N, dtype=torch.float64, device=DEVICE)[3], others])
    alone = block_ritz_pairs(run_on(matrix, others, 4))
    together = block_ritz_pairs(run_on(matrix, start, 4))
    expected = np.sort(np.append(alone.eigenvalues, 4.0))[::-1]
    np.testing.assert_allclose(together.eigenvalues, expected, rtol=1e-11)


def test_zero_start_spends_nothing():
    run = block_lanczos(lambda V: 1 / 0, torch.zeros(N, 3, device=DEVICE), 5)
    assert (run.status, run.n_matvecs, run.exhausted) == ("zero start block", 0, True)
    assert run.basis.shape == (N, 0)
    assert run.start_coefficients.shape == (0, 3)
    pairs = block_ritz_pairs(run, 2)
    assert pairs.status == "zero start block; 0 of 2 pairs"


def test_products_are_counted_in_vectors():
    run = run_on(planted(np.arange(1.0, N + 1)), block(N, 2)[:, [0, 1, 1]], 3)
    assert run.n_matvecs == 6


def test_k_cuts_from_the_top():
    run = run_on(planted(np.arange(1.0, N + 1)), block(N, 3), 4)
    everything, few = block_ritz_pairs(run), block_ritz_pairs(run, 5)
    np.testing.assert_array_equal(few.eigenvalues, everything.eigenvalues[:5])
    assert torch.allclose(few.vectors, everything.vectors[:, :5], atol=1e-14)
    assert block_ritz_pairs(run, 20).status == "12 of 20 pairs"


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_columns_of_extreme_norm(scale):
    matrix, start = planted(np.arange(1.0, N + 1)), block(N, 3)
    other = start.clone()
    other[:, 0] *= scale
    np.testing.assert_allclose(
        run_on(matrix, other, 3).projected, run_on(matrix, start, 3).projected, atol=1e-11
    )


def test_loop_runs_on_the_meta_device():
    # Any synchronisation or mixed device raises there.
    matrix, seen = torch.empty((N, N), device="meta"), []
    run = block_lanczos_recurrence(
        lambda V: matrix @ V.float(), torch.empty((N, 3), device="meta"), 5, on_step=seen.append
    )
    assert (run.basis.device.type, run.basis.shape) == ("meta", (N, 15))
    assert run.diagonal.shape == run.coupling.shape == (5, 3, 3)
    assert run.basis.dtype == run.diagonal.dtype == torch.float64
    assert seen == [1, 2, 3, 4, 5]


def test_float32_products_keep_the_basis_orthonormal_and_the_bounds_true():
    matrix = planted(np.geomspace(1e-9, 1.0, 80))
    single, noise = matrix.float(), 6e-7
    run = block_lanczos(lambda V: single @ V.float(), block(80, 4), 15)
    gram = (run.basis.T @ run.basis).cpu().numpy()
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=ORTHONORMAL)
    pairs = block_ritz_pairs(run, noise=noise)
    defects = matrix @ pairs.vectors - pairs.vectors * make_tensor(pairs.eigenvalues)
    assert (torch.linalg.vector_norm(defects, dim=0).cpu().numpy() <= pairs.residual_norms).all()
    assert (pairs.residual_norms >= noise).all()


def test_invariant_subspace_hidden_by_float32_rounding_is_stagnation():
    single = planted(np.r_[np.linspace(1, 2, 4), np.zeros(36)]).float()
    run = block_lanczos(lambda V: single @ V.float(), block(40, 2), 12)
    assert run.status in {f"stagnation at step {k}" for k in (3, 4)}
    assert not run.exhausted


@pytest.mark.parametrize("width", [2, 6])
def test_couplings_from_the_basis_converge_to_the_exact_ones(width):
    n, top = 120, 8
    matrix = planted(np.geomspace(1e-4, 1.0, n))
    motion = block(n, n, seed=5)
    motion = 0.5 * (motion + motion.T)
    exact = compress(lambda V: motion @ V, dense_pairs(matrix, top).vectors).cpu().numpy()
    errors, resolved = [], []
    for columns in (12, 24, 48, 96):
        pairs = block_ritz_pairs(run_on(matrix, block(n, width), columns // width), top)
        couplings = compress(lambda V: motion @ V, pairs.vectors).cpu().numpy()
        # Vectors are known up to their signs.
        difference = np.abs(np.abs(couplings) - np.abs(exact))
        errors.append(difference.max() / np.abs(exact).max())
        good = pairs.converged(1e-6)
        resolved.append(good.sum())
        # Between modes that are not masked couplings are as good as the mask says.
        gap = 0.07  # of neighbours, in the top eight
        assert (difference[np.ix_(good, good)] <= 4e-6 / gap * largest(motion)).all()
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9
    assert (np.diff(np.log(errors)) < 0).all()
    assert resolved[-1] == top
    assert (np.diff(resolved) >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3])
def test_non_finite_product_is_an_error(bad, at):
    calls = []

    def matmat(V):
        calls.append(1)
        return (
            torch.arange(1.0, N + 1, device=DEVICE)[:, None]
            * V
            * (bad if len(calls) == at else 1.0)
        )

    with pytest.raises(ValueError, match=f"matmat must return finite.*step {at};"):
        block_lanczos(matmat, block(N, 2), 6)


@pytest.mark.parametrize(
    ("matmat", "start", "n_steps", "error", "match"),
    [
        (lambda V: V, np.ones((3, 1)), 2, TypeError, "start must be a torch tensor"),
        (lambda V: V, torch.ones(3), 2, ValueError, "start must have shape"),
        (lambda V: V, torch.ones(3, 0), 2, ValueError, "start must have shape"),
        (lambda V: V, torch.ones(3, 1, dtype=torch.complex64), 2, TypeError, "start must be real"),
        (lambda V: V, torch.tensor([[1.0], [float("nan")]]), 2, ValueError, "start must be finite"),
        (lambda V: V, torch.ones(3, 1), -1, ValueError, "n_steps"),
        (lambda V: V, torch.ones(3, 1), 1.5, TypeError, "n_steps"),
        (lambda V: V[:2], torch.ones(3, 1), 2, ValueError, "matmat must return shape"),
        (lambda V: V.numpy(), torch.ones(3, 1), 2, TypeError, "matmat must return a real"),
    ],
)
def test_wrong_input_is_named(matmat, start, n_steps, error, match):
    with pytest.raises(error, match=match):
        block_lanczos(matmat, start, n_steps)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, 2.0]) | st.floats(TINY, 1e3) | st.floats(-1e3, -TINY),
        min_size=1,
        max_size=12,
    ),
    width=st.integers(1, 5),
    steps=st.integers(0, 8),
    copies=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_invariants(values, width, steps, copies, seed):
    matrix = planted(values, seed)
    start = block(len(values), width, seed)
    start = torch.column_stack([start, start[:, :copies]])
    run = run_on(matrix, start, steps)
    assert_identities(matrix, start, run)
    assert run.basis.shape[1] <= len(values)
    pairs = block_ritz_pairs(run)
    assert_pairs_hold(matrix, pairs)
    ends = torch.linalg.eigvalsh(matrix)[[0, -1]]
    slack = RECURRENCE * largest(matrix)
    assert (pairs.eigenvalues >= float(ends[0]) - slack).all()
    assert (pairs.eigenvalues <= float(ends[1]) + slack).all()
    if run.exhausted and len(run.projected) == len(values):
        np.testing.assert_allclose(
            pairs.eigenvalues[::-1], torch.linalg.eigvalsh(matrix).cpu(), atol=slack
        )
