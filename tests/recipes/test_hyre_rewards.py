"""E3: nothing of a target is trained or tuned on, and the study finds the taste of targets where there is one."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from steelyard.adapt.choose import draw
from steelyard.data.pair_tasks import PreferencePair
from steelyard.data.pair_tasks_rewards import RewardTask, read_reward_tasks
from steelyard.errors import ConfigError
from steelyard.recipes import hyre_rewards, hyre_rewards_runs
from steelyard.recipes.hyre_rewards_heads import (
    FEATURES,
    HEAD_SETS,
    MAIN,
    RewardStudy,
    held_out,
    train,
    training_data,
    with_length,
)
from steelyard.recipes.hyre_rewards_page import Scores, rank_correlation
from steelyard.recipes.hyre_rewards_runs import (
    ADAPTED,
    BLOCK,
    HYRE,
    MAP,
    UNIFORM,
    alignment,
    at_edge,
    blocks_of,
    evaluation_jobs,
    jobs_of,
    prepare,
    tune,
)

WIDTH, PAIRS = 6, 40
TINY = RewardStudy(
    head_sets=(MAIN, "pca"), shots=(1, 5), draws=3, tuning_draws=1, num_heads=6, steps=40, batch_size=64, trunk=8,
    clusters=3, least_pairs=4,
)  # fmt: skip
Made = tuple[list[RewardTask], dict[str, tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """Six families; the first feature of the chosen side is larger in half of them and smaller in the others."""
    folder, generator = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for family in "abcdef":
        (folder / "reward_subsets").mkdir(exist_ok=True)
        with gzip.open(folder / f"reward_subsets/{family}-x.jsonl.gz", "wt") as file:
            for i in range(PAIRS):
                row = {"prompt": f"{family} {i // 2}", "chosen": f"c{i}" + "." * (i % 3), "rejected": f"r{i}"}
                file.write(json.dumps(row) + "\n")
    tasks = read_reward_tasks(folder)
    features = {}
    for number, task in enumerate(tasks):
        first, second = generator.normal(size=(2, PAIRS, WIDTH)).astype(np.float32)
        sign = 1 if number % 2 == 0 else -1
        gap = sign * np.abs(first[:, 0] - second[:, 0])
        middle = (first[:, 0] + second[:, 0]) / 2
        first[:, 0], second[:, 0] = middle + gap / 2, middle - gap / 2
        features[task.name] = (first, second)
    return folder, (tasks, features)


def test_blocks_are_whole_families(made: tuple[Path, Made]) -> None:
    tasks, _ = made[1]
    assert blocks_of(tasks) == [["a-x", "b-x"], ["c-x", "d-x"], ["e-x", "f-x"]]
    assert BLOCK == 2
    assert len(jobs_of(TINY, Path("."), tasks)) == 3 * len(TINY.head_sets)
    with pytest.raises(ConfigError, match="at least 5 families"):
        blocks_of(tasks[:4])


def test_settings_of_a_block_are_chosen_on_the_others() -> None:
    rows: list[dict[str, Any]] = [
        {"heads": MAIN, "for": block, "method": HYRE, "settings": json.dumps({"eta": eta}), "accuracy": value}
        for block, eta, value in ((0, 1, 0.6), (0, 1, 0.8), (0, 2, 0.65), (0, 2, 0.65), (1, 1, 0.2), (1, 2, 0.3))
    ]
    found = {job.blocks: json.loads(job.settings)[HYRE] for job in evaluation_jobs(TINY, Path("."), rows)}
    assert found == {(0,): '{"eta": 1}', (1,): '{"eta": 2}'}


def test_training_data_has_no_prompt_of_a_target(made: tuple[Path, Made]) -> None:
    tasks, features = made[1]
    shared = PreferencePair("  C 0 ", "x", "y")  # a prompt of c, but for case and space
    spoilt = replace(tasks[0], pairs=(shared, *tasks[0].pairs[1:]))
    data, dropped = training_data([spoilt, tasks[1]], tasks[2:], features, TINY)
    assert dropped == 1
    assert len(data) == 2 * PAIRS - 1
    assert not (data.inputs == features["a-x"][0][0]).all(1).any()
    assert np.bincount(data.groups).tolist() == [PAIRS - 1, PAIRS]


def test_small_groups_share_a_head_and_large_ones_are_cut(made: tuple[Path, Made]) -> None:
    tasks, features = made[1]
    groups = ("one",) * 30 + ("two",) * 3 + ("three",) * 7
    task = replace(tasks[0], groups=groups)
    data, _ = training_data([task], [], features, replace(TINY, group_pairs=20))
    assert np.bincount(data.groups).tolist() == [20, 7, 3]


def test_labelled_prompts_are_never_scored(made: tuple[Path, Made]) -> None:
    tasks, features = made[1]
    data, _ = training_data(tasks[2:], tasks[:2], features, TINY)
    learner = train(MAIN, data, TINY)
    target = held_out(tasks[0], features["a-x"], learner, TINY)
    assert target.sources is not None
    assert len(np.unique(target.sources)) == PAIRS // 2
    support, test = draw(target, 5, np.random.default_rng(0))
    assert not set(target.sources[support]) & set(target.sources[test])
    assert len(test) == PAIRS - 2 * len(np.unique(target.sources[support]))


def test_a_job_trains_without_its_blocks(
    made: tuple[Path, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (_, features) = made
    store(tmp_path, features)
    seen = []

    def spy(training: Any, held: Any, *more: Any) -> Any:
        seen.append(([task.family for task in training], [task.family for task in held]))
        return training_data(training, held, *more)

    monkeypatch.setattr(hyre_rewards_runs, "training_data", spy)
    job = jobs_of(replace(TINY, data=str(folder)), tmp_path, made[1][0])[1]
    assert job.blocks == (0, 2)
    prepare(job)
    assert seen == [(["c-x", "d-x"], ["a-x", "b-x", "e-x", "f-x"])]


def test_a_block_is_scored_to_choose_for_the_other(
    made: tuple[Path, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (tasks, features) = made
    store(tmp_path, features)
    monkeypatch.setattr(hyre_rewards_runs, "OF_ALL", (HYRE,))
    config = replace(TINY, data=str(folder))
    job = next(one for one in jobs_of(config, tmp_path, tasks) if one.head_set == "pca" and one.blocks == (0, 2))
    rows = tune(job)
    assert {(row["target"], row["for"]) for row in rows} == {("a-x", 2), ("b-x", 2), ("e-x", 0), ("f-x", 0)}
    assert len(rows) == 4 * len(ADAPTED[HYRE][1]["eta"])


def store(out: Path, features: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}/{side}": x for name, pair in features.items() for side, x in zip("ab", pair, strict=True)}
    safetensors.numpy.save_file(arrays, out / FEATURES)


def test_study(made: tuple[Path, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (_, features) = made
    store(tmp_path, features)
    monkeypatch.setitem(ADAPTED, MAP, (ADAPTED[MAP][0], {"variance": (0.01, 1)}))
    config = replace(TINY, data=str(folder))
    sections, found = hyre_rewards.run(config, tmp_path, 1, Console(quiet=True))
    # half of the families want the opposite: the mean of the heads says nothing, five labels say which half
    assert found[0].verdict == "holds", found[0]
    rows = (tmp_path / "rows.csv").read_text()
    assert rows.count(f",{HYRE},5,") == 6 * 2
    assert len((tmp_path / "targets.csv").read_text().splitlines()) == 7
    monkeypatch.setattr(hyre_rewards_runs, "train", lambda *_: pytest.fail("trained again"))
    again, same = hyre_rewards.run(config, tmp_path, 1, Console(quiet=True))
    assert same == found
    assert again[0].parts[0] == sections[0].parts[0]


def test_without_data_it_says_so(tmp_path: Path) -> None:
    sections, found = hyre_rewards.run(RewardStudy(), tmp_path, 1, Console(quiet=True))
    assert found == []
    assert "--data" in str(sections[0].parts[0])


def test_every_head_set_trains(made: tuple[Path, Made]) -> None:
    tasks, features = made[1]
    for head_set in HEAD_SETS:
        own = with_length(tasks, features, 1.0) if head_set == "groups, length" else features
        data, _ = training_data(tasks[2:], tasks[:2], own, TINY)
        members = held_out(tasks[0], own["a-x"], train(head_set, data, TINY), TINY).examples.members
        assert np.isfinite(members).all()
        assert members.shape[0] == PAIRS
        assert members.std() > 0


def test_length_is_a_feature_of_its_own(made: tuple[Path, Made]) -> None:
    tasks, features = made[1]
    longer = with_length(tasks, features, 1.0)["a-x"]
    assert longer[0].shape == (PAIRS, WIDTH + 1)
    difference = (longer[0] - longer[1])[:, -1]
    assert np.array_equal(np.sign(np.round(difference, 5)), np.sign(tasks[0].length_differences))


def test_statistics() -> None:
    assert alignment(np.array([1.0, -2.0]), np.array([2.0, -4.0])) == pytest.approx(1)
    assert alignment(np.array([1.0, 2.0]), -np.array([1.0, 2.0])) == pytest.approx(-1), "about 0: order means nothing"
    assert alignment(np.zeros(2), np.ones(2)) == 0
    assert rank_correlation(np.array([1.0, 5.0, 9.0]), np.array([1.0, 2.0, 100.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0
    assert at_edge(HYRE, json.dumps({"eta": max(ADAPTED[HYRE][1]["eta"])})) == ["eta"]
    row = {"heads": MAIN, "method": UNIFORM, "n": 5, "target": "t", "family": "f", "accuracy": 0.5}
    assert Scores([row]).of(UNIFORM).tolist() == [0.5]
