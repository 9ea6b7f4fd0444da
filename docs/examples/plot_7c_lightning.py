"""
A run of Lightning
==================

The same for a Lightning ``Trainer``: one line, the callback.
"""

# %%
# The module
# ----------

import logging
import tempfile
import warnings

import lightning.pytorch as lightning
import matplotlib.pyplot as plt
import torch

warnings.filterwarnings("ignore", category=FutureWarning)  # of Lightning's own calls of torch
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

generator = torch.Generator().manual_seed(0)
x = torch.randn(256, 6, generator=generator)
y = x[:, :2].prod(1, keepdim=True)


class Module(lightning.LightningModule):
    """A perceptron, its loss and its optimiser."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self):
        """Return SGD with momentum and a rate that decays."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


# %%
# Training
# --------
# ``model=`` records the network inside, which probe batches are fed to.

from spectralshell.runs.callbacks.lightning import TrainingRecorderCallback

torch.manual_seed(0)
module, place = Module(), tempfile.mkdtemp()
loader = torch.utils.data.DataLoader(
    list(zip(x.split(16), y.split(16), strict=True)), batch_size=None
)
trainer = lightning.Trainer(
    max_steps=120,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[TrainingRecorderCallback(f"{place}/run", model=module.network)],
)
trainer.fit(module, loader)

# %%
# Momentum in τ
# -------------
# With momentum μ a constant gradient is followed 1/(1 − μ) times as far as the sum of the rates.
# A buffer that is still empty follows it less far at the beginning.

from spectralshell.runs import TrainingRun

history = TrainingRun(f"{place}/run", module.network).history
fig, ax = plt.subplots(layout="constrained")
ax.plot(history["step"], history["tau"], label="τ")
ax.plot(history["step"], history["lr"].cumsum() / (1 - 0.9), "--", label="Σ η/(1 − μ)")
ax.set(xlabel="step")
ax.legend()
plt.show()
