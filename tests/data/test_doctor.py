import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from steelyard.data.doctor import diagnose
from steelyard.data.episode import ArraySpec, Episode
from steelyard.data.formats import open_dataset
from steelyard.data.store import Store

from .make import bounded_spec, nested, walk


def healthy(count=6, length=60):
    return [walk(length + i, i) for i in range(count)]


def edit(episodes, number, **changes):
    episodes[number] = dataclasses.replace(episodes[number], **changes)
    return episodes


def edited(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def nan_observation(episodes):
    return edit(episodes, 2, observations=edited(episodes[2].observations, (7, 1), np.nan))


def infinite_action(episodes):
    return edit(episodes, 1, actions=edited(episodes[1].actions, (3, 0), np.inf))


def nan_reward(episodes):
    return edit(episodes, 0, rewards=edited(episodes[0].rewards, 4, np.nan))


def constant(episodes):
    return [dataclasses.replace(e, observations=edited(e.observations, (slice(None), 1), 2.5)) for e in episodes]


def near_constant(episodes):
    def flattened(e):
        return edited(e.observations, (slice(None), 0), 3 + 1e-4 * e.observations[:, 0])

    return [dataclasses.replace(e, observations=flattened(e)) for e in episodes]


def exploding(episodes):
    # a spike is also a step: keep it to one dimension, which the teleport rule forgives
    return edit(episodes, 3, actions=edited(episodes[3].actions, (5, 1), 1e6))


def no_end(episodes):
    return edit(episodes, 4, truncated=False)


def both_ends(episodes):
    return edit(episodes, 4, terminated=True, truncated=True)


def teleport(episodes):
    a, b = episodes[0], episodes[1]
    joined = Episode(
        np.concatenate([a.observations[:-1], b.observations]),
        np.concatenate([a.actions, b.actions]),
        np.concatenate([a.rewards, b.rewards]),
        False,
        True,
    )
    return [joined, *episodes[2:]]


def one_trajectory(episodes):
    whole = walk(600, 0)
    pieces = [slice(i, i + 100) for i in range(0, 600, 100)]
    return [
        Episode(whole.observations[p.start : p.stop + 1], whole.actions[p], whole.rewards[p], False, True)
        for p in pieces
    ]


def beyond_one(episodes):
    return edit(episodes, 2, actions=edited(episodes[2].actions, (0, 0), 1.37))


def saturated(episodes):
    return [dataclasses.replace(e, actions=np.sign(e.actions)) for e in episodes]


def twins(episodes):
    return [*episodes, dataclasses.replace(episodes[1], provenance="copy")]


def frozen(episodes):
    return edit(episodes, 0, observations=edited(episodes[0].observations, slice(10, 40), episodes[0].observations[10]))


def equal_rewards(episodes):
    return [dataclasses.replace(e, rewards=np.full(len(e), -1.0)) for e in episodes]


@pytest.mark.parametrize(
    ("damage", "code", "severity", "words"),
    [
        (nan_observation, "not-finite", "fault", "observation 'observation': 1 NaN .* dimension 1, episode 2, step 7"),
        (infinite_action, "not-finite", "fault", "actions: 1 NaN or infinite .* dimension 0, episode 1, step 3"),
        (nan_reward, "not-finite", "fault", "rewards: .*episode 0, step 4"),
        (constant, "constant", "warning", "dimension 1 is constant"),
        (near_constant, "near-constant", "warning", "dimension 0 is nearly constant"),
        (no_end, "no-end", "fault", "1 episodes are neither .* episode 4"),
        (both_ends, "both-ends", "warning", "episode 4"),
        (teleport, "teleport", "fault", "after episode 0, step 59"),
        (one_trajectory, "joined-episodes", "note", "5 of 5 cuts .* after episode 0"),
        (beyond_one, "action-range", "warning", "1.37 .*dimension 0, episode 2, step 0.*clip"),
        (saturated, "saturated-actions", "note", "100.0% lie exactly at a bound"),
        (twins, "duplicate-episodes", "warning", "episode 6, equal to episode 1"),
        (frozen, "repeated-frames", "warning", "unchanged"),
        (equal_rewards, "constant-reward", "note", "every reward is -1"),
    ],
)
def test_each_fault_is_found_and_nothing_else(damage, code, severity, words):
    report = diagnose(Store.from_episodes(damage(healthy())))
    assert [finding.code for finding in report.findings] == [code]
    assert report.findings[0].severity == severity
    assert re.search(words, report.findings[0].sentence)
    assert bool(report.faults) == (severity == "fault")


def test_exploding_value():
    report = diagnose(Store.from_episodes(exploding(healthy())))
    assert {f.code for f in report.findings} == {"exploding", "action-range"}
    assert "dimension 1 reaches 1e+06" in next(f.sentence for f in report.findings if f.code == "exploding")


def test_healthy_data_has_no_findings():
    assert diagnose(Store.from_episodes(healthy())).findings == ()
    assert diagnose(Store.from_episodes([nested(30, i) for i in range(4)])).faults == ()


def test_a_goal_that_changes_is_no_teleport():
    episodes = []
    for i, episode in enumerate(healthy()):
        goal = np.random.default_rng(i).normal(size=(3, 2)).repeat(40, axis=0)[: len(episode) + 1].astype(np.float32)
        whole = np.concatenate([episode.observations, goal], axis=1)
        episodes.append(dataclasses.replace(episode, observations={"all": whole, "goal": goal}))
    assert diagnose(Store.from_episodes(episodes)).findings == ()


def test_stated_bounds_are_judged():
    episodes = beyond_one(healthy())
    report = diagnose(Store.from_episodes(episodes, spec=bounded_spec()))
    assert [f.code for f in report.faults] == ["action-bounds"]
    assert "dimension 0, episode 2, step 0" in report.faults[0].sentence
    wide = ArraySpec((2,), "float32", (-2.0, -2.0), (2.0, 2.0))
    assert diagnose(Store.from_episodes(episodes), spec_bounds=wide).findings == ()


def test_discrete_actions_must_exist():
    episodes = [nested(20, i) for i in range(3)]
    bad = dataclasses.replace(episodes[1], actions=edited(episodes[1].actions, 4, -1))
    report = diagnose(Store.from_episodes([episodes[0], bad, episodes[2]]))
    assert [f.code for f in report.faults] == ["action-bounds"]


def test_small_chunks_find_the_same(monkeypatch):
    for damage in (nan_observation, teleport, one_trajectory, twins, frozen, constant):
        store = Store.from_episodes(damage(healthy()))
        whole = diagnose(store)
        with monkeypatch.context() as patch:
            patch.setattr("steelyard.data.doctor.CHUNK_ROWS", 70)
            assert diagnose(store).findings == whole.findings


def test_report_prints_and_serialises():
    store = Store.from_episodes(nan_reward(constant(healthy())), notes=["dropped [3] things"])
    report = diagnose(store)
    plain = json.loads(report.to_json())
    assert plain["summary"]["num_episodes"] == 6
    assert sum(plain["summary"]["length_counts"]) == 6
    assert {f["severity"] for f in plain["findings"]} == {"fault", "warning", "note"}
    console = Console(record=True, width=100, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    assert "1 fault, 1 warning, 1 note" in text
    assert "dropped [3] things" in text
    assert "█" in text


def test_adroit_door_passes_with_a_hint(shared_data):
    report = diagnose(open_dataset(shared_data / "adroit_door_human_demos" / "door_demos.hdf5"))
    assert report.faults == ()
    assert [f.code for f in report.findings if f.severity == "warning"] == ["action-range"]
    assert "clip" in report.findings[0].sentence


@pytest.mark.parametrize("name", ["Ant", "HalfCheetah", "Hopper"])
def test_real_locomotion_has_no_faults(shared_data, name):
    assert diagnose(open_dataset(shared_data / "gym_mujoco_expert" / f"{name}-v4_expert.hdf5")).faults == ()
