"""Blocks of a model by depth: which parameters belong together, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectralshell.operators.checkpoints import unwrap
from spectralshell.operators.layer_labels import LAYER_OPTIONS, resolve_layers

AUTO = "auto"
Blocks = str | Mapping[str, str] | Callable[[str], str]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Grouping:
    """Blocks in the order of depth.

    Parameters
    ----------
    labels : tuple of str
        Names of the blocks.
    members : dict of str to tuple of str
        Names of each block's parameters.
    """

    labels: tuple[str, ...]
    members: dict[str, tuple[str, ...]]

    def label_of(self, name: str) -> str:
        """Return the label of a parameter."""
        return next(label for label, names in self.members.items() if name in names)


def check_blocks(blocks: Any) -> None:
    """Check the parameter ``blocks``.

    Raises
    ------
    ValueError, TypeError
        If it is neither a known option, a mapping nor a callable.
    """
    options = (AUTO, *LAYER_OPTIONS)
    if isinstance(blocks, str):
        if blocks not in options:
            raise ValueError(
                f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
                f"expressions to labels or a callable, got {blocks!r}."
            )
    elif not isinstance(blocks, Mapping) and not callable(blocks):
        raise TypeError(
            f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
            f"expressions to labels or a callable, got {type(blocks).__name__}."
        )


def group_parameters(model: nn.Module, blocks: Blocks, names: Sequence[str]) -> Grouping:
    r"""Return the blocks of a model, in the order of depth.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : {"auto", "module", "parameter"}, mapping or callable
        ``"auto"`` follows the module tree, see the notes; the others are those of
        :func:`~spectralshell.operators.layer_labels.resolve_layers`. Depth is the order in which
        the labels of a mapping are given, and otherwise that in which the model registers its
        parameters.
    names : sequence of str
        The parameters that count.

    Returns
    -------
    Grouping

    Raises
    ------
    ValueError, TypeError
        If ``blocks`` is not usable, or a label of a mapping finds no parameter.

    Notes
    -----
    ``"auto"`` takes the members of containers (``Sequential``, ``ModuleList``, ``ModuleDict``)
    apart, from the root down, and a module of another kind only where it holds more than half of
    the parameter tensors and a container with several members: the encoder of a transformer, not a
    residual block. What has nothing but vectors as parameters (normalisations) joins the block
    before it, or, at the beginning, the one after it.

    Examples
    --------
    >>> layers = [nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2)]
    >>> model = nn.Sequential(*layers)
    >>> grouping = group_parameters(model, "auto", [n for n, _ in model.named_parameters()])
    >>> grouping.members["0"]
    ('0.weight', '0.bias', '1.weight', '1.bias')
    >>> grouping.labels
    ('0', '3')
    """
    check_blocks(blocks)
    label_of = _automatic(unwrap(model)) if blocks == AUTO else _named(blocks, names)
    members: dict[str, list[str]] = {}
    if isinstance(blocks, Mapping):
        members = {label: [] for label in blocks.values()}
    for name in names:
        members.setdefault(label_of(name), []).append(name)
    empty = [label for label, found in members.items() if not found]
    if empty:
        raise ValueError(
            f"blocks: no parameter got the label {empty[0]!r}; its expression finds none, or one "
            "before it finds them first."
        )
    return Grouping(tuple(members), {label: tuple(found) for label, found in members.items()})


def _named(blocks: Blocks, names: Sequence[str]) -> Callable[[str], str]:
    try:
        return resolve_layers(blocks, names)
    except (ValueError, TypeError) as error:
        # The same rules under another name.
        raise type(error)(str(error).replace("layers", "blocks", 1)) from error


def _automatic(model: nn.Module) -> Callable[[str], str]:
    labels: dict[str, str] = {}
    waiting: list[str] = []
    last: str | None = None
    total = len(list(model.parameters()))
    for label, owned in _units(model, "", total):
        if all(parameter.ndim <= 1 for parameter in owned.values()):
            if last is None:
                waiting += owned
                continue
            labels.update(dict.fromkeys(owned, last))
            continue
        labels.update(dict.fromkeys([*waiting, *owned], label))
        waiting, last = [], label
    labels.update(dict.fromkeys(waiting, type(model).__name__))
    return labels.__getitem__


def _units(
    module: nn.Module, path: str, total: int
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yield label and parameters of the pieces of a module, in the order of registration."""
    prefix = f"{path}." if path else ""
    if path and not _is_taken_apart(module, total):
        owned = {prefix + name: parameter for name, parameter in module.named_parameters()}
        if owned:
            yield path, owned
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, {prefix + name: parameter}
    for name, child in module.named_children():
        yield from _units(child, prefix + name, total)


def _is_taken_apart(module: nn.Module, total: int) -> bool:
    if isinstance(module, _CONTAINERS):
        return True
    share = len(list(module.parameters()))
    return 2 * share > total and any(
        isinstance(part, _CONTAINERS) and _n_members(part) > 1 for part in module.modules()
    )


def _n_members(container: nn.Module) -> int:
    return sum(any(True for _ in child.parameters()) for child in container.children())


__all__ = ["AUTO", "Blocks", "Grouping", "check_blocks", "group_parameters"]
