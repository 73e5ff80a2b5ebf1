"""Adaptive best-of-N actions: the best is chosen, draws do not depend on rules, rules agree with the contract."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch

from objectives.conformance import HIGH, LOW, NETWORK, SPEC, STATISTICS, seeded
from steelyard.adapt.action_values import Coins, DrawnValues
from steelyard.adapt.best_of_n_actions import (
    ActionAgent,
    BestOfNActions,
    action_agent,
    compute_adaptive,
    compute_fixed,
    evaluate_counted,
    load_action_agent,
    matched,
    stops,
)
from steelyard.adapt.compute_policy import Budget, ComputePolicy, PruneRule, StopRule, TemperatureSchedule
from steelyard.artefact import load_learner
from steelyard.data.episode import ArraySpec, Episode, Spec
from steelyard.data.normalize import BoxScaler
from steelyard.data.store import Store
from steelyard.envs.gym import EnvConfig, VectorEnv
from steelyard.errors import ConfigError, DataError
from steelyard.nets.discrete import DiscreteNetworkConfig
from steelyard.objectives import (
    BCConfig,
    DiscreteCQLConfig,
    FQLConfig,
    IQLConfig,
    QCConfig,
    SACConfig,
    TD3BCConfig,
    build_learner,
)
from steelyard.objectives.fql import FlowNetworkConfig
from steelyard.train.online import OnlineConfig
from steelyard.workflows.control import ControlRun, DataConfig, start

BOX = BoxScaler(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0]))
FLOW = FlowNetworkConfig(actor_hidden=(8,), critic_hidden=(8,), last_layer_gain=1.0)


def line(length: int = 1) -> ActionAgent:
    """A policy that draws around the state, and a critic that likes large first numbers, the more the larger |s|."""

    def draw(states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.tanh(noise + states[:, :1, None])

    def value(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return actions[..., 0] * states[:, :1].abs()

    return ActionAgent(draw, value, BOX, length)


def fresh(agent: ActionAgent, count: int = 2000) -> DrawnValues:
    return DrawnValues(agent.values, count)


def test_the_best_of_all_candidates_is_played_in_the_box_of_the_environment():
    agent, states = line(), torch.tensor([[0.5], [-1.0], [2.0]])
    found = BestOfNActions(agent, compute_fixed(8)).choose(states, seeded(3))
    generator = seeded(3)
    noise = torch.stack([torch.randn((3, 3), generator=generator) for _ in range(8)], 1)[..., :2]
    candidates = agent.draw(states, noise)
    best = agent.value(states, candidates).max(1)
    torch.testing.assert_close(found.values, best.values)
    torch.testing.assert_close(found.actions, candidates[torch.arange(3), best.indices])
    assert found.drawn.tolist() == [8, 8, 8]
    assert bool(torch.isnan(found.no_better).all())
    acted = BestOfNActions(agent, compute_fixed(8)).act(states, seeded(3), "mean")
    torch.testing.assert_close(acted, BOX.inverse(found.actions))


def test_temperature_0_is_the_mode_and_greedy_first_begins_with_it():
    agent, states = line(), torch.tensor([[0.5], [-1.0]])
    mode = BestOfNActions(agent, compute_fixed(1, 0.0)).choose(states, seeded(0))
    torch.testing.assert_close(mode.actions, torch.tanh(states).expand(2, 2))
    first = ComputePolicy(TemperatureSchedule("greedy_first"), StopRule("never"), budget=Budget(1))
    torch.testing.assert_close(BestOfNActions(agent, first).choose(states, seeded(1)).actions, mode.actions)


def test_draws_do_not_depend_on_waves_the_budget_or_the_rule():
    agent, states = line(), torch.linspace(-2, 2, 16)[:, None]
    judge = fresh(agent)
    one_by_one = ComputePolicy(TemperatureSchedule("constant"), StopRule("never"), budget=Budget(8), waves=(1,))
    in_waves = dataclasses.replace(one_by_one, waves=(1, 2, 4, 8))
    at_once = BestOfNActions(agent, compute_fixed(8)).choose(states, seeded(0))
    for compute in (one_by_one, in_waves):
        found = BestOfNActions(agent, compute).choose(states, seeded(0))
        assert torch.equal(found.actions, at_once.actions)
        assert torch.equal(found.drawn, at_once.drawn)
    # a state that stops after k draws has the best of the same first k
    stopped = BestOfNActions(agent, compute_adaptive(StopRule("threshold", 0.8), 8), judge).choose(states, seeded(0))
    assert len(set(stopped.drawn.tolist())) > 1
    for row, count in enumerate(stopped.drawn.tolist()):
        fixed = BestOfNActions(agent, compute_fixed(count)).choose(states, seeded(0))
        assert torch.equal(fixed.actions[row], stopped.actions[row])


def test_other_rows_change_nothing():
    agent, states = line(), torch.linspace(-2, 2, 6)[:, None]
    compute, judge = compute_adaptive(StopRule("threshold", 0.7), 16), fresh(agent)
    alone = BestOfNActions(agent, compute, judge).choose(states, seeded(0))
    others = states.clone()
    others[1::2] += 5
    beside = BestOfNActions(agent, compute, judge).choose(others, seeded(0))
    assert torch.equal(alone.actions[::2], beside.actions[::2])
    assert torch.equal(alone.drawn[::2], beside.drawn[::2])


@pytest.mark.parametrize(
    "rule",
    [StopRule("threshold", 0.8), StopRule("threshold", 0.8, prior_strength=2.0), StopRule("never"),
     StopRule("expected_gain", gain=0.5, cost=0.05, prior_strength=3.0), StopRule("expected_gain", cost=0.1)],
)  # fmt: skip
def test_rules_are_those_of_the_contract(rule):
    draw = np.random.default_rng(0)
    for drawn in (1, 2, 7):
        scores = draw.uniform(size=(50, drawn))
        best = torch.from_numpy(scores.max(1))
        found = stops(rule, best, 1 - best, drawn)  # with every better one worth 1, as for a language model
        assert found.tolist() == [rule.stops(row) for row in scores]


def test_a_known_threshold_draws_as_chance_would_and_finds_more():
    """Stopping at P(better) <= p takes 1 / p draws in every state; the best is worth more than that of 1 / p draws."""
    agent, states = line(), torch.full((3000, 1), 1.0)
    threshold = compute_adaptive(StopRule("threshold", 0.75), 200)
    known = BestOfNActions(agent, threshold, fresh(agent, 1000)).choose(states, seeded(0))
    by_chance = BestOfNActions(agent, threshold, Coins()).choose(states, seeded(0))
    for found in (known, by_chance):
        assert float(found.drawn.double().mean()) == pytest.approx(4, abs=0.3)
    fixed = BestOfNActions(agent, compute_fixed(4)).choose(states, seeded(0))
    assert float(known.values.mean()) > float(fixed.values.mean()) + 0.01
    assert float(fixed.values.mean()) > float(by_chance.values.mean()) + 0.01
    # in ranks: (1 + 0.75) / 2 against 4 / 5
    assert float(known.no_better.mean()) == pytest.approx(0.875, abs=0.01)


def test_expected_gain_spends_where_more_is_at_stake():
    def value(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return actions[..., 0] * states  # the state says how far values lie apart, and nothing else

    agent = ActionAgent(lambda states, noise: torch.tanh(noise), value, BOX)
    states = torch.tensor([0.01, 0.3, 3.0]).repeat(200)[:, None]
    for kind in ("expected_gain", "threshold"):
        compute = compute_adaptive(StopRule(kind, 0.7, cost=0.05), 32)
        drawn = BestOfNActions(agent, compute, fresh(agent)).choose(states, seeded(0)).drawn.double()
        narrow, middle, wide = (float(drawn[k::3].mean()) for k in range(3))
        if kind == "expected_gain":
            assert narrow == 1  # no draw could bring what it costs
            assert 1.2 < middle < wide - 2
        else:  # sees ranks alone
            assert max(narrow, middle, wide) - min(narrow, middle, wide) < 1


def test_more_shrinking_stops_earlier_and_waves_overshoot():
    agent, states = line(), torch.full((200, 1), 0.5)
    judge = fresh(agent)

    def mean(rule: StopRule, waves: tuple[int, ...] = (1,)) -> float:
        policy = BestOfNActions(agent, compute_adaptive(rule, 32, waves), judge)
        return float(policy.choose(states, seeded(0)).drawn.double().mean())

    plain, shrunk = mean(StopRule("threshold", 0.95)), mean(StopRule("threshold", 0.95, prior_strength=2.0))
    assert shrunk < plain < mean(StopRule("threshold", 0.95), (1, 2, 4, 8))


@pytest.mark.parametrize("kind", ["threshold", "expected_gain"])
@pytest.mark.parametrize("waves", [(1,), (1, 2, 4)])
def test_the_mean_is_matched(kind, waves):
    agent = line()
    states = torch.linspace(0.2, 2, 400)[:, None]
    judge = fresh(agent)
    start = compute_adaptive(StopRule(kind), 16, waves)
    counts = []
    for mean in (2.0, 5.0):
        compute = matched(agent, judge, start, states, mean, 0)
        found = BestOfNActions(agent, compute, judge).choose(states, seeded(9))
        assert float(found.drawn.double().mean()) == pytest.approx(mean, rel=0.12)
        counts.append(compute.stop.threshold if kind == "threshold" else -compute.stop.cost)
    assert counts[0] < counts[1]
    coins = matched(agent, Coins(), compute_adaptive(StopRule("threshold"), 16), states, 4.0, 0)
    assert float(BestOfNActions(agent, coins, Coins()).choose(states, seeded(2)).drawn.double().mean()) == (
        pytest.approx(4, rel=0.1)
    )


def test_the_ends_of_the_mean_and_what_cannot_be_matched():
    agent, states = line(), torch.linspace(0.2, 2, 50)[:, None]
    judge = fresh(agent)
    for kind in ("threshold", "expected_gain"):
        start = compute_adaptive(StopRule(kind), 8)
        for mean in (1.0, 8.0):
            compute = matched(agent, judge, start, states, mean, 0)
            drawn = BestOfNActions(agent, compute, judge).choose(states, seeded(1)).drawn.double()
            assert float(drawn.mean()) == pytest.approx(mean, abs=0.35)
        with pytest.raises(ConfigError, match="between the first wave and the budget of 8, found 9"):
            matched(agent, judge, start, states, 9, 0)

    class Sure(Coins):
        def judge(self, known, values, coins):
            return torch.ones(len(values)), torch.zeros(len(values))

    with pytest.raises(ConfigError, match=r"no threshold draws about 4 candidates on average: 1\.00 or 8\.00"):
        matched(agent, Sure(), compute_adaptive(StopRule("threshold"), 8), states, 4, 0)
    with pytest.raises(ConfigError, match="nothing to match"):
        matched(agent, judge, compute_fixed(4), states, 4, 0)


def test_rules_that_do_not_fit_are_refused():
    agent = line()
    with pytest.raises(ConfigError, match="'threshold' needs a judge"):
        BestOfNActions(agent, compute_adaptive(StopRule(), 4))
    with pytest.raises(ConfigError, match="drawn in one piece"):
        BestOfNActions(agent, ComputePolicy(stop=StopRule("never"), prune=PruneRule("quantile")))
    with pytest.raises(ConfigError, match="drawn in one piece"):
        BestOfNActions(agent, ComputePolicy(stop=StopRule("never"), budget=Budget(4, 100)))


def test_chunks_are_played_to_their_end_and_candidates_counted_once():
    agent, states = line(3), torch.tensor([[0.5], [1.5]])
    policy = BestOfNActions(agent, compute_fixed(4))
    counts = []
    for time in range(4):
        policy.act(states, seeded(time), "mean")
        counts.append(policy.drawn.tolist())
    assert counts == [[4, 4], [0, 0], [0, 0], [4, 4]]
    policy.reset(torch.tensor([1]))
    policy.act(states, seeded(9), "mean")
    assert policy.drawn.tolist() == [0, 4]
    resumed = BestOfNActions(agent, compute_fixed(4))
    resumed.load_state_tensors(policy.state_tensors())
    assert torch.equal(resumed.act(states, seeded(10), "mean"), policy.act(states, seeded(10), "mean"))


CONFIGS = [
    IQLConfig(network=NETWORK), SACConfig(network=NETWORK), TD3BCConfig(network=NETWORK),
    FQLConfig(network=FLOW), QCConfig(network=FLOW, chunk_length=3, num_samples=4),
    QCConfig(network=FLOW, chunk_length=3, extraction="fql", target_reduction="min"),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{getattr(c, 'extraction', '')}")
def test_agents_of_learners_draw_what_their_policies_do(config):
    learner = build_learner(SPEC, config, STATISTICS, seeded(1)).eval()
    agent = action_agent(learner)
    states = torch.randn(5, 3, generator=seeded(2))
    h = getattr(config, "chunk_length", 1)
    assert agent.noise_size == 2 * h
    candidates = agent.draw(states, torch.randn(5, 7, 2 * h, generator=seeded(3)))
    assert candidates.shape == (5, 7, 2 * h)
    assert float(candidates.detach().abs().max()) <= 1
    if getattr(config, "extraction", "") != "best_of_n":  # whose mode is a choice among many already
        acted = BestOfNActions(agent, compute_fixed(1, 0.0)).act(states, seeded(0), "mean")
        torch.testing.assert_close(acted, learner.policy().act(states, seeded(0), "mean"))
    # Q as the learner's own score has it, on raw actions
    raw = agent.box.inverse(candidates.view(5, 7, h, 2))
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    assert bool(((raw >= low - 1e-5) & (raw <= high + 1e-5)).all())
    q = learner.nets.critic(learner.nets.normalizer(states), candidates)
    means = isinstance(config, FQLConfig) and config.target_reduction == "mean"
    torch.testing.assert_close(agent.value(states, candidates), q.mean(0) if means else q.amin(0))


def test_best_of_n_with_fixed_noise_is_qcs_own():
    config = QCConfig(network=FLOW, chunk_length=2, num_samples=6)
    learner = build_learner(SPEC, config, STATISTICS, seeded(1)).eval()
    agent, states = action_agent(learner), torch.randn(4, 3, generator=seeded(2))
    noise = learner.mode_noise.expand(4, -1, -1)
    candidates = agent.draw(states, noise)
    best = agent.value(states, candidates).argmax(1)
    expected = learner.propose(learner.nets.normalizer(states), None)
    torch.testing.assert_close(candidates[torch.arange(4), best], expected)


def test_what_has_no_critic_no_spread_or_other_chunks_is_refused():
    bc = build_learner(SPEC, BCConfig(network=NETWORK), STATISTICS, seeded())
    iql = build_learner(SPEC, IQLConfig(network=NETWORK), STATISTICS, seeded())
    with pytest.raises(ConfigError, match="BC has no critic"):
        action_agent(bc)
    both = action_agent(bc, iql)
    states = torch.randn(4, 3, generator=seeded())
    mode = BestOfNActions(both, compute_fixed(1, 0.0)).act(states, seeded(), "mean")
    torch.testing.assert_close(mode, bc.policy().act(states, seeded(), "mean"))
    mse = build_learner(SPEC, BCConfig(network=NETWORK, likelihood="mse"), STATISTICS, seeded())
    with pytest.raises(ConfigError, match="no spread"):
        action_agent(mse, iql)
    chunks = build_learner(SPEC, QCConfig(network=FLOW, chunk_length=3), STATISTICS, seeded())
    with pytest.raises(ConfigError, match="chunks of 1 actions, but the critic values chunks of 3"):
        action_agent(bc, chunks)
    pixels = Spec({"observation": ArraySpec((3,))}, ArraySpec((), "int64"), num_actions=3)
    discrete = build_learner(
        pixels, DiscreteCQLConfig(network=DiscreteNetworkConfig(hidden=(8,))), STATISTICS, seeded()
    )
    with pytest.raises(ConfigError, match="continuous actions"):
        action_agent(discrete)


class Walk(gymnasium.Env):
    """x' = x + 0.1 a_0; ends beyond 1, reward 1 there."""

    observation_space = gymnasium.spaces.Box(-5.0, 5.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(0, 0.5))
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += 0.1 * float(action[0])
        done = self.x > 1
        return np.array([self.x], np.float32), float(done), done, False, {"success": done}


