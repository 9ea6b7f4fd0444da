"""One table of energies through every carrier: the same b, or a refusal that says what to do."""

import io
import pickle
from dataclasses import replace
from decimal import Decimal
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from spectralshell import cross_validate_exponent
from spectralshell.datasets import make_grsd_spectra
from spectralshell.displays import ShellEnergyDisplay, TailFitDisplay
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from spectralshell.shells import ShellPartition, energy_frame
from tests.estimators.tail.energies import SHELLS, WINDOW, exact_energies, frame

# What a carrier may change: nothing but the order of sums.
SAME = 1e-12

# 32-bit energies are off by up to 6e-8 each.
SINGLE = 1e-6

LABELS = ["tau", "batch", "name", "lambda_max", "resolution_floor"]


def table():
    """Three taus, four batches, unequal floors: the last tau has none of the two lowest shells."""
    X = frame("template", 1.6, n_batches=4, taus=(1.0, 3.0, 9.0), frontiers=(0.3, 0.1, 0.03))
    labels = X.index.to_frame(index=False).assign(name="run")
    labels.loc[labels["tau"] == 9.0, "resolution_floor"] = 4e-3
    return X.set_index(pd.MultiIndex.from_frame(labels[LABELS]))


@pytest.fixture(scope="module")
def X():
    return table()


@pytest.fixture(scope="module")
def expected(X):
    return GRSDTailFitter().fit(X)


def through_csv(X, *, index=True, **options):
    return pd.read_csv(io.StringIO(X.to_csv(index=index)), **options)


def through_file(X, kind):
    file = io.BytesIO()
    getattr(X, f"to_{kind}")(file)
    return getattr(pd, f"read_{kind}")(file)


def polars(X):
    return pytest.importorskip("polars", reason="polars is not installed").from_pandas(X)


