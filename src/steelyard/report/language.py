"""The page of a preference run or a reward model's: what changed, by how much, and what the policy now writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table as RichTable

from steelyard.bench import stats
from steelyard.bench.rows import read_lines
from steelyard.bench.stats import Estimate
from steelyard.errors import MissingExtraError
from steelyard.report import plots
from steelyard.report.page import Page, Sample, write_page
from steelyard.report.plots import Frame, Picture, Series
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Rows = list[dict[str, Any]]

SAMPLE_MEASURES = (
    ("return", "reward (gold)"),
    ("proxy", "reward (proxy, trained on)"),
    ("score", "win rate against the reference"),
    ("length", "length in tokens"),
    ("kl_to_reference", "KL(policy, reference), nats per completion"),
    ("kl_from_reference", "KL(reference, policy), nats per completion"),
    ("entropy", "entropy, nats per token"),
    ("distinct_2", "distinct bigrams of words"),
)
"""(key of a row, words); intervals resample prompts."""
PAIR_MEASURES = (
    ("accuracy", "implicit reward accuracy"),
    ("margin", "margin: log-ratio of chosen less rejected"),
    ("chosen_ratio", "log-ratio of chosen completions"),
    ("rejected_ratio", "log-ratio of rejected completions"),
    ("chosen_ratio_per_token", "log-ratio of chosen, per token"),
    ("rejected_ratio_per_token", "log-ratio of rejected, per token"),
)
MOST_SAMPLES = 8
"""Prompts whose samples the page shows."""
CURVES = (
    "loss/preference", "reward", "completions/mean_length", "rewards/accuracies", "rewards/margins", "rewards/chosen",
    "rewards/rejected", "loss/negative_mass", "sampler/kl", "kl/reference", "data/staleness", "loss/reward_model",
    "grad/preference",
)  # fmt: skip


def sample_rows(run: Path) -> Rows:
    """Return the rows of fresh samples, with the share of distinct bigrams in each prompt's texts."""
    rows = [row for row in read_lines(run / "eval.jsonl") if "kl_to_reference" in row]
    texts: dict[tuple[int, int], list[str]] = {}
    for row in read_lines(run / "samples.jsonl"):
        texts.setdefault((row["update_step"], row["prompt_number"]), []).append(row["completion"])
    if not rows:  # without a scorer, samples are no evaluation episodes; their texts are still there
        rows = [
            {"update_step": row["update_step"], "prompt": row["prompt_number"], "length": row["length"]}
            for row in read_lines(run / "samples.jsonl")
        ]
    for row in rows:
        row["distinct_2"] = distinct(texts.get((row["update_step"], row["prompt"]), []), 2)
    return rows


