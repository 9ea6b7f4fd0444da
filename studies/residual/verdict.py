"""What the tables say about the paper's claims, in words that follow from the numbers.

The paper (section 7 of "When Does Learning Renormalize?") makes three claims: shells interact
weakly; mixing within shells is strong compared to transport between them; in residual networks the
coupling is nearly Toeplitz, and in plain ones it is not. Each is split into statements with one
number, an interval, and the same number under the nulls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from studies.residual.results import (
    differences,
    interval_text,
    mean_interval,
    overall,
    with_distance_to_one,
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
    null_satisfies : bool
        Whether a null meets the statement too, by the same rule.
    """

    claim: int
    statement: str
    verdict: str
    measured: str
    null: str
    null_satisfies: bool


def findings(frame: pd.DataFrame) -> list[Finding]:
    """Return all statements with their verdicts, from the frame of statistics."""
    frame = with_distance_to_one(frame)
    return [
        _small(
            frame, 1, "transfer",
            "the energy that changes shells is below a tenth of the dissipation",
        ),
        _small(
            frame, 1, "far_share",
            "shells that are not neighbours carry below a tenth of the transfer",
        ),
        _above_one(frame, 2, "ratio", "couplings within shells exceed those between shells"),
        _beyond_nulls(
            frame, 2, "ratio", "p_high", +1,
            "couplings within shells exceed those between shells by more than with permuted "
            "entries and along any random direction",
        ),
        _small(
            frame[frame["architecture"] == "residual"], 3, "toeplitz_centre",
            "in residual networks the central window is nearly Toeplitz, its residual below 0.1",
        ),
        _beyond_nulls(
            frame[frame["architecture"] == "residual"], 3, "toeplitz_centre", "p_low", -1,
            "in residual networks the central window is closer to Toeplitz than with permuted "
            "entries and along any random direction",
        ),
        _contrast(
            frame, 3, "toeplitz_centre", -1,
            "the Toeplitz residual of the central window is smaller in residual networks",
        ),
        _contrast(
            frame, 3, "toeplitz", -1,
            "the Toeplitz residual of all shells is smaller in residual networks",
        ),
        _contrast(
            frame, 3, "toeplitz_raw", -1,
            "the Toeplitz residual of raw couplings, as in the paper, is smaller in residual "
            "networks",
        ),
        _positive(
            frame[frame["architecture"] == "residual"], 3, "edge_minus_centre",
            "in residual networks the Toeplitz residual falls from the upper edge to the centre",
        ),
        _contrast(
            frame, 3, "edge_minus_centre", +1,
            "the Toeplitz residual falls by more from the upper edge to the centre in residual "
            "networks than in plain ones",
        ),
        _contrast(
            frame, 3, "slope_off", -1,
            "the slope of the diagonal is closer to 1 in residual networks",
        ),
        _contrast(
            frame, 3, "r2", +1, "the diagonal scatters less about its power law (higher R²) in "
            "residual networks",
        ),
        _near_one(
            frame[frame["architecture"] == "residual"], 3, "slope",
            "the diagonal of residual networks has slope 1 within 0.1",
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
            "nulls satisfy it too": ["yes" if one.null_satisfies else "no" for one in found],
        }
    )


def _contrast(frame: pd.DataFrame, claim: int, name: str, sign: int, statement: str) -> Finding:
    """Judge a difference between residual and plain networks of the same seed."""
    found = overall(differences(frame, name))
    null = overall(differences(frame, name, "random"))
    # The couplings of ReLU networks depend on the size of the step.
    smooth = overall(differences(frame[frame["activation"] == "gelu"], name))
    by_case = differences(frame, name).groupby(["activation", "time", "residual"])["difference"]
    agree = sum(_sided(mean_interval(values), sign) == HOLDS for _, values in by_case)
    against = sum(_sided(mean_interval(values), sign) == FAILS for _, values in by_case)
    return Finding(
        claim,
        statement,
        _sided(found, sign),
        f"residual − plain: {interval_text(*found)}; GELU networks: {interval_text(*smooth)}; of "
        f"{len(by_case)} settings alone, {agree} agree and {against} disagree",
        f"random directions: {interval_text(*null)}",
        _sided(null, sign) == HOLDS,
    )


