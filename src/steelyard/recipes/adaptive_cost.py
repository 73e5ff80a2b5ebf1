"""E11 of the adaptive-compute study: what a self-evaluation costs with the cache, and that it changes nothing.

On a small transformer, in one process and one run; `benchmarks/adaptive_decode.py` measures a Hugging Face model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steelyard.adapt.compute_policy import Draw, Request
from steelyard.adapt.decoding import ModelBackend
from steelyard.bench.rows import write_rows
from steelyard.bench.stats import Estimate
from steelyard.config import Config, require_positive
from steelyard.envs.samplers import SamplingConfig
from steelyard.nets.self_eval import SuffixEvaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.recipes.adaptive_statistics import average
from steelyard.recipes.hyre_jobs import begin
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report.page import Section
from steelyard.report.tables import Table
from steelyard.rng import torch_generator

SUFFIX = 16
"""Tokens of the question, about as many as its words have."""
TARGET = 5.0
"""Times cheaper than reading everything again, at 256 tokens."""


@dataclass(frozen=True)
class CostStudy(Config):
    """E11: cost of self-evaluation."""

    width: int = 256
    """Width of the transformer (four blocks, four heads, random weights: cost does not depend on them)."""
    rows: int = 8
    """Samples evaluated together."""
    lengths: tuple[int, ...] = (64, 256)
    """Tokens read so far."""
    repeats: int = 7
    """Timings of each, in turn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "width", "rows", "lengths", "repeats")


PRESETS = {"tiny": CostStudy(repeats=5), "small": CostStudy(), "paper": CostStudy(width=512, repeats=15)}


def run(config: CostStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Measure, write costs.csv into `out`, and return the part of the page and its findings."""
    begin(out, config)
    context = max(64, *config.lengths) + SUFFIX + 1
    model = TinyLM(TransformerConfig(64, config.width, 4, 4, context), torch_generator(0, "cost"), reference="none")
    evaluator = SuffixEvaluator(tuple(range(2, 2 + SUFFIX)), 1, 0)
    timed = [_timed(config, model, evaluator, length) for length in config.lengths]
    write_rows(out / "costs.csv", [row for rows in timed for row in rows])
    cells, ratios = [], {}
    for length, rows in zip(config.lengths, timed, strict=True):
        cached, again = (np.array([row[key] for row in rows]) for key in ("cached", "again"))
        ratios[length] = average(again / cached)
        cells.append((str(length), average(1e3 * cached), average(1e3 * again), ratios[length]))
    same = _same_samples(config, model, evaluator)
    section = Section("E11: what a self-evaluation costs").table(
        Table(
            f"A question of {SUFFIX} tokens to {config.rows} samples",
            f"Wall milliseconds on one thread, {config.repeats} timings of each in turn with 95% bootstrap intervals; "
            f"{4 * 12 * config.width**2 / 1e6:.1f} million parameters. Again: prompt, sample and question read anew.",
            ("tokens read", "with the cache", "reading again", "times cheaper"),
            tuple(cells),
        )
    )
    section.text(
        f"With evaluations after 8 and 16 tokens and at the end, {same[0]} of {same[1]} samples have the same tokens "
        "as without any."
    )
    longest = max(config.lengths)
    ratio = ratios[longest]
    assert ratio.low is not None
    assert ratio.high is not None
    beyond = Estimate(ratio.value - TARGET, ratio.low - TARGET, ratio.high - TARGET, ratio.n)
    return [section], [
        Finding(
            f"A self-evaluation with the cache is at least {TARGET:g} times cheaper than reading everything again at "
            f"{longest} tokens",
            above(beyond),
            f"{ratio.text(1)} times",
            "a small transformer; see benchmarks/adaptive_decode.py for a Hugging Face model",
        ),
        Finding(
            "Evaluating samples does not change them",
            "holds" if same[0] == same[1] else "does not hold",
            f"{same[0]} of {same[1]} samples token-identical",
            "a small transformer with random weights",
        ),
    ]


@torch.no_grad()
def _timed(config: CostStudy, model: TinyLM, evaluator: SuffixEvaluator, length: int) -> list[dict[str, float]]:
    tokens = torch.randint(64, (config.rows, length), generator=torch_generator(0, "cost/tokens"))
    mask = torch.ones(tokens.shape)
    reader: Any = model.reader(tokens, mask, 1, SUFFIX + 1)
    drawn = torch.zeros(config.rows, 3)  # no suffix looks at it

    def again() -> None:
        fresh: Any = model.reader(tokens, mask, 1, SUFFIX + 1)
        evaluator.score(fresh, drawn)

    rows = []
    for number in range(-1, config.repeats):  # the first round only warms up
        cached, anew = _seconds(lambda: evaluator.score(reader, drawn)), _seconds(again)
        if number >= 0:
            rows.append({"tokens": length, "repeat": number, "cached": cached, "again": anew})
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _same_samples(config: CostStudy, model: TinyLM, evaluator: SuffixEvaluator) -> tuple[int, int]:
    """Return how many samples are the same with and without evaluations, and how many there are."""
    prompts = [[20 + k, 30, 40 + k] for k in range(4)]
    requests = [Request(prompt, k, 0.25 * k) for prompt in range(4) for k in range(5)]

    def drawn(checkpoints: tuple[int, ...], asked: SuffixEvaluator | None) -> list[Draw]:
        backend = ModelBackend(model, asked, SamplingConfig(max_new_tokens=24), 0, prompts, eos=63)
        return backend.draw(requests, checkpoints, None)

    plain, evaluated = drawn((), None), drawn((8, 16), evaluator)
    return sum(a.tokens == b.tokens for a, b in zip(plain, evaluated, strict=True)), len(plain)
