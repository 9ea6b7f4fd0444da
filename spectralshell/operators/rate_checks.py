"""Whether a model is differentiated twice correctly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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

_STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Displacements over the norm of the parameters: error 1e-10 of smooth models, rounding 2e-7 in the
last. Of N gates with inputs of order 1, about 0.6 h N flip between two points."""

_NUDGE = 1e-3
"""Distance of another point to compare at, over the norm of the parameters."""

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


@dataclass(frozen=True)
class _Quotient:
    """The central difference of Jᵀu over two points and what lies between them.

    Attributes
    ----------
    plus, middle, minus : tuple of Tensor
        Jᵀu at the points.
    amount : float
        Of the step, in units of the direction.
    """

    plus: Parameters
    middle: Parameters
    minus: Parameters
    amount: float

    def defect(self, rate: Parameters) -> float:
        """Return the relative distance of a rate, less what may be rounding; NaN gives infinity."""
        ends = zip(rate, self.plus, self.minus, strict=True)
        return self._excess(_norm(r - (a - b) / (2.0 * self.amount) for r, a, b in ends))

    @property
    def is_smooth(self) -> bool:
        """Whether the second difference vanishes, as it does between kinks."""
        points = zip(self.plus, self.middle, self.minus, strict=True)
        bend = _norm((a + b - 2.0 * m) / self.amount for a, m, b in points)
        return self._excess(bend) <= _DIFFERENCE_TOLERANCE

    def _excess(self, distance: float) -> float:
        size = _norm(
            (a - b) / (2.0 * self.amount) for a, b in zip(self.plus, self.minus, strict=True)
        )
        eps = torch.finfo(torch.float64).eps
        excess = distance - _ROUNDINGS * eps * _norm(self.middle) / self.amount
        if not excess > 0.0:
            return 0.0 if math.isfinite(excess) else math.inf
        return excess / size if size > 0.0 else 1.0


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
    not run in float64 is not compared, nor one on a device that has none. To be called inside the
    model's guard.
    """
    problem = evaluation.problem
    if problem.function.device.type in ("meta", "mps"):  # without values, without float64
        return dict.fromkeys(FORMS, "")
    function = problem.function.in_double()
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

    J̇ᵀu is compared with the central difference of Jᵀu, along a random direction, over shorter and
    shorter steps. A form that agrees over one of them is right. Of a function with kinks, one of
    millions may lie between two points however close, and the difference is wrong: then the mean of
    its two ends is not the value between them either, and the step judges no form. Where that is so
    of all steps, as for a gate just at its kink, the forms are compared at another point near by.
    ``install(point, thunk)`` runs a thunk while the model, if there is one, is at a point: a
    backward pass may read it.
    """
    found, judged = _compare_at(function, parameters, names, draw, install)
    if judged:
        return found
    nudge = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    factor = _NUDGE * (_norm(parameters) or 1.0) / _norm(nudge)
    nearby = tuple(p + factor * n for p, n in zip(parameters, nudge, strict=True))
    try:
        again, judged = _compare_at(function, nearby, names, draw, install)
    except Exception as error:  # the model need not run there
        if is_out_of_memory(error):
            raise
        return found
    return again if judged else found


def _compare_at(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
    install: Callable[[Parameters, Callable[[], Any]], Any],
) -> tuple[dict[str, str], bool]:
    """Return what is wrong with each form at a point, and whether a step could tell."""
    tangents = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    relative = (_norm(parameters) or 1.0) / _norm(tangents)
    cotangent = draw(function(*parameters).numel()).double()
    found: dict[str, str] = {}
    rates: dict[str, Parameters] = {}
    for name, form in FORMS.items():
        try:
            pull = form(function, parameters, tangents, names=names, draw=draw).pull
            rates[name] = install(parameters, partial(pull, cotangent))
        except Exception as error:  # any failure inside torch speaks against the form
            if is_out_of_memory(error):
                raise
            found[name] = f"{type(error).__name__}: {first_line(error)}"
    if not rates:
        return found, True

    def pulled_at(amount: float) -> Parameters:
        point = tuple(p + amount * t for p, t in zip(parameters, tangents, strict=True))
        pulled: Parameters = install(point, partial(_pull, function, point, cotangent))
        return pulled

    middle, judged = pulled_at(0.0), False
    defects = dict.fromkeys(rates, math.inf)
    for step in _STEPS:
        amount = step * relative
        quotient = _Quotient(pulled_at(amount), middle, pulled_at(-amount), amount)
        for name, rate in rates.items():
            defects[name] = min(defects[name], quotient.defect(rate))
        judged = min(defects.values()) <= _DIFFERENCE_TOLERANCE or quotient.is_smooth
        if judged:
            break
    for name, defect in defects.items():
        right = defect <= _DIFFERENCE_TOLERANCE
        found[name] = "" if right else f"it differs from a difference by {defect:.1e}"
    return {name: found[name] for name in FORMS}, judged


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


def _pull(function: VectorFunction, point: Parameters, cotangent: Tensor) -> Parameters:
    plain = PullBack(function, point)
    if plain.output.requires_grad:
        return plain.pull(cotangent)
    return tuple(torch.zeros_like(p) for p in point)


def _inner(a: Parameters, b: Parameters) -> float:
    return float(sum(float((widen(x) * widen(y)).sum()) for x, y in zip(a, b, strict=True)))


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(widen(t).square().sum()) for t in tensors))
