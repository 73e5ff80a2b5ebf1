"""Promise P6: a run that is killed at any moments, however often, ends bit for bit like one that never was."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from steelyard.artefact import load
from steelyard.config import from_json
from steelyard.data.store import Store
from steelyard.envs.gym import EnvConfig, make, spec_of
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.objectives import BCConfig, SACConfig
from steelyard.train import checkpoint
from steelyard.train.loop import Interrupted
from steelyard.train.online import OnlineConfig, OnlineSource
from steelyard.train.rundir import RunDir
from steelyard.workflows import control
from train.tiny import NETWORK, OBJECTIVES, Point, point_run, point_store

from .kill import Life, differences, everything, kill_until_done, undisturbed, valid_checkpoint_or_none

OFFLINE = {"env": None, "online": OnlineConfig(env_steps=0), "offline_steps": 10}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "store"
    point_store(path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(objective, data, tmp_path):
    config = point_run(data, OBJECTIVES[objective])
    undisturbed(config, tmp_path / "whole")
    hits, had_one = [], False
    # once in each kind of work, then resumed to the end
    for place, saved in (("offline update", 2), ("checkpoint", 2), ("collecting", 0), ("checkpoint", 2)):
        life = Life(config, tmp_path / "killed")
        hits.append(life.killed_at(place, 0.003, saved))
        had_one = valid_checkpoint_or_none(tmp_path / "killed", had_one)
        assert had_one
    Life(config, tmp_path / "killed").finish()
    assert None not in hits, "a kill came after the end: it tested nothing"
    assert hits[-1][1], "no kill hit the online phase"
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "killed")) == []


def test_the_comparison_sees_a_single_bit(data, tmp_path):
    config = point_run(data, offline_steps=4, online=OnlineConfig(env_steps=30))
    undisturbed(config, tmp_path / "run")
    whole = everything(tmp_path / "run")
    undisturbed(replace(config, seed=4), tmp_path / "other")
    other = set(differences(whole, everything(tmp_path / "other")))
    # what a resume could get wrong must be in the comparison at all
    for part in ("model multiplier.raw", "optimizers multiplier/0/exp_avg", "source buffer.returns_to_go"):
        assert part in whole
        assert part in other
    assert {"metrics.jsonl", "eval.jsonl", "train_episodes.jsonl", "calibration.jsonl"} <= other
    assert any(name.startswith("source env.actions") for name in whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_random_kills(data, tmp_path):
    """Many runs are killed and resumed until they are done, 200 kills in all; every one of them must end exactly."""
    rng, kills, finished, hits, unequal = random.Random(0), 200, Counter(), Counter(), {}
    configs = {name: point_run(data, objective) for name, objective in OBJECTIVES.items()}
    seconds = {name: undisturbed(config, tmp_path / name) for name, config in configs.items()}
    whole = {name: everything(tmp_path / name) for name in configs}
    number = 0
    while sum(hits.values()) < kills:
        name = list(configs)[number % 2]
        folder = tmp_path / f"killed {number}"
        hits += kill_until_done(configs[name], folder, rng, seconds[name], kills - sum(hits.values()))
        if wrong := differences(whole[name], everything(folder)):
            unequal[f"run {number} ({name})"] = wrong  # go on: how often it happens is part of the answer
        finished[name] += 1
        number += 1
        shutil.rmtree(folder)
    runs = sum(finished.values())
    print(f"\n{sum(hits.values())} kills in {runs} runs {dict(finished)}; exact: {runs - len(unequal)}; not: {unequal}")
    places = Counter()
    for (place, online), count in sorted(hits.items()):
        places[place] += count
        places["online phase"] += count * online
        print(f"  {count:4d}  {place}, {'online' if online else 'offline'} phase")
    assert unequal == {}
    assert sum(hits.values()) == kills
    assert min(finished.values()) >= 2
    # the kills must not all land where nothing can go wrong
    for place in ("offline update", "online update", "collecting", "checkpoint", "evaluation"):
        assert places[place] >= 5, places
    assert places["online phase"] >= 50


def test_a_kill_in_the_last_clean_up_is_tidied(data, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    original = checkpoint._remove

    def remove(path):
        if checkpoint.last(path.parent).name == "step_00000010":
            raise KilledError
        original(path)

    config = point_run(data, **OFFLINE)
    control.start(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_remove", remove)
        with pytest.raises(KilledError):
            control.start(config, tmp_path / "killed", quiet=True)
    control.resume(tmp_path / "killed", quiet=True)
    names = {
        name: sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "killed")
    }
    assert names["killed"] == names["whole"] == ["step_00000010"]


@pytest.mark.sim
def test_resume_in_the_middle_of_a_maze_episode(tmp_path):
    pytest.importorskip("gymnasium_robotics")
    from steelyard.envs.behaviours import point_maze_env

    config = point_run(
        None,
        SACConfig(network=NETWORK),
        env=point_maze_env("UMaze", max_episode_steps=40),
        offline_steps=0,
        online=OnlineConfig(env_steps=110, offline_ratio=0.0, warmup_steps=45),
        evaluation=control.EvaluationConfig(episodes=1, parallel=1, every_online=0),
    )
    control.start(config, tmp_path / "whole", quiet=True)

    class StopError(Exception):
        pass

    original = OnlineSource.batch

    def stop_in_an_episode(self, step):
        if step == 25:  # the newest checkpoint is of update 21: environment step 66, in the second episode
            raise StopError
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineSource, "batch", stop_in_an_episode)
        with pytest.raises(StopError):
            control.start(config, tmp_path / "stopped", quiet=True)
    found = checkpoint.load(checkpoint.last(tmp_path / "stopped/checkpoints"))
    assert 0 < len(found.source["env.actions.0"]) < 40, "the checkpoint is not of the middle of an episode"
    control.resume(tmp_path / "stopped", quiet=True)
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "stopped")) == []


@pytest.mark.parametrize("written", ["case.json", "environment.json", "config.json", "status.json"])
def test_a_kill_at_the_very_beginning_can_be_continued(written, data, tmp_path, monkeypatch):
    """Whichever file is the last that was written, starting or resuming must go on: there is no dead end."""

    class KilledError(BaseException):
        pass

    original = RunDir.write_json

    def write(self, name, content):
        original(self, name, content)
        if name == written:
            raise KilledError

    config = point_run(data, **OFFLINE)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_json", write)
        with pytest.raises(KilledError):
            control.start(config, tmp_path / "run", quiet=True)
    if (tmp_path / "run/config.json").exists():
        control.resume(tmp_path / "run", quiet=True)
    else:
        control.start(config, tmp_path / "run", quiet=True)
    assert checkpoint.last(tmp_path / "run/checkpoints").name == "step_00000010"
    for name in ("case.json", "environment.json", "config.json", "status.json"):
        assert (tmp_path / "run" / name).is_file()


@pytest.mark.parametrize("online", [False, True])
def test_ctrl_c_then_resume_is_exact(online, data, tmp_path, monkeypatch):
    config = point_run(data, offline_steps=12, online=OnlineConfig(env_steps=40))
    control.start(config, tmp_path / "whole", quiet=True)
    cls = OnlineSource if online else control.OfflineSource
    original, at = cls.batch, 45 if online else 9

    def pressed(self, step):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "batch", pressed)
        with pytest.raises(Interrupted):
            control.start(config, tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
    assert checkpoint.last(tmp_path / "run/checkpoints").name == f"step_{at + 1:08d}"
    control.resume(tmp_path / "run", quiet=True)
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "run")) == []


def test_ctrl_c_in_the_last_offline_update_does_not_begin_the_online_phase(data, tmp_path, monkeypatch):
    original = control.OfflineSource.batch

    def pressed(self, step):
        if step == 11:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(control.OfflineSource, "batch", pressed)
    with pytest.raises(Interrupted):
        control.start(point_run(data, offline_steps=12), tmp_path / "run", quiet=True)
    assert checkpoint.last(tmp_path / "run/checkpoints").name == "step_00000012"
    assert (tmp_path / "run/train_episodes.jsonl").read_text() == ""


# ---------------------------------------------------------------------------------------------- refusals


def test_resume_of_a_finished_run_changes_nothing(data, tmp_path):
    control.start(point_run(data, offline_steps=8, online=OnlineConfig(env_steps=8)), tmp_path / "run", quiet=True)
    before = files(tmp_path / "run")
    assert control.resume(tmp_path / "run", quiet=True) == tmp_path / "run"
    after = files(tmp_path / "run")
    assert sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)) == []


def test_resume_refuses_other_data(tmp_path):
    point_store(tmp_path / "data")
    control.start(point_run(tmp_path / "data", **OFFLINE), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "data")
    point_store(tmp_path / "data", first_seed=100)
    status = tmp_path / "run/status.json"
    status.write_text(status.read_text().replace("done", "running"))  # a finished run has nothing left to refuse
    with pytest.raises(DataError, match=r"not the data that .*run began with; its content hash has changed"):
        control.resume(tmp_path / "run", quiet=True)


def test_start_refuses_a_directory_with_a_run(data, tmp_path):
    config = point_run(data, **OFFLINE)
    control.start(config, tmp_path / "run", quiet=True)
    before = files(tmp_path / "run")
    with pytest.raises(CheckpointError, match="run: holds a run already; resume it, or choose another directory"):
        control.start(config, tmp_path / "run", quiet=True)
    assert files(tmp_path / "run") == before


def test_resume_refuses_a_directory_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no run \(no config.json in it\)"):
        control.resume(tmp_path, quiet=True)


def edited(data, tmp_path, change):
    control.start(point_run(data, OBJECTIVES["iql"], **OFFLINE), tmp_path / "run", quiet=True)
    status = tmp_path / "run/status.json"
    status.write_text(status.read_text().replace("done", "interrupted"))
    file = tmp_path / "run/config.json"
    plain = json.loads(file.read_text())
    change(plain)
    file.write_text(json.dumps(plain))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("place", "key", "near"),
    [
        ((), "batch_sise", "batch_size"),
        (("online",), "utd_rato", "utd_ratio"),
        (("objective",), "expectle", "expectile"),
    ],
)
def test_an_unknown_key_in_the_config_names_the_nearest(place, key, near, data, tmp_path):
    def change(plain):
        for name in place:
            plain = plain[name]
        plain[key] = 1

    with pytest.raises(ConfigError) as caught:
        control.resume(edited(data, tmp_path, change), quiet=True)
    message = str(caught.value)
    assert "config.json: unknown key" in message
    assert key in message
    assert f"did you mean '{near}'?" in message
    assert "\n" not in message


def test_a_changed_config_is_refused(data, tmp_path):
    folder = edited(data, tmp_path, lambda plain: plain.update(batch_size=17))
    with pytest.raises(ConfigError, match="config"):
        control.resume(folder, quiet=True)


def test_shortened_logs_are_refused(data, tmp_path):
    folder = edited(data, tmp_path, lambda plain: None)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: shorter than the checkpoint remembers"):
        control.resume(folder, quiet=True)


def test_a_config_that_cannot_run_leaves_no_directory(data, tmp_path):
    for config, sentence in (
        (point_run(None, env=None), "neither data .* nor an environment"),
        (point_run(None), "data.path names no prior data"),
        (point_run(data, env=None), "env.id names no environment"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            control.start(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- kinds of runs


def test_offline_only(data, tmp_path):
    run = control.start(point_run(data, BCConfig(network=NETWORK), **OFFLINE), tmp_path / "run", quiet=True)
    assert checkpoint.last(run / "checkpoints").name == "step_00000010"
    assert (run / "eval.jsonl").read_text() == ""
    assert load(run).env is None
    assert not (run / "trajectory.json").exists()


def test_online_from_scratch(tmp_path):
    config = point_run(None, SACConfig(network=NETWORK), offline_steps=0)
    config = replace(config, online=OnlineConfig(env_steps=60, offline_ratio=0.0, warmup_steps=10))
    run = control.start(config, tmp_path / "run", quiet=True)
    found = checkpoint.load(checkpoint.last(run / "checkpoints"))
    assert (found.step, int(found.source["env.env_step"])) == (50, 60)
    rows = [json.loads(line) for line in (run / "train_episodes.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"online"}
    assert all(row["score"] == float(row["success"]) for row in rows)


def test_finetune_starts_from_the_weights_of_another_run(data, tmp_path):
    first = control.start(point_run(data, **OFFLINE), tmp_path / "first", quiet=True)
    config = point_run(data, offline_steps=0, online=OnlineConfig(env_steps=5), initial=str(first))
    second = control.start(config, tmp_path / "second", quiet=True)
    begin = checkpoint.load(checkpoint.last(first / "checkpoints"))
    end = checkpoint.load(checkpoint.last(second / "checkpoints"))
    assert end.step == 5
    # 5 more steps of the optimiser, not 5 first ones; the multiplier goes on from where it was
    steps = {
        name: (int(begin.optimizers[name]), int(end.optimizers[name])) for name in end.optimizers if "step" in name
    }
    assert set(steps.values()) == {(10, 15)}
    assert begin.model["multiplier.raw"] != end.model["multiplier.raw"]
    assert from_json(control.ControlRun, (second / "config.json").read_text()) == config


def test_finetune_refuses_other_networks(data, tmp_path):
    first = control.start(point_run(data, **OFFLINE), tmp_path / "first", quiet=True)
    other = replace(OBJECTIVES["cal_ql"], network=replace(NETWORK, actor_hidden=(8,)))
    with pytest.raises(CheckpointError, match=r"weights do not fit the config; first mismatch: 'nets.actor"):
        control.start(point_run(data, other, initial=str(first)), tmp_path / "second", quiet=True)


def test_a_wrong_beginning_leaves_no_directory(data, tmp_path):
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        control.start(point_run(data, initial=str(tmp_path / "nowhere")), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_finetuned_run_resumes_after_its_beginning_is_gone(data, tmp_path, monkeypatch):
    first = control.start(point_run(data, **OFFLINE), tmp_path / "first", quiet=True)
    config = point_run(data, offline_steps=20, online=OnlineConfig(env_steps=0), initial=str(first))
    control.start(config, tmp_path / "whole", quiet=True)
    original = control.OfflineSource.batch

    def pressed(self, step):
        if step == 12:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(control.OfflineSource, "batch", pressed)
        with pytest.raises(Interrupted):
            control.start(config, tmp_path / "run", quiet=True)
    shutil.rmtree(first)
    control.resume(tmp_path / "run", quiet=True)
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "run")) == []


class TwoArrays(gymnasium.Wrapper):
    """The point with its observation as two arrays, whose names do not sort in the order of use."""

    def __init__(self) -> None:
        super().__init__(Point())
        box = gymnasium.spaces.Box(-10.0, 10.0, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"x": box, "goal": box})

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return {"x": observation[:1], "goal": observation[1:]}, info

    def step(self, action):
        observation, *rest = self.env.step(action)
        return {"x": observation[:1], "goal": observation[1:]}, *rest


def test_a_store_keeps_its_columns_apart(tmp_path):
    episode = point_store(episodes=1).episode(0)
    rows = len(episode) + 1
    parts = {"x": np.ones((rows, 1), np.float32), "goal": np.full((rows, 2), 2, np.float32)}
    store = Store.from_episodes([replace(episode, observations=parts)], tmp_path / "data")
    for found in (store, Store.open(tmp_path / "data")):
        assert list(found.spec.observations) == ["x", "goal"]
        for key, values in found.episode(0).observation_dict.items():
            np.testing.assert_array_equal(values, parts[key])


@pytest.mark.parametrize("keys", [("x", "goal"), ("goal", "x")])
def test_data_and_environment_agree_on_the_order_of_observations(keys, tmp_path, monkeypatch):
    """A run, its prior data and its artefact concatenate in one order, however the files sort their keys."""
    gymnasium.register("TwoArrays-v0", entry_point=TwoArrays, max_episode_steps=20)
    monkeypatch.setattr(control, "evaluate", lambda *args, **kwargs: [])
    monkeypatch.setattr(control, "mean_score", lambda rows: None)
    try:
        env = EnvConfig("TwoArrays-v0", observation_keys=keys, success="terminated")
        episodes = []
        for plain in point_store(episodes=4).episodes():
            x, goal = np.ones((len(plain) + 1, 1), np.float32), 2 * np.ones((len(plain) + 1, 1), np.float32)
            episodes.append(replace(plain, observations={"goal": goal, "x": x}))
        # the data have an order of their own, which is not always the environment's
        recorded = replace(env, observation_keys=("goal", "x"))
        Store.from_episodes(episodes, tmp_path / "data", spec=spec_of(make(recorded), recorded))
        seen = []
        original = control.OfflineSource.batch
        monkeypatch.setattr(
            control.OfflineSource, "batch", lambda self, step: seen.append(original(self, step)) or seen[-1]
        )
        config = point_run(tmp_path / "data", env=env, offline_steps=1, online=OnlineConfig(env_steps=0))
        run = control.start(config, tmp_path / "run", quiet=True)
    finally:
        del gymnasium.registry["TwoArrays-v0"]
    expected = {"x": 1.0, "goal": 2.0}
    assert seen[0].observations[0].tolist() == [expected[key] for key in keys]
    policy, parts = load(run), {"x": np.array([0.3]), "goal": np.array([-0.4])}
    np.testing.assert_array_equal(policy(parts), policy(np.concatenate([parts[key] for key in keys])))


def test_evaluation_on_or_off_gives_the_same_run(data, tmp_path):
    """Promise P7, for a whole run with an environment."""
    config = point_run(data, offline_steps=20, online=OnlineConfig(env_steps=30, num_envs=2))
    off = control.EvaluationConfig(every_offline=0, every_online=0)
    much = control.EvaluationConfig(episodes=3, parallel=2, every_offline=3, every_online=4)
    parts = []
    for name, evaluation in {"off": off, "much": much}.items():
        folder = control.start(replace(config, evaluation=evaluation), tmp_path / name, quiet=True)
        whole = everything(folder)
        parts.append(
            {key: value for key, value in whole.items() if key.split()[0] in ("model", "optimizers", "source")}
        )
        parts[-1] |= {"metrics.jsonl": whole["metrics.jsonl"], "train_episodes.jsonl": whole["train_episodes.jsonl"]}
    assert differences(*parts) == []
    assert len((tmp_path / "much/eval.jsonl").read_text().splitlines()) > 30
