"""Activations with kinks, whose gates flip where an exact derivative does not see it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from spectralshell.operators.jacobian.ladder import is_out_of_memory
from spectralshell.operators.problem import Evaluation
from spectralshell.warning_categories import GateWarning

_KINKED = (
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "selu"),
    *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink"),
    *("rnn_relu", "rnn_relu_cell"),
    *("max_pool1d", "max_pool2d", "max_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("fractional_max_pool2d", "fractional_max_pool3d"),
    *("abs", "absolute", "clamp", "clip", "clamp_min", "clamp_max"),
    *("maximum", "minimum", "max", "min", "amax", "amin", "fmax", "fmin", "cummax", "cummin"),
    *("median", "nanmedian", "kthvalue", "topk", "sort", "l1_loss"),
)

_SAMPLES = 2
"""Samples that a model is first recorded on."""


def find_gates(evaluation: Evaluation) -> list[str]:
    """Return the names of the kinked functions that the residual calls on the parameters' way.

    To be called inside the model's guard. Costs a recorded evaluation of two samples, if they run.
    """
    problem = evaluation.problem
    try:
        return _record(evaluation, min(_SAMPLES, problem.n_samples))
    except Exception as error:  # whatever a model raises that was built for another batch
        if is_out_of_memory(error):
            raise
        return _record(evaluation, problem.n_samples)


def warn_of_gates(names: list[str], *, option: str = "method", stacklevel: int) -> None:
    """Say what an exact derivative misses where activations have kinks.

    ``option`` names the parameter that chooses how to differentiate.
    """
    if not names:
        return
    warnings.warn(
        f"the model uses {', '.join(names)}, whose slope jumps at a gate: the exact derivative of "
        "the kernel holds every gate as it is and misses that gates flip along the direction. "
        f"{option}='difference' sees the flips between its two points, more of them, and smoother, "
        "with a larger `step`; a smooth activation has none.",
        GateWarning,
        stacklevel=stacklevel + 1,
    )


def _record(evaluation: Evaluation, n_samples: int) -> list[str]:
    function = evaluation.problem.function
    leaves = tuple(p.detach().requires_grad_() for p in function.parameters)
    vector = evaluation.vector_function(evaluation.take(0, n_samples))
    recorder = _GateRecorder()
    with torch.enable_grad(), recorder:
        vector(*leaves)
    return list(recorder.found)


class _GateRecorder(TorchFunctionMode):
    """While active, notes the kinked functions that are called on what requires gradients.

    Not comparisons, as most choose masks: what ``torch.where`` makes of one is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._kinked = _kinked_functions()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note it if it has kinks."""
        kwargs = kwargs or {}
        name = self._kinked.get(func)
        if func is F.elu and _has_kink(*args, **kwargs):
            name = "elu"
        if name is not None and _differentiated((args, kwargs)):
            self.found[name] = None
        return func(*args, **kwargs)


def _has_kink(input: Any, alpha: float = 1.0, inplace: bool = False) -> bool:
    return alpha != 1.0


def _differentiated(arguments: Any) -> bool:
    return any(
        tensor.requires_grad and tensor.numel() > 1
        for tensor in tree_flatten(arguments)[0]
        if isinstance(tensor, Tensor)
    )


@cache
def _kinked_functions() -> dict[Any, str]:
    """Return the functions of torch with kinks, in all their spellings, and their names."""
    return {
        function: name
        for name in _KINKED
        for spelling in (name, f"{name}_", f"{name}_with_indices")
        for home in (torch, torch.Tensor, F)
        if callable(function := getattr(home, spelling, None))
    }
