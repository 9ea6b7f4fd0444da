"""The rule of each layer against automatic differentiation, and what happens when one is wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralshell.operators import build_exact_kernel
from spectralshell.operators.layers.recording import UseRecorder, count_graph_uses
from spectralshell.operators.layers.rules import Affine, Convolution, Lookup, Matrix, Translation
from spectralshell.warning_categories import KernelWarning
from tests.device import place, place_snapshot
from tests.zoo import CASES_BY_NAME, dense_reference, make_snapshot

EXACT = 1e-12  # float64 sums in another order
N = 3


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return place(torch.randn(shape, generator=generator, dtype=torch.float64))


TABLE = place(torch.tensor([[0, 1, 4], [2, 2, 2], [4, 0, 1]]))

RULES = {
    "linear": (lambda w, x: F.linear(x, w), (4, 5), draw(N, 5)),
    "linear at positions": (lambda w, x: F.linear(x, w), (4, 5), draw(N, 2, 3, 5)),
    "linear on flattened tokens": (lambda w, x: F.linear(x, w), (4, 5), draw(N * 2, 5)),
    "product": (lambda w, x: x @ w, (5, 4), draw(N, 2, 5)),
    "addmm": (lambda w, x: torch.addmm(x.new_zeros(4), x, w), (5, 4), draw(N * 2, 5)),
    "conv1d": (lambda w, x: F.conv1d(x, w, None, 2, 1), (4, 2, 3), draw(N, 2, 7)),
    "conv1d same": (lambda w, x: F.conv1d(x, w, padding="same"), (4, 2, 4), draw(N, 2, 7)),
    "conv2d": (
        lambda w, x: F.conv2d(x, w, None, (2, 1), (1, 2), (1, 2)),
        (4, 2, 3, 2),
        draw(N, 2, 5, 6),
    ),
    "conv2d grouped": (lambda w, x: F.conv2d(x, w, groups=2), (6, 2, 2, 2), draw(N, 4, 3, 3)),
    "conv2d of frames": (lambda w, x: F.conv2d(x, w), (4, 2, 2, 2), draw(N * 2, 2, 3, 3)),
    "conv3d": (
        lambda w, x: F.conv3d(x, w, None, 1, (1, 0, 1)),
        (2, 2, 3, 1, 2),
        draw(N, 2, 2, 3, 2),
    ),
    "embedding": (lambda w, x: F.embedding(x, w), (5, 4), TABLE),
    "embedding with padding": (lambda w, x: F.embedding(x, w, padding_idx=-1), (5, 4), TABLE),
    "layer norm": (lambda w, x: F.layer_norm(x, (2, 4), w), (2, 4), draw(N, 3, 2, 4)),
    "layer norm, shift": (
        lambda w, x: F.layer_norm(x, (2, 4), torch.ones_like(w), w),
        (2, 4),
        draw(N, 3, 2, 4),
    ),
    "rms norm": (lambda w, x: F.rms_norm(x, (4,), w), (4,), draw(N, 3, 4)),
    "group norm": (lambda w, x: F.group_norm(x, 2, w), (4,), draw(N, 4, 3)),
    "group norm, shift": (
        lambda w, x: F.group_norm(x, 2, torch.ones_like(w), w),
        (4,),
        draw(N, 4, 3, 2),
    ),
    "batch norm": (
        lambda w, x: F.batch_norm(x, x.new_tensor(range(4)), x.new_ones(4), w),
        (4,),
        draw(N, 4, 3),
    ),
    "factor": (lambda w, x: w * x, (3, 1), draw(N, 2, 3, 4)),
    "factor with a sample dimension": (lambda w, x: x * w, (1, 3, 4), draw(N, 1, 4)),
    "term": (lambda w, x: x + w, (1, 2, 1, 4), draw(N, 2, 3, 4)),
    "one number": (lambda w, x: w + x, (), draw(N, 2, 3)),
}
"""Function of a parameter and an input with samples first, shape of the parameter, input."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_samples(rule):
    function, shape, inputs = RULES[rule]
    parameter = draw(*shape).requires_grad_()
    with UseRecorder({id(parameter): "w"}, N) as recorder:
        output = function(parameter, inputs)
    (use,) = [use for use in recorder.uses if use.name == "w"]
    assert count_graph_uses(output, {id(parameter): "w"}, recorder.uses)[0] == {"w": 1}
    assert use.intact
    assert use.by_samples
    cotangent = draw(*output.shape)
    found = use.geometry.gradient(cotangent, N)
    per_sample = len(output) // N
    for sample in range(N):
        chosen = torch.zeros_like(output)
        rows = slice(sample * per_sample, (sample + 1) * per_sample)
        chosen[rows] = cotangent[rows]
        (expected,) = torch.autograd.grad(output, parameter, chosen, retain_graph=True)
        difference = found[sample].reshape(shape) - expected
        assert float(difference.norm()) <= EXACT * float(expected.norm())


