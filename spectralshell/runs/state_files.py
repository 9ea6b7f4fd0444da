"""The states of a recorder's directory: one safetensors file each, its moments beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn

from spectralshell.models.optimizer_state import OptimizerState, description, packed
from spectralshell.models.ties import tied_groups
from spectralshell.runs.atomic_files import remove_unfinished, replace_file
from spectralshell.runs.saved_states import SavedState
from spectralshell.warning_categories import RunWarning

_KIND = "spectralshell state"
_SUFFIX = ".safetensors"
_FOLDERS = ("states", "moments")


class StateFiles:
    """The folders ``states`` and ``moments`` of a run."""

    def __init__(self, directory: Path) -> None:
        self._folders = [directory / name for name in _FOLDERS]

    def create(self) -> None:
        """Make the folders, and clear them of what a kill left half-written."""
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)

    def path(self, step: int) -> Path:
        """Return where the state of a step lies."""
        return self._folders[0] / f"step-{step:010d}{_SUFFIX}"

    def moments_path(self, step: int) -> Path:
        """Return where the moments of a step lie."""
        return self._folders[1] / f"step-{step:010d}{_SUFFIX}"

    def steps(self) -> list[int]:
        """Return the steps whose states are there, in order."""
        names = (path.stem.removeprefix("step-") for path in self._folders[0].glob(f"*{_SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(
        self, model: nn.Module, record: Mapping[str, Any], optimizer: OptimizerState | None
    ) -> None:
        """Write a state, its moments first: a state that is there is whole."""
        step = int(record["n_steps"])
        try:
            if optimizer is not None:
                _write(
                    self.moments_path(step), packed(optimizer.moments or {}), description(optimizer)
                )
            texts = {
                "kind": _KIND,
                "step": str(step),
                "tau": repr(record["tau"]),
                "tau_weight_decay": repr(record["tau_weight_decay"]),
                "effective_time": json.dumps(record),
            }
            _write(self.path(step), {names[0]: t for names, t in tied_groups(model)}, texts)
        except BaseException:
            self.drop(step)
            raise

    def later_than_the_first(self) -> list[Path]:
        """Return the files of states and moments but those that a run begins with."""
        first = {self.path(0), self.moments_path(0)}
        found = [path for folder in self._folders for path in folder.glob(f"step-*{_SUFFIX}")]
        numbered = [p for p in found if p.stem.removeprefix("step-").isdigit()]
        return sorted(path for path in numbered if path not in first)

    def n_bytes(self, step: int) -> int:
        """Return the size of a state with its moments."""
        paths = (self.path(step), self.moments_path(step))
        return sum(path.stat().st_size for path in paths if path.exists())

    def drop(self, step: int) -> None:
        """Remove a state with its moments."""
        self.path(step).unlink(missing_ok=True)
        self.moments_path(step).unlink(missing_ok=True)

    def drop_after(self, step: int) -> None:
        """Remove all later states, and moments that a kill left without a state."""
        kept = {later for later in self.steps() if later <= step}
        for folder in self._folders:
            for path in folder.glob(f"step-*{_SUFFIX}"):
                number = path.stem.removeprefix("step-")
                if number.isdigit() and int(number) not in kept:
                    path.unlink(missing_ok=True)

    def record(self, step: int) -> dict[str, Any]:
        """Return what was saved of the effective time with a state; ValueError if it is broken."""
        path = self.path(step)
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata() or {}
            if texts.get("kind") != _KIND:
                raise ValueError("it is no state of a recorder")
            record: dict[str, Any] = json.loads(texts["effective_time"])
            record["tau"] = float(record["tau"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the state {str(path)!r} cannot be read ({error}).") from error
        return record

    def saved(self) -> list[SavedState]:
        """Return all states that can be read; warn (RunWarning) of the others. Headers only."""
        found = []
        for step in self.steps():
            try:
                record = self.record(step)
            except ValueError as error:
                warnings.warn(f"{error} It is left out.", RunWarning, stacklevel=4)
                continue
            moments = self.moments_path(step)
            found.append(
                SavedState(
                    step,
                    record["tau"],
                    str(self.path(step)),
                    str(moments) if moments.exists() else None,
                    float(record["tau_weight_decay"]),
                )
            )
        return found


def _write(path: Path, tensors: Mapping[str, Tensor], texts: dict[str, str]) -> None:
    plain = {name: _on_disk(tensor) for name, tensor in tensors.items()}
    replace_file(path, lambda to: save_file(plain, to, texts))


def _on_disk(tensor: Tensor) -> Tensor:
    """Return a tensor that safetensors takes: on the CPU, dense, with memory of its own."""
    plain = tensor.detach().to("cpu").contiguous()
    if plain.untyped_storage().nbytes() == plain.numel() * plain.itemsize:
        return plain
    with torch.inference_mode(False):
        return plain.clone()
