"""Placement of the shells, the density they stand for, and what they hide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spectralshell.krylov import CumulativeBounds, evaluate_together
from spectralshell.parameter_checks import check_sample_weight
from spectralshell.shells import ShellPartition, SpectralMeasure, cumulative_energies
from spectralshell.warning_categories import DynamicsWarning, ResolutionWarning

# A peak this close to the floor, with this much of its energy unresolved below, may be false.
_SHELLS_NEAR_FLOOR = 2

_HIDDEN_PER_PEAK = 0.5

# Shells that hold less than half of a snapshot's energy do not show where it sits.
_MOST = 0.5

# From here over this module's functions and ``fit`` to the caller's line.
_STACKLEVEL = 4

# Share of the uniform density in the mixture: an empty shell then costs ln(100) and not infinity.
_UNIFORM_SHARE = 0.01

# Energy that rounding may leave on eigenvalues of a null space.
_NEGLIGIBLE_SHARE = 1e-12


def energies_below(measures: Sequence[SpectralMeasure], edges: np.ndarray) -> np.ndarray:
    """Energy strictly below each edge, shape (n_measures, k); edges are positive, non-decreasing.

    Bounds remember their edges, so that a fold or a second fit evaluates nothing again.
    """
    evaluate_together([bounds for _, bounds in _quadratures(measures)], edges)
    return cumulative_energies(measures, edges)


def null_energies(measures: Sequence[SpectralMeasure]) -> np.ndarray:
    """Energy below each measure's own noise, as `SpectralMeasure.null` gives it."""
    noisy = [(m.noise, bounds) for m, bounds in _quadratures(measures) if m.noise > 0.0]
    evaluate_together([bounds for _, bounds in noisy], [[noise] for noise, _ in noisy])
    return np.array([m.null for m in measures])


def _quadratures(
    measures: Sequence[SpectralMeasure],
) -> list[tuple[SpectralMeasure, CumulativeBounds]]:
    return [
        (m, m.bounds) for m in measures if isinstance(m.bounds, CumulativeBounds) and not m.counted
    ]


def warn_of_hidden_energy(
    measures: Sequence[SpectralMeasure], partition: ShellPartition, floor: float
) -> None:
    """Warn before a profile is read that the resolution does not support."""
    totals = np.array([m.total for m in measures])
    below = energies_below(measures, partition.edges[:-1])
    # Below the noise there is nothing to resolve; without noise, null is all there is.
    noise = np.array([m.noise for m in measures])
    unresolved = np.where(noise > 0.0, below[:, 0] - null_energies(measures), 0.0)
    # Most of a snapshot's energy hides, or the profile peaks at the floor with energy below it.
    worst = int(np.argmax(unresolved - _MOST * totals))
    if unresolved[worst] > _MOST * totals[worst]:
        _warn(_most_is_hidden(measures, worst, unresolved[worst] / totals[worst], floor))
        return
    shells = np.diff(below, append=totals[:, None]).mean(axis=0)
    peak = int(shells.argmax())
    if peak < _SHELLS_NEAR_FLOOR and unresolved.mean() > _HIDDEN_PER_PEAK * shells[peak]:
        _warn(
            f"The energy per shell is largest in {partition.names[peak]}, next to the resolution "
            f"floor {floor:.3g}, and energy lies unresolved below it: do not call the profile "
            "unimodal. The peak may move with n_steps; raise n_steps or use solver='exact'."
        )


def warn_of_other_derivative(measures: Sequence[SpectralMeasure]) -> None:
    """Warn where outputs do not change as J says, so that no training dissipates as M does."""
    worst = max(measures, key=lambda m: m.jacobian_defect)
    if worst.jacobian_defect:
        warnings.warn(
            f"The outputs of the snapshot at tau={worst.tau:g}, batch={worst.batch!r} do not "
            f"change as the Jacobian says (they differ by {worst.jacobian_defect:.1e}): the model "
            "rounds, detaches, scales or reverses gradients inside, or caches a function of its "
            "weights without its gradient. Energies and dissipation are those of M = J J* as "
            "reverse mode gives J, not of training; dynamics_exact_ is False.",
            DynamicsWarning,
            stacklevel=3,
        )


def _most_is_hidden(
    measures: Sequence[SpectralMeasure], worst: int, share: float, floor: float
) -> str:
    highest = max(measures, key=lambda m: m.floor)
    hidden = measures[worst]
    return (
        f"{share:.0%} of the energy of the snapshot at tau={hidden.tau:g}, batch={hidden.batch!r} "
        f"lies below the resolution floor {floor:.3g} and is in no shell: do not call the profile "
        f"unimodal. The snapshot at tau={highest.tau:g}, batch={highest.batch!r} has the highest "
        "floor; raise n_steps, use solver='exact', fit such times apart, or set floor=."
    )


