"""Frames of what was found, and of how networks and architectures differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from studies.residual.design import Design, Folders
from studies.residual.pieces import cell_path, step_path
from studies.residual.training import read_record

PAIR = ["activation", "seed", "time", "residual"]
CELL = ["architecture", *PAIR]
_DIGITS = 5


def statistics_frame(design: Design, folders: Folders) -> pd.DataFrame:
    """Return one row for each cell and statistic.

    Columns: those of `CELL`; ``statistic``, ``value``, ``lower``, ``upper`` (jackknife over
    batches); ``permuted``, ``permuted_low``, ``permuted_high`` (median and 95 % of the
    permutations); ``p_low``, ``p_high`` (of a value as small, or as large, by permutation);
    ``draw_0``, ``draw_1``, … (each random direction). Rounded, so that what is derived from the
    frame and from its file agree.
    """
    rows = []
    for cell, found in _cells(design, folders):
        for name, entry in found["statistics"].items():
            permuted = entry.get("permuted", [np.nan] * 3)
            rows.append(
                {
                    **cell,
                    "statistic": name,
                    **{key: entry[key] for key in ("value", "lower", "upper")},
                    "permuted": permuted[1],
                    "permuted_low": permuted[0],
                    "permuted_high": permuted[2],
                    "p_low": entry.get("p_low", np.nan),
                    "p_high": entry.get("p_high", np.nan),
                    **{f"draw_{k}": value for k, value in enumerate(entry["random"])},
                }
            )
    return _rounded(pd.DataFrame(rows))


def part_frame(design: Design, folders: Folders, part: str) -> pd.DataFrame:
    """Return the ``"windows"`` or ``"shells"`` of all cells as one frame."""
    rows = [{**cell, **row} for cell, found in _cells(design, folders) for row in found[part]]
    return _rounded(pd.DataFrame(rows))


def coupling_matrix(folders: Folders, network: Any, when: str, residual: str) -> np.ndarray:
    """Return K of a cell, normalised."""
    found = json.loads(cell_path(folders, network, when, residual).read_text())
    return np.array(found["coupling"], dtype=float)


def step_frame(design: Design, folders: Folders) -> pd.DataFrame:
    """Return the statistics with steps of several sizes, one row for each state and step."""
    rows = []
    for network, when in design.compared_steps():
        path = step_path(folders, network, when)
        if path.exists():
            labels = {"network": f"{network.architecture}-{network.activation}", "time": when}
            rows += [labels | row for row in json.loads(path.read_text())]
    return _rounded(pd.DataFrame(rows))


def training_frame(design: Design, folders: Folders) -> pd.DataFrame:
    """Return one row for each network: what training took and reached."""
    rows = []
    for network in design.networks:
        record = read_record(folders.networks, network)
        if record is None:
            continue
        row = {
            "network": network.name,
            "parameters": record["n_parameters"],
            "steps": record["steps"],
        }
        for when in design.training.times:
            state = record["states"].get(when)
            row[f"{when}: τ"] = _shown(state["tau"]) if state else "not reached"
            row[f"{when}: training loss"] = _shown(state["loss"]) if state else "not reached"
        rows.append(row)
    return pd.DataFrame(rows)


def read_statistics(path: Path) -> pd.DataFrame:
    """Read what `statistics_frame` gave and ``to_csv`` wrote."""
    return pd.read_csv(path)


def draw_columns(frame: pd.DataFrame) -> list[str]:
    """Return the names of the columns with random directions."""
    return [name for name in frame.columns if name.startswith("draw_")]


def with_excess(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the statistics ``excess`` and ``excess_centre``.

    ln of the Toeplitz residual of all shells, or of the central window, over the median of its
    permutations: what is left when the number of shells and modes and the tails of the entries are
    taken off.
    """
    parts = [frame]
    for name, source in (("excess", "toeplitz"), ("excess_centre", "toeplitz_centre")):
        part = frame[frame["statistic"] == source].copy()
        part["statistic"] = name
        columns = ["value", *draw_columns(frame)]
        part[columns] = np.log(part[columns].div(part["permuted"], axis=0))
        part[["lower", "upper", "permuted_low", "permuted_high", "p_low", "p_high"]] = np.nan
        part["permuted"] = 0.0
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def differences(frame: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Return residual minus plain for each pair of networks with the same seed.

    Indexed by `PAIR`; columns: ``value``, ``permuted`` and the random directions. Networks without
    a partner have no row.
    """
    chosen = frame[frame["statistic"] == statistic]
    columns = ["value", "permuted", *draw_columns(frame)]
    residual, plain = (
        chosen[chosen["architecture"] == kind].set_index(PAIR)[columns]
        for kind in ("residual", "plain")
    )
    return (residual - plain.reindex(residual.index)).dropna(subset="value")


def overall(pairs: pd.Series) -> tuple[float, float, float]:
    """Return the mean of differences and its interval; a seed is one observation.

    Networks of one seed share initial weights and the order of the data, whatever their
    activation.
    """
    return mean_interval(pairs.groupby(level="seed").mean())


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return a mean with Student's interval; infinite for a single value."""
    known = np.asarray([v for v in values if np.isfinite(v)], dtype=float)
    if not known.size:
        return np.nan, np.nan, np.nan
    mean = float(known.mean())
    if known.size < 2:
        return mean, -np.inf, np.inf
    half = stats.t.ppf(0.5 + confidence / 2, known.size - 1) * stats.sem(known)
    return mean, float(mean - half), float(mean + half)


def interval_text(mean: float, lower: float, upper: float) -> str:
    """Return ``mean [lower, upper]``."""
    if not np.isfinite(mean):
        return ""
    if not (np.isfinite(lower) and np.isfinite(upper)):
        return _shown(mean)
    return f"{_shown(mean)} [{_shown(lower)}, {_shown(upper)}]"


def _cells(design: Design, folders: Folders) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    for network, when, residual in design.cells():
        path = cell_path(folders, network, when, residual)
        if path.exists():
            labels = (network.architecture, network.activation, network.seed, when, residual)
            yield dict(zip(CELL, labels, strict=True)), json.loads(path.read_text())


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = frame.select_dtypes(float).columns
    frame[numbers] = frame[numbers].map(lambda x: float(f"{x:.{_DIGITS}g}"))
    return frame


def _shown(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3g}"
