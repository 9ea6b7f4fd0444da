"""Rounding errors of kernels: their products and entries against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from spectralshell.models.function import ModelFunction, widen
from spectralshell.models.guard import full_precision
from spectralshell.operators.jacobian.linearizations import (
    DoubleReverse,
    ForwardMode,
    Linearization,
    VectorFunction,
    record,
)
from spectralshell.operators.kernel_operator import Jacobian, Part
from spectralshell.operators.layers.assembly import row_samples
from spectralshell.operators.problem import Evaluation

NOISE_FLOOR = {torch.float64: 4e-15, torch.float32: 6e-7}
"""Least relative rounding error that is claimed."""

_NOISE_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Above this, products are not those of one symmetric matrix."""

NOISE_MARGIN = 2.0
"""A few steps of the power method underestimate the norm of the error."""

NORM_STEPS = 5

ERROR_STEPS = 3
"""From the largest mode and a random vector on: two fall short of the norm by more than the margin
where the error lies in outputs that the largest mode does not reach, three by a factor of 1.3."""

_WHOLE_FLOPS = 1e9
"""Operations of a forward pass up to which all samples are compared: convolutions in float64 are
ten times slower than in float32."""

_FEWEST_SAMPLES = 8

WHOLE_OUTPUTS = 2**23
"""Numbers of outputs of the samples that are compared, which float64 takes a dozen arrays of. More
only of a single sample: eight sequences of a large vocabulary would take gigabytes."""

NOISE_SAMPLES = 4
"""Samples of which a matrix is compared."""

_MATRIX_ERROR_STEPS = 2

FAILURES = (RuntimeError, TypeError, ValueError, MemoryError)
"""Some models fix their dtype inside, and memory may not reach: the other probes remain."""


@dataclass(frozen=True)
class Rounding:
    """‖M‖ from below, the norm of its products' error relative to it, and products spent."""

    norm: float = 0.0
    noise: float = 0.0
    n_probes: int = 0


def measure_rounding(jacobian: Jacobian, evaluation: Evaluation) -> Rounding:
    """Compare M(w/3) with M w/3 and ⟨u, M w⟩ with ⟨w, M u⟩; float32 products also with float64.

    Cost: six products; for float32 three more, and three in float64, of large models on a part.
    """
    problem, dtype = evaluation.problem, evaluation.problem.function.dtype
    floor = NOISE_FLOOR[dtype]
    if problem.function.device.type == "meta":
        return Rounding(noise=floor)
    u = problem.draw(evaluation.residual_vector.numel()).to(evaluation.residual_vector)
    u = u / u.norm()
    image_u = jacobian.product(u)
    norm_u = float(image_u.norm())
    if norm_u == 0.0:
        return Rounding(noise=floor, n_probes=1)
    # A step of the power method: the noise is relative to the largest eigenvalue.
    w = image_u / norm_u
    image_w = jacobian.product(w)
    # Numbers, not vectors, are kept: those of outputs times a vocabulary are large.
    linear = float((image_w - 3.0 * jacobian.product(w / 3.0)).norm())
    symmetric = abs(float(u @ image_w) - float(w @ image_u))
    del image_u
    n_probes = 3
    largest, mode, image = max(float(image_w.norm()), norm_u), w, image_w
    del w
    for _ in range(NORM_STEPS - 2):
        if not 0.0 < float(image.norm()) < float("inf"):
            break
        mode = image / image.norm()
        image = jacobian.product(mode)
        n_probes += 1
        largest = max(largest, float(image.norm()))
    del image
    defect = max(linear, symmetric) / largest
    if not defect <= _NOISE_LIMIT[dtype]:
        raise ValueError(
            f"model: products with its kernel are not repeatable and symmetric (relative defect "
            f"{defect:.1e}); it may hold randomness, change its state when differentiated, or "
            "lower the precision inside, by autocast or a cast of its own."
        )
    if dtype == torch.float32 and problem.function.device.type != "mps":
        start = mode + u
        del mode, u
        error, n_compared = _error_norm(jacobian, evaluation, start, image_w)
        defect, n_probes = max(defect, error / largest), n_probes + n_compared
    return Rounding(largest, max(floor, NOISE_MARGIN * defect), n_probes)