@pytest.mark.parametrize("rule", ["linear at positions", "conv2d grouped", "conv2d of frames"])
def test_inputs_and_output_gradients_at_positions_make_the_gradient(rule):
    function, shape, inputs = RULES[rule]
    parameter = draw(*shape).requires_grad_()
    with UseRecorder({id(parameter): "w"}, N) as recorder:
        output = function(parameter, inputs)
    (use,) = recorder.uses
    cotangent = draw(*output.shape)
    sources = use.geometry.inputs(N)
    arrived = use.geometry.outputs(cotangent, N)
    assert sources.shape[3] == arrived.shape[3] == use.n_positions
    assert arrived.shape[2] == use.fan_out
    by_group = torch.einsum("sgop,sgfp->sgof", arrived, sources)
    assert torch.allclose(by_group.reshape(N, -1), use.geometry.gradient(cotangent, N).flatten(1))
    assert torch.equal(use.geometry.inputs(N, slice(1, 2)), sources[1:2])


def test_an_input_that_was_written_to_is_not_trusted():
    parameter, x = draw(4, 5).requires_grad_(), draw(N, 5)
    with UseRecorder({id(parameter): "w"}, N) as recorder:
        F.linear(x, parameter)
        (use,) = recorder.uses
        assert use.intact
        x.mul_(2.0)
    assert not use.intact


UNKNOWN = {
    "samples coupled": lambda w, x: F.batch_norm(x, None, None, w, training=True),
    "scaled sum": lambda w, x: torch.add(x, w, alpha=2),
    "scaled addmm": lambda w, x: torch.addmm(w, x, torch.eye(4).to(x), beta=0.5),
    "function of the parameter": lambda w, x: x * w.exp(),
    "parameter first": lambda w, x: torch.matmul(w, x.T)[:, None],
    "vector": lambda w, x: (x @ w)[:, None],
    "in place": lambda w, x: x.clone().mul_(w),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_other_forms_are_left_to_the_gradients_of_samples(form):
    parameter = draw(4).requires_grad_()
    with UseRecorder({id(parameter): "w"}, N) as recorder:
        output = UNKNOWN[form](parameter, draw(N, 4))
    assert recorder.uses == []
    assert count_graph_uses(output, {id(parameter): "w"}, recorder.uses)[0]["w"] == 1


# A rule that is wrong, one at a time: the module that it spoils in which member of the zoo.


def scaled(rule, name):
    def patch(monkeypatch):
        right = getattr(rule, name)
        monkeypatch.setattr(rule, name, lambda *args, **more: 1.01 * right(*args, **more))

    return patch


def shifted_padding(monkeypatch):
    right = Convolution.__init__

    def wrong(self, *args):
        right(self, *args)
        self.margins = self.margins[::-1] if len(set(self.margins)) > 1 else (0, 2, 0, 2)

    monkeypatch.setattr(Convolution, "__init__", wrong)


def forgotten_statistics(monkeypatch):
    right = Affine.__init__
    monkeypatch.setattr(
        Affine, "__init__", lambda self, factor, shape: right(self, factor + 0.1, shape)
    )


FAULTS = {
    "linear": (scaled(Matrix, "inputs"), "mlp", {"0", "2"}),
    "linear, output gradients": (scaled(Matrix, "outputs"), "causal attention", {"qkv", "head"}),
    "convolution": (shifted_padding, "residual cnn", {"0", "1.body.0"}),
    "batch norm": (forgotten_statistics, "cnn batchnorm", {"1"}),
    "layer norm": (forgotten_statistics, "layernorm mlp", {"1"}),
    "embedding": (scaled(Lookup, "gradient"), "embedding inputs", {"embedding"}),
    "shift": (scaled(Translation, "gradient"), "groupnorm cnn", {"1"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_found_named_and_mended(fault, monkeypatch):
    patch, name, modules = FAULTS[fault]
    patch(monkeypatch)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        snapshot = make_snapshot(CASES_BY_NAME[name], dtype=dtype)
        expected = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
        with pytest.warns(KernelWarning, match="differ from automatic") as caught:
            kernel = build_exact_kernel(snapshot)
        (message,) = [str(warning.message) for warning in caught]
        assert set(message.split("contracted")[0].split("'")[1::2]) == modules
        assert kernel.rung == "layers"
        difference = kernel.to_dense().cpu() - expected["kernel"]
        assert float(difference.norm()) < tolerance * float(expected["kernel"].norm())


class SmallShare(nn.Module):
    """Its gain adds a millionth to the trace."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.body(x) + 1e-3 * (torch.tanh(x[:, :3]) * self.gain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_wrong_rule_of_a_layer_with_a_small_share_is_found(dtype, monkeypatch):
    scaled(Affine, "gradient")(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallShare().to(dtype)
    snapshot = place_snapshot(model, draw(5, 4).to(dtype), torch.zeros(5, 3, dtype=dtype))
    reference = dense_reference(model, snapshot.inputs, snapshot.targets, "mse")
    with pytest.warns(KernelWarning, match="'gain'"):
        kernel = build_exact_kernel(snapshot, layers="parameter")
    part = reference["jacobian"][:, :3]  # a module's own parameters come first
    assert 1e-8 < float(part.square().sum() / reference["jacobian"].square().sum()) < 1e-5
    difference = kernel.layers["gain"].cpu().double() - part @ part.T
    assert float(difference.norm()) < 1e-5 * float((part @ part.T).norm())
