"""Evidence about the tail: the test of no cutoff, competing densities, the power of the cutoff."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectralshell.estimators.intervals import jackknife_t
from spectralshell.estimators.tail.data import (
    ROUNDING,
    BatchedEnergies,
    TailProblem,
    relative_deviations,
)
from spectralshell.estimators.tail.models import COMPARED, FREE_POWER, SMALLEST_POWER, TailModel
from spectralshell.estimators.tail.profile import (
    TailFit,
    is_determined,
    likelihood_interval,
    profile_fit,
)
from spectralshell.statuses import (
    DEGENERATE_POWER,
    EQUAL_BATCHES,
    FLAT_POWER,
    POWER_EXCLUDES_BOTH,
    POWER_EXCLUDES_TEMPLATE,
    better_model,
    competing_minima,
    fits_not_converged,
    join_statuses,
    repeated_batches,
    rival_minimum,
)

COMPARISON_COLUMNS = (
    "model",
    "slope",
    "n_parameters",
    "aic",
    "delta_aic",
    "log_likelihood",
    "rank",
)

FALSIFIER_FIELDS = (
    "power",
    "lower",
    "upper",
    "slope",
    "template_power",
    "frozen_power",
    "contains_template",
    "contains_frozen",
    "status",
)

# The power of the cutoff that a frozen kernel gives.
FROZEN_POWER = 1.0

# Relative accuracy of shell integrals; a cutoff that explains less explains rounding.
QUADRATURE = 1e-6

# Models whose AIC differ by less are never told apart (Burnham and Anderson 2002, section 2.6).
AIC_TIE = 2.0

# A model that trails by more has essentially no support (ibid.), and that is said even of a tie.
AIC_FAR = 10.0

# Batches whose spectra differ by less in shape move b by less than the fit resolves.
SMALLEST_DEVIATION = 1e-9

# Residuals this small are rounding; ln of their square would rank rounding.
SMALLEST_SQUARE = 1e-20


def no_cutoff_p_value(
    data: BatchedEnergies,
    means: np.ndarray,
    weights: np.ndarray,
    log_lambda: np.ndarray,
    improvement: float,
    sse: float,
) -> float:
    """P-value of κ = 0 from the improvement in weighted squares that a cutoff brings.

    Batches are the subjects of a repeated-measures design: correlated shells and taus do no harm.
    """
    n_taus, n_points = len(means), int((weights > 0).sum())
    if improvement <= QUADRATURE**2 * weights.sum():
        return 1.0
    if data.n_batches == 1:  # the F test on the residuals, which takes them as independent
        freedom = n_points - 2 * n_taus - 1
        if freedom < 1 or sse <= 0:
            return 0.0 if sse <= 0 < improvement and freedom >= 1 else 1.0
        return float(stats.f.sf(improvement / n_taus / (sse / freedom), n_taus, freedom))
    # The improvement against the trace of the batch covariance over the contrasts that a cutoff can
    # move, with the degrees of freedom of Greenhouse and Geisser (Psychometrika 24, 1959).
    contrasts = _cutoff_contrasts(np.sqrt(weights), log_lambda)
    counts = data.present.sum(axis=1)
    # Each batch's part in ln of the mean; n/(n−1) makes its sum of squares an unbiased variance.
    parts = relative_deviations(data, means) / counts[:, None, None]
    parts = parts * np.sqrt(counts / np.maximum(counts - 1.0, 1.0))[:, None, None]
    parts = (parts * np.sqrt(weights)[:, None]).transpose(1, 0, 2).reshape(data.n_batches, -1)
    covariance = (parts @ contrasts).T @ (parts @ contrasts)
    trace = np.trace(covariance)
    if trace <= ROUNDING**2 * weights.sum():
        return 0.0
    freedom = trace**2 / (covariance**2).sum()
    return float(stats.f.sf(improvement / trace, freedom, freedom * (data.n_batches - 1)))


def _cutoff_contrasts(root_weights: np.ndarray, log_lambda: np.ndarray) -> np.ndarray:
    """Orthonormal columns: what a cutoff can add to a power law of one slope, to second order."""
    n_taus, n_shells = root_weights.shape
    x = (log_lambda - log_lambda.mean()) / max(np.ptp(log_lambda), 1e-12)
    blocks = np.eye(n_taus)
    null = np.concatenate([np.kron(blocks, np.ones(n_shells)), np.tile(x, n_taus)[None]])
    full = np.concatenate([np.kron(blocks, x), np.kron(blocks, x**2)])
    root = root_weights.ravel()
    basis, _ = np.linalg.qr((null * root).T)
    rest = (full * root).T
    rest = rest - basis @ (basis.T @ rest)
    left, values, _ = np.linalg.svd(rest - basis @ (basis.T @ rest), full_matrices=False)
    return left[:, values > 1e-9 * values.max(initial=1e-300)]


def batches_differ(problem: TailProblem) -> bool:
    """Return whether any batch has a spectrum of another shape than the mean."""
    deviations = relative_deviations(problem.data, problem.means)
    usable = np.broadcast_to(problem.weights[0][:, None] > 0, deviations.shape)
    most = np.where(usable, deviations, -np.inf).max(axis=-1)
    least = np.where(usable, deviations, np.inf).min(axis=-1)
    return bool((most - least > SMALLEST_DEVIATION).any())


def batch_phrases(problem: TailProblem) -> list[str]:
    """Say where batches are not the independent units that the jackknife takes them for."""
    n = problem.n_batches
    if n > 1 and not batches_differ(problem):
        return [EQUAL_BATCHES]
    rows = problem.data.energies.transpose(1, 0, 2).reshape(n, -1)
    n_repeated = n - len(np.unique(rows, axis=0))
    return [repeated_batches(n_repeated, n)] if n_repeated else []


def minima_phrases(problem: TailProblem, model: TailModel, fit: TailFit, symbol: str) -> list[str]:
    """Say where another minimum of the profile is as good, for the sample or a batch left out."""
    n = problem.n_points
    squares = np.maximum(fit.sse / n, SMALLEST_SQUARE)
    tied = n * np.log(np.maximum(fit.rival_sse / n, SMALLEST_SQUARE) / squares) < AIC_TIE
    tied &= np.abs(fit.rival - fit.theta) >= SMALLEST_POWER
    elsewhere = np.abs(fit.theta - fit.rival[0]) < np.abs(fit.theta - fit.theta[0])
    if model.pole is not None:
        elsewhere |= (fit.theta < model.pole) != (fit.theta[0] < model.pole)
    phrases = [rival_minimum(symbol, float(fit.rival[0]))] if tied[0] else []
    n_unsteady = int((tied | elsewhere)[1:].sum())
    return phrases + ([competing_minima(n_unsteady, len(tied) - 1)] if n_unsteady else [])


def evidence_phrases(
    chosen: TailModel, comparison: pd.DataFrame, falsifier: pd.Series
) -> list[str]:
    """Say the worst that comparison and falsifier know of the chosen model."""
    phrases = []
    table = comparison.set_index("model")
    distance = table["delta_aic"][chosen.name]
    tied = bool(table["rank"][chosen.name] == 1)
    if distance > AIC_FAR or (distance > 0 and not tied):
        phrases.append(better_model(str(table["aic"].idxmin()), distance, tied=tied))
    if chosen.kind == "template" and falsifier["contains_template"] is False:
        frozen = falsifier["contains_frozen"]
        phrases.append(POWER_EXCLUDES_TEMPLATE if frozen else POWER_EXCLUDES_BOTH)
    return phrases


def not_converged_phrase(fits: dict[TailModel, TailFit]) -> str:
    """Name the models whose fit, of the sample or a batch left out, is not at its minimum."""
    return fits_not_converged(m.name for m, fit in fits.items() if not fit.converged.all())


def compare(
    problem: TailProblem,
    fits: dict[TailModel, TailFit],
    shared: bool,
    confidence: float,
) -> pd.DataFrame:
    """Rank the compared models by the AIC of the weighted Gaussian residuals of ln ε.

    Models that tie share the best rank; without an AIC the rank is 0.
    """
    n, n_taus = problem.n_points, problem.n_taus
    rows = []
    for model in COMPARED:
        fit = fits[model]
        extra = {"power": 0, "lognormal": n_taus}.get(model.kind, 1 if shared else n_taus)
        n_parameters = n_taus + 1 + extra
        aic = n * np.log(max(fit.sse[0] / n, SMALLEST_SQUARE)) + 2.0 * n_parameters
        slope = np.nan if model.kind == "lognormal" else fit.theta[0]
        rows.append((model.name, slope, n_parameters, aic, 0.0, _held_out(problem, fit), 0))
    table = pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))
    table["delta_aic"] = table["aic"] - table["aic"].min()
    margin = _tie_margins(problem, [fits[model].sse for model in COMPARED], confidence)
    tied = np.where(table["delta_aic"] < margin, 0.0, table["delta_aic"])
    table["rank"] = pd.Series(tied).rank(method="min").fillna(0).astype(int)
    return table


def _tie_margins(problem: TailProblem, squares: list[np.ndarray], confidence: float) -> np.ndarray:
    """Difference of AIC from the best below which a model ties with it.

    Shells are not independent points, so it is also the jackknife-t interval over batches.
    """
    if problem.n_batches == 1:
        return np.full(len(squares), AIC_TIE)
    n = problem.n_points
    logs = n * np.log(np.maximum(np.array(squares) / n, SMALLEST_SQUARE))
    best = int(logs[:, 0].argmin())
    half, _ = jackknife_t((logs - logs[best]).T, confidence)
    return np.maximum(half, AIC_TIE)


def _held_out(problem: TailProblem, fit: TailFit) -> float:
    """Mean Gaussian log-likelihood of ln ε of each batch under the fit to the others."""
    if problem.n_batches == 1:
        return np.nan
    data = problem.data
    counts = data.present.sum(axis=1)[:, None]
    full = problem.weights[0]
    variance = np.divide(counts, full, out=np.ones_like(full), where=full > 0)[:, None]
    fitted = full > 0
    width = np.where(fitted, np.log(np.where(fitted, problem.means, 1.0)), 0.0)
    width = width - problem.log_density[0]
    energies = data.energies
    scored = (energies > 0) & (problem.weights[1:] > 0).transpose(1, 0, 2)
    held_out = np.log(np.where(scored, energies, 1.0)) - width[:, None]
    # The mean of ln lies half a variance below ln of the mean.
    error = held_out - fit.mean[1:].transpose(1, 0, 2) + 0.5 * variance
    value = -0.5 * (np.log(2.0 * np.pi * variance) + error**2 / variance)
    return float(value[scored].mean()) if scored.any() else np.nan


def empty_comparison() -> pd.DataFrame:
    """Return the comparison of a fit that could not be made."""
    rows = [(model.name, np.nan, 0, np.nan, np.nan, np.nan, 0) for model in COMPARED]
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def falsify(problem: TailProblem, ratios: np.ndarray | None, confidence: float) -> pd.Series:
    """Fit the power p of the cutoff exp(−κ λ^p) freely, where a cutoff was found.

    ``template_power`` is the p = slope − 1 that the template would need at the fitted slope.
    """
    fit = profile_fit(FREE_POWER, problem.log_density, problem.weights, problem.grid, ratios)
    power, slope = float(fit.theta[0]), float(fit.slope[0])
    status = join_statuses(
        [
            not_converged_phrase({FREE_POWER: fit}),
            *minima_phrases(problem, FREE_POWER, fit, "p"),
        ]
    )
    if not is_determined(FREE_POWER, fit) or not (fit.coefficient[0] != 0).any():
        return empty_falsifier(FLAT_POWER)
    if abs(power) < SMALLEST_POWER:
        return empty_falsifier(DEGENERATE_POWER)
    if problem.n_batches > 1 and not batches_differ(problem):
        none = (np.nan, np.nan, slope, slope - 1.0, FROZEN_POWER, None, None)
        return _falsifier(power, *none, join_statuses([EQUAL_BATCHES, status]))
    if problem.n_batches > 1:
        half = float(jackknife_t(fit.theta, confidence)[0])
        lower, upper = power - half, power + half
    else:
        n_parameters = 2 + problem.n_taus + (1 if ratios is not None else problem.n_taus)
        lower, upper = likelihood_interval(
            FREE_POWER,
            fit,
            problem.log_density,
            problem.weights,
            problem.grid,
            ratios,
            n_parameters,
            confidence,
        )
    return _falsifier(
        power,
        lower,
        upper,
        slope,
        slope - 1.0,
        FROZEN_POWER,
        _contains_template(fit, lower, upper, confidence),
        bool(lower <= FROZEN_POWER <= upper),
        status,
    )


def _contains_template(fit: TailFit, lower: float, upper: float, confidence: float) -> bool:
    """Return whether p = b − 1 is tenable: the slope is uncertain too, and correlated with p."""
    gap = fit.theta - (fit.slope - 1.0)
    if len(gap) > 1:
        return bool(abs(gap[0]) <= jackknife_t(gap, confidence)[0])
    return bool(lower <= fit.slope[0] - 1.0 <= upper)


def empty_falsifier(status: str) -> pd.Series:
    """Return the falsifier of a fit that could not be made."""
    return _falsifier(np.nan, np.nan, np.nan, np.nan, np.nan, FROZEN_POWER, None, None, status)


def _falsifier(*values: Any) -> pd.Series:
    fields = dict(zip(FALSIFIER_FIELDS, values, strict=True))
    return pd.Series(fields, name="falsifier", dtype=object)
