"""Data of a tail fit: from a wide frame or an array to rows, shells, replicates and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from spectralshell.estimators.tail.solve import ShellGrid, shell_grid
from spectralshell.parameter_checks import check_real
from spectralshell.shells.partition import NULL, edges_from_names
from spectralshell.snapshots import Snapshot

# Edges that agree to this relative precision are the same edge.
EDGE_TOLERANCE = 1e-9

MAX_DEFAULT_SHELLS = 1000

# Energies below this part of a row's total are what float64 subtraction leaves over.
ROUNDING = 1e-13

# Energies below it have lost digits to underflow.
TINY = float(np.finfo(float).tiny)

# Variances below this part of the median are zero by accident: identical or single batches.
SMALLEST_VARIANCE = 1e-6

_TIDY = {"tau", "shell", "lambda_lo", "lambda_hi", "energy"}


@dataclass(frozen=True)
class ShellLayout:
    """What the columns of X are: shells between increasing positive edges, ``null`` before them."""

    edges: np.ndarray  # (n_shells + 1,)
    has_null: bool
    floor: float = 0.0  # resolution floor, an absolute λ; 0 where none is known
    lambda_max: float = np.inf  # largest eigenvalue

    @property
    def widths(self) -> np.ndarray:
        """Shell widths."""
        return np.diff(self.edges)

    def shells_of(self, values: np.ndarray) -> np.ndarray:
        """Return the columns of ``values`` that are shells."""
        return values[:, 1:] if self.has_null else values

    def whole_shells(self, window: tuple[float, float]) -> np.ndarray:
        """Return which shells lie in the window and above the floor, as booleans."""
        lower, upper = self.edges[:-1], self.edges[1:]
        return (
            (lower >= window[0] * (1.0 - EDGE_TOLERANCE))
            & (upper <= window[1] * (1.0 + EDGE_TOLERANCE))
            & (lower >= self.floor * (1.0 - EDGE_TOLERANCE))
        )


@dataclass(frozen=True)
class BatchedEnergies:
    """Energies by increasing tau, batch and shell."""

    taus: np.ndarray  # (n_taus,)
    energies: np.ndarray  # (n_taus, n_batches, n_shells), zero where a batch is missing
    present: np.ndarray  # (n_taus, n_batches), which batches there are
    totals: np.ndarray  # (n_taus,), mean row total with ``null``

    @property
    def n_batches(self) -> int:
        """Number of distinct batches."""
        return self.energies.shape[1]

    def replicates(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean energies (1 + n_batches, n_taus, n_shells), and how many batches each is made of.

        The full sample first, then each batch left out, if there are several. An underflow is 0.
        """
        total, count = self.energies.sum(axis=1), self.present.sum(axis=1)
        if self.n_batches == 1:
            sums, counts = total[None], count[None]
        else:
            sums = np.concatenate([total[None], total - self.energies.transpose(1, 0, 2)])
            counts = np.concatenate([count[None], count - self.present.T.astype(int)])
        # Subtraction leaves rounding where the other batches hold nothing.
        sums = np.where(sums > ROUNDING * total, sums, 0.0)
        means = sums / np.maximum(counts, 1)[..., None]
        return np.where(means >= TINY, means, 0.0), counts


@dataclass(frozen=True)
class TailProblem:
    """Data of one fit; replicate 0 is the full sample, then one batch is left out."""

    data: BatchedEnergies  # usable taus and shells only
    n_shells: np.ndarray  # usable shells of every tau of the input
    used: np.ndarray  # which taus of the input are fitted
    shells: np.ndarray  # which shells of the input are fitted
    means: np.ndarray  # mean energies of the full sample, (n_taus, n_shells)
    log_density: np.ndarray  # ln of mean energy over width, (n_replicates, n_taus, n_shells)
    weights: np.ndarray  # inverse variances, same shape; 0 leaves a point out
    grid: ShellGrid
    log_lambda: np.ndarray  # ln of the geometric midpoints, (n_shells,)

    @property
    def n_points(self) -> int:
        """Number of (tau, shell) points in the fit."""
        return int((self.weights[0] > 0).sum())

    @property
    def n_taus(self) -> int:
        """Number of fitted taus."""
        return self.means.shape[0]

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return self.data.n_batches


