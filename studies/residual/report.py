"""Tables, figures and the text that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from studies.residual.design import Design, Folders
from studies.residual.networks import Network
from studies.residual.pieces import cell_path
from studies.residual.plots import plot_couplings, plot_diagonal, plot_differences, plot_windows
from studies.residual.results import (
    coupling_matrix,
    differences,
    draw_columns,
    interval_text,
    mean_interval,
    part_frame,
    statistics_frame,
    step_frame,
    training_frame,
    with_excess,
)
from studies.residual.statistics import within_limits
from studies.residual.verdict import (
    CLAIMS,
    FAILS,
    HOLDS,
    OPEN,
    PARTLY,
    Finding,
    findings,
    findings_frame,
    null_frame,
)

SHOWN = {
    "toeplitz": "Toeplitz residual",
    "toeplitz_centre": "central window",
    "raw_centre": "central window, not normalised",
    "slope": "slope of √K",
    "signed_slope": "signed slope",
    "r2": "R²",
    "ratio": "intra/inter",
    "far_share": "transfer beyond neighbours",
    "transfer": "transfer/dissipation",
    "rotation": "turning modes/dissipation",
}
"""Statistics of the tables, and their headings."""

P_VALUES = {"toeplitz": "p_low", "toeplitz_centre": "p_low", "ratio": "p_high"}
"""Statistics whose p-value the table of cells has, and of which side."""

COMPARED = {
    "toeplitz_centre": "Toeplitz residual,\ncentral window",
    "toeplitz": "Toeplitz residual,\nall shells",
    "excess": "ln of the Toeplitz residual\nover that of permuted entries",
    "slope": "slope of √K",
    "r2": "R² of the diagonal",
    "ratio": "intra/inter",
}
NULLS = {name: SHOWN[name] for name in (*P_VALUES, "raw_centre", "far_share", "transfer")}
"""Statistics that are held against their nulls cell by cell."""


def write_report(design: Design, folders: Folders, docs: Path | None) -> str:
    """Write tables and figures of all cells that are there; return the summary."""
    frame = statistics_frame(design, folders)
    if frame.empty:
        raise ValueError(f"no cell in {folders.cells}; run the stages before the report.")
    tables = {
        "networks": training_frame(design, folders),
        "statistics": frame,
        "steps": step_table(step_frame(design, folders)),
        **derived_tables(frame),
    }
    targets = [folders.out, *([docs] if docs is not None else [])]
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            table.to_csv(target / f"{name}.csv", index=False)
        (target / "summary.rst").write_text(summary(frame))
        _write_figures(design, folders, frame, target)
    return summary(frame)


def derived_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of the page that follow from the frame of statistics."""
    return {
        "cells": cell_table(frame),
        "settings": setting_table(frame),
        "differences": difference_table(frame),
        "verdict": findings_frame(findings(frame)),
        "nulls": null_frame(frame, NULLS),
    }


def cell_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every cell with its statistics, intervals over batches, and p-value."""
    rows = []
    for keys, part in frame.groupby(["residual", "time", "architecture", "activation", "seed"]):
        residual, when, architecture, activation, seed = keys
        entries = part.set_index("statistic")
        row = {
            "residual": residual,
            "time": when,
            "network": f"{architecture}-{activation}-{seed}",
        }
        for name, heading in SHOWN.items():
            entry = entries.loc[name]
            row[heading] = interval_text(entry["value"], entry["lower"], entry["upper"])
            if name in P_VALUES:
                row[f"{heading}: permuted, p"] = (
                    f"{entry['permuted']:.3g}, {entry[P_VALUES[name]]:.2g}"
                )
            drawn = entry[draw_columns(frame)]
            row[f"{heading}: random"] = f"{drawn.min():.3g} … {drawn.max():.3g}"
        for name, heading in (("n_shells", "shells"), ("n_modes", "modes")):
            row[heading] = f"{entries.loc[name, 'value']:.0f}"
        rows.append(row)
    return _in_order(pd.DataFrame(rows))


def setting_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds with their intervals, beside those of the nulls."""
    rows = []
    for keys, part in frame.groupby(["residual", "time", "architecture", "activation"]):
        residual, when, architecture, activation = keys
        row = {"residual": residual, "time": when, "network": f"{architecture}, {activation}"}
        for name, heading in SHOWN.items():
            chosen = part[part["statistic"] == name]
            interval = mean_interval(chosen["value"])
            row[heading] = interval_text(*within_limits(name, *interval))
            nulls = [f"random {chosen[draw_columns(frame)].median(axis=1).mean():.3g}"]
            if chosen["permuted"].notna().any():
                nulls.append(f"permuted {chosen['permuted'].mean():.3g}")
            row[f"{heading}: nulls"] = ", ".join(nulls)
        rows.append(row)
    return _in_order(pd.DataFrame(rows))


