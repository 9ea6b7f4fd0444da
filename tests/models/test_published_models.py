"""Models as others publish them, with the weights in their wheels, against a dense Jacobian.

``make test-wheels`` fetches the wheels into ``.wheels/``; tests of one that is missing are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import ShellEnergyEstimator, Snapshot
from tests.fingerprints import model_fingerprint

WHEELS = Path(os.environ.get("SPECTRALSHELL_TEST_WHEELS", Path(__file__).parents[2] / ".wheels"))
# Shares of the largest eigenvalue and of the energy, float64 on both sides.
EIGENVALUE_RTOL = ENERGY_RTOL = 1e-6
DIFFERENCE = 1e-6


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A function that unpacks a wheel, once, and returns the folder."""
    folder = tmp_path_factory.mktemp("wheels")

    def unpack(name):
        found = sorted(WHEELS.glob(f"{name}-*.whl")) if WHEELS.is_dir() else []
        if not found:
            pytest.skip(f"no wheel of {name} in {WHEELS}: make test-wheels fetches it")
        target = folder / name
        if not target.exists():
            with zipfile.ZipFile(found[-1]) as archive:
                archive.extractall(target)
        return target

    return unpack


@pytest.fixture
def load(wheels, monkeypatch):
    """A function that imports one module of a wheel without the rest of its package."""

    def load(wheel, module, *absent):
        folder, package = wheels(wheel), module.partition(".")[0]
        for name in absent:  # what the module imports and the models do not use
            monkeypatch.setitem(sys.modules, name, _Anything(name))
        holder = types.ModuleType(package)
        holder.__path__ = [str(folder / package)]
        monkeypatch.setitem(sys.modules, package, holder)
        loaded = importlib.import_module(module)
        for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
            monkeypatch.setitem(sys.modules, name, sys.modules[name])
        return loaded

    return load


class _Anything(types.ModuleType):
    """A module that has every name."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(f"{self.__name__}.{name}")


class Output(nn.Module):
    """One output of a model that has several."""

    def __init__(self, model, position):
        super().__init__()
        self.model, self.position = model, position

    def forward(self, x):
        return self.model(x)[self.position]


def smooth(*shape):
    """Inputs without an image or a voice: waves of several lengths."""
    grid = torch.arange(float(np.prod(shape)), dtype=torch.float64).reshape(shape)
    return (0.37 * grid).sin() + (0.011 * grid).cos()


def face_detector(load):
    module = load(
        "facenet_pytorch",
        "facenet_pytorch.models.mtcnn",
        *("torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.ops.boxes"),
        *("PIL", "cv2"),
    )
    return Output(module.ONet().double(), 0), smooth(4, 3, 48, 48)


def face_refiner(load):
    module = load(
        "facenet_pytorch",
        "facenet_pytorch.models.mtcnn",
        *("torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.ops.boxes"),
        *("PIL", "cv2"),
    )
    return Output(module.RNet().double(), 1), smooth(6, 3, 24, 24)


def speaker_encoder(load):
    module = load("Resemblyzer", "resemblyzer.voice_encoder", "resemblyzer.audio")
    model = module.VoiceEncoder("cpu", verbose=False).double()
    # One layer and some of the outputs: the reference holds the Jacobian.
    model.requires_grad_(False).linear.requires_grad_(True)
    return model, smooth(3, 12, 40).square()


def adapted(load):
    layers = load("loralib", "loralib.layers")
    torch.manual_seed(0)
    model = nn.Sequential(layers.Linear(6, 5, r=2), nn.Tanh(), layers.Linear(5, 2, r=1)).double()
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.lora_B.normal_()
    return model, smooth(8, 6)


def jacobian(model, x):
    """Return outputs and their Jacobian, row by row in plain reverse mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(x).flatten()
    rows = [
        torch.autograd.grad(
            o, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for o in outputs
    ]
    return outputs.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def slope(model, x, direction):
    """Return the central difference of the outputs along a direction of trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    pieces = direction.split([p.numel() for p in parameters])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter += sign * DIFFERENCE * piece.view_as(parameter)
            values.append(model(x).flatten())
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter -= sign * DIFFERENCE * piece.view_as(parameter)
    return (values[0] - values[1]) / (2 * DIFFERENCE)


@pytest.mark.parametrize("make", [face_detector, face_refiner, speaker_encoder, adapted])
@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_published_weights_have_the_energies_of_a_dense_jacobian(make, solver, load):
    model, x = make(load)
    if make is not adapted:  # which merges its adapter in evaluation mode
        model.eval()
    outputs, dense = jacobian(model, x)
    direction = torch.randn(dense.shape[1], dtype=torch.float64).div(dense.shape[1] ** 0.5)
    np.testing.assert_allclose(slope(model, x, direction), dense @ direction, rtol=0, atol=1e-4)
    targets = torch.zeros(len(x), len(outputs) // len(x), dtype=torch.float64)
    before = model_fingerprint(model)
    estimator = ShellEnergyEstimator(solver=solver, n_steps=len(outputs), floor=1e-9)
    estimator.fit([Snapshot(model, x, targets)])
    assert model_fingerprint(model) == before
    values, vectors = torch.linalg.eigh(dense @ dense.T / len(x))
    energies = (vectors.T @ outputs).square() / (2 * len(x))
    shells = estimator.shells_
    total = float(energies.sum())
    for _, row in shells.iterrows():
        inside = (values >= row.lambda_lo) & (values < row.lambda_hi)
        assert row.energy_lower - ENERGY_RTOL * total <= float(energies[inside].sum())
        assert row.energy_upper + ENERGY_RTOL * total >= float(energies[inside].sum())
    assert float(estimator.transform([Snapshot(model, x, targets)]).sum(axis=1).iloc[0]) == (
        pytest.approx(total, rel=ENERGY_RTOL)
    )
