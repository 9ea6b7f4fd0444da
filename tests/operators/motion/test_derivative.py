"""dM/dt against dense references and identities."""

import gc

import pytest
import torch
from torch import nn

from spectralshell.operators import build_kernel, build_kernel_derivative, survey_motion
from tests.device import place, place_snapshot
from tests.fingerprints import model_fingerprint
from tests.operators.motion.kernel_rates import KINDS, dense_rate, relative
from tests.zoo import CASES_BY_NAME, RESIDUALS, make_snapshot

EXACT = 1e-10  # float64, two derivatives of small models
DIFFERENCE = 1e-8  # a central difference with h of eps^(1/3): its error is about h²
SYMMETRIC = 1e-12
SAME = 1e-12  # the same numbers in another order
NARROW = "2KB"  # holds neither the graphs of two samples, nor two columns of JᵀU

SMOOTH = [
    "mlp",
    "deep linear",
    "residual cnn",
    "layernorm mlp",
    "groupnorm cnn",
    "tied language model",
    "causal attention",
    "embedding inputs",
    "gru",
    "raw parameter",
    "gpt-neox",
    "two inputs, frozen layer",
]
TOKENS = [name for name in SMOOTH if len(CASES_BY_NAME[name]["labels"]) > 1]
PAIRS = [(name, kind) for name in SMOOTH for kind in ("brier", "nll")]
PAIRS += [("mlp", kind) for kind in KINDS] + [("layernorm mlp", "callable"), ("gru", "mse")]
PAIRS += [("tied language model", "cross-entropy"), ("residual cnn", "mse labels")]


def motion_of(name, kind="mse", **more):
    return survey_motion(make_snapshot(CASES_BY_NAME[name], kind), residual=RESIDUALS[kind], **more)


def identity(n):
    return place(torch.eye(n, dtype=torch.float64))


def random_block(n, k):
    generator = torch.Generator().manual_seed(1)
    return place(torch.randn(n, k, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(("name", "kind"), list(dict.fromkeys(PAIRS)))
def test_both_methods_equal_the_dense_derivative(name, kind):
    with motion_of(name, kind) as motion:
        direction = motion.direction("random")
        expected = dense_rate(CASES_BY_NAME[name], kind, direction.tangents)
        exact = motion.derivative(direction)
        assert relative(exact.compress(identity(motion.n)), expected["rate"]) <= EXACT
        difference = motion.derivative(direction, method="difference")
        assert relative(difference.to_dense(), expected["rate"]) <= DIFFERENCE
        assert relative(motion.error_rate(direction), expected["error"]) <= EXACT


@pytest.mark.parametrize(
    ("name", "chunk_size", "max_memory"),
    [
        ("mlp", None, None),
        ("mlp", 2, NARROW),
        ("layernorm mlp", 2, None),
        ("raw parameter", None, None),
        ("custom function", 2, None),
    ],
)
def test_products_layers_and_compression_are_those_of_the_matrix(name, chunk_size, max_memory):
    with motion_of(name, "brier", chunk_size=chunk_size, max_memory=max_memory) as motion:
        direction = motion.direction("random")
        dense = motion.derivative(direction).to_dense()
        block = random_block(motion.n, 5)
        for method, tolerance in (("exact", SAME), ("difference", DIFFERENCE)):
            derivative = motion.derivative(direction, method=method)
            product = derivative._multiply(block)
            assert relative(product, dense @ block) <= tolerance
            assert relative(derivative.matvec(block[:, 0]), dense @ block[:, 0]) <= tolerance
            # What is compressed is symmetrised: before that, it is as the products are.
            form = block.T @ product
            assert relative(form.T, form) <= (SYMMETRIC if method == "exact" else tolerance)
            small = derivative._compress(block)
            assert relative(small, block.T @ dense @ block) <= tolerance
            assert relative(derivative.compress(block), small) <= tolerance
            if method == "exact" or max_memory is None:
                layers = derivative.layers("parameter")
                assert list(layers) == list(motion.parameter_names)
                assert relative(sum(layers.values()), dense) <= tolerance


def test_layers_of_a_difference_need_exact_kernels():
    with motion_of("mlp", max_memory=NARROW) as motion:
        derivative = motion.derivative(motion.direction("random"), method="difference")
        with pytest.raises(ValueError, match="max_memory"):
            derivative.layers()


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_the_kernel_of_a_layer_moves_as_that_of_its_parameters(method):
    with motion_of("mlp") as whole, motion_of("mlp", parameters=r"^2\.") as part:
        tangents = dict(zip(whole.parameter_names, whole.direction("random").tangents, strict=True))
        before = {name: tangents[name] for name in ("0.weight", "0.bias")}
        after = {name: tangents[name] for name in ("2.weight", "2.bias")}
        head, alone = (
            whole.derivative(whole.direction(moving), method=method).layers()["2"]
            for moving in (tangents, before)
        )
        # The last layer is linear in its own parameters: its kernel moves with its inputs.
        assert part.derivative(part.direction(after)).status == "frozen kernel"
        assert relative(head, alone) <= DIFFERENCE


@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.parametrize("name", ["mlp", "layernorm mlp", "tied language model"])
def test_rate_of_the_jacobian(name, method):
    with motion_of(name) as motion:
        direction = motion.direction("random")
        jacobian = dense_rate(CASES_BY_NAME[name], "mse", direction.tangents)["j"]
        vector = random_block(motion.n, 1)[:, 0]
        found = motion.derivative(direction, method=method).rate_gram(vector)
        assert relative(found, jacobian @ (jacobian.T @ vector.cpu())) <= DIFFERENCE


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_homogeneous_kernel_grows_along_the_parameters(depth):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(depth))).double()
    x = random_block(5, 4)
    with survey_motion(place_snapshot(model, x, x)) as motion:
        direction = motion.direction(dict(model.named_parameters()))
        found = motion.derivative(direction).to_dense()
        kernel = build_kernel(place_snapshot(model, x, x)).to_dense()
    assert relative(found, (2 * depth - 2) * kernel) <= EXACT


