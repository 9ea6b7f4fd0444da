"""Which parameters' kernels are kept apart, and under which label."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

LAYER_OPTIONS = ("module", "parameter")
WHOLE = ""
"""Label of everything where no layers are asked for."""


def resolve_layers(
    layers: str | Mapping[str, str] | Callable[[str], str] | None, names: Sequence[str]
) -> Callable[[str], str]:
    r"""Return the function from a parameter's name to its label.

    Parameters
    ----------
    layers : {None, "module", "parameter"}, mapping or callable
        A mapping takes regular expressions to labels; the first that finds the name counts.
    names : sequence of str
        The parameters that count.

    Raises
    ------
    ValueError
        If the option is unknown, an expression is malformed, or a mapping leaves a name out.
    TypeError
        If ``layers`` has another type, or a label is not a string.

    Examples
    --------
    >>> names = ["conv.weight", "head.weight", "head.bias"]
    >>> list(map(resolve_layers("module", names), names))
    ['conv', 'head', 'head']
    >>> list(map(resolve_layers({r"^conv": "body", "": "rest"}, names), names))
    ['body', 'rest', 'rest']
    """
    if layers is None:
        return _constantly(WHOLE)
    if isinstance(layers, str):
        if layers not in LAYER_OPTIONS:
            raise ValueError(
                f"layers must be None, 'module', 'parameter', a mapping or a callable, got "
                f"{layers!r}."
            )
        return _module_of if layers == "module" else _itself
    if isinstance(layers, Mapping):
        labels = {name: _first_match(layers, name) for name in names}
    elif callable(layers):
        labels = {name: layers(name) for name in names}
    else:
        raise TypeError(
            "layers must be None, 'module', 'parameter', a mapping or a callable, got "
            f"{type(layers).__name__}."
        )
    for name, label in labels.items():
        if not isinstance(label, str):
            raise TypeError(
                f"layers gave the label {label!r} of type {type(label).__name__} to {name!r}; a "
                "label is a string."
            )
    return labels.__getitem__


def _first_match(layers: Mapping[str, str], name: str) -> str:
    for expression, label in layers.items():
        try:
            found = re.search(expression, name)
        except re.error as error:
            raise ValueError(
                f"layers: {expression!r} is not a regular expression: {error}."
            ) from error
        if found:
            return label
    raise ValueError(
        f"layers: no expression finds the parameter {name!r}; add one, such as '' for the rest."
    )


def _constantly(label: str) -> Callable[[str], str]:
    return lambda name: label


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _itself(name: str) -> str:
    return name
