"""Trusting an exact kernel: compared with automatic differentiation, and mended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from spectralshell.operators.kernel_problem import Chunk, Evaluation
from spectralshell.operators.ladder import check_finite_gradient, is_out_of_memory
from spectralshell.operators.layer_assembly import (
    LabelOf,
    LayerKernels,
    contract_layers,
)
from spectralshell.operators.linearizations import DoubleReverse, ForwardMode, Parameters, PullBack
from spectralshell.operators.matrix_free import assemble
from spectralshell.operators.model_function import widen
from spectralshell.warning_categories import KernelWarning

AGREEMENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest ‖M v − J Jᵀ v‖ / ‖J Jᵀ v‖: a hundred times the rounding of deep models."""


def verified_kernels(evaluation: Evaluation, *, label_of: LabelOf, max_bytes: int) -> LayerKernels:
    """Contract the layers, compare with a matrix-free product, and mend what differs.

    Where a product with a random vector differs from automatic differentiation, each unit is
    compared by itself; those that differ go through the gradients of each sample, and if that does
    not help, every column of M becomes a product. A :class:`~spectralshell.warning_categories.
    KernelWarning` then names the modules.
    """
    refused: list[str] = []
    problem = evaluation.problem
    probe = _Probe(evaluation)
    for _ in range(2):
        try:
            found = contract_layers(
                evaluation, label_of=label_of, refused=refused, max_bytes=max_bytes
            )
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            break
        if probe.agrees(found.total()):
            if refused:
                _warn(refused, "the gradients of each sample were used for them")
            return found
        wrong = probe.find_wrong_units(found, max_bytes)
        del found
        if not wrong or set(wrong) <= set(refused):
            break
        refused += wrong
    _warn(refused or problem.function.names, "every column of the kernel is a product")
    return _by_products(evaluation, label_of)


class _Probe:
    """Two random vectors with their gradients, and the product of one, by plain differentiation."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        problem = evaluation.problem
        n = evaluation.residual_vector.numel()
        self.vector = problem.draw(n)
        self._chunks: list[tuple[slice, Chunk]] = []
        first = 0
        for chunk in evaluation.chunks():
            n_entries = evaluation.count_entries(chunk)
            if n_entries:
                self._chunks.append((slice(first, first + n_entries), chunk))
            first += n_entries
        self.gradient = self._pull()
        check_finite_gradient(problem.function.names, self.gradient)
        self._product: Tensor | None = None

    def agrees(self, matrix: Tensor) -> bool:
        """Tell whether M v is J Jᵀ v."""
        if matrix.is_meta:
            return True
        found = widen(matrix @ self.vector)
        tolerance = AGREEMENT_TOLERANCE[matrix.dtype]
        for rung in (ForwardMode, DoubleReverse):
            try:
                expected = widen(self._push(rung))
            except Exception as error:  # a rung that cannot differentiate this model
                if is_out_of_memory(error):
                    raise
                continue
            if float((found - expected).norm()) <= tolerance * float(expected.norm()):
                return True
        return False

    def find_wrong_units(self, found: LayerKernels, max_bytes: int) -> list[str]:
        """Name the parameters of units whose own quadratic form is not that of their gradient."""
        names = self._evaluation.problem.function.names
        squares = {
            name: float(widen(part).square().sum())
            for name, part in zip(names, self.gradient, strict=True)
        }
        v = widen(self.vector)
        wrong: list[str] = []
        for unit in found.units:
            # Under one label, so that a bias is merged as it was.
            alone = contract_layers(
                self._evaluation, label_of=lambda name: "", only=unit, max_bytes=max_bytes
            ).total()
            expected = sum(squares[name] for name in unit)
            form = float(v @ (widen(alone) @ v))
            if not abs(form - expected) <= AGREEMENT_TOLERANCE[alone.dtype] * max(form, expected):
                wrong += unit
        return wrong

    def _pull(self) -> Parameters:
        function = self._evaluation.problem.function
        total: Parameters | None = None
        for entries, chunk in self._chunks:
            plain = PullBack(self._evaluation.vector_function(chunk), function.parameters)
            pulled = plain.pull(self.vector[entries])
            total = (
                pulled
                if total is None
                else tuple(a + b for a, b in zip(total, pulled, strict=True))
            )
        return total or ()

    def _push(self, rung: Callable[..., ForwardMode | DoubleReverse]) -> Tensor:
        function = self._evaluation.problem.function
        return torch.cat(
            [
                rung(self._evaluation.vector_function(chunk), function.parameters).push(
                    self.gradient
                )
                for _, chunk in self._chunks
            ]
        )


def _by_products(evaluation: Evaluation, label_of: LabelOf) -> LayerKernels:
    problem = evaluation.problem
    labels: dict[str, list[str]] = {}
    for name in problem.function.names:
        labels.setdefault(label_of(name), []).append(name)
    kernels, n_matvecs, n_probes, rung, noise = {}, 0, 0, "", 0.0
    for label, names in labels.items():
        part = replace(problem, function=problem.function.selecting(names))
        with assemble(part, evaluation.chunk_size) as kernel:
            kernels[label] = kernel.to_dense().to(kernel.dtype)
            n_matvecs += kernel.n_matvecs
            n_probes += kernel.n_probes
            rung, noise = kernel.rung, max(noise, kernel.noise)
    return LayerKernels(
        kernels,
        orders=dict.fromkeys(problem.function.names, "products"),
        units=(),
        rung=rung,
        n_matvecs=n_matvecs,
        n_probes=n_probes,
        noise=noise,
        notes=("layers disagree with automatic differentiation: columns are products",),
    )


def _warn(names: Collection[str], remedy: str) -> None:
    modules = sorted({name.rpartition(".")[0] or name for name in names})
    warnings.warn(
        f"the kernels of {', '.join(map(repr, modules))} contracted by layers differ from "
        f"automatic differentiation; {remedy}, which is slower. It so looks where samples "
        "interact, or where a layer's first dimension does not count samples.",
        KernelWarning,
        stacklevel=2,
    )
