"""The whole kernel M = J Jᵀ as a matrix, built layer by layer and checked."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from spectralshell.models.function import Parameters, cast, widen
from spectralshell.models.guard import exclusive, full_precision, quiet_differentiation
from spectralshell.operators.costs import ExactPlan
from spectralshell.operators.jacobian.ladder import is_out_of_memory
from spectralshell.operators.jacobian.linearizations import (
    DoubleReverse,
    ForwardMode,
    IndependenceError,
    PullBack,
    added,
    check_finite_gradient,
    check_range,
    inner,
)
from spectralshell.operators.kernel_operator import Kernel, KernelOperator
from spectralshell.operators.layers.assembly import (
    LabelOf,
    LayerKernels,
    OnRecord,
    StructureError,
    contract_layers,
)
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.noise import measure_exact_noise
from spectralshell.operators.problem import Evaluation, halve_until_it_fits
from spectralshell.statuses import COLUMNS_ARE_PRODUCTS
from spectralshell.warning_categories import KernelWarning

_AGREEMENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest ‖M v − J Jᵀ v‖ / ‖J Jᵀ v‖: ten times the float32 rounding of deep models."""

_FORMS = 2

_VANISHING = 100.0
"""Gradients below this many roundings of the whole are nothing but rounding."""


class ExactKernel(Kernel):
    """M = J Jᵀ of one snapshot as a matrix; made by :func:`build_exact_kernel`.

    Attributes
    ----------
    n : int
        Entries of the residual: the dimension of M.
    n_rows, n_samples, n_parameters : int
        N of the normalisation, samples of the batch, and differentiated scalars (tied ones once).
    residual_vector : Tensor of float64, shape (n,)
        e / √N, on the device (on the CPU where the device has no float64).
    matrix : Tensor, shape (n, n)
        M in ``dtype``; entries are ordered by sample, then by output.
    layers : dict of str to Tensor, each of shape (n, n)
        Kernels M_l by label in ``dtype``, which sum to M; empty where none were asked for.
    orders : dict of str to str
        How each parameter was contracted: ``"gram"``, ``"pairs"``, ``"gradients"``, or
        ``"samples"`` where the gradients of each sample were needed; named by the weight, which
        its bias goes with.
    rung : str
        ``"layers"``, or the rung of the ladder if every column was a product.
    dtype : torch.dtype
        In which the kernel was computed.
    chunk_size : int or None
        Samples recorded at a time; None is all.
    forward_flops : float
        Operations of one evaluation of the model on the batch.
    n_matvecs, n_probes : int
        Products behind the matrix (none by layers), and products spent on checks.
    dynamics_exact : bool
        Whether de/dt = −M e along the parameter velocity of the residual.
    jacobian_defect : float
        As for :class:`KernelOperator`.
    status : str
        ``"ok"``, or what to know about the measurement.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        found: LayerKernels,
        chunk_size: int | None,
        *,
        keep_layers: bool,
    ) -> None:
        notes = [*evaluation.problem.notes, *found.notes]
        super().__init__(evaluation, rung=found.rung, chunk_size=chunk_size, notes=notes)
        self._evaluation: Evaluation | None = evaluation
        self.orders = found.orders
        self.n_matvecs = found.n_matvecs
        self.n_probes = found.n_probes
        self.layers = dict(found.kernels) if keep_layers else {}
        self.matrix = found.total()
        self._noise = found.noise

    @cached_property
    def noise(self) -> float:
        """Norm of the matrix's rounding error, relative to ‖M‖.

        For float64 it covers the rounding of the contractions alone. For float32 it is found at
        first reading, by comparing a few samples' block with products in float64; cost: one forward
        and about ten backward passes of at most eight samples in float64.
        """
        if self._noise is not None:
            return self._noise
        if self._evaluation is None:
            raise ValueError("this ExactKernel was closed before its noise was read.")
        with exclusive():
            return measure_exact_noise(self._evaluation, self.matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return M v in float64, shape (n,), for v of shape (n,)."""
        self._check_rows(vector, 1)
        return self._multiply(vector)

    def matmat(self, block: Tensor) -> Tensor:
        """Return M V in float64, shape (n, k), for V of shape (n, k)."""
        self._check_rows(block, 2)
        return self._multiply(block)

    def to_dense(self) -> Tensor:
        """Return M as a new float64 tensor of shape (n, n)."""
        return widen(self.matrix).clone() if self.dtype == torch.float64 else widen(self.matrix)

    def close(self) -> None:
        """Free what only the noise still needs; the matrix stays."""
        self._evaluation = None

    def _multiply(self, operand: Tensor) -> Tensor:
        with full_precision(self.device):
            return widen(self.matrix @ cast(operand.detach(), self.device, self.dtype))


