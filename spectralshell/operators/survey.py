"""A snapshot looked at before its kernel is built: evaluated once, its costs counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.models.guard import exclusive
from spectralshell.operators.costs import (
    ExactPlan,
    Footprint,
    fits,
    measure_footprint,
    plan_exact,
    product_cost,
    working_bytes,
)
from spectralshell.operators.exact_kernel import ExactKernel, assemble_exact
from spectralshell.operators.jacobian.ladder import DifferentiationError, ReverseModeError
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.layers.units import resolve_layers
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.probes import probed
from spectralshell.operators.problem import Evaluation, halve_until_it_fits, pose_problem
from spectralshell.statuses import smaller_chunks

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


_BLOCKS_EXPECTED = 4
"""Who multiplies a block multiplies several: block Lanczos, subspace iteration, couplings."""


@dataclass(frozen=True)
class KernelSurvey:
    """An evaluated problem and its footprint, from which either kernel is built."""

    evaluation: Evaluation
    footprint: Footprint

    @property
    def device(self) -> torch.device:
        """Where the kernel will be."""
        return self.evaluation.problem.function.device

    def build_matrix_free(self, chunk_size: int | None) -> KernelOperator:
        """Build the kernel that multiplies, in chunks of samples; wide blocks by the matrix.

        If memory holds it, and it costs less than a few such blocks of products.
        """
        with exclusive():
            problem = self.evaluation.problem
            try:
                kernel = assemble_matrix_free(problem, chunk_size, evaluation=self.evaluation)
            except ReverseModeError:
                raise
            except DifferentiationError as failure:
                raise DifferentiationError(
                    f"{failure}. solver='exact' (build_exact_kernel) needs plain reverse mode "
                    "alone, which works here, and samples that do not interact."
                ) from failure
        budget = working_bytes(None, self.device)
        plan = plan_exact(self.footprint, budget, problem.chunk_size)
        if not fits(plan.peak_bytes, budget):
            return kernel
        product = product_cost(self.footprint, kernel.chunk_size)
        matrix_from = max(2, ceil(plan.kernel_cost / (_BLOCKS_EXPECTED * product)))
        return kernel.with_matrix(matrix_from, lambda: self.build_exact(plan).matrix)

    def build_exact(
        self,
        plan: ExactPlan,
        layers: str | Mapping[str, str] | Callable[[str], str] | None = None,
    ) -> ExactKernel:
        """Build the kernel as a matrix, with those of ``layers`` if asked for."""
        with exclusive():
            names = self.evaluation.problem.function.names
            label_of = resolve_layers(layers, names)
            return assemble_exact(
                self.evaluation, plan, label_of=label_of, keep_layers=layers is not None
            )


def survey_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    layers: str | Mapping[str, str] | Callable[[str], str] | None = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelSurvey:
    """Evaluate a snapshot, with the parameters of ``build_exact_kernel``, and count its costs.

    Cost: two evaluations of the batch, a recorded one of two samples, and those of the probes.
    """
    with exclusive(), ExitStack() as stack:
        problem = pose_problem(
            snapshot,
            residual=residual,
            parameters=parameters,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
            generator=generator,
        )
        label_of = resolve_layers(layers, problem.function.names)
        stack.enter_context(problem.function.guard())  # those inside find what it recorded
        evaluation, size = halve_until_it_fits(problem, problem.chunk_size, problem.evaluate)
        if size != problem.chunk_size:
            noted = replace(problem, notes=(*problem.notes, smaller_chunks(size)))
            evaluation = replace(evaluation, problem=noted)
        evaluation = probed(evaluation)
        with problem.function.installed():
            footprint = measure_footprint(evaluation, label_of)
        return KernelSurvey(evaluation, footprint)
