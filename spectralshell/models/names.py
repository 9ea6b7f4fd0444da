"""Names of a checkpoint brought into those of a model: which prefix is taken off, or put before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.ties import tied_groups

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "model.", "base_model.model.")
"""What wrappers for data parallelism and compilation, trainers and adapters put before names."""

_BARE = ("module.", "_orig_mod.")
"""Those that say nothing about the model, taken off before names are compared in an error."""

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelNames:
    """The names of a model's tensors, tied ones together, and what its checkpoints hold of them."""

    groups: tuple[tuple[str, ...], ...]
    saved: frozenset[str]
    ignored: tuple[str, ...]
    base: str

    @classmethod
    def of(cls, model: nn.Module) -> ModelNames:
        """Read them off a model; those of transformers say which old keys they do without."""
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        base = getattr(model, "base_model_prefix", None)
        return cls(
            tuple(tuple(names) for names, _ in tied_groups(model)),
            frozenset(model.state_dict(keep_vars=True)),
            tuple(p for p in ignored or () if isinstance(p, str)),
            f"{base}." if isinstance(base, str) and base else "",
        )

    def misfit(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return the names that no key gives, and the keys that are none."""
        present = set(keys)
        known = {name for group in self.groups for name in group}
        missing = [
            group[0]
            for group in self.groups
            if present.isdisjoint(group) and not self.saved.isdisjoint(group)
        ]
        unexpected = [
            key
            for key in present - known
            if not key.endswith("_extra_state")
            and not any(re.search(pattern, key) for pattern in self.ignored)
        ]
        return missing, sorted(unexpected)

    def fits(self, keys: Iterable[str]) -> bool:
        """Tell whether keys give all names and nothing else."""
        return self.misfit(keys) == ([], [])


def named_as(
    names: ModelNames, tensors: dict[str, Tensor], prefix: str | None, source: str
) -> tuple[Named, str | None]:
    """Return tensors by the model's names as far as one prefix does it, and advice where none does.

    ``prefix`` given: that one is taken off, and what does not have it is left out.
    """
    if prefix is not None:
        return _without(tensors, prefix, source), None
    tried: list[dict[str, Tensor]] = [tensors]
    for candidate in tried:  # grows: wrappers lie within wrappers
        if names.fits(candidate):
            return candidate, None
        tried += [
            _cut(candidate, wrapper) for wrapper in _WRAPPERS if _all_have(candidate, wrapper)
        ]
    if names.base:
        for candidate in tried:
            longer = {names.base + key: value for key, value in candidate.items()}
            # The base model alone: heads tied to it need no key.
            if names.fits(longer):
                return longer, None
    return _unwrapped(names, tensors), _advice(names, tensors)


def _without(tensors: dict[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    found = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f"state: no key of {source} begins with prefix={prefix!r}; its keys are "
            f"{listed(tensors)}."
        )
    return found


def _unwrapped(names: ModelNames, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = [name for group in names.groups for name in group]
    for prefix in _BARE * 2:
        if _all_have(tensors, prefix) and not any(name.startswith(prefix) for name in own):
            tensors = _cut(tensors, prefix)
    return tensors


def _advice(names: ModelNames, tensors: dict[str, Tensor]) -> str | None:
    """Return which prefix would make all names fit, if one would."""
    prefixes = {
        key[: place + 1]
        for key in tensors
        for place in (match.start() for match in re.finditer(r"\.", key))
    }
    for prefix in sorted(prefixes, key=len):
        if names.fits([k.removeprefix(prefix) for k in tensors if k.startswith(prefix)]):
            return (
                f"The keys that begin with {prefix!r} would fit: pass "
                f"state=Checkpoint(path, prefix={prefix!r})."
            )
    return None


def _all_have(tensors: dict[str, Tensor], prefix: str) -> bool:
    return bool(tensors) and all(key.startswith(prefix) for key in tensors)


def _cut(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items()}
