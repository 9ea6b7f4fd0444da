"""The empirical tangent kernel M = J J* as something that multiplies, and as a matrix."""

from spectralshell.operators.exact_builder import build_exact_kernel
from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.kernel import KernelOperator, build_kernel
from spectralshell.operators.ladder import DifferentiationError

__all__ = [
    "DifferentiationError",
    "ExactKernel",
    "KernelOperator",
    "build_exact_kernel",
    "build_kernel",
]
