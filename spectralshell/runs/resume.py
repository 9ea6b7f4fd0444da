"""A run in a directory that a recorder goes on with: from which step, and with what behind it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from spectralshell.models.optimizer_state import OptimizerState
from spectralshell.models.state import ModelState
from spectralshell.models.ties import tied_groups
from spectralshell.runs.effective_time import EffectiveTime, Follow
from spectralshell.runs.history import read_rows
from spectralshell.runs.run_card import check_card
from spectralshell.runs.state_files import StateFiles
from spectralshell.warning_categories import RunWarning

_BY_THEMSELVES = "Restore one of its states with restore(), or begin another directory."


class RunToResume:
    """A run on disk, checked against the model."""

    def __init__(self, directory: Path, model: nn.Module, files: StateFiles, history: Path) -> None:
        self._steps_before = int(check_card(directory, model).get("steps_before", 0))
        self._files = files
        self._rows = read_rows(history)
        self._last = int(self._rows["step"][-1]) if len(self._rows) else 0
        # A state whose row was lost has no loss: the one before is gone back to.
        self._steps = [step for step in files.steps() if step <= self._last]

    def restore_last(self, model: nn.Module, optimizer: Optimizer) -> int:
        """Load the last whole state into model and optimiser, and return its step."""
        for step in reversed(self._steps):
            if step == 0 and len(self._steps) > 1:
                break  # to begin again, and drop the run, is not to restore it
            self._check_moments_kept(optimizer, step)
            try:
                self._files.record(step)
                state = ModelState.from_argument(model, self._files.path(step)).load(model)
                path = self._files.moments_path(step)
                moments = OptimizerState.from_argument(model, path if path.exists() else None)
            except ValueError as error:
                warnings.warn(f"{error} The state before is restored.", RunWarning, stacklevel=3)
                continue
            if moments is not None:
                moments.load_into(model, optimizer)  # raises where it does not fit
            _load_state(model, state)
            return step
        raise ValueError(
            "restore() found no state of the run after the first that can be loaded. Restore a "
            "checkpoint of your own, and pass its step=."
        )

    def find_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        given: int | None,
        fallback: int | None = None,
    ) -> int:
        """Return the step that the model is at: given, or that of the state that it equals, ..."""
        step = given
        if step is None:
            step = self._equal_state(model)
        if step is None:
            counted = steps_of(optimizer)
            step = fallback if counted is None else counted - self._steps_before
        if step is None:
            raise ValueError(
                "resume: the model equals no state of the run, and the optimiser counts no steps; "
                f"pass step=, the step of what was loaded. {_BY_THEMSELVES}"
            )
        if step > self._last:
            raise ValueError(
                f"resume: the history ends at step {self._last}, before step {step} of the model, "
                "so the effective time between is lost. Call recorder.flush() where checkpoints "
                f"are saved. {_BY_THEMSELVES}"
            )
        if step == 0 and self._last > 0 and given is None:
            raise ValueError(
                f"resume: the model is at its first state, and the run has {self._last} steps that "
                "would be dropped. Load a later state first, as restore() does, or pass step=0."
            )
        return step

    def go_on(self, step: int, time: EffectiveTime) -> float:
        """Set the effective time to that of a step; return the seconds by then."""
        if step in self._steps:
            time.restore(self._files.record(step))
        row = self._rows[self._rows["step"] == step]
        if not len(row):
            return 0.0
        if step not in self._steps:
            time.restore_row(
                step=step,
                tau=float(row["tau"][0]),
                tau_weight_decay=float(row["tau_weight_decay"][0]),
                lr=float(row["lr"][0]),
                own=Follow(n_steps=int(row["n_steps"][0]), share=float(row["share"][0])),
                reference=self._reference(),
            )
        return float(row["seconds"][0])

    def _reference(self) -> int | None:
        """Return the parameter group whose time is τ, which states know and rows do not."""
        found: int | None = None
        for step in self._steps:
            with suppress(ValueError):  # of a broken state
                found = self._files.record(step)["reference"]
        return found

    def _equal_state(self, model: nn.Module) -> int | None:
        """Return the last step whose state is the model's, to the last bit."""
        own = {names[0]: tensor.detach() for names, tensor in tied_groups(model)}
        for step in reversed(self._steps):
            try:
                state = ModelState.from_argument(model, self._files.path(step)).load(model)
            except ValueError:
                continue
            if all(torch.equal(tensor.cpu(), state[name].cpu()) for name, tensor in own.items()):
                return step
        return None

    def _check_moments_kept(self, optimizer: Optimizer, step: int) -> None:
        """Raise ValueError where the optimiser needs moments that were not written."""
        plain = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] for group in optimizer.param_groups
        )
        if step > 0 and not plain and not self._files.moments_path(step).exists():
            raise ValueError(
                f"restore() needs the moments of step {step}, which were not kept (moments=False, "
                "or they are not of the parameters' shapes). Restore a checkpoint of your own, and "
                "pass its step=."
            )


def _load_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for names, own in tied_groups(model):
            own.copy_(state[names[0]])


def steps_of(optimizer: Optimizer) -> int | None:
    """Return the steps that the optimiser itself counts, None where it counts none."""
    held = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    counts = [int(one["step"]) for one in held if "step" in one]
    return max(counts, default=None)
