"""Answers to prompts with as many samples as each needs: a model, what chooses among its samples, and rows on disk.

What chooses is a trained self-evaluation (`self`), a mean log-probability (`logp`), a self-certainty (`certainty`), or
any scorer of texts by its name (`envs/scorers.py`): a reward model, a HyRe profile, a function. Only a self-evaluation
is a probability of doing better, so only it can stop sampling or prune; with the others all samples are drawn.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Backend, ComputePolicy, Draw, Keep, Request, StopRule, Trace
from steelyard.adapt.decoding import ModelBackend, OnStep
from steelyard.bench.stats import Estimate, mean_estimate
from steelyard.config import Config, plain, require_positive
from steelyard.data.preferences import TextData, TextRow, TokenizedData, Truncation, read_text_data
from steelyard.data.tokenizer import Text, Tokenizer
from steelyard.envs.samplers import SamplingConfig
from steelyard.envs.scorers import CompletionScorer, checked_scores, scorer_from_name
from steelyard.errors import ConfigError, DataError
from steelyard.nets.lm import CausalLM
from steelyard.nets.self_eval import Evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.rng import numpy_generator
from steelyard.train.progress import ProgressLine
from steelyard.workflows.pairs import append_rows, begin_rows, json_rows
from steelyard.workflows.preference import load_by_name, tokenizer_of
from steelyard.workflows.self_eval import is_self_eval_run, load_self_eval

SELF = "self"
OWN = {
    "logp": lambda draw: draw.logp / max(len(draw.tokens), 1),
    "certainty": lambda draw: draw.certainty,
}
"""Scores that a model's own distributions give; a mean over tokens each."""


def default_policy(scorer: str) -> ComputePolicy:
    """Return how to sample with this scorer where nothing else is asked for."""
    return ComputePolicy() if scorer == SELF else ComputePolicy(stop=StopRule("never"))


def require_fit(policy: ComputePolicy, scorer: str) -> None:
    """Refuse a policy that asks a scorer for more than it says.

    Raises:
        ConfigError: it stops or prunes by scores that are no probabilities.
    """
    if scorer == SELF:
        return
    if policy.stop.kind != "never":
        raise ConfigError(
            f"stop {policy.stop.kind!r} needs a self-evaluation; with the scorer {scorer!r} stop must be 'never'"
        )
    if policy.prune.kind not in ("none", "random"):
        raise ConfigError(
            f"prune {policy.prune.kind!r} needs a self-evaluation; with the scorer {scorer!r} prune must be 'none' or "
            "'random'"
        )


@dataclass(frozen=True)
class Answerer:
    """A language model and what chooses among its samples.

    Attributes:
        name: of the model, as it was asked for.
        model: `nets.lm.CausalLM` or `nets.tiny_lm.TinyLM`.
        tokenizer: the model's.
        scorer: "self", "logp", "certainty", or the name of a scorer of texts.
        evaluator: of the scorer "self".
        judge: a scorer of texts.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    scorer: str
    evaluator: Evaluator | None = None
    judge: CompletionScorer | None = None

    def backend(
        self,
        prompts: Sequence[Text],
        tokens: Sequence[list[int]],
        sampling: SamplingConfig,
        seed: int,
        keys: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Backend:
        """Return what draws and scores samples of these prompts.

        Args:
            prompts: as texts or conversations, for scorers of texts.
            tokens: the same as token ids.
            sampling: limits and top-p; temperatures come with each request.
            seed: of the samples.
            keys: what tells prompts apart in their randomness; None: their positions.
            on_step: called after each decode step; may raise.
        """
        drawing = ModelBackend(
            self.model, self.evaluator, sampling, seed, tokens,
            keys=keys, eos=self.tokenizer.eos, decode=self.tokenizer.decode, on_step=on_step,
        )  # fmt: skip
        return drawing if self.scorer == SELF else Judged(drawing, self, prompts)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Add adapters to the weights for a while, once for all backends made meanwhile."""
        if not isinstance(self.model, CausalLM):
            yield
            return
        with self.model.with_weights(self.model.merged_weights()):
            yield

    def scores(self, prompts: Sequence[Text], draws: Sequence[Draw]) -> list[float]:
        """Return scores of whole samples, by a scorer other than "self"."""
        if self.judge is None:
            return [OWN[self.scorer](draw) for draw in draws]
        texts, ids = [draw.text for draw in draws], [list(draw.tokens) for draw in draws]
        found = checked_scores(self.judge, self.judge.score(prompts, texts, ids, {}), prompts).tolist()
        # what cannot be scored is chosen last
        return [-math.inf if math.isnan(value) else value for value in found]


