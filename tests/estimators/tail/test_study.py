"""Bias and coverage of the tail fit on synthetic spectra with correlated batches.

Design: ten shells of ratio 2 over (1e-3, 1.0), nine of them whole in the window; six taus, 12
batches; log-normal noise of standard deviation 0.2 in ln ε, with Gaussian correlation of length 0.7
in ln λ (a shell) and of 0.5 between the taus of a batch. Frontiers, where there are any, lie from
25 % to 85 % of the window in ln λ. Every case sees the same noise.
"""

import numpy as np
import pandas as pd
import pytest

from spectralshell.datasets import make_grsd_spectra, make_lazy_spectra
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from spectralshell.shells import energy_frame
from tests.estimators.tail.energies import SHELLS, WINDOW

CASES = (
    [("template", b) for b in (0.7, 1.3, 1.6, 2.0, 3.0)]
    + [("pure", b) for b in (0.7, 1.0, 1.3, 1.6, 2.0, 3.0)]
    + [("frozen", s) for s in (0.5, 1.0, 1.5, 2.0, 3.0)]
)
N_STUDY, N_SHORT = 300, 10
BIAS, COVERAGE = 0.02, (0.87, 0.99)
FROZEN_SLOPE = 0.05


def measures(kind, slope, seed):
    options = {"random_state": seed, "nodes_per_log": 250}
    if kind == "frozen":
        return make_lazy_spectra(slope, **options)
    return make_grsd_spectra(slope, K=0 if kind == "pure" else None, **options)


def study(kind, slope, n_seeds):
    rows = []
    for seed in range(n_seeds):
        X = energy_frame(measures(kind, slope, seed), SHELLS)
        fitter = GRSDTailFitter(window=WINDOW).fit(X)
        lower, upper = fitter.b_interval_
        table = fitter.comparison_.set_index("model")
        ranks = table["rank"]
        rows.append(
            {
                "error": fitter.b_ - slope,
                "covered": lower <= slope <= upper,
                "template": ranks["power law, template cutoff"],
                "frozen": ranks["power law, exp(-kappa lambda)"],
                "others": ranks[["power law", "lognormal"]].min(),
                "frozen error": table["slope"]["power law, exp(-kappa lambda)"] - slope,
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slope"), [case for case in CASES if case[0] != "frozen"])
def test_bias_and_coverage(kind, slope):
    result = study(kind, slope, N_STUDY)
    assert abs(result["error"].mean()) <= BIAS
    assert COVERAGE[0] <= result["covered"].mean() <= COVERAGE[1]


def check_frozen(slope, result):
    assert (result["frozen"] == 1).all()
    assert (result["others"] > 1).all()
    assert ((result["template"] == 1) == (slope == 2.0)).mean() >= COVERAGE[0]
    assert abs(result["frozen error"].mean()) <= FROZEN_SLOPE


@pytest.mark.slow
@pytest.mark.parametrize("slope", [s for kind, s in CASES if kind == "frozen"])
def test_frozen_kernels_rank_first(slope):
    check_frozen(slope, study("frozen", slope, N_STUDY))


@pytest.mark.parametrize(("kind", "slope"), [("template", 1.6), ("template", 3.0), ("pure", 1.0)])
def test_bias_and_coverage_in_short(kind, slope):
    """Limits that a fit within those of the study exceeds once in a thousand times."""
    result = study(kind, slope, N_SHORT)
    spread = result["error"].std(ddof=1) / np.sqrt(N_SHORT)
    assert abs(result["error"].mean()) <= BIAS + 3.5 * spread
    assert result["covered"].sum() >= 5  # P(X < 5) = 5e-4 at a coverage of 0.87


@pytest.mark.parametrize("slope", [1.5, 2.0])
def test_frozen_kernels_rank_first_in_short(slope):
    check_frozen(slope, study("frozen", slope, 3))
