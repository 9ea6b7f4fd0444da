"""The matrix-free kernel of a problem, assembled and tested before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spectralshell.operators.jacobian.faults import name_offending_module
from spectralshell.operators.jacobian.ladder import (
    Climb,
    DifferentiationError,
    ReverseModeError,
    climb,
    first_line,
    is_out_of_memory,
)
from spectralshell.operators.jacobian.linearizations import RUNGS, STREAMED, record
from spectralshell.operators.kernel_operator import Jacobian, KernelOperator, Part
from spectralshell.operators.noise import Rounding, backward_reads_model, measure_rounding
from spectralshell.operators.problem import Evaluation, KernelProblem, halve_until_it_fits
from spectralshell.operators.set_up import SettledRung
from spectralshell.operators.trial import find_norm, try_products
from spectralshell.statuses import set_up_again, smaller_chunks


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
            built = _differentiate(taken, rungs, measured=measured)
        return KernelOperator(
            taken,
            built.jacobian,
            least_norm=built.trial.norm,
            find_norm=partial(find_norm, built.jacobian, taken) if measured else None,
            noise=built.noise,
            refused=built.refused,
            n_probes=built.n_probes,
            notes=(*notes, *built.notes),
        )

    return halve_until_it_fits(problem, size, build)[0]


_LONGEST = 80
"""Letters of a reason that a status passes on."""

_MORE_NOISE = 1.8
"""What the whole set-up finds beyond this, of the noise of a trial, its margin does not hold."""


@dataclass(frozen=True)
class _Built:
    """J of a problem, and what its tests found."""

    jacobian: Jacobian
    trial: Rounding
    noise: float
    refused: Mapping[str, str]
    n_probes: int
    notes: tuple[str, ...] = ()


def _differentiate(
    evaluation: Evaluation, rungs: Sequence[str] | None, *, measured: bool
) -> _Built:
    """Differentiate on the rung that is settled for the model, else on the first that is right."""
    settled = evaluation.problem.set_up.rungs
    streamed = evaluation.chunk_size is not None
    if rungs is not None or not measured:
        return _choose_rung(evaluation, rungs, measured=measured)
    if streamed not in settled:
        built = _choose_rung(evaluation, rungs, measured=True)
        _settle(built, settled)
        return built
    try:
        return _take_rung(evaluation, settled[streamed])
    except Exception as error:  # whatever fails there, the whole set-up may not, or says why
        if is_out_of_memory(error):
            raise
        del settled[streamed]
        built = _choose_rung(evaluation, rungs, measured=True)
        _settle(built, settled)
        return replace(built, notes=(set_up_again(first_line(error)[:_LONGEST]),))


def _take_rung(evaluation: Evaluation, settled: SettledRung) -> _Built:
    """Record J on a rung that is known to work, and try one product."""
    function = evaluation.problem.function
    streamed = evaluation.chunk_size is not None
    parts = []
    for entries, chunk in evaluation.chunks_with_entries():
        vector = evaluation.vector_function(chunk)
        linearization = record(
            settled.name, RUNGS[settled.name], vector, function.parameters, streamed=streamed
        )
        parts.append(Part(entries, linearization))
    jacobian = Jacobian(function, parts, reads_model=settled.reads_model)
    trial = try_products(jacobian, evaluation)
    return _Built(jacobian, trial, trial.noise, settled.refused, trial.n_probes)


def _choose_rung(evaluation: Evaluation, rungs: Sequence[str] | None, *, measured: bool) -> _Built:
    """Climb the ladder, and compare products in all ways."""
    parts, steps = _climb(evaluation, rungs)
    reads_model = backward_reads_model(evaluation, parts)
    jacobian = Jacobian(evaluation.problem.function, parts, reads_model=reads_model)
    trial, whole = Rounding(), Rounding()
    if measured:
        trial = try_products(jacobian, evaluation)
        whole = measure_rounding(jacobian, evaluation)
    return _Built(
        jacobian,
        trial,
        # Else that of the trial, which does not depend on what was measured before.
        noise=whole.noise if whole.noise > _MORE_NOISE * trial.noise else trial.noise,
        refused={name: why for step in steps for name, why in step.refused.items()},
        n_probes=sum(step.n_probes for step in steps) + trial.n_probes + whole.n_probes,
    )


def _settle(built: _Built, settled: dict[bool, SettledRung]) -> None:
    """Note the rung for later snapshots, if one product shows the noise of the whole set-up."""
    if built.noise == built.trial.noise:
        rung = built.jacobian.rung
        name = rung.removesuffix(STREAMED)
        settled[name != rung] = SettledRung(name, built.refused, built.jacobian.reads_model)


def _climb(evaluation: Evaluation, rungs: Sequence[str] | None) -> tuple[list[Part], list[Climb]]:
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
