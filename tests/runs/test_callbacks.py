"""Trainer and Lightning give the run that the same loop gives when it is written plainly."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectralshell.runs import TrainingRecorder, TrainingRun
from tools import import_graph

EXACT = 1e-12
"""Relative: the same rates, added up in the same order."""

STEPS, ACCUMULATION, WARM_UP, RATE = 12, 2, 4, 0.05


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        output = self.layer(x)
        if labels is None:
            return output
        return {"loss": nn.functional.mse_loss(output, labels), "logits": output}


def _data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * ACCUMULATION * STEPS, 3, generator=generator)
    return [{"x": row, "labels": row.sum()[None]} for row in x]


def _micro_batches():
    data = _data()
    for start in range(0, len(data), 4):
        rows = data[start : start + 4]
        yield torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows])


def _warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: k / WARM_UP if k < WARM_UP else (STEPS - k) / (STEPS - WARM_UP),
    )


def _plain_run(directory, *, decay_of_bias):
    """The reference: the loop as people write it, with three lines of glue."""
    model = _Net()
    parts = [
        {"params": [p], "weight_decay": w}
        for p, w in zip(model.parameters(), (0.1, decay_of_bias), strict=True)
    ]
    optimizer = torch.optim.AdamW(parts, lr=RATE)
    scheduler = _warm_up(optimizer)
    with TrainingRecorder(model, optimizer, directory) as recorder:
        total = 0.0
        for position, (x, y) in enumerate(_micro_batches()):
            loss = model(x, y)["loss"] / ACCUMULATION
            loss.backward()
            total += loss.detach()
            if (position + 1) % ACCUMULATION == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                recorder.log(loss=total)
                scheduler.step()
                optimizer.zero_grad()
                total = 0.0
    return TrainingRun(directory, model)


def _trainer(tmp_path, callback, **options):
    import transformers

    model = _Net()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=WARM_UP,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=_data(),
        eval_dataset=_data()[:4],
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.fixture
def quiet_libraries():
    """What the libraries warn of by themselves on a machine without an accelerator."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|accelerate|lightning|torch)\b")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _assert_same_run(run, plain, *, loss):
    for name in ("step", "tau", "tau_weight_decay", "lr"):
        np.testing.assert_allclose(run.history[name], plain.history[name], rtol=EXACT, err_msg=name)
    # Sums of micro-batches in single precision.
    np.testing.assert_allclose(run.history["loss"], plain.history["loss"], rtol=loss)
    assert run.states["step"].tolist() == plain.states["step"].tolist()


def test_a_trainer_gives_the_run_of_the_plain_loop(tmp_path, quiet_libraries):
    from spectralshell.runs.callbacks.transformers import TrainingRecorderCallback

    trainer = _trainer(tmp_path, TrainingRecorderCallback(tmp_path / "run"))
    trainer.train()
    run, plain = (
        TrainingRun(tmp_path / "run", _Net()),
        _plain_run(tmp_path / "plain", decay_of_bias=0.0),
    )
    _assert_same_run(run, plain, loss=1e-6)
    assert run.history["grad_norm"].notna().all()
    saved, own = (
        run.snapshots([next(_micro_batches())])[-1].load_state(),
        trainer.model.state_dict(),
    )
    assert all(torch.equal(saved[name], own[name]) for name in own)


def test_a_trainer_that_resumes_goes_on_with_its_run(tmp_path, quiet_libraries):
    from spectralshell.runs.callbacks.transformers import TrainingRecorderCallback

    saving = {
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the best is an early one, not to be taken for the last
    }
    _trainer(tmp_path, TrainingRecorderCallback(tmp_path / "run"), **saving).train()
    whole = TrainingRun(tmp_path / "run", _Net())
    saved = [load_file(path) for path in whole.states["path"]]
    resumed = _trainer(tmp_path, TrainingRecorderCallback(tmp_path / "run"), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    run = TrainingRun(tmp_path / "run", _Net())
    np.testing.assert_array_equal(run.history["tau"], whole.history["tau"])
    assert run.states["step"].tolist() == whole.states["step"].tolist()
    for state, path in zip(saved, run.states["path"], strict=True):
        again = load_file(path)
        assert all(torch.equal(state[name], again[name]) for name in state)
    plain = _plain_run(tmp_path / "plain", decay_of_bias=0.0)
    last = load_file(plain.states["path"].iloc[-1])
    torch.testing.assert_close(saved[-1], last)


def _lightning_module(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = _Net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.1)
            scheduler = {"scheduler": _warm_up(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Module()


def _fit(lightning, module, callback, tmp_path, **options):
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
        **options,
    )
    batches = list(_micro_batches())
    return trainer, torch.utils.data.DataLoader(batches, batch_size=None)


def test_lightning_gives_the_run_of_the_plain_loop(tmp_path, quiet_libraries):
    import lightning.pytorch as lightning

    from spectralshell.runs.callbacks.lightning import TrainingRecorderCallback

    module = _lightning_module(lightning)
    callback = TrainingRecorderCallback(tmp_path / "run", model=module.net)
    trainer, loader = _fit(lightning, module, callback, tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader)
    run, plain = (
        TrainingRun(tmp_path / "run", _Net()),
        _plain_run(tmp_path / "plain", decay_of_bias=0.1),
    )
    _assert_same_run(run, plain, loss=1e-6)
    whole = TrainingRecorderCallback(tmp_path / "whole")
    module = _lightning_module(lightning)
    trainer, loader = _fit(lightning, module, whole, tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader)
    X = TrainingRun(tmp_path / "whole", module).snapshots([next(_micro_batches())])
    assert len(X) == len(run.snapshots([next(_micro_batches())]))


def test_lightning_that_resumes_goes_on_with_its_run(tmp_path, quiet_libraries):
    import lightning.pytorch as lightning

    from spectralshell.runs.callbacks.lightning import TrainingRecorderCallback

    def fit(ckpt_path=None):
        saving = lightning.callbacks.ModelCheckpoint(
            tmp_path / "saved", "{step}", every_n_train_steps=5, save_top_k=-1
        )
        module = _lightning_module(lightning)
        callback = TrainingRecorderCallback(tmp_path / "run")
        trainer, loader = _fit(lightning, module, callback, tmp_path)
        trainer.callbacks.append(saving)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return TrainingRun(tmp_path / "run", module)

    whole, resumed = fit(), fit(str(tmp_path / "saved" / "step=5.ckpt"))
    np.testing.assert_array_equal(resumed.history["tau"], whole.history["tau"])
    assert resumed.states["step"].tolist() == whole.states["step"].tolist()


def test_only_the_callbacks_import_training_libraries():
    optional = {"transformers", "lightning", "pytorch_lightning", "accelerate", "peft"}
    importing = {
        module
        for module, imports in import_graph.read_graph().items()
        if module.startswith("spectralshell.runs")
        and optional & {name.partition(".")[0] for name in imports}
    }
    assert importing == {"spectralshell.runs.callbacks.transformers"}
