"""dM/dt along a direction: by differentiating twice, or by a central difference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from spectralshell.models.function import Parameters, cast, widen
from spectralshell.models.guard import exclusive, full_precision
from spectralshell.operators.costs import ROOM, ExactPlan, fits, plan_exact, product_cost
from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.jacobian.linearizations import PullBack
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.layers.units import WHOLE, resolve_layers
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.motion.directions import Direction, moved_parameters
from spectralshell.operators.motion.rate import ZeroRate
from spectralshell.operators.noise import Rounding, measure_rounding
from spectralshell.operators.problem import Chunk, Evaluation
from spectralshell.operators.survey import KernelSurvey
from spectralshell.statuses import (
    FROZEN_KERNEL,
    OK,
    STEP_TOO_LONG,
    STEP_TOO_SHORT,
    ZERO_DIRECTION,
)

Layers = str | Mapping[str, str] | Callable[[str], str]

_GRAPHS = 6.0
"""Graphs of f and of its rate, with the tape of f, in those of a forward pass."""

_SHARED_PART = 0.25
"""Part of the memory limit that JᵀU may take."""

_SETUP_PRODUCTS = 8.0
"""What the test of the ladder costs before a first product."""

_NORM_STEPS = 3
"""Of the power method, for ‖J̇‖."""

_TRIALS = 4
"""Steps of a difference that are tried before the last is taken."""

_TOO_FAR = 2.0
"""Change of J, in units of the wanted one, above which a trial is followed by a shorter one."""


_STEP_TOLERANCE = 0.05
"""Part of a rate that the step of its difference may change, or rounding."""

_ROUNDINGS = 4.0
"""Roundings of Jᵀu, in its norm, that the difference of two may hold."""


class KernelDerivative(ABC):
    """dM/dt = J̇Jᵀ + JJ̇ᵀ along a direction, symmetric and in general indefinite.

    Made by :meth:`KernelMotion.derivative` or :func:`build_kernel_derivative`. J̇ is the Jacobian of
    t(θ) = J(θ) θ̇ with θ̇ held fixed.

    Attributes
    ----------
    n : int
        Entries of the residual: the dimension of M.
    method : str
        ``"exact"`` or ``"difference"``.
    step : float
        h of the central difference, in units of the direction; 0.0 for the exact one.
    n_products : int
        Products with J, Jᵀ, J̇ or J̇ᵀ so far, one for each column; none for what exact kernels gave.
    is_zero : bool
        Whether dM/dt is known to vanish; ``status`` says why.
    status : str
        ``"ok"``, ``"zero direction"``, ``"frozen kernel"`` (J does not depend on the parameters
        along the direction; a difference finds out with its first matrix or compression), or what
        else to know.
    """

    method: str

    def __init__(self, error: Tensor) -> None:
        self.n = int(error.numel())
        self.step = 0.0
        self.n_products = 0
        self.is_zero = False
        self.status = OK
        self._device = error.device
        self._dense: Tensor | None = None

    @cached_property
    def noise(self) -> float:
        """2-norm of the rounding error of dM/dt, in its own units; 0.0 on the meta device.

        No entry of Uᵀ (dM/dt) U with orthonormal U, and no column's norm, is wrong by more. With η
        the noise of M, as of :class:`KernelOperator`, it is η ‖M‖ / (√2 h) for a difference, the
        error of two independent kernels over 2h, and 2 η ‖J‖ ‖J̇‖ for the exact derivative. What a
        difference leaves out in h², and the gates that an exact derivative misses, are not in it.

        Notes
        -----
        An estimate: it may be too large by a few times. Cost: once for all directions of a motion,
        at the first reading, about nine products of M, three more in float64 for float32, and five
        where no exact derivative was made before; of an exact derivative also six products with J̇
        or J̇ᵀ.
        """
        return self._measure_noise()

    def matvec(self, vector: Tensor) -> Tensor:
        """Return (dM/dt) v in float64, shape (n,), for v of shape (n,)."""
        if vector.ndim != 1:
            raise ValueError(f"the operand has shape {tuple(vector.shape)}, expected ({self.n},).")
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        """Return (dM/dt) V in float64, shape (n, k), for V of shape (n, k)."""
        block = self._checked(block)
        if self._dense is None and self._prefers_dense(block.shape[1]):
            self.to_dense()
        if self._dense is not None:
            return self._dense @ block
        return self._multiply(block)

    def compress(self, block: Tensor) -> Tensor:
        """Return V = Uᵀ (dM/dt) U in float64, shape (k, k), for U of shape (n, k).

        Symmetric to the last bit. U need not be orthonormal.
        """
        block = self._checked(block)
        if self._dense is None and self._prefers_dense(block.shape[1]):
            self.to_dense()
        if self._dense is None:
            return self._compress(block)
        half = block.T @ (self._dense @ block)
        return (half + half.T) / 2

    def to_dense(self) -> Tensor:
        """Return dM/dt as a float64 tensor of shape (n, n); computed once."""
        if self._dense is None:
            self._dense = self._build_dense()
        return self._dense.clone()

    @abstractmethod
    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt.

        Parameters
        ----------
        layers : {"module", "parameter"}, mapping or callable
            As for :func:`build_exact_kernel`.
        """

    @abstractmethod
    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""

    def close(self) -> None:  # noqa: B027  zero holds nothing to free
        """Free what the products need; the dense form stays if it was computed."""

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
        return f"{type(self).__name__}(n={self.n}, method={self.method!r}, status={self.status!r})"

    @abstractmethod
    def _measure_noise(self) -> float: ...

    @abstractmethod
    def _prefers_dense(self, n_columns: int) -> bool:
        """Tell whether the dense form is cheaper than products with some columns."""

    @abstractmethod
    def _multiply(self, block: Tensor) -> Tensor: ...

    @abstractmethod
    def _compress(self, block: Tensor) -> Tensor: ...

    @abstractmethod
    def _build_dense(self) -> Tensor: ...

    def _identity(self) -> Tensor:
        return torch.eye(self.n, dtype=torch.float64, device=self._device)

    def _checked(self, block: Tensor) -> Tensor:
        if block.ndim != 2 or block.shape[0] != self.n:
            raise ValueError(
                f"the operand has shape {tuple(block.shape)}, expected ({self.n}, k): one entry "
                "for each row and output of the residual."
            )
        return block.detach().to(self._device, torch.float64)


