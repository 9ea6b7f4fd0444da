"""The tail fit on frames with known tails: b, cutoffs, evidence, rows and scores."""

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import trapezoid
from sklearn.utils.estimator_checks import parametrize_with_checks

from spectralshell.datasets import make_grsd_spectra
from spectralshell.estimators.tail.fitter import OUTPUT_COLUMNS, GRSDTailFitter
from spectralshell.shells import ShellPartition, energy_frame
from spectralshell.statuses import (
    DEGENERATE_SLOPE,
    EQUAL_BATCHES,
    FLAT_SLOPE,
    FRONTIER_OUTSIDE,
    NO_CUTOFF,
    ONE_BATCH_OPTIMISTIC,
    POWER_EXCLUDES_BOTH,
    POWER_EXCLUDES_TEMPLATE,
    TOO_FEW_SHELLS,
    better_model,
    names_agree,
    repeated_batches,
    shells_left_empty,
)
from tests.estimators.tail.energies import SHELLS, WINDOW, exact_energies, frame

# Differences of score between shell ratios: what a smooth measure leaves.
SCORE_SPREAD = 5e-3


@parametrize_with_checks([GRSDTailFitter()])
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("b", [0.7, 1.6, 2.0, 3.0])
def test_template_is_found_without_noise(b):
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("template", b, noise="none", n_batches=1))
    assert fitter.b_ == pytest.approx(b, abs=5e-3)  # nodes are half a cell off an edge
    assert fitter.status_.split("; ")[0] == ONE_BATCH_OPTIMISTIC
    lower, upper = fitter.b_interval_
    assert lower <= fitter.b_ <= upper


def test_frame_attribute_holds_cutoff_and_frontier():
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("template", 1.6))
    table = fitter.frame_
    assert list(table.columns) == [
        "tau",
        "amplitude",
        "cutoff",
        "frontier",
        "frontier_lower",
        "frontier_upper",
        "n_shells",
        "status",
    ]
    expected = table["cutoff"] ** (-1 / (fitter.b_ - 1))
    np.testing.assert_allclose(table["frontier"], expected)
    assert (table["frontier_lower"] < table["frontier"]).all()
    assert (table["frontier"] < table["frontier_upper"]).all()
    assert (table["status"] == "ok").all()
    assert (np.diff(table["frontier"]) < 0).all()


@pytest.mark.parametrize("b", [0.7, 1.0, 1.6, 3.0])
def test_pure_power_law_has_no_cutoff(b):
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("pure", b))
    assert fitter.status_.split("; ")[0] == NO_CUTOFF
    assert fitter.b_ == pytest.approx(b, abs=0.05)
    assert (fitter.frame_["cutoff"] == 0).all()
    assert fitter.frame_["frontier"].isna().all()
    assert (fitter.frame_["status"] == NO_CUTOFF).all()


def test_degenerate_is_said():
    """A true b of 1.02, with so little noise that its bend is seen."""
    energies = exact_energies(1.02, 25.0, 0.02, SHELLS.edges)
    X = energies * np.random.default_rng(0).gamma(1e7, 1e-7, size=(12, len(energies)))
    fitter = GRSDTailFitter(edges=SHELLS.edges).fit(X)
    assert "degenerate" in fitter.status_
    assert fitter.b_ == pytest.approx(1.02, abs=0.03)


def imitated_cutoff(first):
    """A frozen kernel's cutoff on shells of ratio 1.5 from 1.5^first: b is found near 1."""
    edges = 1.5 ** np.arange(first, 1.0)
    nodes = edges[:-1, None] * 1.5 ** np.linspace(0.0, 1.0, 4001)
    energies = trapezoid(nodes**-0.3 * np.exp(-5.0 * nodes), nodes, axis=1)
    noise = 0.03 * np.random.default_rng(0).standard_normal((10, energies.size))
    fitter = GRSDTailFitter(edges=edges, floor=0.0, window=(edges[0], 1.0))
    return fitter.fit(energies * np.exp(noise), tau=np.zeros(10), batch=range(10))


def test_degenerate_fit_has_no_frontier():
    fitter = imitated_cutoff(-12)
    assert "degenerate" in fitter.status_
    assert fitter.frame_.filter(like="frontier").isna().all(axis=None)
    assert (fitter.frame_["status"] == DEGENERATE_SLOPE).all()
    assert (fitter.frame_["cutoff"] > 0).all()