def _error_norm(
    jacobian: Jacobian, evaluation: Evaluation, start: Tensor, image: Tensor
) -> tuple[float, int]:
    """Estimate the norm of M's error from below, by the power method; return products spent too.

    M = J Jᵀ is wrong by δJ Jᵀ + J δJᵀ, where J is largest: ``start`` holds the largest mode.
    """
    norm, n_probes = 0.0, 0
    try:
        entries, exact, _ = in_double(jacobian, evaluation, image, _FEWEST_SAMPLES)
        vector = start[entries]
        # Rounding goes with the entries: the norm grows to all samples at most as their number.
        growth = len(start) / len(vector)
        for _ in range(ERROR_STEPS):
            size = float(vector.norm())
            if size == 0.0:
                break
            vector = vector / size
            whole = torch.zeros_like(start)
            whole[entries] = vector
            vector = jacobian.product(whole)[entries] - exact.product(vector)
            n_probes += 2
            norm = max(norm, growth * float(vector.norm()))
    except FAILURES:
        pass
    return norm, n_probes


def in_double(
    jacobian: Jacobian, evaluation: Evaluation, image: Tensor, fewest: int
) -> tuple[Tensor | slice, Jacobian, list[int] | None]:
    """Return rows, J in float64 of them, and their samples: None for all.

    Of large models those that are largest in a product, and at least so many.
    """
    problem = evaluation.problem
    function = problem.function.in_double()
    share = _WHOLE_FLOPS / max(evaluation.forward_flops, 1.0)
    n_few = max(fewest, ceil(share * problem.n_samples))
    n_few = min(n_few, samples_of(evaluation, WHOLE_OUTPUTS))
    if n_few >= problem.n_samples:
        parts = [
            Part(
                places,
                _reference(
                    jacobian, evaluation, evaluation.vector_function(chunk, function), function
                ),
            )
            for places, chunk in evaluation.chunks_with_entries()
        ]
        return slice(None), Jacobian(function, parts, reads_model=jacobian.reads_model), None
    chosen, entries = _largest_samples(evaluation, image.square(), n_few)
    return entries, of_samples(jacobian, evaluation, chosen, function), chosen


def of_samples(
    jacobian: Jacobian, evaluation: Evaluation, samples: Sequence[int], function: ModelFunction
) -> Jacobian:
    """Return J of some samples alone, in the dtype of a function."""
    vector = _joined(evaluation, samples, function)
    part = Part(slice(0, None), _reference(jacobian, evaluation, vector, function))
    return Jacobian(function, [part], reads_model=jacobian.reads_model)


def _reference(
    jacobian: Jacobian, evaluation: Evaluation, vector: VectorFunction, function: ModelFunction
) -> Linearization:
    # Storing a push-forward would cost more than the few products it is used for.
    rung = DoubleReverse if jacobian.rung.startswith("double-vjp") else ForwardMode
    streamed = evaluation.chunk_size is not None
    return record(rung.name, rung, vector, function.parameters, streamed=streamed)


