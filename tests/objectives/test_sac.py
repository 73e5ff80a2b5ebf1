"""Soft actor-critic: conformance (also as RLPD), target, actor and temperature losses by hand, and learning."""

import dataclasses
import math

import pytest
import torch

from steelyard.objectives.sac import SACConfig

from .conformance import (
    BATCH,
    CHECKS,
    NETWORK,
    POINT_DISCOUNT,
    POINT_NETWORK,
    builder,
    check_learns,
    check_name,
    check_page,
    differing,
    given_noise,
    hand_batch,
    hand_learner,
    optimizers_of,
    seeded,
    set_actor,
    set_critic,
    snapshot,
    train,
)

RLPD = SACConfig(
    network=dataclasses.replace(NETWORK, num_critics=5, num_min_critics=2, critic_layer_norm=True),
    actor_reduction="mean",
    backup_entropy=False,
    target_entropy=-1.0,
)
CONFIGS = {
    "plain": SACConfig(network=NETWORK),
    "bounded": SACConfig(network=NETWORK, target_bounds=(-0.5, 0.5), initial_temperature=0.1),
    "rlpd": RLPD,
}


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name, check):
    check(builder(CONFIGS[name]), BATCH)


# noise of the two rows: u = 0 + 1 * noise, so a = tanh(ln(3)/2) = 0.5 and a = 0
NOISE = [math.log(3) / 2, 0.0]
# log pi = log N(u) - log(1 - a^2): -0.549306^2/2 - 0.918939 + 0.287682 = -0.782126, and -0.918939
LOG_PROBS = torch.tensor([-0.782126, -0.918939])


def learner_with(**settings: object):
    """pi(.|s) = tanh N(0, 1); Qbar_0 = s + a, Qbar_1 = 2 s - 2 a; Q_0 = 2 s + a, Q_1 = 2 a + 1.5; alpha = 0.5."""
    made = hand_learner(SACConfig(discount=0.9, initial_temperature=0.5, **settings))
    set_actor(made.nets.actor, slope=0.0, offset=0.0, log_std=0.0)
    set_critic(made.nets.target_critic, (1, 1, 0), (2, -2, 0))
    set_critic(made.nets.critic, (2, 1, 0), (0, 2, 1.5))
    return made


# row 0: s 1, a 0.5, s' 1; row 1: s 0, a -0.5, s' 2
ROWS = hand_batch([1.0, 0.0], [0.5, -0.5], rewards=[1.0, -1.0], next_observations=[1.0, 2.0])
ENDS = dataclasses.replace(ROWS, masks=torch.tensor([1.0, 0.0]))
# next values: row 0: min(1 + 0.5, 2 - 1) = 1; row 1: min(2, 4) = 2


@pytest.mark.parametrize(
    ("batch", "backup_entropy", "target"),
    [
        (ROWS, False, [1 + 0.9 * 1, -1 + 0.9 * 2]),
        (ENDS, False, [1 + 0.9 * 1, -1.0]),
        # minus alpha log pi: 1 + 0.5 * 0.782126 = 1.391063; 2 + 0.5 * 0.918939 = 2.4594695
        (ROWS, True, [1 + 0.9 * 1.391063, -1 + 0.9 * 2.4594695]),
        (ENDS, True, [1 + 0.9 * 1.391063, -1.0]),
    ],
)
def test_target_by_hand(batch, backup_entropy, target):
    learner = learner_with(backup_entropy=backup_entropy)
    with given_noise(NOISE):
        _, metrics = learner.loss_critic(batch, seeded())
    torch.testing.assert_close(metrics["critic/target"], torch.tensor(target))


def test_critic_loss_by_hand():
    learner = learner_with(backup_entropy=False)
    with given_noise(NOISE):
        loss, _ = learner.loss_critic(ROWS, seeded())
    # y = 1.9, 0.8. Q_0 = 2.5, -0.5: (0.6^2 + 1.3^2)/2 = 1.025; Q_1 = 2.5, 0.5: (0.6^2 + 0.3^2)/2 = 0.225
    torch.testing.assert_close(loss, torch.tensor(1.025 + 0.225))


