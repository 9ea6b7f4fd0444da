"""Outputs that do not change as reverse mode says: found, labelled, refused; no false alarm."""

import pickle
from functools import partial

import pytest
import torch
from torch import nn

from spectralshell import (
    JacobianBlockDiagnostic,
    ShellEnergyEstimator,
    ShellFluxEstimator,
    ToeplitzDiagnostic,
)
from spectralshell.models.function import ModelFunction
from spectralshell.operators import build_exact_kernel, probes
from spectralshell.operators.build import build_kernel
from spectralshell.operators.problem import pose_problem
from spectralshell.operators.survey import survey_kernel
from spectralshell.warning_categories import DynamicsWarning
from tests.device import place_snapshot
from tests.untrue_models import HONEST, UNTRUE
from tests.zoo import CASES, RESIDUALS, build_model, make_inputs, make_snapshot, make_targets

DTYPES = [torch.float64, torch.float32]

SMALL_STEP = 1e-5  # of SGD: the loss falls by lr · dissipation but for lr²
SGD = 1e-3  # relative: second order in a step of 1e-5, and rounding of the loss over it

SAYS = "do not change as the Jacobian says"


def snapshot_of(build, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(dtype)
        return place_snapshot(model, torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype))


def defect_of(snapshot, **options):
    return survey_kernel(snapshot, **options).evaluation.problem.jacobian_defect


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNTRUE)
def test_another_derivative_is_found(name, dtype):
    assert defect_of(snapshot_of(UNTRUE[name], dtype=dtype)) > 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HONEST)
def test_kinks_and_rounding_are_not_another_derivative(name, dtype):
    assert defect_of(snapshot_of(HONEST[name], dtype=dtype)) == 0.0


@pytest.mark.parametrize("build", [build_kernel, build_exact_kernel])
def test_kernels_say_so(build):
    with pytest.warns(DynamicsWarning, match=SAYS):
        kernel = build(snapshot_of(UNTRUE["sign weights"]))
    assert SAYS in kernel.status
    assert kernel.jacobian_defect > 0.0
    assert not kernel.dynamics_exact


def loss_rate(snapshot):
    """Return −d(½ mean ‖y − f‖²)/dτ of a real step of SGD."""
    model, x, y = snapshot.model, snapshot.inputs, snapshot.targets
    losses = []
    for _ in range(2):
        loss = 0.5 * (y - model(x)).square().sum() / len(x)
        losses.append(float(loss.detach()))
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SMALL_STEP * parameter.grad
    return (losses[0] - losses[1]) / SMALL_STEP


@pytest.mark.parametrize(("build", "honest"), [(HONEST["relu"], True), *(
    (UNTRUE[name], False) for name in ("sign weights", "reversed gradients", "target branch")
)])  # fmt: skip
def test_dissipation_is_that_of_sgd_or_labelled(build, honest):
    snapshot = snapshot_of(build)
    estimator = ShellEnergyEstimator(solver="exact", floor=1e-9)
    if honest:
        estimator.fit([snapshot])
    else:
        with pytest.warns(DynamicsWarning, match=SAYS):
            estimator.fit([snapshot])
    labelled = estimator.shells_["status"].str.contains(SAYS)
    assert estimator.dynamics_exact_ == honest
    assert labelled.all() != honest
    measure = pickle.loads(pickle.dumps(estimator.spectral_measures([snapshot])[0]))
    assert (measure.jacobian_defect == 0.0) == honest
    dissipation = float((2 * measure.nodes * measure.weights).sum())
    assert (abs(loss_rate(snapshot) / dissipation - 1) < SGD) == honest


@pytest.mark.parametrize(
    "estimator",
    [
        ShellFluxEstimator(),
        ShellFluxEstimator(derivative="difference"),
        ShellFluxEstimator(solver="lanczos", n_steps=4),
        ToeplitzDiagnostic(),
        JacobianBlockDiagnostic(),
    ],
)
def test_balances_are_refused(estimator):
    snapshots = [snapshot_of(UNTRUE["rounded weights"])]
    with pytest.raises(ValueError, match=f"{SAYS}|reverse-mode Jacobian.*by no derivative"):
        estimator.fit(snapshots)


def test_residuals_count_as_outputs_do():
    snapshot = snapshot_of(HONEST["relu"])
    assert defect_of(snapshot, residual=lambda o, t: (o - t) * o.detach()) > 0.0
    assert defect_of(snapshot, residual=lambda o, t: (o - t) * o) == 0.0


def test_only_selected_parameters_are_moved():
    snapshot = snapshot_of(UNTRUE["sign weights"])
    assert defect_of(snapshot, parameters="^b") == 0.0
    assert defect_of(snapshot, parameters="^a") > 0.0


def test_padding_vectors_rest():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.normal_(model[0].weight)
    snapshot = place_snapshot(model, torch.tensor([0, 1, 0, 3]), torch.zeros(4, 3))
    assert defect_of(snapshot) == 0.0


def test_parameters_without_a_jacobian_are_named():
    snapshot = make_snapshot(next(case for case in CASES if case["name"] == "raw parameter"))
    assert build_kernel(snapshot).status == "zero Jacobian of unused"


@pytest.mark.parametrize("few", [1.0, 1e9])
def test_three_evaluations_are_enough(monkeypatch, few):
    monkeypatch.setattr(probes, "_WHOLE_FLOPS", few)
    snapshot, counts = snapshot_of(HONEST["deep relu"]), []
    evaluation = pose_problem(snapshot).evaluate(None)
    plain = ModelFunction._outputs

    def counting(self, installed, inputs):
        counts.append(len(inputs))
        return plain(self, installed, inputs)

    monkeypatch.setattr(ModelFunction, "_outputs", counting)
    probes.probed(evaluation)
    assert counts[0] == 2  # a pair of samples, to see what is read
    assert len(counts[1:]) == 3


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case["name"])
def test_models_of_the_zoo_are_true(case, double, monkeypatch):
    monkeypatch.setattr(probes, "_has_double", lambda function: double)
    assert defect_of(drawn(case, "mse", torch.float32, 1)) == 0.0


def drawn(case, kind, dtype, seed):
    """Make a snapshot of a case with weights and inputs of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(case, dtype)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        inputs, targets = make_inputs(case, dtype), make_targets(case, kind, dtype)
        moved = map_noise(inputs)
    return place_snapshot(model, moved, targets)


def map_noise(inputs):
    if isinstance(inputs, dict):
        return {key: map_noise(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(map_noise, inputs))
    return inputs + torch.randn_like(inputs) if inputs.is_floating_point() else inputs


@pytest.mark.slow
@pytest.mark.parametrize("double", [True, False])
def test_no_false_alarm_in_a_thousand_draws(double, monkeypatch):
    monkeypatch.setattr(probes, "_has_double", lambda function: double)
    kinds = [(case, kind, dtype) for dtype in DTYPES for case in CASES for kind in RESIDUALS]
    alarms = []
    for draw in range(1000):
        case, kind, dtype = kinds[draw % len(kinds)]
        snapshot = drawn(case, kind, dtype, draw)
        found = defect_of(snapshot, residual=RESIDUALS[kind])
        if found:
            alarms.append((case["name"], kind, dtype, draw, found))
    assert alarms == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*UNTRUE, *HONEST])
def test_a_hundred_draws(name, dtype):
    build = (UNTRUE | HONEST)[name]
    draws = map(partial(snapshot_of, build, dtype=dtype), range(100))
    assert sum(defect_of(snapshot) > 0.0 for snapshot in draws) == (100 if name in UNTRUE else 0)