if "SteelyardWalk-v0" not in gymnasium.registry:
    gymnasium.register("SteelyardWalk-v0", entry_point=Walk, max_episode_steps=20)


@pytest.mark.parametrize("length", [1, 3])
def test_episodes_are_counted_to_their_end_and_no_further(length):
    env = VectorEnv(EnvConfig("SteelyardWalk-v0", success="info"), 4, 0, "eval")
    agent = line(length)
    rows, states = evaluate_counted(BestOfNActions(agent, compute_fixed(5)), env, 6, 0)
    assert [row["episode"] for row in rows] == list(range(6))
    assert len({row["length"] for row in rows}) > 1
    for row in rows:
        assert row["decisions"] == math.ceil(row["length"] / length)
        assert row["evaluations"] == 5 * row["decisions"]
    assert states.shape == (sum(row["decisions"] for row in rows), 1)
    assert float(states.max()) <= 1  # none of what comes after an end
    many, _ = evaluate_counted(BestOfNActions(agent, compute_fixed(64)), env, 6, 0)
    assert np.mean([row["length"] for row in many]) <= np.mean([row["length"] for row in rows])
    env.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    found = {}
    for name, config, size in (("bc", BCConfig(network=NETWORK), 1), ("iql", IQLConfig(network=NETWORK), 1),
                               ("wide", IQLConfig(network=NETWORK), 2)):  # fmt: skip
        spec = Spec({"observation": ArraySpec((size,))}, ArraySpec((2,), low=(-2.0, 0.0), high=(2.0, 4.0)))
        states = draw.normal(size=(31, size)).astype(np.float32)
        episode = Episode(states, draw.uniform(0, 2, (30, 2)).astype(np.float32), np.zeros(30), False, True)
        Store.from_episodes([episode], folder / f"{name}-data", spec=spec)
        run = ControlRun(config, DataConfig(str(folder / f"{name}-data")), offline_steps=2, batch_size=4,
                         online=OnlineConfig(env_steps=0))  # fmt: skip
        found[name] = start(run, folder / name, quiet=True)
    return found


def test_agents_are_read_from_runs(runs):
    agent = load_action_agent(runs["bc"], runs["iql"])
    states = torch.randn(3, 1, generator=seeded())
    mode = BestOfNActions(agent, compute_fixed(1, 0.0)).act(states, seeded(), "mean")
    torch.testing.assert_close(mode, load_learner(runs["bc"])[0].policy().act(states, seeded(), "mean"))
    own = load_action_agent(runs["iql"])
    candidates = agent.draw(states, torch.zeros(3, 1, 2))
    assert torch.equal(own.value(states, candidates), agent.value(states, candidates))
    with pytest.raises(DataError, match="critic"):
        load_action_agent(runs["bc"], runs["wide"])
