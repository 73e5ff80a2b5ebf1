"""How good a self-evaluation is on held-out samples: ranking, calibration, and what it did to the policy.

Scores are read in whole forward passes over prompt and sample, which is the same function as reading them while
sampling (`adapt/decoding.py`).

Shapes: P prompts, N samples of each (the most, where they differ), K checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from steelyard.bench import calibration
from steelyard.bench.calibration import Platt
from steelyard.bench.stats import Estimate
from steelyard.data.prefixes import PoolTokens
from steelyard.data.restart_labels import soft_labels
from steelyard.data.sample_pool import SamplePool
from steelyard.data.tokenizer import Tokenizer
from steelyard.nets.self_eval import AnyEvaluator, ProbeEvaluator, head, hidden_states, read
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]
REPORT = "self_eval.json"
DRIFT_SAMPLES = 2
"""Samples of each held-out prompt on which drift is measured."""
BLOCK = 1 << 22
"""Entries of one block of logits."""


@dataclass(frozen=True)
class Drift:
    """How far a policy has moved from its reference, on tokens of samples.

    Attributes:
        kl: mean D_KL(reference || policy) over tokens, in nats, reserved tokens left out.
        greedy_match: share of tokens at which both find the same one likeliest.
        tokens: how many.
    """

    kl: float
    greedy_match: float
    tokens: int


@dataclass(frozen=True)
class PositionReport:
    """How good scores are at one place of the held-out samples.

    Attributes:
        where: "prompt", a number of tokens, or "end".
        samples: scores.
        within: AUC within prompts, None where no prompt has better and worse samples there.
        across: AUC across prompts.
        ece: expected calibration error, calibrated on the other half of the prompts.
        ece_raw: before calibration.
        brier: mean squared error against the soft labels, calibrated like `ece`.
    """

    where: str
    samples: int
    within: Estimate | None
    across: Estimate | None
    ece: float
    ece_raw: float
    brier: float


@dataclass(frozen=True)
class SelfEvalReport:
    """What held-out prompts say of a trained evaluator.

    Attributes:
        rows: the prompt alone, each checkpoint, the end.
        drift: of the policy; None for a probe, which leaves it untouched, or without a reference.
        margin: delta of the labels, in units of the reward.
        step: update of the checkpoint that was kept.
    """

    rows: tuple[PositionReport, ...]
    drift: Drift | None
    margin: float
    step: int

    def at(self, where: str) -> PositionReport:
        """Return the row of one place."""
        for row in self.rows:
            if row.where == where:
                return row
        raise KeyError(where)


# ------------------------------------------------------------------------------------------- reading pools


def score_pool(
    model: Any,
    evaluator: AnyEvaluator,
    pool: SamplePool,
    checkpoints: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> SamplePool:
    """Return a pool with the evaluator's scores: at the end of each sample, and after so many of its tokens.

    Args:
        model: a `TinyLM` or a `CausalLM`; its present weights are used.
        evaluator: of this model.
        pool: samples, all prompts with the same number.
        checkpoints: token counts; NaN for samples that had ended by then.
        tokenizer: turns texts into ids; default: the model's own.
        batch_size: samples in one forward pass.
    """
    tokens = PoolTokens(pool, tokenizer or getattr(model, "tokenizer", None))
    odds = log_odds(model, evaluator, tokens, checkpoints, batch_size)
    with torch.no_grad():
        device = evaluator.scale.device
        scores = evaluator.probability(torch.from_numpy(odds).to(device)).double().cpu().numpy()
    return pool.with_scores(scores[..., 1], scores[..., 2:], tuple(checkpoints))


@torch.no_grad()
def log_odds(
    model: Any, evaluator: AnyEvaluator, tokens: PoolTokens, checkpoints: Sequence[int], batch_size: int
) -> Floats:
    """Return raw log-odds [P, N, 2 + K]: of the prompt alone (at its first sample), at the end, at the checkpoints.

    NaN where a sample had ended before, and where a prompt has fewer samples than others.
    """
    most = max((len(of) for of in tokens.completions), default=0)
    found = np.full((len(tokens), most, 2 + len(checkpoints)), np.nan)
    device = next(model.parameters()).device
    for prompts in chunks(range(len(tokens)), tokens, batch_size):
        samples = [np.arange(len(tokens.completions[prompt]), dtype=np.int64) for prompt in prompts]
        where = []
        for prompt in prompts:
            lengths = np.array([len(ids) for ids in tokens.completions[prompt]])
            at = np.full((len(lengths), 2 + len(checkpoints)), -1, np.int64)
            at[:1, 0], at[:, 1] = 0, tokens.ends[prompt]
            for column, count in enumerate(checkpoints):
                at[:, 2 + column] = np.where(lengths > count, count, -1)
            where.append(at)
        batch = tokens.batch(prompts, samples, np.concatenate(where)).to(device)
        assert batch.cuts is not None
        values = read(model, evaluator, batch, batch.cuts).log_odds.double().cpu().numpy()
        first = 0
        for prompt, of in zip(prompts, samples, strict=True):
            found[prompt, : len(of)] = values[first : first + len(of)]
            first += len(of)
    return found


def chunks(prompts: Sequence[int], tokens: PoolTokens, size: int) -> Iterator[list[int]]:
    """Yield prompts in turn, as many together as have about `size` samples in all; at least one."""
    group: list[int] = []
    count = 0
    for prompt in prompts:
        if group and count + len(tokens.completions[prompt]) > size:
            yield group
            group, count = [], 0
        group.append(prompt)
        count += len(tokens.completions[prompt])
    if group:
        yield group


@torch.no_grad()
def drift(
    model: Any,
    pool: SamplePool | PoolTokens,
    *,
    reserved: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    samples: int = DRIFT_SAMPLES,
    batch_size: int = 32,
) -> Drift:
    """Measure how far a model has moved from its frozen reference.

    Args:
        model: a `TinyLM` or a `CausalLM` with a reference.
        pool: completions at whose tokens it is measured.
        reserved: ids that are never drawn.
        tokenizer: turns texts into ids; default: the model's own.
        samples: of each prompt, the first ones.
        batch_size: samples in one forward pass.
    """
    tokens = pool if isinstance(pool, PoolTokens) else PoolTokens(pool, tokenizer or getattr(model, "tokenizer", None))
    device = next(model.parameters()).device
    blocked = torch.tensor(list(reserved), dtype=torch.int64, device=device)
    kl, same, count = 0.0, 0, 0
    for prompts in chunks(range(len(tokens)), tokens, batch_size):
        chosen = [np.arange(min(samples, len(tokens.completions[prompt])), dtype=np.int64) for prompt in prompts]
        batch = tokens.batch(prompts, chosen, np.zeros((sum(map(len, chosen)), 1), np.int64)).to(device)
        now = _predicting(model, batch)
        with model.as_reference():
            before = _predicting(model, batch)
        for first in range(0, len(now[0]), max(1, BLOCK // len(now[1]))):
            rows = slice(first, first + max(1, BLOCK // len(now[1])))
            p, q = (
                linear(states[rows], weight, bias).float().index_fill(1, blocked, -torch.inf).log_softmax(1)
                for states, weight, bias in (before, now)
            )
            kl += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
            same += int((p.argmax(1) == q.argmax(1)).sum())
            count += len(p)
    return Drift(kl / max(count, 1), same / max(count, 1), count)


def _predicting(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    states, rows = hidden_states(model, batch)
    weight, bias = head(model)
    # of a full copy the weights are swapped back when the reference ends
    return states[rows.sources], weight.detach().clone(), None if bias is None else bias.detach().clone()


# ------------------------------------------------------------------------------------------------- reports


def position_reports(
    odds: Floats, rewards: Sequence[Floats], checkpoints: Sequence[int], margin: float, calibrated: bool, seed: int
) -> tuple[PositionReport, ...]:
    """Return what log-odds [P, N, 2 + K] of `log_odds` say at each place."""
    most = odds.shape[1]
    judged = np.stack([np.pad(of.astype(np.float64), (0, most - len(of)), constant_values=np.nan) for of in rewards])
    better = soft_labels(judged, margin)
    rows = []
    names = ["prompt", "end", *map(str, checkpoints)]
    for column in [0, *range(2, odds.shape[2]), 1]:
        raw = calibration.sigmoid(odds[..., column])
        target = 1 - better
        if column == 0:  # of the prompt: the mean over its samples
            known = ~np.isnan(better)
            means = np.where(known, 1 - better, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
            raw, target = raw[:, :1], means[:, None]
        held = _crossed(raw, target) if calibrated else raw
        generator = numpy_generator(seed, f"self_eval/report/{names[column]}")
        if column == 0:
            within, across = None, calibration.auc_across(raw, judged, generator, margin)
        else:
            within = calibration.auc_within(raw, judged, generator, margin)
            across = calibration.auc_across(raw, judged, generator, margin)
        rows.append(
            PositionReport(
                names[column],
                int((~np.isnan(raw) & ~np.isnan(target)).sum()),
                within,
                across,
                calibration.ece(held, target),
                calibration.ece(raw, target),
                calibration.brier(held, target),
            )
        )
    return tuple(rows)


def _crossed(raw: Floats, target: Floats) -> Floats:
    """Return scores calibrated on the other half of the prompts, so that no prompt judges its own calibration."""
    found = raw.copy()
    for half in (0, 1):
        platt: Platt = calibration.fit_platt(raw[1 - half :: 2], target[1 - half :: 2])
        found[half::2] = platt(raw[half::2])
    return found


def write_report(folder: Path, report: SelfEvalReport) -> None:
    """Write self_eval.json."""
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def read_report(folder: Path) -> SelfEvalReport | None:
    """Read self_eval.json; None where nothing was held out."""
    file = folder / REPORT
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    rows = []
    for row in found["rows"]:
        for name in ("within", "across"):
            row[name] = None if row[name] is None else Estimate(**row[name])
        rows.append(PositionReport(**row))
    moved = None if found["drift"] is None else Drift(**found["drift"])
    return SelfEvalReport(tuple(rows), moved, found["margin"], found["step"])


class Examiner:
    """Evaluates on held-out prompts, and calibrates the evaluator on them; never touches what training draws from.

    Args:
        parts: of the run (`workflows.self_eval.Parts`), with held-out tokens.
        run: where rows are written.
    """

    def __init__(self, parts: Any, run: Any) -> None:
        self.parts, self.run, self.config = parts, run, parts.config
        self.tokens: PoolTokens = parts.held_out
        self.better = [soft_labels(rewards, parts.source.margin) for rewards in self.tokens.rewards]
        self.known = [row for row, better in enumerate(self.better) if not np.isnan(better).all()]

    @torch.no_grad()
    def look(self, step: int) -> float | None:
        """Read ends and random parts of held-out samples, calibrate, append rows; return minus the cross-entropy."""
        config, evaluator, model = self.config, self.parts.evaluator, self.parts.model
        generator = numpy_generator(config.seed, "self_eval/held_out")  # the same places every time
        rows, odds, targets = [], [], []
        for prompts in chunks(self.known[: config.evaluation_prompts], self.tokens, config.batch_size):
            samples = [np.flatnonzero(~np.isnan(self.better[prompt])) for prompt in prompts]
            batch = self.parts.source.of(prompts, samples, generator, self.tokens, self.better)
            batch = batch.to(self.parts.device)
            found = read(model, evaluator, batch, batch.cuts).log_odds
            wanted = batch.cuts >= 0
            loss = binary_cross_entropy_with_logits(found.nan_to_num(), batch.targets, reduction="none") * wanted
            apart = (found.nan_to_num().sigmoid() - batch.targets) ** 2 * wanted
            for number, prompt in enumerate(prompts):
                mine = batch.prompt_of == number
                count = int(wanted[mine].sum())
                rows.append(
                    {
                        "phase": "offline", "update_step": step, "env_step": 0, "episode": prompt,
                        "episode_seed": config.seed, "return": -float(loss[mine].sum()) / count, "length": count,
                        "success": None, "score": 1 - float(apart[mine].sum()) / count,
                    }
                )  # fmt: skip
            odds.append(found[wanted].double().cpu().numpy())
            targets.append(batch.targets[wanted].double().cpu().numpy())
        self.run.append("eval.jsonl", rows)
        if not rows:
            return None
        if config.calibration == "platt":
            platt = calibration.fit_platt(calibration.sigmoid(np.concatenate(odds)), np.concatenate(targets))
            evaluator.calibrate(platt.scale, platt.offset)
        return float(np.mean([row["return"] for row in rows]))

    def report(self, step: int) -> SelfEvalReport:
        """Look at all held-out prompts with the weights that were kept; append a row for every score."""
        config, parts = self.config, self.parts
        odds = log_odds(parts.model, parts.evaluator, self.tokens, config.checkpoints, config.batch_size)
        scores = parts.evaluator.probability(torch.from_numpy(odds).to(parts.device)).double().cpu().numpy()
        names = ["prompt", "end", *map(str, config.checkpoints)]
        for prompt, (rewards, better) in enumerate(zip(self.tokens.rewards, self.better, strict=True)):
            self.run.append(
                "self_eval.jsonl",
                [
                    {"prompt": prompt, "sample": sample, "where": names[column], "score": float(score),
                     "reward": float(rewards[sample]), "better": float(better[sample])}
                    for sample in range(len(rewards))
                    for column, score in enumerate(scores[prompt, sample])
                    if not np.isnan(score)
                ],
            )  # fmt: skip
        moved = None
        if not isinstance(parts.evaluator, ProbeEvaluator) and parts.has_reference:
            moved = drift(parts.model, self.tokens, reserved=parts.evaluator.reserved, batch_size=config.batch_size)
        rows = position_reports(
            odds, self.tokens.rewards, config.checkpoints, parts.source.margin, config.calibration == "platt",
            config.seed,
        )  # fmt: skip
        return SelfEvalReport(rows, moved, parts.source.margin, step)