def assemble_exact(
    evaluation: Evaluation, plan: ExactPlan, *, label_of: LabelOf, keep_layers: bool = False
) -> ExactKernel:
    """Build the exact kernel of an evaluated problem as planned, in smaller chunks if need be."""
    problem = evaluation.problem

    def build(size: int | None) -> ExactKernel:
        with problem.function.guard(), problem.function.installed():
            found = _verified_kernels(
                evaluation, label_of=label_of, max_bytes=plan.layer_bytes, record_size=size
            )
        return ExactKernel(evaluation, found, size, keep_layers=keep_layers)

    return halve_until_it_fits(problem, plan.chunk_size, build)[0]


def _verified_kernels(
    evaluation: Evaluation, *, label_of: LabelOf, max_bytes: int, record_size: int | None = None
) -> LayerKernels:
    """Contract the layers, compare M v with automatic differentiation, and mend what differs.

    Units that differ go through each sample's gradients, else all columns are products.
    """
    wrong: list[str] = []
    irregular: list[str] = []
    problem = evaluation.problem
    probe = _Probe(evaluation)
    attempts = 2
    while attempts:
        try:
            found = contract_layers(
                evaluation,
                label_of=label_of,
                refused=[*wrong, *irregular],
                max_bytes=max_bytes,
                record_size=record_size,
                on_record=probe.watch(),
            )
        except IndependenceError:
            raise
        except StructureError as error:  # each time about other parameters: it comes to an end
            irregular += error.args[1]
            continue
        except Exception as error:  # what else a model or torch raises: products may still run
            if is_out_of_memory(error):
                raise
            break
        if probe.agrees(found, label_of):
            if wrong:
                _warn(wrong, "the gradients of each sample were used for them")
            return found
        blamed = probe.find_wrong_units(found, [*wrong, *irregular], max_bytes)
        del found
        if not blamed:
            break
        wrong += blamed
        attempts -= 1
    products = _by_products(evaluation, label_of)
    _warn(wrong or problem.function.names, "every column of the kernel is a product")
    return products


class _Probe:
    """A random vector with its gradient by plain reverse mode, and its product."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self.vector = evaluation.problem.draw(evaluation.residual_vector.numel())
        self.gradient: Parameters = ()
        self._chunks = evaluation.chunks_with_entries()
        self._squares: dict[str, float] = {}

    def watch(self) -> OnRecord:
        """Return what takes the gradient ⟨v, entries⟩ along the graphs recorded for the layers."""
        self.gradient = ()
        first = 0

        def pull(entries: Tensor, leaves: Parameters) -> None:
            nonlocal first
            last = first + entries.numel()
            with quiet_differentiation():
                pulled = torch.autograd.grad(
                    entries,
                    leaves,
                    self.vector[first:last],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            first = last
            self.gradient = added(self.gradient, pulled)

        return pull

    def _measure_gradient(self) -> None:
        names = self._evaluation.problem.function.names
        check_finite_gradient(names, self.gradient)
        check_range(self.gradient)
        self._squares = {
            name: 0.0 if part.is_meta else float(widen(part).square().sum())
            for name, part in zip(names, self.gradient, strict=True)
        }

    def agrees(self, found: LayerKernels, label_of: LabelOf) -> bool:
        """Tell whether M v is J Jᵀ v, and the form of each label that of its gradient."""
        matrix = found.total()
        if matrix.is_meta:
            return True
        self._measure_gradient()
        squares: dict[str, float] = defaultdict(float)
        for name, square in self._squares.items():
            squares[label_of(name)] += square
        if any(self._differs(kernel, squares[name]) for name, kernel in found.kernels.items()):
            return False
        image = widen(matrix @ self.vector)
        tolerance = _AGREEMENT_TOLERANCE[matrix.dtype]
        for rung in (ForwardMode, DoubleReverse):
            try:
                expected = widen(self._push(rung))
            except Exception as error:  # a rung that cannot differentiate this model
                if is_out_of_memory(error):
                    raise
                continue
            if float((image - expected).norm()) <= tolerance * float(expected.norm()):
                return True
            if self._is_product(expected, tolerance):
                return False
        return self._forms_agree(matrix)

    def _is_product(self, product: Tensor, tolerance: float) -> bool:
        """Tell whether a rung's J Jᵀ v passes ⟨u, J Jᵀ v⟩ = ⟨Jᵀu, Jᵀv⟩."""
        u = self._evaluation.problem.draw(len(product))
        pulled = self._pull(u)
        form, expected = float(widen(u) @ product), inner(pulled, self.gradient)
        scale = (inner(pulled, pulled) * inner(self.gradient, self.gradient)) ** 0.5
        return bool(abs(form - expected) <= tolerance * scale)

    def _forms_agree(self, matrix: Tensor) -> bool:
        """Tell whether ⟨u, M w⟩ is ⟨Jᵀu, Jᵀw⟩, where reverse mode alone is to be trusted.

        Through functions that are differentiable once no rung gives a product, or a wrong one.
        """
        for _ in range(_FORMS):
            u, w = (self._evaluation.problem.draw(len(matrix)) for _ in range(2))
            pulled_u, pulled_w = self._pull(u), self._pull(w)
            scale = (inner(pulled_u, pulled_u) * inner(pulled_w, pulled_w)) ** 0.5
            form = float(widen(u) @ widen(matrix @ w))
            tolerance = _AGREEMENT_TOLERANCE[matrix.dtype]
            if not abs(form - inner(pulled_u, pulled_w)) <= tolerance * scale:
                return False
        return True

    def find_wrong_units(
        self, found: LayerKernels, refused: Collection[str], max_bytes: int
    ) -> list[str]:
        """Name the parameters of units whose own quadratic form is not that of their gradient."""
        wrong: list[str] = []
        for unit in found.units:
            if not set(unit).isdisjoint(refused):
                continue
            try:
                # Under one label, so that a bias is merged as it was.
                alone = contract_layers(
                    self._evaluation, label_of=lambda name: "", only=unit, max_bytes=max_bytes
                ).total()
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                wrong += unit
                continue
            if self._differs(alone, sum(self._squares[name] for name in unit)):
                wrong += unit
        return wrong

    def _differs(self, kernel: Tensor, expected: float) -> bool:
        """Tell whether vᵀM_l v is not ‖J_lᵀv‖²; what vanishes but for rounding is right."""
        v = widen(self.vector)
        form = float(v @ widen(kernel @ self.vector))
        rounding = (_VANISHING * torch.finfo(kernel.dtype).eps) ** 2 * sum(self._squares.values())
        tolerance = _AGREEMENT_TOLERANCE[kernel.dtype] * max(form, expected) + rounding
        return not abs(form - expected) <= tolerance

    def _pull(self, vector: Tensor) -> Parameters:
        function = self._evaluation.problem.function
        total: Parameters = ()
        for entries, chunk in self._chunks:
            plain = PullBack(self._evaluation.vector_function(chunk), function.parameters)
            total = added(total, plain.pull(vector[entries]))
        return total

    def _push(self, rung: Callable[..., ForwardMode | DoubleReverse]) -> Tensor:
        function = self._evaluation.problem.function
        return torch.cat(
            [
                rung(self._evaluation.vector_function(chunk), function.parameters).push(
                    self.gradient
                )
                for _, chunk in self._chunks
            ]
        )


