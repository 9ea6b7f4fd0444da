"""Data of a tail fit: from labelled rows to curves, shells, replicates and weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from spectralshell.estimators.tail.reading import RowLabels, ShellLayout
from spectralshell.estimators.tail.solve import ShellGrid, shell_grid

# Energies below this part of a row's total are what float64 subtraction leaves over.
ROUNDING = 1e-13

# Energies below it have lost digits to underflow.
TINY = float(np.finfo(float).tiny)

# Variances below this part of the median are zero by accident: identical or single batches.
SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class BatchedEnergies:
    """Energies of curves (increasing tau, of each name in turn) by batch and shell."""

    taus: np.ndarray  # (n_taus,), one for each curve
    energies: np.ndarray  # (n_taus, n_batches, n_shells), zero where a batch is missing
    present: np.ndarray  # (n_taus, n_batches), which batches there are
    totals: np.ndarray  # (n_taus,), mean row total with ``null``
    floors: np.ndarray | float = 0.0  # (n_taus,), highest resolution floor among a curve's rows
    largest: np.ndarray | float = np.inf  # (n_taus,), lowest λ_max among a curve's rows
    names: np.ndarray | None = None  # (n_taus,), None where rows have no name
    units: np.ndarray | None = None  # (n_batches,), codes of the batches

    @property
    def n_batches(self) -> int:
        """Number of distinct batches."""
        return self.energies.shape[1]

    def count_missing(self) -> tuple[int, int]:
        """Return how many (tau, batch) are missing, and of how many; a name has its own batches."""
        names = np.zeros(len(self.taus)) if self.names is None else self.names
        n_missing = n_pairs = 0
        for name in set(names):
            present = self.present[names == name]
            n_units = int(present.any(axis=0).sum())
            n_pairs += len(present) * n_units
            n_missing += len(present) * n_units - int(present.sum())
        return n_missing, n_pairs

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


def collect(values: np.ndarray, labels: RowLabels, layout: ShellLayout) -> BatchedEnergies:
    """Sort rows into (name and tau, batch, shell); rows of one curve and batch are averaged."""
    # Sums round by the order of their terms, so rows and batches are taken in the order of what
    # they hold: that of the rows in X, and names of batches, do not change a bit.
    values = np.ascontiguousarray(values)
    by_value = np.lexsort(values.T)
    values, labels = values[by_value], labels.take(by_value)
    curves, which = labels.curves()
    shape = (len(curves), int(labels.batches.max()) + 1)
    shells = layout.shells_of(values)
    energies = np.zeros((*shape, shells.shape[1]))
    counts = np.zeros(shape)
    np.add.at(energies, (which, labels.batches), shells)
    np.add.at(counts, (which, labels.batches), 1.0)
    energies /= np.maximum(counts, 1.0)[..., None]
    totals = np.bincount(which, weights=values.sum(axis=1)) / np.bincount(which)
    floors = np.zeros(len(curves))
    np.maximum.at(floors, which, labels.floors)
    largest = np.full(len(curves), np.inf)
    np.minimum.at(largest, which, labels.largest)
    by_energy = np.lexsort([*counts, *energies.transpose(0, 2, 1).reshape(-1, shape[1])])
    by_energy = by_energy[counts[:, by_energy].any(axis=0)]
    first = labels.take(curves)
    return BatchedEnergies(
        taus=first.taus,
        energies=energies[:, by_energy],
        present=counts[:, by_energy] > 0,
        totals=totals,
        floors=floors,
        largest=largest,
        names=first.names,
        units=by_energy,
    )


def choose_window(
    window: tuple[float, float] | None, data: BatchedEnergies, layout: ShellLayout
) -> tuple[float, float]:
    """Return the window, by default the resolved shells from the peak of the density upwards.

    (NaN, NaN) means that no shell is left.
    """
    if window is not None:
        return window
    usable = usable_points(data, layout, (layout.edges[0], layout.edges[-1]))
    shells = np.asarray(usable.any(axis=0))
    if not shells.any():
        return np.nan, np.nan
    mean = data.replicates()[0][0]
    log_density = np.log(np.where(usable, mean, 1.0) / layout.widths)
    # ln density is averaged, so every tau has the same say.
    level = np.where(usable, log_density, 0.0).sum(axis=0) / np.maximum(usable.sum(axis=0), 1)
    # Shells in which some tau has run out of energy lie beyond the peak, not at it.
    everywhere = usable.all(axis=0)
    common = everywhere if everywhere.any() else shells
    first = int(np.argmax(np.where(common, level, -np.inf)))
    last = first + _end_of_tail(shells[first:])
    return float(layout.edges[first]), float(layout.edges[last])


def _end_of_tail(shells: np.ndarray) -> int:
    """Return how many shells the tail has: up to an empty one, unless more lie beyond it.

    A hole near the peak leaves most of the tail above it, the gap below lone eigenvalues does not.
    """
    end = 0
    for start in np.flatnonzero(shells & ~np.append(False, shells[:-1])).tolist():
        if end and shells[start:].sum() <= start:
            break
        rest = np.flatnonzero(~shells[start:])
        end = start + int(rest[0]) if rest.size else len(shells)
    return end


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
        units=None if data.units is None else data.units[batches],
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
    """Return which (tau, shell) may be fitted: whole, resolved, full, in the window, not empty."""
    means = data.replicates()[0][0]
    if np.isnan(window[0]):
        return np.zeros(means.shape, dtype=bool)
    resolved = layout.resolved_shells(np.broadcast_to(data.floors, len(means)))
    full = layout.full_shells(np.broadcast_to(data.largest, len(means)))
    return layout.whole_shells(window) & resolved & full & (means > ROUNDING * data.totals[:, None])


def count_holes(usable: np.ndarray) -> int:
    """Return how many shells are empty at all taus between shells that are not."""
    shells = np.flatnonzero(usable.any(axis=0))
    return int(shells[-1] - shells[0] + 1 - len(shells)) if shells.size else 0


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
