"""The table of built-in tasks: an environment, what makes its prior data, and how its rewards are read.

    task = task_named("ant_maze/medium-play")
    store = task.make_data("data/medium-play", seed=0)
    run = ControlRun(env=task.env, data=DataConfig("data/medium-play", rewards=task.rewards), ...)

Names are stable: rows of different days are compared by them. All data are made on the spot; only `adroit/*` needs a
file that the user brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from steelyard.data.returns import RewardConfig
from steelyard.data.store import Store
from steelyard.envs import adroit, ant_maze, behaviours, ogbench
from steelyard.envs.config import EnvConfig
from steelyard.errors import ConfigError, DataError, near

MakeData = Callable[[Path, int, int | None, Path | None], Store]
"""(where to write, seed, steps or None for the task's own, the user's file) -> the store."""

SPARSE = RewardConfig(scale=1.0, bias=-1.0, horizon="sparse", step_reward=0.0)
"""Mazes: 0/1 becomes -1/0; a failed episode is worth -1 for ever."""
COUNTED = RewardConfig()
"""OGBench: minus the number of things not in place, as the environment gives it."""
BINARY = RewardConfig(horizon="sparse", step_reward=-1.0)
"""Adroit: -1/0 already; Cal-QL's authors use scale 10 and bias 5 on top."""


@dataclass(frozen=True)
class Task:
    """One environment with its prior data.

    Attributes:
        name: stable name, FAMILY/WHAT-KIND.
        env: environment to evaluate and fine-tune in; its spec is the data's.
        rewards: scale, bias and tail rule.
        discount: suggestion, per step.
        horizon: time limit in decisions.
        steps: of prior data, by default.
        needs_file: whether `make_data` needs a file of the user's.
        extra: name of the extra that its simulator belongs to.
        maker: see `make_data`.
    """

    name: str
    env: EnvConfig
    rewards: RewardConfig
    discount: float
    horizon: int
    steps: int
    maker: MakeData
    needs_file: bool = False
    extra: str = "sim"

    def make_data(
        self, path: str | Path, seed: int = 0, steps: int | None = None, file: str | Path | None = None
    ) -> Store:
        """Write the prior data to `path` as a native store.

        Args:
            path: directory; must not exist.
            seed: of the behaviour.
            steps: to generate; None: the task's own number.
            file: demonstrations in any known format, for the tasks that need them.

        Raises:
            DataError: a file is needed and none was given, or it does not fit.
            MissingExtraError: the simulator is not installed.
        """
        if self.needs_file and file is None:
            raise DataError(f"task {self.name!r} needs a file of demonstrations; none was given")
        return self.maker(Path(path), seed, steps, None if file is None else Path(file))


def task_named(name: str) -> Task:
    """Return a built-in task.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; {near(name, TASKS)}")
    return TASKS[name]


def _point_maze(config: behaviours.PointMazeDataConfig, horizon: int) -> Task:
    def maker(path: Path, seed: int, steps: int | None, file: Path | None) -> Store:
        return behaviours.point_maze_store(replace(config, seed=seed, steps=steps or config.steps), path)

    env = behaviours.point_maze_env(config.size)
    name = f"point_maze/{config.size.lower()}-{config.kind}"
    return Task(name, env, SPARSE, 0.99, horizon, config.steps, maker)


def _ant_maze(config: ant_maze.AntMazeDataConfig) -> Task:
    def maker(path: Path, seed: int, steps: int | None, file: Path | None) -> Store:
        return ant_maze.ant_maze_store(replace(config, seed=seed, steps=steps or config.steps), path)

    env = ant_maze.ant_maze_env(config.size)
    name = f"ant_maze/{config.size.lower()}-{config.kind}"
    return Task(name, env, SPARSE, 0.99, ant_maze.LIMITS[config.size], config.steps, maker)


def _ogbench(config: ogbench.OGBenchDataConfig) -> Task:
    def maker(path: Path, seed: int, steps: int | None, file: Path | None) -> Store:
        return ogbench.ogbench_store(replace(config, seed=seed, steps=steps or config.steps), path)

    env = ogbench.ogbench_env(config.task)
    name = f"ogbench/{config.task}-{config.kind}"
    return Task(name, env, COUNTED, 0.99, ogbench.LIMITS[config.task], config.steps, maker, extra="ogbench")


def _door_data(path: Path, seed: int, steps: int | None, file: Path | None) -> Store:
    episodes = adroit.generate_adroit_door(adroit.AdroitDoorDataConfig(str(file), binary=True))
    return Store.from_episodes(episodes, path, spec=adroit.adroit_door_spec(), notes=episodes.notes)


_DOOR = Task(
    name="adroit/door-human",
    env=replace(adroit.DOOR, binary_reward=True),
    rewards=BINARY,
    discount=0.99,
    horizon=300,
    steps=0,
    maker=_door_data,
    needs_file=True,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            _point_maze(behaviours.PointMazeDataConfig(size=size, kind=kind), 600 if size == "Large" else 300)
            for size in get_args(behaviours.Size)
            for kind in get_args(behaviours.Kind)
        ),
        *(
            _ant_maze(ant_maze.AntMazeDataConfig(size=size, kind=kind))
            for size in get_args(behaviours.Size)
            for kind in get_args(behaviours.Kind)
        ),
        *(
            _ogbench(ogbench.OGBenchDataConfig(task=task, kind=kind))
            for task in get_args(ogbench.Task)
            for kind in ("play", "noisy")
        ),
        _DOOR,
    )
}
"""Every built-in task, by name."""
