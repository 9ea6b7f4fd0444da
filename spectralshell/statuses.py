"""Status phrases, each once, and how several are joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MAX_NAMES = 4

OK = "ok"
"""Nothing to be said."""

# Operators

COLUMNS_ARE_PRODUCTS = "layers disagree with automatic differentiation: columns are products"

ZERO_DIRECTION = "zero direction"
"""The parameters stand still."""

FROZEN_KERNEL = "frozen kernel"
"""J does not depend on the parameters along the direction."""


def measured_in(own: str, working: str) -> str:
    """Of a model in half precision."""
    return f"{own} model measured in {working}"


def checkpoint_in(own: str, working: str) -> str:
    """Of a checkpoint in half precision, of a model that has more digits."""
    return f"{own} checkpoint measured in {working}"


def outputs_change_otherwise(defect: float) -> str:
    """Of a model whose reverse-mode Jacobian is not the derivative of its outputs."""
    return f"the outputs do not change as the Jacobian says (they differ by {defect:.1e})"


def zero_jacobian_of(names: Sequence[str]) -> str:
    """Of parameters that reverse mode finds no dependence on, in the whole batch."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"zero Jacobian of {', '.join(names[:_MAX_NAMES])}{more}"


def set_up_again(reason: str) -> str:
    """Of a snapshot that failed the short test that follows others of its model."""
    return f"set up anew, as what held for earlier snapshots did not: {reason}"


def labels_masked(n_labels: int) -> str:
    """Say that labels under a zero attention mask do not count."""
    noun = "label" if n_labels == 1 else "labels"
    return f"{n_labels} {noun} under a zero attention mask left out"


def own_loss_differs(own: float, measured: float) -> str:
    """Say that a model's own loss of the labels is not the mean negative log-likelihood."""
    return f"the model's own loss is {own:.4g}, and {measured:.4g} without what it adds"


def smaller_chunks(n_samples: int | None) -> str:
    """Of chunks that were halved until memory sufficed."""
    return f"memory ran out: computed in chunks of {n_samples} samples"


def join_statuses(statuses: Iterable[str]) -> str:
    """Return the distinct phrases joined by ``"; "``; ``"ok"`` stands alone or not at all."""
    phrases = dict.fromkeys(phrase for status in statuses for phrase in status.split("; "))
    return "; ".join(phrase for phrase in phrases if phrase not in ("", OK)) or OK


# Krylov

ZERO_START_VECTOR = "zero start vector"
ZERO_START_BLOCK = "zero start block"
EXHAUSTION = "exhaustion"


def start_block_rank(rank: int) -> str:
    """Say that columns of the start block were zero or depended on those before."""
    return f"start block of rank {rank}"


def stagnation_at(step: int) -> str:
    """Say that a new direction follows the rounding of the products."""
    return f"stagnation at step {step}"


def breakdown_at(step: int) -> str:
    """Say that the basis is an invariant subspace."""
    return f"breakdown at step {step}"


def deflation_at(step: int) -> str:
    """Say that some columns of a block ended in an invariant subspace."""
    return f"deflation at step {step}"


def pairs_found(found: int, wanted: int) -> str:
    """Say that there are fewer eigenpairs than asked for."""
    return f"{found} of {wanted} pairs"


def asymmetric(asymmetry: float, noise: float) -> str:
    """Say that a matrix is less symmetric than its rounding error explains."""
    return f"asymmetry {asymmetry:.1e} above the noise {noise:.1e}"


# Shells

BELOW_FLOOR = "below the resolution floor"
WIDE_BOUNDS = "bounds wider than the energy"
ABOVE_LAST_EDGE = "holds energy above the last edge"
BELOW_FIRST_EDGE = "below the first edge"
ZERO_COUPLING = "zero coupling"
FEWER_THAN_TWO_SHELLS = "fewer than two shells"
TWO_SHELLS = "two shells: no interval"


