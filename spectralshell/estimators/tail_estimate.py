"""The estimate behind GRSDTailFitter: which model, its exponent and interval, its frontiers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectralshell.estimators.tail_alternatives import (
    COMPARED,
    compare,
    empty_comparison,
    empty_falsifier,
    falsify,
)
from spectralshell.estimators.tail_intervals import (
    jackknife_t,
    no_cutoff_p_value,
)
from spectralshell.estimators.tail_linear import TailParameters
from spectralshell.estimators.tail_models import DEGENERATE, POWER_LAW, TEMPLATE, TailModel
from spectralshell.estimators.tail_problem import TailProblem
from spectralshell.estimators.tail_profile import likelihood_interval, profile_fit

# Level of the test of κ = 0; it decides the model, so it does not follow ``confidence``.
CUTOFF_LEVEL = 0.05
NO_CUTOFF = "no cutoff in window"
TOO_FEW = "fewer than min_shells usable shells"
FLAT = "flat profile: b is not determined"
OPTIMISTIC = "one batch: interval and test take shells as independent, so they are optimistic"
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


@dataclass(frozen=True)
class TailEstimate:
    """Result of a fit.

    Attributes
    ----------
    slope : float
        b.
    interval : tuple of float
        Of b.
    has_cutoff : bool
        Whether the model has a cutoff.
    shared_cutoff : float
        K of κ_j = K τ_j; NaN where κ_j is free.
    frame : DataFrame
        One row per tau.
    shell_weights : ndarray of shape (n_shells,)
        Mean weight of each shell of the layout over the taus; 0 outside the fit.
    status : str
        Phrases joined by ``"; "``.
    comparison : DataFrame
    falsifier : Series
    """

    slope: float
    interval: tuple[float, float]
    has_cutoff: bool
    shared_cutoff: float
    frame: pd.DataFrame
    shell_weights: np.ndarray
    status: str
    comparison: pd.DataFrame
    falsifier: pd.Series


def no_estimate(
    taus: np.ndarray, n_shells: np.ndarray, n_columns: int, status: str
) -> TailEstimate:
    """Return NaN with a status, for input that is legal but too poor to fit."""
    blank = np.full((len(taus), 5), np.nan)
    frame = _frame(taus, blank, n_shells, [status] * len(taus))
    return TailEstimate(
        np.nan,
        (np.nan, np.nan),
        False,
        np.nan,
        frame,
        np.zeros(n_columns),
        status,
        empty_comparison(),
        empty_falsifier(status),
    )


def estimate_tail(
    problem: TailProblem, taus: np.ndarray, cutoff: str, confidence: float
) -> TailEstimate:
    """Fit all models, test κ = 0, and report b with its interval.

    Parameters
    ----------
    problem : TailProblem
        The data.
    taus : ndarray
        All taus of the input, also those with too few shells.
    cutoff : {"free", "shared", "none"}
        How κ depends on tau.
    confidence : float
        Nominal coverage of the intervals.

    Returns
    -------
    TailEstimate
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
    interval = _interval(problem, chosen, fit, ratios, confidence)
    phrases = _phrases(problem, chosen, fit, cutoff)
    if FLAT in phrases:
        blank = no_estimate(taus, problem.n_shells, len(problem.shells), "; ".join(phrases))
        return _with_evidence(blank, compare(problem, fits, shared, confidence))
    weights = np.zeros(len(problem.shells))
    weights[problem.shells] = problem.weights[0].mean(axis=0)
    amplitude, log_cutoff, log_frontier = natural_parameters(
        fit.theta[:, None], fit.intercept, fit.coefficient, problem.grid.log_reference
    )
    rate = np.exp(log_cutoff[0])
    used = problem.data.taus > 0
    has_rate = shared and chosen is TEMPLATE and used.any()
    shared_cutoff = float((rate[used] / problem.data.taus[used])[0]) if has_rate else np.nan
    return TailEstimate(
        slope=float(fit.theta[0]),
        interval=interval,
        has_cutoff=chosen is TEMPLATE,
        shared_cutoff=shared_cutoff,
        frame=_tau_frame(problem, taus, amplitude[0], rate, log_frontier, cutoff, confidence),
        shell_weights=weights,
        status="; ".join(phrases) or "ok",
        comparison=compare(problem, fits, shared, confidence),
        falsifier=(falsify(problem, ratios, confidence) if found else empty_falsifier(NO_CUTOFF)),
    )


