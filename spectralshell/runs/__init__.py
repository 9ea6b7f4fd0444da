"""Training runs on disk: effective time, the recorder, and a run read as snapshots."""

from spectralshell.runs.recorder import TrainingRecorder
from spectralshell.runs.training_run import TrainingRun

__all__ = ["TrainingRecorder", "TrainingRun"]
