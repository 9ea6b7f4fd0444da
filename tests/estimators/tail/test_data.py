"""The way in and out of the tail fit: frames, labels, names, routing, replicates, weights."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

from spectralshell import Snapshot
from spectralshell.estimators.tail.data import _inverse_trigamma, moderated_weights
from spectralshell.estimators.tail.fitter import OUTPUT_COLUMNS, GRSDTailFitter
from tests.estimators.tail.energies import MIDS, SHELLS, WINDOW, batched_energies, frame


def test_array_with_labels_is_the_frame():
    X = frame("template", 1.6)
    labels = {name: X.index.get_level_values(name).to_numpy() for name in ("tau", "batch")}
    fitter = GRSDTailFitter(window=WINDOW, edges=SHELLS.edges)
    fitter.fit(X.to_numpy()[:, 1:], **labels)
    assert fitter.b_ == GRSDTailFitter(window=WINDOW, floor=0.0).fit(X).b_
    with pytest.raises(ValueError, match="tau"):
        fitter.score(X.to_numpy()[:, 1:])
    assert np.isfinite(fitter.score(X.to_numpy()[:, 1:], tau=labels["tau"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: pd.concat([X, X.iloc[:1]]), "two rows"),
        (lambda X: X.assign(loss=1.0), "loss"),
        (lambda X: X[["null", *X.columns[:0:-1]]], "contiguous"),
        (lambda X: -X, "Negative"),
        (lambda X: X * np.nan, "NaN"),
        (lambda X: X.rename(index={X.index[0][0]: np.nan}, level="tau"), "tau"),
    ],
)
def test_wrong_frame_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        GRSDTailFitter().fit(change(frame("template", 1.6)))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"edges": [1, 2, 3]}, ValueError, "edges"),
        ({"edges": ["a"] * 9}, ValueError, "edges must be numbers"),
        ({"edges": [1, 2, 4, 3, 5, 6, 7, 8, 9]}, ValueError, "edges"),
        ({"window": (2, 1)}, ValueError, "window"),
        ({"window": 3}, TypeError, "window"),
        ({"cutoff": "some"}, ValueError, "cutoff"),
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"min_shells": 2.5}, TypeError, "min_shells"),
        ({"floor": -1.0}, ValueError, "floor"),
    ],
)
def test_wrong_parameter_is_named(options, error, name):
    with pytest.raises(error, match=name):
        GRSDTailFitter(**options).fit(np.ones((3, 8)))


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({"tau": [1.0, np.nan, 2.0]}, "tau"),
        ({"tau": [1.0]}, "tau"),
        ({"tau": ["early", "late", "end"]}, "tau must hold numbers"),
        ({"name": ["a", None, "b"]}, "name is missing .* row 1"),
        ({"batch": [1]}, "batch"),
        ({"batch": 1}, "batch must be a sequence"),
        ({"batch": "abc"}, "batch must be a sequence"),
        ({"batch": [1, 1, 2]}, "two rows"),
        ({"batch": [0, np.nan, 1]}, "batch is missing .* row 1"),
        ({"batch": ["a", "b", None]}, "batch is missing .* row 2"),
    ],
)
def test_wrong_label_is_named(labels, name):
    with pytest.raises((ValueError, TypeError), match=name):
        GRSDTailFitter().fit(np.ones((3, 8)), **labels)


@pytest.mark.parametrize("weight", [-1.0, np.nan])
def test_wrong_sample_weight_is_named(weight):
    X = np.ones((3, 8))
    with pytest.raises(ValueError, match="sample_weight"):
        GRSDTailFitter().fit(X).score(X, sample_weight=[1.0, weight, 1.0])


def test_edges_must_agree_with_a_frame():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW, edges=SHELLS.edges).fit(X)
    assert fitter.b_ == GRSDTailFitter(window=WINDOW).fit(X).b_
    with pytest.raises(ValueError, match="edges contradict"):
        GRSDTailFitter(edges=2.0 * SHELLS.edges).fit(X)


def test_snapshots_are_sent_to_the_step_before():
    snapshot = Snapshot(torch.nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, 2))
    with pytest.raises(TypeError, match="put a ShellEnergyEstimator before"):
        GRSDTailFitter().fit([snapshot])


def test_tidy_frame_is_named():
    tidy = pd.DataFrame(
        {"tau": [0.0], "shell": "null", "lambda_lo": 0.0, "lambda_hi": 1.0, "energy": 1.0}
    )
    with pytest.raises(ValueError, match=r"not shells_"):
        GRSDTailFitter().fit(tidy)


@pytest.mark.parametrize("fitted", [False, True])
def test_failed_fit_changes_nothing(fitted):
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW)
    if fitted:
        fitter.fit(X)
    before = dict(vars(fitter))
    with pytest.raises(ValueError, match="two rows"):
        fitter.fit(np.ones((2, 8)), batch=[0, 0])
    assert vars(fitter) == before
    if not fitted:
        with pytest.raises(NotFittedError):
            check_is_fitted(fitter)


def test_inverse_transform_takes_columns_by_name():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW).fit(X)
    out = fitter.transform(X)
    shuffled = out[out.columns[::-1]].assign(extra="")
    pd.testing.assert_frame_equal(fitter.inverse_transform(shuffled), fitter.inverse_transform(out))
    with pytest.raises(ValueError, match="cutoff"):
        fitter.inverse_transform(out.rename(columns={"cutoff": "kappa"}))


def test_inverse_transform_of_a_frame_after_an_array():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW, edges=SHELLS.edges).fit(X.to_numpy()[:, 1:])
    out = pd.DataFrame(fitter.transform(X.to_numpy()[:, 1:]), columns=list(OUTPUT_COLUMNS))
    assert list(fitter.inverse_transform(out).columns) == list(X.columns[1:])


def test_fit_transform_hands_tau_on():
    X = frame("template", 1.6)
    labels = {name: X.index.get_level_values(name).to_numpy() for name in ("tau", "batch")}
    values = X.to_numpy()[:, 1:]
    fitter = GRSDTailFitter(window=WINDOW, edges=SHELLS.edges, cutoff="shared")
    expected = fitter.fit(values, **labels).transform(values, tau=labels["tau"])
    np.testing.assert_array_equal(clone(fitter).fit_transform(values, **labels), expected)
    with config_context(enable_metadata_routing=True):
        fitter.set_fit_request(tau=True, batch=True).set_transform_request(tau=True)
        pipe = make_pipeline(FunctionTransformer(), fitter)
        np.testing.assert_array_equal(pipe.fit_transform(values, **labels), expected)


def test_clone_and_pickle():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW).fit(X)
    again = pickle.loads(pickle.dumps(fitter))
    pd.testing.assert_frame_equal(again.transform(X), fitter.transform(X))
    assert clone(fitter).fit(X).b_ == fitter.b_


def test_set_output_and_names():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW).set_output(transform="pandas").fit(X)
    assert list(fitter.get_feature_names_out()) == list(OUTPUT_COLUMNS)
    assert fitter.transform(X).index.equals(X.index)
    assert list(fitter.feature_names_in_) == list(X.columns)
    with pytest.raises(ValueError, match="feature names"):
        fitter.transform(X.rename(columns={"null": "nil"}))


def test_cross_validate_in_a_pipeline():
    X = frame("template", 1.6)
    pipe = make_pipeline(FunctionTransformer(), GRSDTailFitter(window=WINDOW))
    groups = X.index.get_level_values("batch")
    result = cross_validate(pipe, X, groups=groups, cv=GroupKFold(3))
    assert np.isfinite(result["test_score"]).all()


def test_metadata_is_routed():
    X = frame("template", 1.6)
    labels = {name: X.index.get_level_values(name).to_numpy() for name in ("tau", "batch")}
    with config_context(enable_metadata_routing=True):
        fitter = GRSDTailFitter(window=WINDOW, edges=SHELLS.edges)
        fitter.set_fit_request(tau=True, batch=True)
        fitter.set_score_request(tau=True, sample_weight=True)
        fitter.set_transform_request(tau=True)
        pipe = make_pipeline(FunctionTransformer(), fitter)
        pipe.fit(X.to_numpy()[:, 1:], **labels)
        direct = GRSDTailFitter(window=WINDOW, floor=0.0).fit(X)
        assert pipe[-1].b_ == direct.b_
        weights = np.arange(len(X), dtype=float)
        routed = pipe.score(X.to_numpy()[:, 1:], tau=labels["tau"], sample_weight=weights)
        assert routed == pytest.approx(direct.score(X, sample_weight=weights))


def test_replicates_are_means_without_one_batch():
    data = batched_energies(0, n_batches=4)
    data.present[1, 2] = False
    data.energies[1, 2] = 0.0
    means, counts = data.replicates()
    for left_out in range(4):
        for tau in range(3):
            kept = data.present[tau] & (np.arange(4) != left_out)
            expected = data.energies[tau, kept].mean(axis=0)
            np.testing.assert_allclose(means[1 + left_out, tau], expected)
            assert counts[1 + left_out, tau] == kept.sum()


def test_equal_noise_gives_nearly_equal_weights():
    data = batched_energies(0)
    weights = moderated_weights(data, data.energies.mean(axis=1), np.ones((3, MIDS.size), bool))
    assert weights.max() / weights.min() < 2.0


def test_noisier_shells_get_less_weight():
    data = batched_energies(0)
    rng = np.random.default_rng(1)
    data.energies[:, :, -1] *= rng.gamma(1.0, 1.0, size=(3, 12))
    weights = moderated_weights(data, data.energies.mean(axis=1), np.ones((3, MIDS.size), bool))
    assert weights[:, -1].max() < 0.5 * weights[:, :-1].mean()


def test_weights_of_unusable_points_are_zero():
    data = batched_energies(0)
    usable = np.ones((3, MIDS.size), bool)
    usable[1, 4] = False
    weights = moderated_weights(data, data.energies.mean(axis=1), usable)
    assert weights[1, 4] == 0.0
    assert (weights[usable] > 0).all()


@pytest.mark.parametrize("value", [1e-3, 0.3, 5.0, 1e3])
def test_inverse_trigamma(value):
    assert special.polygamma(1, _inverse_trigamma(value)) == pytest.approx(value, rel=1e-6)
