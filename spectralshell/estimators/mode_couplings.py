"""Modes of one snapshot's kernel and how a direction couples them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralshell.operators.directions import PER_TAU

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
    unit : str
        What rates are per: ``"per tau"``, for gradient flows, random directions of their length and
        the way between snapshots of different times, or ``"as given"``.
    rate_noise : float
        2-norm of the rounding error of dM/dt. No coupling is wrong by more, and in the root mean
        square by no more than that over the root of ``n_outputs``.
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
    unit: str = PER_TAU
    rate_noise: float = 0.0
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = "ok"

    @cached_property
    def resolved(self) -> NDArray[np.bool_]:
        """Modes that a statistic may use: converged, with λ > 0 at or above the floor, and known.

        See :func:`known_couplings` for the last.
        """
        above = (self.eigenvalues >= self.floor) & (self.eigenvalues > 0.0)
        # ‖error‖_F ≤ √n ‖error‖: the root mean square of an entry.
        noise = self.rate_noise / self.n_outputs**0.5 if self.rate_noise else 0.0
        known = known_couplings(self.couplings, self.eigenvalues, noise)
        return np.asarray(self.converged & above & known, dtype=np.bool_)

    @property
    def frozen(self) -> bool:
        """Whether the kernel does not move along the direction, or nothing moves."""
        return not self.couplings.any()

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> ModeCouplings:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


def known_couplings(couplings: Floats, eigenvalues: Floats, noise: float) -> NDArray[np.bool_]:
    """Tell which modes have couplings that are more than rounding.

    Parameters
    ----------
    couplings : ndarray of shape (k, k)
        V.
    eigenvalues : ndarray of shape (k,)
    noise : float
        Root mean square of the error of an entry of V.

    Returns
    -------
    ndarray of bool, shape (k,)
        From the largest λ down, as long as the noise of V_uu, over λ_u, is less than the root mean
        square of V_uv/√(λ_u λ_v) over the modes above. All of them where V is zero.

    Examples
    --------
    >>> known_couplings(np.diag([0.5, 8.0, 16.0]), np.array([1.0, 8.0, 16.0]), 1.0).tolist()
    [False, True, True]
    """
    known = np.full(eigenvalues.shape, True)
    if noise <= 0.0 or not couplings.any():
        return known
    order = np.argsort(-eigenvalues, kind="stable")
    order = order[eigenvalues[order] > 0.0]
    rates = eigenvalues[order]
    squares = couplings[np.ix_(order, order)] ** 2 / (rates[:, None] * rates)
    sums = np.diagonal(squares.cumsum(axis=0).cumsum(axis=1))
    sizes = np.sqrt(sums) / np.arange(1, rates.size + 1)
    above = np.append(sizes[:1], sizes[:-1])
    known[order] = np.logical_and.accumulate(noise <= rates * above)
    return known


__all__ = ["ModeCouplings", "known_couplings"]
