"""Blocks of one snapshot's Jacobian: norms, coherence, and what moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectralshell.krylov import EigenPairs, dense_pairs, lanczos, ritz_pairs
from spectralshell.measurements.couplings import gate_status, motion_for, unwarned_gates
from spectralshell.measurements.settings import settle_direction, unit_of, unit_status
from spectralshell.models.state import unwrap
from spectralshell.operators import Direction, KernelDerivative, KernelMotion
from spectralshell.operators.costs import (
    ROOM,
    ExactPlan,
    fits,
    format_bytes,
    plan_exact,
    resolve_max_memory,
)
from spectralshell.operators.layers.units import LAYER_OPTIONS, resolve_layers
from spectralshell.operators.motion.directions import PER_TAU
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import join_statuses

AUTO = "auto"

Blocks = str | Mapping[str, str] | Callable[[str], str]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Floats = NDArray[np.float64]

_RATE_STEPS = 24

_RATE_TOLERANCE = 1e-3
"""Lanczos steps for ‖dJ/dt‖², and the relative residual norm above which the status says so."""

_STEP_TOLERANCE = 1e-2
"""Relative change with half the step above which the status says so."""

_ROUNDINGS = 10.0
"""Rates of a kernel below this many of their roundings are none."""


@dataclass(frozen=True)
class Grouping:
    """Blocks in the order of depth.

    Parameters
    ----------
    labels : tuple of str
        Names of the blocks.
    members : dict of str to tuple of str
        Names of each block's parameters.
    """

    labels: tuple[str, ...]
    members: dict[str, tuple[str, ...]]

    def label_of(self, name: str) -> str:
        """Return the label of a parameter."""
        return next(label for label, names in self.members.items() if name in names)


def check_blocks(blocks: Any) -> None:
    """Check the parameter ``blocks``.

    Raises
    ------
    ValueError, TypeError
        If it is neither a known option, a mapping nor a callable.
    """
    options = (AUTO, *LAYER_OPTIONS)
    if isinstance(blocks, str):
        if blocks not in options:
            raise ValueError(
                f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
                f"expressions to labels or a callable, got {blocks!r}."
            )
    elif not isinstance(blocks, Mapping) and not callable(blocks):
        raise TypeError(
            f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
            f"expressions to labels or a callable, got {type(blocks).__name__}."
        )


def group_parameters(model: nn.Module, blocks: Blocks, names: Sequence[str]) -> Grouping:
    r"""Return the blocks of a model, in the order of depth.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : {"auto", "module", "parameter"}, mapping or callable
        ``"auto"`` follows the module tree, see the notes; the others are those of
        :func:`~spectralshell.operators.layers.units.resolve_layers`. Depth is the order in which
        the labels of a mapping are given, and otherwise that in which the model registers its
        parameters.
    names : sequence of str
        The parameters that count.

    Returns
    -------
    Grouping

    Raises
    ------
    ValueError, TypeError
        If ``blocks`` is not usable, or a label of a mapping finds no parameter.

    Notes
    -----
    ``"auto"`` takes the members of containers (``Sequential``, ``ModuleList``, ``ModuleDict``)
    apart, from the root down, and a module of another kind only where it holds more than half of
    the parameter tensors and a container with several members: the encoder of a transformer, not a
    residual block. What has nothing but vectors as parameters (normalisations) joins the block
    before it, or, at the beginning, the one after it.

    Examples
    --------
    >>> layers = [nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2)]
    >>> model = nn.Sequential(*layers)
    >>> grouping = group_parameters(model, "auto", [n for n, _ in model.named_parameters()])
    >>> grouping.members["0"]
    ('0.weight', '0.bias', '1.weight', '1.bias')
    >>> grouping.labels
    ('0', '3')
    """
    check_blocks(blocks)
    label_of = _automatic(unwrap(model)) if blocks == AUTO else _named(blocks, names)
    members: dict[str, list[str]] = {}
    if isinstance(blocks, Mapping):
        members = {label: [] for label in blocks.values()}
    for name in names:
        members.setdefault(label_of(name), []).append(name)
    empty = [label for label, found in members.items() if not found]
    if empty:
        raise ValueError(
            f"blocks: no parameter got the label {empty[0]!r}; its expression finds none, or one "
            "before it finds them first."
        )
    return Grouping(tuple(members), {label: tuple(found) for label, found in members.items()})


def _named(blocks: Blocks, names: Sequence[str]) -> Callable[[str], str]:
    try:
        return resolve_layers(blocks, names)
    except (ValueError, TypeError) as error:
        # The same rules under another name.
        raise type(error)(str(error).replace("layers", "blocks", 1)) from error


def _automatic(model: nn.Module) -> Callable[[str], str]:
    labels: dict[str, str] = {}
    waiting: list[str] = []
    last: str | None = None
    total = len(list(model.parameters()))
    for label, owned in _units(model, "", total):
        if all(parameter.ndim <= 1 for parameter in owned.values()):
            if last is None:
                waiting += owned
                continue
            labels.update(dict.fromkeys(owned, last))
            continue
        labels.update(dict.fromkeys([*waiting, *owned], label))
        waiting, last = [], label
    labels.update(dict.fromkeys(waiting, type(model).__name__))
    return labels.__getitem__


def _units(
    module: nn.Module, path: str, total: int
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yield label and parameters of the pieces of a module, in the order of registration."""
    prefix = f"{path}." if path else ""
    if path and not _is_taken_apart(module, total):
        owned = {prefix + name: parameter for name, parameter in module.named_parameters()}
        if owned:
            yield path, owned
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, {prefix + name: parameter}
    for name, child in module.named_children():
        yield from _units(child, prefix + name, total)