def negative_rates(n_negative: int, *, exact: bool, within_noise: bool) -> str:
    """Say that nodes of a measure are negative; their energy is null."""
    noun = "eigenvalues" if exact else "Ritz values"
    return f"{n_negative} negative {noun}, {'within' if within_noise else 'beyond'} the noise"


def without_coupling(n_shells: int) -> str:
    """Say that shells of zero coupling have no logarithm to fit."""
    return f"{n_shells} shells without coupling left out"


def sign_differs(n_shells: int, n_fitted: int) -> str:
    """Say how many shells have the sign of the minority."""
    return f"sign differs in {n_shells} of {n_fitted} shells"


# Measurements

ZERO_ERROR = "zero error"
LOST_COUPLINGS = "couplings of some modes are lost in rounding"
NOT_CONVERGED = "not converged in the steps taken"
FLUX_IS_ROUNDING = "the flux is rounding"
STEP_TOO_LONG = "changes with the step of the difference"
STEP_TOO_SHORT = "the step of the difference is lost in rounding"
ONE_BLOCK = "one block"
ZERO_KERNEL = "zero kernel"
CHANGES_CANCEL = "the changes by blocks cancel"
RATE_FROM_BELOW = "rate of the Jacobian from below"


def solved_by(solver: str, *, unable: str) -> str:
    """Say that a solver cannot differentiate the model, and which one could."""
    return f"{unable} cannot differentiate the model: solved by {solver}"


def gates_held(names: Iterable[str]) -> str:
    """Say which functions with kinks are held as they are, ``"ok"`` if none."""
    listed = ", ".join(names)
    return f"gates held: {listed}" if listed else OK


def rates_in(unit: str) -> str:
    """Say what rates are, such as ``"per tau, of the selected parameters"``."""
    return f"rates {unit}"


def difference_good_to(share: float) -> str:
    """Say what half the step of a difference changed, in parts of the whole."""
    return f"differences good to {100 * share:.2g} %"


def zero_kernel_of(labels: Iterable[str]) -> str:
    """Say which blocks have no kernel."""
    return f"{ZERO_KERNEL} of {', '.join(labels)}"


# Estimators


def skipped(reason: str) -> str:
    """Say why a snapshot was left out."""
    return f"skipped: {reason}"


def n_skipped(n_left_out: int, n_snapshots: int) -> str:
    """Say how many snapshots were left out."""
    return f"{n_left_out} of {n_snapshots} snapshots skipped"


NO_MODE_NEAR_EDGE = "no mode near the edge"
NO_ENERGY_IN_SHELL = "no energy in the shell"
ENERGY_IS_ROUNDING = "the energy is rounding"
DISSIPATION_IS_ROUNDING = "the dissipation below is rounding"
UNRESOLVED_ENDS = "not resolved at both ends"
EDGE_DECAYS = "the edge decays within the interval"
OTHER_DIRECTION = "the parameters took another direction"
LONG_INTERVAL = "the interval is too long to tell what the parameters did"
NO_FLUX = "no flux"
NO_SIGN_TEST = "one batch: no test of the sign"
NO_DIRECTION = "direction not determined"
FEW_EDGES_OF_ONE_DIRECTION = "too few edges of one direction"
INTERVAL_FROM_EDGES = "interval from the scatter of edges"
ONE_USABLE_SHELL = "one usable shell: residual trivially 0"
ONE_WINDOW = "no more usable shells than a window has"
ONE_BATCH = "one batch: no interval over batches"
MODES_DIFFER = "modes of a batch differ between tau: no permutation p-value"
SEVERAL_TAUS = "mean over several tau: the largest couplings weigh most"


def few_edges(n_needed: int) -> str:
    """Say that too few edges have a velocity to fit."""
    return f"fewer than {n_needed} usable edges"


def other_way(n_other: int, n_edges: int) -> str:
    """Say how many edges drift against the majority."""
    return f"{n_other} of {n_edges} edges drift the other way"


