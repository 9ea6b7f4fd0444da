"""Snapshots: frozen states, checkpoints, sharing, pickling, and what they refuse."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralshell import ShellEnergyEstimator
from spectralshell.models.function import iterate_tensors
from spectralshell.operators import build_kernel
from spectralshell.snapshots import Snapshot, as_snapshots, make_snapshots
from spectralshell.warning_categories import SnapshotWarning
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


@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_what_numpy_writes_to_shared_memory_is_detected(which):
    arrays = {"inputs": np.ones((4, 3), dtype=np.float32), "targets": np.ones((4, 2))}
    snapshot = Snapshot(nn.Linear(3, 2), *map(torch.from_numpy, arrays.values()))
    snapshot.check_unchanged()
    arrays[which][2, 1] = 3.0
    with pytest.raises(ValueError, match=f"{which} of Snapshot.* changed in place"):
        snapshot.check_unchanged()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.inputs.update(x=torch.zeros(4, 3)),
        lambda s: s.inputs.update(scale=3.0),
        lambda s: s.inputs["x"].set_(torch.zeros(4, 3)),
        lambda s: setattr(s.inputs["x"], "data", torch.ones(4, 3)),
        lambda s: s.load_state()["weight"].mul_(2.0),
    ],
    ids=["another tensor", "a number", "other memory", "other data", "the state"],
)
def test_what_a_snapshot_holds_is_not_exchanged_in_silence(change):
    snapshot = Snapshot(nn.Linear(3, 2), {"x": torch.ones(4, 3), "scale": 2.0}, torch.ones(4, 2))
    snapshot.check_unchanged()
    change(snapshot)
    with pytest.raises(ValueError, match="changed in place"):
        snapshot.check_unchanged()


OTHERS = {
    "inputs": torch.full((5, 3), 2.0),
    "targets": torch.zeros(5, 2),
    "model": nn.Linear(3, 2),
    "class_axis": 1,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_snapshot_that_is_given_other_data_forgets_its_measures(name):
    snapshot = Snapshot(nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2))
    first = ShellEnergyEstimator().fit([snapshot]).shells_
    shared = copy.copy(snapshot)
    setattr(snapshot, name, OTHERS[name])
    snapshot.check_unchanged()
    assert snapshot.measures == {}
    assert len(shared.measures) == 1
    again = ShellEnergyEstimator().fit([snapshot]).shells_
    fresh = Snapshot(snapshot.model, snapshot.inputs, snapshot.targets, state=snapshot.state)
    expected = ShellEnergyEstimator().fit([fresh]).shells_
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert again["energy"].equals(first["energy"]) == (name in ("model", "class_axis"))


def test_other_inputs_may_be_another_batch_size():
    snapshot = Snapshot(nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2))
    snapshot.inputs, snapshot.targets = np.ones((7, 3), dtype=np.float32), np.ones((7, 2))
    assert snapshot.n_samples == 7
    assert isinstance(snapshot.targets, torch.Tensor)


def test_a_change_of_the_model_s_code_or_settings_is_measured_anew():
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    model = Scaled(3, 2)
    (snapshot,) = make_snapshots(model, [(torch.ones(5, 3), torch.ones(5, 2))])
    largest = [ShellEnergyEstimator().fit([snapshot]).lambda_max_]
    model.scale = 2.0
    largest.append(ShellEnergyEstimator().fit([snapshot]).lambda_max_)
    Scaled.forward = lambda self, x: 4.0 * nn.Linear.forward(self, x)
    largest.append(ShellEnergyEstimator().fit([snapshot]).lambda_max_)
    np.testing.assert_allclose(np.array(largest) / largest[0], [1.0, 4.0, 16.0], rtol=1e-5)


def test_a_hook_that_notes_what_it_saw_does_not_make_measures_twice():
    model, seen = nn.Linear(3, 2), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.detach().sum()))
    (snapshot,) = make_snapshots(model, [(torch.ones(5, 3), torch.ones(5, 2))])
    estimator = ShellEnergyEstimator().fit([snapshot])
    estimator.transform([snapshot])
    assert seen == []  # put back after every call
    assert len(snapshot.measures) == 1


def loader(shuffled, taus=(0.0, 1.0, 2.0)):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, n, generator=generator) for n in (3, 2))
    for tau in taus:
        order = torch.randperm(6, generator=generator) if shuffled and tau else torch.arange(6)
        batches = [(x[order][part], y[order][part]) for part in (slice(3), slice(3, 6))]
        yield from make_snapshots(nn.Linear(3, 2), batches, tau=tau)


def test_a_shuffled_loader_is_noticed():
    with pytest.warns(
        SnapshotWarning,
        match=r"^inputs of snapshot tau=1, batch=0 are not those of tau=0.*so in 2 batches",
    ):
        ShellEnergyEstimator().fit(list(loader(shuffled=True)))


def test_the_same_batches_are_not_warned_of():
    X = list(loader(shuffled=False))
    ShellEnergyEstimator().fit(X)
    for place, snapshot in enumerate(loader(shuffled=True)):  # other runs have other data
        snapshot.name = str(place)
        X.append(snapshot)
    ShellEnergyEstimator().fit(X)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.tensor([[1.0], [torch.nan], [torch.nan]]), 1.0, "inputs hold NaN in samples 1, 2"),
        ({"input": torch.tensor([[torch.nan], [1.0]])}, 1.0, r"inputs\['input'\] hold NaN in sam"),
        ((torch.ones(2, 1).fill_(torch.nan),), 1.0, r"inputs\[0\] hold NaN in samples 0, 1"),
        (torch.ones(2, 1), torch.tensor([[1.0], [torch.nan]]), "targets hold NaN"),
    ],
    ids=["tensor", "mapping", "tuple", "targets"],
)
def test_nan_in_the_data_is_told_with_its_samples(inputs, targets, message):
    n = len(next(iterate_tensors(inputs)))
    values = targets if isinstance(targets, torch.Tensor) else torch.ones(n, 1)
    with pytest.raises(ValueError, match=message):
        ShellEnergyEstimator().fit([Snapshot(nn.Linear(1, 1), inputs, values)])


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
