"""The checkpoints of a series: found by a pattern, a folder or a list, each with its step."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spectralshell.models.checkpoints import hub
from spectralshell.models.checkpoints.opened import as_checkpoint
from spectralshell.models.checkpoints.request import Checkpoint
from spectralshell.models.checkpoints.tensor_files import TensorFile
from spectralshell.runs.checkpoint_series.trainer_folder import TrainerFolder

_CHECKPOINTS = "checkpoint-*"
"""How a Trainer names the folders in its output folder."""

_WILD = re.compile(r"[*?\[]")

_STEP_NUMBER = re.compile(r"(?:global_?)?(?:step|iter|checkpoint|ckpt)[-_=]?(\d+)", re.IGNORECASE)

_GOES_ON = re.compile(r"[._,]\d|\.?e\d|[kmb](?![a-z])", re.IGNORECASE)
"""What follows digits where a name writes a number in another way: 1_000, 1.5, 1e4, 10k."""

_LIGHTNING = ".ckpt"

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", _LIGHTNING)


@dataclass(frozen=True)
class Place:
    """A checkpoint of a series, and the step that is known without opening it."""

    checkpoint: Checkpoint
    step: int | None = None

    @property
    def path(self) -> str:
        """Its path, or its name in the hub."""
        return str(self.checkpoint.path)

    @cached_property
    def trainer(self) -> TrainerFolder | None:
        """What a Trainer noted beside it; its files are read once."""
        return TrainerFolder.at(self.path)


def find_places(
    checkpoints: Any, *, key: str | None, prefix: str | None, keep: int | None
) -> list[Place]:
    """Return the checkpoints that are meant; errors name ``checkpoints``."""
    places = [
        replace(place, checkpoint=_completed(place.checkpoint, key, prefix, keep))
        for place in _given(checkpoints)
    ]
    if not places:
        raise ValueError("checkpoints is empty; pass at least one path.")
    return places


def step_of(place: Place) -> int:
    """Return the step of a checkpoint: as given, noted inside, or the number in its name."""
    if place.step is not None:
        return place.step
    if place.trainer is not None:
        return place.trainer.step
    if place.path.endswith(_LIGHTNING) and os.path.isfile(place.path):
        content = TensorFile(place.path).content("meta")
        step = content.get("global_step") if isinstance(content, Mapping) else None
        if type(step) is int:
            return step
    return _number_in(place.path)


def _given(checkpoints: Any) -> Iterable[Place]:
    if isinstance(checkpoints, Mapping):
        for step, one in checkpoints.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise TypeError(f"checkpoints: the keys are steps, integers from 0, got {step!r}.")
            yield Place(as_checkpoint(one), step)
    elif isinstance(checkpoints, (str, os.PathLike, Checkpoint)):
        asked = as_checkpoint(checkpoints)
        for path in _matching(str(asked.path)):
            yield Place(replace(asked, path=path))
    elif isinstance(checkpoints, Iterable):
        for one in checkpoints:
            yield Place(as_checkpoint(one))
    else:
        raise TypeError(
            "checkpoints must be a pattern, a folder, a list of paths or a mapping of steps to "
            f"paths, got {type(checkpoints).__name__}."
        )


def _matching(pattern: str) -> list[str]:
    """Return what a pattern stands for: paths, or revisions of a hub model."""
    named = hub.named_by(Checkpoint(pattern))
    if named is not None and _WILD.search(named.revision):
        names = hub.revisions(named.repo, named.revision)
        if not names:
            raise FileNotFoundError(f"checkpoints: no revision of {named.repo!r} fits {pattern!r}.")
        return [f"{named.repo}@{name}" for name in names]
    if named is not None:
        return [pattern]
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):  # a Trainer may have noted its state in its output folder too
        inner = sorted(glob.glob(os.path.join(glob.escape(path), _CHECKPOINTS)))
        return inner or [path]
    found = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not found:
        raise FileNotFoundError(
            f"checkpoints: nothing is at {os.path.abspath(path)!r}; check the path or the pattern."
        )
    return found


def _completed(
    checkpoint: Checkpoint, key: str | None, prefix: str | None, keep: int | None
) -> Checkpoint:
    return replace(
        checkpoint,
        path=os.path.expanduser(checkpoint.path),
        key=key if checkpoint.key is None else checkpoint.key,
        prefix=prefix if checkpoint.prefix is None else checkpoint.prefix,
        keep=keep if checkpoint.keep is None else checkpoint.keep,
    )


def _number_in(path: str) -> int:
    """Return the number of a file's name, or of the folder it lies in where it has none."""
    named = hub.named_by(Checkpoint(path))
    names = [named.revision] if named else [Path(path).name, Path(path).parent.name]
    for name in names:
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        name = re.sub(r"-\d+-of-\d+", "", name)
        found = list(_STEP_NUMBER.finditer(name)) or list(re.finditer(r"(\d+)", name))
        if any(_GOES_ON.match(name, number.end()) for number in found):
            break
        if len({number[1] for number in found}) == 1:
            return int(found[0][1])
        if found:
            break
    raise ValueError(
        f"checkpoints: the step of {path!r} is not told by its name; pass a mapping of steps to "
        "paths, {1000: path, ...}."
    )
