"""Checks of a model before it is measured: finite, repeatable, samples independent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectralshell.operators.ladder import is_out_of_memory
from spectralshell.operators.model_function import ModelFunction, iterate_tensors, map_tensors
from spectralshell.operators.module_trace import first_nonfinite_module, first_random_module

_FLOAT32_BYTES = 4

REPEAT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative difference of two evaluations: above what unordered sums on a GPU give."""

COUPLING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of a sample's output alone and in company: above that of other kernels."""


def check_finite_state(state: Mapping[str, Tensor], parameters: set[str]) -> None:
    """Raise ValueError naming the first tensor of a state with NaN (or, a parameter, infinity).

    Buffers may be infinite: attention masks are.
    """
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        bad = ~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)
        if bool(bad.any()):
            raise ValueError(
                f"model: {name!r} holds NaN or infinite values ({int(bad.sum())} of "
                f"{tensor.numel()}); measure a state from before the run diverged."
            )


def check_finite_inputs(inputs: Any) -> None:
    """Raise ValueError if a floating input holds NaN."""

    def check(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.is_meta and bool(torch.isnan(tensor).any()):
            raise ValueError("inputs hold NaN; remove those samples.")
        return tensor

    map_tensors(check, inputs)


def evaluate(
    function: ModelFunction, inputs: Any, n_samples: int, size: int | None
) -> tuple[Tensor, float]:
    """Evaluate a model twice, by chunks, and check what comes back.

    The second time the chunks begin elsewhere, so that every sample has other company.

    Parameters
    ----------
    function : ModelFunction
    inputs : object
        Of the whole batch, on the device.
    n_samples : int
    size : int or None
        Samples per chunk; None takes all at once.

    Returns
    -------
    outputs : Tensor
        Samples first.
    forward_flops : float
        Operations that matrix products and convolutions of one evaluation take, by shape.

    Raises
    ------
    ValueError
        If the model fails, its outputs are not finite, have no sample dimension, differ between
        two evaluations (the message names the module where that starts), or depend on the other
        samples of a chunk.
    """
    bounds = chunk_bounds(n_samples, size)
    with FlopCounterMode(display=False) as counter:
        outputs = evaluate_chunks(function, inputs, bounds)
    flops = float(counter.get_total_flops())
    if not outputs.is_floating_point():
        raise ValueError(
            f"model: the outputs have dtype {outputs.dtype}; a kernel needs floating ones."
        )
    if function.dtype.itemsize > outputs.dtype.itemsize and outputs.dtype.itemsize < _FLOAT32_BYTES:
        raise ValueError(
            f"model: the outputs have dtype {outputs.dtype} although weights and inputs are "
            f"{function.dtype}: the model lowers the precision inside, by autocast or a cast of "
            "its own; switch that off to measure it."
        )
    if outputs.is_meta:
        return outputs, flops
    if not bool(torch.isfinite(outputs).all()):
        parts = [take_samples(inputs, slice(*bound), n_samples) for bound in bounds]
        where = first_nonfinite_module(function, parts)
        raise ValueError(
            f"model: the outputs hold NaN or infinite values, first in {where}; check inputs and "
            "weights."
        )
    if size is not None and _differ(
        outputs,
        evaluate_chunks(function, inputs, _shifted_bounds(n_samples, size)),
        COUPLING_TOLERANCE[function.dtype],
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


def _check_repeatable(
    function: ModelFunction, inputs: Any, outputs: Tensor, bounds: list[tuple[int, int]]
) -> None:
    again = evaluate_chunks(function, inputs, bounds)
    if _differ(outputs, again, REPEAT_TOLERANCE[function.dtype]):
        n_samples = bounds[-1][1]
        parts = [take_samples(inputs, slice(*bound), n_samples) for bound in bounds]
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
    return not float((outputs - again).abs().max()) <= tolerance * float(outputs.abs().max())


def chunk_bounds(n_samples: int, size: int | None) -> list[tuple[int, int]]:
    """Return (start, stop) of each chunk."""
    step = size or n_samples
    return [(start, min(start + step, n_samples)) for start in range(0, n_samples, step)]


def _shifted_bounds(n_samples: int, size: int) -> list[tuple[int, int]]:
    """Chunks that begin in the middle of those of :func:`chunk_bounds`; single samples in pairs."""
    if size == 1:
        return chunk_bounds(n_samples, 2)
    first = size // 2
    later = chunk_bounds(n_samples - first, size)
    return [(0, first), *((start + first, stop + first) for start, stop in later)]


def take_samples(inputs: Any, positions: slice, n_samples: int) -> Any:
    """Take samples from every tensor whose first dimension counts samples."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != n_samples:
            return tensor
        return tensor[positions]

    return map_tensors(take, inputs)


def evaluate_chunks(function: ModelFunction, inputs: Any, bounds: list[tuple[int, int]]) -> Tensor:
    """Evaluate a model once, by the ranges of :func:`chunk_bounds`, without a graph."""
    n_samples = bounds[-1][1]
    with torch.no_grad():
        return torch.cat(
            [
                _evaluate_part(
                    function, take_samples(inputs, slice(start, stop), n_samples), stop - start
                )
                for start, stop in bounds
            ]
        )


def _evaluate_part(function: ModelFunction, inputs: Any, n_samples: int) -> Tensor:
    try:
        outputs = function.outputs(function.parameters, inputs)
    except (RuntimeError, ValueError, IndexError, AttributeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        shapes = [tuple(tensor.shape) for tensor in iterate_tensors(inputs)]
        raise ValueError(
            f"model: {type(function.model).__name__} failed on the inputs of shape "
            f"{', '.join(map(str, shapes))}: {error}"
        ) from error
    if outputs.ndim == 0 or outputs.shape[0] != n_samples:
        raise ValueError(
            f"model: the outputs have shape {tuple(outputs.shape)} for {n_samples} samples; the "
            "first dimension must be the sample dimension, not a mean or a sum over samples."
        )
    return outputs
