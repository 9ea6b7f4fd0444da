"""Synthetic spectral measures with known tails, for tests and studies of the tail fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special
from scipy.ndimage import gaussian_filter1d
from sklearn.utils import check_random_state

from spectralshell.krylov.quadrature import FLOAT64_NOISE
from spectralshell.parameter_checks import (
    check_integer,
    check_option,
    check_real,
    check_window,
)
from spectralshell.shells import SpectralMeasure

_NOISES = ("lognormal", "gamma", "none")
# Six frontiers between these shares of the window, in ln λ, where none are given.
_INSIDE = (0.25, 0.85)
_N_TAUS = 6
_DEFAULT_WINDOW = (1e-3, 1.0)


def make_grsd_spectra(
    b: float,
    *,
    taus: Sequence[float] | None = None,
    K: float | None = None,
    frontiers: Sequence[float] | None = None,
    n_batches: int = 12,
    window: tuple[float, float] = _DEFAULT_WINDOW,
    noise: str = "lognormal",
    noise_sd: float = 0.2,
    correlation_length: float = 0.7,
    tau_correlation: float = 0.5,
    nodes_per_log: int = 500,
    random_state: Any = None,
) -> list[SpectralMeasure]:
    """Make measures with density λ^−b exp(−κ λ^(b−1)) over a window, on noisy batches.

    Parameters
    ----------
    b : float
        Tail slope.
    taus : sequence of float, optional
        Effective times. By default those at which κ = K τ gives the frontiers, from 1; without a
        cutoff, six from 1 to 100.
    K : float, optional
        κ = K τ at every tau; 0 gives pure power laws.
    frontiers : sequence of float, optional
        λ* of each tau, with κ = λ*^−(b−1), instead of ``K``. With neither, six frontiers in the
        window, from 25 % to 85 % of it in ln λ.
    n_batches : int, default=12
        Batches at each tau, labelled from 0.
    window : tuple of float, default=(1e-3, 1.0)
        Where the measures live. Its ends are their resolution floor and largest eigenvalue.
    noise : {"lognormal", "gamma", "none"}, default="lognormal"
        Distribution of the factor, of mean 1, that multiplies the energy of a batch.
    noise_sd : float, default=0.2
        Standard deviation of the noise: of ln of the factor (log-normal), or of it (gamma).
    correlation_length : float, default=0.7
        ℓ in ln λ: the noise has Gaussian correlation exp(−Δ²/2ℓ²), so shells closer than ℓ move
        together. 0.7 is a shell of ratio 2.
    tau_correlation : float, default=0.5
        Correlation of the noise of one batch between two taus, from 0 to 1 (the same batch draws
        the same samples at every checkpoint).
    nodes_per_log : int, default=500
        Nodes per unit of ln λ. A cell that crosses an edge belongs to the shell of its midpoint,
        which matters where the density falls by much within a cell.
    random_state : int, RandomState or None, default=None
        Seed of the noise.

    Returns
    -------
    list of SpectralMeasure
        By tau, then batch.

    Raises
    ------
    ValueError
        For parameters out of range or that contradict each other; and for b = 1 without ``K=0``,
        since its cutoff does not depend on λ.

    See Also
    --------
    make_lazy_spectra : The same for a frozen kernel.

    Notes
    -----
    The template is that of "Renormalizable spectral-shell dynamics"; the noise is this package's.

    Examples
    --------
    >>> measures = make_grsd_spectra(2.0, K=0, taus=[1.0], n_batches=1, noise="none")
    >>> energies = measures[0].energies([0.01, 0.1, 1.0])[1:]  # ∝ 1/λ_lo − 1/λ_hi
    >>> bool(abs(energies[0] / energies[1] - 10.0) < 0.05)  # nodes are half a cell off an edge
    True
    """
    b = check_real("b", b)
    window = check_window("window", window) or _DEFAULT_WINDOW
    if K is not None and frontiers is not None:
        raise ValueError("frontiers and K both set κ; pass one of them.")
    if K is not None:
        times = _check_taus(np.geomspace(1.0, 100.0, _N_TAUS) if taus is None else taus)
        cutoffs = check_real("K", K, low=0.0) * times
    else:
        if b == 1.0:
            raise ValueError("b=1 has no frontier, since λ^(b−1) is constant; pass K=0.")
        inside = _inside(window) if frontiers is None else _check_positive("frontiers", frontiers)
        cutoffs = inside ** (1.0 - b)
        times = _check_taus(np.sort(cutoffs / cutoffs.min()) if taus is None else taus)
        if times.shape != cutoffs.shape:
            raise ValueError(
                f"taus has {times.size} entries and there are {cutoffs.size} frontiers; pass one "
                "frontier per tau."
            )
        cutoffs = np.sort(cutoffs) if taus is None else cutoffs
    log_lambda, step = _nodes(window, nodes_per_log)
    log_density = -b * log_lambda - cutoffs[:, None] * np.exp((b - 1.0) * log_lambda)
    factors = _noise_factors(
        (len(times), n_batches, len(log_lambda)),
        step,
        noise,
        noise_sd,
        correlation_length,
        tau_correlation,
        random_state,
    )
    return _measures(times, log_lambda, step, log_density, factors, window)


def make_lazy_spectra(
    s: float,
    *,
    taus: Sequence[float] | None = None,
    n_batches: int = 12,
    window: tuple[float, float] = _DEFAULT_WINDOW,
    noise: str = "lognormal",
    noise_sd: float = 0.2,
    correlation_length: float = 0.7,
    tau_correlation: float = 0.5,
    nodes_per_log: int = 500,
    random_state: Any = None,
) -> list[SpectralMeasure]:
    """Make measures of a frozen kernel: density λ^−s e^(−2λτ) over a window, on noisy batches.

    Parameters
    ----------
    s : float
        Slope of the error's density at τ = 0.
    taus : sequence of float, optional
        Effective times; by default six whose frontiers 1/(2τ) lie in the window, from 85 % to 25 %
        of it in ln λ.
    n_batches, window, noise, noise_sd, correlation_length, tau_correlation, nodes_per_log, \
