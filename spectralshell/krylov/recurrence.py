"""Lanczos with the whole basis kept and two Gram-Schmidt passes at every step.

The space is small (one entry per sample and output, not per parameter), so memory for the basis is
cheap and lost orthogonality, with its ghost copies of converged Ritz values, is not worth saving
it. The basis and the recurrence live in float64 on the start vector's device; only the product runs
in the operator's own dtype. Inside the loop nothing is read back to the host: after a breakdown the
vectors are masked to zero, and the host truncates once at the end.

Sources: G. H. Golub and G. Meurant, *Matrices, Moments and Quadrature with Applications* (2010),
chapter 4; L. Giraud, J. Langou and M. Rozložník, "On the loss of orthogonality in the Gram-Schmidt
orthogonalization process" (2005), for "twice is enough".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spectralshell.parameter_checks import check_integer
from spectralshell.statuses import (
    EXHAUSTION,
    ZERO_START_VECTOR,
    breakdown_at,
    join_statuses,
    stagnation_at,
)

MatVec = Callable[[torch.Tensor], torch.Tensor]
MatMat = Callable[[torch.Tensor], torch.Tensor]

FLOAT64_EPS = torch.finfo(torch.float64).eps

# A new direction this small against ‖T‖ consists of the rounding of float64 alone.
BREAKDOWN_EPS = 10.0

# A new direction this small, in units of the product's own rounding, follows that rounding.
STAGNATION_EPS = 20.0


@dataclass(frozen=True)
class Recurrence:
    """The device side of a Lanczos run, before truncation.

    Attributes
    ----------
    basis : Tensor of shape (n, m), float64
        Orthonormal columns; zero columns after a breakdown.
    alpha, beta : Tensor of shape (m,), float64
        Diagonal and off-diagonal of the Jacobi matrix; ``beta[-1]`` couples to the next direction.
    alive : Tensor of shape (m,), bool
        Whether a step ran before any breakdown.
    norm : Tensor of shape (), float64
        Norm of the start vector.
    product_dtype : torch.dtype
        What the matvec returned; float64 if it never ran.
    """

    basis: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor
    alive: torch.Tensor
    norm: torch.Tensor
    product_dtype: torch.dtype


@dataclass(frozen=True)
class LanczosResult:
    """A truncated Lanczos run.

    Attributes
    ----------
    alpha : ndarray of shape (m,)
        Diagonal of the Jacobi matrix, in the operator's unit.
    beta : ndarray of shape (m - 1,)
        Its off-diagonal, positive.
    beta_last : float
        Norm of the direction after the last one, so that M Q = Q T + beta_last q eᵀ.
    norm : float
        Norm of the start vector.
    basis : Tensor of shape (n, m), float64
        Orthonormal columns on the start vector's device; the first is start / norm. Shape (n, 0)
        where it was not kept.
    status : str
        ``"ok"``, or phrases joined by ``"; "``: ``"zero start vector"``; ``"breakdown at step k"``
        (an invariant subspace was found: the recurrence describes the start vector completely);
        ``"exhaustion"`` (the basis spans the whole space); ``"stagnation at step k"`` (a β at or
        below 20 eps of the product's dtype times ‖T‖, but no breakdown: the steps after it follow
        the rounding of the products, and cost matvecs without adding information).
    exhausted : bool
        Whether the subspace is invariant (a breakdown, or m = n).
    n_matvecs : int
        Products spent, those after a breakdown included.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    beta_last: float
    norm: float
    basis: torch.Tensor
    status: str
    exhausted: bool
    n_matvecs: int


