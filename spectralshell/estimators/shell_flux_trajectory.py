"""What the fluxes did over a trajectory: measured from the balance, beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from spectralshell.estimators.shell_flux_frames import BalancedSnapshot, consecutive
from spectralshell.shells import SoftShells
from spectralshell.shells.frames import label_index
from spectralshell.shells.measure import join_statuses

_STIFF = "the edge decays within the interval"
_OTHER = "the parameters took another direction"
_LONG = "the interval is too long to tell what the parameters did"
_EXPLAINED = 0.1  # part of the dissipation that may be missing from the change of energy
_UNRESOLVED = "not resolved at both ends"


def trajectory_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the measured and the predicted flux of every interval, one row per edge.

    Parameters
    ----------
    snapshots : sequence of BalancedSnapshot
        Successive times of a batch (and name) bound an interval.
    shells : SoftShells
        The weights.

    Returns
    -------
    DataFrame
        Columns ``tau_start, tau_end, batch, [name], edge, energy_below_start, energy_below_end,
        dissipation_below, measured, predicted_start, predicted_end, predicted, mismatch, resolved,
        status``. Without rows if every batch has one time.

    Notes
    -----
    ``measured`` is ΔE_≤/Δτ + D_≤, the mean flux that the energies and the dissipation along the
    direction leave for transfer. D_≤ is averaged by the logarithmic mean of the two ends, which is
    exact for one decaying mode and too large for several, or by the arithmetic one where an end is
    not positive. ``predicted`` is the mean of ``flux_down`` at the two ends. Both say little about
    an interval in which the modes at the edge decay, 2 λ Δτ > 1; its status says so.
    ``mismatch`` is the same balance for the whole energy, ΔE/Δτ + D. It is 0 if the parameters
    went the direction that the estimator was given, as far as D is known, and is part of
    ``measured`` otherwise: batches that training did not see do not follow their own gradient. The
    status speaks of another direction if −ΔE/Δτ lies outside the dissipation at the two ends, by
    over 10 %; of an interval too long to tell if it lies between them, over 10 % off their mean.
    """
    pairs = consecutive(snapshots)
    if not pairs:
        return pd.DataFrame(columns=["tau_start", "tau_end", "batch", *_INTERVAL_COLUMNS])
    blocks = [_interval_columns(start, end, shells.edges) for start, end in pairs]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    ends = label_index([end.measure for _, end in pairs]).repeat(shells.edges.size)
    frame = pd.DataFrame(columns, index=ends).reset_index().rename(columns={"tau": "tau_end"})
    starts = np.repeat([start.tau for start, _ in pairs], shells.edges.size)
    frame.insert(0, "tau_start", starts)
    return frame


def integrability_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return ∫|J| dτ, ∫|D| dτ of the shell below, and their ratio, one row per (batch, edge).

    The ratio is the smallest C of the bound in Definition 4.1 of "Renormalizable spectral-shell
    dynamics" over the times measured, integrals by the trapezoidal rule.
    """
    pairs = consecutive(snapshots)
    ends = {end.run: end.measure for _, end in pairs}  # the last of each run stays
    if not ends:
        return pd.DataFrame(columns=["tau_end", "batch", *_INTEGRAL_COLUMNS])
    blocks = [_integral_columns([p for p in pairs if p[0].run == run], shells) for run in ends]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    labels = label_index(list(ends.values())).repeat(shells.edges.size)
    frame = pd.DataFrame(columns, index=labels)
    return frame.reset_index().rename(columns={"tau": "tau_end"})


_INTEGRAL_COLUMNS = ("edge", "flux_integral", "dissipation_integral", "ratio")
_INTERVAL_COLUMNS = (
    "edge",
    "energy_below_start",
    "energy_below_end",
    "dissipation_below",
    "measured",
    "predicted_start",
    "predicted_end",
    "predicted",
    "mismatch",
    "resolved",
    "status",
)


def _interval_columns(
    start: BalancedSnapshot, end: BalancedSnapshot, edges: np.ndarray
) -> dict[str, np.ndarray]:
    elapsed = end.tau - start.tau
    first, last = start.balance, end.balance
    dissipation = _logarithmic_mean(first.dissipation_below, last.dissipation_below)
    losses = [float(balance.dissipation.sum()) for balance in (first, last)]
    lost = float(_logarithmic_mean(*(np.array([loss]) for loss in losses))[0])
    gained = float(last.energy.sum() - first.energy.sum()) / elapsed
    of_all = _mismatch_status(-gained, losses, lost)
    resolved = start.resolved & end.resolved
    stiff = 2.0 * edges * elapsed > 1.0
    status = [
        join_statuses(
            [of_all, *(phrase for phrase, holds in ((_UNRESOLVED, not r), (_STIFF, s)) if holds)]
        )
        for r, s in zip(resolved, stiff, strict=True)
    ]
    return {
        "edge": edges,
        "energy_below_start": first.energy_below,
        "energy_below_end": last.energy_below,
        "dissipation_below": dissipation,
        "measured": (last.energy_below - first.energy_below) / elapsed + dissipation,
        "predicted_start": first.flux_down,
        "predicted_end": last.flux_down,
        "predicted": 0.5 * (first.flux_down + last.flux_down),
        "mismatch": np.full(edges.shape, gained + lost),
        "resolved": resolved,
        "status": np.array(status, dtype=object),
    }


def _mismatch_status(found: float, losses: Sequence[float], mean: float) -> str:
    """Say whether a loss of energy is explained by the dissipation at the ends and their mean.

    Between them anything may be: one mode loses at the logarithmic mean, and several of which the
    fast ones are soon gone at little more than the smaller end.
    """
    slack = _EXPLAINED * abs(mean)
    if abs(found - mean) <= slack:
        return "ok"
    between = min(losses) - slack <= found <= max(losses) + slack
    return _LONG if between else _OTHER


def _logarithmic_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (a − b)/ln(a/b), the mean of an exponential between its ends."""
    mean: np.ndarray = 0.5 * (a + b)
    # Close ends: the two means agree to the square of their relative difference.
    apart = (a > 0.0) & (b > 0.0) & (np.abs(a - b) > 1e-4 * np.abs(mean))
    mean[apart] = (a[apart] - b[apart]) / np.log(a[apart] / b[apart])
    return mean


def _integral_columns(
    pairs: list[tuple[BalancedSnapshot, BalancedSnapshot]], shells: SoftShells
) -> dict[str, np.ndarray]:
    def integrate(rate: Callable[[BalancedSnapshot], np.ndarray]) -> np.ndarray:
        parts = [0.5 * (e.tau - s.tau) * (np.abs(rate(s)) + np.abs(rate(e))) for s, e in pairs]
        return np.asarray(np.sum(parts, axis=0))

    flux = integrate(lambda snapshot: snapshot.balance.flux_down)
    lost = integrate(lambda snapshot: snapshot.balance.dissipation[:-1])
    ratio = np.divide(flux, lost, out=np.full(flux.shape, np.nan), where=lost > 0.0)
    return dict(zip(_INTEGRAL_COLUMNS, (shells.edges, flux, lost, ratio), strict=True))


__all__ = ["integrability_frame", "trajectory_frame"]
