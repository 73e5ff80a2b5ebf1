"""Policies and critics as hypotheses: what a step says of each, how a combination acts, ensembles from runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from objectives.conformance import NETWORK, SPEC, random_batch
from steelyard.adapt.base import Combination, Support
from steelyard.adapt.choose import BestHead
from steelyard.adapt.control import (
    CriticHeads,
    PolicyHeads,
    critic_heads,
    default_method,
    load_critics,
    load_policies,
    policy_heads,
    reweight_critics,
    reweight_policies,
    transitions,
)
from steelyard.adapt.losses import GaussianNLL
from steelyard.adapt.population import GaussianHeads, HeadMAP
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.artefact import load_learner
from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import ArraySpec, Episode, Spec
from steelyard.data.normalize import BoxScaler
from steelyard.data.returns import RewardConfig
from steelyard.data.store import Store
from steelyard.errors import ConfigError, DataError
from steelyard.nets.discrete import DiscreteNetworkConfig
from steelyard.objectives import BCConfig, DiscreteBCConfig, EDACConfig, IQLConfig, QCConfig
from steelyard.objectives.actor_critic import DataStatistics, NetworkConfig
from steelyard.objectives.control_heads import ControlHeads, ControlHeadsConfig
from steelyard.rng import torch_generator
from steelyard.train.online import OnlineConfig
from steelyard.workflows.control import ControlRun, DataConfig, EvaluationConfig, start

BOX = BoxScaler(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0]))
NOW = torch_generator(0, "act")


def steps(actions: torch.Tensor, **others: torch.Tensor) -> TransitionBatch:
    count = len(actions)
    zeros, states = torch.zeros(count), torch.arange(count, dtype=torch.float32)[:, None]
    given = {"observations": states, "actions": actions, "rewards": zeros, "next_observations": states + 1}
    given |= {"masks": zeros + 1, "returns_to_go": zeros, "is_offline": zeros + 1}
    return TransitionBatch(**(given | others))


def two_policies() -> PolicyHeads:
    """Member 0 does (0, s), member 1 does (0.5, -s), with features (1, s)."""

    def actions(states: torch.Tensor) -> torch.Tensor:
        s = states[:, 0]
        first, second = torch.stack([0 * s, s], -1), torch.stack([0 * s + 0.5, -s], -1)
        return torch.stack([first, second], 1)

    return PolicyHeads(actions, BOX, ("a", "b"), lambda states: torch.cat([0 * states + 1, states], -1))


def test_every_number_of_an_action_is_an_example_and_a_policy_is_judged_by_whole_actions():
    heads = two_policies()
    support = heads.support(steps(torch.tensor([[1.0, 3.0], [-2.0, 4.0]])))  # in box units (0.5, 0.5), (-1, 1)
    np.testing.assert_allclose(support.labels, [0.5, 0.5, -1, 1])
    np.testing.assert_allclose(support.members[..., 0], [[0, 0.5], [0, 0], [0, 0.5], [1, -1]], atol=1e-7)
    variance = 0.3
    whole = np.array([0.25 + 0.25 + 1 + 0, 0 + 0.25 + 2.25 + 4]) / (2 * variance)
    expected = np.exp(whole.min() - whole) / np.exp(whole.min() - whole).sum()
    found = adapt(HyRe(GaussianNLL(variance)), support).combination.coefficients
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("method", [HyRe(GaussianNLL(0.3)), GaussianHeads(2.0, 0.5, "regression", 0.1),
                                    HeadMAP(1.0, 0, "regression", 0.1)])  # fmt: skip
def test_the_policy_acts_as_the_combination_says(method):
    heads = two_policies()
    labelled = steps(torch.tensor([[0.3, 2.2], [-0.4, 2.6], [0.1, 1.5]]))
    support = heads.support(labelled)
    combination = adapt(method, support).combination
    said = combination.apply(support.members, support.features).reshape(3, 2)
    policy = heads.policy(combination)
    expected = BOX.inverse(torch.from_numpy(said).float().clamp(-1, 1))
    for mode in ("mean", "sample"):
        torch.testing.assert_close(policy.act(labelled.observations, NOW, mode), expected)
    beyond = heads.policy(Combination(np.array([50.0, 0.0]))).act(torch.tensor([[1.0]]), NOW, "mean")
    torch.testing.assert_close(beyond, torch.tensor([[0.0, 4.0]]))  # moved into the box


def test_features_are_needed_only_where_a_method_uses_them():
    bare = replace(two_policies(), features=None)
    support = bare.support(steps(torch.zeros(2, 2)))
    assert support.features is None
    with pytest.raises(DataError, match="features"):
        adapt(HeadMAP(1.0, 0, "regression"), support)
    policy = bare.policy(Combination(np.ones(2) / 2, np.zeros((1, 4))))
    with pytest.raises(ConfigError, match="features"):
        policy.act(torch.zeros(1, 1), NOW, "mean")


# a walk on a line: one step costs 1, the value is minus the distance to the goal over the length of a step
DISCOUNT = 0.9


def value(states: torch.Tensor, goal: float, pace: float) -> torch.Tensor:
    left = (goal - states[:, 0]).abs() / pace
    return -(1 - DISCOUNT**left) / (1 - DISCOUNT)


def walkers(goals: list[float], gains: list[float]) -> CriticHeads:
    """Exact critics: member k believes that x' = x + gain_k a and that the goal is goal_k."""
    pairs = list(zip(goals, gains, strict=True))

    def v(states: torch.Tensor) -> torch.Tensor:
        return torch.stack([value(states, goal, abs(gain)) for goal, gain in pairs], -1)

    def q(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        columns = []
        for goal, gain in pairs:
            after = states[:, None] + gain * actions  # [B, J, 1]
            columns.append(-1 + DISCOUNT * value(after.flatten(0, 1), goal, abs(gain)).view(after.shape[:2]))
        return torch.stack(columns, -1)

    return CriticHeads(q, v, BoxScaler(torch.tensor([-1.0]), torch.tensor([1.0])), DISCOUNT, tuple("abc"[: len(pairs)]))


def walked(gain: float) -> TransitionBatch:
    """Six steps of +1 and -1 far from any goal, where x' = x + gain a."""
    actions = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    states = torch.arange(6.0)[:, None]
    rewards = torch.full((6,), -1.0)
    return steps(actions, observations=states, next_observations=states + gain * actions, rewards=rewards)


def test_the_loss_by_td_is_the_squared_td_error():
    heads = walkers([20.0, 30.0], [1.0, -1.0])
    batch = replace(walked(1.0), masks=torch.tensor([1.0, 1, 1, 1, 1, 0]), rewards=torch.arange(6.0))
    support = heads.support(batch, "td")
    q = heads.q(batch.observations, batch.actions[:, None])[:, 0]
    error = batch.rewards[:, None] + DISCOUNT * batch.masks[:, None] * heads.v(batch.next_observations) - q
    found = GaussianNLL(1.0)(support.members, support.labels)
    np.testing.assert_allclose(found, 0.5 * error.double().numpy() ** 2, rtol=1e-5, atol=1e-10)


def test_td_errors_tell_dynamics_apart_and_not_goals_and_returns_tell_goals():
    changed = walkers([20.0, 20.0], [1.0, -1.0]).support(walked(-1.0), "td")
    assert adapt(HyRe(GaussianNLL(0.01)), changed).combination.coefficients[1] > 0.999
    goals = walkers([20.0, 30.0, 40.0], [1.0, 1.0, 1.0])
    walk = walked(1.0)
    np.testing.assert_allclose(
        adapt(HyRe(GaussianNLL(0.01)), goals.support(walk, "td")).combination.coefficients, 1 / 3, atol=1e-3
    )
    # the returns of one who walks to 30
    following = replace(walk, actions=torch.ones(6, 1), returns_to_go=value(walk.observations, 30.0, 1.0))
    told = adapt(HyRe(GaussianNLL(0.01)), goals.support(following, "return")).combination.coefficients
    assert told[1] > 0.999


def test_greedy_takes_the_best_candidate_under_the_combined_critic():
    def q(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return torch.stack([-(actions[..., 0] - 0.5).square(), -(actions[..., 0] + 0.5).square()], -1)

    box = BoxScaler(torch.tensor([-2.0]), torch.tensor([2.0]))
    heads = CriticHeads(q, lambda s: torch.zeros(len(s), 2), box, 0.9, ("a", "b"))
    states = torch.zeros(3, 1)
    for weights, best in (([1.0, 0.0], 1.0), ([0.0, 1.0], -1.0), ([0.5, 0.5], 0.0)):
        policy = heads.policy(Combination(np.array(weights)), 200)
        found = policy.act(states, torch_generator(1, "act"), "mean")
        assert found.shape == (3, 1)
        assert ((found - best).abs() < 0.1).all()
    exact = replace(heads, proposals=lambda s: torch.full((len(s), 1, 1), 0.5))
    found = exact.policy(Combination(np.array([1.0, 0.0])), 5).act(states, torch_generator(1, "act"), "mean")
    torch.testing.assert_close(found, torch.ones(3, 1))
    with pytest.raises(ConfigError, match="coefficients alone"):
        heads.policy(Combination(np.ones(2), np.zeros((1, 3))))


def test_a_learner_with_heads_is_an_ensemble():
    learner = ControlHeads(
        SPEC, ControlHeadsConfig(hidden=(8, 8)), DataStatistics(torch.zeros(3), torch.ones(3), -5.0), 2, NOW
    )
    batch = random_batch(6)
    policies, critics = policy_heads(learner), critic_heads(learner)
    assert policies.names == critics.names == ("pooled", "group 0", "group 1")
    assert policies.support(batch).members.shape == (12, 3, 1)
    assert policies.support(batch).features.shape == (12, 16)
    assert critics.support(batch).members.shape == critics.support(batch, "return").members.shape == (6, 3, 1)
    pooled = policies.policy(Combination(np.array([1.0, 0, 0])))
    torch.testing.assert_close(
        pooled.act(batch.observations, NOW, "mean"), learner.policy().act(batch.observations, NOW, "mean")
    )
    assert critics.policy(Combination(np.ones(3) / 3), 4).act(batch.observations, NOW, "mean").shape == (6, 2)
    blind = ControlHeads(
        SPEC, ControlHeadsConfig(critics=False), DataStatistics(torch.zeros(3), torch.ones(3), -5.0), 2, NOW
    )
    with pytest.raises(ConfigError, match="without critics"):
        critic_heads(blind)


# ensembles of ordinary runs: who does a = s, and who does a = -s

LINE = Spec({"observation": ArraySpec((2,))}, ArraySpec((2,), low=(-1.0, -1.0), high=(1.0, 1.0)))


def line_store(sign: float, path=None, spec: Spec = LINE) -> Store:
    rng = np.random.default_rng(3)
    episodes = []
    for _ in range(8):
        states = rng.uniform(-0.9, 0.9, (11, 2)).astype(np.float32)
        noise = 0.05 * rng.standard_normal((10, 2))
        actions = np.clip(sign * states[:-1] + noise, -1, 1).astype(np.float32)
        episodes.append(Episode(states, actions, rng.uniform(size=10), False, True))
    return Store.from_episodes(episodes, path, spec=spec)


def trained(folder, sign: float, objective, name: str, updates: int = 2):
    data = folder / f"data{sign:+.0f}"
    if not data.exists():
        line_store(sign, data)
    run = ControlRun(
        objective=objective,
        data=DataConfig(path=str(data)),
        offline_steps=updates,
        batch_size=32,
        online=OnlineConfig(env_steps=0),
        evaluation=EvaluationConfig(every_offline=0),
    )
    return start(run, folder / name, quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small = NetworkConfig(actor_hidden=(16,), critic_hidden=(8,), last_layer_gain=1.0)
    clone = BCConfig(network=small, learning_rate=1e-2, likelihood="mse")
    made = {
        "same": trained(folder, 1, clone, "same", 150),
        "opposite": trained(folder, -1, clone, "opposite", 150),
        "iql": trained(folder, 1, IQLConfig(network=small), "iql"),
        "iql 2": trained(folder, -1, IQLConfig(network=small), "iql2"),
        "impatient": trained(folder, 1, IQLConfig(network=small, discount=0.5), "impatient"),
        "edac": trained(folder, 1, EDACConfig(network=replace(small, num_critics=4)), "edac"),
        "chunks": trained(folder, 1, QCConfig(), "chunks", 1),
    }
    return folder, made


def test_policies_of_ordinary_runs_are_re_weighted_by_a_demonstrator(runs):
    _, made = runs
    paths = [made["same"], made["opposite"]]
    for sign, right in ((1, 0), (-1, 1)):
        demonstrated = transitions(line_store(sign))
        few = TransitionBatch(**{name: column[:4] for name, column in demonstrated.tensors().items()})
        policy, adapted = reweight_policies(paths, few, HyRe(GaussianNLL(0.05)))
        assert adapted.combination.coefficients[right] > 0.99
        assert adapted.cost["labels"] == 8  # two numbers an action
        own = load_learner(paths[right])[0].policy()
        alone = BestHead(GaussianNLL())
        chosen, _ = reweight_policies(paths, few, alone)
        torch.testing.assert_close(
            chosen.act(few.observations, NOW, "mean"), own.act(few.observations, NOW, "mean"), atol=1e-6, rtol=0
        )
        assert (policy.act(few.observations, NOW, "mean") - few.actions).abs().mean() < 0.15
    _, adapted = reweight_policies(paths, demonstrated)
    assert adapted.combination.coefficients[1] > 0.99


def test_the_members_of_one_run_are_its_critics_and_of_several_their_least(runs):
    _, made = runs
    batch = transitions(line_store(1))
    one, several = load_critics([made["edac"]]), load_critics([made["iql"], made["iql 2"]])
    assert one.names == tuple(f"critic {number}" for number in range(4))
    assert len(several.names) == 2
    learner = load_learner(made["edac"])[0]
    ready = learner.nets.prepare(batch)
    expected = learner.nets.critic(ready.observations, ready.actions).mT.double().detach().numpy()
    np.testing.assert_allclose(one.support(batch, "return").members[..., 0], expected, rtol=1e-4, atol=1e-5)
    first = load_learner(made["iql"])[0]
    found = several.support(batch, "return").members[:, 0, 0]
    np.testing.assert_allclose(found, first.score(batch).double().numpy(), rtol=1e-4, atol=1e-5)
    # IQL has a V of its own
    following = first.value(first.nets.normalizer(batch.next_observations)).detach().double().numpy()
    said = several.support(batch, "td").members[:, 0, 0]
    np.testing.assert_allclose(said, found - 0.99 * following, rtol=1e-4, atol=1e-5)
    for paths in ([made["edac"]], [made["iql"], made["iql 2"]]):
        policy, adapted = reweight_critics(paths, batch)
        assert np.isclose(adapted.combination.coefficients.sum(), 1)
        assert policy.act(batch.observations[:3], NOW, "mean").shape == (3, 2)


def test_what_cannot_be_an_ensemble_is_refused_in_one_sentence(runs):
    folder, made = runs
    with pytest.raises(ConfigError, match="at least one run"):
        load_policies([])
    with pytest.raises(ConfigError, match="remembers its last steps"):
        load_policies([made["same"], made["chunks"]])
    for name in ("same", "chunks"):
        with pytest.raises(ConfigError, match="no critic of single actions"):
            load_critics([made[name]])
    with pytest.raises(ConfigError, match="different discounts"):
        load_critics([made["iql"], made["impatient"]])
    wider = Spec(LINE.observations, ArraySpec((2,), low=(-2.0, -2.0), high=(2.0, 2.0)))
    line_store(1, folder / "wide", wider)
    other = start(
        ControlRun(
            objective=BCConfig(network=NETWORK), data=DataConfig(path=str(folder / "wide")), offline_steps=1,
            batch_size=8, online=OnlineConfig(env_steps=0), evaluation=EvaluationConfig(every_offline=0),
        ),
        folder / "wide run",
        quiet=True,
    )  # fmt: skip
    with pytest.raises(DataError, match="do not fit"):
        load_policies([made["same"], other])
    presses = Episode(np.zeros((6, 2), np.float32), np.array([0, 1, 0, 1, 0]), np.zeros(5), False, True)
    discrete = Store.from_episodes([presses], folder / "discrete")
    assert discrete.spec.num_actions == 2
    counted = start(
        ControlRun(
            objective=DiscreteBCConfig(network=DiscreteNetworkConfig(hidden=(4,))),
            data=DataConfig(path=str(folder / "discrete")), offline_steps=1, batch_size=4,
            online=OnlineConfig(env_steps=0), evaluation=EvaluationConfig(every_offline=0),
        ),
        folder / "discrete run",
        quiet=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="discrete"):
        load_policies([counted])


def test_rewards_are_seen_as_in_training():
    batch = transitions(line_store(1), RewardConfig(scale=2.0, bias=-1.0), 0.5)
    raw = line_store(1).rewards
    np.testing.assert_allclose(batch.rewards.numpy(), 2 * np.asarray(raw) - 1, rtol=1e-5)
    assert len(batch) == 80


def test_the_default_scale_is_the_members_disagreement():
    members = np.array([[[0.0], [2.0]], [[1.0], [1.0]]])
    method = default_method(Support(members, np.zeros(2)))
    assert method.loss.variance == 0.5  # mean of 1 and 0
    agreeing = Support(np.ones((2, 3, 1)), np.zeros(2))
    np.testing.assert_allclose(adapt(default_method(agreeing), agreeing).combination.coefficients, 1 / 3)
