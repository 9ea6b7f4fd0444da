"""Stores of each layer while the backward passes run, and the sums their kernels go to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralshell.operators.layers.recording import ParameterUse
from spectralshell.operators.layers.rules import Positions
from spectralshell.operators.layers.units import GRADIENTS, GRAM, PAIRS, MatrixForm, Unit

_N_TILES = 8
"""Row tiles of the triangle: 56 % of the full product."""

_SLOTS_TOGETHER = 4


@dataclass(frozen=True)
class EntryLayout:
    """Entries of the residual as a table of samples and slots."""

    n_samples: int
    n_slots: int
    # Places of the table that are entries, in the order of the entries; None keeps all.
    kept: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def n(self) -> int:
        """Places of the table."""
        return self.n_samples * self.n_slots

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def sample_tiles(self) -> Iterator[slice]:
        """Yield consecutive ranges of samples: the rows of the triangle's tiles."""
        size = -(-self.n_samples // _N_TILES)
        for start in range(0, self.n_samples, size):
            yield slice(start, min(start + size, self.n_samples))


class KernelSum:
    """Σ M_l of some layers, entries by sample for gradients and pairs, by slot for Gram matrices.

    By slot, the entrywise product of Gram matrices runs along samples.
    """

    def __init__(self, layout: EntryLayout) -> None:
        self.layout = layout
        self._by_sample: Tensor | None = None
        self._by_slot: Tensor | None = None

    def add_gradients(self, gradients: Tensor) -> None:
        """Add W Wᵀ for gradients W of shape (n_samples, n_slots, k)."""
        layout, flat = self.layout, gradients.reshape(self.layout.n, -1)
        total = self._in_order_of_samples().view(layout.n, layout.n)
        for tile in layout.sample_tiles():
            rows = slice(tile.start * layout.n_slots, tile.stop * layout.n_slots)
            total[rows, rows.start :].addmm_(flat[rows], flat[rows.start :].T)

    def add_gram(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add (A Aᵀ) ∘ (G Gᵀ) for A (n_samples, fan_in) and G (n_slots, n_samples, fan_out)."""
        n_slots, n_samples = outputs.shape[:2]
        gram = inputs @ inputs.T
        total = self._in_order_of_slots()
        buffer = outputs.new_empty(_SLOTS_TOGETHER, n_samples, n_samples)
        tiles = list(self.layout.sample_tiles()) if n_slots <= _SLOTS_TOGETHER else [slice(None)]
        for slot in range(n_slots):
            for rows in tiles:
                columns = slice(rows.start, None)
                product = outputs[slot, rows] @ outputs[slot, columns].T
                total[slot, slot, rows, columns].addcmul_(product, gram[rows, columns])
            for start in range(slot + 1, n_slots, _SLOTS_TOGETHER):
                others = outputs[start : start + _SLOTS_TOGETHER]
                product = buffer[: len(others)]
                one = outputs[slot].expand(len(others), -1, -1)
                torch.bmm(one, others.transpose(1, 2), out=product)
                total[slot, start : start + len(others)].addcmul_(product, gram)

    def add_pairs(self, inputs: Tensor, outputs: Tensor, max_bytes: int) -> None:
        """Add Σ_pp' (a_p · a_p') (g_p · g_p') over the positions of each pair of samples.

        Inputs (n_samples, fan_in, positions), outputs (n_samples, n_slots, fan_out, positions).
        """
        n_samples, n_slots, fan_out, positions = outputs.shape
        total = self._in_order_of_samples()
        flat = inputs.transpose(1, 2).reshape(n_samples * positions, -1)
        per_sample = n_slots * fan_out * positions * outputs.element_size()
        step = max(1, max_bytes // per_sample)
        together = max(1, max_bytes // (positions * flat.shape[0] * outputs.element_size()))
        for first in range(0, n_samples, together):
            last = min(first + together, n_samples)
            rows = flat[first * positions : last * positions]
            gram = rows @ flat[first * positions :].T
            gram = gram.view(-1, positions, n_samples - first, positions).permute(0, 2, 3, 1)
            for sample in range(first, last):
                left = outputs[sample].reshape(n_slots, -1)
                for start in range(sample, n_samples, step):
                    others = outputs[start : start + step]
                    between = gram[sample - first, start - first :][: len(others)]
                    mixed = torch.bmm(others.reshape(len(others), -1, positions), between)
                    block = left @ mixed.view(len(others) * n_slots, -1).T
                    target = total[sample, :, start : start + len(others)]
                    target += block.view(n_slots, len(others), n_slots)

    def finish(self) -> Tensor:
        """Return the whole matrix of the entries kept, and forget the parts."""
        n = self.layout.n
        whole, self._by_sample = self._by_sample, None
        slots, self._by_slot = self._by_slot, None
        if whole is not None:
            whole = whole.view(n, n)
            _mirror(whole)
        if slots is not None:
            for slot in range(self.layout.n_slots):
                _mirror(slots[slot, slot])
                for other in range(slot + 1, self.layout.n_slots):
                    slots[other, slot] = slots[slot, other].T
            ordered = slots.permute(2, 0, 3, 1)
            if whole is None:
                whole = ordered.reshape(n, n)
            else:
                whole.view(ordered.shape).add_(ordered)
        if whole is None:
            whole = torch.zeros(n, n, dtype=self.layout.dtype, device=self.layout.device)
        kept = self.layout.kept
        return whole if kept is None else whole[kept[:, None], kept]

    def _in_order_of_samples(self) -> Tensor:
        if self._by_sample is None:
            shape = (self.layout.n_samples, self.layout.n_slots) * 2
            self._by_sample = torch.zeros(shape, dtype=self.layout.dtype, device=self.layout.device)
        return self._by_sample

    def _in_order_of_slots(self) -> Tensor:
        if self._by_slot is None:
            slots, samples = self.layout.n_slots, self.layout.n_samples
            self._by_slot = torch.zeros(
                (slots, slots, samples, samples), dtype=self.layout.dtype, device=self.layout.device
            )
        return self._by_slot


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle of a square matrix to the lower one, in tiles."""
    n = len(matrix)
    size = -(-n // _N_TILES) or 1
    for start in range(0, n, size):
        stop = min(start + size, n)
        diagonal = matrix[start:stop, start:stop]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


class LayerStore(ABC):
    """Inputs and output gradients of one unit, filled pass by pass.

    Later chunks have other uses of the same form as the unit's, which is found in the first.
    """

    def __init__(self, unit: Unit, layout: EntryLayout) -> None:
        self.unit = unit
        self.layout = layout

    @abstractmethod
    def begin(self, uses: Sequence[ParameterUse], samples: slice) -> None:
        """Take the inputs of a chunk of samples."""

    @abstractmethod
    def put(
        self,
        uses: Sequence[ParameterUse],
        cotangents: Sequence[Tensor | None],
        samples: slice,
        slot: int,
    ) -> None:
        """Take the output gradients of one slot of a chunk; None is zero."""

    def end(self, samples: slice) -> None:  # noqa: B027  most stores have nothing left to do
        """Finish a chunk, whose graph is freed next."""

    @abstractmethod
    def add_to(self, total: KernelSum) -> None:
        """Add the unit's kernel."""


class GramStore(LayerStore):
    """One position: the inputs, and the output gradients by slot."""

    def __init__(self, unit: Unit, matrix: MatrixForm, layout: EntryLayout) -> None:
        super().__init__(unit, layout)
        self._outputs = _zeros(layout, layout.n_slots, layout.n_samples, matrix.fan_out)
        self._inputs: list[tuple[slice, Tensor]] = []

    def begin(self, uses: Sequence[ParameterUse], samples: slice) -> None:
        """Take the inputs of a chunk of samples."""
        rules = [_positions(use) for use in uses]
        self._inputs.append((samples, _inputs(self.unit, rules, _length(samples)).flatten(1)))

    def put(
        self,
        uses: Sequence[ParameterUse],
        cotangents: Sequence[Tensor | None],
        samples: slice,
        slot: int,
    ) -> None:
        """Take the output gradients of one slot of a chunk."""
        for cotangent in cotangents:
            if cotangent is not None:
                fan_out = self._outputs.shape[2]
                self._outputs[slot, samples] = cotangent.reshape(-1, fan_out)

    def add_to(self, total: KernelSum) -> None:
        """Add the unit's kernel."""
        total.add_gram(_join(self._inputs, self.layout.n_samples), self._outputs)


class PositionStore(LayerStore):
    """Several positions: the inputs, which are unfolded later, and all output gradients."""

    def __init__(
        self, unit: Unit, matrix: MatrixForm, layout: EntryLayout, order: str, slice_bytes: int
    ) -> None:
        super().__init__(unit, layout)
        self._matrix = matrix
        self._order = order
        self._slice_bytes = slice_bytes
        width = matrix.n_groups * matrix.fan_out
        self._outputs = _zeros(layout, layout.n_samples, layout.n_slots, width, matrix.n_positions)
        self._pieces: list[tuple[slice, list[Positions]]] = []

    def begin(self, uses: Sequence[ParameterUse], samples: slice) -> None:
        """Take the inputs of a chunk of samples."""
        self._pieces.append((samples, [_positions(use) for use in uses]))

    def put(
        self,
        uses: Sequence[ParameterUse],
        cotangents: Sequence[Tensor | None],
        samples: slice,
        slot: int,
    ) -> None:
        """Take the output gradients of one slot of a chunk."""
        first = 0
        for use, cotangent in zip(uses, cotangents, strict=True):
            last = first + use.n_positions
            if cotangent is not None:
                outputs = _positions(use).outputs(cotangent, _length(samples)).flatten(1, 2)
                self._outputs[samples, slot, :, first:last] = outputs
            first = last

    def add_to(self, total: KernelSum) -> None:
        """Add the unit's kernel."""
        fan_in, fan_out = self._matrix.fan_in + self.unit.merged, self._matrix.fan_out
        for group in range(self._matrix.n_groups):
            outputs = self._outputs[:, :, group * fan_out : (group + 1) * fan_out]
            if self._order == PAIRS:
                inputs = [
                    (samples, _inputs(self.unit, rules, _length(samples))[:, group])
                    for samples, rules in self._pieces
                ]
                whole = _join(inputs, self.layout.n_samples)
                total.add_pairs(whole, outputs.contiguous(), self._slice_bytes // 2)
                continue
            per_output = self.layout.n * fan_in * outputs.element_size()
            step = max(1, self._slice_bytes // per_output)
            for start in range(0, fan_out, step):
                chosen = outputs[:, :, start : start + step]
                total.add_gradients(self._gradients(chosen, group))

    def gradients(self) -> Tensor:
        """Return the gradients of all entries, shape (n_samples, n_slots, numbers)."""
        fan_out = self._matrix.fan_out
        found = [
            self._gradients(self._outputs[:, :, group * fan_out : (group + 1) * fan_out], group)
            for group in range(self._matrix.n_groups)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _gradients(self, outputs: Tensor, group: int) -> Tensor:
        """Return Σ_p g_p a_pᵀ for all entries, shape (n_samples, n_slots, fan_out · fan_in)."""
        fan_in = self._matrix.fan_in + self.unit.merged
        n_samples, n_slots, fan_out, positions = outputs.shape
        table = outputs.new_empty(n_samples, n_slots * fan_out, fan_in)
        per_sample = fan_in * positions * outputs.element_size()
        step = max(1, self._slice_bytes // 4 // per_sample)
        for samples, rules in self._pieces:
            for start in range(samples.start, samples.stop, step):
                stop = min(start + step, samples.stop)
                inside = slice(start - samples.start, stop - samples.start)
                inputs = _inputs(self.unit, rules, _length(samples), inside)[:, group]
                rows = outputs[start:stop].reshape(stop - start, -1, positions)
                torch.bmm(rows, inputs.transpose(1, 2), out=table[start:stop])
        return table.view(n_samples, n_slots, -1)


class GradientStore(LayerStore):
    """The gradients themselves, for all uses together, where they are small."""

    def __init__(self, unit: Unit, layout: EntryLayout, n_numbers: int) -> None:
        super().__init__(unit, layout)
        self._gradients = _zeros(layout, layout.n_samples, layout.n_slots, n_numbers)

    def begin(self, uses: Sequence[ParameterUse], samples: slice) -> None:
        """Take nothing: the uses that come with the output gradients know their inputs."""

    def put(
        self,
        uses: Sequence[ParameterUse],
        cotangents: Sequence[Tensor | None],
        samples: slice,
        slot: int,
    ) -> None:
        """Take the output gradients of one slot of a chunk."""
        for use, cotangent in zip(uses, cotangents, strict=True):
            if cotangent is not None:
                gradient = use.geometry.gradient(cotangent, _length(samples))
                self._gradients[samples, slot] += gradient.flatten(1)

    def add_to(self, total: KernelSum) -> None:
        """Add the unit's kernel."""
        total.add_gradients(self._gradients)


class MatrixGradientStore(LayerStore):
    """The gradients of a matrix, each chunk's from its output gradients when they are complete."""

    def __init__(
        self, unit: Unit, matrix: MatrixForm, layout: EntryLayout, slice_bytes: int
    ) -> None:
        super().__init__(unit, layout)
        self._matrix = matrix
        self._slice_bytes = slice_bytes
        numbers = matrix.n_groups * matrix.fan_out * (matrix.fan_in + unit.merged)
        self._gradients = _zeros(layout, layout.n_samples, layout.n_slots, numbers)
        self._chunk: PositionStore | None = None

    def begin(self, uses: Sequence[ParameterUse], samples: slice) -> None:
        """Take the inputs of a chunk of samples."""
        layout = replace(self.layout, n_samples=_length(samples))
        self._chunk = PositionStore(self.unit, self._matrix, layout, GRADIENTS, self._slice_bytes)
        self._chunk.begin(uses, slice(0, layout.n_samples))

    def put(
        self,
        uses: Sequence[ParameterUse],
        cotangents: Sequence[Tensor | None],
        samples: slice,
        slot: int,
    ) -> None:
        """Take the output gradients of one slot of a chunk."""
        if self._chunk is not None:
            self._chunk.put(uses, cotangents, slice(0, _length(samples)), slot)

    def end(self, samples: slice) -> None:
        """Turn the chunk's output gradients into gradients."""
        if self._chunk is not None:
            self._gradients[samples] = self._chunk.gradients()
            self._chunk = None

    def add_to(self, total: KernelSum) -> None:
        """Add the unit's kernel."""
        total.add_gradients(self._gradients)


def make_store(
    unit: Unit, layout: EntryLayout, order: str, n_numbers: int, slice_bytes: int
) -> LayerStore:
    """Return the store for a unit's order of contraction; its tables take ``slice_bytes``."""
    if unit.matrix is not None and order == GRAM:
        return GramStore(unit, unit.matrix, layout)
    if unit.matrix is not None and _keeps_positions(unit.matrix, order, n_numbers):
        return PositionStore(unit, unit.matrix, layout, order, slice_bytes)
    if unit.matrix is not None:
        return MatrixGradientStore(unit, unit.matrix, layout, slice_bytes)
    return GradientStore(unit, layout, n_numbers)


def store_bytes(unit: Unit, layout: EntryLayout, order: str, n_numbers: int) -> int:
    """Return the bytes that a unit's store holds from chunk to chunk."""
    matrix = unit.matrix
    if matrix is not None and (order == GRAM or _keeps_positions(matrix, order, n_numbers)):
        n_numbers = matrix.n_positions * matrix.n_groups * matrix.fan_out
    return layout.n * n_numbers * layout.itemsize


def passing_numbers(unit: Unit, order: str, n_numbers: int) -> int:
    """Return the numbers that a unit's store holds for each entry of a chunk, until its end."""
    matrix = unit.matrix
    if matrix is None or order == GRAM or _keeps_positions(matrix, order, n_numbers):
        return 0
    return matrix.n_positions * matrix.n_groups * matrix.fan_out


def _keeps_positions(matrix: MatrixForm, order: str, n_numbers: int) -> bool:
    """Tell whether output gradients are kept, which take less memory than the parameters'."""
    numbers = matrix.n_positions * matrix.n_groups * matrix.fan_out
    return order == PAIRS or (order == GRADIENTS and numbers < n_numbers)


def _inputs(
    unit: Unit, rules: Sequence[Positions], n_samples: int, samples: slice = slice(None)
) -> Tensor:
    """Return the inputs of all uses, shape (samples, n_groups, fan_in, n_positions)."""
    found = [rule.inputs(n_samples, samples) for rule in rules]
    inputs = found[0] if len(found) == 1 else torch.cat(found, dim=3)
    if not unit.merged:
        return inputs
    return torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], dim=2)


def _join(pieces: Sequence[tuple[slice, Tensor]], n_samples: int) -> Tensor:
    """Join the inputs of chunks; samples without an entry are in none, and zero."""
    if len(pieces) == 1 and len(pieces[0][1]) == n_samples:
        return pieces[0][1]
    joined = pieces[0][1].new_zeros(n_samples, *pieces[0][1].shape[1:])
    for samples, piece in pieces:
        joined[samples] = piece
    return joined


def _positions(use: ParameterUse) -> Positions:
    if not isinstance(use.geometry, Positions):
        raise TypeError(f"{use.name!r} is not a matrix applied at positions")
    return use.geometry


def _zeros(layout: EntryLayout, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=layout.dtype, device=layout.device)


def _length(samples: slice) -> int:
    return int(samples.stop - samples.start)
