"""The main path in scikit-learn's tools: snapshots in, a tail exponent out, products counted."""

import pickle
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline

from spectralshell import GRSDTailFitter, ShellEnergyEstimator, cross_validate_exponent
from spectralshell.datasets import load_digits_trajectory
from spectralshell.operators.set_up import forget_set_ups
from tests.device import place_snapshot, place_trajectory

Q = [1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2]
N_FOLDS = 5


@pytest.fixture(scope="module")
def X():
    """Ten snapshots, two states on five batches."""
    return place_trajectory(
        load_digits_trajectory(n_snapshots=2, n_batches=5, batch_size=8, hidden=(12,), max_iter=200)
    )


@pytest.fixture
def pipe():
    return make_pipeline(ShellEnergyEstimator(), GRSDTailFitter())


def batches(X):
    return [snapshot.batch for snapshot in X]


def test_fits_and_transforms(X, pipe):
    tail = pipe.fit(X).transform(X)
    assert np.isfinite(pipe[-1].b_)
    assert list(tail.columns) == ["amplitude", "cutoff", "frontier", "tail_energy"]
    assert list(tail.index.names) == ["tau", "batch", "lambda_max", "resolution_floor"]
    energies = pipe[0].transform(X)
    assert (tail["tail_energy"] <= energies.sum(axis=1)).all()


def test_clone_and_pickle(X, pipe):
    fitted = pipe.fit(X)
    copy = pickle.loads(pickle.dumps(fitted))
    pd.testing.assert_frame_equal(copy.transform(X), fitted.transform(X))
    assert clone(fitted).get_params(deep=False).keys() == fitted.get_params(deep=False).keys()
    assert clone(fitted).fit(X)[-1].b_ == fitted[-1].b_


@pytest.mark.parametrize("container", ["default", "pandas"])
def test_output_is_a_frame_with_its_labels(X, pipe, container):
    plain = pipe.fit(X).transform(X)
    wrapped = clone(pipe).set_output(transform=container).fit(X)
    pd.testing.assert_frame_equal(plain, wrapped.transform(X))
    assert wrapped[-1].b_ == pipe[-1].b_


def test_polars_output_between_steps_is_refused(X, pipe):
    pytest.importorskip("polars", reason="polars is not installed")
    with pytest.raises(ValueError, match=r"has no tau.*polars output"):
        pipe.set_output(transform="polars").fit(X)


def test_pickled_pipeline_fits_a_carried_table_alike(X, pipe, tmp_path):
    copy = pickle.loads(pickle.dumps(pipe.fit(X)))
    copy[0].transform(X).to_csv(tmp_path / "energies.csv")
    again = copy[-1].fit(pd.read_csv(tmp_path / "energies.csv"))
    assert again.b_ == pytest.approx(pipe[-1].b_, abs=1e-12)  # digits that a reader may drop
    assert again.status_ == pipe[-1].status_


def test_a_given_floor_is_that_of_every_row(X):
    frame = ShellEnergyEstimator(floor=0.02).fit_transform(X)
    assert set(frame.index.get_level_values("resolution_floor")) == {0.02}
    measured = ShellEnergyEstimator().fit_transform(X)
    floors = [m.floor for m in ShellEnergyEstimator().spectral_measures(X)]
    assert measured.index.get_level_values("resolution_floor").tolist() == floors


def test_pipeline_memory_knows_the_same_list_again(X, tmp_path):
    """Whatever its snapshots remember, which travels with pickles as before."""
    snapshots = pickle.loads(pickle.dumps(X))
    before = joblib.hash(snapshots)
    pipe = make_pipeline(ShellEnergyEstimator(), GRSDTailFitter(), memory=str(tmp_path))
    for _ in range(2):
        pipe.fit(snapshots)
        assert len(list(tmp_path.rglob("output.pkl"))) == 1
    snapshots[0].measures["more"] = 1.0
    assert joblib.hash(snapshots) == before
    assert pickle.loads(pickle.dumps(snapshots[0])).measures["more"] == 1.0
    snapshots[0].tau += 1.0
    assert joblib.hash(snapshots) != before


SCALE = 1.0


class Scaled(torch.nn.Linear):
    """A model that reads a global."""

    def forward(self, x):
        return SCALE * torch.tanh(super().forward(x))


def error(outputs, targets):
    return outputs - targets


def doubled(outputs, targets):
    return 2.0 * (outputs - targets)


# The same function defined anew, as when a cell of a notebook is edited and run again.
doubled.__name__ = doubled.__qualname__ = "error"


