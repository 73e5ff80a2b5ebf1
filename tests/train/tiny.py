"""A point on a line to control, prior data of it, and a learner of four numbers: whole runs in about a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from steelyard.data.batch import Batch
from steelyard.data.episode import Episode
from steelyard.data.store import Store
from steelyard.envs.gym import EnvConfig, make, spec_of
from steelyard.objectives import CalQLConfig, ControlConfig, IQLConfig
from steelyard.objectives.actor_critic import NetworkConfig
from steelyard.objectives.base import Group, Learner, Phase
from steelyard.rng import torch_generator
from steelyard.train.loop import LoopConfig
from steelyard.train.online import OnlineConfig
from steelyard.workflows.control import ControlRun, DataConfig, EvaluationConfig

LIMIT = 20


class Point(gymnasium.Env):
    """x' = x + 0.2 a + noise; the task ends within 0.1 of the goal, which the observation (x, goal) shows.

    The noise comes from the environment's own generator, so that a resume is exact only if episodes are replayed.
    """

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, fault: str = "none") -> None:
        self.fault = fault

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.goal = self.np_random.uniform(-1, 1, 2)
        if abs(self.x - self.goal) < 0.3:
            self.goal = self.x - np.sign(self.x) * 0.6
        self.steps = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.x = float(np.clip(self.x + 0.2 * action[0] + 0.01 * self.np_random.standard_normal(), -5, 5))
        distance = abs(self.x - self.goal)
        observation, reward = self._observation(), -float(distance)
        if self.steps == 3 and self.fault == "observation":
            observation[1] = np.nan
        if self.steps == 3 and self.fault == "reward":
            reward = np.nan
        return observation, reward, bool(distance < 0.1), False, {}

    def _observation(self) -> Any:
        return np.array([self.x, self.goal], np.float32)


if "SteelyardPoint-v0" not in gymnasium.registry:
    gymnasium.register("SteelyardPoint-v0", entry_point=Point, max_episode_steps=LIMIT)

POINT = EnvConfig("SteelyardPoint-v0", success="terminated")


def recorded(seed: int, skill: float) -> Episode:
    """Play one episode that moves towards the goal with probability `skill`, else anywhere."""
    env, rng = make(POINT), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards = [observation], [], []
    while True:
        towards = np.sign(observation[1] - observation[0])
        action = np.array([towards if rng.random() < skill else rng.uniform(-1, 1)], np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
        if terminated or truncated:
            break
    return Episode(
        np.array(observations),
        np.array(actions),
        np.array(rewards, np.float64),
        terminated,
        truncated and not terminated,
    )


def point_store(path: Path | None = None, episodes: int = 30, first_seed: int = 0) -> Store:
    """Return prior data of mixed skill, with the environment's own spec."""
    made = [recorded(first_seed + seed, skill=seed % 3 / 2) for seed in range(episodes)]
    return Store.from_episodes(made, path, spec=spec_of(make(POINT), POINT))


NETWORK = NetworkConfig(actor_hidden=(16, 16), critic_hidden=(16, 16))
OBJECTIVES: dict[str, ControlConfig] = {
    # a Lagrange multiplier must survive a resume with its optimiser state
    "cal_ql": CalQLConfig(network=NETWORK, mode="lagrange_a", num_samples=3, discount=0.9),
    "iql": IQLConfig(network=NETWORK, discount=0.9),
}


def point_run(path: Path | None, objective: ControlConfig | None = None, **changes: Any) -> ControlRun:
    """Return a run of 60 offline and 90 online updates that logs, evaluates and saves at intervals that interleave."""
    config = ControlRun(
        objective=objective or OBJECTIVES["cal_ql"],
        data=DataConfig(None if path is None else str(path)),
        env=POINT,
        offline_steps=60,
        batch_size=16,
        online=OnlineConfig(env_steps=90, num_envs=2, capacity=64),
        evaluation=EvaluationConfig(episodes=3, parallel=2, every_offline=20, every_online=30),
        loop=LoopConfig(log_every=10, checkpoint_every=7),
        seed=3,
    )
    return replace(config, **changes)


@dataclass(frozen=True)
class Rows(Batch):
    """x [B, 3]."""

    x: Tensor


class Numbers:
    """A source of random rows, a pure function of the step; remembers which steps were asked for."""

    def __init__(self, before: Callable[[int], None] | None = None, poison: int | None = None) -> None:
        self.before, self.poison = before, poison
        self.asked: list[int] = []

    def batch(self, step: int) -> Rows:
        self.asked.append(step)
        if self.before is not None:
            self.before(step)
        x = torch.randn(8, 3, generator=torch_generator(1, "rows", step))
        if step == self.poison:
            x[5, 1] = float("nan")
        return Rows(x)

    def counters(self) -> dict[str, int]:
        return {"env_step": 0}

    def state_tensors(self) -> dict[str, Tensor]:
        return {"asked": torch.tensor(self.asked, dtype=torch.int64)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self.asked = state["asked"].tolist()


class Line(Learner):
    """Fits a line at every update and its level at every second one."""

    def __init__(self, poison: str = "", poison_step: int = -1) -> None:
        super().__init__()
        self.slope, self.level = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))
        self.register_buffer("target", torch.zeros(3))
        self.groups = {"slope": Group((self.slope,), 0.1), "level": Group((self.level,), 0.1)}
        self.plan = (Phase(("fit",), ("slope",)), Phase(("level",), ("level",), every=2))
        self.poison, self.poison_step = poison, poison_step
        self.calls = {"fit": 0, "level": 0, "after": 0}

    def loss_fit(self, batch: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        bad = self.calls["fit"] == self.poison_step
        self.calls["fit"] += 1
        noise = torch.randn(len(batch), generator=generator)
        loss = (batch.x @ self.slope - batch.x.sum(1) - 0.1 * noise).float().square().mean()
        if bad and self.poison == "loss":
            loss = loss * float("nan")
        if bad and self.poison == "gradient":
            loss = loss + (self.slope * 0).sqrt().sum()  # 0, but its derivative is 0 * infinity
        return loss, {"loss/fit": loss.detach()}

    def loss_level(self, batch: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls["level"] += 1
        loss = (self.level - batch.x.mean()).square()
        return loss, {"loss/level": loss.detach()}

    def after_update(self, step: int) -> None:
        assert step == self.calls["after"] or self.calls["after"] == 0
        self.calls["after"] = step + 1
        self.target.lerp_(self.slope.detach(), 0.1)
