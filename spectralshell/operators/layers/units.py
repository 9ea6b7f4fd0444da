"""Units of parameters whose kernels are contracted together, and the labels they are kept under."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from spectralshell.operators.layers.recording import ParameterUse
from spectralshell.operators.layers.rules import Convolution, Matrix, Positions, Translation
from spectralshell.parameter_checks import call_given

LAYER_OPTIONS = ("module", "parameter")

WHOLE = ""
"""Label of everything where no layers are asked for."""

GRAM = "gram"
"""At one position: the Gram matrices of inputs and of output gradients, multiplied by entries."""

PAIRS = "pairs"
"""For each pair of samples, the Gram matrix of their inputs between their output gradients."""

GRADIENTS = "gradients"
"""The gradients of all entries, and one symmetric product."""

# The pairs' products are many and narrow: measured at half the rate of the large ones.
_PAIRS_PENALTY = 2.0


@dataclass(frozen=True)
class Unit:
    """Parameters whose kernels are found in one contraction: one, or a weight and its bias."""

    names: tuple[str, ...]
    # Of the kernel that the unit adds to.
    label: str
    # Whether the bias is in: it is the weight of an input that is 1.
    merged: bool
    # Where every use applies a matrix of the same form at positions.
    matrix: MatrixForm | None


@dataclass(frozen=True)
class MatrixForm:
    """A matrix applied at positions, in blocks for groups."""

    n_groups: int
    # Of one block; the bias's 1 is not counted.
    fan_in: int
    fan_out: int
    # Positions at which it is applied to one sample, over all uses.
    n_positions: int
    # Whether the inputs at positions take more memory than the input, as patches do.
    unfolds: bool


@dataclass(frozen=True)
class RecordedUnit:
    """A unit with its uses in one recorded pass, whose graph they keep alive."""

    unit: Unit
    uses: tuple[ParameterUse, ...]


def find_units(
    uses: Sequence[ParameterUse],
    graph_uses: Counter[str],
    names: Collection[str],
    label_of: Callable[[str], str],
    refused: Collection[str] = (),
) -> tuple[list[RecordedUnit], list[str]]:
    """Sort parameters into units in the order of the forward pass, and into others.

    The others can only be answered for by the gradients of each sample.
    """
    seen: dict[str, list[ParameterUse]] = defaultdict(list)
    for use in uses:
        seen[use.name].append(use)
    known = {
        name: found
        for name, found in seen.items()
        if name in names
        and name not in refused
        and len(found) == graph_uses[name]
        and all(use.intact and use.by_samples for use in found)
    }
    biases = _biases_by_calls(known)
    units: list[RecordedUnit] = []
    merged: set[str] = set()
    for name, found in known.items():
        matrix = _matrix_form(found)
        bias = biases.get(tuple(use.call for use in found))
        if matrix is None or bias is None or label_of(bias) != label_of(name):
            continue
        if not all(_is_one_per_output(use, matrix) for use in known[bias]):
            continue
        unit = Unit((name, bias), label_of(name), True, matrix)
        units.append(RecordedUnit(unit, tuple(found)))
        merged |= {name, bias}
    for name, found in known.items():
        if name not in merged:
            matrix = _matrix_form(found)
            unit = Unit((name,), label_of(name), False, matrix)
            units.append(RecordedUnit(unit, tuple(found)))
    units.sort(key=lambda recorded: recorded.uses[0].call)
    # A refused one may be in use in other chunks.
    others = [n for n in names if n not in known and (graph_uses[n] or n in refused)]
    return units, others


def _biases_by_calls(known: dict[str, list[ParameterUse]]) -> dict[tuple[int, ...], str]:
    return {
        tuple(use.call for use in found): name
        for name, found in known.items()
        if all(isinstance(use.geometry, Translation) for use in found)
    }


def _is_one_per_output(use: ParameterUse, matrix: MatrixForm) -> bool:
    """Tell whether a term has a number for each output, and is not one number for several."""
    shape = use.geometry.shape if isinstance(use.geometry, Translation) else ()
    return prod(shape) == matrix.n_groups * matrix.fan_out


def _matrix_form(uses: Sequence[ParameterUse]) -> MatrixForm | None:
    """Return the form that all uses share, or None."""
    forms = {_form_of_one(use) for use in uses}
    form = forms.pop()
    if forms or form is None:
        return None
    groups, fan_in, fan_out, _ = form
    return MatrixForm(
        groups,
        fan_in,
        fan_out,
        n_positions=sum(use.n_positions for use in uses),
        unfolds=any(
            isinstance(use.geometry, Convolution) and prod(use.geometry.kernel) > 1 for use in uses
        ),
    )


def _form_of_one(use: ParameterUse) -> tuple[int, int, int, bool] | None:
    geometry = use.geometry
    if not isinstance(geometry, Positions):
        return None
    transposed = isinstance(geometry, Matrix) and geometry.transposed
    return geometry.n_groups, geometry.fan_in, use.fan_out, transposed


def choose_order(unit: Unit, n_samples: int, n_slots: int) -> str:
    """Choose the order of contraction with the fewest operations; see :func:`operation_counts`."""
    if unit.matrix is None:
        return GRADIENTS
    costs = operation_counts(unit.matrix, unit.merged, n_samples, n_slots)
    return min(costs, key=costs.__getitem__)


def operation_counts(
    matrix: MatrixForm, merged: bool, n_samples: int, n_slots: int
) -> dict[str, float]:
    """Return the multiplications of each order that can be used for a matrix."""
    groups, fan_in, fan_out = matrix.n_groups, matrix.fan_in + merged, matrix.fan_out
    positions, n = matrix.n_positions, float(n_samples * n_slots)
    sample_pairs = n_samples * (n_samples + 1) / 2.0
    entry_pairs = n * (n + 1) / 2.0
    columns = groups * fan_in * fan_out
    counts = {GRADIENTS: n * positions * columns + entry_pairs * columns}
    counts[PAIRS] = (
        _PAIRS_PENALTY
        * groups
        * sample_pairs
        * (positions**2 * (fan_in + n_slots * fan_out) + n_slots**2 * fan_out * positions)
    )
    if positions == 1 and groups == 1:
        counts[GRAM] = sample_pairs * fan_in + entry_pairs * fan_out
    return counts


def resolve_layers(
    layers: str | Mapping[str, str] | Callable[[str], str] | None,
    names: Sequence[str],
    *,
    option: str = "layers",
) -> Callable[[str], str]:
    """Return the function from a parameter's name to its label.

    A mapping takes regular expressions to labels; the first that finds the name counts.
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
        labels = {name: _first_match(layers, name, option) for name in names}
    elif callable(layers):
        labels = {name: call_given(option, layers, name) for name in names}
    else:
        raise TypeError(
            "layers must be None, 'module', 'parameter', a mapping or a callable, got "
            f"{type(layers).__name__}."
        )
    for name, label in labels.items():
        if not isinstance(label, str):
            raise TypeError(
                f"{option} gave the label {label!r} of type {type(label).__name__} to {name!r}; a "
                "label is a string."
            )
    return labels.__getitem__


def _first_match(layers: Mapping[str, str], name: str, option: str) -> str:
    for expression, label in layers.items():
        try:
            found = re.search(expression, name)
        except re.error as error:
            raise ValueError(
                f"{option}: {expression!r} is not a regular expression: {error}."
            ) from error
        if found:
            return label
    raise ValueError(
        f"{option}: no expression finds the parameter {name!r}; add one, such as '' for the rest."
    )


def _constantly(label: str) -> Callable[[str], str]:
    return lambda name: label


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _itself(name: str) -> str:
    return name
