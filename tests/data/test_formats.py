import json
import warnings
import zipfile

import h5py
import numpy as np
import pytest

from steelyard.data.formats import FORMATS, detect, episodes_from, open_dataset, write_dataset
from steelyard.data.store import Store
from steelyard.errors import DataError, MissingExtraError

from .make import assert_equal, example_stores, files_of, nested, walk, walks

TARGETS = [("steelyard", "d"), ("minari", "d"), ("flat", "d.npz"), ("flat", "d.hdf5"), ("robomimic", "d.hdf5")]
STORES = example_stores()


@pytest.mark.parametrize(("format_name", "file"), TARGETS)
@pytest.mark.parametrize("which", STORES)
def test_round_trip_is_exact(tmp_path, format_name, file, which):
    store, path = STORES[which], tmp_path / file
    write_dataset(store, path, format_name)
    assert detect(path) == format_name
    back = open_dataset(path)
    assert back.spec == store.spec
    assert back.notes == store.notes
    assert back.content_hash == store.content_hash  # every value, flag, instruction and provenance
    for a, b in zip(back.episodes(), store.episodes(), strict=True):
        assert_equal(a, b)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing temporary stays
    with pytest.raises(DataError, match="already exists"):
        write_dataset(store, path, format_name)


def test_cache_gives_a_store_on_disk(tmp_path):
    write_dataset(STORES["plain"], tmp_path / "a.npz", "flat")
    store = open_dataset(tmp_path / "a.npz", cache=tmp_path / "c")
    assert store.content_hash == STORES["plain"].content_hash == Store.open(tmp_path / "c").content_hash


def test_unknown_formats_and_options(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for name in FORMATS:
        with pytest.raises(DataError, match=rf"not recognised; known formats: .*{name} "):
            detect(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no such file"):
        open_dataset(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="unknown format 'parquet'"):
        open_dataset(tmp_path / "a.txt", "parquet")
    with pytest.raises(DataError, match="format 'flat' has no option 'mask'; it knows: dialect, missing_rewards"):
        open_dataset(tmp_path / "a.txt", "flat", mask="train")
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    with pytest.raises(DataError, match="not recognised"):
        detect(tmp_path / "empty.hdf5")


def test_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    import steelyard.data.formats.source as source

    def absent(module, extra):
        raise MissingExtraError(f"{module} is not installed; install it with: pip install 'steelyard[{extra}]'")

    monkeypatch.setattr(source, "require", absent)
    (tmp_path / "a.hdf5").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"pip install 'steelyard\[data\]'"):
        open_dataset(tmp_path / "a.hdf5", "robomimic")


# ---- minari


def minari():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("minari")


@pytest.mark.parametrize("which", ["plain", "nested"])
def test_the_minari_package_reads_ours(tmp_path, which):
    package, store = minari(), STORES[which]
    write_dataset(store, tmp_path / "m", "minari", dataset_id="toy/walk-v0")
    data = package.MinariDataset(tmp_path / "m" / "data")
    assert (data.total_episodes, data.total_steps, data.id) == (store.num_episodes, store.num_steps, "toy/walk-v0")
    for theirs, ours in zip(data.iterate_episodes(), store.episodes(), strict=True):
        np.testing.assert_array_equal(theirs.actions, ours.actions, strict=True)
        np.testing.assert_array_equal(theirs.rewards, ours.rewards, strict=True)
        assert theirs.terminations.tolist() == [False] * (len(ours) - 1) + [ours.terminated]
        assert theirs.truncations.tolist() == [False] * (len(ours) - 1) + [ours.truncated]
        if which == "plain":
            np.testing.assert_array_equal(theirs.observations, ours.observations, strict=True)
        else:
            for key, place in (("arm.joints", ("arm", "joints")), ("arm.tip", ("arm", "tip")), ("camera", ("camera",))):
                values = theirs.observations
                for name in place:
                    values = values[name]
                np.testing.assert_array_equal(values, ours.observations[key], strict=True)
    space = data.action_space
    if which == "plain":
        assert (space.low.tolist(), space.high.tolist()) == ([-1, -1], [1, 1])
    else:
        assert space.n == store.spec.num_actions


@pytest.fixture
def from_minari(tmp_path, monkeypatch):
    """A data set made by the minari package, with nested observations, an image and an unknown environment."""
    package = minari()
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng, buffers = np.random.default_rng(0), []
    for number, steps in enumerate((4, 1, 12)):
        observations = {
            "goal": rng.normal(size=(steps + 1, 2)).astype(np.float32),
            "arm": {"joints": rng.normal(size=(steps + 1, 3))},
            "eye": rng.integers(0, 255, (steps + 1, 8, 8, 3), dtype=np.uint8),
        }
        last = np.arange(steps) == steps - 1
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=observations,
                actions=rng.normal(size=(steps, 2)).astype(np.float32),
                rewards=rng.normal(size=steps),
                terminations=last & (number == 0),
                truncations=last & (number != 0),
                infos={},
            )
        )
    space = gym.spaces.Dict(
        {
            "goal": gym.spaces.Box(-5, 5, (2,), np.float32),
            "arm": gym.spaces.Dict({"joints": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}),
            "eye": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
        }
    )

    def make(jpeg):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package.create_dataset_from_buffers(
                "toy/x-v0", buffers, observation_space=space, action_space=gym.spaces.Box(-1, 2, (2,), np.float32),
                jpeg_encoding=jpeg, data_format="hdf5",
            )  # fmt: skip
        path = tmp_path / "toy" / "x-v0"
        if jpeg:
            return path, buffers
        metadata = json.loads((path / "data" / "metadata.json").read_text())
        metadata["env_spec"] = json.dumps({"id": "no_such_module:Evil-v0", "entry_point": "no_such_module:Evil"})
        (path / "data" / "metadata.json").write_text(json.dumps(metadata))
        return path, buffers

    return make


