"""torch.func as one writes it: two recipes for the whole kernel, one for products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.functional import cross_entropy

from benchmarks.contender import Contender
from benchmarks.networks_torch import load_data, load_network


class _Plain(Contender):
    """A network as a function of its parameters."""

    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        dtype = getattr(torch, self.options.get("dtype", "float32"))
        self.model = load_network(self.problem, state, dtype)
        self.data = load_data(data, dtype)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.buffers = dict(self.model.named_buffers())

    def outputs(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs = functional_call(self.model, (parameters, self.buffers), (inputs,))
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    def single(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.outputs(parameters, x.unsqueeze(0)).squeeze(0)

    def as_matrix(self, blocks: Tensor) -> Tensor:
        """(N, C, N, C) → (n, n), over N."""
        return blocks.reshape(self.problem.n, self.problem.n) / self.problem.n_samples


class JacobianContraction(_Plain):
    """Every sample's Jacobian by vmap and jacrev, then one product for each parameter.

    The recipe is for two sets of inputs and takes a Jacobian of each; with the option ``once`` the
    same one serves both.
    """

    def run(self) -> Tensor:
        left = self.jacobian()
        right = left if self.options.get("once") else self.jacobian()
        pairs = zip(left, right, strict=True)
        return self.as_matrix(sum(torch.einsum("Naf,Mbf->NaMb", a, b) for a, b in pairs))

    def jacobian(self) -> list[Tensor]:
        blocks = vmap(jacrev(self.single), (None, 0))(self.parameters, self.data["inputs"])
        return [block.flatten(2) for block in blocks.values()]


class NTKVectorProducts(_Plain):
    """M times every unit vector: a vjp, then a jvp, by vmap over chunks of unit vectors.

    The recipe by pairs of samples computes the same, but vmap then copies the tangents of every
    parameter for each pair: it is slower and needs many times the memory.
    """

    def run(self) -> Tensor:
        inputs = self.data["inputs"]

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return self.outputs(parameters, inputs).flatten()

        _, pull = vjp(outputs, self.parameters)

        def column(unit: Tensor) -> Tensor:
            return jvp(outputs, (self.parameters,), pull(unit))[1]

        unit_vectors = torch.eye(self.problem.n, dtype=inputs.dtype)
        return self.as_matrix(vmap(column, chunk_size=self.options["chunk"])(unit_vectors))


class PlainProduct(_Plain):
    """M V, one column at a time: vjp and jvp, each with a forward pass of its own."""

    def rows(self, parameters: dict[str, Tensor]) -> Tensor:
        outputs = self.outputs(parameters, self.data["inputs"])
        targets = self.data["targets"]
        if self.problem.residual == "nll":
            values = cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
            return values * targets.numel() ** -0.5
        return outputs.flatten() * targets.numel() ** -0.5

    def run(self) -> Tensor:
        columns = self.data["vectors"][:, : self.options["columns"]]
        return torch.stack([self._product(column) for column in columns.T], 1)

    def _product(self, vector: Tensor) -> Tensor:
        _, pull = vjp(self.rows, self.parameters)
        (tangent,) = pull(vector)
        return jvp(self.rows, (self.parameters,), (tangent,))[1]
