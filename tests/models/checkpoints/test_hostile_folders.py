"""Folders that are broken, foreign or hostile: a named error, no code run, nothing outside read.

What lies outside is a checkpoint that would fit: were it followed, there would be no error.
"""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from spectralshell import Checkpoint, Snapshot
from tests.models.checkpoints.kinds import (
    adapted_model,
    copied,
    language_model,
    of_an_adapter,
    plain_model,
    save_distributed,
    train_with_lightning,
)
from tests.models.checkpoints.test_tensor_files import harmful

MODEL = plain_model()
BATCH = (torch.ones(5, 3), torch.ones(5, 2))


def shards(folder):
    """A folder of two shards, and a file outside that would fit in their place."""
    inner = folder / "inner"
    inner.mkdir()
    items = list(copied(MODEL).items())
    places = {}
    for name, part in (("a.safetensors", items[:2]), ("b.safetensors", items[2:])):
        save_file(dict(part), inner / name)
        places |= {key: name for key, _ in part}
    shutil.copy(inner / "b.safetensors", folder / "b.safetensors")
    write_index(inner, places)
    return inner


def write_index(folder, places):
    index = folder / "model.safetensors.index.json"
    index.write_text(places if isinstance(places, str) else json.dumps({"weight_map": places}))
    return folder


def moved(folder, name):
    """Let the second shard be looked for under another name."""
    inner = shards(folder)
    places = json.loads((inner / "model.safetensors.index.json").read_text())["weight_map"]
    return write_index(
        inner, {k: name if place == "b.safetensors" else place for k, place in places.items()}
    )


def with_link(folder):
    inner = shards(folder)
    (inner / "b.safetensors").unlink()
    (inner / "b.safetensors").symlink_to(folder / "b.safetensors")
    return inner


def single_link(folder):
    save_file(copied(MODEL), folder / "outside.safetensors")
    inner = folder / "inner"
    inner.mkdir()
    (inner / "model.safetensors").symlink_to(folder / "outside.safetensors")
    return inner


def without_a_shard(folder):
    inner = shards(folder)
    (inner / "b.safetensors").unlink()
    return inner


def of_another_save(folder):
    inner = shards(folder)
    save_file({"other": torch.ones(1)}, inner / "b.safetensors")
    return inner


def twice(folder):
    inner = shards(folder)
    save_file(copied(MODEL), inner / "b.safetensors")
    return inner


def shard_of_code(folder):
    inner = moved(folder, "b.bin")
    state = {n: t for n, t in copied(MODEL).items() if n.startswith("2")}
    torch.save(state | {"more": harmful(folder / "mark")["system"]}, inner / "b.bin")
    return inner


def cut_shard(folder):
    inner = shards(folder)
    (inner / "b.safetensors").write_bytes((inner / "b.safetensors").read_bytes()[:-1])
    return inner


def distributed(folder):
    save_distributed({"model": MODEL.state_dict()}, folder / "inner")
    shutil.copy(folder / "inner" / "__0_0.distcp", folder / "outside.distcp")
    return folder / "inner"


def replanned(folder, change):
    inner = distributed(folder)
    plan = pickle.loads((inner / ".metadata").read_bytes())
    change(plan)
    (inner / ".metadata").write_bytes(pickle.dumps(plan))
    return inner


def placed(**values):
    """A change of where the first piece lies."""

    def change(plan):
        index, place = next(iter(plan.storage_data.items()))
        plan.storage_data[index] = _StorageInfo(**(vars(place) | values))

    return change


def pieces(*spans):
    """A change of the pieces of a vector of four."""

    def change(plan):
        (index, place) = next(i for i in plan.storage_data.items() if i[0].fqn == "model.0.bias")
        plan.state_dict_metadata["model.0.bias"].chunks = [
            ChunkStorageMetadata(torch.Size([start]), torch.Size([size])) for start, size in spans
        ]
        del plan.storage_data[index]
        for start, _ in spans:
            plan.storage_data[type(index)("model.0.bias", torch.Size([start]))] = place

    return change


def overlapping(plan):
    """Two pieces of a vector of four in one place, each as the file has it."""
    (place,) = (p for index, p in plan.storage_data.items() if index.fqn == "model.2.bias")
    pieces((0, 2), (0, 2))(plan)
    for index in plan.storage_data:
        if index.fqn == "model.0.bias":
            plan.storage_data[index] = place


def planned(content):
    def make(folder):
        inner = distributed(folder)
        written = content(folder) if callable(content) else content
        (inner / ".metadata").write_bytes(written)
        return inner

    return make


class WritesToAClass:
    """Unpickled as it stands, it would change a class of torch."""

    def __reduce__(self):
        return Metadata, ({}, {}, {}), (None, {"version": "changed"})


