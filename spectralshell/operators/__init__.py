"""M = J Jᵀ as something that multiplies: built from a model by differentiation, never stored."""

from spectralshell.operators.kernel import KernelOperator, build_kernel
from spectralshell.operators.ladder import DifferentiationError

__all__ = ["DifferentiationError", "KernelOperator", "build_kernel"]