class ZeroDerivative(KernelDerivative):
    """dM/dt along a direction that is zero."""

    def __init__(self, error: Tensor, method: str, parameter_names: Sequence[str]) -> None:
        super().__init__(error)
        self.method = method
        self.is_zero = True
        self.status = ZERO_DIRECTION
        self._names = parameter_names

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return zeros for each label."""
        label_of = resolve_layers(layers, self._names)
        return {label_of(name): self._build_dense() for name in self._names}

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return zeros of shape (n,)."""
        return self._checked(vector[:, None])[:, 0] * 0.0

    def _measure_noise(self) -> float:
        return 0.0

    def _prefers_dense(self, n_columns: int) -> bool:
        return False

    def _multiply(self, block: Tensor) -> Tensor:
        return torch.zeros_like(block)

    def _compress(self, block: Tensor) -> Tensor:
        return block.new_zeros(block.shape[1], block.shape[1])

    def _build_dense(self) -> Tensor:
        return torch.zeros_like(self._identity())


class ExactDerivative(KernelDerivative):
    """dM/dt = J̇Jᵀ + JJ̇ᵀ with J̇ by differentiating t(θ) = J(θ) θ̇; ``rate`` is J̇J̇ᵀ."""

    method = "exact"

    def __init__(self, shared: SharedKernel, rate: KernelOperator) -> None:
        super().__init__(rate.residual_vector)
        self._shared = shared
        self._rate = rate
        # "jvp", reverse through forward mode; "double-vjp", reverse mode twice; "zero", constant J.
        self.form = rate.rung
        if all(isinstance(part.linearization, ZeroRate) for part in rate.jacobian.parts):
            self.is_zero = True
            self.status = FROZEN_KERNEL

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt."""
        halves = self._cross(self._identity(), resolve_layers(layers, self._rate.parameter_names))
        return {label: half + half.T for label, half in halves.items()}

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""
        self.n_products += 2
        return self._rate.matvec(vector)

    def close(self) -> None:
        """Free the graph of this direction; products are errors afterwards."""
        self._rate.close()

    def _measure_noise(self) -> float:
        if self.is_zero or self._device.type == "meta":
            return 0.0
        # J and J̇ each lose about half of what M does, and each stands in both terms.
        rounding = self._shared.rounding
        return 2.0 * rounding.noise * math.sqrt(rounding.norm * self._rate_norm())

    def _rate_norm(self) -> float:
        """Return ‖J̇J̇ᵀ‖, from below, by steps of the power method."""
        generator = torch.Generator().manual_seed(0)
        vector = self._checked(torch.randn(self.n, 1, generator=generator))[:, 0]
        norm = 0.0
        for _ in range(_NORM_STEPS):
            size = float(vector.norm())
            if not 0.0 < size < math.inf:
                break
            vector = self.rate_gram(vector / size)
            norm = max(norm, float(vector.norm()))
        return norm

    def _prefers_dense(self, n_columns: int) -> bool:
        return n_columns >= self.n

    def _multiply(self, block: Tensor) -> Tensor:
        kernel, rate = self._shared.operator, self._rate
        images = []
        for column in block.T:
            first = rate.jvp(kernel.rmatvec(column))
            images.append(first + kernel.jvp(rate.rmatvec(column)))
        self.n_products += 4 * len(images)
        return torch.stack(images, dim=1) if images else torch.zeros_like(block)

    def _compress(self, block: Tensor) -> Tensor:
        half = self._cross(block, resolve_layers(None, ()))[WHOLE]
        return half + half.T

    def _build_dense(self) -> Tensor:
        return self._compress(self._identity())

    def _cross(self, block: Tensor, label_of: Callable[[str], str]) -> dict[str, Tensor]:
        self.n_products += block.shape[1] + self._shared.n_pulls(block)
        return self._shared.cross(block, self._rate, label_of)


class DifferenceDerivative(KernelDerivative):
    """dM/dt = (M(θ + hθ̇) − M(θ − hθ̇)) / 2h, with exact kernels where they fit.

    Known to be zero from when the two kernels were seen to be equal in every bit.
    """

    method = "difference"

    def __init__(self, shared: SharedKernel, direction: Direction, step: float) -> None:
        survey, max_bytes = shared.survey, shared.max_bytes
        super().__init__(survey.evaluation.residual_vector)
        self.step = step
        self._shared = shared
        self._direction = direction
        plan = plan_exact(survey.footprint, max_bytes, survey.evaluation.problem.chunk_size)
        self._plan = plan if fits(plan.peak_bytes, max_bytes) else None
        self._product_cost = product_cost(survey.footprint, shared.chunk_size)
        self._operators: list[KernelOperator] = []

    def layers(self, layers: Layers = "module") -> dict[str, Tensor]:
        """Return dM_l/dt for each label, float64 of shape (n, n); they sum to dM/dt."""
        if self._plan is None:
            raise ValueError(
                "max_memory: the exact kernels whose layers are compared do not fit; allow more, "
                "take fewer samples, or differentiate exactly (derivative='exact' of an estimator)."
            )
        plus, minus = self._exact_kernels(self._plan, layers)
        return {
            label: self._quotient(kernel, minus.layers[label])
            for label, kernel in plus.layers.items()
        }

    def rate_gram(self, vector: Tensor) -> Tensor:
        """Return J̇J̇ᵀ v in float64, shape (n,): its largest eigenvalue is ‖dJ/dt‖²."""
        plus, minus = self._kernels()
        pulled = zip(plus.rmatvec(vector), minus.rmatvec(vector), strict=True)
        tangents = [(a - b) / (2.0 * self.step) for a, b in pulled]
        self.n_products += 4
        return self._quotient(plus.jvp(tangents), minus.jvp(tangents))

    def close(self) -> None:
        """Free the graphs at the two points; they are recorded again when needed."""
        for operator in self._operators:
            operator.close()
        self._operators = []

    def _prefers_dense(self, n_columns: int) -> bool:
        if self._plan is None:
            return False
        products = n_columns + (0.0 if self._operators else _SETUP_PRODUCTS)
        return self._plan.kernel_cost <= products * self._product_cost

    def _multiply(self, block: Tensor) -> Tensor:
        plus, minus = self._kernels()
        self.n_products += 4 * block.shape[1]
        return self._quotient(plus.matmat(block), minus.matmat(block))

    def _compress(self, block: Tensor) -> Tensor:
        product = self._multiply(block)
        if _is_zero(product):  # for this block: a random vector tells whether for all
            probe = torch.randn(self.n, 1, generator=torch.Generator().manual_seed(0))
            self._note_if_frozen(self._multiply(self._checked(probe)))
        half = block.T @ product
        return (half + half.T) / 2

    def _build_dense(self) -> Tensor:
        if self._plan is not None:
            plus, minus = self._exact_kernels(self._plan, None)
            difference = self._quotient(plus.matrix, minus.matrix)
        else:
            operators = self._kernels()
            self.n_products += 4 * self.n
            difference = self._quotient(*(operator.to_dense() for operator in operators))
        self._note_if_frozen(difference)
        return (difference + difference.T) / 2

    def _measure_noise(self) -> float:
        # Two errors that know nothing of each other, over 2h.
        rounding = self._shared.rounding
        return rounding.noise * rounding.norm / (math.sqrt(2.0) * self.step)

    def _note_if_frozen(self, product: Tensor) -> None:
        if _is_zero(product):
            self.is_zero = True
            self.status = FROZEN_KERNEL

    def _kernels(self) -> list[KernelOperator]:
        if not self._operators:
            self._operators = [self._shared.build(end) for end in self._ends()]
        return self._operators

    def _exact_kernels(self, plan: ExactPlan, layers: Layers | None) -> list[ExactKernel]:
        kernels = []
        for end in self._ends():
            with end.build_exact(plan, layers) as kernel:
                kernels.append(kernel)
                self.n_products += 2 * kernel.n_matvecs
        return kernels

    def _ends(self) -> Iterator[KernelSurvey]:
        for sign in (1, -1):
            yield self._shared.displaced(self._direction, sign * self.step)

    def _quotient(self, plus: Tensor, minus: Tensor) -> Tensor:
        return (widen(plus) - widen(minus)) / (2.0 * self.step)


def _is_zero(product: Tensor) -> bool:
    return not product.is_meta and product.numel() > 0 and not bool(product.any())


class SharedKernel:
    """M at θ, matrix-free, for all directions of a motion: built when first needed."""

    def __init__(self, survey: KernelSurvey, max_bytes: int) -> None:
        self.survey = survey
        self.max_bytes = max_bytes
        self.chunk_size = _fitting_chunk(survey, max_bytes)
        self._block: Tensor | None = None
        self._pulled: Parameters = ()
        self._closed = False

    @cached_property
    def operator(self) -> KernelOperator:
        """M; its graphs stay until :meth:`close`."""
        return self.build(self.survey)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation in the chunks of the operator, which may be smaller than planned."""
        return _in_chunks(self.survey.evaluation, self.operator.chunk_size)

    def build(self, survey: KernelSurvey) -> KernelOperator:
        """Build the kernel of a survey in chunks that fit, without measuring its noise."""
        evaluation = survey.evaluation
        with exclusive():
            return assemble_matrix_free(
                evaluation.problem, self.chunk_size, evaluation=evaluation, measured=False
            )

    def evaluation_in(self, size: int | None) -> Evaluation:
        """Return the evaluation in chunks of ``size`` samples."""
        known = self.evaluation
        return known if known.chunk_size == size else _in_chunks(self.survey.evaluation, size)

    @cached_property
    def rounding(self) -> Rounding:
        """Norm and noise of M: about nine products the first time, for float32 more in float64."""
        jacobian, function = self.operator.jacobian, self.evaluation.problem.function
        with function.guard(), function.installed():
            return measure_rounding(jacobian, self.evaluation)

    def displaced(self, direction: Direction, amount: float) -> KernelSurvey:
        """Return the survey of θ + amount·θ̇; what was checked and counted here is taken over."""
        self.check_open()
        here = self.survey.evaluation
        with exclusive():
            there = here.moved(moved_parameters(here.problem.function, direction, amount))
        return KernelSurvey(there, self.survey.footprint)

    def cross(
        self, block: Tensor, rate: KernelOperator, label_of: Callable[[str], str]
    ) -> dict[str, Tensor]:
        """Return UᵀJ_l J̇_lᵀU for each label, float64 of shape (k, k).

        For k columns k products with J̇ᵀ, and k with Jᵀ, or with J for each label without JᵀU.
        """
        names = self.operator.parameter_names
        n_columns = block.shape[1]
        found = {label_of(name): block.new_zeros(n_columns, n_columns) for name in names}
        pulled = self._pull(block)
        for columns, tangents in rate.rmatmat(block):
            if pulled:
                with full_precision(self.operator.device):
                    for name, left, right in zip(names, pulled, tangents, strict=True):
                        product = _rows(left) @ _rows(right).T
                        found[label_of(name)][:, columns] += widen(product)
                continue
            for label, total in found.items():
                mine = tuple(
                    tangent if label_of(name) == label else torch.zeros_like(tangent)
                    for name, tangent in zip(names, tangents, strict=True)
                )
                for offset, column in enumerate(range(columns.start, columns.stop)):
                    image = self.operator.jvp([tangent[offset] for tangent in mine])
                    total[:, column] = block.T @ image
        return found

    def n_pulls(self, block: Tensor) -> int:
        """Return the products with J or Jᵀ that :meth:`cross` needs for a block."""
        return 0 if self._is_kept(block) else int(block.shape[1])

    def check_open(self) -> None:
        """Raise ValueError after :meth:`close`."""
        if self._closed:
            raise ValueError("this KernelMotion was closed; survey the snapshot again.")

    def close(self) -> None:
        """Free the recorded graphs, and JᵀU."""
        self._closed = True
        if "operator" in vars(self):  # it was built
            self.operator.close()
        self._forget_pulled()

    def _is_kept(self, block: Tensor) -> bool:
        kept = self._block
        if kept is None or kept.shape != block.shape:
            return False
        return kept is block or (not kept.is_meta and bool(torch.equal(kept, block)))

    def _pull(self, block: Tensor) -> Parameters:
        """Return JᵀU, kept since every direction needs it; nothing where it does not fit."""
        if self._is_kept(block):
            return self._pulled
        self._forget_pulled()
        operator, n_columns = self.operator, block.shape[1]
        n_bytes = n_columns * operator.n_parameters * operator.dtype.itemsize
        if n_bytes > int(_SHARED_PART * self.max_bytes):
            return ()
        pulled: Parameters = ()
        for columns, tangents in operator.rmatmat(block):
            if not pulled:
                pulled = tuple(t.new_empty(n_columns, *t.shape[1:]) for t in tangents)
            for whole, part in zip(pulled, tangents, strict=True):
                whole[columns] = part
        self._block, self._pulled = block.clone(), pulled
        return pulled

    def _forget_pulled(self) -> None:
        self._block, self._pulled = None, ()