def piece_of_code(folder):
    inner = distributed(folder)
    torch.save(harmful(folder / "mark")["system"], inner / "__0_0.distcp")
    size = (inner / "__0_0.distcp").stat().st_size
    plan = pickle.loads((inner / ".metadata").read_bytes())
    for index in plan.storage_data:
        plan.storage_data[index] = _StorageInfo("__0_0.distcp", 0, size)
    (inner / ".metadata").write_bytes(pickle.dumps(plan))
    return inner


def linked_pieces(folder):
    inner = distributed(folder)
    (inner / "__0_0.distcp").unlink()
    (inner / "__0_0.distcp").symlink_to(folder / "outside.distcp")
    return inner


def linked_plan(folder):
    inner = distributed(folder)
    shutil.move(inner / ".metadata", folder / "plan")
    (inner / ".metadata").symlink_to(folder / "plan")
    return inner


def empty(folder):
    (folder / "inner").mkdir()
    return folder / "inner"


def output_folder(folder):
    (folder / "inner" / "checkpoint-10").mkdir(parents=True)
    return folder / "inner"


def several_files(folder):
    inner = empty(folder)
    for name in ("a.pt", "b.pt", "optimizer.pt"):
        torch.save(copied(MODEL), inner / name)
    return inner


def lightning_with_objects(folder):
    train_with_lightning(folder, n_epochs=1)
    (path,) = folder.rglob("*.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"place": harmful(folder / "mark")["open"]}
    torch.save(content, path)
    return path


def hub_link(folder):
    """A revision whose file leaves the folder of its model."""
    snapshot = folder / "models--org--model" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    save_file(copied(MODEL), folder / "outside.safetensors")
    (snapshot / "model.safetensors").symlink_to(folder / "outside.safetensors")
    return snapshot


def deep_index(folder):
    return write_index(shards(folder), "[" * 10**5)


OUTSIDE = "lies outside its folder"

FOLDERS = {
    "shard above": (lambda f: moved(f, "../b.safetensors"), OUTSIDE),
    "shard by its whole path": (lambda f: moved(f, str(f / "b.safetensors")), OUTSIDE),
    "shard behind a link": (with_link, OUTSIDE),
    "file behind a link": (single_link, OUTSIDE),
    "file outside a model of the hub": (hub_link, OUTSIDE),
    "shard with a zero byte": (lambda f: moved(f, "b\0.safetensors"), "which is no file name"),
    "shard missing": (without_a_shard, "has no file 'b.safetensors'"),
    "shard of another save": (of_another_save, "which its shards do not hold"),
    "tensors in two shards": (twice, "is in 'b.safetensors' and in another shard"),
    "shard that runs code": (shard_of_code, "holds Python objects besides tensors"),
    "shard cut off": (cut_shard, "not a readable checkpoint"),
    "index that is no JSON": (lambda f: write_index(shards(f), "{'a': "), "not a readable file"),
    "index of lists in lists": (deep_index, "not a readable file"),
    "index that is a list": (lambda f: write_index(shards(f), "[1]"), "holds a JSON list"),
    "index without a map": (lambda f: write_index(shards(f), "{}"), "no 'weight_map'"),
    "index of numbers": (lambda f: write_index(shards(f), {"0.bias": 3}), "no 'weight_map'"),
    **{
        f"plan that runs {name}": (
            planned(lambda folder, name=name: pickle.dumps(harmful(folder / "mark")[name])),
            "holds Python objects besides tensors",
        )
        for name in ("system", "eval", "open", "import", "storage", "load")
    },
    "plan that changes a class": (planned(pickle.dumps(WritesToAClass())), "'.metadata' that is"),
    "plan cut off": (planned(b"\x80\x04\x95"), "'.metadata' that is not what"),
    "plan that is text": (planned(b"hello"), "'.metadata' that is not what"),
    "plan of a list": (planned(pickle.dumps([1, 2])), "'.metadata' that is not what"),
    "plan that takes memory": (
        planned(b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b"."),
        "in the memo beyond the file",
    ),
    **{
        f"path that {name}": (
            lambda f, path=path: replanned(
                f, lambda plan: plan.planner_data.update({"model.0.bias": path})
            ),
            "'.metadata' that is not what",
        )
        for name, path in {
            "is empty": (),
            "is another's": ("model", "0.weight"),
            "goes through another": ("model", "0.weight", "inner"),
            "is made of lists": ([],),
        }.items()
    },
    "piece above": (
        lambda f: replanned(f, placed(relative_path="../outside.distcp")),
        OUTSIDE,
    ),
    "piece by its whole path": (
        lambda f: replanned(f, placed(relative_path=str(f / "outside.distcp"))),
        OUTSIDE,
    ),
    "pieces behind a link": (linked_pieces, OUTSIDE),
    "plan behind a link": (linked_plan, OUTSIDE),
    "piece beyond the end": (
        lambda f: replanned(f, placed(offset=10**6)),
        "ends before byte",
    ),
    "piece of another length": (lambda f: replanned(f, placed(length=10)), "begins|readable"),
    "piece before the file": (lambda f: replanned(f, placed(offset=-1)), "'.metadata' that is"),
    "piece that runs code": (piece_of_code, "holds Python objects besides tensors"),
    "piece through an extension": (
        lambda f: replanned(f, placed(transform_descriptors=["zip"])),
        "written through an extension",
    ),
    "piece missing": (lambda f: replanned(f, pieces((0, 2))), "are not all of it"),
    "piece outside": (lambda f: replanned(f, pieces((2, 4))), "lies outside it"),
    "piece of another shape": (lambda f: replanned(f, pieces((0, 2), (2, 2))), "is not the tensor"),
    "pieces that overlap": (lambda f: replanned(f, overlapping), "overlap and leave others out"),
    "empty folder": (empty, "without a checkpoint that is known.*It holds nothing"),
    "output folder": (output_folder, "TrainingRun.from_checkpoints"),
    "several files": (several_files, "inside it: a.pt, b.pt.$"),
    "Lightning with objects": (lightning_with_objects, r"besides tensors.*io\.open"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_or_broken_checkpoint_is_named(tmp_path, kind):
    make, message = FOLDERS[kind]
    path = make(tmp_path)
    version = Metadata.version
    with pytest.raises(ValueError, match=message) as caught:
        Snapshot(MODEL, *BATCH, state=path).load_state()
    assert str(caught.value).startswith("state: ")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(path))
    assert not (tmp_path / "mark").exists()
    assert Metadata.version is version


def test_all_of_the_plan_is_looked_at_when_the_snapshot_is_made(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        Snapshot(language_model(), *BATCH, state=distributed(tmp_path))


def other_settings(folder):
    kind = of_an_adapter(folder)
    return adapted_model(lora_alpha=5), kind.state


def without_a_weight(folder):
    from safetensors.torch import load_file

    kind = of_an_adapter(folder)
    file = Path(kind.state) / "adapter_model.safetensors"
    state = load_file(file)
    save_file(dict(list(state.items())[1:]), file)
    return kind.model, kind.state


def broken_settings(folder):
    kind = of_an_adapter(folder)
    (Path(kind.state) / "adapter_config.json").write_text("{")
    return kind.model, kind.state


def without_weights(folder):
    kind = of_an_adapter(folder)
    (Path(kind.state) / "adapter_model.safetensors").unlink()
    return kind.model, kind.state


def on_another_layer(folder):
    kind = of_an_adapter(folder)
    return adapted_model(target_modules=["c_fc"]), kind.state


ADAPTERS = {
    "other settings": (other_settings, "was trained with lora_alpha=8 instead of 5"),
    "a weight missing": (without_a_weight, "missing keys: .*lora_A"),
    "broken settings": (broken_settings, "not a readable file of JSON"),
    "no weights": (without_weights, "has no file 'adapter_model.safetensors'"),
    "another layer": (on_another_layer, "missing keys: .*c_fc"),
    "no adapter": (lambda f: (language_model(), of_an_adapter(f).state), "wrap the base model"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_named(tmp_path, kind):
    make, message = ADAPTERS[kind]
    model, path = make(tmp_path)
    rows = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        Snapshot(model, {"input_ids": rows, "labels": rows}, state=path)


REQUESTS = {
    "no such key": ({"key": "emma"}, "has no key 'emma': at 'emma' the keys are 'ema', 'step'"),
    "no such inner key": ({"key": "ema.b"}, "at 'b' the keys are 'net.0.weight'"),
    "a key that is no mapping": ({"key": "step"}, "no mapping of names to tensors under 'step'"),
    "no such prefix": (
        {"key": "ema", "prefix": "core."},
        "with prefix='core.'.*net.0.weight",
    ),
    "a prefix that is not told": ({"key": "ema"}, r"pass state=Checkpoint\(path, prefix='net\.'"),
    "a key that is not told": ({}, r"not tensors: ema, step.*Checkpoint\(path, key='ema'\)"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_what_would_fit_is_told(tmp_path, kind):
    options, message = REQUESTS[kind]
    state = {f"net.{name}": tensor for name, tensor in copied(MODEL).items()}
    torch.save({"ema": state, "step": 3}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        Snapshot(MODEL, *BATCH, state=Checkpoint(tmp_path / "run.pt", **options))


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin.index.json"])
def test_a_key_that_would_be_passed_over_is_refused(tmp_path, name):
    # One who asks for an average would be given the plain weights.
    (tmp_path / name).write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="leave key='ema' out"):
        Snapshot(MODEL, *BATCH, state=Checkpoint(tmp_path, key="ema"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"path": 3}, TypeError),
        ({"path": "a", "key": 3}, TypeError),
        ({"path": "a", "key": ""}, ValueError),
        ({"path": "a", "prefix": b"a"}, TypeError),
        ({"path": "a", "keep": 0}, ValueError),
        ({"path": "a", "keep": True}, TypeError),
    ],
    ids=str,
)
def test_a_request_is_checked(options, error):
    with pytest.raises(error, match=list(options)[-1]):
        Checkpoint(**options)
