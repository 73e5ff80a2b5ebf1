"""Readers of preference sets: who was preferred, ties, families, prompts of dialogues, and cached features."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.data.pair_tasks_rewards import (
    pair_features,
    published_scores,
    read_reward_tasks,
    texts_of,
)
from steelyard.errors import DataError


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "autoj_scenarios/pairs.jsonl.gz",
        [
            {"scenario": "chitchat", "prompt": "hi", "response_1": "a", "response_2": "bb", "label": label}
            for label in ("1", "2", "tie")
        ]
        + [{"scenario": "new one", "prompt": "p", "response_1": "x", "response_2": "y", "label": "1"}],
    )
    write(
        tmp_path / "pandalm_human/testset.jsonl.gz",
        [
            {"motivation_app": "Jira", "instruction": "do", "input": "", "response1": "one", "response2": False,
             "annotator1": 1, "annotator2": 2, "annotator3": 0},
            {"motivation_app": "Jira", "instruction": "do", "input": "it", "response1": "one", "response2": "two",
             "annotator1": 1, "annotator2": 1, "annotator3": 2},
        ],
    )  # fmt: skip
    write(
        tmp_path / "hh_rlhf_harmless/test.jsonl.gz",
        [
            {
                "chosen": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: I do",
                "rejected": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: I don't",
            }
        ],
    )
    write(
        tmp_path / "rm_bench/chat.jsonl.gz",
        [{"prompt": "p", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}],
    )
    write(
        tmp_path / "judgebench/pairs.jsonl.gz",
        [
            {"source": "mmlu-pro-math", "question": "q", "response_A": "A", "response_B": "B", "label": "B>A",
             "published_rm_scores": {"Ray2333_GRM-Gemma-2B-rewardmodel-ft": [0.0, 2.0]}},
            {"source": "mmlu-pro-physics", "question": "q", "response_A": "A", "response_B": "B", "label": "A>B",
             "published_rm_scores": {"Ray2333_GRM-Gemma-2B-rewardmodel-ft": [0.0, 2.0]}},
            {"source": "livebench-math", "question": "q", "response_A": "A", "response_B": "B", "label": "A>B",
             "published_rm_scores": None},
        ],
    )  # fmt: skip
    write(
        tmp_path / "reward_subsets/hep-go.jsonl.gz",
        [
            {"prompt": "p", "chosen": "good", "rejected": "bad"},
            {"prompt": "p", "chosen": "same", "rejected": "same"},
        ],
    )
    return tmp_path


def test_sides_ties_and_groups(folder: Path) -> None:
    tasks = {task.name: task for task in read_reward_tasks(folder)}
    chat = tasks["auto-j communication"]
    assert [(pair.chosen, pair.rejected) for pair in chat.pairs] == [("a", "bb"), ("bb", "a")]
    assert chat.groups == ("auto-j chitchat",) * 2
    assert len(chat) == 2
    np.testing.assert_allclose(chat.length_differences, [np.log(2 / 3), np.log(3 / 2)])
    assert tasks["auto-j other"].groups == ("auto-j new one",)
    first, second, third = (tasks[f"pandalm annotator {k}"].pairs for k in (1, 2, 3))
    assert [pair.chosen for pair in first] == ["one", "one"]
    assert [pair.chosen for pair in second] == ["False", "one"]
    assert [pair.chosen for pair in third] == ["two"]
    assert [pair.prompt for pair in first] == ["do", "do\n\nit"]
    assert [pair.chosen for pair in tasks["judgebench mmlu-pro exact"].pairs] == ["B", "A"]
    assert len(tasks["hep-go"]) == 1, "a pair of equal completions says nothing"


def test_rm_bench_styles_and_families(folder: Path) -> None:
    tasks = {task.name: task for task in read_reward_tasks(folder)}
    same, hard = tasks["rm-bench chat"], tasks["rm-bench chat hard"]
    assert [pair.chosen[1] == pair.rejected[1] for pair in same.pairs] == [True] * 3
    assert all(pair.chosen[1] < pair.rejected[1] for pair in hard.pairs)
    assert len(hard) == 3
    assert same.family == hard.family == "alpacaeval"
    assert tasks["hep-go"].family == "humaneval"


def test_last_turn_of_a_dialogue(folder: Path) -> None:
    pair = next(task for task in read_reward_tasks(folder) if task.family == "hh").pairs[0]
    assert pair.chosen == "I do"
    assert pair.rejected == "I don't"
    assert pair.prompt.endswith("Human: s\n\nAssistant:")


def test_features_are_of_the_pair_and_cached(folder: Path, tmp_path: Path) -> None:
    tasks, calls = read_reward_tasks(folder), []

    def compute(texts: Any) -> Any:
        calls.append(len(texts))
        return np.array([[len(prompt), len(completion)] for prompt, completion in texts], np.float32)

    features = pair_features(tasks, tmp_path / "cache", "k", compute, quiet=True)
    chosen, rejected = features["auto-j communication"]
    assert (chosen - rejected).tolist() == [[0, -1], [0, 1]]
    assert sum(calls) == sum(map(len, texts_of(tasks).values()))
    again = pair_features(tasks, tmp_path / "cache", "k", lambda texts: pytest.fail("not cached"), quiet=True)
    assert all(np.array_equal(features[name], again[name]) for name in features)


def test_published_scores_are_of_the_same_rows(folder: Path) -> None:
    scores = published_scores(folder)
    assert scores == {"judgebench mmlu-pro exact": ("GRM-Gemma-2B-rewardmodel-ft", 0.5)}


def test_errors_name_the_place(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one of the folders"):
        read_reward_tasks(tmp_path / "nothing")
    write(folder / "reward_subsets/hep-go.jsonl.gz", [{"prompt": "p", "chosen": "c"}])
    with pytest.raises(DataError, match=r"hep-go\.jsonl\.gz, line 1: expected 'rejected'"):
        read_reward_tasks(folder)


def test_real_sets(shared_data: Path) -> None:
    tasks = read_reward_tasks(shared_data)
    assert len(tasks) >= 18
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(len({pair.prompt for pair in task.pairs}) >= 20 for task in tasks), "5 prompts to adapt, 15 to test"
    assert published_scores(shared_data)["llmbar-natural"][1] == 0.75