def natural_parameters(
    slope: np.ndarray, intercept: np.ndarray, coefficient: np.ndarray, log_reference: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A, ln κ and ln λ* of A λ^−b exp(−κ λ^(b−1)) from a fit's own parameters.

    ln κ is −∞ and ln λ* NaN without a cutoff. A overflows to infinity near b = 1, where cutoff and
    amplitude together imitate a power law.
    """
    power = np.where(slope == 1.0, 1.0, slope - 1.0)
    scaled = coefficient / power  # κ λ_ref^(b−1), not negative
    with np.errstate(divide="ignore", over="ignore"):
        log_cutoff = np.log(scaled) - power * log_reference
        amplitude = np.exp(intercept + slope * log_reference + scaled)
        log_frontier = np.where(scaled > 0, -log_cutoff / power, np.nan)
    return amplitude, log_cutoff, log_frontier


def _has_cutoff(problem: TailProblem, fits: dict[TailModel, TailParameters]) -> bool:
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


def _is_degenerate(chosen: TailModel, slope: float) -> bool:
    return chosen is TEMPLATE and abs(slope - 1.0) < DEGENERATE


def _phrases(
    problem: TailProblem, chosen: TailModel, fit: TailParameters, cutoff: str
) -> list[str]:
    phrases = []
    low, high = chosen.bounds
    if not low + 1e-6 < fit.theta[0] < high - 1e-6:
        phrases.append(FLAT)
    if chosen is POWER_LAW and cutoff != "none":
        phrases.append(NO_CUTOFF)
    if _is_degenerate(chosen, float(fit.theta[0])):
        phrases.append("degenerate")
    if problem.n_batches == 1:
        phrases.append(OPTIMISTIC)
    if not problem.used.all():
        phrases.append(f"{int((~problem.used).sum())} tau with {TOO_FEW} left out")
    return phrases


def _interval(
    problem: TailProblem,
    chosen: TailModel,
    fit: TailParameters,
    ratios: np.ndarray | None,
    confidence: float,
) -> tuple[float, float]:
    best = float(fit.theta[0])
    if _is_degenerate(chosen, best):
        # Cutoff and slope imitate each other: replicates agree on a b that nothing determines.
        return np.nan, np.nan
    if problem.n_batches > 1:
        gap = np.abs(fit.theta - 1.0)
        if chosen is TEMPLATE and gap.min() >= DEGENERATE:
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
    statuses = [TOO_FEW] * len(taus)
    for position, row in enumerate(np.flatnonzero(problem.used)):
        with np.errstate(over="ignore"):
            frontier = np.exp(log_frontier[:, position])
        values[row, :3] = amplitude[position], cutoff[position], frontier[0]
        phrases = []
        if cutoff[position] == 0 and kind != "none":
            phrases.append(NO_CUTOFF)
        if np.isfinite(log_frontier[:, position]).all() and problem.n_batches > 1:
            half = float(jackknife_t(log_frontier[:, position], confidence)[0])
            with np.errstate(over="ignore"):
                values[row, 3:] = np.exp(log_frontier[0, position] + np.array([-half, half]))
        elif cutoff[position] > 0:
            phrases.append("frontier without interval")
        statuses[row] = "; ".join(phrases) or "ok"
    return _frame(taus, values, problem.n_shells, statuses)


def _frame(
    taus: np.ndarray, values: np.ndarray, n_shells: np.ndarray, statuses: list[str]
) -> pd.DataFrame:
    columns = [taus, *values.T, n_shells, statuses]
    return pd.DataFrame(dict(zip(FRAME_COLUMNS, columns, strict=True)))


def _with_evidence(blank: TailEstimate, comparison: pd.DataFrame) -> TailEstimate:
    return TailEstimate(**{**vars(blank), "comparison": comparison})
