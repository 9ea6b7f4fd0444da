"""An optimiser's moments, matched to parameters by name, from wherever they come."""

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralshell import Snapshot, make_snapshots
from spectralshell.models.optimizer_state import OptimizerState, description, packed


def _trained(kind=torch.optim.AdamW, *, groups=1, named=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    parameters = list(model.named_parameters()) if named else list(model.parameters())
    # In an order that is not the model's, as groups with and without decay have it.
    parts = (
        [{"params": parameters}]
        if groups == 1
        else [{"params": parameters[1::2], "weight_decay": 0.0}, {"params": parameters[::2]}]
    )
    optimizer = kind(parts, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _recorded(model, optimizer, path):
    state = OptimizerState.of_optimizer(model, optimizer)
    save_file(packed(state.moments), path, description(state))
    return path


def _saved(model, optimizer, path):
    torch.save(optimizer.state_dict(), path)
    return path


SOURCES = {
    "optimiser": lambda model, optimizer, path: optimizer,
    "state_dict": lambda model, optimizer, path: optimizer.state_dict(),
    "recorder's file": _recorded,
    "torch's file": _saved,
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_moments_by_name(tmp_path, source, groups):
    model, optimizer = _trained(groups=groups, named=groups == 2)
    argument = SOURCES[source](model, optimizer, tmp_path / "file")
    snapshot = Snapshot(model, torch.ones(2, 3), torch.zeros(2, 1), optimizer=argument)
    moments = snapshot.optimizer.load()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(moments[name][key], value)
    settings = snapshot.optimizer.groups[snapshot.optimizer.group_of["0.bias"]]
    assert settings["lr"] == 0.1
    assert tuple(settings["betas"]) == (0.9, 0.999)
    assert settings["weight_decay"] == (0.01 if groups == 1 else 0.0)


def test_moments_are_copied_from_an_optimiser():
    model, optimizer = _trained()
    first, second = make_snapshots(
        model, [(torch.ones(2, 3), torch.zeros(2, 1))] * 2, optimizer=optimizer
    )
    before = first.optimizer.load()["0.bias"]["exp_avg"].clone()
    optimizer.state[model[0].bias]["exp_avg"].zero_()
    assert torch.equal(first.optimizer.load()["0.bias"]["exp_avg"], before)
    assert first.optimizer is second.optimizer


def test_a_state_dict_without_names_of_several_groups_is_refused():
    model, optimizer = _trained(groups=2)
    with pytest.raises(ValueError, match="does not tell which of the model's 4 parameters"):
        OptimizerState.from_argument(model, optimizer.state_dict())
    names = [["0.bias", "1.bias"], ["0.weight", "1.weight"]]
    state = OptimizerState.from_argument(model, optimizer.state_dict(), names=names)
    assert state.load()["1.bias"]["exp_avg"].shape == (1,)


def _wider():
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))


@pytest.mark.parametrize("source", ["state_dict", "recorder's file", "torch's file"])
def test_moments_of_another_shape_are_refused(tmp_path, source):
    argument = SOURCES[source](*_trained(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"exp_avg of '0.(weight|bias)' has shape \(4"):
        OptimizerState.from_argument(_wider(), argument)


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("/tmp/canary-of-optimizer-state",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a file of moments"),
        (b"\x80\x05garbage", "neither a file of moments"),
        (pickle.dumps(_Runs()), "neither a file of moments"),
        ([1, 2], "not a state_dict"),
        ({"state": {}}, "has no 'state' and 'param_groups'"),
    ],
)
def test_files_that_hold_no_moments_are_refused(tmp_path, content, message):
    model, _ = _trained()
    if isinstance(content, bytes):
        (tmp_path / "file").write_bytes(content)
    else:
        torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        OptimizerState.from_argument(model, tmp_path / "file")
    assert not os.path.exists("/tmp/canary-of-optimizer-state")


@pytest.mark.parametrize(
    "texts", [{}, {"kind": "other"}, {"kind": "spectralshell optimizer state"}]
)
def test_safetensors_without_a_description_are_refused(tmp_path, texts):
    save_file({"exp_avg/0.bias": torch.ones(4)}, tmp_path / "file", texts)
    with pytest.raises(ValueError, match="no file of moments of a recorder"):
        OptimizerState.from_argument(_trained()[0], tmp_path / "file")


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (3, TypeError, "optimizer must be None, a torch optimiser"),
        ("missing", FileNotFoundError, "no file at"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters()), ValueError, "no parameter of the model"),
    ],
)
def test_arguments_that_are_no_optimiser_are_refused(argument, error, message):
    with pytest.raises(error, match=message):
        OptimizerState.from_argument(_trained()[0], argument)


def test_a_file_that_changes_is_told(tmp_path):
    model, optimizer = _trained()
    state = OptimizerState.from_argument(model, _recorded(model, optimizer, tmp_path / "file"))
    save_file({}, tmp_path / "file", {"kind": "other"})
    with pytest.raises(ValueError, match="was changed after it was opened"):
        state.load()


def test_a_snapshot_with_another_optimiser_forgets_its_measures():
    model, optimizer = _trained()
    snapshot = Snapshot(model, torch.ones(2, 3), torch.zeros(2, 1), optimizer=optimizer)
    snapshot.measures["key"] = 1
    copied = pickle.loads(pickle.dumps(snapshot))
    assert copied.measures == {"key": 1}
    assert copied.optimizer.load()["1.bias"]["exp_avg"].shape == (1,)
    other = copy.copy(snapshot)
    other.optimizer = None
    assert other.measures == {}
    assert snapshot.measures == {"key": 1}
    with pytest.raises(ValueError, match="no parameter of the model"):
        snapshot.optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())


def test_moments_are_loaded_into_an_optimiser_of_the_same_groups(tmp_path):
    model, optimizer = _trained(groups=2)
    rate = torch.tensor(0.5)
    fresh = torch.optim.AdamW(
        [{"params": group["params"]} for group in optimizer.param_groups], lr=rate
    )
    state = OptimizerState.from_argument(model, _recorded(model, optimizer, tmp_path / "file"))
    state.load_into(model, fresh)
    for p in model.parameters():
        assert torch.equal(fresh.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
    assert fresh.param_groups[0]["weight_decay"] == 0.0
    assert float(fresh.param_groups[0]["lr"]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="build it as it was"):
        state.load_into(model, torch.optim.AdamW(model.parameters()))
