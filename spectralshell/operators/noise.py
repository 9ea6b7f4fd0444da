"""How exact a kernel is: its products and entries against float64."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from spectralshell.models.function import ModelFunction, widen
from spectralshell.models.guard import full_precision
from spectralshell.operators.jacobian.linearizations import (
    DoubleReverse,
    ForwardMode,
    Linearization,
    Streamed,
    VectorFunction,
)
from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.layers.assembly import entry_samples
from spectralshell.operators.problem import Evaluation

NOISE_FLOOR = {torch.float64: 4e-15, torch.float32: 6e-7}
"""Least relative rounding error that is claimed."""

NOISE_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Above this, products are not those of one symmetric matrix."""

_NOISE_MARGIN = 2.0
"""A few steps of the power method underestimate the norm of the error."""

_ERROR_STEPS = 3
"""From the largest mode and a random vector on: two fall short of the norm by more than the margin
where the error lies in outputs that the largest mode does not reach, three by a factor of 1.3."""

_NORM_STEPS = 5

_WHOLE_FLOPS = 1e9
"""Operations of a forward pass up to which all samples are compared: convolutions in float64 are
ten times slower than in float32."""

_FEWEST_SAMPLES = 8

NOISE_SAMPLES = 4
"""Samples whose entries are compared."""

_NOISE_STEPS = 2


class Reference(Protocol):
    """A kernel in float64 to compare with."""

    def build(self, image: Tensor) -> tuple[Tensor, KernelOperator]:
        """Return the entries compared, by the sizes of a product's, and their kernel."""


def measure_noise(
    kernel: KernelOperator,
    draw: Callable[[int], Tensor],
    reference: Reference,
) -> None:
    """Estimate ``kernel.norm`` and ``kernel.noise``; raise where products are not one matrix's.

    ValueError is raised if they are not those of a symmetric linear map.

    Compares M(w/3) with M w/3, whose roundings differ, and ⟨u, M w⟩ with ⟨w, M u⟩; a float32
    kernel also with products in float64, which show the rounding of the activations. Cost: six
    products, for float32 three more, and three in float64, of large models on some samples.

    Parameters
    ----------
    kernel : KernelOperator
    draw : callable
        Gives a random vector of a length.
    reference : Reference
        The same kernel in float64, whole or on some samples; built for a float32 kernel.
    """
    kernel.noise = NOISE_FLOOR[kernel.dtype]
    if kernel.device.type == "meta":
        return
    u = draw(kernel.n).to(kernel.residual_vector)
    u = u / u.norm()
    image_u = kernel.product(u)
    kernel.n_probes += 1
    norm_u = float(image_u.norm())
    if norm_u == 0.0:
        return
    # A step of the power method: the noise is relative to the largest eigenvalue.
    w = image_u / norm_u
    image_w = kernel.product(w)
    scaled = 3.0 * kernel.product(w / 3.0)
    kernel.n_probes += 2
    largest, mode, image = max(float(image_w.norm()), norm_u), w, image_w
    for _ in range(_NORM_STEPS - 2):
        if not 0.0 < float(image.norm()) < float("inf"):
            break
        mode = image / image.norm()
        image = kernel.product(mode)
        kernel.n_probes += 1
        largest = max(largest, float(image.norm()))
    kernel.norm = largest
    linear = float((image_w - scaled).norm()) / largest
    symmetric = abs(float(u @ image_w) - float(w @ image_u)) / largest
    defect = max(linear, symmetric)
    if not defect <= NOISE_LIMIT[kernel.dtype]:
        raise ValueError(
            f"model: products with its kernel are not repeatable and symmetric (relative defect "
            f"{defect:.1e}); it may hold randomness, change its state when differentiated, or "
            "lower the precision inside, by autocast or a cast of its own."
        )
    if kernel.dtype == torch.float32 and kernel.device.type != "mps":
        defect = max(defect, _error_norm(kernel, mode + u, image_w, reference) / largest)
    kernel.noise = max(kernel.noise, _NOISE_MARGIN * defect)


