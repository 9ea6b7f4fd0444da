"""The recorder as a callback of ``transformers.Trainer``."""

from __future__ import annotations

import os
from typing import Any

from spectralshell.runs.recorder import TrainingRecorder

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "the callback for transformers.Trainer needs transformers: pip install "
        "'spectralshell[transformers]'."
    ) from error

__all__ = ["TrainingRecorderCallback"]


class TrainingRecorderCallback(TrainerCallback):
    """Record the run of a ``transformers.Trainer``.

    Parameters
    ----------
    directory : path
        Where the run is written.
    **options : optional
        As for :class:`~spectralshell.runs.TrainingRecorder`: ``states``, ``tau``, ``moments``,
        ``max_bytes``, ``max_overhead``, ``estimator``, ``probe_batches``, ``name``, ``resume``,
        ``overwrite``.

    Raises
    ------
    TypeError, ValueError
        As for the recorder, when training begins.

    Notes
    -----
    What counts is the rate that each step used, while ``lr`` in the logs of a Trainer and in
    ``on_step_end`` may be that of the next one. A Trainer that resumes from a checkpoint goes on
    with the run in the directory. ``loss`` and ``grad_norm`` of the history are those that the
    Trainer logs, every ``logging_steps``: the loss is a mean since the log before. ``tokens`` are
    those of a step, with ``include_num_input_tokens_seen``.

    Examples
    --------
    >>> from spectralshell.runs.callbacks.transformers import TrainingRecorderCallback
    >>> callback = TrainingRecorderCallback("runs/a", states="every:500")
    >>> callback.recorder is None  # until training begins
    True
    """

    def __init__(self, directory: str | os.PathLike[str], **options: Any) -> None:
        self._directory = directory
        self._options = options
        self._tokens = 0
        self._ended = False
        self.recorder: TrainingRecorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Open the recorder on the model and optimiser as they are restored."""
        options = dict(self._options)
        if state.global_step:
            options["resume"] = True
        elif self.recorder is not None and self.recorder.abandon() == 0:
            options["overwrite"] = True  # a smaller batch is tried after memory ran out
        self.recorder = TrainingRecorder(
            about["model"], about["optimizer"], self._directory, **options
        )
        self.recorder.open(fallback_step=state.global_step or None)
        self._ended = False
        self._tokens = state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take down the tokens of the step, where the Trainer counts them."""
        tokens, self._tokens = (
            state.num_input_tokens_seen - self._tokens,
            state.num_input_tokens_seen,
        )
        if self.recorder is not None and tokens:
            self.recorder.log(tokens=tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take down what the Trainer has read by itself."""
        if self.recorder is not None and logs and "loss" in logs:
            self.recorder.log(loss=logs["loss"], grad_norm=logs.get("grad_norm"))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring the history up to the checkpoint, so that a run can go on from it."""
        if self.recorder is not None:
            self.recorder.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the last state before the Trainer may load the best one."""
        if self.recorder is not None and control.should_training_stop:
            self.recorder.keep_last()
            self._ended = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the recorder; the model may be the best one by now, not the last."""
        if self.recorder is not None and (self._ended or args.load_best_model_at_end):
            self.recorder.abandon()
        elif self.recorder is not None:
            self.recorder.close()
