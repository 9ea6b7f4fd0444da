"""curvlinops and hessian-eigenthings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contender import Contender
from benchmarks.networks_torch import load_data, load_network


class _Peer(Contender):
    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        self.model = load_network(self.problem, state)
        self.data = load_data(data)


class CurvlinopsProduct(_Peer):
    """M V = J (Jᵀ V) / N with the Jacobian's two operators."""

    def prepare(self) -> None:
        from curvlinops import JacobianLinearOperator

        batches = [(self.data["inputs"], self.data["targets"])]
        parameters = list(self.model.parameters())
        self.jacobian = JacobianLinearOperator(
            self.model, parameters, batches, check_deterministic=False
        )
        self.transposed = self.jacobian.adjoint()

    def product(self, block: Tensor) -> Tensor:
        return (self.jacobian @ (self.transposed @ block)) / self.problem.n_samples

    def run(self) -> Tensor:
        return self.product(self.data["vectors"][:, : self.options["columns"]])

    def as_array(self, result: Tensor) -> np.ndarray:
        return result.detach().double().numpy()


class CurvlinopsLanczos(CurvlinopsProduct):
    """Lanczos from the error with the Jacobian's operators and full reorthogonalisation."""

    def run(self) -> Tensor:
        with torch.no_grad():
            one_hot = nn.functional.one_hot(self.data["targets"], 10)
            error = (one_hot - self.model(self.data["inputs"])).flatten().double()
        error = error / self.problem.n_samples**0.5
        basis, diagonal, below = [error / error.norm()], [], []
        for _ in range(self.options["steps"]):
            vector = self.product(basis[-1].float()).detach().double()
            diagonal.append(basis[-1] @ vector)
            known = torch.stack(basis)
            for _ in range(2):
                vector = vector - known.T @ (known @ vector)
            below.append(vector.norm())
            basis.append(vector / below[-1])
        couplings = torch.stack(below[:-1])
        matrix = torch.diag(torch.stack(diagonal)) + torch.diag(couplings, 1)
        nodes, vectors = torch.linalg.eigh(matrix + torch.diag(couplings, -1))
        energies = error.dot(error) * vectors[0] ** 2 / 2
        # The first moments of the spectral measure, which a few steps already give exactly.
        return torch.stack([energies @ nodes**power for power in range(3)])


class EigenthingsLanczos(_Peer):
    """Leading eigenvalues of JᵀJ / N, which are those of M, by its own Lanczos."""

    def prepare(self) -> None:
        from hessian_eigenthings import GGNOperator

        self.operator = GGNOperator(
            self.model, [(self.data["inputs"], self.data["targets"])], _forward, _half_square
        )

    def run(self) -> Any:
        from hessian_eigenthings import lanczos

        count = self.options["count"]
        return lanczos(self.operator, k=count, max_iter=self.options["steps"], seed=0).eigenvalues

    def as_array(self, result: Any) -> np.ndarray:
        return np.sort(np.asarray(result, dtype=np.float64))[::-1]


def _forward(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def _half_square(outputs: Tensor, batch: Any) -> Tensor:
    one_hot = nn.functional.one_hot(batch[1], outputs.shape[-1])
    return (outputs - one_hot).square().sum(1).mean() / 2