def test_we_read_what_the_minari_package_writes(from_minari):
    path, buffers = from_minari(False)
    store = open_dataset(path)
    assert store.content_hash == open_dataset(path / "data").content_hash
    assert (store.spec.actions.low, store.spec.actions.high) == ((-1.0, -1.0), (2.0, 2.0))
    assert store.spec.observations["goal"].high == (5.0, 5.0)
    assert store.spec.observations["arm.joints"].low is None
    for episode, buffer in zip(store.episodes(), buffers, strict=True):
        np.testing.assert_array_equal(episode.observations["goal"], buffer.observations["goal"], strict=True)
        np.testing.assert_array_equal(episode.observations["arm.joints"], buffer.observations["arm"]["joints"])
        np.testing.assert_array_equal(episode.observations["eye"], buffer.observations["eye"], strict=True)
        np.testing.assert_array_equal(episode.actions, buffer.actions, strict=True)
        np.testing.assert_array_equal(episode.rewards, buffer.rewards)
        assert (episode.terminated, episode.truncated) == (bool(buffer.terminations[-1]), bool(buffer.truncations[-1]))
    some = open_dataset(path, observation_keys=("goal",))
    assert list(some.spec.observations) == ["goal"]
    with pytest.raises(DataError, match="no observation 'gaol'"):
        open_dataset(path, observation_keys=("gaol",))


def test_jpeg_frames_are_decoded(from_minari):
    path, _ = from_minari(True)
    theirs = minari().MinariDataset(path / "data")
    for episode, other in zip(open_dataset(path).episodes(), theirs.iterate_episodes(), strict=True):
        np.testing.assert_array_equal(episode.observations["eye"], other.observations["eye"], strict=True)


def test_minari_early_flags_and_counts_are_errors(from_minari):
    path, _ = from_minari(False)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        file["episode_2/truncations"][3] = True
    with pytest.raises(DataError, match="truncations' is set at step 3 of 12"):
        open_dataset(path)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        del file["episode_2"]
    with pytest.raises(DataError, match="holds 2 episodes, expected 3"):
        open_dataset(path)


# ---- flat


def d4rl(episodes, then=True):
    """Flat arrays of episodes as D4RL stores them."""
    arrays = {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([[False] * (len(e) - 1) + [e.terminated] for e in episodes]),
        "timeouts": np.concatenate([[False] * (len(e) - 1) + [e.truncated] for e in episodes]),
    }
    if then:
        arrays["next_observations"] = np.concatenate([e.observations[1:] for e in episodes])
    return arrays


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return path


