"""All Gauss-Radau rules of one Jacobi matrix at once, through the arrowhead form.

In the eigenbasis of T the bordered Jacobi matrix of an (m + 1)-point Gauss-Radau rule is an
arrowhead: the Ritz values θ_i on its diagonal, the couplings z_i = β_m s_mi on its border, and one
corner α̂ that the prescribed node x fixes, α̂ = x - Σ z_i²/(x - θ_i). Its eigenvalues, the nodes of
the rule, are the roots of

    f(t) = t - α̂ - Σ z_i²/(t - θ_i),

one between each two neighbouring poles and one beyond each end. A root is found as a distance from
its nearest pole, to full relative accuracy. Nothing breaks down where x is a Ritz value: the corner
then runs to infinity, all other nodes move onto poles, and the rule becomes the m-point Gauss rule,
which is the rule with the smaller modified entry there. The computed rule is the exact rule of a
matrix within a few eps·‖T‖ of T, so its error is covered by the widening in
:mod:`spectralshell.krylov.bounds`.

Sources: G. H. Golub and G. Meurant, *Matrices, Moments and Quadrature with Applications* (2010),
section 6.2, for the rules; R.-C. Li, "Solving secular equations stably and efficiently" (1993), for
the iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Floors in units of ‖T‖. They perturb the matrix by far less than its own rounding and keep every
# quotient below inside the range of float64.
COUPLING_FLOOR = 1e-25
OFFSET_FLOOR = 1e-40
# The iteration converges quadratically: a step this small leaves an error at rounding.
STEP_TOLERANCE = 1e-8
MAX_ITERATIONS = 60
# A side of the node this heavy may be computed as the complement of the other.
HEAVY = 0.05
# Rounding errors, in eps, of one evaluation of f relative to the sum of its terms.
ROUNDINGS = 8.0
# Doubles per work array: bounds the memory and keeps it in cache.
CHUNK = 1 << 16


@dataclass(frozen=True)
class RadauFamily:
    """Ritz values, couplings and first components, scaled by ‖T‖.

    Attributes
    ----------
    poles : ndarray of shape (m,)
        Ritz values, strictly ascending.
    first : ndarray of shape (m,)
        First components of the eigenvectors of T.
    couplings : ndarray of shape (m,)
        Border of the arrowhead, nowhere zero.
    scale : float
        What the poles were divided by.
    """

    poles: Array
    first: Array
    couplings: Array
    scale: float

    @classmethod
    def build(cls, nodes: Array, weights: Array, couplings: Array) -> RadauFamily:
        """Scale and separate the Ritz values; shapes (m,), m >= 1, nodes ascending."""
        scale = float(np.hypot(np.abs(nodes).max(), np.linalg.norm(couplings))) or 1.0
        poles = nodes / scale
        eps = np.finfo(np.float64).eps
        for i in range(1, len(poles)):
            gap = max(4 * eps * abs(poles[i - 1]), OFFSET_FLOOR)
            poles[i] = max(poles[i], poles[i - 1] + gap)
        border = couplings / scale
        small = np.abs(border) < COUPLING_FLOOR
        border = np.where(small, np.copysign(COUPLING_FLOOR, border), border)
        return cls(poles, np.sqrt(weights), border, scale)

    def masses(self, points: Array) -> tuple[Array, Array, Array, Array]:
        """Split the weights of the rule through each point.

        Parameters
        ----------
        points : ndarray of shape (p,)
            Prescribed nodes, finite, in the operator's unit.

        Returns
        -------
        below, at, above : ndarrays of shape (p,)
            Weights strictly below the node, at it, and strictly above it; they sum to 1, and each
            that is small is accurate relative to itself.
        slack : ndarray of shape (p,)
            Bound of the error that the roots' own rounding leaves, as an angle: arcsin √below and
            arcsin √above are right within it. Large only where two nodes of a rule nearly meet.

        Notes
        -----
        Costs about 5 m² operations a point.
        """
        x = points / self.scale
        rank = np.searchsorted(self.poles, x, side="right")
        ratio = self.couplings / self._offsets(x)
        corner = x - ratio @ self.couplings
        first_gap, last_gap = self._gaps_to_sum(rank)
        point, gap = _ranges(first_gap, last_gap)
        weights, errors = np.empty(len(gap)), np.empty(len(gap))
        step = max(CHUNK // len(self.poles), 1)
        for begin in range(0, len(gap), step):
            part = slice(begin, begin + step)
            weights[part], errors[part] = self._nodes_in(gap[part], corner[point[part]])
        own = rank[point]
        below = _sum_by(point, np.where(gap < own, weights, 0.0), len(x))
        at = _sum_by(point, np.where(gap == own, weights, 0.0), len(x))
        above = _sum_by(point, np.where(gap > own, weights, 0.0), len(x))
        slack = 2.0 * np.sqrt(_sum_by(point, errors**2, len(x)))
        below = np.where(first_gap > 0, np.maximum(1.0 - at - above, 0.0), below)
        above = np.where(last_gap < len(self.poles), np.maximum(1.0 - at - below, 0.0), above)
        return below, at, above, slack

    def christoffel(self, points: Array) -> tuple[Array, Index]:
        """Weight at each point of the rule through it, and the count of Ritz values up to it."""
        x = points / self.scale
        rank = np.searchsorted(self.poles, x, side="right")
        ratio = self.couplings / self._offsets(x)
        return (ratio @ self.first) ** 2 / (1.0 + np.einsum("ij,ij->i", ratio, ratio)), rank

    def _offsets(self, x: Array) -> Array:
        offsets = x[:, None] - self.poles
        tiny = np.abs(offsets) < OFFSET_FLOOR
        if tiny.any():
            # A point on a pole counts as just above it, as its rank does.
            offsets[tiny] = np.where(offsets[tiny] < 0, -OFFSET_FLOOR, OFFSET_FLOOR)
        return offsets

    def _gaps_to_sum(self, rank: Index) -> tuple[Index, Index]:
        """First and last gap whose nodes are computed; the node's own gap is ``rank``.

        A side follows from the other as a complement only where it is sure to be heavy, since the
        difference carries an error of eps.
        """
        m = len(self.poles)
        squares = self.first**2
        from_left = np.concatenate([np.zeros(1), np.cumsum(squares)])
        from_right = np.concatenate([np.zeros(1), np.cumsum(squares[::-1])])[::-1]
        # What the Chebyshev-Markov-Stieltjes inequalities promise each side.
        heavy_below = from_left[np.maximum(rank - 1, 0)] >= HEAVY
        heavy_above = from_right[np.minimum(rank + 1, m)] >= HEAVY
        shorter_below = 2 * rank <= m
        skip_below = heavy_below & ~(heavy_above & shorter_below)
        skip_above = heavy_above & ~skip_below
        return np.where(skip_below, rank, 0), np.where(skip_above, rank, m)

    def _nodes_in(self, gap: Index, corner: Array) -> tuple[Array, Array]:
        """Weights of the nodes in gaps ``gap`` (gap j ends at pole j), and amplitude errors."""
        poles, squares = self.poles, self.couplings**2
        m = len(poles)
        left, right = np.maximum(gap - 1, 0), np.minimum(gap, m - 1)
        inner = (gap > 0) & (gap < m)
        half = 0.5 * (poles[right] - poles[left])
        # Take the nearer pole as origin: the sign of f halfway says which one that is. It is found
        # from distances too, since in a cluster the midpoint itself rounds. The outer gaps reach
        # to infinity and have one pole only.
        offsets = half[:, None] - (poles - poles[left][:, None])
        inverse = 1.0 / np.where(inner[:, None], offsets, 1.0)
        halfway = (poles[left] - corner) + half - inverse @ squares
        from_left = (gap == m) | (inner & (halfway >= 0.0))
        origin = np.where(from_left, left, right)
        sign = np.where(from_left, 1.0, -1.0)
        distances = sign[:, None] * (poles - poles[origin][:, None])
        constant = sign * (poles[origin] - corner)
        reach = np.abs(constant) + np.linalg.norm(self.couplings)
        root = _solve(distances, squares, origin, constant, np.where(inner, half, reach))
        inverse = 1.0 / (root[:, None] - distances)
        length = 1.0 + (inverse * inverse) @ squares
        weights = (inverse @ (self.couplings * self.first)) ** 2 / length
        # f is evaluated to eps times the sum of its terms; the root's relative error turns the
        # node's eigenvector between the pole at the origin and all the rest.
        terms = np.abs(constant) + root + np.abs(inverse) @ squares
        share = squares[origin] / (root**2 * length)
        turned = np.sqrt(share * np.maximum(1.0 - share, 0.0))
        return weights, ROUNDINGS * np.finfo(np.float64).eps * terms * turned / (root * length)


def _ranges(first: Index, last: Index) -> tuple[Index, Index]:
    """All pairs (p, j) with first[p] <= j <= last[p]."""
    counts = last - first + 1
    point = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return point, np.arange(len(point)) - np.repeat(starts - first, counts)


def _sum_by(group: Index, values: Array, n_groups: int) -> Array:
    return np.asarray(np.bincount(group, values, minlength=n_groups), dtype=np.float64)


def _solve(distances: Array, squares: Array, origin: Index, constant: Array, high: Array) -> Array:
    """Root u in (0, high] of constant + u - Σ squares_i/(u - distances_i), distances 0 at origin.

    The function increases. The pole at the origin is kept exact and the rest linearised, which
    gives a quadratic; a bracket catches the steps that leave it.
    """
    root = high.copy()
    active = np.arange(len(root))
    near = squares[origin]
    low, top = np.zeros_like(root), high.copy()
    masked = distances.copy()
    # An infinite distance drops the origin's own term from the rest.
    masked[active, origin] = np.inf
    for _ in range(MAX_ITERATIONS):
        u = root[active]
        inverse = 1.0 / (u[:, None] - masked)
        rest = constant[active] + u - inverse @ squares
        slope = 1.0 + (inverse * inverse) @ squares
        positive = rest * u >= near[active]
        top[active] = np.where(positive, u, top[active])
        low[active] = np.where(positive, low[active], u)
        shifted = rest - slope * u
        radical = np.sqrt(shifted**2 + 4.0 * slope * near[active])
        step = np.where(
            shifted > 0,
            2.0 * near[active] / np.where(shifted > 0, shifted + radical, 1.0),
            (radical - shifted) / (2.0 * slope),
        )
        below, above = step <= low[active], step >= top[active]
        step = np.where(below & (low[active] > 0), np.sqrt(low[active] * u), step)
        step = np.where(above & ~positive, 0.5 * (u + top[active]), step)
        step = np.clip(step, low[active], top[active])
        root[active] = step
        going = np.abs(step - u) > STEP_TOLERANCE * u
        if not going.any():
            break
        if not going.all():
            active, masked = active[going], masked[going]
    return root
