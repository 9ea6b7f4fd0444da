"""The gate of the ladder, and how many columns go through a model together."""

import dataclasses

import pytest
import torch

from spectralshell.operators import build_kernel
from spectralshell.operators.jacobian.linearizations import RUNGS, ForwardMode
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.problem import pose_problem
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
    problem = pose_problem(make_snapshot(CASES_BY_NAME["mlp"]))
    evaluation = dataclasses.replace(problem.evaluate(None), flops=forward_flops)
    kernel = assemble_matrix_free(problem, None, evaluation=evaluation)
    block = place(torch.randn(kernel.n, 70, generator=torch.Generator().manual_seed(0)).double())
    expected = kernel.to_dense() @ block
    linearization, seen = kernel.jacobian.parts[0].linearization, []
    pull_block = linearization.pull_block

    def watched(cotangents):
        seen.append(len(cotangents))
        return pull_block(cotangents)

    monkeypatch.setattr(linearization, "pull_block", watched)
    torch.testing.assert_close(kernel.matmat(block), expected)
    assert seen == widths
