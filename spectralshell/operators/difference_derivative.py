"""dM/dt by a central difference of two kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.exact_plan import ExactPlan
from spectralshell.operators.kernel_derivative import KernelDerivative, Layers
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.model_function import widen
from spectralshell.operators.survey import KernelSurvey

_SETUP_PRODUCTS = 8.0
"""What the test of the ladder costs before a first product."""


@dataclass(frozen=True)
class Points:
    """The two ends of a central difference.

    Attributes
    ----------
    displaced : callable
        Gives the survey of θ plus a multiple of the direction.
    build : callable
        Gives the matrix-free kernel of a survey.
    plan : ExactPlan or None
        How exact kernels are built; None where they do not fit.
    product_cost : float
        Predicted seconds of the reference machine for a matrix-free product.
    rounding : callable
        Gives the norm of the rounding error of M.
    """

    displaced: Callable[[float], KernelSurvey]
    build: Callable[[KernelSurvey], KernelOperator]
    plan: ExactPlan | None
    product_cost: float
    rounding: Callable[[], float]


class DifferenceDerivative(KernelDerivative):
    """dM/dt = (M(θ + hθ̇) − M(θ − hθ̇)) / 2h.

    Parameters
    ----------
    n : int
    device : torch.device
    points : Points
    step : float
        h.

    Attributes
    ----------
    status : str
        ``"frozen kernel"`` from when the two kernels were seen to be equal in every bit.
    """

    method = "difference"

    def __init__(self, n: int, device: torch.device, points: Points, step: float) -> None:
        super().__init__(n, device)
        self.step = step
        self._points = points
        self._operators: list[KernelOperator] = []

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt.

        Raises
        ------
        ValueError
            If exact kernels do not fit in memory.
        """
        if self._points.plan is None:
            raise ValueError(
                "max_memory: the exact kernels whose layers are compared do not fit; allow more, "
                "take fewer samples, or use method='exact'."
            )
        plus, minus = self._exact_kernels(layers)
        return {
            label: self._quotient(kernel, minus.layers[label])
            for label, kernel in plus.layers.items()
        }

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""
        plus, minus = self._kernels()
        pulled = zip(plus.rmatvec(vector), minus.rmatvec(vector), strict=True)
        tangents = [(a - b) / (2.0 * self.step) for a, b in pulled]
        self.n_products += 4
        return self._quotient(plus.jvp(tangents), minus.jvp(tangents))

    def close(self) -> None:
        """Free the graphs at the two points; they are recorded again when needed."""
        for operator in self._operators:
            operator.close()
        self._operators = []

    def _prefers_dense(self, n_columns: int) -> bool:
        points = self._points
        if points.plan is None:
            return False
        products = n_columns + (0.0 if self._operators else _SETUP_PRODUCTS)
        return points.plan.kernel_cost <= products * points.product_cost

    def _multiply(self, block: Tensor) -> Tensor:
        plus, minus = self._kernels()
        self.n_products += 4 * block.shape[1]
        return self._quotient(plus.matmat(block), minus.matmat(block))

    def _compress(self, block: Tensor) -> Tensor:
        product = self._multiply(block)
        if _is_zero(product):  # for this block: a random vector tells whether for all
            probe = torch.randn(self.n, 1, generator=torch.Generator().manual_seed(0))
            self._note_if_frozen(self._multiply(self._checked(probe)))
        half = block.T @ product
        return (half + half.T) / 2

    def _build_dense(self) -> Tensor:
        if self._points.plan is not None:
            plus, minus = self._exact_kernels(None)
            difference = self._quotient(plus.matrix, minus.matrix)
        else:
            operators = self._kernels()
            self.n_products += 4 * self.n
            difference = self._quotient(*(operator.to_dense() for operator in operators))
        self._note_if_frozen(difference)
        return (difference + difference.T) / 2

    def _measure_noise(self) -> float:
        # Two errors that know nothing of each other, over 2h.
        return self._points.rounding() / (math.sqrt(2.0) * self.step)

    def _note_if_frozen(self, product: Tensor) -> None:
        if _is_zero(product):
            self.status = "frozen kernel"

    def _kernels(self) -> list[KernelOperator]:
        if not self._operators:
            self._operators = [
                self._points.build(self._points.displaced(sign * self.step)) for sign in (1, -1)
            ]
        return self._operators

    def _exact_kernels(self, layers: Layers | None) -> list[ExactKernel]:
        plan = self._points.plan
        if plan is None:
            raise ValueError("max_memory: exact kernels do not fit.")
        kernels = []
        for sign in (1, -1):
            with self._points.displaced(sign * self.step).build_exact(plan, layers) as kernel:
                kernels.append(kernel)
                self.n_products += 2 * kernel.n_matvecs
        return kernels

    def _quotient(self, plus: Tensor, minus: Tensor) -> Tensor:
        return (widen(plus) - widen(minus)) / (2.0 * self.step)


def _is_zero(product: Tensor) -> bool:
    return not product.is_meta and product.numel() > 0 and not bool(product.any())
