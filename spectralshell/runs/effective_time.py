"""Effective time: how far a constant gradient would have been followed, step by step.

On a constant gradient g every step moves the parameters by −Δτ P g, with P the metric of the
optimiser at that step: the identity for SGD, 1/(√v̂ + ε) for Adam-like ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from spectralshell.parameter_checks import call_given, check_real

Settings = dict[str, Any]
"""What a rule needs of one parameter group at one step: numbers, or tensors still on a device."""


@dataclass(frozen=True)
class Follow:
    """What one parameter group has behind it.

    ``share``: how much of a constant gradient its momentum buffer holds, NaN where there is none.
    """

    tau: float = 0.0
    n_steps: int = 0
    share: float = math.nan


def _sgd(now: Settings, past: Follow) -> tuple[float, float]:
    """Return the increment of τ, and the share that the buffer holds after the step."""
    momentum = now["momentum"]
    if momentum == 0:
        return now["lr"], past.share
    # torch's first buffer is the gradient itself, without dampening.
    first = math.isnan(past.share)
    share = 1.0 if first else momentum * past.share + (1 - now["dampening"])
    return now["lr"] * (1 + momentum * share if now["nesterov"] else share), share


def _adam(now: Settings, past: Follow) -> tuple[float, float]:
    beta = now["beta1"]
    corrected = 1 - beta ** (past.n_steps + 1)
    if math.isnan(past.share) or past.share == 1 - beta**past.n_steps:
        # β1 was the same all along: the bias correction undoes the share to the last bit.
        return now["lr"], corrected
    share = beta * past.share + (1 - beta)
    return now["lr"] * (share / corrected), share


def _rmsprop(now: Settings, past: Follow) -> tuple[float, float]:
    momentum = now["momentum"]
    if momentum == 0:
        return now["lr"], past.share
    share = momentum * (0.0 if math.isnan(past.share) else past.share) + 1
    return now["lr"] * share, share


def _adagrad(now: Settings, past: Follow) -> tuple[float, float]:
    return now["lr"] / (1 + past.n_steps * now["lr_decay"]), past.share


def _as_given(now: Settings, past: Follow) -> tuple[float, float]:
    return now["increment"], past.share


Rule = Callable[[Settings, Follow], tuple[float, float]]

TABLE: dict[type[Optimizer], tuple[Rule, tuple[str, ...]]] = {
    SGD: (_sgd, ("momentum", "dampening", "nesterov")),
    Adam: (_adam, ("betas",)),
    AdamW: (_adam, ("betas",)),
    Adamax: (_adam, ("betas",)),
    RMSprop: (_rmsprop, ("momentum",)),
    Adagrad: (_adagrad, ("lr_decay",)),
}
"""The optimisers whose steps are known, with the settings that count beside lr and weight_decay."""


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimiser inside the wrappers of accelerate and Lightning."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    return inner


def rule_of(optimizer: Optimizer) -> tuple[Rule, tuple[str, ...]]:
    """Return the rule of an optimiser's class, or of a subclass that keeps its step."""
    # torch wraps the step of a class when its first optimiser is made.
    own = inspect.unwrap(type(optimizer).step)
    known = next((cls for cls in type(optimizer).__mro__ if cls in TABLE), None)
    if known is not None and own is inspect.unwrap(known.step):
        return TABLE[known]
    raise ValueError(
        f"optimizer: the effective time of {type(optimizer).__name__} is not known, only that of "
        f"{', '.join(cls.__name__ for cls in TABLE)}. Pass tau=: what each step adds to it, a "
        "number or a function of the optimiser."
    )


