"""The words of errors about checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_NAMES = 5

_LONGEST = 160
"""Letters of another library's message that are passed on."""

_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")
"""Beginnings of lines that tell how to run the code of a file."""

_OBJECTS = ("Unsupported global", "Unsupported class", "GLOBAL", "not an allowed global")
"""What torch says of a pickle that needs more than tensors."""


def listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def unreadable(source: str, error: Exception) -> ValueError:
    """Return the error of a file that a reader stumbled over."""
    text = str(error)
    if any(phrase in text for phrase in _OBJECTS):
        return objects_inside(source, _telling_line(text))
    return ValueError(
        f"state: {source} is not a readable checkpoint ({_telling_line(text)}); it may be corrupt "
        "or incomplete, or from another tool; save model.state_dict() again."
    )


def objects_inside(source: str, what: str) -> ValueError:
    """Return the error of a pickle that would call something."""
    return ValueError(
        f"state: {source} holds Python objects besides tensors, and loading them could run any "
        f"code, so it is refused. Save model.state_dict() alone, or a safetensors file. ({what})"
    )


def _telling_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_ADVICE)]
    telling = [line for line in lines if "GLOBAL" in line or line.startswith("WeightsUnpickler")]
    line = (telling or lines or ["no further detail"])[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
