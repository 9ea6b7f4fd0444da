"""Batches with their labels inside: how they are read, and what is refused."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell.models.language import move_back, move_by_one, predicts_next_token
from spectralshell.snapshots import Snapshot, make_snapshots
from spectralshell.warning_categories import SnapshotWarning
from tests.language_models import make_batch, make_language_model
from tests.zoo import TiedLanguageModel

pytest.importorskip("transformers")

NEXT_TOKEN = {
    "gpt2": True,
    "gpt-neox": True,
    "llama": True,
    "bert masked": False,
    "t5": False,
    "bart decoder": False,
    "gpt2 sequences": False,
    "gpt2 tokens": False,
}


@pytest.fixture(scope="module")
def gpt2():
    return make_language_model("gpt2")


@pytest.fixture
def batch():
    return make_batch("gpt2")


class Tagger(nn.Module):
    """Takes its tokens by name, as the models of Hugging Face, and says nothing of its loss."""

    def __init__(self):
        super().__init__()
        self.inner = TiedLanguageModel(31, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids)


@pytest.mark.parametrize(("name", "expected"), NEXT_TOKEN.items())
def test_a_models_class_says_whether_it_predicts_the_next_token(name, expected):
    assert predicts_next_token(make_language_model(name)) is expected


def test_a_subclass_of_the_user_and_a_plain_module(gpt2):
    class Mine(type(gpt2)):
        pass

    assert predicts_next_token(Mine(gpt2.config)) is True
    assert predicts_next_token(nn.Linear(1, 1)) is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_says_what_its_base_says():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = peft.get_peft_model(make_language_model("gpt2"), lora)
    assert predicts_next_token(adapted) is True


def test_labels_of_a_causal_model_are_moved_by_one(gpt2, batch):
    snapshot = Snapshot(gpt2, batch)
    assert "labels" not in snapshot.inputs
    assert torch.equal(snapshot.targets[:, :-1], batch["labels"][:, 1:])
    assert bool((snapshot.targets[:, -1] == -100).all())
    assert snapshot.n_labels == int((batch["labels"][:, 1:] != -100).sum())


def test_moving_back_is_the_inverse_but_for_the_first_token(batch):
    back = move_back(move_by_one(batch["labels"]))
    assert torch.equal(back[:, 1:], batch["labels"][:, 1:])
    assert bool((back[:, 0] == -100).all())


@pytest.mark.parametrize("name", ["bert masked", "bart decoder", "gpt2 tokens", "t5"])
def test_labels_of_other_models_stay_in_their_places(name):
    batch = make_batch(name)
    assert torch.equal(Snapshot(make_language_model(name), batch).targets, batch["labels"])


@pytest.mark.parametrize("form", [UserDict, lambda batch: {k: v.numpy() for k, v in batch.items()}])
def test_forms_of_a_mapping_give_the_same_targets(gpt2, batch, form):
    expected = Snapshot(gpt2, batch).targets
    assert torch.equal(Snapshot(gpt2, form(batch)).targets, expected)
    assert torch.equal(make_snapshots(gpt2, [form(batch)])[0].targets, expected)


def test_what_a_tokenizer_gives_is_a_batch(gpt2, batch):
    from transformers import BatchEncoding

    assert torch.equal(Snapshot(gpt2, BatchEncoding(batch)).targets, Snapshot(gpt2, batch).targets)


def test_labels_as_a_list_are_read(gpt2, batch):
    listed = {**batch, "labels": batch["labels"].tolist()}
    assert torch.equal(Snapshot(gpt2, listed).targets, Snapshot(gpt2, batch).targets)


def test_mappings_and_pairs_may_be_mixed(gpt2, batch):
    given = {key: value for key, value in batch.items() if key != "labels"}
    inside, apart = make_snapshots(gpt2, [batch, (given, move_by_one(batch["labels"]))])
    assert torch.equal(inside.targets, apart.targets)
    assert (inside.batch, apart.batch) == (0, 1)


def test_the_users_batch_is_not_changed(gpt2, batch):
    before = {key: value.clone() for key, value in batch.items()}
    Snapshot(gpt2, {**batch, "attention_mask": batch["attention_mask"] * 0 + 1})
    Snapshot(gpt2, batch)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


@pytest.mark.parametrize(("name", "n_masked"), [("gpt2", 2), ("bert masked", 2)])
def test_labels_under_a_zero_mask_are_left_out_and_counted(name, n_masked):
    batch = make_batch(name)
    labelled = {**batch, "labels": batch["input_ids"].clone()}
    labelled["labels"][0, 2] = -100
    snapshot = Snapshot(make_language_model(name), labelled)
    assert torch.equal(snapshot.targets, Snapshot(make_language_model(name), batch).targets)
    assert snapshot.notes == (f"{n_masked} labels under a zero attention mask left out",)


def test_a_first_token_under_the_mask_counts_nowhere(gpt2, batch):
    # On the left, padding is where nothing is predicted: two of three labels would have counted.
    batch["attention_mask"][:] = 1
    batch["attention_mask"][1, :3] = 0
    batch["labels"] = batch["input_ids"]
    assert Snapshot(gpt2, batch).notes == ("2 labels under a zero attention mask left out",)


def test_a_mask_of_who_sees_whom_leaves_nothing_out(gpt2, batch):
    square = torch.ones(3, 1, 6, 6).tril()
    assert Snapshot(gpt2, {**batch, "attention_mask": square}).notes == ()


def test_the_mask_of_an_encoder_says_nothing_about_labels():
    batch = make_batch("t5", length=5)
    batch["labels"] = batch["input_ids"].clone()
    assert Snapshot(make_language_model("t5"), batch).n_labels == batch["labels"].numel()


def test_decoder_inputs_are_those_of_the_model_itself():
    model, batch = make_language_model("t5"), make_batch("t5")
    expected = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert torch.equal(Snapshot(model, batch).inputs["decoder_input_ids"], expected)
    own = torch.zeros_like(expected)
    given = Snapshot(model, {**batch, "decoder_input_ids": own})
    assert torch.equal(given.inputs["decoder_input_ids"], own)


def test_a_plain_model_is_told(batch):
    batch["labels"] = batch["input_ids"].clone()
    moved = Snapshot(Tagger(), batch, shift=True)
    assert torch.equal(moved.targets[:2], move_by_one(batch["labels"])[:2])
    assert torch.equal(Snapshot(Tagger(), batch, shift=False).targets[:2], batch["labels"][:2])
    apart = Snapshot(Tagger(), batch["input_ids"], batch["labels"], shift=True)
    assert torch.equal(apart.targets, move_by_one(batch["labels"]))


def test_targets_that_repeat_the_tokens_are_warned_of(gpt2, batch):
    tokens = batch["input_ids"]
    for inputs, targets in (
        ({"input_ids": tokens}, tokens),
        (tokens, tokens.clone()),
        ((tokens,), batch["labels"]),
    ):
        with pytest.warns(SnapshotWarning, match="shift=True"):
            Snapshot(gpt2, inputs, targets)


def test_targets_that_are_meant_are_not_warned_of(gpt2, batch):
    tokens = batch["input_ids"]
    Snapshot(gpt2, tokens, tokens, shift=False)
    Snapshot(gpt2, tokens[:, :-1], tokens[:, 1:])
    Snapshot(gpt2, torch.ones_like(tokens), torch.ones_like(tokens))
    Snapshot(make_language_model("bert masked"), tokens, tokens)


def changed(**parts):
    def change(batch):
        return {**batch, **parts}

    return change


TOKENS = torch.ones(3, 6, dtype=torch.long)

REFUSED = {
    "no labels": (lambda b: {"input_ids": b["input_ids"]}, {}, ValueError, "holds no 'labels'"),
    "another name": (
        lambda b: {"input_ids": b["input_ids"], "label": b["labels"]},
        {},
        ValueError,
        "rename 'label'",
    ),
    "ragged": (changed(labels=[[1, 2], [3]]), {}, TypeError, "padding=True"),
    "another length": (changed(labels=TOKENS[:, :4]), {}, ValueError, r"\(3, 4\).*\(3, 6\)"),
    "all ignored": (changed(labels=TOKENS * -100), {}, ValueError, "all labels are -100"),
    "all masked": (changed(attention_mask=TOKENS * 0), {}, ValueError, "zero attention mask"),
    "first alone": (
        changed(labels=torch.where(torch.arange(6) == 0, TOKENS, -100)),
        {},
        ValueError,
        "only first tokens",
    ),
    "negative": (changed(labels=-TOKENS), {}, ValueError, "hold -1"),
    "another shape": (changed(labels=TOKENS[:, :5].T), {}, ValueError, "one label for each"),
    "real values": (changed(labels=TOKENS * 0.5), {"shift": True}, TypeError, "float"),
    "a word": (changed(), {"shift": "yes"}, TypeError, "shift must be"),
}


@pytest.mark.parametrize(("change", "options", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_batches_are_named(gpt2, batch, change, options, kind, text):
    with pytest.raises(kind, match=text):
        Snapshot(gpt2, change(batch), **options)


def test_a_model_that_does_not_say_is_asked(batch):
    with pytest.raises(ValueError, match="pass shift=True"):
        Snapshot(Tagger(), batch)


def test_labels_of_samples_need_no_answer_and_have_no_next_token():
    labels = torch.tensor([0, 1])
    batch = {"input": torch.ones(2, 3), "labels": labels}
    assert torch.equal(Snapshot(nn.Linear(3, 2), batch).targets, labels)
    with pytest.raises(ValueError, match="second dimension"):
        Snapshot(nn.Linear(3, 2), batch, shift=True)


def test_a_decoder_without_a_start_is_named():
    model, batch = make_language_model("t5"), make_batch("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_input_ids"):
        Snapshot(model, batch)


def test_one_mapping_is_no_list_of_batches(gpt2, batch):
    with pytest.raises(TypeError, match=r"\[batch\]"):
        make_snapshots(gpt2, batch)
    with pytest.raises(TypeError, match="mapping with 'labels'"):
        make_snapshots(gpt2, [batch["input_ids"]])


def test_arrays_of_real_targets_cannot_be_moved():
    with pytest.raises(TypeError, match="class labels"):
        Snapshot(nn.Linear(3, 2), torch.ones(4, 3), np.zeros((4, 2)), shift=True)
