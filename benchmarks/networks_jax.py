"""The networks of :mod:`benchmarks.networks_torch` once more, in plain JAX with the same state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Problem

State = dict[str, Any]
_BN_EPSILON = 1e-5


def split_state(state: dict[str, np.ndarray]) -> tuple[State, State]:
    """Return (parameters, running statistics) as JAX arrays, matrices as inputs × outputs.

    neural-tangents knows the structure of a product with a matrix, not with its transpose: with
    torch's layout its structured derivatives are slower by two orders of magnitude.
    """
    arrays = {
        name: jnp.asarray(value.T if value.ndim == 2 else value)
        for name, value in state.items()
        if "num_batches" not in name
    }
    buffers = {name: value for name, value in arrays.items() if "running_" in name}
    return {name: value for name, value in arrays.items() if name not in buffers}, buffers


def apply_function(problem: Problem, buffers: State) -> Callable[[State, Any], Any]:
    """Return (parameters, inputs) ↦ logits."""
    if problem.network == "mlp":
        return _perceptron
    if problem.network == "resnet":
        return lambda parameters, x: _resnet(parameters | buffers, x)
    raise ValueError(f"network {problem.network!r} is not written in JAX.")


def _linear(state: State, name: str, x: Any) -> Any:
    return x @ state[f"{name}.weight"] + state[f"{name}.bias"]


def _perceptron(parameters: State, x: Any) -> Any:
    for index in (0, 2, 4):
        x = jax.nn.gelu(_linear(parameters, str(index), x), approximate=False)
    return _linear(parameters, "6", x)


def _convolve(x: Any, weight: Any, stride: int) -> Any:
    padding = [(weight.shape[2] // 2, weight.shape[3] // 2)] * 2
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), padding, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def _normalise(state: State, name: str, x: Any) -> Any:
    def column(key: str) -> Any:
        return state[f"{name}.{key}"][:, None, None]

    centred = (x - column("running_mean")) * jax.lax.rsqrt(column("running_var") + _BN_EPSILON)
    return centred * column("weight") + column("bias")


def _relu(x: Any) -> Any:
    return jnp.maximum(x, 0.0)


def _resnet(state: State, x: Any) -> Any:
    x = _relu(_normalise(state, "bn1", _convolve(x, state["conv1.weight"], 1)))
    for block in range(8):
        x = _block(state, f"blocks.{block}", x, 2 if block in (2, 4, 6) else 1)
    return _linear(state, "head", x.mean((2, 3)))


def _block(state: State, name: str, x: Any, stride: int) -> Any:
    inner = _convolve(x, state[f"{name}.conv1.weight"], stride)
    inner = _relu(_normalise(state, f"{name}.bn1", inner))
    inner = _normalise(state, f"{name}.bn2", _convolve(inner, state[f"{name}.conv2.weight"], 1))
    if f"{name}.shortcut.0.weight" in state:
        x = _convolve(x, state[f"{name}.shortcut.0.weight"], stride)
        x = _normalise(state, f"{name}.shortcut.1", x)
    return _relu(inner + x)