def _warn(message: str) -> None:
    warnings.warn(message, ResolutionWarning, stacklevel=_STACKLEVEL)


@dataclass(frozen=True)
class ShellDensity:
    """Piecewise-constant density of energy per unit ln λ on a window."""

    edges: np.ndarray  # window ends and the shell edges between them, 1/τ
    density: np.ndarray  # one value for each bin, integrating to 1

    @classmethod
    def from_measures(
        cls,
        measures: Sequence[SpectralMeasure],
        shell_edges: np.ndarray,
        window: tuple[float, float],
    ) -> ShellDensity:
        """Fit to the mean energies of training measures; uniform if they have none in the window.

        A window of a single rate, below which nothing was resolved, has no bins: scores are NaN.
        """
        lo, hi = window
        if not lo < hi:
            return cls(edges=np.array([lo]), density=np.empty(0))
        inside = shell_edges[(shell_edges > lo) & (shell_edges < hi)]
        edges = np.concatenate([[lo], inside, [np.nextafter(hi, np.inf)]])
        widths = np.diff(np.log(edges))
        energies = np.diff(energies_below(measures, edges)).mean(axis=0)
        total = energies.sum()
        uniform = 1.0 / widths.sum()
        shares = energies / total if total > 0.0 else widths * uniform
        density = (1.0 - _UNIFORM_SHARE) * shares / widths + _UNIFORM_SHARE * uniform
        return cls(edges=edges, density=density)

    def score(self, measures: Sequence[SpectralMeasure], sample_weight: Any = None) -> float:
        """Energy-weighted mean log-density of the nodes in the window, in nats; NaN for none."""
        weights = check_sample_weight(sample_weight, len(measures))
        log_density = np.log(self.density)
        total = gain = 0.0
        for measure, weight in zip(measures, weights, strict=True):
            inside = (measure.nodes >= self.edges[0]) & (measure.nodes < self.edges[-1])
            energy = weight * measure.weights[inside]
            shell = np.searchsorted(self.edges, measure.nodes[inside], side="right") - 1
            total += energy.sum()
            gain += energy @ log_density[shell]
        return float(gain / total) if total > 0.0 else float("nan")


@dataclass(frozen=True)
class PlacedShells:
    """A partition and what it was placed by."""

    partition: ShellPartition  # to the shell that holds lambda_max
    floor: float
    lambda_max: float
    range: tuple[float, float]  # floor and lambda_max; both lambda_0 where M is zero


def place_shells(
    measures: Sequence[SpectralMeasure], *, q: float, lambda_0: float, floor: str | float
) -> PlacedShells:
    """Place shells between the resolution floor, "auto" or given, and the largest eigenvalue.

    The first edge is at or above the floor; empty shells at the start are dropped.
    """
    lambda_max = max(m.lambda_max for m in measures)
    lowest = max(m.floor for m in measures) if isinstance(floor, str) else float(floor)
    if not isinstance(floor, str) and 0.0 < lambda_max <= lowest:
        raise ValueError(
            f"floor must lie below the largest eigenvalue, {lambda_max:.6g}, got {floor!r}; "
            "lower it or leave floor='auto'."
        )
    # A kernel that is zero has no rates to place shells by; one shell at lambda_0 is legal.
    top = lambda_max if lambda_max > 0.0 else lambda_0
    bottom = min(lowest, top) if lowest > 0.0 else top
    partition = ShellPartition.covering(bottom, top, q=q, lambda_0=lambda_0)
    return PlacedShells(
        _without_empty_start(partition, measures), lowest, lambda_max, (bottom, top)
    )


def _without_empty_start(
    partition: ShellPartition, measures: Sequence[SpectralMeasure]
) -> ShellPartition:
    lowest = np.inf
    for measure in measures:
        lowest = _lowest_rate(measure, partition.edges[0], lowest)
        if lowest < partition.edges[1]:  # nothing is dropped, whatever the others hold
            break
    first = int(partition.index(lowest)) if np.isfinite(lowest) else 0
    return replace(partition, first=partition.first + first, n_shells=partition.n_shells - first)


def _lowest_rate(measure: SpectralMeasure, start: float, end: float) -> float:
    """Return the lowest node in [start, end) at which energy has gathered, or else ``end``."""
    first, last = measure.nodes.searchsorted([start, end])
    gathered = measure.weights[first:last].cumsum() > _NEGLIGIBLE_SHARE * measure.total
    found = gathered.argmax() if gathered.size else 0
    return float(measure.nodes[first + found]) if gathered.any() else end
