"""The empirical tangent kernel M = J J* as something that multiplies, and as a matrix."""

from spectralshell.operators.directions import Direction
from spectralshell.operators.exact_builder import build_exact_kernel
from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.kernel import KernelOperator, build_kernel
from spectralshell.operators.kernel_derivative import KernelDerivative
from spectralshell.operators.kernel_motion import KernelMotion
from spectralshell.operators.ladder import DifferentiationError
from spectralshell.operators.motion_builder import build_kernel_derivative, survey_motion

__all__ = [
    "DifferentiationError",
    "Direction",
    "ExactKernel",
    "KernelDerivative",
    "KernelMotion",
    "KernelOperator",
    "build_exact_kernel",
    "build_kernel",
    "build_kernel_derivative",
    "survey_motion",
]
