"""Certified bounds of the energy below an edge.

Two errors separate a computed measure from the true one, and both are bounded.

*Quadrature.* Lanczos knows the first 2m + 1 moments of the spectral measure. Among all measures
with these moments the energy below x is smallest and largest for the Gauss-Radau rule with a node
at x: the weights strictly below x, and these plus the weight at x (Chebyshev, Markov, Stieltjes).

*Rounding.* The computed recurrence is the exact one of an operator M̃ with ‖M̃ - M‖ <= η, whose
spectral subspaces are turned against those of M, by no more than the sin Θ theorem says. An edge
may give way by δ, every δ gives a valid bound, and the best of many is taken.

Sources: G. H. Golub and G. Meurant, *Matrices, Moments and Quadrature with Applications* (2010),
chapter 6; N. I. Akhiezer, *The Classical Moment Problem* (1965), section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.krylov.quadrature import FLOAT64_NOISE, gauss
from spectralshell.krylov.secular import RadauFamily, partial_sums, split_masses
from spectralshell.parameter_checks import check_real

Array = NDArray[np.float64]

# π/2 rounded up: the constant of the sin Θ theorem in general position.
SIN_THETA = 1.6

# Candidates for δ reach from this share of the edge ...
SMALLEST_SHIFT = 1e-6

# ... to the edge itself, or to this many times η where the edge lies near the noise.
LARGEST_SHIFT_IN_NOISE = 1e5

N_SHIFTS = 24

# Edges whose quadrature is remembered.
MOST_KNOWN = 4096


def rotated_down(below: Array, rest: Array, kappa: Array, slack: Array | float = 0.0) -> Array:
    """Smallest share sin²θ with sin θ̃ <= sin θ + κ cos θ; ``below`` + ``rest`` = 1."""
    cos2, sin2 = 1.0 / (1.0 + kappa**2), kappa**2 / (1.0 + kappa**2)
    angle = np.arctan2(np.sqrt(below * cos2), np.sqrt(rest + below * sin2))
    return np.asarray(np.sin(np.maximum(angle - np.arctan(kappa) - slack, 0.0)) ** 2)


def rotated_up(below: Array, rest: Array, kappa: Array, slack: Array | float = 0.0) -> Array:
    """Largest share sin²θ with cos θ̃ <= cos θ + κ sin θ; ``below`` + ``rest`` = 1."""
    cos2, sin2 = 1.0 / (1.0 + kappa**2), kappa**2 / (1.0 + kappa**2)
    angle = np.arctan2(np.sqrt(below + rest * sin2), np.sqrt(rest * cos2))
    return np.asarray(np.sin(np.minimum(angle + np.arctan(kappa) + slack, np.pi / 2)) ** 2)


@dataclass(frozen=True)
class CumulativeBounds:
    """Lower and upper bounds of the energy strictly below any edge.

    Build it with :meth:`from_lanczos` or :meth:`from_spectrum`.

    Attributes
    ----------
    nodes : ndarray of shape (m,)
        Ritz values or eigenvalues, ascending, in the operator's unit.
    weights : ndarray of shape (m,)
        Share of the energy at each node; they sum to 1 (or hold nothing).
    couplings : ndarray of shape (m,) or None
        β_m s_mi with the sign that makes the first component positive; None where the nodes are
        the whole measure.
    mass : float
        Total energy ½‖e‖².
    noise : float
        η, the norm bound of the operator's rounding error, absolute.
    """

    nodes: Array
    weights: Array
    couplings: Array | None
    mass: float
    noise: float
    # Shell edges of one ratio recur in every fold of a search over it.
    _known: dict[float, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_lanczos(
        cls,
        alpha: ArrayLike,
        beta: ArrayLike,
        beta_last: float,
        mass: float,
        noise: float,
        exhausted: bool,
    ) -> CumulativeBounds:
        """Bounds from a Lanczos run that started at e.

        Parameters
        ----------
        alpha : array-like of shape (m,)
            Diagonal of the Jacobi matrix.
        beta : array-like of shape (m - 1,)
            Off-diagonal.
        beta_last : float
            Coupling to the next direction, which sharpens the bounds by one moment.
        mass : float
            Total energy ½‖e‖².
        noise : float
            Norm bound η of the products' rounding error in the operator's unit (for float64
            products 4e-15 λ_max), where λ_max is the operator's norm, not the largest Ritz value of
            a short run. At least 4e-15 of the largest |Ritz value| is used.
        exhausted : bool
            Whether the subspace is invariant. Then the Gauss rule is the measure itself up to η,
            to which the neglected ``beta_last`` is added.

        Returns
        -------
        CumulativeBounds

        Raises
        ------
        TypeError, ValueError
            If the shapes do not fit, or a number is negative or not finite.

        Examples
        --------
        >>> bounds = CumulativeBounds.from_lanczos([2.0, 2.0], [1.0], 0.5, 1.0, 0.0, False)
        >>> lower, upper = bounds.at([2.0])
        >>> bool(0.0 <= lower[0] < 0.5 < upper[0] <= 1.0)
        True
        """
        mass = check_real("mass", mass, low=0.0)
        noise = check_real("noise", noise, low=0.0)
        beta_last = check_real("beta_last", beta_last, low=0.0)
        nodes, weights, last = gauss(alpha, beta)
        if exhausted:
            return cls(nodes, weights, None, mass, _floored(noise + beta_last, nodes))
        return cls(nodes, weights, beta_last * last, mass, _floored(noise, nodes))

    @classmethod
    def from_spectrum(
        cls, eigenvalues: ArrayLike, weights: ArrayLike, noise: float
    ) -> CumulativeBounds:
        """Bounds from a complete spectrum, widened for rounding only.

        Parameters
        ----------
        eigenvalues : array-like of shape (n,)
            Any order.
        weights : array-like of shape (n,)
            Energies ½(φᵀe)², non-negative.
        noise : float
            Norm bound η of the matrix's rounding error; at least 4e-15 of the largest |λ| is used.

        Returns
        -------
        CumulativeBounds

        Raises
        ------
        ValueError
            If the shapes do not fit, a weight is negative, or an entry is not finite.

        Examples
        --------
        >>> bounds = CumulativeBounds.from_spectrum([1.0, 3.0], [0.25, 0.75], 0.0)
        >>> lower, upper = bounds.at([1.0, 2.0])
        >>> lower.round(9).tolist(), upper.round(9).tolist()
        ([0.0, 0.25], [0.25, 0.25])
        """
        nodes = np.array(eigenvalues, dtype=np.float64)
        energies = np.array(weights, dtype=np.float64)
        if nodes.ndim != 1 or nodes.shape != energies.shape:
            raise ValueError(
                "eigenvalues and weights must both have shape (n,), got "
                f"{nodes.shape} and {energies.shape}."
            )
        if not (np.isfinite(nodes).all() and np.isfinite(energies).all() and (energies >= 0).all()):
            raise ValueError("eigenvalues and weights must be finite, and weights non-negative.")
        noise = check_real("noise", noise, low=0.0)
        order = np.argsort(nodes, kind="stable")
        nodes, energies = nodes[order], energies[order]
        mass = float(energies.sum())
        shares = energies / mass if mass > 0 else energies
        return cls(nodes, shares, None, mass, _floored(noise, nodes))

    def at(self, edges: ArrayLike) -> tuple[Array, Array]:
        """Bounds of the energy strictly below each edge.

        Parameters
        ----------
        edges : array-like
            Edges in the operator's unit, any shape and order; infinities are allowed.

        Returns
        -------
        lower, upper : ndarrays of the shape of ``edges``
            0 <= lower <= upper <= mass, both non-decreasing in the edge.

        Raises
        ------
        ValueError
            If an edge is NaN.

        Notes
        -----
        Costs about 10 m² operations an edge: some ten milliseconds for 100 edges and m = 100.

        Examples
        --------
        >>> bounds = CumulativeBounds.from_spectrum([1.0], [2.0], 0.0)
        >>> [float(bound[0]) for bound in bounds.at([float("inf")])]
        [2.0, 2.0]
        """
        wanted = np.asarray(edges, dtype=np.float64)
        if np.isnan(wanted).any():
            raise ValueError("edges must not hold NaN; drop or replace the missing edges.")
        unique, inverse = np.unique(wanted, return_inverse=True)
        lower, upper = np.zeros(len(unique)), np.full(len(unique), self.mass)
        finite = np.isfinite(unique)
        if finite.any() and self.mass > 0 and len(self.nodes):
            low, high = self._shares(unique[finite])
            lower[finite] = self.mass * np.maximum.accumulate(low)
            upper[finite] = self.mass * np.minimum.accumulate(high[::-1])[::-1]
        lower[unique == np.inf] = self.mass
        upper[unique == -np.inf] = 0.0
        upper = np.maximum(np.minimum(upper, self.mass), 0.0)
        lower = np.minimum(np.maximum(lower, 0.0), upper)
        return lower[inverse].reshape(wanted.shape), upper[inverse].reshape(wanted.shape)

    def unwidened(self, edges: ArrayLike) -> tuple[Array, Array]:
        """Bounds of the energy of the computed operator M̃ strictly below each edge.

        They hold for M itself in exact arithmetic only. Their middle is the estimate of the
        energy, since it does not move with the allowance for rounding, and their distance is what
        the number of steps has left open.

        Parameters
        ----------
        edges : array-like of shape (p,)
            Finite edges in the operator's unit.

        Returns
        -------
        lower, upper : ndarrays of shape (p,)
            0 <= lower <= upper <= mass.

        Examples
        --------
        >>> bounds = CumulativeBounds.from_lanczos([2.0], [], 0.5, 1.0, 1e-3, False)
        >>> lower, upper = bounds.unwidened([1.0, 3.0])
        >>> lower.round(9).tolist(), upper.round(9).tolist()
        ([0.0, 0.8], [0.2, 1.0])
        """
        wanted = np.asarray(edges, dtype=np.float64).tolist()
        pairs = [self._known.get(edge) for edge in wanted]
        if None in pairs:
            fresh = _evaluate([self], [[e for e, p in zip(wanted, pairs, strict=True) if not p]])[0]
            pairs = [pair or fresh[edge] for edge, pair in zip(wanted, pairs, strict=True)]
        both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    @cached_property
    def _family(self) -> RadauFamily:
        return RadauFamily.build(self.nodes, self.weights, self._couplings())

    @cached_property
    def _mirrored_family(self) -> RadauFamily:
        couplings = self._couplings()
        return RadauFamily.build(-self.nodes[::-1], self.weights[::-1], couplings[::-1])

    def _couplings(self) -> Array:
        return np.zeros(0) if self.couplings is None else self.couplings

    def quadrature_at(self, points: ArrayLike) -> tuple[Array, Array, Array, Array]:
        """Shares of the computed operator's energy, without widening for rounding.

        Parameters
        ----------
        points : array-like of shape (p,)
            Finite.

        Returns
        -------
        below, at, above : ndarrays of shape (p,)
            Certain to lie below the point, undecided, and certain to lie at or above it.
        slack : ndarray of shape (p,)
            Error bound of the roots behind them, as an angle.
        """
        x = np.asarray(points, dtype=np.float64)
        if self.couplings is not None:
            return self._family.masses(x)
        rank = np.searchsorted(self.nodes, x, side="left")
        from_left, from_right = partial_sums(self.weights)
        return from_left[rank], np.zeros_like(x), from_right[rank], np.zeros_like(x)

    def _shares(self, edges: Array) -> tuple[Array, Array]:
        reach = np.maximum(np.abs(edges), LARGEST_SHIFT_IN_NOISE * self.noise)
        start = np.maximum(SMALLEST_SHIFT * np.abs(edges), SIN_THETA * self.noise)
        start, reach = np.maximum(start, np.finfo(np.float64).tiny), np.maximum(reach, start)
        ratio = np.linspace(0.0, 1.0, N_SHIFTS)
        shifts = start[:, None] * (np.maximum(reach / start, 1.0)[:, None] ** ratio)
        # The shift that rounding left between edge and point, not the one that was meant.
        down, up = edges[:, None] - shifts, edges[:, None] + shifts
        kappa_down = SIN_THETA * self.noise / (edges[:, None] - down)
        kappa_up = SIN_THETA * self.noise / (up - edges[:, None])
        if self.couplings is not None:
            down, kappa_down = self._most_promising(down, kappa_down, mirrored=False)
            up, kappa_up = self._most_promising(up, kappa_up, mirrored=True)
        points = np.concatenate([down.ravel(), up.ravel()])
        below, at, above, slack = self.quadrature_at(points)
        n = down.size
        low = rotated_down(below[:n], at[:n] + above[:n], kappa_down.ravel(), slack[:n])
        high = rotated_up(below[n:] + at[n:], above[n:], kappa_up.ravel(), slack[n:])
        return low.reshape(down.shape).max(axis=1), high.reshape(up.shape).min(axis=1)

    def _most_promising(
        self, points: Array, kappa: Array, *, mirrored: bool
    ) -> tuple[Array, Array]:
        """Pick the shift of each edge whose bound an inexpensive estimate finds best."""
        nodes, weights, x = self.nodes, self.weights, points.ravel()
        if mirrored:
            nodes, weights, x = -nodes[::-1], weights[::-1], -x
        family = self._mirrored_family if mirrored else self._family
        at, rank = family.christoffel(x)
        from_left, _ = partial_sums(weights)
        # The exact share lies between those at the last two Ritz values, and within ``at`` of
        # the last; between Ritz values it grows about evenly.
        previous = from_left[np.maximum(rank - 1, 0)]
        padded = np.append(nodes, np.inf)
        left = np.append(-np.inf, nodes)[rank]
        gap = np.where(rank > 0, padded[rank] - left, np.inf)
        fraction = np.where(gap > 0, np.where(rank > 0, x - left, 0.0) / gap, 0.0)
        even = previous + (from_left[rank] - previous) * fraction
        share = np.clip(np.maximum(from_left[rank] - at, even), 0.0, 1.0)
        value = rotated_down(share, 1.0 - share, kappa.ravel()).reshape(points.shape)
        best = value.argmax(axis=1)[:, None]
        return np.take_along_axis(points, best, axis=1), np.take_along_axis(kappa, best, axis=1)


def evaluate_together(bounds: Sequence[CumulativeBounds], edges: ArrayLike) -> None:
    """Make each of many bounds remember what `CumulativeBounds.unwidened` gives at the edges.

    Parameters
    ----------
    bounds : sequence of CumulativeBounds
        Any number. What one remembers does not depend on the others.
    edges : array-like of shape (p,) or (len(bounds), p)
        Finite edges in the operator's unit; the same for all or their own for each.

    Notes
    -----
    A few edges cost little more than the calls around them, so that many measures at once are
    several times cheaper than one after another.

    Examples
    --------
    >>> bounds = CumulativeBounds.from_lanczos([2.0], [], 0.5, 1.0, 1e-3, False)
    >>> evaluate_together([bounds], [1.0, 3.0])
    >>> bounds.unwidened([3.0])[0].round(9).tolist()
    [0.8]
    """
    points = np.asarray(edges, dtype=np.float64)
    rows = np.broadcast_to(points, (len(bounds), points.shape[-1])).tolist()
    shared = set(rows[0]) if rows and points.ndim == 1 else None
    # Edges that one lacks are evaluated for all that lack as many, in one go.
    groups: dict[int, list[tuple[CumulativeBounds, list[float]]]] = {}
    for one, row in zip(bounds, rows, strict=True):
        if shared is not None and shared <= one._known.keys():
            continue
        missing = [edge for edge in dict.fromkeys(row) if edge not in one._known]
        if missing:
            groups.setdefault(len(missing), []).append((one, missing))
    for group in groups.values():
        _evaluate([one for one, _ in group], [missing for _, missing in group])


def _evaluate(
    bounds: Sequence[CumulativeBounds], edges: Sequence[Sequence[float]]
) -> list[dict[float, tuple[float, float]]]:
    """Evaluate and remember the same number of edges for each, and return what was found."""
    points = np.array(edges)
    below, at = np.zeros_like(points), np.zeros_like(points)
    lanczos = [row for row, one in enumerate(bounds) if one.couplings is not None]
    if lanczos:
        families = [bounds[row]._family for row in lanczos]
        below[lanczos], at[lanczos], _, _ = split_masses(families, points[lanczos])
    for row, one in enumerate(bounds):
        if one.couplings is None:
            below[row], at[row], _, _ = one.quadrature_at(points[row])
    mass = np.array([[one.mass] for one in bounds])
    lower = np.clip(mass * below, 0.0, mass)
    upper = np.clip(mass * (below + at), lower, mass)
    pairs = np.stack([lower, upper], axis=-1).tolist()
    found = [
        dict(zip(row, map(tuple, values), strict=True))
        for row, values in zip(points.tolist(), pairs, strict=True)
    ]
    for one, fresh in zip(bounds, found, strict=True):
        # Threads may share a measure, so that nobody looks up here what another may have cleared.
        if len(one._known) + len(fresh) > MOST_KNOWN:
            one._known.clear()
        one._known.update(fresh)
    return found


def _floored(noise: float, nodes: Array) -> float:
    largest = float(np.abs(nodes).max()) if len(nodes) else 0.0
    return max(noise, FLOAT64_NOISE * largest)
