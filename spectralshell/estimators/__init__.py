"""The scikit-learn classes, one file each, and what they share."""

from spectralshell.estimators.cross_validation import (
    cross_validate_exponent,
    largest_q_within_one_se,
)
from spectralshell.estimators.jacobian_blocks import JacobianBlockDiagnostic
from spectralshell.estimators.shell_energy import ShellEnergyEstimator
from spectralshell.estimators.shell_flux import ShellFluxEstimator
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from spectralshell.estimators.toeplitz import ToeplitzDiagnostic

__all__ = [
    "GRSDTailFitter",
    "JacobianBlockDiagnostic",
    "ShellEnergyEstimator",
    "ShellFluxEstimator",
    "ToeplitzDiagnostic",
    "cross_validate_exponent",
    "largest_q_within_one_se",
]