@pytest.mark.parametrize(("frontier", "status"), [(0.1, "ok"), (2.0, FRONTIER_OUTSIDE)])
def test_frontier_outside_the_window_is_said(frontier, status):
    edges = SHELLS.edges[SHELLS.edges <= 1.0 + 1e-9]
    energies = exact_energies(1.6, frontier**-0.6, 0.6, edges)
    noise = np.random.default_rng(0).gamma(1e6, 1e-6, size=(8, len(energies)))
    fitter = GRSDTailFitter(edges=edges, window=(edges[0], edges[-1])).fit(energies * noise)
    assert fitter.frame_["frontier"][0] == pytest.approx(frontier, rel=0.1)
    assert fitter.frame_["status"][0] == status


def test_shared_cutoff_is_k_tau():
    X = frame("template", 1.6)
    table = GRSDTailFitter(window=WINDOW, cutoff="shared").fit(X).frame_
    rate = table["cutoff"] / table["tau"]
    np.testing.assert_allclose(rate, rate[0])
    assert rate[0] ** (-1 / 0.6) == pytest.approx(  # λ* at τ = 1 is 85 % up the window
        1e-3**0.15, rel=0.2
    )


def test_cutoff_none_is_the_power_law_of_the_comparison():
    fitter = GRSDTailFitter(window=WINDOW, cutoff="none").fit(frame("template", 1.6))
    assert fitter.b_ == fitter.comparison_["slope"][0]
    distance = fitter.comparison_["delta_aic"][0]
    assert fitter.status_ == better_model("power law, template cutoff", distance, tied=False)


def test_energies_are_averaged_before_logarithms():
    """Strong noise in one shell: the mean of logs would lie half a variance lower."""
    energies = exact_energies(1.5, 0.0, 1.0, SHELLS.edges)
    rng = np.random.default_rng(0)
    X = np.repeat(energies[None], 400, axis=0)
    X[:, 0] *= np.exp(1.0 * rng.normal(size=400) - 0.5)
    fitter = GRSDTailFitter(edges=SHELLS.edges, cutoff="none").fit(X)
    assert fitter.b_ == pytest.approx(1.5, abs=0.02)


def test_default_window_runs_from_the_peak_to_the_largest_eigenvalue():
    X = frame("template", 2.0)
    X.insert(1, "shell[0.0005,0.001)", 1e-9)  # below the peak
    fitter = GRSDTailFitter(floor=0.0).fit(X)
    assert fitter.window_[0] == 1e-3
    assert fitter.window_[1] <= X.attrs["lambda_max"]


@pytest.mark.parametrize(
    ("empty", "last"),
    [((1,), 12), ((2,), 12), ((1, 3), 12), ((1, 2), 12), ((8,), 8), ((4, 5, 6, 7), 4), ((11,), 11)],
)
def test_empty_shells_near_the_peak_do_not_end_the_window(empty, last):
    """Of twelve shells, the others as they were; a gap under a few lone shells ends the tail."""
    edges = 2.0 ** np.arange(-11, 2)
    rng = np.random.default_rng(0)
    X = exact_energies(1.5, 0.0, 1.0, edges) * rng.gamma(400.0, 1 / 400.0, size=(8, 12))
    X[:, list(empty)] = 0.0
    options = {"edges": edges, "floor": 0.0}
    labels = {"tau": np.zeros(8), "batch": np.arange(8)}
    fitter = GRSDTailFitter(**options).fit(X, **labels)
    assert fitter.window_ == (edges[0], edges[last])
    assert fitter.b_ == pytest.approx(1.5, abs=0.05)
    inside = sum(shell < last for shell in empty)
    assert fitter.frame_["n_shells"][0] == last - inside
    assert (shells_left_empty(inside) in fitter.status_) == (inside > 0)
    explicit = GRSDTailFitter(**options, window=fitter.window_).fit(X, **labels)
    assert explicit.b_ == fitter.b_


def test_floor_leaves_shells_out():
    X = frame("pure", 1.5)
    high = GRSDTailFitter(window=WINDOW, floor=0.01).fit(X)
    whole = (SHELLS.edges[:-1] >= 0.01) & (SHELLS.edges[1:] <= WINDOW[1])
    assert (high.frame_["n_shells"] == whole.sum()).all()
    labels = X.index.to_frame(index=False).assign(resolution_floor=0.01)
    raised = X.set_index(pd.MultiIndex.from_frame(labels))
    assert GRSDTailFitter(window=WINDOW).fit(raised).b_ == high.b_
    earlier = X.droplevel(["lambda_max", "resolution_floor"])
    earlier.attrs["resolution_floor"] = 0.01
    assert GRSDTailFitter(window=WINDOW).fit(earlier).b_ == high.b_


