"""Tail models solved: Gauss-Newton steps vectorised over replicates, profiled over b.

The mean of a density over a shell is linearised at the shell's own fitted means of the regressors.
At these effective abscissae amplitudes and cutoffs are a non-negative least-squares problem that
decouples over tau and has a closed form; the shared exponents move along what those leave over.

A model of the density is ln ε(λ) = a_j + base(θ; x) − c_j h(θ; x) with x = ln(λ / λ_ref), one
shared non-linear parameter θ and, per tau, an amplitude a_j and a coefficient c_j. The full sample
is profiled over a grid of θ, which finds the right basin; Gauss-Newton then refines it, and the
jackknife replicates start from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spectralshell.estimators.intervals import profile_interval, profile_threshold
from spectralshell.estimators.tail.models import TailModel

# Quadrature nodes per unit of ln λ: shells of ratio 2 get 6 nodes, of ratio 4 get 12.
NODES_PER_LOG = 8.5
MIN_NODES = 4

# Basins of the profile that are refined; the template has one on each side of b = 1.
N_BASINS = 3

N_GRID_STEPS = 5
N_REFINE_STEPS = 12
N_REPLICATE_STEPS = 6

# Relative change of the sum of squares below which a step ends the search.
CONVERGED = 1e-10

# Largest move of a shared exponent in one step.
MAX_MOVE = 0.5

# The two branches of the template, b < 1 and b > 1, have cutoffs at opposite ends.
BRANCH_GAP = 1e-6

# A θ this near an end of its range was stopped by the range.
END_GAP = 1e-6

# Squared norms below this fraction of the data's own weight are rounding, not information.
SINGULAR = 1e-12

# theta, slope, coefficient
_Point = tuple[np.ndarray, np.ndarray, np.ndarray]


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


def profile_fit(
    model: TailModel,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
) -> TailParameters:
    """Fit a model to the full sample, which comes first, and to its replicates.

    Arrays are (n_replicates, n_taus, n_shells); weight 0 leaves out, ratios say κ_j = K·ratio_j.
    """
    theta = np.linspace(*model.bounds, model.n_coarse)
    coarse = profile_grid(model, theta, log_density[:1], weights[:1], grid, ratios)
    padded = np.concatenate([[np.inf], coarse.sse, [np.inf]])
    basins = np.flatnonzero((padded[1:-1] <= padded[:-2]) & (padded[1:-1] <= padded[2:]))
    basins = basins[np.argsort(coarse.sse[basins], kind="stable")[:N_BASINS]]
    refined = _refine(
        model, coarse, basins, log_density[:1], weights[:1], grid, ratios, N_REFINE_STEPS
    )
    winner = np.full(len(log_density), int(refined.sse.argmin()))
    return _refine(model, refined, winner, log_density, weights, grid, ratios, N_REPLICATE_STEPS)


def profile_grid(
    model: TailModel,
    theta: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
) -> TailParameters:
    """Best fits of one sample, arrays of shape (1, n_taus, n_shells), at each of several θ."""
    start = np.zeros((len(theta), log_density.shape[1]))
    return solve(
        model,
        theta,
        np.ones_like(theta),
        start,
        log_density,
        weights,
        grid,
        ratios=ratios,
        move_theta=False,
        n_steps=N_GRID_STEPS,
    )


def likelihood_interval(
    model: TailModel,
    fit: TailParameters,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
    n_parameters: int,
    confidence: float,
) -> tuple[float, float]:
    """Profile-likelihood interval of θ for one sample, its points taken as independent.

    An end is infinite where the data do not bound θ.
    """

    def squares(theta: np.ndarray) -> np.ndarray:
        return profile_grid(model, theta, log_density, weights, grid, ratios).sse

    limit = profile_threshold(fit.sse[0], int((weights > 0).sum()), n_parameters, confidence)
    return profile_interval(squares, float(fit.theta[0]), limit, model.bounds)


def is_determined(model: TailModel, fit: TailParameters) -> bool:
    """Return whether θ of the full sample lies inside the model's range, not at an end of it."""
    low, high = model.bounds
    return bool(low + END_GAP < fit.theta[0] < high - END_GAP)


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


