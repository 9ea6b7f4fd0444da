"""The balance of soft-shell energies: dissipation, transfer, and the flux through every edge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_real
from spectralshell.shells.measure import finite_vector
from spectralshell.shells.soft_shells import SoftShells

Floats = NDArray[np.float64]

Places = NDArray[np.intp]

_EPS = float(np.finfo(np.float64).eps)

_CHUNK = 1 << 15  # close pairs at a time: a few MB for each edge


NOISE = 4e-15
"""Rounding error of a float64 kernel, relative to its norm."""

_TAIL = 1e-12
"""Weight of a mode in a shell so far off that it tells nothing about the shell."""

_MARGIN = 3.0
"""Of a mode's rounding error, in its root mean square over modes."""


@dataclass(frozen=True, eq=False)
class BalanceRounding:
    """What rounding may have left of the numbers of a balance: quotients of less say nothing."""

    energy: Floats  # of the null shell and the shells, as the next
    dissipation: Floats
    density: Floats  # at the edges, as the next
    flux_down: Floats


@dataclass(frozen=True, eq=False)
class EdgeBalance:
    """How the energy of every soft shell changes along a direction of the parameters.

    The null shell comes first, then the shells: dE_α/dt = −dissipation_α + transfer_α. Edges are
    all but the last: ``flux_down`` is the energy per τ that passes an edge from above to below.

    Parameters
    ----------
    shells : SoftShells
        The weights.
    energy, dissipation : ndarray of shape (1 + n_shells,)
        E_α = ½⟨e, w_α(M) e⟩ and −⟨ė, w_α(M) e⟩.
    flux_down : ndarray of shape (n_edges,)
        dE_≤α/dt + D_≤α at each edge, energy per τ.
    density : ndarray of shape (n_edges,)
        Energy per unit λ at the edges, `SoftShells.density_at_edges`.
    n_near : ndarray of int, shape (n_edges,)
        Modes within half a shell of the edge, in ln λ.
    rounding : BalanceRounding
        Sizes of ``energy``, ``dissipation``, ``density`` and ``flux_down`` that rounding explains.
    """

    shells: SoftShells
    energy: Floats
    dissipation: Floats
    flux_down: Floats
    density: Floats
    n_near: NDArray[np.int64]
    rounding: BalanceRounding

    @cached_property
    def transfer(self) -> Floats:
        """Energy per τ that the null shell and every shell gain from all others."""
        return np.diff(self.flux_down, prepend=0.0, append=0.0)

    @cached_property
    def velocity(self) -> Floats:
        """Drift velocity v = −flux_down/ε at the edges; NaN where no energy is near. Unit 1/τ².

        Energy that rounding explains is none.
        """
        known = (self.density > self.rounding.density) & (self.n_near > 0)
        velocity = np.full(self.density.shape, np.nan)
        velocity[known] = -self.flux_down[known] / self.density[known]
        return velocity

    @cached_property
    def shell_velocity(self) -> Floats:
        """Drift velocity of each shell, shape (n_shells,): its edges' mean flux over its density.

        NaN for a shell without energy, and for the last one, which has no upper edge.
        """
        flux = 0.5 * (self.flux_down[:-1] + self.flux_down[1:])
        density = self.energy[1:-1] / self.shells.partition.widths[:-1]
        velocity = np.full(self.energy.size - 1, np.nan)
        known = np.append(self.energy[1:-1] > self.rounding.energy[1:-1], False)
        velocity[known] = -flux[known[:-1]] / density[known[:-1]]
        return velocity

    @property
    def energy_below(self) -> Floats:
        """Energy below each edge, the null shell included, shape (n_edges,)."""
        return np.cumsum(self.energy)[:-1]

    @property
    def dissipation_below(self) -> Floats:
        """Dissipation below each edge, the null shell included, shape (n_edges,)."""
        return np.cumsum(self.dissipation)[:-1]

    @property
    def flux_to_dissipation(self) -> Floats:
        """|J|/|D| of each edge and the shell below it; NaN where D is nothing but rounding.

        The integrands of Definition 4.1 of "Renormalizable spectral-shell dynamics".
        """
        lost, known = np.abs(self.dissipation[:-1]), self.dissipates
        ratio = np.full(lost.shape, np.nan)
        ratio[known] = np.abs(self.flux_down[known]) / lost[known]
        return ratio

    @property
    def dissipates(self) -> NDArray[np.bool_]:
        """Whether the shell below each edge dissipates more than rounding explains."""
        return np.asarray(np.abs(self.dissipation) > self.rounding.dissipation)[:-1]

    @property
    def flows(self) -> NDArray[np.bool_]:
        """Whether the flux through each edge is zero, or more than rounding explains."""
        flux = np.abs(self.flux_down)
        return np.asarray((flux == 0.0) | (flux > self.rounding.flux_down))

    @property
    def null_exchange(self) -> float:
        """Energy per τ that the null shell gains from the others."""
        return float(self.flux_down[0])


