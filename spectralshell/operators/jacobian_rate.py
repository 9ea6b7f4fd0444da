"""The rate J̇ of the Jacobian along a direction, to be multiplied by from both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from spectralshell.operators.ladder import DifferentiationError, IndependenceError, climb
from spectralshell.operators.linearizations import (
    RUNGS,
    DoubleReverse,
    Linearization,
    Parameters,
    PullBack,
    VectorFunction,
)
from spectralshell.operators.model_guard import quiet_differentiation

_REVERSE = "the transpose of reverse mode twice"
"""What stands for a rung where none multiplies by J̇ correctly."""


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
        As for :func:`~spectralshell.operators.ladder.climb`, which finds the push-forward at its
        first use.

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