def samples_of(evaluation: Evaluation, n_outputs: int) -> int:
    """Return how many samples have so many outputs, at least one."""
    return max(1, n_outputs * evaluation.problem.n_samples // max(evaluation.outputs.numel(), 1))


def measure_exact_noise(evaluation: Evaluation, matrix: Tensor) -> float:
    """Return the norm of a matrix's rounding error over its norm, from a few samples' block.

    Samples are those with the largest share of the trace, and the norm grows to all as it does.
    """
    floor = NOISE_FLOOR[matrix.dtype]
    function = evaluation.problem.function
    if matrix.is_meta or matrix.dtype == torch.float64 or function.device.type == "mps":
        return floor
    diagonal = widen(matrix.diagonal())
    largest, trace = spectral_norm(matrix), float(diagonal.sum())
    if largest == 0.0:
        return floor
    chosen, entries = _largest_samples(evaluation, diagonal, NOISE_SAMPLES)
    block = widen(matrix[entries[:, None], entries])
    try:
        norm = _difference_norm(evaluation, chosen, block)
    except (RuntimeError, TypeError, ValueError, MemoryError):
        # Some models fix their dtype inside, and memory may not reach: the floor remains.
        return floor
    growth = trace / float(diagonal[entries].sum())
    return max(floor, NOISE_MARGIN * growth * norm / largest)


def _difference_norm(evaluation: Evaluation, samples: Sequence[int], block: Tensor) -> float:
    """Estimate the norm of a block's error, from below, against products in float64."""
    function = evaluation.problem.function.in_double()
    vector = widen(evaluation.problem.draw(len(block)))
    norm = 0.0
    with function.guard(), function.installed():
        exact = DoubleReverse(_joined(evaluation, samples, function), function.parameters)
        for _ in range(_MATRIX_ERROR_STEPS):
            vector = vector / vector.norm()
            vector = block @ vector - exact.push(exact.pull(vector))
            size = float(vector.norm())
            norm = max(norm, size)
            if size == 0.0:
                break
    return norm


def _largest_samples(
    evaluation: Evaluation, weights: Tensor, n_few: int
) -> tuple[list[int], Tensor]:
    """Return the samples whose entries weigh most, in their order, and their entries' places."""
    samples, row_size = row_samples(evaluation)
    samples = samples.to(weights.device)
    n_samples = evaluation.problem.n_samples
    sizes = weights.new_zeros(n_samples)
    sizes.index_add_(0, samples, weights.reshape(len(samples), row_size).sum(1))
    chosen = sizes.topk(min(n_few, n_samples)).indices.sort().values
    rows = torch.isin(samples, chosen).nonzero()
    entries = rows * row_size + torch.arange(row_size, device=rows.device)
    return chosen.tolist(), entries.reshape(-1)


def _joined(
    evaluation: Evaluation, samples: Sequence[int], function: ModelFunction
) -> VectorFunction:
    """Return one function of some samples, so that the parameters' gradients are held once."""
    chunks = [evaluation.take(sample, sample + 1) for sample in samples]
    pieces = [
        evaluation.vector_function(chunk, function)
        for chunk in chunks
        if evaluation.count_entries(chunk)
    ]

    def vector(*parameters: Tensor) -> Tensor:
        return torch.cat([piece(*parameters) for piece in pieces])

    return vector


def spectral_norm(matrix: Tensor) -> float:
    """Return the norm of a positive matrix, from below, by steps of the power method."""
    vector = matrix.diagonal().clone()
    norm = float(vector.abs().max())
    with full_precision(matrix.device):
        for _ in range(NORM_STEPS):
            size = float(vector.norm())
            if not 0.0 < size < float("inf"):
                break
            vector = matrix @ (vector / size)
            norm = max(norm, float(vector.norm()))
    return norm


def backward_reads_model(evaluation: Evaluation, parts: Sequence[Part]) -> bool:
    """Tell whether a backward pass reads the parameters anew, as checkpointing does.

    Then products carry the frozen state through it too. Found by NaN in place of the parameters.
    """
    function = evaluation.problem.function
    if function.device.type == "meta":
        return False
    jacobian = Jacobian(function, parts)
    vector = evaluation.problem.draw(evaluation.residual_vector.numel())
    expected = jacobian.pull(vector)
    try:
        with function.poisoned():
            found = jacobian.pull(vector)
    except RuntimeError:  # the recomputed graph did not match the recorded one
        return True
    return any(
        not torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) if a.numel() else 0.0)
        for a, b in zip(expected, found, strict=True)
    )
