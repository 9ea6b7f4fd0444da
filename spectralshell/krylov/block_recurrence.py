"""Block Lanczos with the whole basis kept, two Gram-Schmidt passes, and rank loss masked.

Started at a block [e, random vectors], the basis holds the error vector exactly, sees a repeated
eigenvalue up to as many times as the block has columns, and gets modes that e hardly holds: what
couplings between modes need and one vector cannot give. As in :func:`~spectralshell.krylov.lanczos`
basis and recurrence live in float64 on the start block's device, only the product runs in the
operator's own dtype, and nothing is read back to the host inside the loop: a direction that the
basis already holds becomes a column of zeros, and the host leaves such columns out at the end.

Sources: G. H. Golub and R. Underwood, "The block Lanczos method for computing eigenvalues" (1977);
J. K. Cullum and W. E. Donath (1974), for the deflation; L. Giraud, J. Langou and M. Rozložník, "On
the loss of orthogonality in the Gram-Schmidt orthogonalization process" (2005).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spectralshell.krylov.recurrence import (
    BREAKDOWN_EPS,
    FLOAT64_EPS,
    STAGNATION_EPS,
    MatMat,
    checked_product,
)
from spectralshell.parameter_checks import check_integer
from spectralshell.statuses import (
    EXHAUSTION,
    ZERO_START_BLOCK,
    breakdown_at,
    deflation_at,
    join_statuses,
    stagnation_at,
    start_block_rank,
)


@dataclass(frozen=True)
class BlockRecurrence:
    """The device side of a block Lanczos run, before zero columns are left out.

    Attributes
    ----------
    basis : Tensor of shape (n, s b), float64
        Blocks of b columns, orthonormal; columns of zeros where the rank was lost.
    diagonal : Tensor of shape (s, b, b), float64
        Diagonal blocks of the projected operator, as the products gave them.
    coupling : Tensor of shape (s, b, b), float64
        Upper triangular: what a block's product adds in the directions of the next block.
    alive : Tensor of shape (s + 1, b), bool
        Which columns are directions, those of the block after the last one included.
    scale : Tensor of shape (s,), float64
        The largest norm of a product so far, a lower bound of the operator's norm.
    coefficients : Tensor of shape (b, b), float64
        The start block in its orthonormal columns: start = basis[:, :b] @ coefficients.
    product_dtype : torch.dtype
        What the operator returned; float64 if it never ran.
    """

    basis: torch.Tensor
    diagonal: torch.Tensor
    coupling: torch.Tensor
    alive: torch.Tensor
    scale: torch.Tensor
    coefficients: torch.Tensor
    product_dtype: torch.dtype


@dataclass(frozen=True)
class BlockLanczosResult:
    """A block Lanczos run without its zero columns.

    Attributes
    ----------
    basis : Tensor of shape (n, m), float64
        Orthonormal columns Q on the start block's device; the first is start[:, 0] normalised,
        unless that is zero.
    projected : ndarray of shape (m, m)
        T = Qᵀ M Q, symmetric and block tridiagonal, in the operator's unit.
    coupling_last : ndarray of shape (b, r)
        R of the r columns of the last block, so that M Q = Q T + P R Eᵀ with P the orthonormal
        columns after the last and E the last r columns of the identity.
    start_coefficients : ndarray of shape (r_0, c)
        The start block of c columns in the first r_0 of the basis: start = Q[:, :r_0] @ this. The
        first column is that of the error vector.
    status : str
        ``"ok"``, or phrases joined by ``"; "``: ``"zero start block"``; ``"start block of rank
        r"``, where columns of the start were zero or depended on those before; ``"stagnation at
        step k"`` (a new direction follows the rounding of the products); ``"deflation at step
        k"`` (some columns of the block ended in an invariant subspace, and the block goes on with
        fewer); ``"breakdown at step k"`` (all of them did: the basis is an invariant subspace);
        ``"exhaustion"`` (the basis spans the whole space).
    exhausted : bool
        Whether the subspace is invariant.
    n_matvecs : int
        Products with single vectors spent, those with columns of zeros included.
    """

    basis: torch.Tensor
    projected: NDArray[np.float64]
    coupling_last: NDArray[np.float64]
    start_coefficients: NDArray[np.float64]
    status: str
    exhausted: bool
    n_matvecs: int


@torch.no_grad()
def block_lanczos_recurrence(
    matmat: MatMat,
    start: torch.Tensor,
    n_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> BlockRecurrence:
    """Run the recurrence without a single host synchronisation.

    Parameters
    ----------
    matmat : callable
        Maps a float64 tensor of shape (n, b) to the operator's product with it, of the same shape,
        any real floating dtype, same device. The operator must be symmetric.
    start : Tensor of shape (n, b)
        Start block, any device, also ``meta``.
    n_steps : int
        Blocks to multiply; at most ⌈n / b⌉ are.
    on_step : callable, optional
        Called with the number of steps issued so far, after each; must not read device values.

    Returns
    -------
    BlockRecurrence
        Tensors on the start block's device.

    Raises
    ------
    TypeError, ValueError
        If ``start``, ``n_steps`` or the shape or dtype of a product is wrong.

    Notes
    -----
    Costs min(n_steps, ⌈n / b⌉) products with blocks, 8 n m bytes for m = b n_steps columns, and
    about 4 n m² floating-point operations.

    Examples
    --------
    >>> import torch
    >>> meta = torch.empty((6, 2), device="meta")
    >>> block_lanczos_recurrence(lambda V: 2 * V, meta, 2).basis.shape
    torch.Size([6, 4])
    """
    _check_start(start)
    n, width = start.shape
    steps = min(check_integer("n_steps", n_steps, low=0), -(-n // width))
    # Stored by rows: a basis vector is contiguous and all passes are plain matrix products.
    fresh, alive, coefficients = _orthonormal_start(start.detach().to(torch.float64))
    rows = fresh.new_zeros((steps * width, n))
    diagonal = fresh.new_zeros((steps, width, width))
    coupling = torch.zeros_like(diagonal)
    scales = fresh.new_zeros(steps)
    alive_blocks = torch.zeros((steps + 1, width), dtype=torch.bool, device=fresh.device)
    alive_blocks[0] = alive
    scale, dtype = fresh.new_zeros(()), torch.float64
    for step in range(steps):
        own = slice(step * width, (step + 1) * width)
        rows[own] = fresh
        product = checked_product("matmat", matmat(fresh.T), (n, width))
        dtype = product.dtype
        # What an operator makes of a column of zeros is no part of the recurrence.
        block = torch.where(alive[:, None], product.to(torch.float64).T, 0.0)
        scale = torch.maximum(scale, torch.linalg.vector_norm(block, dim=1).max())
        tolerance = BREAKDOWN_EPS * FLOAT64_EPS * scale
        old = rows[: own.stop]
        first = block @ old.T
        fresh, alive, lengths, second = _orthonormal_rows(
            block - first @ old, old, tolerance.expand(width)
        )
        diagonal[step] = (first + second)[:, own].T
        coupling[step] = lengths
        scales[step] = scale
        alive_blocks[step + 1] = alive
        if on_step is not None:
            on_step(step + 1)
    return BlockRecurrence(rows.T, diagonal, coupling, alive_blocks, scales, coefficients, dtype)


def block_lanczos(
    matmat: MatMat,
    start: torch.Tensor,
    n_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> BlockLanczosResult:
    """Run block Lanczos, and leave out on the host what the basis already held.

    Parameters
    ----------
    matmat : callable
        Maps a float64 tensor of shape (n, b) to the operator's product with it, of the same shape,
        any real floating dtype, same device. The operator must be symmetric.
    start : Tensor of shape (n, c)
        Start block, for couplings the error vector and then random vectors. Columns may be zero,
        equal or of very different norms, and more than n: the b columns that are independent of
        those before them go on.
    n_steps : int
        Blocks to multiply; more than ⌈n / b⌉ are cut to that.
    on_step : callable, optional
        Called with the number of steps issued so far, for a progress bar.

    Returns
    -------
    BlockLanczosResult

    Raises
    ------
    TypeError
        If ``start`` or a product is not a real floating tensor.
    ValueError
        If shapes do not fit, or ``start`` or a product holds NaN or infinity.

    Notes
    -----
    Costs b min(n_steps, ⌈n / b⌉) products with single vectors and 8 n m bytes for the basis. A
    column counts as dependent where what two passes leave of it is at most 10 eps of float64 times
    its norm (start) or the largest norm of a product (later). Where some columns end early, such
    as an error vector made of few modes, ⌈n / b⌉ steps do not reach the whole space: then
    ``exhausted`` is false, and residual norms of Ritz pairs tell what is missing.

    An eigenvalue repeated b times or less is found with all its modes, one repeated more often b
    times. Modes orthogonal to all columns of the start block are not seen.

    Source: Golub and Underwood (1977).

    Examples
    --------
    >>> import torch
    >>> from spectralshell.krylov import block_ritz_pairs
    >>> rates = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    >>> start = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 2.0], [1.0, 3.0]])
    >>> run = block_lanczos(lambda V: rates[:, None] * V, start, 2)
    >>> run.status, block_ritz_pairs(run).eigenvalues.round(12).tolist()
    ('exhaustion', [3.0, 2.0, 2.0, 1.0])
    """
    _check_start(start)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start must be finite, got NaN or infinity; check the residual vector.")
    check_integer("n_steps", n_steps, low=0)
    _, independent, coefficients = _orthonormal_start(start.detach().to(torch.float64))
    rank = int(independent.sum())
    if not rank:
        return _zero_start_result(start)
    run = block_lanczos_recurrence(matmat, start[:, independent], n_steps, on_step=on_step)
    diagonal: NDArray[np.float64] = run.diagonal.cpu().numpy()
    coupling: NDArray[np.float64] = run.coupling.cpu().numpy()
    _check_finite(diagonal, coupling)
    alive: NDArray[np.bool_] = run.alive.cpu().numpy()
    kept = alive[:-1].ravel()
    last = max(int(np.flatnonzero(alive[:-1].any(axis=1)).max(initial=-1)), 0)
    exhausted = int(kept.sum()) == len(start) or (len(diagonal) > 0 and not alive[last + 1].any())
    return BlockLanczosResult(
        basis=run.basis[:, torch.from_numpy(kept).to(run.basis.device)],
        projected=_assemble(diagonal, coupling)[np.ix_(kept, kept)],
        coupling_last=coupling[last][:, alive[last]] if len(diagonal) else np.zeros((rank, 0)),
        start_coefficients=coefficients[independent].cpu().numpy()[: int(kept.sum())],
        status=_describe(run, alive, coupling, n_columns=start.shape[1]),
        exhausted=exhausted,
        n_matvecs=rank * len(diagonal),
    )


def _check_start(start: torch.Tensor) -> None:
    if not isinstance(start, torch.Tensor):
        raise TypeError(f"start must be a torch tensor, got {type(start).__name__}.")
    if start.ndim != 2 or 0 in start.shape:
        raise ValueError(
            f"start must have shape (n, b) with n >= 1 and b >= 1, got {tuple(start.shape)}."
        )
    if start.is_complex():
        raise TypeError(f"start must be real, got dtype {start.dtype}.")


def _check_finite(diagonal: NDArray[np.float64], coupling: NDArray[np.float64]) -> None:
    finite = np.isfinite(diagonal).all(axis=(1, 2)) & np.isfinite(coupling).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(
            "matmat must return finite products, got NaN or infinity at step "
            f"{int(np.argmin(finite)) + 1}; check the model's weights and the data, or compute in "
            "a wider dtype."
        )


def _orthonormal_start(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return orthonormal rows, which of them are directions, and the start's coefficients."""
    largest = start.abs().amax(dim=0)
    # Dividing by the largest entry keeps norms from overflow and underflow.
    scaled = (start / torch.where(largest > 0, largest, 1.0)).T
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    unit = scaled / torch.where(norms > 0, norms, 1.0)
    tolerance = torch.full_like(norms[:, 0], BREAKDOWN_EPS * FLOAT64_EPS)
    rows, alive, lengths, _ = _orthonormal_rows(unit, unit[:0], tolerance)
    return rows, alive, lengths * (norms[:, 0] * largest)


