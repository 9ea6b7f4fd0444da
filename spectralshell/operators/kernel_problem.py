"""A snapshot made ready for its kernel: checked, moved, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.ladder import is_out_of_memory
from spectralshell.operators.linearizations import VectorFunction
from spectralshell.operators.model_function import (
    ModelFunction,
    Parameters,
    cast,
    map_tensors,
    select_parameters,
    widen,
)
from spectralshell.operators.probes import (
    check_finite_inputs,
    check_finite_state,
    chunk_bounds,
    evaluate,
    evaluate_chunks,
    take_samples,
)
from spectralshell.operators.settings import resolve_device, resolve_dtype
from spectralshell.parameter_checks import check_integer
from spectralshell.residuals import Residual, Targets, resolve_residual

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot

_CHUNK_TOLERANCE = 1e-10
"""Relative difference of float64 errors from the same outputs: far above rounding."""


@dataclass(frozen=True)
class Chunk:
    """Some samples: inputs and targets on the device, and the model's outputs.

    Attributes
    ----------
    samples : slice
        Which ones.
    """

    samples: slice
    inputs: Any
    targets: Targets
    outputs: Tensor


@dataclass(frozen=True)
class KernelProblem:
    """What a kernel is built from, whichever way; made by :func:`pose_problem`.

    Attributes
    ----------
    function : ModelFunction
    residual : Residual
    inputs : object
        Of the whole batch, on the device.
    targets : Any
        As the user gave them.
    n_samples : int
    chunk_size : int or None
        As asked for; None where one chunk holds all samples.
    draw : callable
        ``draw(n)`` gives a random vector in the working dtype on the device.
    notes : list of str
        What the status should say.
    """

    function: ModelFunction
    residual: Residual
    inputs: Any
    targets: Any
    n_samples: int
    chunk_size: int | None
    draw: Callable[[int], Tensor]
    notes: list[str] = field(default_factory=list)

    def evaluate(self, size: int | None) -> Evaluation:
        """Evaluate the model in chunks of ``size`` samples, twice, and check what comes back.

        Raises
        ------
        ValueError
            If model, data and residual do not fit, something is not finite or not repeatable, or
            samples depend on each other and cannot be taken in chunks.
        """
        function, residual = self.function, self.residual
        with function.guard():
            outputs, flops = evaluate(function, self.inputs, self.n_samples, size)
            targets = residual.prepare(self.targets, outputs)
            error, values = _error_and_values(residual, outputs, targets)
            evaluation = Evaluation(self, size, outputs, targets, error, values, flops)
            if size is not None:
                _check_chunks(evaluation)
        return evaluation


@dataclass(frozen=True)
class Evaluation:
    """A problem with the model's outputs on the whole batch.

    Attributes
    ----------
    problem : KernelProblem
    chunk_size : int or None
        Samples of a chunk; None takes all at once.
    outputs : Tensor
        Samples first.
    targets : Targets
    residual_vector : Tensor of float64, shape (n,)
        e / √N.
    values : Tensor
        What J differentiates, without 1/√N.
    flops : float
        Operations of matrix products and convolutions in one evaluation.
    """

    problem: KernelProblem
    chunk_size: int | None
    outputs: Tensor
    targets: Targets
    residual_vector: Tensor
    values: Tensor
    flops: float

    @property
    def scale(self) -> float:
        """1/√N."""
        return float(self.targets.n_rows**-0.5)

    @property
    def forward_flops(self) -> float:
        """Operations of one evaluation, at least two for each parameter and sample."""
        return max(self.flops, 2.0 * self.problem.n_samples * self.problem.function.n_parameters)

    def chunks(self, size: int | None = None) -> list[Chunk]:
        """Return all samples in chunks of ``size``, by default those of the evaluation."""
        bounds = chunk_bounds(self.problem.n_samples, size or self.chunk_size)
        return [self.take(start, stop) for start, stop in bounds]

    def take(self, start: int, stop: int) -> Chunk:
        """Return some samples as a chunk."""
        problem, function = self.problem, self.problem.function
        inputs = take_samples(problem.inputs, slice(start, stop), problem.n_samples)
        rows_per_sample = self.outputs.shape[1:-1].numel()
        # Taken before the move to the device, which may hold no values to select by.
        part = self.targets.samples(start, stop, problem.n_samples, rows_per_sample)
        targets = part.to(function.device, function.dtype)
        return Chunk(slice(start, stop), inputs, targets, self.outputs[start:stop])

    def moved(self, parameters: Parameters) -> Evaluation:
        """Evaluate the problem at other values of the parameters, once: its checks were made here.

        Raises
        ------
        ValueError
            If the outputs there are not finite.
        """
        problem = replace(self.problem, function=self.problem.function.at(parameters))
        function, bounds = problem.function, chunk_bounds(problem.n_samples, self.chunk_size)
        with function.guard():
            outputs = evaluate_chunks(function, problem.inputs, bounds)
        if not outputs.is_meta and not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "model: the outputs hold NaN or infinite values where the parameters were "
                "displaced to; take a smaller step."
            )
        error, values = _error_and_values(problem.residual, outputs, self.targets)
        return replace(self, problem=problem, outputs=outputs, residual_vector=error, values=values)

    def count_entries(self, chunk: Chunk) -> int:
        """Return the number of the chunk's entries in the residual."""
        return self.problem.residual.jacobian_of(chunk.outputs, chunk.targets).numel()

    def vector_function(
        self, chunk: Chunk, function: ModelFunction | None = None
    ) -> VectorFunction:
        """Return what J differentiates, over √N, as a vector function of the parameters.

        Parameters
        ----------
        chunk : Chunk
        function : ModelFunction, optional
            The model in another dtype; by default the problem's.
        """
        model = function or self.problem.function
        residual, scale = self.problem.residual, self.scale
        inputs = map_tensors(lambda t: cast(t, model.device, model.dtype), chunk.inputs)
        targets = chunk.targets.to(model.device, model.dtype)

        def vector(*parameters: Tensor) -> Tensor:
            values = residual.jacobian_of(model.outputs(parameters, inputs), targets)
            scaled: Tensor = values.reshape(-1) * scale
            return scaled

        return vector


