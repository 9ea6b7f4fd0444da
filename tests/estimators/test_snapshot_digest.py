"""Keys of the cache on disk: alike for equal things, unlike for whatever changes a measure."""

import pickle

import pytest
import torch
from torch import nn

from spectralshell import Snapshot
from spectralshell.estimators.measurement import MeasurementConfig
from spectralshell.estimators.snapshot_digest import configuration_digest, snapshot_digest


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
    plain = MeasurementConfig(residual=lambda o, t: o - t)
    other = MeasurementConfig(residual=lambda o, t: 2 * (o - t))
    assert configuration_digest(plain) == configuration_digest(plain)
    assert configuration_digest(plain) != configuration_digest(other)
