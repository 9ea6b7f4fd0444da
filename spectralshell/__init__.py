"""Spectral-shell measurements of how neural networks learn, in the style of scikit-learn."""

from spectralshell._version import __version__
from spectralshell.displays import (
    CoherenceDisplay,
    ExponentDisplay,
    ShellEnergyDisplay,
    ShellFluxDisplay,
    TailFitDisplay,
    ToeplitzDisplay,
)
from spectralshell.estimators import (
    GRSDTailFitter,
    JacobianBlockDiagnostic,
    ShellEnergyEstimator,
    ShellFluxEstimator,
    ToeplitzDiagnostic,
    cross_validate_exponent,
    largest_q_within_one_se,
)
from spectralshell.models.checkpoints.request import Checkpoint
from spectralshell.shells import ShellPartition, SpectralMeasure
from spectralshell.snapshots import Snapshot, make_snapshots

__all__ = [
    "Checkpoint",
    "CoherenceDisplay",
    "ExponentDisplay",
    "GRSDTailFitter",
    "JacobianBlockDiagnostic",
    "ShellEnergyDisplay",
    "ShellEnergyEstimator",
    "ShellFluxDisplay",
    "ShellFluxEstimator",
    "ShellPartition",
    "Snapshot",
    "SpectralMeasure",
    "TailFitDisplay",
    "ToeplitzDiagnostic",
    "ToeplitzDisplay",
    "__version__",
    "cross_validate_exponent",
    "largest_q_within_one_se",
    "make_snapshots",
]
