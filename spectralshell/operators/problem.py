"""A snapshot made ready for its kernel: checked, moved, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spectralshell.models.function import (
    ModelFunction,
    OutputKindError,
    Parameters,
    cast,
    iterate_tensors,
    map_tensors,
    select_parameters,
    widen,
)
from spectralshell.models.trace import first_nonfinite_module, first_random_module
from spectralshell.operators.finite import check_finite_inputs, check_finite_state
from spectralshell.operators.jacobian.ladder import is_out_of_memory
from spectralshell.operators.jacobian.linearizations import VectorFunction
from spectralshell.operators.own_loss import compare_with_own_loss
from spectralshell.operators.set_up import SetUp, set_up_of
from spectralshell.parameter_checks import check_integer
from spectralshell.residuals import Residual, Targets, resolve_residual
from spectralshell.statuses import checkpoint_in, measured_in

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


_Built = TypeVar("_Built")

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

_REPEAT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative difference of two evaluations: above what unordered sums on a GPU give."""

_COUPLING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of a sample's output alone and in company: above that of other kernels."""

_CHUNK_TOLERANCE = 1e-10
"""Relative difference of float64 errors from the same outputs: far above rounding."""


@dataclass(frozen=True)
class KernelProblem:
    """What a kernel is built from, whichever way; made by :func:`pose_problem`."""

    function: ModelFunction
    residual: Residual
    # Of the whole batch, on the device.
    inputs: Any
    # As the user gave them.
    targets: Any
    n_samples: int
    # Dimension of the outputs that counts classes, where the user says it.
    class_axis: int | None
    # As asked for; None where one chunk holds all samples.
    chunk_size: int | None
    # Gives a random vector of a length, in the working dtype on the device.
    draw: Callable[[int], Tensor]
    # What the status should say.
    notes: tuple[str, ...] = ()
    # By how much the outputs change otherwise than J of reverse mode says; 0.0 if they do not.
    jacobian_defect: float = 0.0
    # What earlier snapshots of the model have settled; added to as this one is looked at.
    set_up: SetUp = field(default_factory=SetUp)

    @property
    def dynamics_exact(self) -> bool:
        """Whether ė = −M e along the velocity of the residual."""
        return self.residual.dynamics_exact and self.jacobian_defect == 0.0

    def evaluate(self, size: int | None) -> Evaluation:
        """Evaluate the model in chunks of ``size`` samples, twice, and check what comes back."""
        function, residual = self.function, self.residual
        with function.guard():
            with function.continued():
                outputs, flops = _evaluate_twice(function, self.inputs, self.n_samples, size)
            targets = self.read_targets(residual, outputs)
            error = _scaled_error(residual, outputs, targets)
            evaluation = Evaluation(self, size, outputs, targets, error, flops)
            if size is not None:
                _check_parts(evaluation, evaluation.chunks())
            if residual.is_callable:
                _check_parts(evaluation, _uneven_parts(evaluation))
        return evaluation

    def read_targets(self, residual: Residual, outputs: Tensor) -> Targets:
        """Return the targets as a residual reads them; classes are last in ``.logits``."""
        axis = -1 if self.class_axis is None and self.function.gives_logits else self.class_axis
        return residual.prepare(self.targets, outputs, axis)


