"""Snapshots: one model state on one batch at one training time, the sample of every estimator."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectralshell.models.function import iterate_tensors
from spectralshell.models.language import (
    IGNORED,
    move_by_one,
    predicts_next_token,
    repeats_inputs,
    take_labels,
)
from spectralshell.models.optimizer_state import OptimizerState
from spectralshell.models.state import ModelState, unwrap
from spectralshell.parameter_checks import check_integer, check_real
from spectralshell.statuses import labels_masked
from spectralshell.warning_categories import SnapshotWarning

_MEASURED = ("model", "inputs", "targets", "state", "n_samples", "class_axis", "optimizer")
"""Attributes that a measure depends on."""


class Snapshot:
    """One model state on one batch.

    Parameters
    ----------
    model : torch.nn.Module
        The network. The object is shared between snapshots and never changed; wrappers for data
        parallelism and compilation are taken off.
    inputs : Tensor, array, tuple, or mapping of str to Tensor
        What the model is called with: ``model(inputs)``, ``model(*inputs)`` or
        ``model(**inputs)``. Samples run along the first dimension of the model's outputs, and of
        the inputs that belong to them; others, such as the edges of a graph, may have another
        length. Arrays are copied to tensors.
    targets : Tensor or array, optional
        Class labels or real values, as the residual needs them, samples first. Outputs of shape
        (B, T, V) count tokens, B T of them, with labels and real values alike. A residual that is
        a callable receives them as they are. None takes ``labels`` out of the inputs, a mapping as
        Hugging Face models take it: what is under a zero attention mask is left out, and the labels
        of a model that predicts the next token are moved by one, as its own loss does.
    tau : float, default=0.0
        Effective training time, the sum of learning rates.
    batch : int or str, default=0
        Label of the data batch, the group in cross-validation.
    state : None, mapping, path or Checkpoint, default=None
        None copies the model's present parameters and buffers; a mapping of names to tensors is
        copied; the path of a checkpoint, a file or a folder, or a :class:`Checkpoint` is read when
        it is needed.
    name : str, optional
        A label for runs measured side by side.
    n_samples : int, optional
        Samples of the batch, the first dimension of the model's outputs. None reads it off the
        inputs; where these differ in their first dimension the outputs decide, and what is
        computed in chunks of samples needs it.
    class_axis : int, optional
        Dimension of the model's outputs that counts classes. None reads it off the shape of the
        labels: dimension 1, as torch's own losses have it, or the last one; the last one for
        ``.logits``. Where both fit, it has to be said.
    optimizer : None, torch.optim.Optimizer, mapping or path, default=None
        The optimiser's state that belongs to the model state: its moments are copied from an
        optimiser or its ``state_dict()``; a file of moments that a recorder wrote, or a
        ``state_dict()`` that ``weights_only`` reads, is read when it is needed. Matched to the
        parameters by name. A ``state_dict()`` tells no names unless the optimiser was built on
        ``named_parameters()``: the order of the model's parameters is taken where it has one group
        of all of them, and refused otherwise.
    shift : bool, optional
        Whether the labels are those of the tokens themselves and have to be moved by one: the
        output at a token is then compared with the next token's label. None asks the model's class
        where ``targets`` is None, and moves nothing where they are given.

    Attributes
    ----------
    measures : dict
        Spectral measures already computed on this snapshot, by configuration. They travel with
        pickles.
    n_labels : int or None
        Class labels that count, those that are not −100: of a language model, its tokens.

    Raises
    ------
    TypeError
        If ``model`` is not a module, or inputs, targets, ``batch`` or ``name`` have a wrong type.
    ValueError
        If ``tau`` is not finite, ``name`` is empty, inputs hold no sample, ``state`` or
        ``optimizer`` does not fit the model, or there are no targets: no ``labels`` among the
        inputs, none that count, or a model that does not say whether it predicts the next token.
    FileNotFoundError
        If ``state`` or ``optimizer`` is a path without a file.

    Warns
    -----
    SnapshotWarning
        If ``targets`` are the tokens of the inputs although the model predicts the next ones.

    Notes
    -----
    Memory: one copy of the state for each ``Snapshot(...)``; :func:`make_snapshots` shares one
    copy between batches. Tensors of inputs and targets are not copied: that they were changed in
    place later is detected, and an error at the next measurement. On a GPU that is seen by the
    counters that torch keeps, in main memory by a checksum too. Attributes may be given other
    values; the snapshot then forgets its measures.

    A measurement leaves parameters, buffers, tensor attributes, modes, hooks and random states of
    the model as they were, and what a forward pass writes to lists, dictionaries and closures of
    its modules. Not put back: what objects of other libraries hold, and arrays of NumPy. Threads
    that measure take turns; do not train a model in one thread while another measures it. Settings
    that are not tensors (a scale, a hook, the code) are those of the model at the time of the
    measurement; a change of them is measured anew.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> snapshot = Snapshot(model, torch.ones(4, 3), torch.zeros(4, 2), tau=1.5)
    >>> before = snapshot.load_state()["weight"].clone()
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> bool(torch.equal(snapshot.load_state()["weight"], before))
    True

    A batch with its labels inside, of a model of next tokens:

    >>> batch = {"input": torch.tensor([[2, 0, 1]]), "labels": torch.tensor([[2, 0, -100]])}
    >>> Snapshot(torch.nn.Embedding(3, 3), batch, shift=True).targets
    tensor([[   0, -100, -100]])
    """

    # Of snapshots that were pickled before there were these.
    labels_moved: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any = None,
        *,
        tau: float = 0.0,
        batch: Any = 0,
        state: Any = None,
        name: str | None = None,
        n_samples: int | None = None,
        class_axis: int | None = None,
        optimizer: Any = None,
        shift: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self._given_n_samples = n_samples
        self.model = unwrap(model)
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            raise TypeError(
                f"model: {type(model).__name__} holds a module compiled by torch.jit, whose "
                "parameters cannot be exchanged; pass the model it was compiled from."
            )
        if shift is not None and not isinstance(shift, bool):
            raise TypeError(f"shift must be True, False or None, got {shift!r}.")
        if targets is None and isinstance(inputs, Mapping):
            inputs, targets = self._take_labels(inputs, shift)
        else:
            inputs, targets = _read_pair(self.model, inputs, targets, shift)
        self.inputs, self.targets = inputs, targets
        self.tau = check_real("tau", tau)
        self.batch = _check_batch(batch)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, got {type(name).__name__}.")
        if name == "":
            raise ValueError('name must not be empty, got ""; use None for no name.')
        self.name = name
        self.n_samples = _count_samples(self.inputs, n_samples)
        if class_axis is not None:
            class_axis = check_integer("class_axis", class_axis)
        self.class_axis = class_axis
        self.state = ModelState.from_argument(self.model, state)
        self.optimizer = OptimizerState.from_argument(self.model, optimizer)
        self.measures: dict[Any, Any] = {}
        self._recorded = self._present_data()

    def load_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name, each tied tensor once.

        Returns
        -------
        dict of str to Tensor
            The frozen copy (do not write to it), or what the checkpoint file holds, read now.

        Raises
        ------
        ValueError
            If the file is corrupt, was changed after construction, needs more than tensors to be
            unpickled, or does not fit the model; the message names the keys.
        """
        return self.state.load(self.model)

    def check_unchanged(self) -> None:
        """Raise if inputs or targets were changed in place after construction.

        Raises
        ------
        ValueError
            If any of their tensors was written to.
        """
        for label, record in self._recorded.items():
            if not record.holds(getattr(self, label)):
                raise ValueError(
                    f"{label} of {self!r} were changed in place after the snapshot was made; pass "
                    "a copy to Snapshot, or make the snapshot again."
                )
        self.state.check_unchanged()

    @property
    def n_labels(self) -> int | None:
        """Number of class labels that are not −100; None where targets are something else."""
        if not isinstance(self.targets, Tensor) or self.targets.is_floating_point():
            return None
        return int((self.targets != IGNORED).sum())

    @property
    def label(self) -> str:
        """How messages call the snapshot: by its tau, batch, and name where it has one."""
        return label_of(self.tau, self.batch, self.name)

    def has_same(self, part: str, other: Snapshot) -> bool:
        """Tell whether ``part``, ``"inputs"`` or ``"targets"``, has the values of another's."""
        return self._recorded[part].values() == other._recorded[part].values()

    def _take_labels(self, batch: Mapping[str, Any], shift: bool | None) -> tuple[Any, Any]:
        """Return the inputs and targets of a batch with its labels inside."""
        found = take_labels(self.model, _as_tensors("inputs", batch), shift)
        if found.by_class:
            self.labels_moved = found.moved
        if found.n_masked:
            self.notes = (labels_masked(found.n_masked),)
        return found.inputs, found.targets

    def _present_data(self) -> dict[str, _DataRecord]:
        return {label: _DataRecord.of(getattr(self, label)) for label in ("inputs", "targets")}

    def __setattr__(self, name: str, value: Any) -> None:
        ready = "_recorded" in vars(self)
        if ready and name in ("inputs", "targets"):
            value = _as_tensors(name, value, strict=name == "inputs")
        if ready and name == "optimizer":
            value = OptimizerState.from_argument(self.model, value)
        super().__setattr__(name, value)
        if ready and name in _MEASURED:
            # Of its own: a shallow copy shares the measures of what it was copied from.
            self.measures = {}
            if name == "inputs":
                self.n_samples = _count_samples(self.inputs, self._given_n_samples)
            self._recorded = self._present_data()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_recorded"}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update({"optimizer": None} | attributes)  # old pickles carry none
        # Version counters and addresses are others in an unpickled tensor.
        self._recorded = self._present_data()

    def __repr__(self) -> str:
        label = f", name={self.name!r}" if self.name is not None else ""
        return (
            f"Snapshot({type(self.model).__name__}, n_samples={self.n_samples}, "
            f"tau={self.tau:g}, batch={self.batch!r}{label})"
        )


