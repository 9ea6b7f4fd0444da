"""Curves that displays draw, from tidy and wide shell frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import LINE_STYLES
from spectralshell.shells.carriers import (
    BATCH,
    FLOOR,
    NAME,
    TAU,
    ShellTable,
    as_frame,
    open_table,
)
from spectralshell.shells.partition import parse_shell_name

_TIDY = ("tau", "batch", "shell", "lambda_lo", "lambda_hi", "energy")
_OUTSIDE = ("null", "unresolved")


def tidy_energies(frame: Any, *, name: str = "frame") -> pd.DataFrame:
    """Return the tidy form of a tidy or a wide shell frame, with its ``attrs``; else raise."""
    frame = as_frame(frame)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"{name} must be a pandas DataFrame of shell energies, got type "
            f"{type(frame).__name__}; pass shells_, shell_frame(X) or transform(X)."
        )
    if set(_TIDY) <= set(frame.columns):
        _refuse_missing_shells(frame, name)
        return frame
    if any(str(column).startswith("shell[") for column in frame.columns):
        table = open_table(frame)
        if table.label(TAU) is not None:
            return _melt(table)
    raise ValueError(
        f"{name} must be a tidy shell frame (columns {', '.join(_TIDY)}) or a wide one (index "
        f"levels tau and batch, columns null and shell[lo,hi)), got columns "
        f"{[str(c) for c in frame.columns[:4]]} and index levels {list(frame.index.names)}; pass "
        "shells_, shell_frame(X) or transform(X) with pandas output."
    )


def _refuse_missing_shells(frame: pd.DataFrame, name: str) -> None:
    """Raise where a shell has no name: readers of CSV take ``null`` for missing."""
    missing = np.flatnonzero(frame["shell"].isna())
    if missing.size:
        raise ValueError(
            f"{name} has no shell in row {missing[0]}, expected null or shell[lo,hi); readers of "
            "CSV take the name null for missing: read_csv(..., keep_default_na=False), or "
            "frame.fillna({'shell': 'null'})."
        )


def _melt(table: ShellTable) -> pd.DataFrame:
    """Lay a wide frame out as one row per (snapshot, shell)."""
    wide = table.energies
    known = {TAU: table.label(TAU), BATCH: table.label(BATCH), NAME: table.label(NAME)}
    index = pd.DataFrame({label: values for label, values in known.items() if values is not None})
    if BATCH not in index:
        index[BATCH] = 0
    floors = table.label(FLOOR)
    parts = []
    for column in wide.columns:
        part = index.copy()
        low, high = (0.0, np.nan) if column == "null" else parse_shell_name(column)
        part["shell"], part["lambda_lo"], part["lambda_hi"] = column, low, high
        part["lambda_mid"] = np.sqrt(low * high)
        part["energy"] = wide[column].to_numpy(dtype=float)
        part["resolved"] = True if floors is None else low >= floors
        parts.append(part)
    tidy = pd.concat(parts, ignore_index=True)
    tidy.attrs = dict(wide.attrs)
    if floors is not None:
        tidy.attrs[FLOOR] = float(floors.max())
    return tidy


def resolution_floor_of(frame: pd.DataFrame) -> float | None:
    """Return the resolution floor that a frame carries, or None."""
    floor = frame.attrs.get("resolution_floor")
    return None if floor is None or not np.isfinite(floor) else float(floor)


def curve_keys(tidy: pd.DataFrame) -> list[str]:
    """Return what tells curves apart: τ, and the name where there are several."""
    if "name" in tidy and len(tidy["name"].unique()) > 1:
        return ["tau", "name"]
    return ["tau"]


def shell_curves(tidy: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Average the "energy" or "density" of each shell over batches: one row per curve and shell.

    ``value`` has beside it the extreme batches and the mean certified bounds, NaN without any.
    """
    keys = curve_keys(tidy)
    rows = tidy[~tidy["shell"].isin(_OUTSIDE)].copy()
    for column in ("energy_lower", "energy_upper"):
        if column not in rows:
            rows[column] = np.nan
    if "resolved" not in rows:
        rows["resolved"] = True
    curves = (
        rows.groupby([*keys, "lambda_lo", "lambda_hi"], sort=True, dropna=False)
        .agg(
            value=("energy", "mean"),
            batch_lower=("energy", "min"),
            batch_upper=("energy", "max"),
            bound_lower=("energy_lower", "mean"),
            bound_upper=("energy_upper", "mean"),
            n_batches=("energy", "size"),
            resolved=("resolved", "all"),
        )
        .reset_index()
    )
    middle = np.sqrt(curves["lambda_lo"] * curves["lambda_hi"])
    curves.insert(list(curves.columns).index("lambda_hi") + 1, "lambda_mid", middle)
    if quantity == "density":
        width = curves["lambda_hi"] - curves["lambda_lo"]
        values = ["value", "batch_lower", "batch_upper", "bound_lower", "bound_upper"]
        curves[values] = curves[values].div(width, axis=0)
    return curves


def split_curves(curves: pd.DataFrame) -> Iterator[tuple[float, Any, pd.DataFrame]]:
    """Yield (τ, name, rows) of every curve, by τ; the name is None where τ tells them apart."""
    keys = curve_keys(curves)
    for key, curve in curves.groupby(keys, sort=True, dropna=False):
        values: tuple[Any, ...] = key if isinstance(key, tuple) else (key,)
        yield float(values[0]), values[1] if len(keys) > 1 else None, curve


def share_outside(tidy: pd.DataFrame) -> np.ndarray:
    """Return, per curve, the share of the energy in no shell; empty where it is not known."""
    outside = tidy["shell"].isin(_OUTSIDE)
    if not outside.any():
        return np.empty(0)
    keys = [tidy[key] for key in curve_keys(tidy)]
    total = tidy["energy"].groupby(keys, dropna=False).sum()
    share = tidy["energy"].where(outside, 0.0).groupby(keys, dropna=False).sum()
    return (share[total > 0] / total[total > 0]).to_numpy()


def line_styles(curves: pd.DataFrame) -> dict[Any, Any]:
    """Return a line style for each name, nothing where τ tells the curves apart."""
    if "name" not in curve_keys(curves):
        return {}
    names = dict.fromkeys(curves["name"])
    return {name: LINE_STYLES[i % len(LINE_STYLES)] for i, name in enumerate(names)}
