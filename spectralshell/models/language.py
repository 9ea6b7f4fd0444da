"""Batches with their labels inside, as language models take them, read as inputs and targets.

A causal model predicts the next token: its own loss moves the labels by one before it compares.
Most models of Hugging Face say what they do by their class; where one does not, the user has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""Label of what is left out, as in ``torch.nn.functional.cross_entropy``."""

_NEXT_TOKEN = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "DoubleHeadsModel")

_GENERATION = ("ForConditionalGeneration", "ForVision2Seq", "ForVisionText2Text")
"""Causal as well, where the model has no encoder: images and text in one row."""

_SAME_TOKEN = (
    "ForMaskedLM",
    "WithLMHeadModel",
    "ForTokenClassification",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)

_TAKES_LABELS_MOVED = {
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "ProphetNetForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLNetLMHeadModel",
}
"""Decoders whose own loss compares with the labels as they are (read off transformers 5.23)."""


@dataclass(frozen=True)
class LabelledBatch:
    """A batch whose labels were taken out of it."""

    # What the model is called with, without the labels.
    inputs: dict[str, Any]
    # Labels in the places of the outputs that they are compared with.
    targets: Tensor
    # Whether the labels were moved by one.
    moved: bool
    # Whether the model's class decided that, and not the user or the shape.
    by_class: bool
    # Labels that count by themselves, but stand where the attention mask is zero.
    n_masked: int


def predicts_next_token(model: nn.Module) -> bool | None:
    """Tell whether a model's own loss moves the labels by one; None where its class does not say.

    Of an encoder and a decoder together it does not: the decoder's inputs are moved instead.
    """
    model = _base(model)
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if "PreTrainedModel" not in kinds:
        return None
    if _has_encoder(model) or not _TAKES_LABELS_MOVED.isdisjoint(kinds):
        return False
    for kind in kinds:  # of a user's subclass, the first that says it
        if kind.endswith(_SAME_TOKEN):
            return False
        if kind.endswith(_NEXT_TOKEN + _GENERATION):
            return True
    return None


def take_labels(model: nn.Module, batch: Mapping[str, Any], shift: bool | None) -> LabelledBatch:
    """Return inputs and targets of a batch with ``labels``; ``shift`` is None by the model's class.

    Raises ValueError or TypeError that names what is missing or does not fit.
    """
    inputs = dict(batch)
    labels = _as_labels(inputs)
    del inputs["labels"]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        if shift:
            raise TypeError(f"shift=True moves class labels, and these have dtype {labels.dtype}.")
        return LabelledBatch(inputs, _as_column(model, labels), False, False, 0)
    labels = labels.long()
    moved, by_class = _decide(model, labels, shift)
    _check_shape(model, inputs, labels, moved)
    inputs = _with_decoder_inputs(model, inputs, labels)
    targets, n_masked = _leave_out_masked(model, inputs, labels, moved)
    if moved:
        targets = move_by_one(targets)
    _check_values(labels, targets, n_masked, moved)
    return LabelledBatch(inputs, targets, moved, by_class, n_masked)


def move_by_one(labels: Tensor) -> Tensor:
    """Return labels (B, T, …) so that place t has label t + 1; the last place has none."""
    if labels.ndim < 2:
        raise ValueError(
            f"shift=True moves labels along their second dimension, that of tokens, and these have "
            f"shape {tuple(labels.shape)}."
        )
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


def move_back(targets: Tensor) -> Tensor:
    """Return labels that :func:`move_by_one` turns into ``targets``; their first place has none."""
    labels = torch.full_like(targets, IGNORED)
    labels[:, 1:] = targets[:, :-1]
    return labels


def repeats_inputs(inputs: Any, targets: Any) -> bool:
    """Tell whether targets are the tokens of the inputs in their places, but for what is left out.

    Not where moving them by one would change nothing.
    """
    if isinstance(inputs, Mapping):
        tokens = inputs.get("input_ids")
    else:
        tokens = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if not isinstance(tokens, Tensor) or not isinstance(targets, Tensor):
        return False
    if tokens.shape != targets.shape or tokens.ndim != 2 or tokens.is_meta or targets.is_meta:
        return False
    if tokens.is_floating_point() or targets.is_floating_point():
        return False
    tokens = tokens.to(targets.device)
    counted = targets != IGNORED
    same = bool(((tokens == targets) | ~counted).all())
    return same and bool((tokens[:, 1:] != targets[:, :-1])[counted[:, :-1]].any())


