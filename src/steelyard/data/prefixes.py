"""Samples of prompts, cut at random places, as batches for self-evaluation: what is read, after how many tokens, and
what is to be said there.

Shapes: P prompts, N samples in a batch (flat over prompts), T tokens, K places of a sample, M places in all, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.batch import Batch
from steelyard.data.experience import ExperienceBatch
from steelyard.data.restart_labels import RestartLabelConfig, cuts, margin_of, soft_labels
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.sampler import EpochSampler
from steelyard.data.tokenizer import Tokenizer
from steelyard.errors import DataError
from steelyard.rng import numpy_generator


@dataclass(frozen=True)
class PrefixBatch(ExperienceBatch):
    """Completions, EOS included where they ended, and what is to be said after parts of them.

    Attributes:
        cuts: int64 [N, K], after how many tokens; -1: nowhere.
        targets: float32 [N, K], P(no fresh sample would be better); read only where cuts are at least 0.
    """

    cuts: Tensor | None = None
    targets: Tensor | None = None

    def row_fields(self) -> list[str]:
        """Return the names of the fields with one row per completion, but `prompt_of`."""
        return [*super().row_fields(), "cuts", "targets"]

    def with_counts(self, parts: int = 1) -> Self:
        """Return the batch with the counts of means over it: completions, tokens and targets."""
        assert self.cuts is not None
        counts = [len(self), float(self.scored_mask.sum()), float((self.cuts >= 0).sum())]
        return replace(self, counts=torch.tensor(counts, device=self.completions.device) / parts)


PLACES = ("states", "lengths", "drawn", "targets")
"""Fields of `StateBatch` with one entry a place."""


@dataclass(frozen=True)
class StateBatch(Batch):
    """Places that a probe reads, their states computed once.

    Attributes:
        states: float32 [M, W].
        lengths: int64 [M], tokens read, prompt included.
        drawn: float32 [M, 3], tokens of the completion, the sum of their log-probs, the lowest of them.
        targets: float32 [M], P(no fresh sample would be better).
        count: float32 [1], what means are taken over, where the batch is a part of another one.
    """

    states: Tensor
    lengths: Tensor
    drawn: Tensor
    targets: Tensor
    count: Tensor | None = None

    def part(self, number: int, parts: int) -> Self:
        """Return part `number` of `parts`: the rows number, number + parts, ..."""
        rows = {name: getattr(self, name)[number::parts] for name in PLACES}
        return replace(self, **rows, count=torch.tensor([len(self.states) / parts]))


class PoolTokens:
    """A pool of samples as token ids.

    Args:
        pool: samples with ids, or with texts.
        tokenizer: of the model; not needed where the pool holds all ids.
        pad: fills up batches.

    Attributes:
        source: name of the pool, for messages.
        prompts: P lists of ids.
        completions: P lists of N lists of ids, EOS included where a sample ended by itself.
        ends: P arrays int64 [N], tokens of each sample before its EOS: where its last score is read.
        rewards: P arrays [N].

    Raises:
        DataError: ids are missing and there is no tokenizer to make them, or nothing tells whether samples ended.
    """

    def __init__(self, pool: SamplePool, tokenizer: Tokenizer | None = None, pad: int | None = None) -> None:
        self.source = pool.source or "pool"
        self.pad = pad if pad is not None else 0 if tokenizer is None else tokenizer.pad
        self.prompts = [self._prompt(number, item, tokenizer) for number, item in enumerate(pool)]
        self.completions = [self._completions(number, item, tokenizer) for number, item in enumerate(pool)]
        self.ends = [self._ends(number, item, tokenizer) for number, item in enumerate(pool)]
        self.rewards = [np.asarray(item.rewards, np.float64) for item in pool]

    def __len__(self) -> int:
        return len(self.prompts)

    def _prompt(self, number: int, item: PromptSamples, tokenizer: Tokenizer | None) -> list[int]:
        if item.prompt_tokens:
            return list(item.prompt_tokens)
        if tokenizer is None or not item.prompt:
            raise DataError(
                f"{self.source}: prompt {number}: expected token ids, or a text and a tokenizer, found neither"
            )
        return tokenizer.prompt(item.prompt)

    def _completions(self, number: int, item: PromptSamples, tokenizer: Tokenizer | None) -> list[list[int]]:
        if any(item.tokens):
            return [list(tokens) for tokens in item.tokens]
        if tokenizer is None or not item.texts:
            raise DataError(
                f"{self.source}: samples of prompt {number}: expected token ids, or texts and a tokenizer, found "
                "neither"
            )
        return [tokenizer.completion(item.prompt, text) for text in item.texts]

    def _ends(self, number: int, item: PromptSamples, tokenizer: Tokenizer | None) -> npt.NDArray[np.int64]:
        completions = self.completions[number]
        lengths = np.array([len(tokens) for tokens in completions], np.int64)
        if item.finished is not None and any(item.tokens):
            return lengths - np.asarray(item.finished, np.int64)
        if tokenizer is None:
            raise DataError(
                f"{self.source}: samples of prompt {number}: expected to be told which of them ended by themselves "
                "(`finished`), or a tokenizer with the token that ends them, found neither"
            )
        return lengths - np.array([tokens[-1:] == [tokenizer.eos] for tokens in completions], np.int64)

    def batch(
        self,
        prompts: Sequence[int],
        samples: Sequence[npt.NDArray[np.int64]],
        where: npt.NDArray[np.int64],
        targets: npt.NDArray[np.float64] | None = None,
    ) -> PrefixBatch:
        """Return a batch of some samples of some prompts.

        Args:
            prompts: numbers of prompts.
            samples: of each of them, numbers of samples.
            where: int64 [N, K], after how many tokens to read each; -1: nowhere.
            targets: float64 [N, K]; None: unknown.
        """
        starts = [self.prompts[prompt] for prompt in prompts]
        ids = [self.completions[prompt][one] for prompt, of in zip(prompts, samples, strict=True) for one in of]
        longest, most = max(map(len, starts)), max(1, *map(len, ids))
        before = torch.full((len(starts), longest), self.pad)
        prompt_mask = torch.zeros(len(starts), longest)
        for row, start in enumerate(starts):
            before[row, longest - len(start) :] = torch.tensor(start)
            prompt_mask[row, longest - len(start) :] = 1
        after, mask = torch.full((len(ids), most), self.pad), torch.zeros(len(ids), most)
        for row, tokens in enumerate(ids):
            after[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        prompt_of = torch.tensor([row for row, of in enumerate(samples) for _ in of])
        wanted = torch.zeros(where.shape) if targets is None else torch.from_numpy(np.nan_to_num(targets)).float()
        return PrefixBatch(before, prompt_mask, after, mask, prompt_of, cuts=torch.from_numpy(where), targets=wanted)


class PrefixSource:
    """Batches of samples with places to read and soft labels; a pure function of (seed, step).

    Args:
        tokens: the pool.
        labels: when another sample counts as better.
        batch_prompts: prompts in a batch.
        samples: samples of each prompt in a batch.
        prefixes: random places in each, beside its end.
        prompt_only: also read prompts before their first token.
        seed: of everything random.

    Attributes:
        margin: in units of the reward.
        better: P arrays [N], the labels: P(another sample is better).

    Raises:
        DataError: no prompt has two samples with a reward.
    """

    def __init__(
        self,
        tokens: PoolTokens,
        labels: RestartLabelConfig,
        batch_prompts: int,
        samples: int,
        prefixes: int,
        prompt_only: bool,
        seed: int,
    ) -> None:
        self.tokens, self.samples, self.prefixes, self.prompt_only = tokens, samples, prefixes, prompt_only
        self.seed = seed
        self.margin = margin_of(tokens.rewards, labels)
        self.better = [soft_labels(rewards, self.margin) for rewards in tokens.rewards]
        self.known = [np.flatnonzero(~np.isnan(better)) for better in self.better]
        self.prompts = np.array([row for row, known in enumerate(self.known) if len(known)], np.int64)
        if not len(self.prompts):
            raise DataError(f"{tokens.source}: expected a prompt with two samples whose rewards are known, found none")
        self.sampler = EpochSampler(len(self.prompts), batch_prompts, seed, "self_eval/prompts")

    def batch(self, step: int) -> PrefixBatch:
        """Return the batch of update `step`."""
        generator = numpy_generator(self.seed, "self_eval/prefixes", step)
        prompts = self.prompts[self.sampler.indices(step)]
        return self.of(prompts.tolist(), [
            np.sort(generator.permutation(self.known[prompt])[: self.samples]) for prompt in prompts
        ], generator)  # fmt: skip

    def of(
        self,
        prompts: Sequence[int],
        samples: Sequence[npt.NDArray[np.int64]],
        generator: np.random.Generator,
        tokens: PoolTokens | None = None,
        better: Sequence[npt.NDArray[np.float64]] | None = None,
    ) -> PrefixBatch:
        """Return a batch of the given samples of the given prompts, cut at places drawn from `generator`.

        Args:
            prompts: numbers of prompts.
            samples: of each, numbers of samples.
            generator: draws the places.
            tokens: another pool (held-out prompts), to be cut in the same way.
            better: its labels.
        """
        tokens, better = tokens or self.tokens, self.better if better is None else better
        where, targets = [], []
        for prompt, chosen in zip(prompts, samples, strict=True):
            found = cuts(tokens.ends[prompt][chosen], self.prefixes, self.prompt_only, generator)
            target = np.repeat(1 - better[prompt][chosen, None], found.shape[1], 1)
            target[:, -1] = 1 - np.nanmean(better[prompt])  # of the prompt alone
            where.append(found)
            targets.append(target)
        return tokens.batch(prompts, samples, np.concatenate(where), np.concatenate(targets))

    def counters(self) -> dict[str, Any]:
        """Return nothing: the update step says it all."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class StateSource:
    """Batches of places whose states were computed once; a pure function of (seed, step)."""

    def __init__(self, states: StateBatch, batch_size: int, seed: int) -> None:
        self.states = states
        self.sampler = EpochSampler(len(states), min(batch_size, len(states)), seed, "self_eval/states")

    def batch(self, step: int) -> StateBatch:
        """Return the batch of update `step`."""
        rows = torch.from_numpy(self.sampler.indices(step))
        return StateBatch(*(getattr(self.states, name)[rows] for name in PLACES))

    def counters(self) -> dict[str, Any]:
        """Return nothing: the update step says it all."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""
