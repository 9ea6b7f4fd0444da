"""One row of scalars per snapshot: what `ToeplitzDiagnostic.transform` and its score return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.estimators.toeplitz_shells import SnapshotShells
from spectralshell.estimators.toeplitz_statistics import ALTERNATIVES, null_p_value
from spectralshell.shells import toeplitz_residual
from spectralshell.shells.frames import label_index
from spectralshell.shells.toeplitz_matrix import most_central, sliding_windows

Floats = NDArray[np.float64]

ROW_NAMES = (
    "toeplitz_residual",
    "permutation_residual",
    "permutation_p",
    "random_residual",
    "random_p",
    "central_residual",
    "central_permutation_residual",
    "central_permutation_p",
    *[name for name in ALTERNATIVES if name != "toeplitz_residual"],
    "n_shells",
    "n_modes",
)


def scalar_frame(
    snapshots: Sequence[SnapshotShells], n_null: int, window_shells: int
) -> pd.DataFrame:
    """Return the columns ``ROW_NAMES`` for each snapshot, none of which depends on the others.

    Parameters
    ----------
    snapshots : sequence of SnapshotShells
        With distinct labels.
    n_null : int
        Permutations.
    window_shells : int
        Shells of the central window.

    Returns
    -------
    DataFrame
        Index levels ``tau``, ``batch`` and, where set, ``name``.
    """
    index = label_index([s.couplings for s in snapshots])
    rows = [_row(snapshot, n_null, window_shells) for snapshot in snapshots]
    return pd.DataFrame(rows, index=index, columns=list(ROW_NAMES), dtype=np.float64)


def log_gain(snapshot: SnapshotShells, n_null: int) -> float:
    """Return −ln(residual / median residual of the permutations).

    NaN where there is nothing to compare, fewer than two usable shells or no coupling: a number
    would reward shells so wide that nothing is left.
    """
    if snapshot.modes.usable.sum() < 2 or snapshot.observed.is_zero():
        return float("nan")
    observed = float(toeplitz_residual(snapshot.observed.coupling))
    null = np.median(toeplitz_residual(snapshot.permuted(n_null, with_flux=False).coupling))
    # Equal entries leave rounding alone, on either side.
    rounding = np.finfo(np.float64).eps
    return float(np.log(max(null, rounding) / max(observed, rounding)))


def _row(snapshot: SnapshotShells, n_null: int, window_shells: int) -> dict[str, float]:
    observed = {name: float(v) for name, v in snapshot.observed.statistics().items()}
    residual = float("nan") if snapshot.observed.is_zero() else observed["toeplitz_residual"]
    permuted = snapshot.permuted(n_null, with_flux=False).statistics()["toeplitz_residual"]
    random = snapshot.random.statistics()["toeplitz_residual"]
    return observed | {
        "permutation_residual": float(np.median(permuted)),
        "permutation_p": null_p_value(residual, permuted, "less"),
        "random_residual": float(np.median(random)),
        "random_p": null_p_value(residual, random, "less"),
        **_central(snapshot, n_null, window_shells),
        "n_shells": float(snapshot.modes.usable.sum()),
        "n_modes": float(snapshot.modes.modes.size),
    }


def _central(snapshot: SnapshotShells, n_null: int, window_shells: int) -> dict[str, float]:
    windows = sliding_windows(snapshot.modes.usable, window_shells)
    chosen = most_central(windows)
    residual, tested, null = np.nan, np.nan, np.full(1, np.nan)
    if chosen is not None:
        window = windows[chosen]
        inner = snapshot.observed.coupling[window.shells, window.shells]
        residual = float(toeplitz_residual(inner))
        null = np.asarray(toeplitz_residual(snapshot.permuted_within(window, n_null)))
        tested = residual if np.nan_to_num(inner).any() else np.nan
    return {
        "central_residual": residual,
        "central_permutation_residual": float(np.median(null)),
        "central_permutation_p": null_p_value(tested, null, "less"),
    }
