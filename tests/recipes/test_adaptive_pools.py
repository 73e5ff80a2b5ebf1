"""E10: evaluators never see the prompts they are tested on, and rules come to what the controller says."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError, DataError
from steelyard.recipes import adaptive_pools
from steelyard.recipes.adaptive_pools import PoolsStudy, ways
from steelyard.recipes.adaptive_pools_evaluators import (
    Split,
    fit_evaluator,
    log_lengths,
    splits,
    texts_of,
    thinned,
    unit_rewards,
)
from steelyard.recipes.adaptive_pools_page import BEST, ONE, ORACLE, PRUNED, RANDOM, matched
from steelyard.recipes.adaptive_statistics import Outcome

PROMPTS, SAMPLES = 15, 8
TINY = PoolsStudy(pools=("math",), folds=3, orders=2, thresholds=4, prior_strengths=(1.0,), targets=(2.0,))


class _Encoder:
    """Says 1 where a text ends well."""

    key = "fake"

    def encode(self, texts: Any) -> np.ndarray:
        return np.array([[float(text.endswith("good")), len(prompt)] for prompt, text in texts], np.float32)


def _folder(tmp_path: Path) -> Path:
    generator, folder = np.random.default_rng(0), tmp_path / "math_best_of_8_rm_scored"
    folder.mkdir()
    with gzip.open(folder / "samples.jsonl.gz", "wt") as file:
        for number in range(PROMPTS):
            correct = (generator.random(SAMPLES) < 0.4).astype(int).tolist()
            samples = [f"one two three four {'good' if right else 'bad'}" for right in correct]
            row = {"idx": number, "question": f"q{number}", "gt": "1", "level": "Level 1", "samples": samples,
                   "pred": [str(right) for right in correct], "correct": correct,
                   "rm_score": [right + generator.normal() for right in correct]}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PoolsStudy:
    monkeypatch.setattr(adaptive_pools, "load_encoder", lambda config: _Encoder())
    monkeypatch.setattr(adaptive_pools, "cache_folder", lambda: tmp_path / "cache")
    return replace(TINY, data=str(_folder(tmp_path)))


def test_every_prompt_is_tested_once_and_never_trained_on_then() -> None:
    found = splits(11, 4, seed=0)
    assert sorted(np.concatenate([split.test for split in found])) == list(range(11))
    assert sorted(np.concatenate([split.validation for split in found])) == list(range(11))
    for split in found:
        parts = [set(split.train), set(split.validation), set(split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 11
    with pytest.raises(DataError, match="at least 4 prompts"):
        splits(3, 4, seed=0)


def test_thinning_keeps_rewards_with_their_texts() -> None:
    rewards = np.arange(6.0)
    item = PromptSamples(
        "p", rewards, np.full(6, 3), tuple(f"t{x:g}" for x in rewards), columns={"rm": rewards.tolist()}
    )
    (found,) = thinned(SamplePool((item,)), 4, seed=1)
    assert len(found.rewards) == 4
    assert found.texts == tuple(f"t{x:g}" for x in found.rewards)
    assert found.columns["rm"] == found.rewards.tolist()


def test_cut_texts_and_lengths_agree() -> None:
    item = PromptSamples("p", np.zeros(2), np.array([6, 3]), ("a b, c d", "a b"))
    pool = SamplePool((item,))
    assert [text for _, text in texts_of(pool, 3)] == ["a b,", "a b"]
    assert np.allclose(log_lengths(pool, 3)[0, :, 0], np.log1p([3, 3]))


def test_an_evaluator_learns_probabilities_and_is_calibrated_on_other_prompts() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 5, 6))
    p = 1 / (1 + np.exp(-2 * x[..., 0]))
    found = fit_evaluator((x[:100], p[:100]), (x[100:], p[100:]))
    assert np.abs(found.probabilities(x[100:]) - p[100:]).mean() < 0.03
    # a constant feature is no error
    assert np.isfinite(fit_evaluator((0 * x[:9], p[:9]), (0 * x[9:18], p[9:18])).probabilities(x)).all()


def test_graded_rewards_become_shares_of_the_training_range() -> None:
    rewards = np.array([[1.0, 3.0], [0.0, 5.0]])
    assert unit_rewards(rewards, np.array([0])).tolist() == [[0, 1], [0, 1]]
    binary = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert (unit_rewards(binary, np.array([0])) == binary).all()


def _found(study: PoolsStudy, tmp_path: Path) -> dict[str, Outcome]:
    job = adaptive_pools.PoolJob(study, "math", str(tmp_path), "rules")
    adaptive_pools.see(job)
    ready = adaptive_pools.prepare(job)
    perfect = 0.1 + 0.8 * ready.pool.rewards()
    split = Split(np.arange(5), np.arange(5, 10), np.arange(10, 15))
    return ways(ready, split, {"text": perfect}, perfect, study)[0]


def test_a_perfect_score_gets_what_an_oracle_gets(study: PoolsStudy, tmp_path: Path) -> None:
    found = _found(study, tmp_path)
    assert np.allclose(found[BEST.format("text")].rewards, found[ORACLE].rewards)
    assert np.allclose(found[PRUNED].rewards, found[ORACLE].rewards)  # the better half holds the best
    assert found[RANDOM].rewards.mean() <= found[PRUNED].rewards.mean()
    assert found[PRUNED].decoded.mean() < found[ORACLE].decoded.mean()
    adaptive = found["adaptive by text, for 2 samples"]
    assert adaptive.rewards.mean() >= found[ONE].rewards.mean()
    assert (adaptive.samples <= SAMPLES).all()


def test_a_fixed_twin_takes_as_many_samples() -> None:
    def outcome(name: str, reward: float, samples: float) -> Outcome:
        return Outcome(name, np.full(3, reward), np.full(3, samples), np.full(3, samples), np.zeros(3))

    best = BEST.format("text")
    found = {ONE: outcome(ONE, 0.0, 1), "best of 2 by text": outcome("best of 2 by text", 0.5, 2),
             best: outcome(best, 1.0, 8)}  # fmt: skip
    assert np.allclose(matched(outcome("adaptive by text, for 2 samples", 0.3, 1.5), found).rewards, 0.25)
    assert np.allclose(matched(outcome("adaptive by text, for 2 samples", 0.3, 5.0), found).rewards, 0.75)
    assert np.allclose(matched(outcome("adaptive by text, for 2 samples", 0.3, 1.0), found).rewards, 0.0)
    assert np.allclose(matched(outcome("adaptive by text, for 2 samples", 0.3, 8.0), found).rewards, 1.0)


def test_the_study_writes_rows_a_page_and_goes_on(study: PoolsStudy, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    sections, found = adaptive_pools.run(study, out, 1, Console(quiet=True))
    assert [section.heading for section in sections] == ["E10: real samples, evaluators trained on their text"]
    assert len(found) == 4  # stopping by text, correctness and reward model; giving up by text
    rows = (out / "prompts.csv").read_text().splitlines()
    adaptive = [row for row in rows if "adaptive by reward model, for 2 samples" in row]
    assert len(adaptive) == PROMPTS  # every prompt once, whatever its fold
    evaluators = (out / "evaluators.csv").read_text()
    assert all(name in evaluators for name in ("text", "length", "correctness", "reward model"))
    (out / "math.safetensors").unlink()  # nothing is computed again
    assert adaptive_pools.run(study, out, 1, Console(quiet=True))[1] == found
    with pytest.raises(ConfigError, match="other settings"):
        adaptive_pools.run(replace(study, orders=3), out, 1, Console(quiet=True))


def test_without_data_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data DIR"):
        adaptive_pools.run(TINY, tmp_path, 1, Console(quiet=True))