def pair_rows(run: Path) -> Rows:
    """Return the rows of held-out pairs, with log-ratios per token."""
    rows = read_lines(run / "pairs.jsonl")
    for row in rows:
        for name in ("chosen", "rejected"):
            ratio = row[f"{name}_ratio"]
            row[f"{name}_ratio_per_token"] = None if ratio is None else ratio / row[f"{name}_length"]
    return rows


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return the share of n-grams of words that are different ones; None where no text has n words."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def estimates(rows: Rows, key: str, group: str) -> dict[int, Estimate]:
    """Return {update step: mean of `key` with its interval}; the values of one `group` (prompt, pair) count as one."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            found.setdefault(row["update_step"], {}).setdefault(row[group], []).append(float(row[key]))
    return {
        step: stats.mean_estimate(
            np.array([np.mean(values) for values in groups.values()]), numpy_generator(0, f"report/{key}", step)
        )
        for step, groups in sorted(found.items())
    }


def change(rows: Rows, key: str, group: str) -> Estimate | None:
    """Return the paired change of `key` from the first to the last evaluation, with its interval."""
    steps = sorted({row["update_step"] for row in rows})
    if len(steps) < 2:
        return None
    means: list[dict[int, float]] = []
    for step in (steps[0], steps[-1]):
        values: dict[int, list[float]] = {}
        for row in rows:
            if row["update_step"] == step and row.get(key) is not None:
                values.setdefault(row[group], []).append(float(row[key]))
        means.append({name: float(np.mean(one)) for name, one in values.items()})
    both = sorted(means[0].keys() & means[1].keys())
    if not both:
        return None
    differences: npt.NDArray[np.float64] = np.array([means[1][name] - means[0][name] for name in both])
    return stats.mean_estimate(differences, numpy_generator(0, f"report/change/{key}"))


def measure_table(title: str, caption: str, rows: Rows, measures: Sequence[tuple[str, str]], group: str) -> Table:
    """Return measure | before | after | change."""
    cells: list[tuple[Cell, ...]] = []
    steps = [row["update_step"] for row in rows]
    for key, words in measures:
        found = estimates(rows, key, group)
        if not found:
            continue
        # a measure that the last evaluation does not have (bigrams of empty answers) is missing, not an older one
        first, last = found.get(min(steps), MISSING), found.get(max(steps), MISSING)
        difference = change(rows, key, group)
        cells.append((words, first, last, MISSING if difference is None else difference))
    return Table(title, caption, ("measure", "before", "after", "change (paired)"), tuple(cells))


def tables_of(run: Path) -> list[Table]:
    """Return the tables of a run: samples and held-out pairs."""
    found = []
    if rows := sample_rows(run):
        caption = "Fresh samples on held-out prompts. Intervals are 95% bootstrap over prompts, of one training run."
        found.append(measure_table("Samples", caption, rows, SAMPLE_MEASURES, "prompt"))
    if rows := pair_rows(run):
        caption = (
            "Held-out preferences. A log-ratio is log pi - log pi_ref of a completion: the chosen one's may fall while "
            "the margin grows (displacement). Intervals are 95% bootstrap over pairs, of one training run."
        )
        found.append(measure_table("Held-out pairs", caption, rows, PAIR_MEASURES, "pair"))
    rows = [row for row in read_lines(run / "eval.jsonl") if "chosen_reward" in row]
    if rows:
        caption = "Held-out preferences under the reward model; 95% bootstrap over pairs, of one training run."
        measures = (("score", "accuracy"), ("return", "margin"), ("chosen_reward", "reward of chosen completions"),
                    ("rejected_reward", "reward of rejected completions"))  # fmt: skip
        found.append(measure_table("Held-out pairs", caption, rows, measures, "episode"))
    return found


def show(folder: Path) -> None:
    """Print the tables of a finished run and write its page."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for table in tables_of(folder):
        printed = RichTable(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            printed.add_row(*(cell.text(3) if isinstance(cell, Estimate) else cell for cell in row))
        console.print(printed)
    try:
        console.print(f"report: {write_language_report(folder)}")
    except MissingExtraError as error:  # the run itself is fine
        print(f"run: {folder} (no report page: {error})", file=sys.stderr)


def write_language_report(run: Path) -> Path:
    """Write report.html and report.md of a preference run or a reward model's. Return the path of the former.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: a log is damaged.
    """
    config = json.loads((run / "config.json").read_text())
    case = json.loads((run / "case.json").read_text())
    tables = tables_of(run)
    page = Page(f"{case['label']}, seed {case['seed']}", lead(run, config, tables))
    results = page.section("Results")
    results.notes(_notes(run))
    for table in tables:
        results.table(table)
    figures = evaluation_figures(run)
    if figures:
        results.panels(figures)
    samples = sample_pairs(run)
    if samples:
        section = page.section("Samples before and after")
        section.text(
            "The same held-out prompts with the same random numbers, before the first update and after the last one."
        )
        section.samples(*samples)
    curves = training_figures(run)
    if curves:
        page.section("Training").text("One value per log point, of one run.").panels(curves)
    settings = page.section("Where the numbers come from")
    settings.table(_settings(config, case, run))
    page.footer = "from eval.jsonl, pairs.jsonl, samples.jsonl and metrics.jsonl beside this page."
    return write_page(page, run)


def lead(run: Path, config: dict[str, Any], tables: Sequence[Table]) -> str:
    """Return the result in words, bad news included."""
    kind = config["objective"]["kind"]
    words = []
    for table in tables:
        for name, before, after, difference in table.rows:
            if table.rows.index((name, before, after, difference)) == 0 and isinstance(difference, Estimate):
                assert isinstance(before, Estimate)
                assert isinstance(after, Estimate)
                clear = "" if difference.excludes_zero() else "; the interval of the change holds 0"
                words.append(f"{name} from {before.text(3)} to {after.text(3)} ({difference.text(3)}{clear})")
    if not words:
        return f"{kind}: nothing was evaluated on held-out rows."
    return f"{kind}: " + "; ".join(words) + "."


def _notes(run: Path) -> list[str]:
    status = json.loads((run / "status.json").read_text())
    found = ["One training run: the intervals say nothing about other seeds."]
    # the page is written before the status of an unfinished run is
    if status["status"] in ("failed", "interrupted"):
        found.append(f"The run has not finished: {status['status']} {status['message']}".strip())
    metrics = read_lines(run / "metrics.jsonl")
    for name, words in (
        ("data/dropped_ties", "prompts were dropped because all their completions had the same reward"),
        ("data/dropped_empty", "empty completions were dropped"),
        ("data/dropped_unscorable", "completions could not be scored"),
        ("data/redraws", "buffers were drawn again because nothing could be learned from them"),
    ):
        if metrics and metrics[-1].get(name):
            found.append(f"{int(metrics[-1][name])} {words}.")
    return found


def evaluation_figures(run: Path) -> list[Picture]:
    """Return small curves of what was evaluated, where there are at least two evaluations."""
    samples, pairs = sample_rows(run), pair_rows(run)
    plan = [
        ("reward", samples, "prompt", (("return", "gold"), ("proxy", "proxy"))),
        ("KL, nats", samples, "prompt",
         (("kl_to_reference", "KL(policy, reference)"), ("kl_from_reference", "KL(reference, policy)"))),
        ("length, tokens", samples, "prompt", (("length", "length"),)),
        ("accuracy", pairs, "pair", (("accuracy", "implicit reward accuracy"),)),
        ("log-ratio, nats", pairs, "pair", (("chosen_ratio", "chosen"), ("rejected_ratio", "rejected"))),
    ]  # fmt: skip
    pictures = []
    for label, rows, group, keys in plan:
        series = []
        for key, name in keys:
            found = estimates(rows, key, group)
            if len(found) > 1:
                values = list(found.values())
                series.append(
                    Series(
                        name,
                        [one.value for one in values],
                        [one.value if one.low is None else one.low for one in values],
                        [one.value if one.high is None else one.high for one in values],
                        x=[float(step) for step in found],
                    )
                )
        if series:
            caption = f"{label} on held-out rows; bands are 95% over {group}s."
            frame = Frame(f"evaluation/{label}", caption, "updates", label, small=True, legend=len(series) > 1)
            pictures.append(plots.lines(series, frame))
    return pictures


def training_figures(run: Path) -> list[Picture]:
    """Return small curves of the training log."""
    metrics = read_lines(run / "metrics.jsonl")
    pictures = []
    for name in CURVES:
        points = [(row["update_step"], row[name]) for row in metrics if row.get(name) is not None]
        if len(points) > 1:
            x, y = plots.thin(*(np.array(column, np.float64) for column in zip(*points, strict=True)))
            series = [Series(name, y.tolist(), x=x.tolist(), index=0)]
            frame = Frame(f"training/{name}", name, "updates", name, small=True, legend=False)
            pictures.append(plots.lines(series, frame))
    return pictures


def sample_pairs(run: Path) -> list[Sample]:
    """Return prompts with the first sample before training and after it."""
    rows = [row for row in read_lines(run / "samples.jsonl") if row["sample"] == 0]
    steps = sorted({row["update_step"] for row in rows})
    found = []
    for prompt in sorted({row["prompt_number"] for row in rows})[:MOST_SAMPLES]:
        texts = []
        for step in dict.fromkeys((steps[0], steps[-1])):
            for row in rows:
                if row["prompt_number"] == prompt and row["update_step"] == step:
                    reward = "" if row["reward"] is None else f", reward {row['reward']:.3g}"
                    when = "before" if step == steps[0] else f"after {step} updates"
                    texts.append((f"{when}: {row['length']} tokens{reward}", row["completion"]))
                    text = row["prompt"]
        found.append(Sample(text, tuple(texts)))
    return found


def _settings(config: dict[str, Any], case: dict[str, Any], run: Path) -> Table:
    environment = json.loads((run / "environment.json").read_text())
    rows: list[tuple[Cell, ...]] = [("run", run.name), ("config hash", case["config_hash"])]
    rows += [("data hash", str(case["data_hash"])), ("data", str(config["data"]["path"]))]
    rows += [("model", json.dumps(config["model"])), ("objective", json.dumps(config["objective"]))]
    rows += [
        (key, json.dumps(config[key])) for key in ("negative", "experience", "sampling", "scorer") if key in config
    ]
    rows += [("steelyard", str(environment["steelyard"])), ("commit", str(environment["commit"]))]
    return Table("Settings", "config.json has them all.", ("what", "value"), tuple(rows))
