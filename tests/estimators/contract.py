"""What every estimator on lists of snapshots promises, as tests to inherit.

scikit-learn's own checks pass arrays, so few of them apply to X of snapshots.
"""

import pickle
from copy import deepcopy

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline

# Workers run BLAS with fewer threads, which reorders sums.
PROCESS_RTOL = 1e-9
# The same sums with and without terms of weight zero.
WEIGHT_RTOL = 1e-12


def as_tuples(snapshots):
    return [(s.model, s.inputs, s.targets) for s in snapshots]


def alternating(X):
    """Weights that leave the odd positions."""
    return np.arange(len(X)) % 2


class SnapshotEstimatorContract:
    """Subclasses name the estimator and settings that are cheap."""

    estimator_class = None
    cheap = {}

    def make(self, **changes):
        return self.estimator_class(**{**self.cheap, **changes})

    def test_constructor_only_assigns(self):
        estimator = self.make()
        assert set(vars(estimator)) == set(estimator.get_params())

    def test_clone_keeps_parameters_and_nothing_fitted(self, measured_trajectory):
        fitted = self.make().fit(measured_trajectory)
        copy = clone(fitted)
        assert copy.get_params() == fitted.get_params()
        assert not [name for name in vars(copy) if name.endswith("_")]

    def test_unfitted_transform_says_so(self, measured_trajectory):
        with pytest.raises(NotFittedError):
            self.make().transform(measured_trajectory)

    def test_fit_is_idempotent(self, measured_trajectory):
        estimator = self.make()
        first = estimator.fit(measured_trajectory).transform(measured_trajectory)
        second = estimator.fit(measured_trajectory).transform(measured_trajectory)
        pd.testing.assert_frame_equal(first, second, check_exact=True)

    def test_fit_changes_no_parameter(self, measured_trajectory):
        estimator = self.make()
        before = deepcopy(estimator.get_params())
        assert estimator.fit(measured_trajectory) is estimator
        assert estimator.get_params() == before

    def test_rows_do_not_depend_on_the_other_snapshots(self, measured_trajectory):
        estimator = self.make().fit(measured_trajectory)
        together = estimator.transform(measured_trajectory)
        alone = [estimator.transform([s]) for s in measured_trajectory]
        np.testing.assert_array_equal(together.to_numpy(), pd.concat(alone).to_numpy())

    def test_columns_are_the_feature_names(self, measured_trajectory):
        estimator = self.make().fit(measured_trajectory)
        frame = estimator.transform(measured_trajectory)
        assert list(frame.columns) == list(estimator.get_feature_names_out())

    @pytest.mark.parametrize("container", ["default", "pandas"])
    def test_set_output_keeps_index_and_columns(self, measured_trajectory, container):
        plain = self.make().fit(measured_trajectory).transform(measured_trajectory)
        wrapped = self.make().set_output(transform=container).fit_transform(measured_trajectory)
        pd.testing.assert_frame_equal(wrapped, plain, check_exact=True)

    def test_pickled_estimator_transforms_alike(self, measured_trajectory):
        estimator = self.make().fit(measured_trajectory)
        copy = pickle.loads(pickle.dumps(estimator))
        pd.testing.assert_frame_equal(
            copy.transform(measured_trajectory), estimator.transform(measured_trajectory)
        )

    def test_tuples_are_snapshots_with_their_position_as_batch(self, trajectory):
        one_state = trajectory[:4]
        frame = self.make().fit_transform(as_tuples(one_state))
        assert list(frame.index.get_level_values("batch")) == [0, 1, 2, 3]

    def test_two_processes_give_what_one_gives(self, trajectory):
        alone = self.make(n_jobs=1).fit(trajectory).transform(trajectory)
        for snapshot in trajectory:
            snapshot.measures.clear()
        together = self.make(n_jobs=2).fit(trajectory).transform(trajectory)
        pd.testing.assert_frame_equal(together, alone, rtol=PROCESS_RTOL, atol=1e-300)

    def test_score_takes_sample_weight(self, measured_trajectory):
        X = measured_trajectory
        estimator = self.make().fit(X)
        weighted = estimator.score(X, sample_weight=alternating(X))
        assert weighted == pytest.approx(estimator.score(X[1::2]), rel=WEIGHT_RTOL)

    def test_sample_weight_is_routed_through_a_pipeline(self, measured_trajectory):
        X = measured_trajectory
        with config_context(enable_metadata_routing=True):
            pipe = make_pipeline(self.make().set_score_request(sample_weight=True)).fit(X)
            weighted = pipe.score(X, sample_weight=alternating(X))
            plain = pipe.score(X)
        expected = pipe[-1].score(X[1::2])
        assert weighted == pytest.approx(expected, rel=WEIGHT_RTOL)
        assert plain != pytest.approx(expected, rel=WEIGHT_RTOL)

    def test_sample_weight_is_routed_through_cross_validation(self, measured_trajectory):
        X = measured_trajectory
        folds = GroupKFold(2)
        groups, weight = [s.batch for s in X], np.linspace(0.0, 1.0, len(X))
        with config_context(enable_metadata_routing=True):
            found = cross_validate(
                self.make().set_score_request(sample_weight=True),
                X,
                cv=folds,
                params={"groups": groups, "sample_weight": weight},
                error_score="raise",
            )
        expected = [
            self.make()
            .fit([X[i] for i in train])
            .score([X[i] for i in test], sample_weight=weight[test])
            for train, test in folds.split(X, groups=groups)
        ]
        np.testing.assert_allclose(found["test_score"], expected, rtol=WEIGHT_RTOL)

    def test_last_step_of_a_pipeline_scores(self, measured_trajectory):
        pipe = make_pipeline(self.make()).fit(measured_trajectory)
        assert np.isfinite(pipe.score(measured_trajectory))

    def test_a_random_state_instance_is_asked_in_fit_alone(self, measured_trajectory):
        """And so are the other settings: what is fitted stays as it is until the next fit."""
        X = measured_trajectory[:2]
        estimator = self.make(random_state=np.random.RandomState(0))
        if "direction" in estimator.get_params():
            estimator.set_params(direction="random")
        estimator.fit(X)
        first, score = estimator.transform(X), estimator.score(X)
        estimator.set_params(random_state=1)
        pd.testing.assert_frame_equal(estimator.transform(X), first, check_exact=True)
        assert estimator.score(X) == pytest.approx(score, rel=WEIGHT_RTOL, nan_ok=True)

    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_cross_validates_by_batch(self, measured_trajectory, n_jobs):
        X = measured_trajectory
        groups = [s.batch for s in X]
        result = cross_validate(
            self.make(), X, groups=groups, cv=GroupKFold(4), n_jobs=n_jobs, error_score="raise"
        )
        assert np.isfinite(result["test_score"]).all()

    def test_joblib_round_trip(self, measured_trajectory, tmp_path):
        estimator = self.make().fit(measured_trajectory)
        joblib.dump(estimator, tmp_path / "estimator.joblib")
        copy = joblib.load(tmp_path / "estimator.joblib")
        assert copy.get_params() == estimator.get_params()


class ShellEstimatorContract(SnapshotEstimatorContract):
    """For estimators with a shell ratio."""

    def test_grid_search_over_q(self, measured_trajectory):
        X = measured_trajectory
        search = GridSearchCV(
            self.make(), {"q": [1.5, 2.0, 4.0]}, cv=GroupKFold(2), error_score="raise"
        )
        search.fit(X, groups=[s.batch for s in X])
        assert search.best_params_["q"] in (1.5, 2.0, 4.0)
