"""Worlds of HyRe's point maze, the study's settings, and the data of every world.

A world is a shift of the actuators and a goal. Demonstrators who know their world give the prior data. Unseen worlds
give labelled steps (of a demonstrator) and rewarded steps (of random actions): labels come from the first half of a
world's demonstrations, action errors are measured on the other half.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steelyard.adapt.control import transitions
from steelyard.config import Config, require_positive
from steelyard.data.batch import TransitionBatch
from steelyard.data.returns import RewardConfig
from steelyard.data.store import Store
from steelyard.envs.behaviours import Cell, PointMazeDataConfig, PointSize
from steelyard.envs.shifted_maze import Shift, random_steps_store, shifted_maze_env, shifted_maze_store
from steelyard.errors import ConfigError, DataError
from steelyard.objectives.control_heads import ControlHeadsConfig
from steelyard.rng import derive_seed, numpy_generator

REWARDS = RewardConfig(scale=1.0, bias=-1.0, horizon="sparse", step_reward=0.0)
"""Every step costs 1 until the goal."""


@dataclass(frozen=True)
class World:
    """One maze to act in.

    Attributes:
        kind: how it relates to the worlds of training.
        shift: of the actuators.
        goal: None: the maze's own.
    """

    kind: str
    shift: Shift = field(default_factory=Shift)
    goal: Cell | None = None


BETWEEN, BEYOND, GOAL, BOTH = "dynamics between", "dynamics beyond", "new goal", "dynamics and goal"
KINDS = (BETWEEN, BEYOND, GOAL, BOTH)
TRAINED = "trained"
WORLDS: dict[str, World] = {
    "as it was": World(TRAINED),
    "turned 90": World(TRAINED, Shift(rotation=90)),
    "turned 180": World(TRAINED, Shift(rotation=180)),
    "turned 270": World(TRAINED, Shift(rotation=270)),
    "exchanged": World(TRAINED, Shift(swapped=True)),
    "exchanged, turned 90": World(TRAINED, Shift(rotation=90, swapped=True)),
    "half the force": World(TRAINED, Shift(gain=0.5)),
    "wind +x": World(TRAINED, Shift(wind=(0.4, 0.0))),
    "wind -x": World(TRAINED, Shift(wind=(-0.4, 0.0))),
    "wind +y": World(TRAINED, Shift(wind=(0.0, 0.4))),
    "wind -y": World(TRAINED, Shift(wind=(0.0, -0.4))),
    **{f"goal {r},{c}": World(TRAINED, goal=(r, c)) for r, c in ((1, 1), (1, 6), (4, 1), (6, 1), (3, 3), (4, 6), (6, 3),
       (2, 5))},
    "turned 45": World(BETWEEN, Shift(rotation=45)),
    "turned 135": World(BETWEEN, Shift(rotation=135)),
    "turned 225": World(BETWEEN, Shift(rotation=225)),
    "turned 300": World(BETWEEN, Shift(rotation=300)),
    "wind +x+y": World(BETWEEN, Shift(wind=(0.25, 0.25))),
    "exchanged, turned 45": World(BETWEEN, Shift(rotation=45, swapped=True)),
    "wind +x, strong": World(BEYOND, Shift(wind=(0.6, 0.0))),
    "a third of the force": World(BEYOND, Shift(gain=0.35)),
    "exchanged, turned 180": World(BEYOND, Shift(rotation=180, swapped=True)),
    "turned 90, wind -x": World(BEYOND, Shift(rotation=90, wind=(-0.3, 0.0))),
    **{f"goal {r},{c}": World(GOAL, goal=(r, c)) for r, c in ((2, 1), (4, 4), (5, 3), (2, 6), (6, 5), (4, 2))},
    "goal 4,6, turned 90": World(BOTH, Shift(rotation=90), (4, 6)),
    "goal 3,3, wind +x": World(BOTH, Shift(wind=(0.4, 0.0)), (3, 3)),
    "turned 60": World("validation", Shift(rotation=60)),
    "turned 200": World("validation", Shift(rotation=200)),
    "wind -x+y": World("validation", Shift(wind=(-0.3, 0.3))),
    "two thirds of the force": World("validation", Shift(gain=0.7)),
    "goal 1,2": World("validation", goal=(1, 2)),
    "goal 5,6": World("validation", goal=(5, 6)),
}  # fmt: skip
"""Every world of the study, by name."""


def worlds_of(*kinds: str) -> tuple[str, ...]:
    """Return the names of the worlds of some kinds."""
    return tuple(name for name, world in WORLDS.items() if world.kind in kinds)


@dataclass(frozen=True)
class MazeStudy(Config):
    """HyRe over policies and critics in point mazes with changed dynamics and goals."""

    size: PointSize = "Medium"
    """Maze."""
    action_repeat: int = 4
    """Simulator steps for which each action is held."""
    training: tuple[str, ...] = worlds_of(TRAINED)
    """Worlds of the prior data: one head each."""
    validation: tuple[str, ...] = worlds_of("validation")
    """Worlds on which settings are chosen."""
    targets: tuple[str, ...] = worlds_of(*KINDS)
    """Unseen worlds of the tables."""
    prior_steps: int = 1_000
    """Steps of prior data of each world."""
    prior_noise: float = 0.4
    """Standard deviation of the noise on the forces of prior data."""
    label_steps: int = 300
    """Steps of demonstrations of each unseen world; labels are drawn from the first half of their episodes."""
    label_noise: float = 0.2
    """Standard deviation of the noise on the forces of demonstrations."""
    heads: ControlHeadsConfig = field(default_factory=lambda: ControlHeadsConfig(hidden=(128, 128), expectile=0.7))
    """Networks and learning rate."""
    updates: int = 3_000
    """Updates of the heads."""
    group_batch: int = 12
    """Transitions of each world in a batch."""
    shots: tuple[int, ...] = (1, 2, 5, 20)
    """Labelled or rewarded steps to adapt with."""
    episodes: int = 6
    """Episodes per method, number of steps, world and seed."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of weights, batches, drawn steps and starts; the prior data are the same for all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "prior_steps", "label_steps", "updates", "group_batch", "shots", "episodes")
        names = (*self.training, *self.validation, *self.targets)
        if unknown := [name for name in names if name not in WORLDS]:
            raise ConfigError(f"no world is named {unknown[0]!r}; there are {', '.join(map(repr, WORLDS))}")
        if len(set(names)) < len(names):
            raise ConfigError("training, validation and targets must be different worlds: one is named twice")


