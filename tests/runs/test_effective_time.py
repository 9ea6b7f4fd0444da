"""Effective time: on a constant gradient the parameters move by τ times it, in the metric."""

import math

import pytest
import torch

from spectralshell.runs import TrainingRecorder, TrainingRun
from spectralshell.runs.effective_time import EffectiveTime, unwrap_optimizer

EXACT = 1e-12
"""Relative: sums of a few dozen steps in double precision."""

STEPS = 40
G = torch.tensor([0.7, -1.3, 0.02], dtype=torch.float64)
START = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)


def _rate(step):
    """A warm-up from 0, then a decay."""
    return 0.03 * min(step / 5, 1.0) * (1.0 - step / (2 * STEPS))


def _follow(make, *, moving=lambda optimizer: None, gradient=lambda p: G, steps=STEPS):
    """Train on a constant gradient; return the path and what was counted at each step."""
    p = torch.nn.Parameter(START.clone())
    optimizer = make([p])
    time = EffectiveTime(optimizer)
    path, taus = [p.detach().clone()], [0.0]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        moving(optimizer)
        p.grad = gradient(p.detach()).clone()
        optimizer.step()
        time.advance(time.read())
        path.append(p.detach().clone())
        taus.append(time.tau)
    return torch.stack(path), torch.tensor(taus, dtype=torch.float64), time, optimizer


def _assert_moved_by(path, tau, direction):
    torch.testing.assert_close(path - path[0], -tau[:, None] * direction, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "foreach": True},
    ],
)
def test_sgd_moves_by_tau(options):
    path, tau, *_ = _follow(lambda ps: torch.optim.SGD(ps, **options))
    _assert_moved_by(path, tau, -G if options.get("maximize") else G)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.8}),
        (torch.optim.Adam, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_a_decay_in_the_gradient_is_followed_with_it(cls, options):
    # The gradient of the loss is chosen so that with the decay it is constant.
    decay = 0.2
    path, tau, time, optimizer = _follow(
        lambda ps: cls(ps, weight_decay=decay, **options), gradient=lambda p: G - decay * p
    )
    _assert_moved_by_increments(path, tau, optimizer)
    assert math.isclose(time.tau_weight_decay, decay * sum(map(_rate, range(STEPS))))


def _metrics(optimizer):
    """Return the metric of every step on the constant gradient G."""
    group = optimizer.param_groups[0]
    eps = group.get("eps", 0.0)
    steps = range(1, STEPS + 1)
    if isinstance(optimizer, torch.optim.SGD):
        return [torch.ones_like(G) for _ in steps]
    if isinstance(optimizer, torch.optim.Adamax):
        return [1 / (G.abs() + eps) for _ in steps]
    if isinstance(optimizer, torch.optim.Adam):
        return [1 / (G.abs() + eps) for _ in steps]
    if isinstance(optimizer, torch.optim.Adagrad):
        return [1 / (G.abs() * math.sqrt(k) + eps) for k in steps]
    held = [1 - group["alpha"] ** k for k in steps]
    spread = [h - h**2 if group["centered"] else h for h in held]
    return [1 / (G.abs() * math.sqrt(s) + eps) for s in spread]


def _assert_moved_by_increments(path, tau, optimizer):
    moved = [dt * P * G for dt, P in zip(tau.diff(), _metrics(optimizer), strict=True)]
    torch.testing.assert_close(
        path[1:] - path[0], -torch.stack(moved).cumsum(0), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "foreach": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adagrad, {"lr_decay": 0.1}),
        (torch.optim.RMSprop, {"alpha": 0.9}),
        (torch.optim.RMSprop, {"alpha": 0.9, "centered": True}),
    ],
)
def test_each_step_moves_by_its_part_of_tau_in_the_metric_of_the_step(cls, options):
    path, tau, _, optimizer = _follow(lambda ps: cls(ps, **options))
    _assert_moved_by_increments(path, tau, optimizer)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax])
