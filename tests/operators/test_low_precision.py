"""Models that lower the precision inside, and compiled ones, are refused in words."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_kernel
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