def refuse_other_input(X: Any) -> None:
    """Raise if X is what an earlier step takes, or has one row per shell as ``shells_`` has."""
    if isinstance(X, (list, tuple)) and any(isinstance(item, Snapshot) for item in X):
        raise TypeError(
            "X holds snapshots, expected a frame of shell energies; put a ShellEnergyEstimator "
            "before this step, as in make_pipeline(ShellEnergyEstimator(), GRSDTailFitter())."
        )
    if isinstance(X, pd.DataFrame) and set(X.columns) >= _TIDY:
        raise ValueError(
            "X is a tidy frame with one row per shell, expected one row per snapshot; pass "
            "transform(X) of the ShellEnergyEstimator, not shells_."
        )


def is_wide_frame(X: Any) -> bool:
    """Return whether X is meant as a frame of shell energies rather than as a plain table."""
    if not isinstance(X, pd.DataFrame):
        return False
    named = any(
        isinstance(column, str) and (column == NULL or column.startswith("shell["))
        for column in X.columns
    )
    return named or "tau" in X.index.names


def read_layout(X: Any, n_columns: int, edges: Any, floor: Any) -> ShellLayout:
    """Read shells from a frame's columns, or from ``edges``, or take ratio 2 for an array.

    Edges must agree with a frame's columns; floor None takes the frame's.
    """
    if is_wide_frame(X):
        found = edges_from_names(list(X.columns))
        _check_agreement(edges, found)
        default_floor = X.attrs.get("resolution_floor", 0.0)
        lambda_max = float(X.attrs.get("lambda_max", np.inf))
        has_null = X.columns[0] == NULL
    else:
        found = check_edges(edges, n_columns)
        default_floor, lambda_max, has_null = 0.0, np.inf, False
    floor = check_real("floor", default_floor if floor is None else floor, low=0.0)
    return ShellLayout(found, bool(has_null), floor, lambda_max)


def _check_agreement(edges: Any, found: np.ndarray) -> None:
    if edges is None:
        return
    given = check_edges(edges, found.size - 1)
    if not np.allclose(given, found, rtol=EDGE_TOLERANCE, atol=0.0):
        raise ValueError(
            f"edges contradict the columns of X, whose shells run from {found[0]!r} to "
            f"{found[-1]!r}; leave edges out, since a frame's columns name its shells."
        )


def check_edges(edges: Any, n_columns: int) -> np.ndarray:
    """Return the edges of consecutive shells, or raise if they are not one more than columns."""
    if edges is None:
        if n_columns > MAX_DEFAULT_SHELLS:
            raise ValueError(
                f"X has {n_columns} columns, too many for consecutive shells of ratio 2; pass "
                "edges with one more entry than columns."
            )
        return 2.0 ** np.arange(n_columns + 1)
    array = np.asarray(edges, dtype=np.float64)
    if array.ndim != 1 or array.size != n_columns + 1:
        raise ValueError(
            f"edges must have one more entry than X has columns ({n_columns}), got shape "
            f"{array.shape}; pass the lower edge of every shell and the last upper edge."
        )
    if not np.isfinite(array).all() or array[0] <= 0 or (np.diff(array) <= 0).any():
        raise ValueError(
            "edges must be finite, positive and strictly increasing; sort the shells by their "
            "lower edge, columns of X alike."
        )
    return array


