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
