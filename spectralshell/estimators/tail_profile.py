"""Profile fits of tail models that are integrated over shells.

A model of the density is ln ε(λ) = a_j + base(θ; x) − c_j h(θ; x) with x = ln(λ / λ_ref), one
shared non-linear parameter θ and, per tau, an amplitude a_j and a coefficient c_j. The full sample
is profiled over a grid of θ, which finds the right basin; Gauss-Newton then refines it, and the
jackknife replicates start from there.
"""

from __future__ import annotations

import numpy as np

from spectralshell.estimators.tail_intervals import profile_interval, profile_threshold
from spectralshell.estimators.tail_linear import TailParameters, solve
from spectralshell.estimators.tail_models import ShellGrid, TailModel

N_GRID_STEPS = 5
N_REFINE_STEPS = 12
N_REPLICATE_STEPS = 6
# Basins of the profile that are refined; the template has one on each side of b = 1.
N_BASINS = 3


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
