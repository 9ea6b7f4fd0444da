"""The empirical tangent kernel M = J J* as something that multiplies, and as a matrix."""

from spectralshell.operators.build import build_exact_kernel, build_kernel
from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.jacobian.ladder import DifferentiationError
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.motion.derivative import KernelDerivative
from spectralshell.operators.motion.directions import Direction
from spectralshell.operators.motion.kernel_motion import (
    KernelMotion,
    build_kernel_derivative,
    survey_motion,
)

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
