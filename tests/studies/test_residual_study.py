"""The study runs from one command, goes on after an interruption, and its page is true to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from spectralshell import Snapshot
from spectralshell.operators import build_exact_kernel, build_kernel_derivative
from studies.residual.__main__ import main
from studies.residual.design import Design
from studies.residual.measuring import (
    RESIDUALS,
    Coupled,
    MeasuringPlan,
    brier_kernel,
    measure,
)
from studies.residual.networks import ACTIVATIONS, Network
from studies.residual.report import derived_tables, summary
from studies.residual.results import differences, mean_interval, read_statistics
from studies.residual.statistics import STATISTICS, jackknife
from studies.residual.training import TrainingPlan, train

PAGE = Path(__file__).parents[2] / "docs" / "studies" / "residual"
# The same numbers in another order of float64 operations.
ROUNDING = 1e-10
# Differences are wrong by the square of their step, which changes the error by a thousandth.
DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images whose class is their brightness: a tiny network learns it in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 10
    shade = labels[:, None, None, None] * 20
    images = (shade + rng.integers(0, 50, (240, 32, 32, 3))).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(
        path, X_train=images[:200], y_train=labels[:200], X_test=images[200:], y_test=labels[200:]
    )
    return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a quick run."""
    out = tmp_path_factory.mktemp("study")
    main(["--quick", "--jobs", "1", "--out", str(out), "--data", str(data)])
    return out


def test_quick_run_fills_every_cell(finished):
    frame = read_statistics(finished / "statistics.csv")
    design = Design.quick()
    assert len(frame) == len(list(design.cells())) * len(STATISTICS)
    assert np.isfinite(frame["value"]).all()
    verdict = pd.read_csv(finished / "verdict.csv")
    assert set(verdict["claim"]) == {1, 2, 3}
    for figure in ("windows", "windows_raw", "diagonal", "couplings", "differences"):
        assert (finished / f"{figure}.png").stat().st_size > 10_000


def test_killed_run_goes_on_with_what_is_missing(finished, data, tmp_path):
    """Whatever file is lost, a new run makes it again, the same, and touches no other."""
    pieces = sorted(p for p in finished.rglob("*") if p.suffix in (".npz", ".json"))
    lost = [next(p for p in pieces if p.suffix == ".npz"), pieces[0]]
    before = {p: p.stat().st_mtime_ns for p in pieces}
    old = Coupled.load(lost[0])
    for path in lost:
        path.unlink()
    stages = ["--only", "train", "measure", "analyse"]
    main(["--quick", "--jobs", "1", "--out", str(finished), "--data", str(data), *stages])
    changed = {p for p in pieces if p.stat().st_mtime_ns != before[p]}
    # One piece of measuring writes both residuals, and their cells follow.
    state, _, batch = lost[0].stem.split("_")
    made = {p for p in pieces if p.parent == lost[0].parent and p.stem.startswith(f"{state}_")}
    cells = {finished / "cells" / f"{lost[0].parent.name}_{state}_{r}.json" for r in RESIDUALS}
    assert changed == {p for p in made if p.stem.endswith(f"_{batch}")} | cells | {lost[1]}
    assert np.array_equal(Coupled.load(lost[0]).flow, old.flow)
    assert not [p for p in finished.rglob(".*") if p.is_file()]


@pytest.mark.parametrize("other", ["design", "images"])
def test_pieces_of_another_study_are_refused(other, finished, data, tmp_path, monkeypatch):
    if other == "design":
        quick = Design.quick()
        monkeypatch.setattr(Design, "quick", lambda: replace(quick, n_test=10))
    else:
        with np.load(data) as images:
            changed = {name: images[name].copy() for name in images}
        changed["X_train"][0] += 1
        data = tmp_path / "images.npz"
        np.savez(data, **changed)
    with pytest.raises(ValueError, match=f"pieces of (an)?other {other}.*--out"):
        main(["--quick", "--jobs", "1", "--out", str(finished), "--data", str(data)])


def test_steps_are_compared_along_both_kinds_of_direction(finished):
    table = pd.read_csv(finished / "steps.csv")
    assert set(table["direction"]) == {"gradient flow", "random", "random, float32"}
    assert len(table) == 3 * len(list(Design.quick().compared_steps())) * len(RESIDUALS)
    numbers = table["step 1 %"].str.split(", ", expand=True).astype(float)
    assert numbers.shape[1] == 4
    assert np.isfinite(numbers.to_numpy()).all()


def test_finished_run_needs_no_data(finished, monkeypatch):
    monkeypatch.setenv("SPECTRALSHELL_DATA", "/nowhere")
    main(["--quick", "--jobs", "1", "--out", str(finished), "--only", "analyse"])


def test_residual_and_plain_networks_share_all_weights_but_the_shortcuts():
    first, second = (
        Network(kind, "relu", 3, width=2).build().state_dict() for kind in ("residual", "plain")
    )
    assert set(second) < set(first)
    assert all("shortcut" in name for name in set(first) - set(second))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_full_design_is_that_of_the_page():
    design = Design.full()
    assert len(list(design.cells())) == 3 * 2 * 2 * 3 * 2
    assert {n.activation for n in design.networks} == set(ACTIVATIONS)


