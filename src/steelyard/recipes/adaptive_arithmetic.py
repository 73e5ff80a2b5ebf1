r"""Tier 1 of the adaptive-compute study (E7, E8, E9): a small transformer on step-by-step arithmetic, made on the spot.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation"
(arXiv 2410.02725) use an 8-billion-parameter model on instructions and GSM8K. Here everything is small and known: slips
that another sample repairs, misconceptions that greedy decoding repeats, and problems that no sample solves
(`envs/arithmetic.py`). What is measured is the method: whether a model can read off its own partial answer that a fresh
one would be better, and what stopping, pruning and choosing by that are worth against greedy decoding, best-of-k and
random pruning on the same prompts.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from steelyard.bench.rows import write_rows
from steelyard.recipes.adaptive_arithmetic_runs import ArithmeticStudy, SeedJob, work
from steelyard.recipes.adaptive_page import findings, sections
from steelyard.recipes.adaptive_replays import means
from steelyard.recipes.hyre_jobs import Row, begin, carry_out
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

TITLE = "Tier 1: a small transformer on step-by-step arithmetic"
DIFFERS = "a transformer of 0.1 million parameters on generated arithmetic with a verifier, not an 8B model on language"

PRESETS: dict[str, ArithmeticStudy] = {
    "tiny": ArithmeticStudy(
        demonstrations=12_000,
        policy_steps=800,
        train_prompts=500,
        validation_prompts=150,
        test_prompts=300,
        readers=("slot", "probe"),
        reader_steps=120,
    ),
    "small": ArithmeticStudy(seeds=(1, 2, 3)),  # seed 0 was used while the task and its sizes were chosen
    "paper": ArithmeticStudy(
        seeds=tuple(range(5)),
        demonstrations=40_000,
        policy_steps=3_000,
        train_prompts=3_000,
        validation_prompts=500,
        test_prompts=2_000,
        reader_steps=1_000,
        orders=8,
        live_prompts=100,
    ),
}
"""Sizes; small and paper have at least 1,000 test prompts of each mix and seed."""


def run(config: ArithmeticStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes outcomes.csv (means of every way of spending compute), readers.csv, strata.csv, live.csv and costs.csv into
    `out`; outcomes prompt by prompt are in `out`/jobs.

    Raises:
        ConfigError: the folder holds a study with other settings.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    begin(out, config)
    rows = carry_out([SeedJob(config, seed) for seed in config.seeds], work, out, "tier 1: arithmetic", workers)
    write_tables(out, rows)
    return sections(rows, TITLE), findings(rows, "tier 1", DIFFERS)


def write_tables(out: Path, rows: list[Row]) -> None:
    """Write the rows of each kind as CSV; of outcomes their means over prompts."""
    for kind, name in (
        ("reader", "readers"),
        ("stratum", "strata"),
        ("auc", "aucs"),
        ("live", "live"),
        ("cost", "costs"),
    ):
        write_rows(out / f"{name}.csv", [row for row in rows if row["kind"] == kind])
    write_rows(out / "outcomes.csv", [means(row) for row in rows if row["kind"] == "outcome"])
