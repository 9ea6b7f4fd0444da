"""Spectral-shell measurements of how neural networks learn, in the style of scikit-learn."""

from spectralshell._version import __version__
from spectralshell.displays import ExponentDisplay, ShellEnergyDisplay, TailFitDisplay
from spectralshell.estimators import (
    GRSDTailFitter,
    ShellEnergyEstimator,
    cross_validate_exponent,
    largest_q_within_one_se,
)
from spectralshell.shells import ShellPartition, SpectralMeasure
from spectralshell.snapshots import Snapshot, make_snapshots

__all__ = [
    "ExponentDisplay",
    "GRSDTailFitter",
    "ShellEnergyDisplay",
    "ShellEnergyEstimator",
    "ShellPartition",
    "Snapshot",
    "SpectralMeasure",
    "TailFitDisplay",
    "__version__",
    "cross_validate_exponent",
    "largest_q_within_one_se",
    "make_snapshots",
]