def few_modes(min_modes: int) -> str:
    """Say why a shell is masked."""
    return f"fewer than {min_modes} modes"


def no_usable_shell(min_modes: int) -> str:
    """Say that all shells are masked."""
    return f"no shell with {min_modes} modes"


def few_block_orders(p_value: float, n_blocks: int) -> str:
    """Say that so few blocks have few orders, which limits the p-value."""
    return f"p of about {p_value:.2g} or more: few orders of {n_blocks} blocks"


def few_random_orders(p_value: float) -> str:
    """Say that so few random orders limit the p-value."""
    return f"p of {p_value:.2g} or more: few random orders"


# Tail fit

EMPTY_TAIL = "empty tail"
TOO_FEW_SHELLS = "fewer than min_shells usable shells"
NO_CUTOFF = "no cutoff in window"
FLAT_SLOPE = "flat profile: b is not determined"
DEGENERATE_SLOPE = "degenerate"
ONE_BATCH_OPTIMISTIC = (
    "one batch: interval and test take shells as independent, so they are optimistic"
)
NO_FRONTIER_INTERVAL = "frontier without interval"
FRONTIER_OUTSIDE = "frontier outside the window"
FLAT_POWER = "flat profile: the power of the cutoff is not determined"
DEGENERATE_POWER = "degenerate: the free cutoff is itself a power law"


EQUAL_BATCHES = "batches do not differ: no interval"
POWER_EXCLUDES_TEMPLATE = "the cutoff's free power excludes b − 1"
POWER_EXCLUDES_BOTH = "the cutoff's free power excludes b − 1 and a frozen kernel's 1"


def better_model(name: str, distance: float, *, tied: bool) -> str:
    """Say which model the data prefer, by how much, and whether batches agree on that."""
    spread = ", within the spread over batches" if tied else ""
    return f"{name} fits better: AIC lower by {distance:.0f}{spread}"


def fits_not_converged(names: Iterable[str]) -> str:
    """Say which fits are not known to be at their minimum, ``"ok"`` if none."""
    listed = " and ".join(names)
    return f"fit not converged: {listed}" if listed else OK


def rival_minimum(symbol: str, value: float) -> str:
    """Say where the profile has another minimum that is as good."""
    return f"another minimum at {symbol} = {value:.3g} fits as well"


def competing_minima(n_replicates: int, n_all: int) -> str:
    """Say how many batches, left out, decide between minima that are far apart."""
    return f"minima compete in {n_replicates} of {n_all} jackknife replicates"


def repeated_batches(n_repeated: int, n_batches: int) -> str:
    """Say how many batches are copies of another one and no independent unit."""
    return f"{n_repeated} of {n_batches} batches repeat another"


def taus_left_out(n_taus: int) -> str:
    """Return that so many tau have too few shells."""
    return f"{n_taus} tau with {TOO_FEW_SHELLS} left out"


NAMES_NOT_COMPARED = "slopes of names not compared"


def assumed(labels: Iterable[str]) -> str:
    """Say what nobody told and what was taken for it, such as ``"tau 0"``; ``"ok"`` if nothing."""
    listed = ", ".join(labels)
    return f"not told, so assumed: {listed}" if listed else OK


def batches_missing(n_missing: int, n_rows: int) -> str:
    """Say that batches differ between tau, in (tau, batch) of one name."""
    return f"{n_missing} of {n_rows} (tau, batch) missing"


def shells_left_empty(n_shells: int) -> str:
    """Say that shells between those fitted hold nothing."""
    noun = "shell" if n_shells == 1 else "shells"
    return f"{n_shells} empty {noun} inside the window left out"


def names_differ(p_value: float) -> str:
    """Say that one slope for all names is not tenable."""
    return f"slopes of names differ (p = {p_value:.2g})"


def names_agree(p_value: float) -> str:
    """Say that one slope for all names is tenable."""
    return f"slopes of names do not differ (p = {p_value:.2g})"
