"""Lanczos on M = J Jᵀ with its basis in the domain of J, where that is the smaller space.

Golub and Kahan's bidiagonalisation from a vector u gives Jᵀ U = V Bᵀ and J V = U B + β u eᵀ with a
lower bidiagonal B, and B Bᵀ is the Jacobi matrix that Lanczos on M gives from u. Only V is kept and
orthogonalised against: of a vocabulary, an output vector is many times as long as the parameters.
V then stays orthonormal, and with it the recurrence, whatever becomes of the vectors U.

Sources: G. H. Golub and W. Kahan, "Calculating the singular values and pseudo-inverse of a matrix"
(1965), section 3; H. D. Simon and H. Zha, "Low-rank matrix approximation using the Lanczos
bidiagonalization process" (2000), section 3, for one side being enough.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectralshell.krylov.recurrence import (
    BREAKDOWN_EPS,
    FLOAT64_EPS,
    LanczosResult,
    MatVec,
    Recurrence,
    check_lanczos_arguments,
    checked_product,
    orthogonalize,
    safe_norm,
    truncate,
    zero_start_result,
)


@torch.no_grad()
def bidiagonal_lanczos(
    pull: MatVec,
    push: MatVec,
    start: torch.Tensor,
    n_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> LanczosResult:
    """Run Lanczos on J Jᵀ, keeping a basis of vectors as long as ``pull`` gives them.

    Parameters
    ----------
    pull : callable
        Maps a float64 tensor of shape (n,) to Jᵀ times it, shape (p,), real floating dtype.
    push : callable
        Maps a float64 tensor of shape (p,) to J times it, shape (n,).
    start : Tensor of shape (n,)
        Start vector; a zero vector gives a result of depth 0 and spends no product.
    n_steps : int
        Steps to run; more than n are cut to n.
    on_step : callable, optional
        Called with the number of steps issued so far, for a progress bar.

    Returns
    -------
    LanczosResult
        As of :func:`lanczos`, without a basis: shape (n, 0).

    Raises
    ------
    TypeError, ValueError
        As for :func:`lanczos`.

    Notes
    -----
    Costs min(n_steps, n) products of either kind, 8 p min(n_steps, p) bytes for the basis and four
    vectors of n float64 numbers. Its rounding is that of the products, as of :func:`lanczos`.

    Examples
    --------
    >>> import torch
    >>> factor = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> run = bidiagonal_lanczos(lambda u: factor.T @ u, lambda v: factor @ v, torch.ones(3), 5)
    >>> len(run.alpha), run.status, bool(abs(run.alpha.sum() - 7.0) < 1e-12)
    (3, 'exhaustion', True)
    """
    check_lanczos_arguments(start, n_steps)
    if not bool((start != 0).any()):
        return zero_start_result(start)
    n = start.shape[0]
    m = min(n_steps, n)
    current = start.detach().to(torch.float64)
    norm = safe_norm(current)
    current = current / norm
    alpha, beta = current.new_zeros(m), current.new_zeros(m)
    alive_steps = torch.zeros(m, dtype=torch.bool, device=current.device)
    alive = norm > 0
    rows = current.new_zeros((0, 0))
    scale, below = current.new_zeros(()), current.new_zeros(())
    dtype = torch.float64
    for step in range(m):
        pulled = pull(current)
        if step == 0:
            rows = current.new_zeros((min(m, len(pulled)), len(pulled)))
        pulled = checked_product("pull", pulled, (rows.shape[1],))
        dtype = pulled.dtype
        # The part along the last basis vector is β, and is projected off with the others.
        kept = rows[: min(step, len(rows))]
        domain = pulled.to(torch.float64)
        if len(kept):
            domain = orthogonalize(domain, kept)[0]
        right = safe_norm(domain) if step < rows.shape[1] else torch.zeros_like(norm)
        domain = torch.where(right > 0, domain / torch.where(right > 0, right, 1.0), 0.0)
        if step < len(rows):
            rows[step] = domain
        pushed = checked_product("push", push(domain), (n,)).to(torch.float64)
        current = torch.addcmul(pushed, current, right, value=-1.0)
        del pushed
        left = safe_norm(current)
        alpha[step] = torch.where(alive, right.square() + below.square(), 0.0)
        length = right * left
        beta[step] = torch.where(alive, length, 0.0)
        alive_steps[step] = alive
        previous = beta[step - 1] if step else torch.zeros_like(length)
        scale = torch.maximum(scale, alpha[step].abs() + length + previous)
        alive = alive & (length > BREAKDOWN_EPS * FLOAT64_EPS * scale)
        current.mul_(torch.where(alive, 1.0 / torch.where(alive, left, 1.0), 0.0))
        below = left
        if on_step is not None:
            on_step(step + 1)
    basis = current.new_zeros((n, 0))
    return truncate(Recurrence(basis, alpha, beta, alive_steps, norm, dtype))