def test_training_keeps_the_first_state_below_each_loss(tmp_path):
    network = Network("plain", "gelu", 0, width=2, blocks=(1,))
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0].mean(dim=(1, 2)) > 0).long()
    plan = TrainingPlan(
        losses=(1.5, 1e-9), batch_size=16, max_steps=30, check_every=2, n_checked=32, warm_up=4
    )
    record = train(network, inputs, targets, plan, tmp_path)
    losses = pd.read_csv(tmp_path / network.name / "losses.csv")
    first = losses[losses["loss"] <= 1.5].iloc[0]
    assert record["states"]["loss 1.5"]["step"] == first["step"]
    assert record["missed"] == ["loss 1e-09"]
    # Four steps of the rise, then the full rate: τ is Σ η/(1 − μ).
    rates = 0.02 * np.minimum(1.0, np.arange(1, 31) / 4)
    assert losses["tau"].iloc[-1] == pytest.approx(rates.sum() / 0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny network with a state on disk, and a batch."""
    network = Network("residual", "gelu", 0, width=2, blocks=(1, 1))
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_file(network.build().state_dict(), path)
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return network, path, inputs, torch.tensor([1, 2, 0, 9])


def test_brier_kernel_follows_from_that_of_the_logits(tiny):
    network, _, inputs, targets = tiny
    snapshot = Snapshot(network.build().double().eval(), inputs.double(), targets)
    with build_exact_kernel(snapshot, residual="cross-entropy", device="cpu") as logits:
        made = brier_kernel(logits.matrix.numpy(), logits.residual_vector.numpy(), targets)
    with build_exact_kernel(snapshot, residual="brier", device="cpu") as kernel:
        assert np.allclose(made, kernel.matrix.numpy(), rtol=0, atol=ROUNDING * np.abs(made).max())


@pytest.mark.parametrize(("residual", "at_start"), [(RESIDUALS[0], False), (RESIDUALS[1], True)])
def test_couplings_are_those_of_the_exact_derivative(tiny, residual, at_start):
    network, path, inputs, targets = tiny
    # The other step is too long.
    short, long = 1e-3, 0.5
    changes = {
        "change": long if at_start else short,
        "change_at_start": short if at_start else long,
    }
    plan = MeasuringPlan(n_random=1, **changes)
    found = measure(network, path, inputs, targets, plan, at_start=at_start)[residual]
    snapshot = Snapshot(network.build().double().eval(), inputs.double(), targets)
    with build_kernel_derivative(snapshot, residual=residual, device="cpu") as rate:
        expected = np.linalg.eigvalsh(rate.to_dense().numpy())
    # Modes of equal λ may be mixed, so the spectra of V and dM/dt are compared.
    largest = np.abs(expected).max()
    assert np.allclose(np.linalg.eigvalsh(found.flow), expected, atol=DIFFERENCE * largest)
    with build_exact_kernel(snapshot, residual=residual, device="cpu") as kernel:
        error = float(kernel.residual_vector.norm())
    assert np.linalg.norm(found.amplitudes) == pytest.approx(error)


def test_saved_couplings_come_back(tiny, tmp_path):
    network, path, inputs, targets = tiny
    found = measure(network, path, inputs, targets, MeasuringPlan(n_random=2))["brier"]
    found.save(tmp_path / "one.npz")
    again = Coupled.load(tmp_path / "one.npz")
    assert np.array_equal(again.eigenvalues, found.eigenvalues)
    assert np.allclose(again.flow, found.flow, rtol=1e-6, atol=0)
    assert np.allclose(again.random, found.random, rtol=1e-6, atol=0)
    assert again.floor == found.floor


def test_jackknife_of_a_mean_is_students_interval():
    values = [1.0, 2.0, 4.0]
    found = jackknife(lambda some: {"slope": np.mean(some)}, values)["slope"]
    assert found == pytest.approx(mean_interval(values))


def test_jackknife_of_positive_quantities_stays_positive():
    values = [1.0, 2.0, 4.0]
    found = jackknife(lambda some: {"transfer": np.exp(np.mean(some))}, values)["transfer"]
    assert found == pytest.approx(np.exp(mean_interval(values)))
    value, lower, upper = jackknife(lambda some: {"toeplitz": np.mean(some)}, [0.2, 0.5, 0.9])[
        "toeplitz"
    ]
    assert 0.0 < lower < value < upper == 1.0


def test_differences_are_paired_by_seed():
    keys = dict.fromkeys(("activation", "time", "residual"), "same")
    rows = [
        {**keys, "architecture": kind, "seed": seed, "statistic": "ratio", "value": value}
        for kind, values in {"residual": (1.0, 5.0, 9.0), "plain": (0.5, 7.0)}.items()
        for seed, value in reversed(list(enumerate(values)))
    ]
    found = differences(pd.DataFrame(rows).assign(permuted=np.nan), "ratio")["value"]
    # The third has no partner.
    assert found.groupby(level="seed").sum().to_dict() == {0: 0.5, 1: -2.0}


def test_page_says_what_its_tables_say():
    """The tables and the text of the page follow from the numbers that lie beside them."""
    frame = read_statistics(PAGE / "statistics.csv")
    assert len(frame) == len(list(Design.full().cells())) * len(STATISTICS)
    assert (PAGE / "summary.rst").read_text() == summary(frame)
    for name, table in derived_tables(frame).items():
        assert (PAGE / f"{name}.csv").read_text() == table.to_csv(index=False)


def test_page_is_right_about_the_size_of_the_step():
    steps = pd.read_csv(PAGE / "steps.csv")
    steps = steps[steps["direction"] == "gradient flow"]
    shown = {name: steps[name].str.split(",").str[0].astype(float) for name in steps.columns[4:]}
    start, gelu = steps["time"] == "start", steps["network"].str.contains("gelu")
    gap = np.where(
        start,
        (shown["step 0.1 %"] - shown["step 0.03 %"]).abs(),
        (shown["step 1 %"] - shown["step 0.1 %"]).abs(),
    )
    assert len(steps) == 24
    assert gap[gelu].max() < 0.005
    assert gap[~gelu].max() > 0.1