def _is_taken_apart(module: nn.Module, total: int) -> bool:
    if isinstance(module, _CONTAINERS):
        return True
    share = len(list(module.parameters()))
    return 2 * share > total and any(
        isinstance(part, _CONTAINERS) and _n_members(part) > 1 for part in module.modules()
    )


def _n_members(container: nn.Module) -> int:
    return sum(any(True for _ in child.parameters()) for child in container.children())


@dataclass(frozen=True)
class BlockConfig:
    """What the blocks of a Jacobian depend on beside their snapshot.

    Parameters
    ----------
    residual, parameters, chunk_size, device, dtype, max_memory
        As in :class:`~spectralshell.measurements.spectrum.MeasurementConfig`.
    blocks : str, mapping or callable
        As in :func:`~spectralshell.measurements.blocks.group_parameters`.
    direction : str, Snapshot, mapping of str to Tensor, or callable
        What the parameters do.
    derivative : {"exact", "difference"}
    step : float or None
        Of the difference, in units of the direction.
    random_seed : int
        Of a random direction.
    """

    residual: Any = "mse"
    blocks: Blocks = "auto"
    direction: Any = "gradient-flow"
    derivative: str = "exact"
    step: float | None = None
    parameters: Any = None
    chunk_size: int | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    max_memory: int | str | None = None
    random_seed: int = 0


@dataclass(frozen=True, eq=False)
class BlockMeasure:
    """The blocks of one snapshot's Jacobian; independent of band and null.

    Parameters
    ----------
    blocks : tuple of str
        L labels, by depth.
    block_sizes : ndarray of int, shape (L,)
        Parameters of each block.
    norms : ndarray of shape (L,)
        ‖J_l‖ = √λ_max(M_l), in 1/√τ.
    traces : ndarray of shape (L,)
        tr M_l, in 1/τ.
    coherence : ndarray of shape (L, L)
        ‖J_l* J_m‖, in 1/τ; the diagonal holds ‖J_l‖².
    uncertainty : ndarray of shape (L, L)
        How much rounding of the kernels may have added to or taken from it.
    gram : ndarray of shape (L, L, L)
        ⟨D_lm, D_lm'⟩ (Frobenius), D_lm the rate of M_l along the direction restricted to block m.
    jacobian_norm, jacobian_rate : float
        ‖J‖ and ‖dJ/dt‖ along the direction, in 1/√τ and per τ.
    direction : str
    direction_norm : float
    derivative : str
    n_outputs, n_rows, n_parameters : int
    dynamics_exact : bool
        Whether ė = −M e along the direction.
    unit : str
        What rates are per: ``"per tau"`` or ``"as given"``.
    tau, batch, name
        Labels of the snapshot.
    status : str
        ``"ok"``, or phrases joined by ``"; "``.
    """

    blocks: tuple[str, ...]
    block_sizes: NDArray[np.int64]
    norms: Floats
    traces: Floats
    coherence: Floats
    uncertainty: Floats
    gram: Floats
    jacobian_norm: float
    jacobian_rate: float
    direction: str
    direction_norm: float
    derivative: str
    n_outputs: int
    n_rows: int
    n_parameters: int
    dynamics_exact: bool
    unit: str = PER_TAU
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = "ok"

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> BlockMeasure:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


