"""Directions: what they are, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from spectralshell.operators import build_kernel, survey_motion
from tests.device import place_snapshot
from tests.operators.motion.test_derivative import NARROW, SAME, motion_of, random_block, relative
from tests.zoo import CASES_BY_NAME, RESIDUALS, make_snapshot


def flat(tangents):
    return torch.cat([tangent.reshape(-1) for tangent in tangents])


@pytest.mark.parametrize("kind", list(RESIDUALS))
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_gradient_flow_is_the_velocity_of_the_table(kind, chunk_size):
    with motion_of("mlp", kind, chunk_size=chunk_size) as motion:
        snapshot = make_snapshot(CASES_BY_NAME["mlp"], kind)
        expected = build_kernel(snapshot, residual=RESIDUALS[kind]).velocity()
        direction = motion.direction("gradient-flow")
        assert relative(flat(direction.tangents), flat(expected)) <= SAME
        assert direction.norm == pytest.approx(float(flat(expected).norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["gradient-flow", "cross-entropy"])
def test_a_checkpointed_model_is_differentiated_at_the_snapshot(spec, dtype):
    # Its backward pass evaluates a part anew, with whatever weights it finds.
    snapshot = make_snapshot(CASES_BY_NAME["checkpointed"], "mse labels", dtype)
    with survey_motion(snapshot, dtype="float64") as motion:
        expected = motion.direction("random", norm=1.0), motion.direction(spec)
    with torch.no_grad():
        for parameter in snapshot.model.parameters():
            parameter *= 0.5
    with survey_motion(snapshot, dtype="float64") as motion:
        random, found = motion.direction("random", norm=1.0), motion.direction(spec)
        assert torch.equal(flat(random.tangents), flat(expected[0].tangents))
        assert torch.equal(flat(found.tangents), flat(expected[1].tangents))
        if spec == "gradient-flow":
            velocity = build_kernel(snapshot, dtype="float64").velocity()
            assert relative(flat(found.tangents), flat(velocity)) <= SAME


@pytest.mark.parametrize("kind", ["mse labels", "brier", "cross-entropy", "nll"])
@pytest.mark.parametrize("name", ["mlp", "tied language model"])
def test_cross_entropy_under_any_residual(name, kind):
    snapshot = make_snapshot(CASES_BY_NAME[name], kind)
    model = snapshot.model.eval()
    loss = F.cross_entropy(model(snapshot.inputs).flatten(0, -2), snapshot.targets.flatten())
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    with survey_motion(snapshot, residual=RESIDUALS[kind]) as motion:
        found = motion.direction("cross-entropy")
        assert relative(flat(found.tangents), -expected) <= SAME
        if kind == "cross-entropy":
            flow = motion.direction("gradient-flow")
            assert relative(flat(found.tangents), flat(flow.tangents)) <= SAME


def test_random_directions_follow_the_generator_and_have_the_norm_of_the_flow():
    with motion_of("mlp") as motion, motion_of("mlp") as again:
        flow = motion.direction("gradient-flow")
        first, second = motion.direction("random"), motion.direction("random")
        assert first.norm == pytest.approx(flow.norm)
        assert relative(flat(first.tangents), flat(second.tangents)) > 0.5
        assert torch.equal(flat(first.tangents), flat(again.direction("random").tangents))
        seeded = [
            flat(m.direction("random", generator=torch.Generator().manual_seed(4)).tangents)
            for m in (motion, again)
        ]
        assert torch.equal(*seeded)


def test_random_directions_do_not_depend_on_what_was_probed():
    plain, busy = (motion_of("mlp", generator=torch.Generator().manual_seed(4)) for _ in range(2))
    with plain, busy:
        busy.derivative(busy.direction("gradient-flow")).to_dense()
        tangents = [flat(m.direction("random").tangents) for m in (plain, busy)]
        assert torch.equal(*tangents)
    with motion_of("mlp", generator=torch.Generator().manual_seed(5)) as other:
        assert relative(flat(other.direction("random").tangents), tangents[0]) > 0.5


@pytest.mark.parametrize(("tau", "unit"), [(1.0, "as given"), (1.5, "per tau"), (0.5, "per tau")])
def test_displacement_to_a_snapshot(tau, unit):
    here = make_snapshot(CASES_BY_NAME["cnn batchnorm"], "brier", tau=1.0)
    state = {
        name: tensor + 0.1 if tensor.is_floating_point() else tensor
        for name, tensor in here.load_state().items()
    }
    there = place_snapshot(here.model, here.inputs, here.targets, tau=tau, state=state)
    with survey_motion(here, residual="brier") as motion:
        direction = motion.direction(there)
        found = flat(direction.tangents)
        assert direction.unit == unit
        assert relative(found, torch.full_like(found, 0.1 / ((tau - 1.0) or 1.0))) <= SAME
        with pytest.raises(ValueError, match="same model"):
            motion.direction(make_snapshot(CASES_BY_NAME["mlp"]))


def moved_snapshot(here, amounts, tau):
    """Return a snapshot whose tensors differ by what their names are given."""
    state = dict(here.load_state())
    for name, amount in amounts.items():
        state[name] = state[name] + amount
    return place_snapshot(here.model, here.inputs, here.targets, tau=tau, state=state)


@pytest.mark.parametrize(
    ("amounts", "unit"),
    [
        ({"2.weight": 0.1}, "per tau"),
        ({"2.weight": 0.1, "0.bias": 0.1}, "per tau, of the selected parameters"),
    ],
)
def test_a_displacement_of_some_parameters_says_that_others_moved_too(amounts, unit):
    here = make_snapshot(CASES_BY_NAME["mlp"])
    with survey_motion(here, parameters=r"^2\.") as motion:
        direction = motion.direction(moved_snapshot(here, amounts, tau=1.0))
    assert direction.unit == unit
    assert direction.norm == pytest.approx(0.1 * 15**0.5)


def test_a_diverged_snapshot_is_no_direction():
    here = make_snapshot(CASES_BY_NAME["mlp"])
    with motion_of("mlp") as motion:
        with pytest.raises(ValueError, match=r"direction: .*'0.bias' holds NaN or infinite"):
            motion.direction(moved_snapshot(here, {"0.bias": torch.inf}, tau=1.0))
        with pytest.raises(ValueError, match=r"direction 'snapshot': .* NaN or infinite"):
            motion.direction(moved_snapshot(here, {"0.bias": 1e300}, tau=1e-300))


def test_two_names_of_one_parameter_have_to_agree():
    with motion_of("tied language model") as motion:
        both = {"embedding.weight": torch.ones(5, 4), "head.weight": torch.ones(5, 4)}
        assert motion.direction(both).norm == pytest.approx(20**0.5)
        with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are one"):
            motion.direction(both | {"head.weight": torch.zeros(5, 4)})


def test_a_mapping_fills_in_zeros_and_knows_tied_names():
    with motion_of("tied language model") as motion:
        value = random_block(5, 4)
        for name in ("embedding.weight", "head.weight"):
            direction = motion.direction({name: value.cpu().numpy()})
            assert direction.norm == pytest.approx(float(value.norm()))
            assert sum(bool(t.any()) for t in direction.tangents) == 1


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("downhill", ValueError, "gradient-flow"),
        (3, TypeError, "Snapshot"),
        ({"9.weight": torch.ones(1)}, ValueError, "none of the differentiated parameters"),
        ({"0.bias": torch.ones(2)}, ValueError, r"expected \(5,\)"),
        ({"0.bias": torch.full((5,), torch.nan)}, ValueError, "not finite"),
        ("cross-entropy", TypeError, "class labels"),
    ],
)
def test_what_is_no_direction_is_refused(spec, error, message):
    with motion_of("mlp") as motion, pytest.raises(error, match=message):
        motion.direction(spec)


def test_arguments_and_order_of_use_are_checked():
    motion, other = motion_of("mlp"), motion_of("gru", "nll")
    direction = motion.direction("random")
    with pytest.raises(ValueError, match="another motion"):
        other.derivative(direction)
    with pytest.raises(TypeError, match="must be a Direction"):
        motion.derivative("random")
    with pytest.raises(ValueError, match="method"):
        motion.derivative(direction, method="guess")
    with pytest.raises(ValueError, match="step"):
        motion.derivative(direction, method="difference", step=0.0)
    derivative = motion.derivative(direction)
    with pytest.raises(ValueError, match="operand"):
        derivative.compress(random_block(3, 3))
    difference = motion.derivative(direction, method="difference")
    motion.close()
    with pytest.raises(ValueError, match="closed"):
        motion.direction("random")
    with pytest.raises(ValueError, match="closed"):
        difference.to_dense()
    with pytest.raises(ValueError, match="closed"):
        derivative.matvec(random_block(motion.n, 1)[:, 0])


@pytest.mark.parametrize("max_memory", [None, NARROW])
def test_a_step_beyond_the_range_of_numbers_is_refused(max_memory):
    with motion_of("deep linear", max_memory=max_memory) as motion:
        direction = motion.direction("random", norm=1.0)
        derivative = motion.derivative(direction, method="difference", step=1e100)
        with pytest.raises(ValueError, match="smaller step"):
            derivative.to_dense()
