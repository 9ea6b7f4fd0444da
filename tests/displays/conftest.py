"""No window, no figure left behind, no change of matplotlib's global settings."""

import pytest


@pytest.fixture(autouse=True)
def _clean(clean_matplotlib):
    """Every test of a display."""
