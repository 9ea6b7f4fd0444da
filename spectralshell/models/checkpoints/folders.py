"""The kind of a folder, told by the files in it."""

from __future__ import annotations

import os

from spectralshell.models.checkpoints.adapters import CONFIG, WEIGHTS, AdapterFolder
from spectralshell.models.checkpoints.distributed import METADATA, DistributedFolder
from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.checkpoints.places import file_inside, has_file
from spectralshell.models.checkpoints.shards import INDEX_ENDING, ShardedFiles
from spectralshell.models.checkpoints.tensor_files import TensorFile

WEIGHT_FILES = (
    *("model.safetensors", f"model.safetensors{INDEX_ENDING}"),
    *("pytorch_model.bin", f"pytorch_model.bin{INDEX_ENDING}"),
)
"""What ``save_pretrained`` and a Trainer write, in the order in which transformers looks."""

_INNER = ("pytorch_model_fsdp_0",)
"""Folders in which a Trainer leaves a sharded state."""

_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")

_NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "scaler", "training_args")
"""How the files begin that a Trainer leaves beside the weights."""

Source = TensorFile | ShardedFiles | DistributedFolder | AdapterFolder


def open_folder(folder: str, key: str | None) -> Source:
    """Return how the state of a folder is read; ValueError for one that is no checkpoint."""
    label = f"the folder {folder!r}"
    if has_file(folder, CONFIG):
        weights = next((name for name in WEIGHTS if has_file(folder, name)), WEIGHTS[0])
        file_inside(folder, weights, label)
        _refuse_key(label, key)
        return AdapterFolder(folder, weights)
    for inner in (folder, *(os.path.join(folder, name) for name in _INNER)):
        if has_file(inner, METADATA):
            file_inside(folder, os.path.relpath(os.path.join(inner, METADATA), folder), label)
            return DistributedFolder(inner, key)
    for name in WEIGHT_FILES:
        if has_file(folder, name):
            return open_file(file_inside(folder, name, label), key)
    raise ValueError(
        f"state: {folder!r} is a folder without a checkpoint that is known: no "
        f"{listed(WEIGHT_FILES)}, {METADATA!r} or {CONFIG!r}. {_advice(folder)}"
    )


def open_file(path: str, key: str | None) -> Source:
    """Return how the state of a file is read."""
    if path.endswith(INDEX_ENDING):
        _refuse_key(f"the index {path!r}", key)
        return ShardedFiles(path)
    if os.path.basename(path) == METADATA:
        return DistributedFolder(os.path.dirname(path), key)
    return TensorFile(path, key)


def _refuse_key(label: str, key: str | None) -> None:
    if key is not None:
        raise ValueError(
            f"state: {label} stands for one set of tensors by name; leave key={key!r} out, or use "
            "prefix=."
        )


def _advice(folder: str) -> str:
    names = sorted(os.listdir(folder))
    inner = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    files = [
        name for name in names if name.endswith(_ENDINGS) and not name.startswith(_NOT_WEIGHTS)
    ]
    if any(name.startswith("checkpoint-") for name in inner):
        return (
            f"It holds {listed(inner)}: pass one of them, or read them all with "
            f"TrainingRun.from_checkpoints({os.path.join(folder, 'checkpoint-*')!r}, model)."
        )
    if files:
        return f"Pass the path of the checkpoint file inside it: {listed(files)}."
    return f"It holds {listed(names) or 'nothing'}."
