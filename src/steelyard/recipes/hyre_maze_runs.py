"""What is run for HyRe's point maze: heads, and every way of adapting them to unseen worlds, seed by seed.

Heads are trained on the prior data of all training worlds, one head a world. Every method then adapts to each unseen
world with n labelled or rewarded steps and plays whole episodes there, from the same starts as all others.

Settings of every method are chosen for each n on validation worlds, which are neither trained on nor reported, by the
error of the policy's actions: nothing is tuned by success.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steelyard.adapt.base import Combination, Floats, Method, Support
from steelyard.adapt.choose import BestHead, search
from steelyard.adapt.control import (
    CombinedPolicy,
    Judge,
    PolicyHeads,
    critic_heads,
    policy_heads,
)
from steelyard.adapt.losses import GaussianNLL
from steelyard.adapt.population import GaussianHeads, HeadMAP
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.bench.evaluate import evaluate
from steelyard.data.batch import TransitionBatch
from steelyard.data.grouped import GroupedSource, joined
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store
from steelyard.envs.gym import VectorEnv
from steelyard.envs.shifted_maze import shifted_maze_env
from steelyard.objectives.base import Policy
from steelyard.objectives.control_heads import ControlHeads
from steelyard.recipes.hyre_maze_worlds import (
    REWARDS,
    TRAINED,
    WORLDS,
    MazeStudy,
    SeedJob,
    Steps,
    data_folder,
    read_prior,
    read_steps,
)
from steelyard.rng import torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

ETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
VARIANCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS = (1, 3, 10, 30)
NOISE = 0.1  # variance of demonstrated actions, where only its ratio to a weight matters
DRAWS = 3  # of labels in validation worlds


def train_heads(study: MazeStudy, out: str, seed: int) -> ControlHeads:
    """Train heads on the prior data."""
    store, groups = joined([Store.open(data_folder(out, world) / "demonstrations") for world in study.training])
    whole = OfflineSource(store, REWARDS, study.heads.discount, 1, seed)
    source = GroupedSource(whole, groups, study.group_batch, seed)
    generator = torch_generator(seed, "initial weights")
    learner = ControlHeads(whole.spec, study.heads, whole.statistics(), source.num_groups, generator)
    optimizers = Optimizers(learner, OptimConfig())
    for step in range(study.updates):
        update(learner, optimizers, source.batch(step), seed, step)
    return learner.eval()


class Agent:
    """Trained heads, and the ways of adapting them.

    Attributes:
        policies, critics: the members.
        variances: of members' residuals on their own group's prior data, for labels and both judges: {name: [H]}.
    """

    def __init__(self, learner: ControlHeads, prior: Sequence[TransitionBatch]) -> None:
        self.learner, self.policies, self.critics = learner, policy_heads(learner), critic_heads(learner)
        self.variances = {
            "labels": _own_variance([self.policies.support(steps) for steps in prior]),
            "td": _own_variance([self.critics.support(steps, "td") for steps in prior]),
            "return": _own_variance([self.critics.support(steps, "return") for steps in prior]),
        }

    @property
    def num_members(self) -> int:
        """H."""
        return self.learner.num_members

    def error(self, outputs: Floats, steps: TransitionBatch) -> float:
        """Return the mean squared error of action numbers [N A, 1], moved into the box."""
        labels = self.policies.support(steps).labels
        return float(np.mean((np.clip(outputs[:, 0], -1, 1) - labels) ** 2))


def _own_variance(supports: Sequence[Support]) -> Floats:
    squares = np.array([((one.members[..., 0] - one.labels[:, None]) ** 2).mean(0) for one in supports])  # [K, H]
    return np.concatenate([[squares[:, 0].mean()], np.diag(squares[:, 1:])])


@dataclass(frozen=True)
class Way:
    """A way of adapting by a support, whose settings are searched in `grid`.

    Attributes:
        name: in tables.
        evidence: what it reads: labels, td, random (td of random actions) or return.
        always: whether it plays after any number of steps, or only after the most.
        grid: of settings.
        build: settings -> method.
    """

    name: str
    evidence: str
    grid: dict[str, Sequence[float]]
    build: Callable[..., Method]
    always: bool = False


def ways(agent: Agent) -> list[Way]:
    """Return all ways of adapting that end in a combination of the heads."""

    def hyre(name: str, evidence: str, always: bool = True) -> Way:
        variance = agent.variances["td" if evidence == "random" else evidence]
        return Way(name, evidence, {"eta": ETAS}, lambda eta: HyRe(GaussianNLL(variance), eta), always)

    def gaussian(weight: float) -> Method:
        return GaussianHeads(weight, 0.0, "regression", NOISE)

    return [
        hyre("HyRe", "labels"),
        Way("Gaussian over heads", "labels", {"weight": WEIGHTS}, gaussian, True),
        Way("head MAP", "labels", {"variance": VARIANCES}, lambda variance: HeadMAP(variance, 0, "regression", NOISE)),
        Way("best head", "labels", {}, lambda: BestHead(GaussianNLL())),
        hyre("HyRe by TD", "td"),
        hyre("HyRe by TD, random actions", "random", False),
        hyre("HyRe by returns", "return", False),
    ]


def support_of(agent: Agent, evidence: str, labelled: TransitionBatch, random: TransitionBatch) -> Support:
    """Return what a way of adapting reads."""
    if evidence == "labels":
        return agent.policies.support(labelled)
    judge: Judge = "return" if evidence == "return" else "td"
    return agent.critics.support(random if evidence == "random" else labelled, judge)


def choose(agent: Agent, way: Way, validation: Sequence[Steps], n: int, seed: int) -> dict[str, float]:
    """Return the settings with the least action error in validation worlds after n steps."""
    if not way.grid:
        return {}
    cases = []
    for world in validation:
        held_out = agent.policies.support(world.held_out)
        for number in range(DRAWS):
            cases.append((support_of(agent, way.evidence, *world.drawn(n, seed, number)), held_out))

    def score(**settings: float) -> float:
        method, total = way.build(**settings), 0.0
        for support, held_out in cases:
            outputs = adapt(method, support).combination.apply(held_out.members, held_out.features)
            total -= float(np.mean((np.clip(outputs[:, 0], -1, 1) - held_out.labels) ** 2))
        return total

    return dict(search(way.grid, score).settings)


def fine_tuned(agent: Agent, labelled: TransitionBatch, rate: float) -> Iterator[tuple[int, CombinedPolicy]]:
    """Yield (steps, policy) while the pooled policy, all of its layers, is trained on the labels."""
    learner = agent.learner
    actor = copy.deepcopy(learner.actor)
    states, actions = learner.normalizer(labelled.observations), learner.box(labelled.actions).clamp(-1, 1)
    optimizer = torch.optim.Adam(actor.parameters(), rate)
    heads = PolicyHeads(lambda seen: actor(learner.normalizer(seen))[:, :1], learner.box, ("fine-tuned",))
    policy = heads.policy(Combination(np.ones(1)))
    for step in range(1, max(STEPS) + 1):
        loss = (actor(states)[:, 0] - actions).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step in STEPS:
            yield step, policy


def choose_fine_tuning(agent: Agent, validation: Sequence[Steps], n: int, seed: int) -> tuple[float, int]:
    """Return the rate and the number of steps with the least action error in validation worlds; one draw a world."""
    errors: dict[tuple[float, int], float] = dict.fromkeys(((r, s) for r in RATES for s in STEPS), 0.0)
    for world in validation:
        labelled, _ = world.drawn(n, seed)
        for rate in RATES:
            for steps, policy in fine_tuned(agent, labelled, rate):
                outputs = policy.heads.members(world.held_out.observations)[:, 0]
                errors[rate, steps] += agent.error(outputs, world.held_out)
    return min(errors, key=errors.__getitem__)


def run_seed(job: SeedJob) -> list[dict[str, Any]]:
    """Train heads, choose settings, adapt to every target with every method, and play. Return one row for each."""
    torch.set_num_threads(1)
    study, out, seed = job.study, job.out, job.seed
    learner = train_heads(study, out, seed)
    prior = [read_prior(study, out, world) for world in study.training]
    agent = Agent(learner, prior)
    validation = [read_steps(study, out, world) for world in study.validation]
    settings = {(way.name, n): choose(agent, way, validation, n, seed) for way in ways(agent) for n in study.shots}
    tuned = {n: choose_fine_tuning(agent, validation, n, seed) for n in study.shots}
    rows = []
    for name in study.targets:
        target = read_steps(study, out, name)
        play = _Player(study, name, seed)
        for method, n, policy, notes in _policies(agent, study, target, settings, tuned, seed):
            row = {"seed": seed, "world": name, "kind": WORLDS[name].kind, "method": method, "n": n}
            rows.append(row | notes | ({} if policy is None else play(policy)))
        play.env.close()
    return rows + (_own(agent, study, seed) if seed == study.seeds[0] else [])


def _policies(
    agent: Agent,
    study: MazeStudy,
    target: Steps,
    settings: dict[tuple[str, int], dict[str, float]],
    tuned: dict[int, tuple[float, int]],
    seed: int,
) -> Iterator[tuple[str, int, Policy | None, dict[str, Any]]]:
    """Yield (method, n, policy or None where it does not play, numbers) of all that is compared in one world."""
    held_out, count = agent.policies.support(target.held_out), agent.num_members
    each = ((held_out.members[..., 0] - held_out.labels[:, None]) ** 2).mean(0)

    def of_heads(combination: Combination) -> tuple[Policy, dict[str, Any]]:
        error = agent.error(combination.apply(held_out.members, held_out.features), target.held_out)
        return agent.policies.policy(combination), {"error": error}

    uniform = Combination(np.full(count, 1 / count))
    yield "uniform", 0, *of_heads(uniform)
    yield "single", 0, *of_heads(Combination(np.eye(count)[0]))
    yield "best head, known", 0, *of_heads(Combination(np.eye(count)[each.argmin()]))
    yield "uniform, greedy", 0, agent.critics.policy(uniform), {}
    for n in study.shots:
        labelled, random = target.drawn(n, seed)
        for way in ways(agent):
            chosen = settings[way.name, n]
            support = support_of(agent, way.evidence, labelled, random)
            adapted = adapt(way.build(**chosen), support)
            policy, notes = of_heads(adapted.combination)
            notes |= {"ess": adapted.diagnostics.get("ess"), "setting": next(iter(chosen.values()), None)}
            most = n == max(study.shots)
            yield way.name, n, policy if way.always or most else None, notes
            if way.evidence in ("td", "return") and most:
                yield f"{way.name}, greedy", n, agent.critics.policy(adapted.combination), {}
        rate, steps = tuned[n]
        policy = next(found for done, found in fine_tuned(agent, labelled, rate) if done == steps)
        error = agent.error(policy.heads.members(target.held_out.observations)[:, 0], target.held_out)
        yield "fine-tuning", n, policy, {"error": error, "setting": f"{rate:g} x {steps}"}


class _Player:
    """Plays the same episodes of a world with any policy."""

    def __init__(self, study: MazeStudy, world: str, seed: int) -> None:
        one = WORLDS[world]
        env = shifted_maze_env(study.size, one.shift, one.goal, action_repeat=study.action_repeat)
        self.env, self.seed, self.episodes = VectorEnv(env, study.episodes, seed, "eval"), seed, study.episodes

    def __call__(self, policy: Policy) -> dict[str, float]:
        """Return the share of episodes that reach the goal and the mean return, minus the steps taken."""
        rows = evaluate(policy, self.env, self.episodes, self.seed)
        return {
            "success": float(np.mean([row["success"] for row in rows])),
            "return": -float(np.mean([row["length"] for row in rows])),
        }


def _own(agent: Agent, study: MazeStudy, seed: int) -> list[dict[str, Any]]:
    """Play every training world with its own policy head, and greedily with its own critic: the most heads can do."""
    rows = []
    for number, name in enumerate(study.training):
        play = _Player(study, name, seed)
        own = Combination(np.eye(agent.num_members)[number + 1])
        policies: dict[str, Policy] = {
            "own head": agent.policies.policy(own),
            "own critic, greedy": agent.critics.policy(own),
        }
        for method, policy in policies.items():
            row = {"seed": seed, "world": name, "kind": TRAINED, "method": method, "n": 0}
            rows.append(row | play(policy))
        play.env.close()
    return rows
