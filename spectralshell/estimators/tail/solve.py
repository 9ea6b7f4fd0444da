"""Tail models at a fixed shared exponent: amplitudes and cutoffs to convergence, vectorised.

A model of the density is ln ε(λ) = a_j + base(θ; x) − c_j h(θ; x) with x = ln(λ / λ_ref), one
shared exponent θ and, per tau, an amplitude a_j and a coefficient c_j of one sign; the model with a
free power has a slope beside. Its mean over a shell is a quadrature in ln λ.

At fixed θ the amplitudes have a closed form. The weighted squares are then a function of one
coefficient for each tau (or of one for all, and of the slope), which Newton's method minimises
under the bound c_j = 0, with second derivatives of its own and steps that never go up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectralshell.estimators.tail.models import TailModel

# Quadrature nodes per unit of ln λ: shells of ratio 2 get 7 nodes, of ratio 4 get 14.
NODES_PER_LOG = 10.0
MIN_NODES = 4

# Newton's method takes 3 to 8 steps; one that has taken so many is said not to converge.
MAX_STEPS = 60

# A step that moves ln of the fitted means by less is the last: what is left is its square.
LAST_STEP = 1e-6

# A step that went up is tried again at this length.
SHORTER = 0.25

# Second derivatives below this part of those without curvature are not trusted.
LEAST_CURVATURE = 0.1

# Squares agree to this part of their size with what rounding lets be known.
ROUNDING_OF_SQUARES = 1e-12

# Squared norms below this fraction of the data's own weight are rounding, not information.
SINGULAR = 1e-12


@dataclass(frozen=True)
class ShellGrid:
    """Gauss-Legendre nodes of each shell of a fit, in x = ln(λ / λ_ref) <= 0."""

    x: np.ndarray  # (n_shells, n_nodes)
    log_weights: np.ndarray  # same shape: ln of quadrature weight times λ over the shell width
    log_reference: float  # ln λ_ref, the last edge
    span: float  # ln of the last over the first edge


@dataclass(frozen=True)
class TailParameters:
    """Parameters of n replicates."""

    theta: np.ndarray  # (n,)
    slope: np.ndarray  # (n,), the tail slope where θ is the power of the cutoff
    coefficient: np.ndarray  # c_j, (n, n_taus)
    intercept: np.ndarray  # a_j, (n, n_taus)
    sse: np.ndarray  # weighted sum of squares, (n,)
    mean: np.ndarray  # ln of the fitted mean density, (n, n_taus, n_shells)
    gradient: np.ndarray  # derivative of the least squares in θ, (n,)
    converged: np.ndarray  # whether the last step was as short as it must be, (n,)

    def take(self, which: np.ndarray) -> TailParameters:
        """Return some of them."""
        return TailParameters(**{name: value[which] for name, value in vars(self).items()})

    @staticmethod
    def joined(parts: Sequence[TailParameters]) -> TailParameters:
        """Return those of several one after the other."""
        tables = [vars(part) for part in parts]
        return TailParameters(
            **{name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        )


def shell_grid(lower: np.ndarray, upper: np.ndarray) -> ShellGrid:
    """Quadrature in ln λ over the shells [lower, upper), which need not be contiguous."""
    log_lower, log_upper = np.log(lower), np.log(upper)
    length = log_upper - log_lower
    n_nodes = max(MIN_NODES, int(np.ceil(NODES_PER_LOG * length.max())))
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    log_lambda = log_lower[:, None] + 0.5 * length[:, None] * (1.0 + nodes)
    reference = float(log_upper.max())
    # ∫ ε dλ / width = ∫ ε λ d(ln λ) / width
    log_weights = (
        np.log(0.5 * length[:, None] * weights) + log_lambda - np.log(upper - lower)[:, None]
    )
    return ShellGrid(
        log_lambda - reference, log_weights, reference, float(reference - log_lower.min())
    )


def solve(
    model: TailModel,
    theta: np.ndarray,
    slope: np.ndarray,
    coefficient: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    *,
    ratios: np.ndarray | None,
    max_steps: int = MAX_STEPS,
    last_step: float = LAST_STEP,
) -> TailParameters:
    """Minimise the weighted squares at each θ of shape (n,), from a start to convergence.

    Data are (n, n_taus, n_shells), the start (n,) and (n, n_taus); no steps leave it as it is.
    """
    problems = _tabulate(model, theta, log_density, weights, grid, ratios)
    if model.kind == "free" or ratios is not None:
        return _minimise(problems, slope, coefficient, max_steps, last_step)
    # Each tau is a problem of its own.
    n, n_taus, n_shells = log_density.shape
    problems = replace(
        problems,
        index=np.repeat(problems.index, n_taus),
        log_density=log_density.reshape(-1, 1, n_shells),
        weights=weights.reshape(-1, 1, n_shells),
        totals=problems.totals.reshape(-1, 1),
        sign=np.repeat(problems.sign, n_taus, axis=0),
    )
    start = np.repeat(slope, n_taus), coefficient.reshape(-1, 1)
    apart = _minimise(problems, *start, max_steps, last_step)
    return TailParameters(
        theta,
        slope,
        apart.coefficient.reshape(n, n_taus),
        apart.intercept.reshape(n, n_taus),
        apart.sse.reshape(n, n_taus).sum(axis=1),
        apart.mean.reshape(n, n_taus, n_shells),
        apart.gradient.reshape(n, n_taus).sum(axis=1),
        np.all(apart.converged.reshape(n, n_taus), axis=1),
    )


@dataclass(frozen=True)
class _Problems:
    """Fits at fixed θ that are solved side by side; arrays of nodes have the nodes first."""

    model: TailModel
    theta: np.ndarray  # the distinct ones, (n_θ,)
    x: np.ndarray  # (n_nodes, 1, 1, n_shells)
    base: (
        np.ndarray
    )  # ln of quadrature weight times density without cutoff, (n_nodes, n_θ, n_shells)
    h: np.ndarray  # same shape
    drop: np.ndarray | None  # minus the derivative of base in θ, where there is one
    bend: np.ndarray | None  # derivative of h in θ, where there is one
    index: np.ndarray  # which θ each problem has, (n,)
    log_density: np.ndarray  # (n, n_taus, n_shells)
    weights: np.ndarray  # same shape
    ratios: np.ndarray | None  # c_j = C·ratio_j
    totals: np.ndarray  # weight of each tau, 1 where it has none, (n, n_taus)
    sign: np.ndarray  # of each problem's coefficients, 0 where both are allowed, (n, 1)

    def take(self, which: np.ndarray) -> _Problems:
        """Return some of the problems."""
        return replace(
            self,
            index=self.index[which],
            log_density=self.log_density[which],
            weights=self.weights[which],
            totals=self.totals[which],
            sign=self.sign[which],
        )

    def at(self, table: np.ndarray) -> np.ndarray:
        """Return a table over θ for each problem, with room for its taus."""
        return table[:, self.index, None]

    def centred(self, values: np.ndarray) -> np.ndarray:
        """Return what an amplitude for each tau leaves of values on shells."""
        return values - (_sum(self.weights, values) / self.totals)[..., None]

    def grouped(self, values: np.ndarray, order: int) -> np.ndarray:
        """Sum over the taus of one coefficient: over all where κ_j = K·ratio_j."""
        if self.ratios is None:
            return values
        return (values * self.ratios**order).sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Shells:
    """What a point gives on the shells of each tau."""

    parts: np.ndarray  # share of each node in its shell, nodes first
    mean: np.ndarray  # ln of the mean density without its amplitude, (n, n_taus, n_shells)
    intercept: np.ndarray
    residual: np.ndarray
    squares: np.ndarray  # (n,)

    def moment(self, values: np.ndarray) -> np.ndarray:
        """Mean of values at nodes over the density in each shell."""
        return (self.parts * values).sum(axis=0)


def _tabulate(
    model: TailModel,
    theta: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
) -> _Problems:
    """Tabulate a model at the distinct θ, once for all steps."""
    distinct, index = np.unique(theta, return_inverse=True)
    x, power = grid.x.T[:, None], distinct[:, None]
    drop: np.ndarray | None = x
    bend = None
    if model.kind == "lognormal":  # common width, a location for each tau
        h = x + 0.5 * grid.span
        drop = h**2
    elif model.kind == "free":
        h, drop = box_cox(x, power), None
        bend = box_cox_derivative(x, power, h)
    elif model.kind == "template":
        h = box_cox(x, power - 1.0)
        bend = box_cox_derivative(x, power - 1.0, h)
    else:
        h = box_cox(x, np.ones(1))
    if model.kind == "lognormal":
        signs = np.zeros_like(distinct)
    else:
        signs = np.where(distinct < (-np.inf if model.pole is None else model.pole), -1.0, 1.0)
    shape = (len(x), len(distinct), x.shape[-1])
    totals = weights.sum(axis=-1)
    base = grid.log_weights.T[:, None] - (0.0 if drop is None else power * drop)
    return _Problems(
        model,
        distinct,
        x[:, None],
        np.broadcast_to(base, shape),
        np.broadcast_to(h, shape),
        drop,
        bend,
        index,
        log_density,
        weights,
        ratios,
        np.where(totals > 0, totals, 1.0),
        signs[index, None],
    )


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Sum of products over shells."""
    return np.einsum("nts,nts->nt", one, other)


