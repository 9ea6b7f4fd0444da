"""Parameters that share memory in another shape are named; those that only seem to are not."""

import pytest
import torch
from torch import nn

from spectralshell import Snapshot
from spectralshell.operators import build_exact_kernel
from tests.zoo import CASES, build_model


def autoencoder(tie):
    torch.manual_seed(0)
    model = nn.ModuleDict({"enc": nn.Linear(4, 3, bias=False), "dec": nn.Linear(3, 4, bias=False)})
    tie(model)
    model.forward = lambda x: model["dec"](model["enc"](x).tanh())
    return model


def transposed(model):
    model["dec"].weight = nn.Parameter(model["enc"].weight.data.t())


def reshaped(model):
    model["dec"].weight = nn.Parameter(model["enc"].weight.data.view(4, 3))


def part_of_a_table(model):
    table = nn.Parameter(torch.randn(20))
    model.register_parameter("table", table)
    model["dec"].weight = nn.Parameter(table.data[4:16].view(4, 3))


def other_columns(model):
    table = torch.randn(4, 6)
    model.register_parameter("left", nn.Parameter(table[:, :4]))
    model["dec"].weight = nn.Parameter(table[:, 2:5])


def buffer(model):
    model.register_buffer("seen", model["enc"].weight.data.flatten())


@pytest.mark.parametrize(
    ("tie", "names"),
    [
        (transposed, ("enc.weight", "dec.weight")),
        (reshaped, ("enc.weight", "dec.weight")),
        (part_of_a_table, ("table", "dec.weight")),
        (other_columns, ("left", "dec.weight")),
        (buffer, ("enc.weight", "seen")),
    ],
)
def test_shared_memory_is_an_error_that_names_both(tie, names):
    model = autoencoder(tie)
    for state in (None, model.state_dict()):
        with pytest.raises(ValueError, match="share memory") as found:
            Snapshot(model, torch.ones(5, 4), torch.zeros(5, 4), state=state)
        assert all(repr(name) in str(found.value) for name in names)


def next_to_each_other(model):
    flat = torch.randn(24)
    model["enc"].weight = nn.Parameter(flat[:12].view(3, 4))
    model["dec"].weight = nn.Parameter(flat[12:].view(4, 3))


def interleaved(model):
    table = torch.randn(4, 6)
    model["dec"].weight = nn.Parameter(table[:, ::2])
    model.register_parameter("odd", nn.Parameter(table[:, 1::2]))


def two_buffers(model):
    model.register_buffer("one", torch.ones(6))
    model.register_buffer("other", model.one.view(2, 3))


def normalised(model):
    torch.nn.utils.spectral_norm(model["dec"])


def many_in_a_flat_buffer(model):
    flat = torch.randn(3000, 4)
    for row in range(1, 3000):
        model.register_parameter(f"row{row}", nn.Parameter(flat[row]))


@pytest.mark.parametrize(
    "tie", [next_to_each_other, many_in_a_flat_buffer, interleaved, two_buffers, normalised]
)
def test_memory_beside_each_other_is_no_error(tie):
    Snapshot(autoencoder(tie), torch.ones(5, 4), torch.zeros(5, 4))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_no_model_of_the_zoo_is_refused(case):
    model = build_model(case, torch.float64)
    Snapshot(model, torch.ones(2, 3), torch.zeros(2))


def test_the_remedy_gives_the_kernel_of_training():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.enc = nn.Linear(4, 3, bias=False).double()

        def forward(self, x):
            return self.enc(x).tanh() @ self.enc.weight

    model, x, rate = Tied(), torch.randn(5, 4).double(), 1e-7
    y = torch.zeros(5, 4).double()
    kernel = build_exact_kernel(Snapshot(model, x, y))
    error = kernel.residual_vector
    expected = float(error @ kernel.matvec(error))
    before = 0.5 * (y - model(x)).square().sum() / 5
    before.backward()
    with torch.no_grad():
        model.enc.weight -= rate * model.enc.weight.grad
    after = 0.5 * (y - model(x)).square().sum() / 5
    # A step of 1e-7 is curved by about as much, relative.
    assert float((before - after).detach()) / rate == pytest.approx(expected, rel=1e-5)
