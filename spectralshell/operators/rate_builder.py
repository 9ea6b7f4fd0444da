"""Building J̇ along a direction for the chunks of a problem, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectralshell.operators.jacobian_rate import (
    FORMS,
    ForwardRate,
    PushRung,
    ReverseRate,
    StreamedRate,
    ZeroRate,
)
from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.kernel_problem import Chunk, Evaluation
from spectralshell.operators.ladder import (
    GATE_TOLERANCE,
    DifferentiationError,
    first_line,
    is_out_of_memory,
)
from spectralshell.operators.linearizations import (
    STREAMED_RUNGS,
    Linearization,
    Parameters,
    VectorFunction,
)
from spectralshell.operators.module_faults import name_offending_module
from spectralshell.operators.rate_checks import PlainReference, require_second_derivatives


def build_rate(
    evaluation: Evaluation,
    kernel: KernelOperator,
    tangents: Parameters,
    *,
    forms: Mapping[str, str],
    reference: PlainReference,
) -> KernelOperator:
    """Return J̇ along a direction, as the operator J̇J̇ᵀ with its two factors.

    To be called inside the model's guard.

    Parameters
    ----------
    evaluation : Evaluation
    kernel : KernelOperator
        Of the same problem.
    tangents : tuple of Tensor
        The direction, in the order of the parameters.
    forms : mapping of str to str
        What is wrong with each form, as :func:`~spectralshell.operators.rate_checks.working_forms`
        tells.
    reference : PlainReference
        Of the first chunk with entries.

    Raises
    ------
    DifferentiationError
        If no way to differentiate twice agrees with plain reverse mode.
    """
    problem = evaluation.problem
    parts: list[Part] = []
    form, first, rung = "", 0, PushRung(STREAMED_RUNGS)
    for chunk in evaluation.chunks():
        n_entries = evaluation.count_entries(chunk)
        if n_entries == 0:
            continue
        vector = evaluation.vector_function(chunk)
        if parts:  # the first chunk chose for all: they run the same operations
            rate = _record(evaluation, vector, form, tangents, rung)
        else:
            form, rate = _choose(evaluation, chunk, tangents, forms, reference, rung)
        # Known to be linear so far; a pull-back tells, where a graph only might depend on θ.
        if all(isinstance(part.linearization, ZeroRate) for part in parts) and _vanishes(
            rate, problem.draw(n_entries)
        ):
            rate = ZeroRate(n_entries, vector, problem.function.parameters)
        parts.append(Part(slice(first, first + n_entries), rate))
        first += n_entries
    operator = KernelOperator(
        problem.function,
        parts,
        problem.residual,
        evaluation.targets.n_rows,
        evaluation.residual_vector,
        evaluation.values,
    )
    operator.n_samples = problem.n_samples
    operator.chunk_size = evaluation.chunk_size
    operator.forward_flops = evaluation.forward_flops
    operator.reads_model = kernel.reads_model
    return operator


def _choose(
    evaluation: Evaluation,
    chunk: Chunk,
    tangents: Parameters,
    forms: Mapping[str, str],
    reference: PlainReference,
    rung: PushRung,
) -> tuple[str, Linearization]:
    """Return the first form that agrees with the reference, recorded for the first chunk."""
    vector = evaluation.vector_function(chunk)
    refused = {form: why for form, why in forms.items() if why}
    for form in forms:
        if form in refused:
            continue
        try:
            rate = _record(evaluation, vector, form, tangents, rung)
            defect = reference.defect(rate, tangents)
        except Exception as error:  # any failure inside torch sends us to the next form
            if is_out_of_memory(error):
                raise
            refused[form] = f"{type(error).__name__}: {first_line(error)}"
            continue
        if defect <= GATE_TOLERANCE[evaluation.problem.function.dtype]:
            return form, rate
        refused[form] = f"its products are wrong (relative defect {defect:.1e})"
    raise second_derivative_error(evaluation, chunk, refused)


def second_derivative_error(
    evaluation: Evaluation, chunk: Chunk, refused: Mapping[str, str]
) -> DifferentiationError:
    """Return the error that says why a model cannot be differentiated twice, and where."""
    problem = evaluation.problem
    where = name_offending_module(
        problem.function, chunk.inputs, problem.draw, attempt=require_second_derivatives
    )
    listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return DifferentiationError(
        "model: no way to differentiate it twice is correct, as far as torch provides it; the "
        f"fault starts in {where}. method='difference' needs first derivatives only. Tried {listed}"
    )


def _record(
    evaluation: Evaluation,
    vector: VectorFunction,
    form: str,
    tangents: Parameters,
    rung: PushRung,
) -> Linearization:
    problem = evaluation.problem
    parameters = problem.function.parameters

    def make() -> ForwardRate | ReverseRate:
        return FORMS[form](
            vector, parameters, tangents, names=problem.function.names, draw=problem.draw
        )

    return make() if evaluation.chunk_size is None else StreamedRate(make, rung)


def _vanishes(rate: Linearization, cotangent: Tensor) -> bool:
    return not cotangent.is_meta and not any(bool(part.any()) for part in rate.pull(cotangent))
