"""Small training loops whose every step depends on its number alone, so that any can go on."""

import torch
from torch import nn

from spectralshell.runs import TrainingRecorder


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def make_optimizer(model, kind="adamw"):
    groups = [{"params": [p]} for p in model.parameters()]
    groups[1]["lr"] = 0.01
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.01)
    if kind == "adam":  # one group, so that a state_dict tells its parameters
        return torch.optim.Adam(model.parameters(), lr=0.02)
    return torch.optim.AdamW(groups, lr=0.02)


def take_step(model, optimizer, step, recorder=None):
    """Make the step of this number: data and rate are functions of it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    optimizer.param_groups[0]["lr"] = 0.02 / (1 + 0.01 * step)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if recorder is not None:
        recorder.log(loss=loss, tokens=8)


def record(directory, n_steps, *, kind="adamw", **options):
    """Record a run, or go on with it where ``resume`` says so; return the model and recorder."""
    model = make_model()
    optimizer = make_optimizer(model, kind)
    recorder = TrainingRecorder(model, optimizer, directory, **options)
    start = recorder.restore() if options.get("resume") else 0
    with recorder:
        for step in range(start, n_steps):
            take_step(model, optimizer, step, recorder)
    return model, optimizer, recorder