def _in_chunks(known: Evaluation, size: int | None) -> Evaluation:
    if known.chunk_size == size:
        return known
    with exclusive():
        return known.problem.evaluate(size)


def _fitting_chunk(survey: KernelSurvey, max_bytes: int) -> int | None:
    """Return the samples of a chunk whose graphs fit, None for all."""
    footprint = survey.footprint
    size = survey.evaluation.chunk_size or footprint.n_samples
    while size > 1 and _GRAPHS * size * footprint.graph_bytes > ROOM * max_bytes:
        size = (size + 1) // 2
    return None if size >= footprint.n_samples else size


def _rows(stacked: Tensor) -> Tensor:
    return stacked.reshape(len(stacked), -1)


def natural_step(evaluation: Evaluation, direction: Direction, chunk_size: int | None) -> float:
    """Return the step h of a difference along a direction; the same one whenever it is asked for.

    To be called with the model held exclusively; tried are the first ``chunk_size`` samples.
    """
    # In proportion to the parameters, ‖hθ̇‖ = eps^(1/3) ‖θ‖, is the largest step. A gradient acts on
    # few directions and turns J much faster than that, so Jᵀu of a random u is compared at θ ± hθ̇,
    # and h shortened until half of their distance is about eps^(1/3) ‖Jᵀu‖. A kernel that hardly
    # moves keeps the largest step, and so does one that grows in proportion from J = 0.
    function = evaluation.problem.function
    if function.device.type == "meta":
        return 1.0
    wanted = float(torch.finfo(function.dtype).eps ** (1 / 3))
    step = wanted * (_norm(function.parameters) or 1.0) / direction.norm
    entries, chunk = evaluation.chunks_with_entries(chunk_size)[0]
    cotangent = _draw(evaluation, entries.stop - entries.start)
    here = _pulled(evaluation, chunk, function.parameters, cotangent)
    for _ in range(_TRIALS):
        plus, minus = (
            _pulled(
                evaluation, chunk, moved_parameters(function, direction, sign * step), cotangent
            )
            for sign in (1.0, -1.0)
        )
        change = 0.5 * _norm(a - b for a, b in zip(plus, minus, strict=True))
        bend = _norm(0.5 * (a + b) - c for a, b, c in zip(plus, minus, here, strict=True))
        factor = _shortening(_norm(here), change, bend, wanted)
        if factor == 1.0:
            break
        step *= factor
    return step


