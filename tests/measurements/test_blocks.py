"""Blocks of small networks against dense Jacobians, and the cases without structure."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp

from spectralshell.estimators.jacobian_block_frames import explained_shares, normalized_coherence
from spectralshell.measurements.blocks import BlockSettings, measure_blocks
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from tests.device import place_snapshot
from tests.estimators.sharp import Sharp

# Coherence goes with the square root of the kernels' rounding.
COHERENCE = 1e-7
# Two Jacobians of float64, multiplied.
RATES = 1e-10
# Central differences with h ~ eps^(1/3).
DIFFERENCE = 1e-7
# The largest singular value of dJ/dt by Lanczos.
NORM = 1e-5


MOTION = {"direction", "derivative", "step", "random_seed"}


def settings(blocks="auto", **options):
    """The settings of a measurement, each option where it belongs."""
    motion = {name: value for name, value in options.items() if name in MOTION}
    kernel = {name: value for name, value in options.items() if name not in MOTION}
    return BlockSettings(KernelSettings(**kernel), MotionSettings(**motion), blocks)


class Towers(nn.Module):
    """A sum of functions of their own parameters, to one output or to one each."""

    def __init__(self, n_towers, apart):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(n_towers)
        )
        self.apart = apart

    def forward(self, x):
        outputs = [tower(x) for tower in self.towers]
        return torch.cat(outputs, dim=1) if self.apart else torch.stack(outputs).sum(dim=0)


class Muted(nn.Module):
    def __init__(self):
        super().__init__()
        self.heard = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.muted = nn.Linear(3, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.heard(x)) + 0.0 * self.muted(x)


def perceptron(activation=nn.Tanh):
    layers = [nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 2)]
    return nn.Sequential(*layers)


def snapshot_of(build, n_outputs=2, dtype=torch.float64, **labels):
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = build().to(dtype)
    torch.random.set_rng_state(torch_state)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=generator, dtype=dtype)
    y = torch.randn(6, n_outputs, generator=generator, dtype=dtype)
    return place_snapshot(model, x, y, **labels)


def dense_reference(snapshot, groups):
    """Return J_l, and dJ_l/dt when block m alone follows the gradient flow of ½E‖y − f‖²."""
    parameters = {name: p.detach() for name, p in snapshot.model.named_parameters()}
    scale = len(snapshot.inputs) ** -0.5

    def outputs(values):
        return functional_call(snapshot.model, values, (snapshot.inputs,)).reshape(-1) * scale

    def jacobian(values):
        parts = jacrev(outputs)(values)
        return {name: part.reshape(len(part), -1) for name, part in parts.items()}

    whole = jacobian(parameters)
    error = snapshot.targets.reshape(-1) * scale - outputs(parameters)
    flow = {name: (part.T @ error).reshape(parameters[name].shape) for name, part in whole.items()}
    blocks = [torch.cat([whole[name] for name in group], dim=1) for group in groups]
    rates = []
    for group in groups:
        tangent = {n: t if n in group else torch.zeros_like(t) for n, t in flow.items()}
        rate = jvp(jacobian, (parameters,), (tangent,))[1]
        rates.append([torch.cat([rate[name] for name in g], dim=1) for g in groups])
    return blocks, rates


GROUPS = [("0.weight", "0.bias"), ("2.weight", "2.bias"), ("4.weight", "4.bias")]


@pytest.fixture(scope="module")
def reference():
    return dense_reference(snapshot_of(perceptron), GROUPS)


@pytest.fixture(scope="module", params=["exact", "difference"])
def measured(request):
    return measure_blocks(snapshot_of(perceptron), settings(derivative=request.param))


def test_coherence_is_that_of_the_dense_blocks(measured, reference):
    blocks, _ = reference
    expected = [[float(torch.linalg.matrix_norm(a.T @ b, 2)) for b in blocks] for a in blocks]
    np.testing.assert_allclose(measured.coherence, expected, rtol=COHERENCE)
    np.testing.assert_allclose(np.diag(measured.coherence), measured.norms**2, rtol=1e-12)
    traces = [float((block**2).sum()) for block in blocks]
    np.testing.assert_allclose(measured.traces, traces, rtol=1e-12)
    norm = float(torch.linalg.matrix_norm(torch.cat(blocks, dim=1), 2))
    assert measured.jacobian_norm == pytest.approx(norm, rel=1e-12)
    assert (measured.uncertainty <= COHERENCE * measured.coherence.max()).all()


def test_rates_are_those_of_the_dense_blocks(measured, reference):
    blocks, rates = reference
    parts = [
        [block @ rate.T + rate @ block.T for rate in (r[position] for r in rates)]
        for position, block in enumerate(blocks)
    ]
    stacked = torch.stack([torch.stack(part) for part in parts]).flatten(2)
    gram = torch.einsum("lms,lks->lmk", stacked, stacked).cpu().numpy()
    tolerance = RATES if measured.derivative == "exact" else DIFFERENCE
    np.testing.assert_allclose(measured.gram, gram, atol=tolerance * gram.max())
    whole = sum(torch.cat(rate, dim=1) for rate in rates)
    norm = float(torch.linalg.matrix_norm(whole, 2))
    assert measured.jacobian_rate == pytest.approx(norm, rel=NORM)
    assert measured.status == "ok"


def test_sizes_and_labels(measured):
    assert measured.blocks == ("0", "2", "4")
    assert measured.block_sizes.tolist() == [20, 24, 10]
    assert measured.n_parameters == measured.block_sizes.sum() == 54
    assert (measured.n_outputs, measured.n_rows) == (12, 6)


@pytest.mark.parametrize("apart", [False, True])
def test_towers_move_themselves_alone(apart):
    build = lambda: Towers(3, apart)  # noqa: E731
    measure = measure_blocks(
        snapshot_of(build, n_outputs=3 if apart else 1),
        settings(blocks=lambda name: name.split(".")[1]),
    )
    np.testing.assert_array_equal(explained_shares(measure.gram, 0), 1.0)
    normalized = normalized_coherence(measure.coherence, measure.norms)
    others = normalized[~np.eye(3, dtype=bool)]
    if apart:
        # Their outputs are orthogonal; what is left is the kernel's rounding.
        assert (others <= COHERENCE).all()
    else:
        assert (others > 0.1).all()


def test_blocks_alike_are_fully_coherent():
    snapshot = snapshot_of(lambda: Towers(2, False), n_outputs=1)
    first = {n: t for n, t in snapshot.load_state().items() if n.startswith("towers.0")}
    state = first | {name.replace("towers.0", "towers.1"): t for name, t in first.items()}
    twins = place_snapshot(snapshot.model, snapshot.inputs, snapshot.targets, state=state)
    measure = measure_blocks(twins, settings(blocks=lambda name: name.split(".")[1]))
    normalized = normalized_coherence(measure.coherence, measure.norms)
    np.testing.assert_allclose(normalized, 1.0, atol=1e-12)


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_frozen_kernel_is_a_status(derivative):
    snapshot = snapshot_of(lambda: nn.Linear(3, 2))
    measure = measure_blocks(snapshot, settings(blocks="parameter", derivative=derivative))
    assert "frozen kernel" in measure.status
    assert not measure.gram.any()
    assert np.isnan(explained_shares(measure.gram, 1)).all()
    assert np.isfinite(measure.coherence).all()


def test_one_block_is_a_status():
    measure = measure_blocks(snapshot_of(perceptron), settings(blocks={"": "all"}))
    assert measure.status == "one block"
    assert measure.coherence.shape == (1, 1)
    assert measure.coherence[0, 0] == pytest.approx(measure.jacobian_norm**2, rel=1e-12)
    np.testing.assert_array_equal(explained_shares(measure.gram, 0), 1.0)


def test_block_without_kernel_is_a_status():
    measure = measure_blocks(snapshot_of(Muted), settings())
    assert measure.status == "zero Jacobian of muted.weight, muted.bias; zero kernel of muted"
    muted = measure.blocks.index("muted")
    assert not measure.coherence[muted].any()
    assert not normalized_coherence(measure.coherence, measure.norms)[muted].any()
    assert np.isnan(explained_shares(measure.gram, 0)[muted])


def test_zero_error_does_not_move():
    snapshot = snapshot_of(perceptron)
    with torch.no_grad():
        targets = snapshot.model(snapshot.inputs)
    still = place_snapshot(snapshot.model, snapshot.inputs, targets)
    measure = measure_blocks(still, settings())
    assert "zero direction" in measure.status
    assert measure.jacobian_rate == 0.0
    assert not measure.gram.any()


@pytest.mark.parametrize(
    ("activation", "derivative", "status"),
    [
        (nn.ReLU, "exact", "gates held: relu"),
        (nn.ReLU, "difference", "ok"),
        (nn.Tanh, "exact", "ok"),
    ],
)
def test_gates_are_named_only_where_their_jumps_are_missed(activation, derivative, status):
    snapshot = snapshot_of(lambda: perceptron(activation))
    assert measure_blocks(snapshot, settings(derivative=derivative)).status == status


def test_directions():
    snapshot = snapshot_of(perceptron)
    moved = {name: tensor + 0.1 for name, tensor in snapshot.load_state().items()}
    there = place_snapshot(snapshot.model, snapshot.inputs, snapshot.targets, state=moved, tau=2.0)
    measures = {
        name: measure_blocks(snapshot, settings(direction=direction, random_seed=seed))
        for name, direction, seed in (
            ("flow", "gradient-flow", 0),
            ("random", "random", 1),
            ("again", "random", 1),
            ("other", "random", 2),
            ("snapshot", there, 0),
            ("callable", lambda _: there, 0),
        )
    }
    assert measures["random"].direction_norm == pytest.approx(measures["flow"].direction_norm)
    np.testing.assert_array_equal(measures["random"].gram, measures["again"].gram)
    assert measures["random"].jacobian_rate != measures["other"].jacobian_rate
    np.testing.assert_array_equal(measures["snapshot"].gram, measures["callable"].gram)
    # 0.1 in every entry over a time of 2.
    assert measures["snapshot"].direction_norm == pytest.approx(0.05 * np.sqrt(54))


def test_float32_agrees_to_its_rounding():
    double = measure_blocks(snapshot_of(perceptron), settings())
    single = measure_blocks(snapshot_of(perceptron), settings(dtype=torch.float32))
    error = np.abs(single.coherence - double.coherence)
    assert (error <= single.uncertainty + 1e-5 * double.coherence).all()
    np.testing.assert_allclose(single.gram, double.gram, atol=1e-4 * double.gram.max())


def test_step_of_a_difference_follows_the_jacobian():
    # In proportion to the parameters, the step would be 0.5 % of 100: over many turns of the sine.
    snapshot = snapshot_of(Sharp)
    exact = measure_blocks(snapshot, settings())
    how = {"derivative": "difference", "dtype": torch.float32}
    single = measure_blocks(snapshot, settings(**how))
    assert single.jacobian_rate == pytest.approx(exact.jacobian_rate, rel=1e-3)
    assert single.status == exact.status
    far = measure_blocks(snapshot, settings(**how, step=0.05))
    assert "differences good to" in far.status


def test_memory_that_does_not_suffice_is_named():
    message = r"20 KB do not hold the kernels for n = 12 entries and 3 blocks: they need .* join"
    with pytest.raises(ValueError, match=message):
        measure_blocks(snapshot_of(perceptron), settings(max_memory="20KB"))
