"""Figures of the study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from studies.residual.results import differences, draw_columns, mean_interval

COLORS = {"residual": "#1f6fb4", "plain": "#d0672b"}
MARKERS = {"relu": "o", "gelu": "s"}
LINES = {"relu": "-", "gelu": "--"}
SMALLEST = 3e-2
"""Of a mean coupling, where the colors of the heat maps begin."""
TITLES = {"cross-entropy": "cross-entropy", "brier": "Brier"}


def plot_windows(rows: pd.DataFrame, path: Path, column: str = "toeplitz") -> None:
    """Toeplitz residual of sliding windows, from the upper spectral edge downwards.

    One row of panels for each residual and activation, one column for each time. Means over the
    seeds, all seeds faint; the range of the random directions as a band and the median of the
    permutations dotted, in the color of the networks.
    """
    forms, times = _unique(rows, "residual"), _unique(rows, "time")
    kinds = [(form, activation) for form in forms for activation in _unique(rows, "activation")]
    figure, panels = plt.subplots(
        len(kinds), len(times), figsize=(3.5 * len(times), 2.5 * len(kinds)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for (i, (form, activation)), (j, when) in _grid(kinds, times):
        panel = panels[i, j]
        chosen = (rows["residual"] == form) & (rows["activation"] == activation)
        part = rows[chosen & (rows["time"] == when)]
        for kind, lines in part.groupby("architecture", sort=False):
            _draw_windows(panel, lines, column, str(kind))
        panel.set_title(f"{TITLES[form]}, {_activation(activation)}, {_when(when)}", fontsize=9)
        panel.set_ylim(0, 1)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3, lw=0.4)
        if i == len(kinds) - 1:
            panel.set_xlabel("shells between window and upper edge")
        if j == 0:
            panel.set_ylabel("Toeplitz residual")
    _shared_legend(figure, panels[0, 0])
    _save(figure, path)


def _draw_windows(panel: Any, lines: pd.DataFrame, column: str, kind: str) -> None:
    color = COLORS[kind]
    for _, line in lines.groupby("seed"):
        panel.plot(line["position"], line[column], color=color, alpha=0.22, lw=0.8)
    low, high, permuted, mean = (
        _common_mean(lines, f"{column}{end}")
        for end in ("_random_low", "_random_high", "_permuted", "")
    )
    panel.fill_between(
        low.index, low, high, color=color, alpha=0.13, lw=0, label=f"{kind}: random directions"
    )
    panel.plot(
        permuted.index, permuted, ":", color=color, lw=1.2, label=f"{kind}: permuted entries"
    )
    panel.plot(mean.index, mean, "-o", color=color, ms=4, label=f"{kind}: gradient flow")


def plot_diagonal(rows: pd.DataFrame, path: Path) -> None:
    """Diagonal of the raw couplings against λ, with lines of slope 1."""
    forms, times = _unique(rows, "residual"), _unique(rows, "time")
    figure, panels = plt.subplots(
        len(forms), len(times), figsize=(3.5 * len(times), 2.9 * len(forms)), squeeze=False
    )
    for (i, form), (j, when) in _grid(forms, times):
        panel = panels[i, j]
        part = rows[(rows["residual"] == form) & (rows["time"] == when)]
        for (kind, activation), points in part.groupby(["architecture", "activation"], sort=False):
            panel.loglog(
                points["lambda"], points["rms"], MARKERS[activation], color=COLORS[kind], ms=3.5,
                mfc="none" if activation == "gelu" else COLORS[kind], mew=0.8,
                label=f"{kind}, {_activation(activation)}",
            )  # fmt: skip
        x = np.array([part["lambda"].min(), part["lambda"].max()])
        middle = np.exp(np.mean(np.log(part["rms"]) - np.log(part["lambda"])))
        panel.loglog(x, middle * x, color="0.4", lw=1, ls=":", label="slope 1")
        panel.set_title(f"{TITLES[form]}, {_when(when)}", fontsize=9)
        panel.grid(alpha=0.3, lw=0.4)
        if i == len(forms) - 1:
            panel.set_xlabel("λ (1/τ)")
        if j == 0:
            panel.set_ylabel("√K_αα, not normalised (1/τ²)")
    _shared_legend(figure, panels[0, 0])
    _save(figure, path)


def plot_couplings(matrices: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    """Heat maps of K, one row for each kind of network and one column for each time."""
    kinds = list(dict.fromkeys(kind for kind, _ in matrices))
    times = list(dict.fromkeys(when for _, when in matrices))
    figure, panels = plt.subplots(
        len(kinds), len(times), figsize=(2.6 * len(times) + 0.8, 2.5 * len(kinds)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    shown = {key: _relative(matrix) for key, matrix in matrices.items()}
    norm = LogNorm(SMALLEST, max(np.nanmax(m) for m in shown.values()))
    colors = plt.get_cmap("viridis").with_extremes(bad="0.8", under=plt.get_cmap("viridis")(0.0))
    for (i, kind), (j, when) in _grid(kinds, times):
        panel = panels[i, j]
        image = panel.imshow(shown[kind, when], norm=norm, cmap=colors, origin="lower")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        architecture, activation = kind.split(", ")
        panel.set_title(f"{architecture}, {_activation(activation)}, {_when(when)}", fontsize=9)
        panel.set_xlabel("shell" if i == len(kinds) - 1 else "")
        panel.set_ylabel("shell" if j == 0 else "")
    figure.colorbar(image, ax=panels, label="K_αβ over its mean", shrink=0.8, extend="min")
    _save(figure, path)


def plot_differences(frame: pd.DataFrame, names: dict[str, str], path: Path) -> None:
    """Residual minus plain for each setting: mean, interval over seeds, every random direction."""
    figure, panels = plt.subplots(
        1, len(names), figsize=(2.6 * len(names) + 1.6, 4.2), sharey=True, squeeze=False
    )
    keys = ["residual", "time", "activation"]
    for panel, (name, title) in zip(panels[0], names.items(), strict=True):
        labels = []
        pairs = differences(frame, name)
        for row, (setting, values) in enumerate(pairs.groupby(level=keys, sort=False)):
            mean, lower, upper = mean_interval(values["value"])
            panel.plot([lower, upper], [row, row], color="#444", lw=1.2)
            panel.plot(mean, row, "o", color="#444", ms=4.5, label=_once("gradient flow", row))
            drawn = values[draw_columns(values)].mean()
            panel.plot(
                drawn, np.full(len(drawn), row + 0.25), "x", color="#a0a0a0", ms=4,
                label=_once("each random direction", row),
            )  # fmt: skip
            form, when, activation = setting
            labels.append(f"{TITLES[form]}, {_when(when)}, {_activation(activation)}")
        panel.axvline(0, color="black", lw=0.7)
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3, lw=0.4, axis="x")
    panels[0, 0].set_yticks(range(len(labels)), labels, fontsize=7)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("residual − plain (same seed)", fontsize=9)
    _shared_legend(figure, panels[0, 0])
    _save(figure, path)


def _common_mean(lines: pd.DataFrame, column: str) -> pd.Series:
    """Mean over seeds where all have the window."""
    by_position = lines.groupby("position")[column]
    n_seeds = lines["seed"].nunique()
    return by_position.mean()[by_position.size() == n_seeds]


def _relative(matrix: np.ndarray) -> np.ndarray:
    """Return couplings over their mean, without the shells outside of all known ones."""
    (known,) = np.nonzero(np.isfinite(np.diagonal(matrix)))
    inner = matrix[known[0] : known[-1] + 1, known[0] : known[-1] + 1]
    return inner / np.nanmean(inner)


def _grid(rows: list[Any], columns: list[Any]) -> list[tuple[tuple[int, Any], tuple[int, Any]]]:
    return [(a, b) for a in enumerate(rows) for b in enumerate(columns)]


def _unique(rows: pd.DataFrame, name: str) -> list[str]:
    return list(dict.fromkeys(rows[name]))


def _once(label: str, row: int) -> str | None:
    return label if row == 0 else None


def _activation(name: str) -> str:
    return {"relu": "ReLU", "gelu": "GELU"}[name]


def _when(when: str) -> str:
    return "initialisation" if when == "start" else when


def _shared_legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False,
        bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip
    figure.tight_layout()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
