"""The matrix-free kernel of a problem, assembled and tested before it is used."""

from __future__ import annotations

from collections.abc import Sequence

from spectralshell.operators.jacobian.faults import name_offending_module
from spectralshell.operators.jacobian.ladder import (
    Climb,
    DifferentiationError,
    ReverseModeError,
    climb,
)
from spectralshell.operators.kernel_operator import Jacobian, KernelOperator, Part
from spectralshell.operators.noise import Rounding, backward_reads_model, measure_rounding
from spectralshell.operators.problem import Evaluation, KernelProblem, halve_until_it_fits
from spectralshell.statuses import smaller_chunks


def assemble_matrix_free(
    problem: KernelProblem,
    size: int | None,
    *,
    evaluation: Evaluation | None = None,
    rungs: Sequence[str] | None = None,
    measured: bool = True,
) -> KernelOperator:
    """Build the kernel in chunks of ``size`` samples (None is all at once), or smaller ones.

    An ``evaluation`` in such chunks is not repeated; measuring norm and noise takes nine products.
    """

    def build(fitting: int | None) -> KernelOperator:
        taken = evaluation
        if taken is None or taken.chunk_size != fitting:
            taken = problem.evaluate(fitting)
        notes = problem.notes if fitting == size else (*problem.notes, smaller_chunks(fitting))
        with problem.function.guard(), problem.function.installed():
            parts, steps = _differentiate(taken, rungs)
            reads_model = backward_reads_model(taken, parts)
            jacobian = Jacobian(problem.function, parts, reads_model=reads_model)
            rounding = measure_rounding(jacobian, taken) if measured else Rounding()
        return KernelOperator(
            taken,
            jacobian,
            norm=rounding.norm,
            noise=rounding.noise,
            refused={name: why for step in steps for name, why in step.refused.items()},
            n_probes=sum(step.n_probes for step in steps) + rounding.n_probes,
            notes=notes,
        )

    return halve_until_it_fits(problem, size, build)[0]


def _differentiate(
    evaluation: Evaluation, rungs: Sequence[str] | None
) -> tuple[list[Part], list[Climb]]:
    problem = evaluation.problem
    function = problem.function
    parts: list[Part] = []
    steps: list[Climb] = []
    for entries, chunk in evaluation.chunks_with_entries():
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
        except ReverseModeError as failure:
            where = name_offending_module(function, chunk.inputs, problem.draw)
            raise ReverseModeError(
                f"model: it cannot be differentiated by any solver; the fault starts in {where}. "
                "Replace what torch has no derivative for, and call torch.autograd.grad inside a "
                "forward with create_graph=True, in eval mode too. "
                f"Tried {failure}"
            ) from failure
        except DifferentiationError as failure:
            where = name_offending_module(function, chunk.inputs, problem.draw)
            raise DifferentiationError(
                "model: no way to differentiate it multiplies by its Jacobian correctly; the fault "
                f"starts in {where}. So it looks too where a model lowers the precision inside, by "
                f"autocast or a cast of its own. Tried {failure}"
            ) from failure
        steps.append(step)
        parts.append(Part(entries, step.linearization))
    return parts, steps
