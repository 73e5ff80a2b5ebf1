"""The artefact acts as the learner did, from whichever directory it is read, without data or environment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steelyard
from steelyard.artefact import ControlArtefact, find, load, load_learner
from steelyard.config import plain
from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import ArraySpec, Episode, Spec
from steelyard.data.store import Store
from steelyard.errors import CheckpointError, DataError
from steelyard.objectives import BCConfig, build_learner
from steelyard.objectives.actor_critic import DataStatistics
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.online import OnlineConfig
from steelyard.workflows import control
from train.tiny import NETWORK, OBJECTIVES, POINT, point_run, point_store

STATES = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "store"
    point_store(path)
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return (run directory, the learner as the loop left it)."""
    kept = {}
    original = control.build_learner

    def remembered(*args):
        kept["learner"] = original(*args)
        return kept["learner"]

    config = point_run(
        data,
        OBJECTIVES["cal_ql"],
        offline_steps=20,
        online=OnlineConfig(env_steps=0),
        evaluation=control.EvaluationConfig(episodes=1, parallel=1, every_offline=14),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "build_learner", remembered)
        run = control.start(config, tmp_path_factory.mktemp("run") / "run", quiet=True)
    return run, kept["learner"]


def offline_run(store, folder, objective, **changes):
    config = point_run(store, objective, env=None, offline_steps=4, online=OnlineConfig(env_steps=0), **changes)
    return control.start(config, folder, quiet=True)


def test_every_directory_of_a_run_is_the_artefact(trained):
    run, learner = trained
    last = checkpoint.last(run / "checkpoints")
    expected = learner.policy().act(torch.from_numpy(STATES), torch_generator(0, "x"), "mean").numpy()
    for path in (run, str(run), last, last / "pretrained"):
        policy = load(path)
        np.testing.assert_array_equal(policy(STATES), expected)
        assert policy.env == POINT
        assert policy.spec.actions.shape == (1,)


def test_load_is_a_name_of_the_package():
    assert steelyard.load is load


def test_last_and_best(trained):
    run, _ = trained
    assert find(run, "last").name == "step_00000020"
    assert find(run, "best") == checkpoint.best(run / "checkpoints")
    load(run, "best")


def test_samples_are_those_of_the_learner(trained):
    run, learner = trained
    policy, states = load(run), torch.from_numpy(STATES)
    for call in range(2):
        expected = learner.policy().act(states, torch_generator(7, "act", call), "sample").numpy()
        np.testing.assert_array_equal(policy(STATES, mode="sample", seed=7), expected)
    assert not np.array_equal(policy(STATES, "sample"), policy(STATES, "sample"))
    np.testing.assert_array_equal(policy(STATES), policy(STATES))


def test_all_weights_are_the_learners(trained):
    run, learner = trained
    found, artefact = load_learner(run)
    assert isinstance(artefact, ControlArtefact)
    assert not found.training
    for name, value in learner.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_one_observation_or_a_batch(trained):
    policy = load(trained[0])
    batch = policy(STATES)
    assert (batch.shape, batch.dtype) == ((5, 1), np.float32)
    for state, action in zip(STATES, batch, strict=True):
        single = policy(state)
        assert single.shape == (1,)
        np.testing.assert_allclose(single, action, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy(STATES.astype(np.float64)), batch, rtol=1e-6)
    np.testing.assert_array_equal(policy({"observation": STATES[0]}), policy(STATES[0]))
    assert (np.abs(policy(100 * STATES)) <= 1).all()


def test_values_are_the_critics(trained):
    run, learner = trained
    actions = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    zeros, states = torch.zeros(5), torch.from_numpy(STATES)
    expected = learner.score(TransitionBatch(states, torch.from_numpy(actions), zeros, states, zeros, zeros, zeros))
    values = load(run).value(STATES, actions)
    assert values.shape == (5,)
    np.testing.assert_array_equal(values, expected.numpy())


def test_a_wrong_shape_is_one_sentence(trained):
    policy = load(trained[0])
    for bad in (np.zeros(3), np.zeros((4, 3)), np.zeros(()), np.zeros((2, 1))):
        with pytest.raises(DataError, match=r"^observation has shape \(.*\), expected \[2\] or \[B, 2\]$"):
            policy(bad)
    with pytest.raises(DataError, match=r"^observation lacks 'observation'; the policy needs \['observation'\]$"):
        policy({"state": STATES[0]})


