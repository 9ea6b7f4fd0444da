"""From a Lanczos run to a frame whose bounds hold the dense truth."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import CumulativeBounds, gauss, lanczos
from spectralshell.shells import ShellPartition, SpectralMeasure, energy_frame, shell_frame

ROUNDING = 1e-14  # of the dense truth's own sums, relative to the total


def run(eigenvalues, n_steps, seed):
    """Return the dense and the Lanczos measure of a random error on a rotated spectrum."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((eigenvalues.size,) * 2))
    matrix = torch.from_numpy((basis * eigenvalues) @ basis.T)
    error = rng.standard_normal(eigenvalues.size)
    total, noise = 0.5 * error @ error, 4e-15 * eigenvalues.max()
    result = lanczos(lambda v: matrix @ v, torch.from_numpy(error), n_steps)
    bounds = CumulativeBounds.from_lanczos(
        result.alpha, result.beta, result.beta_last, total, noise, result.exhausted
    )
    nodes, shares, _ = gauss(result.alpha, result.beta)
    shared = {"total": total, "lambda_max": eigenvalues.max(), "floor": 1e-8, "noise": noise}
    truth = SpectralMeasure(eigenvalues, 0.5 * (basis.T @ error) ** 2, **shared)
    measured = SpectralMeasure(nodes, total * shares, bounds=bounds, solver="lanczos", **shared)
    return truth, measured


SPECTRA = {
    "power law": np.arange(1.0, 61.0) ** -2.0,
    "gap": np.concatenate([np.linspace(1e-3, 2e-3, 30), np.linspace(1.0, 2.0, 30)]),
    "repeated": np.repeat([0.01, 0.3, 0.3001, 2.0], 15),
    "rank-deficient": np.concatenate([np.zeros(30), np.geomspace(1e-6, 1.0, 30)]),
    "rank one": np.concatenate([np.zeros(59), [1.0]]),
}


@pytest.mark.parametrize("n_steps", [1, 5, 20, 61])
@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA)
def test_bounds_in_frames_hold_the_dense_truth(eigenvalues, n_steps):
    shells = ShellPartition.covering(1e-5, eigenvalues.max(), q=1.7)
    for seed in range(2):
        truth, measured = run(eigenvalues, n_steps, seed)
        frame = shell_frame([measured], shells)
        energies = truth.energies([shells.edges[0] / 1e6, *shells.edges])
        exact = np.concatenate([[energies[:2].sum()], energies[2:]])
        slack = ROUNDING * truth.total
        tidy = frame.set_index("shell").loc[list(shells.names)]
        assert (tidy["energy_lower"] <= exact[1:] + slack).all()
        assert (tidy["energy_upper"] >= exact[1:] - slack).all()
        resolved = tidy["resolved"].to_numpy()
        # a resolved shell is known to half of its energy
        assert (
            np.abs(tidy["energy"] - exact[1:])[resolved] <= 0.5 * tidy["energy"][resolved]
        ).all()
        row = energy_frame([measured], shells).iloc[0]
        assert row.sum() == pytest.approx(truth.total, rel=1e-12)


def test_full_depth_resolves_what_few_steps_do_not():
    eigenvalues = SPECTRA["power law"]
    # No edge lies on an eigenvalue 1/k², where any rounding would make the shell ambiguous.
    shells = ShellPartition.covering(3e-4, 1.0, q=2.0, lambda_0=0.9)
    few, all_ = (shell_frame([run(eigenvalues, m, 0)[1]], shells)[2:] for m in (6, 60))
    assert not few["resolved"].all()
    # of an empty shell only an upper bound is known, at rounding
    assert (all_["resolved"] == (all_["n_ritz"] > 0)).all()
    assert all_.loc[~all_["resolved"], "energy_upper"].max() < 1e-10 * few["cumulative"].iloc[-1]
