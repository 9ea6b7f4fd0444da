"""Names that transformers writes otherwise than its models hold them, by its own rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_LIBRARY = "transformers"


def renaming_of(model: nn.Module) -> Callable[[str], str] | None:
    """Return what a key of a checkpoint is called in a model of transformers; None for others.

    Versions before 5 write the names that their models hold.
    """
    if not any(cls.__module__.partition(".")[0] == _LIBRARY for cls in type(model).__mro__):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return None
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return None
    rules: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def rename(key: str) -> str:
        for rule in renamings:
            key, _ = rule.rename_source_key(key)
        return key

    return rename
