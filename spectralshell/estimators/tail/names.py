"""Several runs in one frame: the slope of each, and the test that they are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from spectralshell.statuses import NAMES_NOT_COMPARED, join_statuses, names_agree, names_differ

NAME_COLUMNS = ("name", "b", "lower", "upper", "status")

# Level of the test that slopes are equal; the status says which way it went.
EQUALITY_LEVEL = 0.05


@dataclass(frozen=True)
class NamedSlope:
    """The tail slope of one name, fitted alone."""

    name: str
    slopes: np.ndarray  # the full sample first, then each batch left out, if there are several
    units: np.ndarray  # codes of the batches left out
    interval: tuple[float, float]
    phrases: Sequence[str]  # of its status


def slopes_by_name(named: list[NamedSlope]) -> pd.DataFrame:
    """Return one row per name: its slope with its interval and status."""
    rows = [
        (one.name, float(one.slopes[0]), *one.interval, join_statuses(one.phrases)) for one in named
    ]
    return pd.DataFrame(rows, columns=list(NAME_COLUMNS))


def compare_names(named: list[NamedSlope]) -> str:
    """Say whether the slopes of names differ, by an F test on their jackknife covariance."""
    known = [one for one in named if np.isfinite(one.slopes).all() and len(one.slopes) > 2]
    if len(known) < len(named):
        return NAMES_NOT_COMPARED
    p_value = equality_p_value(named)
    return names_differ(p_value) if p_value < EQUALITY_LEVEL else names_agree(p_value)


def equality_p_value(named: list[NamedSlope]) -> float:
    """P-value of equal slopes: squared contrasts over the trace of their jackknife covariance."""
    # Batches that names share are left out together: degrees of freedom of Greenhouse and Geisser
    # (two names: the paired t test). Else those of Satterthwaite (two names: Welch's test).
    slopes = np.array([one.slopes[0] for one in named])
    k = len(slopes)
    centring = np.eye(k) - 1.0 / k
    if _share_units(named):
        order = [1 + np.argsort(one.units) for one in named]
        left_out = np.stack([o.slopes[rows] for o, rows in zip(named, order, strict=True)], axis=1)
        n = len(left_out)
        deviations = left_out - left_out.mean(axis=0)
        covariance = (n - 1) / n * deviations.T @ deviations
    else:
        variances = np.array([_jackknife_variance(one.slopes[1:]) for one in named])
        covariance = np.diag(variances)
    moved = centring @ covariance @ centring
    trace = np.trace(moved)
    square = float(((slopes - slopes.mean()) ** 2).sum())
    if trace <= 0.0:
        return 1.0 if square == 0.0 else 0.0
    freedom = trace**2 / (moved**2).sum()
    if _share_units(named):
        rest = freedom * (n - 1)
    else:
        counts = np.array([len(one.slopes) - 1 for one in named])
        rest = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    return float(stats.f.sf(square / trace, freedom, rest))


def _share_units(named: list[NamedSlope]) -> bool:
    return all(set(one.units) == set(named[0].units) for one in named)


def _jackknife_variance(left_out: np.ndarray) -> float:
    n = len(left_out)
    return float((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
