"""The state of an optimiser: its moments and settings, matched to a model's parameters by name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralshell.models.ties import tied_groups

KIND = "spectralshell optimizer state"
"""What the metadata of a file of moments say it is."""

_SEPARATOR = "/"
"""Between the key of a moment and the parameter's name: ``exp_avg/layer.weight``."""

_LONGEST = 160
"""Letters of another library's message that are passed on."""

Moments = dict[str, dict[str, Tensor]]


class OptimizerState:
    """Moments and settings of an optimiser at one step: in memory, or a file read when needed.

    ``groups``: the settings of each parameter group. ``group_of``: parameter name to its group.
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[Mapping[str, Any]],
        group_of: Mapping[str, int],
        moments: Moments | None = None,
        path: str | None = None,
    ) -> None:
        self.name = name
        self.groups = tuple(dict(group) for group in groups)
        self.group_of = dict(group_of)
        self.moments = moments
        self.path = path
        self.stamp = _stamp(path) if path is not None else None

    @classmethod
    def from_argument(
        cls, model: nn.Module, optimizer: Any, *, names: Sequence[Sequence[str]] | None = None
    ) -> OptimizerState | None:
        """Build from an optimiser, its ``state_dict()``, or a file; check it against the model.

        ``names`` of the parameters of each group, for a state dict that does not tell them.
        """
        if optimizer is None:
            return None
        if isinstance(optimizer, OptimizerState):
            optimizer.check(model)
            return optimizer
        inner = getattr(optimizer, "optimizer", None)  # accelerate's and Lightning's wrappers
        if isinstance(inner, Optimizer):
            optimizer = inner
        if isinstance(optimizer, Optimizer):
            state = cls.of_optimizer(model, optimizer)
        elif isinstance(optimizer, Mapping):
            state = cls._of_state_dict(model, optimizer, names)
        elif isinstance(optimizer, (str, os.PathLike)):
            state = cls._of_file(model, os.fspath(optimizer), names)
        else:
            raise TypeError(
                "optimizer must be None, a torch optimiser, its state_dict(), or the path of a "
                f"file of one, got {type(optimizer).__name__}."
            )
        state.check(model)
        return state

    @classmethod
    def of_optimizer(
        cls, model: nn.Module, optimizer: Optimizer, *, copy: bool = True
    ) -> OptimizerState:
        """Take the present moments of an optimiser, copied or the tensors that it writes to."""
        named = parameter_names(model)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in named for p in held):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} holds no parameter of the model; pass the "
                "optimiser that trains it."
            )
        group_of = {
            named[id(p)]: position
            for position, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if id(p) in named
        }
        moments = {
            named[id(p)]: _tensors_of(optimizer.state[p], clone=copy)
            for p in held
            if id(p) in named and p in optimizer.state
        }
        groups = [settings_of(group) for group in optimizer.param_groups]
        return cls(type(optimizer).__name__, groups, group_of, moments)

    @classmethod
    def _of_state_dict(
        cls,
        model: nn.Module,
        content: Mapping[str, Any],
        names: Sequence[Sequence[str]] | None,
    ) -> OptimizerState:
        groups: Any = content.get("param_groups")
        whole = isinstance(content.get("state"), Mapping) and isinstance(groups, Sequence)
        if not whole or not all(isinstance(group.get("params"), list) for group in groups):
            raise ValueError(
                "optimizer: the mapping is not the state_dict() of a torch optimiser: it has no "
                f"'state' and 'param_groups', but {sorted(map(str, content))[:5]}."
            )
        names = names or _names_of_groups(model, groups)
        moments: Moments = {}
        group_of: dict[str, int] = {}
        for position, (group, own) in enumerate(zip(groups, names, strict=True)):
            if len(own) != len(group["params"]):
                raise ValueError(
                    f"optimizer: group {position} holds {len(group['params'])} parameters, and "
                    f"{len(own)} names are known for it; pass the optimiser itself."
                )
            for key, name in zip(group["params"], own, strict=True):
                group_of[name] = position
                if key in content["state"]:
                    moments[name] = _tensors_of(content["state"][key], clone=True)
        settings = [settings_of(group) for group in groups]
        return cls("", settings, group_of, moments)

    @classmethod
    def _of_file(
        cls, model: nn.Module, path: str, names: Sequence[Sequence[str]] | None
    ) -> OptimizerState:
        path = os.path.abspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"optimizer: there is no file at {path!r}; check the path.")
        metadata = _metadata_of(path)
        if metadata is not None:
            described = _described(path, metadata)
            return cls(described["name"], described["groups"], described["group_of"], path=path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the reader raises on a file that is not what it seems
            raise ValueError(
                f"optimizer: {path!r} is neither a file of moments of a recorder nor a "
                f"state_dict() that weights_only reads ({_first_line(error)})."
            ) from error
        if not isinstance(content, Mapping):
            raise ValueError(
                f"optimizer: {path!r} holds {type(content).__name__}, not a state_dict()."
            )
        return cls._of_state_dict(model, content, names)

    def load(self) -> Moments:
        """Return the moments by parameter name; a file is read anew at every call."""
        if self.moments is not None:
            return {name: dict(held) for name, held in self.moments.items()}
        path = str(self.path)
        try:
            if _stamp(path) != self.stamp:
                raise ValueError(
                    f"optimizer: {path!r} was changed after it was opened; make the snapshot again."
                )
            return _by_parameter(load_file(path, device="cpu"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"optimizer: {path!r} cannot be read ({error}).") from error

    def load_into(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Give an optimiser of the same groups these moments and settings."""
        named = parameter_names(model)
        held = [[named.get(id(p), "") for p in g["params"]] for g in optimizer.param_groups]
        own = {name: position for position, names in enumerate(held) for name in names}
        if own != self.group_of or len(held) != len(self.groups):
            raise ValueError(
                f"optimizer: its {len(held)} groups do not hold the parameters that those of the "
                f"saved {self.name} hold; build it as it was."
            )
        moments = self.load()
        present = optimizer.state_dict()
        numbers = {
            name: number
            for group, names in zip(present["param_groups"], held, strict=True)
            for number, name in zip(group["params"], names, strict=True)
        }
        groups = [
            {**group, **_settings_like(group, saved)}
            for group, saved in zip(present["param_groups"], self.groups, strict=True)
        ]
        state = {numbers[name]: tensors for name, tensors in moments.items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of all moments; of a file its header is read."""
        if self.moments is not None:
            return {
                name: {key: tuple(t.shape) for key, t in held.items()}
                for name, held in self.moments.items()
            }
        with safe_open(str(self.path), framework="pt") as file:
            flat = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return _by_parameter(flat)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where names or shapes are not those of the model's parameters."""
        own = {n: tuple(t.shape) for names, t in tied_groups(model) for n in names}
        foreign = sorted(name for name in self.group_of if name not in own)
        if foreign:
            raise ValueError(
                f"optimizer: it holds {', '.join(foreign[:5])}, which the model has not; pass the "
                "optimiser of this model."
            )
        for name, held in self.shapes().items():
            for key, shape in held.items():
                if shape not in ((), (1,), own.get(name)):
                    raise ValueError(
                        f"optimizer: {key} of {name!r} has shape {shape}, the parameter "
                        f"{own.get(name)}; pass the optimiser of this model."
                    )


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the first name of each parameter, by the identity of the object."""
    named: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), name)
    return named


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group as plain numbers, without its parameters."""
    return {
        key: _plain(value)
        for key, value in group.items()
        if key not in ("params", "param_names") and _plain(value) is not NotImplemented
    }


def packed(moments: Moments) -> dict[str, Tensor]:
    """Return the tensors of a file of moments: ``key/parameter`` to tensor."""
    return {
        f"{key}{_SEPARATOR}{name}": tensor
        for name, held in moments.items()
        for key, tensor in held.items()
    }


def description(state: OptimizerState) -> dict[str, str]:
    """Return the metadata of a file of moments, which a reader needs beside its tensors."""
    content = {"name": state.name, "groups": state.groups, "group_of": state.group_of}
    return {"kind": KIND, "optimizer": json.dumps(content)}


def _described(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        if metadata.get("kind") != KIND:
            raise ValueError(f"its kind is {metadata.get('kind')!r}")
        content = json.loads(metadata["optimizer"])
        return {
            "name": str(content["name"]),
            "groups": [dict(group) for group in content["groups"]],
            "group_of": {str(k): int(v) for k, v in content["group_of"].items()},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"optimizer: {path!r} is no file of moments of a recorder ({error}); pass one of its "
            "folder moments/."
        ) from error


def _metadata_of(path: str) -> dict[str, str] | None:
    """Return the metadata of a safetensors file, None of any other."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST]


def _by_parameter(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for label, value in flat.items():
        key, _, name = label.partition(_SEPARATOR)
        found.setdefault(name, {})[key] = value
    return found


def _names_of_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the names that a state dict tells, or those of the model's parameters in order."""
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    named = list(dict.fromkeys(parameter_names(model).values()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    n_held = sum(len(group["params"]) for group in groups)
    for candidates in (named, [name for name in named if name in trained]):
        if len(groups) == 1 and len(candidates) == n_held:
            return [candidates]
    raise ValueError(
        f"optimizer: a state_dict() of {len(groups)} groups and {n_held} parameters does not tell "
        f"which of the model's {len(named)} parameters they are. Pass the optimiser itself, or "
        "build it on model.named_parameters(), so that its state tells the names."
    )


def _tensors_of(held: Mapping[str, Any], *, clone: bool) -> dict[str, Tensor]:
    found = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            found[str(key)] = value.detach().clone() if clone else value.detach()
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[str(key)] = torch.tensor(float(value), dtype=torch.float64)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return NotImplemented if NotImplemented in items else items
    return NotImplemented


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _settings_like(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings in the types of a group's own: tensors of its device, and tuples."""
    found = {}
    for key, value in saved.items():
        own = group.get(key)
        if isinstance(own, Tensor):
            value = torch.as_tensor(value, dtype=own.dtype, device=own.device).reshape(own.shape)
        found[key] = tuple(value) if isinstance(own, tuple) else value
    return found
