"""Tapes: linear maps replayed from one run, through models that overwrite their tensors."""

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

from spectralshell.operators.jacobian.linearizations import RUNGS, Tape, TapeError
from tests.device import place, place_snapshot
from tests.zoo import build_on_rungs, dense_reference

TOLERANCE = 1e-12
"""Float64, a few layers."""


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return place(torch.randn(*shape, generator=generator, dtype=torch.float64))


class FillsABlank(nn.Linear):
    def forward(self, x):
        filled = x.new_zeros(x.shape[0], 5)
        filled[:, 1:4] = super().forward(x)
        return filled.square() + filled


class FillsACopy(nn.Linear):
    def forward(self, x):
        filled = x[:, :3].clone()
        filled[:, 1:] *= super().forward(x)[:, 1:]
        return filled


class ActsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        hidden = torch.relu_(self.first(x))
        mixed = self.second(hidden)
        mixed += hidden
        return torch.relu_(mixed).mean((2, 3))


MODELS = {
    "fills a blank": (lambda: FillsABlank(4, 3), drawn(6, 4)),
    "fills a copy": (lambda: FillsACopy(4, 3), drawn(6, 4)),
    "acts in place": (ActsInPlace, drawn(5, 2, 4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_write_in_place(name):
    build, x = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(build().double())
    targets = torch.zeros_like(model(x.clone())).detach()
    kernel = build_on_rungs(place_snapshot(model, x, targets))
    reference = dense_reference(model, x, targets, "mse")["kernel"]
    assert kernel.rung == "linearize"
    for _ in range(2):
        assert float((kernel.to_dense().cpu() - reference).norm() / reference.norm()) < TOLERANCE


def test_a_tape_keeps_what_its_result_needs():
    constant, tangents = drawn(3), (drawn(3, seed=1), drawn(3, seed=2))

    def compute(a, b):
        (a * constant).exp_().sum()  # nothing that the result needs
        primal = constant.sin().cos()
        return (a * primal + b).view(3, 1)

    tape = Tape(compute, tangents)
    assert len(tape) == 3
    a, b = drawn(4, 3, seed=3), drawn(4, 3, seed=4)
    expected = (a * constant.sin().cos() + b).unsqueeze(-1)
    torch.testing.assert_close(vmap(tape)(a, b), expected)
    torch.testing.assert_close(tape(a[0], b[0]), expected[0])


def test_constants_have_their_values_of_the_moment():
    def compute(t):
        constant = torch.full_like(t, 2.0)
        early = t * constant
        constant.mul_(5.0)
        return early + t * constant

    tape = Tape(compute, (drawn(3),))
    t = drawn(3, seed=1)
    torch.testing.assert_close(tape(t), 12.0 * t)


FAULTS = {
    "looks at the values": lambda t: t * t.sum().item(),
    "into a constant": lambda t: torch.arange(3.0).to(t).sin().add_(t),
    "overwrites an argument": lambda t: t.mul_(2.0),
    "does not depend": lambda t: torch.ones(3, device=t.device),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_replayed_is_an_error(message):
    with pytest.raises(TapeError, match=message):
        Tape(FAULTS[message], (drawn(3),))


@pytest.mark.parametrize("rung", RUNGS)
def test_blocks_count_columns_of_unused_parameters(rung):
    weight, unused = drawn(3, 2), drawn(5, seed=1)
    linearization = RUNGS[rung](lambda w, _: w.sin().sum(1), (weight, unused))
    pulled = linearization.pull_block(drawn(4, 3, seed=2))
    assert [tuple(p.shape) for p in pulled] == [(4, 3, 2), (4, 5)]
    tangent = drawn(4, 3, 2, seed=3)
    pushed = linearization.push_block((tangent, drawn(4, 5, seed=4)))
    expected = [jvp(lambda w: w.sin().sum(1), (weight,), (t,))[1] for t in tangent]
    torch.testing.assert_close(pushed, torch.stack(expected))


def test_memory_is_reused_only_where_nothing_else_sees_it():
    constant = drawn(3)

    def compute(t):
        doubled = t * 2.0
        seen = doubled.view(3, 1)
        tripled = doubled * 3.0  # the view of the first operand is still to be read
        return (tripled + seen.squeeze(1)) * constant + t * constant

    tape = Tape(compute, (drawn(3),))
    t = drawn(3, seed=1)
    expected = (t * 8.0 + t) * constant
    kept = t.clone()
    for _ in range(2):
        torch.testing.assert_close(tape(t), expected)
        torch.testing.assert_close(vmap(tape)(t.expand(2, 3)), expected.expand(2, 3))
    assert torch.equal(t, kept)
    names = [str(step.operation) for step in tape._steps if step.operation._schema.is_mutable]
    assert names == ["aten.add_.Tensor", "aten.mul_.Tensor", "aten.add_.Tensor"]