@dataclass(frozen=True, eq=False)
class ShellBalance(EdgeBalance):
    """A balance from all modes and couplings, with the parts of its fluxes.

    Parameters
    ----------
    shells, energy, dissipation, flux_down, density, n_near, rounding
        As for `EdgeBalance`.
    drift, rotation : ndarray of shape (n_edges,)
        Parts of ``flux_down`` from moving eigenvalues (u = v) and from turning modes (u ≠ v).
        Within a repeated eigenvalue only their sum means something.
    pair_flux : ndarray of shape (1 + n_shells, 1 + n_shells)
        F_αβ, the energy per τ that shell α gains from shell β; antisymmetric, its row sums are
        ``transfer``.
    """

    drift: Floats
    rotation: Floats
    pair_flux: Floats

    @cached_property
    def null_share(self) -> float:
        """Share of all transfer, Σ |F_αβ|, that has the null shell at one end; 0 without any.

        NaN where all of it is rounding.
        """
        if not self.flows.any():
            return float("nan")
        exchanged = np.abs(self.pair_flux)
        total = float(exchanged.sum())
        return 2.0 * float(exchanged[0].sum()) / total if total > 0.0 else 0.0

    @cached_property
    def share_by_distance(self) -> Floats:
        """Share of all transfer between shells at distance d = 1, …, n_shells − 1.

        With `null_share` these add up to 1, or to 0 without any transfer; NaN as that.
        """
        exchanged = np.abs(self.pair_flux)
        total = float(exchanged.sum())
        size = len(exchanged) - 1
        if not self.flows.any():
            return np.full(size - 1, np.nan)
        if not total > 0.0:
            return np.zeros(size - 1)
        inner = exchanged[1:, 1:]
        return np.array([2.0 * np.trace(inner, d) / total for d in range(1, size)])

    @cached_property
    def defect(self) -> float:
        """Largest |Σ_β F_αβ − transfer_α|, relative to Σ |F|: rounding, if all is well.

        NaN where Σ |F| is itself rounding.
        """
        if not self.flows.any():
            return float("nan")
        scale = float(np.abs(self.pair_flux).sum())
        mismatch = np.abs(self.pair_flux.sum(axis=1) - self.transfer).max()
        return float(mismatch / scale) if scale > 0.0 else float(mismatch)


