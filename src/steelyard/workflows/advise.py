"""From a model, data and a reward to advice: samples are drawn and scored, data are scored, and the page is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steelyard.bench.advise import Advice, as_json
from steelyard.bench.evidence import Evidence, Floats, Observations, PairObservations, edit_distance, shared_tokens
from steelyard.config import Config, require_positive, require_range
from steelyard.data.preferences import TextData, TokenizedData, Truncation
from steelyard.envs.samplers import Sampler, SamplingConfig, texts
from steelyard.envs.scorers import CompletionScorer, checked_scores, text_of
from steelyard.report.page import Page, Sample, write_page
from steelyard.report.plots import Picture
from steelyard.report.tables import Table
from steelyard.rng import numpy_generator
from steelyard.train.progress import ProgressLine

SHOWN = 3
"""Prompts whose completions stand on the page."""


@dataclass(frozen=True)
class AdviseConfig(Config):
    """How much is measured."""

    num_prompts: int = 32
    """P: prompts, drawn at random; intervals are over them."""
    num_generations: int = 8
    """N: samples per prompt."""
    max_new_tokens: int = 128
    """Longest sample; advice from samples that were cut is worth little."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    max_completion_tokens: int = 512
    """Longest completion of the data; the rest of a longer one is not measured."""
    truncation: Truncation = "keep_end"
    """What happens to a longer prompt."""
    batch_prompts: int = 4
    """Prompts sampled and scored together."""
    peak: float | None = None
    """The highest reward there can be, where you know it (1 for a test that is passed); None: the best one seen."""
    seed: int = 0
    """Of prompts, samples and intervals."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_new_tokens", "max_prompt_tokens", "max_completion_tokens", "batch_prompts")
        require_range(self, 2, math.inf, "num_prompts", "num_generations")

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own distribution: nothing is tempered or cut off."""
        return SamplingConfig(max_new_tokens=self.max_new_tokens)


def some_rows(data: TextData, config: AdviseConfig) -> TextData:
    """Return random rows, twice as many as are measured (some may be dropped): a large set is not tokenised whole."""
    order = numpy_generator(config.seed, "advise/some rows").permutation(len(data))[: 2 * config.num_prompts]
    return dataclasses.replace(data, rows=[data.rows[row] for row in np.sort(order)])


@torch.no_grad()
def observe(
    model: Any,
    sampler: Sampler,
    data: TokenizedData,
    scorer: CompletionScorer | None,
    config: AdviseConfig,
    learned: bool = False,
    quiet: bool = False,
) -> tuple[Observations, list[Sample]]:
    """Draw, score and compare. Return what was seen, and a few texts.

    Args:
        model: a `PolicyModel`.
        sampler: draws from it with `config.sampling`.
        data: prompts; of a preference set the pairs are measured too.
        scorer: gives rewards; None without one.
        config: sizes and seed.
        learned: the scorer is a reward model.
        quiet: no progress.
    """
    rows = numpy_generator(config.seed, "advise/rows").permutation(len(data))[: config.num_prompts]
    rows = np.sort(rows)
    own: dict[str, list[Floats]] = {name: [] for name in ("lengths", "logps", "rewards", "cut")}
    foreign: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(PairObservations)}
    shown: list[Sample] = []
    n = config.num_generations
    with ProgressLine("samples", len(rows) * n, 0, quiet) as line:
        for first in range(0, len(rows), config.batch_prompts):
            chosen = rows[first : first + config.batch_prompts]
            found, written = _sampled(sampler, data, scorer, chosen, config, next(model.parameters()).device)
            for name, values in found.items():
                own[name].append(values)
            preferences = data.kind == "preference"
            pairs, ends = _pairs(model, data, scorer, chosen, config.max_new_tokens) if preferences else ({}, [])
            for name, values in pairs.items():
                foreign[name].append(values + first if name == "prompt" else values)
            prompts = data.texts(chosen)
            for k in range(min(len(chosen), SHOWN - len(shown))):
                shown.append(_shown(text_of(prompts[k]), written[k], found["rewards"][k] if scorer else None, ends, k))
            line.advance_to((first + len(chosen)) * n)
    joined = {name: np.concatenate(values) for name, values in own.items() if values}
    pair_values = {name: np.concatenate(values) for name, values in foreign.items() if values}
    return (
        Observations(
            joined["lengths"],
            joined["logps"],
            joined["cut"] > 0,
            joined["rewards"] if scorer is not None else None,
            PairObservations(**pair_values) if pair_values else None,
            learned,
            config.peak,
        ),
        shown,
    )


def _sampled(
    sampler: Sampler,
    data: TokenizedData,
    scorer: CompletionScorer | None,
    rows: npt.NDArray[np.int64],
    config: AdviseConfig,
    device: torch.device,
) -> tuple[dict[str, Floats], list[list[str]]]:
    """Return {name: [P, N]} of samples, and their texts by prompt."""
    n = config.num_generations
    prompts, mask = (tensor.to(device) for tensor in data.prompts(rows))
    samples = sampler.sample(prompts, mask, n, seed=config.seed, step=0, keys=torch.from_numpy(rows))
    written = texts(samples, data.tokenizer.decode)
    lengths = samples.scored_mask.sum(1).double().cpu().numpy()
    found = {
        "lengths": lengths,
        "logps": samples.token_logps.double().sum(1).cpu().numpy(),
        "cut": (~samples.finished).double().cpu().numpy(),
    }
    if scorer is not None:
        tokens = samples.completions.tolist()
        ids = [row[: int(length)] for row, length in zip(tokens, lengths, strict=True)]
        found["rewards"] = _rewards(scorer, data, rows, np.repeat(np.arange(len(rows)), n), written, ids)
    by_prompt = {name: values.reshape(len(rows), n) for name, values in found.items()}
    return by_prompt, [written[k * n : (k + 1) * n] for k in range(len(rows))]


