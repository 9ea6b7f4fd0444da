"""Probes of a snapshot, once, before its kernel: whether outputs change as reverse mode says.

⟨u, (f(θ + hv) − f(θ − hv)) / 2h⟩ is compared with ⟨Jᵀu, v⟩. The second difference
f(θ + hv) − 2 f(θ) + f(θ − hv), over 2h, is by how much rounding, curvature and kinks inside ±h may
part the two: of a kink it is the error itself. So one rule serves all models, dtypes and steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite

import torch
from torch import Tensor, nn

from spectralshell.models.caches import StaleStateError, check_caches, check_loading
from spectralshell.models.function import ModelFunction, Parameters, widen
from spectralshell.operators.jacobian.linearizations import PullBack
from spectralshell.operators.noise import WHOLE_OUTPUTS, samples_of
from spectralshell.operators.problem import Chunk, Evaluation
from spectralshell.statuses import outputs_change_otherwise, zero_jacobian_of

_STEP = {torch.float64: 1.5e-8, torch.float32: 3.5e-4}
"""√eps, relative to the size of each parameter: curvature then weighs as much as rounding."""

_OTHER_STEPS = {torch.float64: (1.5e-10, 1e-3), torch.float32: (1e-2,)}
"""Tried where the first tells nothing: below a jump inside it, above a model's own rounding."""

_COARSE_STEP = {torch.float64: 1e-3, torch.float32: 3e-3}
"""Here a cast to float32 inside a model is smooth; below its rounding it is flat, with jumps."""

_STAIRS = 0.03
"""Part of a difference that has to be left at the coarse step: 1e-4 is, of a cast to float32."""

_LIMIT = {torch.float64: 3e-6, torch.float32: 1e-3}
"""Least difference that counts, relative to the change of the outputs along v."""

_CERTAINTY = 10.0
"""Times the second difference, of which a Gaussian u takes more with a probability of 1e-23."""

_COTANGENTS = 2
"""One u may be blind to a difference of 1e-3 of the change once in three hundred times."""

_WHOLE_FLOPS = 1e9
"""Operations of a forward pass up to which all samples are probed."""

_BRIEF_FLOPS = 1e8
"""The same where an earlier snapshot of the model has passed: of small models all samples."""

_FEWEST_SAMPLES = 8

_PAIR = 2
"""Samples that what a model keeps is looked for on."""

_DOUBLE_PARAMETERS = 5e7
"""More are probed in the working dtype: three copies in float64 take over a gigabyte."""

_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, MemoryError)
"""What a model may raise in another dtype, or of some samples alone."""


