"""The table of built-in suites. A suite is data: tasks, cases, seeds, and the settings that they share.

Names of suites, tasks and cases are stable: rows of different days and machines are compared by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from steelyard.bench.suite import Overrides, Suite, SuiteCase, Task, merged
from steelyard.config import plain, read_config
from steelyard.envs.behaviours import Kind, PointMazeDataConfig, point_maze_env
from steelyard.errors import ConfigError, near
from steelyard.objectives import OBJECTIVES, CQLConfig
from steelyard.recipes.cal_ql import PRESETS
from steelyard.workflows.control import ControlRun

_CLONES = ("bc",)  # experience of its own teaches it nothing
_ONLINE = ("sac", "rlpd")  # nothing holds their values down where the data are silent
_DISCRETE = "discrete_"  # for discrete actions: not for mazes

# What the two methods with an update-to-data ratio and a warm-up of their own do at each size; all else is shared.
_PACE: dict[str, Overrides] = {
    "smoke": {"utd_ratio": 1.0, "warmup_steps": 10},
    "tiny": {"utd_ratio": 1.0, "warmup_steps": 100},
    "small": {"utd_ratio": 2.0, "warmup_steps": 1_000},
    "paper": {},  # the authors' own: `steelyard.objectives.RUN_DEFAULTS`
}


def offline_to_online(size: str) -> Suite:
    """Every method that can go online after offline updates, on the noisy point maze of the Cal-QL recipe."""
    suite = _point_maze("offline_to_online", size, _kinds((*_CLONES, "sac")), ("noisy",))
    if size != "tiny":
        return suite
    # a third of the recipe's steps, so that all methods fit into some minutes
    short = {"offline_steps": 1_000, "online": {"env_steps": 1_000, "utd_ratio": 0.5}}
    return replace(suite, seeds=(0, 1), run=merged(suite.run, short))


def offline(size: str) -> Suite:
    """Every method that learns from data alone, on play and noisy point-maze data; no online phase."""
    suite = _point_maze("offline", size, _kinds(_ONLINE), ("play", "noisy"))
    suite = replace(suite, run=merged(suite.run, {"online": {"env_steps": 0}}))
    return replace(suite, seeds=(0,), run=merged(suite.run, {"offline_steps": 1_000})) if size == "tiny" else suite


def smoke(size: str) -> Suite:
    """Every continuous method for some 50 updates: does it run at all? Its scores mean nothing."""
    suite = _point_maze("smoke", "tiny", _kinds(()), ("noisy",), "smoke")
    few = {
        "offline_steps": 30,
        "batch_size": 16,
        "online": {"env_steps": 40, "utd_ratio": 0.5},
        "evaluation": {"episodes": 2, "parallel": 2, "every_offline": 0, "every_online": 40},
        "loop": {"log_every": 10, "checkpoint_every": 25},
    }
    data = PointMazeDataConfig(size="UMaze", kind="noisy", action_repeat=6, steps=300, goal_fraction=0.3)
    return replace(suite, seeds=(0,), tasks={"point_maze_umaze": _point_maze_task(data)}, run=merged(suite.run, few))


SUITES: dict[str, Callable[[str], Suite]] = {
    "offline_to_online": offline_to_online,
    "offline": offline,
    "smoke": smoke,
}
"""Size (tiny, small, paper) -> suite, by name."""
SIZES = ("tiny", "small", "paper")


def _kinds(without: tuple[str, ...]) -> list[str]:
    return [kind for kind in OBJECTIVES if kind not in without and not kind.startswith(_DISCRETE)]


def _point_maze_task(data: PointMazeDataConfig) -> Task:
    env = point_maze_env(data.size, data.start, data.goal, data.max_episode_steps, data.action_repeat)
    return Task({"env": plain(env)}, data)


def _point_maze(
    name: str, size: str, kinds: Sequence[str], behaviours: Sequence[Kind], pace: str | None = None
) -> Suite:
    """Return a suite with the settings of a preset of the Cal-QL recipe, wherever it differs from the defaults."""
    preset = PRESETS[size]
    objective = _beyond(plain(preset.cql), plain(CQLConfig())) | {
        "learning_rate": preset.cql.critic_lr,
        "expectile": preset.iql.expectile,
        "inverse_temperature": preset.iql.inverse_temperature,
    }
    online = {"online": _PACE[pace or size]}
    own: dict[str, Overrides] = {"rlpd": {"offline_steps": 0} | online, "wsrl": online}
    return Suite(
        name=name,
        tasks={
            f"point_maze_{preset.prior.size.lower()}_{kind}": _point_maze_task(replace(preset.prior, kind=kind))
            for kind in behaviours
        },
        cases=tuple(SuiteCase(kind, {"kind": kind}, run=own.get(kind, {})) for kind in kinds),
        seeds=preset.seeds,
        run=_beyond(plain(preset.run), plain(ControlRun())),
        objective=objective,
    )


def _beyond(values: Overrides, defaults: Overrides) -> Overrides:
    """Return the values that differ from the defaults."""
    return {
        key: _beyond(value, defaults[key]) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in values.items()
        if value != defaults.get(key)
    }


def find_suite(name: str, size: str | None) -> tuple[Suite, str]:
    """Return a suite of the table or of a file, and the word for it in error messages and directories.

    Raises:
        ConfigError: no such suite, a file that is not one, or a size that does not exist.
    """
    if name.endswith(".json") or Path(name).is_file():
        if size is not None:
            raise ConfigError(f"--size is for the built-in suites; {name} is a file")
        return read_config(Suite, name), name
    if name not in SUITES:
        raise ConfigError(
            f"suite {name!r} is unknown; {near(name, SUITES)} (a suite of your own is a file: my_suite.json)"
        )
    if (size or "tiny") not in SIZES:
        raise ConfigError(f"--size must be one of {', '.join(SIZES)}, found {size!r}")
    return SUITES[name](size or "tiny"), name
