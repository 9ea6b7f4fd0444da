"""The balance of soft shells from energies at two displaced parameters, with the error frozen.

Where there are too many modes for their couplings, the transfer ½⟨e, D[w_α(M)](dM/dt) e⟩ is the
rate of ½⟨e, w_α(M) e⟩ with e held fixed, and each of these energies is a quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_real
from spectralshell.shells.flux import EdgeBalance
from spectralshell.shells.measure_checks import finite_vector
from spectralshell.shells.soft_shells import SoftShells

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ErrorRule:
    """A quadrature rule of an error's spectral measure: rates and the energies ½g² there.

    Parameters
    ----------
    nodes : ndarray of shape (m,)
        Rates, unit 1/τ.
    energies : ndarray of shape (m,)
        Energies at the nodes.
    """

    nodes: Floats
    energies: Floats

    def below(self, shells: SoftShells) -> Floats:
        """Return the energy below each edge, what has no node not counted."""
        below: Floats = shells.below(self.nodes) @ self.energies
        return below


def flux_by_difference(
    forward: ErrorRule, backward: ErrorRule, amount: float, shells: SoftShells
) -> Floats:
    """Return the flux through each edge from the energies of a frozen error at θ ± h θ̇.

    Parameters
    ----------
    forward, backward : ErrorRule
        Rules of the error at θ in the kernels at θ + h θ̇ and θ − h θ̇.
    amount : float
        h, in units of τ.
    shells : SoftShells
        The weights.

    Returns
    -------
    ndarray of shape (n_edges,)
        flux_down, with an error of order h² and that of the rules.

    Raises
    ------
    ValueError
        If ``amount`` is not positive.
    """
    step = check_real("amount", amount, low=0.0, low_open=True)
    return (forward.below(shells) - backward.below(shells)) / (2.0 * step)


def difference_balance(
    eigenvalues: ArrayLike,
    amplitudes: ArrayLike,
    error_rates: ArrayLike,
    flux_down: ArrayLike,
    shells: SoftShells,
    *,
    total: float,
    total_rate: float,
) -> EdgeBalance:
    """Return the balance from the Ritz modes of an error and fluxes known otherwise.

    Parameters
    ----------
    eigenvalues, amplitudes, error_rates : array-like of float, shape (m,)
        Ritz values of a Krylov space that begins with e, g = ⟨e, y⟩ and ⟨ė, y⟩.
    flux_down : array-like of float, shape (n_edges,)
        As from `flux_by_difference`.
    shells : SoftShells
        The weights.
    total, total_rate : float
        ½‖e‖² and ⟨ė, e⟩.

    Returns
    -------
    EdgeBalance
    """
    rates = finite_vector("eigenvalues", eigenvalues)
    amplitude = finite_vector("amplitudes", amplitudes)
    energies = 0.5 * amplitude**2
    losses = -amplitude * finite_vector("error_rates", error_rates)
    weights = shells.weights(rates)
    energy, dissipation = weights @ energies, weights @ losses
    # What no Ritz mode carries has no rate; it is rounding, as e lies in their span.
    energy[0] += max(total - float(energies.sum()), 0.0)
    dissipation[0] += -total_rate - float(losses.sum())
    return EdgeBalance(
        shells=shells,
        energy=energy,
        dissipation=dissipation,
        flux_down=finite_vector("flux_down", flux_down),
        density=shells.density_at_edges(rates, energies),
        n_near=shells.count_near(rates),
    )
