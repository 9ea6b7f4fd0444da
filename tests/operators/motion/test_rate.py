"""Second derivatives that torch has wrong or not at all, and gates that none sees."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralshell.operators import DifferentiationError, survey_motion
from spectralshell.operators.jacobian.ladder import climb
from spectralshell.operators.motion import rate as jacobian_rate
from spectralshell.operators.motion.rate import FORMS, ForwardRate, wrong_forms
from spectralshell.warning_categories import GateWarning
from tests.device import place_snapshot
from tests.fingerprints import model_fingerprint
from tests.hostile_models import OnceSquare
from tests.operators.motion.test_derivative import (
    DIFFERENCE,
    EXACT,
    motion_of,
    random_block,
    relative,
)
from tests.zoo import CASES_BY_NAME, make_snapshot


class _Blind(torch.autograd.Function):
    """A square whose backward pass hides that it depends on the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.x * gradient


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def snapshot_through(function):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), Applied(function), nn.Linear(5, 3)).double()
    return place_snapshot(model, random_block(6, 4), random_block(6, 3))


@pytest.mark.parametrize("function", [_Blind.apply, OnceSquare.apply])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_wrong_second_derivatives_are_refused_where_they_start(function, chunk_size):
    snapshot = snapshot_through(function)
    before = model_fingerprint(snapshot.model)
    with survey_motion(snapshot, chunk_size=chunk_size) as motion:
        direction = motion.direction("random")
        with pytest.raises(DifferentiationError, match=r"module '1' \(Applied\).*"):
            motion.derivative(direction).to_dense()
        assert model_fingerprint(snapshot.model) == before


def test_gates_do_not_hide_a_wrong_second_derivative():
    snapshot = snapshot_through(lambda x: _Blind.apply(torch.relu(x)))
    with survey_motion(snapshot) as motion:
        direction = motion.direction("random")
        with (
            pytest.warns(GateWarning),
            pytest.raises(DifferentiationError, match="differs from a difference"),
        ):
            motion.derivative(direction)


def test_a_difference_needs_first_derivatives_only():
    with survey_motion(snapshot_through(_Blind.apply)) as motion:
        found = motion.derivative(motion.direction("random"), method="difference").to_dense()
    with survey_motion(snapshot_through(torch.square)) as motion:
        expected = motion.derivative(motion.direction("random")).to_dense()
    assert relative(found, expected) <= DIFFERENCE


def test_a_form_that_is_wrong_is_passed_over(monkeypatch):
    class Wrong(ForwardRate):
        def pull(self, cotangent):
            return tuple(1.01 * part for part in super().pull(cotangent))

    with motion_of("mlp") as motion:
        direction = motion.direction("random")
        expected = motion.derivative(direction).to_dense()
    monkeypatch.setitem(FORMS, "jvp", Wrong)
    with motion_of("mlp") as motion:
        derivative = motion.derivative(direction)
        assert derivative.form == "double-vjp"
        assert relative(derivative.to_dense(), expected) <= EXACT


@pytest.mark.parametrize("seed", range(3))
def test_many_gates_are_no_fault_of_the_second_derivative(seed):
    # Of 80 000 gates, all close to their kinks, some flip within any step that is not very short.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(8, 20_000), nn.Linear(20_000, 2)
    with torch.no_grad():
        first.weight *= 1e-5
        first.bias *= 1e-5
    model = nn.Sequential(first, nn.ReLU(), last).double()
    generator = torch.Generator().manual_seed(seed)
    with survey_motion(
        place_snapshot(model, random_block(4, 8), random_block(4, 2)), generator=generator
    ) as motion:
        with pytest.warns(GateWarning):
            derivative = motion.derivative(motion.direction("random"))
        assert derivative.form == "jvp"


def test_a_gate_at_its_kink_is_no_fault_of_the_second_derivative():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.zeros_(model[0].bias)
    x = random_block(6, 4)
    x[2] = 0.0
    with survey_motion(place_snapshot(model, x, random_block(6, 3))) as motion:
        with pytest.warns(GateWarning):
            derivative = motion.derivative(motion.direction("random"))
        assert derivative.form == "jvp"


