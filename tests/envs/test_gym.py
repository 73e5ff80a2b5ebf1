"""The Gymnasium seam: specs, ends of episodes, exact resume, and errors that name their cause."""

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import tyro

from steelyard.config import from_json, to_json
from steelyard.envs.behaviours import point_maze_env
from steelyard.envs.gym import EnvConfig, VectorEnv, flatten, make, render_episode, spec_of
from steelyard.errors import ConfigError, DataError, MissingExtraError, NonFiniteError, SteelyardError

PENDULUM = EnvConfig("Pendulum-v1", max_episode_steps=30)


class Toy(gymnasium.Env):
    """A counter with switches for what can go wrong."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, fault: str = "none"):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        start = np.random.standard_normal() if self.fault == "global_reset" else self.np_random.standard_normal()
        self.state = np.array([start, 0.0])
        return self.state.copy(), {}

    def step(self, action):
        self.steps += 1
        action *= 0.5  # in place, as a careless environment may
        self.state += action[0]
        if self.fault == "noise":
            self.state += np.random.default_rng().standard_normal()
        if self.fault == "nan" and self.steps == 3:
            self.state[1] = np.nan
        reward = np.inf if self.fault == "reward" else float(self.steps == 4)
        return self.state.copy(), reward, self.steps == 6, False, {"is_success": self.steps == 2}


@pytest.fixture(autouse=True)
def toy():
    gymnasium.register("Toy-v0", entry_point=Toy)
    yield
    del gymnasium.registry["Toy-v0"]


def toy_config(fault="none", **changes):
    return EnvConfig("Toy-v0", kwargs={"fault": fault}, **changes)


def random_actions(vector, steps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (steps, vector.num_envs, *vector.spec.actions.shape)).astype(np.float32)


def play(vector, actions):
    """Step and reset; return every result as bytes, for comparison bit for bit."""
    rows = []
    for action in actions:
        vector.reset_done()
        result = vector.step(action)
        rows.append([result.observations.tobytes(), result.rewards.tobytes(), result.done.tobytes()])
    return rows


def assert_resumes(config, num_envs=3, before=25, after=25):
    first, second = VectorEnv(config, num_envs, 3, "train/env"), VectorEnv(config, num_envs, 3, "train/env")
    actions = random_actions(first, before + after)
    play(first, actions[:before])
    snapshot = first.snapshot()
    assert all(isinstance(value, np.ndarray) for value in snapshot.values())
    expected = play(first, actions[before:])
    play(second, actions[: before // 2])  # a used vector must resume as well as a new one
    second.restore(snapshot)
    assert play(second, actions[before:]) == expected
    assert (second.next_episode, second.env_step) == (first.next_episode, first.env_step)


def test_plain_gymnasium_environment_works():
    vector = VectorEnv(PENDULUM, 2, 0, "eval")
    assert vector.spec.observations["observation"].shape == (3,)
    assert vector.spec.actions.low == (-2.0,)
    first = vector.reset_all()
    assert first.dtype == np.float32
    assert first.shape == (2, 3)
    for _ in range(29):
        assert not vector.step(np.zeros((2, 1))).done.any()
    result = vector.step(np.zeros((2, 1)))
    assert result.truncated.all()
    assert not result.terminated.any()
    assert result.success is None
    assert_resumes(PENDULUM)


def test_discrete_actions():
    config = EnvConfig("CartPole-v1", success="terminated")
    vector = VectorEnv(config, 1, 0, "eval")
    assert vector.spec.num_actions == 2
    assert vector.spec.actions.shape == ()
    vector.reset_all()
    while not vector.done[0]:
        result = vector.step(np.array([1]))
    assert result.terminated[0]
    assert result.success[0]
    vector.reset_all()
    with pytest.raises(SteelyardError, match=r"integers in \[0, 2\)"):
        vector.step(np.array([2]))
    snapshot = vector.snapshot()
    assert snapshot["actions.0"].shape == (0,)


def test_no_hidden_reset_and_termination_is_not_truncation():
    vector = VectorEnv(toy_config(max_episode_steps=6), 1, 0, "eval")
    start = vector.reset_all()
    for step in range(1, 7):
        result = vector.step(np.full((1, 1), 0.5, np.float32))
        np.testing.assert_allclose(result.observations, start + 0.25 * step, rtol=1e-6)
    # the time limit and the end of the task fall on the same step: it is an end
    assert result.terminated[0]
    assert not result.truncated[0]
    with pytest.raises(SteelyardError, match="its episode is over"):
        vector.step(np.zeros((1, 1)))
    assert not np.array_equal(vector.reset_done(), result.observations)


def test_initial_states_depend_on_seed_stream_and_episode_only():
    one, three = VectorEnv(toy_config(), 1, 0, "eval"), VectorEnv(toy_config(), 3, 0, "eval")
    singles = [one.reset_all()[0, 0] for _ in range(3)]
    assert three.reset_all()[:, 0].tolist() == singles
    assert three.reset_all()[:, 0].tolist() != singles
    assert three.reset_all(first_episode=0)[:, 0].tolist() == singles
    assert VectorEnv(toy_config(), 1, 1, "eval").reset_all()[0, 0] != singles[0]
    assert VectorEnv(toy_config(), 1, 0, "train").reset_all()[0, 0] != singles[0]


def test_inactive_environments_stand_still():
    vector = VectorEnv(toy_config(), 2, 0, "eval")
    start = vector.reset_all()
    actions = np.array([[1.0], [np.nan]])
    result = vector.step(actions, active=np.array([True, False]))
    assert result.observations[0, 0] != start[0, 0]
    assert result.observations[1].tobytes() == start[1].tobytes()
    assert vector.env_step == 1


@pytest.mark.parametrize(("rule", "step"), [("info", 2), ("positive_reward", 4), ("terminated", 6)])
def test_success_rules(rule, step):
    vector = VectorEnv(toy_config(success=rule), 1, 0, "eval")
    vector.reset_all()
    found = [bool(vector.step(np.zeros((1, 1))).success[0]) for _ in range(6)]
    assert found == [number >= step for number in range(1, 7)]  # once reached, an episode stays a success


def test_binary_reward_ends_at_success():
    vector = VectorEnv(toy_config(success="info", binary_reward=True), 1, 0, "eval")
    vector.reset_all()
    first, second = vector.step(np.zeros((1, 1))), vector.step(np.zeros((1, 1)))
    assert (first.rewards[0], first.terminated[0], first.success[0]) == (-1.0, False, False)
    assert (second.rewards[0], second.terminated[0], second.success[0]) == (0.0, True, True)


def test_missing_success_entry_is_named():
    vector = VectorEnv(EnvConfig("Pendulum-v1", success="info"), 1, 0, "eval")
    vector.reset_all()
    with pytest.raises(ConfigError, match="neither 'success' nor 'is_success'"):
        vector.step(np.zeros((1, 1)))


def test_bad_values_raise():
    vector = VectorEnv(toy_config("nan"), 2, 0, "eval")
    vector.reset_all()
    for bad in (np.nan, np.inf):
        with pytest.raises(NonFiniteError, match="environment step 0"):
            vector.step(np.array([[0.0], [bad]]))
    with pytest.raises(SteelyardError, match="outside the action space"):
        vector.step(np.array([[0.0], [1.1]]))
    with pytest.raises(SteelyardError, match="have shape"):
        vector.step(np.zeros((2, 3)))
    vector.step(np.array([[0.0], [1 + 5e-6]]))  # rounding is clipped
    assert vector.snapshot()["actions.1"].max() == 1.0
    vector.step(np.zeros((2, 1)))
    with pytest.raises(NonFiniteError, match="element 1"):
        vector.step(np.zeros((2, 1)))
    vector = VectorEnv(toy_config("reward"), 1, 0, "eval")
    vector.reset_all()
    with pytest.raises(NonFiniteError, match="returned reward inf"):
        vector.step(np.zeros((1, 1)))


def test_resume_is_exact():
    assert_resumes(toy_config(), before=9)  # 9 = in the middle of the second episode


def test_resume_before_the_first_and_after_the_last_step():
    vector, again = VectorEnv(toy_config(), 2, 0, "eval"), VectorEnv(toy_config(), 2, 0, "eval")
    again.restore(vector.snapshot())
    assert again.done.all()
    vector.reset_all()
    for _ in range(6):
        vector.step(np.ones((2, 1)))
    again.restore(vector.snapshot())
    assert again.done.all()
    assert again.reset_done().tobytes() == vector.reset_done().tobytes()


def test_environment_that_does_not_repeat_itself_is_refused():
    vector = VectorEnv(toy_config("noise"), 1, 0, "eval")
    vector.reset_all()
    vector.step(np.zeros((1, 1)))
    with pytest.raises(DataError, match="'Toy-v0' is not deterministic"):
        vector.restore(vector.snapshot())
    with pytest.raises(DataError, match="does not fit 2 environments"):
        VectorEnv(toy_config(), 2, 0, "eval").restore(vector.snapshot())


def test_resets_that_draw_from_the_global_generator_repeat_and_leave_it_alone():
    np.random.seed(5)
    expected = np.random.standard_normal(2)
    np.random.seed(5)
    found = [np.random.standard_normal()]
    vector = VectorEnv(toy_config("global_reset"), 1, 0, "eval")
    first = vector.reset_all()
    found.append(np.random.standard_normal())
    assert found == expected.tolist()
    assert vector.reset_all(first_episode=0).tobytes() == first.tobytes()


def test_unknown_ids_and_arguments():
    with pytest.raises(ConfigError, match=r"'Pendulm-v1' is not registered; near ones are .*Pendulum-v1"):
        make(EnvConfig("Pendulm-v1"))
    with pytest.raises(ConfigError, match="no_such_package"):
        make(EnvConfig("no_such_package:Thing-v0"))
    with pytest.raises(ConfigError, match=r"does not take all of \['colour'\]"):
        make(EnvConfig("Pendulum-v1", kwargs={"colour": "red"}))
    with pytest.raises(ConfigError, match="must be null"):
        VectorEnv(EnvConfig("Pendulum-v1", observation_keys=("observation",)), 1, 0, "eval")
    with pytest.raises(ConfigError, match="expected Box"):
        VectorEnv(EnvConfig("FrozenLake-v1"), 1, 0, "eval")
    with pytest.raises(ConfigError, match="pin_goal needs a maze"):
        make(EnvConfig("Pendulum-v1", pin_goal=True))


def test_missing_simulator_is_named(monkeypatch):
    import steelyard.envs.gym as seam

    def absent(module, extra):
        raise MissingExtraError(f"{module} is not installed; install it with: pip install 'steelyard[{extra}]'")

    monkeypatch.setattr(seam, "require", absent)
    monkeypatch.setattr(gymnasium, "registry", {})
    with pytest.raises(MissingExtraError, match=r"pip install 'steelyard\[sim\]'"):
        make(EnvConfig("PointMaze_Medium-v3"))


def test_config_round_trip_and_command_line():
    config = point_maze_env("Medium")
    assert from_json(EnvConfig, to_json(config)) == config
    parsed = tyro.cli(EnvConfig, args=["--id", "Pendulum-v1", "--max-episode-steps", "9", "--success", "none"])
    assert parsed == EnvConfig("Pendulum-v1", max_episode_steps=9)


@pytest.mark.sim
def test_dict_observations():
    config = EnvConfig("PointMaze_UMaze-v3")
    with pytest.raises(ConfigError, match=r"some of \['achieved_goal', 'desired_goal', 'observation'\]"):
        VectorEnv(config, 1, 0, "eval")
    with pytest.raises(ConfigError, match="no observation 'goal'"):
        VectorEnv(EnvConfig("PointMaze_UMaze-v3", observation_keys=("goal",)), 1, 0, "eval")
    config = EnvConfig("PointMaze_UMaze-v3", observation_keys=("desired_goal", "observation"))
    env = make(config)
    observation, _ = env.reset(seed=0)
    flat = flatten(observation, config)
    np.testing.assert_array_equal(flat[:2], observation["desired_goal"].astype(np.float32))
    np.testing.assert_array_equal(flat[2:], observation["observation"].astype(np.float32))
    spec = spec_of(env, config)
    assert {key: entry.shape for key, entry in spec.observations.items()} == {"desired_goal": (2,), "observation": (4,)}
    assert spec.actions.low == (-1.0, -1.0)


ANT = EnvConfig(
    "AntMaze_UMaze-v4", kwargs={"continuing_task": False}, observation_keys=("achieved_goal", "observation")
)
DOOR = EnvConfig("AdroitHandDoor-v1", success="info")


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize(
    ("config", "observations", "actions"),
    [
        (ANT, 29, 8),
        (DOOR, 39, 28),
        (EnvConfig("AdroitHandPen-v1", success="info"), 45, 24),
        (EnvConfig("AdroitHandHammerSparse-v1", success="info", binary_reward=True), 46, 26),
        (EnvConfig("AdroitHandRelocateSparse-v1", success="info", binary_reward=True), 39, 30),
    ],
    ids=lambda value: value.id if isinstance(value, EnvConfig) else "",
)
def test_ant_mazes_and_adroit_by_their_ids(config, observations, actions):
    vector = VectorEnv(config, 1, 0, "eval")
    assert vector.reset_all().shape == (1, observations)
    for action in random_actions(vector, 3):
        result = vector.step(action)
    assert action.shape == (1, actions)
    if config.binary_reward:
        assert result.rewards[0] == -1.0


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("config", [point_maze_env("Medium", max_episode_steps=20), ANT, DOOR], ids=lambda c: c.id)
def test_simulators_resume_exactly(config):
    assert_resumes(config, before=30)


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_goal_of_an_ant_maze_can_be_pinned():
    options = {"goal_cell": [3, 1], "reset_cell": [1, 1]}
    config = EnvConfig(
        "AntMaze_UMaze-v4", reset_options=options, observation_keys=("desired_goal", "achieved_goal"), pin_goal=True
    )
    vector = VectorEnv(config, 3, 0, "eval")
    first = vector.reset_all()
    maze = vector.envs[0].unwrapped.maze
    np.testing.assert_array_equal(first[:, :2], np.tile(maze.cell_rowcol_to_xy([3, 1]), (3, 1)))
    assert [maze.cell_xy_to_rowcol(row[2:]).tolist() for row in first] == [[1, 1]] * 3


@pytest.mark.sim
def test_a_setting_that_mujoco_cannot_load_with_is_one_sentence():
    code = "from steelyard.envs.gym import EnvConfig, make; make(EnvConfig('PointMaze_UMaze-v3'))"
    work = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": "nothing"}, capture_output=True, text=True
    )
    assert "SteelyardError: MuJoCo cannot be loaded with MUJOCO_GL=nothing" in work.stderr


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the viewer's own destructor
def test_render(monkeypatch):
    config = point_maze_env("UMaze", max_episode_steps=4)
    make(config).close()  # loads mujoco, which reads the setting once
    monkeypatch.setenv("MUJOCO_GL", "nothing")

    def still(observations):
        return np.zeros((len(observations), 2))

    with pytest.raises(SteelyardError, match="MUJOCO_GL=nothing"):
        render_episode(config, still, seed=0, width=32, height=32)
    monkeypatch.delenv("MUJOCO_GL")
    try:
        frames = render_episode(config, still, seed=0, every=2, width=48, height=32)
    except SteelyardError as error:
        pytest.skip(f"no OpenGL here: {error}")
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 3
    assert frames[0].std() > 1
