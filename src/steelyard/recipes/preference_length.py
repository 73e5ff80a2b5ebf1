r"""Level 2 of the preference study: length problems with a small transformer, learned and gold rewards.

Tajwar, Singh et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024): where the
reward peaks relative to the reference decides how much on-policy sampling and a negative gradient help.

What is run here, for each seed: a transformer is trained on the language of `envs/length.py` (the reference); pairs are
sampled from it and labelled with the gold reward; a Bradley-Terry reward model begins at the reference's weights and
learns from those pairs; then every method fine-tunes the reference with equal steps and completions a step. Offline
methods see the pairs; on-policy ones draw completions and score them with the learned reward (arm "learned": the same
data decide) or with the gold one (arm "gold"). No arm has a KL penalty, so that the KL spent is the method's own.

| task | gold reward | where it peaks | pairs |
|---|---|---|---|
| min | - length | hardly any mass of the reference | the reference's |
| mode | - abs(length - m) | most mass of the reference | the reference's |
| skew_long, skew_short | - length | hardly any mass | lengths cut anew to exp(+- rate length) |

A run that fails keeps the values of its last evaluation and stays in every average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from steelyard.bench.executors import LocalExecutor, work_off
from steelyard.bench.rows import write_rows
from steelyard.config import to_json
from steelyard.errors import ConfigError
from steelyard.recipes.preference_length_page import sections
from steelyard.recipes.preference_length_runs import (
    LENGTH_METHODS,
    Job,
    LengthStudy,
    TaskName,
    lay_foundation,
    train,
)
from steelyard.report.page import Section
from steelyard.train.progress import ProgressLine

PRESETS: dict[str, LengthStudy] = {
    "tiny": LengthStudy(),
    "small": LengthStudy(
        seeds=tuple(range(10, 18)),
        tuning_seeds=(0, 1),
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
        sft_steps=600,
        reward_model_steps=200,
        steps=150,
        evaluate_every=10,
        reuse=(1, 2, 4, 8),
        refresh=(2, 4, 8),
    ),
    "paper": LengthStudy(
        seeds=tuple(range(10, 20)),
        tuning_seeds=(0, 1, 2),
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
        width=64,
        sft_examples=20_000,
        sft_steps=2_000,
        train_prompts=19_000,
        held_out_prompts=1_000,
        reward_model_steps=600,
        steps=1_000,
        evaluate_every=50,
        reuse=(1, 2, 4, 8),
        refresh=(8, 16, 32, 64),
    ),
}
"""Sizes; "paper" has the paper's numbers of pairs and its sweeps, with this toy in place of its language model."""


