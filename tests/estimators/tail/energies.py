"""Frames with known tails, shared by the tests of the tail fit."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.integrate import trapezoid

from spectralshell.datasets import make_grsd_spectra, make_lazy_spectra
from spectralshell.estimators.tail.data import BatchedEnergies
from spectralshell.shells import ShellPartition, energy_frame

WINDOW = (1e-3, 1.0)
SHELLS = ShellPartition.covering(1e-3, 0.9, q=2.0, lambda_0=1e-3)
MIDS = np.linspace(0.0, 5.0, 9)  # ln λ of the shells of batched_energies
MAKERS = {
    "template": make_grsd_spectra,
    "pure": lambda b, **options: make_grsd_spectra(b, K=0, **options),
    "frozen": make_lazy_spectra,
}


@lru_cache(maxsize=64)
def _cached(kind, slope, options):
    # A cell of 1/200 in ln λ keeps what it misplaces at an edge below the noise.
    measures = MAKERS[kind](slope, **{"nodes_per_log": 200, "random_state": 0, **dict(options)})
    return energy_frame(measures, SHELLS)


def frame(kind, slope, **options):
    return _cached(kind, slope, tuple(sorted(options.items()))).copy()


def exact_energies(slope, cutoff, power, edges, n=20_000):
    """∫ λ^−slope exp(−cutoff λ^power) over each shell, by the trapezoidal rule in ln λ."""
    rows = []
    for lower, upper in pairwise(edges):
        lam = np.geomspace(lower, upper, n)
        rows.append(trapezoid(lam ** (1 - slope) * np.exp(-cutoff * lam**power), np.log(lam)))
    return np.array(rows)


def batched_energies(seed, n_batches=12, n_taus=3, sd=0.2, bend=0.0, shared=0.5):
    """Pure power laws, or bent ones, with noise that is smooth in ln λ and shared over tau."""
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(np.exp(-0.5 * (MIDS[:, None] - MIDS) ** 2) + 1e-9 * np.eye(MIDS.size))
    own = rng.normal(size=(n_taus, n_batches, MIDS.size)) @ root.T
    common = rng.normal(size=(1, n_batches, MIDS.size)) @ root.T
    noise = sd * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    energies = np.exp(-1.5 * MIDS - bend * (MIDS - MIDS.mean()) ** 2 + noise)
    present = np.ones((n_taus, n_batches), dtype=bool)
    return BatchedEnergies(np.arange(n_taus) + 1.0, energies, present, energies.sum((1, 2)))
