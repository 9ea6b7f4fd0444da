"""A kernel in float64, whole or on some samples, to measure the rounding of float32 by."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.kernel_problem import Evaluation
from spectralshell.operators.layer_assembly import entry_samples
from spectralshell.operators.linearizations import (
    DoubleReverse,
    ForwardMode,
    Linearization,
    Streamed,
    VectorFunction,
)
from spectralshell.operators.model_function import ModelFunction

_WHOLE_FLOPS = 1e9
"""Operations of a forward pass up to which all samples are compared: convolutions in float64 are
ten times slower than in float32."""

_FEWEST_SAMPLES = 8


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
