"""A power law of the drift velocity, v = ±c λ^b, with its interval and a test of its sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectralshell.estimators.tail_intervals import jackknife_t

MIN_EDGES = 3
_LEVEL = 0.05
_ONE_BATCH = "one batch: no test of the sign"
_COLUMNS = (
    "sign",
    "p_value",
    "b",
    "b_lower",
    "b_upper",
    "amplitude",
    "scatter",
    "agreement",
    "n_edges",
    "n_batches",
    "status",
)


@dataclass(frozen=True, eq=False)
class _Velocities:
    """Fluxes and densities of the batches of one time, at the edges usable in all of them.

    Parameters
    ----------
    log_edges : ndarray of shape (k,)
    flux, density : ndarray of shape (n_batches, k)
    batches : tuple
        Labels of the batches.
    """

    log_edges: np.ndarray
    flux: np.ndarray
    density: np.ndarray
    batches: tuple[Any, ...]

    def velocity(self, leave_out: Any = None) -> np.ndarray:
        """Return v = −mean flux/mean density: a mean of ratios would follow the emptiest batch."""
        kept = np.array([batch != leave_out for batch in self.batches])
        if not kept.any():
            return np.full(self.log_edges.shape, np.nan)
        velocity: np.ndarray = -self.flux[kept].mean(axis=0) / self.density[kept].mean(axis=0)
        return velocity

    def net_directions(self) -> np.ndarray:
        """Return −Σ J of each batch over the mean Σ|J|, positive if more flows up than down."""
        size = float(np.abs(self.flux).sum(axis=1).mean()) if self.flux.size else 0.0
        net: np.ndarray = -self.flux.sum(axis=1) / (size or 1.0)
        return net


def fit_velocity(fluxes: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Fit v = ±c λ^b to the velocities at the edges, for all times together and for each.

    Parameters
    ----------
    fluxes : DataFrame
        ``fluxes_`` of :class:`~spectralshell.ShellFluxEstimator`.
    confidence : float
        Coverage of the intervals.

    Returns
    -------
    DataFrame
        One row for all times (``scope`` is ``"all"``, ``tau`` NaN) and one for each: ``scope, tau,
        sign, p_value, b, b_lower, b_upper, amplitude, scatter, agreement, n_edges, n_batches,
        status``. ``sign`` is that of v where the test at 5 % tells it, else 0; ``amplitude`` is c;
        ``scatter`` is the root mean square residual of ln |v|; ``agreement`` is the share of edges
        with the majority's sign, the only ones in the fit. Snapshots with different names are
        batches of their own.

    Notes
    -----
    Velocities are ratios of means over batches, at edges that are resolved and have modes nearby
    in every batch. The row of all times has one b and an amplitude for each time. Intervals are
    jackknife-t over batches from three batches on, else Student's t over the edges, which takes
    neighbouring edges for independent. The sign is tested by Student's t over batches of their
    net flux −Σ J. One batch has no such test, since its edges share their pairs of modes: ``sign``
    is 0 and ``p_value`` NaN, and the fit takes the sign of most edges.
    """
    usable = fluxes["resolved"] & fluxes["velocity"].notna()
    taus = fluxes["tau"].to_numpy(dtype=float)
    times = {float(t): _gather(fluxes[taus == t], usable[taus == t]) for t in np.unique(taus)}
    rows = [{"scope": "all", "tau": np.nan} | _fit(list(times.values()), confidence)]
    rows += [{"scope": "tau", "tau": tau} | _fit([data], confidence) for tau, data in times.items()]
    return pd.DataFrame(rows, columns=["scope", "tau", *_COLUMNS])


def _gather(part: pd.DataFrame, usable: pd.Series) -> _Velocities:
    levels = [part[key].tolist() for key in ("batch", "name") if key in part]
    sources = list(zip(*levels, strict=True))
    batches = tuple(dict.fromkeys(sources))
    # Every snapshot has the same edges, in the same order.
    order = np.argsort([batches.index(source) for source in sources], kind="stable")

    def table(values: pd.Series) -> np.ndarray:
        return values.to_numpy()[order].reshape(len(batches), -1)

    kept = table(usable).astype(bool).all(axis=0)
    return _Velocities(
        log_edges=np.log(table(part["edge"])[0, kept]),
        flux=table(part["flux_down"])[:, kept],
        density=table(part["density"])[:, kept],
        batches=batches,
    )


