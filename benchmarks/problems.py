"""A network on a batch: what every contender of a comparison is given, as plain arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

N_CLASSES = 10
N_VECTORS = 16
TOKENS_PER_SAMPLE = 128
VOCABULARY = 256


@dataclass(frozen=True)
class Problem:
    """One network, one batch, one residual.

    Parameters
    ----------
    network : {"mlp", "resnet", "gpt-neox"}
        See :mod:`benchmarks.networks_torch` and :mod:`benchmarks.networks_jax`.
    width : int
        Hidden units, channels of the first stage, or embedding size.
    n_samples : int
        Samples; sequences of 128 tokens for the language model.
    residual : str
        Kind of residual; every kernel is divided by the number of rows.
    """

    network: str
    width: int
    n_samples: int
    residual: str = "mse"

    @property
    def name(self) -> str:
        return f"{self.network}-{self.width}-N{self.n_samples}-{self.residual}"

    @property
    def n(self) -> int:
        """Rows of the kernel."""
        if self.network == "gpt-neox":
            return self.n_samples * TOKENS_PER_SAMPLE
        return self.n_samples * N_CLASSES

    def tiny(self) -> Problem:
        """Return the same kind of network and batch, as small as they get."""
        width = {"mlp": 32, "resnet": 4, "gpt-neox": 32}[self.network]
        samples = {"mlp": 16, "resnet": 8, "gpt-neox": 2}[self.network]
        return replace(self, width=width, n_samples=samples)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_data(problem: Problem, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, labels and vectors; what a product costs does not depend on them."""
    generator = np.random.default_rng(seed)
    if problem.network == "gpt-neox":
        shape = (problem.n_samples, TOKENS_PER_SAMPLE)
        inputs = generator.integers(0, VOCABULARY, shape)
        targets = generator.integers(0, VOCABULARY, shape)
    else:
        features = (64,) if problem.network == "mlp" else (3, 32, 32)
        inputs = generator.standard_normal((problem.n_samples, *features))
        targets = generator.integers(0, N_CLASSES, problem.n_samples)
    vectors = generator.standard_normal((problem.n, N_VECTORS))
    return {"inputs": inputs, "targets": targets, "vectors": vectors}


def save_arrays(path: Path, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
    """Write the state (float32, names as in torch) and the data to one ``.npz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{f"state/{name}": value for name, value in state.items()}, **data)


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return state and data as :func:`save_arrays` wrote them."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    state = {name[6:]: value for name, value in arrays.items() if name.startswith("state/")}
    return state, {name: value for name, value in arrays.items() if "/" not in name}
