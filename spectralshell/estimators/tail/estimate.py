"""A tail estimated from its data: models fitted, κ = 0 tested, b with its interval and status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectralshell.estimators.intervals import jackknife_t
from spectralshell.estimators.tail.data import TailProblem
from spectralshell.estimators.tail.evidence import (
    batch_phrases,
    batches_differ,
    compare,
    empty_falsifier,
    evidence_phrases,
    falsify,
    minima_phrases,
    no_cutoff_p_value,
    not_converged_phrase,
)
from spectralshell.estimators.tail.models import (
    COMPARED,
    POWER_LAW,
    SMALLEST_POWER,
    TEMPLATE,
    TailModel,
)
from spectralshell.estimators.tail.profile import (
    TailFit,
    is_determined,
    likelihood_interval,
    profile_fit,
)
from spectralshell.statuses import (
    DEGENERATE_SLOPE,
    FLAT_SLOPE,
    FRONTIER_OUTSIDE,
    NO_CUTOFF,
    NO_FRONTIER_INTERVAL,
    OK,
    ONE_BATCH_OPTIMISTIC,
    TOO_FEW_SHELLS,
    join_statuses,
    taus_left_out,
)

FRAME_COLUMNS = (
    "tau",
    "amplitude",
    "cutoff",
    "frontier",
    "frontier_lower",
    "frontier_upper",
    "n_shells",
    "status",
)

# Level of the test of κ = 0; it decides the model, so it does not follow ``confidence``.
CUTOFF_LEVEL = 0.05


@dataclass(frozen=True)
class TailEstimate:
    """Result of a fit."""

    slope: float  # b, NaN where the phrases say why
    slopes: np.ndarray  # b, and b without each batch where there are several; NaN alone for none
    interval: tuple[float, float]
    has_cutoff: bool
    shared_cutoff: float  # K of κ_j = K τ_j, NaN where κ_j is free
    frame: pd.DataFrame  # one row per tau
    shell_weights: np.ndarray  # mean weight of each shell over the taus, 0 outside the fit
    phrases: Sequence[str]  # what is to be said of b
    comparison: pd.DataFrame
    falsifier: pd.Series


def estimate_tail(
    problem: TailProblem, taus: np.ndarray, cutoff: str, confidence: float
) -> TailEstimate:
    """Fit all models, test κ = 0, and report b with its interval.

    ``taus`` are all of the input, also those with too few shells.
    """
    shared = cutoff == "shared"
    ratios = problem.data.taus if shared else None
    fits = {
        model: profile_fit(
            model,
            problem.log_density,
            problem.weights,
            problem.grid,
            None if model.kind == "lognormal" else ratios,
        )
        for model in COMPARED
    }
    found = _has_cutoff(problem, fits)
    chosen = TEMPLATE if found and cutoff != "none" else POWER_LAW
    fit = fits[chosen]
    comparison = compare(problem, fits, shared, confidence)
    falsifier = empty_falsifier(NO_CUTOFF)
    if found and is_determined(chosen, fit):
        falsifier = falsify(problem, ratios, confidence)
    phrases = [
        *_phrases(problem, chosen, fit, cutoff),
        not_converged_phrase(fits),
        *evidence_phrases(chosen, comparison, falsifier),
    ]
    if not is_determined(chosen, fit):
        return no_estimate(taus, problem.n_shells, len(problem.shells), phrases, comparison)
    weights = np.zeros(len(problem.shells))
    weights[problem.shells] = problem.weights[0].mean(axis=0)
    amplitude, log_cutoff, log_frontier = natural_parameters(
        fit.theta[:, None], fit.intercept, fit.coefficient, problem.grid.log_reference
    )
    rate = np.exp(log_cutoff[0])
    used = problem.data.taus > 0
    has_rate = shared and chosen is TEMPLATE and used.any()
    return TailEstimate(
        slope=float(fit.theta[0]),
        slopes=fit.theta,
        interval=_interval(problem, chosen, fit, ratios, confidence),
        has_cutoff=chosen is TEMPLATE,
        shared_cutoff=float((rate[used] / problem.data.taus[used])[0]) if has_rate else np.nan,
        frame=_tau_frame(problem, taus, amplitude[0], rate, log_frontier, cutoff, confidence),
        shell_weights=weights,
        phrases=phrases,
        comparison=comparison,
        falsifier=falsifier,
    )


def no_estimate(
    taus: np.ndarray,
    n_shells: np.ndarray,
    n_columns: int,
    phrases: Sequence[str],
    comparison: pd.DataFrame,
) -> TailEstimate:
    """Return NaN with a status, for input that is legal but too poor to fit."""
    status = join_statuses(phrases)
    blank = np.full((len(taus), 5), np.nan)
    return TailEstimate(
        slope=np.nan,
        slopes=np.array([np.nan]),
        interval=(np.nan, np.nan),
        has_cutoff=False,
        shared_cutoff=np.nan,
        frame=_frame(taus, blank, n_shells, [status] * len(taus)),
        shell_weights=np.zeros(n_columns),
        phrases=phrases,
        comparison=comparison,
        falsifier=empty_falsifier(status),
    )


def _has_cutoff(problem: TailProblem, fits: dict[TailModel, TailFit]) -> bool:
    without, with_cutoff = fits[POWER_LAW].sse[0], fits[TEMPLATE].sse[0]
    if not (fits[TEMPLATE].coefficient[0] != 0).any():
        return False
    p_value = no_cutoff_p_value(
        problem.data,
        problem.means,
        problem.weights[0],
        problem.log_lambda,
        max(without - with_cutoff, 0.0),
        with_cutoff,
    )
    return p_value < CUTOFF_LEVEL


def _phrases(problem: TailProblem, chosen: TailModel, fit: TailFit, cutoff: str) -> list[str]:
    phrases = []
    if not is_determined(chosen, fit):
        phrases.append(FLAT_SLOPE)
    if chosen is POWER_LAW and cutoff != "none":
        phrases.append(NO_CUTOFF)
    if _is_degenerate(chosen, float(fit.theta[0])):
        phrases.append(DEGENERATE_SLOPE)
    if chosen is TEMPLATE:
        phrases += minima_phrases(problem, chosen, fit, "b")
    if problem.n_batches == 1:
        phrases.append(ONE_BATCH_OPTIMISTIC)
    phrases += batch_phrases(problem)
    if not problem.used.all():
        phrases.append(taus_left_out(int((~problem.used).sum())))
    return phrases


def _interval(
    problem: TailProblem,
    chosen: TailModel,
    fit: TailFit,
    ratios: np.ndarray | None,
    confidence: float,
) -> tuple[float, float]:
    best = float(fit.theta[0])
    if _is_degenerate(chosen, best):
        # Cutoff and slope imitate each other: replicates agree on a b that nothing determines.
        return np.nan, np.nan
    if problem.n_batches > 1:
        if not batches_differ(problem):
            return np.nan, np.nan
        gap = np.abs(fit.theta - 1.0)
        one_branch = np.ptp(np.sign(fit.theta - 1.0)) == 0
        if chosen is TEMPLATE and one_branch and gap.min() >= SMALLEST_POWER:
            # A cutoff says the less about b the nearer b is to 1: ln|b − 1| has even spread.
            half = float(jackknife_t(np.log(gap), confidence)[0])
            ends = 1.0 + np.sign(best - 1.0) * gap[0] * np.exp([-half, half])
            return float(ends.min()), float(ends.max())
        half = float(jackknife_t(fit.theta, confidence)[0])
        return best - half, best + half
    extra = 0 if chosen is POWER_LAW else (1 if ratios is not None else problem.n_taus)
    return likelihood_interval(
        chosen,
        fit,
        problem.log_density,
        problem.weights,
        problem.grid,
        ratios,
        problem.n_taus + 1 + extra,
        confidence,
    )


def _is_degenerate(chosen: TailModel, slope: float) -> bool:
    return chosen is TEMPLATE and bool(_is_near_pole(slope))


def _is_near_pole(slope: float | np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(slope) - 1.0) < SMALLEST_POWER


def natural_parameters(
    slope: np.ndarray, intercept: np.ndarray, coefficient: np.ndarray, log_reference: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A, ln κ and ln λ* of A λ^−b exp(−κ λ^(b−1)); without a cutoff ln κ is −∞, ln λ* NaN.

    Near b = 1 ln λ* is NaN, since nothing determines it, and A may overflow to infinity.
    """
    power = np.where(slope == 1.0, 1.0, slope - 1.0)
    scaled = coefficient / power  # κ λ_ref^(b−1), not negative
    with np.errstate(divide="ignore", over="ignore"):
        log_cutoff = np.log(scaled) - power * log_reference
        amplitude = np.exp(intercept + slope * log_reference + scaled)
        # Near b = 1 the power −1/(b − 1) makes any λ* of a κ that hardly moves.
        has_frontier = (scaled > 0) & ~_is_near_pole(slope)
        log_frontier = np.where(has_frontier, -log_cutoff / power, np.nan)
    return amplitude, log_cutoff, log_frontier