def test_second_derivatives_are_not_compared_where_there_is_no_float64():
    def refuse():
        raise TypeError("no float64 on this device")

    function = SimpleNamespace(device=torch.device("mps"), in_double=refuse)
    evaluation = SimpleNamespace(problem=SimpleNamespace(function=function))
    assert wrong_forms(evaluation) == {}


@pytest.mark.parametrize("name", ["mlp", "layernorm mlp", "custom function"])
def test_the_push_forward_of_a_streamed_rate_is_chosen_once(name, monkeypatch):
    climbs = []

    def counted(*args, **more):
        climbs.append(more["rungs"])
        return climb(*args, **more)

    monkeypatch.setattr(jacobian_rate, "climb", counted)
    with motion_of(name, chunk_size=2) as motion:
        derivative = motion.derivative(motion.direction("random"))
        block = random_block(motion.n, 3)
        found, expected = derivative._multiply(block), derivative.to_dense() @ block
        derivative.rate_gram(block[:, 0])
        assert relative(found, expected) <= EXACT
    # Two chunks more, and three columns.
    assert len(climbs) == (1 if derivative.form.startswith("jvp") else 0)


@pytest.mark.parametrize("name", ["layernorm mlp", "gpt-neox"])
def test_layer_normalisation_takes_the_form_that_torch_has_right(name):
    with motion_of(name, "brier") as motion:
        assert motion.derivative(motion.direction("random")).form == "double-vjp"


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.RNN(5, 5, nonlinearity="relu", batch_first=True)

    def forward(self, x):
        return self.recurrent(x[:, None])[0][:, 0]


KINKED = {
    "relu": torch.relu,
    "F.relu": F.relu,
    "in place": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(),
    "hardtanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0.1),
    "elu": lambda x: F.elu(x, alpha=0.5),
    "rnn_relu": Recurrent(),
    "rnn_relu_cell": nn.RNNCell(5, 5, nonlinearity="relu"),
    "max_pool1d": lambda x: F.max_pool1d(x[:, None], 2)[:, 0].repeat(1, 3)[:, :5],
}
SMOOTH = {
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "softmax": nn.Softmax(-1),
}


@pytest.mark.parametrize("name", KINKED)
def test_gates_are_warned_of(name):
    with survey_motion(snapshot_through(KINKED[name])) as motion:
        direction = motion.direction("random")
        with pytest.warns(GateWarning, match="gates flip"):
            motion.derivative(direction)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            motion.derivative(direction, method="difference")


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_are_not_warned_of(name):
    with survey_motion(snapshot_through(SMOOTH[name])) as motion, warnings.catch_warnings():
        warnings.simplefilter("error")
        motion.derivative(motion.direction("random"))
        assert motion.gates == ()


def test_a_maximum_of_constants_is_no_gate():
    with survey_motion(snapshot_through(lambda x: x * x.new_ones(6, 1).abs().max())) as motion:
        assert motion.gates == ()


def test_between_gates_the_exact_derivative_is_that_of_a_small_step():
    with motion_of("cnn batchnorm", "brier") as motion:
        direction = motion.direction("random")
        with pytest.warns(GateWarning):
            derivative = motion.derivative(direction)
        exact = derivative.to_dense()
        small = motion.derivative(direction, method="difference").to_dense()
        large = motion.derivative(direction, method="difference", step=0.5 / direction.norm)
        assert relative(small, exact) <= DIFFERENCE
        assert relative(large.to_dense(), exact) > 0.01


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_directions_share_what_they_have_in_common(name):
    with survey_motion(make_snapshot(CASES_BY_NAME[name], "nll"), residual="nll") as motion:
        block = random_block(motion.n, 3)
        first, second = (motion.derivative(motion.direction("random")) for _ in range(2))
        first.compress(block)
        second.compress(block)
        assert (first.n_products, second.n_products) == (6, 3)
