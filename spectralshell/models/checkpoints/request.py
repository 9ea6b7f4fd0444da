"""A checkpoint that is asked for: its place, and what to take of it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and which of the weights in it are meant; pass it as ``state`` of a snapshot.

    A path alone does where nothing has to be said: ``state="out/checkpoint-500"``.

    Parameters
    ----------
    path : path or str
        A file of safetensors or ``torch.save``, an index of shards, a ``.ckpt`` of Lightning, a
        folder that ``save_pretrained``, a Trainer, peft or ``torch.distributed.checkpoint``
        wrote, or a model of the hub with its revision, ``"org/model@step1000"``.
    key : str, optional
        Where the weights lie in a file that holds more: ``"ema"``, or ``"trainer.ema"`` for a
        dictionary within one. None looks under the usual names.
    prefix : str, optional
        What the names of the weights begin with in the file and not in the model; it is taken off,
        and what does not begin with it is left out. ``""`` takes off nothing. None takes off usual
        ones (``module.``, ``_orig_mod.``, ``_forward_module.``, ``model.``,
        ``base_model.model.``) where all names then fit the model.
    keep : int, optional
        Revisions of a hub model that stay in the cache, of those that this process fetched; older
        ones are deleted before the next is fetched. What was there before stays. None keeps all.

    Raises
    ------
    TypeError, ValueError
        If a parameter has a wrong type or value. The path is looked at when a snapshot is made.

    Examples
    --------
    >>> import tempfile, torch
    >>> from spectralshell import Snapshot
    >>> model, path = torch.nn.Linear(3, 2), tempfile.mkstemp(suffix=".pt")[1]
    >>> torch.save({"ema": {"net.weight": torch.ones(2, 3), "net.bias": torch.ones(2)}}, path)
    >>> state = Checkpoint(path, key="ema", prefix="net.")
    >>> snapshot = Snapshot(model, torch.ones(4, 3), torch.zeros(4, 2), state=state)
    >>> snapshot.load_state()["bias"].tolist()
    [1.0, 1.0]
    """

    path: str | os.PathLike[str]
    key: str | None = None
    prefix: str | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(f"path must be a path or str, got {type(self.path).__name__}.")
        object.__setattr__(self, "path", os.fspath(self.path))
        for name in ("key", "prefix"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None, got {type(value).__name__}.")
        if self.key == "":
            raise ValueError('key must not be empty, got ""; use None for the usual names.')
        if self.keep is not None and (
            isinstance(self.keep, bool) or not isinstance(self.keep, int)
        ):
            raise TypeError(f"keep must be an integer or None, got {type(self.keep).__name__}.")
        if self.keep is not None and self.keep < 1:
            raise ValueError(
                f"keep must be at least 1, got {self.keep}; a revision is in the cache while it "
                "is read."
            )