def test_frozen_kernel_ranks_first():
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("frozen", 1.5))
    ranks = fitter.comparison_.set_index("model")["rank"]
    assert ranks["power law, exp(-kappa lambda)"] == 1
    assert (ranks.drop("power law, exp(-kappa lambda)") > 1).all()
    assert fitter.falsifier_["contains_frozen"]
    assert not fitter.falsifier_["contains_template"]
    assert fitter.comparison_["log_likelihood"].idxmax() == 2


def test_falsifier_is_silent_where_there_is_no_cutoff():
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("pure", 1.5))
    assert fitter.status_.split("; ")[0] == "no cutoff in window"
    assert fitter.falsifier_["status"] == "no cutoff in window"
    assert np.isnan(fitter.falsifier_["power"])
    assert fitter.falsifier_["contains_frozen"] is None


def test_degenerate_slope_has_no_interval():
    """Slope 3 and a little curvature: near b = 1 the cutoff imitates the whole power law."""
    edges = 2.0 ** np.arange(-8, 1)
    log_mid = 0.5 * np.log(edges[1:] * edges[:-1])
    energies = np.diff(edges) * np.exp(-3.0 * log_mid - 0.02 * log_mid**2)
    noise = np.exp(0.02 * np.random.default_rng(0).normal(size=(12, len(energies))))
    fitter = GRSDTailFitter(edges=edges).fit(energies * noise)
    assert fitter.status_.split("; ")[0] == "degenerate"
    assert abs(fitter.b_ - 1.0) < 0.05
    assert np.isnan(fitter.b_interval_).all()


def test_template_is_told_from_a_frozen_kernel():
    # one seed of a 95 % interval
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("template", 1.6, random_state=2))
    assert fitter.comparison_["aic"].idxmin() == 1
    assert not fitter.falsifier_["contains_frozen"]
    assert fitter.falsifier_["contains_template"]


@pytest.mark.parametrize(
    ("X", "status"),
    [
        (np.zeros((3, 8)), "empty tail"),
        (np.ones((3, 2)), TOO_FEW_SHELLS),
        (np.eye(8)[:1], TOO_FEW_SHELLS),
        (np.full((3, 8), 5e-324), "empty tail"),
    ],
)
def test_poor_input_gives_a_status(X, status):
    fitter = GRSDTailFitter().fit(X)
    assert np.isnan(fitter.b_)
    assert np.isnan(fitter.b_interval_).all()
    assert status in fitter.status_
    assert len(fitter.comparison_) == 4
    assert np.isnan(fitter.score(X))
    assert np.isnan(fitter.transform(X)[:, :3]).all()


def test_flat_profile_gives_a_status():
    """A template steeper than the range of b drives the fit to the end of it."""
    edges = 1.2 ** np.arange(9)
    X = exact_energies(12.0, 2.0**-11, 11.0, edges)
    X = X * np.random.default_rng(0).gamma(1e6, 1e-6, size=(12, 8))
    fitter = GRSDTailFitter(edges=edges).fit(X)
    assert fitter.status_.startswith(FLAT_SLOPE)
    assert np.isnan(fitter.b_)
    assert fitter.frame_["amplitude"].isna().all()
    assert np.isfinite(fitter.comparison_["aic"]).all()


def test_exact_power_law_has_no_cutoff_either():
    """Without noise the test compares rounding with rounding."""
    fitter = GRSDTailFitter().fit(exact_energies(3.0, 0.0, 1.0, 2.0 ** np.arange(9))[None])
    assert fitter.b_ == pytest.approx(3.0, abs=1e-6)
    assert NO_CUTOFF in fitter.status_


def test_tau_with_too_few_shells_is_left_out():
    X = frame("pure", 1.5)
    last = X.index.get_level_values("tau") == X.index.get_level_values("tau").max()
    X.iloc[last, 4:] = 0.0
    table = GRSDTailFitter(window=WINDOW).fit(X).frame_
    assert table["status"].iloc[-1] == TOO_FEW_SHELLS
    assert table["amplitude"].isna().tolist() == [False] * 5 + [True]


