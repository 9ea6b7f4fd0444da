"""Mean of spectral measures over batches: measures are averaged, never kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectralshell.shells.measure import Floats, SpectralMeasure
from spectralshell.statuses import join_statuses


@dataclass(frozen=True)
class MeanBounds:
    """Bounds of the mean energy of several measures: the means of their bounds."""

    measures: tuple[SpectralMeasure, ...]

    def at(self, edges: Floats, /) -> tuple[Floats, Floats]:
        """Return (lower, upper) of the mean energy strictly below each edge."""
        triples = [measure.cumulative(edges) for measure in self.measures]
        lower = np.mean([triple[0] for triple in triples], axis=0)
        upper = np.mean([triple[2] for triple in triples], axis=0)
        return lower, upper

    def unwidened(self, edges: Floats, /) -> tuple[Floats, Floats]:
        """Return the mean of the estimates, as both bounds."""
        middle = np.mean([measure.estimate(edges) for measure in self.measures], axis=0)
        return middle, middle


def mean_measure(measures: Sequence[SpectralMeasure]) -> SpectralMeasure:
    """Return the average over batches of measures taken at one τ of one model.

    Energies and their bounds are averaged (never matrices, never logarithms).

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        At least one, all of the same ``tau`` and ``name``.

    Returns
    -------
    SpectralMeasure
        All nodes, with weights divided by the number of measures; the largest floor and λ_max;
        ``batch="mean"``; counts of products summed; ``solver="mixed"`` where they differ. Nodes
        that a measure counts as null, since they are below its own noise, are at 0, and ``noise``
        is the smallest.

    Raises
    ------
    ValueError
        If there is none, or labels differ.

    Examples
    --------
    >>> one = SpectralMeasure([1.0], [0.5], total=0.5, lambda_max=1.0, floor=0.1, noise=0.0)
    >>> two = SpectralMeasure([4.0], [1.5], total=1.5, lambda_max=4.0, floor=0.2, noise=0.0)
    >>> mean = mean_measure([one, two])
    >>> mean.energies([0.5, 2.0, 8.0]).tolist(), mean.floor
    ([0.0, 0.25, 0.75], 0.2)
    """
    parts = tuple(measures)
    if not parts:
        raise ValueError("measures is empty; pass at least one SpectralMeasure.")
    for label in ("tau", "name"):
        values = {getattr(part, label) for part in parts}
        if len(values) > 1:
            raise ValueError(
                f"measures differ in {label} ({sorted(map(str, values))}); average over batches at "
                f"one {label} only."
            )
    solvers = {part.solver for part in parts}
    norms = [part.residual_norms for part in parts if part.residual_norms is not None]
    return replace(
        parts[0],
        nodes=np.concatenate([_without_noise(part) for part in parts]),
        weights=np.concatenate([part.weights for part in parts]) / len(parts),
        total=sum(part.total for part in parts) / len(parts),
        lambda_max=max(part.lambda_max for part in parts),
        floor=max(part.floor for part in parts),
        noise=min(part.noise for part in parts),
        batch="mean",
        bounds=None if all(part.bounds is None for part in parts) else MeanBounds(parts),
        residual_norms=np.concatenate(norms) if len(norms) == len(parts) else None,
        solver=solvers.pop() if len(solvers) == 1 else "mixed",
        rung="; ".join(dict.fromkeys(part.rung for part in parts if part.rung)),
        n_matvecs=sum(part.n_matvecs for part in parts),
        n_probes=sum(part.n_probes for part in parts),
        n_outputs=sum(part.n_outputs for part in parts),
        n_rows=sum(part.n_rows for part in parts),
        dynamics_exact=all(part.dynamics_exact for part in parts),
        jacobian_defect=max(part.jacobian_defect for part in parts),
        status=join_statuses(part.status for part in parts),
    )


def _without_noise(part: SpectralMeasure) -> Floats:
    null = part.counted & (part.nodes >= 0.0) & (part.nodes < part.noise)
    return np.where(null, 0.0, part.nodes)
