"""Whether a model is differentiated twice correctly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectralshell.operators.jacobian_rate import FORMS
from spectralshell.operators.kernel_problem import Chunk, Evaluation
from spectralshell.operators.ladder import DifferentiationError, first_line, is_out_of_memory
from spectralshell.operators.linearizations import (
    Linearization,
    Parameters,
    PullBack,
    VectorFunction,
)
from spectralshell.operators.model_function import widen
from spectralshell.operators.model_guard import quiet_differentiation

_ROUNDINGS = 100.0
"""Rates below this many roundings of what they are rates of are nothing but rounding."""

_STEPS = (1e-5, 1e-6, 1e-7)
"""Displacements over the norm of the parameters: error 1e-10 of smooth models, 1e-9 of the last."""

_DIFFERENCE_TOLERANCE = 1e-6
_FEW = 4


@dataclass(frozen=True)
class PlainReference:
    """⟨Jᵀu, Jᵀv⟩ of random u and v, and its gradient by plain reverse mode twice.

    The gradient's product with any direction is ⟨u, (dM/dt) v⟩ along it: one reference serves all.

    Attributes
    ----------
    u, v : Tensor, shape (n,)
    pulled_u, pulled_v, gradient : tuple of Tensor
        In the shapes of the parameters.
    """

    u: Tensor
    v: Tensor
    pulled_u: Parameters
    pulled_v: Parameters
    gradient: Parameters

    def defect(self, rate: Linearization, tangents: Parameters) -> float:
        """Return the relative difference from ⟨J̇ᵀu, Jᵀv⟩ + ⟨Jᵀu, J̇ᵀv⟩; 0 without values."""
        rate_u, rate_v = rate.pull(self.u), rate.pull(self.v)
        if self.u.is_meta:
            return 0.0
        found = _inner(rate_u, self.pulled_v) + _inner(self.pulled_u, rate_v)
        size_u, size_v = _norm(self.pulled_u), _norm(self.pulled_v)
        scale = _norm(rate_u) * size_v + size_u * _norm(rate_v)
        rounding = _ROUNDINGS * torch.finfo(self.u.dtype).eps * size_u * size_v * _norm(tangents)
        defect = abs(found - _inner(self.gradient, tangents))
        if not defect < float("inf"):
            return float("inf")
        return max(defect - rounding, 0.0) / scale if scale > 0.0 else float(defect > rounding)


def take_reference(
    function: VectorFunction, parameters: Parameters, draw: Callable[[int], Tensor]
) -> PlainReference:
    """Differentiate ⟨Jᵀu, Jᵀv⟩ of random u and v by the parameters, in reverse mode twice."""
    leaves = tuple(p.detach().requires_grad_() for p in parameters)
    with torch.enable_grad(), quiet_differentiation():
        output = function(*leaves)
        u, v = draw(output.numel()), draw(output.numel())
        pulled = [
            torch.autograd.grad(
                output, leaves, w, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for w in (u, v)
        ]
        form = torch.stack([(a * b).sum() for a, b in zip(*pulled, strict=True)]).sum()
        gradient = tuple(torch.zeros_like(p) for p in leaves)
        if form.requires_grad:
            gradient = torch.autograd.grad(form, leaves, allow_unused=True, materialize_grads=True)
    pulled_u, pulled_v = (tuple(part.detach() for part in parts) for parts in pulled)
    return PlainReference(u, v, pulled_u, pulled_v, gradient)


def working_forms(evaluation: Evaluation) -> dict[str, str]:
    """Return, for each form of the second derivative, what is wrong with it: "" if nothing.

    Compared on a few samples in float64 with the difference of first derivatives, since torch's
    own second derivatives are wrong for some operations, however they are taken. A model that does
    not run in float64 is not compared. To be called inside the model's guard.
    """
    problem = evaluation.problem
    function = problem.function.in_double()
    if function.device.type == "meta":
        return dict.fromkeys(FORMS, "")
    chunk = _few_samples(evaluation)
    vector = evaluation.vector_function(chunk, function)
    try:
        vector(*function.parameters)
    except Exception as error:  # whatever a model raises that fixes its dtype, or its batch
        if is_out_of_memory(error):
            raise
        return dict.fromkeys(FORMS, "")

    def install(point: Parameters, thunk: Callable[[], Any]) -> Any:
        return function.installed(tuple(p.detach().requires_grad_() for p in point), thunk)

    return compare_forms(vector, function.parameters, function.names, problem.draw, install)


def compare_forms(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
    install: Callable[[Parameters, Callable[[], Any]], Any] = lambda point, thunk: thunk(),
) -> dict[str, str]:
    """Return what is wrong with each form for a function in float64 at a point.

    J̇ᵀu is compared with the central difference of Jᵀu, along a random direction. The smaller steps
    are for functions with kinks, one of which may lie between two points. ``install(point, thunk)``
    runs a thunk while the model, if there is one, is at a point: a backward pass may read it.
    """
    tangents = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    relative = (_norm(parameters) or 1.0) / _norm(tangents)
    cotangent = draw(function(*parameters).numel()).double()
    expected = [
        _differenced(function, parameters, tangents, cotangent, step * relative, install)
        for step in _STEPS
    ]
    found: dict[str, str] = {}
    for name, form in FORMS.items():
        try:
            recorded = form(function, parameters, tangents, names=names, draw=draw)
            rate = install(parameters, partial(recorded.pull, cotangent))
        except Exception as error:  # any failure inside torch speaks against the form
            if is_out_of_memory(error):
                raise
            found[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        defect = min(_relative(rate, difference, noise) for difference, noise in expected)
        right = defect <= _DIFFERENCE_TOLERANCE
        found[name] = "" if right else f"it differs from a difference by {defect:.1e}"
    return found


def require_second_derivatives(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
) -> None:
    """Raise DifferentiationError if no form works for a function at a point, of any dtype."""
    wide = tuple(p.double() for p in parameters)
    found = compare_forms(function, wide, names, draw)
    if all(found.values()):
        raise DifferentiationError("; ".join(found.values()))


def _few_samples(evaluation: Evaluation) -> Chunk:
    for stop in range(_FEW, evaluation.problem.n_samples, _FEW):
        chunk = evaluation.take(0, stop)
        if evaluation.count_entries(chunk):
            return chunk
    return evaluation.take(0, evaluation.problem.n_samples)


def _differenced(
    function: VectorFunction,
    parameters: Parameters,
    tangents: Parameters,
    cotangent: Tensor,
    step: float,
    install: Callable[[Parameters, Callable[[], Any]], Any],
) -> tuple[Parameters, float]:
    """Return the central difference of Jᵀu, and the norm of what may be its rounding."""
    ends = []
    for sign in (1.0, -1.0):
        point = tuple(p + sign * step * t for p, t in zip(parameters, tangents, strict=True))
        ends.append(install(point, partial(_pull, function, point, cotangent)))
    difference = tuple((a - b) / (2.0 * step) for a, b in zip(*ends, strict=True))
    rounding = _ROUNDINGS * torch.finfo(torch.float64).eps * _norm(ends[0]) / step
    return difference, rounding


def _pull(function: VectorFunction, point: Parameters, cotangent: Tensor) -> Parameters:
    plain = PullBack(function, point)
    if plain.output.requires_grad:
        return plain.pull(cotangent)
    return tuple(torch.zeros_like(p) for p in point)


def _relative(rate: Parameters, difference: Parameters, noise: float) -> float:
    apart = _norm(tuple(a - b for a, b in zip(rate, difference, strict=True)))
    size = _norm(difference)
    excess = max(apart - noise, 0.0)
    return excess / size if size > 0.0 else float(excess > 0.0)


def _inner(a: Parameters, b: Parameters) -> float:
    return float(sum(float((widen(x) * widen(y)).sum()) for x, y in zip(a, b, strict=True)))


def _norm(a: Parameters) -> float:
    return math.sqrt(_inner(a, a))
