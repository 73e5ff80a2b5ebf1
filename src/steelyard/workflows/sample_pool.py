"""Sample pools from a model and a scorer: draw N completions of every prompt, score them, keep everything.

The pool grows by pieces of `batch_prompts` prompts; a build that was stopped, or killed, goes on after its last whole
piece. A sample is a function of (seed, number of the prompt, number of the sample, temperature), and pieces are always
the same ones, so what comes out is what an undisturbed build gives. A pool of other settings is refused.

The prompts' numbers are their places in the data, so a longer list that begins with the same prompts continues a pool.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.adapt.compute_policy import Draw, Request, TemperatureSchedule
from steelyard.adapt.decoding import ModelBackend
from steelyard.config import Config, plain, require_positive
from steelyard.data.preferences import TokenizedData, Truncation
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.sample_pool_files import PoolFolder
from steelyard.data.tokenizer import Text
from steelyard.envs.samplers import SamplingConfig
from steelyard.envs.scorers import CompletionScorer, checked_scores, text_of
from steelyard.errors import ConfigError, DataError
from steelyard.nets.lm import CausalLM
from steelyard.nets.self_eval import Evaluator
from steelyard.train.progress import ProgressLine

Answer = Callable[[str], str]
"""A completion -> the answer that it states, for votes; "" for none."""


@dataclass(frozen=True)
class SamplePoolConfig(Config):
    """What decides a pool."""

    num_samples: int = 16
    """N: completions per prompt."""
    temperatures: TemperatureSchedule = field(default_factory=lambda: TemperatureSchedule("constant"))
    """Of a prompt's samples in turn."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    """Longest completion, top-p and top-k; its temperature must stay 1, for the schedule says it."""
    checkpoints: tuple[int, ...] = ()
    """Token counts at which a self-evaluation reads unfinished samples."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    truncation: Truncation = "error"
    """What happens to a longer one."""
    batch_prompts: int = 16
    """Prompts of a piece; what a kill can cost."""
    limit: int | None = None
    """Use the first so many prompts only."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "num_samples", "checkpoints", "max_prompt_tokens", "batch_prompts", "limit")
        if self.sampling.temperature != 1:
            raise ConfigError(
                f"temperature is {self.sampling.temperature:g}, but the schedule of temperatures decides: set its "
                "highest one (temperatures.high)"
            )
        if list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ConfigError(f"checkpoints must be increasing token counts, found {self.checkpoints}")

    def of_pool(self) -> dict[str, Any]:
        """Return the settings that decide the samples: not how many prompts are wanted."""
        return {name: value for name, value in plain(self).items() if name != "limit"}


@dataclass(frozen=True)
class PoolPrompt:
    """A prompt to be sampled.

    Attributes:
        text: plain or messages, as scorers are given it.
        tokens: its ids.
        stratum: what kind of prompt it is.
        columns: JSON values; scorers are given them, and the pool keeps them.
    """

    text: Text
    tokens: tuple[int, ...]
    stratum: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def prompts_of(data: TokenizedData) -> list[PoolPrompt]:
    """Return the prompts of text data; a column `stratum` says what kind each is."""
    numbers = np.arange(len(data))
    columns = data.columns(numbers)
    tokens, mask = data.prompts(numbers)
    return [
        PoolPrompt(
            text,
            tuple(tokens[row][mask[row] > 0].tolist()),
            str(columns["stratum"][row] or "") if "stratum" in columns else "",
            {name: values[row] for name, values in columns.items() if name != "stratum"},
        )
        for row, text in enumerate(data.texts(numbers))
    ]