@pytest.mark.parametrize("edited", ["residual", "global"])
def test_pipeline_memory_sees_what_is_defined_anew(edited, tmp_path, monkeypatch):
    here = sys.modules[__name__]
    x = torch.linspace(-1, 1, 48).reshape(8, 6).cos()
    snapshots = [place_snapshot(Scaled(6, 4), x, torch.ones(8, 4))]

    def rate():
        shells = ShellEnergyEstimator(residual=here.error, solver="exact")
        pipe = make_pipeline(shells, GRSDTailFitter(min_shells=2), memory=str(tmp_path))
        return pipe.fit(snapshots)[0].lambda_max_

    before = rate()
    assert rate() == before
    assert len(list(tmp_path.rglob("output.pkl"))) == 1
    if edited == "residual":
        monkeypatch.setattr(here, "error", doubled)
    else:
        monkeypatch.setattr(here, "SCALE", 2.0)
    assert rate() == pytest.approx(4.0 * before)


@pytest.mark.parametrize(("routing", "n_jobs"), [(False, 1), (True, 1), (False, 2)])
def test_cross_validates_by_batch(X, pipe, routing, n_jobs):
    with config_context(enable_metadata_routing=routing):
        groups = {"params": {"groups": batches(X)}} if routing else {"groups": batches(X)}
        result = cross_validate(
            pipe, X, cv=GroupKFold(N_FOLDS), n_jobs=n_jobs, error_score="raise", **groups
        )
    assert np.isfinite(result["test_score"]).all()


def test_sample_weight_reaches_the_last_step(X, pipe):
    weight = (np.array(batches(X)) == 0).astype(float)
    only = [s for s in X if s.batch == 0]
    pipe.fit(X)
    expected = pipe.score(only)
    assert pipe.score(X, sample_weight=weight) == pytest.approx(expected, rel=1e-12)
    with config_context(enable_metadata_routing=True):
        routed = make_pipeline(
            ShellEnergyEstimator(), GRSDTailFitter().set_score_request(sample_weight=True)
        ).fit(X)
        assert routed.score(X, sample_weight=weight) == pytest.approx(expected, rel=1e-12)


def test_taus_are_routed_to_the_fitter(X, pipe):
    taus = np.array([s.tau for s in X])
    with config_context(enable_metadata_routing=True):
        fitter = GRSDTailFitter().set_fit_request(tau=True, batch=True)
        routed = make_pipeline(ShellEnergyEstimator(), fitter)
        routed.fit(X, tau=taus + 1.0, batch=batches(X))
    assert routed[-1].frame_["tau"].tolist() == sorted(set(taus + 1.0))


def test_exponent_per_fold(X, pipe):
    folds = cross_validate_exponent(pipe, X, groups=batches(X))
    assert folds["n_test"].tolist() == [2] * 5
    left_out = clone(pipe).fit([s for s in X if s.batch != 0])
    assert folds["b"][0] == left_out[-1].b_


class LoggedError:
    """The error of a classifier, and a line in a file for every evaluation, in any process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, outputs, targets):
        with self.path.open("a") as log:
            log.write("evaluated\n")
        return outputs - torch.nn.functional.one_hot(targets, 10)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_search_over_q_multiplies_as_often_as_one_fit(X, pipe, tmp_path, n_jobs):
    """Ten ratios, five folds: no snapshot is measured after the first fit, in no process."""
    log = tmp_path / "evaluations"
    pipe.set_params(
        shellenergyestimator__residual=LoggedError(log), shellenergyestimator__solver="exact"
    )
    snapshots = [pickle.loads(pickle.dumps(s)) for s in X]
    one_fit = clone(pipe).fit(snapshots)
    after_one_fit = log.read_text()
    if n_jobs == 1:  # the search itself does the work of one fit, once
        for snapshot in snapshots:
            snapshot.measures.clear()
        log.unlink()
        forget_set_ups()
    search = GridSearchCV(
        pipe,
        {"shellenergyestimator__q": Q},
        cv=GroupKFold(N_FOLDS),
        n_jobs=n_jobs,
        error_score="raise",
    ).fit(snapshots, groups=batches(snapshots))
    assert log.read_text() == after_one_fit
    best = search.best_estimator_[0]
    # Built from layers: no product but the one that each kernel is checked with.
    assert best.n_matvecs_ == one_fit[0].n_matvecs_ == 0
    assert best.n_probes_ == one_fit[0].n_probes_ == len(snapshots)


def test_one_batch_gives_a_status_and_no_exception(X, pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitter = pipe.fit([s for s in X if s.batch == 0])[-1]
    assert "optimistic" in fitter.status_ or np.isnan(fitter.b_)