def probed(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose problem knows, and says in its notes, what the probes found.

    Cost: three evaluations, two backward passes in float64; of a pair where J is settled.
    """
    problem, set_up = evaluation.problem, evaluation.problem.set_up
    if problem.function.device.type == "meta":
        return evaluation
    _check_state(evaluation)
    step = set_up.telling_step
    finding = None if step is None else _probe_briefly(evaluation, step)
    if finding is None:
        finding = _probe(evaluation)
        set_up.telling_step = finding.step if finding.defect == 0.0 else None
        set_up.tells_clearly = finding.clear
    notes = list(problem.notes)
    silent = _zero_on_batch(evaluation, finding)
    if silent:
        notes.append(zero_jacobian_of(silent))
    if finding.defect:
        notes.append(outputs_change_otherwise(finding.defect))
    noted = replace(problem, notes=tuple(notes), jacobian_defect=finding.defect)
    return replace(evaluation, problem=noted)


def _check_state(evaluation: Evaluation) -> None:
    """Raise ValueError if the model computes with what it kept from other weights."""
    problem, set_up = evaluation.problem, evaluation.problem.set_up
    n_whole = min(evaluation.chunk_size or problem.n_samples, problem.n_samples)
    usual = (min(_PAIR, n_whole), n_whole)
    for n_samples in dict.fromkeys(usual if set_up.read_on is None else (set_up.read_on,)):
        inputs = evaluation.take(0, n_samples).inputs
        try:
            check_loading(problem.function, inputs)
            some_unread = check_caches(problem.function, inputs, set_up.examined)
            set_up.read_on = n_samples
            if not some_unread:
                return
        except StaleStateError:
            raise
        except _FAILURES:  # of some samples alone, as the nodes of a graph
            continue


@dataclass(frozen=True)
class _Finding:
    """The relative defect of J, 0.0 if none is certain, and parameters whose Jᵀu vanished."""

    defect: float = 0.0
    silent: tuple[str, ...] = ()
    # Whether all samples were probed.
    whole: bool = True
    # That told most; None if J could not be compared at all.
    step: float | None = None
    # Whether neither rounding nor a jump may hide a difference there.
    clear: bool = True


def _probe(evaluation: Evaluation) -> _Finding:
    problem = evaluation.problem
    function = problem.function
    functions = [function]
    if function.dtype == torch.float32 and _has_double(function):
        functions.insert(0, function.in_double())
    share = _WHOLE_FLOPS / max(evaluation.forward_flops, 1.0)
    n_few = max(_FEWEST_SAMPLES, int(share * problem.n_samples))
    n_few = min(n_few, samples_of(evaluation, WHOLE_OUTPUTS))
    attempts = [(f, n_few) for f in functions]
    if n_few < problem.n_samples:  # samples that the others belong to, as the nodes of a graph
        attempts += [(f, problem.n_samples) for f in functions]
    for tried, n_samples in attempts:
        try:
            return _Comparison(evaluation, tried, n_samples).find(_steps(tried.dtype))
        except _FAILURES:
            continue
    return _Finding(whole=False)


def _probe_briefly(evaluation: Evaluation, step: float) -> _Finding | None:
    """Compare some samples along one direction; None if they differ or cannot be compared."""
    function = evaluation.problem.function
    if function.dtype == torch.float32 and _has_double(function):
        function = function.in_double()
    try:
        share = _BRIEF_FLOPS / max(evaluation.forward_flops, 1.0)
        n_few = max(_PAIR, int(share * evaluation.problem.n_samples))
        n_few = min(n_few, samples_of(evaluation, WHOLE_OUTPUTS))
        finding = _Comparison(evaluation, function, n_few, n_cotangents=1).find([step])
    except _FAILURES:
        return None
    clear = finding.clear or not evaluation.problem.set_up.tells_clearly
    return finding if clear and finding.defect == 0.0 else None


def _has_double(function: ModelFunction) -> bool:
    return function.device.type != "mps" and function.n_parameters <= _DOUBLE_PARAMETERS


@dataclass(frozen=True)
class _Difference:
    """Relative to the change; ``unclear`` where rounding or a jump may explain it."""

    size: float = 0.0
    certain: bool = False
    unclear: bool = False


class _Comparison:
    """Changes of some samples' vector against its reverse-mode gradients, in one dtype."""

    def __init__(
        self,
        evaluation: Evaluation,
        function: ModelFunction,
        n_samples: int,
        *,
        n_cotangents: int = _COTANGENTS,
    ) -> None:
        self._function = function
        self._n_cotangents = n_cotangents
        self._evaluation = evaluation
        self._whole = n_samples >= evaluation.problem.n_samples
        chunks = _chunks(evaluation, n_samples)
        self._vectors = [evaluation.vector_function(chunk, function) for chunk in chunks]
        self._resting = list(_padding_rows(function))
        # Not the problem's: its later probes are drawn as if there were none of these.
        self._generator = torch.Generator().manual_seed(0)

    def find(self, steps: Iterable[float]) -> _Finding:
        """Return what the first step shows that tells anything."""
        with self._function.guard(), self._function.installed():
            centre, cotangents, gradients = self._differentiate()
            names = self._function.names
            silent = tuple(
                name
                for name, parts in zip(names, zip(*gradients, strict=True), strict=True)
                if not any(bool(part.any()) for part in parts)
            )
            compare = partial(self._compare, centre, cotangents, gradients)
            defect, telling, least, clear = 0.0, None, inf, False
            for step in steps:
                keep_zeros = step == _OTHER_STEPS[self._function.dtype][0]
                tangents = self._draw_tangents(keep_zeros=keep_zeros)
                found = compare(tangents, step)
                if telling is None or found.size < least:
                    telling, least = step, found.size
                if found.unclear:
                    continue
                telling, clear = step, True
                if found.certain:  # along another direction too, or it is an accident
                    others = self._draw_tangents(keep_zeros=keep_zeros)
                    again = compare(others, step)
                    coarse = compare(others, _COARSE_STEP[self._function.dtype])
                    stays = coarse.size >= _STAIRS * again.size
                    defect = max(found.size, again.size) if again.certain and stays else 0.0
                break
        return _Finding(defect, silent, self._whole, telling, clear)

    def _differentiate(self) -> tuple[Tensor, list[Tensor], list[Parameters]]:
        """Return f(θ), some u and their Jᵀu."""
        values: list[Tensor] = []
        drawn: list[list[Tensor]] = [[] for _ in range(self._n_cotangents)]
        totals: list[Parameters] = [() for _ in range(self._n_cotangents)]
        for vector in self._vectors:
            plain = PullBack(vector, self._function.parameters)
            values.append(plain.output.detach())
            for index in range(self._n_cotangents):
                u = self._draw(plain.output)
                drawn[index].append(u)
                pulled = plain.pull(u)
                total = totals[index]
                totals[index] = (
                    tuple(a + b for a, b in zip(total, pulled, strict=True)) if total else pulled
                )
        return torch.cat(values), [torch.cat(parts) for parts in drawn], totals

    def _compare(
        self,
        centre: Tensor,
        cotangents: Sequence[Tensor],
        gradients: Sequence[Parameters],
        tangents: Parameters,
        step: float,
    ) -> _Difference:
        """Compare the change of the outputs between θ ± step·v with what reverse mode says."""
        forward, backward = (self._displaced(tangents, side * step) for side in (1.0, -1.0))
        change = widen(forward - backward) / (2.0 * step)
        bend = float(widen(forward - 2.0 * centre + backward).norm()) / (2.0 * step)
        worst = _Difference()
        for u, gradient in zip(cotangents, gradients, strict=True):
            seen = float(widen(u) @ change)
            said = sum(
                float(widen(g).flatten() @ widen(t).flatten())
                for g, t in zip(gradient, tangents, strict=True)
            )
            scale = max(float(change.norm()), abs(said))
            size = abs(seen - said)
            if not isfinite(size):
                return _Difference(inf, unclear=True)
            if size <= _LIMIT[self._function.dtype] * scale:
                continue
            certain = worst.certain or size > _CERTAINTY * bend
            worst = _Difference(max(worst.size, size / scale), certain, unclear=not certain)
        return worst

    def _displaced(self, tangents: Parameters, amount: float) -> Tensor:
        points = self._function.parameters
        moved = tuple(p + amount * t for p, t in zip(points, tangents, strict=True))
        # Gradients stay enabled, for some models differentiate inside, a few by their parameters.
        try:
            return torch.cat([vector(*moved).detach() for vector in self._vectors])
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        leaves = tuple(point.requires_grad_() for point in moved)
        return torch.cat([vector(*leaves).detach() for vector in self._vectors])

    def _draw_tangents(self, *, keep_zeros: bool) -> Parameters:
        """Draw v, of the size of each parameter; exact zeros may lie on a jump and then stay."""
        points = self._function.parameters
        sizes = [float(p.norm()) / max(p.numel(), 1) ** 0.5 for p in points]
        usual = sorted(size for size in sizes if size > 0.0) or [1.0]
        tangents = []
        for point, size in zip(points, sizes, strict=True):
            tangent = self._draw(point) * (size or usual[len(usual) // 2])
            tangents.append(torch.where(point == 0.0, 0.0, tangent) if keep_zeros else tangent)
        for position, row in self._resting:
            tangents[position][row] = 0.0
        return tuple(tangents)

    def _draw(self, like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=self._generator, dtype=torch.float32)
        return numbers.to(like.device, like.dtype)


def _steps(dtype: torch.dtype) -> tuple[float, ...]:
    return (_STEP[dtype], *_OTHER_STEPS[dtype])


def _padding_rows(function: ModelFunction) -> Iterator[tuple[int, int]]:
    """Yield position and row of what torch keeps from training: the vectors of padding tokens."""
    positions = function.positions()
    for name, module in function.model.named_modules():
        padding = getattr(module, "padding_idx", None)
        position = positions.get(f"{name}.weight" if name else "weight")
        embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if embeds and position is not None and padding is not None:
            yield position, padding


def _chunks(evaluation: Evaluation, n_samples: int) -> list[Chunk]:
    """Return the chunks of all samples, or the first of so many that has labelled rows."""
    if n_samples >= evaluation.problem.n_samples:
        return [chunk for _, chunk in evaluation.chunks_with_entries()]
    size = min(n_samples, evaluation.chunk_size or n_samples)
    return [evaluation.chunks_with_entries(size)[0][1]]


def _zero_on_batch(evaluation: Evaluation, finding: _Finding) -> tuple[str, ...]:
    """Return the parameters whose Jacobian vanishes on all samples, not on those probed alone."""
    if finding.whole or not finding.silent:
        return finding.silent
    function = evaluation.problem.function
    generator = torch.Generator().manual_seed(0)
    silent = dict.fromkeys(finding.silent)
    with function.guard(), function.installed():
        for _, chunk in evaluation.chunks_with_entries():
            plain = PullBack(evaluation.vector_function(chunk), function.parameters)
            u = torch.randn(plain.output.shape, generator=generator).to(plain.output)
            for name, part in zip(function.names, plain.pull(u), strict=True):
                if name in silent and bool(part.any()):
                    del silent[name]
            if not silent:
                break
    return tuple(silent)
