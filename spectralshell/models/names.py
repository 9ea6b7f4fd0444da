"""Names of a checkpoint brought into those of a model: which prefix is taken off, or put before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.renames import renaming_of
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
    rename: Callable[[str], str] | None

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
            renaming_of(model),
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
        made = {_tail(name) for name in known - self.saved}
        unexpected = [
            key
            for key in present - known
            if not key.endswith("_extra_state")
            # Older checkpoints hold buffers that the model makes by itself now.
            and _tail(key) not in made
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
        tried = [_without(tensors, prefix, source)]
    else:
        tried = [tensors]
        for candidate in tried:  # grows: wrappers lie within wrappers
            tried += [_cut(candidate, w) for w in _WRAPPERS if _all_have(candidate, w)]
    for change in (_as_it_is, _with_base, _renamed):
        for candidate in tried:
            found = change(names, candidate)
            if found is not None and names.fits(found):
                return found, None
    if prefix is not None:
        return tried[0], None
    return _unwrapped(names, tensors), _advice(names, tensors)


def _as_it_is(names: ModelNames, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    return tensors


def _with_base(names: ModelNames, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Put the name of the base model before all: heads tied to it need no key."""
    return {names.base + key: value for key, value in tensors.items()} if names.base else None


def _renamed(names: ModelNames, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Rename as transformers does when it loads, with the base model's name where that is known."""
    if names.rename is None:
        return None
    own = {name for group in names.groups for name in group}
    found = {}
    for key, value in tensors.items():
        name = names.rename(key)
        found[names.base + name if names.base + name in own else name] = value
    return found if len(found) == len(tensors) else None


def _tail(name: str) -> str:
    """Return the last two parts of a name: a buffer, and the module that has it."""
    return ".".join(name.split(".")[-2:])


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
