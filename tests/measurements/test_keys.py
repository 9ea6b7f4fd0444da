"""Keys of what is remembered: alike for equal things, unlike for whatever changes a measure."""

import importlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import Snapshot
from spectralshell.measurements import keys as digests
from spectralshell.measurements.keys import model_digest, settings_digest, snapshot_digest
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


BEFORE = """
import dataclasses, functools, weakref
import torch
from torch import nn
import helper_of_a_user as helper
from helper_of_a_user import moved

FACTOR = 2.0
TABLE = {"act": torch.tanh}

@dataclasses.dataclass
class Config:
    scale: float = 2.0

CONFIG = Config()

def innermost(x):
    return x * 2.0

def inner(x):
    return innermost(x)

def bound(factor):
    def apply(x):
        return factor * x
    return apply

def wrapped(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)
    return call

class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0

class Halved(nn.Module):
    def forward(self, x):
        return x * 2.0

class Grandparent(nn.Module):
    GAIN = 2.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def act(self, x):
        return x * 2.0

class Parent(Grandparent):
    @property
    def gain(self):
        return 2.0

    def forward(self, x, power=2.0):
        from late_of_a_user import late
        y = self.act(self.linear(x)) * self.gain * self.GAIN * power
        y = FACTOR * CONFIG.scale * inner(y) + helper.added(y) + moved(y) + late(y)
        return self.closed(TABLE["act"](Squared.apply(y))) + self.parts[0](y)

class Leaf(Parent):
    def __init__(self):
        super().__init__()
        self.closed = bound(2.0)
        self.parts = [nn.Linear(2, 2, device="meta").to_empty(device="cpu")]
        nn.init.constant_(self.parts[0].weight, 2.0)
        nn.init.zeros_(self.parts[0].bias)
        self.linear.register_forward_hook(lambda module, args, output: output * 2.0)
        self.linear.width = 2.0
        torch.nn.utils.parametrize.register_parametrization(self.linear, "bias", Halved())
        self.own = weakref.ref(self)

    @wrapped
    def forward(self, x):
        return super().forward(x) * 2.0
"""

HELPER = """
def added(x):
    return x * 2.0

def moved(x):
    return x - 2.0

def unused(x):
    return x
"""

LATE = """
def late(x):
    return x * 2.0
"""


class Written:
    """Modules of a user in files, written anew and imported anew, as in a later process."""

    NAMES = ("model_of_a_user", "helper_of_a_user", "late_of_a_user")

    def __init__(self, folder):
        self.folder = folder

    def digest(self, *sources):
        for name, source in zip(self.NAMES, sources, strict=True):
            sys.modules.pop(name, None)
            (self.folder / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return model_digest(importlib.import_module(self.NAMES[0]).Leaf())


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Written(tmp_path)
    for name in Written.NAMES:
        sys.modules.pop(name, None)


EDITS = {
    "parent": "y = self.act(self.linear(x)) * self.gain * self.GAIN * power",
    "grandparent": "    def act(self, x):\n        return x * 2.0",
    "class attribute": "GAIN = 2.0",
    "property": "def gain(self):\n        return 2.0",
    "default": "power=2.0",
    "constant": "FACTOR = 2.0",
    "field of a config": "scale: float = 2.0",
    "function of a function": "def innermost(x):\n    return x * 2.0",
    "closure": "bound(2.0)",
    "decorated": "return super().forward(x) * 2.0",
    "decorator": "return function(*args)",
    "table": "torch.tanh",
    "autograd function": "def forward(ctx, x):\n        return x * 2.0",
    "module of a list": "self.parts[0].weight, 2.0",
    "hook": "output * 2.0",
    "attribute of a layer": "width = 2.0",
    "parametrization": "Halved(nn.Module):\n    def forward(self, x):\n        return x * 2.0",
}


def edited(source, piece):
    other = piece.replace("2.0", "3.0") if "2.0" in piece else piece.replace("tanh", "sin")
    if piece == EDITS["parent"]:
        other = piece.replace("power", "power + 1")
    if piece == EDITS["decorator"]:
        other = piece.replace("*args)", "*args) + 1")
    assert source.count(piece) == 1
    assert other != piece
    return source.replace(piece, other)


@pytest.mark.parametrize("kind", EDITS)
def test_code_that_a_model_runs_counts_wherever_it_stands(written, kind):
    before = written.digest(BEFORE, HELPER, LATE)
    assert written.digest(BEFORE, HELPER, LATE) == before
    assert written.digest(edited(BEFORE, EDITS[kind]), HELPER, LATE) != before


def test_code_of_other_modules_counts_where_it_is_run(written):
    before = written.digest(BEFORE, HELPER, LATE)
    for piece in ("return x * 2.0", "return x - 2.0"):
        assert written.digest(BEFORE, edited(HELPER, piece), LATE) != before
    assert written.digest(BEFORE, HELPER, edited(LATE, "return x * 2.0")) != before
    assert written.digest(BEFORE, HELPER.replace("return x\n", "return -x\n"), LATE) == before


def test_places_and_remarks_do_not_count(written):
    before = written.digest(BEFORE, HELPER, LATE)
    assert written.digest("# moved\n\n\n" + BEFORE, HELPER + "# longer\n", LATE) == before


def test_a_method_put_into_a_class_of_a_library_counts(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.GELU())
    before = model_digest(model)
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: 2.0 * x)
    assert model_digest(model) != before


@pytest.mark.parametrize("where", ["instance", "global hook", "pre-hook", "keyword hook"])
def test_what_is_called_around_a_forward_counts(where):
    model, handle = Scaled(), None
    before = model_digest(model)
    if where == "instance":
        model.linear.forward = lambda x: x
    elif where == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    elif where == "pre-hook":
        handle = model.register_forward_pre_hook(lambda module, args: args)
    else:
        handle = model.register_forward_hook(lambda *args, **more: None, with_kwargs=True)
    try:
        assert model_digest(model) != before
    finally:
        if handle is not None:
            handle.remove()
            assert model_digest(model) == before


def test_the_state_does_not_count_twice():
    model = nn.Sequential(nn.LSTM(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    before = model_digest(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert model_digest(model) == before


def test_what_is_too_deep_is_like_nothing_else():
    model = Scaled()
    model.chain = []
    for _ in range(10**4):
        model.chain = [model.chain]
    assert model_digest(model) != model_digest(model)


@pytest.mark.slow  # another interpreter
def test_a_process_of_other_hashes_finds_the_same_key(written):
    source = BEFORE.replace("FACTOR = 2.0", "FACTOR = max({'a', 'b', 'c', 'd'}) and 2.0")
    here = written.digest(source, HELPER, LATE)
    code = (
        "import model_of_a_user as m; from spectralshell.measurements.keys import model_digest; "
        "print(model_digest(m.Leaf()))"
    )
    path = os.pathsep.join([str(written.folder), *sys.path])
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here
