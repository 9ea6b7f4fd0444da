"""Modes of one snapshot's kernel and how a direction couples them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ModeCouplings:
    """V = Uᵀ (dM/dt) U between k modes of M, and the error along them.

    Made by :func:`~spectralshell.estimators.coupling_measurement.measure_couplings`; it does not
    depend on the shells.

    Parameters
    ----------
    eigenvalues : ndarray of shape (k,)
        Ascending, 1/τ; rounding may leave some below zero.
    amplitudes : ndarray of shape (k,)
        g = ⟨e, u⟩. Their squares sum to ‖e‖²: the error lies in the span of the modes.
    error_rates : ndarray of shape (k,)
        ⟨ė, u⟩ along the direction; what ė has outside the span is missing.
    couplings : ndarray of shape (k, k)
        V along the direction, symmetric, 1/τ².
    random_couplings : ndarray of shape (n_random, k, k)
        V along random directions of the same norm.
    residual_norms : ndarray of shape (k,)
        ‖M u − λ u‖, rounding included.
    converged : ndarray of bool, shape (k,)
        Modes whose residual norm is small beside their own eigenvalue.
    lambda_max, floor, noise : float
        Largest eigenvalue; the λ below which modes are unresolved; norm of the rounding error of
        M. All 1/τ.
    total, total_rate : float
        ½‖e‖², and ⟨ė, e⟩: how fast ½‖e‖² changes along the direction.
    direction, derivative : str
        What the parameters do, and how M was differentiated.
    direction_norm : float
        ‖θ̇‖ over the parameters.
    solver : str
        ``"exact"`` or ``"lanczos"``.
    n_matvecs : int
        Products with M behind the modes.
    n_outputs, n_rows, n_parameters : int
        Entries of e, rows N, and parameters that move.
    dynamics_exact : bool
        Whether ė = −M e along the direction.
    tau, batch, name
        Labels of the snapshot.
    status : str
        ``"ok"``, or phrases joined by ``"; "``.
    """

    eigenvalues: Floats
    amplitudes: Floats
    error_rates: Floats
    couplings: Floats
    random_couplings: Floats
    residual_norms: Floats
    converged: NDArray[np.bool_]
    lambda_max: float
    floor: float
    noise: float
    total: float
    total_rate: float
    direction: str
    derivative: str
    direction_norm: float
    solver: str
    n_matvecs: int
    n_outputs: int
    n_rows: int
    n_parameters: int
    dynamics_exact: bool
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = "ok"

    @property
    def resolved(self) -> NDArray[np.bool_]:
        """Converged modes at or above the floor, with λ > 0: those that a statistic may use."""
        above = (self.eigenvalues >= self.floor) & (self.eigenvalues > 0.0)
        return np.asarray(self.converged & above, dtype=np.bool_)

    @property
    def frozen(self) -> bool:
        """Whether the kernel does not move along the direction, or nothing moves."""
        return not self.couplings.any()

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> ModeCouplings:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


__all__ = ["ModeCouplings"]
