"""Shell energies of templates near b = 1, with gamma noise that batches share over τ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectralshell.datasets import make_grsd_spectra

SLOPES = (0.7, 0.85, 0.95, 1.05, 1.15, 1.2, 1.3, 1.6)

# Ten shells of ratio 2; 88 nodes per unit of ln λ put whole cells into each of them.
EDGES = 1e-3 * 2.0 ** np.arange(11)
NODES_PER_LOG = 88
# Six frontiers between these shares of the window, in ln λ, as in the package's data sets.
INSIDE = np.linspace(0.25, 0.85, 6)
N_BATCHES = 12


def noise(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes, and factors of mean 1, (taus, batches, nodes): gamma noise of 20 %.

    A pure law of slope 1 has equal energy in every cell of ln λ, so its weights are the noise.
    """
    measures = make_grsd_spectra(
        1.0,
        K=0,
        n_batches=N_BATCHES,
        window=(EDGES[0], EDGES[-1]),
        noise="gamma",
        nodes_per_log=NODES_PER_LOG,
        random_state=seed,
    )
    weights = np.stack([measure.weights for measure in measures])
    step = np.log(measures[0].nodes[1] / measures[0].nodes[0])
    return measures[0].nodes, weights.reshape(len(INSIDE), N_BATCHES, -1) / step


@dataclass(frozen=True)
class Sample:
    """Energies by row and shell; rows by tau, then batch."""

    energies: np.ndarray
    tau: np.ndarray

    @property
    def batch(self) -> np.ndarray:
        """Batch of each row."""
        return np.tile(np.arange(N_BATCHES), len(INSIDE))


def template(b: float, nodes: np.ndarray, factors: np.ndarray) -> Sample:
    """Energies of a template of slope b under this noise."""
    frontiers = EDGES[0] * (EDGES[-1] / EDGES[0]) ** INSIDE
    kappas = np.sort(frontiers ** (1.0 - b))
    logs = (1.0 - b) * np.log(nodes) - kappas[:, None] * nodes ** (b - 1.0)
    cells = np.exp(logs)[:, None] * factors
    energies = cells.reshape(-1, len(EDGES) - 1, nodes.size // (len(EDGES) - 1)).sum(axis=-1)
    return Sample(energies, np.repeat(kappas / kappas[0], N_BATCHES))