@torch.no_grad()
def lanczos_recurrence(
    matvec: MatVec,
    start: torch.Tensor,
    n_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Recurrence:
    """Run the recurrence without a single host synchronisation.

    Parameters
    ----------
    matvec : callable
        Maps a float64 tensor of shape (n,) to the operator's product with it, shape (n,), any real
        floating dtype, same device. The operator must be symmetric.
    start : Tensor of shape (n,)
        Start vector, any device, also ``meta``.
    n_steps : int
        Steps to run; at most n are.
    on_step : callable, optional
        Called with the number of steps issued so far, after each; must not read device values.

    Returns
    -------
    Recurrence
        Tensors on the start vector's device.

    Raises
    ------
    TypeError, ValueError
        If ``start``, ``n_steps`` or the shape or dtype of a product is wrong.

    Notes
    -----
    Costs min(n_steps, n) products, 8 n m bytes, and about 8 n m² floating-point operations.

    Examples
    --------
    >>> import torch
    >>> meta = torch.empty(6, device="meta")
    >>> lanczos_recurrence(lambda v: 2 * v, meta, 4).basis.shape
    torch.Size([6, 4])
    """
    _check_start(start)
    n = start.shape[0]
    m = min(check_integer("n_steps", n_steps, low=0), n)
    vector = start.detach().to(torch.float64)
    norm = safe_norm(vector)
    # Stored by rows: a basis vector is contiguous and both passes are plain matrix products.
    rows = vector.new_zeros((m, n))
    alpha, beta = vector.new_zeros(m), vector.new_zeros(m)
    alive_steps = torch.zeros(m, dtype=torch.bool, device=vector.device)
    alive = norm > 0
    current = vector / torch.where(alive, norm, 1.0)
    scale = vector.new_zeros(())
    dtype = torch.float64
    for step in range(m):
        rows[step] = current
        product = checked_product("matvec", matvec(current), (n,))
        dtype = product.dtype
        remainder, coefficient = orthogonalize(product.to(torch.float64), rows[: step + 1])
        length = safe_norm(remainder)
        alpha[step] = torch.where(alive, coefficient, 0.0)
        beta[step] = torch.where(alive, length, 0.0)
        alive_steps[step] = alive
        previous = beta[step - 1] if step else torch.zeros_like(length)
        # A row sum bounds ‖T‖ from above once all rows are in.
        scale = torch.maximum(scale, coefficient.abs() + length + previous)
        tolerance = BREAKDOWN_EPS * FLOAT64_EPS * scale
        alive = alive & (length > tolerance)
        current = torch.where(alive, remainder / torch.where(alive, length, 1.0), 0.0)
        if on_step is not None:
            on_step(step + 1)
    return Recurrence(rows.T, alpha, beta, alive_steps, norm, dtype)


def lanczos(
    matvec: MatVec,
    start: torch.Tensor,
    n_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> LanczosResult:
    """Run Lanczos and truncate the result on the host.

    Parameters
    ----------
    matvec : callable
        Maps a float64 tensor of shape (n,) to the operator's product with it, shape (n,), any real
        floating dtype, same device. The operator must be symmetric.
    start : Tensor of shape (n,)
        Start vector; a zero vector gives a result of depth 0 and spends no product.
    n_steps : int
        Steps to run; more than n are cut to n.
    on_step : callable, optional
        Called with the number of steps issued so far, for a progress bar.

    Returns
    -------
    LanczosResult

    Raises
    ------
    TypeError
        If ``start`` or a product is not a real floating tensor.
    ValueError
        If shapes do not fit, or ``start`` or a product holds NaN or infinity.

    Notes
    -----
    Costs min(n_steps, n) products and 8 n m bytes for the basis. With products in float32 the
    basis stays orthonormal to float64 rounding, and the recurrence is that of an operator within
    the products' rounding error of the true one.

    Source: Golub and Meurant (2010), chapter 4.1.

    Examples
    --------
    >>> import torch
    >>> eigenvalues = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    >>> run = lanczos(lambda v: eigenvalues * v, torch.ones(4), 10)
    >>> run.status, run.exhausted, len(run.alpha)
    ('breakdown at step 3', True, 3)
    """
    check_lanczos_arguments(start, n_steps)
    if not bool((start != 0).any()):
        return zero_start_result(start)
    return truncate(lanczos_recurrence(matvec, start, n_steps, on_step=on_step))


def check_lanczos_arguments(start: torch.Tensor, n_steps: int) -> None:
    """Raise TypeError or ValueError if a run cannot begin with these."""
    _check_start(start)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start must be finite, got NaN or infinity; check the residual vector.")
    check_integer("n_steps", n_steps, low=0)


def truncate(run: Recurrence) -> LanczosResult:
    """Return a recurrence up to its breakdown, on the host; a basis that was not kept is empty."""
    m = int(run.alive.sum())
    alpha: NDArray[np.float64] = run.alpha[:m].cpu().numpy()
    beta: NDArray[np.float64] = run.beta[:m].cpu().numpy()
    bad = np.flatnonzero(~(np.isfinite(alpha) & np.isfinite(beta)))
    if bad.size:
        raise ValueError(
            f"matvec must return finite products, got NaN or infinity at step {bad[0] + 1}; check "
            "the model's weights and the data, or compute in a wider dtype."
        )
    broke_down = m < len(run.alpha) or (m > 0 and bool(_at_rounding(alpha, beta)[-1]))
    exhausted = broke_down or m == run.basis.shape[0]
    return LanczosResult(
        alpha=alpha,
        beta=beta[:-1],
        beta_last=float(beta[-1]) if m else 0.0,
        norm=float(run.norm),
        basis=run.basis[:, :m],
        status=_describe(alpha, beta, run, broke_down=broke_down),
        exhausted=exhausted,
        n_matvecs=len(run.alpha),
    )


def _check_start(start: torch.Tensor) -> None:
    if not isinstance(start, torch.Tensor):
        raise TypeError(f"start must be a torch tensor, got {type(start).__name__}.")
    if start.ndim != 1 or start.shape[0] == 0:
        raise ValueError(
            f"start must have shape (n,) with n >= 1, got {tuple(start.shape)}; flatten it first."
        )
    if start.is_complex():
        raise TypeError(f"start must be real, got dtype {start.dtype}.")


def checked_product(name: str, product: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the product that a caller's function gave; raise on another kind or shape."""
    if not isinstance(product, torch.Tensor) or not product.is_floating_point():
        kind = product.dtype if isinstance(product, torch.Tensor) else type(product).__name__
        raise TypeError(f"{name} must return a real floating tensor, got {kind}.")
    if tuple(product.shape) != shape:
        raise ValueError(
            f"{name} must return shape {shape} like its input, got {tuple(product.shape)}."
        )
    return product


def safe_norm(vector: torch.Tensor) -> torch.Tensor:
    """Euclidean norm; dividing by the largest entry keeps it from overflow and underflow."""
    largest = vector.abs().max()
    safe = torch.where(largest > 0, largest, 1.0)
    length: torch.Tensor = torch.linalg.vector_norm(vector / safe) * largest
    return length


def orthogonalize(product: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Project ``product`` off the rows twice; return it and its coefficient on the last row."""
    first = rows @ product
    remainder = product - first @ rows
    second = rows @ remainder
    remainder = remainder - second @ rows
    return remainder, first[-1] + second[-1]


def _row_sums(alpha: NDArray[np.float64], beta: NDArray[np.float64]) -> NDArray[np.float64]:
    previous = np.concatenate([np.zeros(1), beta[:-1]])
    return np.asarray(np.maximum.accumulate(np.abs(alpha) + beta + previous), dtype=np.float64)


def _at_rounding(alpha: NDArray[np.float64], beta: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Repeat the device's breakdown test on the host."""
    threshold = BREAKDOWN_EPS * FLOAT64_EPS * _row_sums(alpha, beta)
    return np.asarray(beta <= threshold, dtype=np.bool_)


def _describe(
    alpha: NDArray[np.float64],
    beta: NDArray[np.float64],
    run: Recurrence,
    *,
    broke_down: bool,
) -> str:
    m, n = len(alpha), run.basis.shape[0]
    phrases = []
    # The last β is no stagnation where it is already a breakdown or the space is full.
    inner = beta[:-1] if (broke_down or m == n) else beta
    eps = torch.finfo(run.product_dtype).eps
    sums = _row_sums(alpha, beta)[: len(inner)] if m else np.zeros(0)
    small = np.flatnonzero(inner <= STAGNATION_EPS * eps * sums)
    if small.size:
        phrases.append(stagnation_at(small[0] + 1))
    if broke_down and m < n:
        phrases.append(breakdown_at(m))
    elif m == n:
        phrases.append(EXHAUSTION)
    return join_statuses(phrases)


def zero_start_result(start: torch.Tensor) -> LanczosResult:
    """Return the run of a zero vector, of depth 0."""
    empty = np.zeros(0)
    basis = torch.zeros((start.shape[0], 0), dtype=torch.float64, device=start.device)
    return LanczosResult(empty, empty.copy(), 0.0, 0.0, basis, ZERO_START_VECTOR, True, 0)
