"""The gate of the ladder, and how many columns go through a model together."""

import pytest
import torch

from spectralshell.operators import build_kernel
from spectralshell.operators.kernel import assemble_kernel
from spectralshell.operators.linearizations import RUNGS, ForwardMode
from tests.device import place
from tests.zoo import CASES_BY_NAME, make_snapshot


class Drifting(ForwardMode):
    """Right twice, wrong later: as a map that writes to its own constants."""

    calls = 0

    def push(self, tangents):
        self.calls += 1
        return super().push(tangents) * (1.0 if self.calls < 3 else 1.1)


class OtherPull(ForwardMode):
    def pull(self, cotangent):
        return tuple(1.1 * part for part in super().pull(cotangent))


class OtherPush(ForwardMode):
    def push(self, tangents):
        return 1.1 * super().push(tangents)


@pytest.mark.parametrize("rung", [Drifting, OtherPull, OtherPush])
def test_a_rung_that_is_wrong_at_any_time_is_refused(rung, monkeypatch):
    monkeypatch.setitem(RUNGS, "linearize", rung)
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    assert "wrong" in kernel.refused["linearize"]
    assert kernel.rung == "double-vjp"


@pytest.mark.parametrize(("forward_flops", "widths"), [(1e3, [64, 6]), (1e8, [10] * 7), (1e12, [])])
def test_width_of_blocks_follows_from_operations_alone(forward_flops, widths, monkeypatch):
    kernel = assemble_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    block = place(torch.randn(kernel.n, 70, generator=torch.Generator().manual_seed(0)).double())
    expected = kernel.to_dense() @ block
    kernel.forward_flops = forward_flops
    linearization, seen = kernel.parts[0].linearization, []
    pull_block = linearization.pull_block

    def watched(cotangents):
        seen.append(len(cotangents))
        return pull_block(cotangents)

    monkeypatch.setattr(linearization, "pull_block", watched)
    torch.testing.assert_close(kernel.matmat(block), expected)
    assert seen == widths