def build_pool(
    path: Path | None,
    prompts: Sequence[PoolPrompt],
    model: Any,
    scorer: CompletionScorer,
    config: SamplePoolConfig,
    identity: Mapping[str, Any] | None = None,
    *,
    evaluator: Evaluator | None = None,
    answer: Answer | None = None,
    eos: int | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    rows: int | None = None,
    source: str = "",
    quiet: bool = False,
) -> SamplePool:
    """Draw and score what the pool does not hold yet; return the pool of these prompts.

    Args:
        path: folder of the pool, begun or gone on with; None: in memory only.
        prompts: all of them, those that are there already included.
        model: `nets.lm.CausalLM` or `nets.tiny_lm.TinyLM`.
        scorer: gives rewards.
        config: sizes, temperatures and seed.
        identity: JSON values that tell this model, its evaluator and the way answers are found from others.
        evaluator: scores samples at their end and at the checkpoints; None: no scores.
        answer: finds what votes are for.
        eos: ends a sample; by default the tokenizer's.
        decode: token ids -> text; by default the tokenizer's.
        rows: completions decoded at a time.
        source: for messages and reports.
        quiet: no progress.

    Raises:
        ConfigError: checkpoints without an evaluator.
        DataError: the pool was made by other settings or from other prompts.
    """
    if config.checkpoints and evaluator is None:
        raise ConfigError("checkpoints: nothing reads samples there; give an evaluator, or a run of train self_eval")
    prompts = prompts[: config.limit]
    if not prompts:
        raise DataError(f"{source or 'sample pool'}: expected prompts, found none")
    folder = None
    items: list[PromptSamples] = []
    if path is not None:
        made_by = {**(identity or {}), "scorer": scorer.name, **config.of_pool()}
        folder = PoolFolder.begin(path, made_by, source, config.checkpoints)
        items = list(folder.read(len(prompts)).items)
        _require_same_prompts(path, items, prompts)
    n, total = config.num_samples, len(prompts)
    merged = model.with_weights(model.merged_weights()) if isinstance(model, CausalLM) else contextlib.nullcontext()
    with merged, ProgressLine("completions", total * n, len(items) * n, quiet) as line:
        while len(items) < total:
            numbers = range(len(items), min(total, len(items) + config.batch_prompts))
            wanted = [prompts[number] for number in numbers]
            backend = ModelBackend(
                model, evaluator, config.sampling, config.seed, [prompt.tokens for prompt in wanted],
                keys=numbers, eos=eos, decode=decode, rows=rows,
            )  # fmt: skip
            asked = [Request(row, k, config.temperatures.of(k)) for row in range(len(wanted)) for k in range(n)]
            draws = backend.draw(asked, config.checkpoints, None)
            piece = _judged(wanted, draws, scorer, config, answer)
            if folder is not None:
                folder.append(piece)
            items += piece
            known = np.concatenate([item.rewards for item in piece])
            known = known[~np.isnan(known)]
            line.advance_to(len(items) * n, f"reward {known.mean():.3g}" if len(known) else "nothing scorable")
    return SamplePool(tuple(items), config.checkpoints, source)


def _judged(
    prompts: Sequence[PoolPrompt],
    draws: Sequence[Draw],
    scorer: CompletionScorer,
    config: SamplePoolConfig,
    answer: Answer | None,
) -> list[PromptSamples]:
    """Return the samples of some prompts, scored; draws of a prompt stand together."""
    n = config.num_samples
    asked = [prompt.text for prompt in prompts for _ in range(n)]
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    columns = {name: [prompt.columns.get(name) for prompt in prompts for _ in range(n)] for name in names}
    texts, ids = [draw.text for draw in draws], [list(draw.tokens) for draw in draws]
    rewards = checked_scores(scorer, scorer.score(asked, texts, ids, columns), asked).double().numpy()
    items = []
    for row, prompt in enumerate(prompts):
        own = draws[row * n : (row + 1) * n]
        scores = np.array([draw.score for draw in own])
        read = [[draw.checkpoint_scores.get(at, math.nan) for at in config.checkpoints] for draw in own]
        messages = {} if isinstance(prompt.text, str) else {"messages": prompt.text}
        items.append(
            PromptSamples(
                text_of(prompt.text),
                rewards[row * n : (row + 1) * n].copy(),
                np.array([draw.decoded for draw in own], np.int64),
                tuple(draw.text for draw in own),
                tuple(draw.tokens for draw in own),
                temperatures=np.array([draw.request.temperature for draw in own]),
                logps=np.array([draw.logp for draw in own]),
                certainty=np.array([draw.certainty for draw in own]),
                answers=() if answer is None else tuple(answer(draw.text) for draw in own),
                scores=None if np.isnan(scores).all() else scores,
                checkpoint_scores=np.array(read) if config.checkpoints else None,
                stratum=prompt.stratum,
                columns={**messages, **prompt.columns},
                prompt_tokens=tuple(int(token) for token in prompt.tokens),
                finished=np.array([draw.finished for draw in own]),
            )
        )
    return items


def _require_same_prompts(path: Path, items: Sequence[PromptSamples], prompts: Sequence[PoolPrompt]) -> None:
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=False)):
        if item.prompt != text_of(prompt.text) or item.prompt_tokens != tuple(prompt.tokens):
            raise DataError(
                f"{path}: prompt {number} is {item.prompt[:40]!r} there and {text_of(prompt.text)[:40]!r} now; choose "
                "another path"
            )
