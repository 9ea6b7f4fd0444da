"""The rate J̇ of the Jacobian along a direction, as a vector function that is linearised in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.kernel_problem import Evaluation
from spectralshell.operators.ladder import (
    GATE_TOLERANCE,
    DifferentiationError,
    IndependenceError,
    climb,
    first_line,
    is_out_of_memory,
)
from spectralshell.operators.linearizations import (
    Linearization,
    Parameters,
    PullBack,
    VectorFunction,
)
from spectralshell.operators.model_function import widen
from spectralshell.operators.model_guard import quiet_differentiation
from spectralshell.operators.module_faults import name_offending_module

_ROUNDINGS = 100.0
"""Rates below this many roundings of what they are rates of are nothing but rounding."""


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


class ForwardRate(Linearization):
    """J̇ and J̇ᵀ from t(θ) = J(θ) θ̇ by forward mode, recorded and pulled back.

    Parameters
    ----------
    function : callable
        What J differentiates.
    parameters, tangents : tuple of Tensor
        θ and θ̇.
    names, draw
        As for :func:`~spectralshell.operators.ladder.climb`, which finds the push-forward at its
        first use.
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
            try:
                step = climb(self.function, self.parameters, self._names, self._draw)
                self._climbed = step.linearization
            except (DifferentiationError, IndependenceError):
                self._climbed = self._reverse
        return self._climbed


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
    """Either form without storage: graphs are recorded for one product and dropped."""

    calls_model = True

    def __init__(self, make: Callable[[], ForwardRate | ReverseRate]) -> None:
        fresh = make()
        super().__init__(fresh.function, fresh.parameters)
        self.name = f"{fresh.name} (streamed)"
        self._make = make

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return J̇ᵀu, for u of shape (n,)."""
        return self._make().pull(cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return J̇ᵀu for each row of a block (k, n)."""
        return self._make().pull_block(cotangents)

    def push(self, tangents: Parameters) -> Tensor:
        """Return J̇ t, shape (n,)."""
        return self._make().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J̇ t for each of k stacked tangents, shape (k, n)."""
        return self._make().push_block(tangents)


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


def build_rate(
    evaluation: Evaluation,
    kernel: KernelOperator,
    tangents: Parameters,
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
    reference : PlainReference
        Of the first chunk with entries.

    Raises
    ------
    DifferentiationError
        If no way to differentiate twice agrees with plain reverse mode.
    """
    problem = evaluation.problem
    function = problem.function
    parts: list[Part] = []
    forms = tuple(FORMS)
    first = 0
    for chunk in evaluation.chunks():
        n_entries = evaluation.count_entries(chunk)
        if n_entries == 0:
            continue
        vector = evaluation.vector_function(chunk)
        refused: dict[str, str] = {}
        for form in forms:
            try:
                rate = _record(evaluation, vector, form, tangents)
                defect = 0.0 if parts else reference.defect(rate, tangents)
            except Exception as error:  # any failure inside torch sends us to the next form
                if is_out_of_memory(error):
                    raise
                refused[form] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if defect <= GATE_TOLERANCE[function.dtype]:
                forms = (form,)  # the first chunk chooses for all: they run the same operations
                break
            refused[form] = f"its products are wrong (relative defect {defect:.1e})"
        else:
            raise _failure(evaluation, chunk.inputs, refused)
        # Known to be linear so far; a pull-back tells, where a graph only might depend on θ.
        if all(isinstance(part.linearization, ZeroRate) for part in parts) and _vanishes(
            rate, problem.draw(n_entries)
        ):
            rate = ZeroRate(n_entries, vector, function.parameters)
        parts.append(Part(slice(first, first + n_entries), rate))
        first += n_entries
    operator = KernelOperator(
        function,
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


def _record(
    evaluation: Evaluation, vector: VectorFunction, form: str, tangents: Parameters
) -> Linearization:
    problem = evaluation.problem
    parameters = problem.function.parameters

    def make() -> ForwardRate | ReverseRate:
        return FORMS[form](
            vector, parameters, tangents, names=problem.function.names, draw=problem.draw
        )

    return make() if evaluation.chunk_size is None else StreamedRate(make)


def _vanishes(rate: Linearization, cotangent: Tensor) -> bool:
    return not cotangent.is_meta and not any(bool(part.any()) for part in rate.pull(cotangent))


def _failure(
    evaluation: Evaluation, inputs: object, refused: dict[str, str]
) -> DifferentiationError:
    problem = evaluation.problem
    where = name_offending_module(problem.function, inputs, problem.draw)
    listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return DifferentiationError(
        f"model: no way to differentiate it twice is correct; the fault starts in {where}. Use "
        f"method='difference'. Tried {listed}"
    )


FORMS: dict[str, type[ForwardRate] | type[ReverseRate]] = {
    rate.name: rate for rate in (ForwardRate, ReverseRate)
}
"""Ways to differentiate twice, cheapest first."""


def _inner(a: Parameters, b: Parameters) -> float:
    return float(sum(float((widen(x) * widen(y)).sum()) for x, y in zip(a, b, strict=True)))


def _norm(a: Parameters) -> float:
    return math.sqrt(_inner(a, a))
