"""The matrix-free kernel of a problem, assembled and tested before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.models.guard import exclusive
from spectralshell.operators.jacobian.faults import name_offending_module
from spectralshell.operators.jacobian.ladder import Climb, DifferentiationError, climb
from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.noise import DoubleReference, backward_reads_model, measure_noise
from spectralshell.operators.problem import (
    Evaluation,
    KernelProblem,
    halve_until_it_fits,
    pose_problem,
)

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


def assemble_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
    rungs: Sequence[str] | None = None,
) -> KernelOperator:
    """Build a kernel that multiplies alone; ``rungs`` restricts the ladder, for tests of a rung."""
    with exclusive():
        problem = pose_problem(
            snapshot,
            residual=residual,
            parameters=parameters,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
            generator=generator,
        )
        return assemble(problem, problem.chunk_size, rungs=rungs)


def assemble(
    problem: KernelProblem,
    size: int | None,
    *,
    evaluation: Evaluation | None = None,
    rungs: Sequence[str] | None = None,
    measured: bool = True,
) -> KernelOperator:
    """Build the matrix-free kernel of a problem in chunks of ``size`` samples, or smaller ones.

    Parameters
    ----------
    problem : KernelProblem
    size : int or None
        Samples of a chunk; None takes all at once.
    evaluation : Evaluation, optional
        Of the same problem, in chunks of ``size``.
    rungs : sequence of str, optional
        Restricts the ladder, for tests of a rung.
    measured : bool, default=True
        Whether to measure the norm and the noise, which takes about nine products.
    """

    def build(size: int | None) -> KernelOperator:
        known = evaluation is not None and evaluation.chunk_size == size
        taken = evaluation if known and evaluation else problem.evaluate(size)
        return _assemble(taken, rungs, measured=measured)

    kernel: KernelOperator
    kernel, fitting = halve_until_it_fits(problem, size, build)
    notes = list(problem.notes)
    if fitting != size:
        notes.append(f"memory ran out: computed in chunks of {fitting} samples")
    if notes:
        kernel.status = "; ".join(notes)
    return kernel


def _assemble(
    evaluation: Evaluation, rungs: Sequence[str] | None, *, measured: bool
) -> KernelOperator:
    problem = evaluation.problem
    function = problem.function

    with function.guard(), function.installed():
        parts, steps = _differentiate(evaluation, rungs)
        kernel = KernelOperator(
            function,
            parts,
            problem.residual,
            evaluation.targets.n_rows,
            evaluation.residual_vector,
            evaluation.values,
        )
        kernel.refused = {name: why for step in steps for name, why in step.refused.items()}
        kernel.n_probes = sum(step.n_probes for step in steps)
        kernel.n_samples = problem.n_samples
        kernel.chunk_size = evaluation.chunk_size
        kernel.forward_flops = evaluation.forward_flops
        kernel.reads_model = backward_reads_model(kernel, function, problem.draw)
        if measured:
            measure_noise(kernel, problem.draw, DoubleReference(kernel, evaluation))
        return kernel


def _differentiate(
    evaluation: Evaluation, rungs: Sequence[str] | None
) -> tuple[list[Part], list[Climb]]:
    problem = evaluation.problem
    function = problem.function
    parts: list[Part] = []
    steps: list[Climb] = []
    first = 0
    for chunk in evaluation.chunks():
        n_entries = evaluation.count_entries(chunk)
        if n_entries == 0:
            continue  # no row of this chunk is labelled
        vector = evaluation.vector_function(chunk)
        try:
            step = climb(
                vector,
                function.parameters,
                function.names,
                problem.draw,
                streamed=evaluation.chunk_size is not None,
                # The first chunk chooses for all: they run the same operations.
                rungs=(steps[0].rung,) if steps else rungs,
            )
        except DifferentiationError as failure:
            where = name_offending_module(function, chunk.inputs, problem.draw)
            raise DifferentiationError(
                "model: no way to differentiate it multiplies by its Jacobian correctly; the fault "
                f"starts in {where}. So it looks too where a model lowers the precision inside, by "
                f"autocast or a cast of its own. Tried {failure}"
            ) from failure
        steps.append(step)
        parts.append(Part(slice(first, first + n_entries), step.linearization))
        first += n_entries
    return parts, steps
