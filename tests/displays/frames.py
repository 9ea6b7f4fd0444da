"""Hand-made frames with the columns of the estimators."""

from itertools import pairwise

import numpy as np
import pandas as pd

from spectralshell.shells.partition import shell_name

EDGES = np.array([0.5, 1.0, 2.0, 4.0])


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


def pair_frame(taus=(0.0, 1.0, 30.0), n_batches=2, n_blocks=5, seed=0):
    """Coherence that falls with the distance of blocks, with noise; influence is not symmetric."""
    rng = np.random.default_rng(seed)
    names = list("abcdefghijklmnopqrstuvwxyz")[:n_blocks]
    names += [f"encoder.layers.{i}" for i in range(n_blocks - len(names))]
    rows, columns = np.divmod(np.arange(n_blocks**2), n_blocks)
    frames = []
    for tau in taus:
        for batch in range(n_batches):
            noise = rng.random((n_blocks, n_blocks))
            falling = np.exp(-0.2 * np.abs(rows - columns) * (1 + 0.02 * tau))
            shares = falling * (1 - 0.1 * np.abs(noise + noise.T).ravel() * (rows != columns))
            norms = 1.0 + 0.3 * np.arange(n_blocks)
            frames.append(
                pd.DataFrame(
                    {
                        "tau": tau,
                        "batch": batch,
                        "block": [names[row] for row in rows],
                        "other": [names[column] for column in columns],
                        "depth": rows,
                        "other_depth": columns,
                        "distance": np.abs(rows - columns),
                        "coherence": shares * norms[rows] * norms[columns],
                        "normalized": shares,
                        "influence": rng.random(n_blocks**2),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def norm_frame(taus=(0.0, 1.0, 30.0), n_batches=2):
    taus = np.repeat(np.asarray(taus, dtype=float), n_batches)
    batches = np.tile(np.arange(n_batches), len(taus) // n_batches)
    return pd.DataFrame(
        {
            "tau": taus,
            "batch": batches,
            "jacobian_norm": 1.4 + 0.05 * taus + 0.1 * batches,
            "jacobian_rate": 0.2 + 0.4 * taus + 0.1 * batches,
        }
    )


def toeplitz_frames(n_shells=9, masked=(2,), sign=-1.0, seed=0):
    """What `ToeplitzDisplay.from_frame` takes: couplings that fall with the offset of shells."""
    rng = np.random.default_rng(seed)
    edges, names = edges_and_names(n_shells)
    offset = np.abs(np.subtract.outer(np.arange(n_shells), np.arange(n_shells)))
    scatter = np.exp(0.2 * rng.standard_normal((n_shells, n_shells)))
    matrix = 0.2 * np.exp(-0.7 * offset) * np.sqrt(scatter * scatter.T)
    matrix[list(masked)] = np.nan
    matrix[:, list(masked)] = np.nan
    inner = np.diagonal(matrix)
    shells = pd.DataFrame(
        {
            "shell": names,
            "lambda_mean": np.where(np.isnan(inner), np.nan, np.sqrt(edges[1:] * edges[:-1])),
            "coupling": inner,
            "coupling_lower": 0.8 * inner,
            "coupling_upper": 1.25 * inner,
            "signed_mean": sign * np.sqrt(inner),
        }
    )
    n_windows = max(n_shells - 3, 1)
    first = np.arange(n_windows)[::-1]
    windows = pd.DataFrame(
        {
            "lambda_lo": edges[first],
            "lambda_hi": edges[np.minimum(first + 4, n_shells)],
            "centrality": 1.0 - np.abs(np.linspace(-1.0, 1.0, n_windows + 2)[1:-1]),
            "residual": 0.2 + 0.02 * first,
            "lower": 0.15,
            "upper": 0.4,
        }
    )
    for null, level in (("permutation", 0.3), ("random", 0.35)):
        for end, shift in (("lower", -0.1), ("median", 0.0), ("upper", 0.1)):
            windows[f"{null}_{end}"] = level + shift
    diagonal = pd.DataFrame(
        {"slope": 0.1, "slope_lower": -0.1, "slope_upper": 0.3, "r2": 0.4, "scale_free": 0.0},
        index=["coupling", "signed_mean"],
    )
    coupling = pd.DataFrame(matrix, index=names, columns=names)
    return {"frame": coupling, "windows": windows, "shells": shells, "diagonal": diagonal}


def flux_frame(taus=(0.0, 1.0), n_batches=3, names=None):
    """Fluxes ∝ λ, down at even times and up at odd ones; the first edge is not resolved."""
    rows = [
        {
            "tau": tau,
            "batch": b,
            **({} if name is None else {"name": name}),
            "edge": edge,
            "flux_down": (1.0 + 0.1 * b) * edge * (-1.0) ** t,
            "drift": 0.75 * (1.0 + 0.1 * b) * edge * (-1.0) ** t,
            "rotation": 0.25 * (1.0 + 0.1 * b) * edge * (-1.0) ** t,
            "density": 0.5 * (1.0 + 0.2 * b),
            "n_near": 2,
            "resolved": edge > 0.6,
        }
        for t, tau in enumerate(taus)
        for name in names or [None]
        for b in range(n_batches)
        for edge in EDGES
    ]
    return pd.DataFrame(rows)