def shell_balance(
    eigenvalues: ArrayLike,
    amplitudes: ArrayLike,
    error_rates: ArrayLike,
    couplings: ArrayLike,
    shells: SoftShells,
    *,
    total: float | None = None,
    total_rate: float | None = None,
    noise: float = NOISE,
    coupling_noise: float = 0.0,
    speed: float = 0.0,
) -> ShellBalance:
    """Return the balance of soft-shell energies from modes and their couplings.

    Parameters
    ----------
    eigenvalues : array-like of float, shape (k,)
        Rates λ_u of M, unit 1/τ; rates at 0 and below are null.
    amplitudes : array-like of float, shape (k,)
        g_u = ⟨e, φ_u⟩.
    error_rates : array-like of float, shape (k,)
        ⟨ė, φ_u⟩, with ė along the same direction as ``couplings``.
    couplings : array-like of float, shape (k, k)
        V_uv = ⟨φ_u, (dM/dt) φ_v⟩; only the symmetric part counts.
    shells : SoftShells
        The weights w_α.
    total, total_rate : float, optional
        ½‖e‖² and ⟨ė, e⟩ of all modes. What the k modes leave of them is null. By default these are
        all modes.
    noise, coupling_noise : float, optional
        Norms of the rounding errors of M, relative to ‖M‖, and of dM/dt, in its own units.
    speed : float, optional
        ‖J‖ ‖θ̇‖: the rounding of ė is in proportion to it, or to ‖ė‖ if that is larger.

    Returns
    -------
    ShellBalance

    Raises
    ------
    ValueError
        If shapes disagree or a value is not finite.

    Notes
    -----
    dE_α/dt = ⟨ė, w_α(M) e⟩ + ½ Σ_uv g_u g_v V_uv w_α[λ_u, λ_v] (Daleckii and Krein), the divided
    difference being w_α' where λ_u = λ_v. In contrast to equation (3) of "Renormalizable
    spectral-shell dynamics" it holds while eigenvalues cross edges, and for every residual and
    direction, as ė = −M e is not assumed. The transfer between two shells is the part of
    ½ [w_α(λ_u) w_β(λ_v) − w_α(λ_v) w_β(λ_u)]/(λ_u − λ_v). Costs a few arrays of k² numbers, and
    time of order k² n_shells.

    Examples
    --------
    >>> from spectralshell.shells import ShellPartition, SoftShells, shell_balance
    >>> shells = SoftShells(ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=2))
    >>> rates, couplings = [-1.9, -2.1], [[-1.9, 0.0], [0.0, -2.1]]  # dM = −M
    >>> balance = shell_balance([1.9, 2.1], [1.0, 1.0], rates, couplings, shells)
    >>> bool(abs(balance.velocity[1] / -2.0 - 1) < 1e-12)  # every rate falls with v = −λ
    True
    >>> float(balance.transfer.sum())
    0.0
    """
    rates, amplitude, error_rate, matrix = _checked(eigenvalues, amplitudes, error_rates, couplings)
    energies, losses = 0.5 * amplitude**2, -amplitude * error_rate
    weights = shells.weights(rates)
    energy, dissipation = weights @ energies, weights @ losses
    if total is not None:
        energy[0] += max(check_real("total", total) - energies.sum(), 0.0)
    if total_rate is not None:
        dissipation[0] += -check_real("total_rate", total_rate) - losses.sum()
    terms = PairTerms(rates, 0.5 * np.outer(amplitude, amplitude) * (matrix + matrix.T), shells)
    drift, rotation = terms.edge_fluxes()
    rounding = _rounding(
        amplitude, error_rate, rates, weights, shells, noise, coupling_noise, speed
    )
    return ShellBalance(
        shells=shells,
        energy=energy,
        dissipation=dissipation,
        flux_down=drift + rotation,
        density=shells.density_at_edges(rates, energies),
        n_near=shells.count_near(rates),
        rounding=rounding,
        drift=drift,
        rotation=rotation,
        pair_flux=terms.pair_flux(weights),
    )


def difference_balance(
    eigenvalues: ArrayLike,
    amplitudes: ArrayLike,
    error_rates: ArrayLike,
    flux_down: ArrayLike,
    shells: SoftShells,
    *,
    total: float,
    total_rate: float,
    noise: float = NOISE,
    coupling_noise: float = 0.0,
    speed: float = 0.0,
) -> EdgeBalance:
    """Return the balance from the Ritz modes of an error and fluxes known otherwise.

    Amplitudes and rates are ⟨e, y⟩ and ⟨ė, y⟩; the rest is as for `shell_balance`.
    """
    rates = finite_vector("eigenvalues", eigenvalues)
    amplitude = finite_vector("amplitudes", amplitudes)
    error_rate = finite_vector("error_rates", error_rates)
    energies = 0.5 * amplitude**2
    losses = -amplitude * error_rate
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
        rounding=_rounding(
            amplitude, error_rate, rates, weights, shells, noise, coupling_noise, speed
        ),
    )