def _tau_frame(
    problem: TailProblem,
    taus: np.ndarray,
    amplitude: np.ndarray,
    cutoff: np.ndarray,
    log_frontier: np.ndarray,
    kind: str,
    confidence: float,
) -> pd.DataFrame:
    """One row per tau; the frontier's interval is a jackknife-t of ln λ*."""
    values = np.full((len(taus), 5), np.nan)
    statuses = [TOO_FEW_SHELLS] * len(taus)
    resampled = problem.n_batches > 1 and batches_differ(problem)
    last = problem.grid.log_reference
    first = last - problem.grid.span
    for position, row in enumerate(np.flatnonzero(problem.used)):
        logs = log_frontier[:, position]
        has_interval = resampled and bool(np.isfinite(logs).all())
        with np.errstate(over="ignore"):
            values[row, :3] = amplitude[position], cutoff[position], np.exp(logs[0])
            if has_interval:
                half = float(jackknife_t(logs, confidence)[0])
                values[row, 3:] = np.exp(logs[0] + np.array([-half, half]))
        if cutoff[position] == 0:
            statuses[row] = OK if kind == "none" else NO_CUTOFF
        elif np.isnan(logs[0]):
            statuses[row] = DEGENERATE_SLOPE
        else:
            outside = not first <= logs[0] <= last
            statuses[row] = join_statuses(
                [
                    FRONTIER_OUTSIDE if outside else OK,
                    OK if has_interval else NO_FRONTIER_INTERVAL,
                ]
            )
    return _frame(taus, values, problem.n_shells, statuses)


def _frame(
    taus: np.ndarray, values: np.ndarray, n_shells: np.ndarray, statuses: list[str]
) -> pd.DataFrame:
    columns = [taus, *values.T, n_shells, statuses]
    return pd.DataFrame(dict(zip(FRAME_COLUMNS, columns, strict=True)))
