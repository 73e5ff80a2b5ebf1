"""Cal-QL: conformance, its limits, and above all the online phase: real returns, and a bound that stays on."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import Episode
from steelyard.data.replay import ReplayBuffer
from steelyard.data.returns import RewardConfig
from steelyard.data.sampler import uniform_indices
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store
from steelyard.objectives.base import Learner
from steelyard.objectives.cal_ql import CalQLConfig
from steelyard.objectives.cql import ActionSamples, CQLConfig

from .conformance import (
    BATCH,
    CHECKS,
    HAND_SPEC,
    NETWORK,
    POINT_DISCOUNT,
    POINT_NETWORK,
    builder,
    check_learns,
    check_name,
    check_page,
    differing,
    hand_learner,
    optimizers_of,
    seeded,
    set_critic,
    snapshot,
    train,
)

PLAIN = CalQLConfig(network=NETWORK, num_samples=3)
LEARNED = dataclasses.replace(PLAIN, lower_bound="learned")
CONFIGS = {
    "returns": PLAIN,
    "learned": LEARNED,
    "returns_lagrange": dataclasses.replace(PLAIN, mode="lagrange_a", max_target_backup=True, bound_random=True),
    "learned_lagrange": dataclasses.replace(LEARNED, mode="lagrange_c", shares_samples=False),
}


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name, check):
    check(builder(CONFIGS[name]), BATCH)


def with_returns(batch: TransitionBatch, value: float) -> TransitionBatch:
    return dataclasses.replace(batch, returns_to_go=torch.full_like(batch.returns_to_go, value))


@pytest.mark.parametrize("settings", [{}, {"mode": "lagrange_a"}, {"importance_sampling": False}], ids=str)
def test_returns_of_minus_infinity_are_cql_bit_for_bit(settings):
    results = []
    batch = with_returns(BATCH, -math.inf)
    for config in (CalQLConfig, CQLConfig):
        learner = builder(config(network=NETWORK, num_samples=3, **settings))(0)
        metrics = train(learner, optimizers_of(learner), batch, 0, 3)
        results.append((snapshot(learner), metrics))
    (cal_ql, cal_ql_metrics), (cql, cql_metrics) = results
    assert not differing(cal_ql, cql)
    for a, b in zip(cal_ql_metrics, cql_metrics, strict=True):
        assert a.pop("critic/bound_rate").sum() == 0
        assert not differing(a, b)


def gap_gradients(learner: Learner, batch: TransitionBatch, samples: ActionSamples) -> dict[str, Tensor]:
    """Return the gradient of the gap to the actions of each group: nonzero where a sampled Q is pushed down."""
    parts = {name: getattr(samples, name).clone().requires_grad_() for name in ("random", "current", "next")}
    _, gap, _ = learner.critic_terms(batch, dataclasses.replace(samples, **parts), seeded())
    return dict(zip(parts, torch.autograd.grad(gap.sum(), list(parts.values())), strict=True))


def test_the_bound_masks_the_push_down_of_policy_actions():
    learner = builder(PLAIN)(0)
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded())
    low = gap_gradients(learner, with_returns(batch, -1e3), samples)
    assert all(g.abs().sum() > 0 for g in low.values())
    # finite and far above Q, yet small enough that the random actions keep a weight that float32 can hold
    high = gap_gradients(learner, with_returns(batch, 60.0), samples)
    assert high["random"].abs().sum() > 0
    assert not high["current"].any()
    assert not high["next"].any()


def test_the_bound_is_that_of_the_state_for_both_groups():
    """A row with a high return masks its own samples, those drawn at its next state too, and no others."""
    learner = builder(PLAIN)(0)
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded())
    returns = torch.full((len(batch),), -1e3)
    returns[2] = 50.0
    gradients = gap_gradients(learner, dataclasses.replace(batch, returns_to_go=returns), samples)
    for group in ("current", "next"):
        masked = gradients[group].abs().sum((1, 2)) == 0
        assert masked.tolist() == [row == 2 for row in range(len(batch))]


def test_bound_random_masks_everything():
    learner = builder(dataclasses.replace(PLAIN, bound_random=True))(0)
    batch = with_returns(learner.prepare(BATCH), 60.0)
    gradients = gap_gradients(learner, batch, learner.sample_actions(batch, seeded()))
    assert not any(g.any() for g in gradients.values())


def test_target_and_td_loss_do_not_know_the_bound():
    learner = builder(PLAIN)(0)
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded())
    low, high = (learner.critic_terms(with_returns(batch, g), samples, seeded()) for g in (-1e3, 1e3))
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[2]["critic/target"], high[2]["critic/target"])
    assert low[2]["critic/bound_rate"].mean() == 0
    assert high[2]["critic/bound_rate"].mean() == 1


def test_learned_reference_regresses_on_returns():
    learner = builder(dataclasses.replace(LEARNED, critic_lr=1e-2))(0)
    optimizers = optimizers_of(learner)
    batch = dataclasses.replace(BATCH, returns_to_go=torch.where(BATCH.observations[:, 0] > 0, 2.0, -1.0))
    for _ in range(100):
        train(learner, optimizers, batch, 0, 1)
    ready = learner.prepare(batch)
    reference = learner.reference_values(ready)
    assert not reference.requires_grad
    assert ((reference - batch.returns_to_go).square().mean() < 0.1).all()
    fresh, _ = learner.loss_reference(ready, seeded())
    torch.testing.assert_close(fresh, (learner.reference(ready.observations) - batch.returns_to_go).square().mean())


def test_learned_reference_is_the_bound():
    learner = builder(LEARNED)(0)
    batch = with_returns(learner.prepare(BATCH), 1e3)  # the batch's own returns must not count
    for value, rate in ((-1e3, 0.0), (1e3, 1.0)):
        with torch.no_grad():
            learner.reference.net.layers[-1].bias.fill_(value)
        _, _, metrics = learner.critic_terms(batch, learner.sample_actions(batch, seeded()), seeded())
        assert metrics["critic/bound_rate"].mean() == rate


# --- the online phase --------------------------------------------------------------------------------------------

# scaled by 2, minus 1: 1, -1, 5. With discount 0.5: G_2 = 5, G_1 = -1 + 2.5 = 1.5, G_0 = 1 + 0.75 = 1.75
REWARDS = RewardConfig(scale=2.0, bias=-1.0)
RAW = np.array([1.0, 0.0, 3.0])
RETURNS = [1.75, 1.5, 5.0]
OBSERVATIONS = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
ACTIONS = np.array([[0.5], [-0.5], [0.0]], np.float32)


def online_batch(terminated: bool = True) -> TransitionBatch:
    buffer = ReplayBuffer(10, 1, 1, REWARDS, discount=0.5)
    buffer.add_trajectory(OBSERVATIONS, ACTIONS, RAW, terminated)
    return buffer.gather(np.arange(3))


def offline_batch() -> TransitionBatch:
    episode = Episode(OBSERVATIONS, ACTIONS, RAW, terminated=True, truncated=False)
    return OfflineSource(Store.from_episodes([episode], spec=HAND_SPEC), REWARDS, 0.5, 3, 0).gather(np.arange(3))


def hand_samples() -> ActionSamples:
    """One action of each group and row, each with density 1/2: every entry is exp(Q) / (1/2)."""
    zero, half = torch.zeros(3, 1, 1), torch.full((3, 1), -math.log(2))
    return ActionSamples(zero, zero, half, zero, half)


def flat_learner(**settings: object) -> Learner:
    """Q = 1.6 everywhere, between the returns of the trajectory."""
    learner = hand_learner(CalQLConfig(discount=0.5, num_samples=1, cql_weight=1.0, **settings), num_critics=1)
    set_critic(learner.nets.critic, (0, 0, 1.6))
    set_critic(learner.nets.target_critic, (0, 0, 2.0))
    return learner


def test_a_finished_trajectory_carries_its_returns_to_go():
    batch = online_batch()
    assert batch.returns_to_go.tolist() == RETURNS
    assert batch.rewards.tolist() == [1.0, -1.0, 5.0]
    assert batch.masks.tolist() == [1.0, 1.0, 0.0]
    assert batch.is_offline.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(batch.next_observations, torch.from_numpy(OBSERVATIONS[1:]))
    cut = online_batch(terminated=False)
    assert cut.masks.tolist() == [1.0, 1.0, 1.0], "a time limit is no termination"
    assert cut.returns_to_go.tolist() == RETURNS


def test_online_loss_by_hand():
    """Calibration stays on for online data, with the return each step really had."""
    batch = online_batch()
    td, gap, metrics = flat_learner().critic_terms(batch, hand_samples(), seeded())
    # entries 2 exp(Q): random 1.6; the policy's two max(1.6, G) = 1.75, 1.6, 5; minus Q of the data, 1.6
    gaps = [math.log(2 * math.exp(1.6) + 4 * math.exp(max(1.6, g))) - 1.6 for g in RETURNS]
    torch.testing.assert_close(gap, torch.tensor([sum(gaps) / 3]))
    # two of three returns lie above 1.6
    torch.testing.assert_close(metrics["critic/bound_rate"].mean(), torch.tensor(2 / 3))
    # y = r + 0.5 * 2, terminated 5: 2, 0, 5
    torch.testing.assert_close(td, torch.tensor([(0.4**2 + 1.6**2 + 3.4**2) / 3]))


def test_online_data_are_treated_exactly_as_offline_data():
    online, offline = online_batch(), offline_batch()
    assert offline.is_offline.tolist() == [1.0, 1.0, 1.0]
    assert not differing(
        {k: v for k, v in online.tensors().items() if k != "is_offline"},
        {k: v for k, v in offline.tensors().items() if k != "is_offline"},
    )
    learner = flat_learner()
    for a, b in zip(
        learner.critic_terms(online, hand_samples(), seeded())[:2],
        learner.critic_terms(offline, hand_samples(), seeded())[:2],
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shortcut", ["zero_returns", "bound_off"])
def test_the_widespread_shortcuts_would_be_noticed(shortcut):
    """Return 0 for online steps, or plain CQL online, give other numbers than the ones asserted above."""
    batch = online_batch()
    shortcuts = {"zero_returns": with_returns(batch, 0.0), "bound_off": with_returns(batch, -math.inf)}
    _, gap, metrics = flat_learner().critic_terms(shortcuts[shortcut], hand_samples(), seeded())
    torch.testing.assert_close(gap, torch.tensor([math.log(6)]))  # no calibration at all: log(3N) + A log 2
    assert metrics["critic/bound_rate"].sum() == 0
    assert flat_learner().critic_terms(batch, hand_samples(), seeded())[1] > gap + 1


def test_full_updates_on_online_data_use_the_bound():
    """Through `prepare` and the whole critic loss, not only through the seam above."""
    learner = flat_learner()
    rates = []
    for batch in (online_batch(), offline_batch()):
        _, metrics = learner.loss_critic(learner.prepare(batch), seeded())
        rates.append(float(metrics["critic/bound_rate"].mean()))
    assert rates == [pytest.approx(2 / 3)] * 2


def test_failures_online_are_worth_never_reaching_the_goal():
    config = RewardConfig(scale=10.0, bias=-5.0, horizon="sparse")
    buffer = ReplayBuffer(10, 1, 1, config, discount=0.99)
    buffer.add_trajectory(OBSERVATIONS, ACTIONS, np.zeros(3), terminated=False)
    np.testing.assert_allclose(buffer.gather(np.arange(3)).returns_to_go, -500.0, rtol=1e-6)


# --- the ring ----------------------------------------------------------------------------------------------------


def fill(buffer: ReplayBuffer, lengths: list[int]) -> None:
    """Add trajectories in which step number n (counted over all) has observation n, action -n and raw reward n."""
    number = buffer.total
    for length in lengths:
        steps = np.arange(number, number + length)
        observations = np.arange(number, number + length + 1, dtype=np.float32)[:, None]
        buffer.add_trajectory(observations, -steps[:, None].astype(np.float32), steps.astype(float), terminated=False)
        number += length


@pytest.mark.parametrize("lengths", [[3], [3, 2], [3, 3], [4, 4, 4], [5], [6], [12], [2, 12, 1], [1] * 13], ids=str)
def test_the_ring_holds_the_newest_steps_in_all_its_slots(lengths):
    capacity = 5
    buffer = ReplayBuffer(capacity, 1, 1, RewardConfig(), discount=0.5)
    fill(buffer, lengths)
    total = sum(lengths)
    assert buffer.total == total
    assert len(buffer) == min(total, capacity)
    batch = buffer.gather(np.arange(len(buffer)))
    newest = list(range(max(0, total - capacity), total))
    assert sorted(batch.observations[:, 0].tolist()) == newest
    # rows stay whole: action, reward, next observation and return belong to the observation's step
    steps = batch.observations[:, 0]
    assert torch.equal(batch.actions[:, 0], -steps)
    assert torch.equal(batch.rewards, steps)
    assert torch.equal(batch.next_observations[:, 0], steps + 1)
    ends = np.cumsum(lengths)
    for row, step in enumerate(steps.int().tolist()):
        end = int(ends[np.searchsorted(ends, step, side="right")])
        expected = sum(0.5 ** (n - step) * n for n in range(step, end))  # also where the ring has lost the beginning
        assert float(batch.returns_to_go[row]) == pytest.approx(expected)


def test_the_last_slot_is_written_and_drawn():
    buffer = ReplayBuffer(4, 1, 1, RewardConfig(), discount=0.5)
    fill(buffer, [3])
    assert len(buffer) == 3
    fill(buffer, [3])
    drawn = np.concatenate([uniform_indices(len(buffer), 16, 0, "test", step) for step in range(4)])
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    assert buffer.gather(np.array([3])).observations.item() == 3.0
    assert buffer.gather(np.array([0])).observations.item() == 4.0


@pytest.mark.parametrize("lengths", [[3], [3, 2], [3, 4], [12]], ids=str)
def test_the_ring_goes_on_after_a_resume(lengths):
    first, second = (ReplayBuffer(5, 1, 1, RewardConfig(), discount=0.5) for _ in range(2))
    fill(first, lengths)
    second.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    for buffer in (first, second):
        fill(buffer, [2, 4])
    every = np.arange(5)
    assert not differing(first.gather(every).tensors(), second.gather(every).tensors())


def test_learns():
    config = CalQLConfig(
        network=POINT_NETWORK,
        discount=POINT_DISCOUNT,
        target_update_rate=0.05,
        actor_lr=3e-3,
        critic_lr=3e-3,
        initial_temperature=0.05,
        cql_weight=0.5,
        num_samples=4,
    )
    check_learns(config)


def test_the_example_of_the_page_runs():
    check_page("cal_ql")
