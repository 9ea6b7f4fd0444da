"""Models that lower the precision inside, and compiled ones, are refused in words."""

import pytest
import torch
from torch import nn

from spectralshell import ShellEnergyEstimator
from spectralshell.measurements.settings import kernel_settings
from spectralshell.operators import build_exact_kernel, build_kernel
from tests.device import place_snapshot

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Lowered(nn.Linear):
    raised = False

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = super().forward(x)
        return outputs.float() if self.raised else outputs


@pytest.mark.parametrize("raised", [False, True])
def test_a_model_that_lowers_the_precision_inside(raised):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Lowered(4, 3))
    model[2].raised = raised
    with pytest.raises(ValueError, match=r"lowers? the precision inside"):
        build_kernel(place_snapshot(model, X, torch.zeros(6, 3)))


def test_compiled_modules_are_refused():
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(nn.Linear(4, 3))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(TypeError, match=r"compiled by torch\.jit"):
            place_snapshot(model, X, torch.zeros(6, 3))


@pytest.mark.parametrize(
    ("spelled", "dtype"),
    [
        ("float32", torch.float32),
        ("torch.float32", torch.float32),
        (torch.float32, torch.float32),
        ("float64", torch.float64),
        ("torch.float64", torch.float64),
        (torch.float64, torch.float64),
        (None, None),
    ],
)
def test_a_dtype_is_spelled_the_same_everywhere(spelled, dtype):
    snapshot = place_snapshot(nn.Linear(4, 3), X, torch.zeros(6, 3))
    for build in (build_kernel, build_exact_kernel):
        assert build(snapshot, dtype=spelled).dtype == (dtype or torch.float32)
    estimator = ShellEnergyEstimator(dtype=spelled)
    assert kernel_settings(estimator).dtype == dtype
    assert estimator.fit([snapshot]).n_shells_ > 0


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", torch.float16, "double", 64, float])
def test_another_dtype_is_one_error_everywhere(dtype):
    snapshot = place_snapshot(nn.Linear(4, 3), X, torch.zeros(6, 3))
    texts = set()
    for act in (
        lambda: build_kernel(snapshot, dtype=dtype),
        lambda: build_exact_kernel(snapshot, dtype=dtype),
        lambda: ShellEnergyEstimator(dtype=dtype).fit([snapshot]),
    ):
        with pytest.raises(ValueError, match="dtype must be None, 'float32' or 'float64'") as found:
            act()
        texts.add(str(found.value))
    assert len(texts) == 1