def test_the_bias_correction_makes_tau_of_adam_the_sum_of_its_rates(cls):
    _, tau, *_ = _follow(lambda ps: cls(ps, betas=(0.97, 0.999)))
    rates = torch.tensor([_rate(step) for step in range(STEPS)], dtype=torch.float64)
    torch.testing.assert_close(tau[1:], rates.cumsum(0), rtol=EXACT, atol=0.0)


def test_a_beta_that_changes_on_the_way_is_followed():
    def cycle(optimizer):
        step = optimizer.state[optimizer.param_groups[0]["params"][0]].get("step", 0)
        optimizer.param_groups[0]["betas"] = (0.95 - 0.002 * float(step), 0.999)

    path, tau, _, optimizer = _follow(torch.optim.Adam, moving=cycle)
    _assert_moved_by_increments(path, tau, optimizer)
    assert abs(float(tau[-1]) - sum(map(_rate, range(STEPS)))) > 1e-3  # not the sum of rates


def test_the_decay_of_adamw_is_beside_the_gradient():
    decay = 0.3
    path, tau, time, _ = _follow(lambda ps: torch.optim.AdamW(ps, weight_decay=decay))
    rates = torch.tensor([_rate(step) for step in range(STEPS)], dtype=torch.float64)
    shrunk = (rates[:, None] * decay * path[:-1]).sum(0)
    metric = 1 / (G.abs() + 1e-8)
    torch.testing.assert_close(
        path[-1] - path[0] + shrunk, -tau[-1] * metric * G, rtol=EXACT, atol=EXACT
    )
    assert math.isclose(time.tau_weight_decay, decay * float(rates.sum()), rel_tol=EXACT)


