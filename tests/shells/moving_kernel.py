"""A small tanh network in numpy with its kernel, and the hard-shell balance as a reference.

Hard shells need the eigenvalues that cross edges as events; the package has soft ones instead.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

RTOL, ATOL = 1e-12, 1e-14


@dataclass
class TwoLayers:
    """f = tanh(X Wᵀ) a on n samples, with the mean over samples in J and e."""

    inputs: np.ndarray
    targets: np.ndarray
    hidden: int

    def jacobian(self, theta, velocity):
        """Return e, J and dJ/dt along a velocity of the parameters."""
        n, d = self.inputs.shape
        a, W = theta[: self.hidden], theta[self.hidden :].reshape(self.hidden, d)
        a_dot, W_dot = velocity[: self.hidden], velocity[self.hidden :].reshape(self.hidden, d)
        H = np.tanh(self.inputs @ W.T)
        slope = 1 - H**2
        H_dot = slope * (self.inputs @ W_dot.T)
        inner = a * slope
        inner_dot = a_dot * slope - 2 * a * H * H_dot
        x = self.inputs[:, None, :]
        J = np.hstack([H, (inner[:, :, None] * x).reshape(n, -1)])
        J_dot = np.hstack([H_dot, (inner_dot[:, :, None] * x).reshape(n, -1)])
        return (self.targets - H @ a) / n**0.5, J / n**0.5, J_dot / n**0.5

    def modes(self, theta):
        """Return λ, g, ⟨ė, φ⟩ and V of gradient flow, and θ̇."""
        e, J, _ = self.jacobian(theta, np.zeros_like(theta))
        velocity = J.T @ e
        _, _, J_dot = self.jacobian(theta, velocity)
        M = J @ J.T
        lam, U = np.linalg.eigh(M)
        half = (U.T @ J_dot) @ (J.T @ U)
        return lam, U.T @ e, U.T @ -(M @ e), half + half.T, velocity


def small_network(seed=1):
    """Return a network of twelve samples whose eigenvalues move far while it learns."""
    rng = np.random.default_rng(seed)
    network = TwoLayers(rng.normal(size=(12, 3)), 2.0 * rng.normal(size=12), hidden=8)
    return network, rng.normal(size=8 * 4) * 0.6


def integrate(network, theta, rates_of, n_rates, times, events=None):
    """Integrate gradient flow with extra states dy/dt = rates_of(modes); return its solution."""

    def rhs(t, state):
        modes = network.modes(state[: theta.size])
        return np.concatenate([modes[-1], rates_of(*modes[:-1])])

    start = np.concatenate([theta, np.zeros(n_rates)])
    return solve_ivp(
        rhs, times, start, method="DOP853", rtol=RTOL, atol=ATOL, events=events, dense_output=False
    )


def hard_energies(lam, g, edges):
    """Return ½ Σ g² of what lies below the first edge, in each shell, and above the last edge."""
    place = np.searchsorted(edges, lam, side="right")
    return np.bincount(place, weights=0.5 * g**2, minlength=len(edges) + 1)


def kato_rates(lam, g, rates, V, place, n_places):
    """Return −D_α + Σ_β F_αβ of hard shells with the memberships fixed (first paper, eq. 3)."""
    gap = lam[:, None] - lam
    foreign = place[:, None] != place
    exchange = np.divide(np.outer(g, g) * V, gap, out=np.zeros_like(V), where=foreign)
    gained = g * rates + exchange.sum(axis=1)
    return np.bincount(place, weights=gained, minlength=n_places)


def hard_shell_run(network, theta, edges, end):
    """Integrate the hard balance from crossing to crossing.

    Returns the energies at both ends, the integral of −D + ΣF, the energies moved by crossings,
    and how many crossings there were.
    """
    n_places = len(edges) + 1
    time, state = 0.0, theta
    lam, g, *_ = network.modes(theta)
    first = hard_energies(lam, g, edges)
    place = np.searchsorted(edges, lam, side="right")
    integral, moved, crossings = np.zeros(n_places), np.zeros(n_places), 0
    limits = np.concatenate([[-np.inf], edges, [np.inf]])
    while time < end:
        run = integrate(
            network,
            state,
            lambda lam, g, rates, V, place=place: kato_rates(lam, g, rates, V, place, n_places),
            n_places,
            (time, end),
            events=_escapes(network, theta.size, limits[place], limits[place + 1]),
        )
        time, state = run.t[-1], run.y[: theta.size, -1]
        integral += run.y[theta.size :, -1]
        if run.status != 1:
            break
        _, g, _, V, _ = network.modes(state)
        mode = next(i for i, times in enumerate(run.t_events) if len(times))
        target = place[mode] + (1 if V[mode, mode] > 0 else -1)
        moved[place[mode]] -= 0.5 * g[mode] ** 2
        moved[target] += 0.5 * g[mode] ** 2
        place = place.copy()
        place[mode] = target
        crossings += 1
    lam, g, *_ = network.modes(state)
    return first, hard_energies(lam, g, edges), integral, moved, crossings


def _escapes(network, n_parameters, lower, upper):
    """Return one event per mode: it leaves the interval of the shell that it is booked in."""
    seen = {}

    def rates_at(y):
        key = y.tobytes()
        if key not in seen:
            seen.clear()
            seen[key] = network.modes(y[:n_parameters])[0]
        return seen[key]

    def event_of(mode):
        def escape(t, y):
            rate = rates_at(y)[mode]
            return min(rate - lower[mode], upper[mode] - rate)

        escape.terminal, escape.direction = True, -1
        return escape

    return [event_of(mode) for mode in range(len(lower))]
