"""Choosing between the exact solver and Lanczos, from counts alone and within a memory limit."""

import dataclasses

import pytest
import torch

from spectralshell import ShellEnergyEstimator, ShellFluxEstimator, ToeplitzDiagnostic
from spectralshell.measurements import solver
from spectralshell.measurements.settings import KernelSettings
from spectralshell.measurements.solver import PLAN_COLUMNS, plan_by_memory, plan_spectrum
from spectralshell.operators.costs import Footprint, measure_footprint
from spectralshell.operators.survey import survey_kernel
from tests.device import CPU, place_snapshot
from tests.zoo import CASES, CASES_BY_NAME, make_snapshot

AMPLE = 10**12


def footprint(**changes):
    """An image classifier: 64 samples of 10 outputs, no parameter without a layer."""
    sizes = Footprint(
        n_samples=64,
        n_slots=10,
        n_entries=640,
        n_parameters=10**6,
        itemsize=4,
        forward_flops=1e10,
        graph_bytes=5e6,
        largest_activation=10**4,
        n_nodes=100,
        units=(),
        n_others=0,
    )
    return dataclasses.replace(sizes, **changes)


def test_few_outputs_are_solved_exactly_and_many_by_lanczos():
    assert plan_spectrum(footprint(), AMPLE, n_steps=100).solver == "exact"
    many = footprint(n_samples=4096, n_entries=40960)
    assert plan_spectrum(many, AMPLE, n_steps=100).solver == "lanczos"


def test_same_counts_give_the_same_plan():
    first, again = (plan_spectrum(footprint(), AMPLE, n_steps=100) for _ in range(2))
    assert first == again


def test_a_solver_asked_for_is_kept():
    assert plan_spectrum(footprint(), AMPLE, n_steps=100, solver="lanczos").solver == "lanczos"


def test_little_memory_makes_chunks():
    plan = plan_spectrum(footprint(), 200 * 10**6, n_steps=100)
    assert plan.chunk_size is not None
    assert plan.chunk_size < 64
    assert plan.exact.peak_bytes <= 200 * 10**6


def test_the_other_solver_steps_in_where_the_matrix_does_not_fit():
    wide = footprint(n_samples=1000, n_entries=10**4, n_slots=10, graph_bytes=1e4, n_parameters=10)
    assert plan_spectrum(wide, AMPLE, n_steps=10**4).solver == "exact"
    assert plan_spectrum(wide, 10**9, n_steps=100).solver == "lanczos"


@pytest.mark.parametrize("name", ["auto", "exact", "lanczos"])
def test_an_error_says_what_would_fit(name):
    with pytest.raises(ValueError, match=r"max_memory: 1 KB .*exact' needs about .* GB|MB"):
        plan_spectrum(footprint(), 1000, n_steps=100, solver=name)


def test_a_bad_limit_is_named():
    estimator = ShellEnergyEstimator(max_memory="lots")
    with pytest.raises(ValueError, match="max_memory must be a number of bytes"):
        estimator.fit([make_snapshot(CASES_BY_NAME["mlp"])])


def test_a_tiny_limit_is_an_error_of_fit():
    estimator = ShellEnergyEstimator(max_memory="2 KB")
    with pytest.raises(ValueError, match=r"max_memory: 2 KB do not hold solver='auto'"):
        estimator.fit([make_snapshot(CASES_BY_NAME["mlp"])])


@pytest.mark.parametrize("kind", [ShellEnergyEstimator, ShellFluxEstimator, ToeplitzDiagnostic])
def test_what_is_free_does_not_choose_the_solver(kind, monkeypatch):
    found = []
    for free in (AMPLE, 300_000):
        monkeypatch.setattr(solver, "free_bytes", lambda device, free=free: free)
        found.append(kind().fit([make_snapshot(CASES_BY_NAME["mlp"])]).plan_)
    assert list(found[0]["solver"]) == list(found[1]["solver"])
    monkeypatch.setattr(solver, "free_bytes", lambda device: 100)
    with pytest.raises(ValueError, match=r"max_memory=None allows 8 GB.* and 100 B are free"):
        kind().fit([make_snapshot(CASES_BY_NAME["mlp"])])


def test_little_that_is_free_makes_smaller_pieces(monkeypatch):
    large = footprint(graph_bytes=5e7)

    def plan(max_bytes, name):
        return plan_spectrum(large, max_bytes, solver=name, n_steps=100)

    free = 10**9
    monkeypatch.setattr(solver, "free_bytes", lambda device: free)
    found = plan_by_memory(KernelSettings(solver="lanczos"), CPU, plan)
    assert found.peaks["lanczos"] <= free < plan(AMPLE, "lanczos").peaks["lanczos"]


def test_the_plan_is_a_frame_with_a_row_for_each_snapshot():
    X = [make_snapshot(CASES_BY_NAME["mlp"], tau=float(tau)) for tau in range(2)]
    estimator = ShellEnergyEstimator().fit(X)
    assert list(estimator.plan_.columns) == ["tau", "batch", *PLAN_COLUMNS]
    assert estimator.plan_["tau"].tolist() == [0.0, 1.0]
    assert set(estimator.plan_["solver"]) == {estimator.solver_} == {"exact"}
    assert estimator.n_matvecs_ == 0
    assert (estimator.plan_["exact_cost"] < estimator.plan_["lanczos_cost"]).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_two_samples_tell_the_footprint_of_the_batch(case):
    """Every count but the held bytes, whose small parts may not depend on the samples."""
    survey = survey_kernel(make_snapshot(case))
    problem = survey.evaluation.problem
    whole = dataclasses.replace(survey.evaluation)
    guard, installed = problem.function.guard(), problem.function.installed()
    with guard, installed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectralshell.operators.costs._COUNTED_SAMPLES", problem.n_samples)
        counted = measure_footprint(whole, lambda _: "")
    assert dataclasses.replace(counted, graph_bytes=survey.footprint.graph_bytes) == (
        survey.footprint
    )
    assert counted.graph_bytes == pytest.approx(survey.footprint.graph_bytes, rel=0.5)


def test_a_batch_that_cannot_be_halved_is_counted_whole():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x):
            return self.linear(x.reshape(3, 2, 2)).reshape(6, 1)

    snapshot = place_snapshot(Fixed(), torch.randn(6, 2), torch.zeros(6, 1))
    assert survey_kernel(snapshot).footprint.n_slots == 1