@pytest.mark.parametrize(("reduction", "q"), [("min", [2.5, 0.0]), ("mean", [2.5, 0.75])])
def test_actor_and_temperature_loss_by_hand(reduction, q):
    learner = learner_with(actor_reduction=reduction)
    with given_noise(NOISE):
        loss, metrics = learner.loss_actor(ROWS, seeded())
    # Q at the sampled actions: row 0 (a 0.5): 2.5 and 2.5; row 1 (a 0): 0 and 1.5
    actor = (0.5 * LOG_PROBS - torch.tensor(q)).mean()
    torch.testing.assert_close(metrics["loss/actor"], actor)
    # L_alpha = -log alpha * mean(log pi + Hbar), Hbar = -A = -1: log 0.5 = -0.693147, mean = -1.8505325
    temperature = 0.693147 * -1.8505325
    torch.testing.assert_close(loss, actor + temperature)
    # entropy 0.85 lies above the target -1: log alpha must fall, so its gradient is positive
    (slope,) = torch.autograd.grad(loss, learner.temperature.log_value)
    torch.testing.assert_close(slope, torch.tensor(1.8505325))


def test_actor_gradient_by_hand():
    """d/d(mean) of alpha log pi - Q at u: alpha 2 tanh(u) - dQ/da (1 - a^2); min picks Q_0 in row 1."""
    learner = learner_with()
    rows = hand_batch([0.0, 0.0], [0.0, 0.0])
    with given_noise(NOISE):
        loss, _ = learner.loss_actor(rows, seeded())
    bias = learner.nets.actor.net.layers[-1].bias
    (slope,) = torch.autograd.grad(loss, bias)
    # s = 0: Q_0 = a < Q_1 = 2 a + 1.5 in both rows. Row 0: 0.5 * 2 * 0.5 - 0.75 = -0.25; row 1: 0 - 1 = -1
    torch.testing.assert_close(slope[0], torch.tensor(-1.25 / 2))


def test_target_bounds():
    learner = builder(CONFIGS["bounded"])(0)
    batch = dataclasses.replace(BATCH, rewards=torch.linspace(-5, 5, len(BATCH)))
    _, metrics = learner.loss_critic(learner.prepare(batch), seeded())
    assert (metrics["critic/target"].min(), metrics["critic/target"].max()) == (-0.5, 0.5)


def test_subset_of_all_critics_is_all_of_them():
    """REDQ's random subset with count None, or with all members, is the plain minimum."""
    full = dataclasses.replace(NETWORK, num_critics=3)
    found = []
    for count in (None, 3):
        learner = builder(SACConfig(network=dataclasses.replace(full, num_min_critics=count)))(0)
        found.append(learner.loss_critic(learner.prepare(BATCH), seeded(1))[0])
    assert torch.equal(*found)
    fewer = builder(SACConfig(network=dataclasses.replace(full, num_min_critics=1)))(0)
    with torch.no_grad():
        for p in fewer.nets.target_critic.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(1)))
    results = {float(fewer.loss_critic(fewer.prepare(BATCH), seeded(s))[0].detach()) for s in range(5)}
    assert len(results) > 1


def test_actor_every_delays_actor_and_temperature():
    learner = builder(SACConfig(network=NETWORK, actor_every=3))(0)
    optimizers = optimizers_of(learner)
    moved = []
    for step in range(6):
        before = snapshot(learner)
        train(learner, optimizers, BATCH, step, step + 1)
        changed = differing(before, snapshot(learner))
        assert any(name.startswith("nets.critic.") for name in changed)
        moved.append(any(name.startswith("nets.actor.") for name in changed))
        assert ("temperature.log_value" in changed) == moved[-1]
    assert moved == [False, False, True, False, False, True]


def test_default_target_entropy_is_minus_the_action_size():
    assert builder(SACConfig(network=NETWORK))(0).target_entropy == -2.0
    assert builder(RLPD)(0).target_entropy == -1.0


def test_learns():
    """From recorded random actions, which cover the whole box: there is nothing to be pessimistic about."""
    config = SACConfig(
        network=POINT_NETWORK,
        discount=POINT_DISCOUNT,
        target_update_rate=0.05,
        actor_lr=3e-3,
        critic_lr=3e-3,
        initial_temperature=0.05,
    )
    check_learns(config)


def test_the_example_of_the_page_runs():
    check_page("sac")
