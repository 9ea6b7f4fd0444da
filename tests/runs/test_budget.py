"""Budgets: the share of a loop's time, by a clock of the test's own."""

import pytest

from spectralshell.runs.budget import TimeShare, densest


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("most", "n_kept"), [(0.05, 5), (0.2, 24), (None, 100)])
def test_states_are_kept_below_the_share(most, n_kept):
    clock = _Clock()
    share = TimeShare(most, clock)
    kept = 0
    for _ in range(100):
        clock.now += 1.0  # a step of the loop
        with share.counted():
            if share.allows_a_state():
                with share.of_a_state(), share.counted():
                    clock.now += 1.0  # a state
                kept += 1
    assert abs(kept - n_kept) <= 1
    assert share.spent == pytest.approx(kept)
    if most is not None:
        assert share.spent <= most * share.seconds + 1.0  # but for the first, of unknown cost


@pytest.mark.parametrize(
    ("steps", "logarithmic", "lost"),
    [
        ([0, 1, 2, 100], True, 1),
        ([0, 50, 60, 100], False, 60),
        ([0, 10, 100, 110, 2000], True, 100),
        ([0, 10], True, None),
        ([0], False, None),
    ],
)
def test_the_densest_state_is_lost(steps, logarithmic, lost):
    assert densest(steps, logarithmic=logarithmic) == lost
