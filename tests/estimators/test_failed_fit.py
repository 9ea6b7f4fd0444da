"""Snapshots that cannot be measured: who is named, who is skipped, and what a failed fit leaves."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spectralshell import (
    JacobianBlockDiagnostic,
    ShellEnergyEstimator,
    ShellFluxEstimator,
    Snapshot,
    ToeplitzDiagnostic,
)
from spectralshell.estimators import base
from spectralshell.warning_categories import SnapshotWarning

ESTIMATORS = {
    "energy": (ShellEnergyEstimator, {"q": 1.5}, {"parameters": "0.weight"}),
    "flux": (ShellFluxEstimator, {"q": 1.5}, {"parameters": "0.weight", "softness": 0.5}),
    "toeplitz": (ToeplitzDiagnostic, {"n_null": 3, "min_modes": 1}, {"n_null": 4, "q": 1.5}),
    "blocks": (JacobianBlockDiagnostic, {"n_null": 3}, {"band": 0, "n_null": 5}),
}
"""Class, settings, and other settings."""


def snapshots(n_batches=3, taus=(0.5,), names=(None,)):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batches = [(draw(5, 3), torch.softmax(draw(5, 2), 1)) for _ in range(n_batches)]
    found = []
    for name in names:
        for tau in taus:
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(draw(*parameter.shape))
            found += [
                Snapshot(model, *batch, tau=tau, batch=number, name=name)
                for number, batch in enumerate(batches)
            ]
    return found


def diverged(snapshot):
    state = snapshot.load_state()
    state["2.weight"] = torch.full_like(state["2.weight"], torch.nan)
    labels = {"tau": snapshot.tau, "batch": snapshot.batch, "name": snapshot.name}
    return Snapshot(snapshot.model, snapshot.inputs, snapshot.targets, state=state, **labels)


def with_bad(places, **more):
    X = snapshots(**more)
    for place in places:
        X[place] = diverged(X[place])
    return X


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


FAILURES = ["bad parameter", "bad snapshot", "interrupt", "results", "warning"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_failed_fit_leaves_an_estimator_as_it_was(kind, failure, monkeypatch):
    make, settings, others = ESTIMATORS[kind]
    X, estimator = snapshots(), make(**settings)
    expected = estimator.fit_transform(X)
    estimator.set_params(**others)
    before = dict(vars(estimator))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        error = ValueError
        if failure == "bad parameter":
            estimator.set_params(chunk_size=-1)
            before["chunk_size"] = -1
        elif failure == "interrupt":
            patch.setattr(base, "measure_each", interrupt)
            error = KeyboardInterrupt
        elif failure == "results":
            patch.setattr(make, "_set_results", interrupt)
            error = KeyboardInterrupt
        elif failure == "warning":  # raised as an error, after the results were set
            warnings.simplefilter("error")
            estimator.set_params(on_error="skip")
            before["on_error"] = "skip"
            error = SnapshotWarning
        with pytest.raises(error):
            estimator.fit(with_bad([1]) if failure in ("bad snapshot", "warning") else X)
    assert vars(estimator).keys() == before.keys()
    assert [name for name in before if vars(estimator)[name] is not before[name]] == []
    pd.testing.assert_frame_equal(estimator.transform(X), expected, check_exact=True)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_settings_of_later_do_not_reach_what_is_fitted(kind):
    make, settings, others = ESTIMATORS[kind]
    X, estimator = snapshots(), make(**settings)
    expected = estimator.fit_transform(X)
    score = estimator.score(X)
    estimator.set_params(**others)
    pd.testing.assert_frame_equal(estimator.transform(X), expected, check_exact=True)
    np.testing.assert_array_equal(estimator.score(X), score)


def test_a_floor_of_later_does_not_reach_what_is_fitted():
    X, estimator = snapshots(), ShellEnergyEstimator()
    expected = estimator.fit(X).transform(X).attrs
    assert estimator.set_params(floor=1e-3).transform(X).attrs == expected


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("name", [None, "a"])
def test_an_error_begins_with_its_snapshot(kind, name):
    make, settings, _ = ESTIMATORS[kind]
    label = "snapshot tau=0.5, batch=1" + ("" if name is None else ", name='a'")
    with pytest.raises(ValueError, match=f"^{label}: model: '2.weight' holds NaN") as caught:
        make(**settings).fit(with_bad([1], names=(name,)))
    assert type(caught.value.__cause__) is ValueError


class Failing(nn.Linear):
    """Raises an error whose type wants more than a text."""

    def forward(self, x):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "no text")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.inputs.mul_(2.0), ValueError, "inputs of Snapshot.* changed in place"),
        (lambda s: s.load_state()["0.bias"].add_(1.0), ValueError, "state: '0.bias' was changed"),
        (lambda s: setattr(s, "targets", torch.ones(5, 9)), ValueError, "targets"),
        (lambda s: setattr(s, "inputs", torch.full((5, 3), torch.nan)), ValueError, "inputs hold"),
    ],
    ids=["inputs", "state", "targets", "nan"],
)
def test_every_fault_of_a_snapshot_names_it(change, error, message):
    X = snapshots()
    change(X[2])
    for method in ("fit", "eigenpairs", "spectral_measures"):
        with pytest.raises(error, match=f"snapshot tau=0.5, batch=2: {message}"):
            getattr(ShellEnergyEstimator(), method)(X)


def test_an_error_that_wants_more_than_a_text_keeps_its_type():
    s = Snapshot(Failing(3, 2), torch.ones(5, 3), torch.ones(5, 2), batch=7)
    with pytest.raises(ValueError, match="no text") as caught:
        ShellEnergyEstimator().fit([s])
    told = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("batch=7" in text for text in told)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_skipped_snapshot_has_a_row_of_nan(kind):
    make, settings, _ = ESTIMATORS[kind]
    estimator, X = make(on_error="skip", **settings), with_bad([1, 3], n_batches=5)
    with pytest.warns(SnapshotWarning, match=r"^2 of 5 .*batch=1: .*; snapshot .*batch=3: "):
        estimator.fit(X)
    assert estimator.n_skipped_ == 2
    assert estimator.skipped_["batch"].tolist() == [1, 3]
    assert estimator.skipped_["status"].str.startswith("skipped: model: '2.weight' holds").all()
    with pytest.warns(SnapshotWarning):
        frame = estimator.transform(X)
    assert frame.index.get_level_values("batch").tolist() == [0, 1, 2, 3, 4]
    assert frame.iloc[[1, 3]].isna().all(axis=None)
    good = [X[place] for place in (0, 2, 4)]
    alone = make(**settings).fit(good)
    pd.testing.assert_frame_equal(frame.iloc[[0, 2, 4]], alone.transform(good), check_exact=True)
    assert list(frame.attrs) == list(alone.transform(good).attrs)
    with pytest.warns(SnapshotWarning):
        np.testing.assert_array_equal(
            estimator.score(X, sample_weight=[1.0, 9.0, 2.0, 9.0, 3.0]),
            alone.score(good, sample_weight=[1.0, 2.0, 3.0]),
        )
    assert len(estimator.plan_) == 5
    assert pickle.loads(pickle.dumps(estimator)).n_skipped_ == 2


@pytest.mark.parametrize(
    ("kind", "attribute"), [("energy", "shells_"), ("flux", "summary_"), ("blocks", "trajectory_")]
)
def test_a_status_says_why_one_was_skipped(kind, attribute):
    make, settings, _ = ESTIMATORS[kind]
    estimator, X = make(on_error="skip", **settings), snapshots(names=("a", None))[:4]
    X[0] = diverged(X[0])
    with pytest.warns(SnapshotWarning):
        frame = getattr(estimator.fit(X), attribute)
    row = frame[frame["status"].str.startswith("skipped: ")].iloc[0]
    assert (row["tau"], row["batch"], row["name"]) == (0.5, 0, "a")
    assert set(frame["name"]) == {"a", ""}
    kept = frame.drop(index=row.name)
    alone = getattr(make(**settings).fit(X[1:]), attribute)
    kept = kept[list(alone)].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, alone, check_dtype=False, check_exact=True)


def test_the_diagnosis_counts_those_skipped():
    estimator = ToeplitzDiagnostic(n_null=3, min_modes=1, on_error="skip")
    with pytest.warns(SnapshotWarning):
        estimator.fit(with_bad([1]))
    assert "1 of 3 snapshots skipped" in estimator.status_


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_without_any_snapshot_the_first_error_is_raised(kind):
    make, settings, _ = ESTIMATORS[kind]
    with pytest.raises(ValueError, match=r"^snapshot tau=0.5, batch=0: model: '2.weight'"):
        make(on_error="skip", **settings).fit(with_bad([0, 1, 2]))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_option_is_checked(kind):
    with pytest.raises(ValueError, match="on_error must be one of 'raise', 'skip', got 'ignore'"):
        ESTIMATORS[kind][0](on_error="ignore").fit(snapshots())


def test_an_interrupt_is_not_skipped(monkeypatch):
    monkeypatch.setattr("spectralshell.estimators.shell_energy.measure_spectrum", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ShellEnergyEstimator(on_error="skip").fit(snapshots())
