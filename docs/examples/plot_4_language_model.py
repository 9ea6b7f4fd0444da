"""
A token model and its negative log-likelihood
=============================================

The papers measure language models with the error e = −log p(y | x), one entry per token. A tiny
model learns to predict the next character of a short text, and we measure where its error sits.
"""

# %%
# The model
# ---------
# Characters in, logits out. The embedding is tied to the output layer; tied parameters count once.

import matplotlib.pyplot as plt
import torch

TEXT = (
    "the error along a mode decays at the rate of the mode. what is large goes first. "
    "what is small stays. a shell holds the modes of about one rate. " * 4
)
letters = sorted(set(TEXT))
codes = torch.tensor([letters.index(letter) for letter in TEXT])


class NextCharacter(torch.nn.Module):
    """Predict the next character from the last two."""

    def __init__(self, n_letters, width=16):
        super().__init__()
        self.embedding = torch.nn.Embedding(n_letters, width)
        self.mix = torch.nn.Linear(2 * width, width)

    def forward(self, tokens):
        """Return logits of shape (sequences, length, letters)."""
        x = self.embedding(tokens)
        previous = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        hidden = torch.tanh(self.mix(torch.cat([x, previous], dim=-1)))
        return hidden @ self.embedding.weight.T


# %%
# Training, with snapshots
# ------------------------
# Four probe batches of three sequences each. Rows are tokens, so N is their number. The learning
# rate is constant, so τ is the number of steps times it.

from spectralshell import make_snapshots

generator = torch.Generator().manual_seed(0)
model = NextCharacter(len(letters)).double()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)

length = 16
starts = torch.arange(0, 12 * length, length)
windows = torch.stack([codes[start : start + length + 1] for start in starts])
batches = [(rows[:, :-1], rows[:, 1:]) for rows in windows.split(3)]

rate, X = 0.5, []
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
for step in range(301):
    if step in (0, 10, 100, 300):
        X += make_snapshots(model, batches, tau=step * rate)
    logits = model(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# The measure
# -----------
# Its energy is half the mean *square* of the token losses: other than the mean loss, it is
# dominated by the tokens that are hard.

from spectralshell import ShellEnergyDisplay, ShellEnergyEstimator

estimator = ShellEnergyEstimator(q=2.0, residual="nll").fit(X)
estimator.transform(X).sum(axis=1).groupby("tau").mean()

# %%

ShellEnergyDisplay.from_estimator(estimator).plot()
plt.show()

# %%
# Training here is on the mean negative log-likelihood, not on this energy. So the dissipation
# column is Σ λ g², and not the rate at which this run loses energy.

print(f"dynamics exact: {estimator.dynamics_exact_}")
