"""Functions of the weights kept between calls: refused by name, or the numbers of the state."""

import copy
import re
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parametrize

from spectralshell import ShellEnergyEstimator
from spectralshell.models.caches import StaleStateError
from spectralshell.operators import build_exact_kernel
from spectralshell.operators.build import build_kernel
from spectralshell.operators.survey import survey_kernel
from tests import caching_models, caching_places
from tests.caching_models import HONEST, STALE, WIDTH, Attribute, ByVersion, InBuffer, Square
from tests.caching_places import PLACES, Folding, Listed, Partial
from tests.device import place, place_snapshot
from tests.fingerprints import model_fingerprint

EXACT = 1e-11  # the same operations in float64, beside the order of sums
SINGLE = 1e-3  # float32, and inverses of condition up to a hundred; another state differs by 0.1
RIGHT = (
    caching_models.InLruCache,
    caching_models.InOwnLruCache,
    caching_places.InPropertyCache,
    caching_places.InStaticCache,
)
"""Caches of functions, which a measurement replaces by empty ones."""


def draw(build, seed=0, dtype=torch.float64):
    """Return a model that was used, inputs, targets, and another state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = caching_models.network(build(), dtype)
        x, y = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
        caching_models.fill(model, x, grad=bool(seed % 2))
        state = {
            name: tensor + 0.05 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in model.state_dict().items()
        }
    return model, x, y, state


def reference(x, state):
    """Return M of a network around the inverse of a weight, by torch.func in plain code."""

    def outputs(p):
        h = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
        h = torch.tanh(h @ torch.linalg.inv(p["2.weight"]) + p["2.bias"])
        return (h @ p["4.weight"].T + p["4.bias"]).flatten() / len(x) ** 0.5

    jacobian = torch.cat([j.flatten(1) for j in jacrev(outputs)(state).values()], dim=1)
    return jacobian @ jacobian.T


def measured(build, seed, dtype=torch.float64):
    """Return how the other state was measured: refused, right, or something else."""
    model, x, y, state = draw(build, seed, dtype)
    before = model_fingerprint(model)
    try:
        kernel = build_kernel(place_snapshot(model, x, y, state=state))
    except ValueError as error:
        return "refused" if "'2'" in str(error) else str(error)
    finally:
        assert model_fingerprint(model) == before
    wide = {name: tensor.double() for name, tensor in state.items()}
    expected = reference(x.double(), wide)
    error = float((kernel.to_dense().cpu() - expected).abs().max() / expected.abs().max())
    close = error < (EXACT if dtype == torch.float64 else SINGLE)
    return "right" if close else "wrong"


@pytest.mark.parametrize("build", [*STALE, *PLACES], ids=lambda kind: kind.__name__)
def test_what_was_kept_is_refused_or_left_aside(build):
    assert {measured(build, seed) for seed in (0, 1)} == {"right" if build in RIGHT else "refused"}


@pytest.mark.parametrize("build", [Attribute, InBuffer], ids=lambda kind: kind.__name__)
def test_the_state_that_filled_it_is_refused_too(build):
    model, x, y, _ = draw(build)
    with pytest.raises(StaleStateError, match=r"module '2' .* keeps '_w'.*empty it"):
        survey_kernel(place_snapshot(model, x, y))


@pytest.mark.parametrize("build", HONEST.values(), ids=HONEST)
def test_other_things_are_kept_freely(build):
    model, x, y, state = draw(build)
    survey_kernel(place_snapshot(model, x, y, state=state))


KEEPING_GRADIENTS = [
    kind for kind in STALE if issubclass(kind, Square) and kind.inverse is Square.inverse
][:13]


@pytest.mark.parametrize("build", KEEPING_GRADIENTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", [build_kernel, build_exact_kernel])
def test_an_empty_cache_gives_the_numbers_of_the_state(build, make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = caching_models.network(build())
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    caching_models._LAST = None
    state = {name: 1.1 * tensor for name, tensor in model.state_dict().items()}
    before = model_fingerprint(model)
    for scale in (1.0, 1.05):  # what the first left would be read by the second
        other = {name: scale * tensor for name, tensor in state.items()}
        kernel = make(place_snapshot(model, x, y, state=other))
        torch.testing.assert_close(
            kernel.to_dense().cpu(), reference(x, other), rtol=EXACT, atol=EXACT
        )
    assert model_fingerprint(model) == before
    assert caching_models._LAST is None


def test_a_training_step_makes_a_version_and_right_numbers():
    model, x, y, _ = draw(ByVersion)
    with torch.no_grad():
        model[2].weight.mul_(1.01)
        model(x)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    kernel = build_kernel(place_snapshot(model, x, y))
    torch.testing.assert_close(kernel.to_dense().cpu(), reference(x, state), rtol=EXACT, atol=EXACT)


class _Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def test_parametrizations_follow_the_state_inside_cached():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(layer, "weight", _Symmetric())
        model = caching_models.network(layer)
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    state = {name: 1.2 * tensor for name, tensor in model.state_dict().items()}
    snapshot = place_snapshot(model, x, y, state=state)
    expected = build_kernel(snapshot).to_dense()
    other = copy.deepcopy(model)
    rows = jacrev(lambda p: functional_call(other, p, (x,)).flatten())(dict(state))
    jacobian = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    torch.testing.assert_close(
        expected.cpu(), jacobian @ jacobian.T / len(x), rtol=EXACT, atol=EXACT
    )
    with parametrize.cached():
        model(place(x))
        kept = dict(parametrize._cache)
        assert torch.equal(build_kernel(snapshot).to_dense(), expected)
        assert kept
        assert all(parametrize._cache[key] is value for key, value in kept.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("build", STALE, ids=lambda kind: kind.__name__)
def test_every_cache_in_a_hundred(build, dtype):
    found = {measured(build, seed, dtype) for seed in range(100)}
    assert found == {"right" if build in RIGHT else "refused"}


class DataOfAWeight(nn.Module):
    """A decoder in the memory of the encoder, which no state reaches."""

    def __init__(self, inner):
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        value = self.encoder.weight.data.t()
        self.kept = {"decoder": [value]} if inner else value

    def forward(self, x):
        kept = self.kept if isinstance(self.kept, torch.Tensor) else self.kept["decoder"][0]
        return torch.tanh(self.encoder(x)) @ kept.t()


@pytest.mark.parametrize("inner", [False, True])
def test_the_memory_of_a_weight_under_another_name_is_refused(inner):
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    with pytest.raises(StaleStateError, match=r"'encoder\.weight' without being it"):
        build_kernel(place_snapshot(DataOfAWeight(inner), x, torch.zeros(4, 3)))


def test_an_old_spectral_norm_before_its_first_call_is_measured():
    model = torch.nn.utils.spectral_norm(nn.Linear(3, 2))
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    assert build_kernel(place_snapshot(model, x, torch.zeros(4, 2))).dynamics_exact


@pytest.mark.parametrize("build", [Listed, Partial])
@pytest.mark.parametrize("factor", [None, 2.0])
def test_a_parameter_read_past_its_module_is_refused(build, factor):
    model, x = build(), torch.linspace(-1, 1, 12).reshape(4, 3)
    state = None if factor is None else {k: factor * v for k, v in model.state_dict().items()}
    with pytest.raises(StaleStateError, match=r"reads the parameter 'encoder\.weight'"):
        build_kernel(place_snapshot(model, x, torch.zeros(4, 3), state=state))


def test_what_is_computed_on_loading_is_refused_for_another_state():
    model, x = Folding(), torch.linspace(-1, 1, 12).reshape(4, 3)
    other = {name: 2.0 * value for name, value in model.state_dict().items()}
    build_kernel(place_snapshot(model, x, torch.zeros(4, 3)))
    with pytest.raises(StaleStateError, match="when a state is loaded"):
        build_kernel(place_snapshot(model, x, torch.zeros(4, 3), state=other))


class AttributeDict(dict):
    """A configuration whose items are attributes."""

    __getattr__ = dict.__getitem__


class Configured(nn.Linear):
    defaults = AttributeDict(scale=1.0)

    def __init__(self):
        super().__init__(3, 2)
        self.config = AttributeDict(scale=2.0)

    def forward(self, x):
        return super().forward(x) * self.config.scale * self.defaults.scale


def test_a_configuration_that_answers_to_every_name_is_measured():
    snapshot = place_snapshot(Configured(), torch.ones(4, 3), torch.zeros(4, 2))
    ShellEnergyEstimator(q=4.0).fit([snapshot])


def test_a_long_list_comes_back():
    model = nn.Linear(3, 2)
    model.history = [0.0] * 3000
    model.register_forward_hook(lambda module, args, output: module.history.append(1.0))
    build_kernel(place_snapshot(model, torch.ones(4, 3), torch.zeros(4, 2)))
    assert len(model.history) == 3000


class Searching(nn.Linear):
    """Keeps objects of the standard library, whose members are read only and new at each look."""

    pattern = re.compile("a+", re.IGNORECASE | re.ASCII)
    since = timedelta(days=1000, seconds=2000)

    def __init__(self):
        super().__init__(3, 2)
        self.share = Fraction(1, 3)
        self.found = 0

    def forward(self, x):
        copy.deepcopy(self.since)
        self.found += re.search(f"b{self.found}+|a", "aa") is not None
        return super().forward(x) * float(self.share)


def test_objects_of_the_standard_library_are_left_alone():
    model = Searching()
    build_kernel(place_snapshot(model, torch.ones(4, 3), torch.zeros(4, 2)))
    assert model.found == 0
    assert any("b0+|a" in key for key in re._cache)  # what it compiled is not the model's