@pytest.mark.parametrize("kind", ["mse", "brier"])
def test_error_along_gradient_flow_moves_by_the_kernel(kind):
    with motion_of("tied language model", kind) as motion:
        rate = motion.error_rate(motion.direction("gradient-flow"))
        kernel = motion.survey.build_matrix_free(None)
        assert relative(rate, -kernel.matvec(motion.residual_vector)) <= EXACT
        assert motion.dynamics_exact


def test_a_model_linear_in_its_parameters_has_a_frozen_kernel():
    snapshot = place_snapshot(nn.Linear(4, 3).double(), random_block(6, 4), random_block(6, 3))
    for chunk_size in (None, 2):
        derivative = build_kernel_derivative(snapshot, "random", norm=1.0, chunk_size=chunk_size)
        assert (derivative.is_zero, derivative.status) == (True, "frozen kernel")
        for found in (derivative.to_dense(), derivative._multiply(random_block(18, 2))):
            assert not found.any()
        assert not derivative.rate_gram(random_block(18, 1)[:, 0]).any()


@pytest.mark.parametrize("max_memory", [None, NARROW])
def test_a_difference_tells_from_its_zeros_that_the_kernel_is_frozen(max_memory):
    snapshot = place_snapshot(nn.Linear(4, 3).double(), random_block(6, 4), random_block(6, 3))
    with survey_motion(snapshot, max_memory=max_memory) as motion:
        direction = motion.direction("random", norm=1.0)
        for multiply in (lambda d: d.to_dense(), lambda d: d.compress(random_block(18, 1))):
            derivative = motion.derivative(direction, method="difference")
            assert (derivative.is_zero, derivative.status) == (False, "ok")
            assert not multiply(derivative).any()
            assert (derivative.is_zero, derivative.status) == (True, "frozen kernel")
    with motion_of("mlp", max_memory=max_memory) as motion:
        derivative = motion.derivative(motion.direction("random"), method="difference")
        derivative.compress(torch.zeros(motion.n, 1))
        assert derivative.status == "ok"


