"""Fits near b = 1 against the optimum of their definition, and the coverage of their intervals.

``python -m studies.tail [--quick] [--out FOLDER]`` writes ``fits.csv`` (one row a fit),
``replicates.csv`` (one row a replicate that was compared) and ``summary.md``. A run that was ended
goes on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from spectralshell import GRSDTailFitter
from spectralshell.estimators.tail.data import build_problem, collect
from spectralshell.estimators.tail.models import TEMPLATE
from spectralshell.estimators.tail.profile import profile_fit
from spectralshell.estimators.tail.reading import open_table, read_labels, read_layout
from spectralshell.statuses import DEGENERATE_SLOPE, NO_CUTOFF
from studies.tail.data import EDGES, SLOPES, Sample, noise, template
from studies.tail.optimum import Definition

WINDOW = (float(EDGES[0]), float(EDGES[-1]))

# b of a fit and of its definition agree to this.
AGREEMENT = 1e-6

# Words of a status that say that the optimum is not one number.
COMPETING = ("another minimum", "minima compete", "fit not converged")


def fit_row(b: float, seed: int, sample: Sample) -> dict[str, object]:
    """One fit as a user makes it."""
    fitter = GRSDTailFitter(window=WINDOW, edges=EDGES)
    fitter.fit(sample.energies, tau=sample.tau, batch=sample.batch)
    lower, upper = fitter.b_interval_
    status = fitter.status_
    return {
        "b": b,
        "seed": seed,
        "fit": fitter.b_,
        "lower": lower,
        "upper": upper,
        "no_cutoff": NO_CUTOFF in status,
        "degenerate": DEGENERATE_SLOPE in status,
        "competing": any(words in status for words in COMPETING),
        "status": status,
    }


def compared_rows(b: float, seed: int, sample: Sample, n: int | None) -> list[dict[str, object]]:
    """Compare the first n replicates of the template's fit, or all, with their definition."""
    X = sample.energies
    table = open_table(X)
    layout = read_layout(table, X.shape[1], EDGES)
    data = collect(X, read_labels(table, len(X), tau=sample.tau, batch=sample.batch), layout)
    problem = build_problem(data, layout, WINDOW, 4)
    arrays = problem.log_density, problem.weights
    fit = profile_fit(TEMPLATE, *arrays, problem.grid)
    definition = Definition(EDGES[:-1], EDGES[1:])
    rows = []
    for replicate in range(len(fit.theta) if n is None else n):
        minima = definition.minima(*(array[replicate] for array in arrays))
        theta, squares = float(fit.theta[replicate]), float(fit.sse[replicate])
        rows.append(
            {
                "b": b,
                "seed": seed,
                "replicate": replicate,
                "fit": theta,
                "definition": minima[0].b,
                "squares_ratio": squares / minima[0].squares - 1.0,
                "converged": bool(fit.converged[replicate]),
            }
        )
    return rows


def summary(fits: pd.DataFrame, replicates: pd.DataFrame) -> str:
    """One line for each b, as a table in Markdown."""
    agree = (replicates["fit"] - replicates["definition"]).abs() <= AGREEMENT
    lower = replicates["squares_ratio"] < -AGREEMENT
    replicates = replicates.assign(agree=agree, lower=~agree & lower, higher=~agree & ~lower)
    lines = [
        "| b | fits | compared | within 1e-6 | fit lower | fit higher | no cutoff | degenerate | "
        "competing | coverage with cutoff | unflagged | its coverage | median width |",
        "|---" * 13 + "|",
    ]
    for b, rows in fits.groupby("b"):
        met = replicates[replicates["b"] == b]
        covered = (rows["lower"] <= b) & (b <= rows["upper"])
        judged = ~rows["no_cutoff"] & ~rows["degenerate"]
        clean = judged & ~rows["competing"]
        numbers = [f"{met[column].mean():.4f}" for column in ("agree", "lower", "higher")] + [
            f"{rows[column].mean():.3f}" for column in ("no_cutoff", "degenerate", "competing")
        ]
        width = (rows["upper"] - rows["lower"])[judged].median()
        numbers += [
            f"{covered[judged].mean():.3f}",
            f"{clean.mean():.3f}",
            f"{covered[clean].mean():.3f}",
            f"{width:.3f}",
        ]
        lines.append("| " + " | ".join([f"{b:g}", str(len(rows)), str(len(met)), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Do the seeds that are missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/study-tail"))
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, the sample itself compared"
    )
    parser.add_argument("--seeds", type=int, help="seeds of each b, by default 300")
    parser.add_argument("--all-replicates", type=int, help="seeds with every replicate compared")
    parser.add_argument("--samples", type=int, help="seeds whose full sample is compared")
    options = parser.parse_args(arguments)
    usual = (2, 0, 1) if options.quick else (300, 10, 50)
    given = (options.seeds, options.all_replicates, options.samples)
    n_seeds, n_all, n_samples = (
        default if value is None else value for value, default in zip(given, usual, strict=True)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {name: options.out / f"{name}.csv" for name in ("fits", "replicates")}
    done = pd.read_csv(tables["fits"])["seed"].max() + 1 if tables["fits"].exists() else 0
    for seed in range(int(done), n_seeds):
        nodes, factors = noise(seed)
        samples = {b: template(b, nodes, factors) for b in SLOPES}
        rows = [fit_row(b, seed, sample) for b, sample in samples.items()]
        n = None if seed < n_all else int(seed < n_samples)
        compared = [
            row for b, sample in samples.items() for row in compared_rows(b, seed, sample, n)
        ]
        for name, new in (("replicates", compared), ("fits", rows)):
            table = pd.DataFrame(new)
            table.to_csv(tables[name], mode="a", header=not tables[name].exists(), index=False)
    report = summary(*(pd.read_csv(path) for path in tables.values()))
    (options.out / "summary.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
