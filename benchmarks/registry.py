"""Contenders by name, and the environment each lives in."""

from __future__ import annotations

from importlib import import_module

from benchmarks.contender import Contender

TORCH, JAX = "torch", "jax"

# Name → (module, class, environment). Modules are imported in the worker alone.
_CONTENDERS = {
    "exact kernel": ("contenders_ours", "ExactKernel", TORCH),
    "product": ("contenders_ours", "Product", TORCH),
    "fit": ("contenders_ours", "Fit", TORCH),
    "leading pairs": ("contenders_ours", "LeadingPairs", TORCH),
    "grid": ("contenders_ours", "Grid", TORCH),
    "torch.func Jacobian contraction": ("contenders_plain", "JacobianContraction", TORCH),
    "torch.func NTK-vector products": ("contenders_plain", "NTKVectorProducts", TORCH),
    "torch.func vjp + jvp": ("contenders_plain", "PlainProduct", TORCH),
    "curvlinops": ("contenders_peers", "CurvlinopsProduct", TORCH),
    "curvlinops Lanczos": ("contenders_peers", "CurvlinopsLanczos", TORCH),
    "hessian-eigenthings": ("contenders_peers", "EigenthingsLanczos", TORCH),
    "neural-tangents": ("contenders_jax", "NeuralTangents", JAX),
}

PACKAGES = {
    TORCH: (
        "spectralshell", "torch", "curvlinops-for-pytorch", "hessian-eigenthings", "transformers",
        "scikit-learn", "numpy", "scipy", "pandas",
    ),
    JAX: ("neural-tangents", "jax", "jaxlib", "numpy", "scipy"),
}  # fmt: skip


def contender_class(name: str) -> type[Contender]:
    """Import the class of a contender."""
    module, attribute, _ = _CONTENDERS[name]
    return getattr(import_module(f"benchmarks.{module}"), attribute)


def environment_of(name: str) -> str:
    """Return ``"torch"`` or ``"jax"``."""
    return _CONTENDERS[name][2]
