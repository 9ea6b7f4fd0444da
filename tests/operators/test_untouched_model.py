"""What a measurement may not do to the user's model, and how the model may not disturb it."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from spectralshell.operators.kernel import assemble_kernel
from spectralshell.snapshots import Snapshot
from tests.fingerprints import model_fingerprint

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.linspace(1, -1, 18, dtype=torch.float64).reshape(6, 3)


def network(*between):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3)).double()


def test_threads_take_turns_with_a_model():
    model = network(nn.Tanh(), nn.Dropout())
    snapshots = [Snapshot(model, X + shift, Y) for shift in range(4)]

    def work(snapshot):
        # Forward mode calls the model in every product.
        kernel = assemble_kernel(snapshot, rungs=["jvp"])
        return kernel.to_dense(), Snapshot(model, X, Y).load_state()["0.weight"]

    expected = [work(snapshot) for snapshot in snapshots]
    before = model_fingerprint(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, snapshots * 3))
    assert model_fingerprint(model) == before
    for (kernel, state), (kernel_alone, state_alone) in zip(found, expected * 3, strict=True):
        assert torch.equal(kernel, kernel_alone)
        assert torch.equal(state, state_alone)