def _minimise(
    problems: _Problems,
    slope: np.ndarray,
    coefficient: np.ndarray,
    max_steps: int,
    last_step: float,
) -> TailParameters:
    """Newton's method on the problems that are not done; a step that went up is shortened."""
    slope, coefficient = slope.copy(), coefficient.copy()
    n = len(slope)
    converged = np.full(n, problems.model.kind == "power")  # there is nothing else to fit
    squares, share = np.full(n, np.inf), np.ones(n)
    move = (np.zeros(n), np.zeros_like(coefficient))
    for _ in range(max_steps):
        active = np.flatnonzero(~converged)
        if not active.size:
            break
        part = problems.take(active)
        trial = _ahead(part, (slope, coefficient), move, share, active)
        shells = _evaluate(part, *trial)
        better = shells.squares <= squares[active] * (1.0 + ROUNDING_OF_SQUARES)
        share[active[~better]] *= SHORTER
        new = active[better]
        share[new], squares[new] = 1.0, shells.squares[better]
        slope[new], coefficient[new] = trial[0][better], trial[1][better]
        *fresh, length = _newton(part, trial[1], shells)
        move[0][new], move[1][new] = fresh[0][better], fresh[1][better]
        last = better & (length <= last_step)
        done = active[last]
        slope[done], coefficient[done] = _ahead(
            part.take(last), (slope, coefficient), move, share, done
        )
        converged[done] = True
    shells = _evaluate(problems, slope, coefficient)
    return TailParameters(
        problems.theta[problems.index],
        slope,
        coefficient,
        shells.intercept,
        shells.squares,
        shells.mean + shells.intercept[..., None],
        _gradient(problems, coefficient, shells),
        converged,
    )


