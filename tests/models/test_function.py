"""A model as a function: which parameters it has, and how the model carries them."""

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

from spectralshell.models.function import ModelFunction, select_parameters
from spectralshell.models.state import copy_state
from tests.fingerprints import model_fingerprint

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)


class Tied(nn.Module):
    """Two layers of one weight, and a buffer that a forward pass rebinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        self.second = nn.Linear(2, 2, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        self.scale = self.scale.clone()
        return self.second(torch.tanh(self.first(x))) * self.scale


@pytest.fixture
def function():
    torch.manual_seed(0)
    model = Tied()
    names = select_parameters(model, None)
    return ModelFunction(model, copy_state(model), names, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (None, ["first.weight", "second.bias"]),
        ("^first", ["first.weight"]),
        ("^second", ["first.weight", "second.bias"]),  # a tied one has its first name
        (lambda name: name.endswith("bias"), ["second.bias"]),
    ],
)
def test_selected_names(parameters, names):
    assert select_parameters(Tied(), parameters) == names


def test_an_installed_state_is_seen_under_all_names(function):
    model = function.model
    weight, bias = (torch.full_like(p, 2.0) for p in function.parameters)
    with function.installed((weight, bias)):
        assert model.first.weight is model.second.weight is weight
        assert model.second.bias is bias
        inner = tuple(map(torch.zeros_like, (weight, bias)))
        with function.installed(inner):
            assert model.second.weight is inner[0]
        assert model.second.weight is weight


@pytest.mark.parametrize("context", ["installed", "poisoned"])
def test_the_model_comes_back_exactly_also_after_an_exception(function, context):
    model = function.model
    before = model_fingerprint(model)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def interrupted():
        with getattr(function, context)():
            model(X)
            del model.second._parameters["bias"]
            model.second.bias = torch.zeros(2)
            raise KeyboardInterrupt

    with function.guard(), pytest.raises(KeyboardInterrupt):
        interrupted()
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert list(after) == list(own)
    assert all(after[name] is tensor for name, tensor in own.items())
    assert model_fingerprint(model) == before


def test_a_poisoned_model_gives_nothing(function):
    with function.guard(), function.poisoned():
        assert function.model(X).isnan().all()
    assert function.outputs(function.parameters, X).isfinite().all()


def test_transforms_go_through_an_installed_state(function):
    tangents = tuple(map(torch.ones_like, function.parameters))
    with function.guard():
        pushed = jvp(lambda *p: function.outputs(p, X), function.parameters, tangents)[1]
        stacked = tuple(torch.stack([t, 2.0 * t]) for t in tangents)

        def push(*single):
            return jvp(lambda *p: function.outputs(p, X), function.parameters, single)[1]

        torch.testing.assert_close(vmap(push)(*stacked), torch.stack([pushed, 2.0 * pushed]))
