"""Lanczos: identities, depths, degenerate operators, and freedom from ghosts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.krylov import gauss, lanczos, lanczos_recurrence, residual_norms
from tests.device import DEVICE, make_tensor
from tests.krylov.zoo import KINDS, random_case

# A few eps times the square root of the sizes used here.
ORTHOGONALITY = 1e-14
# The float64 noise of the design, relative to the operator's norm.
RECURRENCE = 4e-15
N = 12


def operator(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    matrix = (vectors * np.asarray(eigenvalues)) @ vectors.T
    return make_tensor(0.5 * (matrix + matrix.T)), make_tensor(vectors)


def jacobi(run):
    return np.diag(run.alpha) + np.diag(run.beta, 1) + np.diag(run.beta, -1)


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_recurrence_and_orthonormality(seed):
    case = random_case(seed)
    run = lanczos(case.product(), make_tensor(case.start), case.depth)
    basis = run.basis.cpu().numpy()
    defect = case.matrix @ basis - basis @ jacobi(run)
    inside = np.linalg.svd(defect[:, :-1], compute_uv=False).max(initial=0.0)
    assert inside <= RECURRENCE * case.lambda_max
    assert abs(np.linalg.norm(defect[:, -1]) - run.beta_last) <= RECURRENCE * case.lambda_max
    assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max() <= ORTHOGONALITY
    np.testing.assert_allclose(basis[:, 0] * run.norm, case.start, rtol=1e-14)


@pytest.mark.parametrize(
    ("depth", "steps", "status"), [(0, 0, "ok"), (1, 1, "ok"), (N - 1, N - 1, "ok")]
)
def test_depth_below_n(depth, steps, status):
    matrix, _ = operator(np.arange(1.0, N + 1))
    run = lanczos(lambda v: matrix @ v, torch.ones(N, device=DEVICE), depth)
    assert (len(run.alpha), run.n_matvecs, run.status, run.exhausted) == (
        steps,
        steps,
        status,
        False,
    )


@pytest.mark.parametrize("depth", [N, N + 1, 5 * N])
def test_full_depth_is_exact(depth):
    values = np.arange(1.0, N + 1)
    matrix, vectors = operator(values)
    start = torch.ones(N, dtype=torch.float64, device=DEVICE)
    run = lanczos(lambda v: matrix @ v, start, depth)
    assert (run.status, run.exhausted, run.n_matvecs) == ("exhaustion", True, N)
    nodes, weights, _ = gauss(run.alpha, run.beta)
    np.testing.assert_allclose(nodes, values, rtol=1e-13)
    np.testing.assert_allclose(weights * N, (vectors.T @ start).cpu().numpy() ** 2, rtol=1e-11)


DEGENERATE = {
    # name: eigenvalues, start (None: ones), distinct eigenvalues that the start sees
    "zero operator": (np.zeros(N), None, 1),
    "identity": (np.ones(N), None, 1),
    "rank one": (np.eye(N)[0], None, 2),
    "rank deficient": (np.r_[np.arange(1.0, 5), np.zeros(N - 4)], None, 5),
    "repeated": (np.repeat([1.0, 2.0, 3.0], 4), None, 3),
    "eigenvector": (np.arange(1.0, N + 1), 3, 1),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_breakdown_finds_the_invariant_subspace(name):
    values, column, n_seen = DEGENERATE[name]
    # A diagonal operator multiplies without rounding, so that the breakdown is clean.
    diagonal = make_tensor(values)
    start = (
        torch.ones(N, dtype=torch.float64, device=DEVICE)
        if column is None
        else torch.eye(N, device=DEVICE)[column]
    )
    run = lanczos(lambda v: diagonal * v, start, N)
    assert run.status == f"breakdown at step {n_seen}"
    assert run.exhausted
    assert run.basis.shape == (N, n_seen)
    nodes, weights, _ = gauss(run.alpha, run.beta)
    seen, counts = np.unique(values, return_counts=True)
    if column is not None:
        seen, counts = values[[column]], np.array([N])
    np.testing.assert_allclose(nodes, seen, atol=1e-14)
    np.testing.assert_allclose(weights, counts / N, atol=1e-14)


def test_breakdown_at_the_last_step_asked_for_is_seen():
    run = lanczos(lambda v: 2 * v, torch.ones(N, device=DEVICE), 1)
    assert (run.status, run.exhausted) == ("breakdown at step 1", True)


def test_invariant_subspace_hidden_by_float32_rounding_is_stagnation():
    # Five distinct eigenvalues: the fifth new direction, or one soon after, is float32 rounding.
    matrix, _ = operator(np.r_[np.linspace(1, 2, 4), np.zeros(36)])
    single = matrix.float()
    run = lanczos(lambda v: single @ v.float(), torch.ones(40, device=DEVICE), 30)
    assert run.status in {f"stagnation at step {k}" for k in (5, 6, 7)}
    assert not run.exhausted


def test_zero_start_spends_nothing():
    run = lanczos(lambda v: 1 / 0, torch.zeros(N, device=DEVICE), 5)
    assert (run.status, run.n_matvecs, run.norm) == ("zero start vector", 0, 0.0)
    assert run.exhausted
    assert run.basis.shape == (N, 0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_start_of_extreme_norm(scale):
    diagonal = torch.arange(1.0, N + 1, dtype=torch.float64, device=DEVICE)
    start = torch.ones(N, dtype=torch.float64, device=DEVICE)
    run = lanczos(lambda v: diagonal * v, scale * start, 5)
    np.testing.assert_allclose(run.alpha, lanczos(lambda v: diagonal * v, start, 5).alpha)
    np.testing.assert_allclose(run.norm, scale * np.sqrt(N))


def test_loop_runs_on_the_meta_device():
    # Any synchronisation or mixed device raises there.
    matrix = torch.empty((N, N), device="meta")
    seen = []
    run = lanczos_recurrence(
        lambda v: matrix @ v.float(), torch.empty(N, device="meta"), 5, on_step=seen.append
    )
    assert (run.basis.device.type, run.basis.shape, run.basis.dtype) == (
        "meta",
        (N, 5),
        torch.float64,
    )
    assert run.alpha.shape == run.beta.shape == (5,)
    assert seen == [1, 2, 3, 4, 5]


def test_float32_products_leave_the_basis_orthonormal_and_make_no_ghosts():
    n, steps, noise = 300, 200, 6e-7
    values = np.logspace(-12, 0, n)
    matrix, _ = operator(values)
    single = matrix.float()
    run = lanczos(lambda v: single @ v.float(), torch.ones(n, device=DEVICE), steps)
    basis = run.basis.cpu().numpy()
    assert np.linalg.norm(basis.T @ basis - np.eye(steps), 2) <= 1e-12
    nodes, _, last = gauss(run.alpha, run.beta)
    # Ritz values separate eigenvalues: r of them in an interval need r - 1 eigenvalues there, and
    # r where each has converged. A ghost copy of a converged Ritz value breaks both.
    converged = residual_norms(last, run.beta_last) <= noise
    assert converged.sum() >= 50
    for nodes_here, missing in ((nodes, 1), (nodes[converged], 0)):
        first = np.searchsorted(values, nodes_here - noise, side="left")
        final = np.searchsorted(values, nodes_here + noise, side="right")
        rank = np.arange(len(nodes_here))
        allowed = final[None, :] - first[:, None]
        held = rank[None, :] - rank[:, None] + 1
        assert (held <= allowed + missing)[np.triu_indices(len(rank))].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3])
def test_non_finite_product_is_an_error(bad, at):
    diagonal = torch.arange(1.0, N + 1, dtype=torch.float64, device=DEVICE)
    calls = []

    def matvec(vector):
        calls.append(1)
        product = diagonal * vector
        return product * bad if len(calls) == at else product

    with pytest.raises(ValueError, match=f"matvec must return finite.*step {at};"):
        lanczos(matvec, torch.ones(N, device=DEVICE), 6)


@pytest.mark.parametrize(
    ("matvec", "start", "n_steps", "error", "match"),
    [
        (lambda v: v, np.ones(3), 2, TypeError, "start must be a torch tensor"),
        (lambda v: v, torch.ones(3, 2), 2, ValueError, "start must have shape"),
        (lambda v: v, torch.ones(0), 2, ValueError, "start must have shape"),
        (lambda v: v, torch.ones(3, dtype=torch.complex64), 2, TypeError, "start must be real"),
        (lambda v: v, torch.tensor([1.0, float("nan")]), 2, ValueError, "start must be finite"),
        (lambda v: v, torch.ones(3), -1, ValueError, "n_steps"),
        (lambda v: v, torch.ones(3), 1.5, TypeError, "n_steps"),
        (lambda v: v[:2], torch.ones(3), 2, ValueError, "matvec must return shape"),
        (lambda v: v.numpy(), torch.ones(3), 2, TypeError, "matvec must return a real"),
        (lambda v: v.to(torch.complex64), torch.ones(3), 2, TypeError, "matvec must return a real"),
    ],
)
def test_wrong_input_is_named(matvec, start, n_steps, error, match):
    with pytest.raises(error, match=match):
        lanczos(matvec, start, n_steps)


@settings(deadline=None, max_examples=25)
@given(
    # Scaling by a power of two is exact as long as nothing underflows.
    values=st.lists(st.just(0.0) | st.floats(1e-100, 1e3), min_size=1, max_size=10),
    scale=st.floats(1e-3, 1e3),
    steps=st.integers(1, 12),
)
def test_scaling_the_operator_scales_the_recurrence(values, scale, steps):
    diagonal = make_tensor(values, dtype=torch.float64)
    # A power of two scales without rounding.
    factor = 2.0 ** round(np.log2(scale))
    start = torch.arange(1.0, len(values) + 1, device=DEVICE)
    one = lanczos(lambda v: diagonal * v, start, steps)
    two = lanczos(lambda v: factor * diagonal * v, start, steps)
    assert one.status == two.status
    np.testing.assert_array_equal(one.alpha * factor, two.alpha)
    np.testing.assert_array_equal(one.beta * factor, two.beta)
