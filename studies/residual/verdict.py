"""What the tables say about the paper's claims, in words that follow from the numbers.

The paper (section 7 of "When Does Learning Renormalize?") makes three claims: shells interact
weakly; mixing within shells is strong compared to transport between them; in residual networks the
coupling is nearly Toeplitz, and in plain ones it is not. Each is split into statements with one
number, an interval, and the same number under the nulls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from studies.residual.results import (
    differences,
    draw_columns,
    interval_text,
    mean_interval,
    overall,
    with_excess,
)

CLAIMS = {
    1: "that shells interact weakly",
    2: "that mixing within shells dominates",
    3: "that couplings are Toeplitz with residual connections, and less so without",
}
HOLDS, FAILS, PARTLY, OPEN = "holds", "does not hold", "holds in part", "undecided"
SUBLEADING = 0.1
"""Share up to which a part is called small beside the whole."""
SIGNIFICANT = 0.05

_GROUP = ["architecture", "activation", "time", "residual"]
_ALIKE = {True: "yes", False: "no", None: "–"}


@dataclass(frozen=True)
class Finding:
    """A statement of the paper and what was found.

    Parameters
    ----------
    claim : int
        Which of the three.
    statement : str
    verdict : str
    measured : str
        The number behind the verdict.
    null : str
        The same under the nulls.
    null_alike : bool or None
        Whether a null does as well: meets a statement as often, or has a difference of the same
        sign. None where there is nothing to explain.
    """

    claim: int
    statement: str
    verdict: str
    measured: str
    null: str
    null_alike: bool | None


def findings(frame: pd.DataFrame) -> list[Finding]:
    """Return all statements with their verdicts, from the frame of statistics."""
    frame = with_excess(frame)
    residual = frame[frame["architecture"] == "residual"]
    return [
        _counting(
            frame, 1, "transfer", _small,
            "the energy that changes shells is below a tenth of the dissipation",
        ),
        _counting(
            frame, 1, "rotation", _small,
            "what turning modes carry from shell to shell is below a tenth of the dissipation",
        ),
        _counting(
            frame, 1, "far_share", _small,
            "shells that are not neighbours carry below a tenth of the transfer",
        ),
        _counting(
            frame, 2, "ratio", lambda x: x > 1.0,
            "couplings within shells exceed those between shells",
        ),
        _counting(
            residual, 3, "raw_centre", _small,
            "in residual networks the central window of couplings as in the paper, not "
            "normalised, is nearly Toeplitz, its residual below 0.1",
        ),
        _counting(
            residual, 3, "toeplitz_centre", _small,
            "in residual networks the central window is nearly Toeplitz, its residual below 0.1",
        ),
        _contrast(
            frame, 3, "raw_centre", -1,
            "the Toeplitz residual of the central window, not normalised, is smaller in residual "
            "networks",
        ),
        _contrast(
            frame, 3, "toeplitz_centre", -1,
            "the Toeplitz residual of the central window is smaller in residual networks",
        ),
        _contrast(
            frame, 3, "excess_centre", -1,
            "the Toeplitz residual of the central window over that of its permuted entries (ln) "
            "is smaller in residual networks",
        ),
        _contrast(
            frame, 3, "toeplitz", -1,
            "the Toeplitz residual of all shells is smaller in residual networks",
        ),
        _contrast(
            frame, 3, "excess", -1,
            "the Toeplitz residual of all shells over that of permuted entries (ln) is smaller in "
            "residual networks",
        ),
        _positive(
            residual, 3, "raw_edge_minus_centre",
            "in residual networks the Toeplitz residual, not normalised, falls from the upper "
            "edge to the centre",
        ),
        _positive(
            residual, 3, "edge_minus_centre",
            "in residual networks the Toeplitz residual falls from the upper edge to the centre",
        ),
        _contrast(
            frame, 3, "edge_minus_centre", +1,
            "the Toeplitz residual falls by more from the upper edge to the centre in residual "
            "networks than in plain ones",
        ),
        _counting(
            residual, 3, "square_slope", _near_one,
            "the diagonal K_αα of residual networks, as in the paper, has slope 1 within 0.1",
        ),
        _counting(
            residual, 3, "slope", _near_one,
            "the root of the diagonal, √K_αα, of residual networks has slope 1 within 0.1",
        ),
        _contrast(
            frame, 3, "slope_off", -1,
            "the slope of √K_αα is closer to 1 in residual networks",
        ),
        _contrast(
            frame, 3, "r2", +1, "the diagonal scatters less about its power law (higher R²) in "
            "residual networks",
        ),
    ]  # fmt: skip


def findings_frame(found: list[Finding]) -> pd.DataFrame:
    """Return the findings as the table of the page."""
    return pd.DataFrame(
        {
            "claim": [one.claim for one in found],
            "statement": [one.statement for one in found],
            "verdict": [f"**{one.verdict}**" for one in found],
            "measured": [one.measured for one in found],
            "under the nulls": [one.null for one in found],
            "a null does as well": [_ALIKE[one.null_alike] for one in found],
        }
    )


def null_frame(frame: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Return in how many cells a statistic is outside of its nulls, on either side.

    Parameters
    ----------
    frame : DataFrame
        Of the statistics.
    names : dict of str to str
        Statistics and their headings.
    """
    draws = draw_columns(frame)
    rows = []
    for name, heading in names.items():
        for kind, cells in frame[frame["statistic"] == name].groupby("architecture", sort=False):
            row = {"statistic": heading, "architecture": kind, "cells": len(cells)}
            if cells["p_low"].notna().any():
                row["smaller than permuted"] = f"{(cells['p_low'] <= SIGNIFICANT).sum()}"
                row["larger than permuted"] = f"{(cells['p_high'] <= SIGNIFICANT).sum()}"
            row["below all random"] = f"{(cells['value'] < cells[draws].min(axis=1)).sum()}"
            row["above all random"] = f"{(cells['value'] > cells[draws].max(axis=1)).sum()}"
            rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def _contrast(frame: pd.DataFrame, claim: int, name: str, sign: int, statement: str) -> Finding:
    """Judge a difference between residual and plain networks of the same seed."""
    pairs = differences(frame, name)
    value = pairs["value"]
    found = overall(value)
    # The couplings of ReLU networks depend on the size of the step.
    parts = {
        "trained states": value[value.index.get_level_values("time") != "start"],
        "GELU networks": value[value.index.get_level_values("activation") == "gelu"],
    }
    alone = [f"{label}: {interval_text(*overall(part))}" for label, part in parts.items()]
    by_case = value.groupby(level=["activation", "time", "residual"])
    verdicts = [_sided(mean_interval(values), sign) for _, values in by_case]
    nulls = _sided_nulls({column: overall(pairs[column]) for column in pairs}, sign)
    return Finding(
        claim,
        statement,
        _sided(found, sign),
        f"residual − plain: {interval_text(*found)}; {'; '.join(alone)}; of {len(verdicts)} "
        f"settings alone, {verdicts.count(HOLDS)} agree and {verdicts.count(FAILS)} disagree",
        *nulls,
    )