def _positive(frame: pd.DataFrame, claim: int, name: str, statement: str) -> Finding:
    chosen = frame[frame["statistic"] == name]
    by_network = chosen.groupby(["activation", "seed"])[["value", "random", "permuted"]].mean()
    found, random, permuted = (mean_interval(by_network[c]) for c in by_network)
    return Finding(
        claim,
        statement,
        _sided(found, +1),
        f"edge − centre: {interval_text(*found)}",
        f"random directions: {interval_text(*random)}; permutations: {interval_text(*permuted)}",
        HOLDS in (_sided(random, +1), _sided(permuted, +1)),
    )


def _small(frame: pd.DataFrame, claim: int, name: str, statement: str) -> Finding:
    groups = _by_group(frame, name)
    return _counting(groups, groups < SUBLEADING, claim, statement)


def _above_one(frame: pd.DataFrame, claim: int, name: str, statement: str) -> Finding:
    groups = _by_group(frame, name)
    return _counting(groups, groups > 1.0, claim, statement)


def _near_one(frame: pd.DataFrame, claim: int, name: str, statement: str) -> Finding:
    groups = _by_group(frame, name)
    return _counting(groups, (groups - 1.0).abs() <= SUBLEADING, claim, statement)


def _counting(groups: pd.DataFrame, met: pd.DataFrame, claim: int, statement: str) -> Finding:
    """Judge by how many settings meet a condition; ``met`` has the columns of ``groups``."""
    nulls = {"random": "random directions", "permuted": "permutations"}
    known = {c: label for c, label in nulls.items() if groups[c].notna().all()}
    return Finding(
        claim,
        statement,
        _counted(int(met["value"].sum()), len(groups)),
        f"{met['value'].sum()} of {len(groups)} settings; {_range(groups['value'])}",
        "; ".join(f"{label}: {met[c].sum()}, {_range(groups[c])}" for c, label in known.items()),
        any(bool(met[c].all()) for c in known),
    )


def _beyond_nulls(
    frame: pd.DataFrame, claim: int, name: str, p_value: str, sign: int, statement: str
) -> Finding:
    cells = frame[frame["statistic"] == name]
    beyond = cells[p_value] <= SIGNIFICANT
    if sign > 0:
        outside = cells["value"] > cells["random_high"]
    else:
        outside = cells["value"] < cells["random_low"]
    both = int((beyond & outside).sum())
    return Finding(
        claim,
        statement,
        _counted(both, len(cells)),
        f"{both} of {len(cells)} cells: {beyond.sum()} beyond permutations (p ≤ {SIGNIFICANT}), "
        f"{outside.sum()} beyond all random directions",
        f"medians: measured {cells['value'].median():.3g}, random directions "
        f"{cells['random'].median():.3g}, permutations {cells['permuted'].median():.3g}",
        False,
    )


def _by_group(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return means over the seeds of each setting."""
    chosen = frame[frame["statistic"] == name]
    return chosen.groupby(_GROUP, sort=False)[["value", "random", "permuted"]].mean()


def _sided(interval: tuple[float, float, float], sign: int) -> str:
    _, lower, upper = interval
    if not (np.isfinite(lower) and np.isfinite(upper)) or lower <= 0.0 <= upper:
        return OPEN
    return HOLDS if (lower > 0.0) == (sign > 0) else FAILS


def _counted(count: int, of: int) -> str:
    if count == of:
        return HOLDS
    return FAILS if count <= of / 10 else PARTLY


def _range(values: pd.Series) -> str:
    return f"{values.min():.3g} to {values.max():.3g} (median {values.median():.3g})"
