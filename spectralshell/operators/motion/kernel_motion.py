"""A snapshot whose kernel is set in motion: directions, rates of the error and of the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from spectralshell.models.function import Parameters, cast, widen
from spectralshell.models.guard import exclusive
from spectralshell.operators.costs import ROOM, fits, plan_exact, product_cost
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.motion.derivative import (
    DifferenceDerivative,
    ExactDerivative,
    KernelDerivative,
    Points,
    SharedPullBack,
    ZeroDerivative,
    natural_step,
)
from spectralshell.operators.motion.directions import (
    NAMED_DIRECTIONS,
    Direction,
    cross_entropy_flow,
    displacement,
    gradient_flow,
    mapped_direction,
    random_direction,
)
from spectralshell.operators.motion.gates import find_gates, warn_of_gates
from spectralshell.operators.motion.rate import (
    PlainReference,
    build_rate,
    take_reference,
    working_forms,
)
from spectralshell.operators.noise import Rounding, measure_rounding
from spectralshell.operators.problem import Evaluation, halve_until_it_fits
from spectralshell.operators.survey import KernelSurvey
from spectralshell.parameter_checks import check_option, check_real

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


_GRAPHS = 6.0
"""Graphs of f and of its rate, with the tape of f, in those of a forward pass."""

_SHARED_PART = 0.25
"""Part of the memory limit that JᵀU may take."""

METHODS = ("exact", "difference")


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
        self._rounding: Rounding | None = None
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
        with exclusive():
            problem, size = survey.evaluation.problem, self.fitting_chunk
            return assemble_matrix_free(problem, size, evaluation=survey.evaluation, measured=False)

    def kernel(self) -> KernelOperator:
        """Return the matrix-free kernel; its graphs stay until :meth:`close`."""
        if self._kernel is None:
            self._kernel = self.build_kernel(self._survey)
            with exclusive():
                self._evaluation = self._evaluation_in(self._kernel.chunk_size)
        return self._kernel

    def measured(self) -> Rounding:
        """Return the norm and noise of the matrix-free kernel, measured once.

        Cost: about nine products the first time, and three in float64 for float32.
        """
        if self._rounding is None:
            kernel, function = self.kernel(), self._evaluation.problem.function
            with function.guard(), function.installed():
                self._rounding = measure_rounding(kernel.jacobian, self._evaluation)
        return self._rounding

    def rounding(self) -> float:
        """Return the 2-norm of the rounding error of M; 0.0 on the meta device."""
        measured = self.measured()
        return measured.noise * measured.norm

    def differentiate_twice(self, direction: Direction) -> ExactDerivative:
        """Return the exact derivative along a direction."""
        kernel = self.kernel()
        shared = self._shared
        if shared is None:
            shared = self._shared = SharedPullBack(kernel, int(_SHARED_PART * self._max_bytes))
        with exclusive():
            rate, _ = halve_until_it_fits(
                self._evaluation.problem,
                self._evaluation.chunk_size,
                lambda size: self._build_rate(kernel, direction.tangents, size),
            )
        return ExactDerivative(kernel, rate, shared, self.measured)

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

        with function.guard(), function.installed():
            if self._forms is None:
                self._forms = working_forms(evaluation)
            reference = self._reference_for(evaluation)
            return build_rate(evaluation, kernel, tangents, forms=self._forms, reference=reference)

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


class KernelMotion:
    """Directions, and the rates of error and kernel along them; made by :func:`survey_motion`.

    Attributes
    ----------
    survey : KernelSurvey
        Of the snapshot itself.
    residual_vector : Tensor of float64, shape (n,)
        e / √N.
    n, n_rows, n_parameters : int
    parameter_names : tuple of str
    dynamics_exact : bool
        Whether de/dt = −M e along ``"gradient-flow"``.
    device : torch.device
    dtype : torch.dtype
        In which products are computed.
    gates : tuple of str
        Functions with kinks that the model uses; found at the first exact derivative.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        survey: KernelSurvey,
        max_bytes: int,
        generator: torch.Generator | None,
    ) -> None:
        problem = survey.evaluation.problem
        self.survey = survey
        self.residual_vector = survey.evaluation.residual_vector
        self.n = int(self.residual_vector.numel())
        self.n_rows = survey.evaluation.targets.n_rows
        self.n_parameters = problem.function.n_parameters
        self.parameter_names = tuple(problem.function.names)
        self.dynamics_exact = problem.residual.dynamics_exact
        self.device = problem.function.device
        self.dtype = problem.function.dtype
        self._snapshot = snapshot
        self._max_bytes = max_bytes
        self._generator = _own_generator(generator)
        self._flow: Direction | None = None
        self._gates: tuple[str, ...] | None = None
        self._parts = MotionParts(survey, max_bytes)
        self._closed = False

    def direction(
        self,
        spec: str | Snapshot | Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        norm: float | None = None,
    ) -> Direction:
        """Return a direction θ̇.

        Parameters
        ----------
        spec : str, Snapshot or mapping
            ``"gradient-flow"``: of the residual's own loss, as in the table of
            :class:`~spectralshell.residuals.Residual`. ``"cross-entropy"``: minus the gradient of
            the mean cross-entropy of logits, whatever the residual. ``"random"``: Gaussian. A
            snapshot of the same model: from here to there, over the difference of the times if they
            differ (what training did). A mapping of parameter names to tensors: those, and zero for
            the rest. Along every direction the differentiated parameters move alone: frozen ones,
            those that ``parameters`` left out, and buffers such as running statistics stay.
        generator : torch.Generator, optional
            For ``"random"``; by default the motion's own, which nothing else draws from, so that
            each call gives another.
        norm : float, optional
            Scales the direction to this 2-norm; by default ``"random"`` gets that of
            ``"gradient-flow"``, and the others stay as they are. Zero stays zero.

        Raises
        ------
        ValueError, TypeError
            If the specification or a tensor does not fit, or the targets are no class labels.

        Notes
        -----
        Cost: a forward and a backward pass for the first two, once for ``"gradient-flow"``.
        """
        self._check_open()
        if norm is not None:
            norm = check_real("norm", norm, low=0.0)
        with exclusive():
            found = self._find_direction(spec, generator)
        if norm is not None:
            return found.with_norm(norm)
        return found.with_norm(self._gradient_flow().norm) if found.name == "random" else found

    def error_rate(self, direction: Direction) -> Tensor:
        """Return ė, the rate of the residual vector along a direction: float64, shape (n,).

        For ``"mse"`` and ``"brier"`` along ``"gradient-flow"`` it is −M e.
        """
        self._check_direction(direction)
        if direction.norm == 0.0:
            return torch.zeros_like(self.residual_vector)
        return self._parts.kernel().error_jvp(direction.tangents)

    def displaced(self, direction: Direction, amount: float) -> KernelSurvey:
        """Return the survey of θ + amount·θ̇, residual and parameters as here.

        Raises
        ------
        ValueError
            If the outputs there are not finite.

        Notes
        -----
        Cost: one evaluation. What was checked and counted here is taken over.
        """
        self._check_direction(direction)
        function = self.survey.evaluation.problem.function
        with exclusive():
            parameters = tuple(
                cast(widen(p) + amount * widen(t), function.device, function.dtype)
                for p, t in zip(function.parameters, direction.tangents, strict=True)
            )
            return KernelSurvey(self.survey.evaluation.moved(parameters), self.survey.footprint)

    def derivative(
        self, direction: Direction, *, method: str = "exact", step: float | None = None
    ) -> KernelDerivative:
        """Return dM/dt along a direction.

        Parameters
        ----------
        direction : Direction
        method : {"exact", "difference"}, default="exact"
            Differentiating twice, or a central difference.
        step : float, optional
            h of the difference in units of the direction; by default :meth:`default_step`.

        Returns
        -------
        KernelDerivative

        Warns
        -----
        GateWarning
            If ``method="exact"`` and the model uses activations with kinks. Seen are torch's own
            functions; kinks made by ``torch.where``, by products with a comparison, or inside a
            user's own autograd function are not.

        Raises
        ------
        DifferentiationError
            If no way to differentiate the model twice is correct.

        Notes
        -----
        Exact, set up once for all directions: about five products, and reverse mode twice for the
        check. For each direction one recorded graph, about three of a forward pass in memory and
        time, and two of its backward passes for the check. Then, for k columns: ``compress`` takes
        k backward passes of the direction's graph, and k of the model's shared by all directions
        with the same U while JᵀU (k times the parameters) takes less than a quarter of
        ``max_memory``, else k push-forwards; ``matmat`` takes two products with J or Jᵀ and two
        with J̇ or J̇ᵀ for each column; ``to_dense`` is ``compress`` of the identity.
        Difference: two exact kernels for ``to_dense``, or 2 k products of two matrix-free ones.
        """
        self._check_direction(direction)
        check_option("method", method, METHODS)
        if step is not None:
            step = check_real("step", step, low=0.0, low_open=True)
        if direction.norm == 0.0:
            device = self.residual_vector.device
            return ZeroDerivative(self.n, device, method, self.parameter_names)
        if method == "difference":
            return self._difference(direction, step)
        warn_of_gates(list(self.gates), stacklevel=2)
        return self._parts.differentiate_twice(direction)

    def default_step(self, direction: Direction) -> float:
        """Return the step h of a central difference along a direction, in units of the direction.

        Half of J(θ + hθ̇) − J(θ − hθ̇) is about eps^(1/3) of J as seen by one random Jᵀu, and ‖hθ̇‖
        no more than eps^(1/3) ‖θ‖; eps is that of the working dtype. 1.0 where nothing tells one
        step from another: for the zero direction, and on the meta device.

        Notes
        -----
        Cost: a forward and a backward pass of one chunk at θ, and two of each for a trial, at most
        four trials.
        """
        self._check_direction(direction)
        if direction.norm == 0.0:
            return 1.0
        with exclusive():
            return natural_step(self.survey.evaluation, direction, self._parts.fitting_chunk)

    @property
    def gates(self) -> tuple[str, ...]:
        """Functions with kinks that the model uses."""
        if self._gates is None:
            function = self.survey.evaluation.problem.function
            with function.guard():
                self._gates = tuple(find_gates(self.survey.evaluation))
        return self._gates

    def close(self) -> None:
        """Free the recorded graphs; exact derivatives made here end with it."""
        self._closed = True
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"KernelMotion(n={self.n}, n_parameters={self.n_parameters}, dtype={self.dtype})"

    def _find_direction(self, spec: Any, generator: torch.Generator | None) -> Direction:
        problem = self.survey.evaluation.problem
        if isinstance(spec, str):
            check_option("direction", spec, NAMED_DIRECTIONS)
            if spec == "random":
                return random_direction(problem.function, generator or self._generator)
            if spec == "gradient-flow":
                return self._gradient_flow()
            with problem.function.guard():
                return cross_entropy_flow(self.survey.evaluation)
        if isinstance(spec, Mapping):
            return mapped_direction(problem.function, spec)
        if hasattr(spec, "load_state") and hasattr(spec, "tau"):
            return displacement(problem.function, self._snapshot, spec)
        raise TypeError(
            f"direction must be one of {', '.join(map(repr, NAMED_DIRECTIONS))}, a Snapshot, or a "
            f"mapping of parameter names to tensors, got {type(spec).__name__}."
        )

    def _gradient_flow(self) -> Direction:
        if self._flow is None:
            with self.survey.evaluation.problem.function.guard():
                self._flow = gradient_flow(self.survey.evaluation)
        return self._flow

    def _difference(self, direction: Direction, step: float | None) -> DifferenceDerivative:
        parts, footprint = self._parts, self.survey.footprint
        chunk = self.survey.evaluation.problem.chunk_size
        plan = plan_exact(footprint, self._max_bytes, chunk)
        points = Points(
            displaced=lambda amount: self.displaced(direction, amount),
            build=parts.build_kernel,
            plan=plan if fits(plan.peak_bytes, self._max_bytes) else None,
            product_cost=product_cost(footprint, parts.fitting_chunk),
            rounding=parts.rounding,
        )
        step = self.default_step(direction) if step is None else step
        return DifferenceDerivative(self.n, self.residual_vector.device, points, step)

    def _check_direction(self, direction: Direction) -> None:
        self._check_open()
        if not isinstance(direction, Direction):
            raise TypeError(
                f"direction must be a Direction, as KernelMotion.direction() gives it, got "
                f"{type(direction).__name__}."
            )
        parameters = self.survey.evaluation.problem.function.parameters
        shapes = [tangent.shape for tangent in direction.tangents]
        if shapes != [p.shape for p in parameters]:
            raise ValueError(
                "direction: its tangents have other shapes than the parameters; it belongs to "
                "another motion."
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this KernelMotion was closed; survey the snapshot again.")


def _own_generator(given: torch.Generator | None) -> torch.Generator:
    """Return a generator for directions: how many probes were drawn must not change them."""
    seed = 0
    if given is not None:
        seed = int(torch.randint(2**62, (), generator=given, device=given.device))
    return torch.Generator().manual_seed(seed)
