"""The claimed noise of float32 products bounds their error where it is hard to find."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_exact_kernel, build_kernel
from spectralshell.operators.noise import NOISE_FLOOR
from tests.device import place_snapshot
from tests.zoo import CASES_BY_NAME, make_snapshot


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
        snapshot = place_snapshot(ExactAndRough(gain), x, torch.zeros(n_samples, 5))
    coarse, fine = (build_kernel(snapshot, dtype=dtype) for dtype in ("float32", "float64"))
    reference = fine.to_dense()
    error = torch.linalg.matrix_norm(coarse.to_dense() - reference, 2)
    relative_error = float(error / torch.linalg.matrix_norm(reference, 2))
    assert 6e-7 < relative_error <= coarse.noise < 10 * relative_error


def test_noise_of_a_checkpointed_kernel_is_measured_at_the_snapshot(monkeypatch):
    # Its backward pass evaluates a part anew, with whatever weights it finds.
    monkeypatch.setitem(NOISE_FLOOR, torch.float32, 0.0)
    snapshot = make_snapshot(CASES_BY_NAME["checkpointed"], dtype=torch.float32)
    noise = build_exact_kernel(snapshot).noise
    with torch.no_grad():
        for parameter in snapshot.model.parameters():
            parameter *= 0.5
    assert build_exact_kernel(snapshot).noise == noise > 0.0