def _ahead(
    part: _Problems,
    point: tuple[np.ndarray, np.ndarray],
    move: tuple[np.ndarray, np.ndarray],
    share: np.ndarray,
    which: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and coefficients a share of the move on, coefficients stopped at zero."""
    slope = point[0][which] + share[which] * move[0][which]
    return slope, _bounded(part, point[1][which] + share[which, None] * move[1][which])


def _bounded(problems: _Problems, coefficient: np.ndarray) -> np.ndarray:
    return np.where(problems.sign * coefficient >= 0.0, coefficient, 0.0)


def _evaluate(problems: _Problems, slope: np.ndarray, coefficient: np.ndarray) -> _Shells:
    """Quadrature of the density over each shell, and what it leaves of the data."""
    logs = problems.at(problems.base)
    if problems.model.kind == "free":
        logs = logs - slope[:, None, None] * problems.x
    if problems.model.kind != "power":
        logs = logs - coefficient[..., None] * problems.at(problems.h)
    top = logs.max(axis=0)
    parts = np.exp(logs - top)
    norm = parts.sum(axis=0)
    parts /= norm
    mean = np.broadcast_to(np.log(norm) + top, problems.log_density.shape)
    residual = problems.log_density - mean
    intercept = _sum(problems.weights, residual) / problems.totals
    residual = residual - intercept[..., None]
    squares = _sum(problems.weights * residual, residual).sum(axis=-1)
    return _Shells(parts, mean, intercept, residual, squares)


def _gradient(problems: _Problems, coefficient: np.ndarray, shells: _Shells) -> np.ndarray:
    """Return dS/dθ at the minimum, where the other parameters stand still."""
    fall = np.zeros_like(shells.residual)
    if problems.drop is not None:
        fall = fall + shells.moment(problems.drop[:, None])
    if problems.bend is not None:
        fall = fall + coefficient[..., None] * shells.moment(problems.at(problems.bend))
    return 2.0 * _sum(problems.weights * shells.residual, fall).sum(axis=-1)


def _newton(
    problems: _Problems, coefficient: np.ndarray, shells: _Shells
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's step of slope and coefficients, and how far it moves ln of the means."""
    weights, sign = problems.weights, problems.sign
    curved = weights * shells.residual
    # Half the squares have the gradient Σ w r h and the second derivative Σ w (h h − r var h).
    nodes = problems.at(problems.h)
    h = shells.moment(nodes)
    away = problems.centred(h)
    first = problems.grouped(_sum(curved, h), 1)
    flat = problems.grouped(_sum(weights * away, away), 2)
    bent = problems.grouped(_sum(curved, shells.moment((nodes - h) ** 2)), 2)
    known = flat > SINGULAR * problems.grouped(problems.totals, 0)
    flat = np.where(known, flat, 1.0)
    second = np.where(flat - bent > LEAST_CURVATURE * flat, flat - bent, flat)
    at_bound = (problems.grouped(coefficient, 1) == 0.0) & (sign != 0.0)
    free = known & ~(at_bound & (sign * first >= 0.0))
    slope_move = np.zeros(len(coefficient))
    change = np.zeros_like(shells.residual)
    if problems.model.kind == "free":
        x = shells.moment(problems.x)
        x_away = problems.centred(x)
        bends = (
            _sum(curved, shells.moment((problems.x - x) ** 2)).sum(axis=-1),
            problems.grouped(_sum(curved, shells.moment((problems.x - x) * (nodes - h))), 1),
            bent,
        )
        flats = (
            _sum(weights * x_away, x_away).sum(axis=-1),
            problems.grouped(_sum(weights * x_away, away), 1),
            flat,
        )
        slope_move, first, second = _slope_move(
            _sum(curved, x).sum(axis=-1), first, flats, bends, free
        )
        free = free & ~(at_bound & (sign * first >= 0.0))
        change = slope_move[:, None, None] * x_away
    move = np.where(free, -first / second, 0.0)
    if problems.ratios is not None:
        move = move * problems.ratios
    change = change + (_bounded(problems, coefficient + move) - coefficient)[..., None] * away
    length = _sum(weights * change, change).sum(axis=-1) / problems.totals.sum(axis=-1)
    return slope_move, move, np.sqrt(length)


def _slope_move(
    push: np.ndarray,
    first: np.ndarray,
    flats: tuple[np.ndarray, np.ndarray, np.ndarray],
    bends: tuple[np.ndarray, np.ndarray, np.ndarray],
    free: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step of the slope with the free coefficients eliminated; what is then left for them."""
    # Second derivatives are those of the slope, of both, and of the coefficients: without their
    # curvature, and the curvature, which is left out where the whole would not be positive.

    def eliminated(
        slope: np.ndarray, both: np.ndarray, own: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        ratio = np.where(free, both / own, 0.0)
        return slope - (ratio * both).sum(axis=-1), ratio

    exact = [flat - bend for flat, bend in zip(flats, bends, strict=True)]
    positive = (exact[2] > LEAST_CURVATURE * flats[2]).all(axis=-1)
    exact[2] = np.where(positive[:, None], exact[2], flats[2])
    rest, _ = eliminated(*flats)
    positive &= eliminated(exact[0], exact[1], exact[2])[0] > LEAST_CURVATURE * rest
    both = np.where(positive[:, None], exact[1], flats[1])
    own = np.where(positive[:, None], exact[2], flats[2])
    whole, ratio = eliminated(np.where(positive, exact[0], flats[0]), both, own)
    known = whole > SINGULAR * flats[0]
    move = np.where(known, -(push - (ratio * first).sum(axis=-1)), 0.0)
    move = move / np.where(known, whole, 1.0)
    return move, first + both * move[:, None], own


def box_cox(x: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Return (e^(power x) − 1)/power, and x where the power is zero."""
    safe = np.where(power == 0.0, 1.0, power)
    # Above 700 the exponential overflows; such a density is zero to any precision anyway.
    return np.where(power == 0.0, x, np.expm1(np.minimum(safe * x, 700.0)) / safe)


def box_cox_derivative(x: np.ndarray, power: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the derivative of `box_cox` in the power, given its value."""
    near = np.abs(power) < 1e-5  # where the quotient would cancel
    safe = np.where(near, 1.0, power)
    exact = (x * np.exp(np.minimum(safe * x, 700.0)) - value) / safe
    return np.where(near, 0.5 * x * x, exact)