@pytest.fixture(params=["a.npz", "a.hdf5"])
def flat_path(tmp_path, request):
    return tmp_path / request.param


def test_d4rl_with_next_observations_loses_nothing(flat_path):
    episodes = walks()
    store = open_dataset(save(flat_path, d4rl(episodes)))
    assert store.notes == ()
    for a, b in zip(store.episodes(), episodes, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        assert (len(a), a.terminated, a.truncated) == (len(b), b.terminated, b.truncated)


def test_d4rl_without_next_observations(flat_path):
    episodes = walks((5, 1, 8, 3))  # terminated, truncated, terminated, truncated
    store = open_dataset(save(flat_path, d4rl(episodes, then=False)))
    assert store.lengths.tolist() == [5, 8, 2]
    assert "dropped the last step of 2 episodes" in store.notes[0]
    assert "1 of these had no other step" in store.notes[0]
    assert "repeated the last observation of 2 terminated" in store.notes[1]
    first, last = store.episode(0), store.episode(2)
    np.testing.assert_array_equal(first.observations, [*episodes[0].observations[:-1], episodes[0].observations[-2]])
    np.testing.assert_array_equal(last.observations, episodes[3].observations[:-1])
    assert (first.terminated, last.terminated, last.truncated) == (True, False, True)


def test_d4rl_unfinished_end(flat_path):
    arrays = d4rl(walks((4, 6)), then=False)
    arrays["timeouts"][-1] = False
    store = open_dataset(save(flat_path, arrays))
    assert store.lengths.tolist() == [4, 5]
    assert store.truncated.tolist() == [False, True]
    assert any("last trajectory of the file has no end flag" in note for note in store.notes)


def test_d4rl_splits_where_observations_do_not_join(flat_path):
    arrays = d4rl([walk(5, 0), walk(4, 1), walk(3, 2)])
    arrays["timeouts"][:] = False
    store = open_dataset(save(flat_path, arrays))
    assert store.lengths.tolist() == [5, 4, 3]
    assert store.truncated.all()
    assert "split 2 times" in store.notes[0]


def test_d4rl_jumps_across_pieces(flat_path, monkeypatch):
    monkeypatch.setattr("steelyard.data.formats.flat._CHUNK", 5)
    arrays = d4rl([walk(5, 0), walk(7, 1), walk(3, 2)])
    arrays["timeouts"][:] = False
    assert open_dataset(save(flat_path, arrays)).lengths.tolist() == [5, 7, 3]


def test_d4rl_cannot_be_split_without_any_sign(flat_path):
    arrays = d4rl([walk(5, 0)], then=False)
    arrays["timeouts"][:] = False
    with pytest.raises(DataError, match="episodes cannot be told apart"):
        open_dataset(save(flat_path, arrays))


def test_ogbench(flat_path):
    episodes = [walk(5, 0), walk(3, 1)]
    arrays = {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([np.concatenate([e.actions, e.actions[:1]]) for e in episodes]),
        "terminals": np.concatenate([np.arange(len(e) + 1) == len(e) for e in episodes]).astype(np.float32),
    }
    save(flat_path, arrays)
    with pytest.raises(DataError, match="option missing_rewards: 'final'"):
        open_dataset(flat_path)
    store = open_dataset(flat_path, missing_rewards="final")
    for a, b in zip(store.episodes(), episodes, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.rewards.tolist() == [0.0] * (len(b) - 1) + [1.0]
        assert (a.terminated, a.truncated) == (False, True)
    assert not open_dataset(flat_path, missing_rewards="zero").rewards.any()


def test_dialect_in_doubt_is_an_error(flat_path):
    arrays = d4rl(walks(), then=False)
    del arrays["timeouts"]
    save(flat_path, arrays)
    with pytest.raises(DataError, match="say so with the option dialect: 'd4rl' or 'ogbench'"):
        open_dataset(flat_path)
    assert open_dataset(flat_path, dialect="d4rl").lengths.tolist() == [5, 1 + 8, 3 - 1]  # cut at terminations only


def test_actions_beyond_bounds_are_kept(flat_path):
    arrays = d4rl(walks())
    arrays["actions"] *= 2
    np.testing.assert_array_equal(open_dataset(save(flat_path, arrays)).actions, arrays["actions"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("actions"), "'actions' is missing"),
        (lambda a: a.update(actions=a["actions"][:-1]), "equally many rows"),
        (lambda a: a.update(terminals=a["rewards"]), "'terminals' must hold one flag"),
        (
            lambda a: a.update(actions=np.array(["x"] * len(a["actions"]), dtype="S1")),
            "actions' has type .*expected numbers",
        ),
        (lambda a: a.update(next_observations=a["next_observations"][:-1]), "'next_observations' has shape"),
    ],
)
def test_bad_flat_files(flat_path, change, words):
    arrays = d4rl(walks())
    change(arrays)
    with pytest.raises(DataError, match=words):
        open_dataset(save(flat_path, arrays), "flat")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    arrays = d4rl(walks())
    np.savez(tmp_path / "a.npz", **(arrays | {"actions": np.array([Bomb()] * len(arrays["actions"]), dtype=object)}))
    with pytest.raises(DataError, match=r"a\.npz"):
        open_dataset(tmp_path / "a.npz")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, values in arrays.items():
            if name != "actions":
                file[name] = values
        file.create_dataset("actions", (len(values),), h5py.vlen_dtype(np.float32))
    with pytest.raises(DataError, match="'/actions' has type object"):
        open_dataset(tmp_path / "a.hdf5")


def test_links_to_other_files_are_not_followed(tmp_path):
    write_dataset(STORES["plain"], tmp_path / "a.hdf5", "flat")
    arrays = d4rl(walks())
    del arrays["actions"]
    save(tmp_path / "b.hdf5", arrays)
    with h5py.File(tmp_path / "b.hdf5", "a") as file:
        file["actions"] = h5py.ExternalLink(str(tmp_path / "a.hdf5"), "/actions")
    with pytest.raises(DataError, match="links to another file"):
        open_dataset(tmp_path / "b.hdf5", "flat")


# ---- robomimic


@pytest.fixture
def robomimic_path(tmp_path):
    """Three demonstrations as others write them."""
    with h5py.File(tmp_path / "r.hdf5", "w") as file:
        for number in (0, 2, 10):
            episode, group = nested(number + 2, number), file.create_group(f"data/demo_{number}")
            group.attrs["num_samples"] = len(episode)
            for key in ("arm.joints", "camera"):
                group[f"obs/{key.replace('.', '_')}"] = episode.observations[key][:-1]
                group[f"next_obs/{key.replace('.', '_')}"] = episode.observations[key][1:]
            group["actions"] = np.random.default_rng(number).normal(size=(len(episode), 7))
            group["rewards"], group["dones"] = episode.rewards, np.arange(len(episode)) == len(episode) - 1
        file["mask/train"] = np.array([b"demo_10", b"demo_0"])
    return tmp_path / "r.hdf5"


def test_robomimic_options(robomimic_path):
    store = open_dataset(robomimic_path)
    assert store.lengths.tolist() == [2, 4, 12]  # in the order of the numbers
    assert store.terminated.all()
    np.testing.assert_array_equal(store.episode(1).observations["arm_joints"], nested(4, 2).observations["arm.joints"])
    assert not open_dataset(robomimic_path, dones="truncated").terminated.any()
    assert open_dataset(robomimic_path, mask="train").lengths.tolist() == [2, 12]
    assert list(open_dataset(robomimic_path, observation_keys=["camera"]).spec.observations) == ["camera"]
    with pytest.raises(DataError, match="no mask 'test'; found \\['train'\\]"):
        open_dataset(robomimic_path, mask="test")


def test_robomimic_without_rewards_or_next_obs(robomimic_path):
    with h5py.File(robomimic_path, "a") as file:
        for demo in file["data"].values():
            del demo["rewards"], demo["next_obs"]
    with pytest.raises(DataError, match="option missing_rewards"):
        open_dataset(robomimic_path)
    store = open_dataset(robomimic_path, missing_rewards="final")
    assert store.episode_returns().tolist() == [1, 1, 1]
    assert "repeated the last observation of 3" in store.notes[0]
    cut = open_dataset(robomimic_path, missing_rewards="zero", dones="truncated")
    assert cut.lengths.tolist() == [1, 3, 11]
    assert "dropped the last step of 3" in cut.notes[0]


def test_robomimic_wrong_count(robomimic_path):
    with h5py.File(robomimic_path, "a") as file:
        file["data/demo_2"].attrs["num_samples"] = 9
    with pytest.raises(DataError, match="demo_2' has 4 rows, expected 9"):
        open_dataset(robomimic_path)


# ---- damage


def attempt(path, format_name):
    try:
        return open_dataset(path, format_name), ""
    except DataError as error:
        return None, str(error)


def damage_and_read(tmp_path, format_name, file, count, seed):
    """Flip a byte or cut the file at random places; the reader must complain or give exactly the same data."""
    original = STORES["plain"]
    path = tmp_path / file
    write_dataset(original, path, format_name)
    rng, refused = np.random.default_rng(seed), 0
    for trial in range(count):
        target = files_of(path)[rng.integers(len(files_of(path)))]
        good = target.read_bytes()
        place = int(rng.integers(len(good)))
        if trial % 4 == 3:
            target.write_bytes(good[:place])
        else:
            flipped = bytes([good[place] ^ int(rng.integers(1, 256))])
            target.write_bytes(good[:place] + flipped + good[place + 1 :])
        back, sentence = attempt(path, format_name)
        if back is None:
            refused += 1
            assert target.name in sentence or path.name in sentence
            assert "\n" not in sentence
        else:
            assert (back.content_hash, back.spec) == (original.content_hash, original.spec), f"{target.name} at {place}"
        target.write_bytes(good)
    assert open_dataset(path, format_name).content_hash == original.content_hash
    return refused


@pytest.mark.parametrize(("format_name", "file"), TARGETS)
def test_damage_is_noticed(tmp_path, format_name, file):
    assert damage_and_read(tmp_path, format_name, file, 40, seed=0) == 40


@pytest.mark.slow
@pytest.mark.parametrize(("format_name", "file"), TARGETS)
def test_damage_is_noticed_200(tmp_path, format_name, file):
    assert damage_and_read(tmp_path, format_name, file, 200, seed=1) == 200


@pytest.mark.parametrize(("format_name", "file"), TARGETS[1:])
def test_lost_seal_is_noticed(tmp_path, format_name, file):
    write_dataset(STORES["plain"], tmp_path / file, format_name)
    for target in files_of(tmp_path / file):
        if target.suffix != ".json":
            target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"truncated|damaged"):
        open_dataset(tmp_path / file, format_name)


