"""The frames of a Toeplitz diagnosis: statistics, windows, offsets, diagonal, locality, nulls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.estimators.toeplitz_shells import SnapshotShells
from spectralshell.estimators.toeplitz_statistics import (
    ALTERNATIVES,
    CONFIDENCE,
    ShellSummary,
    jackknife,
    mean_known,
    null_columns,
    shares,
)
from spectralshell.shells import ShellPartition, offset_kernel, toeplitz_residual
from spectralshell.shells.coupling import CouplingRule
from spectralshell.shells.diagonal_scaling import DIAGONAL_ROWS, scaling_frame
from spectralshell.shells.measure import join_statuses
from spectralshell.shells.toeplitz_matrix import ShellWindow, sliding_windows

Floats = NDArray[np.float64]

_APART = "modes of a batch differ between tau: no permutation p-value"
_SLOPES = ("coupling_slope", "signed_slope")
Interval = tuple[Floats, Floats]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The mean couplings of some snapshots, with intervals over batches and nulls.

    Parameters
    ----------
    snapshots : sequence of SnapshotShells
        At least one, all with the same shells and rule.
    n_null : int
        Permutations.
    window_shells : int
        Shells per window.
    """

    snapshots: Sequence[SnapshotShells]
    n_null: int
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
        """The mean over snapshots, one draw each; NaN where they cannot be permuted together.

        Snapshots of one batch and name share their permutations: their couplings are nearly the
        same, so that permuted apart they would average out, and seem more regular than noise is.
        """
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
                "status": np.where(usable, "ok", f"fewer than {self.rule.min_modes} modes"),
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
        phrases = [phrase for s in self.snapshots for phrase in s.couplings.status.split("; ")]
        n_usable = int((self.counts > 0).sum())
        if n_usable == 0:
            phrases.append(f"no shell with {self.rule.min_modes} modes")
        elif n_usable == 1:
            phrases.append("one usable shell: residual trivially 0")
        elif n_usable <= self.window_shells:
            phrases.append("no more usable shells than a window has")
        if self.observed.is_zero():
            phrases.append("zero coupling")
        if self._intervals is None:
            phrases.append("one batch: no interval over batches")
        if not self._permute_together():
            phrases.append(_APART)
        if len({s.couplings.tau for s in self.snapshots}) > 1:
            phrases.append("mean over several tau: the largest couplings weigh most")
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
            sizes.setdefault(snapshot.source, set()).add(snapshot.n_permuted(window))
        return all(len(found) == 1 for found in sizes.values())

    def _moves(self, window: ShellWindow) -> bool:
        inner = self.observed.coupling[window.shells, window.shells]
        return bool((np.nan_to_num(inner) != 0.0).any())

    def _window_status(self, window: ShellWindow) -> str:
        if (self.counts[window.shells] > 0).sum() < 2:
            return "fewer than two shells"
        return "ok" if self._permute_together(window) else _APART

    @cached_property
    def _nulls(self) -> dict[str, ShellSummary]:
        return {"permutation": self.permuted, "random": self.random}

    @cached_property
    def _null_statistics(self) -> dict[str, dict[str, Floats]]:
        return {kind: summary.statistics() for kind, summary in self._nulls.items()}

    @cached_property
    def _intervals(self) -> dict[str, Interval] | None:
        return jackknife([s.source for s in self.snapshots], self._evaluate)

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
