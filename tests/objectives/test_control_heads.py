"""Heads of policies and critics: each learns from its own group alone, the pooled one from all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from objectives.conformance import SPEC, STATISTICS, random_batch, seeded
from steelyard.data.grouped import GroupedTransitions
from steelyard.errors import ConfigError, DataError
from steelyard.objectives.control_heads import ControlHeads, ControlHeadsConfig
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

GROUPS = torch.tensor([0, 1, 1, 0, 2, 2, 2, 2])
BATCH = GroupedTransitions(**random_batch(8).tensors(), groups=GROUPS)
CONFIG = ControlHeadsConfig(hidden=(8, 8), discount=0.9, expectile=0.7)
NAMES = ("actor", "value", "critic")


def learner(seed: int = 0, **changes) -> ControlHeads:
    return ControlHeads(SPEC, dataclasses.replace(CONFIG, **changes), STATISTICS, 3, seeded(seed))


def rows(batch: GroupedTransitions, chosen) -> GroupedTransitions:
    return GroupedTransitions(**{name: column[chosen] for name, column in batch.tensors().items()})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_learns_from_its_own_group_and_the_pooled_one_from_all(kind):
    made = learner(heads=kind)
    for name in NAMES:
        head = getattr(made, name).head
        for group in range(3):
            batch = made.prepare(rows(BATCH, group == GROUPS))
            made.zero_grad()
            made.loss(name)(batch, seeded())[0].backward()
            for parameter in head.parameters():
                touched = parameter.grad.flatten(1).abs().sum(1) > 0
                assert not touched[[k for k in (1, 2, 3) if k != group + 1]].any()
                assert touched[0]
            assert any((p.grad[group + 1] != 0).any() for p in head.parameters())


def test_losses_by_hand():
    made = learner()
    ready = made.prepare(BATCH)
    own = GROUPS + 1

    def mean_of_members(errors):  # [8, 4]
        parts = [errors[:, 0].mean()] + [errors[own == k, k].mean() for k in (1, 2, 3)]
        return torch.stack(parts).mean()

    with torch.no_grad():
        errors = (made.actor(ready.observations) - ready.actions[:, None]).square().sum(-1)
        torch.testing.assert_close(made.loss_actor(ready, seeded())[0], mean_of_members(errors))
        # STATISTICS has mean return 1.5: units of returns, and 0.1 of it a step
        u = (ready.returns_to_go[:, None] - made.member_v(BATCH.observations)) / 1.5
        expected = mean_of_members(torch.where(u < 0, 0.3, 0.7) * u.square())
        torch.testing.assert_close(made.loss_value(ready, seeded())[0], expected)
        v, after = made.member_v(BATCH.observations), made.member_v(BATCH.next_observations)
        q = made.member_q(BATCH.observations, ready.actions[:, None])[:, 0]
        error = BATCH.rewards[:, None] + 0.9 * BATCH.masks[:, None] * after - q
        expected = mean_of_members((error / 0.15).square())
        torch.testing.assert_close(made.loss_critic(ready, seeded())[0], expected, rtol=1e-4, atol=1e-5)
        assert v.shape == q.shape == (8, 4)


def test_a_group_that_is_absent_costs_nothing_and_says_nothing():
    made = learner()
    loss, metrics = made.loss_actor(made.prepare(rows(BATCH, GROUPS == 1)), seeded())
    assert torch.isfinite(loss)
    assert torch.isfinite(metrics["loss/actor_pooled"])


def test_updates_repeat_and_weights_are_saved_whole():
    def trained(seed: int) -> ControlHeads:
        made = learner(seed)
        optimizers = Optimizers(made, OptimConfig())
        for step in range(3):
            update(made, optimizers, BATCH, 0, step)
        return made

    first, second = trained(0), trained(0)
    other = learner(5)
    assert not torch.equal(first.member_actions(BATCH.observations), other.member_actions(BATCH.observations))
    other.load_state_dict(first.state_dict())
    for made in (second, other):
        assert torch.equal(first.member_actions(BATCH.observations), made.member_actions(BATCH.observations))
        assert torch.equal(first.member_v(BATCH.observations), made.member_v(BATCH.observations))


def test_members_have_their_own_answers():
    """Group k does a = its own constant: its head learns it, the pooled head learns the mean."""
    constants = torch.tensor([[-0.8], [0.0], [0.8]])
    low, high = torch.tensor(SPEC.actions.low), torch.tensor(SPEC.actions.high)
    generator, made = seeded(1), learner(learning_rate=3e-2, critics=False)
    optimizers = Optimizers(made, OptimConfig())
    for step in range(120):
        whole = random_batch(30, seed=step)
        groups = torch.arange(3).repeat(10)
        actions = low + (high - low) * (constants[groups] + 1) / 2
        columns = whole.tensors() | {"actions": actions.expand(-1, 2)}
        update(made, optimizers, GroupedTransitions(**columns, groups=groups), 0, step)
    states = torch.randn(50, 3, generator=generator) * 2
    found = made.member_actions(states).mean((0, 2))
    np.testing.assert_allclose(found.numpy(), [0, -0.8, 0, 0.8], atol=0.1)
    assert list(made.groups) == ["actor"]
    acted = made.policy().act(states, generator, "mean")
    assert ((acted >= low) & (acted <= high)).all()


def test_mistakes_are_sentences():
    with pytest.raises(DataError, match="group of every transition"):
        learner().prepare(random_batch(4))
    with pytest.raises(ConfigError, match="expectile"):
        ControlHeadsConfig(expectile=1.5)
    with pytest.raises(ConfigError, match="hidden"):
        ControlHeadsConfig(hidden=(8, 0))