def _pairs(
    model: Any, data: TokenizedData, scorer: CompletionScorer | None, rows: npt.NDArray[np.int64], limit: int
) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """Return what is known of the pairs of some rows, and (prompt, text) of the chosen ones."""
    batch = data.batch(rows)
    assert batch.pairs is not None
    pairs = batch.pairs.numpy()
    device = next(model.parameters()).device
    logps = model.outputs(batch.to(device)).token_logps.double().cpu()
    ids, written = data.completion_ids(rows), data.completion_texts(rows)
    prompt_of = batch.prompt_of.numpy()
    distances = [edit_distance(ids[a], ids[b]) / max(len(ids[a]), len(ids[b])) for a, b in pairs]
    found: dict[str, Any] = {
        "prompt": prompt_of[pairs[:, 0]],
        "lengths": batch.lengths.double().numpy()[pairs],
        "logps": logps.sum(1).numpy()[pairs],
        "head_lengths": batch.scored_mask[:, :limit].sum(1).double().numpy()[pairs],
        "head_logps": logps[:, :limit].sum(1).numpy()[pairs],
        "distances": np.array(distances),
        "shared": np.array([shared_tokens(ids[a], ids[b]) for a, b in pairs]),
    }
    if scorer is not None:
        found["rewards"] = _rewards(scorer, data, rows, prompt_of, written, ids)[pairs]
    return found, [(int(prompt_of[a]), written[a]) for a in pairs[:, 0]]


def _rewards(
    scorer: CompletionScorer,
    data: TokenizedData,
    rows: npt.NDArray[np.int64],
    prompt_of: npt.NDArray[np.int64],
    written: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> Floats:
    """Return the rewards [N] of completions, NaN where unscorable."""
    own = rows[prompt_of]
    asked = data.texts(own)
    scores = scorer.score(asked, written, ids, data.columns(own))
    return checked_scores(scorer, scores, asked).double().cpu().numpy()


def _shown(prompt: str, written: list[str], rewards: Floats | None, ends: list[tuple[int, str]], k: int) -> Sample:
    found = [("a sample", written[0]), ("another", written[1])]
    if rewards is not None and not np.isnan(rewards).all():
        best, worst = int(np.nanargmax(rewards)), int(np.nanargmin(rewards))
        found = [
            (f"best of {len(written)}, reward {rewards[best]:.3g}", written[best]),
            (f"worst of {len(written)}, reward {rewards[worst]:.3g}", written[worst]),
        ]
    return Sample(prompt, (*found, *[("chosen in the data", text) for prompt_of, text in ends if prompt_of == k][:1]))


def tables(evidence: Evidence) -> list[Table]:
    """Return one table of measures for each question."""
    return [
        Table(
            question.capitalize(),
            "Intervals are over prompts.",
            ("measure", "value", "95% interval", "how to read it"),
            tuple((measure.label, *measure.cells(), measure.note) for measure in measures),
        )
        for question, measures in evidence.questions.items()
    ]


def _curves(evidence: Evidence) -> list[Picture]:
    """Return the best-of-N curve, where there is one."""
    from steelyard.report import plots

    keys = {1: "reward"} | {2**k: f"best_of_{2**k}" for k in range(1, 12)}
    found = {k: measure.estimate for k, key in keys.items() if (measure := evidence.find(key)) is not None}
    if len(found) < 2:
        return []
    estimates = list(found.values())
    low = [e.value if e.low is None else e.low for e in estimates]
    high = [e.value if e.high is None else e.high for e in estimates]
    series = plots.Series("samples", [e.value for e in estimates], low, high, list(found))
    caption = "Expected best reward of N samples of the model, with 95% intervals over prompts."
    return [plots.lines([series], plots.Frame("best_of_n", caption, "samples N", "reward", log_x=True, legend=False))]


def write_advice(
    out: Path,
    title: str,
    evidence: Evidence,
    advice: Sequence[Advice],
    shown: Sequence[Sample],
    settings: dict[str, Any],
) -> Path:
    """Write OUT (JSON) and, beside it, the same as a page in HTML and Markdown; return the page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, **as_json(evidence, advice)}
    out.write_text(json.dumps(content, indent=2) + "\n")
    first = advice[0]
    page = Page(title, f"{first.verdict[0].upper()}{first.verdict[1:]} Confidence: {first.confidence}.")
    if evidence.warnings:
        page.section("First of all").notes(evidence.warnings)
    section = page.section("Advice")
    for one in advice:
        section.text(f"{one.topic} ({one.confidence}): {one.verdict}")
        section.notes([*one.numbers, f"rule: {one.rule}", *(f"run: {command}" for command in one.commands)])
    section = page.section("Measures").table(*tables(evidence))
    if importlib.util.find_spec("matplotlib") is not None:
        section.figure(*_curves(evidence))
    if shown:
        page.section("What was compared").samples(*shown)
    page.footer = f"from {out.name} beside this page."
    return write_page(page, out.parent, out.stem)
