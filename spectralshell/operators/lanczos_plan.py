"""How matrix-free products fit in memory, and what a Lanczos run costs."""

from __future__ import annotations

from dataclasses import dataclass

from spectralshell.operators.exact_plan import MODEL_RATE, NODE_SECONDS, fits
from spectralshell.operators.footprint import Footprint

_PRODUCT_PASSES = 4.0
"""A pull-back and a push-forward, each of two passes: through inputs and through weights."""

_STREAMED_PASSES = 8.0
"""A product in chunks records its graphs anew."""

_SETUP_PRODUCTS = 20.0
"""The ladder's test, and the probes of the noise."""

_NODES_PER_PRODUCT = 4.0
_GRAPHS = 1.25
"""Graph and tape of a stored product, in graphs of a recorded forward pass."""

_PARAMETER_COPIES = 12
"""Own copy, pulled-back gradient and its temporaries, and those of the float64 reference."""

_DENSE_RATE = 2e10
"""Operations a second of the orthogonalisation in float64."""


@dataclass(frozen=True)
class LanczosPlan:
    """How a Lanczos run is done.

    Attributes
    ----------
    chunk_size : int or None
        Samples whose graph is recorded at a time; None keeps the graph of all.
    peak_bytes : int
        Predicted most memory at a time.
    cost : float
        Predicted seconds of the reference machine.
    """

    chunk_size: int | None
    peak_bytes: int
    cost: float


def plan_lanczos(
    footprint: Footprint, n_steps: int, max_bytes: int, chunk_size: int | None = None
) -> LanczosPlan:
    """Choose the largest chunks that fit.

    Parameters
    ----------
    footprint : Footprint
    n_steps : int
        Lanczos steps.
    max_bytes : int
        Working memory.
    chunk_size : int, optional
        Fixes the samples of a chunk.

    Returns
    -------
    LanczosPlan
        If nothing fits, the plan for single samples.
    """
    size = footprint.n_samples if chunk_size is None else chunk_size
    while (
        chunk_size is None
        and size > 1
        and not fits(_peak_bytes(footprint, n_steps, size), max_bytes)
    ):
        size = (size + 1) // 2
    whole = size >= footprint.n_samples
    return LanczosPlan(
        chunk_size=None if whole else size,
        peak_bytes=_peak_bytes(footprint, n_steps, size),
        cost=_cost(footprint, n_steps, size),
    )


def _peak_bytes(footprint: Footprint, n_steps: int, size: int) -> int:
    samples = min(size, footprint.n_samples)
    graphs = _GRAPHS * footprint.graph_bytes * samples
    parameters = _PARAMETER_COPIES * footprint.n_parameters * footprint.itemsize
    basis = 8.0 * footprint.n_entries * (min(n_steps, footprint.n_entries) + 2)
    return int(graphs + parameters + basis)


def product_cost(footprint: Footprint, chunk_size: int | None) -> float:
    """Return the reference seconds of one product, its graphs stored or recorded in chunks."""
    n_chunks = 1 if chunk_size is None else -(-footprint.n_samples // chunk_size)
    passes = _PRODUCT_PASSES if n_chunks == 1 else _STREAMED_PASSES
    return (
        passes * footprint.forward_flops * footprint.itemsize / 4 / MODEL_RATE
        + _NODES_PER_PRODUCT * footprint.n_nodes * n_chunks * NODE_SECONDS
    )


def _cost(footprint: Footprint, n_steps: int, size: int) -> float:
    steps = min(n_steps, footprint.n_entries)
    product = product_cost(footprint, None if size >= footprint.n_samples else size)
    dense = 4.0 * footprint.n_entries * float(steps) ** 2 / _DENSE_RATE
    return (steps + _SETUP_PRODUCTS) * product + dense
