"""Status phrases, each once, and how several are joined."""

from __future__ import annotations

from collections.abc import Iterable

OK = "ok"
"""Nothing to be said."""

# operators

COLUMNS_ARE_PRODUCTS = "layers disagree with automatic differentiation: columns are products"


def measured_in(own: str, working: str) -> str:
    """Of a model in half precision."""
    return f"{own} model measured in {working}"


def smaller_chunks(n_samples: int | None) -> str:
    """Of chunks that were halved until memory sufficed."""
    return f"memory ran out: computed in chunks of {n_samples} samples"


def join_statuses(statuses: Iterable[str]) -> str:
    """Return the distinct phrases joined by ``"; "``, without ``"ok"`` unless it is the only one.

    Examples
    --------
    >>> join_statuses(["ok", "a; b", "a"])
    'a; b'
    """
    phrases = dict.fromkeys(phrase for status in statuses for phrase in status.split("; "))
    return "; ".join(phrase for phrase in phrases if phrase not in ("", "ok")) or "ok"


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
FLAT_POWER = "flat profile: the power of the cutoff is not determined"
DEGENERATE_POWER = "degenerate: the free cutoff is itself a power law"


def taus_left_out(n_taus: int) -> str:
    """Return that so many tau have too few shells."""
    return f"{n_taus} tau with {TOO_FEW_SHELLS} left out"
