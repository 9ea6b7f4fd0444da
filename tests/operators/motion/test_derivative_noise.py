"""The rounding error that a derivative of the kernel says it has, against float64."""

import numpy as np
import pytest
import torch

from spectralshell.operators import survey_motion
from tests.operators.motion.test_derivative import NARROW
from tests.zoo import CASES_BY_NAME, RESIDUALS, make_snapshot

# What is claimed over what is wrong. The noise of M has a margin of two and a floor of 6e-7, which
# small models stay below; an error scatters with its few largest roundings.
MEAN, EACH = (2.0, 8.0), (0.4, 16.0)
# One error may be small by luck: the root mean square along as many directions is compared.
N_DIRECTIONS = 4

NAMES = ["mlp", "residual cnn", "groupnorm cnn", "tied language model", "checkpointed"]


def motion_in(dtype, name, **options):
    """Set the kernel of a float32 model in motion, computed in a dtype."""
    kind = "brier"
    snapshot = make_snapshot(CASES_BY_NAME[name], kind, torch.float32)
    return survey_motion(snapshot, residual=RESIDUALS[kind], dtype=dtype, **options)


def claims(name, method, max_memory):
    """Return the noise in float32 and in float64, and the error in float32, of some derivatives."""
    found = []
    with (
        motion_in("float32", name, max_memory=max_memory) as narrow,
        motion_in("float64", name) as wide,
    ):
        for _ in range(N_DIRECTIONS):
            direction = narrow.direction("random", norm=1.0)
            moved = dict(zip(narrow.parameter_names, direction.tangents, strict=True))
            derivative = narrow.derivative(direction, method=method)
            step = {"step": derivative.step} if method == "difference" else {}
            expected = wide.derivative(wide.direction(moved), method=method, **step)
            error = torch.linalg.matrix_norm(derivative.to_dense() - expected.to_dense(), 2)
            found.append((derivative.noise, expected.noise, float(error)))
    return np.array(found)


@pytest.mark.parametrize(
    ("method", "max_memory"), [("difference", None), ("difference", NARROW), ("exact", None)]
)
def test_noise_is_the_size_of_the_error(method, max_memory):
    found = np.array([claims(name, method, max_memory) for name in NAMES])
    narrow, wide, errors = np.sqrt((found**2).mean(axis=1)).T
    ratios = narrow / errors
    assert MEAN[0] < np.exp(np.log(ratios).mean()) < MEAN[1]
    assert EACH[0] < (found[..., 0] / found[..., 2]).min()
    assert ratios.max() < EACH[1]
    assert (wide / errors).max() < 1e-6
