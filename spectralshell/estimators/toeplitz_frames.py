"""Frames of a Toeplitz diagnosis: statistics, windows, offsets, diagonal, locality, nulls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.estimators.intervals import jackknife_t
from spectralshell.estimators.placement import PlacedShells, place_shells
from spectralshell.measurements.couplings import ModeCouplings
from spectralshell.shells import (
    ShellPartition,
    SoftShells,
    SpectralMeasure,
    intra_inter_ratio,
    offset_kernel,
    permutation_p_value,
    toeplitz_residual,
)
from spectralshell.shells.coupling import (
    CouplingRule,
    PairEntries,
    ShellModes,
    assign_modes,
    couple_shells,
    permuted_matrix,
)
from spectralshell.shells.coupling_statistics import (
    DIAGONAL_ROWS,
    ShellWindow,
    fit_line,
    log_sizes,
    scaling_frame,
    sliding_windows,
)
from spectralshell.shells.flux import PairTerms
from spectralshell.statuses import (
    FEWER_THAN_TWO_SHELLS,
    MODES_DIFFER,
    OK,
    ONE_BATCH,
    ONE_USABLE_SHELL,
    ONE_WINDOW,
    SEVERAL_TAUS,
    ZERO_COUPLING,
    few_modes,
    join_statuses,
    no_usable_shell,
)

Floats = NDArray[np.float64]

CONFIDENCE = 0.95

NULL_BAND = (0.05, 0.95)
"""Quantiles of the null that frames and displays show as its band."""

ALTERNATIVES = {
    "toeplitz_residual": "less",
    "coupling_slope": "two-sided",
    "coupling_r2": "greater",
    "signed_slope": "two-sided",
    "signed_r2": "greater",
    "intra_inter_ratio": "greater",
    "adjacent_share": "greater",
}
"""The statistics, and on which side of a null the papers' claims put them."""

_TIE = 1e-9

_MARGIN = 3.0
"""Of the rounding error of a coupling between modes, in its root mean square."""

_RESIDUALS = ("toeplitz_residual", "windows")

# Positive and skewed, so their intervals are made in logarithms.
_LOGARITHMIC = (*_RESIDUALS, "intra_inter_ratio", "diagonal", "kernel")

_SHARES = ("coupling_r2", "signed_r2", "adjacent_share", "shares")

# Streams of the generator, so that no null depends on which others are drawn.
_WHOLE, _WINDOW, _FLUX = range(3)

_SLOPES = ("coupling_slope", "signed_slope")

Interval = tuple[Floats, Floats]


