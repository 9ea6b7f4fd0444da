"""What is read off the couplings of one cell: a network, a time and a residual, all its batches.

Shell couplings and statistics are those of `ToeplitzDiagnostic`, averaged over the batches before a
statistic is taken of them; intervals are the jackknife over batches. Every statistic is taken of
the gradient flow, of the random directions, and of the gradient flow with the normalised entries
of V permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralshell.estimators.intervals import jackknife_t
from spectralshell.estimators.toeplitz_frames import (
    ShellSummary,
    SnapshotShells,
    mean_known,
    place_coupling_shells,
)
from spectralshell.shells import (
    ShellPartition,
    SoftShells,
    permutation_p_value,
    shell_balance,
    toeplitz_residual,
)
from spectralshell.shells.coupling import CouplingRule
from spectralshell.shells.coupling_statistics import ShellWindow, most_central, sliding_windows
from studies.residual.measuring import Coupled

Floats = NDArray[np.float64]

Q = 2.0
WINDOW_SHELLS = 6
N_PERMUTATIONS = 99
N_FLUX_PERMUTATIONS = 19
"""Fewer: all modes are permuted, not sums of them."""
CONFIDENCE = 0.95
SCALED, RAW = CouplingRule(), CouplingRule("raw")
"""Couplings of V / √(λ_u λ_v), the default, and of V itself."""

FROM_COUPLINGS = (
    "toeplitz", "toeplitz_raw", "ratio", "slope", "slope_off", "square_slope", "r2",
    "signed_slope", "signed_r2",
)  # fmt: skip
FROM_WINDOWS = (
    "toeplitz_centre", "toeplitz_edge", "edge_minus_centre",
    "raw_centre", "raw_edge", "raw_edge_minus_centre",
)  # fmt: skip
SHARES = ("near_share", "far_share")
FROM_BALANCE = ("transfer", "rotation")
COUNTS = ("n_shells", "n_modes")
STATISTICS = (*FROM_COUPLINGS, *FROM_WINDOWS, *SHARES, *FROM_BALANCE, *COUNTS)

LIMITS = {
    **dict.fromkeys(("toeplitz", "toeplitz_raw", "toeplitz_centre", "toeplitz_edge"), (0.0, 1.0)),
    **dict.fromkeys(("raw_centre", "raw_edge", *SHARES, "r2", "signed_r2"), (0.0, 1.0)),
    **dict.fromkeys(("ratio", *FROM_BALANCE), (0.0, np.inf)),
}
"""Where statistics end, and intervals with them."""
_LOGARITHMIC = (
    "toeplitz", "toeplitz_raw", "toeplitz_centre", "toeplitz_edge", "raw_centre", "raw_edge",
    "ratio", *FROM_BALANCE,
)  # fmt: skip
"""Positive and skewed: their intervals are made in logarithms."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The same couplings normalised and raw: of one batch, of several, or of a stack of draws."""

    scaled: ShellSummary
    raw: ShellSummary

    @classmethod
    def mean(cls, some: Sequence[Pair]) -> Pair:
        """Return the mean over batches."""
        return cls(
            ShellSummary.mean([one.scaled for one in some]),
            ShellSummary.mean([one.raw for one in some]),
        )

    def statistics(self) -> dict[str, Any]:
        """Return `FROM_COUPLINGS` and `SHARES`: a number each, or one for each draw."""
        scaled, raw = self.scaled.statistics(), self.raw.statistics()
        # Of the root mean square: a kernel that moves in proportion to itself has slope 1.
        slope = raw["coupling_slope"] / 2
        return {
            "toeplitz": scaled["toeplitz_residual"],
            "toeplitz_raw": raw["toeplitz_residual"],
            "ratio": scaled["intra_inter_ratio"],
            "slope": slope,
            "slope_off": np.abs(slope - 1.0),
            "square_slope": raw["coupling_slope"],
            "r2": raw["coupling_r2"],
            "signed_slope": raw["signed_slope"],
            "signed_r2": raw["signed_r2"],
            "near_share": scaled["adjacent_share"],
            "far_share": 1.0 - scaled["adjacent_share"],
        }

    def residuals(self, window: ShellWindow) -> tuple[Any, Any]:
        """Return the Toeplitz residuals of a window, normalised and raw."""
        inside = (..., window.shells, window.shells)
        return (
            toeplitz_residual(self.scaled.coupling[inside]),
            toeplitz_residual(self.raw.coupling[inside]),
        )


