"""The least squares of a tail model as a function of its shared exponent, and its global minimum.

The profile S(θ) = min over all other parameters has an exact derivative, since those stand at their
minimum. It is taken on a grid over the whole range of θ, for the full sample and every replicate;
between two neighbours where it changes its sign from − to + lies a local minimum, and so is an end
of the range where it points outwards. The lowest of them are refined, and the lowest is the fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spectralshell.estimators.intervals import profile_interval, profile_threshold
from spectralshell.estimators.tail.models import TailModel
from spectralshell.estimators.tail.solve import LAST_STEP, ShellGrid, TailParameters, solve

# A model whose cutoff is constant at a θ is fitted on both sides of it, up to this distance.
BRANCH_GAP = 1e-6

# Where the steps of the grid begin to grow with the distance from a pole.
POLE_SCALE = 0.3

# Local minima of one profile that are refined, by what a cubic through their neighbours promises.
N_MINIMA = 3

# θ is known to this; the derivative of the profile has its sign to about as much.
TOLERANCE = 1e-9
MAX_ROOT_STEPS = 60

# Squares that differ by a smaller part are equal to what solving them leaves over.
SQUARES_TOLERANCE = 1e-9

# A minimum that promises squares above this multiple of the lowest on the grid is not refined.
HOPELESS = 10.0

# Neighbours of the grid between which a minimum may hide get so many points between them, so often.
N_CLOSER = 3
MAX_CLOSER = 3
CLOSEST = 1e-4

# The last step on the grid, as in the solver: what is refined is solved again.
GRID_STEP = 1e-4

# Nodes of the quadrature that are worked on at once: what fits into a processor's cache.
BLOCK = 60_000

# Differences of ln ε that rounding leaves.
ROUNDING_OF_LOGS = 1e-11

# A θ this near an end of its range was stopped by the range.
END_GAP = 1e-6


_Point = tuple[np.ndarray, np.ndarray, np.ndarray]  # theta, slope, coefficient


@dataclass(frozen=True)
class TailFit(TailParameters):
    """The global minimum of the profile of each replicate, and the next best local one."""

    rival: np.ndarray  # θ of the second lowest local minimum, NaN without one, (n,)
    rival_sse: np.ndarray  # infinite without one, (n,)


def profile_fit(
    model: TailModel,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
) -> TailFit:
    """Fit a model to the full sample, which comes first, and to its replicates.

    Arrays are (n_replicates, n_taus, n_shells); weight 0 leaves out, ratios say κ_j = K·ratio_j.
    """
    profile = _profiles(model, log_density, weights, grid, ratios)
    for _ in range(MAX_CLOSER):
        closer = profile.doubtful()
        if not closer.size:
            break
        profile = _closer(model, profile, closer, log_density, weights, grid, ratios)
    low, high = _minima(profile, len(log_density))
    found = _refine(model, profile, low, high, log_density, weights, grid, ratios)
    # Residuals of ln ε are rounded at 1e-12 or so.
    rounding = ROUNDING_OF_LOGS**2 * weights.sum(axis=(-1, -2))
    return _best(found, profile.owner[low], profile.lowest, rounding)


def profile_at(
    model: TailModel,
    theta: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None = None,
    last_step: float = LAST_STEP,
) -> TailParameters:
    """Best fits of one sample, arrays of shape (1, n_taus, n_shells), at each of several θ."""
    n, n_taus, n_shells = len(theta), *log_density.shape[1:]
    shape = (n, n_taus, n_shells)
    return solve(
        model,
        theta,
        np.ones(n),
        np.zeros((n, n_taus)),
        np.broadcast_to(log_density, shape),
        np.broadcast_to(weights, shape),
        grid,
        ratios=ratios,
        last_step=last_step,
    )


def likelihood_interval(
    model: TailModel,
    fit: TailParameters,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
    n_parameters: int,
    confidence: float,
) -> tuple[float, float]:
    """Profile-likelihood interval of θ for one sample, its points taken as independent.

    An end is infinite where the data do not bound θ.
    """

    def squares(theta: np.ndarray) -> np.ndarray:
        return profile_at(model, theta, log_density, weights, grid, ratios).sse

    limit = profile_threshold(fit.sse[0], int((weights > 0).sum()), n_parameters, confidence)
    return profile_interval(squares, float(fit.theta[0]), limit, model.bounds)


def is_determined(model: TailModel, fit: TailParameters) -> bool:
    """Return whether θ of the full sample lies inside the model's range, not at an end of it."""
    low, high = model.bounds
    return bool(low + END_GAP < fit.theta[0] < high - END_GAP)