class Judged:
    """A backend whose whole samples are scored by something else than a self-evaluation.

    Args:
        drawing: draws.
        answerer: scores.
        prompts: as texts or conversations.
    """

    def __init__(self, drawing: ModelBackend, answerer: Answerer, prompts: Sequence[Text]) -> None:
        self.drawing, self.answerer, self.prompts = drawing, answerer, prompts
        self.max_new_tokens = drawing.max_new_tokens

    def draw(self, requests: Sequence[Request], checkpoints: Sequence[int], keep: Keep | None) -> list[Draw]:
        """Draw a wave and score what was carried to its end."""
        draws = self.drawing.draw(requests, checkpoints, keep)
        whole = [row for row, draw in enumerate(draws) if draw.pruned_at is None]
        asked = [self.prompts[draws[row].request.prompt] for row in whole]
        for row, score in zip(whole, self.answerer.scores(asked, [draws[row] for row in whole]), strict=True):
            draws[row] = replace(draws[row], score=score)
        return draws


def scorer_of(model: str, scorer: str | None) -> str:
    """Return the scorer that is meant, before anything is loaded.

    Raises:
        ConfigError: none was named and the model has no self-evaluation, or "self" was and it has none.
    """
    trained = is_self_eval_run(model)
    if scorer is None and trained:
        return SELF
    if scorer in (None, SELF) and not trained:
        raise ConfigError(
            f"{model}: has no self-evaluation (steelyard train self_eval); name what chooses among its samples with "
            "--scorer: logp, certainty, reward_model:DIR, hyre:DIR#profile.json, ..."
        )
    assert scorer is not None
    return scorer


def open_answerer(model: str, scorer: str | None = None, device: str = "cpu", allow_code: bool = False) -> Answerer:
    """Load a model and what chooses among its samples.

    Args:
        model: run of `steelyard train self_eval`, or any name that `steelyard data pairs` takes.
        scorer: see `Answerer`; None: "self".
        device: where the model runs.
        allow_code: whether the scorer may be a function in a file.

    Raises:
        ConfigError: as `scorer_of`, or an unknown scorer.
    """
    chosen = scorer_of(model, scorer)
    judge = None if chosen in (SELF, *OWN) else scorer_from_name(chosen, allow_code=allow_code)
    evaluator: Evaluator | None = None
    if is_self_eval_run(model):
        trained = load_self_eval(model, device)
        network, evaluator = trained.model, trained.evaluator if chosen == SELF else None
    else:
        network = load_by_name(model, device)
    tokenizer = tokenizer_of(network)
    if isinstance(network, TinyLM) and network.config.vocab_size != tokenizer.vocab_size:
        found = network.config.vocab_size
        raise ConfigError(f"{model}: expected bytes as tokens ({tokenizer.vocab_size}), found a vocabulary of {found}")
    return Answerer(model, network, tokenizer, chosen, evaluator, judge)


# ------------------------------------------------------------------------------------------------ a file of prompts