class EffectiveTime:
    """τ of the first parameter group that moves, and the factor of every group beside it.

    ``given``: what a step adds, a number or a function of the optimiser, instead of the table.
    """

    def __init__(self, optimizer: Optimizer, given: Any = None) -> None:
        self.optimizer = optimizer
        self._given = _check_increment(given)
        self._rule, self._keys = (_as_given, ()) if given is not None else rule_of(optimizer)
        self.n_steps = 0
        self.tau_weight_decay = 0.0
        self.lr = math.nan
        # None until a group has moved: the first may be empty, frozen, or at a rate of 0.
        self._reference: int | None = None
        # Steps at which other groups moved and that one did not.
        self.n_standing = 0
        self.groups: Sequence[Follow] = [self._behind(group) for group in optimizer.param_groups]
        self.factors = _factors_of_rates(optimizer.param_groups)

    @property
    def tau(self) -> float:
        """Effective time of the group of reference."""
        return self.groups[self.reference].tau

    @property
    def reference(self) -> int:
        """The group whose time is τ."""
        return self._reference or 0

    def read(self) -> list[Settings]:
        """Return the settings that the step just taken used, one for each group; no waiting."""
        return [self._settings(group) for group in self.optimizer.param_groups]

    def advance(self, settings: Sequence[Settings]) -> bool:
        """Count one step, whose settings are numbers by now; tell whether it did anything."""
        if not any(now["active"] for now in settings):
            return False  # without a gradient torch does nothing
        before = [*self.groups, *[Follow()] * (len(settings) - len(self.groups))]
        pairs = zip(settings, before, strict=True)
        self.groups, moved = zip(*(self._after(now, past) for now, past in pairs), strict=True)
        if self._reference is None:
            self._reference = next((k for k, one in enumerate(moved) if one > 0), None)
        own = moved[self.reference]
        if own > 0:
            self.factors = [one / own for one in moved]
        self.n_standing += own == 0 and any(moved)
        now = settings[self.reference]
        self.n_steps += 1
        self.lr = now["lr"]
        if now["active"]:
            self.tau_weight_decay += now["lr"] * now["weight_decay"]
        return True

    def record(self) -> dict[str, Any]:
        """Return all that goes on from here, as plain numbers."""
        return {
            "n_steps": self.n_steps,
            "tau": self.tau,
            "tau_weight_decay": self.tau_weight_decay,
            "lr": self.lr,
            "reference": self._reference,
            "groups": [asdict(group) for group in self.groups],
            "factors": self.factors,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what :meth:`record` returned."""
        self.n_steps = int(record["n_steps"])
        self.tau_weight_decay = float(record["tau_weight_decay"])
        self.lr = float(record["lr"])
        self._reference = record["reference"]
        self.groups = [Follow(**group) for group in record["groups"]]
        self.factors = [float(factor) for factor in record["factors"]]

    def restore_row(
        self,
        *,
        step: int,
        tau: float,
        tau_weight_decay: float,
        lr: float,
        own: Follow,
        reference: int | None,
    ) -> None:
        """Go on from a row of the history, which knows the group of reference alone.

        Groups with its settings have followed as it did; others are taken as long under way.
        """
        self._reference = reference
        settings = self.read()
        same = [_recursion(now) == _recursion(settings[self.reference]) for now in settings]
        self.groups = [
            Follow(tau, own.n_steps, own.share if alike else group.share)
            for alike, group in zip(same, self.groups, strict=True)
        ]
        self.n_steps, self.tau_weight_decay, self.lr = step, tau_weight_decay, lr

    def _settings(self, group: Mapping[str, Any]) -> Settings:
        now = {
            "lr": _value(group.get("lr", math.nan)),
            "weight_decay": _value(group.get("weight_decay", 0.0)),
            "active": any(p.grad is not None for p in group["params"]),
        }
        for key in self._keys:
            now[key] = _value(group[key][0] if key == "betas" else group[key])
        if "betas" in now:
            now["beta1"] = now.pop("betas")
        if self._given is not None:
            now["increment"] = self._increment()
            now["active"] = True  # its gradients may lie elsewhere
        return now

    def _increment(self) -> Any:
        if callable(self._given):
            increment = _value(call_given("tau", self._given, self.optimizer))
            if isinstance(increment, Tensor) and increment.numel() == 1:
                return increment
            return check_real("tau, as its function gives it,", increment)
        return self._given

    def _after(self, now: Settings, past: Follow) -> tuple[Follow, float]:
        if not now["active"]:
            return past, 0.0
        increment, share = self._rule(now, past)
        return Follow(past.tau + increment, past.n_steps + 1, share), increment

    def _behind(self, group: Mapping[str, Any]) -> Follow:
        """Return what a group has behind it that was trained before: a buffer is taken as full."""
        held = [self.optimizer.state.get(p, {}) for p in group["params"]]
        n_steps = max((int(one["step"]) for one in held if "step" in one), default=0)
        share = math.nan
        if any(one.get("momentum_buffer") is not None for one in held):
            share = (1 - group.get("dampening", 0.0)) / (1 - group["momentum"])
        elif n_steps and "betas" in group:
            share = 1 - float(group["betas"][0]) ** n_steps
        return Follow(0.0, n_steps, share)


def on_the_cpu(values: Sequence[Any]) -> list[float]:
    """Return numbers and tensors of one element as floats; each device is waited for once."""
    found: list[float] = [math.nan] * len(values)
    by_place: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            by_place.setdefault((value.device, value.dtype), []).append(position)
        else:
            found[position] = float(value)
    for positions in by_place.values():
        stacked = torch.stack([values[p].reshape(()) for p in positions])
        for position, number in zip(positions, stacked.double().tolist(), strict=True):
            found[position] = number
    return found


def _recursion(now: Settings) -> dict[str, Any]:
    return {key: now[key] for key in now if key not in ("lr", "weight_decay", "active")}


def _factors_of_rates(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the rates over the first one, before a step was taken: a warm-up may begin at 0."""
    rates = on_the_cpu([group.get("initial_lr", group.get("lr", 1.0)) for group in groups])
    return [rate / rates[0] if rates[0] > 0 else math.nan for rate in rates]


def _value(value: Any) -> Any:
    """Return a number, or a copy of a tensor on a device, where reading it would wait."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu":
        return value.item()
    # A scheduler writes the next rate into the same tensor.
    return value.detach().clone()


def _check_increment(given: Any) -> Any:
    if given is None or callable(given):
        return given
    return check_real("tau", given, low=0.0)
