import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.episode import ActionMeaning, ArraySpec, Episode, Spec
from steelyard.data.store import Store
from steelyard.errors import DataError

from .make import assert_equal, bounded_spec, nested, walk, walks


def episode(**changes):
    parts = {
        "observations": np.zeros((4, 2), np.float32),
        "actions": np.zeros((3, 1), np.float32),
        "rewards": np.zeros(3),
        "terminated": False,
        "truncated": True,
    }
    return Episode(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": np.zeros((0, 1)), "rewards": np.zeros(0)}, "no actions"),
        ({"rewards": np.zeros((3, 1))}, r"rewards have shape \(3, 1\), expected \(3,\)"),
        ({"observations": np.zeros((3, 2))}, "has 3 rows, expected 4"),
        ({"observations": {"a": np.zeros((4, 2)), "b": np.zeros((5, 2))}}, "'b' has 5 rows, expected 4"),
        ({"actions": np.array(["a", "b", "c"])}, "'actions' has type .*expected numbers"),
        ({"observations": np.array([None] * 4)}, "'observation' has type object"),
    ],
)
def test_episode_checks_itself(changes, words):
    with pytest.raises(DataError, match=words):
        episode(**changes)


def test_spec_differences():
    spec = bounded_spec()
    assert spec.difference(spec) == []
    other = Spec(
        observations={"observation": ArraySpec((4,), "float32"), "camera": ArraySpec((2,), "uint8")},
        actions=ArraySpec((2,), "int64", (-2.0, -1.0), (1.0, 1.0)),
        num_actions=4,
        meaning=ActionMeaning(control="absolute"),
    )
    text = "; ".join(spec.difference(other))
    for words in ("'camera': absent here", "shape (3,) here, (4,) there", "type float32 here, int64 there", "low",
                  "discrete actions: None here, 4 there", "control: 'delta' here, 'absolute' there"):  # fmt: skip
        assert words in text
    assert "rate_hz" not in text  # stated by one side only
    with pytest.raises(DataError, match="left and right do not fit"):
        spec.require_match(other, "left", "right")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ends=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
    on_disk=st.booleans(),
    several=st.booleans(),
)
def test_gather_equals_direct_indexing(lengths, ends, seed, on_disk, several):
    if several:
        episodes = [nested(n, seed + i) for i, n in enumerate(lengths)]
    else:
        episodes = [walk(n, seed + i, terminated=ends[i]) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        store = Store.from_episodes(episodes, path if on_disk else None)
        if on_disk:
            store = Store.open(path)
        where = [(e, t) for e, item in enumerate(episodes) for t in range(len(item))]
        assert len(store) == len(where)
        indices = np.random.default_rng(seed).integers(len(where), size=20)
        steps = store.gather(indices)
        for row, index in enumerate(indices):
            e, t = where[index]
            item = episodes[e]
            for key, values in item.observation_dict.items():
                np.testing.assert_array_equal(steps.observations[key][row], values[t])
                np.testing.assert_array_equal(steps.next_observations[key][row], values[t + 1])
            np.testing.assert_array_equal(steps.actions[row], item.actions[t])
            assert steps.rewards[row] == item.rewards[t]
            assert steps.terminated[row] == (item.terminated and t == len(item) - 1)
        for read, item in zip(store.episodes(), episodes, strict=True):
            assert_equal(read, item)
        np.testing.assert_array_equal(store.lengths, lengths)
        np.testing.assert_allclose(store.episode_returns(), [item.rewards.sum() for item in episodes])
        np.testing.assert_array_equal(store.actions, np.concatenate([item.actions for item in episodes]))
        np.testing.assert_array_equal(store.rewards, np.concatenate([item.rewards for item in episodes]))


def test_memory_and_disk_have_the_same_hash(tmp_path):
    a = Store.from_episodes(walks())
    b = Store.from_episodes(walks(), tmp_path / "s", notes=["n"])
    assert a.content_hash == b.content_hash == Store.open(tmp_path / "s").content_hash
    assert Store.open(tmp_path / "s").notes == ("n",)
    assert Store.from_episodes(walks(first_seed=9)).content_hash != a.content_hash


def test_gathered_arrays_are_torch_ready():
    import torch

    steps = Store.from_episodes([nested(6, 0)]).gather(np.arange(4))
    for values in (*steps.observations.values(), steps.actions, steps.rewards):
        assert values.flags["C_CONTIGUOUS"]
        torch.from_numpy(values)


def test_discrete_actions_count_over_all_episodes():
    def with_actions(*actions):
        return episode(actions=np.array(actions))

    assert Store.from_episodes([with_actions(0, 1, 0), with_actions(0, 4, 2)]).spec.num_actions == 5
    spec = Spec({"observation": ArraySpec((2,))}, ArraySpec((), "int64"), num_actions=3)
    assert Store.from_episodes([with_actions(0, 1, 0)], spec=spec).spec.num_actions == 3
    with pytest.raises(DataError, match=r"action 4 found, expected 0\.\.2"):
        Store.from_episodes([with_actions(0, 4, 0)], spec=spec)


def test_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(DataError, match="no episodes"):
        Store.from_episodes([])
    with pytest.raises(DataError, match=r"shape \(2,\) here, \(3,\) there"):
        Store.from_episodes([episode(), walk(3, 0)], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays
    with pytest.raises(DataError, match="float64, which does not fit float32"):
        Store.from_episodes([episode(), episode(observations=np.zeros((4, 2)))])
    Store.from_episodes(walks(), tmp_path / "s")
    with pytest.raises(DataError, match="already exists"):
        Store.from_episodes(walks(), tmp_path / "s")


def test_nothing_is_pickled_and_header_is_plain(tmp_path):
    Store.from_episodes(walks(), tmp_path / "s")
    header = json.loads((tmp_path / "s" / "store.json").read_text())
    assert header["num_steps"] == 17
    assert set(header["files"]) == {file.name for file in (tmp_path / "s").iterdir()} - {"store.json"}