def _fit(times: Sequence[_Velocities], confidence: float) -> dict[str, Any]:
    batches = list(dict.fromkeys(batch for data in times for batch in data.batches))
    velocities = [data.velocity() for data in times]
    n_edges = sum(v.size for v in velocities)
    row: dict[str, Any] = dict.fromkeys(_COLUMNS, np.nan)
    row |= {"sign": 0, "n_edges": n_edges, "n_batches": len(batches)}
    if n_edges and not any(v.any() for v in velocities):
        return row | {"status": "no flux"}
    if n_edges < MIN_EDGES:
        return row | {"status": f"fewer than {MIN_EDGES} usable edges"}
    net = np.array([_net_direction(times, batch) for batch in batches])
    direction, p_value = _test_sign(net, np.concatenate(velocities))
    signs = [np.sign(v) == direction for v in velocities]
    agreement = float(np.concatenate(signs).mean())
    untested = _ONE_BATCH if len(batches) == 1 else "direction not determined"
    phrases = [] if p_value <= _LEVEL else [untested]
    if agreement < 1.0:
        other = n_edges - int(np.concatenate(signs).sum())
        phrases.append(f"{other} of {n_edges} edges drift the other way")
    row |= {
        "sign": int(direction) if p_value <= _LEVEL else 0,
        "p_value": p_value,
        "agreement": agreement,
    }
    b, scatter, error, intercept = _slope(times, velocities, direction)
    if not np.isfinite(b):
        return row | {"status": "; ".join([*phrases, "too few edges of one direction"])}
    replicates = np.array(
        [b, *(_slope(times, [d.velocity(out) for d in times], direction)[0] for out in batches)]
    )
    if len(batches) >= 3 and np.isfinite(replicates).all():
        half = float(jackknife_t(replicates, confidence)[0])
    else:
        half = error * float(stats.t.ppf(0.5 + confidence / 2.0, _freedom(signs)))
        phrases.append("interval from the scatter of edges")
    row |= {"b": b, "b_lower": b - half, "b_upper": b + half, "scatter": scatter}
    return row | {"amplitude": intercept, "status": "; ".join(phrases) or "ok"}


def _net_direction(times: Sequence[_Velocities], batch: Any) -> float:
    found = [
        data.net_directions()[data.batches.index(batch)] for data in times if batch in data.batches
    ]
    return float(np.mean(found))


def _test_sign(net: np.ndarray, velocities: np.ndarray) -> tuple[float, float]:
    """Return the direction, ±1, and the p-value of having none, NaN with one batch."""
    if net.size == 1:
        up, moving = int((velocities > 0).sum()), int((velocities != 0).sum())
        return 1.0 if 2 * up > moving or (2 * up == moving and net[0] > 0) else -1.0, np.nan
    direction = 1.0 if net.mean() > 0 else -1.0
    spread = float(net.std(ddof=1))
    # Equal batches are no evidence beyond that of one.
    if spread <= 1e-12 * float(np.abs(net).max()):
        return direction, 1.0
    return direction, float(stats.ttest_1samp(net, 0.0).pvalue)


def _slope(
    times: Sequence[_Velocities], velocities: list[np.ndarray], direction: float
) -> tuple[float, float, float, float]:
    """Return b, the scatter of ln |v|, the standard error of b, and c where there is one time."""
    centred_x, centred_y, freedom, amplitude = [], [], -1, np.nan
    for data, velocity in zip(times, velocities, strict=True):
        kept = velocity * direction > 0.0
        if kept.sum() < 2:
            continue
        x, y = data.log_edges[kept], np.log(np.abs(velocity[kept]))
        centred_x.append(x - x.mean())
        centred_y.append(y - y.mean())
        freedom += x.size - 1
    if freedom < 1:
        return np.nan, np.nan, np.nan, np.nan
    x_all, y_all = np.concatenate(centred_x), np.concatenate(centred_y)
    b = float(x_all @ y_all / (x_all @ x_all))
    squares = float(((y_all - b * x_all) ** 2).sum())
    if len(times) == 1:
        kept = velocities[0] * direction > 0.0
        mean_log = np.log(np.abs(velocities[0][kept])).mean()
        amplitude = float(np.exp(mean_log - b * times[0].log_edges[kept].mean()))
    error = (squares / freedom / float(x_all @ x_all)) ** 0.5
    return b, (squares / x_all.size) ** 0.5, error, amplitude


def _freedom(signs: list[np.ndarray]) -> int:
    counts = [int(kept.sum()) for kept in signs if kept.sum() >= 2]
    return max(sum(counts) - len(counts) - 1, 1)


__all__ = ["fit_velocity"]
