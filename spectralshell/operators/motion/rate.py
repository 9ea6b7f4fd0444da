"""The rate J̇ of the Jacobian along a direction, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import jvp

from spectralshell.models.function import Parameters, widen
from spectralshell.models.guard import quiet_differentiation
from spectralshell.operators.jacobian.faults import name_offending_module
from spectralshell.operators.jacobian.ladder import (
    ACCEPTANCE_TOLERANCE,
    Climb,
    DifferentiationError,
    climb,
    first_line,
    is_out_of_memory,
    take_first,
)
from spectralshell.operators.jacobian.linearizations import (
    RUNGS,
    STREAMED_RUNGS,
    DoubleReverse,
    IndependenceError,
    Linearization,
    PullBack,
    VectorFunction,
    inner,
    record,
)
from spectralshell.operators.kernel_operator import Jacobian, KernelOperator, Part
from spectralshell.operators.problem import Chunk, Evaluation

_ROUNDINGS = 100.0
"""Rates below this many roundings of what they are rates of are nothing but rounding."""

_STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Displacements over the norm of the parameters: error 1e-10 of smooth models, rounding 2e-7 in the
last. Of N gates with inputs of order 1, about 0.6 h N flip between two points."""

_NUDGE = 1e-3
"""Distance of another point to compare at, over the norm of the parameters."""

_DIFFERENCE_TOLERANCE = 1e-6
"""Largest relative difference of J̇ᵀu from a central difference."""

_FEW = 4
"""Samples that the forms are compared on."""

_REVERSE = "the transpose of reverse mode twice"
"""What stands for a rung where none multiplies by J̇ correctly."""


def build_rate(
    evaluation: Evaluation,
    kernel: KernelOperator,
    tangents: Parameters,
    *,
    refused: Mapping[str, str],
    reference: PlainReference,
) -> KernelOperator:
    """Return J̇ along a direction, as the operator J̇J̇ᵀ with its two factors; ``kernel`` is M.

    To be called inside the model's guard; ``refused`` are forms known to be wrong, and why.
    """
    problem, streamed = evaluation.problem, evaluation.chunk_size is not None
    function = problem.function
    push_rung = PushRung(function.names, problem.draw, STREAMED_RUNGS if streamed else tuple(RUNGS))
    forms = {
        name: partial(form, tangents=tangents, push_rung=push_rung) for name, form in FORMS.items()
    }
    parts: list[Part] = []
    chosen = ""
    for entries, chunk in evaluation.chunks_with_entries():
        n_entries = entries.stop - entries.start
        vector = evaluation.vector_function(chunk)
        rates = {
            name: partial(record, name, form, vector, function.parameters, streamed=streamed)
            for name, form in forms.items()
        }
        if parts:  # the first chunk chose for all: they run the same operations
            rate = rates[chosen]()
        else:
            defect_of = partial(reference.defect, tangents=tangents)
            found = _choose(evaluation, chunk, rates, refused, defect_of)
            chosen, rate = found.rung, found.linearization
        # Known to be linear so far; a pull-back tells, where a graph only might depend on θ.
        if all(isinstance(part.linearization, ZeroRate) for part in parts) and _vanishes(
            rate, problem.draw(n_entries)
        ):
            rate = ZeroRate(n_entries, vector, function.parameters)
        parts.append(Part(entries, rate))
    reads_model = kernel.jacobian.reads_model
    return KernelOperator(evaluation, Jacobian(function, parts, reads_model=reads_model))


