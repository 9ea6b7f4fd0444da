"""Kernels of parameters that no layer rule covers, from the gradients of all entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectralshell.operators.kernel_sums import KernelSum

RecordSample = Callable[[int], tuple[Tensor, Tensor, Sequence[Tensor]]]
"""Maps a sample to its entries (with their graph), their slots, and the leaves."""


def add_sample_gradients(
    total: KernelSum, record: RecordSample, sizes: Sequence[int], max_bytes: int
) -> None:
    """Add J Jᵀ of some parameters, each sample alone, one backward pass for each entry.

    Parameters
    ----------
    total : KernelSum
    record : callable
        Evaluates one sample, and returns its entries, their slots, and the leaves that count.
    sizes : sequence of int
        Numbers of each leaf.
    max_bytes : int
        For the table of gradients; columns are taken in turns where it does not suffice.

    Notes
    -----
    Cost: n backward passes of one sample for each turn, and n² p / 2 multiplications.
    """
    layout = total.layout
    width = max(1, max_bytes // (layout.n * layout.itemsize))
    for columns in _column_ranges(sum(sizes), width):
        table = torch.zeros(
            (layout.n_samples, layout.n_slots, len(columns)),
            dtype=layout.dtype,
            device=layout.device,
        )
        for sample in range(layout.n_samples):
            entries, slots, leaves = record(sample)
            if not entries.requires_grad:  # this sample does not use them
                continue
            for entry, slot in zip(entries, slots.tolist(), strict=True):
                gradients = torch.autograd.grad(
                    entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
                table[sample, slot] = joined[columns.start : columns.stop]
        total.add_gradients(table)


def _column_ranges(n_columns: int, width: int) -> Iterator[range]:
    for start in range(0, n_columns, width):
        yield range(start, min(start + width, n_columns))