@dataclass(frozen=True)
class Evaluation:
    """A problem with the model's outputs on the whole batch."""

    problem: KernelProblem
    # Samples of a chunk; None takes all at once.
    chunk_size: int | None
    # Samples first.
    outputs: Tensor
    targets: Targets
    # e / √N in float64.
    residual_vector: Tensor
    # Operations of matrix products and convolutions in one evaluation.
    flops: float

    @property
    def values(self) -> Tensor:
        """What J differentiates, without 1/√N, in float64: not kept, for it may be large."""
        wide = widen(self.outputs.detach())
        targets = self.targets.to(wide.device, wide.dtype)
        return self.problem.residual.jacobian_of(wide, targets).detach()

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
        bounds = _chunk_bounds(self.problem.n_samples, size or self.chunk_size)
        return [self.take(start, stop) for start, stop in bounds]

    def chunks_with_entries(self, size: int | None = None) -> list[tuple[slice, Chunk]]:
        """Return the chunks that have labelled rows, each with its places in the residual."""
        found, first = [], 0
        for chunk in self.chunks(size):
            n_entries = self.count_entries(chunk)
            if n_entries:
                found.append((slice(first, first + n_entries), chunk))
            first += n_entries
        return found

    def take(self, start: int, stop: int) -> Chunk:
        """Return some samples as a chunk."""
        problem, function = self.problem, self.problem.function
        inputs = _take_samples(problem.inputs, slice(start, stop), problem.n_samples)
        # Taken before the move to the device, which may hold no values to select by.
        part = self.targets.samples(start, stop, problem.n_samples)
        targets = part.to(function.device, function.dtype)
        return Chunk(slice(start, stop), inputs, targets, self.outputs[start:stop])

    def moved(self, parameters: Parameters) -> Evaluation:
        """Evaluate the problem at other values of the parameters, once: it was checked here."""
        problem = replace(self.problem, function=self.problem.function.at(parameters))
        function, bounds = problem.function, _chunk_bounds(problem.n_samples, self.chunk_size)
        with function.guard():
            outputs = _evaluate_chunks(function, problem.inputs, bounds)
        if not outputs.is_meta and not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "model: the outputs hold NaN or infinite values where the parameters were "
                "displaced to; take a smaller step."
            )
        error = _scaled_error(problem.residual, outputs, self.targets)
        return replace(self, problem=problem, outputs=outputs, residual_vector=error)

    def count_entries(self, chunk: Chunk) -> int:
        """Return the number of the chunk's entries in the residual."""
        return self.problem.residual.jacobian_of(chunk.outputs, chunk.targets).numel()

    def vector_function(
        self, chunk: Chunk, function: ModelFunction | None = None
    ) -> VectorFunction:
        """Return what J differentiates, over √N, as a vector function of the parameters.

        ``function`` is the model in another dtype; by default the problem's.
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


@dataclass(frozen=True)
class Chunk:
    """Some samples: inputs and targets on the device, and the model's outputs."""

    samples: slice
    inputs: Any
    targets: Targets
    outputs: Tensor

    @property
    def n_samples(self) -> int:
        """Number of its samples."""
        return int(self.samples.stop - self.samples.start)


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
    """Check the arguments of a kernel (as ``build_kernel``), and move the snapshot to the device.

    To be called where the model may be touched.
    """
    resolved = resolve_residual(residual)
    if chunk_size is not None:
        chunk_size = check_integer("chunk_size", chunk_size, low=1)
    snapshot.check_unchanged()
    names = select_parameters(snapshot.model, parameters, snapshot.state.trainable)
    state = snapshot.load_state()
    where = _resolve_device(device, snapshot.model, state)
    _check_values(snapshot, state, without=where.type == "meta" and device != "auto")
    trainable = {name for name, _ in snapshot.model.named_parameters()}
    check_finite_state(state, trainable)
    check_finite_inputs(snapshot.inputs)
    working, notes = _working_dtype(dtype, state, where)
    notes += snapshot.notes
    if snapshot.state.narrow:
        notes += (checkpoint_in(", ".join(snapshot.state.narrow), _short(working)),)
    function = ModelFunction(snapshot.model, state, names, where, working)
    inputs = map_tensors(lambda t: _own_input(t, where, working), snapshot.inputs)
    n_samples = snapshot.n_samples
    if n_samples is None:
        n_samples = _count_outputs(function, inputs)
    whole = chunk_size is None or chunk_size >= n_samples
    set_up = set_up_of(
        function,
        resolved,
        inputs,
        snapshot.targets,
        chunk_size=None if whole else chunk_size,
        class_axis=snapshot.class_axis,
    )
    if snapshot.labels_moved is not None and not set_up.has_own_loss:
        found = compare_with_own_loss(snapshot, function, inputs, n_samples)
        notes += found
        set_up.has_own_loss = not found  # a number that differs is told of each state
    return KernelProblem(
        function=function,
        residual=resolved,
        inputs=inputs,
        targets=snapshot.targets,
        n_samples=n_samples,
        class_axis=snapshot.class_axis,
        chunk_size=None if whole else chunk_size,
        draw=_drawing(generator, where, working),
        notes=notes,
        set_up=set_up,
    )