def _rounding(
    amplitude: Floats,
    error_rate: Floats,
    rates: Floats,
    weights: Floats,
    shells: SoftShells,
    noise: float,
    coupling_noise: float,
    speed: float,
) -> BalanceRounding:
    """Return the roundings of a balance: M's turns e and ė by its noise, a part for each mode."""
    size, speed = float(np.linalg.norm(amplitude)), max(float(np.linalg.norm(error_rate)), speed)
    share = _MARGIN * noise / max(rates.size, 1) ** 0.5
    energies = share * size * (np.abs(amplitude) + share * size)
    losses = share * (np.abs(amplitude) * speed + np.abs(error_rate) * size + share * size * speed)
    tails = np.where(weights < _TAIL, weights, 0.0)
    energy = weights @ energies + tails @ (0.5 * amplitude**2)
    dissipation = weights @ losses + tails @ np.abs(amplitude * error_rate)
    # What is left of a total is the difference of two sums over all modes.
    energy[0] += _EPS * rates.size * size**2
    dissipation[0] += _EPS * rates.size * size * speed
    flux = np.zeros(len(shells.edges))
    if coupling_noise > 0.0:
        entry = coupling_noise / max(rates.size, 1) ** 0.5
        flux = PairTerms(rates, entry * np.outer(amplitude, amplitude), shells).spread()
    return BalanceRounding(energy, dissipation, shells.density_at_edges(rates, energies), flux)


def flux_by_difference(
    forward: ErrorRule, backward: ErrorRule, amount: float, shells: SoftShells
) -> Floats:
    """Return the flux through each edge from the energies of a frozen error at θ ± h θ̇.

    ``amount`` is h, positive, in units of τ; the error is of order h², besides that of the rules.
    """
    step = check_real("amount", amount, low=0.0, low_open=True)
    return (forward.below(shells) - backward.below(shells)) / (2.0 * step)


@dataclass(frozen=True, eq=False)
class ErrorRule:
    """A quadrature rule of an error's spectral measure: rates (1/τ) and the energies ½g² there."""

    nodes: Floats
    energies: Floats

    def below(self, shells: SoftShells) -> Floats:
        """Return the energy below each edge, what has no node not counted."""
        below: Floats = shells.below(self.nodes) @ self.energies
        return below


