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
from spectralshell.estimators.tail.models import ShellGrid, TailModel, box_cox, box_cox_derivative

# Squared norms below this fraction of the data's own weight are rounding, not information.
SINGULAR = 1e-12

# Relative change of the sum of squares below which a step ends the search.
CONVERGED = 1e-10

# Largest move of a shared exponent in one step.
MAX_MOVE = 0.5

# The two branches of the template, b < 1 and b > 1, have cutoffs at opposite ends.
BRANCH_GAP = 1e-6

# theta, slope, coefficient
_Point = tuple[np.ndarray, np.ndarray, np.ndarray]

N_GRID_STEPS = 5

N_REFINE_STEPS = 12

N_REPLICATE_STEPS = 6

# Basins of the profile that are refined; the template has one on each side of b = 1.
N_BASINS = 3


@dataclass(frozen=True)
class TailParameters:
    """Parameters of n replicates.

    Attributes
    ----------
    theta, slope : ndarray of shape (n,)
        Profiled parameter, and the tail slope where θ is the power of the cutoff.
    coefficient, intercept : ndarray of shape (n, n_taus)
        c_j and a_j.
    sse : ndarray of shape (n,)
        Weighted sum of squares.
    mean : ndarray of shape (n, n_taus, n_shells)
        ln of the fitted mean density of each shell.
    """

    theta: np.ndarray
    slope: np.ndarray
    coefficient: np.ndarray
    intercept: np.ndarray
    sse: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class _Shells:
    """ln of the mean density without its amplitude, and minus its derivatives."""

    mean: np.ndarray
    regressor: np.ndarray
    shared: list[np.ndarray]
    sign: np.ndarray


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
    """Minimise the weighted squares from a starting point, with halved steps where one fails.

    Parameters
    ----------
    model : TailModel
        What to fit.
    theta, slope : ndarray of shape (n,)
        Where to start; θ stays there unless ``move_theta``.
    coefficient : ndarray of shape (n, n_taus)
        Where to start, of the sign that the model asks for.
    log_density, weights : ndarray of shape (n or 1, n_taus, n_shells)
        Data and inverse variances; zero weight leaves a point out.
    grid : ShellGrid
        The shells.
    ratios : ndarray of shape (n_taus,) or None
        κ_j = K·ratio_j, or free.
    move_theta : bool
        Whether θ is fitted.
    n_steps : int
        Number of steps.

    Returns
    -------
    TailParameters
        The best point met.
    """
    weight_sum = weights.sum(axis=-1)
    scale = np.where(weight_sum > 0, weight_sum, 1.0)

    def centred(values: np.ndarray) -> np.ndarray:
        return values - ((weights * values).sum(axis=-1) / scale)[..., None]

    point: _Point = (theta, slope, coefficient)
    best, target = point, point
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
        target = _pick_point(better, proposal, _halfway(target, best))
        point = target
    return TailParameters(*best, best_rest[0], best_sse, best_rest[1])


def _shell_means(
    model: TailModel,
    theta: np.ndarray,
    slope: np.ndarray,
    coefficient: np.ndarray,
    grid: ShellGrid,
    move_theta: bool,
) -> _Shells:
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


def profile_grid(
    model: TailModel,
    theta: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
) -> TailParameters:
    """Best fits at each fixed θ of a grid.

    Parameters
    ----------
    model, grid, ratios
        As in :func:`profile_fit`.
    theta : ndarray of shape (n_grid,)
        Values of the profiled parameter.
    log_density, weights : ndarray of shape (1, n_taus, n_shells)
        One sample.

    Returns
    -------
    TailParameters
        Its ``sse`` is the profile.
    """
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
    """Profile-likelihood interval of θ for one sample, with independent points.

    Parameters
    ----------
    model, log_density, weights, grid, ratios
        As in :func:`profile_fit`, with one replicate.
    fit : TailParameters
        Its best fit.
    n_parameters : int
        Number of fitted parameters.
    confidence : float
        Nominal coverage.

    Returns
    -------
    lower, upper : float
        Infinite where the data do not bound θ.
    """

    def squares(theta: np.ndarray) -> np.ndarray:
        return profile_grid(model, theta, log_density, weights, grid, ratios).sse

    limit = profile_threshold(fit.sse[0], int((weights > 0).sum()), n_parameters, confidence)
    return profile_interval(squares, float(fit.theta[0]), limit, model.bounds)


def profile_fit(
    model: TailModel,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
) -> TailParameters:
    """Fit a model to the full sample and to its replicates.

    Parameters
    ----------
    model : TailModel
        What to fit.
    log_density : ndarray of shape (n_replicates, n_taus, n_shells)
        ln of energy over shell width, the full sample first; any finite number where the weight is
        zero.
    weights : ndarray of shape (n_replicates, n_taus, n_shells)
        Inverse variances; zero leaves a point out.
    grid : ShellGrid
        The shells.
    ratios : ndarray of shape (n_taus,), optional
        κ_j = K·ratio_j with one shared K; by default κ_j is free for each tau.

    Returns
    -------
    TailParameters
        θ of the full sample at an end of the model's range means that it is not determined.
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
