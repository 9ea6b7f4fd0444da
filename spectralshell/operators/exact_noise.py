"""How exact a kernel in float32 is: some of its entries against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralshell.operators.kernel_problem import Evaluation
from spectralshell.operators.layer_assembly import entry_samples
from spectralshell.operators.linearizations import DoubleReverse
from spectralshell.operators.model_function import widen
from spectralshell.operators.model_guard import full_precision
from spectralshell.operators.noise import NOISE_FLOOR

NOISE_SAMPLES = 4
"""Samples whose entries are compared."""

_NOISE_STEPS = 2
_NOISE_MARGIN = 2.0
"""A few steps of the power method underestimate the norm of the error."""

_NORM_STEPS = 5


def measure_exact_noise(evaluation: Evaluation, matrix: Tensor) -> float:
    """Return the norm of the rounding error of a kernel, relative to its norm.

    The block of the samples with the largest share of the trace is compared with float64 products,
    by steps of the power method on the difference. Rounding goes with the entries, so the norm is
    taken to grow to the whole matrix as the trace does.
    """
    floor = NOISE_FLOOR[matrix.dtype]
    function = evaluation.problem.function
    if matrix.is_meta or matrix.dtype == torch.float64 or function.device.type == "mps":
        return floor
    diagonal = widen(matrix.diagonal())
    largest, trace = spectral_norm(matrix), float(diagonal.sum())
    if largest == 0.0:
        return floor
    samples = entry_samples(evaluation).to(diagonal.device)
    shares = diagonal.new_zeros(evaluation.problem.n_samples).index_add_(0, samples, diagonal)
    chosen = shares.topk(min(NOISE_SAMPLES, len(shares))).indices.sort().values
    entries = torch.isin(samples, chosen).nonzero().reshape(-1)
    block = widen(matrix[entries[:, None], entries])
    try:
        norm = _difference_norm(evaluation, chosen.tolist(), block)
    except (RuntimeError, TypeError, ValueError, MemoryError):
        # Some models fix their dtype inside, and memory may not reach: the floor remains.
        return floor
    growth = trace / float(diagonal[entries].sum())
    return max(floor, _NOISE_MARGIN * growth * norm / largest)


def _difference_norm(evaluation: Evaluation, samples: list[int], block: Tensor) -> float:
    """Estimate the norm of a block's error, from below, against products in float64."""
    function = evaluation.problem.function.in_double()
    start = widen(evaluation.problem.draw(len(block)))
    chunks = [evaluation.take(sample, sample + 1) for sample in samples]
    pieces = [
        evaluation.vector_function(chunk, function)
        for chunk in chunks
        if evaluation.count_entries(chunk)
    ]

    def climb() -> float:
        # One function of all samples, so that the parameters' gradients are held once.
        exact = DoubleReverse(
            lambda *parameters: torch.cat([piece(*parameters) for piece in pieces]),
            function.parameters,
        )
        norm, vector = 0.0, start
        for _ in range(_NOISE_STEPS):
            vector = vector / vector.norm()
            difference = block @ vector - exact.push(exact.pull(vector))
            size = float(difference.norm())
            norm, vector = max(norm, size), difference
            if size == 0.0:
                break
        return norm

    with function.guard():
        return function.installed(None, climb)


def spectral_norm(matrix: Tensor) -> float:
    """Return the norm of a positive matrix, from below, by steps of the power method."""
    vector = matrix.diagonal().clone()
    norm = float(vector.abs().max())
    with full_precision(matrix.device):
        for _ in range(_NORM_STEPS):
            size = float(vector.norm())
            if not 0.0 < size < float("inf"):
                break
            vector = matrix @ (vector / size)
            norm = max(norm, float(vector.norm()))
    return norm
