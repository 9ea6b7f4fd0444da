"""Checkpoints of every kind, written by the libraries that write them, and the states they hold."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

VOCABULARY, LENGTH = 16, 6

SHARD_SIZE = "2KB"
"""So small that a model of a few thousand weights is cut into several files."""


@dataclass(frozen=True)
class Kind:
    """What is given as a snapshot's state, and the same state in memory."""

    model: nn.Module
    state: Any
    expected: dict
    batch: tuple
    residual: str


def plain_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def language_model(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


class Tokens(Dataset):
    """Sixteen rows of tokens, the same at every reading."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = torch.randint(
            0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index)
        )
        return {"input_ids": row, "labels": row}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain(model, state, expected):
    generator = torch.Generator().manual_seed(1)
    batch = tuple(torch.randn(5, n, generator=generator) for n in (3, 2))
    return Kind(model, state, expected, batch, "mse")


def language(model, state, expected):
    rows = torch.stack([Tokens()[index]["input_ids"] for index in range(2)])
    return Kind(
        model, state, expected, ({"input_ids": rows, "labels": rows}, None), "cross-entropy"
    )


def train_with_trainer(folder, model, n_steps=4, callbacks=(), **options):
    """Train as people do; return the model as it was at the last step."""
    from transformers import Trainer, TrainingArguments

    given = {
        "max_steps": n_steps,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder), **(given | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the loader, on machines without a GPU
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Tokens(), callbacks=list(callbacks)
        )
        trainer.train()
    return model


def train_with_lightning(folder, n_epochs=2):
    """Train a module of Lightning with hyper-parameters, an optimiser and a scheduler."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, width=4, rate=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.model = plain_model()

        def training_step(self, batch, _):
            return (self.model(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    data = TensorDataset(torch.randn(8, 3), torch.randn(8, 2))
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders and loggers
        trainer = lightning.Trainer(
            max_epochs=n_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, DataLoader(data, batch_size=4))
    return module


def of_trainer(folder):
    model = train_with_trainer(folder / "run", language_model())
    return language(language_model(1), folder / "run" / "checkpoint-4", copied(model))


def of_trainer_in_an_output_folder_with_an_adapter(folder):
    model = train_with_trainer(folder / "run", adapted_model(), n_steps=2)
    return language(adapted_model(), folder / "run" / "checkpoint-2", copied(model))


def of_pretrained_shards(folder):
    model = language_model()
    model.save_pretrained(folder / "model", max_shard_size=SHARD_SIZE)
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    return language(language_model(1), folder / "model", copied(model))


def of_an_index(folder):
    kind = of_pretrained_shards(folder)
    return language(kind.model, kind.state / "model.safetensors.index.json", kind.expected)


def of_pickled_shards(folder):
    import json

    model = language_model()
    items = list(copied(model).items())
    half, places = len(items) // 2, {}
    for name, part in (("a.bin", items[:half]), ("b.bin", items[half:])):
        torch.save(dict(part), folder / name)
        places |= {key: name for key, _ in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return language(language_model(1), folder, copied(model))


def of_the_base_model(folder):
    model = language_model()
    model.transformer.save_pretrained(folder / "base")
    return language(language_model(1), folder / "base", copied(model))


def neox_model(seed=0):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def of_renamed_weights(folder):
    """As the published checkpoints of Pythia: another name for the head, buffers of before."""
    model = neox_model()
    model.save_pretrained(folder / "model")
    state = load_file(folder / "model" / "model.safetensors")
    assert "embed_out.weight" in state
    layer = "gpt_neox.layers.0.attention"
    state |= {
        f"{layer}.bias": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(1),
    }
    torch.save(state, folder / "pytorch_model.bin")
    return language(neox_model(1), folder / "pytorch_model.bin", copied(model))


def adapted_model(seed=0, **options):
    from peft import LoraConfig, get_peft_model

    model = language_model()  # the base is the same
    torch.manual_seed(seed)
    given = {
        "r": 2,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "init_lora_weights": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at a name that peft reads
        return get_peft_model(model, LoraConfig(**(given | options)))


def of_an_adapter(folder, **options):
    model = adapted_model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(folder / "adapter")
    return language(adapted_model(1, **options), folder / "adapter", copied(model))


def of_an_adapter_with_a_head(folder):
    return of_an_adapter(folder, modules_to_save=["ln_f"])


def of_lightning(folder):
    module = train_with_lightning(folder)
    (path,) = folder.rglob("*.ckpt")
    return plain(plain_model(1), path, copied(module.model))


def of_distributed(folder):
    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    save_distributed(content, folder / "dcp")
    return plain(plain_model(1), folder / "dcp", copied(model))


def save_distributed(content, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(content, checkpoint_id=folder, no_dist=True)


def of_a_nested_file(folder):
    from spectralshell import Checkpoint

    model = plain_model()
    ema = {f"net.{name}": tensor for name, tensor in copied(model).items()}
    content = {"trainer": {"ema.weights": ema, "more": {"a": torch.ones(1)}}, "step": 3}
    torch.save(content, folder / "run.pt")
    state = Checkpoint(folder / "run.pt", key="trainer.ema.weights", prefix="net.")
    return plain(plain_model(1), state, copied(model))


def of_wrapped_names(folder):
    model = plain_model()
    path = folder / "model.safetensors"
    save_file({f"_forward_module.module._orig_mod.{n}": t for n, t in copied(model).items()}, path)
    return plain(plain_model(1), path, copied(model))


def of_the_hub(folder):
    """A revision in the hub's cache, as its client lays it out."""
    from huggingface_hub import constants

    model = language_model()
    put_into_cache(constants.HF_HUB_CACHE, "org/model", "step1000", model)
    return language(language_model(1), "org/model@step1000", copied(model))


def put_into_cache(cache, repo, revision, model, **options):
    """Lay out a revision as the cache does: blobs, links to them, and a reference."""
    import hashlib

    root = Path(cache) / ("models--" + repo.replace("/", "--"))
    commit = hashlib.sha1(f"{repo}{revision}".encode()).hexdigest()
    snapshot, written = root / "snapshots" / commit, Path(cache) / "written"
    for folder in (root / "blobs", snapshot, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(written, **options)
    for file in written.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, root / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    shutil.rmtree(written)
    (root / "refs" / revision).write_text(commit)
    return commit


KINDS = {
    "Trainer": of_trainer,
    "Trainer with an adapter": of_trainer_in_an_output_folder_with_an_adapter,
    "save_pretrained in shards": of_pretrained_shards,
    "index of shards": of_an_index,
    "pickled shards": of_pickled_shards,
    "base model": of_the_base_model,
    "renamed weights": of_renamed_weights,
    "peft": of_an_adapter,
    "peft with a layer saved whole": of_an_adapter_with_a_head,
    "Lightning": of_lightning,
    "torch.distributed.checkpoint": of_distributed,
    "nested torch.save": of_a_nested_file,
    "wrapped names": of_wrapped_names,
    "hub": of_the_hub,
}

OF_LANGUAGE_MODELS = [
    *("Trainer", "Trainer with an adapter", "save_pretrained in shards", "index of shards"),
    *(
        "pickled shards",
        "base model",
        "renamed weights",
        "peft",
        "peft with a layer saved whole",
        "hub",
    ),
]
