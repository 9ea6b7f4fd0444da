"""What cannot be computed in chunks is refused: coupled samples, residuals and targets."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_kernel
from tests.device import place_snapshot

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.linspace(1, -1, 36, dtype=torch.float64).reshape(6, 6)
W = torch.arange(1.0, 7.0, dtype=torch.float64)


def centred(outputs, targets):
    return outputs - outputs.mean(0) - targets


def weighted(outputs, targets):
    values, weights = targets
    return weights * (outputs - values)


@pytest.mark.parametrize(("residual", "targets"), [(centred, Y), (weighted, (Y, W))])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, None])
def test_a_residual_that_needs_the_whole_batch_is_named(residual, targets, chunk_size):
    snapshot = place_snapshot(nn.Linear(4, 6).double(), X, targets)
    with pytest.raises(ValueError, match=f"residual '{residual.__name__}' .*in chunks"):
        build_kernel(snapshot, residual=residual, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, None])
def test_constants_bound_to_a_residual_do_not_count_samples(chunk_size):
    def bound(outputs, targets):
        return weighted(outputs, (targets, W.to(outputs)))

    snapshot = place_snapshot(nn.Linear(4, 6).double(), X, Y)
    assert build_kernel(snapshot, residual=bound, chunk_size=chunk_size).n == 36


class ScaledByTheLargest(nn.Linear):
    def forward(self, x):
        return super().forward(x) / x.abs().amax().clamp(min=5)


@pytest.mark.parametrize("position", [0, 1, 5, 39])
@pytest.mark.parametrize("chunk_size", [1, 10])
def test_one_sample_that_acts_on_its_company_is_found(position, chunk_size):
    x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(40, 4)
    x[position, 2] = 9
    snapshot = place_snapshot(ScaledByTheLargest(4, 3).double(), x, torch.zeros(40, 3))
    with pytest.raises(ValueError, match="depend on the other samples"):
        build_kernel(snapshot, chunk_size=chunk_size)
