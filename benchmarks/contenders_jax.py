"""neural-tangents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np

from benchmarks.contender import Contender
from benchmarks.networks_jax import apply_function, split_state


class NeuralTangents(Contender):
    """``empirical_ntk_fn``, compiled before the first run."""

    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        self.parameters, self.buffers = split_state(state)
        self.inputs = jnp.asarray(data["inputs"], jnp.float32)

    def prepare(self) -> None:
        kernel = nt.empirical_ntk_fn(
            apply_function(self.problem, self.buffers),
            trace_axes=(),
            vmap_axes=0,
            implementation=nt.NtkImplementation[self.options["implementation"]],
        )
        function = jax.jit(lambda parameters, x: kernel(x, None, parameters))
        self.compiled = function.lower(self.parameters, self.inputs).compile()

    def run(self) -> Any:
        return self.compiled(self.parameters, self.inputs).block_until_ready()

    def as_array(self, result: Any) -> np.ndarray:
        blocks = np.asarray(result, dtype=np.float64).transpose(0, 2, 1, 3)
        return blocks.reshape(self.problem.n, self.problem.n) / self.problem.n_samples
