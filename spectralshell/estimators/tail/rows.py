"""The fitted density on shells: rows fitted at known b, energies, expected log-likelihoods."""

from __future__ import annotations

import numpy as np

from spectralshell.estimators.tail.data import ROUNDING, TINY
from spectralshell.estimators.tail.models import POWER_LAW, TEMPLATE
from spectralshell.estimators.tail.reading import ShellLayout
from spectralshell.estimators.tail.solve import MAX_STEPS, shell_grid, solve


def fit_rows(
    energies: np.ndarray,
    totals: np.ndarray,
    layout: ShellLayout,
    shell_weights: np.ndarray,
    slope: float,
    *,
    has_cutoff: bool,
    cutoffs: np.ndarray | None,
    min_shells: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Intercept and coefficient of each row at known b, and ln λ_ref, as the solver has them.

    Totals of rows tell rounding from energy; rows with too few usable shells get NaN.
    """
    kept = shell_weights > 0
    lower, upper = layout.edges[:-1][kept], layout.edges[1:][kept]
    grid = shell_grid(lower, upper)
    values = energies[:, kept]
    usable = (values > ROUNDING * totals[:, None]) & (values >= TINY)
    log_density = np.log(np.where(usable, values, 1.0) / (upper - lower))
    n_rows = len(energies)
    power = slope - 1.0
    start = np.zeros((n_rows, 1))
    if cutoffs is not None and has_cutoff:
        start[:, 0] = cutoffs * power * np.exp(power * grid.log_reference)
    fit = solve(
        TEMPLATE if has_cutoff else POWER_LAW,
        np.full(n_rows, slope),
        np.zeros(n_rows),
        start,
        log_density[:, None],
        (usable * shell_weights[kept])[:, None],
        grid,
        ratios=None,
        max_steps=MAX_STEPS if has_cutoff and cutoffs is None else 0,
    )
    enough = usable.sum(axis=1) >= min_shells
    intercept = np.where(enough, fit.intercept[:, 0], np.nan)
    return intercept, np.where(enough, fit.coefficient[:, 0], np.nan), grid.log_reference


def window_energies(
    energies: np.ndarray,
    layout: ShellLayout,
    window: tuple[float, float],
    slope: float,
    cutoffs: np.ndarray,
) -> np.ndarray:
    """Measured energy of each row in the window; a straddling shell counts by its fitted share."""
    if np.isnan(window[0]):
        return np.zeros(len(energies))
    slope = 1.0 if np.isnan(slope) else slope  # without a fit, shared out evenly in ln λ
    return (energies * fitted_shares(layout, window, slope, np.nan_to_num(cutoffs))).sum(axis=1)


def score_rows(
    energies: np.ndarray,
    layout: ShellLayout,
    window: tuple[float, float],
    slope: float,
    cutoffs: np.ndarray,
) -> np.ndarray:
    """Σ w_i E_fit[ln f | shell i ∩ window] / Σ w_i for each row; NaN without energy there.

    f is the fitted density per unit ln λ, which integrates to 1 over the shells in the window.
    """
    lower, upper = _clipped(layout, window)
    touched = upper > lower
    if not touched.any():
        return np.full(len(energies), np.nan)
    weights = energies[:, touched] * fitted_shares(layout, window, slope, cutoffs)[:, touched]
    _, mean_log = log_shell_energies(lower[touched], upper[touched], slope, cutoffs)
    norm, _ = log_shell_energies(lower[touched][:1], upper[touched][-1:], slope, cutoffs)
    total, value = weights.sum(axis=1), (weights * (mean_log - norm)).sum(axis=1)
    return np.divide(value, total, out=np.full(len(energies), np.nan), where=total > 0)


def fitted_shares(
    layout: ShellLayout, window: tuple[float, float], slope: float, cutoffs: np.ndarray
) -> np.ndarray:
    """Part of each shell's fitted energy that lies in the window, shape (n_rows, n_shells)."""
    lower, upper = _clipped(layout, window)
    edges = layout.edges
    shares = np.zeros((len(cutoffs), len(lower)))
    shares[:, (lower == edges[:-1]) & (upper == edges[1:])] = 1.0
    cut = (upper > lower) & ((lower > edges[:-1]) | (upper < edges[1:]))
    if cut.any():
        part, _ = log_shell_energies(lower[cut], upper[cut], slope, cutoffs)
        whole, _ = log_shell_energies(edges[:-1][cut], edges[1:][cut], slope, cutoffs)
        shares[:, cut] = np.exp(np.minimum(part - whole, 0.0))
    return shares


def _clipped(layout: ShellLayout, window: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = layout.edges[:-1], layout.edges[1:]
    return np.clip(lower, *window), np.clip(upper, *window)


def log_shell_energies(
    lower: np.ndarray, upper: np.ndarray, slope: float, cutoffs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ln ∫ ε dλ over n intervals and the mean of ln(λ ε) under ε there, each (n_rows, n).

    The density is ε = λ^−b e^(−κ λ^(b−1)), with a κ for each row.
    """
    grid = shell_grid(lower, upper)
    log_lambda = grid.x + grid.log_reference
    log_density = -slope * log_lambda - cutoffs[:, None, None] * np.exp((slope - 1.0) * log_lambda)
    logs = log_density + grid.log_weights + np.log(upper - lower)[:, None]
    top = logs.max(axis=-1, keepdims=True)
    parts = np.exp(logs - top)
    norm = parts.sum(axis=-1)
    mean_log = (parts * (log_density + log_lambda)).sum(axis=-1) / norm
    return np.log(norm) + top[..., 0], mean_log