def measure_blocks(
    snapshot: Snapshot, config: BlockConfig, probe_seed: int = 0, verbose: int = 0
) -> BlockMeasure:
    """Measure the blocks of one snapshot, without looking into any cache.

    Parameters
    ----------
    snapshot : Snapshot
    config : BlockConfig
    probe_seed : int, default=0
        Of the probes that check the operators.
    verbose : int, default=0
        Not used: there is nothing to choose.

    Returns
    -------
    BlockMeasure

    Raises
    ------
    ValueError
        If the kernels of the blocks do not fit in ``max_memory``; the message says what would.
    """
    del verbose
    with motion_for(snapshot, config, probe_seed) as motion:
        grouping = group_parameters(snapshot.model, config.blocks, motion.parameter_names)
        plan = _plan(motion, config, len(grouping.labels))
        spectra = _spectra(motion, plan, grouping)
        direction = _direction(snapshot, motion, config)
        with unwarned_gates():
            rate, step, phrases = _jacobian_rate(motion, direction, config, spectra)
            gram = _gram(motion, direction, grouping, replace(config, step=step))
        rounding = spectra.noise * spectra.norm * (rate + (spectra.norm / step if step else 0.0))
        gram[np.sqrt(np.einsum("lmm->l", gram)) <= _ROUNDINGS * rounding] = 0.0
        unit = unit_of(direction)
        phrases = [spectra.status, *phrases, *_phrases(grouping, spectra, gram), unit_status(unit)]
        phrases.append(gate_status(motion, direction, config.derivative))
        return BlockMeasure(
            blocks=grouping.labels,
            block_sizes=_sizes(motion, grouping),
            norms=spectra.norms,
            traces=spectra.traces,
            coherence=spectra.coherence,
            uncertainty=spectra.uncertainty,
            gram=gram,
            jacobian_norm=spectra.norm,
            jacobian_rate=rate,
            direction=direction.name,
            direction_norm=direction.norm,
            derivative=config.derivative,
            n_outputs=motion.n,
            n_rows=motion.n_rows,
            n_parameters=motion.n_parameters,
            dynamics_exact=motion.dynamics_exact and direction.name == "gradient-flow",
            unit=unit,
            tau=snapshot.tau,
            batch=snapshot.batch,
            name=snapshot.name,
            status=join_statuses(phrases),
        )


@dataclass(frozen=True)
class _Spectra:
    norm: float
    noise: float
    norms: Floats
    traces: Floats
    coherence: Floats
    uncertainty: Floats
    status: str


