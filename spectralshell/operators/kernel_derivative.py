"""dM/dt, the rate of the kernel along a direction, as something that multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from spectralshell.operators.layer_labels import resolve_layers

Layers = str | Mapping[str, str] | Callable[[str], str]


class KernelDerivative(ABC):
    """dM/dt = J̇Jᵀ + JJ̇ᵀ along a direction, symmetric and in general indefinite.

    Made by :meth:`KernelMotion.derivative` or :func:`build_kernel_derivative`. J̇ is the Jacobian of
    t(θ) = J(θ) θ̇ with θ̇ held fixed.

    Attributes
    ----------
    n : int
        Entries of the residual: the dimension of M.
    method : str
        ``"exact"`` or ``"difference"``.
    step : float
        h of the central difference, in units of the direction; 0.0 for the exact one.
    n_products : int
        Products with J, Jᵀ, J̇ or J̇ᵀ so far, one for each column; none for what exact kernels gave.
    status : str
        ``"ok"``, ``"zero direction"``, ``"frozen kernel"`` (J does not depend on the parameters
        along the direction; a difference finds out with its first matrix or compression), or what
        else to know.
    """

    method: str

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.step = 0.0
        self.n_products = 0
        self.status = "ok"
        self._device = device
        self._dense: Tensor | None = None

    @cached_property
    def noise(self) -> float:
        """2-norm of the rounding error of dM/dt, in its own units; 0.0 on the meta device.

        No entry of Uᵀ (dM/dt) U with orthonormal U, and no column's norm, is wrong by more. With η
        the noise of M, as of :class:`KernelOperator`, it is η ‖M‖ / (√2 h) for a difference, the
        error of two independent kernels over 2h, and 2 η ‖J‖ ‖J̇‖ for the exact derivative. What a
        difference leaves out in h², and the gates that an exact derivative misses, are not in it.

        Notes
        -----
        An estimate: it may be too large by a few times. Cost: once for all directions of a motion,
        at the first reading, about nine products of M, three more in float64 for float32, and five
        where no exact derivative was made before; of an exact derivative also six products with J̇
        or J̇ᵀ.
        """
        return self._measure_noise()

    def matvec(self, vector: Tensor) -> Tensor:
        """Return (dM/dt) v in float64, shape (n,), for v of shape (n,)."""
        if vector.ndim != 1:
            raise ValueError(f"the operand has shape {tuple(vector.shape)}, expected ({self.n},).")
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        """Return (dM/dt) V in float64, shape (n, k), for V of shape (n, k)."""
        block = self._checked(block)
        if self._dense is None and self._prefers_dense(block.shape[1]):
            self.to_dense()
        if self._dense is not None:
            return self._dense @ block
        return self._multiply(block)

    def compress(self, block: Tensor) -> Tensor:
        """Return V = Uᵀ (dM/dt) U in float64, shape (k, k), for U of shape (n, k).

        Symmetric to the last bit. U need not be orthonormal.
        """
        block = self._checked(block)
        if self._dense is None and self._prefers_dense(block.shape[1]):
            self.to_dense()
        if self._dense is None:
            return self._compress(block)
        half = block.T @ (self._dense @ block)
        return (half + half.T) / 2

    def to_dense(self) -> Tensor:
        """Return dM/dt as a float64 tensor of shape (n, n); computed once."""
        if self._dense is None:
            self._dense = self._build_dense()
        return self._dense.clone()

    @abstractmethod
    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt.

        Parameters
        ----------
        layers : {"module", "parameter"}, mapping or callable
            As for :func:`build_exact_kernel`.
        """

    @abstractmethod
    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""

    def close(self) -> None:  # noqa: B027  zero holds nothing to free
        """Free what the products need; the dense form stays if it was computed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n}, method={self.method!r}, status={self.status!r})"

    @abstractmethod
    def _measure_noise(self) -> float: ...

    @abstractmethod
    def _prefers_dense(self, n_columns: int) -> bool:
        """Tell whether the dense form is cheaper than products with some columns."""

    @abstractmethod
    def _multiply(self, block: Tensor) -> Tensor: ...

    @abstractmethod
    def _compress(self, block: Tensor) -> Tensor: ...

    @abstractmethod
    def _build_dense(self) -> Tensor: ...

    def _identity(self) -> Tensor:
        return torch.eye(self.n, dtype=torch.float64, device=self._device)

    def _checked(self, block: Tensor) -> Tensor:
        if block.ndim != 2 or block.shape[0] != self.n:
            raise ValueError(
                f"the operand has shape {tuple(block.shape)}, expected ({self.n}, k): one entry "
                "for each row and output of the residual."
            )
        return block.detach().to(self._device, torch.float64)


class ZeroDerivative(KernelDerivative):
    """dM/dt along a direction that is zero."""

    def __init__(
        self, n: int, device: torch.device, method: str, parameter_names: Sequence[str]
    ) -> None:
        super().__init__(n, device)
        self.method = method
        self.status = "zero direction"
        self._names = parameter_names

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return zeros for each label."""
        label_of = resolve_layers(layers, self._names)
        return {label_of(name): self._build_dense() for name in self._names}

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return zeros of shape (n,)."""
        return self._checked(vector[:, None])[:, 0] * 0.0

    def _measure_noise(self) -> float:
        return 0.0

    def _prefers_dense(self, n_columns: int) -> bool:
        return False

    def _multiply(self, block: Tensor) -> Tensor:
        return torch.zeros_like(block)

    def _compress(self, block: Tensor) -> Tensor:
        return block.new_zeros(block.shape[1], block.shape[1])

    def _build_dense(self) -> Tensor:
        return torch.zeros_like(self._identity())