def pose_problem(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelProblem:
    """Check the arguments of a kernel and move the snapshot to the device.

    To be called under :data:`~spectralshell.operators.model_guard.MODEL_LOCK`, outside inference
    mode. The parameters are those of :func:`~spectralshell.operators.build_kernel`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable, the snapshot has changed, or its state is not finite.
    """
    resolved = resolve_residual(residual)
    if chunk_size is not None:
        chunk_size = check_integer("chunk_size", chunk_size, low=1)
    snapshot.check_unchanged()
    names = select_parameters(snapshot.model, parameters, snapshot.state.trainable)
    where = resolve_device(device, snapshot.model)
    state = snapshot.load_state()
    trainable = {name for name, _ in snapshot.model.named_parameters()}
    check_finite_state(state, trainable)
    check_finite_inputs(snapshot.inputs)
    working, notes = resolve_dtype(dtype, state, where)
    function = ModelFunction(snapshot.model, state, names, where, working)
    inputs = map_tensors(lambda t: cast(t.detach(), where, working), snapshot.inputs)
    whole = chunk_size is None or chunk_size >= snapshot.n_samples
    return KernelProblem(
        function=function,
        residual=resolved,
        inputs=inputs,
        targets=snapshot.targets,
        n_samples=snapshot.n_samples,
        chunk_size=None if whole else chunk_size,
        draw=_drawing(generator, where, working),
        notes=notes,
    )


def halve_until_it_fits(
    problem: KernelProblem, size: int | None, build: Callable[[int | None], Any]
) -> tuple[Any, int | None]:
    """Call ``build(size)`` with smaller and smaller chunks until memory suffices.

    Returns
    -------
    built : object
    size : int or None
        Samples of a chunk in the end.

    Raises
    ------
    MemoryError
        If a single sample does not fit.
    """
    while True:
        try:
            return build(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = _halved(size or problem.n_samples, error)


def _halved(size: int, error: Exception) -> int:
    if size == 1:
        raise MemoryError(
            "memory ran out with a single sample; use a smaller model, dtype float32, or another "
            "device."
        ) from error
    return (size + 1) // 2


def _error_and_values(
    residual: Residual, outputs: Tensor, targets: Targets
) -> tuple[Tensor, Tensor]:
    wide = widen(outputs.detach())
    exact = targets.to(wide.device, wide.dtype)
    error = residual.error(wide, exact).detach().double().reshape(-1) * targets.n_rows**-0.5
    if error.numel() == 0:
        raise ValueError("residual: the error vector is empty; return one entry per sample.")
    if not error.is_meta and not bool(torch.isfinite(error).all()):
        raise ValueError(
            f"residual {residual.name!r} holds NaN or infinite values although the outputs are "
            "finite; check the targets and the residual."
        )
    return error, residual.jacobian_of(wide, exact).detach()


def _check_chunks(evaluation: Evaluation) -> None:
    """Raise ValueError if a residual gives other errors for chunks than for the whole batch."""
    whole, residual = evaluation.residual_vector, evaluation.problem.residual
    if whole.is_meta:
        return
    try:
        errors = [
            residual.error(
                widen(chunk.outputs), chunk.targets.to(whole.device, whole.dtype)
            ).reshape(-1)
            for chunk in evaluation.chunks()
        ]
        joined = torch.cat(errors).detach().double() * evaluation.scale
        same = joined.shape == whole.shape and torch.allclose(
            joined, whole, rtol=_CHUNK_TOLERANCE, atol=_CHUNK_TOLERANCE * float(whole.abs().max())
        )
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"residual {residual.name!r} fails in chunks: {error}") from error
    if not same:
        raise ValueError(
            f"residual {residual.name!r} gives other errors in chunks than for the whole batch: it "
            "couples samples, or `targets` hold a tensor whose first dimension is the number of "
            "samples but does not count them. Use chunk_size=None, or one target row per sample."
        )


def _drawing(
    generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Callable[[int], Tensor]:
    source = generator if generator is not None else torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(n, dtype=dtype, device=device)
        numbers = torch.randn(n, generator=source, device=source.device, dtype=torch.float32)
        return numbers.to(device, dtype)

    return draw
