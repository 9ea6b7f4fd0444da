"""Figures of cost against size, and of the comparisons."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

_AXES = {
    "N": "samples N",
    "parameters": "parameters",
    "steps": "Lanczos steps",
}


def plot_scaling(rows: pd.DataFrame, folder: Path) -> None:
    """One panel for each quantity, with the fitted exponents; writes ``scaling.png``."""
    axes_present = [axis for axis in _AXES if axis in set(rows["axis"])]
    figure, panels = plt.subplots(
        1, len(axes_present), figsize=(4.6 * len(axes_present), 3.8), squeeze=False
    )
    for panel, axis in zip(panels[0], axes_present, strict=True):
        for label, line in rows[rows["axis"] == axis].groupby("line", sort=False):
            exponent = line["exponent"].iloc[0]
            panel.loglog(
                line["x"], line["seconds"], "o-", ms=4, lw=1.2, label=f"{label}: {exponent:.2f}"
            )
        panel.set_xlabel(_AXES[axis])
        panel.set_ylabel("seconds")
        panel.grid(alpha=0.3, which="both", lw=0.4)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.legend(
            fontsize=7, title="fitted exponent", title_fontsize=7, loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
        )  # fmt: skip
    figure.tight_layout()
    figure.savefig(folder / "scaling.png", dpi=110)
    plt.close(figure)


def plot_ratios(rows: pd.DataFrame, folder: Path) -> None:
    """Every contender's time over ours, on a logarithmic axis; writes ``ratios.png``."""
    others = rows[(rows["contender"] != rows.groupby("comparison")["contender"].transform("first"))]
    others = others.dropna(subset=["ratio"]).iloc[::-1]
    figure, panel = plt.subplots(figsize=(8.5, 0.9 + 0.36 * len(others)))
    position = np.arange(len(others))
    panel.barh(position, others["ratio"], color="#4878a8", height=0.6)
    for y, row in zip(position, others.itertuples(), strict=True):
        panel.text(row.ratio * 1.05, y, f"{row.ratio:.3g}", va="center", fontsize=7)
        if not np.isnan(row.asked_ratio):
            panel.plot([row.asked_ratio] * 2, [y - 0.38, y + 0.38], color="#b03030", lw=1.6)
    labels = others["contender"] + "  (" + others["comparison"] + ")"
    panel.set_yticks(position, labels, fontsize=7)
    panel.set_xscale("log")
    panel.axvline(1, color="black", lw=0.8)
    panel.set_xlabel("time over that of spectralshell (red: the ratio aimed at)")
    panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(folder / "ratios.png", dpi=110)
    plt.close(figure)
