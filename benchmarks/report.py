"""Tables and figures of what was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.plots import plot_ratios, plot_scaling
from benchmarks.registry import JAX, TORCH
from benchmarks.workers import WorkerError, Workplace

STUDIES = ("choice", "memory", "grid", "scaling")


def environment(workplace: Workplace) -> pd.DataFrame:
    """What the figures depend on beside the code."""
    known = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads of every contender": str(workplace.threads),
        "memory (GB)": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}",
        "system": platform.platform(),
    }
    for name in (TORCH, JAX):
        try:
            versions = workplace.versions(name)
        except WorkerError as error:
            versions = {"not available": str(error)}
        known |= {f"{package} ({name} environment)": v for package, v in versions.items()}
    return pd.DataFrame({"what": known.keys(), "value": known.values()})


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def comparison_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons as text, for people."""
    table = pd.DataFrame(
        {
            "case": rows["title"].where(~rows["comparison"].duplicated(), ""),
            "contender": rows["contender"],
            "seconds [quartiles]": [
                _with_range(*v) for v in _columns(rows, "seconds", "seconds_q25", "seconds_q75")
            ],
            "× ours [quartiles]": [
                _with_range(*v) for v in _columns(rows, "ratio", "ratio_q25", "ratio_q75")
            ],
            "aim": [_asked(value) for value in rows["asked_ratio"]],
            "peak (MB)": [_peak(value) for value in rows["peak_mb"]],
            "difference": [_number(value, 1) for value in rows["difference"]],
            "from": rows["against"].fillna(""),
            "once before (s)": [_once(value) for value in rows["prepare_seconds"]],
            "runs": rows["repeats"].fillna(0).astype(int),
            "note": rows["note"].fillna(""),
        }
    )
    ours = ~rows["comparison"].duplicated()
    table.loc[ours, "contender"] = "**spectralshell:** " + table.loc[ours, "contender"]
    return table


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a study with numbers of three digits."""
    shown = rows.copy()
    for name in shown.columns[[pd.api.types.is_float_dtype(kind) for kind in shown.dtypes]]:
        shown[name] = [_number(value, 3) for value in shown[name]]
    return shown.astype(object).where(shown.notna(), "")


def verdicts(frames: dict[str, pd.DataFrame]) -> list[str]:
    """One line for each aim: reached or not, with the figure."""
    lines = []
    if "comparisons" in frames:
        for row in frames["comparisons"].itertuples():
            if not np.isnan(row.asked_ratio):
                lines.append(_verdict(row.comparison, row.contender, row.ratio, row.asked_ratio))
            if not np.isnan(row.asked_memory_ratio):
                label = f"{row.contender}, peak memory"
                aim = row.asked_memory_ratio
                lines.append(_verdict(row.comparison, label, row.memory_ratio, aim))
    if "choice" in frames:
        right = frames["choice"]["right"]
        lines.append(f"- choice: `auto` took the faster solver in {right.sum()} of {len(right)}")
    if "grid" in frames:
        for row in frames["grid"].itertuples():
            lines.append(f"- grid, {row.solver}, {row.case}: {row.ratio:.3f} × one fit")
    if "scaling" in frames:
        slopes = frames["scaling"].groupby(["axis", "line"], sort=False)["exponent"].first()
        lines += [
            f"- {line}, against {axis}: exponent {b:.3f}" for (axis, line), b in slopes.items()
        ]
    return lines


def _verdict(comparison: str, label: str, ratio: float, aim: float) -> str:
    word = "reached" if ratio >= aim else "**not reached**"
    return f"- {comparison}, {label}: {ratio:.3g} × ours, aim ≥ {aim:.3g}: {word}"


def write_report(out: Path, docs: Path | None, settings: pd.DataFrame) -> str:
    """Write tables and figures of all parts that are there; return the markdown."""
    frames = read_parts(out)
    lines = ["# Benchmarks", ""]
    tables: dict[str, pd.DataFrame] = {}
    if "comparisons" in frames:
        frames["comparisons"].to_csv(out / "benchmarks.csv", index=False)
        tables["comparisons"] = comparison_table(frames["comparisons"])
        plot_ratios(frames["comparisons"], out)
    for name in STUDIES:
        if name in frames:
            tables[name] = study_table(frames[name])
    if "scaling" in frames:
        plot_scaling(frames["scaling"], out)
    for name, table in (tables | {"environment": settings}).items():
        lines += [f"## {name}", "", *_markdown(table), ""]
    lines += ["## aims", "", *verdicts(frames), ""]
    text = "\n".join(lines)
    (out / "benchmarks.md").write_text(text)
    settings.to_csv(out / "environment.csv", index=False)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        for name, table in (tables | {"environment": settings}).items():
            table.to_csv(docs / f"{name}.csv", index=False)
        for figure in ("ratios.png", "scaling.png"):
            if (out / figure).exists():
                (docs / figure).write_bytes((out / figure).read_bytes())
    return text


def write_part(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Store one comparison or study, so that a run can be continued."""
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)


def read_parts(out: Path) -> dict[str, pd.DataFrame]:
    """Return what was stored: ``"comparisons"`` (joined) and the studies by name."""
    from benchmarks.comparisons import comparisons

    folder = out / "parts"
    found = [folder / f"{comparison.name}.csv" for comparison in comparisons()]
    joined = [pd.read_csv(path) for path in found if path.exists()]
    frames = {"comparisons": _complete(pd.concat(joined))} if joined else {}
    for name in STUDIES:
        if (folder / f"{name}.csv").exists():
            frames[name] = pd.read_csv(folder / f"{name}.csv")
    return frames


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    numbers = (
        "seconds", "seconds_q25", "seconds_q75", "ratio", "ratio_q25", "ratio_q75", "repeats",
        "prepare_seconds", "difference", "tolerance", "peak_mb", "memory_ratio",
    )  # fmt: skip
    wanted = list(dict.fromkeys([*rows.columns, *numbers, "against", "note"]))
    rows = rows.reindex(columns=wanted).reset_index(drop=True)
    return rows.astype(dict.fromkeys(numbers, float))


def _markdown(table: pd.DataFrame) -> list[str]:
    head = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return head + ["| " + " | ".join(map(str, row)) + " |" for row in table.to_numpy()]


def _columns(rows: pd.DataFrame, *names: str) -> list[tuple[float, ...]]:
    return list(zip(*(rows[name] for name in names), strict=True))


def _with_range(middle: float, low: float, high: float) -> str:
    if np.isnan(middle):
        return ""
    return f"{_number(middle, 3)} [{_number(low, 3)}, {_number(high, 3)}]"


def _asked(value: float) -> str:
    return "" if np.isnan(value) else f"≥ {value:.3g}"


def _peak(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 20 else "< 20"


def _once(value: float) -> str:
    return _number(value, 2) if value > 1e-3 else ""


def _number(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}g}"