class Product(nn.Module):
    """a tanh(w x), whose Jacobian vanishes at a = w = 0 and grows from there."""

    def __init__(self):
        super().__init__()
        self.a, self.w = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return self.a * torch.tanh(self.w * x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_jacobian_that_vanishes_here_does_not_shorten_the_step_to_nothing(dtype):
    snapshot = place_snapshot(Product(), random_block(5, 1), random_block(5, 1))
    moved = {"a": torch.ones(1), "w": torch.ones(1)}
    with survey_motion(snapshot, dtype=dtype) as motion:
        derivative = motion.derivative(motion.direction(moved), method="difference")
        assert derivative.step == pytest.approx(torch.finfo(motion.dtype).eps ** (1 / 3) / 2**0.5)
        assert not derivative.to_dense().any()


def test_where_the_outputs_overflow_the_step_is_shortened():
    class Growth(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.still = nn.Parameter(torch.full((1,), 1e9, dtype=torch.float64))

        def forward(self, x):
            return torch.exp(self.rate * x) + 1e-9 * self.still

    # In proportion to the parameters the step is 6e3, where exp is infinite.
    ones = torch.ones(1, 1, dtype=torch.float64)
    moved = {"rate": torch.ones(1)}
    found = build_kernel_derivative(
        place_snapshot(Growth(), ones, ones), moved, method="difference"
    )
    assert relative(found.to_dense(), 2.0 * torch.exp(2.0 * ones)) <= DIFFERENCE


@pytest.mark.parametrize("max_memory", [None, NARROW])
def test_a_difference_asked_for_twice_is_the_same(max_memory):
    with motion_of("mlp", max_memory=max_memory) as motion:
        direction = motion.direction("gradient-flow")
        first = motion.derivative(direction, method="difference")
        dense = first.to_dense()
        motion.derivative(motion.direction("random")).to_dense()
        second = motion.derivative(direction, method="difference")
        assert first.step == second.step == motion.default_step(direction)
        assert torch.equal(second.to_dense(), dense)


@pytest.mark.parametrize("max_memory", [None, NARROW])
def test_the_difference_of_a_checkpointed_model_is_that_of_the_snapshot(max_memory):
    snapshot = make_snapshot(CASES_BY_NAME["checkpointed"])
    found = []
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for parameter in snapshot.model.parameters():
                parameter *= factor
        with survey_motion(snapshot, max_memory=max_memory) as motion:
            direction = motion.direction("gradient-flow")
            derivative = motion.derivative(direction, method="difference")
            found.append((derivative.step, derivative.to_dense()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_zero_direction(method):
    with motion_of("mlp") as motion:
        direction = motion.direction({})
        derivative = motion.derivative(direction, method=method)
        assert (direction.norm, derivative.status) == (0.0, "zero direction")
        assert derivative.is_zero
        assert not derivative.to_dense().any()
        assert derivative.compress(random_block(motion.n, 2)).shape == (2, 2)
        assert derivative.matvec(random_block(motion.n, 1)[:, 0]).shape == (motion.n,)
        assert set(derivative.layers()) == {"0", "2"}
        assert not motion.error_rate(direction).any()
        assert derivative.noise == 0.0
        assert motion.default_step(direction) == 1.0


def test_a_fitted_model_has_no_flow_and_random_directions_of_its_norm():
    model = place(nn.Linear(4, 3).double())
    x = random_block(6, 4)
    with survey_motion(place_snapshot(model, x, model(x).detach())) as motion:
        assert motion.direction("gradient-flow").norm < SAME
        assert motion.direction("random").norm < SAME
        assert motion.direction("random", norm=2.0).norm == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_difference_defaults_to_the_cube_root_of_eps(dtype):
    with motion_of("mlp", dtype=dtype) as motion:
        direction = motion.direction("random")
        step = motion.derivative(direction, method="difference").step
        parameters = motion.survey.evaluation.problem.function.parameters
        size = sum(float(p.double().square().sum()) for p in parameters)
        eps = torch.finfo(motion.dtype).eps
        assert step * direction.norm / size**0.5 == pytest.approx(eps ** (1 / 3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_the_difference_does_not_go_beyond_the_turns_of_the_jacobian(dtype, tolerance):
    # In proportion to the parameters, the step in float32 would be 0.5 % of 100: over many turns.
    class Waves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=dtype))
            self.still = torch.nn.Parameter(torch.tensor([100.0], dtype=dtype))

        def forward(self, x):
            return torch.sin(20.0 * self.phase * x) + 1e-3 * self.still

    inputs = torch.linspace(0.5, 1.0, 4, dtype=dtype)[:, None]
    snapshot = place_snapshot(Waves(), inputs, torch.zeros(4, 2, dtype=dtype))
    moved = {"phase": torch.ones(2, dtype=dtype)}
    exact, difference = (
        build_kernel_derivative(snapshot, moved, method=method).to_dense()
        for method in ("exact", "difference")
    )
    gap = torch.linalg.matrix_norm(difference - exact) / torch.linalg.matrix_norm(exact)
    assert gap < tolerance


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-5), ("difference", 2e-3)])
def test_float32(method, tolerance):
    # The difference: rounding over h is eps^(2/3) = 2e-5 of M, which is many times dM/dt h.
    with motion_of("mlp", "brier") as motion:
        direction = motion.direction("random")
        expected = motion.derivative(direction).to_dense()
        norm = direction.norm
    with motion_of("mlp", "brier", dtype="float32") as motion:
        block = random_block(motion.n, 3)
        direction = motion.direction("random", norm=norm)
        found = motion.derivative(direction, method=method)
        assert relative(found._compress(block), block.T @ expected @ block) <= tolerance
        assert relative(found.to_dense(), expected) <= tolerance


def test_displaced_points_are_those_of_the_displaced_model():
    case = CASES_BY_NAME["cnn batchnorm"]
    with motion_of("cnn batchnorm", "brier") as motion:
        direction = motion.direction("random", norm=0.1)
        survey = motion.displaced(direction, 2.0)
        snapshot = make_snapshot(case, "brier")
        state = dict(snapshot.load_state())
        for name, tangent in zip(motion.parameter_names, direction.tangents, strict=True):
            state[name] = state[name] + 2.0 * tangent
        moved = place_snapshot(snapshot.model, snapshot.inputs, snapshot.targets, state=state)
        expected = build_kernel(moved, residual="brier")
        found = survey.build_matrix_free(None)
        assert relative(survey.evaluation.residual_vector, expected.residual_vector) <= SAME
        assert relative(found.to_dense(), expected.to_dense()) <= SAME


@pytest.mark.parametrize("name", ["cnn batchnorm"])
@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.filterwarnings("ignore::spectralshell.warning_categories.GateWarning")
def test_it_runs_without_values(name, method):
    with motion_of(name, "brier", device="meta") as motion:
        for spec in ("gradient-flow", "random"):
            derivative = motion.derivative(motion.direction(spec), method=method)
            block = motion.residual_vector[:, None].expand(-1, 3)
            assert derivative._compress(block).shape == (3, 3)
            assert derivative._multiply(block).shape == (motion.n, 3)
            assert derivative.to_dense().device.type == "meta"
            assert derivative.noise == 0.0
            assert derivative.rate_gram(motion.residual_vector).shape == (motion.n,)
        assert motion.error_rate(motion.direction("random")).shape == (motion.n,)


@pytest.mark.parametrize(
    ("name", "chunk_size"), [("gru", None), ("checkpointed", 2), ("residual cnn", None)]
)
def test_the_model_is_left_alone(name, chunk_size):
    snapshot = make_snapshot(CASES_BY_NAME[name], "nll")
    before = model_fingerprint(snapshot.model)
    with survey_motion(snapshot, residual="nll", chunk_size=chunk_size) as motion:
        for method in ("exact", "difference"):
            direction = motion.direction("cross-entropy")
            derivative = motion.derivative(direction, method=method)
            derivative.compress(random_block(motion.n, 2))
            derivative._multiply(random_block(motion.n, 2))
            motion.error_rate(direction)
    gc.collect()
    assert model_fingerprint(snapshot.model) == before
