"""Frames of fluxes by edge, shell, snapshot and distance, over trajectories, and of the drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectralshell.dynamics.lazy import lazy_loss
from spectralshell.estimators.intervals import jackknife_t
from spectralshell.measurements.fluxes import FluxMeasurement
from spectralshell.shells import EdgeBalance, ShellBalance, SoftShells, SpectralMeasure
from spectralshell.shells.frames import label_index
from spectralshell.statuses import (
    DISSIPATION_IS_ROUNDING,
    EDGE_DECAYS,
    ENERGY_IS_ROUNDING,
    FEW_EDGES_OF_ONE_DIRECTION,
    INTERVAL_FROM_EDGES,
    LONG_INTERVAL,
    NO_DIRECTION,
    NO_ENERGY_IN_SHELL,
    NO_FLUX,
    NO_MODE_NEAR_EDGE,
    NO_SIGN_TEST,
    OK,
    OTHER_DIRECTION,
    UNRESOLVED_ENDS,
    few_edges,
    join_statuses,
    other_way,
)

FLUX = "flux_down"

_EXPLAINED = 0.1  # part of the dissipation that may be missing from the change of energy

MIN_EDGES = 3

_LEVEL = 0.05

_FIT_COLUMNS = (
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

_INTEGRAL_COLUMNS = ("edge", "flux_integral", "dissipation_integral", "ratio")

_INTERVAL_COLUMNS = (
    "edge",
    "energy_below_start",
    "energy_below_end",
    "dissipation_below",
    "measured",
    "predicted_start",
    "predicted_end",
    "predicted",
    "mismatch",
    "resolved",
    "status",
)


@dataclass(frozen=True, eq=False)
class BalancedSnapshot:
    """A measurement, which is independent of shells, with its balance in given shells."""

    measurement: FluxMeasurement
    balance: EdgeBalance
    faults: np.ndarray  # of each edge: what keeps its flux from being resolved, or "ok"

    @property
    def resolved(self) -> np.ndarray:
        """Edges whose flux is resolved, bool of shape (n_edges,)."""
        return np.asarray(self.faults == OK, dtype=bool)

    @property
    def measure(self) -> SpectralMeasure:
        """Where the error's energy is."""
        return self.measurement.measure

    @property
    def tau(self) -> float:
        """Effective training time."""
        return self.measure.tau

    @property
    def trajectory(self) -> tuple[Any, Any]:
        """Batch and name."""
        return self.measure.batch, self.measure.name


def balance_all(
    measurements: Sequence[FluxMeasurement], shells: SoftShells
) -> list[BalancedSnapshot]:
    """Return the balance of every measurement in the shells."""
    return [BalancedSnapshot(m, *m.balance(shells)) for m in measurements]


def flux_name(edge: float) -> str:
    """Return the column name of the flux through an edge, with a float that reads back exactly."""
    return f"{FLUX}[{float(edge)!r}]"