def _grid(model: TailModel) -> tuple[np.ndarray, np.ndarray]:
    """Return the θ at which the profile is taken first, and the branch of each.

    The ends of the range, and those of both branches beside a pole, are among them.
    """
    low, high = model.bounds
    if model.pole is None:
        return np.linspace(low, high, model.n_grid), np.zeros(model.n_grid, dtype=int)
    half = model.n_grid // 2
    below, above = _outwards(model.pole - low, half), _outwards(high - model.pole, half)
    return np.append(model.pole - below[::-1], model.pole + above), np.repeat([0, 1], half)


def _outwards(reach: float, n: int) -> np.ndarray:
    """Distances from a pole, from the gap to the end, in steps that grow with them."""
    share = np.linspace(0.0, 1.0, n)
    distances = POLE_SCALE * np.expm1(share * np.log1p(reach / POLE_SCALE))
    distances[0], distances[-1] = BRANCH_GAP, reach
    return distances


@dataclass(frozen=True)
class _Profiles:
    """Points of all profiles, sorted by replicate, branch and θ."""

    owner: np.ndarray  # replicate of each point
    branch: np.ndarray
    points: TailParameters

    @property
    def lowest(self) -> np.ndarray:
        """Lowest squares that each replicate has met."""
        starts = np.flatnonzero(np.append(True, np.diff(self.owner) > 0))
        return np.fmin.reduceat(self.points.sse, starts)

    @property
    def joined(self) -> np.ndarray:
        """Return which points have their right neighbour beside them."""
        return (np.diff(self.owner) == 0) & (np.diff(self.branch) == 0)

    def promise(self) -> np.ndarray:
        """Lowest of the cubic between each point and the next, taken at nine points."""
        t = np.linspace(0.0, 1.0, 9)[:, None]
        squares, slopes = self.points.sse, self.points.gradient
        widths = np.diff(self.points.theta)
        cubics = (
            (1 + 2 * t) * (1 - t) ** 2 * squares[:-1]
            + t**2 * (3 - 2 * t) * squares[1:]
            + t * (1 - t) ** 2 * widths * slopes[:-1]
            - t**2 * (1 - t) * widths * slopes[1:]
        )
        return cubics.min(axis=0)

    def hopeful(self, squares: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """Return which squares are not far above the lowest of their replicate."""
        return squares <= HOPELESS * self.lowest[owner]

    def doubtful(self) -> np.ndarray:
        """Positions between which a minimum hides: both slopes have a sign that squares belie."""
        squares, rises = self.points.sse, self.points.gradient >= 0
        promise = self.promise()
        dips = promise < np.minimum(squares[:-1], squares[1:])
        belied = (squares[1:] < squares[:-1]) == rises[:-1]
        same = self.joined & (rises[:-1] == rises[1:])
        wide = np.diff(self.points.theta) > CLOSEST
        hidden = same & (dips | belied) & wide
        return np.flatnonzero(hidden & self.hopeful(promise, self.owner[:-1]))


def _profiles(
    model: TailModel,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
) -> _Profiles:
    """Take all profiles on the model's grid; replicates start where the full sample ends."""
    theta, branch = _grid(model)
    n, n_theta, n_taus = len(log_density), len(theta), log_density.shape[1]
    full = profile_at(model, theta, log_density[:1], weights[:1], grid, ratios, GRID_STEP)
    size = max(1, BLOCK // (n_taus * grid.x.size))
    blocks = [full]
    for begin in range(n_theta, n * n_theta, size):
        owner, at = np.divmod(np.arange(begin, min(begin + size, n * n_theta)), n_theta)
        start = (full.slope[at], full.coefficient[at])
        data = (log_density[owner], weights[owner])
        blocks.append(
            solve(model, theta[at], *start, *data, grid, ratios=ratios, last_step=GRID_STEP)
        )
    owner = np.repeat(np.arange(n), n_theta)
    return _Profiles(owner, np.tile(branch, n), TailParameters.joined(blocks))


def _closer(
    model: TailModel,
    profile: _Profiles,
    after: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
) -> _Profiles:
    """Add points between some neighbours."""
    points = profile.points
    left = np.repeat(after, N_CLOSER)
    share = np.tile(np.arange(1, N_CLOSER + 1) / (N_CLOSER + 1.0), len(after))
    start = _between(points.take(left), points.take(left + 1), share)
    data = (log_density[profile.owner[left]], weights[profile.owner[left]])
    found = solve(model, *start, *data, grid, ratios=ratios, last_step=GRID_STEP)
    owner = np.concatenate([profile.owner, profile.owner[left]])
    branch = np.concatenate([profile.branch, profile.branch[left]])
    both = TailParameters.joined([points, found])
    order = np.lexsort((both.theta, branch, owner))
    return _Profiles(owner[order], branch[order], both.take(order))


def _minima(profile: _Profiles, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours around the most promising local minima, as positions in the profiles.

    A minimum at an end of a branch is its own neighbour.
    """
    squares, rises = profile.points.sse, profile.points.gradient >= 0
    joined = profile.joined
    inside = np.flatnonzero(joined & ~rises[:-1] & rises[1:])
    ends = np.flatnonzero(
        (~np.append(False, joined) & rises) | (~np.append(joined, False) & ~rises)
    )
    low, high = np.append(inside, ends), np.append(inside + 1, ends)
    promise = np.append(profile.promise()[inside], squares[ends])
    owner = profile.owner[low]
    order = np.lexsort((promise, owner))
    place = np.arange(len(order)) - np.searchsorted(owner[order], np.arange(n))[owner[order]]
    kept = order[(place < N_MINIMA) & ((place == 0) | profile.hopeful(promise, owner)[order])]
    return low[kept], high[kept]


def _refine(
    model: TailModel,
    profile: _Profiles,
    low: np.ndarray,
    high: np.ndarray,
    log_density: np.ndarray,
    weights: np.ndarray,
    grid: ShellGrid,
    ratios: np.ndarray | None,
) -> TailParameters:
    """Solve at the root of the profile's derivative between each pair of neighbours.

    Chandrupatla's method interpolates where that is safe, else bisects (Adv. Eng. Softw. 28, 1997).
    """
    owner, points = profile.owner[low], profile.points

    def solved(which: np.ndarray, point: _Point) -> TailParameters:
        data = log_density[owner[which]], weights[owner[which]]
        return solve(model, *point, *data, grid, ratios=ratios)

    # One end is the newest point, the other has a derivative of the other sign.
    newest, opposite = points.take(high), points.take(low)
    share = np.full(len(low), 0.5)
    active = np.flatnonzero(low != high)
    for _ in range(MAX_ROOT_STEPS):
        if not active.size:
            break
        one, other = newest.take(active), opposite.take(active)
        found = solved(active, _between(one, other, share[active]))
        same = (found.gradient < 0) == (one.gradient < 0)
        third, other = _chosen(same, one, other), _chosen(same, other, one)
        _put(newest, active, found)
        _put(opposite, active, other)
        width = np.abs(other.theta - found.theta)
        least = 0.5 * TOLERANCE / np.maximum(width, TOLERANCE)
        share[active] = np.clip(_interpolated(found, other, third), least, 1.0 - least)
        active = active[(width > TOLERANCE) & (found.gradient != 0.0)]
    nearer = np.abs(newest.gradient) <= np.abs(opposite.gradient)
    best = _chosen(nearer, newest, opposite)
    every = np.arange(len(low))
    result = solved(every, (best.theta, best.slope, best.coefficient))
    return replace(result, converged=result.converged & ~np.isin(every, active))


def _column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _between(one: TailParameters, other: TailParameters, share: np.ndarray) -> _Point:
    def mixed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + _column(share, a) * (b - a)

    return (
        mixed(one.theta, other.theta),
        mixed(one.slope, other.slope),
        mixed(one.coefficient, other.coefficient),
    )


def _chosen(first: np.ndarray, one: TailParameters, other: TailParameters) -> TailParameters:
    pairs = {name: (value, vars(other)[name]) for name, value in vars(one).items()}
    return TailParameters(
        **{name: np.where(_column(first, a), a, b) for name, (a, b) in pairs.items()}
    )


def _put(into: TailParameters, which: np.ndarray, values: TailParameters) -> None:
    for name, value in vars(values).items():
        vars(into)[name][which] = value


def _interpolated(
    newest: TailParameters, opposite: TailParameters, third: TailParameters
) -> np.ndarray:
    """Share of the way from the newest point to the opposite one at which to go on."""
    x1, x2, x3 = newest.theta, opposite.theta, third.theta
    f1, f2, f3 = newest.gradient, opposite.gradient, third.gradient
    with np.errstate(divide="ignore", invalid="ignore"):
        place, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        safe = (phi**2 < place) & ((1.0 - phi) ** 2 < 1.0 - place)
        back = (x3 - x1) / (x2 - x1)
        share = f1 / (f2 - f1) * f3 / (f2 - f3) + back * f1 / (f3 - f1) * f2 / (f3 - f2)
    return np.where(safe, share, 0.5)


def _best(
    found: TailParameters, owner: np.ndarray, lowest: np.ndarray, rounding: np.ndarray
) -> TailFit:
    """Return the lowest minimum of each replicate with the next one beside it.

    One that a point of the grid undercuts is not the minimum.
    """
    n = len(lowest)
    order = np.lexsort((found.sse, owner))
    begins = np.searchsorted(owner[order], np.arange(n))
    beside = np.append(order, 0)[begins + 1]
    has_rival = np.append(owner[order], -1)[begins + 1] == np.arange(n)
    best = found.take(order[begins])
    agrees = best.sse <= lowest * (1.0 + SQUARES_TOLERANCE) + rounding
    best = replace(best, converged=best.converged & agrees)
    return TailFit(
        **vars(best),
        rival=np.where(has_rival, found.theta[beside], np.nan),
        rival_sse=np.where(has_rival, found.sse[beside], np.inf),
    )