class PairTerms:
    """The terms of ½ Σ_uv g_u g_v V_uv c[λ_u, λ_v], from ascending rates and g_u g_v V_uv."""

    # Pairs further apart than the width of an edge are divided by λ_u − λ_v once, for all shells;
    # for close pairs every edge has its own divided difference.

    def __init__(self, rates: Floats, products: Floats, shells: SoftShells) -> None:
        self.rates = rates
        self.shells = shells
        self.below, self.above = shells.below(rates), shells.above(rates)
        self.products = products
        # Modes so far below the first edge that every weight of theirs is 0 or 1 exchange nothing.
        first = int(np.count_nonzero(self.above[0] == 0.0))
        ends = np.searchsorted(rates, rates * np.exp(shells.sigma), side="right")
        ends[:first] = 0  # they have no close pairs
        self._low, self._high = _pairs_within(np.arange(rates.size), ends)
        self._far = self._divide_far_pairs(first)

    def edge_fluxes(self) -> tuple[Floats, Floats]:
        """Return the parts of the flux through each edge with u = v and with u ≠ v."""
        drift = 0.5 * self.shells.slope_below(self.rates) @ np.diagonal(self.products)
        return drift, self._far_fluxes() + self._close_fluxes()

    def spread(self) -> Floats:
        """Return the root of the sum of squares of the terms of the flux through each edge."""
        diagonal = 0.5 * self.shells.slope_below(self.rates) * np.diagonal(self.products)
        squares = (diagonal**2).sum(axis=1)
        splits = np.count_nonzero(self.below >= 0.5, axis=1)
        squares += [(self._far[:split, split:] ** 2).sum() for split in splits]
        for low, high, products in self._close_pairs():
            squares += self._edge_differences(low, high) ** 2 @ products**2
        return np.asarray(np.sqrt(squares))

    def pair_flux(self, weights: Floats) -> Floats:
        """Return F_αβ, what shell α gains from shell β; ``weights`` has shape (n_shells + 1, k)."""
        far = weights @ self._far @ weights.T
        size = len(weights)
        close = np.zeros((size, size))
        for low, high, products in self._close_pairs():
            close += (self._weight_differences(low, high) * products) @ weights[:, high].T
        slopes = _edges_to_shells(self.shells.slope_below(self.rates))
        close += (0.5 * slopes * np.diagonal(self.products)) @ weights.T
        return 0.5 * (far - far.T) + (close - close.T)

    def _divide_far_pairs(self, first: int) -> Floats:
        gaps = self.rates[:, None] - self.rates
        gaps[:first, :first] = np.inf
        gaps[self._low, self._high] = np.inf
        gaps[self._high, self._low] = np.inf
        np.fill_diagonal(gaps, np.inf)
        quotients: Floats = self.products / gaps
        return quotients

    def _far_fluxes(self) -> Floats:
        # c = 1 below an edge, 0 above it, plus a part near it. The first is a sum over the pairs
        # that straddle the edge, so nothing large cancels; the second a sum over the modes near it.
        nearby = np.where(self.below < 0.5, self.below, -self.above)
        around: Floats = nearby @ self._far.sum(axis=1)
        splits = np.count_nonzero(self.below >= 0.5, axis=1)
        straddling = [self._far[:split, split:].sum() for split in splits]
        fluxes: Floats = around + np.array(straddling)
        return fluxes

    def _close_fluxes(self) -> Floats:
        fluxes = np.zeros(len(self.below))
        for low, high, products in self._close_pairs():
            fluxes += self._edge_differences(low, high) @ products
        return fluxes

    def _close_pairs(self) -> Iterator[tuple[Places, Places, Floats]]:
        for start in range(0, self._low.size, _CHUNK):
            low, high = self._low[start : start + _CHUNK], self._high[start : start + _CHUNK]
            yield low, high, self.products[low, high]

    def _edge_differences(self, low: Places, high: Places) -> Floats:
        """Return c_k[λ_u, λ_v] of close pairs, shape (n_edges, n_pairs)."""
        u, v = self.rates[low], self.rates[high]
        edges = range(len(self.below))
        return np.array([self.shells.difference_below(edge, u, v) for edge in edges])

    def _weight_differences(self, low: Places, high: Places) -> Floats:
        return _edges_to_shells(self._edge_differences(low, high))


def _edges_to_shells(below: Floats) -> Floats:
    """Turn what holds for c_k at the edges into what holds for w_α of null and the shells."""
    return np.diff(below, axis=0, prepend=0.0, append=0.0)


def _pairs_within(starts: Places, ends: Places) -> tuple[Places, Places]:
    """Return the pairs (u, v) of positions with u < v < ends[u]."""
    counts = np.maximum(ends - starts - 1, 0)
    low = np.repeat(starts, counts)
    offsets = np.arange(low.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return low, low + 1 + offsets


def _checked(
    eigenvalues: ArrayLike, amplitudes: ArrayLike, error_rates: ArrayLike, couplings: ArrayLike
) -> tuple[Floats, Floats, Floats, Floats]:
    rates = finite_vector("eigenvalues", eigenvalues)
    amplitude = finite_vector("amplitudes", amplitudes)
    error_rate = finite_vector("error_rates", error_rates)
    if not rates.size == amplitude.size == error_rate.size:
        raise ValueError(
            "eigenvalues, amplitudes and error_rates must have one entry per mode, got "
            f"{rates.size}, {amplitude.size} and {error_rate.size}."
        )
    matrix = np.asarray(couplings, dtype=np.float64)
    if matrix.shape != (rates.size, rates.size):
        raise ValueError(
            f"couplings must have shape ({rates.size}, {rates.size}), one row and column per "
            f"eigenvalue, got {matrix.shape}."
        )
    if not np.isfinite(matrix).all():
        raise ValueError("couplings must be finite, got NaN or infinity; mask unconverged modes.")
    order = np.argsort(rates, kind="stable")
    return rates[order], amplitude[order], error_rate[order], matrix[np.ix_(order, order)]