def test_batch_that_is_missing_at_a_tau():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW).fit(X.drop(index=X.index[3]))
    assert fitter.b_ == pytest.approx(GRSDTailFitter(window=WINDOW).fit(X).b_, abs=0.02)


def test_names_are_no_independent_batches():
    X = frame("template", 1.6)
    copies = pd.concat(dict.fromkeys(("one", "two"), X), names=["name"])
    named = copies.reorder_levels(["tau", "batch", "name", "lambda_max", "resolution_floor"])
    plain, twice = (GRSDTailFitter(window=WINDOW, floor=0.0).fit(x) for x in (X, named))
    assert twice.b_ == pytest.approx(plain.b_, rel=1e-9)
    assert twice.b_interval_ == pytest.approx(plain.b_interval_, rel=1e-9)
    assert names_agree(1.0) in twice.status_
    with pytest.raises(ValueError, match="two rows"):
        GRSDTailFitter().fit(pd.concat([named, named.iloc[:1]]))


@pytest.mark.parametrize("seed", range(3))
def test_order_of_rows_does_not_matter(seed):
    """To the last bit: the fit takes rows in an order of its own."""
    X = frame("template", 1.6)
    shuffled = X.sample(frac=1, random_state=seed)
    one, other = (GRSDTailFitter(window=WINDOW).fit(rows) for rows in (X, shuffled))
    assert one.b_ == other.b_
    assert one.b_interval_ == other.b_interval_
    pd.testing.assert_frame_equal(one.frame_, other.frame_, check_exact=True)
    pd.testing.assert_frame_equal(one.comparison_, other.comparison_, check_exact=True)
    pd.testing.assert_series_equal(one.falsifier_, other.falsifier_, check_exact=True)
    rows = one.transform(X).loc[shuffled.index]
    pd.testing.assert_frame_equal(one.transform(shuffled), rows, check_exact=True)


def test_order_of_named_rows_does_not_matter():
    X = frame("template", 1.6)
    scales = {"a": 0.3, "b": 1.1, "c": 1.7}
    named = pd.concat({name: X * scale for name, scale in scales.items()}, names=["name"])
    one = GRSDTailFitter(window=WINDOW).fit(named)
    assert one.b_ == GRSDTailFitter(window=WINDOW).fit(named.sample(frac=1, random_state=0)).b_


@pytest.mark.parametrize(("kind", "slope"), [("template", 1.6), ("template", 0.7), ("pure", 1.5)])
def test_round_trip_of_a_row_on_the_model(kind, slope):
    X = frame(kind, slope, noise="none", n_batches=2)
    fitter = GRSDTailFitter(window=WINDOW).fit(X)
    out = fitter.transform(X)
    assert out.index.equals(X.index)
    assert list(out.columns) == list(OUTPUT_COLUMNS)
    back = fitter.inverse_transform(out)
    assert list(back.columns) == list(X.columns)
    assert (back["null"] == 0).all()
    np.testing.assert_allclose(back.iloc[:, 1:], X.iloc[:, 1:], rtol=0.05)  # misplaced cells


def test_tail_energy_is_measured_in_the_window():
    X = frame("template", 1.6)
    out = GRSDTailFitter(window=(0.002, 0.256)).fit(X).transform(X)
    np.testing.assert_allclose(out["tail_energy"], X.iloc[:, 2:9].sum(axis=1))


def test_shared_transform_needs_tau_only_for_arrays():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW, cutoff="shared").fit(X)
    out = fitter.transform(X)
    np.testing.assert_allclose(
        out["cutoff"].groupby("tau").first(), fitter.frame_["cutoff"], rtol=1e-9
    )


def one_measure(kind, slope, q):
    """A smooth measure whose shells of any ratio cover the window."""
    options = {"window": (1e-5, 1.0), "n_batches": 1, "noise": "none", "taus": [1.0]}
    cutoff = {"frontiers": [0.02]} if kind == "template" else {"K": 0}
    measures = make_grsd_spectra(slope, **options, **cutoff)
    return energy_frame(measures, ShellPartition.covering(1e-5, 1.0, q=q))


