"""Frames: the contract's columns, closure of rows, statuses, and exact parquet files."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.shells import (
    ShellPartition,
    average_over_batches,
    energy_frame,
    read_frame,
    shell_frame,
    write_frame,
)
from tests.shells.test_measure import CLOSURE, WobblyBounds, measure_of

SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=-4, n_shells=8)
COLUMNS = [
    *("tau", "batch", "shell", "lambda_lo", "lambda_hi", "lambda_mid"),
    *("energy", "energy_lower", "energy_upper", "dissipation", "density", "amplitude_density"),
    *("cumulative", "n_ritz", "resolved", "status"),
]


def random_measure(seed, *, solver="exact", **labels):
    rng = np.random.default_rng(seed)
    nodes, weights = 10.0 ** rng.uniform(-4, 1.1, 30), rng.random(30)
    bounds = None if solver == "exact" else WobblyBounds(nodes, weights, seed, 1e-3)
    return measure_of(nodes, weights, bounds=bounds, solver=solver, **labels)


@given(st.integers(0, 10_000), st.sampled_from(["exact", "lanczos"]))
@settings(deadline=None, max_examples=40)
def test_rows_close_and_agree(seed, solver):
    measure = random_measure(seed, solver=solver)
    wide, tidy = energy_frame([measure], SHELLS), shell_frame([measure], SHELLS)
    assert wide.to_numpy().sum() == pytest.approx(measure.total, rel=CLOSURE)
    assert tidy["energy"].sum() == pytest.approx(measure.total, rel=CLOSURE)
    np.testing.assert_allclose(tidy["energy"][2:], wide.iloc[0, 1:], rtol=CLOSURE)
    assert tidy["energy"][:2].sum() == pytest.approx(wide["null"].iloc[0], rel=CLOSURE)
    np.testing.assert_allclose(tidy["cumulative"], tidy["energy"].cumsum(), rtol=1e-10)
    assert (tidy["energy"] >= 0.0).all()
    assert (tidy["energy_lower"] >= 0.0).all()
    assert tidy["energy"].between(tidy["energy_lower"], tidy["energy_upper"]).all()
    truth = [
        measure.weights[(measure.nodes >= lo) & (measure.nodes < hi)].sum()
        for lo, hi in zip(tidy["lambda_lo"][:-1], tidy["lambda_hi"][:-1], strict=True)
    ]
    rounding = 1e-13  # of sums of thirty weights
    assert (tidy["energy_lower"][:-1] <= np.add(truth, rounding)).all()
    assert (tidy["energy_upper"][:-1] >= np.subtract(truth, rounding)).all()


def test_tidy_columns_units_and_rows():
    tidy = shell_frame([random_measure(0, tau=1.5, batch="a")], SHELLS)
    assert tidy.columns.tolist() == COLUMNS
    assert tidy["shell"].tolist() == ["null", "unresolved", *SHELLS.names]
    shells = tidy.iloc[2:]
    np.testing.assert_array_equal(shells["lambda_lo"], SHELLS.edges[:-1])
    np.testing.assert_array_equal(shells["lambda_mid"], SHELLS.midpoints)
    np.testing.assert_allclose(shells["density"] * SHELLS.widths, shells["energy"], rtol=1e-14)
    np.testing.assert_allclose(shells["amplitude_density"] ** 2 / 2, shells["density"], rtol=1e-14)
    assert tidy["resolved"].dtype == bool
    assert tidy["n_ritz"].dtype == np.int64


def test_wide_frame_contract():
    measures = [random_measure(k, tau=float(k // 2), batch=k % 2, floor=0.1 * k) for k in range(4)]
    wide = energy_frame(measures, SHELLS)
    assert wide.index.names == ["tau", "batch", "lambda_max", "resolution_floor"]
    for level, values in (
        ("lambda_max", [measure.lambda_max for measure in measures]),
        ("resolution_floor", [measure.floor for measure in measures]),
    ):
        assert wide.index.get_level_values(level).tolist() == values
    assert wide.columns.tolist() == ["null", *SHELLS.names]
    assert wide.attrs["resolution_floor"] == measures[3].floor
    assert wide.attrs["lambda_max"] == max(measure.lambda_max for measure in measures)
    assert (wide.dtypes == np.float64).all()


@pytest.mark.parametrize("make", [energy_frame, shell_frame])
def test_rows_do_not_depend_on_other_snapshots(make):
    measures = [random_measure(k, batch=k, solver=s) for k, s in enumerate(["exact", "lanczos"])]
    together = make(measures, SHELLS)
    alone = [make([measure], SHELLS) for measure in measures]
    stacked = pd.concat(alone, ignore_index=make is shell_frame)
    assert together.equals(stacked)


@pytest.mark.parametrize("make", [energy_frame, shell_frame])
def test_names_appear_only_where_one_is_set(make):
    plain, named = random_measure(0, batch=0), random_measure(1, batch=1, name="run")
    frames = make([plain], SHELLS).reset_index(), make([plain, named], SHELLS).reset_index()
    assert "name" not in frames[0]
    assert set(frames[1]["name"]) == {"", "run"}


@pytest.mark.parametrize("make", [energy_frame, shell_frame])
def test_no_or_repeated_snapshots_are_refused(make):
    measure = random_measure(0)
    with pytest.raises(ValueError, match="empty"):
        make([], SHELLS)
    with pytest.raises(ValueError, match="more than once"):
        make([measure, measure], SHELLS)


def rows(measure, shells=SHELLS):
    return shell_frame([measure], shells).set_index("shell")


def test_status_of_shells_below_the_floor():
    frame = rows(random_measure(0, floor=0.3))
    low = frame["lambda_lo"] < 0.3
    assert not frame.loc[low, "resolved"].iloc[1:].any()
    assert frame.loc[~low, "resolved"].all()
    assert frame.loc[SHELLS.names[0], "status"] == "below the resolution floor"
    assert not frame.loc["unresolved", "resolved"]


def test_status_of_overflow_negative_nodes_and_the_measure():
    measure = measure_of([-1e-3, 1e-4, 20.0], [1.0, 2.0, 4.0], status="float32")
    frame = rows(measure)
    assert frame["status"].str.startswith("float32").all()
    assert frame["status"].iloc[-1] == "float32; holds energy above the last edge"
    assert frame["energy"].iloc[-1] == 4.0
    assert frame.loc["null", "status"] == "float32; 1 negative eigenvalues, beyond the noise"
    assert frame.loc["null", ["energy", "n_ritz"]].tolist() == [1.0, 1]
    assert frame.loc["unresolved", ["energy", "n_ritz"]].tolist() == [2.0, 1]


def test_wide_bounds_make_a_shell_unresolved():
    nodes, weights = np.array([0.3, 5.0]), np.array([1.0, 1e-3])
    measure = measure_of(
        nodes, weights, bounds=WobblyBounds(nodes, weights, 0, 1e-2), solver="lanczos", floor=0.01
    )
    frame = rows(measure)
    wide = frame["energy_upper"] - frame["energy_lower"] > frame["energy"]
    assert (frame["resolved"] == ~wide)[2:].all()
    assert frame.loc[wide, "status"][2:].str.contains("bounds wider than the energy").all()
    assert frame.loc["shell[0.25,0.5)", "resolved"]
    assert not frame.loc["shell[4.0,8.0)", "resolved"]
    assert not frame.loc["null", "resolved"]


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("nodes", [[], [0.0], [3.0]])
def test_degenerate_measures_fill_a_single_shell(nodes, noise):
    shells = ShellPartition(q=2.0, lambda_0=2.0, first=0, n_shells=1)
    measure = measure_of(nodes, [0.5] * len(nodes), noise=noise)
    frame = rows(measure, shells)
    assert frame["energy"].sum() == measure.total
    assert frame["energy"].iloc[-1] == (0.5 if nodes == [3.0] else 0.0)
    values = frame.drop(columns="status").drop(index=["null", "unresolved"]).to_numpy(float)
    assert np.isfinite(values).all()


def test_average_takes_the_mean_over_batches_at_each_tau():
    measures = [
        random_measure(k, tau=float(k % 2), batch=k, name="run" if k > 3 else None)
        for k in range(8)
    ]
    wide = energy_frame(measures, SHELLS)
    mean = average_over_batches(wide)
    assert mean.index.tolist() == [(0.0, ""), (1.0, ""), (0.0, "run"), (1.0, "run")]
    expected = wide.iloc[[4, 6]].mean()
    np.testing.assert_allclose(mean.loc[(0.0, "run")], expected, rtol=1e-14)
    assert mean.attrs == wide.attrs
    with pytest.raises(ValueError, match="batch"):
        average_over_batches(mean)


LABELS = {
    "integers": [{"batch": 0}, {"batch": 1}],
    "strings": [{"batch": "a"}, {"batch": "b"}],
    "both": [{"batch": "1"}, {"batch": 1}],
    "names": [{"batch": 0, "name": "run"}, {"batch": 0}],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("make", [energy_frame, shell_frame])
def test_parquet_round_trip_is_exact(make, labels, tmp_path):
    measures = [random_measure(k, tau=0.1 + k / 3, **label) for k, label in enumerate(labels)]
    frame = make(measures, SHELLS)
    before = frame.copy()
    write_frame(frame, tmp_path / "frame.parquet")
    back = read_frame(tmp_path / "frame.parquet")
    pd.testing.assert_frame_equal(back, frame, check_exact=True, check_column_type=True)
    assert back.attrs == frame.attrs == before.attrs
    assert [type(value) for value in back.reset_index()["batch"]] == [
        type(value) for value in frame.reset_index()["batch"]
    ]
    pd.testing.assert_frame_equal(frame, before, check_exact=True)


def test_averaged_frames_and_single_index_levels_are_stored(tmp_path):
    mean = average_over_batches(
        energy_frame([random_measure(0), random_measure(1, batch=1)], SHELLS)
    )
    write_frame(mean, tmp_path / "mean.parquet")
    pd.testing.assert_frame_equal(read_frame(tmp_path / "mean.parquet"), mean, check_exact=True)


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"broken\.parquet"):
        read_frame(path)
    with pytest.raises(FileNotFoundError):
        read_frame(tmp_path / "missing.parquet")