@dataclass(frozen=True)
class AnswersConfig(Config):
    """How prompts are answered."""

    policy: Annotated[ComputePolicy, tyro.conf.arg(name="")] = field(default_factory=ComputePolicy)
    """How much to sample."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=256))
    """Limits of a sample; its temperature is that of the policy's schedule, not this one."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    truncation: Truncation = "error"
    """What happens to a longer one."""
    batch_prompts: int = 8
    """Prompts sampled together; what a kill can cost."""
    limit: int | None = None
    """Answer the first so many prompts only."""
    seed: int = 0
    """Of the samples."""
    keep_samples: bool = False
    """Write all samples with their scores into the rows, not only the chosen one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_prompt_tokens", "batch_prompts", "limit")


def read_prompts(path: str | Path) -> TextData:
    """Return prompts in their order: the lines of a .txt file, or the prompts of any text data.

    Raises:
        DataError: none there, or the file cannot be read.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return read_text_data(path, "prompt")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
    rows = [TextRow(line, where=f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: expected one prompt a line, found an empty file")
    return TextData("prompt", rows, str(path))


def answer(
    out: Path,
    answerer: Answerer,
    data: TokenizedData,
    config: AnswersConfig,
    identity: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Answer prompts into a JSONL file, going on where it stands, and return its rows.

    Args:
        out: the file; what made it is kept beside it.
        answerer: the model and what chooses.
        data: prompts.
        config: how much to sample.
        identity: what tells these prompts from others; a file of others is refused.
        quiet: no progress.

    Raises:
        DataError: the file was made by other settings.
        ConfigError: the policy asks for what the scorer does not say.
    """
    require_fit(config.policy, answerer.scorer)
    settings = plain(config)
    made_by = {name: value for name, value in settings.items() if name != "limit"}
    made_by |= {"model": answerer.name, "scorer": answerer.scorer, **(identity or {})}
    total, size = len(data), config.batch_prompts
    done = begin_rows(out, made_by, 1, size, total)
    with answerer.merged(), ProgressLine("prompts", total, done, quiet) as line, out.open("ab") as file:
        for first in range(done, total, size):
            rows = _answered(range(first, min(first + size, total)), answerer, data, config)
            append_rows(file, rows)
            line.advance_to(
                first + len(rows), f"{sum(row['samples'] for row in rows) / len(rows):.2g} samples a prompt"
            )
    return list(json_rows(out))[:total]


def _answered(
    numbers: Sequence[int], answerer: Answerer, data: TokenizedData, config: AnswersConfig
) -> list[dict[str, Any]]:
    padded, mask = data.prompts(list(numbers))
    tokens = [row[kept > 0].tolist() for row, kept in zip(padded, mask, strict=True)]
    prompts = data.texts(list(numbers))
    backend = answerer.backend(prompts, tokens, config.sampling, config.seed, keys=numbers)
    traces = sample(backend, len(tokens), config.policy)
    return [
        {"prompt_id": number, "prompt": prompt, **row_of(trace, config.keep_samples)}
        for number, prompt, trace in zip(numbers, prompts, traces, strict=True)
    ]


def row_of(trace: Trace, keep_samples: bool = False) -> dict[str, Any]:
    """Return an answer and what it cost, as JSON values; NaN becomes None."""
    chosen = trace.draws[trace.chosen]
    row = {"answer": chosen.text, "score": _number(chosen.score), "finished": chosen.finished} | cost_of(trace)
    if keep_samples:
        row["draws"] = [
            {
                "text": draw.text,
                "temperature": draw.request.temperature,
                "score": _number(draw.score),
                "tokens": draw.decoded,
                "finished": draw.finished,
                "pruned_at": draw.pruned_at,
            }
            for draw in trace.draws
        ]
    return row


def cost_of(trace: Trace) -> dict[str, Any]:
    """Return what an answer cost and why sampling ended, as JSON values."""
    return {
        "samples": trace.samples,
        "decoded": trace.decoded,
        "evaluated": trace.evaluated,
        "waves": trace.waves,
        "stopped": trace.stopped,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def summary(rows: Sequence[dict[str, Any]], seed: int = 0) -> list[tuple[str, Estimate | str]]:
    """Return what the answers cost: means over prompts with intervals, and why sampling ended."""
    generator = numpy_generator(seed, "answers/intervals")
    lines: list[tuple[str, Estimate | str]] = [("prompts", str(len(rows)))]
    for name, words in (
        ("samples", "samples a prompt"),
        ("decoded", "tokens decoded a prompt"),
        ("evaluated", "tokens read to evaluate, a prompt"),
        ("score", "score of the answers"),
    ):
        values = np.array([row[name] for row in rows if row[name] is not None], np.float64)
        if len(values):
            lines.append((words, mean_estimate(values, generator)))
    ends = Counter(str(row["stopped"]) for row in rows)
    lines.append(("stopped by", ", ".join(f"{name} {count}" for name, count in ends.most_common())))
    lines.append(("cut at the limit", str(sum(not row["finished"] for row in rows))))
    return lines
