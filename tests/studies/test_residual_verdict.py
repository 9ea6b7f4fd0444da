"""Verdicts follow from numbers: planted answers are found, and the nulls are judged alike."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from studies.residual.measuring import Coupled
from studies.residual.report import derived_tables, summary
from studies.residual.statistics import STATISTICS, analyse_cell
from studies.residual.verdict import FAILS, HOLDS, OPEN, PARTLY, findings

N_MODES, N_RANDOM = 120, 3
# 120 modes in eight shells: residuals of unstructured couplings scatter by about this much.
NOISE_RESIDUAL = 0.2


def planted_frame(difference, random_difference=0.0, **values):
    """Return a frame in which residual networks differ from plain ones by a given amount.

    Pairs of networks scatter a little, so that intervals are not points.
    """
    rows = []
    cells = product(
        ("residual", "plain"), ("relu", "gelu"), range(3), ("start", "loss 1.5"), ("brier",)
    )
    for kind, activation, seed, when, form in cells:
        scatter = 0.01 * (seed + 3 * (activation == "gelu"))
        for name in STATISTICS:
            base = values.get(name, 0.5)
            shift = (kind == "residual") * 1.0
            rows.append(
                {
                    "architecture": kind, "activation": activation, "seed": seed, "time": when,
                    "residual": form, "statistic": name,
                    "value": base + shift * (difference + scatter),
                    "lower": 0.0, "upper": 1.0,
                    "random": base + shift * (random_difference + scatter - 0.025),
                    "random_low": 0.4, "random_high": 0.6,
                    "permuted": base, "permuted_low": 0.4, "permuted_high": 0.6,
                    "p_low": 0.01, "p_high": 1.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdict_on(frame, words):
    found = [one for one in findings(frame) if words in one.statement]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("difference", "verdict"), [(-0.2, HOLDS), (0.2, FAILS), (-0.025, OPEN)])
def test_contrast_follows_the_interval_of_the_pairs(difference, verdict):
    found = verdict_on(planted_frame(difference), "central window is smaller")
    assert found.verdict == verdict
    assert not found.null_satisfies


def test_random_directions_that_differ_as_much_are_named():
    frame = planted_frame(-0.2, random_difference=-0.2)
    found = verdict_on(frame, "central window is smaller")
    assert (found.verdict, found.null_satisfies) == (HOLDS, True)
    assert found.statement in summary(frame).split("they are no evidence")[1]


@pytest.mark.parametrize(("transfer", "verdict"), [(0.01, PARTLY), (-0.3, HOLDS), (0.5, FAILS)])
def test_small_parts_are_counted_over_settings(transfer, verdict):
    # Plain networks have the base value, residual ones 0.2 more.
    assert verdict_on(planted_frame(0.2, transfer=transfer), "changes shells").verdict == verdict


def test_beyond_nulls_needs_both():
    frame = planted_frame(-0.2)  # 0.3 is below the random directions' 0.4, and p is small
    assert verdict_on(frame, "closer to Toeplitz than with permuted").verdict == HOLDS
    frame["p_low"] = 0.5
    assert verdict_on(frame, "closer to Toeplitz than with permuted").verdict == FAILS


def test_every_statement_is_in_the_summary():
    frame = planted_frame(-0.2)
    text = summary(frame)
    assert all(one.statement in text for one in findings(frame))
    tables = derived_tables(frame.assign(time=frame["time"]))
    assert len(tables["verdict"]) == len(findings(frame))
    assert tables["cells"]["time"].iloc[0] == "start"


def noise(rates, rng):
    drawn = rng.standard_normal((rates.size, rates.size))
    return np.sqrt(np.outer(rates, rates)) * (drawn + drawn.T)


@pytest.fixture(scope="module")
def unstructured():
    """Statistics of a kernel that moves at random, in proportion to its own size."""
    rng = np.random.default_rng(0)
    rates = np.geomspace(1.0, 250.0, N_MODES)
    batches = [
        Coupled(
            eigenvalues=rates,
            amplitudes=rng.standard_normal(N_MODES),
            flow=noise(rates, rng),
            random=np.stack([noise(rates, rng) for _ in range(N_RANDOM)]),
            error_rates=rng.standard_normal(N_MODES),
            floor=0.5,
            direction_norm=1.0,
        )
        for _ in range(2)
    ]
    return analyse_cell(batches)["statistics"]


def test_unstructured_motion_is_toeplitz_of_slope_one(unstructured):
    """The statements that the paper takes as evidence hold without any structure."""
    assert unstructured["toeplitz"]["value"] < NOISE_RESIDUAL
    assert unstructured["toeplitz_raw"]["value"] > 0.8
    assert unstructured["slope"]["value"] == pytest.approx(1.0, abs=0.1)
    assert unstructured["r2"]["value"] > 0.95
    low, middle, high = unstructured["slope"]["permuted"]
    assert low < middle < high
    assert middle == pytest.approx(1.0, abs=0.1)


def test_unstructured_motion_is_not_beyond_its_nulls(unstructured):
    for name in ("toeplitz", "ratio", "slope"):
        assert unstructured[name]["p_low"] > 0.01
        assert unstructured[name]["p_high"] > 0.01
        assert len(unstructured[name]["random"]) == N_RANDOM


def test_shares_of_the_flux_add_up(unstructured):
    near, far = unstructured["near_share"]["value"], unstructured["far_share"]["value"]
    assert near + far == pytest.approx(1.0)
    assert unstructured["transfer"]["value"] > 0
