"""Sums of layer kernels: only half of the symmetric matrix is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_N_TILES = 8
"""Row tiles of the triangle: 56 % of the full product."""

_SLOTS_TOGETHER = 4


@dataclass(frozen=True)
class EntryLayout:
    """Entries of the residual as a table of samples and slots.

    Attributes
    ----------
    n_samples, n_slots : int
    kept : Tensor of int64 or None
        Places of the table that are entries, in the order of the entries; None keeps all.
    dtype, device
        Of the kernel.
    """

    n_samples: int
    n_slots: int
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
        return torch.empty(0, dtype=self.dtype).element_size()

    def sample_tiles(self) -> Iterator[slice]:
        """Yield consecutive ranges of samples: the rows of the triangle's tiles."""
        size = -(-self.n_samples // _N_TILES)
        for start in range(0, self.n_samples, size):
            yield slice(start, min(start + size, self.n_samples))


class KernelSum:
    """Σ M_l of some layers, in the dtype of the products.

    Two orders of the entries are in use: by sample for gradients and pairs of samples, by slot for
    Gram matrices, whose entrywise product then runs along samples.
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
        """Add (A Aᵀ) ∘ (G Gᵀ).

        Parameters
        ----------
        inputs : Tensor, shape (n_samples, fan_in)
        outputs : Tensor, shape (n_slots, n_samples, fan_out)
        """
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

        Parameters
        ----------
        inputs : Tensor, shape (n_samples, fan_in, n_positions)
        outputs : Tensor, shape (n_samples, n_slots, fan_out, n_positions)
        max_bytes : int
            For the Gram matrices of some samples' inputs with the others', and again for their
            products with the output gradients.
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