def _positive(frame: pd.DataFrame, claim: int, name: str, statement: str) -> Finding:
    """Judge whether a statistic is positive; the networks of a seed are one observation."""
    columns = ["value", "permuted", *draw_columns(frame)]
    by_seed = frame[frame["statistic"] == name].groupby("seed")[columns].mean()
    intervals = {column: mean_interval(by_seed[column]) for column in columns}
    return Finding(
        claim,
        statement,
        _sided(intervals["value"], +1),
        f"edge − centre: {interval_text(*intervals['value'])}",
        *_sided_nulls(intervals, +1),
    )


def _sided_nulls(
    intervals: dict[str, tuple[float, float, float]], sign: int
) -> tuple[str, bool | None]:
    """Return what the nulls give, and whether they decide as the measurement does.

    Parameters
    ----------
    intervals : dict
        Of ``value``, ``permuted`` and the random directions.
    sign : int
        Side of zero on which the statement holds.
    """
    verdict, permuted = _sided(intervals["value"], sign), intervals["permuted"]
    random = [one for column, one in intervals.items() if column.startswith("draw_")]
    alike = sum(_sided(one, sign) == verdict for one in random)
    texts = [f"random directions: {np.mean([one[0] for one in random]):.3g}"]
    if verdict != OPEN:
        texts[0] += f", {alike} of {len(random)} decide alike"
    # What is measured against the permutations is zero for them.
    if permuted[1] < permuted[2]:
        texts.append(f"permutations: {interval_text(*permuted)}")
    if verdict == OPEN:
        return "; ".join(texts), None
    return "; ".join(texts), 2 * alike >= len(random) or _sided(permuted, sign) == verdict


def _counting(
    frame: pd.DataFrame,
    claim: int,
    name: str,
    meets: Callable[[pd.DataFrame], pd.DataFrame],
    statement: str,
) -> Finding:
    """Judge by how many settings, means over seeds, meet a condition."""
    draws = draw_columns(frame)
    chosen = frame[frame["statistic"] == name]
    groups = chosen.groupby(_GROUP, sort=False)[["value", "permuted", *draws]].mean()
    known = groups.loc[groups["value"].notna()]
    counts = meets(known).sum()
    count, verdict = int(counts["value"]), _counted(int(counts["value"]), len(known))
    nulls = [
        f"random directions: {counts[draws].median():g}, {_range(known[draws].median(axis=1))}"
    ]
    alike = 2 * (counts[draws] >= count).sum() >= len(draws)
    if known["permuted"].notna().all():
        nulls.append(f"permutations: {counts['permuted']}, {_range(known['permuted'])}")
        alike = alike or counts["permuted"] >= count
    smooth = meets(known[known.index.get_level_values("activation") == "gelu"])["value"]
    return Finding(
        claim,
        statement,
        verdict,
        f"{count} of {len(known)} settings ({smooth.sum()} of {len(smooth)} with GELU); "
        f"{_range(known['value'])}",
        "; ".join(nulls),
        bool(alike) if verdict in (HOLDS, PARTLY) else None,
    )


def _small(values: pd.DataFrame) -> pd.DataFrame:
    return values < SUBLEADING


def _near_one(values: pd.DataFrame) -> pd.DataFrame:
    return (values - 1.0).abs() <= SUBLEADING


def _sided(interval: tuple[float, float, float], sign: int) -> str:
    _, lower, upper = interval
    if not (np.isfinite(lower) and np.isfinite(upper)) or lower <= 0.0 <= upper:
        return OPEN
    return HOLDS if (lower > 0.0) == (sign > 0) else FAILS


def _counted(count: int, of: int) -> str:
    if of == 0:
        return OPEN
    if count == of:
        return HOLDS
    return FAILS if count <= of / 10 else PARTLY


def _range(values: pd.Series) -> str:
    return f"{values.min():.3g} to {values.max():.3g} (median {values.median():.3g})"