def _shortening(here: float, change: float, bend: float, wanted: float) -> float:
    """Return the factor to the next step, 1.0 where this one will do.

    ``change`` is half the distance of the ends of Jᵀu, ``bend`` that of their mean from ``here``.
    """
    if not math.isfinite(change):
        return wanted
    if not change > _TOO_FAR * wanted * here:
        return 1.0
    if here > wanted * change:
        return wanted * here / change
    # J all but vanishes here and is no measure of its change: that has to be in proportion to h.
    return wanted if bend > wanted * change else 1.0


def judge_step(
    evaluation: Evaluation, direction: Direction, step: float, chunk_size: int | None
) -> str:
    """Return what is wrong with a step, ``"ok"`` if nothing; see :meth:`KernelMotion.step_fault`.

    Too long is one that gives another rate than a shorter one, lost what moves J by its rounding.
    """
    function = evaluation.problem.function
    if function.device.type == "meta":
        return OK
    entries, chunk = evaluation.chunks_with_entries(chunk_size)[0]
    cotangent = _draw(evaluation, entries.stop - entries.start)
    here = _norm(_pulled(evaluation, chunk, function.parameters, cotangent))
    rounding = _ROUNDINGS * torch.finfo(function.dtype).eps * here

    def rate(amount: float) -> list[Tensor]:
        plus, minus = (
            _pulled(
                evaluation, chunk, moved_parameters(function, direction, sign * amount), cotangent
            )
            for sign in (1.0, -1.0)
        )
        return [(p - m) / (2.0 * amount) for p, m in zip(plus, minus, strict=True)]

    natural = natural_step(evaluation, direction, chunk_size)
    found = rate(step)
    if 2.0 * step * _norm(found) <= rounding / _STEP_TOLERANCE:
        lost = step < natural and 2.0 * natural * _norm(rate(natural)) > rounding / _STEP_TOLERANCE
        return STEP_TOO_SHORT if lost else OK
    # A homogeneous network's rate is the same for all steps that leave its point far behind.
    other = natural if step > natural else step / 2.0
    defect = _norm(f - o for f, o in zip(found, rate(other), strict=True))
    allowed = _STEP_TOLERANCE * _norm(found) + rounding / (2.0 * other)
    return OK if defect <= allowed else STEP_TOO_LONG


def _draw(evaluation: Evaluation, n: int) -> Tensor:
    # From a generator of its own, so that a step does not depend on what was drawn before.
    function = evaluation.problem.function
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return cast(numbers, function.device, function.dtype)


def _pulled(
    evaluation: Evaluation, chunk: Chunk, parameters: Parameters, cotangent: Tensor
) -> Parameters:
    function = evaluation.problem.function
    # A backward pass may read the model anew, as under checkpointing: at its own point.
    point = tuple(p.detach().requires_grad_() for p in parameters)
    with function.guard(), function.installed(point):
        return PullBack(evaluation.vector_function(chunk), parameters).pull(cotangent)


def _norm(tensors: Iterable[Tensor]) -> float:
    square = sum(float(widen(t).square().sum()) for t in tensors)
    return float(square**0.5)
