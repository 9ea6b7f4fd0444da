"""What a measurement may not do to the user's model, and how the model may not disturb it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from spectralshell.models import guard
from spectralshell.models.guard import full_precision
from spectralshell.operators import build_exact_kernel, kernel_operator, survey_motion
from spectralshell.operators.build import build_kernel
from spectralshell.snapshots import Snapshot, make_snapshots
from tests.device import DEVICE, place, place_snapshot
from tests.fingerprints import model_fingerprint
from tests.zoo import build_on_rungs

X = place(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4))
Y = place(torch.linspace(1, -1, 18, dtype=torch.float64).reshape(6, 3))
EXACT = 1e-13  # the same operations in float64


def network(*between):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return place(nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3)).double())


def test_threads_take_turns_with_a_model():
    model = network(nn.Tanh(), nn.Dropout())
    snapshots = [place_snapshot(model, X + shift, Y) for shift in range(4)]

    def work(snapshot):
        # Forward mode calls the model in every product.
        kernel = build_on_rungs(snapshot, rungs=["jvp"])
        # Not placed: moving a model that another thread measures is not for a measurement to mend.
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
    assert build_kernel(place_snapshot(model, X, Y)).n_parameters == 18


def test_a_model_may_write_to_its_weights():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)).double()
    tokens = torch.tensor([0, 2, 4])
    snapshot = place_snapshot(model, tokens, Y[:3])
    before = snapshot.load_state()["0.weight"].clone()
    kernel = build_kernel(snapshot)
    dense = kernel.to_dense()
    assert torch.equal(kernel.to_dense(), dense)
    assert torch.equal(snapshot.load_state()["0.weight"], before)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(build_kernel(snapshot).to_dense(), dense)


def test_weights_in_the_same_memory_are_tied():
    model = place(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double())
    model[2].weight.data = model[0].weight.data
    kernel = build_kernel(place_snapshot(model, X, X))
    assert kernel.n_parameters == 24
    shared = nn.Sequential(*model)
    shared[2].weight = shared[0].weight
    torch.testing.assert_close(
        kernel.to_dense(),
        build_kernel(place_snapshot(shared, X, X)).to_dense(),
        rtol=EXACT,
        atol=EXACT,
    )


def test_backward_hooks_stay_silent():
    model = network(nn.Tanh())
    seen = []
    model[0].register_full_backward_hook(lambda *gradients: seen.append(1))
    model[1].register_full_backward_pre_hook(lambda *gradients: seen.append(2))
    before = model_fingerprint(model)
    kernel = build_kernel(place_snapshot(model, X, Y))
    kernel.to_dense()
    assert seen == []
    assert model_fingerprint(model) == before


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(1, device=DEVICE)

    def forward(self, x):
        with torch.no_grad():
            self.count.add_(1)
        return x.tanh()


def test_tensor_attributes_are_put_back():
    model = network(Counting())
    count = model[1].count
    # In chunks, products call the model.
    kernel = build_kernel(place_snapshot(model, X, Y), chunk_size=3)
    kernel.matvec(kernel.residual_vector)
    assert model[1].count is count
    assert count.item() == 0.0


@pytest.mark.parametrize("rung", ["linearize", "jvp"])
def test_autocast_of_the_caller_does_not_reach_inside(rung):
    model = network(nn.Tanh()).float()
    snapshot = place_snapshot(model, X.float(), Y.float())
    expected = build_on_rungs(snapshot, rungs=[rung]).to_dense()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(build_on_rungs(snapshot, rungs=[rung]).to_dense(), expected)


def test_autocast_of_the_caller_does_not_reach_matrices():
    snapshot = place_snapshot(network(nn.Tanh()).float(), X.float(), Y.float())
    block = place(torch.linspace(-1, 2, 90, dtype=torch.float64).reshape(18, 5))

    def measure():
        exact, free = build_exact_kernel(snapshot, layers="parameter"), build_kernel(snapshot)
        free = free.with_matrix(2, lambda: exact.matrix)
        with survey_motion(snapshot) as motion:
            direction = motion.direction("gradient-flow")
            ways = ("exact", "difference")
            exactly, differing = (motion.derivative(direction, method=way) for way in ways)
            products = [
                *(exact.matmat(block), exact.matvec(block[:, 0]), *exact.layers.values()),
                *(free.matmat(block), free.matvec(block[:, 0])),
                *(exactly.compress(block), exactly.matmat(block), exactly.rate_gram(block[:, 0])),
                *(differing.compress(block), differing.rate_gram(block[:, 0])),
            ]
            figures = [exact.noise, free.noise, free.norm, exactly.noise, differing.noise]
        return products, figures

    products, figures = measure()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        again, same = measure()
    assert all(torch.equal(a, b) for a, b in zip(products, again, strict=True))
    assert figures == same


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_norm_is_estimated_from_below(dtype):
    kernel = build_kernel(place_snapshot(network(nn.Tanh()), X, Y), dtype=dtype)
    exact = float(torch.linalg.eigvalsh(kernel.to_dense())[-1])
    assert 0.7 * exact < kernel.norm < 1.0001 * exact  # five steps, and the rounding of float32


def test_inputs_that_require_gradients_leave_none_in_results():
    kernel = build_kernel(place_snapshot(network(nn.Tanh()), X.clone().requires_grad_(), Y))
    results = (kernel.residual_vector, kernel.to_dense(), *kernel.velocity())
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_half_precision_is_told(dtype):
    snapshot = place_snapshot(network(nn.Tanh()).half(), X, Y)
    assert build_kernel(snapshot, dtype=dtype).status == "float16 model measured in float32"


def test_sparse_embeddings_give_dense_gradients():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)).double()
    snapshot = place_snapshot(model, torch.tensor([0, 2, 4]), Y[:3])
    found = [build_on_rungs(snapshot, rungs=[r]).to_dense() for r in ("linearize", "double-vjp")]
    torch.testing.assert_close(*found, rtol=EXACT, atol=EXACT)
    assert model[0].sparse


def test_a_block_without_columns_is_ordinary():
    kernel = build_kernel(place_snapshot(network(nn.Tanh()), X, Y))
    assert kernel.matmat(torch.ones(18, 0)).shape == (18, 0)


class Positioned(nn.Linear):
    def forward(self, position_ids, x):
        return super().forward(x) + position_ids


def test_tensors_shared_by_the_samples_do_not_count_them():
    inputs = {"position_ids": torch.ones(1, 3), "x": X}
    snapshot = place_snapshot(Positioned(4, 3).double(), inputs, Y)
    assert snapshot.n_samples == 6
    whole, chunked = (build_kernel(snapshot, chunk_size=size).to_dense() for size in (None, 2))
    torch.testing.assert_close(whole, chunked, rtol=EXACT, atol=EXACT)


def test_tying_the_model_later_keeps_the_stored_weights():
    model = place(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double())
    snapshot = place_snapshot(model, X, X)
    expected = build_kernel(snapshot, parameters="bias").to_dense()
    model[2].weight.data = model[0].weight.data
    assert torch.equal(build_kernel(snapshot, parameters="bias").to_dense(), expected)


def cudnn_flags():
    return torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32


# There may be no GPU: then autocast says so.
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_cudnn_keeps_float32_on_a_gpu():
    enabled, narrow = cudnn_flags()
    with full_precision(torch.device("cuda")):
        assert cudnn_flags() == (enabled, False)
    with full_precision(torch.device("cpu")):
        assert cudnn_flags() == (enabled, narrow)
    assert cudnn_flags() == (enabled, narrow)


@pytest.mark.parametrize(("layer", "stays"), [(nn.Linear(3, 2), True), (nn.GRU(3, 2), False)])
def test_recurrent_layers_are_left_to_torch(layer, stays):
    enabled, narrow = cudnn_flags()
    with guard._native_recurrence(layer, torch.device("cuda")):
        assert torch.backends.cudnn.enabled == (enabled and stays)
    assert cudnn_flags() == (enabled, narrow)


def test_products_are_taken_in_full_precision(monkeypatch):
    entered = []

    @contextmanager
    def watched(device):
        entered.append(device)
        yield

    kernel = build_on_rungs(
        place_snapshot(nn.Conv1d(2, 3, 2), torch.ones(4, 2, 3), torch.ones(4, 3, 2))
    )
    monkeypatch.setattr(kernel_operator, "full_precision", watched)
    kernel.matvec(place(torch.ones(kernel.n)))
    assert entered == [DEVICE]


class Rearranging(nn.Module):
    """Registers a buffer anew, not to be saved, and takes a parameter out and in again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        self.register_buffer("scale", self.scale, persistent=False)
        self._parameters["first"] = self._parameters.pop("first")
        return (x @ self.first).tanh() @ self.second * self.scale


def test_order_and_persistence_come_back():
    model = Rearranging()
    state, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    kernel = build_kernel(place_snapshot(model, torch.ones(4, 3), torch.zeros(4, 3)))
    kernel.matvec(place(torch.ones(kernel.n)))
    assert list(model.state_dict()) == state
    assert [name for name, _ in model.named_parameters()] == names
