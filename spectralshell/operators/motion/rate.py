"""The rate J̇ of the Jacobian along a direction, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from spectralshell.models.function import Parameters, widen
from spectralshell.models.guard import quiet_differentiation
from spectralshell.operators.jacobian.faults import name_offending_module
from spectralshell.operators.jacobian.ladder import (
    ACCEPTANCE_TOLERANCE,
    DifferentiationError,
    IndependenceError,
    climb,
    first_line,
    is_out_of_memory,
)
from spectralshell.operators.jacobian.linearizations import (
    RUNGS,
    STREAMED_RUNGS,
    DoubleReverse,
    Linearization,
    PullBack,
    VectorFunction,
)
from spectralshell.operators.kernel_operator import Jacobian, KernelOperator, Part
from spectralshell.operators.problem import Chunk, Evaluation

_REVERSE = "the transpose of reverse mode twice"
"""What stands for a rung where none multiplies by J̇ correctly."""

_ROUNDINGS = 100.0
"""Rates below this many roundings of what they are rates of are nothing but rounding."""

_STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Displacements over the norm of the parameters: error 1e-10 of smooth models, rounding 2e-7 in the
last. Of N gates with inputs of order 1, about 0.6 h N flip between two points."""

_NUDGE = 1e-3
"""Distance of another point to compare at, over the norm of the parameters."""

_DIFFERENCE_TOLERANCE = 1e-6

_FEW = 4


@dataclass
class PushRung:
    """The rung that multiplies by J̇, found by the first product and kept for the others.

    Attributes
    ----------
    candidates : sequence of str
        Rungs of the ladder, in the order in which they are tried.
    found : str
        Empty before the first product.
    """

    candidates: Sequence[str] = tuple(RUNGS)
    found: str = ""


