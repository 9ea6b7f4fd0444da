"""The power law of the drift velocity: known laws, its sign under the null, and statuses."""

import numpy as np
import pandas as pd
import pytest

from spectralshell.estimators.shell_flux_frames import fit_velocity, flux_name
from spectralshell.shells import ShellPartition, SoftShells, shell_balance

EDGES = 2.0 ** np.arange(-6, 4)
# Products of powers of two and square roots.
EXACT_RTOL = 1e-10


def frame_of(flux, density=1.0, taus=(0.0,)):
    """Return what the fit reads; flux has shape (n_taus, n_batches, n_edges)."""
    flux = np.broadcast_to(flux, (len(taus), *np.shape(flux)[-2:]))
    density = np.broadcast_to(density, flux.shape)
    rows = [
        {
            "tau": tau,
            "batch": b,
            "edge": edge,
            "flux_down": flux[t, b, k],
            "density": density[t, b, k],
            "velocity": -flux[t, b, k] / density[t, b, k],
            "resolved": True,
        }
        for t, tau in enumerate(taus)
        for b in range(flux.shape[1])
        for k, edge in enumerate(EDGES)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("b", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_power_law_is_found_with_its_sign(b, sign):
    """The mean flux over the mean density is the law, the mean of their ratios is not."""
    sizes = np.array([0.8, 1.0, 1.3, 0.9])[:, None]
    others = np.array([0.3, 2.0, 0.7, 1.0])[:, None]  # of the same mean
    law, density = 3.0 * EDGES**b, EDGES**-1.5
    frame = frame_of(-sign * sizes * law * density, others * density)
    for _, row in fit_velocity(frame, 0.95).iterrows():
        assert row["sign"] == sign
        assert row["p_value"] < 0.01
        assert row[["b", "b_lower", "b_upper"]].tolist() == pytest.approx([b] * 3, rel=EXACT_RTOL)
        assert row["agreement"] == 1
    assert row["amplitude"] == pytest.approx(3.0, rel=EXACT_RTOL)


def test_all_times_share_a_slope_and_not_an_amplitude():
    rng = np.random.default_rng(0)
    amplitudes = np.array([0.1, 7.0])[:, None, None]
    noise = np.exp(0.1 * rng.normal(size=(2, 5, EDGES.size)))
    fit = fit_velocity(frame_of(amplitudes * EDGES**1.4 * noise, taus=(0.0, 2.0)), 0.95)
    assert fit["scope"].tolist() == ["all", "tau", "tau"]
    assert (fit["b_lower"] < 1.4).all()
    assert (fit["b_upper"] > 1.4).all()
    pooled, single = fit.iloc[0], fit.iloc[1]
    assert pooled["b_upper"] - pooled["b_lower"] < single["b_upper"] - single["b_lower"]


@pytest.mark.parametrize("direction", [1, -1])
def test_one_batch_has_a_slope_and_no_test_of_the_sign(direction):
    """Its edges share their pairs of modes: the finer the shells, the surer a count would be."""
    fit = fit_velocity(frame_of(direction * EDGES[None, None] ** 2), 0.95).iloc[0]
    assert fit["sign"] == 0
    assert np.isnan(fit["p_value"])
    assert fit["b"] == pytest.approx(2.0)
    assert fit["agreement"] == 1.0
    assert fit["status"] == "one batch: no test of the sign; interval from the scatter of edges"


def test_equal_batches_are_no_evidence_of_a_sign():
    fit = fit_velocity(frame_of(np.repeat(EDGES[None, None], 4, axis=1)), 0.95).iloc[0]
    assert fit["sign"] == 0
    assert "direction not determined" in fit["status"]


def test_edges_of_the_other_sign_are_counted_and_left_out():
    flux = np.repeat(EDGES[None, None], 3, axis=1) * np.array([0.9, 1.0, 1.1])[:, None]
    flux[..., 0] *= -1
    fit = fit_velocity(frame_of(flux), 0.95).iloc[0]
    assert fit["b"] == pytest.approx(1.0)
    assert fit["agreement"] == pytest.approx(0.9)
    assert "1 of 10 edges drift the other way" in fit["status"]


@pytest.mark.parametrize(("kept", "status"), [(2, "fewer than 3 usable edges"), (10, "no flux")])
def test_nothing_to_fit_has_a_status(kept, status):
    frame = frame_of(np.zeros((1, 2, EDGES.size)))
    frame.loc[frame["edge"] >= EDGES[0] * 2**kept, "resolved"] = False
    frame.loc[:, "flux_down"] = frame["velocity"] = float(kept == 2)
    fit = fit_velocity(frame, 0.95)
    assert (fit["status"] == status).all()
    assert fit["b"].isna().all()
    assert (fit["sign"] == 0).all()


def fluxes_of_unstructured_couplings(rng, n_batches, k=40):
    """Couplings that are noise in proportion to √(λ_u λ_v), amplitudes flat in ln λ."""
    shells = SoftShells(ShellPartition.covering(0.02, 8.0, q=2.0))
    blocks = []
    for batch in range(n_batches):
        lam = np.exp(rng.uniform(-5, 2.5, k))
        noise = rng.normal(size=(k, k))
        V = (noise + noise.T) * np.sqrt(np.outer(lam, lam))
        balance = shell_balance(lam, rng.normal(size=k), np.zeros(k), V, shells)
        blocks.append(
            pd.DataFrame(
                {
                    "tau": 0.0,
                    "batch": batch,
                    "edge": shells.edges,
                    "flux_down": balance.flux_down,
                    "density": balance.density,
                    "velocity": balance.velocity,
                    "resolved": True,
                }
            )
        )
    return pd.concat(blocks, ignore_index=True)


def test_unstructured_couplings_have_no_sign_and_a_slope_near_one():
    """So a slope near one is no evidence of structure, and the sign test keeps its level."""
    rng = np.random.default_rng(1)
    fits = [fit_velocity(fluxes_of_unstructured_couplings(rng, 5), 0.95).iloc[0] for _ in range(60)]
    told = np.mean([fit["sign"] != 0 for fit in fits])
    # Three standard deviations of a proportion of 0.05 in 60 draws.
    assert told < 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5
    assert np.median([fit["b"] for fit in fits]) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("edge", [0.5, 0.1 + 0.2, 1e-300])
def test_column_names_hold_the_edge_exactly(edge):
    name = flux_name(edge)
    assert name == f"flux_down[{edge}]"
    assert float(name.removeprefix("flux_down[").removesuffix("]")) == edge
