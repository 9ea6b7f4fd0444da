"""Wide frames however they are carried: labels in the index or in columns, pandas or Arrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import interchange

from spectralshell.shells.partition import NULL, edges_from_names

TAU, BATCH, NAME = "tau", "batch", "name"
LAMBDA_MAX, FLOOR = "lambda_max", "resolution_floor"
LABELS = (TAU, BATCH, NAME, LAMBDA_MAX, FLOOR)

# Names that readers of CSV and reset_index give to an index without one.
_WRITTEN_INDEX = ("Unnamed:", "level_", "index", "__index_level_")


@dataclass(frozen=True)
class ShellTable:
    """A table taken apart: energies for each row, and the labels that came with it."""

    energies: Any  # frame of energies alone, index as it came; or the array as it came
    labels: dict[str, np.ndarray]  # those of LABELS that the table has
    named: bool  # whether its columns name shells

    def label(self, key: str) -> np.ndarray | None:
        """Return the values of one label, None where the table has none."""
        return self.labels.get(key)

    def by_label(self) -> pd.DataFrame:
        """Return the energies of a table that has labels, with these as its index."""
        frame: pd.DataFrame = self.energies.copy(deep=False)
        kept = {label: self.labels[label] for label in LABELS if label in self.labels}
        frame.index = pd.MultiIndex.from_arrays(list(kept.values()), names=list(kept))
        return frame

    @property
    def edges(self) -> np.ndarray:
        """Shell edges that the columns name."""
        return edges_from_names(list(self.energies.columns))

    @property
    def has_null(self) -> bool:
        """Whether the first column is the energy in no shell."""
        return self.named and self.energies.columns[0] == NULL


def open_table(X: Any) -> ShellTable:
    """Take labels and energies apart; what has no columns stays as it is.

    A table whose labels or columns can be read in two ways, or not at all, is refused.
    """
    frame = as_frame(X)
    if not isinstance(frame, pd.DataFrame):
        return ShellTable(frame, {}, named=False)
    _refuse_turned(frame)
    levels = [level for level in frame.index.names if level is not None]
    columns = [str(column) for column in frame.columns]
    for label in LABELS:
        if levels.count(label) + columns.count(label) > 1:
            raise ValueError(
                f"X has the label {label!r} more than once, in its columns {columns[:4]} or its "
                f"index {levels}; drop all but one."
            )
    named = any(map(_is_shell_column, columns))
    labels = {label: frame[label].to_numpy() for label in LABELS if label in columns}
    labels |= {x: frame.index.get_level_values(x).to_numpy() for x in LABELS if x in levels}
    for label in (LAMBDA_MAX, FLOOR):  # as frames had them before they were levels
        if label not in labels and label in frame.attrs:
            labels[label] = np.full(len(frame), frame.attrs[label])
    for label in set(labels) & {LAMBDA_MAX, FLOOR}:
        labels[label] = _check_rates(label, labels[label])
    if BATCH in labels:
        _refuse_averaged(labels[BATCH])
    energies = frame.drop(columns=[label for label in LABELS if label in columns])
    if named or labels:
        _refuse_foreign_levels(frame)
    if named:
        _refuse_foreign_columns(energies)
        energies = _as_numbers(energies)
    return ShellTable(energies, labels, named)


def as_frame(X: Any) -> Any:
    """Return a pandas frame of anything with named columns, and anything else as it is."""
    if isinstance(X, pd.DataFrame):
        return X
    if isinstance(X, np.ndarray):
        return X if X.dtype.names is None else pd.DataFrame(X)  # records have named columns
    if isinstance(X, dict) and not hasattr(X, "shape"):  # as some sparse matrices are
        raise TypeError("X is a dict, expected a table; pass pandas.DataFrame(X).")
    if hasattr(X, "collect") and hasattr(X, "collect_schema"):
        raise TypeError(f"X is a {type(X).__name__} that has not been computed; pass X.collect().")
    if hasattr(X, "__arrow_c_stream__") and hasattr(X, "columns"):
        return pa.table(X).to_pandas()
    if hasattr(X, "__dataframe__"):
        return interchange.from_dataframe(X).to_pandas()
    return X


def _is_shell_column(column: Any) -> bool:
    return isinstance(column, str) and (column == NULL or column.startswith("shell["))


def skipped_rows(X: Any) -> np.ndarray | None:
    """Return which rows of a shell frame are of snapshots that were skipped, None if none is."""
    frame = as_frame(X)
    if not isinstance(frame, pd.DataFrame):
        return None
    shells = [column for column in frame.columns if _is_shell_column(column)]
    if not shells or frame.columns.nlevels > 1:
        return None
    skipped = frame[shells].isna().all(axis=1).to_numpy()
    return skipped if skipped.any() else None


def measured_rows(X: Any) -> Any:
    """Return X without the rows of snapshots that were skipped."""
    skipped = skipped_rows(X)
    return X if skipped is None else as_frame(X)[~skipped]


def _refuse_turned(frame: pd.DataFrame) -> None:
    """Raise if shells run along the rows, or columns have several levels."""
    if any(map(_is_shell_column, frame.index.get_level_values(-1))):
        raise ValueError(
            "X has shells along its rows, expected one row per snapshot and one column per shell; "
            "pass X.T, or transform(X) of the ShellEnergyEstimator."
        )
    if frame.columns.nlevels > 1:
        raise ValueError(
            f"X has columns of {frame.columns.nlevels} levels, expected one level with null and "
            "shell[lo,hi); pass the frame of ShellEnergyEstimator.transform, or droplevel."
        )


def _refuse_foreign_levels(frame: pd.DataFrame) -> None:
    """Raise if an index level that is not known sets rows apart: they would be pooled."""
    for position, level in enumerate(frame.index.names):
        values = frame.index.get_level_values(position)
        if level in LABELS or not 1 < values.nunique(dropna=False) < len(frame):
            continue
        if level is None and frame.index.nlevels == 1:  # row numbers after some shuffling
            continue
        raise ValueError(
            f"X has the index level {level!r}, which is no label of a snapshot: tau, batch, name, "
            "lambda_max and resolution_floor are; call it name if it tells runs apart "
            "(X.index.set_names), or drop it with X.droplevel."
        )


def _refuse_foreign_columns(energies: pd.DataFrame) -> None:
    foreign = [column for column in energies.columns if not _is_shell_column(column)]
    if not foreign:
        return
    if str(foreign[0]).startswith(_WRITTEN_INDEX):
        remedy = "it is an index that was written as a column: drop it, or read with index_col"
    else:
        remedy = "drop it; runs that it tells apart go in a column name"
    raise ValueError(
        f"X has the column {foreign[0]!r}, which is neither a shell nor a label; feature names are "
        f"null and shell[lo,hi), labels {', '.join(LABELS)}; {remedy}."
    )


def _as_numbers(energies: pd.DataFrame) -> pd.DataFrame:
    """Return energies as float64; text that is no number is named by its column."""
    numbers = {}
    for position, column in enumerate(energies.columns):
        values = energies.iloc[:, position]
        try:
            if values.dtype.kind == "c":
                raise TypeError("complex numbers")
            numbers[position] = values.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {column!r} of X holds what is no number ({error}); energies are numbers."
            ) from error
    read = pd.DataFrame(numbers, index=energies.index)
    read.columns, read.attrs = energies.columns, dict(energies.attrs)
    return read


def _refuse_averaged(batches: np.ndarray) -> None:
    """Raise for batches with a decimal point: labels are whole numbers or text, means are not."""
    if batches.dtype.kind == "f" and not np.isnan(batches).any():
        raise ValueError(
            f"X has batch={float(batches[0])!r}, a number with a decimal point, as averages over "
            "batches leave it; pass the frame before it was averaged, or X.astype({'batch': int}) "
            "if these are labels."
        )


def _check_rates(label: str, values: np.ndarray) -> np.ndarray:
    """Return the floors or largest eigenvalues of rows, each a number that is not negative."""
    try:
        rates = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        rates = np.full(len(values), np.nan)
    wrong = np.flatnonzero(~(rates >= 0.0) | np.isinf(rates))
    if wrong.size:
        raise ValueError(
            f"X has {label}={values[wrong[0]]} in row {wrong[0]}, expected a number not below 0; "
            "put together only frames that have it."
        )
    return rates