def _own_input(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an input to compute with: the model may differentiate by one that requires it."""
    return cast(tensor.detach(), device, dtype).requires_grad_(tensor.requires_grad)


def _check_values(snapshot: Snapshot, state: Mapping[str, Tensor], *, without: bool) -> None:
    """Raise ValueError naming what is sparse, or has no values where they are not done without."""
    empty = next((name for name, tensor in state.items() if tensor.is_meta and not without), None)
    if empty is not None:
        raise ValueError(
            f"model: {empty!r} is on the meta device, which holds no values; load the weights, or "
            "pass Snapshot(..., state=) with them."
        )
    for label, given in (("inputs", snapshot.inputs), ("targets", snapshot.targets)):
        for tensor in iterate_tensors(given):
            if tensor.is_meta and not without:
                raise ValueError(
                    f"{label}: a tensor of shape {tuple(tensor.shape)} is on the meta device, "
                    "which holds no values."
                )
            if tensor.layout is not torch.strided:
                raise ValueError(
                    f"{label}: a tensor of shape {tuple(tensor.shape)} has the layout "
                    f"{tensor.layout}, of which no samples can be taken; pass .to_dense(), and let "
                    "the model's forward make it sparse if it must be."
                )


def _resolve_device(
    device: str | torch.device, model: nn.Module, state: Mapping[str, Tensor]
) -> torch.device:
    """Return the device to compute on; ``"auto"`` is where the model's parameters are.

    Where some are but declared (the meta device), it is that of the state.
    """
    if isinstance(device, torch.device):
        return _available(device)
    if not isinstance(device, str):
        raise TypeError(
            f"device must be 'auto', a device string or a torch.device, got {device!r}."
        )
    if device != "auto":
        try:
            named = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"device={device!r} is not a torch device such as 'cpu' or 'cuda:0'."
            ) from error
        return _available(named)
    devices = {parameter.device for parameter in model.parameters()}
    if any(found.type == "meta" for found in devices):
        devices = {tensor.device for tensor in state.values()}
        devices = {found for found in devices if found.type != "meta"} or devices
    if len(devices) != 1:
        listed = ", ".join(sorted(str(d) for d in devices)) or "none"
        raise ValueError(
            f"device='auto' needs all parameters on one device, got {listed}; name the device."
        )
    return devices.pop()


def _available(device: torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device={str(device)!r} is not available here ({error}); use 'auto' or 'cpu'."
        ) from error
    return device


def resolve_dtype(dtype: Any) -> torch.dtype | None:
    """Return the number type that a parameter ``dtype`` stands for, None for the model's own."""
    if dtype is None:
        return None
    chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(
            f"dtype must be None, 'float32' or 'float64', got {dtype!r}; half precision cannot "
            "resolve a spectrum."
        )
    return chosen


def _working_dtype(
    dtype: Any, state: Mapping[str, Tensor], device: torch.device
) -> tuple[torch.dtype, tuple[str, ...]]:
    """Return the dtype of products, and what the status should say about it.

    None takes the widest floating dtype in the state, at least float32.
    """
    complex_names = [name for name, tensor in state.items() if tensor.is_complex()]
    if complex_names:
        raise TypeError(
            f"model: {complex_names[0]!r} is complex; kernels are defined for real parameters."
        )
    own = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    chosen = resolve_dtype(dtype)
    if chosen is torch.float64 and device.type == "mps":
        raise ValueError("dtype='float64' does not exist on this device; use 'float32'.")
    if chosen is None:
        if torch.float64 in own and device.type != "mps":
            return torch.float64, ()
        chosen = torch.float32
    half = sorted(_short(d) for d in own & {torch.float16, torch.bfloat16})
    return chosen, (measured_in(", ".join(half), _short(chosen)),) if half else ()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def _evaluate_twice(
    function: ModelFunction, inputs: Any, n_samples: int, size: int | None
) -> tuple[Tensor, float]:
    """Return outputs, samples first, and operations of an evaluation in chunks, which is checked.

    The second time chunks begin elsewhere, so that every sample has other company.
    """
    bounds = _chunk_bounds(n_samples, size)
    with _OperationCounter() as counter:
        outputs = _evaluate_chunks(function, inputs, bounds)
    flops = float(counter.total)
    if not outputs.is_floating_point():
        raise ValueError(
            f"model: the outputs have dtype {outputs.dtype}; a kernel needs floating ones."
        )
    if outputs.dtype.itemsize < min(function.dtype.itemsize, torch.float32.itemsize):
        raise ValueError(
            f"model: the outputs have dtype {outputs.dtype} although weights and inputs are "
            f"{function.dtype}: the model lowers the precision inside, by autocast or a cast of "
            "its own; switch that off to measure it."
        )
    if outputs.is_meta:
        return outputs, flops
    if not bool(torch.isfinite(outputs).all()):
        parts = [_take_samples(inputs, slice(*bound), n_samples) for bound in bounds]
        where = first_nonfinite_module(function, parts)
        raise ValueError(
            f"model: the outputs hold NaN or infinite values, first in {where}; check inputs and "
            "weights."
        )
    if size is not None and _differ(
        outputs,
        _evaluate_chunks(function, inputs, _shifted_bounds(n_samples, size)),
        _COUPLING_TOLERANCE[function.dtype],
    ):
        _check_repeatable(function, inputs, outputs, bounds)
        raise ValueError(
            "chunk_size: the outputs of a sample depend on the other samples of its batch, for "
            "example through batch statistics, so the kernel cannot be computed in chunks; use "
            "chunk_size=None with a batch that fits in memory, or remove the coupling."
        )
    if size is None:
        _check_repeatable(function, inputs, outputs, bounds)
    return outputs, flops


class _OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the operations of matrix products and convolutions.

    As torch's own counter, which hooks modules and so breaks models that differentiate inside.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "overloadpacket", func))
        if count is not None:
            self.total += int(count(*args, **kwargs, out_val=returned))
        return returned


def _check_repeatable(
    function: ModelFunction, inputs: Any, outputs: Tensor, bounds: list[tuple[int, int]]
) -> None:
    again = _evaluate_chunks(function, inputs, bounds)
    if _differ(outputs, again, _REPEAT_TOLERANCE[function.dtype]):
        n_samples = bounds[-1][1]
        parts = [_take_samples(inputs, slice(*bound), n_samples) for bound in bounds]
        where = first_random_module(function, parts)
        difference, scale = float((outputs - again).abs().max()), float(outputs.abs().max())
        raise ValueError(
            "model: two evaluations in eval mode differ by "
            f"{difference:.1e} (largest output {scale:.1e}), first in {where}: randomness such as "
            "dropout stays on in eval mode, or the model changes its own state; switch it off."
        )


def _differ(outputs: Tensor, again: Tensor, tolerance: float) -> bool:
    if outputs.shape != again.shape:
        return True
    difference = float((outputs - again).abs_().max())
    return not difference <= tolerance * float(outputs.abs().max())


def _evaluate_chunks(function: ModelFunction, inputs: Any, bounds: list[tuple[int, int]]) -> Tensor:
    """Evaluate a model once, by the ranges of :func:`_chunk_bounds`, without a graph."""
    n_samples = bounds[-1][1]
    return torch.cat(
        [
            _evaluate_part(
                function, _take_samples(inputs, slice(start, stop), n_samples), stop - start
            )
            for start, stop in bounds
        ]
    )


def _count_outputs(function: ModelFunction, inputs: Any) -> int:
    """Return the first dimension of the outputs: it counts samples where the inputs disagree."""
    with function.guard():
        outputs = _call_model(function, inputs)
    lengths = [int(tensor.shape[0]) for tensor in iterate_tensors(inputs) if tensor.ndim]
    if outputs.ndim == 0 or int(outputs.shape[0]) not in lengths:
        raise ValueError(
            f"inputs of first dimensions {', '.join(map(str, lengths))} and outputs of shape "
            f"{tuple(outputs.shape)} do not say which dimension counts samples; pass "
            "Snapshot(..., n_samples=)."
        )
    return int(outputs.shape[0])


def _evaluate_part(function: ModelFunction, inputs: Any, n_samples: int) -> Tensor:
    outputs = _call_model(function, inputs)
    if outputs.ndim == 0 or outputs.shape[0] != n_samples:
        raise ValueError(
            f"model: the outputs have shape {tuple(outputs.shape)} for {n_samples} samples; the "
            "first dimension must be the sample dimension, not a mean or a sum over samples. Where "
            "another dimension of the inputs counts samples, pass Snapshot(..., n_samples=)."
        )
    return outputs


def _call_model(function: ModelFunction, inputs: Any) -> Tensor:
    try:
        return function.evaluate(inputs)
    except OutputKindError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        shapes = [tuple(tensor.shape) for tensor in iterate_tensors(inputs)]
        hint = ""
        if "dtype" in str(error):
            hint = (
                f" Parameters and floating inputs are all {function.dtype} here, see `dtype`: let "
                "the forward cast to the dtype of its weights instead of to one of its own."
            )
        raise ValueError(
            f"model: {type(function.model).__name__} failed on the inputs of shape "
            f"{', '.join(map(str, shapes))}: {str(error).rstrip('.')}.{hint}"
        ) from error


def _chunk_bounds(n_samples: int, size: int | None) -> list[tuple[int, int]]:
    """Return (start, stop) of each chunk."""
    step = size or n_samples
    return [(start, min(start + step, n_samples)) for start in range(0, n_samples, step)]


def _shifted_bounds(n_samples: int, size: int) -> list[tuple[int, int]]:
    """Chunks that begin in the middle of the others; single samples in pairs."""
    if size == 1:
        return _chunk_bounds(n_samples, 2)
    first = size // 2
    later = _chunk_bounds(n_samples - first, size)
    return [(0, first), *((start + first, stop + first) for start, stop in later)]


def _take_samples(inputs: Any, positions: slice, n_samples: int) -> Any:
    """Take samples from every tensor whose first dimension counts samples."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != n_samples:
            return tensor
        return tensor[positions]

    return map_tensors(take, inputs)


def _scaled_error(residual: Residual, outputs: Tensor, targets: Targets) -> Tensor:
    """Return e / √N in float64."""
    wide = widen(outputs.detach())
    exact = targets.to(wide.device, wide.dtype)
    error: Tensor = residual.error(wide, exact).detach().double().reshape(-1)
    error = error * targets.n_rows**-0.5
    if error.numel() == 0:
        raise ValueError("residual: the error vector is empty; return one entry per sample.")
    if not error.is_meta and not bool(torch.isfinite(error).all()):
        raise ValueError(
            f"residual {residual.name!r} holds NaN or infinite values although the outputs are "
            "finite; check the targets and the residual."
        )
    return error


def _uneven_parts(evaluation: Evaluation) -> list[Chunk]:
    """Return the first sample, and two parts of the others: they cut pairs and equal groups."""
    n_samples = evaluation.problem.n_samples
    ends = sorted({0, 1, (1 + n_samples) // 2, n_samples})
    return [evaluation.take(start, stop) for start, stop in pairwise(ends)]


def _check_parts(evaluation: Evaluation, parts: Sequence[Chunk]) -> None:
    """Raise ValueError if a residual gives other errors for parts than for the whole batch."""
    whole, residual = evaluation.residual_vector, evaluation.problem.residual
    if whole.is_meta:
        return
    try:
        errors = [
            residual.error(
                widen(chunk.outputs), chunk.targets.to(whole.device, whole.dtype)
            ).reshape(-1)
            for chunk in parts
        ]
        joined = torch.cat(errors).detach().double() * evaluation.scale
        same = joined.shape == whole.shape and torch.allclose(
            joined, whole, rtol=_CHUNK_TOLERANCE, atol=_CHUNK_TOLERANCE * float(whole.abs().max())
        )
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"residual {residual.name!r} fails in chunks, on some of the samples alone: {error}"
        ) from error
    if not same:
        raise ValueError(
            f"residual {residual.name!r} gives other errors in chunks, of some samples alone, than "
            "for the whole batch: it couples samples (shapes (N,) and (N, 1) make (N, N)), or "
            "`targets` hold a tensor whose first dimension is the number of samples but does not "
            "count them. Compute every row from its own sample, with one target row per sample; "
            "bind constants to the callable."
        )


def halve_until_it_fits(
    problem: KernelProblem, size: int | None, build: Callable[[int | None], _Built]
) -> tuple[_Built, int | None]:
    """Return ``build(size)`` with the size halved until memory suffices, and that size.

    None is all samples; MemoryError where a single one does not fit.
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
