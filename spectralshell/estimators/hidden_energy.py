"""Warnings about energy below the resolution floor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from spectralshell.estimators.energies_below import energies_below, null_energies
from spectralshell.shells import ShellPartition, SpectralMeasure
from spectralshell.warning_categories import ResolutionWarning

# A peak this close to the floor, with this much of its energy unresolved below, may be false.
_SHELLS_NEAR_FLOOR = 2
_HIDDEN_PER_PEAK = 0.5
# Shells that hold less than half of a snapshot's energy do not show where it sits.
_MOST = 0.5
# From here over this module's functions, ``fit`` and scikit-learn's wrapper to the caller's line.
_STACKLEVEL = 5


def warn_of_hidden_energy(
    measures: Sequence[SpectralMeasure], partition: ShellPartition, floor: float
) -> None:
    """Warn before a profile is read that the resolution does not support.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        Training measures.
    partition : ShellPartition
        The fitted shells.
    floor : float
        Resolution floor, 1/τ.

    Warns
    -----
    ResolutionWarning
        If most of a snapshot's energy is unresolved, else if the mean energy per shell is largest
        next to the floor while energy lies unresolved below it.
    """
    totals = np.array([m.total for m in measures])
    below = energies_below(measures, partition.edges[:-1])
    # Below the noise there is nothing to resolve; without noise, null is all there is.
    noise = np.array([m.noise for m in measures])
    unresolved = np.where(noise > 0.0, below[:, 0] - null_energies(measures), 0.0)
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