class ForwardRate(Linearization):
    """J̇ and J̇ᵀ from t(θ) = J(θ) θ̇ by forward mode, recorded and pulled back.

    Parameters
    ----------
    function : callable
        What J differentiates.
    parameters, tangents : tuple of Tensor
        θ and θ̇.
    names, draw
        As for :func:`~spectralshell.operators.jacobian.ladder.climb`, which finds the
        push-forward at its first use.

    Attributes
    ----------
    rung : PushRung
        How it pushes forward; may be shared between rates of the same model.
    """

    name = "jvp"
    calls_model = True

    def __init__(
        self,
        function: VectorFunction,
        parameters: Parameters,
        tangents: Parameters,
        *,
        names: list[str],
        draw: Callable[[int], Tensor],
    ) -> None:
        def rate(*point: Tensor) -> Tensor:
            with quiet_differentiation():
                pushed: Tensor = jvp(function, point, tangents)[1]
            return pushed

        super().__init__(rate, parameters)
        self._names = names
        self._draw = draw
        self._reverse = ReverseRate(function, parameters, tangents, names=names, draw=draw)
        self._climbed: Linearization | None = None
        self.rung = PushRung()

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return J̇ᵀu, for u of shape (n,): zero where f is linear in θ."""
        if not self.output.requires_grad:
            return tuple(torch.zeros_like(p) for p in self.parameters)
        return super().pull(cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return J̇ᵀu for each row of a block (k, n)."""
        if not self.output.requires_grad:
            return tuple(p.new_zeros(len(cotangents), *p.shape) for p in self.parameters)
        return super().pull_block(cotangents)

    def push(self, tangents: Parameters) -> Tensor:
        """Return J̇ t, shape (n,)."""
        return self._climb().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J̇ t for each of k stacked tangents, shape (k, n)."""
        return self._climb().push_block(tangents)

    def _climb(self) -> Linearization:
        if self._climbed is None:
            self._climbed = self._find() if not self.rung.found else self._known()
        return self._climbed

    def _find(self) -> Linearization:
        try:
            step = climb(
                self.function,
                self.parameters,
                self._names,
                self._draw,
                rungs=self.rung.candidates,
            )
        except IndependenceError:  # of these samples, which tell nothing about others
            return self._reverse
        except DifferentiationError:
            self.rung.found = _REVERSE
            return self._reverse
        self.rung.found = step.rung
        return step.linearization

    def _known(self) -> Linearization:
        rung = RUNGS.get(self.rung.found)
        if rung is None or (rung is DoubleReverse and not self.output.requires_grad):
            return self._reverse
        return rung(self.function, self.parameters)


class ReverseRate(Linearization):
    """J̇ᵀu = ∇⟨Jᵀu, θ̇⟩ by reverse mode twice, and J̇ as its transpose.

    Slower than :class:`ForwardRate`, and never in need of a third derivative, which torch has
    not for some operations, and wrong for others: the mean and the scale inside a layer
    normalisation are constants to what differentiates its forward mode.

    The parameters are those of :class:`ForwardRate`.
    """

    name = "double-vjp"
    calls_model = True

    def __init__(
        self,
        function: VectorFunction,
        parameters: Parameters,
        tangents: Parameters,
        *,
        names: list[str],
        draw: Callable[[int], Tensor],
    ) -> None:
        super().__init__(function, parameters)
        self._tangents = tangents
        self._draw = draw
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


class StreamedRate(Linearization):
    """Either form without storage: graphs are recorded for one product and dropped.

    Parameters
    ----------
    make : callable
        Gives the rate of one product.
    rung : PushRung
        How the rates push forward, if they have a choice; shared by all chunks.
    """

    calls_model = True

    def __init__(self, make: Callable[[], ForwardRate | ReverseRate], rung: PushRung) -> None:
        self._make = make
        self._rung = rung
        fresh = self._fresh()
        super().__init__(fresh.function, fresh.parameters)
        self.name = f"{fresh.name} (streamed)"

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return J̇ᵀu, for u of shape (n,)."""
        return self._fresh().pull(cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return J̇ᵀu for each row of a block (k, n)."""
        return self._fresh().pull_block(cotangents)

    def push(self, tangents: Parameters) -> Tensor:
        """Return J̇ t, shape (n,)."""
        return self._fresh().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J̇ t for each of k stacked tangents, shape (k, n)."""
        return self._fresh().push_block(tangents)

    def _fresh(self) -> ForwardRate | ReverseRate:
        rate = self._make()
        if isinstance(rate, ForwardRate):
            rate.rung = self._rung
        return rate


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

    def installed(point: Parameters) -> AbstractContextManager[None]:
        return function.installed(tuple(p.detach().requires_grad_() for p in point))

    return compare_forms(vector, function.parameters, function.names, problem.draw, installed)


def compare_forms(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
    installed: Callable[[Parameters], AbstractContextManager[None]] = lambda point: nullcontext(),
) -> dict[str, str]:
    """Return what is wrong with each form for a function in float64 at a point.

    J̇ᵀu is compared with the central difference of Jᵀu, along a random direction, over shorter and
    shorter steps. A form that agrees over one of them is right. Of a function with kinks, one of
    millions may lie between two points however close, and the difference is wrong: then the mean of
    its two ends is not the value between them either, and the step judges no form. Where that is so
    of all steps, as for a gate just at its kink, the forms are compared at another point near by.
    ``installed(point)`` is the context in which the model, if there is one, is at a point: a
    backward pass may read it.
    """
    found, judged = _compare_at(function, parameters, names, draw, installed)
    if judged:
        return found
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
    """Return what is wrong with each form at a point, and whether a step could tell."""
    tangents = tuple(draw(p.numel()).double().reshape(p.shape) for p in parameters)
    relative = (_norm(parameters) or 1.0) / _norm(tangents)
    cotangent = draw(function(*parameters).numel()).double()
    found: dict[str, str] = {}
    rates: dict[str, Parameters] = {}
    for name, form in FORMS.items():
        try:
            pull = form(function, parameters, tangents, names=names, draw=draw).pull
            with installed(parameters):
                rates[name] = pull(cotangent)
        except Exception as error:  # any failure inside torch speaks against the form
            if is_out_of_memory(error):
                raise
            found[name] = f"{type(error).__name__}: {first_line(error)}"
    if not rates:
        return found, True

    def pulled_at(amount: float) -> Parameters:
        point = tuple(p + amount * t for p, t in zip(parameters, tangents, strict=True))
        with installed(point):
            return _pull(function, point, cotangent)

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
        What is wrong with each form, as :func:`~spectralshell.operators.motion.rate.working_forms`
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
    reads_model = kernel.jacobian.reads_model
    return KernelOperator(evaluation, Jacobian(problem.function, parts, reads_model=reads_model))


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
        if defect <= ACCEPTANCE_TOLERANCE[evaluation.problem.function.dtype]:
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
