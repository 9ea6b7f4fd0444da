"""Runs of several names: a slope for each, a shared one, and the test that they are equal."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectralshell import cross_validate_exponent
from spectralshell.displays import ExponentDisplay, ShellEnergyDisplay, TailFitDisplay
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from spectralshell.estimators.tail.names import NamedSlope, equality_p_value
from spectralshell.statuses import NAMES_NOT_COMPARED
from tests.estimators.tail.energies import WINDOW, frame

TAUS = (1.0, 3.0, 9.0)


def run(slope, seed, n_batches=5):
    options = {"random_state": seed, "n_batches": n_batches, "taus": TAUS}
    return frame("template", slope, frontiers=(0.3, 0.1, 0.03), **options)


def together(**runs):
    return pd.concat(runs, names=["name"])


@pytest.fixture(scope="module")
def X():
    return together(a=run(1.3, 0), b=run(1.7, 1))


@pytest.fixture(scope="module")
def fitter(X):
    return GRSDTailFitter(window=WINDOW).fit(X)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_each_name_is_fitted_as_if_alone(X, window):
    table = GRSDTailFitter(window=window).fit(X).b_by_name_
    assert table.columns.tolist() == ["name", "b", "lower", "upper", "status"]
    for row, (name, rows) in zip(table.itertuples(), X.groupby("name"), strict=True):
        alone = GRSDTailFitter(window=window).fit(rows.droplevel("name"))
        assert (row.name, row.b, row.status) == (name, alone.b_, alone.status_)
        assert (row.lower, row.upper) == alone.b_interval_


def test_names_share_a_slope_and_nothing_else(X, fitter):
    assert "slopes of names differ (p = " in fitter.status_
    low, high = fitter.b_by_name_["b"]
    assert low < fitter.b_ < high
    table = fitter.frame_
    assert table["name"].tolist() == [name for name in "ab" for _ in TAUS]
    assert table["tau"].tolist() == [*TAUS, *TAUS]
    rows = fitter.transform(X).groupby(["name", "tau"])["amplitude"].median()
    np.testing.assert_allclose(rows, table["amplitude"], rtol=0.2)  # batches scatter by 10 %
    scaled = X.copy()
    scaled.loc["b"] = 1e3 * X.loc["b"].to_numpy()
    assert GRSDTailFitter(window=WINDOW).fit(scaled).b_ == pytest.approx(fitter.b_, rel=1e-9)


def test_equal_slopes_are_not_called_different():
    fitter = GRSDTailFitter(window=WINDOW).fit(together(a=run(1.6, 0), b=3 * run(1.6, 1)))
    assert "slopes of names do not differ (p = " in fitter.status_


def test_names_of_one_batch_are_not_compared():
    fitter = GRSDTailFitter(window=WINDOW).fit(together(a=run(1.3, 0, 1), b=run(1.7, 1, 1)))
    assert NAMES_NOT_COMPARED in fitter.status_


def test_one_name_is_no_comparison(X):
    one = GRSDTailFitter(window=WINDOW).fit(X.loc[["a"]])
    assert one.status_ == "ok"
    assert one.frame_["name"].unique().tolist() == ["a"]
    plain = GRSDTailFitter(window=WINDOW).fit(X.loc["a"])
    assert plain.b_by_name_["name"].tolist() == [""]
    assert plain.b_ == one.b_


def test_rows_are_scored_with_the_cutoff_of_their_name(X, fitter):
    cutoffs = fitter.frame_.set_index(["name", "tau"])["cutoff"]
    assert cutoffs["a", 9.0] != pytest.approx(cutoffs["b", 9.0], rel=0.1)
    both = fitter.score_samples(X)
    told = fitter.score_samples(X.droplevel("name"), name=X.index.get_level_values("name"))
    np.testing.assert_array_equal(both, told)
    swapped = fitter.score_samples(X.rename(index={"a": "b", "b": "a"}, level="name"))
    assert both.mean() > swapped.mean()
    stranger = fitter.score_samples(X.rename(index={"a": "c"}, level="name"))
    np.testing.assert_array_equal(stranger[len(X) // 2 :], both[len(X) // 2 :])
    assert np.isfinite(stranger).all()


def replicate(slope, spread, n, seed):
    noise = spread * np.random.default_rng(seed).normal(size=n)
    return np.append(slope, slope + noise - noise.mean())


def named(label, slopes, units):
    return NamedSlope(label, slopes, np.asarray(units), (np.nan, np.nan), [])


def test_two_names_with_their_own_batches_are_welchs_test():
    """Pseudo-values are what a jackknife takes for observations."""
    sizes, pseudo = (6, 9), []
    parts = [replicate(1.5 + 0.02 * k, 0.01 + 0.01 * k, n, k) for k, n in enumerate(sizes)]
    for slopes, n in zip(parts, sizes, strict=True):
        pseudo.append(n * slopes[0] - (n - 1) * slopes[1:])
    units = np.arange(6), np.arange(9) + 6
    p_value = equality_p_value([named(*x) for x in zip("ab", parts, units, strict=True)])
    assert p_value == pytest.approx(stats.ttest_ind(*pseudo, equal_var=False).pvalue, rel=1e-9)


def test_two_names_of_shared_batches_are_the_paired_test():
    n = 7
    parts = [replicate(1.5 + 0.02 * k, 0.02, n, k) for k in range(2)]
    pseudo = [n * slopes[0] - (n - 1) * slopes[1:] for slopes in parts]
    order = np.random.default_rng(0).permutation(n)
    other = named("b", np.append(parts[1][0], parts[1][1:][order]), order)
    p_value = equality_p_value([named("a", parts[0], range(n)), other])
    assert p_value == pytest.approx(stats.ttest_rel(*pseudo).pvalue, rel=1e-9)


def test_batches_of_other_labels_are_units_of_their_own(X):
    """An interval over ten batches, not over five pairs."""
    columns = X.reset_index()
    columns.loc[columns["name"] == "b", "batch"] += 5
    apart = GRSDTailFitter(window=WINDOW).fit(columns)
    paired = GRSDTailFitter(window=WINDOW).fit(X)
    assert apart.b_ == pytest.approx(paired.b_, rel=1e-9)
    assert apart.b_interval_ != pytest.approx(paired.b_interval_, rel=1e-3)
    assert "missing" not in apart.status_
    assert len(cross_validate_exponent(GRSDTailFitter(window=WINDOW), columns)) == 10


def test_plots_carry_the_name(X, fitter, clean_matplotlib):
    display = TailFitDisplay.from_estimator(fitter, X)
    assert display.frame().groupby(["name", "tau"]).size().index.tolist() == [
        (name, tau) for name in "ab" for tau in TAUS
    ]
    assert f"a: {fitter.b_by_name_['b'][0]:.3f} [" in display.plot().ax_.get_title(loc="left")
    assert {"a", "b"} <= {text.get_text() for text in display.legend_.get_texts()}
    energies = ShellEnergyDisplay.from_frame(X, fitter=fitter).frame()
    drawn = energies.groupby(["name", "tau"])["frontier"].agg(["min", "max"])
    for end in drawn:
        assert drawn[end].tolist() == fitter.frame_["frontier"].tolist()
    exponents = ExponentDisplay.from_frame(fitter.b_by_name_, reference=fitter)
    assert exponents.frame()["name"].tolist() == ["a", "b"]
    assert exponents.plot().ax_.get_xlabel() == "name of the run"