@dataclass(frozen=True)
class DataJob:
    """The data of one world."""

    study: MazeStudy
    out: str
    world: str

    @property
    def name(self) -> str:
        """What the progress line says."""
        return f"data {self.world}"


@dataclass(frozen=True)
class SeedJob:
    """Everything of one seed."""

    study: MazeStudy
    out: str
    seed: int

    @property
    def name(self) -> str:
        """What the progress line says."""
        return f"seed {self.seed}"


def make_data(job: DataJob) -> list[dict[str, Any]]:
    """Play the demonstrator of a world, and in unseen worlds random actions too; return how many steps there are."""
    study, world = job.study, WORLDS[job.world]
    seed = derive_seed(0, f"hyre_maze/{job.world}") % 2**31
    trained = job.world in study.training
    config = PointMazeDataConfig(
        size=study.size,
        kind="diverse",
        steps=study.prior_steps if trained else study.label_steps,
        goal=world.goal,
        action_repeat=study.action_repeat,
        goal_fraction=1.0,
        noise=study.prior_noise if trained else study.label_noise,
        seed=seed,
    )
    folder = data_folder(job.out, job.world)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    demonstrations = shifted_maze_store(config, world.shift, folder / "demonstrations")
    row = {"world": job.world, "kind": world.kind, "demonstrated": demonstrations.num_steps, "random": 0}
    if not trained:
        env = shifted_maze_env(study.size, world.shift, world.goal, action_repeat=study.action_repeat)
        row["random"] = random_steps_store(env, study.label_steps, seed, folder / "random").num_steps
    return [row]


def data_folder(out: str, world: str) -> Path:
    """Return where the data of a world lie."""
    return Path(out) / "data" / world.replace(" ", "_").replace(",", "")


@dataclass(frozen=True)
class Steps:
    """Steps of one unseen world.

    Attributes:
        name: of the world.
        labelled: demonstrated steps that labels are drawn from.
        held_out: demonstrated steps of other episodes.
        random: steps of random actions.
    """

    name: str
    labelled: TransitionBatch
    held_out: TransitionBatch
    random: TransitionBatch

    def drawn(self, n: int, seed: int, number: int = 0) -> tuple[TransitionBatch, TransitionBatch]:
        """Return n labelled steps and n of random actions; those of a smaller n are among those of a larger one."""
        found = []
        for what, steps in (("labels", self.labelled), ("random", self.random)):
            generator = numpy_generator(seed, f"hyre_maze/{what}/{self.name}", number)
            found.append(rows_of(steps, generator.permutation(len(steps))[:n]))
        return found[0], found[1]


def rows_of(steps: TransitionBatch, rows: npt.NDArray[np.int64]) -> TransitionBatch:
    """Return some steps."""
    return TransitionBatch(**{name: value[torch.from_numpy(rows)] for name, value in steps.tensors().items()})


def read_steps(study: MazeStudy, out: str, world: str) -> Steps:
    """Read the steps of an unseen world."""
    folder = data_folder(out, world)
    store = Store.open(folder / "demonstrations")
    if store.num_episodes < 2:
        raise DataError(f"{folder}: one episode cannot be labelled and held out; found one, raise label_steps")
    found = transitions(store, REWARDS, study.heads.discount)
    middle = int(store.starts[(store.num_episodes + 1) // 2])
    rows = np.arange(len(found))
    random = transitions(Store.open(folder / "random"), REWARDS, study.heads.discount)
    return Steps(world, rows_of(found, rows[:middle]), rows_of(found, rows[middle:]), random)


def read_prior(study: MazeStudy, out: str, world: str) -> TransitionBatch:
    """Read the prior data of a training world."""
    return transitions(Store.open(data_folder(out, world) / "demonstrations"), REWARDS, study.heads.discount)
