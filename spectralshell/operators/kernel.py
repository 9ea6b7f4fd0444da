"""Building the empirical neural tangent kernel M = J Jᵀ of a snapshot, and testing it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.kernel_operator import KernelOperator, Part
from spectralshell.operators.ladder import Climb, DifferentiationError, climb, is_out_of_memory
from spectralshell.operators.linearizations import (
    DoubleReverse,
    ForwardMode,
    Streamed,
    VectorFunction,
)
from spectralshell.operators.model_function import (
    ModelFunction,
    cast,
    map_tensors,
    select_parameters,
    widen,
)
from spectralshell.operators.model_guard import MODEL_LOCK
from spectralshell.operators.module_faults import name_offending_module
from spectralshell.operators.noise import backward_reads_model, measure_noise
from spectralshell.operators.probes import (
    check_finite_inputs,
    check_finite_state,
    chunk_bounds,
    evaluate,
    take_samples,
)
from spectralshell.operators.settings import resolve_device, resolve_dtype
from spectralshell.parameter_checks import check_integer
from spectralshell.residuals import Residual, Targets, resolve_residual

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot

__all__ = ["KernelOperator", "build_kernel"]

_CHUNK_TOLERANCE = 1e-10
"""Relative difference of float64 errors from the same outputs: far above rounding."""


def build_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelOperator:
    """Build M = J Jᵀ of a snapshot, matrix-free, and test it before it is used.

    Parameters
    ----------
    snapshot : Snapshot
    residual : str or callable, default="mse"
        Which error, and which Jacobian; see :func:`spectralshell.residuals.resolve_residual`.
    parameters : None, str, or callable
        All trainable parameters, or those whose name a regular expression finds or for whose name
        a callable is true.
    chunk_size : int, optional
        Samples whose graph is recorded at a time. Smaller needs less memory and more time. Without
        it, the batch is chunked when memory runs out.
    device : str or torch.device, default="auto"
        ``"auto"`` is where the model's parameters are.
    dtype : {None, "float32", "float64"} or torch.dtype
        None is the model's own; half precision is raised to float32.
    generator : torch.Generator, optional
        For the probes; by default one with a fixed seed. No global random state is used.

    Returns
    -------
    KernelOperator

    Raises
    ------
    ValueError
        If model, data and residual do not fit, something is not finite or not repeatable, or no
        way to differentiate the model passes its test (the message names the module).
    TypeError
        If an argument has a wrong type.

    Notes
    -----
    Cost: two evaluations, and about nine products for the tests. See the design's section 5 for the
    ladder of differentiation.

    Examples
    --------
    A linear model's kernel is the Gram matrix of its inputs, over N:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> kernel = build_kernel(Snapshot(model, x, torch.zeros(4, 1)))
    >>> bool(torch.allclose(kernel.to_dense(), x @ x.T / 4, atol=1e-14))
    True
    """
    return assemble_kernel(
        snapshot,
        residual=residual,
        parameters=parameters,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
        generator=generator,
    )


def assemble_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
    rungs: Sequence[str] | None = None,
) -> KernelOperator:
    """Do the work of :func:`build_kernel`; ``rungs`` restricts the ladder, for tests of a rung."""
    resolved = resolve_residual(residual)
    if chunk_size is not None:
        chunk_size = check_integer("chunk_size", chunk_size, low=1)
    # Tensors made under the user's inference mode could not be differentiated.
    with MODEL_LOCK, torch.inference_mode(False):
        snapshot.check_unchanged()
        names = select_parameters(snapshot.model, parameters, snapshot.state.trainable)
        where = resolve_device(device, snapshot.model)
        state = snapshot.load_state()
        trainable = {name for name, _ in snapshot.model.named_parameters()}
        check_finite_state(state, trainable)
        check_finite_inputs(snapshot.inputs)
        working, notes = resolve_dtype(dtype, state, where)
        size = None if chunk_size is None or chunk_size >= snapshot.n_samples else chunk_size
        draw = _drawing(generator, where, working)
        function = ModelFunction(snapshot.model, state, names, where, working)
        while True:
            try:
                kernel = _assemble(function, snapshot, resolved, size, draw, rungs)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                size = _halved(size or snapshot.n_samples, error)
    if size is not None and size != chunk_size:
        notes.append(f"memory ran out: computed in chunks of {size} samples")
    if notes:
        kernel.status = "; ".join(notes)
    return kernel


def _assemble(
    function: ModelFunction,
    snapshot: Snapshot,
    residual: Residual,
    size: int | None,
    draw: Callable[[int], Tensor],
    rungs: Sequence[str] | None,
) -> KernelOperator:
    n_samples = snapshot.n_samples
    inputs = map_tensors(
        lambda t: cast(t.detach(), function.device, function.dtype), snapshot.inputs
    )
    bounds = chunk_bounds(n_samples, size)
    pieces = [take_samples(inputs, slice(*bound), n_samples) for bound in bounds]
    with function.guard():
        outputs, flops = evaluate(function, inputs, n_samples, size)
        targets = residual.prepare(snapshot.targets, outputs)
        error, values = _error_and_values(residual, outputs, targets)
        rows_per_sample = outputs.shape[1:-1].numel()
        chunks = []
        for piece, (start, stop) in zip(pieces, bounds, strict=True):
            # Taken before the move to the device, which may hold no values to select by.
            part = targets.samples(start, stop, n_samples, rows_per_sample)
            part = part.to(function.device, function.dtype)
            chunks.append((piece, part, outputs[start:stop]))
        if size is not None:
            _check_chunks(residual, chunks, error, targets.n_rows**-0.5)

        def finish() -> KernelOperator:
            parts, steps = _differentiate(function, residual, chunks, draw, size, rungs)
            kernel = KernelOperator(function, parts, residual, targets.n_rows, error, values)
            kernel.refused = {name: why for step in steps for name, why in step.refused.items()}
            kernel.n_probes = sum(step.n_probes for step in steps)
            kernel.n_samples = n_samples
            kernel.chunk_size = size
            kernel.forward_flops = max(flops, 2.0 * n_samples * function.n_parameters)
            kernel.reads_model = backward_reads_model(kernel, function, draw)
            measure_noise(kernel, draw, lambda: _in_double(kernel, function, residual, chunks))
            return kernel

        return function.installed(None, finish)


def _differentiate(
    function: ModelFunction,
    residual: Residual,
    chunks: list[tuple[Any, Targets, Tensor]],
    draw: Callable[[int], Tensor],
    size: int | None,
    rungs: Sequence[str] | None,
) -> tuple[list[Part], list[Climb]]:
    parts: list[Part] = []
    steps: list[Climb] = []
    first = 0
    for inputs, targets, outputs in chunks:
        n_entries = residual.jacobian_of(outputs, targets).numel()
        if n_entries == 0:
            continue  # no row of this chunk is labelled
        vector = _vector_function(function, residual, inputs, targets)
        try:
            step = climb(
                vector,
                function.parameters,
                function.names,
                draw,
                streamed=size is not None,
                # The first chunk chooses for all: they run the same operations.
                rungs=(steps[0].rung,) if steps else rungs,
            )
        except DifferentiationError as failure:
            where = name_offending_module(function, inputs, draw)
            raise DifferentiationError(
                "model: no way to differentiate it multiplies by its Jacobian correctly; the fault "
                f"starts in {where}. So it looks too where a model lowers the precision inside, by "
                f"autocast or a cast of its own. Tried {failure}"
            ) from failure
        steps.append(step)
        parts.append(Part(slice(first, first + n_entries), step.linearization))
        first += n_entries
    return parts, steps


def _in_double(
    kernel: KernelOperator,
    function: ModelFunction,
    residual: Residual,
    chunks: list[tuple[Any, Targets, Tensor]],
) -> KernelOperator:
    exact = function.in_double()
    # Tracing a tangent map would cost more than the two products it is used for.
    rung = ForwardMode if kernel.rung.startswith("jvp") else DoubleReverse
    parts = []
    labelled = [chunk for chunk in chunks if residual.jacobian_of(chunk[2], chunk[1]).numel()]
    for part, (inputs, targets, _) in zip(kernel.parts, labelled, strict=True):
        fine = map_tensors(lambda t: cast(t, exact.device, exact.dtype), inputs)
        vector = _vector_function(exact, residual, fine, targets.to(exact.device, exact.dtype))
        linearization = (
            rung(vector, exact.parameters)
            if kernel.chunk_size is None
            else Streamed(rung, vector, exact.parameters)
        )
        parts.append(Part(part.entries, linearization))
    reference = KernelOperator(
        exact, parts, residual, kernel.n_rows, kernel.residual_vector, kernel.residual_vector
    )
    reference.reads_model = kernel.reads_model
    return reference


def _vector_function(
    function: ModelFunction, residual: Residual, inputs: Any, targets: Targets
) -> VectorFunction:
    scale = targets.n_rows**-0.5

    def vector(*parameters: Tensor) -> Tensor:
        values = residual.jacobian_of(function.outputs(parameters, inputs), targets)
        scaled: Tensor = values.reshape(-1) * scale
        return scaled

    return vector


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


def _check_chunks(
    residual: Residual, chunks: list[tuple[Any, Targets, Tensor]], whole: Tensor, scale: float
) -> None:
    """Raise ValueError if a residual gives other errors for chunks than for the whole batch."""
    if whole.is_meta:
        return
    try:
        errors = [
            residual.error(widen(outputs), targets.to(whole.device, whole.dtype)).reshape(-1)
            for _, targets, outputs in chunks
        ]
        joined = torch.cat(errors).detach().double() * scale
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


def _halved(size: int, error: Exception) -> int:
    if size == 1:
        raise MemoryError(
            "memory ran out with a single sample; use a smaller model, dtype float32, or another "
            "device."
        ) from error
    return (size + 1) // 2


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