def difference_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return residual minus plain, paired by seed, for each setting, and of permuted entries."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    keys = ["residual", "time", "activation"]
    for name, heading in SHOWN.items():
        for setting, part in differences(frame, name).groupby(level=keys, sort=False):
            row = rows.setdefault(setting, dict(zip(keys, setting, strict=True)))
            row[heading] = interval_text(*mean_interval(part["value"]))
            if part["permuted"].notna().any():
                row[f"{heading}: permuted"] = interval_text(*mean_interval(part["permuted"]))
    return _in_order(pd.DataFrame(rows.values()))


def step_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what depends on the size of the step, one column for each size."""
    keys = ["residual", "time", "network", "direction"]
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows.to_dict("records"):
        labels = {key: row[key] for key in keys}
        cells = table.setdefault(tuple(labels.values()), labels)
        shown = (f"{row[name]:.3f}" for name in ("toeplitz", "slope", "ratio"))
        cells[f"step {row['step'] * 100:g} %"] = f"{', '.join(shown)}, {row['transfer']:.3g}"
    return _in_order(pd.DataFrame(table.values()))


def summary(frame: pd.DataFrame) -> str:
    """Return the text of the page: what holds, what does not, what the nulls satisfy too."""
    found = findings(frame)
    cells = len(frame.drop_duplicates(["architecture", "activation", "seed", "time", "residual"]))
    lines = [f"Over {cells} cells, by claim:", ""]
    lines += [_claim_line(claim, [f for f in found if f.claim == claim]) for claim in CLAIMS]
    groups = {
        "These statements hold here:": (HOLDS,),
        "These do not:": (FAILS,),
        "These hold in part, or are undecided:": (PARTLY, OPEN),
    }
    for title, verdicts in groups.items():
        chosen = [one for one in found if one.verdict in verdicts]
        if chosen:
            lines += ["", title, "", *map(_bullet, chosen)]
    alike = [one for one in found if one.null_alike]
    lines += ["", "A null does as well in these, which are therefore no evidence:", ""]
    lines += [f"- {one.statement} (claim {one.claim}: {one.verdict})" for one in alike] or [
        "- none"
    ]
    return "\n".join(lines) + "\n"


def _claim_line(claim: int, found: list[Finding]) -> str:
    """Return what becomes of a claim: evidence is what holds and no null satisfies."""
    counts = {verdict: _count(found, verdict) for verdict in (HOLDS, PARTLY, OPEN, FAILS)}
    evidence = sum(one.verdict == HOLDS and not one.null_alike for one in found)
    if counts[FAILS] == len(found):
        word = "does not hold"
    elif evidence == len(found):
        word = "holds"
    else:
        word = "is supported in part" if evidence else "is not supported"
    return (
        f"- **Claim {claim}, {CLAIMS[claim]}, {word}.** Statements: {len(found)}, of which "
        f"{counts[HOLDS]} hold ({evidence} of them beyond the nulls), {counts[PARTLY]} hold in "
        f"part, {counts[OPEN]} are undecided and {counts[FAILS]} do not hold."
    )


def _bullet(one: Finding) -> str:
    verdict = f"{one.verdict.capitalize()}: {one.measured} ({one.null})."
    return f"- *Claim {one.claim}: {one.statement}.* {verdict}"


def _count(found: list[Finding], verdict: str) -> int:
    return sum(one.verdict == verdict for one in found)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort as the design does: cross-entropy first, and times as they come."""
    if table.empty:
        return table
    by_residual = table["residual"].map({"cross-entropy": 0, "brier": 1})
    # "start" first, then losses falling.
    losses = table["time"].str.extract(r"([\d.]+)", expand=False).astype(float)
    by_time = -losses.fillna(float("inf"))
    order = pd.DataFrame({"a": by_residual, "b": by_time}).sort_values(["a", "b"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def _write_figures(design: Design, folders: Folders, frame: pd.DataFrame, target: Path) -> None:
    windows = part_frame(design, folders, "windows")
    plot_windows(windows, target / "windows.png")
    plot_windows(windows, target / "windows_raw.png", "raw")
    plot_diagonal(part_frame(design, folders, "shells"), target / "diagonal.png")
    plot_couplings(_example_couplings(design, folders), target / "couplings.png")
    plot_differences(with_excess(frame), COMPARED, target / "differences.png")


def _example_couplings(design: Design, folders: Folders) -> dict[tuple[str, str], Any]:
    """Return K under cross-entropy of the first network of each kind."""
    first: dict[str, Network] = {}
    for network in design.networks:
        first.setdefault(f"{network.architecture}, {network.activation}", network)
    ordered = sorted(first.items(), key=lambda item: (item[0].split(", ")[1], item[0]))
    return {
        (kind, when): coupling_matrix(folders, network, when, "cross-entropy")
        for kind, network in ordered
        for when in design.training.times
        if cell_path(folders, network, when, "cross-entropy").exists()
    }
