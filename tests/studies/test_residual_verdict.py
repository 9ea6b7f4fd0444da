"""Verdicts follow from numbers: planted answers are found, and the nulls are judged alike."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from studies.residual.measuring import Coupled
from studies.residual.report import derived_tables, summary
from studies.residual.statistics import STATISTICS, analyse_cell, analyse_step
from studies.residual.verdict import FAILS, HOLDS, OPEN, PARTLY, findings, null_frame

N_MODES, N_RANDOM = 120, 3
# 120 modes in eight shells: residuals of unstructured couplings scatter by about this much.
NOISE_RESIDUAL = 0.2


def planted_frame(difference, random_difference=0.0, permuted_difference=0.0, **values):
    """Return a frame in which residual networks differ from plain ones by a given amount.

    Seeds scatter a little, so that intervals are not points; networks of a seed scatter together.
    """
    rows = []
    cells = product(
        ("residual", "plain"), ("relu", "gelu"), range(3), ("start", "loss 1.5"), ("brier",)
    )
    for kind, activation, seed, when, form in cells:
        scatter = 0.01 * seed
        for name in STATISTICS:
            base = values.get(name, 0.5)
            shift = (kind == "residual") * 1.0
            rows.append(
                {
                    "architecture": kind, "activation": activation, "seed": seed, "time": when,
                    "residual": form, "statistic": name,
                    "value": base + shift * (difference + scatter),
                    "lower": 0.0, "upper": 1.0,
                    "permuted": base + shift * (permuted_difference + scatter - 0.01),
                    "permuted_low": 0.4, "permuted_high": 0.6,
                    "p_low": 0.01, "p_high": 1.0,
                    **{
                        f"draw_{k}": base + shift * (random_difference + scatter - 0.01)
                        for k in range(4)
                    },
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdict_on(frame, words):
    found = [one for one in findings(frame) if words in one.statement]
    assert len(found) == 1
    return found[0]


CENTRE = "the Toeplitz residual of the central window is smaller"


@pytest.mark.parametrize(("difference", "verdict"), [(-0.2, HOLDS), (0.2, FAILS), (-0.01, OPEN)])
def test_contrast_follows_the_interval_of_the_seeds(difference, verdict):
    found = verdict_on(planted_frame(difference), CENTRE)
    assert found.verdict == verdict
    assert found.null_alike is (None if verdict == OPEN else False)


def test_networks_of_a_seed_are_one_observation():
    """What scatters between activations alone leaves no doubt, however large; seeds do."""
    frame, words = planted_frame(0.2), "the diagonal scatters less"
    residual = frame["architecture"] == "residual"
    gelu = np.where(frame["activation"] == "gelu", 1.0, -1.0)
    # R² may be anything; Toeplitz residuals are positive.
    chosen = residual & (frame["statistic"] == "r2")
    frame.loc[chosen, "value"] += 5.0 * gelu[chosen]
    assert verdict_on(frame, words).verdict == HOLDS
    frame.loc[chosen, "value"] += 5.0 * (frame.loc[chosen, "seed"] - 1)
    assert verdict_on(frame, words).verdict == OPEN


@pytest.mark.parametrize("null", ["random_difference", "permuted_difference"])
@pytest.mark.parametrize("difference", [-0.2, 0.2])
def test_nulls_that_differ_as_much_are_named(null, difference):
    frame = planted_frame(difference, **{null: difference})
    found = verdict_on(frame, CENTRE)
    assert (found.verdict, found.null_alike) == (HOLDS if difference < 0 else FAILS, True)
    assert found.statement in summary(frame).split("no evidence")[1]


def test_excess_takes_off_what_permutations_have():
    words = "the Toeplitz residual of all shells over that of permuted"
    frame = planted_frame(0.2)
    assert verdict_on(frame, words).verdict == FAILS
    frame["permuted"] = frame["value"] * frame["seed"].map({0: 0.99, 1: 1.0, 2: 1.01})
    assert verdict_on(frame, words).verdict == OPEN


@pytest.mark.parametrize(("transfer", "verdict"), [(0.01, PARTLY), (-0.3, HOLDS), (0.5, FAILS)])
def test_small_parts_are_counted_over_settings(transfer, verdict):
    # Plain networks have the base value, residual ones 0.2 more.
    found = verdict_on(planted_frame(0.2, transfer=transfer), "the energy that changes shells")
    assert found.verdict == verdict
    # Random directions have no difference: they meet the statement more often.
    assert found.null_alike is (None if verdict == FAILS else True)


def test_null_that_meets_a_statement_less_often_is_not_alike():
    frame = planted_frame(0.6, random_difference=0.1, permuted_difference=0.1, ratio=0.5)
    found = verdict_on(frame, "couplings within shells exceed")
    assert (found.verdict, found.null_alike) == (PARTLY, False)


def test_cells_outside_of_the_nulls_are_counted_on_both_sides():
    frame = planted_frame(-0.2, random_difference=0.1)
    table = null_frame(frame, {"toeplitz": "T"}).set_index("architecture")
    assert table.loc["residual", "below all random"] == "12"
    assert table.loc["residual", "above all random"] == "0"
    assert table.loc["plain", "below all random"] == "0"
    assert table.loc["plain", ["smaller than permuted", "larger than permuted"]].tolist() == [
        "12", "0",
    ]  # fmt: skip


def test_unknown_values_and_missing_partners_leave_statements_undecided():
    frame = planted_frame(-0.2)
    plain = frame["architecture"] == "plain"
    assert verdict_on(frame[~plain], CENTRE).verdict == OPEN
    frame.loc[frame["statistic"] == "transfer", "value"] = np.nan
    assert verdict_on(frame, "the energy that changes shells").verdict == OPEN


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
    for name in ("toeplitz", "toeplitz_centre", "raw_centre", "ratio", "slope", "far_share"):
        assert unstructured[name]["p_low"] > 0.01
        assert unstructured[name]["p_high"] > 0.01
        assert len(unstructured[name]["random"]) == N_RANDOM


def test_shares_of_the_flux_add_up(unstructured):
    near, far = unstructured["near_share"]["value"], unstructured["far_share"]["value"]
    assert near + far == pytest.approx(1.0)
    assert unstructured["rotation"]["value"] > 0


def test_moving_eigenvalues_alone_turn_no_modes():
    """dM = aM: energy crosses edges, but no mode of one shell turns into another."""
    rates = np.geomspace(1.0, 250.0, N_MODES)
    g = np.random.default_rng(0).standard_normal(N_MODES)
    batch = Coupled(
        eigenvalues=rates, amplitudes=g, flow=0.3 * np.diag(rates), random=np.empty((0, 1, 1)),
        error_rates=-rates * g, floor=0.5, direction_norm=1.0,
    )  # fmt: skip
    found = analyse_step(batch)
    assert found["transfer"] > 1e-3
    assert found["rotation"] == 0.0
    assert found["slope"] == pytest.approx(1.0)
    assert found["square_slope"] == pytest.approx(2.0)
