"""How far a central difference goes: until the Jacobian has changed by eps^(1/3) of itself."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralshell.operators.directions import Direction
from spectralshell.operators.kernel_problem import Chunk, Evaluation
from spectralshell.operators.linearizations import Parameters, PullBack
from spectralshell.operators.model_function import cast, widen

_TRIALS = 4
_TOO_FAR = 2.0
"""Change of J, in units of the wanted one, above which a trial is followed by a shorter one."""


def natural_step(evaluation: Evaluation, direction: Direction, chunk_size: int | None) -> float:
    """Return the step h of a difference along a direction.

    To be called outside inference mode, under the model lock.

    Parameters
    ----------
    evaluation : Evaluation
        At the point of the derivative.
    direction : Direction
        Of positive norm.
    chunk_size : int or None
        Samples that are tried: the first ones with entries. None is all.

    Notes
    -----
    In proportion to the parameters, ‖hθ̇‖ = eps^(1/3) ‖θ‖, is the largest step. A gradient acts on
    few directions and turns J much faster than that, so Jᵀu of a random u is compared at θ ± hθ̇,
    and h shortened until half of their distance is about eps^(1/3) ‖Jᵀu‖. A kernel that hardly
    moves keeps the largest step. Cost: a forward and a backward pass at θ, and two of each for a
    trial, at most four trials.
    """
    function = evaluation.problem.function
    if function.device.type == "meta":
        return 1.0
    wanted = float(torch.finfo(function.dtype).eps ** (1 / 3))
    step = wanted * (_norm(function.parameters) or 1.0) / direction.norm
    chunk = next(c for c in evaluation.chunks(chunk_size) if evaluation.count_entries(c))
    cotangent = evaluation.problem.draw(evaluation.count_entries(chunk))
    here = _norm(_pulled(evaluation, chunk, function.parameters, cotangent))
    for _ in range(_TRIALS):
        ends = (
            _pulled(evaluation, chunk, _displaced(evaluation, direction, sign * step), cotangent)
            for sign in (1.0, -1.0)
        )
        change = 0.5 * _norm(tuple(a - b for a, b in zip(*ends, strict=True)))
        if not change > _TOO_FAR * wanted * here:
            break
        step *= wanted * here / change
    return step


def _displaced(evaluation: Evaluation, direction: Direction, amount: float) -> Parameters:
    function = evaluation.problem.function
    return tuple(
        cast(widen(p) + amount * widen(t), function.device, function.dtype)
        for p, t in zip(function.parameters, direction.tangents, strict=True)
    )


def _pulled(
    evaluation: Evaluation, chunk: Chunk, parameters: Parameters, cotangent: Tensor
) -> Parameters:
    function = evaluation.problem.function
    with function.guard():
        pulled: Parameters = function.installed(
            None, lambda: PullBack(evaluation.vector_function(chunk), parameters).pull(cotangent)
        )
    return pulled


def _norm(tensors: Parameters) -> float:
    square = sum(float(widen(t).square().sum()) for t in tensors)
    return float(square**0.5)
