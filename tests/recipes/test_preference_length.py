"""The length study: equal budgets, shared foundations, runs that fail are kept, a whole study in miniature."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from steelyard.envs.length import LengthLanguageConfig, length_rewards
from steelyard.errors import ConfigError, NonFiniteError
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES
from steelyard.recipes import preference_length, preference_length_runs
from steelyard.recipes.preference_length import PRESETS, choose, reporting_jobs, run, tuning_jobs
from steelyard.recipes.preference_length_page import Results, findings, kl_at, paired
from steelyard.recipes.preference_length_runs import (
    LENGTH_METHODS,
    Job,
    Judge,
    LengthStudy,
    TaskScorer,
    experience_source,
    lay_foundation,
    load_foundation,
    sample,
    task_pairs,
    train,
)
from steelyard.report.page import Page, write_page

MINI = LengthStudy(
    tasks=("min", "skew_long"),
    seeds=(3, 4),
    learning_rates=(3e-3,),
    language=LengthLanguageConfig(words=6, prompt_words=2, cap=10, mean_length=6.0, std_length=2.0),
    width=16,
    sft_examples=300,
    sft_steps=80,
    train_prompts=200,
    held_out_prompts=60,
    evaluation_prompts=16,
    reward_model_steps=60,
    steps=4,
    prompts_per_step=4,
    evaluate_every=2,
    tuning_seeds=(),
    contrast_learning_rates=(1e-3,),
    reuse=(1, 2),
    refresh=(2,),
)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """(job of seed 3, what its foundation is like)."""
    job = Job(MINI, str(tmp_path_factory.mktemp("length")), 3)
    job.result.parent.mkdir()
    return job, lay_foundation(job)


def test_budgets_are_equal():
    base = Job(LengthStudy(tasks=("min", "mode"), tuning_seeds=(0, 1)), "out", 0)
    jobs = tuning_jobs(base)
    counts = {}
    for job in jobs:
        key = (job.task, job.method, job.arm)
        counts[key] = counts.get(key, 0) + 1
    assert set(counts.values()) == {2 * len(base.study.learning_rates)}
    assert {method for _, method, _ in counts} == set(base.study.methods)
    assert len({(job.study.steps, job.study.prompts_per_step) for job in jobs}) == 1
    with pytest.raises(ConfigError, match=r"seeds \[1\] are in both"):
        LengthStudy(seeds=(1, 2), tuning_seeds=(1,))


@pytest.mark.parametrize("size", PRESETS)
def test_presets(size):
    preset = PRESETS[size]
    assert len(preset.seeds) >= (3 if size == "tiny" else 5)
    assert {"min", "mode", "skew_long", "skew_short"} == set(preset.tasks)
    assert set(preset.methods) == set(LENGTH_METHODS) - {"ppo_unclipped"}
    names = [job.name for job in reporting_jobs(Job(preset, "out", 0), choose([], 1e-3))]
    # a sweep's first point is the main run of that method: the same files
    assert len(set(names)) < len(names)


def test_no_method_pays_for_kl_and_all_exist():
    for method in LENGTH_METHODS.values():
        config = PREFERENCE_OBJECTIVES[method.kind](learning_rate=1e-3, **method.fields)
        if method.kind in ("rloo", "ppo"):
            assert config.beta == 0
            assert not config.needs.reference
        assert config.needs.pairs == (method.kind in ("pref_ft", "dpo", "ipo"))


def test_offline_and_on_policy_updates_see_as_many_completions(mini):
    job, _ = mini
    foundation = load_foundation(job.folder, 3)
    counts = {}
    for name in ("dpo", "rloo", "online_dpo"):
        one = dataclasses.replace(job, method=name, arm="gold")
        method = LENGTH_METHODS[name]
        config = PREFERENCE_OBJECTIVES[method.kind](learning_rate=1e-3, **method.fields)
        model = preference_length_runs.TinyLM(MINI.transformer, torch.Generator().manual_seed(0))
        model.transformer.load_state_dict(foundation.policy)
        learner = preference_length_runs.build_preference_learner(model.renew_reference(), config)
        judge = Judge(MINI, foundation, one)
        scorer = TaskScorer(MINI, foundation, "min", "gold", 3) if method.on_policy else None
        batch = experience_source(one, learner, judge.train_pairs, scorer).batch(0)
        counts[name] = len(batch)
        assert (batch.born == (0 if method.on_policy else -1)).all()
        if scorer is not None:  # the scorer sees token ids, ends included
            raw = length_rewards("min", batch.lengths, 6)
            assert torch.allclose(batch.rewards, scorer.of_batch(batch))
            assert np.corrcoef(raw, batch.rewards)[0, 1] > 0.999
        if name == "online_dpo":
            chosen, rejected = batch.pairs.T
            assert (batch.lengths[chosen] < batch.lengths[rejected]).all()
    assert counts["dpo"] == counts["rloo"] == MINI.prompts_per_step * MINI.num_generations
    assert counts["online_dpo"] <= counts["dpo"]  # prompts whose completions tie have no pair


def test_a_reward_model_learns_from_a_tiny_budget(mini):
    _, found = mini
    rows = {row["model"]: row for row in found["pairs"] if row["pairs"] == "independent"}
    assert set(rows) == {"min", "skew_long", "min_scratch"}
    assert rows["min"]["reward_model_accuracy"] >= 0.9
    assert rows["skew_long"]["reward_model_accuracy"] >= 0.9
    # shorter answers score higher, all in all
    proxy = [point["proxy"] for point in found["proxy"] if point["model"] == "min"]
    assert np.corrcoef(range(len(proxy)), proxy)[0, 1] < -0.7


def test_the_reference_writes_the_language(mini):
    job, found = mini
    assert abs(found["reference_length"] - 6) < 1.2
    foundation = load_foundation(job.folder, 3)
    pairs, held_out = task_pairs(MINI, foundation, "min", 3)
    assert len(pairs) <= MINI.train_prompts
    assert len(held_out) <= MINI.held_out_prompts
    assert (pairs.lengths[:, 0] < pairs.lengths[:, 1]).all()
    skewed, _ = task_pairs(MINI, foundation, "skew_long", 3)
    assert float(skewed.lengths.float().mean()) > float(pairs.lengths.float().mean())


def test_the_judge_starts_at_no_kl_and_no_displacement(mini):
    job, _ = mini
    foundation = load_foundation(job.folder, 3)
    model = preference_length_runs.TinyLM(MINI.transformer, torch.Generator().manual_seed(0), reference="none")
    model.transformer.load_state_dict(foundation.policy)
    model.renew_reference()
    values = Judge(MINI, foundation, dataclasses.replace(job, method="dpo")).whole(model)
    for name in ("kl", "kl_k3", "reverse_kl", "train_delta_w", "held_delta_l"):
        assert abs(values[name]) < 1e-4, name
    shares = [float(share) for share in values["histogram"].split()]
    assert len(shares) == MINI.language.cap
    assert abs(sum(shares) - 1) < 0.01
    assert values["gold"] == -values["length"]
    assert values["entropy"] > 0.5
    again = sample(model, MINI, foundation.evaluation, 1, 5)
    assert torch.equal(again.completions, sample(model, MINI, foundation.evaluation, 1, 5).completions)


@pytest.mark.parametrize("method", ["pref_ft", "dpo", "ipo", "best_of_n", "rwr", "rloo", "ppo", "online_dpo"])
def test_every_method_moves_the_policy_and_repeats_exactly(mini, method):
    job, _ = mini
    arm = "learned" if LENGTH_METHODS[method].on_policy else "pairs"
    one = dataclasses.replace(job, method=method, arm=arm, learning_rate=3e-3)
    first, second = train(one), train(one)
    assert first["values"]["status"] == "done"
    assert first["values"]["kl_k3"] > 1e-4
    costs = ("cpu_seconds",)
    assert all(first["values"][k] == second["values"][k] for k in first["values"] if k not in costs)
    assert [point["step"] for point in first["curve"]] == [0, 2, 4]
    assert (first["values"]["reward_queries"] > 0) == LENGTH_METHODS[method].on_policy


def test_a_run_that_fails_keeps_its_last_values(mini, monkeypatch):
    job, _ = mini
    real, calls = preference_length_runs.update, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise NonFiniteError("loss 'preference' is not finite at update step 3")
        return real(*arguments)

    monkeypatch.setattr(preference_length_runs, "update", breaks)
    row = train(dataclasses.replace(job, method="dpo", learning_rate=3e-3))
    assert row["values"]["status"] == "failed"
    assert "not finite" in row["values"]["message"]
    assert row["values"]["updates"] == 3
    assert row["values"]["gold"] == row["curve"][-1]["gold"]
    assert row["curve"][-1]["step"] == 2


def test_a_run_with_nothing_left_to_learn_stops_and_counts(mini, monkeypatch):
    job, _ = mini
    # every reward the same: no pair, nothing to learn from
    monkeypatch.setattr(TaskScorer, "score", lambda self, prompts, *rest: torch.zeros(len(prompts)))
    row = train(dataclasses.replace(job, method="online_dpo", arm="gold", learning_rate=3e-3))
    assert row["values"]["status"] == "converged"
    assert row["values"]["updates"] == 0
    assert row["values"]["mean_gold"] == pytest.approx(
        (row["curve"][0]["gold"] + 2 * row["values"]["gold"]) / 3, abs=1e-6
    )


def _row(method, arm, seed, gold, task="min", **values):
    identity = {"stage": "main", "task": task, "method": method, "arm": arm, "learning_rate": 1e-3,
                "pairs": "independent", "reuse": 1, "refresh": 1, "seed": seed}  # fmt: skip
    return {"identity": identity, "values": {"gold": gold, "mean_gold": gold, **values}, "curve": []}


def test_tuning_prefers_the_end_and_then_the_speed():
    def tuned(rate, gold, mean_gold):
        row = _row("dpo", "pairs", 0, gold)
        row["identity"]["learning_rate"] = rate
        row["values"]["mean_gold"] = mean_gold
        return row

    assert choose([tuned(1e-3, -2.0, -9), tuned(3e-3, -1.0, -9.5)], 5.0)["min", "dpo", "pairs"] == 3e-3
    assert choose([tuned(1e-3, -1.01, -3), tuned(3e-3, -1.0, -9.5)], 5.0)["min", "dpo", "pairs"] == 1e-3
    assert choose([], 5.0)["min", "dpo", "pairs"] == 5.0


def test_differences_are_paired_by_seed_and_skewed_tasks_share_gold_runs():
    rows = [_row("dpo", "pairs", 3, -4.0), _row("dpo", "pairs", 4, -2.0)]
    rows += [_row("online_dpo", "gold", 3, -1.0), _row("online_dpo", "gold", 4, -1.5)]
    rows += [_row("dpo", "pairs", seed, -6.0, "skew_long") for seed in (3, 4)]
    results = Results(rows, MINI)
    assert paired(results, "gold", "min", [("online_dpo", "gold")], [("dpo", "pairs")]).tolist() == [3.0, 0.5]
    assert paired(results, "gold", "min", [("online_dpo", "gold")], [("ipo", "pairs")]) is None
    skewed = paired(results, "gold", "skew_long", [("online_dpo", "gold")], [("dpo", "pairs")])
    assert skewed.tolist() == [5.0, 4.5]


def test_claims_follow_from_the_rows():
    rows = []
    for seed in (3, 4):
        rows += [_row("dpo", "pairs", seed, -2.0, start_gold=-13.0, held_delta_w=-9.0)]
        rows += [_row("pref_ft", "pairs", seed, -11.0 - seed, start_gold=-13.0, held_delta_w=1.0)]
        rows += [_row("rloo", "learned", seed, -1.0, start_gold=-13.0)]
        rows += [_row("rloo", "learned", seed, -0.1, "mode", start_gold=-3.0)]
        rows += [_row("dpo", "pairs", seed, -0.3, "mode", start_gold=-3.0)]
    found = {finding.claim: finding for finding in findings(MINI, Results(rows, MINI))}
    assert found["Min (misaligned): on-policy with the learned reward ends above offline"].verdict == "holds"
    assert found["Mode (aligned): on-policy with the learned reward and offline are comparable"].verdict == "holds"
    assert found["Min: DPO lowers the log-probability of held-out chosen answers"].measured.startswith("9.00")
    assert found["on-policy sampling gains more in Min than in Mode"].verdict == "holds"
    assert not any("Skew" in claim for claim in found)  # not run, so not claimed


def test_kl_where_a_level_is_reached():
    curve = [{"gold": -13.0, "kl": 0.0}, {"gold": -9.0, "kl": 2.0}, {"gold": -1.0, "kl": 6.0}]
    assert kl_at(curve, -5.0) == 4.0
    assert kl_at(curve, -11.0) == 1.0
    assert np.isnan(kl_at(curve, 0.0))


def test_a_study_in_miniature(tmp_path, monkeypatch):
    study = dataclasses.replace(
        MINI, tasks=("min",), methods=("dpo", "ppo"), steps=2, evaluate_every=1, tuning_seeds=(0,), sft_steps=10,
        learning_rates=(1e-3, 3e-3), reward_model_steps=10,
    )  # fmt: skip
    out = tmp_path / "length"
    found = run(study, out, 1, Console(quiet=True))
    page = write_page(Page("Length", "A test.", found), tmp_path)
    text = page.read_text()
    for words in (
        "Min Length",
        "Over-optimisation",
        "Similar and distinct pairs",
        "PPO without clipping",
        "from scratch",
        "Claims",
    ):
        assert words in text
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert {row["seed"] for row in rows} == {"3", "4"}
    assert {row["stage"] for row in rows} == {"main", "reuse", "contrast", "scratch"}
    tuned = list(csv.DictReader((out / "tuning.csv").open()))
    assert {row["seed"] for row in tuned} == {"0"}
    assert {row["chosen"] for row in tuned} == {"True", "False"}
    for name in ("curves.csv", "pairs.csv", "proxy.csv"):
        assert (out / name).stat().st_size > 100
    # going on with it carries nothing out again
    for name in ("train", "lay_foundation"):
        monkeypatch.delattr(preference_length, name)
    assert len(run(study, out, 1, Console(quiet=True))) == len(found)
    with pytest.raises(ConfigError, match="holds runs with other settings"):
        run(dataclasses.replace(study, steps=3), out, 1, Console(quiet=True))
    assert json.loads((out / "study.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_on_policy_and_the_gold_reward_reach_the_shortest_answers(tmp_path):
    study = LengthStudy(tasks=("min",), seeds=(3,), tuning_seeds=(), contrasts=False)
    job = Job(study, str(tmp_path), 3)
    job.result.parent.mkdir()
    found = lay_foundation(job)
    assert abs(found["reference_length"] - 13) < 1
    assert found["pairs"][0]["reward_model_accuracy"] > 0.95
    gold = {}
    for method in ("pref_ft", "rloo", "ppo", "online_dpo", "best_of_n"):
        arm = "gold" if LENGTH_METHODS[method].on_policy else "pairs"
        gold[method] = train(dataclasses.replace(job, method=method, arm=arm, learning_rate=1e-3))["values"]["gold"]
    assert gold["pref_ft"] < -8
    assert all(value > -1.5 for method, value in gold.items() if method != "pref_ft")
