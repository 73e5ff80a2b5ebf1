"""Tier 2 with a random model of thirty thousand parameters: every stage runs, resumes, and keeps its splits apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("reasoning_gym")

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError
from steelyard.recipes import adaptive_smollm2
from steelyard.recipes.adaptive_replays import MIXES, VERIFIER, mix_rows
from steelyard.recipes.adaptive_smollm2 import (
    PRESETS,
    SmolLMStudy,
    all_problems,
    completed,
    level_rows,
    stated,
    with_verifier,
)

TINY = SmolLMStudy(
    model="tiny", sft_problems=(16, 8), sft_learning_rates=(1e-3, 1e-4), train_prompts=16,
    held_out_prompts=8, validation_prompts=10, test_prompts=10,
    samples=4, max_new_tokens=8, reader_steps=2, suffix_steps=2, checkpoints=(2, 4),
    readers=("suffix", "slot", "probe", "state"), annealed=3, thresholds=(0.3, 0.6, 0.9), orders=2, most_samples=(1.5,),
)  # fmt: skip


class _Encoder:
    key = "fake"

    def encode(self, texts: Any) -> np.ndarray:
        return np.array([[float("=" in text), len(text)] for _, text in texts], np.float32)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adaptive_smollm2, "load_encoder", lambda config: _Encoder())
    monkeypatch.setattr(adaptive_smollm2, "cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_no_problem_is_in_two_splits(size: str) -> None:
    found = all_problems(PRESETS[size])  # and there are enough of every level
    questions = [one.question for part in found.values() for one in part]
    assert len(set(questions)) == len(questions)


def test_the_policy_does_not_depend_on_how_much_is_tested() -> None:
    study = PRESETS["tiny"]
    found, other = (all_problems(one) for one in (study, replace(study, test_prompts=80)))
    assert [found[name] for name in ("sft_0", "sft_1", "train")] == [
        other[name] for name in ("sft_0", "sft_1", "train")
    ]


def test_the_tables_prompts_serve_every_mix() -> None:
    study = PRESETS["tiny"]
    items = tuple(
        PromptSamples(str(number), np.zeros(1), np.ones(1, np.int64), stratum=one.stratum)
        for number, one in enumerate(all_problems(study)["test"])
    )
    for shares in MIXES.values():
        assert len(mix_rows(SamplePool(items), shares, study.test_prompts)) == study.test_prompts


def test_solutions_fit_and_votes_find_their_answers() -> None:
    for one in all_problems(PRESETS["tiny"])["train"]:
        assert stated(one.solution) == one.answer
        assert len(one.solution) < PRESETS["tiny"].max_new_tokens


def test_the_verifier_learns_from_training_samples_only(encoder: None) -> None:
    def pool(right: float) -> SamplePool:
        items = tuple(
            PromptSamples(f"p{right}{i}", np.array([right, 1 - right]), np.array([3, 3]), ("1=1", "ab"))
            for i in range(8)
        )
        return SamplePool(items)

    (found,) = with_verifier(_Encoder(), pool(1.0), pool(1.0), [pool(0.0)])
    assert (found.array(VERIFIER)[:, 0] > 0.5).all()  # as in training, although it is wrong here
    assert (found.array(VERIFIER)[:, 1] < 0.5).all()


def test_samples_at_temperature_1_stand_for_the_last_annealed_ones() -> None:
    def item(n: int, reward: float) -> PromptSamples:
        own = np.full(n, reward)
        texts = tuple(f"{reward}{k}" for k in range(n))
        return PromptSamples(
            "p", own, np.arange(n) + 1, texts, temperatures=np.ones(n), scores=own, checkpoint_scores=own[:, None]
        )

    (found,) = completed(SamplePool((item(2, 0.0),), (3,)), SamplePool((item(4, 1.0),), (3,)))
    assert found.rewards.tolist() == [0, 0, 1, 1]
    assert found.texts == ("0.00", "0.01", "1.02", "1.03")
    assert found.lengths.tolist() == [1, 2, 3, 4]
    assert found.temperatures is not None
    assert found.temperatures.tolist() == [0, 0.5, 0.75, 0.875]
    assert found.checkpoint_scores is not None
    assert found.checkpoint_scores.shape == (4, 1)


def test_levels_are_measured() -> None:
    item = PromptSamples("p", np.array([1.0, 0.0]), np.array([4, 6]), columns={"level": "word of 4"})
    (row,) = level_rows(SamplePool((item,)))
    assert (row["one"], row["any"], row["tokens"], row["prompts"]) == (0.5, 1.0, 5.0, 1)


@pytest.mark.lm
def test_every_stage_runs_and_a_stopped_study_goes_on(
    encoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out, quiet = tmp_path / "out", Console(quiet=True)

    def stop(*_: Any) -> Any:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(adaptive_smollm2, "replay", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            adaptive_smollm2.run(TINY, out, 1, quiet)
    monkeypatch.setattr(adaptive_smollm2, "fine_tune", lambda *_: None)
    monkeypatch.setattr(adaptive_smollm2, "draw", stop)
    monkeypatch.setattr(adaptive_smollm2, "train_reader", stop)
    sections, found = adaptive_smollm2.run(TINY, out, 1, quiet)
    assert found
    assert sections[-1].heading == "tier 2, SmolLM2-135M: problems and cost"
    for name in ("pool_test_constant", "pool_test_annealed"):
        pool = SamplePool.load(out / name)
        assert np.isfinite(pool.array("scores")).all()  # read while they were drawn
        assert pool.checkpoints == TINY.checkpoints
    assert SamplePool.load(out / "pool_test_annealed").items[0].temperatures[0] == 0
    assert {"level", "reader", "outcome"} <= {
        line.split(",")[0] for line in (out / "replays.csv").read_text().splitlines()
    }
    with pytest.raises(ConfigError, match="other settings"):
        adaptive_smollm2.run(replace(TINY, orders=3), out, 1, quiet)