def _refine(
    model: TailModel,
    start: TailParameters,
    which: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
    n_steps: int,
) -> TailParameters:
    """Go on from some points of an earlier fit, θ free."""
    return solve(
        model,
        start.theta[which],
        start.slope[which],
        start.coefficient[which],
        log_density,
        weights,
        grid,
        ratios=ratios,
        move_theta=True,
        n_steps=n_steps,
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
    move_theta: bool,
    n_steps: int,
) -> TailParameters:
    """Minimise the weighted squares from a starting point; return the best point met.

    The start has shapes (n,), (n,) and (n, n_taus); its θ stays unless ``move_theta``.
    """
    weight_sum = weights.sum(axis=-1)
    scale = np.where(weight_sum > 0, weight_sum, 1.0)

    def centred(values: np.ndarray) -> np.ndarray:
        return values - ((weights * values).sum(axis=-1) / scale)[..., None]

    point: _Point = (theta, slope, coefficient)
    best = point
    best_sse = np.full(len(theta), np.inf)
    best_rest = (np.zeros_like(coefficient), np.zeros((1, 1, 1)))
    for step in range(n_steps + 1):
        shells = _shell_means(model, *point, grid, move_theta)
        residual = log_density - shells.mean
        intercept = (weights * residual).sum(axis=-1) / scale
        residual = residual - intercept[..., None]
        sse = (weights * residual**2).sum(axis=(-1, -2))
        better = sse <= best_sse
        settled = np.isfinite(best_sse)
        settled[settled] = np.abs(best_sse - sse)[settled] <= CONVERGED * best_sse[settled]
        best = _pick_point(better, point, best)
        best_rest = (
            _pick(better, intercept, best_rest[0]),
            _pick(better, shells.mean + intercept[..., None], best_rest[1]),
        )
        best_sse = np.where(better, sse, best_sse)
        if step == n_steps or settled.all():
            break
        proposal = _propose(model, point, residual, shells, weights, centred, ratios, move_theta)
        point = _pick_point(better, proposal, _halfway(point, best))
    return TailParameters(*best, best_rest[0], best_sse, best_rest[1])


@dataclass(frozen=True)
class _Shells:
    """ln of the mean density without its amplitude, and minus its derivatives."""

    mean: np.ndarray
    regressor: np.ndarray
    shared: list[np.ndarray]
    sign: np.ndarray


def _shell_means(
    model: TailModel,
    theta: np.ndarray,
    slope: np.ndarray,
    coefficient: np.ndarray,
    grid: ShellGrid,
    move_theta: bool,
) -> _Shells:
    """Return each shell's mean density and regressors at a point, by quadrature."""
    x, kind = grid.x, model.kind
    theta = theta[:, None, None]
    centre = 0.5 * grid.span
    if kind == "lognormal":  # common width, a location for each tau
        base, h, sign = -theta * (x + centre) ** 2, x + centre, np.zeros(1)
        pieces = [(x + centre) ** 2] if move_theta else []
    elif kind == "free":
        base, h = -slope[:, None, None] * x, box_cox(x, theta)
        sign = np.where(theta[..., 0] < 0, -1.0, 1.0)
        pieces = [x, box_cox_derivative(x, theta, h)] if move_theta else [x]
    else:
        base = -theta * x
        if kind == "power":
            h = np.zeros_like(x)
        else:
            h = box_cox(x, np.ones(1) if kind == "exponential" else theta - 1.0)
        sign = np.where(theta[..., 0] < 1.0, -1.0, 1.0) if kind == "template" else np.ones(1)
        pieces = [x] if move_theta else []
    h = np.broadcast_to(h, (len(theta), *x.shape))[:, None]
    logs = (base + grid.log_weights)[:, None] - coefficient[..., None, None] * h
    top = logs.max(axis=-1, keepdims=True)
    parts = np.exp(logs - top)
    norm = parts.sum(axis=-1)
    parts /= norm[..., None]
    means = [
        np.einsum("ntsq,nsq->nts", parts, np.broadcast_to(p, (len(theta), *x.shape)))
        for p in (h[:, 0], *pieces)
    ]
    shared = means[1:]
    if move_theta and kind == "free":
        shared[1] = coefficient[..., None] * shared[1]
    elif move_theta and kind == "template":
        bend = box_cox_derivative(x, theta - 1.0, h[:, 0])
        shared[0] = shared[0] + coefficient[..., None] * np.einsum("ntsq,nsq->nts", parts, bend)
    return _Shells(np.log(norm) + top[..., 0], means[0], shared, sign)


