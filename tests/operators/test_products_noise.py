"""The claimed noise of float32 products bounds their error where it is hard to find."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_kernel
from spectralshell.snapshots import Snapshot


class ExactAndRough(nn.Module):
    """Outputs of the largest eigenvalues are exact; the error is all in two others."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.exact, self.rough = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        rough = torch.sin(300.0 * self.rough(x[:, 4:]))  # the phase loses three digits
        return torch.cat([self.gain * self.exact(x[:, :4]), rough], dim=1)


@pytest.mark.parametrize("gain", [200.0, 600.0])
@pytest.mark.parametrize("n_samples", [20, 60])
def test_error_beside_the_largest_modes_is_covered(gain, n_samples):
    x = torch.randn(n_samples, 8, generator=torch.Generator().manual_seed(n_samples))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        snapshot = Snapshot(ExactAndRough(gain), x, torch.zeros(n_samples, 5))
    coarse, fine = (build_kernel(snapshot, dtype=dtype) for dtype in ("float32", "float64"))
    reference = fine.to_dense()
    error = torch.linalg.matrix_norm(coarse.to_dense() - reference, 2)
    relative_error = float(error / torch.linalg.matrix_norm(reference, 2))
    assert 6e-7 < relative_error <= coarse.noise < 10 * relative_error
