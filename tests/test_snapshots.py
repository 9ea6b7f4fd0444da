"""Snapshots: frozen states, checkpoints, sharing, pickling, and what they refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralshell.operators import build_kernel
from spectralshell.snapshots import Snapshot, as_snapshots, make_snapshots
from tests.zoo import CASES_BY_NAME, TiedLanguageModel, build_model, make_inputs, make_targets


@pytest.fixture
def model():
    return build_model(CASES_BY_NAME["cnn batchnorm"])


@pytest.fixture
def batch():
    case = CASES_BY_NAME["cnn batchnorm"]
    return make_inputs(case), make_targets(case, "mse")


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_state_is_frozen_at_construction(model, batch):
    snapshot = Snapshot(model, *batch)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert same_state(snapshot.load_state(), expected)


def test_a_state_dict_is_copied_although_it_aliases_the_model(model, batch):
    snapshot = Snapshot(model, *batch, state=model.state_dict())
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same_state(snapshot.load_state(), expected)


@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy", "nested", "wrapped"])
def test_checkpoints_load_by_path(model, batch, tmp_path, form):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "wrapped":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "pt")
    snapshot = Snapshot(model, *batch, state=path)
    assert snapshot.state.tensors is None  # nothing is read before it is needed
    assert same_state(snapshot.load_state(), state)


def test_one_name_of_tied_weights_is_enough(tmp_path):
    model = TiedLanguageModel(5, 4)
    state = model.state_dict()
    for dropped in ("head.weight", "embedding.weight"):
        path = tmp_path / f"without {dropped}.safetensors"
        save_file({name: t.clone() for name, t in state.items() if name != dropped}, path)
        tokens = torch.zeros(2, 3, dtype=torch.long)
        loaded = Snapshot(model, tokens, tokens, state=path).load_state()
        assert list(loaded) == ["embedding.weight", "mix.weight", "mix.bias"]
        assert torch.equal(loaded["embedding.weight"], state["head.weight"])


def test_tied_names_with_different_values_are_refused():
    model = TiedLanguageModel(5, 4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["head.weight"] += 1
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are one tied"):
        Snapshot(model, tokens, tokens, state=state)


def test_buffers_that_are_not_saved_come_from_the_model(batch):
    module = nn.Linear(3, 2)
    module.register_buffer("mask", torch.tensor([1.0, 2.0]), persistent=False)
    snapshot = Snapshot(module, torch.ones(2, 3), torch.ones(2, 2), state=module.state_dict())
    assert torch.equal(snapshot.load_state()["mask"], module.mask)


def test_buffers_that_are_not_saved_are_copied_for_a_path_too(tmp_path):
    module = nn.Linear(3, 2)
    module.register_buffer("mask", torch.tensor([1.0, 2.0]), persistent=False)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    snapshot = Snapshot(module, torch.ones(2, 3), torch.ones(2, 2), state=tmp_path / "model.pt")
    module.mask.zero_()
    assert snapshot.load_state()["mask"].tolist() == [1.0, 2.0]


class Compiled(nn.Module):
    """Wraps as torch.compile does, without its half minute of imports."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize(
    "wrapper", [nn.DataParallel, Compiled, lambda model: Compiled(nn.DataParallel(model))]
)
def test_wrappers_are_taken_off(model, batch, wrapper):
    assert Snapshot(wrapper(model), *batch).model is model


def test_batches_share_one_state_also_through_pickle(model, batch):
    snapshots = make_snapshots(model, [batch, batch, batch], tau=2.0)
    assert [s.batch for s in snapshots] == [0, 1, 2]
    assert {s.tau for s in snapshots} == {2.0}
    restored = pickle.loads(pickle.dumps(snapshots))
    assert restored[0].state is restored[2].state
    assert restored[0].model is restored[2].model
    one, three = (len(pickle.dumps(snapshots[:k])) for k in (1, 3))
    assert three < 2 * one


def test_pickles_carry_measures_and_copies_are_usable(model, batch):
    snapshot = Snapshot(model, *batch, tau=0.5, batch="a", name="run")
    snapshot.measures["key"] = [1, 2]
    for other in (pickle.loads(pickle.dumps(snapshot)), copy.deepcopy(snapshot)):
        assert other.measures == {"key": [1, 2]}
        assert (other.tau, other.batch, other.name) == (0.5, "a", "run")
        assert same_state(other.load_state(), snapshot.load_state())
        other.check_unchanged()


@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_data_changed_in_place_are_detected(model, batch, which):
    snapshot = Snapshot(model, *batch)
    getattr(snapshot, which).mul_(2)
    with pytest.raises(ValueError, match=f"{which} of Snapshot.* changed in place"):
        build_kernel(snapshot)


def test_arrays_are_copied(model, batch):
    array = batch[0].numpy().copy()
    snapshot = Snapshot(model, array, batch[1].numpy())
    array[:] = 0
    assert torch.equal(snapshot.inputs, batch[0])


def test_tensors_made_in_inference_mode_are_accepted():
    with torch.inference_mode():
        x = torch.ones(4, 3)
    build_kernel(Snapshot(nn.Linear(3, 2), x, torch.zeros(4, 2)))


def test_an_overwritten_checkpoint_is_an_error(model, batch, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(model.state_dict(), path)
    snapshot = Snapshot(model, *batch, state=path)
    torch.save(model.state_dict() | {"more": torch.ones(500)}, path)
    with pytest.raises(ValueError, match=r"last\.pt' was changed after"):
        snapshot.load_state()


def test_half_checkpoints_load_in_the_model_s_dtype(model, batch):
    half = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    state = Snapshot(model, *batch, state=half).load_state()
    assert state["0.weight"].dtype == torch.float64


def test_the_repr_is_short(model, batch):
    text = repr(Snapshot(model, *batch, tau=0.25, batch=3, name="a"))
    assert text == "Snapshot(Sequential, n_samples=5, tau=0.25, batch=3, name='a')"


def test_tuples_become_snapshots_by_position(model, batch):
    first, second = as_snapshots([(model, *batch), (model, *batch)])
    assert (first.batch, second.batch, first.tau) == (0, 1, 0.0)


@pytest.mark.parametrize("label", [None, True, (1, 2), 1.0, [3]])
def test_batches_are_labelled_by_integers_or_strings(model, batch, label):
    with pytest.raises(TypeError, match="batch must be an integer or a string, got"):
        Snapshot(model, *batch, batch=label)


def test_a_name_is_not_empty(model, batch):
    with pytest.raises(ValueError, match="name must not be empty"):
        Snapshot(model, *batch, name="")


def test_numpy_scalars_are_numbers(model, batch):
    assert type(Snapshot(model, *batch, batch=np.int64(3)).batch) is int
    assert Snapshot(model, *batch, tau=np.float64(1.5)).tau == 1.5
