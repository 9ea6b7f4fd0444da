"""The empirical neural tangent kernel M = J Jᵀ as something that multiplies vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from spectralshell.models.function import ModelFunction, Parameters, cast, widen
from spectralshell.models.guard import exclusive, full_precision
from spectralshell.operators.jacobian.ladder import blocks_agree, is_out_of_memory, pulls_agree
from spectralshell.operators.jacobian.linearizations import Linearization, added
from spectralshell.operators.problem import Evaluation
from spectralshell.statuses import join_statuses

_BLOCK_BYTES = 2**28
"""Parameter tangents that a block may hold."""

_BLOCK_FLOPS = 2**30
"""Operations of a block's forward passes. Below, calls dominate and columns together save them;
above, arithmetic does, and blocks only take memory that the system clears page by page: measured,
columns together are 1.2 times slower than one by one for a ResNet-18 and a GPT-NeoX."""

_MAX_BLOCK = 64

_NORM_PROBES = 5


class Kernel(ABC):
    """M = J Jᵀ of one snapshot, a context manager that frees what the products need."""

    def __init__(
        self,
        evaluation: Evaluation,
        *,
        rung: str,
        chunk_size: int | None,
        notes: Sequence[str] = (),
    ) -> None:
        problem, function = evaluation.problem, evaluation.problem.function
        self.residual_vector = evaluation.residual_vector
        self.n = int(evaluation.residual_vector.numel())
        self.n_rows = evaluation.targets.n_rows
        self.n_samples = problem.n_samples
        self.n_parameters = function.n_parameters
        self.parameter_names = tuple(function.names)
        self.residual = problem.residual.name
        self.dynamics_exact = problem.dynamics_exact
        self.jacobian_defect = problem.jacobian_defect
        self.rung = rung
        self.dtype = function.dtype
        self.device = function.device
        self.chunk_size = chunk_size
        self.forward_flops = evaluation.forward_flops
        self._notes = tuple(notes)

    @property
    def status(self) -> str:
        """``"ok"``, or what to know about the measurement."""
        return join_statuses(self._notes)

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


class KernelOperator(Kernel):
    """M = J Jᵀ of one snapshot, matrix-free; made by :func:`~spectralshell.operators.build_kernel`.

    Attributes
    ----------
    n : int
        Entries of the residual: the dimension of M.
    n_rows, n_samples, n_parameters : int
        N of the normalisation, samples of the batch, and differentiated scalars (tied ones once).
    residual_vector : Tensor of float64, shape (n,)
        e / √N, on the device (on the CPU where the device has no float64).
    rung : str
        How the model is differentiated.
    refused : dict of str to str
        Rungs tried before, and why they were refused.
    dtype : torch.dtype
        In which products are computed.
    noise : float
        Norm of the rounding error of a product, relative to ‖M‖. For float64 it covers the
        rounding of the products alone, not that of the model's outputs and activations.
    norm : float
        Estimate of ‖M‖, its largest eigenvalue, from below, by five steps of the power method,
        found when it is first read (five products); 0.0 on the meta device.
    least_norm : float
        The same by two steps, which cost nothing more.
    dynamics_exact : bool
        Whether de/dt = −M e along :meth:`velocity`.
    jacobian_defect : float
        By how much the outputs change otherwise than J says, relative to their change, where
        reverse mode is not their derivative (straight-through estimators, parts detached); M is
        then J Jᵀ all the same. 0.0 where no difference is certain.
    chunk_size : int or None
        Samples per chunk, where chunks are in use.
    forward_flops : float
        Operations of one evaluation of the model on the batch, for cost estimates.
    matrix_from : int or None
        Columns from which a block is multiplied with the matrix, as that takes fewer operations.
    n_matvecs, n_probes : int
        Products asked for so far, and products spent on checks.
    status : str
        ``"ok"``, or what to know about the measurement.

    Notes
    -----
    A product costs about three evaluations of the model; memory is that of one recorded backward
    graph (two on the rungs ``"linearize"`` and ``"double-vjp"``). The model is in its own state
    between calls; ``close`` frees the graphs.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        jacobian: Jacobian,
        *,
        least_norm: float = 0.0,
        find_norm: Callable[[], float] | None = None,
        noise: float = 0.0,
        refused: Mapping[str, str] | None = None,
        n_probes: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(
            evaluation, rung=jacobian.rung, chunk_size=evaluation.chunk_size, notes=notes
        )
        self._jacobian: Jacobian | None = jacobian
        self._residual = evaluation.problem.residual
        self._evaluation = evaluation
        self.least_norm = least_norm
        self._find_norm = find_norm
        self.noise = noise
        self.refused = dict(refused or {})
        self.n_matvecs = 0
        self.n_probes = n_probes
        self.blocks_work: bool | None = None
        self.pull_blocks_work: bool | None = None
        self.matrix_from: int | None = None
        self._build_matrix: Callable[[], Tensor] | None = None
        self._matrix: Tensor | None = None

    def with_matrix(self, matrix_from: int, build: Callable[[], Tensor]) -> Self:
        """Return this kernel with M as a matrix, built when needed, for blocks of some columns on.

        Parameters
        ----------
        matrix_from : int
            Columns from which a block is multiplied with the matrix.
        build : callable
            Gives M in ``dtype``.
        """
        other = copy(self)
        other.matrix_from, other._build_matrix, other._matrix = matrix_from, build, None
        return other

    @property
    def norm(self) -> float:
        """‖M‖ from below; of a closed kernel what was known."""
        if self._find_norm is not None:
            find, self._find_norm = self._find_norm, None
            self.least_norm = find()
            self.n_probes += _NORM_PROBES
        return self.least_norm

    @property
    def jacobian(self) -> Jacobian:
        """What the products are made of; an error when closed."""
        if self._jacobian is None:
            raise ValueError("this KernelOperator was closed; build it again.")
        return self._jacobian

    def matvec(self, vector: Tensor) -> Tensor:
        """Return M v.

        Parameters
        ----------
        vector : Tensor, shape (n,)
            On the operator's device.

        Returns
        -------
        Tensor of float64, shape (n,)

        Raises
        ------
        ValueError
            If the shape is wrong, or the operator was closed.
        """
        jacobian = self.jacobian
        self._check_rows(vector, 1)
        self.n_matvecs += 1
        return jacobian.product(vector)

    def matmat(self, block: Tensor) -> Tensor:
        """Return M V for a block V of shape (n, k), in float64.

        A block of at least ``matrix_from`` columns is multiplied with M as a matrix, built from the
        layers at the first such call. Otherwise columns go through a small model together where
        its operations allow it, at most 64, and through a large one one by one. All follows from
        the operations of a forward pass and the number of parameters alone. That a block and its
        columns agree is checked once. When memory runs out, the block is halved.
        """
        jacobian = self.jacobian
        self._check_rows(block, 2)
        self.n_matvecs += int(block.shape[1])
        if self.matrix_from is not None and block.shape[1] >= self.matrix_from:
            with full_precision(self.device):
                return widen(self._as_matrix() @ jacobian.narrow(block))
        return self._multiply(block)

    def rmatvec(self, vector: Tensor) -> Parameters:
        """Return Jᵀu as tensors in the shapes of the parameters, in ``dtype``."""
        jacobian = self.jacobian
        self._check_rows(vector, 1)
        with jacobian.ready():
            return jacobian.pull(jacobian.narrow(vector))

    def rmatmat(self, block: Tensor) -> Iterator[tuple[slice, Parameters]]:
        """Yield JᵀU for U of shape (n, k), a range of columns at a time.

        Yields
        ------
        columns : slice
            At most 64, and as many as some memory holds.
        tangents : tuple of Tensor
            Stacked along the first dimension, in ``dtype``.
        """
        jacobian = self.jacobian
        self._check_rows(block, 2)
        columns = jacobian.narrow(block).T
        start, size = 0, self._stack_size()
        while start < len(columns):
            part = columns[start : start + size]
            try:
                with jacobian.ready():
                    pulled = self._pull_columns(part)
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                size //= 2
                continue
            yield slice(start, start + len(part)), pulled
            start += len(part)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return J t in float64, shape (n,), for a tangent as :meth:`rmatvec` returns it."""
        jacobian = self.jacobian
        with jacobian.ready():
            return widen(jacobian.push(tuple(map(jacobian.narrow, tangents))))

    def pull_joined(self, vector: Tensor) -> Tensor:
        """Return Jᵀu as one float64 vector of all parameters; half a product, counted as one."""
        self.n_matvecs += 1
        return widen(torch.cat([part.reshape(-1) for part in self.rmatvec(vector)]))

    def push_joined(self, tangent: Tensor) -> Tensor:
        """Return J t in float64 for a tangent as :meth:`pull_joined` returns it."""
        parameters = self.jacobian.parameters
        parts = torch.split(tangent, [p.numel() for p in parameters])
        return self.jvp([part.view_as(p) for part, p in zip(parts, parameters, strict=True)])

    def velocity(self) -> Parameters:
        """Return the parameter velocity dθ/dτ that the residual goes with (design table)."""
        return self.rmatvec(self._residual.velocity_cotangent(self.residual_vector))

    def training_velocity(self) -> Parameters:
        """Return minus the gradient of the usual training loss; for ``"nll"`` that of its mean."""
        cotangent = self._residual.training_cotangent(self.residual_vector, self.n_rows)
        return self.rmatvec(cotangent)

    def error_jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return de/dτ in float64, shape (n,), when the parameters move along ``tangents``."""
        values = self._evaluation.values
        rate = self.jvp(tangents).reshape(values.shape)
        return self._residual.error_rate(values, rate).reshape(-1)

    def to_dense(self) -> Tensor:
        """Return M as a float64 tensor of shape (n, n): n products, and n² numbers of memory."""
        size = self._block_size()
        columns = []
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            block = torch.zeros(
                self.n, stop - start, dtype=torch.float64, device=self.residual_vector.device
            )
            block[start:stop] = torch.eye(
                stop - start, dtype=torch.float64, device=self.residual_vector.device
            )
            self.n_matvecs += stop - start
            columns.append(self._multiply(block))
        return torch.cat(columns, dim=1)

    def close(self) -> None:
        """Free the recorded graphs; products are errors afterwards."""
        self._jacobian = None
        self._find_norm = None
        self.forget_matrix()
        self._build_matrix = None

    def forget_matrix(self) -> None:
        """Free the matrix that wide blocks are multiplied with; the next one builds it again."""
        self._matrix = None

    def _multiply(self, block: Tensor) -> Tensor:
        if block.shape[1] == 0:
            return self.residual_vector.new_zeros(self.n, 0)
        jacobian = self.jacobian
        with jacobian.ready():
            product = self._apply_blockwise(jacobian.narrow(block).T)
            return widen(product.T.contiguous())

    def _as_matrix(self) -> Tensor:
        if self._matrix is None:
            if self._build_matrix is None:
                raise ValueError("this KernelOperator has no way to build its matrix.")
            self._matrix = self._build_matrix()
        return self._matrix

    def _apply_blockwise(self, columns: Tensor) -> Tensor:
        jacobian = self.jacobian
        size = self._block_size()
        while True:
            try:
                if columns.shape[0] > 1 and size > 1 and self._can_use_blocks(columns):
                    pieces = torch.split(columns, size)
                    return torch.cat([jacobian.push_block(jacobian.pull_block(p)) for p in pieces])
                return torch.stack([jacobian.push(jacobian.pull(column)) for column in columns])
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                size //= 2

    def _pull_columns(self, columns: Tensor) -> Parameters:
        size = self._block_size()
        if len(columns) > 1 and size > 1 and self._can_pull_blocks(columns):
            pieces = map(self.jacobian.pull_block, torch.split(columns, size))
            return tuple(map(torch.cat, zip(*pieces, strict=True)))
        singles = map(self.jacobian.pull, columns)
        return tuple(map(torch.stack, zip(*singles, strict=True)))

    def _can_pull_blocks(self, columns: Tensor) -> bool:
        if self.pull_blocks_work is None:
            part = self.jacobian.parts[0]
            self.pull_blocks_work = pulls_agree(part.linearization, columns[:2, part.entries])
            self.n_probes += 2
        return self.pull_blocks_work

    def _can_use_blocks(self, columns: Tensor) -> bool:
        if self.blocks_work is None:
            part = self.jacobian.parts[0]
            self.blocks_work = blocks_agree(part.linearization, columns[:2, part.entries])
            self.n_probes += 2
        return self.blocks_work

    def _block_size(self) -> int:
        by_work = int(_BLOCK_FLOPS / max(1.0, self.forward_flops))
        return max(1, min(self._stack_size(), by_work))

    def _stack_size(self) -> int:
        per_column = (self.n_parameters + self.n) * self.dtype.itemsize
        return max(1, min(_MAX_BLOCK, _BLOCK_BYTES // max(1, per_column)))


class Jacobian:
    """J over √N in parts, in the working dtype: products to be taken where it is :meth:`ready`.

    ``reads_model``: a backward pass evaluates the model anew, and has to find its frozen state.
    """

    def __init__(
        self, function: ModelFunction, parts: Sequence[Part], *, reads_model: bool = False
    ) -> None:
        self._function = function
        self.parts = tuple(parts)
        self.reads_model = reads_model
        self.rung = parts[0].linearization.name
        self.dtype = function.dtype

    @property
    def parameters(self) -> Parameters:
        """The point at which J is taken."""
        return self._function.parameters

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let products be taken inside: with the model guarded and installed where they need it."""
        calls_model = any(part.linearization.calls_model for part in self.parts)
        with exclusive(), full_precision(self._function.device), ExitStack() as stack:
            if calls_model or self.reads_model:
                stack.enter_context(self._function.guard())
            if self.reads_model:
                stack.enter_context(self._function.installed())
            yield

    def narrow(self, tensor: Tensor) -> Tensor:
        """Return an operand in the working dtype, on the device."""
        return cast(tensor.detach(), self._function.device, self._function.dtype)

    def pull(self, vector: Tensor) -> Parameters:
        """Return Jᵀv."""
        total: Parameters = ()
        for part in self.parts:
            total = added(total, part.linearization.pull(vector[part.entries]))
        return total

    def pull_block(self, columns: Tensor) -> Parameters:
        """Return Jᵀv for each row v of (k, n), stacked along the first dimension."""
        total: Parameters = ()
        for part in self.parts:
            total = added(total, part.linearization.pull_block(columns[:, part.entries]))
        return total

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t."""
        pushed = [part.linearization.push(tangents) for part in self.parts]
        return pushed[0] if len(pushed) == 1 else torch.cat(pushed)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for tangents stacked along the first dimension, as rows (k, n)."""
        return torch.cat([part.linearization.push_block(tangents) for part in self.parts], dim=1)

    def product(self, vector: Tensor) -> Tensor:
        """Return J Jᵀ v in float64, from outside."""
        with self.ready():
            return widen(self.push(self.pull(self.narrow(vector))))


@dataclass(frozen=True)
class Part:
    """The entries of one chunk of samples, and how they are differentiated."""

    entries: slice
    linearization: Linearization
