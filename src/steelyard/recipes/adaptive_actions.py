"""Adaptive best-of-N actions on a point maze: return against critic evaluations, by rule.

After Manvi, Singh, Ermon, "Adaptive Inference-Time Compute" (arXiv 2410.02725), for an agent: a flow clones the
behaviour and draws chunks of actions, critics value them (`objectives/qc.py`), and drawing stops by rules
(`adapt/best_of_n_actions.py`). Fixed best-of-K is compared with rules that draw as many candidates on average, and
with stopping by chance. All play the same episodes with the same agents and see the same candidates.

The judge of fresh draws learns from states of episodes that are not those of the tables, and there too thresholds and
costs are matched to a mean number of draws: once on the states of best-of-4, once more on those that the rule itself
visits.

Nothing here reproduces a published number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from steelyard.adapt.action_values import Coins, DrawnValues, Judge, ValueQuantilesConfig, fit_value_quantiles
from steelyard.adapt.best_of_n_actions import (
    PROBE,
    ActionAgent,
    BestOfNActions,
    action_agent,
    compute_adaptive,
    compute_fixed,
    evaluate_counted,
    matched,
    rematched,
)
from steelyard.adapt.compute_policy import ComputePolicy, StopRule
from steelyard.bench.rows import write_rows
from steelyard.config import Config, require_positive
from steelyard.data.returns import RewardConfig
from steelyard.data.source import OfflineSource
from steelyard.envs.behaviours import PointMazeDataConfig, PointSize, point_maze_env, point_maze_store
from steelyard.envs.gym import VectorEnv, make
from steelyard.errors import ConfigError
from steelyard.objectives import QCConfig, build_learner
from steelyard.objectives.fql import FlowNetworkConfig
from steelyard.recipes.adaptive_actions_page import (
    BOUND,
    CHANCE,
    FIXED,
    GAIN,
    MODE,
    THRESHOLD,
    findings,
    section,
)
from steelyard.recipes.hyre_jobs import begin, carry_out
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section
from steelyard.rng import torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

REWARDS = RewardConfig(scale=1.0, bias=-1.0, horizon="sparse", step_reward=0.0)
"""Every decision costs 1 until the goal."""
STATES = 500
"""States in which values of choices are compared."""


def _objective() -> QCConfig:
    network = FlowNetworkConfig(actor_hidden=(64, 64), critic_hidden=(128, 128), critic_layer_norm=False)
    return QCConfig(
        network=network,
        chunk_length=4,
        num_samples=4,
        flow_steps=5,
        discount=0.98,
        learning_rate=1e-3,
        chunk_ends="terminal",
    )


@dataclass(frozen=True)
class ActionStudy(Config):
    """Adaptive best-of-N actions on a point maze."""

    size: PointSize = "Medium"
    """Maze."""
    action_repeat: int = 4
    """Simulator steps for which each action is held."""
    max_episode_steps: int = 600
    """Time limit of an evaluation episode, in simulator steps."""
    data_steps: int = 6_000
    """Actions of prior data, of each seed."""
    goal_fraction: float = 0.3
    """Share of prior episodes that end at the goal."""
    noise: float = 0.3
    """Standard deviation of the noise on the forces of prior data."""
    objective: QCConfig = field(default_factory=_objective)
    """Flow and critics."""
    updates: int = 3_000
    """Of flow and critics."""
    batch_size: int = 128
    """Rows of an update."""
    judge: ValueQuantilesConfig = field(default_factory=ValueQuantilesConfig)
    """The distribution of fresh draws' values."""
    probe_episodes: int = 20
    """Episodes whose states the judge learns from, and as many to match each rule on."""
    fixed: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """K of fixed best-of-K; the last is also the most that a rule may draw."""
    means: tuple[float, ...] = (1.5, 2.0, 4.0, 8.0)
    """Mean candidates a decision that rules are matched to."""
    episodes: int = 50
    """Evaluation episodes of each seed and method."""
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    """Of data, training and evaluation; 0 was looked at while the task was set up, so it is not among them."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "action_repeat", "max_episode_steps", "data_steps", "updates", "batch_size")
        require_positive(self, "probe_episodes", "fixed", "means", "episodes")
        if list(self.fixed) != sorted(set(self.fixed)) or self.fixed[0] != 1 or len(self.fixed) < 2:
            raise ConfigError(f"fixed must begin with 1 and increase, found {self.fixed}")
        if not self.means or not all(1 < mean < self.fixed[-1] for mean in self.means):
            raise ConfigError(f"means must lie between 1 and {self.fixed[-1]}, found {self.means}")


PRESETS: dict[str, ActionStudy] = {
    "tiny": ActionStudy(
        data_steps=5_000,
        updates=2_500,
        judge=ValueQuantilesConfig(hidden=(64, 64), draws=16, updates=1_000, batch_size=128),
        probe_episodes=10,
        fixed=(1, 2, 4, 8, 32),
        means=(2.0, 4.0),
        episodes=24,
        seeds=(10, 11, 12),
    ),
    "small": ActionStudy(),
    "paper": ActionStudy(data_steps=40_000, updates=20_000, episodes=200, seeds=tuple(range(10, 20))),
}
"""Sizes; the paper has no such experiment, and "paper" is only the largest."""


@dataclass(frozen=True)
class SeedJob:
    """Everything of one seed."""

    study: ActionStudy
    seed: int

    @property
    def name(self) -> str:
        """What the progress line says."""
        return f"seed {self.seed}"


def run(config: ActionStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes rows.csv (one row a seed, method and episode) and states.csv (one row a seed and method: what is chosen in
    the same states) into `out`.

    Raises:
        MissingExtraError: the simulator is not installed.
        ConfigError: the folder holds a study with other settings.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    make(_env(config)).close()  # before anything is written
    begin(out, config)
    jobs = [SeedJob(config, seed) for seed in config.seeds]
    found = carry_out(jobs, run_seed, out, "actions seeds", workers)
    episodes = [row for row in found if "episode" in row]
    states = [row for row in found if "episode" not in row]
    write_rows(out / "rows.csv", episodes)
    write_rows(out / "states.csv", states)
    return [section(config, episodes, states)], findings(config, episodes, states)


def _env(study: ActionStudy) -> Any:
    return point_maze_env(study.size, max_episode_steps=study.max_episode_steps, action_repeat=study.action_repeat)


def train_agent(study: ActionStudy, seed: int) -> ActionAgent:
    """Make the prior data of a seed and train flow and critics on them."""
    data = PointMazeDataConfig(
        size=study.size,
        kind="diverse",
        steps=study.data_steps,
        action_repeat=study.action_repeat,
        goal_fraction=study.goal_fraction,
        noise=study.noise,
        seed=seed,
    )
    objective = study.objective
    source = OfflineSource(
        point_maze_store(data), REWARDS, objective.discount, study.batch_size, seed, needs=objective.needs
    )
    learner = build_learner(source.spec, objective, source.statistics(), torch_generator(seed, "initial weights"))
    optimizers = Optimizers(learner, OptimConfig())
    for step in range(study.updates):
        update(learner, optimizers, source.batch(step), seed, step)
    return action_agent(learner.eval())


def run_seed(job: SeedJob) -> list[dict[str, Any]]:
    """Train an agent and a judge, match the rules, and play every method. Return one row an episode, one a method."""
    torch.set_num_threads(1)
    study, seed = job.study, job.seed
    agent = train_agent(study, seed)
    # states of other episodes than those of the tables
    probe = VectorEnv(_env(study), study.probe_episodes, seed, "probe")
    _, states = evaluate_counted(BestOfNActions(agent, compute_fixed(PROBE)), probe, study.probe_episodes, seed)
    learned, calibration = fit_value_quantiles(agent.values, states, study.judge, seed)
    bound = DrawnValues(agent.values, 128, seed)
    order = torch.randperm(len(states), generator=torch_generator(seed, "actions/states"))
    common = states[order[:STATES]]
    env = VectorEnv(_env(study), study.episodes, seed, "eval")
    rows: list[dict[str, Any]] = []
    for method, mean, compute, judge in _methods(study, agent, learned, bound, states, seed):
        key = {"seed": seed, "method": method, "mean": mean}
        choice = BestOfNActions(agent, compute, judge).choose(common, torch_generator(seed, "actions/choices"))
        notes = {"value": float(choice.values.mean()), "evaluations": float(choice.drawn.double().mean())}
        notes |= {"calibration_error": calibration.error, "within_states": calibration.spread}
        rows.append(key | notes | {"threshold": compute.stop.threshold, "cost": compute.stop.cost})
        if method == BOUND:
            continue
        if judge is not None and method != CHANCE:  # chance draws alike everywhere
            compute = rematched(agent, judge, compute, probe, mean, study.probe_episodes, seed)
        played, _ = evaluate_counted(BestOfNActions(agent, compute, judge), env, study.episodes, seed)
        kept = ("episode", "success", "length", "decisions", "evaluations")
        rows += [key | {name: row[name] for name in kept} for row in played]
    probe.close()
    env.close()
    return rows


def _methods(
    study: ActionStudy, agent: ActionAgent, learned: Judge, bound: Judge, states: Tensor, seed: int
) -> Iterator[tuple[str, float, ComputePolicy, Judge | None]]:
    """Yield (method, mean candidates, rules, judge) of all that is compared."""
    most = study.fixed[-1]
    yield MODE, 1.0, compute_fixed(1, 0.0), None
    for count in study.fixed:
        yield FIXED, float(count), compute_fixed(count), None
    ways: tuple[tuple[str, StopRule, Judge], ...] = (
        (THRESHOLD, StopRule("threshold"), learned),
        (GAIN, StopRule("expected_gain"), learned),
        (CHANCE, StopRule("threshold"), Coins()),
        (BOUND, StopRule("expected_gain"), bound),
    )
    for mean in study.means:
        for method, rule, judge in ways:
            yield method, mean, matched(agent, judge, compute_adaptive(rule, most), states, mean, seed), judge