def _error_norm(
    kernel: KernelOperator, start: Tensor, image: Tensor, reference: Reference
) -> float:
    """Estimate the norm of the kernel's error, from below, by steps of the power method on it.

    M = J Jᵀ is wrong by δJ Jᵀ + J δJᵀ, where J is largest: the steps begin at the largest mode, and
    at a random vector, for outputs that the mode does not reach. Where the reference has some
    samples, they are those with the largest entries in ``image``, a product of the kernel, and the
    norm is taken to grow to all as their number does: at most, as rounding goes with the entries.
    """
    norm = 0.0
    try:
        entries, exact = reference.build(image)
        growth = kernel.n / len(entries)
        vector = start[entries]
        for _ in range(_ERROR_STEPS):
            size = float(vector.norm())
            if size == 0.0:
                break
            vector = vector / size
            whole = torch.zeros_like(start)
            whole[entries] = vector
            vector = kernel.product(whole)[entries] - exact.product(vector)
            kernel.n_probes += 2
            norm = max(norm, growth * float(vector.norm()))
    except (RuntimeError, TypeError, ValueError, MemoryError):
        # Some models fix their dtype inside, and memory may not reach: the other probes remain.
        return norm
    return norm


def backward_reads_model(
    kernel: KernelOperator, function: ModelFunction, draw: Callable[[int], Tensor]
) -> bool:
    """Tell whether a backward pass reads the model's parameters anew, as checkpointing does.

    Then products have to carry the frozen state through the backward pass too. Found by putting
    NaN in the place of the parameters during one.
    """
    if kernel.device.type == "meta":
        return False
    vector = draw(kernel.n)
    expected = kernel.pull(vector)
    try:
        with function.poisoned():
            found = kernel.pull(vector)
    except RuntimeError:  # the recomputed graph did not match the recorded one
        return True
    return any(
        not torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) if a.numel() else 0.0)
        for a, b in zip(expected, found, strict=True)
    )


class DoubleReference:
    """Builds the reference of :func:`~spectralshell.operators.noise.measure_noise`.

    Parameters
    ----------
    kernel : KernelOperator
        In float32.
    evaluation : Evaluation
        That it was built from.
    """

    def __init__(self, kernel: KernelOperator, evaluation: Evaluation) -> None:
        self._kernel = kernel
        self._evaluation = evaluation

    def build(self, image: Tensor) -> tuple[Tensor, KernelOperator]:
        """Return the entries of the samples compared, and their kernel in float64."""
        evaluation = self._evaluation
        function = evaluation.problem.function.in_double()
        n_samples = evaluation.problem.n_samples
        share = _WHOLE_FLOPS / max(evaluation.forward_flops, 1.0)
        n_few = max(_FEWEST_SAMPLES, ceil(share * n_samples))
        if n_few >= n_samples:
            everything = torch.arange(self._kernel.n, device=image.device)
            return everything, self._operator(function, self._whole(function))
        samples = entry_samples(evaluation).to(image.device)
        sizes = image.new_zeros(n_samples).index_add_(0, samples, image.square())
        chosen = sizes.topk(n_few).indices.sort().values
        entries = torch.isin(samples, chosen).nonzero().reshape(-1)
        vector = _joined([self._of(sample, function) for sample in chosen.tolist()])
        part = Part(slice(0, len(entries)), self._linearize(vector, function))
        return entries, self._operator(function, [part])

    def _whole(self, function: ModelFunction) -> list[Part]:
        labelled = [
            chunk for chunk in self._evaluation.chunks() if self._evaluation.count_entries(chunk)
        ]
        return [
            Part(
                part.entries,
                self._linearize(self._evaluation.vector_function(chunk, function), function),
            )
            for part, chunk in zip(self._kernel.parts, labelled, strict=True)
        ]

    def _of(self, sample: int, function: ModelFunction) -> VectorFunction:
        return self._evaluation.vector_function(self._evaluation.take(sample, sample + 1), function)

    def _linearize(self, vector: VectorFunction, function: ModelFunction) -> Linearization:
        # Storing a push-forward would cost more than the three products it is used for.
        rung = DoubleReverse if self._kernel.rung.startswith("double-vjp") else ForwardMode
        if self._kernel.chunk_size is None:
            return rung(vector, function.parameters)
        return Streamed(rung, vector, function.parameters)

    def _operator(self, function: ModelFunction, parts: list[Part]) -> KernelOperator:
        kernel = self._kernel
        vector = kernel.residual_vector
        reference = KernelOperator(
            function, parts, self._evaluation.problem.residual, kernel.n_rows, vector, vector
        )
        reference.reads_model = kernel.reads_model
        return reference


def _joined(pieces: list[VectorFunction]) -> VectorFunction:
    """Return one function of all samples, so that the parameters' gradients are held once."""

    def vector(*parameters: Tensor) -> Tensor:
        return torch.cat([piece(*parameters) for piece in pieces])

    return vector


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

    with function.guard(), function.installed():
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
