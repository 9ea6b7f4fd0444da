"""Notes that a Trainer of transformers leaves beside the weights: step, rates, optimiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.models.checkpoints.places import file_inside, has_file
from spectralshell.models.checkpoints.shards import read_json
from spectralshell.models.checkpoints.tensor_files import TensorFile
from spectralshell.models.trainer_optimizer import OPTIMIZER_FILE, n_steps_taken

STATE_FILE = "trainer_state.json"

_SCHEDULER_FILE, _CONFIG = "scheduler.pt", "config.json"

_OWN_RATES = 5
"""The version of transformers since which a log surely holds the rate of its own step."""


class RatesUnknownError(ValueError):
    """What is missing for τ, in words that end a sentence."""


@dataclass(frozen=True)
class TrainerFolder:
    """A folder ``checkpoint-*`` with a ``trainer_state.json``."""

    folder: str

    @classmethod
    def at(cls, path: str) -> TrainerFolder | None:
        """Return it if a path is such a folder."""
        return cls(path) if os.path.isfile(os.path.join(path, STATE_FILE)) else None

    @property
    def step(self) -> int:
        """The optimiser's steps up to here, as the Trainer counts them."""
        step = self._state.get("global_step")
        if type(step) is not int or step < 0:
            raise ValueError(f"state: {STATE_FILE} in {self.folder!r} has no 'global_step'.")
        return step

    @property
    def optimizer_file(self) -> str | None:
        """The file with the optimiser's moments, None where only the model was saved."""
        return self._file(OPTIMIZER_FILE)

    @property
    def history(self) -> pd.DataFrame:
        """One row a step that was logged: step, tau, lr, loss, grad_norm."""
        rows = self._logged
        frame = pd.DataFrame({"step": list(rows)}, dtype="int64")
        for column, key in (("lr", "learning_rate"), ("loss", "loss"), ("grad_norm", "grad_norm")):
            frame[column] = [_number(row.get(key)) for row in rows.values()]
        try:
            tau = np.cumsum(self.rates())
            frame.insert(1, "tau", [tau[step - 1] for step in frame["step"]])
        except ValueError:  # of a file beside it as well: the weights may be whole
            frame.insert(1, "tau", np.nan)
        return frame

    def rates(self) -> np.ndarray:
        """Return the rate of every step; RatesUnknownError says what is missing."""
        logged = {step: row for step, row in self._logged.items() if "learning_rate" in row}
        missing = [step for step in range(1, self.step + 1) if step not in logged]
        if missing:
            raise RatesUnknownError(
                f"{STATE_FILE} holds the learning rates of {self.step - len(missing)} of "
                f"{self.step} steps (not of step {missing[0]}; a Trainer logs all with "
                "logging_steps=1)"
            )
        rates = np.array([_number(logged[s]["learning_rate"]) for s in range(1, self.step + 1)])
        if not np.isfinite(rates).all():
            raise RatesUnknownError(f"{STATE_FILE} holds learning rates that are no numbers")
        self._check_own(rates)
        self._check_optimizer()
        return rates

    @cached_property
    def _state(self) -> dict[str, Any]:
        return self._read(STATE_FILE)

    @property
    def _logged(self) -> dict[int, dict[str, Any]]:
        """The logs of training by step, in order; of a step that is logged twice the last."""
        found: dict[int, dict[str, Any]] = {}
        entries = self._state.get("log_history")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and type(entry.get("step")) is int:
                training = "learning_rate" in entry or "loss" in entry
                if training and 1 <= entry["step"] <= self.step:
                    found.setdefault(entry["step"], {}).update(entry)
        return dict(sorted(found.items()))

    def _check_own(self, rates: np.ndarray) -> None:
        """Raise where the log may hold the next step's rate, as older transformers wrote it."""
        if len(rates) == 0 or (rates == rates[0]).all() or self._version >= _OWN_RATES:
            return
        following = self._next_rate
        if following is not None and following != rates[-1]:
            return
        raise RatesUnknownError(
            f"{STATE_FILE} seems to hold for each step the rate of the next, as transformers "
            f"before {_OWN_RATES} wrote it, and so not that of the first"
        )

    def _check_optimizer(self) -> None:
        """Raise where τ is not the sum of rates: momentum, or steps that were skipped."""
        if self.optimizer_file is None:
            return
        content = TensorFile(self.optimizer_file).content("meta")
        groups = content.get("param_groups") if isinstance(content, Mapping) else None
        group = groups[0] if isinstance(groups, list) and groups else None
        if not isinstance(group, Mapping):
            raise RatesUnknownError(f"{OPTIMIZER_FILE} is no state of an optimiser")
        if group.get("momentum"):
            raise RatesUnknownError(
                f"the optimiser has momentum {group['momentum']}, so that τ is not the sum of rates"
            )
        taken = n_steps_taken(self.optimizer_file)
        if taken is not None and taken != self.step:
            raise RatesUnknownError(
                f"the optimiser took {taken} of {self.step} steps (a gradient scaler skips some)"
            )

    @property
    def _version(self) -> int:
        version = self._read(_CONFIG).get("transformers_version", "")
        major = str(version).partition(".")[0]
        return int(major) if major.isdigit() else 0

    @property
    def _next_rate(self) -> float | None:
        path = self._file(_SCHEDULER_FILE)
        content = TensorFile(path).content("cpu") if path is not None else {}
        last = content.get("_last_lr") if isinstance(content, Mapping) else None
        return _number(last[0]) if isinstance(last, list) and last else None

    def _read(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        return dict(read_json(path, f"the file {path!r}")) if path is not None else {}

    def _file(self, name: str) -> str | None:
        """Return the path of a file, None if there is none; ValueError if it leaves the folder."""
        there = has_file(self.folder, name)
        return file_inside(self.folder, name, f"the folder {self.folder!r}") if there else None


def _number(value: Any) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain else float("nan")