@pytest.mark.parametrize(
    ("kind", "slope"),
    [("template", 0.7), ("template", 1.3), ("template", 2.0), ("pure", 1.0), ("pure", 2.0)],
)
def test_score_hardly_depends_on_the_shell_ratio(kind, slope):
    window = (1.7e-4, 0.77)
    scores = []
    for q in (1.25, 1.5, 2.0, 3.0, 4.0):
        X = one_measure(kind, slope, q)
        scores.append(GRSDTailFitter(window=window).fit(X).score(X))
    assert np.ptp(scores) <= SCORE_SPREAD


def test_score_is_the_mean_log_density():
    """Against the integral ∫ f ln f d ln λ for a pure law over whole shells."""
    X = pd.DataFrame([exact_energies(1.5, 0.0, 1.0, SHELLS.edges)])
    fitter = GRSDTailFitter(edges=SHELLS.edges).fit(X.to_numpy())
    x = np.linspace(np.log(SHELLS.edges[0]), np.log(SHELLS.edges[-1]), 100_001)
    f = np.exp(-0.5 * x)
    f /= trapezoid(f, x)
    assert fitter.score(X.to_numpy()) == pytest.approx(trapezoid(f * np.log(f), x), abs=1e-4)


def test_score_weights_rows():
    X = frame("template", 1.6)
    fitter = GRSDTailFitter(window=WINDOW).fit(X)
    samples = fitter.score_samples(X)
    weights = np.zeros(len(X))
    weights[3] = 2.0
    assert fitter.score(X, sample_weight=weights) == samples[3]
    assert fitter.score(X) == pytest.approx(samples.mean())


def rows_of(kind):
    """Batches that are no independent units, or only in part."""
    edges = 2.0 ** np.arange(10)
    row = exact_energies(1.6, 2.0, -0.4, edges)
    if kind == "equal":
        return np.repeat(row[None], 8, axis=0)
    if kind == "scaled":
        return row * np.arange(1.0, 9.0)[:, None]
    noisy = row * np.random.default_rng(0).gamma(100.0, 0.01, size=(4, row.size))
    return np.concatenate([noisy, noisy])


@pytest.mark.parametrize("kind", ["equal", "scaled"])
@pytest.mark.parametrize("cutoff", ["free", "none"])
def test_batches_that_do_not_differ_give_no_interval(kind, cutoff):
    """A width of 0 would claim a b that is known exactly."""
    fitter = GRSDTailFitter(edges=2.0 ** np.arange(10), cutoff=cutoff).fit(rows_of(kind))
    assert EQUAL_BATCHES in fitter.status_.split("; ")
    assert np.isnan(fitter.b_interval_).all()
    assert fitter.frame_[["frontier_lower", "frontier_upper"]].isna().all(axis=None)
    assert fitter.falsifier_["contains_template"] is None
    assert np.isnan(fitter.falsifier_["lower"])


def test_copies_of_batches_are_said():
    fitter = GRSDTailFitter(edges=2.0 ** np.arange(10)).fit(rows_of("copied"))
    assert repeated_batches(4, 8) in fitter.status_.split("; ")


def test_status_repeats_the_falsifier_and_the_better_model():
    """A frozen kernel is fitted by a template, which two attributes know to be wrong."""
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("frozen", 1.5))
    distance = fitter.comparison_["delta_aic"][1]
    assert distance > 10.0
    name = "power law, exp(-kappa lambda)"
    assert fitter.status_.split("; ") == [
        better_model(name, distance, tied=False),
        POWER_EXCLUDES_TEMPLATE,
    ]


def test_status_says_that_the_free_power_excludes_both():
    """A cutoff exp(-5 λ^3) on a slope of 1.5 is neither the template's nor a frozen kernel's."""
    energies = exact_energies(1.5, 5.0, 3.0, SHELLS.edges)
    X = energies * np.random.default_rng(0).gamma(1e4, 1e-4, size=(12, len(energies)))
    fitter = GRSDTailFitter(edges=SHELLS.edges).fit(X)
    assert not fitter.falsifier_["contains_template"]
    assert not fitter.falsifier_["contains_frozen"]
    assert POWER_EXCLUDES_BOTH in fitter.status_.split("; ")


def test_better_model_that_batches_do_not_agree_on_is_said_as_such():
    fitter = GRSDTailFitter(window=WINDOW).fit(frame("pure", 1.5))
    table = fitter.comparison_
    assert table["rank"][0] == 1
    assert table["delta_aic"][0] > 10.0
    assert "within the spread over batches" in fitter.status_
