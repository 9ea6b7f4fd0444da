"""Krylov and dense spectral measures of a vector under a symmetric operator.

Everything here knows only torch, numpy and scipy: an operator is a function that multiplies a
vector, a measure is nodes and weights. :func:`lanczos` builds the basis of one vector and
:func:`block_lanczos` that of a block, :func:`gauss` turns the recurrence into a quadrature rule,
:class:`CumulativeBounds` says with certainty how much energy lies below an edge, and
:func:`eigenmeasure` is the dense reference. :func:`ritz_pairs`, :func:`block_ritz_pairs` and
:func:`dense_pairs` give the top of the spectrum with its vectors, :func:`compress` a slice in them.
"""

from spectralshell.krylov.bidiagonal import bidiagonal_lanczos
from spectralshell.krylov.block_recurrence import (
    BlockLanczosResult,
    BlockRecurrence,
    block_lanczos,
    block_lanczos_recurrence,
)
from spectralshell.krylov.bounds import CumulativeBounds, evaluate_together
from spectralshell.krylov.dense import DenseSpectrum, eigenmeasure
from spectralshell.krylov.eigenpairs import (
    EigenPairs,
    block_ritz_pairs,
    compress,
    dense_pairs,
    ritz_pairs,
)
from spectralshell.krylov.quadrature import gauss, radau_matrix, residual_norms
from spectralshell.krylov.recurrence import LanczosResult, Recurrence, lanczos, lanczos_recurrence

__all__ = [
    "BlockLanczosResult",
    "BlockRecurrence",
    "CumulativeBounds",
    "DenseSpectrum",
    "EigenPairs",
    "LanczosResult",
    "Recurrence",
    "bidiagonal_lanczos",
    "block_lanczos",
    "block_lanczos_recurrence",
    "block_ritz_pairs",
    "compress",
    "dense_pairs",
    "eigenmeasure",
    "evaluate_together",
    "gauss",
    "lanczos",
    "lanczos_recurrence",
    "radau_matrix",
    "residual_norms",
    "ritz_pairs",
]
