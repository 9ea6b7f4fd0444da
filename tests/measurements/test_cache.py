"""Keys of the cache on disk: alike for equal things, unlike for whatever changes a measure."""

import importlib
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import Snapshot
from spectralshell.measurements import cache as digests
from spectralshell.measurements.cache import settings_digest, snapshot_digest
from spectralshell.measurements.settings import KernelSettings, MotionSettings


class Scaled(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.linear = nn.Linear(3, 2, device="meta").to_empty(device="cpu")
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self._scale = scale

    def forward(self, x):
        return self._scale * self.linear(x)


class Shifted(Scaled):
    def forward(self, x):
        return self._scale * self.linear(x) + 1.0


def make(model, inputs=1.0, **more):
    return Snapshot(model, torch.full((4, 3), inputs), torch.zeros(4, 2), **more)


def with_hook():
    model = Scaled()
    model.register_forward_hook(lambda module, args, output: 3.0 * output)
    return model


def partly_frozen():
    model = Scaled()
    model.linear.bias.requires_grad_(False)
    return model


def with_weights(value):
    model = Scaled()
    nn.init.constant_(model.linear.weight, value)
    return model


def test_equal_snapshots_have_one_key_whatever_their_labels():
    first, second = make(Scaled()), make(Scaled(), tau=3.0, batch=7, name="run")
    assert snapshot_digest(first) == snapshot_digest(second)
    assert snapshot_digest(pickle.loads(pickle.dumps(first))) == snapshot_digest(first)


@pytest.mark.parametrize(
    "other",
    [
        make(Scaled(2.0)),
        make(Shifted()),
        make(with_hook()),
        make(partly_frozen()),
        make(with_weights(2.0)),
        make(Scaled(), inputs=2.0),
        Snapshot(Scaled(), torch.ones(4, 3), torch.ones(4, 2)),
        Snapshot(Scaled(), torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.float64)),
    ],
    ids=["setting", "class", "hook", "frozen", "state", "inputs", "targets", "dtype"],
)
def test_whatever_changes_a_measure_changes_the_key(other):
    assert snapshot_digest(other) != snapshot_digest(make(Scaled()))


def test_callables_count_by_their_code():
    plain = KernelSettings(residual=lambda o, t: o - t)
    other = KernelSettings(residual=lambda o, t: 2 * (o - t))
    assert settings_digest(plain) == settings_digest(plain)
    assert settings_digest(plain) != settings_digest(other)


MODULE = """
import numpy as np
FACTOR = np.ones(3)
LIMITS = {"low": 0.0, "high": [1.0, 2.0]}

def scaled(outputs, targets):
    return [FACTOR.sum() * o for o in outputs]

class Clipped:
    def __call__(self, outputs, targets):
        return outputs.clip(LIMITS["low"])
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "residuals_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("residuals_of_a_user")
    del sys.modules["residuals_of_a_user"]


@pytest.mark.parametrize("kind", ["function", "object"])
def test_data_that_a_callable_finds_in_its_module_counts(module, kind):
    residual = module.scaled if kind == "function" else module.Clipped()
    settings = KernelSettings(residual=residual)
    before = settings_digest(settings)
    assert settings_digest(settings) == before
    if kind == "function":
        module.FACTOR[1] += 1e-12
    else:
        module.LIMITS["high"][0] = 3.0
    assert settings_digest(settings) != before


@pytest.mark.parametrize("size", [3, 2000])
def test_arrays_count_by_every_entry(size):
    """The text of an array has eight digits, and of a thousand entries the ends alone."""
    array = np.ones(size)
    other = array.copy()
    other[size // 2] += 1e-12
    same, moved, single, square = (
        settings_digest(MotionSettings(direction={"weight": value}))
        for value in (array.copy(), other, array.astype(np.float32), array[:, None])
    )
    assert len({same, moved, single, square}) == 4
    assert same == settings_digest(MotionSettings(direction={"weight": array}))


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([None])])
def test_what_has_no_value_to_compare_is_refused(value):
    with pytest.raises(TypeError, match="cannot tell by its value"):
        settings_digest(MotionSettings(direction={"weight": value}))


def test_another_version_of_the_package_measures_again(monkeypatch):
    before = settings_digest(KernelSettings())
    monkeypatch.setattr(digests, "__version__", "99.0")
    assert settings_digest(KernelSettings()) != before
