"""The card of a run: which model and optimiser a directory belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from spectralshell.models.ties import tied_groups
from spectralshell.runs.atomic_files import replace_file

CARD = "run.json"
_KIND = "spectralshell run"
_VERSION = 1
_MAX_NAMES = 4


def write_card(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    name: str | None,
    steps_before: int,
) -> None:
    """Write the card of a new run. ``steps_before``: what the optimiser counted when it began."""
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "name": name,
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "steps_before": steps_before,
        "tensors": _tensors_of(model),
    }
    text = json.dumps(content, indent=1)
    replace_file(directory / CARD, lambda to: to.write_text(text, encoding="utf-8"))


def read_card(directory: Path) -> dict[str, Any]:
    """Return the card of a run; FileNotFoundError or ValueError where there is none."""
    path = directory / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"directory: {str(directory)!r} is no run of a TrainingRecorder: it has no {CARD}. A "
            "folder of checkpoints is read by TrainingRun.from_checkpoints."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = content["kind"] == _KIND and isinstance(content["tensors"], dict)
        newer = int(content["version"]) > _VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"directory: {str(path)!r} cannot be read ({error}).") from error
    if not known or newer:
        raise ValueError(
            f"directory: {str(path)!r} is not the card of a run that this version reads."
        )
    return content


def check_card(directory: Path, model: nn.Module) -> dict[str, Any]:
    """Return the card; raise ValueError where the run is one of another model."""
    card = read_card(directory)
    recorded, own = card["tensors"], _tensors_of(model)
    problems = [
        f"{label}: {', '.join(names[:_MAX_NAMES])}" + (" ..." if len(names) > _MAX_NAMES else "")
        for label, names in (
            ("not in the model", sorted(set(recorded) - set(own))),
            ("not in the run", sorted(set(own) - set(recorded))),
            ("of another shape", [n for n in own if n in recorded and own[n] != recorded[n]]),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"directory: {str(directory)!r} is the run of another model, {card.get('model')}; "
            + "; ".join(problems)
            + ". Pass the model that was trained, or another directory."
        )
    return card


def _tensors_of(model: nn.Module) -> dict[str, list[int]]:
    return {names[0]: list(tensor.shape) for names, tensor in tied_groups(model)}