def _orthonormal_rows(
    block: torch.Tensor, old: torch.Tensor, tolerance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return orthonormal rows, which are directions (not zero), and coefficients in rows and old.

    The coefficients are (new row, row of block), and of the second pass (row of block, old row).
    """
    width = len(block)
    fresh = torch.zeros_like(block)
    alive = torch.zeros(width, dtype=torch.bool, device=block.device)
    lengths = block.new_zeros((width, width))
    second = block.new_zeros((width, len(old)))
    for index in range(width):
        row, before = block[index], fresh[:index]
        inner = before @ row
        row = row - inner @ before
        again, again_inner = old @ row, before @ row
        row = row - again @ old - again_inner @ before
        length = torch.linalg.vector_norm(row)
        keep = length > tolerance[index]
        fresh[index] = torch.where(keep, row / torch.where(keep, length, 1.0), 0.0)
        alive[index] = keep
        lengths[:index, index] = inner + again_inner
        # A length that is not finite stays, for the host to see.
        lengths[index, index] = torch.where(keep | ~torch.isfinite(length), length, 0.0)
        second[index] = again
    return fresh, alive, lengths, second


def _assemble(diagonal: NDArray[np.float64], coupling: NDArray[np.float64]) -> NDArray[np.float64]:
    steps, width = diagonal.shape[:2]
    projected = np.zeros((steps, width, steps, width))
    for step in range(steps):
        projected[step, :, step] = 0.5 * (diagonal[step] + diagonal[step].T)
        if step + 1 < steps:
            projected[step + 1, :, step] = coupling[step]
            projected[step, :, step + 1] = coupling[step].T
    return projected.reshape(steps * width, steps * width)


def _describe(
    run: BlockRecurrence,
    alive: NDArray[np.bool_],
    coupling: NDArray[np.float64],
    *,
    n_columns: int,
) -> str:
    n, width = run.basis.shape[0], alive.shape[1]
    phrases = [] if width == n_columns else [start_block_rank(width)]
    lengths = np.diagonal(coupling, axis1=1, axis2=2)
    rounding = STAGNATION_EPS * torch.finfo(run.product_dtype).eps * run.scale.cpu().numpy()
    stagnating = np.flatnonzero((alive[1:] & (lengths <= rounding[:, None])).any(axis=1))
    if stagnating.size:
        phrases.append(stagnation_at(stagnating[0] + 1))
    counts = alive.sum(axis=1)
    total = np.cumsum(counts)
    # Columns that end because the space is full are no loss.
    fewer = np.flatnonzero((np.diff(counts) < 0) & (counts[1:] > 0) & (total[1:] < n))
    if fewer.size:
        phrases.append(deflation_at(fewer[0] + 1))
    if counts[:-1].sum() == n:
        phrases.append(EXHAUSTION)
    elif len(coupling) and not counts[-1]:
        phrases.append(breakdown_at(int(np.flatnonzero(counts).max()) + 1))
    return join_statuses(phrases)


def _zero_start_result(start: torch.Tensor) -> BlockLanczosResult:
    n, width = start.shape
    empty = torch.zeros((n, 0), dtype=torch.float64, device=start.device)
    nothing = np.zeros((0, 0))
    return BlockLanczosResult(
        empty, nothing, nothing.copy(), np.zeros((0, width)), ZERO_START_BLOCK, True, 0
    )