def _plan(motion: KernelMotion, config: BlockConfig, n_blocks: int) -> ExactPlan:
    budget = resolve_max_memory(config.max_memory, motion.device)
    plan = plan_exact(motion.survey.footprint, budget, motion.survey.evaluation.chunk_size)
    # Kernels of the blocks with their factors, and then the halves of all pairs of rates.
    matrices = max(3 * n_blocks, n_blocks + n_blocks**2 // 2)
    peak = plan.peak_bytes + 8 * matrices * motion.n**2
    if not fits(peak, budget):
        raise ValueError(
            f"max_memory: the kernels of {n_blocks} blocks of n = {motion.n} entries need about "
            f"{format_bytes(peak / ROOM)}, and {format_bytes(budget)} are allowed; allow that "
            "much, take fewer samples, or join blocks."
        )
    return plan


def _spectra(motion: KernelMotion, plan: ExactPlan, grouping: Grouping) -> _Spectra:
    with motion.survey.build_exact(plan, grouping.label_of) as kernel:
        wide = [kernel.layers[label].to(kernel.residual_vector) for label in grouping.labels]
        norm = _largest(kernel.to_dense())
        relative = kernel.noise
        status = kernel.status
    noise = relative * norm
    factors = [_factor(matrix, noise) for matrix in wide]
    squares = np.array([_largest(factor.T @ factor) for factor in factors])
    n_blocks = len(factors)
    coherence = np.diag(squares)
    for row in range(n_blocks):
        for column in range(row):
            found = _cross_norm(factors[row], factors[column])
            coherence[row, column] = coherence[column, row] = found
    # |δ λ_max(M_l^½ M_m M_l^½)| ≤ ‖δM_l‖ ‖M_m‖ + ‖M_l‖ ‖δM_m‖, of the square of the coherence.
    shift = noise * (squares[:, None] + squares)
    uncertainty = np.sqrt(coherence**2 + shift) - coherence
    traces = np.array([float(matrix.diagonal().sum()) for matrix in wide])
    return _Spectra(
        float(np.sqrt(norm)), relative, np.sqrt(squares), traces, coherence, uncertainty, status
    )


def _factor(matrix: Tensor, noise: float) -> Tensor:
    """Return F with F Fᵀ the matrix, without the modes below its noise."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def _cross_norm(left: Tensor, right: Tensor) -> float:
    """Return ‖F_lᵀ F_m‖ = √λ_max(M_l^½ M_m M_l^½)."""
    cross = left.T @ right
    if cross.shape[0] > cross.shape[1]:
        cross = cross.T
    return float(np.sqrt(_largest(cross @ cross.T)))


def _largest(matrix: Tensor) -> float:
    if not len(matrix):
        return 0.0
    return max(float(dense_pairs(matrix, 1).eigenvalues[0]), 0.0)


def _direction(snapshot: Snapshot, motion: KernelMotion, config: BlockConfig) -> Direction:
    spec = config.direction
    if callable(spec):
        spec = settle_direction(spec, snapshot)
    return motion.direction(spec, generator=torch.Generator().manual_seed(config.random_seed))


def _jacobian_rate(
    motion: KernelMotion, direction: Direction, config: BlockConfig, spectra: _Spectra
) -> tuple[float, float | None, list[str]]:
    """Return ‖dJ/dt‖, the step of a difference, and what there is to say."""
    with motion.derivative(direction, method=config.derivative, step=config.step) as derivative:
        step = (derivative.step or None) if config.derivative == "difference" else None
        if derivative.status in ("zero direction", "frozen kernel"):
            return 0.0, step, [derivative.status]
        pairs = _rate_pairs(motion, derivative, _RATE_STEPS)
        square = max(float(pairs.eigenvalues[0]), 0.0)
        phrases = [derivative.status]
        if pairs.residual_norms[0] > _RATE_TOLERANCE * square > 0.0:
            phrases.append("rate of the Jacobian from below")
        if step is not None and step * square**0.5 > _ROUNDINGS * spectra.noise * spectra.norm:
            phrases.append(_defect_of_step(motion, direction, derivative, pairs.vectors[:, 0]))
        return square**0.5, step, phrases


def _rate_pairs(motion: KernelMotion, derivative: KernelDerivative, n_steps: int) -> EigenPairs:
    start = torch.randn(motion.n, generator=torch.Generator().manual_seed(0))
    return ritz_pairs(lanczos(derivative.rate_gram, start.to(motion.residual_vector), n_steps), 1)


def _defect_of_step(
    motion: KernelMotion, direction: Direction, derivative: KernelDerivative, vector: Tensor
) -> str:
    """Compare the difference with that of half the step, along the fastest change of J."""
    found = derivative.rate_gram(vector)
    with motion.derivative(direction, method="difference", step=derivative.step / 2) as half:
        gap = float(torch.linalg.vector_norm(half.rate_gram(vector) - found))
    share = gap / float(torch.linalg.vector_norm(found))
    return "ok" if share <= _STEP_TOLERANCE else f"differences good to {100 * share:.2g} %"


def _gram(
    motion: KernelMotion, direction: Direction, grouping: Grouping, config: BlockConfig
) -> Floats:
    """Return ⟨D_lm, D_lm'⟩ for all blocks l, m, m'."""
    n_blocks = len(grouping.labels)
    rates: list[list[Tensor]] = [[] for _ in range(n_blocks)]
    for derivative in _restricted(motion, direction, grouping, config):
        with derivative:
            parts = derivative.layers(grouping.label_of)
        for kept, label in zip(rates, grouping.labels, strict=True):
            kept.append(_packed(parts[label]))
    gram = np.empty((n_blocks,) * 3)
    for position, kept in enumerate(rates):
        stacked = torch.stack(kept)
        gram[position] = (stacked @ stacked.T).cpu().numpy()
        kept.clear()
    return gram


def _restricted(
    motion: KernelMotion, direction: Direction, grouping: Grouping, config: BlockConfig
) -> Iterator[KernelDerivative]:
    """Yield the derivative along the direction of each block's parameters alone, by depth."""
    tangents = dict(zip(motion.parameter_names, direction.tangents, strict=True))
    for label in grouping.labels:
        part: Mapping[str, Tensor] = {name: tangents[name] for name in grouping.members[label]}
        yield motion.derivative(motion.direction(part), method=config.derivative, step=config.step)


def _packed(matrix: Tensor) -> Tensor:
    """Return the lower half of a symmetric matrix as a vector with the same inner products."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    # From ones of its own type: a root of two in single precision would be the rounding of all.
    weights = torch.where(rows == columns, matrix.new_ones(()), 2.0**0.5)
    return matrix[rows, columns] * weights


def _sizes(motion: KernelMotion, grouping: Grouping) -> NDArray[np.int64]:
    function = motion.survey.evaluation.problem.function
    numbers = dict(zip(function.names, (p.numel() for p in function.parameters), strict=True))
    return np.array(
        [sum(numbers[name] for name in grouping.members[label]) for label in grouping.labels]
    )


def _phrases(grouping: Grouping, spectra: _Spectra, gram: Floats) -> list[str]:
    phrases = ["one block"] if len(grouping.labels) == 1 else []
    zero = [label for label, norm in zip(grouping.labels, spectra.norms, strict=True) if norm == 0]
    if zero:
        phrases.append(f"zero kernel of {', '.join(zero)}")
    if not gram.any():
        phrases.append("frozen kernel")
    return phrases
