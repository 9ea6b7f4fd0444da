"""Sums of half matrices, and the orders of contraction, against dense formulas."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_exact_kernel
from spectralshell.operators.layers import assembly as layer_assembly
from spectralshell.operators.layers.stores import EntryLayout, KernelSum
from spectralshell.operators.layers.units import (
    GRADIENTS,
    GRAM,
    PAIRS,
    MatrixForm,
    Unit,
    choose_order,
    operation_counts,
)
from tests.device import DEVICE, place, place_snapshot
from tests.zoo import dense_reference

EXACT = 1e-13  # float64 sums in another order

# Fewer and more samples than tiles, no multiple of them; slots around those taken together.
SIZES = [(1, 1), (1, 6), (2, 3), (7, 1), (8, 4), (9, 5), (17, 2), (23, 9)]
sizes = pytest.mark.parametrize(("n_samples", "n_slots"), SIZES)


def layout_of(n_samples, n_slots, kept=None):
    return EntryLayout(n_samples, n_slots, place(kept), torch.float64, DEVICE)


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return place(torch.randn(*shape, generator=generator, dtype=torch.float64))


def same(found, expected):
    assert torch.equal(found, found.T)
    found, expected = found.cpu(), expected.cpu()
    assert float((found - expected).norm()) <= EXACT * float(expected.norm())


def gram_terms(n_samples, n_slots):
    """Inputs, output gradients, and Σ_f (A Aᵀ) ∘ (G Gᵀ) with entries ordered by sample."""
    inputs, outputs = draw(n_samples, 3), draw(n_slots, n_samples, 2)
    expected = torch.einsum("if,jf,sio,tjo->isjt", inputs, inputs, outputs, outputs)
    return inputs, outputs, expected.reshape(n_samples * n_slots, -1)


def pair_terms(n_samples, n_slots, positions):
    """Inputs and output gradients at positions, and the kernel of their products' sums."""
    inputs, outputs = draw(n_samples, 3, positions), draw(n_samples, n_slots, 2, positions)
    gradients = torch.einsum("ifp,isop->isof", inputs, outputs).reshape(n_samples * n_slots, -1)
    return inputs, outputs, gradients @ gradients.T


@sizes
def test_gradients(n_samples, n_slots):
    gradients = draw(n_samples, n_slots, 5)
    total = KernelSum(layout_of(n_samples, n_slots))
    total.add_gradients(gradients)
    flat = gradients.reshape(-1, 5)
    same(total.finish(), flat @ flat.T)


@sizes
def test_gram(n_samples, n_slots):
    inputs, outputs, expected = gram_terms(n_samples, n_slots)
    total = KernelSum(layout_of(n_samples, n_slots))
    total.add_gram(inputs, outputs)
    same(total.finish(), expected)


@sizes
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("max_bytes", [1, 10**3, 10**9])
def test_pairs(n_samples, n_slots, positions, max_bytes):
    inputs, outputs, expected = pair_terms(n_samples, n_slots, positions)
    total = KernelSum(layout_of(n_samples, n_slots))
    total.add_pairs(inputs, outputs, max_bytes)
    same(total.finish(), expected)


@sizes
def test_everything_adds_up_and_only_entries_are_kept(n_samples, n_slots):
    table = torch.arange(n_samples * n_slots)
    kept = table[table % 3 != 1]
    total = KernelSum(layout_of(n_samples, n_slots, kept))
    inputs, outputs, expected = gram_terms(n_samples, n_slots)
    total.add_gram(inputs, outputs)
    inputs, outputs, pairs = pair_terms(n_samples, n_slots, 2)
    total.add_pairs(inputs, outputs, 10**9)
    gradients = draw(n_samples, n_slots, 5)
    total.add_gradients(gradients)
    flat = gradients.reshape(-1, 5)
    expected = expected + pairs + flat @ flat.T
    same(total.finish(), expected[kept[:, None], kept])


def test_nothing_adds_up_to_zero():
    found = KernelSum(layout_of(3, 2, torch.tensor([0, 1, 4]))).finish()
    assert torch.equal(found.cpu(), torch.zeros(3, 3, dtype=torch.float64))


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (9, 3)),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten()),
        (5, 2, 3),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 2, groups=2, stride=2), nn.Tanh(), nn.Conv2d(6, 2, 2), nn.Flatten()
        ),
        (5, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("order", [GRAM, PAIRS, GRADIENTS])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_order_gives_the_same_kernel(network, order, chunk_size, monkeypatch):
    build, shape = NETWORKS[network]
    chosen = []

    def force(unit, n_samples, n_slots):
        costs = operation_counts(unit.matrix, unit.merged, n_samples, n_slots)
        chosen.append(order if order in costs else PAIRS)
        return chosen[-1]

    monkeypatch.setattr(layer_assembly, "choose_order", force)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(build().double())
    inputs = draw(*shape)
    targets = torch.zeros_like(model(inputs)).detach()
    kernel = build_exact_kernel(place_snapshot(model, inputs, targets), chunk_size=chunk_size)
    same(kernel.matrix, dense_reference(model, inputs, targets, "mse")["kernel"])
    assert set(kernel.orders.values()) == set(chosen)
    if not (order == GRAM and network == "tokens"):
        assert order in chosen


def unit_of(**sizes):
    form = {"n_groups": 1, "fan_in": 64, "fan_out": 64, "n_positions": 1, "unfolds": False} | sizes
    return Unit(("w", "b"), "", True, MatrixForm(**form))


@pytest.mark.parametrize(
    ("unit", "n_samples", "n_slots", "order"),
    [
        (unit_of(), 256, 10, GRAM),
        (unit_of(n_positions=4, fan_in=2048, fan_out=2048), 64, 10, PAIRS),
        (unit_of(n_positions=1024, fan_in=27, fan_out=16), 64, 10, GRADIENTS),
        (unit_of(n_positions=1024, fan_in=9, fan_out=1, n_groups=32), 64, 10, GRADIENTS),
        (unit_of(fan_in=1, fan_out=1000), 4, 1, GRAM),
        (Unit(("gain",), "", False, None), 64, 10, GRADIENTS),
    ],
)
def test_the_fewest_operations_are_chosen(unit, n_samples, n_slots, order):
    assert choose_order(unit, n_samples, n_slots) == order