def wide_fluxes(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return one row per snapshot and one column per edge, values ``flux_down``."""
    measures = [s.measure for s in snapshots]
    frame = pd.DataFrame(
        np.stack([s.balance.flux_down for s in snapshots]),
        index=label_index(measures),
        columns=pd.Index([flux_name(edge) for edge in shells.edges]),
    )
    frame.attrs = {
        "resolution_floor": max(m.floor for m in measures),
        "lambda_max": max(m.lambda_max for m in measures),
    }
    return frame


def edge_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the tidy frame of fluxes, one row per (snapshot, edge)."""
    edges = shells.edges
    return _stacked(snapshots, [_edge_columns(s, edges) for s in snapshots], edges.size)


def shell_balance_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the balance of every soft shell, one row per (snapshot, shell), null first."""
    first = _first_of_trajectories(snapshots)
    blocks = [_shell_columns(s, first[s.trajectory], shells) for s in snapshots]
    return _stacked(snapshots, blocks, len(shells.names))


def summary_frame(snapshots: Sequence[BalancedSnapshot]) -> pd.DataFrame:
    """Return what holds for a snapshot as a whole, one row each."""
    first, before = _first_of_trajectories(snapshots), _before_each(snapshots)
    blocks = []
    for s in snapshots:
        parts = s.balance if isinstance(s.balance, ShellBalance) else None
        earlier = before.get(id(s))
        block: dict[str, Any] = {
            "energy": s.measure.total,
            "energy_rate": s.measurement.total_rate,
            "lazy_energy": _lazy_total(first[s.trajectory], s.tau),
            "lazy_energy_step": np.nan if earlier is None else _lazy_total(earlier, s.tau),
            "null_exchange": s.balance.null_exchange,
            "null_share": np.nan if parts is None else parts.null_share,
            "defect": np.nan if parts is None else parts.defect,
            "n_resolved": int(s.resolved.sum()),
            "direction": s.measurement.direction,
            "direction_norm": s.measurement.direction_norm,
            "solver": s.measure.solver,
            "n_matvecs": s.measurement.n_matvecs,
            "resolution_floor": s.measure.floor,
            "lambda_max": s.measure.lambda_max,
            "dynamics_exact": s.measure.dynamics_exact,
            "status": s.measure.status,
        }
        blocks.append({key: np.array([value]) for key, value in block.items()})
    return _stacked(snapshots, blocks, 1)


def distance_frame(snapshots: Sequence[BalancedSnapshot]) -> pd.DataFrame:
    """Return the share of transfer by shell distance, one row per (snapshot, distance).

    Distance 0 stands for the transfer that has the null shell at one end. Lanczos has none.
    """
    blocks = []
    size = len(snapshots[0].balance.energy) - 1
    for s in snapshots:
        parts = s.balance
        shares = (
            np.append(parts.null_share, parts.share_by_distance)
            if isinstance(parts, ShellBalance)
            else np.full(size, np.nan)
        )
        blocks.append({"distance": np.arange(size), "share": shares})
    return _stacked(snapshots, blocks, size)


def _edge_columns(snapshot: BalancedSnapshot, edges: np.ndarray) -> dict[str, np.ndarray]:
    balance = snapshot.balance
    parts = balance if isinstance(balance, ShellBalance) else None
    unknown = np.full(edges.shape, np.nan)
    return {
        "edge": edges,
        FLUX: balance.flux_down,
        "drift": unknown if parts is None else parts.drift,
        "rotation": unknown if parts is None else parts.rotation,
        "density": balance.density,
        "velocity": balance.velocity,
        "regime_index": np.abs(balance.velocity) / edges,
        "energy_below": balance.energy_below,
        "dissipation_below": balance.dissipation_below,
        "flux_to_dissipation": balance.flux_to_dissipation,
        "n_near": balance.n_near,
        "resolved": snapshot.resolved,
        "status": _edge_statuses(snapshot),
    }


def _edge_statuses(snapshot: BalancedSnapshot) -> np.ndarray:
    statuses = []
    balance = snapshot.balance
    for edge, fault in enumerate(snapshot.faults):
        empty = NO_MODE_NEAR_EDGE if balance.n_near[edge] == 0 else OK
        if empty is OK and np.isnan(balance.velocity[edge]):
            empty = ENERGY_IS_ROUNDING
        still = OK if balance.dissipates[edge] else DISSIPATION_IS_ROUNDING
        statuses.append(join_statuses([snapshot.measure.status, fault, empty, still]))
    return np.array(statuses, dtype=object)


def _shell_columns(
    snapshot: BalancedSnapshot, first: BalancedSnapshot, shells: SoftShells
) -> dict[str, np.ndarray]:
    balance, partition = snapshot.balance, shells.partition
    velocity = np.append(np.nan, balance.shell_velocity)
    middle = np.append(np.nan, partition.midpoints)
    names = list(shells.names)
    status = [snapshot.measure.status] * len(names)
    for row in np.flatnonzero(balance.energy <= balance.rounding.energy):
        phrase = ENERGY_IS_ROUNDING if balance.energy[row] else NO_ENERGY_IN_SHELL
        status[row] = join_statuses([status[row], phrase])
    return {
        "shell": np.array(names, dtype=object),
        "lambda_lo": np.append(0.0, partition.edges[:-1]),
        "lambda_hi": partition.edges,
        "lambda_mid": middle,
        "energy_soft": balance.energy,
        "dissipation": balance.dissipation,
        "transfer": balance.transfer,
        "velocity": velocity,
        "regime_index": np.abs(velocity) / middle,
        "drift_to_decay": np.abs(velocity) / (2.0 * middle**2),
        "lazy_energy": _lazy_energies(first.measure, snapshot.tau, shells),
        "status": np.array(status, dtype=object),
    }


def _lazy_energies(measure: SpectralMeasure, tau: float, shells: SoftShells) -> np.ndarray:
    """Return the soft-shell energies at ``tau`` if the kernel had stayed as it was."""
    kept = np.exp(-2.0 * np.maximum(measure.nodes, 0.0) * (tau - measure.tau))
    energies = shells.weights(measure.nodes) @ (kept * measure.weights)
    energies[0] += measure.missing
    return energies


def _lazy_total(snapshot: BalancedSnapshot, tau: float) -> float:
    measure = snapshot.measure
    nodes = np.maximum(measure.nodes, 0.0)
    return float(lazy_loss(nodes, measure.weights, tau - measure.tau)) + measure.missing


def _first_of_trajectories(snapshots: Sequence[BalancedSnapshot]) -> dict[Any, BalancedSnapshot]:
    first: dict[Any, BalancedSnapshot] = {}
    for snapshot in snapshots:
        known = first.get(snapshot.trajectory)
        if known is None or snapshot.tau < known.tau:
            first[snapshot.trajectory] = snapshot
    return first


def _before_each(snapshots: Sequence[BalancedSnapshot]) -> dict[int, BalancedSnapshot]:
    return {id(end): start for start, end in consecutive(snapshots)}


def consecutive(
    snapshots: Sequence[BalancedSnapshot],
) -> list[tuple[BalancedSnapshot, BalancedSnapshot]]:
    """Return the pairs of successive snapshots of each trajectory, by τ."""
    pairs: list[tuple[BalancedSnapshot, BalancedSnapshot]] = []
    for trajectory in dict.fromkeys(s.trajectory for s in snapshots):
        ordered = sorted((s for s in snapshots if s.trajectory == trajectory), key=lambda s: s.tau)
        pairs += pairwise(ordered)
    return pairs


def _stacked(
    snapshots: Sequence[BalancedSnapshot], blocks: list[dict[str, np.ndarray]], rows: int
) -> pd.DataFrame:
    labels = label_index([s.measure for s in snapshots]).repeat(rows)
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    return pd.DataFrame(columns, index=labels).reset_index()


def trajectory_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the measured and the predicted flux of every interval, one row per edge.

    ``mismatch`` is the balance of the whole energy, ΔE/Δτ + D, and a part of ``measured``.
    """
    pairs = consecutive(snapshots)
    if not pairs:
        return pd.DataFrame(columns=["tau_start", "tau_end", "batch", *_INTERVAL_COLUMNS])
    blocks = [_interval_columns(start, end, shells.edges) for start, end in pairs]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    ends = label_index([end.measure for _, end in pairs]).repeat(shells.edges.size)
    frame = pd.DataFrame(columns, index=ends).reset_index().rename(columns={"tau": "tau_end"})
    starts = np.repeat([start.tau for start, _ in pairs], shells.edges.size)
    frame.insert(0, "tau_start", starts)
    return frame


def integrability_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return ∫|J| dτ, ∫|D| dτ of the shell below, and their ratio, one row per (batch, edge).

    The ratio is the smallest C of Definition 4.1 of "Renormalizable spectral-shell dynamics".
    """
    pairs = consecutive(snapshots)
    ends = {end.trajectory: end.measure for _, end in pairs}  # the last of each stays
    if not ends:
        return pd.DataFrame(columns=["tau_end", "batch", *_INTEGRAL_COLUMNS])
    blocks = [
        _integral_columns([pair for pair in pairs if pair[0].trajectory == label], shells)
        for label in ends
    ]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    labels = label_index(list(ends.values())).repeat(shells.edges.size)
    frame = pd.DataFrame(columns, index=labels)
    return frame.reset_index().rename(columns={"tau": "tau_end"})


def _interval_columns(
    start: BalancedSnapshot, end: BalancedSnapshot, edges: np.ndarray
) -> dict[str, np.ndarray]:
    elapsed = end.tau - start.tau
    first, last = start.balance, end.balance
    # Exact for one decaying mode, too large for several.
    dissipation = _logarithmic_mean(first.dissipation_below, last.dissipation_below)
    losses = [float(balance.dissipation.sum()) for balance in (first, last)]
    lost = float(_logarithmic_mean(*(np.array([loss]) for loss in losses))[0])
    gained = float(last.energy.sum() - first.energy.sum()) / elapsed
    of_all = _mismatch_status(-gained, losses, lost)
    resolved = start.resolved & end.resolved
    # Modes at the edge decay meanwhile: the mean flux then says little about that at the ends.
    stiff = 2.0 * edges * elapsed > 1.0
    status = [
        join_statuses([of_all, OK if known else UNRESOLVED_ENDS, EDGE_DECAYS if decays else OK])
        for known, decays in zip(resolved, stiff, strict=True)
    ]
    return {
        "edge": edges,
        "energy_below_start": first.energy_below,
        "energy_below_end": last.energy_below,
        "dissipation_below": dissipation,
        "measured": (last.energy_below - first.energy_below) / elapsed + dissipation,
        "predicted_start": first.flux_down,
        "predicted_end": last.flux_down,
        "predicted": 0.5 * (first.flux_down + last.flux_down),
        "mismatch": np.full(edges.shape, gained + lost),
        "resolved": resolved,
        "status": np.array(status, dtype=object),
    }


def _mismatch_status(found: float, losses: Sequence[float], mean: float) -> str:
    """Say whether a loss of energy is explained by the dissipation at the ends and their mean."""
    slack = _EXPLAINED * abs(mean)
    if abs(found - mean) <= slack:
        return OK
    # Between the ends anything may be: one mode loses at the logarithmic mean, and several of which
    # the fast ones are soon gone at little more than the smaller end.
    between = min(losses) - slack <= found <= max(losses) + slack
    return LONG_INTERVAL if between else OTHER_DIRECTION


def _logarithmic_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (a − b)/ln(a/b), the mean of an exponential; the arithmetic one if not positive."""
    mean: np.ndarray = 0.5 * (a + b)
    # Close ends: the two means agree to the square of their relative difference.
    apart = (a > 0.0) & (b > 0.0) & (np.abs(a - b) > 1e-4 * np.abs(mean))
    mean[apart] = (a[apart] - b[apart]) / np.log(a[apart] / b[apart])
    return mean


def _integral_columns(
    pairs: list[tuple[BalancedSnapshot, BalancedSnapshot]], shells: SoftShells
) -> dict[str, np.ndarray]:
    def integrate(rate: Callable[[BalancedSnapshot], np.ndarray]) -> np.ndarray:
        parts = [0.5 * (e.tau - s.tau) * (np.abs(rate(s)) + np.abs(rate(e))) for s, e in pairs]
        return np.asarray(np.sum(parts, axis=0))

    flux = integrate(lambda snapshot: snapshot.balance.flux_down)
    lost = integrate(lambda snapshot: snapshot.balance.dissipation[:-1])
    rounding = integrate(lambda snapshot: snapshot.balance.rounding.dissipation[:-1])
    ratio = np.divide(flux, lost, out=np.full(flux.shape, np.nan), where=lost > rounding)
    return dict(zip(_INTEGRAL_COLUMNS, (shells.edges, flux, lost, ratio), strict=True))


@dataclass(frozen=True, eq=False)
class _Velocities:
    """Fluxes and densities of the batches of one time, at the edges usable in all of them."""

    log_edges: np.ndarray  # shape (k,)
    flux: np.ndarray  # shape (n_batches, k)
    density: np.ndarray
    batches: tuple[Any, ...]  # labels: batch, and name where there is one

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
    """Fit v = ±c λ^b at the edges, for all times together (one b) and for each: a row each.

    Snapshots with different names are batches of their own.
    """
    # Edges that are resolved and have modes nearby; `_gather` keeps those usable in every batch.
    usable = fluxes["resolved"] & fluxes["velocity"].notna()
    taus = fluxes["tau"].to_numpy(dtype=float)
    times = {float(t): _gather(fluxes[taus == t], usable[taus == t]) for t in np.unique(taus)}
    rows = [{"scope": "all", "tau": np.nan} | _fit(list(times.values()), confidence)]
    rows += [{"scope": "tau", "tau": tau} | _fit([data], confidence) for tau, data in times.items()]
    return pd.DataFrame(rows, columns=["scope", "tau", *_FIT_COLUMNS])


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
    row: dict[str, Any] = dict.fromkeys(_FIT_COLUMNS, np.nan)
    row |= {"sign": 0, "n_edges": n_edges, "n_batches": len(batches)}
    if n_edges and not any(v.any() for v in velocities):
        return row | {"status": NO_FLUX}
    if n_edges < MIN_EDGES:
        return row | {"status": few_edges(MIN_EDGES)}
    net = np.array([_net_direction(times, batch) for batch in batches])
    direction, p_value = _test_sign(net, np.concatenate(velocities))
    signs = [np.sign(v) == direction for v in velocities]
    agreement = float(np.concatenate(signs).mean())
    untested = NO_SIGN_TEST if len(batches) == 1 else NO_DIRECTION
    phrases = [] if p_value <= _LEVEL else [untested]
    if agreement < 1.0:
        other = n_edges - int(np.concatenate(signs).sum())
        phrases.append(other_way(other, n_edges))
    row |= {
        "sign": int(direction) if p_value <= _LEVEL else 0,
        "p_value": p_value,
        "agreement": agreement,
    }
    b, scatter, error, intercept = _slope(times, velocities, direction)
    if not np.isfinite(b):
        return row | {"status": join_statuses([*phrases, FEW_EDGES_OF_ONE_DIRECTION])}
    replicates = np.array(
        [b, *(_slope(times, [d.velocity(out) for d in times], direction)[0] for out in batches)]
    )
    if len(batches) >= 3 and np.isfinite(replicates).all():
        half = float(jackknife_t(replicates, confidence)[0])
    else:
        # Takes neighbouring edges for independent.
        half = error * float(stats.t.ppf(0.5 + confidence / 2.0, _freedom(signs)))
        phrases.append(INTERVAL_FROM_EDGES)
    row |= {"b": b, "b_lower": b - half, "b_upper": b + half, "scatter": scatter}
    return row | {"amplitude": intercept, "status": join_statuses(phrases)}


def _net_direction(times: Sequence[_Velocities], batch: Any) -> float:
    found = [
        data.net_directions()[data.batches.index(batch)] for data in times if batch in data.batches
    ]
    return float(np.mean(found))


def _test_sign(net: np.ndarray, velocities: np.ndarray) -> tuple[float, float]:
    """Return the direction, ±1, and the p-value of having none: Student's t over batches.

    NaN with one batch, whose edges share their pairs of modes; most edges then decide.
    """
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
