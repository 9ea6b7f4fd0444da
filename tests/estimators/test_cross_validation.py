"""Folds of the tail slope: splitters, groups, pipelines."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline

from spectralshell.estimators.cross_validation import FOLD_COLUMNS, cross_validate_exponent
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from tests.estimators.tail.energies import WINDOW, frame


class Rows(TransformerMixin, BaseEstimator):
    """Stands for the estimator that turns snapshots into rows."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return pd.concat([item.row for item in X])


def snapshots(X):
    return [
        SimpleNamespace(batch=batch, row=X.iloc[[k]]) for k, (_, batch, *_) in enumerate(X.index)
    ]


@pytest.fixture(scope="module")
def data():
    return frame("template", 1.6, n_batches=5)


def test_one_batch_is_left_out_at_a_time(data):
    folds = cross_validate_exponent(GRSDTailFitter(window=WINDOW), data)
    assert list(folds.columns) == list(FOLD_COLUMNS)
    assert folds["fold"].tolist() == list(range(5))
    assert (folds["n_test"] == 6).all()
    assert (folds["n_train"] == 24).all()
    assert ((folds["b_lower"] < folds["b"]) & (folds["b"] < folds["b_upper"])).all()
    left_out = data.drop(index=2, level="batch")
    expected = GRSDTailFitter(window=WINDOW).fit(left_out)
    assert folds["b"][2] == expected.b_
    assert folds["score"][2] == expected.score(data.xs(2, level="batch", drop_level=False))


def test_snapshots_through_a_pipeline_agree_with_frames(data):
    pipe = make_pipeline(Rows(), GRSDTailFitter(window=WINDOW))
    expected = cross_validate_exponent(GRSDTailFitter(window=WINDOW), data)
    pd.testing.assert_frame_equal(cross_validate_exponent(pipe, snapshots(data)), expected)
    assert not hasattr(pipe[0], "fitted_")


def test_two_jobs_agree_with_one(data):
    fitter = GRSDTailFitter(window=WINDOW)
    one, two = (cross_validate_exponent(fitter, data, n_jobs=n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize(("cv", "n_folds"), [(2, 2), (np.int64(2), 2), (KFold(3), 3), (None, 5)])
def test_splitters(data, cv, n_folds):
    assert len(cross_validate_exponent(GRSDTailFitter(window=WINDOW), data, cv=cv)) == n_folds


def test_numpy_integer_keeps_batches_together(data):
    fitter = GRSDTailFitter(window=WINDOW)
    expected = cross_validate_exponent(fitter, data, cv=3)
    pd.testing.assert_frame_equal(cross_validate_exponent(fitter, data, cv=np.int64(3)), expected)
    assert set(expected["n_test"]) == {6, 12}  # whole batches of 6 taus


@pytest.mark.parametrize(("cv", "error"), [(0, ValueError), (1, ValueError), (True, TypeError)])
def test_too_few_folds_are_named(data, cv, error):
    with pytest.raises(error, match="cv"):
        cross_validate_exponent(GRSDTailFitter(), data, cv=cv)


def test_groups_may_be_tuples(data):
    fitter = GRSDTailFitter(window=WINDOW)
    groups = [("batch", batch) for batch in data.index.get_level_values("batch")]
    folds = cross_validate_exponent(fitter, data, groups=groups)
    pd.testing.assert_frame_equal(folds, cross_validate_exponent(fitter, data))


def test_many_groups_make_five_folds():
    X = frame("pure", 1.5, n_batches=12, taus=(1.0,))
    folds = cross_validate_exponent(GRSDTailFitter(window=WINDOW), X)
    assert len(folds) == 5
    assert folds["n_test"].sum() == len(X)


def test_rows_of_an_array_are_their_own_groups():
    X = np.random.default_rng(0).gamma(20.0, size=(6, 8))
    assert len(cross_validate_exponent(GRSDTailFitter(), X)) == 6


def test_poor_data_give_nan():
    folds = cross_validate_exponent(GRSDTailFitter(), np.zeros((4, 8)))
    assert folds[["b", "b_lower", "b_upper", "score"]].isna().all(axis=None)


@pytest.mark.parametrize("estimator", [LinearRegression(), GRSDTailFitter, Rows()])
def test_other_estimators_are_refused(data, estimator):
    with pytest.raises(TypeError, match="GRSDTailFitter"):
        cross_validate_exponent(estimator, data)


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        ([0, 1], "groups must have one entry"),
        (np.zeros(30), "groups"),
        (np.zeros((30, 2)), "groups must be one-dim"),
        ([None, *range(29)], "groups is missing .* row 0"),
    ],
)
def test_wrong_groups_are_named(data, groups, name):
    with pytest.raises(ValueError, match=name):
        cross_validate_exponent(GRSDTailFitter(), data, groups=groups)