random_state
        As in :func:`make_grsd_spectra`.

    Returns
    -------
    list of SpectralMeasure
        By tau, then batch.

    Raises
    ------
    ValueError
        For parameters out of range.

    Notes
    -----
    At s = 2 this is the template with b = 2 and κ = 2τ, exactly.

    Examples
    --------
    >>> early, late = make_lazy_spectra(1.5, taus=[0.0, 5.0], n_batches=1, noise="none")
    >>> bool(abs(early.lazy_decay(5.0) - late.total) < 1e-12 * early.total)
    True
    """
    s = check_real("s", s)
    window = check_window("window", window) or _DEFAULT_WINDOW
    times = _check_taus(np.sort(0.5 / _inside(window)) if taus is None else taus)
    log_lambda, step = _nodes(window, nodes_per_log)
    log_density = -s * log_lambda - 2.0 * times[:, None] * np.exp(log_lambda)
    factors = _noise_factors(
        (len(times), n_batches, len(log_lambda)),
        step,
        noise,
        noise_sd,
        correlation_length,
        tau_correlation,
        random_state,
    )
    return _measures(times, log_lambda, step, log_density, factors, window)


def _inside(window: tuple[float, float]) -> np.ndarray:
    low, high = np.log(window)
    return np.exp(low + (high - low) * np.linspace(*_INSIDE, _N_TAUS))


def _nodes(window: tuple[float, float], nodes_per_log: int) -> tuple[np.ndarray, float]:
    """Midpoints in ln λ of equal cells that fill the window."""
    nodes_per_log = check_integer("nodes_per_log", nodes_per_log, low=1)
    low, high = np.log(window)
    n_nodes = max(1, int(np.ceil(nodes_per_log * (high - low))))
    step = (high - low) / n_nodes
    return low + step * (np.arange(n_nodes) + 0.5), float(step)


def _noise_factors(
    shape: tuple[int, int, int],
    step: float,
    noise: str,
    noise_sd: float,
    correlation_length: float,
    tau_correlation: float,
    random_state: Any,
) -> np.ndarray:
    """Factors of mean 1, shape (n_taus, n_batches, n_nodes)."""
    check_option("noise", noise, _NOISES)
    check_integer("n_batches", shape[1], low=1)
    noise_sd = check_real("noise_sd", noise_sd, low=0.0)
    length = check_real("correlation_length", correlation_length, low=0.0)
    shared = check_real("tau_correlation", tau_correlation, low=0.0, high=1.0)
    random = check_random_state(random_state)
    if noise == "none" or noise_sd == 0.0:
        return np.ones(shape)
    common = _smooth_field(random, (1, *shape[1:]), length / step)
    own = _smooth_field(random, shape, length / step)
    field = np.sqrt(shared) * common + np.sqrt(1.0 - shared) * own
    if noise == "lognormal":
        return np.exp(noise_sd * field - 0.5 * noise_sd**2)
    shape_parameter = noise_sd**-2.0
    return special.gammaincinv(shape_parameter, special.ndtr(field)) / shape_parameter


def _smooth_field(
    random: np.random.RandomState, shape: tuple[int, ...], length: float
) -> np.ndarray:
    """Gaussian field of unit variance with correlation exp(−Δ²/2ℓ²) along the last axis."""
    sigma = length / np.sqrt(2.0)  # white noise smoothed by σ has correlation length √2 σ
    if sigma < 0.5:
        return random.standard_normal(shape)
    margin = int(np.ceil(4.0 * sigma))
    white = random.standard_normal((*shape[:-1], shape[-1] + 2 * margin))
    smooth = gaussian_filter1d(white, sigma, axis=-1, truncate=4.0)[..., margin:-margin]
    kernel = np.exp(-0.5 * (np.arange(-margin, margin + 1) / sigma) ** 2)
    return smooth * (kernel.sum() / np.sqrt((kernel**2).sum()))


def _measures(
    taus: np.ndarray,
    log_lambda: np.ndarray,
    step: float,
    log_density: np.ndarray,
    factors: np.ndarray,
    window: tuple[float, float],
) -> list[SpectralMeasure]:
    nodes = np.exp(log_lambda)
    weights = np.exp(log_density + log_lambda)[:, None] * step * factors
    return [
        SpectralMeasure(
            nodes=nodes,
            weights=weights[j, batch],
            total=float(weights[j, batch].sum()),
            lambda_max=window[1],
            floor=window[0],
            noise=FLOAT64_NOISE * window[1],
            tau=float(tau),
            batch=batch,
        )
        for j, tau in enumerate(taus)
        for batch in range(factors.shape[1])
    ]


def _check_taus(taus: Any) -> np.ndarray:
    times = np.asarray(taus, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all() or (times < 0).any():
        raise ValueError(f"taus must be a sequence of finite times >= 0, got {taus!r}.")
    if len(np.unique(times)) < times.size:
        raise ValueError(f"taus must be distinct, got {taus!r}; batches repeat each of them.")
    return times


def _check_positive(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(f"{name} must be a sequence of positive rates, got {values!r}.")
    return array
