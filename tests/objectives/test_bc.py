"""Behaviour cloning: conformance, likelihoods worked out by hand, and a task that it must learn."""

import dataclasses
import math

import pytest
import torch

from steelyard.objectives.bc import BCConfig

from .conformance import (
    BATCH,
    CHECKS,
    NETWORK,
    POINT_NETWORK,
    builder,
    check_determinism,
    check_learns,
    check_name,
    check_page,
    check_resume,
    hand_batch,
    hand_learner,
    seeded,
    set_actor,
)

CONFIGS = {
    "tanh_gaussian": BCConfig(network=NETWORK),
    "gaussian": BCConfig(network=NETWORK, likelihood="gaussian", weight_decay=0.1),
    "mse": BCConfig(network=NETWORK, likelihood="mse"),
    "raw_observations": BCConfig(network=dataclasses.replace(NETWORK, normalizes_observations=False)),
}


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name, check):
    check(builder(CONFIGS[name]), BATCH)


@pytest.mark.parametrize("check", [check_determinism, check_resume], ids=check_name)
def test_dropout_is_a_function_of_seed_and_step(check):
    check(builder(BCConfig(network=dataclasses.replace(NETWORK, actor_dropout=0.5))), BATCH)


LOG_2PI = math.log(2 * math.pi)
# rows: s = 1 and s = -1; data actions 0.5 and 0
ROWS = hand_batch([1.0, -1.0], [0.5, 0.0])


def test_tanh_gaussian_by_hand():
    learner = hand_learner(BCConfig())
    set_actor(learner.nets.actor, slope=0.0, offset=0.0, log_std=0.0)  # u ~ N(0, 1), a = tanh(u)
    loss, _ = learner.loss_actor(ROWS, seeded())
    # row 0: u = atanh 0.5 = ln(3)/2 = 0.549306; log N(u) = -u^2/2 - ln(2 pi)/2; minus log(1 - 0.25)
    # row 1: u = 0: log N(0), no stretch
    u = math.log(3) / 2
    row0 = -(u**2) / 2 - LOG_2PI / 2 - math.log(0.75)
    row1 = -LOG_2PI / 2
    assert row0 == pytest.approx(-0.782126, abs=1e-6)
    assert row1 == pytest.approx(-0.918939, abs=1e-6)
    torch.testing.assert_close(loss, torch.tensor(-(row0 + row1) / 2))


def test_gaussian_by_hand():
    learner = hand_learner(BCConfig(likelihood="gaussian"))
    set_actor(learner.nets.actor, slope=math.log(3) / 2, offset=0.0, log_std=math.log(0.5))
    loss, _ = learner.loss_actor(ROWS, seeded())
    # means tanh(+-ln(3)/2) = +-0.5, std 0.5: z = 0 and z = (0 + 0.5) / 0.5 = 1
    # -log p = z^2/2 + log 0.5 + ln(2 pi)/2: mean of z^2/2 is 0.25
    torch.testing.assert_close(loss, torch.tensor(0.25 - math.log(2) + LOG_2PI / 2))


def test_squared_error_by_hand():
    learner = hand_learner(BCConfig(likelihood="mse"))
    set_actor(learner.nets.actor, slope=math.log(3) / 2, offset=0.0, log_std=0.0)
    loss, _ = learner.loss_actor(ROWS, seeded())
    # modes 0.5 and -0.5 against 0.5 and 0: (0 + 0.25) / 2
    torch.testing.assert_close(loss, torch.tensor(0.125))


def test_squared_error_sums_over_action_dimensions():
    learner = builder(BCConfig(network=NETWORK, likelihood="mse"))(0)
    with torch.no_grad():
        for p in learner.nets.actor.net.parameters():
            p.zero_()
    ready = dataclasses.replace(learner.prepare(BATCH), actions=torch.full_like(BATCH.actions, 0.5))
    torch.testing.assert_close(learner.loss_actor(ready, seeded())[0], torch.tensor(2 * 0.25))


@pytest.mark.parametrize("likelihood", ["tanh_gaussian", "gaussian", "mse"])
def test_actions_on_the_border_are_finite(likelihood):
    learner = hand_learner(BCConfig(likelihood=likelihood))
    raw = hand_batch([0.0, 0.0, 0.0], [1.0, -1.0, 0.0])
    loss, _ = learner.loss_actor(learner.prepare(raw), seeded())
    gradients = torch.autograd.grad(loss, learner.groups["actor"].parameters)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("likelihood", ["tanh_gaussian", "gaussian", "mse"])
def test_learns(likelihood):
    check_learns(BCConfig(network=POINT_NETWORK, learning_rate=3e-3, likelihood=likelihood), expert=True)


def test_the_example_of_the_page_runs():
    check_page("bc")
