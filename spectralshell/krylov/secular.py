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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Floors in units of ‖T‖. They perturb the matrix by far less than its own rounding and keep every
# quotient below inside the range of float64.
COUPLING_FLOOR = 1e-25
OFFSET_FLOOR = 1e-40
# A Ritz value coupled less than this, in units of ‖T‖, has converged: it is a node of every rule,
# with its own weight. Taking it out perturbs the matrix by a small part of eps·‖T‖.
CONVERGED = 1e-17
# The iteration converges quadratically: a step this small leaves an error at rounding.
STEP_TOLERANCE = 1e-8
MAX_ITERATIONS = 60
# A side of the node this heavy may be computed as the complement of the other.
HEAVY = 0.05
# Rounding errors, in eps, of one evaluation of f relative to the sum of its terms.
ROUNDINGS = 8.0
# Doubles that numpy's sums take at a time, or a multiple of it.
WIDTH = 32
# Doubles per work array: bounds the memory and keeps it in cache.
CHUNK = 1 << 15


@dataclass(frozen=True)
class RadauFamily:
    """Ritz values, couplings and first components, scaled by ‖T‖; arrays of shape (m,)."""

    poles: Array  # Ritz values, strictly ascending
    first: Array  # first components of the eigenvectors of T
    couplings: Array  # border of the arrowhead, nowhere zero
    scale: float  # what the poles were divided by

    @classmethod
    def build(cls, nodes: Array, weights: Array, couplings: Array) -> RadauFamily:
        """Scale and separate the Ritz values; shapes (m,), m >= 1, nodes ascending."""
        scale = float(np.hypot(np.abs(nodes).max(), np.linalg.norm(couplings))) or 1.0
        poles = nodes / scale
        eps = np.finfo(np.float64).eps
        gaps = np.maximum(4 * eps * np.abs(poles[:-1]), OFFSET_FLOOR)
        if (poles[1:] < poles[:-1] + gaps).any():
            for i in range(1, len(poles)):
                gap = max(4 * eps * abs(poles[i - 1]), OFFSET_FLOOR)
                poles[i] = max(poles[i], poles[i - 1] + gap)
        border = couplings / scale
        small = np.abs(border) < COUPLING_FLOOR
        border = np.where(small, np.copysign(COUPLING_FLOOR, border), border)
        return cls(poles, np.sqrt(weights), border, scale)

    def masses(self, points: Array) -> tuple[Array, Array, Array, Array]:
        """Split the weights of the rule through each point; see :func:`split_masses`."""
        below, at, above, slack = split_masses([self], points)
        return below[0], at[0], above[0], slack[0]

    def christoffel(self, points: Array) -> tuple[Array, Index]:
        """Weight at each point of the rule through it, and the count of Ritz values up to it."""
        x = points / self.scale
        rank = np.searchsorted(self.poles, x, side="right")
        ratio = self.couplings / _offsets(x, self.poles)
        return (ratio @ self.first) ** 2 / (1.0 + np.einsum("ij,ij->i", ratio, ratio)), rank

    @cached_property
    def is_moving(self) -> NDArray[np.bool_]:
        """Which Ritz values have not converged, so that the prescribed node moves them."""
        size = np.abs(self.couplings)
        moving = size > CONVERGED
        moving[size.argmax()] = True  # one is needed to carry the prescribed node
        return moving


