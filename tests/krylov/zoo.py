"""Symmetric operators with a spectrum known by construction, to more digits than float64 has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.device import make_tensor

KINDS = (
    "power law",
    "gap",
    "clusters",
    "repeated",
    "rank deficient",
    "condition 1e12",
)
WIDE = np.longdouble


@dataclass(frozen=True)
class Case:
    """M = U diag(λ) Uᵀ rounded to float64, its spectrum, and a start vector."""

    matrix: np.ndarray
    eigenvalues: np.ndarray
    start: np.ndarray
    energies: np.ndarray
    depth: int

    @property
    def mass(self) -> float:
        return float(self.energies.sum())

    @property
    def lambda_max(self) -> float:
        return float(self.eigenvalues.max())

    def product(self, dtype: torch.dtype = torch.float64):
        matrix = make_tensor(self.matrix).to(dtype)
        return lambda vector: matrix @ vector.to(dtype)

    def truth(self, edges: np.ndarray) -> np.ndarray:
        """Energy strictly below each edge, from the constructed spectrum."""
        return np.array([self.energies[self.eigenvalues < edge].sum() for edge in edges])


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "power law":
        return np.arange(1, n + 1) ** -rng.uniform(0.5, 4.0)
    if kind == "gap":
        top = max(n // 3, 1)
        return np.concatenate([rng.uniform(0.5, 1, top), rng.uniform(0.5, 1, n - top) * 1e-5])
    if kind == "clusters":
        centres = 10.0 ** rng.uniform(-6, 0, max(n // 6, 1))
        return rng.choice(centres, n) * (1 + 1e-9 * rng.standard_normal(n))
    if kind == "repeated":
        return rng.choice(10.0 ** rng.uniform(-8, 0, max(n // 4, 1)), n)
    if kind == "rank deficient":
        values = 10.0 ** rng.uniform(-6, 0, n)
        values[rng.random(n) < 0.5] = 0.0
        return values
    return np.logspace(-12, 0, n)


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    n = int(rng.integers(1, 41))
    eigenvalues = spectrum(kind, n, rng) * 10.0 ** rng.uniform(-3, 3)
    vectors = np.linalg.qr(rng.standard_normal((n, n)))[0].astype(WIDE)
    # One Newton step makes the columns orthonormal to the wider format's rounding.
    vectors = vectors @ (1.5 * np.eye(n, dtype=WIDE) - 0.5 * (vectors.T @ vectors))
    matrix = (vectors * eigenvalues) @ vectors.T
    # Amplitudes of many shapes: flat, falling and rising with λ, down to 1e-9.
    ratio = np.maximum(eigenvalues / max(eigenvalues.max(), 1e-300), 1e-12)
    amplitudes = rng.standard_normal(n) * ratio ** rng.uniform(-0.3, 0.75)
    start = np.asarray(vectors @ amplitudes, dtype=np.float64)
    exact = vectors.T @ start.astype(WIDE)
    depth = int(rng.integers(1, n + 2))
    return Case(
        np.asarray(0.5 * (matrix + matrix.T), dtype=np.float64),
        eigenvalues,
        start,
        np.asarray(0.5 * exact**2, dtype=np.float64),
        depth,
    )


def edges_of(case: Case, nodes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges over the whole range, exactly on Ritz values, and exactly on eigenvalues."""
    anywhere = case.lambda_max * 10.0 ** rng.uniform(-12, 0.3, 24)
    on_ritz = np.abs(rng.choice(nodes, min(8, len(nodes)), replace=False))
    on_eigenvalues = rng.choice(case.eigenvalues, min(8, len(case.eigenvalues)), replace=False)
    return np.concatenate([anywhere, on_ritz, on_eigenvalues])
