"""Tier 1 from end to end on a handful of prompts, the page made of its rows, and what is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError, DataError, MissingExtraError
from steelyard.recipes import adaptive_arithmetic, adaptive_compute, adaptive_cost
from steelyard.recipes.adaptive_arithmetic_runs import ArithmeticStudy, SeedJob, train_policy, work
from steelyard.recipes.adaptive_compute import AdaptiveStudy
from steelyard.recipes.adaptive_page import Mix, findings, sections
from steelyard.recipes.adaptive_replays import (
    ABSOLUTE,
    ADAPTIVE,
    BEST,
    BOTH,
    GREEDY,
    MIXES,
    ONE,
    STRATA,
    VERIFIER,
    Replays,
    counts_of,
    enough_for,
    mix_rows,
    rows_of_outcomes,
)
from steelyard.report.page import Section

STUDY = ArithmeticStudy(
    demonstrations=200,
    policy_steps=3,
    width=16,
    layers=1,
    train_prompts=8,
    validation_prompts=6,
    test_prompts=8,
    samples=4,
    reader_steps=2,
    reader="suffix",
    readers=("suffix", "probe"),
    thresholds=(0.3, 0.9),
    orders=2,
    live_prompts=4,
)


def known_pool(annealed: bool, prompts: int = 60, samples: int = 16, seed: int = 0) -> SamplePool:
    """A pool whose scores know the rewards (up to noise) and whose hopeless prompts say so."""
    rng = np.random.default_rng([seed, annealed])
    # easy: four of five; medium: exactly one of all; hopeless: none
    chances = {"easy": 0.8, "medium": 0.0, "hopeless": 0.0}
    items = []
    for number in range(prompts):
        stratum = STRATA[number % 3]
        rewards = (rng.random(samples) < chances[stratum]).astype(float)
        if stratum == "medium":
            rewards[rng.integers(samples)] = 1
        certain = np.where((rewards > 0) | (stratum == "hopeless"), 0.95, 0.2)
        lengths = np.full(samples, 20)
        scores = np.clip(certain + 0.04 * rng.normal(size=samples), 0.01, 0.99)
        temperatures = 1 - 2.0 ** -np.arange(samples) if annealed else np.ones(samples)
        items.append(
            PromptSamples(
                f"p{number}",
                rewards,
                lengths,
                temperatures=temperatures,
                logps=rng.normal(size=samples),
                certainty=rng.normal(size=samples),
                answers=tuple("right" if r else str(k) for k, r in enumerate(rewards)),
                scores=scores,
                checkpoint_scores=np.stack([scores, scores], 1),
                stratum=stratum,
                columns={VERIFIER: (0.9 * rewards + 0.05).tolist()},
            )
        )
    return SamplePool(tuple(items), (6, 12), "made")


def known_rows() -> list[dict[str, Any]]:
    study = ArithmeticStudy(validation_prompts=20, test_prompts=20, thresholds=(0.5, 0.8), orders=2)
    validation = Replays(study, known_pool(False, seed=1), known_pool(True, seed=1), 1)
    test = Replays(study, known_pool(False), known_pool(True), 1)
    return rows_of_outcomes(study, validation, test, 0)


def test_mixes_share_prompts_and_have_their_shares() -> None:
    wanted = enough_for(MIXES, 40)
    assert wanted == {"easy": 30, "medium": 14, "hopeless": 12}
    pool = known_pool(False, 90)
    rows = mix_rows(pool, MIXES["easy-heavy"], 40)
    strata = [pool.items[row].stratum for row in rows]
    assert [strata.count(stratum) for stratum in STRATA] == [30, 6, 4]
    assert sum(counts_of(MIXES["mixed"], 7).values()) == 7


def test_replays_of_known_scores_come_to_what_they_must() -> None:
    rows = known_rows()
    mix = Mix.of(rows, "mixed")
    # a selector that knows the rewards is the oracle
    np.testing.assert_allclose(mix.best.rewards, mix.oracle.rewards)
    assert mix.best.samples.tolist() == [16.0] * 20
    assert mix.best.evaluated.tolist() == [16.0] * 20
    assert mix.one.rewards.mean() < mix.best.rewards.mean()
    # stopping at the first sample that is right, or hopeless, loses nothing and saves most
    adaptive = mix["curve", ADAPTIVE, 0.5]
    np.testing.assert_allclose(adaptive.rewards, mix.oracle.rewards)
    assert adaptive.samples.mean() < 7
    hopeless = adaptive.rewards == 0
    assert hopeless.any()
    assert adaptive.samples[hopeless].mean() == 1
    # an absolute threshold draws all samples of hopeless prompts
    absolute = mix["curve", "absolute correctness, T = 1", 0.5]
    assert absolute.samples[hopeless].mean() == 16


def test_pruning_by_score_keeps_the_right_ones_and_costs_less() -> None:
    mix = Mix.of(known_rows(), "mixed")
    half = mix["pruned", "lowest scores, 50%", None]
    np.testing.assert_allclose(half.rewards, mix.oracle.rewards)
    # 4 of 16 at 6 tokens and 4 at 12 instead of 20 tokens each
    assert set(half.decoded) == {4 * 6 + 4 * 12 + 8 * 20.0}
    assert mix["pruned", "at random, 50%", None].rewards.mean() < half.rewards.mean()


def test_threshold_is_chosen_on_validation_alone() -> None:
    study = ArithmeticStudy(validation_prompts=20, test_prompts=20, thresholds=(0.5, 0.8), orders=1)
    pools = known_pool(False, seed=1), known_pool(True, seed=1)
    spoiled = [
        dataclasses.replace(pool, items=tuple(dataclasses.replace(item, scores=np.full(16, 0.6)) for item in pool))
        for pool in (known_pool(False), known_pool(True))
    ]
    chosen = []
    for test in ((known_pool(False), known_pool(True)), spoiled):
        rows = rows_of_outcomes(study, Replays(study, *pools, 1), Replays(study, *test, 1), 0)
        chosen.append([row["threshold"] for row in rows if row["group"] == "chosen"])
    assert chosen[0] == chosen[1]


def test_page_and_claims_of_known_rows() -> None:
    rows = known_rows()
    rows += [
        {"kind": "auc", "seed": 0, "mix": mix, "name": "within", "value": 0.95, "low": 0.9, "high": 1.0, "prompts": 9}
        for mix in MIXES
    ]
    claims = {one.claim: one for one in findings(rows, "tier 0", "made up")}
    assert all(claim.startswith("tier 0") for claim in claims)
    gate = next(one for claim, one in claims.items() if "recovers half" in claim)
    assert gate.verdict == "holds"
    assert next(o for c, o in claims.items() if "mixed prompts: giving up half of the samples" in c).verdict == "holds"
    # the same scores with a poor AUC: the headline is not claimed
    poor = [row | {"value": 0.6} if row["kind"] == "auc" else row for row in rows]
    said = findings(poor, "tier 0", "made up")
    assert said[0].verdict == "does not hold"
    assert "too weak" in said[0].measured
    assert all(one.verdict == "not clear" for one in said if "keeps 75%" in one.claim)


def test_page_has_the_baselines_in_one_table() -> None:
    pytest.importorskip("matplotlib")
    found = sections(known_rows(), "Tier 0")
    tables = [part for section in found for part in section.parts if hasattr(part, "rows")]
    everything = next(table for table in tables if table.title == "E7, mixed: all ways")  # type: ignore[union-attr]
    names = [row[0] for row in everything.rows]  # type: ignore[union-attr]
    for name in (
        ONE,
        GREEDY,
        BEST.format(16),
        "best of 16 by an external verifier",
        "majority of 16",
        "best of 16 by mean log-probability",
        "best of 16 by self-certainty",
        "best of 16 by an oracle",
    ):
        assert name in names  # fmt: skip
    assert any(str(name).startswith(BOTH) for name in names)


@pytest.mark.slow
def test_policy_learns_its_tables() -> None:
    from steelyard.envs.arithmetic import EOS, ArithmeticScorer, ArithmeticTokenizer, draw_problems, padded
    from steelyard.envs.samplers import SamplingConfig, TinySampler

    study = ArithmeticStudy()
    model = train_policy(study, 0)
    tokenizer = ArithmeticTokenizer()
    problems = draw_problems(study.language, {"easy": 100}, 0, "test")
    prompts, mask = padded([tokenizer.prompt(p) for p in problems], left=True)
    sampler = TinySampler(model, SamplingConfig(temperature=0, max_new_tokens=study.language.max_answer), EOS, 0)
    drawn = sampler.sample(prompts, mask, 1, seed=0, step=0, keys=np_keys(100))
    texts = [tokenizer.decode(row.tolist()) for row in drawn.completions]
    assert ArithmeticScorer(5).score(problems, texts, [[]] * 100, {}).mean() > 0.75


def np_keys(count: int) -> Any:
    import torch

    return torch.arange(count)


def test_a_seed_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, claims = adaptive_arithmetic.run(STUDY, tmp_path, 1, Console(quiet=True))
    assert found
    assert claims
    rows = json.loads((tmp_path / "jobs" / "seed_0.json").read_text())
    live = [row for row in rows if row["kind"] == "live"]
    assert len(live) == 3
    assert all(row["same"] == row["prompts"] for row in live)
    assert all(row["score_difference"] < 1e-5 for row in live)
    assert {row["reader"] for row in rows if row["kind"] == "reader"} == {"suffix", "probe"}
    probe = next(row for row in rows if row["kind"] == "reader" and row["reader"] == "probe")
    assert (probe["kl"], probe["greedy_match"]) == (0.0, 1.0)
    foreign = [
        row for row in rows if row["kind"] == "outcome" and ("verifier" in row["name"] or row["name"] == ABSOLUTE)
    ]
    assert len({row["name"] for row in foreign}) == 2
    assert all(row["evaluated"] == row["decoded"] for row in foreign)  # a model of its own reads every token again
    for name in ("outcomes", "readers", "strata", "live", "costs"):
        assert (tmp_path / f"{name}.csv").is_file()
    # done jobs are not done again
    before = (tmp_path / "jobs" / "seed_0.json").stat().st_mtime_ns
    adaptive_arithmetic.run(STUDY, tmp_path, 1, Console(quiet=True))
    assert (tmp_path / "jobs" / "seed_0.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other settings"):
        adaptive_arithmetic.run(dataclasses.replace(STUDY, samples=5), tmp_path, 1, Console(quiet=True))


def test_a_seed_is_a_function_of_its_number() -> None:
    small = dataclasses.replace(STUDY, readers=("suffix",))
    first, second = ([row for row in work(SeedJob(small, 0)) if row["kind"] != "cost"] for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


def test_cost_part_says_that_samples_stay_the_same(tmp_path: Path) -> None:
    config = adaptive_cost.CostStudy(width=32, rows=2, lengths=(16,), repeats=2)
    found, claims = adaptive_cost.run(config, tmp_path, 1, Console(quiet=True))
    assert claims[1].verdict == "holds"
    assert "20 of 20" in claims[1].measured
    assert "20 of 20 samples" in str(found[0].parts)


def test_parts_that_lack_something_are_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    class Part:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def run(self, *_: Any) -> tuple[list[Section], list[Any]]:
            if self.error is not None:
                raise self.error
            return [Section("Here it is")], []

    parts = {"tier1": Part(None), "tier2": Part(MissingExtraError("needs lm"))}
    for name, part in parts.items():
        monkeypatch.setitem(adaptive_compute.MODULES, name, part)
    path = adaptive_compute.run(AdaptiveStudy(parts=("tier1", "tier2", "pools"), out=str(tmp_path)), "tiny")
    page = path.with_suffix(".md").read_text()
    assert "Here it is" in page
    assert "Left out: tier2" in page
    assert "needs lm" in page
    assert "give the folder that holds them: --data DIR" in page
    assert "pools: left out: real samples cannot be generated" in capsys.readouterr().out
    monkeypatch.setitem(adaptive_compute.MODULES, "pools", Part(DataError("a broken pool")))
    with pytest.raises(DataError, match="a broken pool"):  # nothing that is there may be left out
        adaptive_compute.run(AdaptiveStudy(parts=("pools",), data="here", out=str(tmp_path)), "tiny")


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="parts must not be empty"):
        AdaptiveStudy(parts=())
    with pytest.raises(ConfigError, match="reader 'slot' among"):
        ArithmeticStudy(readers=("probe",))