def split_masses(
    families: Sequence[RadauFamily], points: Array
) -> tuple[Array, Array, Array, Array]:
    """Split the weights of the rules through each point: below, at, above, (n_families, p).

    The fourth bounds what the roots' rounding leaves of arcsin √below and arcsin √above.
    """
    # About 5 m² operations a point and family, m Ritz values that have not converged.
    stack = _Stack.build(families)
    shape = len(families), points.shape[-1]
    row = np.repeat(np.arange(shape[0]), shape[1])
    x = (points / np.array([[family.scale] for family in families])).ravel()
    fixed_below, fixed_at, fixed_above = _fixed_masses(families, x.reshape(shape))
    rank, corner = stack.prescribe(row, x)
    first_gap, last_gap = stack.gaps_to_sum(row, rank, fixed_below, fixed_above)
    point, gap = _ranges(first_gap, last_gap)
    weights, errors = np.empty(len(gap)), np.empty(len(gap))
    step = max(CHUNK // stack.poles.shape[1], 1)
    for begin in range(0, len(gap), step):
        part = slice(begin, begin + step)
        of = point[part]
        weights[part], errors[part] = stack.nodes_in(row[of], gap[part], corner[of])
    own = rank[point]
    below = _sum_by(point, np.where(gap < own, weights, 0.0), len(x)) + fixed_below
    at = _sum_by(point, np.where(gap == own, weights, 0.0), len(x)) + fixed_at
    above = _sum_by(point, np.where(gap > own, weights, 0.0), len(x)) + fixed_above
    slack = 2.0 * np.sqrt(_sum_by(point, errors**2, len(x)))
    below = np.where(first_gap > 0, np.maximum(1.0 - at - above, 0.0), below)
    above = np.where(last_gap < stack.counts[row], np.maximum(1.0 - at - below, 0.0), above)
    return below.reshape(shape), at.reshape(shape), above.reshape(shape), slack.reshape(shape)


def partial_sums(weights: Array) -> tuple[Array, Array]:
    """Sum the weights before and from each rank; each sum is accurate relative to itself."""
    zero = np.zeros((*weights.shape[:-1], 1))
    from_left = np.concatenate([zero, np.cumsum(weights, axis=-1)], axis=-1)
    from_right = np.concatenate([zero, np.cumsum(weights[..., ::-1], axis=-1)], axis=-1)
    return from_left, from_right[..., ::-1]


@dataclass(frozen=True)
class _Stack:
    """The moving Ritz values of many families, one row each, padded with uncoupled infinity."""

    # A sum over a row has the same rounding whatever the other rows are, since the width is a
    # multiple of what numpy adds at a time and padding adds exact zeros.
    poles: Array
    first: Array
    couplings: Array
    counts: Index
    lengths: Array

    @classmethod
    def build(cls, families: Sequence[RadauFamily]) -> _Stack:
        counts = np.array([np.count_nonzero(family.is_moving) for family in families])
        width = -(-int(counts.max()) // WIDTH) * WIDTH
        poles = np.full((len(families), width), np.inf)
        first, couplings = np.zeros_like(poles), np.zeros_like(poles)
        for row, (family, count) in enumerate(zip(families, counts, strict=True)):
            moving, border = family.is_moving, family.couplings
            poles[row, :count] = family.poles[moving]
            # Only the sign of the product matters.
            first[row, :count] = np.copysign(family.first, border * family.first)[moving]
            couplings[row, :count] = np.abs(border)[moving]
        return cls(poles, first, couplings, counts, np.sqrt(_dot(couplings, couplings)))

    def prescribe(self, row: Index, x: Array) -> tuple[Index, Array]:
        """Return how many poles lie at or below each node, and the corner that fixes it."""
        rank, corner = np.empty(len(x), dtype=np.intp), np.empty(len(x))
        step = max(CHUNK // self.poles.shape[1], 1)
        for begin in range(0, len(x), step):
            part = slice(begin, begin + step)
            couplings = self.couplings[row[part]]
            offsets = _offsets(x[part], self.poles[row[part]])
            rank[part] = np.count_nonzero(offsets > 0.0, axis=1)
            corner[part] = x[part] - _dot(np.divide(couplings, offsets, out=offsets), couplings)
        return rank, corner

    def gaps_to_sum(
        self, row: Index, rank: Index, fixed_below: Array, fixed_above: Array
    ) -> tuple[Index, Index]:
        """First and last gap whose nodes are computed; the node's own gap is ``rank``."""
        # A side follows from the other as a complement only where it is sure to be heavy, since the
        # difference carries an error of eps.
        m = self.counts[row]
        from_left, from_right = partial_sums(self.first**2)
        # What the Chebyshev-Markov-Stieltjes inequalities promise each side.
        heavy_below = fixed_below + from_left[row, np.maximum(rank - 1, 0)] >= HEAVY
        heavy_above = fixed_above + from_right[row, np.minimum(rank + 1, m)] >= HEAVY
        shorter_below = 2 * rank <= m
        skip_below = heavy_below & ~(heavy_above & shorter_below)
        skip_above = heavy_above & ~skip_below
        return np.where(skip_below, rank, 0), np.where(skip_above, rank, m)

    def nodes_in(self, row: Index, gap: Index, corner: Array) -> tuple[Array, Array]:
        """Weights of the nodes in gaps ``gap`` (gap j ends at pole j), and amplitude errors."""
        m, here = self.counts[row], np.arange(len(gap))
        left, right = np.maximum(gap - 1, 0), np.minimum(gap, m - 1)
        inner, last = (gap > 0) & (gap < m), gap == m
        at_left, at_right = self.poles[row, left], self.poles[row, right]
        # The outer gaps reach to infinity and have one pole only.
        reach = np.abs(at_left - corner) + self.lengths[row]
        start = np.where(inner, 0.5 * (at_right - at_left), np.where(last, reach, -reach))
        # Take the nearer pole as origin: the sign of f halfway says which one that is. It is found
        # from distances too, since in a cluster the midpoint itself rounds.
        couplings = self.couplings[row]
        distances = self.poles[row] - at_left[:, None]
        ratio = np.divide(couplings, start[:, None] - distances)
        from_left = last | (inner & ((at_left - corner) + start >= _dot(ratio, couplings)))
        origin = np.where(from_left, left, right)
        sign = np.where(from_left, 1.0, -1.0)
        flipped = np.flatnonzero(~from_left)
        distances[flipped] = at_right[flipped, None] - self.poles[row[flipped]]
        # An infinite distance drops the origin's own term; the others have their values at start.
        distances[here, origin], ratio[here, origin] = np.inf, 0.0
        constant, own = (
            sign * (np.where(from_left, at_left, at_right) - corner),
            couplings[here, origin],
        )
        sums = sign * _dot(ratio, couplings), _dot(ratio, ratio)
        root = _solve(distances, couplings, own**2, constant, np.abs(start), sums)
        np.subtract(root[:, None], distances, out=ratio)
        np.divide(couplings, ratio, out=ratio)
        ratio[here, origin] = own / root
        amplitude, length = _dot(ratio, self.first[row]), 1.0 + _dot(ratio, ratio)
        # f is evaluated to eps times the sum of its terms; the root's relative error turns the
        # node's eigenvector between the pole at the origin and all the rest.
        terms = np.abs(constant) + root + _dot(np.abs(ratio, out=ratio), couplings)
        share = own**2 / (root**2 * length)
        turned = np.sqrt(share * np.maximum(1.0 - share, 0.0))
        errors = ROUNDINGS * np.finfo(np.float64).eps * terms * turned / (root * length)
        return amplitude**2 / length, errors


def _fixed_masses(families: Sequence[RadauFamily], x: Array) -> tuple[Array, Array, Array]:
    """Weights of the converged Ritz values strictly below, at, and strictly above each point."""
    masses = np.zeros((3, *x.shape))
    for row, family in enumerate(families):
        fixed = ~family.is_moving
        if fixed.any():
            poles = family.poles[fixed]
            from_left, from_right = partial_sums(family.first[fixed] ** 2)
            first = np.searchsorted(poles, x[row], side="left")
            after = np.searchsorted(poles, x[row], side="right")
            masses[0, row], masses[2, row] = from_left[first], from_right[after]
            masses[1, row] = np.where(after > first, from_left[after] - from_left[first], 0.0)
    below, at, above = masses.reshape(3, -1)
    return below, at, above


def _offsets(x: Array, poles: Array) -> Array:
    offsets = np.asarray(x[:, None] - poles, dtype=np.float64)
    tiny = np.abs(offsets) < OFFSET_FLOOR
    if tiny.any():
        # A point on a pole counts as just above it.
        offsets[tiny] = np.where(offsets[tiny] < 0, -OFFSET_FLOOR, OFFSET_FLOOR)
    return offsets


def _dot(a: Array, b: Array) -> Array:
    return np.asarray(np.einsum("ij,ij->i", a, b), dtype=np.float64)


def _ranges(first: Index, last: Index) -> tuple[Index, Index]:
    """All pairs (p, j) with first[p] <= j <= last[p]."""
    counts = last - first + 1
    point = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return point, np.arange(len(point)) - np.repeat(starts - first, counts)


def _sum_by(group: Index, values: Array, n_groups: int) -> Array:
    return np.asarray(np.bincount(group, values, minlength=n_groups), dtype=np.float64)


def _solve(
    distances: Array,
    couplings: Array,
    near: Array,
    constant: Array,
    high: Array,
    sums: tuple[Array, Array],
) -> Array:
    """Root u in (0, high] of constant + u - near/u - Σ z_i²/(u - distances_i), z the couplings."""
    # The pole at the origin has the distance infinity, which drops it from the sum; ``sums`` holds
    # Σ z_i²/(u - distances_i) and Σ z_i²/(u - distances_i)² at u = high.
    # The function increases. The pole at the origin is kept exact and the rest linearised, which
    # gives a quadratic; a bracket catches the steps that leave it.
    root, u = high.copy(), high
    active, others = np.arange(len(root)), distances
    low, top = np.zeros_like(root), high.copy()
    first, second = sums
    for _ in range(MAX_ITERATIONS):
        rest, slope = constant + u - first, 1.0 + second
        positive = rest * u >= near
        top = np.where(positive, u, top)
        low = np.where(positive, low, u)
        shifted = rest - slope * u
        radical = np.sqrt(shifted**2 + 4.0 * slope * near)
        step = np.where(
            shifted > 0,
            2.0 * near / np.where(shifted > 0, shifted + radical, 1.0),
            (radical - shifted) / (2.0 * slope),
        )
        below, above = step <= low, step >= top
        step = np.where(below & (low > 0), np.sqrt(low * u), step)
        step = np.where(above & ~positive, 0.5 * (u + top), step)
        step = np.clip(step, low, top)
        root[active] = step
        going = np.abs(step - u) > STEP_TOLERANCE * u
        if not going.any():
            break
        if not going.all():
            active, others, couplings = active[going], others[going], couplings[going]
            constant, near, low, top = constant[going], near[going], low[going], top[going]
        u = step[going]
        ratio = u[:, None] - others
        np.divide(couplings, ratio, out=ratio)
        first, second = _dot(ratio, couplings), _dot(ratio, ratio)
    return root
