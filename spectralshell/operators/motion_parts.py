"""What the derivatives of a kernel along all directions share."""

from __future__ import annotations

from functools import partial

import torch

from spectralshell.operators.directions import Direction
from spectralshell.operators.double_reference import DoubleReference
from spectralshell.operators.exact_derivative import ExactDerivative, SharedPullBack
from spectralshell.operators.exact_plan import ROOM
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.kernel_problem import Evaluation, halve_until_it_fits
from spectralshell.operators.linearizations import Parameters
from spectralshell.operators.matrix_free import assemble
from spectralshell.operators.model_guard import MODEL_LOCK
from spectralshell.operators.noise import measure_noise
from spectralshell.operators.rate_builder import build_rate
from spectralshell.operators.rate_checks import PlainReference, take_reference, working_forms
from spectralshell.operators.survey import KernelSurvey

_GRAPHS = 6.0
"""Graphs of f and of its rate, with the tape of f, in those of a forward pass."""

_SHARED_PART = 0.25
"""Part of the memory limit that JᵀU may take."""


class MotionParts:
    """The matrix-free kernel of a survey, and what is found once for all of its directions.

    Parameters
    ----------
    survey : KernelSurvey
    max_bytes : int
        Working memory.
    """

    def __init__(self, survey: KernelSurvey, max_bytes: int) -> None:
        self._survey = survey
        self._max_bytes = max_bytes
        self._evaluation = survey.evaluation
        self._kernel: KernelOperator | None = None
        self._shared: SharedPullBack | None = None
        self._forms: dict[str, str] | None = None
        self._reference: tuple[int | None, PlainReference] | None = None

    @property
    def fitting_chunk(self) -> int | None:
        """Samples of a chunk whose graphs fit; None for all."""
        footprint = self._survey.footprint
        size = self._survey.evaluation.chunk_size or footprint.n_samples
        while size > 1 and _GRAPHS * size * footprint.graph_bytes > ROOM * self._max_bytes:
            size = (size + 1) // 2
        return None if size >= footprint.n_samples else size

    def build_kernel(self, survey: KernelSurvey) -> KernelOperator:
        """Build the matrix-free kernel of a survey, its noise not measured."""
        with MODEL_LOCK, torch.inference_mode(False):
            problem, size = survey.evaluation.problem, self.fitting_chunk
            return assemble(problem, size, evaluation=survey.evaluation, measured=False)

    def kernel(self) -> KernelOperator:
        """Return the matrix-free kernel; its graphs stay until :meth:`close`."""
        if self._kernel is None:
            self._kernel = self.build_kernel(self._survey)
            with MODEL_LOCK, torch.inference_mode(False):
                self._evaluation = self._evaluation_in(self._kernel.chunk_size)
        return self._kernel

    def measured_kernel(self) -> KernelOperator:
        """Return the matrix-free kernel with its norm and noise, measured once.

        Cost: about nine products the first time, and three in float64 for float32.
        """
        kernel, problem = self.kernel(), self._evaluation.problem
        if kernel.noise == 0.0:
            reference = DoubleReference(kernel, self._evaluation)
            with MODEL_LOCK, torch.inference_mode(False), problem.function.guard():
                problem.function.installed(
                    None, partial(measure_noise, kernel, problem.draw, reference)
                )
        return kernel

    def rounding(self) -> float:
        """Return the 2-norm of the rounding error of M; 0.0 on the meta device."""
        kernel = self.measured_kernel()
        return kernel.noise * kernel.norm

    def differentiate_twice(self, direction: Direction) -> ExactDerivative:
        """Return the exact derivative along a direction."""
        kernel = self.kernel()
        shared = self._shared
        if shared is None:
            shared = self._shared = SharedPullBack(kernel, int(_SHARED_PART * self._max_bytes))
        with MODEL_LOCK, torch.inference_mode(False):
            rate, _ = halve_until_it_fits(
                self._evaluation.problem,
                self._evaluation.chunk_size,
                lambda size: self._build_rate(kernel, direction.tangents, size),
            )
        return ExactDerivative(kernel, rate, shared, self.measured_kernel)

    def close(self) -> None:
        """Free the recorded graphs."""
        if self._kernel is not None:
            self._kernel.close()
        if self._shared is not None:
            self._shared.close()
        self._reference = None

    def _build_rate(
        self, kernel: KernelOperator, tangents: Parameters, size: int | None
    ) -> KernelOperator:
        evaluation = self._evaluation_in(size)
        function = evaluation.problem.function

        def build() -> KernelOperator:
            if self._forms is None:
                self._forms = working_forms(evaluation)
            reference = self._reference_for(evaluation)
            return build_rate(evaluation, kernel, tangents, forms=self._forms, reference=reference)

        with function.guard():
            rate: KernelOperator = function.installed(None, build)
        return rate

    def _reference_for(self, evaluation: Evaluation) -> PlainReference:
        if self._reference is None or self._reference[0] != evaluation.chunk_size:
            function = evaluation.problem.function
            chunk = next(c for c in evaluation.chunks() if evaluation.count_entries(c))
            reference = take_reference(
                evaluation.vector_function(chunk), function.parameters, evaluation.problem.draw
            )
            self._reference = evaluation.chunk_size, reference
        return self._reference[1]

    def _evaluation_in(self, size: int | None) -> Evaluation:
        for known in (self._evaluation, self._survey.evaluation):
            if known.chunk_size == size:
                return known
        return self._survey.evaluation.problem.evaluate(size)
