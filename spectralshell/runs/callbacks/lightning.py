"""The recorder as a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from torch import nn

from spectralshell.runs.recorder import TrainingRecorder

_NAMES = ("lightning.pytorch", "pytorch_lightning")
"""The library has two names; a Trainer of one takes no callback of the other."""


def _callback_class() -> Any:
    """Return the base class of the name that the user has imported, else of one installed."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    raise ImportError(
        "the callback for Lightning needs lightning: pip install 'spectralshell[lightning]'."
    )


_Callback: Any = _callback_class()

__all__ = ["TrainingRecorderCallback"]


class TrainingRecorderCallback(_Callback):
    """Record the run of a Lightning ``Trainer``.

    Parameters
    ----------
    directory : path
        Where the run is written.
    model : torch.nn.Module, optional
        The part of the LightningModule that is recorded, such as its network. None records the
        whole.
    optimizer : int, optional
        Which optimiser is followed, where ``configure_optimizers`` gives several.
    **options : optional
        As for :class:`~spectralshell.runs.TrainingRecorder`: ``states``, ``tau``, ``moments``,
        ``max_bytes``, ``max_overhead``, ``estimator``, ``probe_batches``, ``name``, ``resume``,
        ``overwrite``.

    Raises
    ------
    TypeError, ValueError
        As for the recorder, when training begins; also where there are several optimisers.

    Notes
    -----
    Works with ``lightning.pytorch`` and with ``pytorch_lightning``, whichever was imported first.
    A fit with ``ckpt_path`` goes on with the run in the directory. ``loss`` of the history is the
    mean over the micro-batches of a step.

    Examples
    --------
    >>> from spectralshell.runs.callbacks.lightning import TrainingRecorderCallback
    >>> callback = TrainingRecorderCallback("runs/a", states="every:500")
    >>> callback.recorder is None  # until training begins
    True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        optimizer: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._options = options
        self._loss: Any = None
        self._step = 0
        self.recorder: TrainingRecorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recorder on the model and optimiser as they are restored."""
        options = dict(self._options)
        if trainer.global_step:
            options["resume"] = True
        model = pl_module if self._model is None else self._model
        optimizer = _chosen(trainer.optimizers, self._optimizer)
        self.recorder = TrainingRecorder(model, optimizer, self._directory, **options)
        self.recorder.open(fallback_step=trainer.global_step or None)
        self._step, self._loss = trainer.global_step, None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Add up the loss of the micro-batches of a step; nothing waits for the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            loss = loss.detach()
            self._loss = loss.clone() if self._loss is None else self._loss + loss
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self.recorder is not None:
                self.recorder.log(loss=self._loss)
            self._loss = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Bring the history up to the checkpoint, so that a run can go on from it."""
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the recorder."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what is in memory after a failure or an interrupt."""
        if self.recorder is not None:
            self.recorder.abandon()


def _chosen(optimizers: list[Any], position: int | None) -> Any:
    if position is None and len(optimizers) != 1:
        raise ValueError(
            f"optimizer: the module has {len(optimizers)} optimisers; pass optimizer=, the "
            "position of the one whose steps count."
        )
    return optimizers[position or 0]
