"""The parameter ``memory``: where results are kept on disk."""

from __future__ import annotations

import os
from typing import Any

from joblib import Memory
from sklearn.utils.validation import check_memory


def resolve_memory(memory: Any) -> Memory:
    """Return the cache that the parameter ``memory`` stands for.

    Parameters
    ----------
    memory : None, str, path or joblib.Memory
        None is a cache that keeps nothing.

    Returns
    -------
    joblib.Memory

    Raises
    ------
    ValueError
        If it is anything else.

    Examples
    --------
    >>> resolve_memory(None).location is None
    True
    """
    return check_memory(os.fspath(memory) if isinstance(memory, os.PathLike) else memory)