@dataclass(frozen=True)
class Windows:
    """Sliding windows of a cell, from the upper spectral edge downwards."""

    windows: list[ShellWindow]

    @classmethod
    def of(cls, mean: Pair) -> Windows:
        """Return those of a mean over all batches, the same for all that is compared with it."""
        return cls(sliding_windows(np.isfinite(mean.scaled.log_lambda), WINDOW_SHELLS))

    def statistics(self, residuals: Callable[[ShellWindow], tuple[Any, Any]]) -> dict[str, Any]:
        """Return `FROM_WINDOWS`, given what finds both residuals of a window."""
        edge, edge_raw = residuals(self.windows[0])
        centre, centre_raw = residuals(self.windows[most_central(self.windows)])
        return {
            "toeplitz_centre": centre,
            "toeplitz_edge": edge,
            "edge_minus_centre": edge - centre,
            "raw_centre": centre_raw,
            "raw_edge": edge_raw,
            "raw_edge_minus_centre": edge_raw - centre_raw,
        }


@dataclass(frozen=True, eq=False)
class Permuted:
    """The gradient flow with the entries of V / √(λ_u λ_v) in random places.

    Raw couplings are these times the λ of the shells: what the sizes of the modes alone would give.
    """

    batches: list[SnapshotShells]

    def whole(self) -> Pair:
        """Couplings of all shells, a draw each."""
        drawn = [one.permuted(N_PERMUTATIONS, with_flux=False) for one in self.batches]
        return Pair.mean(
            [
                Pair(
                    one,
                    ShellSummary(
                        _times_rates(one.coupling, one.log_lambda),
                        one.signed_mean * np.exp(one.log_lambda),
                        one.log_lambda,
                        one.flux,
                    ),
                )
                for one in drawn
            ]
        )

    def residuals(self, window: ShellWindow) -> tuple[Floats, Floats]:
        """Return both Toeplitz residuals of a window whose own entries are permuted."""
        drawn = [one.permuted_within(window, N_PERMUTATIONS) for one in self.batches]
        raw = [
            _times_rates(one, batch.modes.log_lambda[window.shells])
            for one, batch in zip(drawn, self.batches, strict=True)
        ]
        return toeplitz_residual(mean_known(drawn)), toeplitz_residual(mean_known(raw))

    def shares(self) -> dict[str, Floats]:
        """Return `SHARES` with the entries of all modes permuted."""
        drawn = [one.permuted(N_FLUX_PERMUTATIONS) for one in self.batches]
        found = ShellSummary.mean(drawn).statistics()["adjacent_share"]
        return {"near_share": found, "far_share": 1.0 - found}


def analyse_cell(batches: Sequence[Coupled], *, seed: int = 0) -> dict[str, Any]:
    """Return all statistics of a cell, with intervals and nulls.

    Parameters
    ----------
    batches : sequence of Coupled
        At least one; intervals need two.
    seed : int, default=0
        Of the permutations.

    Returns
    -------
    dict
        ``"statistics"``: name → value, lower, upper, and under ``random`` and ``permuted`` the
        values under the nulls, with the p-values of small and of large ones; ``"shells"``: λ and
        diagonal; ``"coupling"``: K; ``"windows"``: residual by window, with the nulls.
    """
    measured = [batch.mode_couplings(label) for label, batch in enumerate(batches)]
    partition = place_coupling_shells(measured, q=Q, lambda_0=1.0).partition
    scaled = [SnapshotShells(one, partition, SCALED, seed) for one in measured]
    raw = [SnapshotShells(one, partition, RAW, seed) for one in measured]
    both = list(zip(scaled, raw, strict=True))
    flow = [Pair(s.observed, r.observed) for s, r in both]
    mean, random = Pair.mean(flow), Pair.mean([Pair(s.random, r.random) for s, r in both])
    windows, null = Windows.of(mean), Permuted(scaled)

    def from_couplings(some: Sequence[Pair]) -> dict[str, Any]:
        one = Pair.mean(some)
        return one.statistics() | windows.statistics(one.residuals)

    drawn = null.whole().statistics() | windows.statistics(null.residuals) | null.shares()
    others = random.statistics() | windows.statistics(random.residuals)
    transfers = [_transfers(batch, batch.flow, partition) for batch in batches]
    found = jackknife(from_couplings, flow) | jackknife(_mean_of_each, transfers)
    others |= _mean_of_each(
        [_stacked([_transfers(b, V, partition) for V in b.random]) for b in batches]
    )
    counts = {
        "n_shells": int(np.isfinite(mean.scaled.log_lambda).sum()),
        "n_modes": int(min(one.resolved.sum() for one in measured)),
    }
    return {
        "statistics": {
            **{name: _entry(found[name], others[name], drawn.get(name)) for name in found},
            **{name: _entry((float(n),) * 3, np.empty(0), None) for name, n in counts.items()},
        },
        "shells": _shell_rows(mean.raw),
        "coupling": mean.scaled.coupling.tolist(),
        "windows": _window_rows(windows, mean, random, null, partition),
    }


def analyse_step(batch: Coupled) -> dict[str, float]:
    """Return the statistics of one batch along its gradient flow, without intervals and nulls."""
    measured = batch.mode_couplings(0)
    partition = place_coupling_shells([measured], q=Q, lambda_0=1.0).partition
    scaled, raw = (SnapshotShells(measured, partition, rule, 0).observed for rule in (SCALED, RAW))
    found = Pair(scaled, raw).statistics() | _transfers(batch, batch.flow, partition)
    return {name: float(value) for name, value in found.items()}


