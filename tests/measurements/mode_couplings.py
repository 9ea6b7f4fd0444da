"""Couplings between modes made by hand, with or without structure."""

import numpy as np

from spectralshell.measurements.couplings import ModeCouplings


def make_couplings(V, eigenvalues, *, seed=0, n_random=3, converged=None, **labels):
    """ModeCouplings with these V, amplitudes of 1 and random directions of GOE entries."""
    k = len(eigenvalues)
    rng = np.random.default_rng(seed)
    random = rng.standard_normal((n_random, k, k))
    return ModeCouplings(
        eigenvalues=np.asarray(eigenvalues, dtype=float),
        amplitudes=np.ones(k),
        error_rates=-np.asarray(eigenvalues, dtype=float),
        couplings=np.asarray(V, dtype=float),
        random_couplings=random + random.swapaxes(1, 2),
        residual_norms=np.zeros(k),
        converged=np.ones(k, dtype=bool) if converged is None else converged,
        lambda_max=float(np.max(eigenvalues, initial=0.0)),
        floor=1e-12,
        noise=1e-13,
        total=0.5 * k,
        total_rate=-float(np.sum(eigenvalues)),
        direction="gradient-flow",
        derivative="exact",
        direction_norm=1.0,
        solver="exact",
        n_matvecs=0,
        n_outputs=k,
        n_rows=k,
        n_parameters=k,
        dynamics_exact=True,
        **labels,
    )


def even_rates(n_shells, modes_per_shell):
    """Rates equally spaced in ln λ over shells of ratio 2 from 1."""
    return 2.0 ** (np.arange(n_shells * modes_per_shell) / modes_per_shell)


def noise(k, seed=0):
    """A symmetric matrix of Gaussian entries."""
    upper = np.random.default_rng(seed).standard_normal((k, k))
    return np.triu(upper) + np.triu(upper, 1).T


def by_offset(rates, decay=1.0, seed=0):
    """Couplings whose normalised size falls with the distance of the shells: Toeplitz."""
    shell = np.floor(np.log2(rates))
    size = np.exp(-decay * np.abs(shell[:, None] - shell))
    return np.sqrt(rates[:, None] * rates) * size * noise(rates.size, seed)


def by_scale(rates, power=1.0, seed=0):
    """Couplings whose normalised size grows with λ: not Toeplitz."""
    product = rates[:, None] * rates
    return product ** (0.5 + 0.5 * power) * noise(rates.size, seed)