@pytest.mark.parametrize("file", ["a.npz", "a.hdf5"])
def test_damaged_foreign_files_give_one_sentence(tmp_path, file):
    path = save(tmp_path / file, d4rl(walks((50, 60))))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(30):
        place = int(rng.integers(len(good)))
        path.write_bytes(good[:place] if place % 2 else good[:place] + bytes(8) + good[place + 8 :])
        back, sentence = attempt(path, "flat")
        assert back is not None or (file in sentence and "\n" not in sentence)


# ---- real data


def test_adroit_door(shared_data):
    source = episodes_from(shared_data / "adroit_door_human_demos" / "door_demos.hdf5")
    store = Store.from_episodes(source, notes=source.notes)
    assert (store.num_episodes, store.num_steps) == (17, 4621 - 17)
    assert "dropped the last step of 17 episodes" in store.notes[0]
    assert np.abs(store.actions).max() > 1.3  # never clipped behind your back


@pytest.mark.parametrize(("name", "best"), [("Ant", 4713), ("HalfCheetah", 4068), ("Hopper", 3718)])
def test_gym_mujoco(shared_data, name, best):
    store = open_dataset(shared_data / "gym_mujoco_expert" / f"{name}-v4_expert.hdf5")
    assert store.lengths.tolist() == [1000, 1000]
    assert store.episode_returns().max() == pytest.approx(best, abs=1)


def test_zip_bomb_shapes_do_not_allocate(tmp_path):
    """A header that promises more rows than the file has fails at the missing bytes."""
    path = save(tmp_path / "a.npz", d4rl(walks()))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.npz", "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            new.writestr(name, raw.replace(b"'shape': (17,", b"'shape': (99,"))
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(tmp_path / "b.npz")
