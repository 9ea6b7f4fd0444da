"""What a measurement may not do to the user's model, and how the model may not disturb it."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from spectralshell.operators.kernel import assemble_kernel, build_kernel
from spectralshell.snapshots import Snapshot, make_snapshots
from tests.fingerprints import model_fingerprint

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.linspace(1, -1, 18, dtype=torch.float64).reshape(6, 3)
EXACT = 1e-13  # the same operations in float64


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


def test_freezing_the_model_later_changes_no_snapshot():
    model = network(nn.Tanh())
    batches = make_snapshots(model, [(X, Y), (X, Y)])
    expected = build_kernel(batches[0]).to_dense()
    model[0].requires_grad_(False)
    for snapshot in batches:
        assert torch.equal(build_kernel(snapshot).to_dense(), expected)
    assert build_kernel(Snapshot(model, X, Y)).n_parameters == 18


def test_a_model_may_write_to_its_weights():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)).double()
    tokens = torch.tensor([0, 2, 4])
    snapshot = Snapshot(model, tokens, Y[:3])
    before = snapshot.load_state()["0.weight"].clone()
    kernel = build_kernel(snapshot)
    dense = kernel.to_dense()
    assert torch.equal(kernel.to_dense(), dense)
    assert torch.equal(snapshot.load_state()["0.weight"], before)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(build_kernel(snapshot).to_dense(), dense)


def test_weights_in_the_same_memory_are_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight.data = model[0].weight.data
    kernel = build_kernel(Snapshot(model, X, X))
    assert kernel.n_parameters == 24
    shared = nn.Sequential(*model)
    shared[2].weight = shared[0].weight
    torch.testing.assert_close(
        kernel.to_dense(), build_kernel(Snapshot(shared, X, X)).to_dense(), rtol=EXACT, atol=EXACT
    )