def read_labels(
    X: Any, n_rows: int, tau: Any = None, batch: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tau and the code of the batch for each row, by default from a frame's index.

    Without any, tau is 0, and rows of equal tau are batches by their position.
    """
    levels = list(X.index.names) if isinstance(X, pd.DataFrame) else []
    if tau is None and "tau" in levels:
        tau = X.index.get_level_values("tau")
    if batch is None and "batch" in levels:
        batch = X.index.get_level_values("batch")
    taus = np.zeros(n_rows) if tau is None else _check_taus(tau, n_rows)
    if batch is None:
        return taus, pd.Series(taus).groupby(taus).cumcount().to_numpy()
    codes = label_codes("batch", batch, n_rows)
    names = X.index.get_level_values("name") if "name" in levels else [None] * n_rows
    # Rows of one (tau, batch) are averaged; their names tell them from a row given twice.
    repeated = pd.DataFrame({"tau": taus, "batch": codes, "name": list(names)}).duplicated()
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        raise ValueError(
            f"X has two rows with tau={taus[row]!r}, batch={list(batch)[row]!r} and "
            f"name={names[row]!r}; give every row its own, or average repeated measurements first."
        )
    return taus, codes


def _check_taus(tau: Any, n_rows: int) -> np.ndarray:
    taus = np.asarray(tau, dtype=np.float64)
    if taus.shape != (n_rows,):
        raise ValueError(
            f"tau must have one entry per row of X ({n_rows}), got shape {taus.shape}."
        )
    if not np.isfinite(taus).all():
        raise ValueError("tau holds NaN or infinity, expected finite effective times.")
    return taus


def label_codes(name: str, labels: Any, n_rows: int) -> np.ndarray:
    """Return an integer code for each hashable label; one that is missing is refused."""
    if getattr(labels, "ndim", 1) != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {np.shape(labels)}.")
    labels = list(labels)
    if len(labels) != n_rows:
        raise ValueError(f"{name} must have one entry per row of X ({n_rows}), got {len(labels)}.")
    codes = pd.factorize(_as_objects(labels))[0]
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise ValueError(
            f"{name} is missing ({labels[row]!r}) in row {row} of X; label every row, or drop it."
        )
    return codes


def _as_objects(labels: list[Any]) -> np.ndarray:
    # A list of tuples would become a two-dimensional array.
    objects = np.empty(len(labels), dtype=object)
    for position, label in enumerate(labels):
        objects[position] = label
    return objects


def collect(
    values: np.ndarray, taus: np.ndarray, codes: np.ndarray, layout: ShellLayout
) -> BatchedEnergies:
    """Sort rows into (tau, batch, shell); rows of one (tau, batch) are averaged."""
    # Sums round by the order of their terms, so rows and batches are taken in the order of what
    # they hold: that of the rows in X, and names of batches, do not change a bit.
    values = np.ascontiguousarray(values)
    by_value = np.lexsort(values.T)
    values, taus, codes = values[by_value], taus[by_value], codes[by_value]
    levels, which = np.unique(taus, return_inverse=True)
    shape = (len(levels), int(codes.max()) + 1)
    shells = layout.shells_of(values)
    energies = np.zeros((*shape, shells.shape[1]))
    counts = np.zeros(shape)
    np.add.at(energies, (which, codes), shells)
    np.add.at(counts, (which, codes), 1.0)
    energies /= np.maximum(counts, 1.0)[..., None]
    totals = np.bincount(which, weights=values.sum(axis=1)) / np.bincount(which)
    by_energy = np.lexsort([*counts, *energies.transpose(0, 2, 1).reshape(-1, shape[1])])
    return BatchedEnergies(levels, energies[:, by_energy], counts[:, by_energy] > 0, totals)


def choose_window(
    window: tuple[float, float] | None, data: BatchedEnergies, layout: ShellLayout
) -> tuple[float, float]:
    """Return the window, by default the resolved shells from the peak of the density upwards.

    (NaN, NaN) means that no shell is left.
    """
    if window is not None:
        return window
    mean = data.replicates()[0][0]
    usable = mean > ROUNDING * data.totals[:, None]
    shells = layout.whole_shells((layout.edges[0], layout.lambda_max)) & usable.any(axis=0)
    if not shells.any():
        return np.nan, np.nan
    log_density = np.log(np.where(usable, mean, 1.0) / layout.widths)
    # ln density is averaged, so every tau has the same say.
    level = np.where(usable, log_density, 0.0).sum(axis=0) / np.maximum(usable.sum(axis=0), 1)
    # Shells in which some tau has run out of energy lie beyond the peak, not at it.
    common = shells & usable.all(axis=0) if (shells & usable.all(axis=0)).any() else shells
    first = int(np.argmax(np.where(common, level, -np.inf)))
    gaps = np.flatnonzero(~shells[first:])
    last = first + int(gaps[0]) if gaps.size else len(shells)
    return float(layout.edges[first]), float(layout.edges[last])


def build_problem(
    data: BatchedEnergies,
    layout: ShellLayout,
    window: tuple[float, float],
    min_shells: int,
) -> TailProblem | None:
    """Assemble the fit, or None where no tau has ``min_shells`` usable shells."""
    usable = usable_points(data, layout, window)
    used = usable.sum(axis=1) >= min_shells
    if not used.any():
        return None
    shells = usable[used].any(axis=0)
    batches = data.present[used].any(axis=0)
    part = BatchedEnergies(
        data.taus[used],
        data.energies[np.ix_(used, batches, shells)],
        data.present[np.ix_(used, batches)],
        data.totals[used],
    )
    kept = usable[np.ix_(used, shells)]
    means, counts = part.replicates()
    full_weights = moderated_weights(part, means[0], kept)
    share = counts / counts[0]
    weights = np.where(means > 0, full_weights * share[..., None], 0.0)
    lower, upper = layout.edges[:-1][shells], layout.edges[1:][shells]
    density = np.where(weights > 0, means / (upper - lower), 1.0)
    return TailProblem(
        data=part,
        n_shells=usable.sum(axis=1),
        used=used,
        shells=shells,
        means=means[0],
        log_density=np.log(density),
        weights=weights,
        grid=shell_grid(lower, upper),
        log_lambda=0.5 * (np.log(lower) + np.log(upper)),
    )


def usable_points(
    data: BatchedEnergies, layout: ShellLayout, window: tuple[float, float]
) -> np.ndarray:
    """Return which (tau, shell) may be fitted: whole, resolved, in the window, not empty."""
    means = data.replicates()[0][0]
    if np.isnan(window[0]):
        return np.zeros(means.shape, dtype=bool)
    return layout.whole_shells(window) & (means > ROUNDING * data.totals[:, None])


def moderated_weights(data: BatchedEnergies, means: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Inverse variances of ln of the mean energy, shrunk to a common value; 0 where not usable."""
    counts = data.present.sum(axis=1)
    freedom = np.broadcast_to((counts - 1.0)[:, None], usable.shape)
    squares = (relative_deviations(data, means) ** 2).sum(axis=1)
    known = usable & (freedom > 0)
    variance = np.divide(squares, freedom, out=np.zeros(usable.shape), where=known)
    # Rounding of equal batches is no variance.
    if not known.any() or np.median(variance[known]) < ROUNDING**2:
        return usable.astype(float)
    variance = np.maximum(variance, SMALLEST_VARIANCE * np.median(variance[known]))
    # An empirical-Bayes prior from the scatter of log-variances over shells (Smyth, Stat. Appl.
    # Genet. Mol. Biol. 3, 2004, section 6.2); no more than that of a χ² gives equal weights.
    nu = freedom[known] / 2.0
    logs = np.log(variance[known]) - special.digamma(nu) + np.log(nu)
    excess = logs.var(ddof=1) - special.polygamma(1, nu).mean() if logs.size > 1 else 0.0
    if excess > 0:
        d0 = 2.0 * _inverse_trigamma(excess)
        s0 = np.exp(logs.mean() + special.digamma(d0 / 2.0) - np.log(d0 / 2.0))
        variance = (d0 * s0 + freedom * np.where(known, variance, s0)) / (d0 + freedom)
    else:
        variance = np.full(usable.shape, np.exp(logs.mean()))
    return np.where(usable, np.maximum(counts, 1)[:, None] / variance, 0.0)


def relative_deviations(data: BatchedEnergies, means: np.ndarray) -> np.ndarray:
    """Influence of each batch on ln of the mean energy: E_r / mean − 1, and 0 where missing."""
    safe = np.where(means > 0, means, 1.0)[:, None]
    usable = data.present[..., None] & (means > 0)[:, None]
    return np.where(usable, data.energies / safe - 1.0, 0.0)


def _inverse_trigamma(value: float) -> float:
    """Solve ψ'(x) = value by Newton's method on 1/ψ', which is nearly linear."""
    x = 0.5 + 1.0 / value
    for _ in range(50):
        trigamma = special.polygamma(1, x)
        step = trigamma * (1.0 - trigamma / value) / special.polygamma(2, x)
        x = x + step
        if abs(step) < 1e-8 * x:
            break
    return float(x)