def _base(model: nn.Module) -> nn.Module:
    """Return the model inside an adapter of peft."""
    inner = getattr(model, "get_base_model", None)
    found = inner() if callable(inner) else model
    return found if isinstance(found, nn.Module) else model


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _as_labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        held = ", ".join(repr(str(key)) for key in batch) or "nothing"
        named = next((key for key in ("label", "label_ids", "targets") if key in batch), None)
        remedy = (
            f"rename {named!r} to 'labels'"
            if named
            else "add them (for a causal model a copy of 'input_ids', -100 at what does not count)"
        )
        raise ValueError(
            f"targets: none were given, and the batch holds no 'labels' but {held}; {remedy}, or "
            "pass targets (an empty tuple where a callable residual needs none)."
        )
    if isinstance(labels, Tensor):
        return labels.detach()
    try:
        return torch.as_tensor(labels).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"inputs['labels'] must be a tensor or an array, got {type(labels).__name__} "
            f"({error}); "
            'a tokenizer gives tensors with return_tensors="pt" and padding=True.'
        ) from error


def _as_column(model: nn.Module, labels: Tensor) -> Tensor:
    """Return real labels in the shape of the outputs of a regression, (B, 1)."""
    config = getattr(_base(model), "config", None)
    single = labels.ndim == 1 and getattr(config, "num_labels", None) == 1
    return labels.unsqueeze(-1) if single else labels


def _decide(model: nn.Module, labels: Tensor, shift: bool | None) -> tuple[bool, bool]:
    """Return whether labels are to be moved, and whether the model's class says so."""
    if shift is not None:
        return shift, False
    if labels.ndim < 2:  # of samples, not of tokens
        return False, False
    found = predicts_next_token(model)
    if found is None:
        raise ValueError(
            f"inputs['labels']: {type(model).__name__} does not say whether its loss compares the "
            "outputs at a token with that token's label or with the next one's; pass shift=True "
            "if it predicts the next token, shift=False if the labels fit as they are."
        )
    return found, True


def _check_shape(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, moved: bool) -> None:
    tokens = inputs.get("input_ids")
    if not moved or not isinstance(tokens, Tensor) or tokens.shape == labels.shape:
        return
    raise ValueError(
        f"inputs['labels'] have shape {tuple(labels.shape)} and 'input_ids' "
        f"{tuple(tokens.shape)}: {type(model).__name__} predicts the next token, and needs one "
        "label for each, in its place (they are moved by one here)."
    )


def _with_decoder_inputs(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor
) -> dict[str, Any]:
    """Add what a decoder reads, which a model makes of the labels where it is given them."""
    model = _base(model)
    given = (inputs.get("decoder_input_ids"), inputs.get("decoder_inputs_embeds"))
    if any(part is not None for part in given) or labels.ndim < 2 or not _has_encoder(model):
        return inputs
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        if type(model).__name__.endswith(_SAME_TOKEN):  # it has a way of its own
            return inputs
        raise ValueError(
            f"inputs: {type(model).__name__} has a decoder, and does not say how its inputs follow "
            "from the labels; add 'decoder_input_ids' to the batch."
        )
    try:
        decoded = prepare(labels=labels)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"inputs: {type(model).__name__} could not make 'decoder_input_ids' of the labels "
            f"({error}); add them to the batch."
        ) from error
    return {**inputs, "decoder_input_ids": decoded}


def _leave_out_masked(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, moved: bool
) -> tuple[Tensor, int]:
    """Return labels without those under a zero mask, and how many of them would have counted."""
    decodes = _has_encoder(_base(model)) and "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    if not isinstance(mask, Tensor):
        mask = torch.as_tensor(mask) if isinstance(mask, list) else None
    if mask is None or mask.shape != labels.shape or mask.ndim != 2:
        return labels, 0
    if mask.is_meta or labels.is_meta:
        return labels, 0
    hidden = (mask.to(labels.device) == 0) & (labels != IGNORED)
    counted = hidden[:, 1:] if moved else hidden
    return labels.masked_fill(hidden, IGNORED), int(counted.sum())


def _check_values(labels: Tensor, targets: Tensor, n_masked: int, moved: bool) -> None:
    if labels.is_meta:
        return
    wrong = labels[(labels < 0) & (labels != IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"inputs['labels'] hold {int(wrong[0])}, which is no class; {IGNORED} leaves a token "
            "out."
        )
    if bool((targets != IGNORED).any()):
        return
    why = f"all labels are {IGNORED}"
    if n_masked:
        why = f"all labels are {IGNORED} or under a zero attention mask"
    elif moved and bool((labels != IGNORED).any()):
        why = "only first tokens are labelled, which nothing predicts"
    raise ValueError(f"inputs['labels'] leave no token: {why}; label at least one.")
