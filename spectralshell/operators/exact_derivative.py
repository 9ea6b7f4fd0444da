"""dM/dt by differentiating twice: two linearisations, of f and of its rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectralshell.operators.jacobian_rate import ZeroRate
from spectralshell.operators.kernel_derivative import KernelDerivative, Layers
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.layer_labels import WHOLE, resolve_layers
from spectralshell.operators.linearizations import Parameters
from spectralshell.operators.model_function import widen
from spectralshell.operators.model_guard import full_precision

_NORM_STEPS = 3


class SharedPullBack:
    """JᵀU of the last block U, kept where it fits, since every direction needs it.

    Parameters
    ----------
    kernel : KernelOperator
    max_bytes : int
        Most memory of JᵀU.
    """

    def __init__(self, kernel: KernelOperator, max_bytes: int) -> None:
        self._kernel = kernel
        self._max_bytes = max_bytes
        self._block: Tensor | None = None
        self._pulled: Parameters = ()

    def cross(
        self, block: Tensor, rate: KernelOperator, label_of: Callable[[str], str]
    ) -> dict[str, Tensor]:
        """Return UᵀJ_l J̇_lᵀU for each label, float64 of shape (k, k).

        Cost: k products with J̇ᵀ, and k with Jᵀ unless they were kept; where they do not fit, k with
        J for each label instead.
        """
        names = self._kernel.parameter_names
        n_columns = block.shape[1]
        found = {label_of(name): block.new_zeros(n_columns, n_columns) for name in names}
        pulled = self._pull(block)
        for columns, tangents in rate.rmatmat(block):
            if pulled:
                with full_precision(self._kernel.device):
                    for name, left, right in zip(names, pulled, tangents, strict=True):
                        product = _rows(left) @ _rows(right).T
                        found[label_of(name)][:, columns] += widen(product)
                continue
            for label, total in found.items():
                mine = tuple(
                    tangent if label_of(name) == label else torch.zeros_like(tangent)
                    for name, tangent in zip(names, tangents, strict=True)
                )
                for offset, column in enumerate(range(columns.start, columns.stop)):
                    image = self._kernel.jvp([tangent[offset] for tangent in mine])
                    total[:, column] = block.T @ image
        return found

    def n_pulls(self, block: Tensor) -> int:
        """Return the products with J or Jᵀ that :meth:`cross` needs for a block."""
        return 0 if self._is_kept(block) else int(block.shape[1])

    def close(self) -> None:
        """Free what is kept."""
        self._block, self._pulled = None, ()

    def _is_kept(self, block: Tensor) -> bool:
        kept = self._block
        if kept is None or kept.shape != block.shape:
            return False
        return kept is block or (not kept.is_meta and bool(torch.equal(kept, block)))

    def _pull(self, block: Tensor) -> Parameters:
        if self._is_kept(block):
            return self._pulled
        self.close()
        kernel, n_columns = self._kernel, block.shape[1]
        if n_columns * kernel.n_parameters * kernel.dtype.itemsize > self._max_bytes:
            return ()
        pulled: Parameters = ()
        for columns, tangents in kernel.rmatmat(block):
            if not pulled:
                pulled = tuple(t.new_empty(n_columns, *t.shape[1:]) for t in tangents)
            for whole, part in zip(pulled, tangents, strict=True):
                whole[columns] = part
        self._block, self._pulled = block.clone(), pulled
        return pulled


class ExactDerivative(KernelDerivative):
    """dM/dt = J̇Jᵀ + JJ̇ᵀ with J̇ by differentiating t(θ) = J(θ) θ̇.

    Parameters
    ----------
    kernel : KernelOperator
        M, with J and Jᵀ.
    rate : KernelOperator
        J̇J̇ᵀ, with J̇ and J̇ᵀ.
    shared : SharedPullBack
        Of ``kernel``.
    measured : callable
        Gives ``kernel`` with its norm and noise.

    Attributes
    ----------
    form : str
        How J̇ is differentiated: ``"jvp"``, in reverse through forward mode, or ``"double-vjp"``, in
        reverse mode twice; ``"zero"`` where J is constant.
    """

    method = "exact"

    def __init__(
        self,
        kernel: KernelOperator,
        rate: KernelOperator,
        shared: SharedPullBack,
        measured: Callable[[], KernelOperator],
    ) -> None:
        super().__init__(kernel.n, kernel.residual_vector.device)
        self._kernel = kernel
        self._rate = rate
        self._shared = shared
        self._measured = measured
        self.form = rate.rung
        if all(isinstance(part.linearization, ZeroRate) for part in rate.parts):
            self.status = "frozen kernel"

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt."""
        halves = self._cross(self._identity(), resolve_layers(layers, self._kernel.parameter_names))
        return {label: half + half.T for label, half in halves.items()}

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""
        self.n_products += 2
        return self._rate.matvec(vector)

    def close(self) -> None:
        """Free the graph of this direction; products are errors afterwards."""
        self._rate.close()

    def _measure_noise(self) -> float:
        if self.status != "ok" or self._device.type == "meta":
            return 0.0
        # J and J̇ each lose about half of what M does, and each stands in both terms.
        kernel = self._measured()
        return 2.0 * kernel.noise * math.sqrt(kernel.norm * self._rate_norm())

    def _rate_norm(self) -> float:
        """Return ‖J̇J̇ᵀ‖, from below, by steps of the power method."""
        generator = torch.Generator().manual_seed(0)
        vector = self._checked(torch.randn(self.n, 1, generator=generator))[:, 0]
        norm = 0.0
        for _ in range(_NORM_STEPS):
            size = float(vector.norm())
            if not 0.0 < size < math.inf:
                break
            vector = self.rate_gram(vector / size)
            norm = max(norm, float(vector.norm()))
        return norm

    def _prefers_dense(self, n_columns: int) -> bool:
        return n_columns >= self.n

    def _multiply(self, block: Tensor) -> Tensor:
        kernel, rate = self._kernel, self._rate
        images = []
        for column in block.T:
            first = rate.jvp(kernel.rmatvec(column))
            images.append(first + kernel.jvp(rate.rmatvec(column)))
        self.n_products += 4 * len(images)
        return torch.stack(images, dim=1) if images else torch.zeros_like(block)

    def _compress(self, block: Tensor) -> Tensor:
        half = self._cross(block, resolve_layers(None, ()))[WHOLE]
        return half + half.T

    def _build_dense(self) -> Tensor:
        return self._compress(self._identity())

    def _cross(self, block: Tensor, label_of: Callable[[str], str]) -> dict[str, Tensor]:
        self.n_products += block.shape[1] + self._shared.n_pulls(block)
        return self._shared.cross(block, self._rate, label_of)


def _rows(stacked: Tensor) -> Tensor:
    return stacked.reshape(len(stacked), -1)
