"""What is measured of a batch with its labels inside is the loss that the model itself computes."""

import pytest
import torch
from torch.nn import functional as F

from spectralshell import ShellEnergyEstimator
from spectralshell.models.language import move_by_one
from spectralshell.operators import build_exact_kernel, build_kernel
from spectralshell.operators.problem import pose_problem
from spectralshell.snapshots import Snapshot
from tests.language_models import MODELS, make_batch, make_language_model

pytest.importorskip("transformers")

SINGLE = 1e-6
"""Relative, of a loss in float32: models compute theirs in it whatever their weights are."""

DOUBLE = 1e-12
"""Relative, of a loss in float64."""

KERNEL = 1e-11
"""Relative to the largest entry, of float64 kernels by two ways of differentiation."""


def measured_loss(name, model, batch):
    """Return the mean of e, or of its square, as a kernel would have it."""
    residual = "mse" if name == "gpt2 values" else "nll"
    found = pose_problem(Snapshot(model, batch), residual=residual).evaluate(None)
    assert found.problem.notes == ()
    error = found.residual_vector * found.targets.n_rows**0.5
    return float(error.mean() if residual == "nll" else error.square().mean())


def notes_of(model, batch, **options):
    return pose_problem(Snapshot(model, batch, **options), residual="nll").notes


def own_loss(model, batch):
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_measured_is_the_models_own(name):
    model, batch = make_language_model(name, torch.float32), make_batch(name, torch.float32)
    expected = own_loss(model, batch)
    assert measured_loss(name, model, batch) == pytest.approx(expected, rel=SINGLE)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_measured_in_double_is_that_of_the_outputs(name):
    model, batch = make_language_model(name), make_batch(name)
    moved = name in ("gpt2", "gpt-neox", "llama")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name in ("bart", "t5"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        inputs["decoder_input_ids"] = shifted
    with torch.no_grad():
        logits = model(**inputs).logits
    labels = move_by_one(batch["labels"]) if moved else batch["labels"]
    if name == "gpt2 values":
        expected = F.mse_loss(logits.squeeze(), labels)
    else:
        expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert measured_loss(name, model, batch) == pytest.approx(float(expected), rel=DOUBLE)


@pytest.mark.parametrize(
    ("residual", "build"),
    [("nll", build_kernel), ("nll", build_exact_kernel), ("cross-entropy", build_exact_kernel)],
)
def test_the_kernel_of_a_causal_batch_is_that_of_plain_torch(residual, build):
    model, batch = make_language_model("gpt2"), make_batch("gpt2", n_samples=2, length=4)
    matrix = build(Snapshot(model, batch), residual=residual).to_dense()
    expected = dense_reference(model, batch, residual)
    assert torch.allclose(matrix, expected, rtol=0.0, atol=KERNEL * float(expected.abs().max()))


def dense_reference(model, batch, residual):
    """Return J Jᵀ / N from one reverse pass for each entry, with the shift written out."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tokens, mask = batch["input_ids"], batch["attention_mask"]

    def entries(parameters):
        called = torch.func.functional_call(
            model, parameters, (), {"input_ids": tokens, "attention_mask": mask}
        )
        logits, following = called.logits[:, :-1], batch["labels"][:, 1:]
        rows, labels = logits[following != -100], following[following != -100]
        if residual == "nll":
            return -rows.log_softmax(-1)[torch.arange(len(labels)), labels]
        return rows.flatten()

    values, pull = torch.func.vjp(entries, parameters)
    rows = []
    for unit in torch.eye(len(values), dtype=values.dtype):
        rows.append(torch.cat([part.flatten() for part in pull(unit)[0].values()]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T / int((batch["labels"][:, 1:] != -100).sum())


def test_the_direction_of_training_is_the_gradient_of_the_models_own_loss():
    model, batch = make_language_model("gpt2"), make_batch("gpt2")
    kernel = build_kernel(Snapshot(model, batch), residual="nll")
    model(**batch).loss.backward()
    expected = [-parameter.grad for parameter in model.parameters()]
    for got, wanted in zip(kernel.training_velocity(), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=0.0, atol=SINGLE)


def test_masked_labels_are_told_and_rows_are_labels():
    model, batch = make_language_model("gpt2"), make_batch("gpt2")
    batch["labels"] = batch["input_ids"]
    snapshot = Snapshot(model, batch)
    found = pose_problem(snapshot, residual="nll").evaluate(None)
    assert found.problem.notes == ("2 labels under a zero attention mask left out",)
    assert found.targets.n_rows == snapshot.n_labels == 13


def with_other_loss(loss):
    model = make_language_model("gpt2")
    model.loss_function = loss
    return model


def test_a_model_that_does_otherwise_than_its_class_says_is_refused():
    def unmoved(logits, labels, vocab_size, **kwargs):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    batch = make_batch("gpt2")
    with pytest.raises(ValueError, match="pass shift=False"):
        notes_of(with_other_loss(unmoved), batch)
    assert notes_of(with_other_loss(unmoved), batch, shift=True) == ()


def test_a_masked_model_that_predicts_the_next_token_is_refused():
    model, batch = make_language_model("bart decoder"), make_batch("bart decoder")
    forward = model.forward

    def moving(labels=None, **inputs):
        return forward(labels=None if labels is None else move_by_one(labels), **inputs)

    model.forward = moving
    with pytest.raises(ValueError, match="pass shift=True"):
        notes_of(model, batch)


def test_a_loss_with_more_in_it_is_told_in_the_status():
    def doubled(logits, labels, vocab_size, **kwargs):
        moved = move_by_one(labels)
        return 2.0 * F.cross_entropy(logits.flatten(0, 1), moved.flatten())

    (note,) = notes_of(with_other_loss(doubled), make_batch("gpt2"))
    assert "the model's own loss is" in note


def test_a_loss_that_fails_is_not_compared():
    def failing(logits, labels, vocab_size, **kwargs):
        raise RuntimeError("no loss")

    assert notes_of(with_other_loss(failing), make_batch("gpt2")) == ()


@pytest.mark.parametrize("wrong", [31, 1000])
def test_a_label_beyond_the_vocabulary_is_named(wrong):
    batch = make_batch("gpt2")
    batch["labels"][1, 2] = wrong
    with pytest.raises(ValueError, match=f"class index {wrong}, out of range for 31 classes"):
        build_kernel(Snapshot(make_language_model("gpt2"), batch), residual="nll")


def test_the_model_is_as_it_was():
    model, batch = make_language_model("gpt2", torch.float32), make_batch("gpt2")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache = model.config.use_cache
    ShellEnergyEstimator(residual="nll", n_steps=4).fit([Snapshot(model, batch)])
    assert model.training
    assert model.config.use_cache is cache
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
