"""ShellEnergyEstimator: the contract, its frames, its caches and its score."""

import warnings
from functools import partial, wraps

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import GridSearchCV, GroupKFold

from spectralshell import ShellEnergyEstimator, largest_q_within_one_se
from spectralshell.estimators import shell_energy
from spectralshell.measurements import solver
from spectralshell.operators import KernelOperator
from spectralshell.warning_categories import ResolutionWarning
from tests.device import place
from tests.estimators.contract import ShellEstimatorContract

# Sums of a few hundred float64 energies.
CLOSURE_RTOL = 1e-12


def scaled_error(outputs, targets, scale):
    return scale * (outputs - torch.nn.functional.one_hot(targets, 10))


class TestContract(ShellEstimatorContract):
    estimator_class = ShellEnergyEstimator


@pytest.fixture
def count_products(monkeypatch):
    """Columns multiplied by any operator in this process."""
    count = {"columns": 0, "operators": 0}
    matmat = KernelOperator.matmat
    matvec = KernelOperator.matvec
    build = solver.survey_kernel

    def counted_matmat(self, V):
        count["columns"] += V.shape[1]
        return matmat(self, V)

    def counted_matvec(self, v):
        count["columns"] += 1
        return matvec(self, v)

    def counted_build(*args, **kwargs):
        count["operators"] += 1
        return build(*args, **kwargs)

    monkeypatch.setattr(KernelOperator, "matmat", counted_matmat)
    monkeypatch.setattr(KernelOperator, "matvec", counted_matvec)
    monkeypatch.setattr(solver, "survey_kernel", counted_build)
    return count


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_rows_sum_to_half_the_squared_error(measured_trajectory, solver):
    estimator = ShellEnergyEstimator(solver=solver, n_steps=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        frame = estimator.fit_transform(measured_trajectory)
    for total, snapshot in zip(frame.sum(axis=1), measured_trajectory, strict=True):
        state = snapshot.load_state()
        outputs = torch.func.functional_call(snapshot.model, state, (snapshot.inputs,))
        onehot = torch.nn.functional.one_hot(snapshot.targets, 10)
        expected = 0.5 * (onehot - outputs).square().sum().item() / len(outputs)
        assert total == pytest.approx(expected, rel=CLOSURE_RTOL)


def test_lanczos_bounds_contain_the_exact_energies(measured_trajectory):
    exact = ShellEnergyEstimator(solver="exact").fit(measured_trajectory)
    lanczos = ShellEnergyEstimator(solver="lanczos", n_steps=25, floor=exact.edges_[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        bounds = lanczos.fit(measured_trajectory).shells_
    merged = bounds.merge(exact.shells_, on=["tau", "batch", "shell"], suffixes=("", "_exact"))
    shells = merged[~merged["shell"].isin(["null", "unresolved"])]
    assert len(shells) > 100
    assert (shells["energy_lower"] <= shells["energy_exact"]).all()
    assert (shells["energy_exact"] <= shells["energy_upper"]).all()


def test_first_edge_lies_at_or_above_the_floor(measured_trajectory):
    estimator = ShellEnergyEstimator(solver="exact", q=3.0).fit(measured_trajectory)
    assert estimator.edges_[0] >= estimator.resolution_floor_
    assert estimator.edges_[-1] > estimator.lambda_max_
    frame = estimator.transform(measured_trajectory)
    assert frame.attrs["resolution_floor"] > 0
    assert frame.attrs["lambda_max"] == estimator.lambda_max_


def test_grid_over_q_costs_the_products_of_one_fit(trajectory, count_products):
    estimator = ShellEnergyEstimator(solver="lanczos", n_steps=20)
    grid = {"q": list(np.linspace(1.3, 4.0, 10))}
    search = GridSearchCV(estimator, grid, cv=GroupKFold(4), refit=largest_q_within_one_se)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        search.fit(trajectory, groups=[s.batch for s in trajectory])
    assert count_products["operators"] == len(trajectory)
    assert search.best_estimator_.n_matvecs_ == 20 * len(trajectory)


def test_memory_resumes_an_interrupted_run(trajectory, tmp_path, monkeypatch):
    estimator = ShellEnergyEstimator(memory=str(tmp_path))
    measure = shell_energy.measure_spectrum
    calls, resumed = [], []

    @wraps(measure)
    def interrupted(snapshot, *args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(snapshot)
        return measure(snapshot, *args)

    monkeypatch.setattr(shell_energy, "measure_spectrum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(trajectory)

    @wraps(measure)
    def counted(snapshot, *args):
        resumed.append(snapshot)
        return measure(snapshot, *args)

    monkeypatch.setattr(shell_energy, "measure_spectrum", counted)
    for snapshot in trajectory:
        snapshot.measures.clear()
    estimator.fit(trajectory)
    assert len(resumed) == len(trajectory) - 5


def test_callable_objects_are_measured_once_also_by_clones(trajectory, count_products):
    residual = partial(scaled_error, scale=2.0)
    search = GridSearchCV(
        ShellEnergyEstimator(residual=residual), {"q": [1.5, 2.0]}, cv=GroupKFold(2)
    )
    search.fit(trajectory, groups=[s.batch for s in trajectory])
    assert count_products["operators"] == len(trajectory)


def test_memory_may_be_a_path(trajectory, tmp_path):
    ShellEnergyEstimator(memory=tmp_path).fit(trajectory[:1])
    assert any(tmp_path.rglob("output.pkl"))


def test_memory_tells_states_residuals_and_settings_apart(trajectory, tmp_path):
    first, other_state = trajectory[0], trajectory[-4]
    frames = [
        ShellEnergyEstimator(memory=str(tmp_path), solver="exact", **changes).fit_transform([s])
        for s, changes in [
            (first, {}),
            (other_state, {}),
            (first, {"residual": "brier"}),
            (first, {"residual": lambda outputs, targets: outputs[:, :1]}),
            (first, {"residual": lambda outputs, targets: outputs[:, 1:]}),
            (first, {"parameters": "0.weight"}),
        ]
    ]
    totals = {(round(f.to_numpy().sum(), 12), round(f.attrs["lambda_max"], 12)) for f in frames}
    assert len(totals) == len(frames)


def test_score_prefers_the_resolution_of_the_data(measured_trajectory):
    X = measured_trajectory
    search = GridSearchCV(ShellEnergyEstimator(), {"q": [1.02, 2.0, 1e6]}, cv=GroupKFold(4))
    search.fit(X, groups=[s.batch for s in X])
    noise, best, blurred = search.cv_results_["mean_test_score"]
    assert best > noise
    assert best > blurred


def test_score_is_a_likelihood(measured_trajectory):
    """The density integrates to one over the window, whatever q is."""
    for q in (1.3, 2.0, 7.0):
        density = ShellEnergyEstimator(q=q).fit(measured_trajectory)._density
        mass = (density.density * np.diff(np.log(density.edges))).sum()
        assert mass == pytest.approx(1.0, rel=1e-12)


def flat_profile():
    """Energies flat in ln λ from 1e-8 λ_max to λ_max: nothing has a peak."""
    n = 200
    scale = torch.logspace(-4, 0, n, dtype=torch.float64)
    model = torch.nn.Linear(n, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    targets = torch.ones(n, 1, dtype=torch.float64)
    return [place((model, torch.diag(scale) * n**0.5, targets))]


def test_a_flat_profile_warns_before_anyone_calls_it_unimodal():
    with pytest.warns(ResolutionWarning, match="do not call the profile unimodal"):
        ShellEnergyEstimator(solver="lanczos", n_steps=15).fit(flat_profile())


@pytest.mark.parametrize("n_steps", [20, 40])
def test_floor_of_a_smooth_measure_falls_as_the_square_of_the_steps(n_steps):
    """Above it a flat profile is flat; the known range of the constant is 10 to 80."""
    estimator = ShellEnergyEstimator(solver="lanczos", n_steps=n_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        energies = estimator.fit_transform(flat_profile()).iloc[0, 1:-1]
    constant = estimator.resolution_floor_ * n_steps**2 / estimator.lambda_max_
    assert 10 < constant < 80
    # Seven or eight of the 200 modes fall into an octave.
    np.testing.assert_allclose(energies, energies.mean(), rtol=0.15)


def test_zero_error_gives_zero_energies_and_a_status():
    model = place(torch.nn.Linear(3, 2, dtype=torch.float64))
    inputs = place(torch.eye(3, dtype=torch.float64))
    estimator = ShellEnergyEstimator().fit([(model, inputs, model(inputs).detach())])
    assert (estimator.shells_["energy"] == 0).all()
    assert estimator.shells_["status"].str.contains("zero error").any()
    assert np.isnan(estimator.score([(model, inputs, model(inputs).detach())]))


def test_fit_callbacks_see_one_task_per_snapshot(measured_trajectory):
    callback_module = pytest.importorskip("sklearn.callback")
    seen = []

    class Recorder:
        def setup(self, estimator, context):
            seen.append("setup")

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context):
            seen.append(context.task_name)

        def teardown(self, estimator, context):
            seen.append("teardown")

    assert isinstance(Recorder(), callback_module.FitCallback)
    ShellEnergyEstimator().set_callbacks(Recorder()).fit(measured_trajectory)
    assert seen.count("snapshot") == len(measured_trajectory)
    assert seen[0] == "setup"
    assert seen[-1] == "teardown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": 1.0}, "q must be"),
        ({"q": float("nan")}, "q must be"),
        ({"q": "2"}, "q must be a real number"),
        ({"lambda_0": 0.0}, "lambda_0"),
        ({"solver": "cg"}, "solver must be one of"),
        ({"n_steps": 0}, "n_steps"),
        ({"n_steps": 2.5}, "n_steps must be an integer"),
        ({"floor": -1.0}, "floor"),
        ({"floor": "low"}, "floor must be one of 'auto'"),
        ({"floor": 1e9}, "floor must lie below the largest eigenvalue"),
        ({"window": (2.0, 1.0)}, "window"),
        ({"window": 3.0}, "window"),
        ({"residual": "hinge"}, "residual"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"parameters": "no such layer"}, "parameters"),
        ({"verbose": -1}, "verbose"),
    ],
)
def test_wrong_parameters_are_named(measured_trajectory, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ShellEnergyEstimator(**changes).fit(measured_trajectory)


def test_float32_products_agree_with_float64(measured_trajectory):
    double = ShellEnergyEstimator(solver="exact", floor=1e-3).fit(measured_trajectory)
    single = ShellEnergyEstimator(solver="exact", floor=1e-3, dtype="float32")
    frames = [e.fit(measured_trajectory).transform(measured_trajectory) for e in (double, single)]
    largest = [frame.index.get_level_values("lambda_max").to_numpy() for frame in frames]
    np.testing.assert_allclose(*largest, rtol=1e-6)
    # Eigenvalues within the rounding error of an edge may change shells.
    sums = (frame.droplevel("lambda_max").T.cumsum() for frame in frames)
    pd.testing.assert_frame_equal(*sums, atol=1e-4, rtol=1e-2)