def run(config: LengthStudy, out: Path, workers: int, console: Console) -> list[Section]:
    """Carry out the study, or go on with it, and return its part of the report.

    Writes rows.csv (one row a run), curves.csv (every evaluation), tuning.csv, pairs.csv (what the pairs are like) and
    proxy.csv (what the reward models say about each length) into `out`.

    Raises:
        ConfigError: the directory holds runs with other settings.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = to_json(replace(config, seeds=(0,), tuning_seeds=()))  # further seeds may be added
    recorded = out / "study.json"
    if recorded.exists() and recorded.read_text() != identity:
        raise ConfigError(f"{out}: holds runs with other settings (see {recorded}); choose another --out")
    recorded.write_text(identity)

    base = Job(config, str(out), 0)
    everyone = (*config.tuning_seeds, *config.seeds)
    foundations = carry_out([replace(base, seed=seed) for seed in everyone], workers, "length: references", console)
    tuning = carry_out(tuning_jobs(base), workers, "length: tuning", console)
    chosen = choose(tuning, config.learning_rates[0])
    rows = carry_out(reporting_jobs(base, chosen), workers, "length: runs", console)

    curves = [row["identity"] | point for row in rows for point in row["curve"]]
    write_rows(out / "rows.csv", [row["identity"] | row["values"] for row in rows])
    write_rows(out / "curves.csv", curves)
    write_rows(
        out / "tuning.csv",
        [
            row["identity"] | {"chosen": chosen[_choice(row)] == row["identity"]["learning_rate"]} | row["values"]
            for row in tuning
        ],
    )
    kept = [found for found in foundations if found["seed"] in config.seeds]
    write_rows(out / "pairs.csv", [row for found in kept for row in found["pairs"]])
    write_rows(out / "proxy.csv", [row for found in kept for row in found["proxy"]])
    for row in rows:
        if row["values"]["status"] == "failed":
            console.print(f"failed: {row['name']}: {row['values']['message']}", markup=False, highlight=False)
    return sections(config, rows, tuning, chosen, kept)


def arms_of(config: LengthStudy, task: TaskName, method: str) -> tuple[Literal["learned", "gold", "pairs"], ...]:
    """Return the arms that are runs of their own: a skewed task has min's gold reward, so it shares min's gold runs."""
    if not LENGTH_METHODS[method].on_policy:
        return ("pairs",)
    shared = task.startswith("skew") and "min" in config.tasks
    return tuple(arm for arm in config.arms if not (shared and arm == "gold"))


def tuning_jobs(base: Job) -> list[Job]:
    """Return one job per task, method, arm, learning rate and tuning seed: an equal budget for all."""
    config = base.study
    return [
        replace(base, task=task, method=method, arm=arm, learning_rate=rate, seed=seed, stage="tuning")
        for seed in config.tuning_seeds
        for task in config.tasks
        for method in config.methods
        for arm in arms_of(config, task, method)
        for rate in config.learning_rates
    ]


Choice = tuple[str, str, str]


def _choice(row: Mapping[str, Any]) -> Choice:
    identity = row["identity"]
    return identity["task"], identity["method"], identity["arm"]


def choose(tuning: Sequence[Mapping[str, Any]], default: float) -> dict[Choice, float]:
    """Return the learning rate of each (task, method, arm) with the highest mean gold reward at the end.

    Rewards that agree to a tenth of a token are taken for equal; then the higher mean over training decides. The gold
    reward chooses in every arm: which rate is right is not what is studied.
    """
    found: dict[Choice, dict[float, list[tuple[float, float]]]] = {}
    for row in tuning:
        values = row["values"]
        rates = found.setdefault(_choice(row), {})
        rates.setdefault(row["identity"]["learning_rate"], []).append((values["gold"], values["mean_gold"]))

    def merit(runs: list[tuple[float, float]]) -> tuple[float, float]:
        gold, during = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        return round(gold, 1), during

    best = {choice: max(rates, key=lambda rate: merit(rates[rate])) for choice, rates in found.items()}
    return _Chosen(best, default)


class _Chosen(dict[Choice, float]):
    """Chosen rates; the default where nothing was tuned."""

    def __init__(self, chosen: dict[Choice, float], default: float) -> None:
        super().__init__(chosen)
        self.default = default

    def __missing__(self, choice: Choice) -> float:
        return self.default


def reporting_jobs(base: Job, chosen: Mapping[Choice, float]) -> list[Job]:
    """Return the runs of the tables; seeds outermost, so that a study that is stopped holds whole pairs."""
    config, jobs = base.study, []
    for seed in config.seeds:
        for task in config.tasks:
            for method in config.methods:
                for arm in arms_of(config, task, method):
                    rate = chosen[task, method, arm]
                    jobs.append(replace(base, seed=seed, task=task, method=method, arm=arm, learning_rate=rate))
        jobs += [replace(job, seed=seed) for job in sweep_jobs(base, chosen)]
        if config.scratch and "min" in config.tasks:
            # what it changes is asked at the rates that suit the other reward model
            jobs += [
                replace(base, seed=seed, method=method, arm="scratch", learning_rate=chosen["min", method, "learned"],
                        stage="scratch")
                for method in config.methods
                if LENGTH_METHODS[method].on_policy
            ]  # fmt: skip
        if config.contrasts:
            # the same rates for all: the pairs are what is compared
            jobs += [
                replace(base, seed=seed, method=method, pairs=pairs, learning_rate=rate, stage="contrast")
                for method in ("dpo", "pref_ft")
                for pairs in ("similar", "distinct")
                for rate in config.contrast_learning_rates
            ]
    return jobs


def sweep_jobs(base: Job, chosen: Mapping[Choice, float]) -> list[Job]:
    """Return the reuse and staleness sweep: Min Length with the gold reward, each method at its own rate."""
    config = base.study
    points = [(reuse, 1) for reuse in config.reuse] + [(1, refresh) for refresh in config.refresh if refresh > 1]
    jobs = []
    for method, tuned_as in (("best_of_n", "best_of_n"), ("ppo", "ppo"), ("ppo_unclipped", "ppo")):
        if tuned_as in config.methods and "gold" in config.arms and "min" in config.tasks:
            rate = chosen["min", tuned_as, "gold"]
            one = replace(base, method=method, arm="gold", learning_rate=rate, stage="reuse")
            jobs += [replace(one, reuse=reuse, refresh=refresh) for reuse, refresh in points]
    return jobs


def carry_out(jobs: Sequence[Job], workers: int, label: str, console: Console) -> list[dict[str, Any]]:
    """Carry out the jobs that have no result yet, `workers` at a time, and return all results in their order.

    Raises:
        Interrupted: ctrl-C.
        SteelyardError: a worker process died.
    """
    todo = {job.result: job for job in jobs if not job.result.exists()}
    for job in todo.values():
        job.result.parent.mkdir(parents=True, exist_ok=True)
    done = len(jobs) - len(todo)

    def ended(job: Job, _: str | None) -> None:
        nonlocal done
        done += 1
        progress.advance_to(done, job.name)

    with ProgressLine(label, len(jobs), done) as progress:
        work_off(todo.values(), _work, LocalExecutor(workers) if workers > 1 and todo else None, ended)
    return [json.loads(job.result.read_text()) | {"identity": job.identity} for job in jobs]


def _work(job: Job) -> str | None:
    """Carry out one job and write its result."""
    result = train(job) if job.method else lay_foundation(job)
    unfinished = job.result.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(job.result)
    return None
