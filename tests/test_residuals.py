"""The five kinds of residual against formulas written with torch's own losses."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from spectralshell.residuals import resolve_residual

NAMES = ["mse", "brier", "cross-entropy", "nll"]
EXACT = 1e-12


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.tensor([[0, 3, -100], [2, -100, 1]])


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_label_are_left_out(name, outputs, labels):
    residual = resolve_residual(name)
    kept = labels != -100
    alone = residual.error(outputs[kept], labels[kept])
    torch.testing.assert_close(residual.error(outputs, labels), alone)
    assert residual.prepare(labels, outputs).n_rows == 4


def test_labels_and_one_hot_targets_count_the_same_tokens(outputs):
    labels = torch.tensor([[0, 3, 2], [2, 1, 1]])
    one_hot = F.one_hot(labels, 4).double()
    residual = resolve_residual("mse")
    torch.testing.assert_close(
        residual.error(outputs, labels).flatten(), residual.error(outputs, one_hot).flatten()
    )
    rows = {residual.prepare(targets, outputs).n_rows for targets in (labels, one_hot)}
    assert rows == {6}


def test_nll_is_torch_s_cross_entropy(outputs, labels):
    expected = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
    error = resolve_residual("nll").error(outputs, labels)
    torch.testing.assert_close(error, expected[labels.flatten() != -100])


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("mse", lambda f, y: 0.5 * (f - F.one_hot(y, 4)).square().sum()),
        ("brier", lambda f, y: 0.5 * (f.softmax(-1) - F.one_hot(y, 4)).square().sum()),
        ("cross-entropy", lambda f, y: F.cross_entropy(f, y, reduction="sum")),
        ("nll", lambda f, y: 0.5 * F.cross_entropy(f, y, reduction="none").square().sum()),
    ],
)
def test_the_velocity_descends_the_loss_of_the_table(name, loss, outputs):
    residual = resolve_residual(name)
    z = outputs[0].clone().requires_grad_()
    y = torch.tensor([0, 3, 1])
    downhill = -torch.autograd.grad(loss(z, y), z)[0]
    error = residual.error(z, y)
    cotangent = residual.velocity_cotangent(error.detach())
    velocity = torch.autograd.grad(residual.jacobian_of(z, y), z, cotangent)[0]
    torch.testing.assert_close(velocity, downhill, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_the_error_rate_is_the_derivative_of_the_error(name, seed):
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (3,), generator=generator)
    residual = resolve_residual(name)
    _, expected = torch.func.jvp(lambda x: residual.error(x, y), (z,), (t,))
    values, rate = torch.func.jvp(lambda x: residual.jacobian_of(x, y), (z,), (t,))
    torch.testing.assert_close(residual.error_rate(values, rate), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("name", "exact"), [("mse", True), ("brier", True), ("cross-entropy", False), ("nll", False)]
)
def test_which_residuals_obey_the_linear_dynamics(name, exact):
    assert resolve_residual(name).dynamics_exact is exact


@pytest.mark.parametrize("residual", [*NAMES, F.mse_loss])
def test_residuals_pickle(residual):
    resolved = resolve_residual(residual)
    assert pickle.loads(pickle.dumps(resolved)).name == resolved.name


def test_integer_regression_targets_of_the_outputs_shape_are_real_values():
    outputs = torch.zeros(3, 1)
    error = resolve_residual("mse").error(outputs, torch.tensor([[1], [2], [3]]))
    assert error.flatten().tolist() == [1.0, 2.0, 3.0]
