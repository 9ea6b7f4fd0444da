"""A snapshot whose kernel is set in motion: directions, rates of the error and of the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from spectralshell.models.function import Parameters
from spectralshell.models.guard import exclusive
from spectralshell.operators.costs import working_bytes
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.motion.derivative import (
    DifferenceDerivative,
    ExactDerivative,
    KernelDerivative,
    SharedKernel,
    ZeroDerivative,
    judge_step,
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
    wrong_forms,
)
from spectralshell.operators.problem import KernelProblem, halve_until_it_fits
from spectralshell.operators.survey import KernelSurvey, survey_kernel
from spectralshell.parameter_checks import check_option, check_real

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot

_METHODS = ("exact", "difference")


def survey_motion(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    max_memory: int | str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelMotion:
    """Evaluate a snapshot whose kernel shall move.

    Parameters
    ----------
    snapshot : Snapshot
    residual, parameters, chunk_size, device, dtype
        As for :func:`~spectralshell.operators.build_kernel`.
    max_memory : int or str, optional
        Bytes of working memory, or a string such as ``"1GB"``; by default 8 GB, or what is free.
    generator : torch.Generator, optional
        For probes and random directions; by default ones with a fixed seed.

    Returns
    -------
    KernelMotion

    Raises
    ------
    ValueError, TypeError
        As :func:`~spectralshell.operators.build_kernel`; ValueError, too, if the outputs do not
        change as the Jacobian of reverse mode says, as with straight-through estimators.

    Notes
    -----
    Cost: that of a survey, two evaluations and a recorded one of two samples. Whatever else is
    needed is computed when it is asked for, and shared by all directions.

    Examples
    --------
    Of a linear network of L layers without biases, the kernel is homogeneous of degree 2 (L − 1) in
    the parameters, so that it grows 2 (L − 1)-fold along them:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> layers = [torch.nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    >>> model = torch.nn.Sequential(*layers)
    >>> with survey_motion(Snapshot(model, x, torch.zeros(4, 3))) as motion:
    ...     direction = motion.direction(dict(model.named_parameters()))
    ...     rate = motion.derivative(direction).to_dense()
    ...     kernel = motion.survey.build_matrix_free(None).to_dense()
    >>> bool(torch.allclose(rate, 2 * kernel))
    True
    """
    survey = survey_kernel(
        snapshot,
        residual=residual,
        parameters=parameters,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
        generator=generator,
    )
    return KernelMotion(snapshot, survey, max_memory=max_memory, generator=generator)


def build_kernel_derivative(
    snapshot: Snapshot,
    direction: str | Snapshot | Mapping[str, Any] = "gradient-flow",
    *,
    method: str = "exact",
    step: float | None = None,
    norm: float | None = None,
    **options: Any,
) -> KernelDerivative:
    """Return dM/dt of a snapshot along one direction.

    For several directions, :func:`survey_motion` shares what they have in common.

    Parameters
    ----------
    snapshot : Snapshot
    direction, norm
        As for :meth:`KernelMotion.direction`.
    method, step
        As for :meth:`KernelMotion.derivative`.
    **options
        As for :func:`survey_motion`.

    Returns
    -------
    KernelDerivative

    Examples
    --------
    The kernel of a model that is linear in its parameters does not move:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.ones(2, 3)
    >>> rate = build_kernel_derivative(Snapshot(torch.nn.Linear(3, 1), x, torch.zeros(2, 1)))
    >>> rate.to_dense().abs().max().item(), rate.status
    (0.0, 'frozen kernel')
    """
    motion = survey_motion(snapshot, **options)
    return motion.derivative(motion.direction(direction, norm=norm), method=method, step=step)


class KernelMotion:
    """Directions, and the rates of error and kernel along them; made by :func:`survey_motion`.

    Attributes
    ----------
    survey : KernelSurvey
        The snapshot, evaluated and its costs counted: its kernel is built from it.
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
        *,
        max_memory: int | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        problem = survey.evaluation.problem
        _check_derivative(problem)
        self.survey = survey
        self.residual_vector = survey.evaluation.residual_vector
        self.n = int(self.residual_vector.numel())
        self.n_rows = survey.evaluation.targets.n_rows
        self.n_parameters = problem.function.n_parameters
        self.parameter_names = tuple(problem.function.names)
        self.dynamics_exact = problem.dynamics_exact
        self.device = problem.function.device
        self.dtype = problem.function.dtype
        self._snapshot = snapshot
        self._generator = _own_generator(generator)
        self._shared = SharedKernel(survey, working_bytes(max_memory, self.device))
        self._refused: dict[str, str] | None = None
        self._reference: PlainReference | None = None

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
        self._shared.check_open()
        if norm is not None:
            norm = check_real("norm", norm, low=0.0)
        with exclusive():
            found = self._find_direction(spec, generator)
        if norm is not None:
            return found.with_norm(norm)
        return found.with_norm(self._gradient_flow.norm) if found.name == "random" else found

    def error_rate(self, direction: Direction) -> Tensor:
        """Return ė, the rate of the residual vector along a direction: float64, shape (n,).

        For ``"mse"`` and ``"brier"`` along ``"gradient-flow"`` it is −M e.
        """
        self._check_direction(direction)
        if direction.norm == 0.0:
            return torch.zeros_like(self.residual_vector)
        return self._shared.operator.error_jvp(direction.tangents)

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
        return self._shared.displaced(direction, amount)

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
        check_option("method", method, _METHODS)
        if step is not None:
            step = check_real("step", step, low=0.0, low_open=True)
        if direction.norm == 0.0:
            return ZeroDerivative(self.residual_vector, method, self.parameter_names)
        if method == "difference":
            step = self.default_step(direction) if step is None else step
            return DifferenceDerivative(self._shared, direction, step)
        warn_of_gates(list(self.gates), stacklevel=2)
        return ExactDerivative(self._shared, self._rate(direction))

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
            return natural_step(self.survey.evaluation, direction, self._shared.chunk_size)

    def step_fault(self, direction: Direction, step: float) -> str:
        """Return ``"ok"``, or the status of a step that is too long, or lost in rounding.

        Notes
        -----
        As seen by one random Jᵀu. Cost: that of :meth:`default_step`, and five forward and backward
        passes of one chunk.
        """
        self._check_direction(direction)
        with exclusive():
            evaluation = self.survey.evaluation
            return judge_step(evaluation, direction, step, self._shared.chunk_size)

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """Functions with kinks that the model uses."""
        with self.survey.evaluation.problem.function.guard():
            return tuple(find_gates(self.survey.evaluation))

    def close(self) -> None:
        """Free the recorded graphs; derivatives made here end with it."""
        self._shared.close()
        self._reference = None

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
                return self._gradient_flow
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

    @cached_property
    def _gradient_flow(self) -> Direction:
        with self.survey.evaluation.problem.function.guard():
            return gradient_flow(self.survey.evaluation)

    def _rate(self, direction: Direction) -> KernelOperator:
        """Return J̇ along a direction, in the chunks of M, or smaller ones where memory runs out."""
        kernel, evaluation = self._shared.operator, self._shared.evaluation
        rate: KernelOperator
        with exclusive():
            rate, _ = halve_until_it_fits(
                evaluation.problem,
                evaluation.chunk_size,
                partial(self._rate_in, kernel, direction.tangents),
            )
        return rate

    def _rate_in(
        self, kernel: KernelOperator, tangents: Parameters, size: int | None
    ) -> KernelOperator:
        evaluation = self._shared.evaluation_in(size)
        function = evaluation.problem.function
        with function.guard(), function.installed():
            if self._refused is None:
                self._refused = wrong_forms(evaluation)
            if self._reference is None or self._reference.chunk_size != evaluation.chunk_size:
                self._reference = take_reference(evaluation)
            return build_rate(
                evaluation, kernel, tangents, refused=self._refused, reference=self._reference
            )

    def _check_direction(self, direction: Direction) -> None:
        self._shared.check_open()
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


def _check_derivative(problem: KernelProblem) -> None:
    """Raise ValueError if ė and dM/dt would be those of a derivative that the outputs lack."""
    if problem.jacobian_defect:
        raise ValueError(
            f"model: the outputs of {type(problem.function.model).__name__} do not change as its "
            f"reverse-mode Jacobian says (they differ by {problem.jacobian_defect:.1e}), so "
            "neither the rate of its kernel nor a balance of energies can be measured, by no "
            "derivative or step: it rounds, detaches, scales or reverses gradients inside. "
            "Differentiate the model without that, or measure energies alone with "
            "ShellEnergyEstimator."
        )


def _own_generator(given: torch.Generator | None) -> torch.Generator:
    """Return a generator for directions: how many probes were drawn must not change them."""
    seed = 0
    if given is not None:
        seed = int(torch.randint(2**62, (), generator=given, device=given.device))
    return torch.Generator().manual_seed(seed)
