r"""A synthetic language for length problems: where a reward peaks relative to the reference is known exactly.

Tajwar, Singh et al. (2024), section 4: preference problems on the length of an answer. Min Length peaks where the
reference policy has almost no mass, Mode Length where it has most, and in Skew Length the preference data do not look
like what the reference writes either.

The language: a prompt is a few words; an answer is a walk that mostly steps to the next word of the vocabulary and
sometimes jumps back to a word of the prompt; its length is normal, whatever the prompt. Token ids: 0 padding, 1 the end
(EOS), 2 where an answer begins, then the words, written as letters. Lengths count tokens, the end included, so the
shortest answer (nothing but the end) has length 1; an answer that is cut off has the longest length.

| reward of length l | formula |
|---|---|
| min, skew | - l |
| max | l |
| mode | - abs(l - m), m the language's mean length, rounded |

Skew: the pairs' lengths are cut anew to p(l) \propto exp(rate l), l = 1..cap. The paper's skew is known here only at
second hand and its direction is not, so the rate is signed: above 0 answers pile up at the long end.

Shapes: P prompts, L prompt tokens, N completions, T completion tokens.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import FOREIGN, ExperienceBatch
from steelyard.errors import ConfigError, DataError

PAD, EOS, ANSWER = 0, 1, 2
NUM_SPECIALS = 3
LengthTask = Literal["min", "mode", "max", "skew"]
PairKind = Literal["independent", "similar", "distinct"]


@dataclass(frozen=True)
class LengthLanguageConfig(Config):
    """What prompts and answers of the language look like."""

    words: int = 22
    """Words of the vocabulary (at most 52: letters); three special tokens come on top."""
    prompt_words: int = 4
    """Words of a prompt."""
    cap: int = 24
    """Most tokens of an answer, its end included."""
    mean_length: float = 13.0
    """Mean length of answers, in tokens."""
    std_length: float = 3.5
    """Standard deviation of the lengths, before they are rounded and cut to 1..cap."""
    follow: float = 0.6
    """Chance that a word is followed by the next one of the vocabulary; else it is one of the prompt's."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "words", "prompt_words", "cap", "mean_length", "std_length")
        require_range(self, 0, 1, "follow")
        if not 2 <= self.words <= len(string.ascii_letters):
            raise ConfigError(f"words must be between 2 and {len(string.ascii_letters)}, found {self.words}")
        if self.mean_length > self.cap:
            raise ConfigError(f"mean_length must be at most cap = {self.cap}, found {self.mean_length}")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return NUM_SPECIALS + self.words

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt, the mark where the answer begins included."""
        return self.prompt_words + 1

    @property
    def mode(self) -> int:
        """The most frequent length m."""
        return round(self.mean_length)


class LengthTokenizer:
    """Words are letters; the protocol of `data/tokenizer.py`."""

    pad, eos = PAD, EOS

    def __init__(self, config: LengthLanguageConfig) -> None:
        self.vocab_size = config.vocab_size
        self._letters = string.ascii_letters[: config.words]

    def prompt(self, prompt: Any) -> list[int]:
        """Return the ids of a prompt and of the mark where the answer begins."""
        return [*self._encode(prompt), ANSWER]

    def completion(self, prompt: Any, completion: Any) -> list[int]:
        """Return the ids of an answer and of its end."""
        return [*self._encode(completion), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of `ids` as letters; special tokens are left out."""
        return "".join(self._letters[int(i) - NUM_SPECIALS] for i in ids if int(i) >= NUM_SPECIALS)

    def _encode(self, text: Any) -> list[int]:
        unknown = sorted(set(text) - set(self._letters))
        if unknown:
            raise DataError(f"text {text!r:.40}: expected letters up to {self._letters[-1]!r}, found {unknown[0]!r}")
        return [NUM_SPECIALS + self._letters.index(letter) for letter in text]


def draw_prompts(config: LengthLanguageConfig, count: int, generator: torch.Generator) -> Tensor:
    """Return prompts int64 [P, L]: random words and the mark where the answer begins."""
    words = torch.randint(config.words, (count, config.prompt_words), generator=generator) + NUM_SPECIALS
    return torch.cat([words, torch.full((count, 1), ANSWER)], dim=1)


def draw_lengths(config: LengthLanguageConfig, count: int, generator: torch.Generator) -> Tensor:
    """Return lengths int64 [N] of answers as people write them: normal, rounded, in 1..cap."""
    drawn = config.mean_length + config.std_length * torch.randn(count, generator=generator)
    return drawn.round().clamp(1, config.cap).long()


