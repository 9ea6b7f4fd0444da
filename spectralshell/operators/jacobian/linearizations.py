"""Products with a Jacobian and its transpose: the rungs of the ladder.

All share the pull-back u ↦ Jᵀu, which replays one recorded backward graph, and differ in the
push-forward t ↦ J t. Blocks have their columns along the first dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from spectralshell.models.function import Parameters, widen
from spectralshell.models.guard import quiet_differentiation
from spectralshell.operators.jacobian.tapes import Tape

VectorFunction = Callable[..., Tensor]


class IndependenceError(ValueError):
    """The residual does not depend on the parameters."""


class PullBack:
    """Jᵀ at a point along a recorded graph, by plain reverse mode: rungs are tested against it."""

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        self.function = function
        self.parameters = parameters
        self.leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
        self._output: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """The vector, with the graph that leads to it; recorded at first use."""
        if self._output is None:
            with torch.enable_grad():
                self._output = self.function(*self.leaves)
        return self._output

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return Jᵀu for u of shape (n,): zero where the vector depends on no parameter."""
        if not self.output.requires_grad:
            return tuple(torch.zeros_like(p) for p in self.parameters)
        return self._grad(self.output, self.leaves, cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return Jᵀu for each row u of a block (k, n), stacked along the first dimension."""
        if not self.output.requires_grad:
            return tuple(p.new_zeros(len(cotangents), *p.shape) for p in self.parameters)
        return self._grad(self.output, self.leaves, cotangents, batched=True)

    @staticmethod
    def _grad(
        output: Any, inputs: Sequence[Tensor], cotangent: Any, *, batched: bool = False
    ) -> Parameters:
        with quiet_differentiation():
            found = torch.autograd.grad(
                output,
                inputs,
                cotangent,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        if all(part is not None for part in found):
            return found
        # torch would fill in zeros of one input for a block of cotangents.
        first = cotangent if isinstance(cotangent, Tensor) else cotangent[0]
        block = (first.shape[0],) if batched else ()
        return tuple(
            part if part is not None else point.new_zeros(block + point.shape)
            for part, point in zip(found, inputs, strict=True)
        )


class Linearization(PullBack, ABC):
    """Pull-back and push-forward: a rung of the ladder."""

    name: str
    calls_model = False
    """Whether a product evaluates the model anew, so that it has to be guarded."""

    @abstractmethod
    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        block: Tensor = vmap(lambda *t: self.push(t))(*tangents)
        return block


Rung = Callable[[VectorFunction, Parameters], Linearization]


class LinearizedForward(Linearization):
    """Rung 1: forward mode once, on tape; a push-forward replays what depends on the tangent.

    It takes one jvp to make, where ``torch.func.linearize`` takes seconds to trace.
    """

    name = "linearize"

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        super().__init__(function, parameters)

        def compute(*tangents: Tensor) -> Tensor:
            pushed: Tensor = jvp(function, parameters, tangents)[1]
            return pushed

        with quiet_differentiation():
            self._tape = Tape(compute, tuple(torch.ones_like(p) for p in parameters))

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._tape(*tangents)


class DoubleReverse(Linearization):
    """Rung 2: Jᵀu is linear in u, and J t is its transpose, by a second stored backward pass."""

    name = "double-vjp"

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        super().__init__(function, parameters)
        self._transposed: tuple[Tensor, tuple[Tensor, ...], list[int]] | None = None

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._push(tangents, batched=False)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        return self._push(tangents, batched=True)

    def _push(self, tangents: Parameters, *, batched: bool) -> Tensor:
        if self._transposed is None:
            self._transposed = self._record_transpose()
        dummy, pulled, active = self._transposed
        chosen = tuple(tangents[index] for index in active)
        return self._grad(pulled, (dummy,), chosen, batched=batched)[0]

    def _record_transpose(self) -> tuple[Tensor, tuple[Tensor, ...], list[int]]:
        with torch.enable_grad():
            dummy = torch.zeros_like(self.output).requires_grad_()
            pulled = torch.autograd.grad(
                self.output, self.leaves, dummy, create_graph=True, allow_unused=True
            )
        # Parameters that the output does not use have no gradient, and add nothing to J t.
        active = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        return dummy, tuple(pulled[index] for index in active), active


class ForwardMode(Linearization):
    """Rung 3: dual numbers through the model, one evaluation per product."""

    name = "jvp"
    calls_model = True

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        with quiet_differentiation():
            pushed: Tensor = jvp(self.function, self.parameters, tangents)[1]
        return pushed


class Streamed(Linearization):
    """Any rung without storage: graphs are recorded for one product and dropped.

    Used for chunks, whose graphs together would not fit in memory.
    """

    calls_model = True

    def __init__(
        self, name: str, rung: Rung, function: VectorFunction, parameters: Parameters
    ) -> None:
        super().__init__(function, parameters)
        self._rung = rung
        self.name = f"{name} (streamed)"

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return Jᵀu for u of shape (n,)."""
        return self._fresh().pull(cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return Jᵀu for each row of a block (k, n)."""
        return self._fresh().pull_block(cotangents)

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._fresh().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        return self._fresh().push_block(tangents)

    def _fresh(self) -> Linearization:
        return self._rung(self.function, self.parameters)


RUNGS: dict[str, type[Linearization]] = {
    rung.name: rung for rung in (LinearizedForward, DoubleReverse, ForwardMode)
}
"""The ladder, cheapest product first."""

STREAMED_RUNGS = ("jvp", "double-vjp")
"""Order for chunks: tracing a tangent map anew for each product would cost more than it saves."""


def record(
    name: str, rung: Rung, function: VectorFunction, parameters: Parameters, *, streamed: bool
) -> Linearization:
    """Return a rung at a point; streamed, it records anew for each product."""
    return Streamed(name, rung, function, parameters) if streamed else rung(function, parameters)


def check_depends(output: Tensor) -> None:
    """Raise ValueError if a vector does not depend on any parameter."""
    if not output.requires_grad:
        raise IndependenceError(
            "the residual does not depend on the selected parameters: the model's forward detaches "
            "its outputs or runs under no_grad, or `parameters=` selects unused ones."
        )


def check_finite_gradient(names: list[str], gradient: Parameters) -> None:
    """Raise ValueError naming the first parameter whose derivative is NaN or infinite."""
    for name, part in zip(names, gradient, strict=True):
        if not part.is_meta and not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"model: the derivative with respect to {name!r} is NaN or infinite although the "
                "outputs are finite, for example from a root or a norm at 0; change the data or "
                "the model there."
            )


def added(total: Parameters, more: Parameters) -> Parameters:
    """Return the sum of two tangents; nothing yet counts as zero."""
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else tuple(more)


def inner(a: Parameters, b: Parameters) -> float:
    """Return the inner product of two tangents, in float64."""
    terms = [(widen(x) * widen(y)).sum() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(terms).sum())
