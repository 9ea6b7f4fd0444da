"""How far a central difference goes: until the Jacobian has changed by eps^(1/3) of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

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
    """Return the step h of a difference along a direction; the same one whenever it is asked for.

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
    moves keeps the largest step, and so does one that grows in proportion from J = 0. Cost: a
    forward and a backward pass at θ, and two of each for a trial, at most four trials.
    """
    function = evaluation.problem.function
    if function.device.type == "meta":
        return 1.0
    wanted = float(torch.finfo(function.dtype).eps ** (1 / 3))
    step = wanted * (_norm(function.parameters) or 1.0) / direction.norm
    chunk = next(c for c in evaluation.chunks(chunk_size) if evaluation.count_entries(c))
    cotangent = _draw(evaluation, evaluation.count_entries(chunk))
    here = _pulled(evaluation, chunk, function.parameters, cotangent)
    for _ in range(_TRIALS):
        plus, minus = (
            _pulled(evaluation, chunk, _displaced(evaluation, direction, sign * step), cotangent)
            for sign in (1.0, -1.0)
        )
        change = 0.5 * _norm(a - b for a, b in zip(plus, minus, strict=True))
        bend = _norm(0.5 * (a + b) - c for a, b, c in zip(plus, minus, here, strict=True))
        factor = _shortening(_norm(here), change, bend, wanted)
        if factor == 1.0:
            break
        step *= factor
    return step


def _shortening(here: float, change: float, bend: float, wanted: float) -> float:
    """Return the factor to the next step, 1.0 where this one will do.

    ``here`` is the size of Jᵀu, ``change`` half the distance of the two ends, and ``bend`` the
    distance of their mean from the middle.
    """
    if not math.isfinite(change):
        return wanted
    if not change > _TOO_FAR * wanted * here:
        return 1.0
    if here > wanted * change:
        return wanted * here / change
    # J all but vanishes here and is no measure of its change: that has to be in proportion to h.
    return wanted if bend > wanted * change else 1.0


def _draw(evaluation: Evaluation, n: int) -> Tensor:
    # From a generator of its own, so that a step does not depend on what was drawn before.
    function = evaluation.problem.function
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return cast(numbers, function.device, function.dtype)


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
    plain = PullBack(evaluation.vector_function(chunk), parameters)
    with function.guard():
        if not plain.output.requires_grad:
            return tuple(torch.zeros_like(p) for p in parameters)
        # A backward pass may read the model anew, as under checkpointing: at its own point.
        point = tuple(p.detach().requires_grad_() for p in parameters)
        pulled: Parameters = function.installed(point, partial(plain.pull, cotangent))
    return pulled


def _norm(tensors: Iterable[Tensor]) -> float:
    square = sum(float(widen(t).square().sum()) for t in tensors)
    return float(square**0.5)