def _by_products(evaluation: Evaluation, label_of: LabelOf) -> LayerKernels:
    problem = evaluation.problem
    labels: dict[str, list[str]] = {}
    for name in problem.function.names:
        labels.setdefault(label_of(name), []).append(name)
    with assemble_matrix_free(problem, evaluation.chunk_size) as kernel:
        if len(labels) == 1:
            kernels = dict.fromkeys(labels, kernel.to_dense().to(kernel.dtype))
        else:
            kernels = _products_by_label(kernel, labels)
        found = (kernel.rung, kernel.n_matvecs, kernel.n_probes, kernel.noise)
    rung, n_matvecs, n_probes, noise = found
    return LayerKernels(
        kernels,
        orders=dict.fromkeys(problem.function.names, "products"),
        units=(),
        rung=rung,
        n_matvecs=n_matvecs,
        n_probes=n_probes,
        noise=noise,
        notes=(COLUMNS_ARE_PRODUCTS,),
    )


def _products_by_label(
    kernel: KernelOperator, labels: Mapping[str, Collection[str]]
) -> dict[str, Tensor]:
    """Return J_l J_lᵀ for each label, column by column; one alone may vanish but for rounding."""
    columns: dict[str, list[Tensor]] = {label: [] for label in labels}
    identity = torch.eye(kernel.n, dtype=torch.float64, device=kernel.residual_vector.device)
    for unit in identity:
        named = dict(zip(kernel.parameter_names, kernel.rmatvec(unit), strict=True))
        for label, names in labels.items():
            tangents = [t if name in names else torch.zeros_like(t) for name, t in named.items()]
            columns[label].append(kernel.jvp(tangents).to(kernel.dtype))
    return {label: torch.stack(found, dim=1) for label, found in columns.items()}


def _warn(names: Collection[str], remedy: str) -> None:
    modules = sorted({name.rpartition(".")[0] or name for name in names})
    warnings.warn(
        f"the kernels of {', '.join(map(repr, modules))} contracted by layers differ from "
        f"automatic differentiation; {remedy}, which is slower. It so looks where samples "
        "interact, or where a layer's first dimension does not count samples.",
        KernelWarning,
        stacklevel=2,
    )
