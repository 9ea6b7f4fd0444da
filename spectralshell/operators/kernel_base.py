"""What both forms of the kernel share: how operands are checked, and how it is closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Kernel(ABC):
    """M = J Jᵀ of one snapshot, a context manager that frees what the products need."""

    n: int
    n_parameters: int
    residual: str
    rung: str
    dtype: torch.dtype

    @abstractmethod
    def close(self) -> None:
        """Free what the kernel holds beside its results."""

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
        return (
            f"{type(self).__name__}(n={self.n}, n_parameters={self.n_parameters}, "
            f"residual={self.residual!r}, rung={self.rung!r}, dtype={self.dtype})"
        )

    def _check_rows(self, tensor: Tensor, ndim: int) -> None:
        if tensor.ndim != ndim or tensor.shape[0] != self.n:
            expected = f"({self.n},)" if ndim == 1 else f"({self.n}, k)"
            raise ValueError(
                f"the operand has shape {tuple(tensor.shape)}, expected {expected}: one entry for "
                "each row and output of the residual."
            )
