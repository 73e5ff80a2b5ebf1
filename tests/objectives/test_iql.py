"""Implicit Q-learning: conformance, its three losses by hand, the limit of expectile 0.5, and learning."""

import dataclasses
import math

import pytest
import torch

from steelyard.objectives.iql import MAX_WEIGHT, IQLConfig

from .conformance import (
    BATCH,
    CHECKS,
    NETWORK,
    POINT_DISCOUNT,
    POINT_NETWORK,
    STATISTICS,
    builder,
    check_learns,
    check_name,
    check_page,
    hand_batch,
    hand_learner,
    seeded,
    set_actor,
    set_critic,
)

CONFIGS = {
    "plain": IQLConfig(network=NETWORK),
    "bounded": IQLConfig(network=NETWORK, target_bounds=(-0.5, 0.5), expectile=0.9, inverse_temperature=10.0),
    "layer_norm": IQLConfig(network=dataclasses.replace(NETWORK, critic_layer_norm=True, num_critics=3)),
}


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name, check):
    check(builder(CONFIGS[name]), BATCH)


@pytest.fixture
def learner():
    """V(s) = s; targets Qbar_0 = s + a + 1 and Qbar_1 = 2 s + 3; critics Q_0 = s + 2 a, Q_1 = s - a."""
    made = hand_learner(IQLConfig(discount=0.9, expectile=0.7, inverse_temperature=2.0))
    set_critic(made.nets.critic, (1, 2, 0), (1, -1, 0))
    set_critic(made.nets.target_critic, (1, 1, 1), (2, 0, 3))
    with torch.no_grad():
        layer = made.value.net.layers[-1]
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    set_actor(made.nets.actor, slope=math.log(3) / 2, offset=0.0, log_std=0.0)
    return made


# row 0: s 1, a 0.5; row 1: s -1, a -0.5, terminated
ROWS = hand_batch([1.0, -1.0], [0.5, -0.5], rewards=[0.25, -1.0], next_observations=[2.0, 5.0], masks=[1.0, 0.0])
# min over targets: row 0: min(2.5, 5) = 2.5; row 1: min(-0.5, 1) = -0.5.  advantages: 2.5 - 1 = 1.5, -0.5 + 1 = 0.5


def test_value_loss_by_hand(learner):
    loss, _ = learner.loss_value(ROWS, seeded())
    torch.testing.assert_close(loss, torch.tensor(0.7 * (1.5**2 + 0.5**2) / 2))  # both u > 0
    with torch.no_grad():
        learner.value.net.layers[-1].bias.fill_(1.0)  # V = s + 1: u = 0.5 and -0.5
    loss, _ = learner.loss_value(ROWS, seeded())
    torch.testing.assert_close(loss, torch.tensor((0.7 * 0.25 + 0.3 * 0.25) / 2))


def test_critic_loss_by_hand(learner):
    loss, metrics = learner.loss_critic(ROWS, seeded())
    # y: 0.25 + 0.9 * V(2) = 2.05; terminated: -1
    torch.testing.assert_close(metrics["critic/target"], torch.tensor([2.05, -1.0]))
    # Q_0: 2 and -2: (0.05^2 + 1^2) / 2 = 0.50125; Q_1: 0.5 and -0.5: (1.55^2 + 0.5^2) / 2 = 1.32625
    torch.testing.assert_close(loss, torch.tensor(0.50125 + 1.32625))


def test_actor_loss_by_hand(learner):
    loss, metrics = learner.loss_actor(ROWS, seeded())
    # weights exp(2 * 1.5) and exp(2 * 0.5); means tanh(+-ln(3)/2) = +-0.5 equal the data's actions: log p = -ln(2 pi)/2
    torch.testing.assert_close(metrics["actor/weight"], torch.tensor([math.exp(3), math.exp(1)]))
    torch.testing.assert_close(loss, torch.tensor((math.exp(3) + math.exp(1)) / 2 * math.log(2 * math.pi) / 2))


def test_weights_are_clipped(learner):
    with torch.no_grad():
        learner.value.net.layers[-1].bias.fill_(-5.0)  # advantages 6.5 and 5.5: exp(13) and exp(11)
    loss, metrics = learner.loss_actor(ROWS, seeded())
    assert metrics["actor/weight"].tolist() == [MAX_WEIGHT, MAX_WEIGHT] == [100.0, 100.0]
    assert torch.isfinite(loss)


def test_targets_are_clipped():
    learner = builder(CONFIGS["bounded"])(0)
    batch = dataclasses.replace(BATCH, rewards=torch.linspace(-5, 5, len(BATCH)))
    _, metrics = learner.loss_critic(learner.prepare(batch), seeded())
    assert metrics["critic/target"].min() == -0.5
    assert metrics["critic/target"].max() == 0.5


def test_expectile_one_half_is_half_the_mean_regression(learner):
    half = hand_learner(IQLConfig(expectile=0.5))
    half.load_state_dict(learner.state_dict())
    loss, _ = half.loss_value(ROWS, seeded())
    torch.testing.assert_close(loss, torch.tensor((1.5**2 + 0.5**2) / 2 / 2))


def test_order_is_value_actor_critic(learner):
    """Q regresses on the new V: the value phase comes first, as in the authors' code."""
    assert [phase.groups for phase in learner.plan] == [("value",), ("actor",), ("critic",)]


def test_initial_value_can_be_the_mean_return():
    learner = builder(IQLConfig(network=dataclasses.replace(NETWORK, critic_init="mean_return")))(0)
    with torch.no_grad():
        for output in (learner.nets.critic.output, learner.nets.target_critic.output, learner.value.net.layers[-1]):
            torch.testing.assert_close(output.bias, torch.full_like(output.bias, STATISTICS.mean_return))


def test_learns():
    config = IQLConfig(
        network=POINT_NETWORK,
        learning_rate=3e-3,
        discount=POINT_DISCOUNT,
        target_update_rate=0.05,
        inverse_temperature=10.0,
    )
    check_learns(config)


def test_the_example_of_the_page_runs():
    check_page("iql")