CARRIERS = {
    "pickle": lambda X: pickle.loads(pickle.dumps(X)),
    "csv": through_csv,
    "csv, first levels": lambda X: through_csv(X, index_col=[0, 1]),
    "csv, every level": lambda X: through_csv(X, index_col=list(range(5))),
    "csv, without index": lambda X: through_csv(X.reset_index(), index=False),
    "parquet": lambda X: through_file(X, "parquet"),
    "feather": lambda X: through_file(X.reset_index(), "feather"),
    "reset_index": lambda X: X.reset_index(),
    "Arrow": pa.Table.from_pandas,
    "Arrow, plain": lambda X: pa.table(dict(X.reset_index().items())),
    "polars": lambda X: polars(X.reset_index()),
    "records": lambda X: X.to_records(),
    "groupby": lambda X: X.groupby(level=LABELS).mean(),
    "groupby, sum": lambda X: X.groupby(LABELS, sort=False).sum(),
    "shuffled": lambda X: X.sample(frac=1.0, random_state=0),
    "levels in another order": lambda X: X.reorder_levels(LABELS[::-1]),
    "without attrs": lambda X: pd.concat([X.iloc[:5], X.iloc[5:] * 1.0]),
    "runs put together": lambda X: pd.concat([group for _, group in X.groupby("tau")]),
    "labels of categories": lambda X: X.reset_index().astype({"batch": "category"}),
    "objects": lambda X: X.astype(object),
    "decimals": lambda X: X.map(Decimal),
    "text": lambda X: X.astype(str),
    "nullable": lambda X: X.convert_dtypes(),
    "without null": lambda X: X.drop(columns="null"),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_carrier_gives_the_same_slope(X, expected, carrier):
    fitter = GRSDTailFitter().fit(CARRIERS[carrier](X))
    assert fitter.b_ == pytest.approx(expected.b_, abs=SAME)
    assert fitter.b_interval_ == pytest.approx(expected.b_interval_, abs=SAME)
    assert fitter.window_ == expected.window_
    assert fitter.status_ == expected.status_


@pytest.mark.parametrize("carrier", ["csv", "feather", "Arrow, plain"])
def test_rows_and_scores_survive_a_carrier(X, expected, carrier):
    carried = CARRIERS[carrier](X)
    np.testing.assert_allclose(expected.transform(carried), expected.transform(X), rtol=SAME)
    scores = expected.score_samples(carried)
    np.testing.assert_allclose(scores, expected.score_samples(X), rtol=SAME)
    folds = [cross_validate_exponent(GRSDTailFitter(), rows) for rows in (X, carried)]
    pd.testing.assert_frame_equal(*folds)


def test_displays_take_what_the_fit_takes(X, expected):
    for carried in (through_csv(X), pa.Table.from_pandas(X)):
        drawn, wanted = (ShellEnergyDisplay.from_frame(rows) for rows in (carried, X))
        pd.testing.assert_frame_equal(drawn.frame(), wanted.frame())
        assert drawn.resolution_floor == wanted.resolution_floor == 4e-3
        drawn, wanted = (TailFitDisplay.from_estimator(expected, rows) for rows in (carried, X))
        pd.testing.assert_frame_equal(drawn.frame(), wanted.frame())


@pytest.mark.parametrize("carried", ["pandas", "columns"])
def test_rows_of_skipped_snapshots_are_left_out_and_counted(X, expected, carried):
    rows = pd.concat([X.iloc[:1] * np.nan, X, X.iloc[:2] * np.nan])
    index = rows.index.to_frame(index=False)
    index.loc[[0, len(X) + 1, len(X) + 2], ["lambda_max", "resolution_floor"]] = np.nan
    index.loc[[0, len(X) + 1, len(X) + 2], "batch"] = [90, 91, 92]
    rows.index = pd.MultiIndex.from_frame(index)
    rows = rows if carried == "pandas" else rows.reset_index()
    fitter = GRSDTailFitter().fit(rows)
    assert (fitter.b_, fitter.b_interval_) == (expected.b_, expected.b_interval_)
    assert fitter.status_.endswith(f"3 of {len(X) + 3} snapshots skipped")
    out = fitter.transform(rows)
    assert out.index.equals(rows.index)
    assert out.iloc[[0, -2, -1]].isna().all(axis=None)
    np.testing.assert_array_equal(out.iloc[1:-2], expected.transform(X))
    scores = fitter.score_samples(rows)
    np.testing.assert_array_equal(scores[1:-2], expected.score_samples(X))
    assert np.isnan(scores[[0, -2, -1]]).all()
    assert fitter.transform(rows.iloc[-2:]).isna().all(axis=None)
    for make in (ShellEnergyDisplay.from_frame, partial(TailFitDisplay.from_estimator, fitter)):
        pd.testing.assert_frame_equal(make(rows).frame(), make(X).frame())


def test_single_precision_is_as_good_as_its_digits(X, expected):
    fitter = GRSDTailFitter().fit(X.reset_index().astype(dict.fromkeys(X.columns, "float32")))
    assert fitter.b_ == pytest.approx(expected.b_, abs=SINGLE)


REFUSED = {
    "index not written": (lambda X: through_csv(X, index=False), "has no tau.*reset_index"),
    "index thrown away": (lambda X: X.reset_index(drop=True), "has no tau"),
    "polars without index": (polars, "has no tau.*polars output"),
    "polars, not computed": (lambda X: polars(X.reset_index()).lazy(), "pass X.collect"),
    "mean over batches": (lambda X: X.groupby(["tau", "name"]).mean(), "has no batch"),
    "mean over batches, labels too": (
        lambda X: X.reset_index().drop(columns="name").groupby("tau").mean(),
        "batch=.*decimal point.*before it was averaged",
    ),
    "mean over times": (lambda X: X.groupby("batch").mean(), "has no tau"),
    "index written twice": (lambda X: through_csv(X.reset_index()), "Unnamed: 0.*index_col"),
    "label twice": (lambda X: X.assign(tau=X.index.get_level_values("tau")), "more than once"),
    "renamed level": (lambda X: X.rename_axis(index={"tau": "time"}), "level 'time'"),
    "level without name": (lambda X: pd.concat({"a": X, "b": 2 * X}), "level None.*call it name"),
    "level of the user": (
        lambda X: pd.concat({1: X, 2: 2 * X}, names=["seed"]),
        "level 'seed'.*call it name",
    ),
    "column of the user": (lambda X: X.assign(lr=0.1), "column 'lr'.*drop it"),
    "melted": (lambda X: X.reset_index(drop=True).melt(), "column 'variable'"),
    "turned": (lambda X: X.T, "pass X.T"),
    "turned with its labels": (lambda X: X.reset_index().T, "pass X.T"),
    "columns of two levels": (lambda X: pd.concat({"run": X}, axis=1), "columns of 2 levels"),
    "sorted as text, null last": (lambda X: X[[*X.columns[1:], "null"]], "null"),
    "shell dropped": (lambda X: X.drop(columns=X.columns[4]), "contiguous"),
    "shells of another run": (
        lambda X: pd.concat([X.iloc[:5, :-2], X.iloc[5:]]),
        "NaN in column .* one fitted ShellEnergyEstimator",
    ),
    "all snapshots skipped": (lambda X: X * np.nan, "all snapshots were skipped"),
    "floor missing": (lambda X: X.droplevel("resolution_floor").pipe(forget), "has no resolution_"),
    "floor of some": (
        lambda X: pd.concat([X.droplevel("resolution_floor").reset_index(), X.reset_index()]),
        "resolution_floor=nan in row 0",
    ),
    "complex": (lambda X: X.astype(complex), "complex"),
    "words": (lambda X: X.astype(str).replace("0.0", "none"), "column 'null'"),
    "name NA read as missing": (
        lambda X: through_csv(X.rename(index={"run": "NA"}, level="name")),
        "keep_default_na=False",
    ),
    "a dictionary": (lambda X: X.to_dict("list"), "pandas.DataFrame"),
}


def forget(X):
    X.attrs = {}
    return X


@pytest.mark.parametrize("carrier", REFUSED)
def test_what_lost_its_meaning_is_refused_with_the_remedy(X, carrier):
    carry, message = REFUSED[carrier]
    fitter = GRSDTailFitter()
    with pytest.raises((ValueError, TypeError), match=message):
        fitter.fit(carry(X))
    assert not hasattr(fitter, "n_features_in_")


def test_labels_that_are_passed_override_those_of_the_frame(X, expected):
    lost = forget(X.reset_index(drop=True))
    told = {label: X.index.get_level_values(label) for label in ("tau", "batch", "name")}
    fitter = GRSDTailFitter(window=WINDOW, floor=4e-3).fit(lost, **told)
    assert fitter.b_ == GRSDTailFitter(window=WINDOW, floor=4e-3).fit(X).b_
    assert fitter.frame_["name"].unique().tolist() == ["run"]
    later = GRSDTailFitter().fit(X, tau=told["tau"] + 1.0, name=["other"] * len(X))
    assert later.frame_["tau"].tolist() == [2.0, 4.0, 10.0]
    assert later.b_by_name_["name"].tolist() == ["other"]


def test_a_shell_counts_where_all_rows_of_its_curve_are_resolved(X):
    """Against energies below the floor struck out by hand."""
    struck = X.copy()
    low = SHELLS.edges[:-1] < 4e-3
    late = X.index.get_level_values("tau") == 9.0
    struck.iloc[late, 1 + np.flatnonzero(low)] = 0.0
    by_hand = GRSDTailFitter(floor=0.0, window=WINDOW).fit(struck)
    fitter = GRSDTailFitter(window=WINDOW).fit(X)
    assert fitter.b_ == pytest.approx(by_hand.b_, abs=1e-9)
    assert fitter.frame_["n_shells"].tolist() == [9, 9, 9 - low.sum()]
    pd.testing.assert_frame_equal(
        fitter.transform(X).iloc[:, :3], by_hand.transform(struck).iloc[:, :3]
    )
    # One row of the first time with the higher floor holds its whole mean to it.
    labels = X.index.to_frame(index=False)
    labels.loc[0, "resolution_floor"] = 4e-3
    one = GRSDTailFitter(window=WINDOW).fit(X.set_index(pd.MultiIndex.from_frame(labels)))
    assert one.frame_["n_shells"].tolist() == [9 - low.sum(), 9, 9 - low.sum()]


@pytest.mark.parametrize(
    ("options", "labels", "assumed"),
    [
        ({}, {}, ["tau 0", "batch", "floor", "full last", "ratio 2"]),
        ({"edges": SHELLS.edges}, {"tau": 1.0}, ["batch", "floor", "full last"]),
        ({"edges": SHELLS.edges, "window": WINDOW, "floor": 0.0}, {"tau": 1.0, "batch": 0}, []),
    ],
)
def test_an_array_says_what_was_assumed(options, labels, assumed):
    rng = np.random.default_rng(0)
    energies = exact_energies(1.5, 0.0, 1.0, SHELLS.edges) * rng.gamma(25, 1 / 25, (6, 10))
    told = {"tau": np.full(6, 1.0), "batch": np.arange(6)}
    fitter = GRSDTailFitter(**options).fit(energies, **{label: told[label] for label in labels})
    said = fitter.status_.partition("not told, so assumed: ")[2]
    assert len(said.split(", ")) == max(len(assumed), 1)
    assert all(text in said for text in assumed)


def test_an_overfull_last_shell_is_not_in_the_window(X, expected):
    """Energy above the last edge is counted in the last shell."""
    labels = X.index.to_frame(index=False).assign(lambda_max=5.0)
    higher = GRSDTailFitter().fit(X.set_index(pd.MultiIndex.from_frame(labels)))
    assert higher.window_ == expected.window_
    assert higher.b_ == expected.b_


TOPS = {1.0: 0.14, 2.0: 0.28, 4.0: 1.1}


def below(measure, top):
    """The measure without its modes above ``top``, as a kernel with a lower λ_max has it."""
    kept = measure.nodes < top
    nodes, weights = measure.nodes[kept], measure.weights[kept]
    return replace(
        measure, nodes=nodes, weights=weights, total=weights.sum(), lambda_max=nodes.max()
    )


def rising(b, seed):
    """Runs of one law whose largest eigenvalue grows with τ."""
    partition = ShellPartition.covering(1e-3, 0.99, q=2.0)
    measures = make_grsd_spectra(b, K=0, taus=list(TOPS), n_batches=8, random_state=seed)
    return energy_frame([below(one, TOPS[one.tau]) for one in measures], partition)


@pytest.mark.parametrize("window", [None, (1e-3, 1.0)])
def test_shells_are_full_below_the_largest_eigenvalue_of_their_own_curve(window):
    """Against half-empty shells and all above struck out by hand."""
    X = rising(1.6, 1)
    edges = [float(column[6:-1].split(",")[1]) for column in X.columns[1:]]
    struck = forget(X.droplevel("lambda_max"))
    for i, largest in enumerate(X.index.get_level_values("lambda_max")):
        struck.iloc[i, 1 + np.flatnonzero(np.array(edges) > largest)] = 0.0
    fitter = GRSDTailFitter(window=window).fit(X)
    by_hand = GRSDTailFitter(window=fitter.window_).fit(struck)
    assert fitter.b_ == pytest.approx(by_hand.b_, abs=1e-9)
    assert fitter.b_interval_[0] < 1.6 < fitter.b_interval_[1]
    assert fitter.frame_["n_shells"].tolist() == by_hand.frame_["n_shells"].tolist()
    amplitudes = (one["amplitude"] for one in (fitter.transform(X), by_hand.transform(struck)))
    np.testing.assert_allclose(*amplitudes, rtol=1e-9)


def test_the_largest_eigenvalue_of_another_name_changes_nothing():
    short = energy_frame(
        [below(one, 0.2) for one in make_grsd_spectra(1.6, K=0, n_batches=6, random_state=2)],
        ShellPartition.covering(1e-3, 0.99, q=2.0),
    )
    runs = {"short": short, "long": rising(1.6, 3)}
    table = GRSDTailFitter().fit(pd.concat(runs, names=["name"])).b_by_name_.set_index("name")
    for name, rows in runs.items():
        assert table.loc[name, "b"] == GRSDTailFitter().fit(rows).b_


def test_one_row_with_a_lower_largest_eigenvalue_holds_its_curve_to_it(X):
    labels = X.index.to_frame(index=False)
    labels.loc[0, "lambda_max"] = SHELLS.edges[-2] * 0.9
    lower = GRSDTailFitter(window=WINDOW).fit(X.set_index(pd.MultiIndex.from_frame(labels)))
    full = GRSDTailFitter(window=WINDOW).fit(X).frame_["n_shells"]
    within = SHELLS.edges[1:] <= WINDOW[1] * (1 + 1e-9)
    lost = int((within & (SHELLS.edges[1:] > labels.loc[0, "lambda_max"])).sum())
    assert lost > 0
    assert (full - lower.frame_["n_shells"]).tolist() == [lost, 0, 0]


def test_rows_of_a_table_without_index_are_named(X, expected):
    out = expected.transform(pa.table(dict(X.reset_index().items())))
    pd.testing.assert_frame_equal(out, expected.transform(X))


def test_foreign_columns_need_edges():
    rng = np.random.default_rng(0)
    energies = exact_energies(1.5, 0.0, 1.0, SHELLS.edges) * rng.gamma(25, 1 / 25, (6, 10))
    foreign = pd.DataFrame(energies, columns=list("abcdefghij"))
    with pytest.raises(ValueError, match=r"column 'a', which names no shell.*edges="):
        GRSDTailFitter().fit(foreign)
    named = GRSDTailFitter(edges=SHELLS.edges).fit(foreign)
    assert named.b_ == GRSDTailFitter(edges=SHELLS.edges).fit(energies).b_
    counted = GRSDTailFitter().fit(pd.DataFrame(energies).add_prefix("x"))
    assert counted.b_ == GRSDTailFitter().fit(energies).b_


def test_a_missing_batch_is_said(X):
    assert "1 of 12 (tau, batch) missing" in GRSDTailFitter().fit(X.iloc[1:]).status_
