"""Hand-made frames with the columns of the estimators."""

from itertools import pairwise

import numpy as np
import pandas as pd

from spectralshell.shells.partition import shell_name


def edges_and_names(n_shells=10, q=2.0, first=0.05):
    edges = first * q ** np.arange(n_shells + 1)
    names = [shell_name(float(lo), float(hi)) for lo, hi in pairwise(edges)]
    return edges, names


def wide_frame(taus=(0.0, 1.0, 30.0), n_batches=3, n_shells=10, b=1.6, seed=0, cutoff=0.02):
    """Energies ∝ λ^(1−b) exp(−cutoff·τ·λ^(b−1)) below a rounded peak, with batch noise."""
    rng = np.random.default_rng(seed)
    edges, names = edges_and_names(n_shells)
    mid = np.sqrt(edges[1:] * edges[:-1])
    rows, index = [], []
    for tau in taus:
        for batch in range(n_batches):
            shape = mid ** (1 - b) * np.exp(-cutoff * tau * mid ** (b - 1)) / (1 + 0.3 / mid)
            energies = 0.1 * shape * np.exp(0.2 * rng.standard_normal(n_shells))
            rows.append([0.05, *energies])
            index.append((tau, batch))
    frame = pd.DataFrame(
        rows,
        index=pd.MultiIndex.from_tuples(index, names=["tau", "batch"]),
        columns=["null", *names],
    )
    frame.attrs = {"resolution_floor": float(edges[0]), "lambda_max": float(edges[-1])}
    return frame


def tidy_frame(*, bounds=0.1, unresolved=1, **kwargs):
    """The same as one row per shell, with certified bounds ±``bounds`` and the two rows before."""
    wide = wide_frame(**kwargs)
    edges, names = edges_and_names(wide.shape[1] - 1)
    rows = []
    for (tau, batch), energies in zip(wide.index, wide.to_numpy(), strict=True):
        parts = [
            ("null", 0.0, 1e-4, energies[0] / 2),
            ("unresolved", 1e-4, edges[0], energies[0] / 2),
        ]
        parts += zip(names, edges[:-1], edges[1:], energies[1:], strict=True)
        for i, (shell, lo, hi, energy) in enumerate(parts):
            rows.append(
                {
                    "tau": tau,
                    "batch": batch,
                    "shell": shell,
                    "lambda_lo": lo,
                    "lambda_hi": hi,
                    "lambda_mid": np.sqrt(lo * hi),
                    "energy": energy,
                    "energy_lower": energy * (1 - bounds),
                    "energy_upper": energy * (1 + bounds),
                    "density": energy / (hi - lo),
                    "resolved": i >= 2 + unresolved,
                    "status": "ok",
                }
            )
    frame = pd.DataFrame(rows)
    frame.attrs = dict(wide.attrs)
    return frame


def fitted_frame(wide, b=1.6, cutoff=0.02):
    """The energies of ``wide_frame`` without noise and without the peak, 0 in ``null``."""
    edges, _ = edges_and_names(wide.shape[1] - 1)
    mid = np.sqrt(edges[1:] * edges[:-1])
    taus = wide.index.get_level_values("tau").to_numpy()
    tail = 0.1 * mid ** (1 - b) * np.exp(-cutoff * taus[:, None] * mid ** (b - 1))
    values = np.column_stack([np.zeros(len(wide)), tail])
    return pd.DataFrame(values, index=wide.index, columns=wide.columns)


def comparison_frame():
    return pd.DataFrame(
        {
            "model": [
                "power law",
                "power law, template cutoff",
                "power law, exp(-kappa lambda)",
                "lognormal",
            ],
            "slope": [1.9, 1.6, 1.45, np.nan],
            "aic": [12.0, -30.5, -28.1, -11.0],
        }
    )


def frontier_frame(taus=(0.0, 1.0, 30.0)):
    taus = np.asarray(taus, dtype=float)
    frontier = np.where(taus > 0, 40 / np.maximum(taus, 1e-300) ** 0.6, np.nan)
    return pd.DataFrame(
        {
            "tau": taus,
            "amplitude": 0.1,
            "cutoff": 0.02 * taus,
            "frontier": frontier,
            "frontier_lower": 0.7 * frontier,
            "frontier_upper": 1.4 * frontier,
            "n_shells": 8,
            "status": np.where(taus > 0, "ok", "no cutoff in window"),
        }
    )


def fold_frame(n_folds=5, seed=0):
    rng = np.random.default_rng(seed)
    b = 1.5 + 0.05 * rng.standard_normal(n_folds)
    return pd.DataFrame(
        {
            "fold": np.arange(n_folds),
            "b": b,
            "b_lower": b - 0.12,
            "b_upper": b + 0.15,
            "score": -1.0,
            "n_train": 8,
            "n_test": 2,
        }
    )
