"""Memory of language models: arrays of tokens times vocabulary are few, and planned before."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")

FEW = {"nll": 6.5, "cross-entropy": 15.5}
"""Float64 arrays of tokens times vocabulary, with all that is beside them. Seen: 5.2 and 13.9."""

ROOM = 0.85
"""Part of its limit that a plan fills."""

LIMIT = 3 * 10**9

RUN = """
import json, resource, sys
import torch
from torch import nn
torch.set_num_threads(1)
from spectralshell import ShellEnergyEstimator, make_snapshots

residual, n_steps, vocabulary, n_samples, length, kind = json.loads(sys.argv[1])

class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.embedding(input_ids)))

def fit(model, vocabulary):
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (n_samples, length))
    batch = {"input_ids": tokens, "labels": tokens}
    snapshots = make_snapshots(model, [batch], shift=True)
    estimator = ShellEnergyEstimator(residual=residual, n_steps=n_steps, solver="lanczos")
    return estimator.fit(snapshots)

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

if kind == "gpt2":
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=length, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes))
else:
    model = Model(vocabulary)
fit(Model(50), 50)  # what torch loads when it differentiates first is not counted
before = peak()
estimator = fit(model, vocabulary)
print(json.dumps([before, peak(), int(estimator.plan_["lanczos_memory"].iloc[0])]))
"""


def measure(*arguments):
    """Return the peak of a fresh process before and after a fit, and what was planned."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("residual", ["nll", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_arrays_of_tokens_times_vocabulary_are_few_and_planned(residual):
    vocabulary, n_samples, length = 20_000, 4, 128
    before, after, planned = measure(residual, 4, vocabulary, n_samples, length, "plain")
    array = 8 * vocabulary * n_samples * length
    assert after - before <= FEW[residual] * array
    assert after - before <= planned / ROOM


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "n_steps"), [("nll", 100), ("cross-entropy", 20)])
def test_a_vocabulary_of_fifty_thousand_takes_under_three_gigabytes(residual, n_steps):
    pytest.importorskip("transformers")
    _, after, _ = measure(residual, n_steps, 50_000, 8, 64, "gpt2")
    assert after <= LIMIT
