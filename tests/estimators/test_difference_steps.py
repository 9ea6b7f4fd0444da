"""Steps of a difference out of range are told, by every solver and estimator that takes one."""

import pytest
import torch
from torch import nn

from spectralshell import JacobianBlockDiagnostic, ShellFluxEstimator, ToeplitzDiagnostic
from spectralshell.statuses import FROZEN_KERNEL, STEP_TOO_LONG, STEP_TOO_SHORT
from tests.device import place_snapshot

WRONG = 0.06
"""Relative error of the largest flux that a step has to be found at: above the 5 % of the check."""

STEPS = (1e-20, 1e-5, 0.3, 1000.0)


def snapshot(activation=nn.Tanh, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    inputs, targets = (torch.randn(10, n, generator=generator).to(dtype) for n in (3, 2))
    return place_snapshot(model, inputs, targets)


def fluxes(s, **options):
    estimator = ShellFluxEstimator(n_steps=20, **options).fit([s])
    return estimator.fluxes_, estimator.summary_["status"].iloc[0]


@pytest.mark.filterwarnings("ignore::spectralshell.warning_categories.GateWarning")
@pytest.mark.parametrize("solver", ["exact", "lanczos"])
@pytest.mark.parametrize(
    ("activation", "dtype"), [(nn.Tanh, torch.float64), (nn.ReLU, torch.float32)]
)
def test_a_wrong_flux_is_not_resolved(activation, dtype, solver):
    s = snapshot(activation, dtype)
    true = fluxes(s, derivative="exact", solver="exact")[0]["flux_down"]
    true_size = true.abs().max()
    for step in STEPS:
        frame, status = fluxes(s, derivative="difference", solver=solver, step=step)
        defect = abs(frame["flux_down"].abs().max() / true_size - 1.0)
        if defect > WRONG and solver == "exact":
            assert not frame["resolved"].any(), (step, defect)
            assert STEP_TOO_LONG in status or STEP_TOO_SHORT in status
        if step in (1e-20, 1000.0):
            assert not frame["resolved"].any()
            assert STEP_TOO_SHORT in status or STEP_TOO_LONG in status
            assert FROZEN_KERNEL not in status
    frame, status = fluxes(s, derivative="difference", solver=solver)
    assert frame["resolved"].any()
    assert "step" not in status


@pytest.mark.parametrize(("step", "phrase"), [(1e-20, STEP_TOO_SHORT), (1000.0, STEP_TOO_LONG)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_diagnostics_tell_it_too(activation, step, phrase):
    how = {"derivative": "difference", "step": step, "n_null": 3}
    toeplitz = ToeplitzDiagnostic(min_modes=1, **how).fit([snapshot(activation)])
    assert phrase in toeplitz.status_
    assert FROZEN_KERNEL not in toeplitz.status_
    blocks = JacobianBlockDiagnostic(**how).fit([snapshot(activation)])
    assert phrase in blocks.trajectory_["status"].iloc[0]


def test_a_kernel_that_stands_still_is_frozen_at_any_step():
    s = place_snapshot(nn.Linear(3, 2).double(), *(torch.ones(4, n).double() for n in (3, 2)))
    for solver in ("exact", "lanczos"):
        for step in (1e-20, 1.0):
            _, status = fluxes(s, derivative="difference", solver=solver, step=step)
            assert FROZEN_KERNEL in status
            assert STEP_TOO_SHORT not in status


def test_a_block_larger_than_the_space_is_the_space():
    found = [
        ToeplitzDiagnostic(solver="lanczos", block_size=size, n_null=2, min_modes=1)
        .fit([snapshot()])
        .coupling_
        for size in (20, 10**12)  # of that many vectors even the first would not fit
    ]
    assert found[0].equals(found[1])
