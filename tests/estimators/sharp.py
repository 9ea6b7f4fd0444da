"""A model whose Jacobian turns much faster than its parameters grow."""

import torch
from torch import nn


class Sharp(nn.Module):
    """Turns quickly along one of its many parameters."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.full((400,), 5.0))

    def forward(self, x):
        return torch.sin(30.0 * self.turn(x)) + 1e-3 * self.scale.mean()