def _read_pair(model: nn.Module, inputs: Any, targets: Any, shift: bool | None) -> tuple[Any, Any]:
    """Return inputs and targets that were given apart, as tensors."""
    inputs = _as_tensors("inputs", inputs)
    targets = _as_tensors("targets", targets, strict=False)
    if shift:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise TypeError("shift=True moves class labels, and targets are none.")
        targets = move_by_one(targets.long())
    if shift is None and predicts_next_token(model) and repeats_inputs(inputs, targets):
        warnings.warn(
            f"targets are the tokens of the inputs in their places, and {type(model).__name__} "
            "predicts the next ones: its own loss moves labels by one, and this one does not. Pass "
            "the batch with 'labels' inside instead of targets, or shift=True; shift=False says "
            "that they are meant.",
            SnapshotWarning,
            stacklevel=3,
        )
    return inputs, targets


def make_snapshots(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any] | Mapping[str, Any]],
    *,
    tau: float = 0.0,
    state: Any = None,
    name: str | None = None,
    n_samples: int | None = None,
    class_axis: int | None = None,
    optimizer: Any = None,
    shift: bool | None = None,
) -> list[Snapshot]:
    """Take one model state on several batches; the snapshots share one copy of the state.

    Parameters
    ----------
    model : torch.nn.Module
    batches : iterable of (inputs, targets), or of mappings
        A mapping has its ``labels`` inside. The position becomes the snapshot's ``batch``.
    tau : float, default=0.0
        Effective training time of the state.
    state : None, mapping, path or Checkpoint, default=None
        As for :class:`Snapshot`.
    name, n_samples, class_axis, optimizer, shift : optional
        As for :class:`Snapshot`, the same for all of them.

    Returns
    -------
    list of Snapshot

    Raises
    ------
    TypeError, ValueError
        As for :class:`Snapshot`; also if there is no batch.

    Examples
    --------
    >>> import torch
    >>> batches = [(torch.ones(4, 3), torch.zeros(4, 2)) for _ in range(2)]
    >>> first, second = make_snapshots(torch.nn.Linear(3, 2), batches, tau=0.5)
    >>> first.state is second.state, second.batch
    (True, 1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be an iterable of pairs (inputs, targets), or of mappings with 'labels', "
            f"got {type(batches).__name__}; a single batch is [batch]."
        )
    shared = ModelState.from_argument(unwrap(model), state)
    shared_optimizer = OptimizerState.from_argument(unwrap(model), optimizer)
    snapshots = []
    for position, batch in enumerate(batches):
        pair = (batch, None) if isinstance(batch, Mapping) else batch
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"batches[{position}] must be a pair (inputs, targets) or a mapping with 'labels', "
                f"got {type(pair).__name__}."
            )
        snapshots.append(
            Snapshot(
                model,
                pair[0],
                pair[1],
                tau=tau,
                batch=position,
                state=shared,
                name=name,
                n_samples=n_samples,
                class_axis=class_axis,
                optimizer=shared_optimizer,
                shift=shift,
            )
        )
    if not snapshots:
        raise ValueError("batches is empty; pass at least one pair (inputs, targets).")
    return snapshots


def as_snapshots(X: Any) -> list[Snapshot]:
    """Check the samples that an estimator received, and convert tuples.

    Parameters
    ----------
    X : sequence of Snapshot, or of tuples (model, inputs, targets)
        A tuple becomes a snapshot at tau 0 whose batch is its position.

    Returns
    -------
    list of Snapshot

    Raises
    ------
    TypeError
        If ``X`` is not a sequence or holds anything else.
    ValueError
        If ``X`` is empty, or two snapshots have the same tau, batch and name.

    Examples
    --------
    >>> import torch
    >>> pair = (torch.nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, 2))
    >>> [s.batch for s in as_snapshots([pair, pair])]
    [0, 1]
    """
    if isinstance(X, (Snapshot, str, bytes, Mapping)) or not isinstance(X, Iterable):
        raise TypeError(
            f"X must be a list of Snapshot, got {type(X).__name__}; wrap a single one in a list."
        )
    snapshots = [_as_snapshot(item, position) for position, item in enumerate(X)]
    if not snapshots:
        raise ValueError("X is empty; pass at least one Snapshot.")
    seen: dict[tuple[Any, ...], int] = {}
    for position, snapshot in enumerate(snapshots):
        if not math.isfinite(snapshot.tau):
            raise ValueError(f"X[{position}].tau must be finite, got {snapshot.tau!r}.")
        key = (snapshot.tau, snapshot.batch, snapshot.name)
        if key in seen:
            raise ValueError(
                f"X[{seen[key]}] and X[{position}] both have tau={snapshot.tau!r}, "
                f"batch={snapshot.batch!r}, name={snapshot.name!r}; give each snapshot its own "
                "(tau, batch), or name different runs."
            )
        seen[key] = position
    return snapshots


def label_of(tau: float, batch: int | str, name: str | None) -> str:
    """Return what messages call the snapshot of a tau, batch and name."""
    named = "" if name is None else f", name={name!r}"
    return f"snapshot tau={tau:g}, batch={batch!r}{named}"


def warn_of_other_data(snapshots: Sequence[Snapshot]) -> None:
    """Warn (SnapshotWarning) where a batch is not the same data at all times, as of a loader.

    A fit compares the times of one batch; the label says which data it is.
    """
    first: dict[tuple[Any, ...], Snapshot] = {}
    differing: dict[tuple[Any, ...], str] = {}
    for snapshot in snapshots:
        key = (snapshot.batch, snapshot.name)
        other = first.setdefault(key, snapshot)
        for part in ("inputs", "targets"):
            if other is not snapshot and not other.has_same(part, snapshot):
                differing.setdefault(
                    key, f"{part} of {snapshot.label} are not those of tau={other.tau:g}"
                )
    if differing:
        warnings.warn(
            f"{next(iter(differing.values()))}, as from a loader that shuffles"
            + (f"; so in {len(differing)} batches" if len(differing) > 1 else "")
            + ". Measure the same probe batches at every tau, or give other data another batch.",
            SnapshotWarning,
            stacklevel=5,
        )


def _as_snapshot(item: Any, position: int) -> Snapshot:
    if isinstance(item, Snapshot):
        return item
    if isinstance(item, tuple) and len(item) == 3:
        return Snapshot(item[0], item[1], item[2], batch=position)
    raise TypeError(
        f"X[{position}] must be a Snapshot or a tuple (model, inputs, targets), got "
        f"{type(item).__name__}."
    )


def _as_tensors(label: str, value: Any, *, strict: bool = True) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_to_tensor(label, value)
    if isinstance(value, Mapping):
        return {key: _as_tensors(f"{label}[{key!r}]", v, strict=False) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(
            _as_tensors(f"{label}[{position}]", v, strict=False) for position, v in enumerate(value)
        )
    if isinstance(value, list) and label.startswith("targets"):
        return _array_to_tensor(label, np.asarray(value))
    if strict:
        raise TypeError(
            f"{label} must be a tensor, an array, a tuple or a mapping of them, got "
            f"{type(value).__name__}."
        )
    return value


def _array_to_tensor(label: str, array: Any) -> Tensor:
    try:
        # A copy: writes to an array could not be detected.
        return torch.tensor(np.asarray(array))
    except TypeError as error:
        raise TypeError(
            f"{label} has dtype {np.asarray(array).dtype}, which torch has not: pass numbers."
        ) from error


def _check_batch(batch: Any) -> int | str:
    if isinstance(batch, str):
        return str(batch)
    if isinstance(batch, (int, np.integer)) and not isinstance(batch, bool):
        return int(batch)
    raise TypeError(
        f"batch must be an integer or a string, got {batch!r} ({type(batch).__name__})."
    )


def _count_samples(inputs: Any, given: int | None) -> int | None:
    """Return the number of samples, None where only the outputs can tell."""
    lengths = [int(tensor.shape[0]) for tensor in iterate_tensors(inputs) if tensor.ndim]
    if not lengths:
        raise ValueError(
            "inputs hold no tensor with a sample dimension; samples must run along the first one."
        )
    if 0 in lengths:
        raise ValueError("inputs hold no sample (first dimension 0); pass a full batch.")
    if given is not None:
        return check_integer("n_samples", given, low=1)
    # Tensors of length 1, such as position ids, are shared by all samples.
    several = {length for length in lengths if length > 1} or {1}
    return several.pop() if len(several) == 1 else None


@dataclass(frozen=True)
class _DataRecord:
    """What inputs or targets were when a snapshot took them."""

    leaves: tuple[Any, ...]
    # For each leaf: torch's counter of writes, and the address; None for what is no tensor.
    marks: tuple[Any, ...]
    checksums: tuple[Any, ...]

    @classmethod
    def of(cls, data: Any) -> _DataRecord:
        """Record data; of tensors in main memory by their values, at about 2 GB/s."""
        leaves = tuple(_leaves(data))
        return cls(leaves, tuple(map(_mark, leaves)), tuple(map(_checksum, leaves)))

    def values(self) -> tuple[Any, ...]:
        """Return the checksums, now also of tensors on a GPU, which costs their way to the CPU."""
        return tuple(
            _checksum(leaf.cpu()) if isinstance(leaf, Tensor) and leaf.is_cuda else known
            for leaf, known in zip(self.leaves, self.checksums, strict=True)
        )

    def holds(self, data: Any) -> bool:
        """Tell whether data are still the same objects, written to by nobody."""
        leaves = tuple(_leaves(data))
        return (
            len(leaves) == len(self.leaves)
            and all(a is b for a, b in zip(leaves, self.leaves, strict=True))
            and tuple(map(_mark, leaves)) == self.marks
            and tuple(map(_checksum, leaves)) == self.checksums
        )


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield key
            yield from _leaves(value)
    elif isinstance(data, (tuple, list)):
        for value in data:
            yield from _leaves(value)
    else:
        yield data


def _mark(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return None
    # Tensors made under inference_mode keep no version counter.
    return -1 if leaf.is_inference() else leaf._version, leaf.data_ptr(), leaf.shape


def _checksum(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, (str, bool, int, float, complex, type(None))) else ""
    if leaf.device.type != "cpu" or leaf.layout != torch.strided or leaf.is_quantized:
        return ""
    flat = leaf.detach().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
