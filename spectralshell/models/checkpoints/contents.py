"""The state dict inside what a file holds: under a key that is named, or a usual one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectralshell.models.checkpoints.messages import listed

_NESTED_KEYS = ("model_state_dict", "state_dict", "model")


def tensors_of(content: Any, source: str, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a state dict, under ``key`` or a usual one; ValueError for others.

    ``source`` names where it comes from.
    """
    nested = _without_shells(content) if key is None else _under(content, key, source)
    if not isinstance(nested, Mapping) or not nested:
        raise ValueError(
            f"state: {source} holds no mapping of names to tensors"
            + (f" under {key!r}" if key is not None else "")
            + "; save model.state_dict()."
        )
    tensors = {
        str(name): value
        for name, value in nested.items()
        if isinstance(value, Tensor) or not str(name).endswith("_extra_state")
    }
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"state: {source} holds entries that are not tensors: {listed(foreign)}; "
            + _remedy(nested, key)
        )
    return tensors


def _remedy(nested: Mapping[Any, Any], key: str | None) -> str:
    holders = [str(name) for name, value in nested.items() if _holds_tensors(value)]
    if not holders:
        return "save model.state_dict() alone."
    inner = holders[0] if key is None else f"{key}.{holders[0]}"
    return (
        f"pass what lies under {holders[0]!r} as a mapping, or of a file "
        f"state=Checkpoint(path, key={inner!r})."
    )


def _without_shells(content: Any) -> Any:
    passed: list[int] = []
    while isinstance(content, Mapping) and id(content) not in passed:  # a file can hold a circle
        passed.append(id(content))
        inner = (content.get(key) for key in _NESTED_KEYS)
        content = next((value for value in inner if isinstance(value, Mapping)), content)
    return content


def _under(content: Any, key: str, source: str) -> Any:
    """Return what lies under a dotted key, whose parts may have dots themselves."""
    rest = key
    while rest:
        if not isinstance(content, Mapping):
            break
        parts = rest.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found = {str(name): name for name in content}
        head = next((head for head in heads if head in found), None)
        if head is None:
            break
        content = content[found[head]]
        rest = rest[len(head) + 1 :]
    if rest:
        there = (
            listed(repr(str(name)) for name in content) if isinstance(content, Mapping) else "none"
        )
        raise ValueError(
            f"state: {source} has no key {key!r}: at {rest!r} the keys are {there}; pass key= as "
            "the names of dictionaries from outside to inside, joined by dots."
        )
    return content


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    inner = value.values()
    return any(isinstance(item, (Tensor, Mapping)) for item in inner)