def skewed_lengths(config: LengthLanguageConfig, count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return lengths int64 [N] with p(l) proportional to exp(rate l), l = 1..cap; a rate above 0 favours long ones."""
    log_weights = rate * torch.arange(1, config.cap + 1, dtype=torch.float64)
    return torch.multinomial(log_weights.softmax(0), count, replacement=True, generator=generator) + 1


def write_answers(config: LengthLanguageConfig, prompts: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return answers int64 [N, cap] of the given lengths [N] to prompts [N, L], as the language has them."""
    empty = torch.full((len(prompts), config.cap), PAD)
    return recut(config, prompts, empty, torch.ones_like(lengths), lengths, generator)


def recut(
    config: LengthLanguageConfig,
    prompts: Tensor,
    completions: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return completions int64 [N, cap] with other lengths: cut, or continued as the language would, then ended.

    Args:
        config: the language.
        prompts: int64 [N, L], the prompt of each completion.
        completions: int64 [N, at most cap].
        lengths: int64 [N], tokens of each, the last of which is taken for its end.
        new_lengths: int64 [N] in 1..cap.
        generator: draws the words that are added.
    """
    count, words = len(prompts), prompts[:, : config.prompt_words]
    result = torch.full((count, config.cap), PAD)
    result[:, : completions.shape[1]] = completions
    previous = words[:, -1]
    for position in range(config.cap):
        follows = torch.rand(count, generator=generator) < config.follow
        jump = words.gather(1, torch.randint(config.prompt_words, (count, 1), generator=generator)).squeeze(1)
        step = (previous - NUM_SPECIALS + 1) % config.words + NUM_SPECIALS
        word = torch.where(position < lengths - 1, result[:, position], torch.where(follows, step, jump))
        end, beyond = new_lengths - 1 == position, new_lengths - 1 < position
        result[:, position] = word.masked_fill(end, EOS).masked_fill(beyond, PAD)
        previous = word
    return result


def length_rewards(task: LengthTask, lengths: Tensor, mode: int) -> Tensor:
    """Return rewards float32 of lengths in tokens; see the module docstring."""
    lengths = lengths.float()
    if task == "mode":
        return -(lengths - mode).abs()
    return lengths if task == "max" else -lengths


class LengthScorer:
    """The gold reward as a scorer of completions; the protocol of `envs/scorers.py`.

    Args:
        task: which reward.
        mode: the length that Mode Length asks for.
        scale: rewards are divided by it.
    """

    def __init__(self, task: LengthTask, mode: int, scale: float = 1.0) -> None:
        self.task, self.mode, self.scale = task, mode, scale

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return rewards float32 [N] of completions given as token ids, the end included."""
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        return length_rewards(self.task, lengths, self.mode) / self.scale


def scored_mask(lengths: Tensor, width: int) -> Tensor:
    """Return float32 [N, width], 1 on the first `lengths` tokens."""
    return (torch.arange(width) < lengths[:, None]).float()


def experience(prompts: Tensor, prompt_of: Tensor, completions: Tensor, lengths: Tensor) -> ExperienceBatch:
    """Return a batch of completions int64 [N, T] with lengths [N] to prompts [P, L], written by nobody of this run."""
    return ExperienceBatch(
        prompts=prompts,
        prompt_mask=torch.ones(prompts.shape),
        completions=completions,
        scored_mask=scored_mask(lengths, completions.shape[1]),
        prompt_of=prompt_of,
        born=torch.full((len(completions),), FOREIGN),
    )


def sft_data(config: LengthLanguageConfig, count: int, generator: torch.Generator) -> ExperienceBatch:
    """Return `count` prompts with one answer each, for supervised fine-tuning."""
    prompts = draw_prompts(config, count, generator)
    lengths = draw_lengths(config, count, generator)
    return experience(prompts, torch.arange(count), write_answers(config, prompts, lengths, generator), lengths)


@dataclass(frozen=True)
class LengthPairs:
    """Preference pairs of a length problem: row k of each field belongs together.

    Attributes:
        prompts: int64 [K, L].
        completions: int64 [K, 2, T], chosen and rejected.
        lengths: int64 [K, 2].
        rewards: float32 [K, 2], gold; the chosen one's is the higher.
    """

    prompts: Tensor
    completions: Tensor
    lengths: Tensor
    rewards: Tensor

    def __len__(self) -> int:
        """Return the number of pairs K."""
        return len(self.prompts)

    def __getitem__(self, rows: slice | Tensor) -> LengthPairs:
        """Return some of the pairs."""
        return LengthPairs(self.prompts[rows], self.completions[rows], self.lengths[rows], self.rewards[rows])

    def batch(self, rows: Tensor | None = None) -> ExperienceBatch:
        """Return the pairs `rows` (int64; None: all) as a batch: completions 2k and 2k + 1 are pair k's."""
        chosen = self if rows is None else self[rows]
        count = len(chosen)
        batch = experience(
            chosen.prompts,
            torch.arange(count).repeat_interleave(2),
            chosen.completions.flatten(0, 1),
            chosen.lengths.flatten(),
        )
        extra = {
            "rewards": chosen.rewards.flatten(),
            "labels": torch.tensor([1.0, 0.0]).repeat(count),
            "pairs": torch.arange(2 * count).view(count, 2),
            "margins": chosen.rewards[:, 0] - chosen.rewards[:, 1],
        }
        return ExperienceBatch(**(batch.tensors() | extra))

    def rows(self, tokenizer: LengthTokenizer) -> list[dict[str, str]]:
        """Return the pairs as text rows: prompt, chosen, rejected."""
        return [
            {
                "prompt": tokenizer.decode(prompt.tolist()),
                "chosen": tokenizer.decode(completions[0].tolist()),
                "rejected": tokenizer.decode(completions[1].tolist()),
            }
            for prompt, completions in zip(self.prompts, self.completions, strict=True)
        ]


def label_pairs(
    config: LengthLanguageConfig, task: LengthTask, prompts: Tensor, completions: Tensor, lengths: Tensor
) -> LengthPairs:
    """Return the pairs of completions [P, 2, T] with lengths [P, 2], the better first; ties are dropped."""
    rewards = length_rewards(task, lengths, config.mode)
    order = rewards.argsort(dim=1, descending=True)
    kept = rewards[:, 0] != rewards[:, 1]
    sorted_completions = completions.gather(1, order[..., None].expand_as(completions))
    return LengthPairs(
        prompts[kept], sorted_completions[kept], lengths.gather(1, order)[kept], rewards.gather(1, order)[kept]
    )


def skew_pairs(
    config: LengthLanguageConfig,
    rate: float,
    prompts: Tensor,
    completions: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
) -> LengthPairs:
    """Return Skew Length's pairs of completions [P, 2, T]: lengths cut anew to exp(rate l), then labelled as in min."""
    new_lengths = skewed_lengths(config, 2 * len(prompts), rate, generator)
    new = recut(config, prompts.repeat_interleave(2, 0), completions.flatten(0, 1), lengths.flatten(), new_lengths,
                generator)  # fmt: skip
    return label_pairs(config, "skew", prompts, new.view(len(prompts), 2, -1), new_lengths.view(-1, 2))


def contrast_pairs(
    config: LengthLanguageConfig,
    similar: bool,
    prompts: Tensor,
    completions: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    max_gap: int = 3,
) -> LengthPairs:
    """Return Min Length's pairs that differ in 1..max_gap tokens of length and, unless similar, in their words.

    The rejected completion is the first of each prompt. The chosen one is the same text ended earlier (similar) or the
    second of the prompt cut to that very length (distinct): both kinds have the same lengths, only the distance varies.
    """
    rejected, rejected_lengths = completions[:, 0], lengths[:, 0]
    gaps = torch.randint(1, max_gap + 1, (len(prompts),), generator=generator)
    kept = rejected_lengths > gaps
    other = 0 if similar else 1
    chosen_lengths = (rejected_lengths - gaps).clamp(min=1)
    chosen = recut(config, prompts, completions[:, other], lengths[:, other], chosen_lengths, generator)
    width = chosen.shape[1]
    padded = torch.full((len(prompts), width), PAD)
    padded[:, : rejected.shape[1]] = rejected
    both = torch.stack([chosen, padded], dim=1)[kept]
    return label_pairs(config, "min", prompts[kept], both, torch.stack([chosen_lengths, rejected_lengths], 1)[kept])


def edit_distances(first: Tensor, second: Tensor, first_lengths: Tensor, second_lengths: Tensor) -> Tensor:
    """Return the Levenshtein distances int64 [K] between rows of [K, T], all pairs at once."""
    count, width = first.shape
    row = torch.arange(second.shape[1] + 1).expand(count, -1)
    table = [row]
    for i in range(1, width + 1):
        new = [torch.full((count,), i)]
        for j in range(1, second.shape[1] + 1):
            substitute = row[:, j - 1] + (first[:, i - 1] != second[:, j - 1])
            new.append(torch.minimum(substitute, torch.minimum(row[:, j], new[-1]) + 1))
        row = torch.stack(new, dim=1)
        table.append(row)
    everything = torch.stack(table, dim=1)  # [K, T + 1, T + 1]
    return everything[torch.arange(count), first_lengths, second_lengths]
