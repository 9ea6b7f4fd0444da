"""The largest eigenpairs of a symmetric operator, with what is known of their errors.

All solvers answer through the same class: Lanczos, with one vector or a block, with the Ritz pairs
of its stored basis, a dense matrix with its own eigenvectors. :func:`compress` then takes the slice
Uᵀ A U of any operator in these vectors, such as the derivative of the kernel for couplings between
modes.

Source: B. N. Parlett, *The Symmetric Eigenvalue Problem* (1998), chapters 11 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from spectralshell.krylov.block_recurrence import BlockLanczosResult
from spectralshell.krylov.quadrature import FLOAT64_NOISE, residual_norms
from spectralshell.krylov.recurrence import LanczosResult, MatMat, checked_product
from spectralshell.parameter_checks import check_integer, check_real
from spectralshell.statuses import OK, join_statuses, pairs_found

# A part of the spectrum this small goes to the partial solver, which computes no other vector.
PARTIAL_SHARE = 0.25


@dataclass(frozen=True)
class EigenPairs:
    """Approximate eigenpairs, the largest eigenvalue first.

    Built by :func:`ritz_pairs`, :func:`block_ritz_pairs` or :func:`dense_pairs`.

    Attributes
    ----------
    eigenvalues : ndarray of shape (k,)
        Descending, in the operator's unit, unlike nodes of measures, which ascend: a truncated
        answer holds the top of the spectrum, and its row 0 is the largest mode whatever k is.
    vectors : Tensor of shape (n, k), float64
        Orthonormal columns u_i, on the operator's device.
    residual_norms : ndarray of shape (k,)
        ‖M u_i − λ_i u_i‖ with the allowance for rounding that the builder documents: an
        eigenvalue of M lies within this distance of λ_i.
    status : str
        ``"ok"``, or phrases joined by ``"; "``: what the solver reported, and
        ``"j of k pairs"`` where there are fewer than asked for.
    """

    eigenvalues: NDArray[np.float64]
    vectors: torch.Tensor
    residual_norms: NDArray[np.float64]
    status: str

    def converged(self, tolerance: float) -> NDArray[np.bool_]:
        """Which pairs are known to a tolerance.

        Parameters
        ----------
        tolerance : float
            Largest residual norm allowed, relative to the largest |eigenvalue|; non-negative.

        Returns
        -------
        ndarray of bool, shape (k,)
            Converged pairs need not come first: Lanczos finds the modes that its start vector
            holds, and one that it hardly holds comes late.

        Raises
        ------
        TypeError, ValueError
            If ``tolerance`` is not a non-negative number.
        """
        tolerance = check_real("tolerance", tolerance, low=0.0)
        scale = float(np.abs(self.eigenvalues).max(initial=0.0))
        return np.asarray(self.residual_norms <= tolerance * scale, dtype=np.bool_)


@torch.no_grad()
def ritz_pairs(result: LanczosResult, k: int, noise: float = 0.0) -> EigenPairs:
    """Return the Ritz pairs with the largest Ritz values of a Lanczos run.

    Parameters
    ----------
    result : LanczosResult
        The run, with its basis Q and Jacobi matrix T.
    k : int
        Pairs wanted, at least 0.
    noise : float, default=0.0
        Norm bound η of the products' rounding error, absolute, in the operator's unit. At least
        4e-15 of the largest |Ritz value| is used, for the float64 of the recurrence.

    Returns
    -------
    EigenPairs
        min(k, m) pairs u = Q s. Residual norms are hypot(β_m |s_m|, η): the neglected direction
        is orthogonal to the basis, and to rounding so is what the products left out.

    Raises
    ------
    TypeError, ValueError
        If ``k`` is not a non-negative integer, or ``noise`` not a non-negative number.

    Notes
    -----
    Costs 2 n m k operations on the device, O(m³) on the host, no product. Lanczos sees one
    direction of each eigenspace, that of the start vector: a repeated eigenvalue comes once, and
    a mode orthogonal to the start vector not at all, with no sign of it in the residual norms.
    Unconverged Ritz values lie inside the spectrum.

    Source: Parlett (1998), section 13.2.

    Examples
    --------
    >>> import torch
    >>> from spectralshell.krylov import lanczos
    >>> rates = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    >>> pairs = ritz_pairs(lanczos(lambda v: rates * v, torch.ones(3), 3), 2)
    >>> pairs.eigenvalues.round(12).tolist(), pairs.status
    ([4.0, 2.0], 'exhaustion')
    """
    k = check_integer("k", k, low=0)
    noise = check_real("noise", noise, low=0.0)
    m = len(result.alpha)
    kept = min(k, m)
    if not m:
        return _pairs(np.zeros(0), result.basis[:, :0], np.zeros(0), k, result.status)
    # Implicit QL, as for the measure: orthonormal vectors also in clusters.
    ascending, columns = (
        np.asarray(part, dtype=np.float64)
        for part in scipy.linalg.eigh_tridiagonal(result.alpha, result.beta, lapack_driver="stev")
    )
    largest = slice(m - 1, m - 1 - kept if kept < m else None, -1) if kept else slice(0)
    components = columns[:, largest].copy()
    floor = max(noise, FLOAT64_NOISE * float(np.abs(ascending).max()))
    norms = np.hypot(residual_norms(components[-1], result.beta_last), floor)
    vectors = result.basis @ torch.from_numpy(components).to(result.basis.device)
    return _pairs(ascending[largest], vectors, norms, k, result.status)


@torch.no_grad()
def block_ritz_pairs(
    result: BlockLanczosResult, k: int | None = None, noise: float = 0.0
) -> EigenPairs:
    """Return the Ritz pairs with the largest Ritz values of a block Lanczos run.

    Parameters
    ----------
    result : BlockLanczosResult
        The run, with its basis Q and projected operator T.
    k : int, optional
        Pairs wanted, at least 0; by default all. The amplitudes of all pairs hold the whole error
        vector: Σ⟨e, u⟩² = ‖e‖² where e is in the start block.
    noise : float, default=0.0
        Norm bound η of the products' rounding error, absolute, in the operator's unit. At least
        4e-15 of the largest |Ritz value| is used, for the float64 of the recurrence.

    Returns
    -------
    EigenPairs
        min(k, m) pairs u = Q s. Residual norms are hypot(‖R s_last‖, η), with R what the products
        of the last block have outside the basis. Pairs that have not converged are told apart by
        :meth:`EigenPairs.converged`: their vectors mix modes, so mask them where modes count.

    Raises
    ------
    TypeError, ValueError
        If ``k`` is not a non-negative integer, or ``noise`` not a non-negative number.

    Notes
    -----
    Costs 2 n m k operations on the device, O(m³) on the host, no product. An eigenvalue repeated
    more often than the block has columns comes as often as that, and a mode orthogonal to the
    whole start block not at all, with no sign of it in the residual norms.

    Source: Parlett (1998), section 13.10.

    Examples
    --------
    >>> import torch
    >>> from spectralshell.krylov import block_lanczos
    >>> rates = torch.tensor([4.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    >>> start = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0], [1.0, 3.0]])
    >>> pairs = block_ritz_pairs(block_lanczos(lambda V: rates[:, None] * V, start, 2), 2)
    >>> pairs.eigenvalues.round(12).tolist(), pairs.status
    ([4.0, 4.0], 'exhaustion')
    """
    m = len(result.projected)
    k = m if k is None else check_integer("k", k, low=0)
    noise = check_real("noise", noise, low=0.0)
    if not m:
        return _pairs(np.zeros(0), result.basis[:, :0], np.zeros(0), k, result.status)
    ascending, columns = np.linalg.eigh(result.projected)
    components = columns[:, ::-1][:, :k].copy()
    floor = max(noise, FLOAT64_NOISE * float(np.abs(ascending).max()))
    last = result.coupling_last @ components[m - result.coupling_last.shape[1] :]
    norms = np.hypot(np.linalg.norm(last, axis=0), floor)
    vectors = result.basis @ torch.from_numpy(components).to(result.basis.device)
    return _pairs(ascending[::-1][:k], vectors, norms, k, result.status)


@torch.no_grad()
def dense_pairs(matrix: torch.Tensor, k: int, noise: float = 0.0) -> EigenPairs:
    """Return the eigenpairs of a symmetric matrix with the largest eigenvalues.

    Parameters
    ----------
    matrix : Tensor of shape (n, n)
        Symmetric up to rounding; its symmetric part is diagonalised in float64. Any real dtype.
    k : int
        Pairs wanted, at least 0.
    noise : float, default=0.0
        Norm bound of the matrix's rounding error, relative to its norm.

    Returns
    -------
    EigenPairs
        min(k, n) pairs. Residual norms are hypot(‖M u − λ u‖, η), computed from the matrix itself,
        with η = ``noise`` times the largest |eigenvalue| found.

    Raises
    ------
    TypeError
        If ``matrix`` is not a tensor, or ``k`` not an integer.
    ValueError
        If ``matrix`` is not square or finite, or ``k`` or ``noise`` is negative.

    Notes
    -----
    Costs O(n³) operations and about 32 n² bytes. On the CPU up to a quarter of the spectrum is
    found by a partial solver (LAPACK's ``evr``), which computes no other eigenvector; other
    devices compute all.

    Examples
    --------
    >>> import torch
    >>> pairs = dense_pairs(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> pairs.eigenvalues.round(12).tolist(), bool(pairs.converged(1e-14).all())
    ([3.0, 2.0], True)
    """
    k = check_integer("k", k, low=0)
    noise = check_real("noise", noise, low=0.0)
    square = _checked(matrix)
    symmetric = square - 0.5 * (square - square.T)
    values, vectors = _largest(symmetric, min(k, len(square)))
    defects = symmetric @ vectors - vectors * values
    norms = torch.linalg.vector_norm(defects, dim=0).cpu().numpy()
    eigenvalues: NDArray[np.float64] = values.cpu().numpy()
    floor = noise * float(np.abs(eigenvalues).max(initial=0.0))
    return _pairs(eigenvalues, vectors, np.hypot(norms, floor), k, OK)


@torch.no_grad()
def compress(matmat: MatMat, vectors: torch.Tensor) -> torch.Tensor:
    """Return the slice Uᵀ A U of a symmetric operator, in float64.

    Parameters
    ----------
    matmat : callable
        Maps a float64 tensor of shape (n, k) to A's product with it, of the same shape, any real
        floating dtype. A must be symmetric.
    vectors : Tensor of shape (n, k)
        The columns U, for couplings those of :class:`EigenPairs`.

    Returns
    -------
    Tensor of shape (k, k), float64
        Symmetrised: the antisymmetric part is rounding of the products.

    Raises
    ------
    TypeError, ValueError
        If ``vectors`` is no matrix, or a product has another shape or is not finite.

    Notes
    -----
    Costs one block of k products and 2 n k² operations. With A = M it is the diagonal of the
    Ritz values to rounding, with A = dM/dt it holds the couplings between modes.

    Examples
    --------
    >>> import torch
    >>> basis = torch.eye(3, dtype=torch.float64)[:, :2]
    >>> compress(lambda V: 2.0 * V, basis).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"vectors must be a torch tensor, got {type(vectors).__name__}.")
    if vectors.ndim != 2:
        raise ValueError(f"vectors must have shape (n, k), got {tuple(vectors.shape)}.")
    columns = vectors.to(torch.float64)
    if not columns.shape[1]:
        return columns.new_zeros((0, 0))
    product = checked_product("matmat", matmat(columns), tuple(columns.shape))
    if not bool(torch.isfinite(product).all()):
        raise ValueError("matmat must return finite products, got NaN or infinity.")
    slice_ = columns.T @ product.to(torch.float64)
    return 0.5 * (slice_ + slice_.T)


def _largest(symmetric: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(symmetric)
    if not k:
        return symmetric.new_zeros(0), symmetric.new_zeros((n, 0))
    if symmetric.device.type == "cpu" and k <= PARTIAL_SHARE * n:
        ascending, columns = scipy.linalg.eigh(
            symmetric.numpy(), subset_by_index=(n - k, n - 1), check_finite=False
        )
        values, vectors = torch.from_numpy(ascending), torch.from_numpy(columns)
    else:
        values, vectors = torch.linalg.eigh(symmetric)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


def _checked(matrix: torch.Tensor) -> torch.Tensor:
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"matrix must be a torch tensor, got {type(matrix).__name__}.")
    if matrix.ndim != 2 or not len(matrix) or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape (n, n) with n >= 1, got {tuple(matrix.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            "matrix must be finite, got NaN or infinity; check the model and the data."
        )
    return matrix.to(torch.float64)


def _pairs(
    eigenvalues: NDArray[np.float64],
    vectors: torch.Tensor,
    norms: NDArray[np.float64],
    wanted: int,
    status: str,
) -> EigenPairs:
    phrases = [status]
    if len(eigenvalues) < wanted:
        phrases.append(pairs_found(len(eigenvalues), wanted))
    return EigenPairs(eigenvalues.copy(), vectors, norms, join_statuses(phrases))