def _choose(
    evaluation: Evaluation,
    chunk: Chunk,
    rates: Mapping[str, Callable[[], Linearization]],
    refused: Mapping[str, str],
    defect_of: Callable[[Linearization], float],
) -> Climb:
    """Return the first form that agrees with the reference, and the rate of the first chunk."""
    problem = evaluation.problem
    try:
        return take_first(
            rates, defect_of, ACCEPTANCE_TOLERANCE[problem.function.dtype], refused=refused
        )
    except DifferentiationError as failure:
        where = name_offending_module(
            problem.function, chunk.inputs, problem.draw, attempt=_require_second_derivatives
        )
        raise DifferentiationError(
            "model: no way to differentiate it twice is correct, as far as torch provides it; the "
            f"fault starts in {where}. derivative='difference' of an estimator (method= of a "
            f"motion) needs first derivatives only. Tried {failure}"
        ) from failure


def _require_second_derivatives(
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


def _vanishes(rate: Linearization, cotangent: Tensor) -> bool:
    return not cotangent.is_meta and not any(bool(part.any()) for part in rate.pull(cotangent))


class PushRung:
    """The rung that multiplies by J̇: found by the first product, kept for all rates of a model."""

    def __init__(
        self,
        names: list[str],
        draw: Callable[[int], Tensor],
        candidates: Sequence[str] = tuple(RUNGS),
    ) -> None:
        self._names = names
        self._draw = draw
        self._candidates = candidates
        self._found = ""

    def push_forward(self, rate: PullBack, otherwise: Linearization) -> Linearization:
        """Return what multiplies by the Jacobian of a rate; ``otherwise`` where no rung does."""
        if self._found:
            rung = RUNGS.get(self._found)
            if rung is None or (rung is DoubleReverse and not rate.output.requires_grad):
                return otherwise
            return rung(rate.function, rate.parameters)
        try:
            step = climb(
                rate.function, rate.parameters, self._names, self._draw, rungs=self._candidates
            )
        except IndependenceError:  # of these samples, which tell nothing about others
            return otherwise
        except DifferentiationError:
            self._found = _REVERSE
            return otherwise
        self._found = step.rung
        return step.linearization


class ForwardRate(Linearization):
    """J̇ and J̇ᵀ from t(θ) = J(θ) θ̇ by forward mode, recorded and pulled back."""

    name = "jvp"
    calls_model = True

    def __init__(
        self,
        function: VectorFunction,
        parameters: Parameters,
        tangents: Parameters,
        push_rung: PushRung,
    ) -> None:
        def rate(*point: Tensor) -> Tensor:
            with quiet_differentiation():
                pushed: Tensor = jvp(function, point, tangents)[1]
            return pushed

        super().__init__(rate, parameters)
        self._reverse = ReverseRate(function, parameters, tangents, push_rung)
        self._push_rung = push_rung
        self._pushed: Linearization | None = None

    def push(self, tangents: Parameters) -> Tensor:
        """Return J̇ t, shape (n,)."""
        return self._push_forward().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J̇ t for each of k stacked tangents, shape (k, n)."""
        return self._push_forward().push_block(tangents)

    def _push_forward(self) -> Linearization:
        if self._pushed is None:
            self._pushed = self._push_rung.push_forward(self, self._reverse)
        return self._pushed


class ReverseRate(Linearization):
    """J̇ᵀu = ∇⟨Jᵀu, θ̇⟩ by reverse mode twice, and J̇ as its transpose: no third derivative.

    Slower, but right where torch's forward mode is not, as in layer normalisation.
    """

    name = "double-vjp"
    calls_model = True

    def __init__(
        self,
        function: VectorFunction,
        parameters: Parameters,
        tangents: Parameters,
        push_rung: PushRung,  # not needed: it pushes forward in its own way
    ) -> None:
        super().__init__(function, parameters)
        self._tangents = tangents
        self._transposed: tuple[Tensor, Parameters] | None = None

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return J̇ᵀu, for u of shape (n,)."""
        return tuple(part.detach() for part in self._differentiate(cotangent, keep=False))

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return J̇ᵀu for each row of a block (k, n), one by one."""
        singles = [self.pull(cotangent) for cotangent in cotangents]
        return tuple(map(torch.stack, zip(*singles, strict=True)))

    def push(self, tangents: Parameters) -> Tensor:
        """Return J̇ t, shape (n,)."""
        if self._transposed is None:
            dummy = torch.zeros_like(self.output).requires_grad_()
            self._transposed = dummy, self._differentiate(dummy, keep=True)
        return self._push(*self._transposed, tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J̇ t for each of k stacked tangents, shape (k, n), one by one."""
        return torch.stack([self.push(single) for single in zip(*tangents, strict=True)])

    def _differentiate(self, cotangent: Tensor, *, keep: bool) -> Parameters:
        with torch.enable_grad(), quiet_differentiation():
            pulled = torch.autograd.grad(
                self.output, self.leaves, cotangent, create_graph=True, allow_unused=True
            )
            terms = [
                (gradient * tangent).sum()
                for gradient, tangent in zip(pulled, self._tangents, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not terms:
                return tuple(torch.zeros_like(leaf) for leaf in self.leaves)
            return torch.autograd.grad(
                torch.stack(terms).sum(),
                self.leaves,
                retain_graph=True,
                create_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )

    @staticmethod
    def _push(dummy: Tensor, transposed: Parameters, tangents: Parameters) -> Tensor:
        active = [
            (part, tangent)
            for part, tangent in zip(transposed, tangents, strict=True)
            if part.requires_grad
        ]
        if not active:
            return torch.zeros_like(dummy).detach()
        outputs, weights = zip(*active, strict=True)
        return PullBack._grad(outputs, (dummy,), weights)[0]


class ZeroRate(Linearization):
    """J̇ = 0: the function is linear in the parameters."""

    name = "zero"

    def __init__(self, n: int, function: VectorFunction, parameters: Parameters) -> None:
        super().__init__(function, parameters)
        self._n = n

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return zeros in the shapes of the parameters."""
        return tuple(torch.zeros_like(p) for p in self.parameters)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return zeros, stacked."""
        return tuple(p.new_zeros(len(cotangents), *p.shape) for p in self.parameters)

    def push(self, tangents: Parameters) -> Tensor:
        """Return zeros of shape (n,)."""
        return tangents[0].new_zeros(self._n)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return zeros of shape (k, n)."""
        return tangents[0].new_zeros(tangents[0].shape[0], self._n)


FORMS: dict[str, type[ForwardRate] | type[ReverseRate]] = {
    rate.name: rate for rate in (ForwardRate, ReverseRate)
}
"""Ways to differentiate twice, cheapest first."""


@dataclass(frozen=True)
class PlainReference:
    """⟨Jᵀu, Jᵀv⟩ of random u and v on the first chunk, and its gradient by reverse mode twice.

    The gradient's product with any direction is ⟨u, (dM/dt) v⟩ along it: one reference serves all.
    """

    chunk_size: int | None
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
        found = inner(rate_u, self.pulled_v) + inner(self.pulled_u, rate_v)
        size_u, size_v = _norm(self.pulled_u), _norm(self.pulled_v)
        scale = _norm(rate_u) * size_v + size_u * _norm(rate_v)
        rounding = _ROUNDINGS * torch.finfo(self.u.dtype).eps * size_u * size_v * _norm(tangents)
        defect = abs(found - inner(self.gradient, tangents))
        if not defect < float("inf"):
            return float("inf")
        return max(defect - rounding, 0.0) / scale if scale > 0.0 else float(defect > rounding)


def take_reference(evaluation: Evaluation) -> PlainReference:
    """Differentiate ⟨Jᵀu, Jᵀv⟩ of random u and v by the parameters, in reverse mode twice."""
    draw = evaluation.problem.draw
    function = evaluation.vector_function(evaluation.chunks_with_entries()[0][1])
    leaves = tuple(p.detach().requires_grad_() for p in evaluation.problem.function.parameters)
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
    return PlainReference(evaluation.chunk_size, u, v, pulled_u, pulled_v, gradient)


def wrong_forms(evaluation: Evaluation) -> dict[str, str]:
    """Return the forms of the second derivative that are wrong on a few samples, and why.

    torch's own are wrong for some operations. To be called inside the model's guard.
    """
    problem = evaluation.problem
    if problem.function.device.type in ("meta", "mps"):  # without values, without float64
        return {}
    function = problem.function.in_double()
    chunk = _few_samples(evaluation)
    vector = evaluation.vector_function(chunk, function)
    try:
        vector(*function.parameters)
    except Exception as error:  # whatever a model raises that fixes its dtype, or its batch
        if is_out_of_memory(error):
            raise
        return {}

    def installed(point: Parameters) -> AbstractContextManager[None]:
        return function.installed(tuple(p.detach().requires_grad_() for p in point))

    found = compare_forms(vector, function.parameters, function.names, problem.draw, installed)
    return {name: why for name, why in found.items() if why}


def _few_samples(evaluation: Evaluation) -> Chunk:
    for stop in range(_FEW, evaluation.problem.n_samples, _FEW):
        chunk = evaluation.take(0, stop)
        if evaluation.count_entries(chunk):
            return chunk
    return evaluation.take(0, evaluation.problem.n_samples)


def compare_forms(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
    installed: Callable[[Parameters], AbstractContextManager[None]] = lambda point: nullcontext(),
) -> dict[str, str]:
    """Return what is wrong with each form, "" if nothing, for a function in float64 at a point.

    ``installed(point)`` is the context in which a backward pass reads the model there, if any.
    """
    found, judged = _compare_at(function, parameters, names, draw, installed)
    if judged:
        return found
    # As with a gate just at its kink: at another point near by, a step may tell.
    nudge = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    factor = _NUDGE * (_norm(parameters) or 1.0) / _norm(nudge)
    nearby = tuple(p + factor * n for p, n in zip(parameters, nudge, strict=True))
    try:
        again, judged = _compare_at(function, nearby, names, draw, installed)
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
    installed: Callable[[Parameters], AbstractContextManager[None]],
) -> tuple[dict[str, str], bool]:
    """Return what is wrong with each form at a point, and whether a step could tell.

    A form is right whose J̇ᵀu agrees with a difference of Jᵀu over one of ever shorter steps.
    """
    tangents = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    relative = (_norm(parameters) or 1.0) / _norm(tangents)
    cotangent = draw(function(*parameters).numel()).double()
    push_rung = PushRung(names, draw)
    found: dict[str, str] = {}
    rates: dict[str, Parameters] = {}
    for name, form in FORMS.items():
        try:
            recorded = form(function, parameters, tangents, push_rung)
            with installed(parameters):
                rates[name] = recorded.pull(cotangent)
        except Exception as error:  # any failure inside torch speaks against the form
            if is_out_of_memory(error):
                raise
            found[name] = f"{type(error).__name__}: {first_line(error)}"
    if not rates:
        return found, True

    def pulled_at(amount: float) -> Parameters:
        point = tuple(p + amount * t for p, t in zip(parameters, tangents, strict=True))
        with installed(point):
            return PullBack(function, point).pull(cotangent)

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


@dataclass(frozen=True)
class _Quotient:
    """The central difference of Jᵀu over two points, and Jᵀu between them."""

    plus: Parameters
    middle: Parameters
    minus: Parameters
    amount: float  # of the step, in units of the direction

    def defect(self, rate: Parameters) -> float:
        """Return the relative distance of a rate, less what may be rounding; NaN gives infinity."""
        ends = zip(rate, self.plus, self.minus, strict=True)
        return self._excess(_norm(r - (a - b) / (2.0 * self.amount) for r, a, b in ends))

    @property
    def is_smooth(self) -> bool:
        """Whether the second difference vanishes: between close points it does, but for a kink."""
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


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(widen(t).square().sum()) for t in tensors))
