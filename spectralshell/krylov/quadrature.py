"""Gauss and Gauss-Radau rules from a Jacobi matrix.

Lanczos started at e gives the Jacobi matrix T of the error's own spectral measure, so the m-point
Gauss rule of T is exact for polynomials of degree 2m - 1 in λ under that measure.

Sources: G. H. Golub and J. H. Welsch, "Calculation of Gauss quadrature rules" (1969); G. H. Golub
and G. Meurant, *Matrices, Moments and Quadrature with Applications* (2010), chapter 6.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal

Array = NDArray[np.float64]

# Rounding of the float64 recurrence and of its diagonalisation, relative to the largest |λ|.
FLOAT64_NOISE = 4e-15


def gauss(alpha: ArrayLike, beta: ArrayLike) -> tuple[Array, Array, Array]:
    """Gauss nodes and weights of a Jacobi matrix.

    Parameters
    ----------
    alpha : array-like of shape (m,)
        Diagonal, in the operator's unit.
    beta : array-like of shape (m - 1,)
        Off-diagonal.

    Returns
    -------
    nodes : ndarray of shape (m,)
        Eigenvalues, ascending (the Ritz values).
    first_components_squared : ndarray of shape (m,)
        Squared first components of the eigenvectors: the weights, which sum to 1.
    last_components : ndarray of shape (m,)
        Last components, in the sign that makes the first component non-negative.

    Raises
    ------
    ValueError
        If the shapes do not fit or an entry is not finite.

    Notes
    -----
    Costs O(m³). Implicit QL (``stev``) is used rather than the faster MRRR: its eigenvectors are
    orthonormal to a few eps also in clusters. Components carry an absolute error of a few eps, so
    a weight below about 1e-31 is rounding.

    Source: Golub and Welsch (1969).

    Examples
    --------
    >>> nodes, weights, _ = gauss([2.0, 2.0], [1.0])
    >>> nodes.round(12).tolist(), weights.round(12).tolist()
    ([1.0, 3.0], [0.5, 0.5])
    """
    diagonal, off_diagonal = check_jacobi(alpha, beta)
    if not diagonal.size:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    pairs = eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stev")
    nodes = np.asarray(pairs[0], dtype=np.float64)
    first, final = np.asarray(pairs[1], dtype=np.float64)[[0, -1]]
    return nodes, first**2, np.asarray(np.where(first < 0, -final, final))


def radau_matrix(
    alpha: ArrayLike, beta: ArrayLike, beta_last: float, node: float
) -> tuple[Array, Array]:
    """Jacobi matrix of a Gauss-Radau rule with one prescribed node.

    Of the two rules with the node, with m + 1 and with m points, the one with the smaller modified
    entry is taken: near a Ritz value the entry of the larger rule runs away to infinity, and near a
    Ritz value of the matrix without its last row that of the smaller rule does; never both.

    Parameters
    ----------
    alpha : array-like of shape (m,)
        Diagonal of the Jacobi matrix, m >= 1.
    beta : array-like of shape (m - 1,)
        Off-diagonal.
    beta_last : float
        Coupling to the next direction.
    node : float
        The prescribed node.

    Returns
    -------
    alpha : ndarray of shape (m,) or (m + 1,)
        Modified diagonal.
    beta : ndarray of shape (m - 1,) or (m,)
        Off-diagonal.

    Raises
    ------
    ValueError
        If the shapes do not fit or an entry is not finite.

    Notes
    -----
    Costs O(m). Source: G. H. Golub, "Some modified matrix eigenvalue problems" (1973), section 7;
    Golub and Meurant (2010), section 6.2.

    Examples
    --------
    >>> nodes, _, _ = gauss(*radau_matrix([2.0, 2.0], [1.0], 1.0, 0.5))
    >>> bool(abs(nodes - 0.5).min() < 1e-14)
    True
    """
    diagonal, off_diagonal = check_jacobi(alpha, beta)
    m = len(diagonal)
    if not m or not np.isfinite([beta_last, node]).all():
        raise ValueError(
            "beta_last and node must be finite and alpha hold an entry, got "
            f"beta_last={beta_last}, node={node}, {m} entries."
        )
    couplings = np.append(off_diagonal, beta_last)
    # Pivots of T - node; a vanishing one is a Ritz value of a leading block, met exactly.
    tiny = np.finfo(np.float64).tiny ** 0.5
    corrections = np.zeros(m + 1)
    for k in range(m):
        pivot = diagonal[k] - node - corrections[k]
        corrections[k + 1] = couplings[k] ** 2 / (pivot if abs(pivot) > tiny else tiny)
    small, large = node + corrections[m - 1], node + corrections[m]
    if abs(small - node) < abs(large - node):
        return np.append(diagonal[:-1], small), off_diagonal
    return np.append(diagonal, large), couplings


def residual_norms(last_components: ArrayLike, beta_last: float) -> Array:
    """Residual norms ‖M y - θ y‖ = |β_m s_mi| of the Ritz pairs.

    Parameters
    ----------
    last_components : array-like of shape (m,)
        Last components of the eigenvectors of T, as :func:`gauss` returns them.
    beta_last : float
        Norm of the direction after the last one.

    Returns
    -------
    ndarray of shape (m,)
        In the operator's unit; an eigenvalue of M lies within this distance of each Ritz value.

    Notes
    -----
    Source: B. N. Parlett, *The Symmetric Eigenvalue Problem* (1998), section 13.2.

    Examples
    --------
    >>> residual_norms([0.6, -0.8], 0.5).tolist()
    [0.3, 0.4]
    """
    return np.asarray(np.abs(beta_last * np.asarray(last_components, dtype=np.float64)))


def check_jacobi(alpha: ArrayLike, beta: ArrayLike) -> tuple[Array, Array]:
    """Return the diagonals as finite float64 arrays of fitting shapes, or raise."""
    diagonal = np.array(alpha, dtype=np.float64)
    off_diagonal = np.array(beta, dtype=np.float64)
    if diagonal.ndim != 1 or off_diagonal.shape != (max(len(diagonal) - 1, 0),):
        raise ValueError(
            "alpha must have shape (m,) and beta (m - 1,), got "
            f"{diagonal.shape} and {off_diagonal.shape}; pass beta_last apart from beta."
        )
    if not (np.isfinite(diagonal).all() and np.isfinite(off_diagonal).all()):
        raise ValueError("alpha and beta must be finite, got NaN or infinity.")
    return diagonal, off_diagonal
