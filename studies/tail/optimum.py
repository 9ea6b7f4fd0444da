"""The tail fit by its definition, slowly, with no code of the package.

Minimise Σ_j Σ_i w_ji (y_ji − ln(mean over shell i of A_j λ^−b exp(−κ_j λ^(b−1))))² over b, A_j and
κ_j ≥ 0. The mean is a composite Simpson rule in ln λ. At fixed b every τ is searched over a ladder
of κ first, then between its neighbours by bisected Newton steps; b is searched over a grid on both
sides of 1, then by bounded Brent around the lowest local minima.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.integrate import simpson
from scipy.optimize import minimize_scalar

BOUNDS = (-3.0, 8.0)
# The template has a branch on each side of b = 1, up to this distance.
GAP = 1e-6
N_GRID = 61  # points of b on each branch, denser towards 1
N_LADDER = 161  # values of κ at each b
N_SIMPSON = 61  # points in a shell
N_BASINS = 4


@dataclass(frozen=True)
class Minimum:
    """A local minimum of the profile."""

    b: float
    squares: float


class Definition:
    """The profile of one set of shells."""

    def __init__(self, lower: np.ndarray, upper: np.ndarray) -> None:
        x = np.linspace(np.log(lower), np.log(upper), N_SIMPSON)  # (points, shells)
        self._x = x - np.log(upper[-1])
        # ∫ f dλ / width = ∫ f λ d ln λ / width
        self._measure = np.exp(x) / (upper - lower)
        self._step = x[1] - x[0]
        away = np.geomspace(1e-2, 1.0, N_GRID - 1)
        below = np.append(GAP, away * (1.0 - BOUNDS[0]))
        above = np.append(GAP, away * (BOUNDS[1] - 1.0))
        self._branches = (1.0 - below[::-1], 1.0 + above)
        self._ladders = [self._ladder(branch) for branch in self._branches]

    def minima(self, y: np.ndarray, weights: np.ndarray) -> list[Minimum]:
        """Local minima of the profile, the lowest first; arrays are (taus, shells)."""
        found = []
        for branch, (kappas, logs) in zip(self._branches, self._ladders, strict=True):
            squares = self._profile(branch, kappas, logs, y, weights)
            padded = np.concatenate([[np.inf], squares, [np.inf]])
            lows = np.flatnonzero((squares <= padded[:-2]) & (squares <= padded[2:]))
            for k in lows[np.argsort(squares[lows])][:N_BASINS]:
                found.append(self._refined(branch, int(k), y, weights))
        return sorted(found, key=lambda minimum: minimum.squares)

    def squares(self, b: float, y: np.ndarray, weights: np.ndarray) -> float:
        """Profile at one b."""
        branch = np.array([b])
        return float(self._profile(branch, *self._ladder(branch), y, weights)[0])

    def _refined(self, branch: np.ndarray, k: int, y: np.ndarray, weights: np.ndarray) -> Minimum:
        low, high = branch[max(k - 1, 0)], branch[min(k + 1, len(branch) - 1)]
        result = minimize_scalar(
            self.squares,
            bounds=(low, high),
            args=(y, weights),
            method="bounded",
            options={"xatol": 1e-10, "maxiter": 200},
        )
        ends = [Minimum(float(b), self.squares(b, y, weights)) for b in (low, high)]
        return min(
            [Minimum(float(result.x), float(result.fun)), *ends], key=lambda point: point.squares
        )

    def _ladder(self, branch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of κ at each b, by how much they suppress the density, and ln of the means."""
        reach = np.abs(np.expm1(np.outer(branch - 1.0, self._x))).max(axis=1)
        steps = np.append(0.0, np.geomspace(1e-4, 1e8, N_LADDER - 1))
        kappas = steps / reach[:, None]
        logs = np.stack([self._moments(branch, kappas[:, j])[0] for j in range(N_LADDER)])
        return kappas, logs

    def _moments(self, b: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ln of the mean over each shell, and its first two derivatives in κ, (n, shells)."""
        power = (b - 1.0)[:, None, None]
        g = np.expm1(power * self._x)
        logs = -b[:, None, None] * self._x - kappa[:, None, None] * g + np.log(self._measure)
        top = logs.max(axis=1, keepdims=True)
        density = np.exp(logs - top)
        norm = simpson(density, axis=1) * self._step
        first = simpson(density * g, axis=1) * self._step / norm
        second = simpson(density * (g - first[:, None]) ** 2, axis=1) * self._step / norm
        return np.log(norm) + top[:, 0], -first, second

    def _profile(
        self, branch: np.ndarray, kappas: np.ndarray, logs: np.ndarray, y: np.ndarray, w: np.ndarray
    ) -> np.ndarray:
        """Σ over the taus of the least squares in A and κ, at each b of a branch."""
        at, tau = (index.ravel() for index in np.indices((len(branch), len(y))))
        ladder = np.stack(
            [self._left_over(row - logs, weight)[0] for row, weight in zip(y, w, strict=True)]
        )  # (taus, ladder, b)
        best = ladder.argmin(axis=1)[tau, at]
        places = (best, np.maximum(best - 1, 0), np.minimum(best + 1, N_LADDER - 1))
        start = (kappas[at, place] for place in places)
        least = self._least(branch[at], *start, y[tau], w[tau])
        return least.reshape(len(branch), len(y)).sum(axis=1)

    def _left_over(self, rest: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Σ w r² and r, with the best amplitude taken off along the last axis."""
        rest = rest - ((rest * weight).sum(axis=-1) / weight.sum(axis=-1))[..., None]
        return (rest**2 * weight).sum(axis=-1), rest

    def _least(
        self,
        b: np.ndarray,
        kappa: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
    ) -> np.ndarray:
        """Newton's steps on the derivative in κ, bisected where they leave the bracket."""
        kappa, low, high = kappa.copy(), low.copy(), high.copy()
        best = np.full(len(b), np.inf)
        for _ in range(100):
            mean, slope, bend = self._moments(b, kappa)
            squares, rest = self._left_over(y - mean, weight)
            best = np.minimum(best, squares)
            derivative = -2.0 * (rest * slope * weight).sum(axis=-1)
            flat = self._left_over(slope, weight)[0]
            curvature = 2.0 * flat - 2.0 * (rest * bend * weight).sum(axis=-1)
            low = np.where(derivative < 0, kappa, low)
            high = np.where(derivative > 0, kappa, high)
            step = -derivative / np.where(curvature > 0, curvature, 1.0)
            trial = np.where(curvature > 0, kappa + step, np.inf)
            trial = np.where((trial > low) & (trial < high), trial, 0.5 * (low + high))
            moved = np.abs(trial - kappa)
            kappa = trial
            if (moved <= 1e-13 * np.abs(kappa) + 1e-300).all():
                break
        return best