def test_a_policy_without_critic_says_so(data, tmp_path):
    policy = load(offline_run(data, tmp_path / "run", BCConfig(network=NETWORK)))
    assert policy(STATES).shape == (5, 1)
    with pytest.raises(CheckpointError, match=r"^BC has no critic to value actions with$"):
        policy.value(STATES, np.zeros((5, 1), np.float32))
    policy.reset()


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A policy on dict observations, whose keys are concatenated in the order that the config gives."""
    folder, rng = tmp_path_factory.mktemp("nested"), np.random.default_rng(1)
    episodes = [
        Episode(
            {
                "arm": rng.normal(size=(6, 2, 2)).astype(np.float32),
                "goal": 5 + rng.normal(size=(6, 1)).astype(np.float32),
                "noise": rng.normal(size=(6, 3)).astype(np.float32),
            },
            rng.uniform(-1, 1, (5, 2)).astype(np.float32),
            rng.normal(size=5),
            terminated=False,
            truncated=True,
        )
        for _ in range(4)
    ]
    spec = Spec(episodes[0].spec.observations, ArraySpec((2,), "float32", (-1.0, -3.0), (1.0, 3.0)))
    Store.from_episodes(episodes, folder / "store", spec=spec)
    source = control.DataConfig(str(folder / "store"), observation_keys=("goal", "arm"))
    return load(offline_run(folder / "store", folder / "run", OBJECTIVES["iql"], data=source))


def test_dict_observations(nested):
    rng = np.random.default_rng(2)
    arm, goal = rng.normal(size=(2, 2)).astype(np.float32), rng.normal(size=1).astype(np.float32)
    expected = nested(np.concatenate([goal, arm.ravel()]))
    assert expected.shape == (2,)
    np.testing.assert_array_equal(nested({"arm": arm, "goal": goal}), expected)
    np.testing.assert_array_equal(nested({"noise": np.zeros(3), "goal": goal, "arm": arm}), expected)
    with pytest.raises(DataError, match=r"^observation lacks 'goal'; the policy needs \['goal', 'arm'\]$"):
        nested({"arm": arm})


def test_a_batch_of_dict_observations(nested):
    rng = np.random.default_rng(2)
    arms, goals = rng.normal(size=(4, 2, 2)).astype(np.float32), rng.normal(size=(4, 1)).astype(np.float32)
    expected = nested(np.concatenate([goals, arms.reshape(4, -1)], axis=1))
    np.testing.assert_array_equal(nested({"arm": arms, "goal": goals}), expected)


@pytest.mark.parametrize(
    "shapes", [((2, 2), (2,)), ((2, 3), (1,)), ((4, 2, 2), (3, 1)), ((4, 2, 2), (1,)), ((2,), (1,))]
)
def test_a_wrong_shape_in_a_dict_is_one_sentence(shapes, nested):
    arm, goal = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(DataError) as caught:
        nested({"arm": arm, "goal": goal})
    assert "\n" not in str(caught.value)
    assert re.search("shape|batch size", str(caught.value))


def test_what_is_no_artefact_is_one_sentence(trained, tmp_path):
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint with an evaluation score in it"):
        load(tmp_path, "best")


def test_weights_of_another_config_are_refused(tmp_path, data):
    spec = Store.open(data).spec
    statistics = DataStatistics(torch.zeros(2), torch.ones(2), 0.0)
    learner = build_learner(spec, OBJECTIVES["cal_ql"], statistics, torch_generator(0, "x"))
    path = checkpoint.save(
        tmp_path,
        1,
        config=plain(ControlArtefact(OBJECTIVES["iql"], spec)),
        model=learner.state_dict(),
        optimizers={},
        source={},
        state={},
    )
    with pytest.raises(CheckpointError, match="weights do not fit the config; first mismatch"):
        load(path)


def test_no_environment_and_no_data_are_needed(trained, tmp_path):
    """In a process of its own that knows neither the environment nor the data: what is deployed."""
    run, _ = trained
    script = tmp_path / "act.py"
    script.write_text(
        "import sys, gymnasium, numpy as np\n"
        "def forbidden(*args, **kwargs): raise AssertionError('an environment was made')\n"
        "gymnasium.make = gymnasium.register_envs = forbidden\n"
        "import steelyard.artefact\n"
        "policy = steelyard.artefact.load(sys.argv[1])\n"
        "assert policy.env.id not in gymnasium.registry\n"
        "assert 'gymnasium_robotics' not in sys.modules and 'mujoco' not in sys.modules\n"
        "np.save(sys.argv[2], policy(np.load(sys.argv[3])))\n"
    )
    np.save(tmp_path / "states.npy", STATES)
    arguments = [run, tmp_path / "actions.npy", tmp_path / "states.npy"]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=Path(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), load(run)(STATES))
