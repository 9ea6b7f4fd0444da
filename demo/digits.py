"""From a small network that learns the digits to shell energies and a tail exponent.

Run by ``make demo``; frames and figures are written to ``out/``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline

from spectralshell import (
    ExponentDisplay,
    GRSDTailFitter,
    ShellEnergyDisplay,
    ShellEnergyEstimator,
    TailFitDisplay,
    cross_validate_exponent,
    largest_q_within_one_se,
)
from spectralshell.datasets import load_digits_trajectory
from spectralshell.shells import mean_measure, parse_shell_name, write_frame
from spectralshell.warning_categories import ResolutionWarning

OUT = Path("out")
Q_CANDIDATES = (1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
Q_FOR_EXPONENT = (1.25, 1.4, 1.5, 1.75, 2.0, 2.5)
# Before τ = 5 a gap separates a few large eigenvalues from the others: there is no tail to fit.
TAIL_STARTS = 5.0
# From above the resolution floor to below the last, thinly populated shells.
WINDOW = (0.03, 8.0)
console = Console(width=118, markup=False, highlight=False)


def main() -> None:
    """Run the whole path and say what came out."""
    OUT.mkdir(exist_ok=True)
    console.rule("1. Train a perceptron on the digits, keep 6 points of training × 7 probe batches")
    X = load_digits_trajectory(n_snapshots=6, n_batches=7, batch_size=48, loss="mse")
    console.print(f"{len(X)} snapshots, τ = {sorted({round(s.tau, 4) for s in X})}")

    console.rule("2. Shell energies over the whole training")
    estimator = ShellEnergyEstimator(q=1.5, residual="mse", verbose=1).fit(X)
    show_shells(estimator, X)

    console.rule(f"3. The tail exponent after τ = {TAIL_STARTS:g}, window λ in {WINDOW}")
    late = [snapshot for snapshot in X if snapshot.tau > TAIL_STARTS]
    groups = [snapshot.batch for snapshot in late]
    pipe = make_pipeline(clone(estimator).set_params(verbose=0), GRSDTailFitter(window=WINDOW)).fit(
        late
    )
    show_tail(pipe[-1])

    console.rule("4. The exponent, cross-validated over probe batches")
    folds = cross_validate_exponent(pipe, late, groups=groups)
    show_frame(folds)

    console.rule("5. The shell ratio q, and the exponent against it")
    search = choose_q(pipe[0], late, groups)
    by_q = exponent_against_q(pipe, late)

    console.rule("6. Measured loss beside the loss that a frozen kernel predicts")
    losses = compare_with_lazy(estimator, X)

    displays = {
        "shells": ShellEnergyDisplay.from_estimator(estimator),
        "tail_fit": TailFitDisplay.from_estimator(pipe, late),
        "exponent_by_fold": ExponentDisplay.from_frame(folds, reference=pipe[-1]),
        "exponent_by_q": ExponentDisplay.from_frame(by_q, reference=pipe[-1]),
    }
    frames = {
        "shells": estimator.shells_,
        "energies": estimator.transform(X),
        "tail": pipe[-1].frame_,
        "comparison": pipe[-1].comparison_,
        "folds": folds,
        "exponent_by_q": by_q,
        "losses": losses,
    }
    write_results(frames, displays)
    console.rule("What this shows, and what it does not")
    console.print(conclusion(pipe[-1], folds, search, by_q, losses))


def show_shells(estimator: ShellEnergyEstimator, X: list) -> None:
    """Print how the mean energies move over training."""
    energies = estimator.transform(X).groupby("tau").mean()
    console.print(
        f"solver {estimator.solver_}, {estimator.n_matvecs_} products, "
        f"{estimator.n_shells_} shells, resolution floor {estimator.resolution_floor_:.2e}, "
        f"largest eigenvalue {estimator.lambda_max_:.3g} (1/τ)"
    )
    shells = energies.drop(columns="null")
    show_frame(
        pd.DataFrame(
            {
                "total energy": energies.sum(axis=1),
                "null": energies["null"],
                "largest shell": [
                    "[{:.3g}, {:.3g})".format(*parse_shell_name(n)) for n in shells.idxmax(axis=1)
                ],
                "its energy": shells.max(axis=1),
            }
        ).reset_index()
    )


def show_tail(fitter: GRSDTailFitter) -> None:
    """Print the tail fit, its status and what it was compared with."""
    low, high = fitter.b_interval_
    console.print(
        f"tail slope b = {fitter.b_:.3f}, {fitter.confidence:.0%} interval "
        f"[{low:.3f}, {high:.3f}], window λ in [{fitter.window_[0]:.3g}, {fitter.window_[1]:.3g}]"
    )
    console.print(f"status: {fitter.status_}")
    falsifier = fitter.falsifier_
    console.print(
        f"cutoff power p fitted freely: {falsifier['power']:.3g} "
        f"[{falsifier['lower']:.3g}, {falsifier['upper']:.3g}] ({falsifier['status']})"
    )
    show_frame(fitter.frame_)
    console.print("\nThe same tail under other models (lower AIC is better):")
    show_frame(fitter.comparison_)


def choose_q(estimator: ShellEnergyEstimator, X: list, groups: list[int]) -> GridSearchCV:
    """Search q by held-out likelihood; no product with M is done again."""
    candidate = clone(estimator).set_params(verbose=0)
    search = GridSearchCV(
        candidate, {"q": Q_CANDIDATES}, cv=GroupKFold(4), refit=largest_q_within_one_se
    )
    search.fit(X, groups=groups)
    results = search.cv_results_
    splits = [results[f"split{fold}_test_score"] for fold in range(search.n_splits_)]
    scores = pd.DataFrame(
        {
            "q": Q_CANDIDATES,
            "score": results["mean_test_score"],
            "standard error": np.std(splits, axis=0, ddof=1) / np.sqrt(len(splits)),
        }
    )
    show_frame(scores)
    console.print(f"largest q within one standard error of the best: {search.best_params_['q']}")
    return search


def exponent_against_q(pipe: Pipeline, X: list) -> pd.DataFrame:
    """Fit the tail for several q, on one window."""
    rows = []
    for q in Q_FOR_EXPONENT:
        candidate = clone(pipe)
        candidate[0].set_params(q=q, verbose=0)
        candidate[-1].set_params(window=pipe[-1].window_)
        fitter = candidate.fit(X)[-1]
        low, high = fitter.b_interval_
        rows.append({"q": q, "b": fitter.b_, "b_lower": low, "b_upper": high})
    frame = pd.DataFrame(rows)
    console.print("\nThe exponent on one window, against q:")
    show_frame(frame)
    console.print(f"spread over q: {np.ptp(frame['b']):.3f}")
    return frame


def compare_with_lazy(estimator: ShellEnergyEstimator, X: list) -> pd.DataFrame:
    """Loss on the probe batches beside the decay under the kernel of initialisation."""
    measures = estimator.spectral_measures(X)
    times = sorted({m.tau for m in measures})
    means = {tau: mean_measure([m for m in measures if m.tau == tau]) for tau in times}
    start = means[times[0]]
    frame = pd.DataFrame(
        {
            "tau": times,
            "measured loss": [means[tau].total for tau in times],
            "frozen kernel": start.lazy_decay(np.array(times) - times[0]),
            "largest eigenvalue": [means[tau].lambda_max for tau in times],
        }
    )
    show_frame(frame)
    return frame


def write_results(frames: dict[str, pd.DataFrame], displays: dict[str, Any]) -> None:
    """Write frames as parquet and figures as PNG."""
    for name, frame in frames.items():
        write_frame(frame, OUT / f"{name}.parquet")
    for name, display in displays.items():
        display.plot().figure_.savefig(OUT / f"{name}.png", dpi=150, bbox_inches="tight")
    names = ", ".join([*(f"{n}.parquet" for n in frames), *(f"{n}.png" for n in displays)])
    console.print(f"\nwritten to {OUT}/: {names}")


def conclusion(
    fitter: GRSDTailFitter,
    folds: pd.DataFrame,
    search: GridSearchCV,
    by_q: pd.DataFrame,
    losses: pd.DataFrame,
) -> str:
    """Say in words what the figures above mean."""
    low, high = fitter.b_interval_
    measured, frozen = losses["measured loss"].iloc[-1], losses["frozen kernel"].iloc[-1]
    growth = losses["largest eigenvalue"].iloc[-1] / losses["largest eigenvalue"].iloc[0]
    ranked = fitter.comparison_.sort_values("aic")
    tied = ranked.loc[ranked["rank"] == 1, "model"]
    paragraphs = (
        f"Late in training, for rates {fitter.window_[0]:g} to {fitter.window_[1]:g}, the error "
        f"energy per unit rate falls off with a tail slope b = {fitter.b_:.2f}, 95 % interval over "
        f"probe batches {low:.2f} to {high:.2f}. Leaving out one batch gives "
        f"{folds['b'].min():.2f} to {folds['b'].max():.2f}; other shell ratios give "
        f"{by_q['b'].min():.2f} to {by_q['b'].max():.2f}. The fit says: {fitter.status_}.",
        f"Models that the window does not tell from the best by AIC: {', '.join(tied)}. A straight "
        "line on log axes is not evidence for transport between shells. Energies that start as "
        "λ^−s keep the slope s under any such law, and a frozen kernel on λ^−2 data gives the "
        "b = 2 template exactly.",
        f"The kernel is not frozen: its largest eigenvalue changed by a factor {growth:.1f}. The "
        f"network ends at a loss of {measured:.3g} on the probe batches. A kernel frozen at "
        f"initialisation and trained on each batch alone would end at {frozen:.3g}; the network "
        "was trained on all images, so the two are no race.",
        f"q = {search.best_params_['q']:g} is the coarsest shell ratio within one standard error "
        "of the best score on held-out batches: they do not ask for fine shells. The spread of b "
        "over q is the better guide to how much the shells matter.",
        "This is one small network, one data set and one seed. The interval is over probe batches "
        "at fixed training and in a window chosen by eye. The exact solver knows every eigenvalue, "
        'so no energy lies below the resolution floor (column "null").',
    )
    return "\n".join(f"- {paragraph}" for paragraph in paragraphs)


def show_frame(frame: pd.DataFrame) -> None:
    """Print a frame as a table with four significant digits."""
    table = Table(show_edge=False, pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


if __name__ == "__main__":
    with warnings.catch_warnings():
        # The energy below the floor is printed in the column "null".
        warnings.simplefilter("ignore", ResolutionWarning)
        main()