def jackknife(
    evaluate: Callable[[Sequence[Any]], dict[str, Any]], items: Sequence[Any]
) -> dict[str, tuple[float, float, float]]:
    """Return value, lower and upper end of everything that is evaluated, by leaving items out.

    Intervals of positive quantities are made in logarithms, and end where the quantity ends; that
    of a single item has infinite ends, and that of a statistic which is unknown without one of the
    items has unknown ones.
    """
    everything = evaluate(items)
    left_out = [evaluate([*items[:i], *items[i + 1 :]]) for i in range(len(items))]
    if len(items) < 2:
        return {name: (float(value), -np.inf, np.inf) for name, value in everything.items()}
    return {
        name: _interval(name, np.array([float(one[name]) for one in (everything, *left_out)]))
        for name in everything
    }


def _interval(name: str, replicates: Floats) -> tuple[float, float, float]:
    value = float(replicates[0])
    if name in _LOGARITHMIC and (replicates > 0.0).all():
        factor = float(np.exp(jackknife_t(np.log(replicates), CONFIDENCE)[0]))
        lower, upper = value / factor, value * factor
    else:
        half = float(jackknife_t(replicates, CONFIDENCE)[0])
        lower, upper = value - half, value + half
    return within_limits(name, value, lower, upper)


def within_limits(
    name: str, value: float, lower: float, upper: float
) -> tuple[float, float, float]:
    """Return a value with its interval, which ends where the statistic does; infinite ends stay."""
    if np.isinf([lower, upper]).any():
        return value, lower, upper
    low, high = LIMITS.get(name, (-np.inf, np.inf))
    return value, max(lower, low), min(upper, high)


def _entry(
    interval: tuple[float, float, float], random: Floats, permuted: Floats | None
) -> dict[str, Any]:
    value, lower, upper = interval
    entry = {"value": value, "lower": lower, "upper": upper, "random": np.ravel(random).tolist()}
    if permuted is not None:
        entry["permuted"] = np.quantile(permuted, [0.025, 0.5, 0.975]).tolist()
        entry["p_low"] = permutation_p_value(value, permuted)
        entry["p_high"] = permutation_p_value(-value, -np.asarray(permuted))
    return entry


def _transfers(batch: Coupled, V: Floats, partition: ShellPartition) -> dict[str, float]:
    """Return the energy that changes shells, ½ Σ |transfer_α|, relative to the dissipation.

    Of all of it, and of what turning modes carry alone. Exchange that cancels does not count: the
    reading that is kindest to a small transfer.
    """
    balance = shell_balance(
        batch.eigenvalues, batch.amplitudes, batch.error_rates, V, SoftShells(partition)
    )
    lost = float(np.abs(balance.dissipation).sum())
    turned = np.diff(balance.rotation, prepend=0.0, append=0.0)
    return {
        "transfer": 0.5 * float(np.abs(balance.transfer).sum()) / lost,
        "rotation": 0.5 * float(np.abs(turned).sum()) / lost,
    }


def _stacked(some: Sequence[dict[str, float]]) -> dict[str, Floats]:
    return {name: np.array([one[name] for one in some]) for name in FROM_BALANCE}


def _mean_of_each(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.mean([one[name] for one in some], axis=0) for name in FROM_BALANCE}


def _times_rates(coupling: Floats, log_lambda: Floats) -> Floats:
    rates = np.exp(log_lambda)
    return np.asarray(coupling * rates[:, None] * rates)


def _shell_rows(raw: ShellSummary) -> list[dict[str, float]]:
    inner = np.sqrt(np.diagonal(raw.coupling))
    return [
        {"lambda": float(np.exp(x)), "rms": float(y), "signed": float(s)}
        for x, y, s in zip(raw.log_lambda, inner, raw.signed_mean, strict=True)
        if np.isfinite(x)
    ]


def _window_rows(
    windows: Windows, flow: Pair, random: Pair, null: Permuted, partition: ShellPartition
) -> list[dict[str, float]]:
    """Return both residuals of every window beside the medians and ranges of their nulls."""
    rows = []
    for position, window in enumerate(windows.windows):
        row = {
            "position": position,
            "centrality": window.centrality,
            "lambda_lo": float(partition.edges[window.first]),
            "lambda_hi": float(partition.edges[window.stop]),
        }
        values = flow.residuals(window), random.residuals(window), null.residuals(window)
        for kind, value, drawn, permuted in zip(("toeplitz", "raw"), *values, strict=True):
            row[kind] = float(value)
            row[f"{kind}_random_low"] = float(np.min(drawn))
            row[f"{kind}_random_high"] = float(np.max(drawn))
            row[f"{kind}_permuted"] = float(np.median(permuted))
        rows.append(row)
    return rows
