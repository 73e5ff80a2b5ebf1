r"""E3 of HyRe: real preference distributions that heads have never seen, five labelled pairs of each.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812) compares reward models of 2B parameters on 18 distributions. This is the same question with a small
frozen encoder: does re-weighting with five pairs help where the heads were trained on other people's preferences?

Families of targets share prompts or labellers. Heads for the targets of a block of two families are trained on all
other families, without pairs that have a prompt of a target; settings are chosen on other blocks by nested
cross-validation (`recipes/hyre_rewards_runs.py`). So no prompt, and nobody's labels, are on both sides.
"""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.numpy
from rich.console import Console

from steelyard.bench.rows import write_rows
from steelyard.data.pair_tasks_rewards import pair_features, published_scores, read_reward_tasks
from steelyard.nets.encoder import load_encoder
from steelyard.nets.lm import cache_folder
from steelyard.recipes.hyre_jobs import begin, carry_out
from steelyard.recipes.hyre_rewards_heads import FEATURES, RewardStudy
from steelyard.recipes.hyre_rewards_page import findings, section
from steelyard.recipes.hyre_rewards_runs import evaluate, evaluation_jobs, jobs_of, tune
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

PRESETS: dict[str, RewardStudy] = {
    "tiny": RewardStudy(),
    "small": RewardStudy(),
    "paper": RewardStudy(draws=100, shots=(1, 2, 5, 10, 15), steps=1000),
}
"""Sizes. There are no generated benchmarks: without a data folder this part is left to E1."""


def run(config: RewardStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes rows.csv (one row a head set, target, method and n), targets.csv, settings.csv and
    tuning.csv into `out`.

    Raises:
        ConfigError: the folder holds a study with other settings.
        DataError: there are no preference sets in the data folder.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    if config.data is None:
        text = (
            "Not run: reward benchmarks cannot be generated. E1 asks the same of generated tastes; for this part give "
            "a folder with preference sets: --data DIR."
        )
        return [Section("E3: real preference distributions").text(text)], []
    begin(out, config)
    tasks = read_reward_tasks(config.data)
    if not (out / FEATURES).exists():
        encoder = load_encoder(config.encoder)
        console.print(f"features of {config.encoder.encoder} for {len(tasks)} preference distributions")
        features = pair_features(tasks, cache_folder() / "features", encoder.key, encoder.encode)
        arrays = {f"{name}/{side}": x for name, pair in features.items() for side, x in zip("ab", pair, strict=True)}
        safetensors.numpy.save_file(arrays, out / "features.part")
        (out / "features.part").rename(out / FEATURES)
    tuning = carry_out(jobs_of(config, out, tasks), tune, out, "preference distributions: settings", workers)
    rows = carry_out(evaluation_jobs(config, out, tuning), evaluate, out, "preference distributions: tests", workers)
    scores, settings, targets = (
        [row["values"] for row in rows if row["kind"] == kind] for kind in ("score", "setting", "target")
    )
    published = published_scores(config.data)
    targets = [row | {"published_2b": published.get(row["target"], ("", math.nan))[1]} for row in targets]
    write_rows(out / "rows.csv", scores)
    write_rows(out / "settings.csv", settings)
    write_rows(out / "tuning.csv", tuning)
    write_rows(out / "targets.csv", targets)
    return [section(config, scores, targets, settings)], findings(scores, targets)