def test_momentum_of_rmsprop_is_exact_once_its_second_moment_is_settled():
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.RMSprop([p], lr=0.01, momentum=0.9)
    time = EffectiveTime(optimizer)
    for _ in range(STEPS):
        p.grad = G.clone()
        if p in optimizer.state:
            optimizer.state[p]["square_avg"] = G**2
        else:
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "square_avg": G**2,
                "momentum_buffer": torch.zeros_like(G),
            }
        optimizer.step()
        time.advance(time.read())
    moved = -time.tau * G / (G.abs() + 1e-8)
    torch.testing.assert_close(p.detach() - START, moved, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("second", [{}, {"momentum": 0.5}, {"nesterov": True}])
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_groups_have_factors_beside_the_first(scale, second):
    parts = [torch.nn.Parameter(START.clone()) for _ in range(2)]
    groups = [{"params": [parts[0]]}, {"params": [parts[1]], "lr": 0.1 * scale, **second}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    time = EffectiveTime(optimizer)
    assert time.factors == pytest.approx([1.0, scale])
    moved = torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(STEPS):
        for p in parts:
            p.grad = G.clone()
        before = time.tau
        optimizer.step()
        time.advance(time.read())
        factors = torch.tensor(time.factors, dtype=torch.float64)
        moved -= (time.tau - before) * factors[:, None] * G
    torch.testing.assert_close(
        torch.stack([p.detach() - START for p in parts]), moved, rtol=EXACT, atol=EXACT
    )


def test_a_group_without_gradients_does_not_move():
    parts = [torch.nn.Parameter(START.clone()) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parts], lr=0.1)
    time = EffectiveTime(optimizer)
    assert not time.advance(time.read())  # no gradient at all: no step
    parts[1].grad = G.clone()
    assert time.advance(time.read())
    assert (time.n_steps, time.groups[0].tau, time.groups[1].tau) == (1, 0.0, 0.1)
    assert (time.reference, time.tau) == (1, 0.1)  # τ is that of the first group that moves


def test_rates_that_are_tensors_are_read_at_the_step():
    rate = torch.tensor(0.1, dtype=torch.float64)
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.Adam([p], lr=rate)
    p.grad = G.clone()
    time = EffectiveTime(optimizer)
    optimizer.step()
    settings = time.read()
    rate.fill_(7.0)  # what a scheduler does next
    time.advance(settings)
    assert time.tau == pytest.approx(0.1, rel=EXACT)


@pytest.mark.parametrize(
    ("options", "share"),
    [({"momentum": 0.9}, 10.0), ({"momentum": 0.9, "dampening": 0.5}, 5.0), ({}, None)],
)
def test_an_optimiser_that_has_trained_before_has_a_full_buffer(options, share):
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([p], lr=0.1, **options)
    p.grad = G.clone()
    optimizer.step()
    found = EffectiveTime(optimizer).groups[0].share
    assert math.isnan(found) if share is None else found == pytest.approx(share)


def test_what_is_recorded_goes_on():
    def make(ps):
        return torch.optim.SGD(ps, momentum=0.9)

    _, _, whole, optimizer = _follow(make)
    resumed = EffectiveTime(optimizer)
    resumed.restore(whole.record())
    for time in (whole, resumed):
        time.advance(time.read())
    assert resumed.record() == whole.record()


class _Own(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class _Renamed(torch.optim.AdamW):
    pass


class _Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("cls", [_Own, torch.optim.NAdam, torch.optim.Rprop, torch.optim.LBFGS])
def test_an_unknown_optimiser_names_itself_and_the_remedy(cls):
    optimizer = cls([torch.nn.Parameter(START.clone())], lr=0.1)
    with pytest.raises(ValueError, match=rf"{cls.__name__} is not known.*Pass tau="):
        EffectiveTime(optimizer)


def test_a_subclass_that_keeps_its_step_is_known():
    optimizer = _Renamed([torch.nn.Parameter(START.clone())])
    assert EffectiveTime(optimizer).tau == 0.0
    assert unwrap_optimizer(_Wrapper(optimizer)) is optimizer


@pytest.mark.parametrize("given", [0.5, lambda optimizer: optimizer.param_groups[0]["lr"] * 5])
def test_tau_of_an_unknown_optimiser_is_given(given):
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.NAdam([p], lr=0.1)
    time = EffectiveTime(optimizer, given)
    for _ in range(4):
        time.advance(time.read())
    assert time.tau == pytest.approx(2.0)


@pytest.mark.parametrize(("given", "error"), [(-1.0, ValueError), ("lr", TypeError)])
def test_a_tau_that_is_no_increment_is_refused(given, error):
    optimizer = torch.optim.SGD([torch.nn.Parameter(START.clone())])
    with pytest.raises(error, match="tau"):
        EffectiveTime(optimizer, given)


class _Fails(torch.nn.Module):
    """A parameter whose gradient is G, or infinite where the input says so."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(START.clone())

    def forward(self, overflow):
        return (self.p * G).sum() * (math.inf if overflow else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_with_scaling_accumulation_and_clipping(tmp_path, fused):
    model, rate, most = _Fails(), 0.01, 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=fused)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    used = []
    with TrainingRecorder(model, optimizer, tmp_path, states=[10]) as recorder:
        for step in range(16):
            for micro in range(4):
                scaler.scale(model(overflow=step in (3, 5, 6) and micro == 2) / 4).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
            used.append(optimizer.param_groups[0]["lr"])
            scaler.step(optimizer)
            scaler.update()
            warm_up.step()
            optimizer.zero_grad()
    taken = [lr for step, lr in enumerate(used) if step not in (3, 5, 6)]
    assert recorder.tau == pytest.approx(sum(taken), rel=EXACT)
    clipped = G * (most / (G.norm() + 1e-6))  # as torch has it
    moved = -recorder.tau * clipped / (clipped.abs() + 1e-8)
    torch.testing.assert_close(model.p.detach() - START, moved, rtol=EXACT, atol=EXACT)
    run = TrainingRun(tmp_path, model)
    assert run.history["step"].tolist() == list(range(1, 14))
    assert run.states["step"].tolist() == [0, 10]
    assert run.history["lr"].tolist() == taken
