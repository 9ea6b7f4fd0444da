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

REPEAT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative difference of two evaluations: above what unordered sums on a GPU give."""

COUPLING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of a sample's output alone and in company: above that of other kernels."""

_MAX_PROBED_SAMPLES = 8


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


def evaluate(function: ModelFunction, parts: list[Any]) -> tuple[Tensor, float]:
    """Evaluate a model twice on chunks of inputs, and check what comes back.

    Parameters
    ----------
    function : ModelFunction
    parts : list
        Inputs of each chunk, on the device; the model is called on each alone.

    Returns
    -------
    outputs : Tensor
        Samples first.
    forward_flops : float
        Operations that matrix products and convolutions of one evaluation take, by shape.

    Raises
    ------
    ValueError
        If the model fails, its outputs are not finite, have no sample dimension, or differ
        between two evaluations; the message names the module where that starts.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = torch.cat([_evaluate_part(function, part) for part in parts])
    flops = float(counter.get_total_flops())
    if not outputs.is_floating_point():
        raise ValueError(
            f"model: the outputs have dtype {outputs.dtype}; a kernel needs floating ones."
        )
    if outputs.is_meta:
        return outputs, flops
    if not bool(torch.isfinite(outputs).all()):
        where = first_nonfinite_module(function, parts)
        raise ValueError(
            f"model: the outputs hold NaN or infinite values, first in {where}; check inputs and "
            "weights."
        )
    with torch.no_grad():
        again = torch.cat([_evaluate_part(function, part) for part in parts])
    scale = float(outputs.abs().max())
    difference = float((outputs - again).abs().max())
    if not difference <= REPEAT_TOLERANCE[function.dtype] * scale:
        where = first_random_module(function, parts)
        raise ValueError(
            "model: two evaluations in eval mode differ by "
            f"{difference:.1e} (largest output {scale:.1e}), first in {where}: randomness such as "
            "dropout stays on in eval mode, or the model changes its own state; switch it off."
        )
    return outputs, flops


def check_independent_samples(
    function: ModelFunction, inputs: Any, n_samples: int, chunk_size: int
) -> None:
    """Raise ValueError if the outputs of a sample depend on the other samples of its batch.

    A few samples spread over the batch, a chunk at most (but two), are evaluated together and in
    two halves.
    """
    size = min(_MAX_PROBED_SAMPLES, n_samples, max(2, chunk_size))
    if size < 2:
        return
    picked = torch.linspace(0, n_samples - 1, size).round().long().tolist()
    with torch.no_grad():
        together = _evaluate_part(function, take_samples(inputs, picked, n_samples))
        halves = [
            _evaluate_part(function, take_samples(inputs, half, n_samples))
            for half in (picked[: size // 2], picked[size // 2 :])
        ]
    apart = torch.cat(halves)
    if together.is_meta:
        return
    difference = float((together - apart).abs().max()) if together.shape == apart.shape else 1.0
    if not difference <= COUPLING_TOLERANCE[function.dtype] * float(together.abs().max()):
        raise ValueError(
            "chunk_size: the outputs of a sample depend on the other samples of its batch "
            f"(difference {difference:.1e}), for example through batch statistics, so the kernel "
            "cannot be computed in chunks; use chunk_size=None with a batch that fits in memory, "
            "or remove the coupling."
        )


def take_samples(inputs: Any, positions: list[int] | slice, n_samples: int) -> Any:
    """Take samples from every tensor whose first dimension counts samples."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != n_samples:
            return tensor
        return tensor[positions]

    return map_tensors(take, inputs)


def _evaluate_part(function: ModelFunction, inputs: Any) -> Tensor:
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
    n_samples = next(t.shape[0] for t in iterate_tensors(inputs) if t.ndim)
    if outputs.ndim == 0 or outputs.shape[0] != n_samples:
        raise ValueError(
            f"model: the outputs have shape {tuple(outputs.shape)} for {n_samples} samples; the "
            "first dimension must be the sample dimension, not a mean or a sum over samples."
        )
    return outputs