def _propose(
    model: TailModel,
    point: _Point,
    residual: np.ndarray,
    shells: _Shells,
    weights: np.ndarray,
    centred: Callable[[np.ndarray], np.ndarray],
    ratios: np.ndarray | None,
    move_theta: bool,
) -> _Point:
    """Gauss-Newton point: shared parameters first, then the constrained coefficients."""
    theta, slope, coefficient = point
    # residual ≈ a − Σ Δshared·g − Δc·h, with g and h minus the derivatives
    h = centred(shells.regressor)
    h_square = (weights * h * h).sum(axis=-1)
    target = centred(residual) - coefficient[..., None] * h
    moves = np.zeros((len(theta), 0))
    if shells.shared:
        free = (coefficient != 0) | _wants_cutoff(target, h, weights, shells.sign)
        gradients = [centred(g) for g in shells.shared]
        moves = _shared_moves(target, gradients, h, h_square, weights, free, ratios)
        if model.kind == "template":
            moves = np.clip(moves, -MAX_MOVE, MAX_MOVE)
        for k, gradient in enumerate(gradients):
            target = target + moves[:, k, None, None] * gradient
    new_slope = slope + moves[:, 0] if model.kind == "free" else slope
    new_theta = theta + moves[:, -1] if move_theta else theta
    new_theta = np.clip(new_theta, *model.bounds) if move_theta else new_theta
    if move_theta and model.kind in ("template", "free"):
        pole = 1.0 if model.kind == "template" else 0.0
        new_theta = np.where(
            theta < pole,
            np.minimum(new_theta, pole - BRANCH_GAP),
            np.maximum(new_theta, pole + BRANCH_GAP),
        )
    return new_theta, new_slope, _cutoffs(target, h, h_square, weights, shells.sign, ratios)


def _wants_cutoff(
    target: np.ndarray, h: np.ndarray, weights: np.ndarray, sign: np.ndarray
) -> np.ndarray:
    """Return which taus would take a cutoff that is now at zero."""
    return -(weights * h * target).sum(axis=-1) * sign > 0


def _shared_moves(
    target: np.ndarray,
    gradients: list[np.ndarray],
    h: np.ndarray,
    h_square: np.ndarray,
    weights: np.ndarray,
    free: np.ndarray,
    ratios: np.ndarray | None,
) -> np.ndarray:
    """Least squares of target on −Σ move_k g_k with the free cutoffs projected out."""
    floor = SINGULAR * weights.sum(axis=-1)

    def project(values: np.ndarray) -> np.ndarray:
        product = (weights * h * values).sum(axis=-1) * free
        if ratios is None:
            part = np.divide(product, h_square, out=np.zeros_like(product), where=h_square > floor)
            return values - part[..., None] * h
        square = (h_square * ratios**2 * free).sum(axis=-1, keepdims=True)
        product = (product * ratios).sum(axis=-1, keepdims=True)
        part = np.divide(product, square, out=np.zeros_like(product), where=square > floor.max())
        return values - (part * ratios)[..., None] * h

    rest = [project(g) for g in gradients]
    gram = np.stack(
        [np.stack([(weights * a * b).sum(axis=(-1, -2)) for b in rest], -1) for a in rest], -2
    )
    right = np.stack([-(weights * a * target).sum(axis=(-1, -2)) for a in rest], -1)
    # Levenberg's ridge keeps a direction that the cutoffs already explain at rest.
    trace = np.trace(gram, axis1=-2, axis2=-1)
    ridge = 1e-12 * trace + SINGULAR * weights.sum(axis=(-1, -2))
    gram = gram + ridge[:, None, None] * np.eye(len(rest))
    gram[trace <= 0] = np.eye(len(rest))
    return np.linalg.solve(gram, right[..., None])[..., 0]


def _cutoffs(
    target: np.ndarray,
    h: np.ndarray,
    h_square: np.ndarray,
    weights: np.ndarray,
    sign: np.ndarray,
    ratios: np.ndarray | None,
) -> np.ndarray:
    """Non-negative least squares of target on −c h: one c per tau, or c_j = C·ratio_j."""
    product = -(weights * h * target).sum(axis=-1)
    floor = SINGULAR * weights.sum(axis=-1)
    if ratios is not None:
        product = (product * ratios).sum(axis=-1, keepdims=True)
        h_square = (h_square * ratios**2).sum(axis=-1, keepdims=True)
        floor = floor.max(axis=-1, keepdims=True)
    best = np.divide(product, h_square, out=np.zeros_like(product), where=h_square > floor)
    best = np.where((best * sign >= 0) | (sign == 0), best, 0.0)
    return best if ratios is None else best * ratios


def _halfway(one: _Point, other: _Point) -> _Point:
    return 0.5 * (one[0] + other[0]), 0.5 * (one[1] + other[1]), 0.5 * (one[2] + other[2])


def _pick_point(better: np.ndarray, new: _Point, old: _Point) -> _Point:
    return (
        _pick(better, new[0], old[0]),
        _pick(better, new[1], old[1]),
        _pick(better, new[2], old[2]),
    )


def _pick(better: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


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