@dataclass(frozen=True, eq=False)
class ShellSummary:
    """Couplings and fluxes between shells: what may be averaged over snapshots."""

    coupling: Floats  # K_αβ, shape (..., n_shells, n_shells), NaN in masked shells
    signed_mean: Floats  # mean of the normalised V_uu of each shell, (..., n_shells)
    log_lambda: Floats  # mean ln λ of its modes, (n_shells,)
    flux: Floats  # Σ |F_αβ| by distance |α − β|, (..., n_shells)

    @classmethod
    def mean(cls, summaries: Sequence[ShellSummary]) -> ShellSummary:
        """Return the mean over snapshots of what each has; NaN where none has it."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: mean_known([getattr(s, name) for s in summaries]) for name in names})

    def statistics(self) -> dict[str, Floats]:
        """Return every statistic, one number or one for each draw."""
        inner = np.diagonal(self.coupling, axis1=-2, axis2=-1)
        drift = fit_line(self.log_lambda, log_sizes(self.signed_mean))
        size = fit_line(self.log_lambda, log_sizes(inner))
        values = {
            "toeplitz_residual": toeplitz_residual(self.coupling),
            "coupling_slope": size.slope,
            "coupling_r2": size.r2,
            "signed_slope": drift.slope,
            "signed_r2": drift.r2,
            "intra_inter_ratio": intra_inter_ratio(self.coupling),
            "adjacent_share": adjacent_share(self.flux),
        }
        zero = self.is_zero()
        return {name: np.where(zero, 0.0, value) for name, value in values.items()}

    def is_zero(self) -> NDArray[np.bool_]:
        """Whether there are couplings and all of them are zero, for each draw."""
        known = ~np.isnan(self.coupling)
        zero = ~(known & (self.coupling != 0.0)).any(axis=(-2, -1))
        return np.asarray(zero & known.any(axis=(-2, -1)))


def mean_known(values: Sequence[Floats]) -> Floats:
    """Return the mean over the first axis of what is not NaN, NaN where nothing is."""
    stack = np.stack(values)
    known = ~np.isnan(stack)
    counts = known.sum(axis=0)
    sums = np.where(known, stack, 0.0).sum(axis=0)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def shares(flux: Floats) -> Floats:
    """Return sizes by distance as shares of their sum, 0 where nothing flows."""
    total = flux.sum(axis=-1, keepdims=True)
    there = np.broadcast_to(total != 0.0, flux.shape)  # unknown ones stay so
    return np.asarray(np.divide(flux, total, out=np.zeros(flux.shape), where=there))


def adjacent_share(flux: Floats) -> Floats:
    """Return the share of the flux between neighbouring shells; NaN for a single shell."""
    if flux.shape[-1] < 2:
        return np.full(flux.shape[:-1], np.nan)
    return shares(flux)[..., 1]


def null_p_value(observed: float, null: Floats, alternative: str) -> float:
    """Return (1 + #draws at least as extreme) / (1 + n_draws), NaN if there is nothing to compare.

    Extreme is small ("less"), large ("greater") or far from the median ("two-sided").
    """
    if np.isnan(observed) or np.isnan(null).all():
        return float("nan")
    if alternative == "less":
        return permutation_p_value(observed, null)
    if alternative == "greater":
        return permutation_p_value(-observed, -null)
    # The median is that of draws and observation: if these are exchangeable, so are the distances.
    # Sums in another order differ by rounding, which must not decide who is farther.
    tied = np.isclose(null, observed, rtol=_TIE, atol=0.0)
    pooled = np.append(np.where(tied, observed, null), observed)
    middle = np.nanmedian(pooled)
    with np.errstate(invalid="ignore"):
        gaps = np.where(pooled == middle, 0.0, np.abs(pooled - middle))
    return permutation_p_value(-gaps[-1], -gaps[:-1])


def null_columns(prefix: str, observed: Floats, null: Floats, alternative: str) -> dict[str, Any]:
    """Return median, band and p-values of a null, (n_draws, n_rows), as columns of a frame."""
    # Infinite draws are ordered, not interpolated between.
    lower, upper = np.quantile(null, NULL_BAND, axis=0, method="inverted_cdf")
    p = [null_p_value(value, null[:, row], alternative) for row, value in enumerate(observed)]
    return {
        f"{prefix}_median": np.median(null, axis=0),
        f"{prefix}_lower": lower,
        f"{prefix}_upper": upper,
        f"{prefix}_p": p,
    }


def jackknife(
    trajectories: Sequence[Any], evaluate: Callable[[Sequence[int]], dict[str, Floats]]
) -> dict[str, tuple[Floats, Floats]] | None:
    """Return the interval (lower, upper) of all that ``evaluate`` gives for positions of snapshots.

    Trajectories are left out as a whole; None with fewer than two.
    """
    labels = list(dict.fromkeys(trajectories))
    if len(labels) < 2:
        return None
    everything = list(range(len(trajectories)))
    left_out = [[i for i in everything if trajectories[i] != label] for label in labels]
    replicates = [evaluate(chosen) for chosen in (everything, *left_out)]
    return {
        name: _interval(name, np.stack([found[name] for found in replicates]))
        for name in replicates[0]
    }


def _interval(name: str, replicates: Floats) -> tuple[Floats, Floats]:
    logarithmic = name in _LOGARITHMIC
    usable = np.isfinite(replicates) & ((replicates > 0.0) | (not logarithmic))
    safe = np.where(usable, replicates, 1.0)
    scale = np.log(safe) if logarithmic else safe
    half, _ = jackknife_t(scale, CONFIDENCE)
    half = np.where(usable.all(axis=0), half, np.nan)
    if logarithmic:
        lower, upper = safe[0] * np.exp(-half), safe[0] * np.exp(half)
        return lower, np.minimum(upper, 1.0) if name in _RESIDUALS else upper
    lower, upper = replicates[0] - half, replicates[0] + half
    return (np.maximum(lower, 0.0), np.minimum(upper, 1.0)) if name in _SHARES else (lower, upper)


@dataclass(frozen=True, eq=False)
class SnapshotShells:
    """The couplings of one snapshot in given shells, and what they would be without structure."""

    couplings: ModeCouplings  # only its resolved modes count
    partition: ShellPartition
    rule: CouplingRule
    seed: int  # of the permutations; the trajectory's snapshots, much alike, have the same ones

    @property
    def trajectory(self) -> tuple[Any, Any]:
        """Batch and name."""
        return self.couplings.batch, self.couplings.name

    def n_permuted(self, window: ShellWindow | None = None) -> tuple[int, ...]:
        """Return how many modes have their entries permuted, for couplings and for fluxes.

        In a window there are no fluxes.
        """
        if window is not None:
            return (int(self.modes.counts[window.shells].sum()),)
        return self.modes.modes.size, self._all_modes.modes.size

    @cached_property
    def modes(self) -> ShellModes:
        """Modes of the shells with enough of them."""
        m = self.couplings
        return assign_modes(m.eigenvalues, self.partition, self.rule.min_modes, m.resolved)

    @cached_property
    def observed(self) -> ShellSummary:
        """Along the direction."""
        return self._summary(self.couplings.couplings)

    @cached_property
    def random(self) -> ShellSummary:
        """Along random directions of the same norm, one draw each."""
        return stack_summaries([self._summary(V) for V in self.couplings.random_couplings])

    def permuted(self, n_null: int, *, with_flux: bool = True) -> ShellSummary:
        """Return the couplings, and the fluxes if wanted, with the entries of V in random places.

        Fluxes permute the entries of all resolved modes and do not change the couplings.
        """
        m = self.couplings
        drawn = self._entries.permuted(n_null, self._generator(_WHOLE))
        flux = np.zeros((n_null, self.partition.n_shells))
        if with_flux:
            modes, draws = self._all_modes, self._generator(_FLUX)
            for draw in range(n_null):
                V = permuted_matrix(m.couplings, m.eigenvalues, modes, self.rule, draws)
                flux[draw] = self._flux_sizes(V)
        return ShellSummary(drawn.coupling, drawn.signed_mean, self.modes.log_lambda, flux)

    def permuted_within(self, window: ShellWindow, n_null: int) -> Floats:
        """Return the couplings of one window with its entries permuted, (n_null, W, W)."""
        generator = self._generator(_WINDOW, window.first, window.stop)
        drawn = self._entries.within(window.shells).permuted(n_null, generator).coupling
        return drawn[:, window.shells, window.shells]

    @cached_property
    def _entries(self) -> PairEntries:
        m = self.couplings
        return PairEntries.of(m.couplings, m.eigenvalues, self.modes, self.rule)

    @cached_property
    def _all_modes(self) -> ShellModes:
        return assign_modes(self.couplings.eigenvalues, self.partition, 1, self.couplings.resolved)

    def _summary(self, V: Floats) -> ShellSummary:
        m = self.couplings
        found = couple_shells(V, m.eigenvalues, self.partition, self.rule, m.resolved)
        coupling = np.where(found.coupling <= self._rounding, 0.0, found.coupling)
        signed = np.where(np.diagonal(coupling) == 0.0, 0.0, found.signed_mean)
        rows = self._all_modes.modes
        flux = self._flux_sizes(V[np.ix_(rows, rows)])
        return ShellSummary(coupling, signed, found.modes.log_lambda, flux)

    @cached_property
    def _rounding(self) -> Floats:
        """Couplings between shells that rounding explains, which are none."""
        m = self.couplings
        entry = _MARGIN * m.rate_noise / max(m.n_outputs, 1) ** 0.5
        entries = np.full(m.couplings.shape, entry)
        return couple_shells(entries, m.eigenvalues, self.partition, self.rule, m.resolved).coupling

    def _flux_sizes(self, V: Floats) -> Floats:
        """Return Σ |F_αβ| by distance between shells, from V between all resolved modes."""
        rows = self._all_modes.modes
        order = np.argsort(self.couplings.eigenvalues[rows], kind="stable")
        rates = self.couplings.eigenvalues[rows][order]
        g = self.couplings.amplitudes[rows][order]
        soft = SoftShells(self.partition)
        terms = PairTerms(rates, np.outer(g, g) * V[np.ix_(order, order)], soft)
        exchanged = np.abs(terms.pair_flux(soft.weights(rates))[1:, 1:])
        distances = range(self.partition.n_shells)
        return np.array([np.trace(exchanged, distance) for distance in distances])

    def _generator(self, *stream: int) -> np.random.Generator:
        labels = repr(self.trajectory)
        digest = hashlib.sha256(labels.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *stream])


def stack_summaries(summaries: Sequence[ShellSummary]) -> ShellSummary:
    """Return summaries of one snapshot as one with a draw each."""
    return ShellSummary(
        np.stack([s.coupling for s in summaries]),
        np.stack([s.signed_mean for s in summaries]),
        summaries[0].log_lambda,
        np.stack([s.flux for s in summaries]),
    )


def place_coupling_shells(
    measured: Sequence[ModeCouplings], *, q: float, lambda_0: float
) -> PlacedShells:
    """Place shells from the lowest resolved mode of any snapshot to the largest eigenvalue."""
    counted = [_counting_measure(couplings) for couplings in measured]
    return place_shells(counted, q=q, lambda_0=lambda_0, floor="auto")


def _counting_measure(couplings: ModeCouplings) -> SpectralMeasure:
    nodes = couplings.eigenvalues[couplings.resolved]
    return SpectralMeasure(
        nodes,
        np.ones(nodes.size),
        total=float(nodes.size),
        lambda_max=couplings.lambda_max,
        floor=couplings.floor,
        noise=couplings.noise,
    )


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The mean couplings of some snapshots, with intervals over batches and nulls."""

    snapshots: Sequence[SnapshotShells]  # at least one, all with the same shells and rule
    n_null: int  # permutations
    window_shells: int

    @property
    def partition(self) -> ShellPartition:
        """The shells."""
        return self.snapshots[0].partition

    @property
    def rule(self) -> CouplingRule:
        """How couplings are made."""
        return self.snapshots[0].rule

    @cached_property
    def observed(self) -> ShellSummary:
        """The mean over snapshots."""
        return ShellSummary.mean([s.observed for s in self.snapshots])

    @cached_property
    def permuted(self) -> ShellSummary:
        """The mean over snapshots, one draw each; NaN where they cannot be permuted together."""
        # Snapshots of a trajectory share their permutations: their couplings are nearly the same,
        # so that permuted apart they would average out, and seem more regular than noise is.
        drawn = ShellSummary.mean([s.permuted(self.n_null) for s in self.snapshots])
        if self._permute_together():
            return drawn
        unknown = {f.name: np.full_like(getattr(drawn, f.name), np.nan) for f in fields(drawn)}
        return ShellSummary(**unknown | {"log_lambda": drawn.log_lambda})

    @cached_property
    def random(self) -> ShellSummary:
        """The mean over snapshots along random directions, one draw each."""
        return ShellSummary.mean([s.random for s in self.snapshots])

    @cached_property
    def counts(self) -> Floats:
        """Mean number of modes of each usable shell, 0 where masked."""
        return np.mean([s.modes.counts for s in self.snapshots], axis=0)

    @cached_property
    def windows(self) -> list[ShellWindow]:
        """Windows from the upper spectral edge to the lower one."""
        return sliding_windows(self.counts > 0, self.window_shells)

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """One row per statistic: value, interval over batches, both nulls with p-values.

        Where nothing couples there is nothing to compare, and p-values are NaN.
        """
        values = self.observed.statistics()
        rows = []
        for name, alternative in ALTERNATIVES.items():
            value = np.atleast_1d(values[name])
            tested = np.where(self.observed.is_zero(), np.nan, value)
            lower, upper = self._interval(name)
            row = {"value": value[0], "lower": float(lower), "upper": float(upper)}
            row |= {"alternative": alternative}
            for kind, draws in self._null_statistics.items():
                found = null_columns(kind, tested, draws[name][:, None], alternative)
                row |= {column: cells[0] for column, cells in found.items()}
            rows.append(row)
        return pd.DataFrame(rows, index=pd.Index(list(ALTERNATIVES), name="statistic"))

    @property
    def null(self) -> pd.DataFrame:
        """One row per null and draw, one column per statistic."""
        parts = []
        for kind, draws in self._null_statistics.items():
            part = pd.DataFrame(draws)
            part.insert(0, "null", kind)
            part.insert(1, "draw", np.arange(len(part)))
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @property
    def coupling(self) -> pd.DataFrame:
        """K_αβ with the shells' names."""
        names = list(self.partition.names)
        return pd.DataFrame(self.observed.coupling, index=names, columns=names)

    @property
    def shells(self) -> pd.DataFrame:
        """One row per shell: what the diagonal fits are made of."""
        edges = self.partition.edges
        lower, upper = self._interval("diagonal")
        usable = self.counts > 0
        return pd.DataFrame(
            {
                "shell": self.partition.names,
                "lambda_lo": edges[:-1],
                "lambda_hi": edges[1:],
                "lambda_mean": np.exp(self.observed.log_lambda),
                "n_modes": self.counts,
                "coupling": np.diagonal(self.observed.coupling),
                "coupling_lower": lower,
                "coupling_upper": upper,
                "signed_mean": self.observed.signed_mean,
                "status": np.where(usable, OK, few_modes(self.rule.min_modes)),
            }
        )

    @property
    def kernel(self) -> pd.DataFrame:
        """Coupling by shell offset, with its spread, interval and nulls."""
        frame = offset_kernel(self.observed.coupling)
        frame["lower"], frame["upper"] = self._interval("kernel")
        tested = frame["coupling"].replace(0.0, np.nan).to_numpy()
        for kind, summary in self._nulls.items():
            draws = np.array([offset_kernel(K)["coupling"] for K in summary.coupling])
            frame = frame.assign(**null_columns(kind, tested, draws, "two-sided"))
        return frame[frame["n_pairs"] > 0].reset_index(drop=True)

    @property
    def locality(self) -> pd.DataFrame:
        """Share of the flux between shells by their distance, with its interval and nulls."""
        flux = self.observed.flux
        lower, upper = self._interval("shares")
        frame = pd.DataFrame(
            {
                "distance": np.arange(1, flux.size),
                "flux": flux[1:],
                "share": shares(flux)[1:],
                "lower": lower[1:],
                "upper": upper[1:],
            }
        )
        tested = np.where(flux.any(), frame["share"], np.nan)
        for kind, summary in self._nulls.items():
            draws = shares(summary.flux)[:, 1:]
            frame = frame.assign(**null_columns(kind, tested, draws, "two-sided"))
        return frame

    @property
    def diagonal(self) -> pd.DataFrame:
        """Slopes of ln K_αα and of the signed mean against ln λ, as `diagonal_scaling` gives."""
        mean = self.observed
        frame = scaling_frame(
            mean.log_lambda, np.diagonal(mean.coupling), mean.signed_mean, self.rule, CONFIDENCE
        )
        frame["interval"] = "least squares over shells"
        if self._intervals is not None:
            for row, name in zip(DIAGONAL_ROWS, _SLOPES, strict=True):
                frame.loc[row, ["slope_lower", "slope_upper"]] = [*map(float, self._interval(name))]
            frame["interval"] = "jackknife over batches"
        return frame

    @property
    def window_frame(self) -> pd.DataFrame:
        """Residual in each window, from the upper spectral edge to the lower one."""
        edges = self.partition.edges
        lower, upper = self._interval("windows")
        frame = pd.DataFrame(
            {
                "window": np.arange(len(self.windows)),
                "lambda_lo": [edges[w.first] for w in self.windows],
                "lambda_hi": [edges[w.stop] for w in self.windows],
                "centrality": [w.centrality for w in self.windows],
                "n_shells": [int((self.counts[w.shells] > 0).sum()) for w in self.windows],
                "residual": self._window_residuals(self.observed.coupling),
                "lower": lower,
                "upper": upper,
            }
        )
        moving = np.array([self._moves(window) for window in self.windows], dtype=bool)
        tested = np.where(moving, frame["residual"], np.nan)
        permuted = [self.permuted_window(window) for window in self.windows]
        draws = {
            "permutation": np.reshape(permuted, (len(self.windows), self.n_null)).T,
            "random": self._window_residuals(self.random.coupling).T,
        }
        for kind, values in draws.items():
            frame = frame.assign(**null_columns(kind, tested, values, "less"))
        frame["status"] = [self._window_status(window) for window in self.windows]
        return frame

    @property
    def status(self) -> str:
        """What to know about the result, ``"ok"`` if nothing."""
        phrases = [s.couplings.status for s in self.snapshots]
        n_usable = int((self.counts > 0).sum())
        if n_usable == 0:
            phrases.append(no_usable_shell(self.rule.min_modes))
        elif n_usable == 1:
            phrases.append(ONE_USABLE_SHELL)
        elif n_usable <= self.window_shells:
            phrases.append(ONE_WINDOW)
        if self.observed.is_zero():
            phrases.append(ZERO_COUPLING)
        if self._intervals is None:
            phrases.append(ONE_BATCH)
        if not self._permute_together():
            phrases.append(MODES_DIFFER)
        if len({s.couplings.tau for s in self.snapshots}) > 1:
            phrases.append(SEVERAL_TAUS)
        return join_statuses(phrases)

    def permuted_window(self, window: ShellWindow) -> Floats:
        """Return the residuals of the window under permutations of its own entries."""
        if not self._permute_together(window):
            return np.full(self.n_null, np.nan)
        drawn = [s.permuted_within(window, self.n_null) for s in self.snapshots]
        return np.asarray(toeplitz_residual(mean_known(drawn)))

    def _permute_together(self, window: ShellWindow | None = None) -> bool:
        """Tell whether snapshots that differ in tau alone have as many modes, and so one order."""
        sizes: dict[Any, set[tuple[int, ...]]] = {}
        for snapshot in self.snapshots:
            sizes.setdefault(snapshot.trajectory, set()).add(snapshot.n_permuted(window))
        return all(len(found) == 1 for found in sizes.values())

    def _moves(self, window: ShellWindow) -> bool:
        inner = self.observed.coupling[window.shells, window.shells]
        return bool((np.nan_to_num(inner) != 0.0).any())

    def _window_status(self, window: ShellWindow) -> str:
        if (self.counts[window.shells] > 0).sum() < 2:
            return FEWER_THAN_TWO_SHELLS
        return OK if self._permute_together(window) else MODES_DIFFER

    @cached_property
    def _nulls(self) -> dict[str, ShellSummary]:
        return {"permutation": self.permuted, "random": self.random}

    @cached_property
    def _null_statistics(self) -> dict[str, dict[str, Floats]]:
        return {kind: summary.statistics() for kind, summary in self._nulls.items()}

    @cached_property
    def _intervals(self) -> dict[str, Interval] | None:
        return jackknife([s.trajectory for s in self.snapshots], self._evaluate)

    def _interval(self, name: str) -> Interval:
        if self._intervals is not None:
            return self._intervals[name]
        unknown = np.full(np.shape(self._evaluated[name]), np.nan)
        return unknown, unknown

    @cached_property
    def _evaluated(self) -> dict[str, Floats]:
        return self._evaluate(range(len(self.snapshots)))

    def _evaluate(self, chosen: Sequence[int]) -> dict[str, Floats]:
        mean = ShellSummary.mean([self.snapshots[i].observed for i in chosen])
        return mean.statistics() | {
            "diagonal": np.diagonal(mean.coupling),
            "kernel": offset_kernel(mean.coupling)["coupling"].to_numpy(),
            "shares": shares(mean.flux),
            "windows": self._window_residuals(mean.coupling),
        }

    def _window_residuals(self, coupling: Floats) -> Floats:
        """Return residuals by window, shape (n_windows, ...)."""
        found = [toeplitz_residual(coupling[..., w.shells, w.shells]) for w in self.windows]
        return np.asarray(found).reshape(len(self.windows), *coupling.shape[:-2])
