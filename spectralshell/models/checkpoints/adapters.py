"""A folder of peft: the weights of an adapter alone, which belong on a base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.checkpoints.places import file_inside
from spectralshell.models.checkpoints.shards import read_json
from spectralshell.models.checkpoints.tensor_files import TensorFile

CONFIG = "adapter_config.json"

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("layer_replication", "num_virtual_tokens", "alpha", "scaling"),
)
"""What of an adapter's settings its outputs depend on where names and shapes do not tell."""

_SAVED_WHOLE = "modules_to_save"

_PROMPT = {"prompt_embeddings": "prompt_encoder.{}.embedding.weight"}
"""Names that peft writes otherwise than it holds them."""


@dataclass(frozen=True)
class AdapterFolder:
    """The weights of an adapter; all others are those of the model that it is read for."""

    folder: str
    weights: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the adapter {self.folder!r}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return tuple(file_inside(self.folder, name, self.label) for name in (CONFIG, self.weights))

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Return the tensors by the names of the file."""
        return TensorFile(file_inside(self.folder, self.weights, self.label)).tensors(device)

    def named_for(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by the model's names; ValueError if they are not those of its adapter."""
        place, adapter, settings = _adapter_of(model, self.label)
        self._check_settings(settings)
        saved = _saved_names(model, place, adapter)
        missing = [name for name in saved if name not in tensors]
        if missing:
            raise ValueError(
                f"state: {self.label} does not fit {type(model).__name__}; missing keys: "
                f"{listed(missing)}; the file has {listed(tensors)}. Wrap the model with the "
                "configuration that the adapter was trained with."
            )
        prompt = {key: f"{place}{name.format(adapter)}" for key, name in _PROMPT.items()}
        return {
            saved.get(name, prompt.get(name, place + name)): tensor
            for name, tensor in tensors.items()
        }

    def _check_settings(self, settings: Mapping[str, object]) -> None:
        path = file_inside(self.folder, CONFIG, self.label)
        written = read_json(path, f"the file {path!r}")
        other = [
            f"{name}={written[name]!r} instead of {_plain(settings[name])!r}"
            for name in _SETTINGS
            if name in written and name in settings and written[name] != _plain(settings[name])
        ]
        if other:
            raise ValueError(
                f"state: {self.label} was trained with {listed(other)} of the model; wrap the "
                "model with the configuration that the adapter was trained with."
            )


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _adapter_of(model: nn.Module, source: str) -> tuple[str, str, dict[str, object]]:
    """Return where the peft model begins in the model's names, its adapter, and the settings."""
    for path, module in model.named_modules():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, Mapping) or not configs:
            continue
        active = _active(module) or list(configs)
        if len(active) != 1:
            raise ValueError(
                f"state: {source} is one adapter, and the model has {listed(map(repr, active))} "
                "switched on; leave one on with set_adapter."
            )
        config = configs[active[0]]
        return f"{path}." if path else "", active[0], dict(vars(config))
    raise ValueError(
        f"state: {source} holds the weights of an adapter alone, and {type(model).__name__} has no "
        "place for them; wrap the base model first, with peft.get_peft_model or "
        "PeftModel.from_pretrained."
    )


def _active(module: nn.Module) -> list[str]:
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
    if isinstance(active, str):
        return [active]
    return [str(name) for name in active] if isinstance(active, Iterable) else []


def _saved_names(model: nn.Module, place: str, adapter: str) -> dict[str, str]:
    """Return the names of an adapter's tensors as peft writes them, with those of the model."""
    saved = {}
    for name in model.state_dict(keep_vars=True):
        parts = name.removeprefix(place).split(".")
        if not name.startswith(place) or adapter not in parts:
            continue
        written = ".".join(part for part in parts if part not in (adapter, _SAVED_WHOLE))
        if written not in _PROMPTS_HELD:
            saved[written] = name
    return saved


_PROMPTS_HELD = frozenset(
    ".".join(part for part in name.split(".") if part != "{}") for name in _PROMPT.values()
)
