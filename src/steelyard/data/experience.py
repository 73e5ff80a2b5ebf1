"""Experience with text (or any token) completions: prompts, completions, rewards, labels and pairs in one batch.

Everything that the preference-tuning literature varies is visible here: where completions come from (`born`), what is
known about them (`rewards`, `labels`, `pairs`) and how they were drawn (`sampler_token_logps`). Objectives read this
batch and the policy's token log-probabilities, nothing else.

Shapes: P prompts, N completions (flat over prompts), L prompt tokens, T completion tokens, K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from steelyard.data.batch import Batch

FOREIGN = -1
"""`born` of completions that no policy of this run has written."""


@dataclass(frozen=True)
class ExperienceBatch(Batch):
    """Completions of prompts with what is known about them.

    Attributes:
        prompts: int64 [P, L] token ids, padded on the left; float32 [P, D] features in a bandit.
        prompt_mask: float32 [P, L], 1 on real tokens (all ones for features).
        completions: int64 [N, T] token ids, padded on the right; EOS, where there is one, included once.
        scored_mask: float32 [N, T], 1 on the completion's tokens (EOS included), 0 on padding.
        prompt_of: int64 [N], the prompt of each completion; completions of one prompt form a group.
        rewards: float32 [N]; NaN where unscored.
        labels: float32 [N], 1 desirable, 0 undesirable; NaN where unknown.
        pairs: int64 [K, 2], rows (chosen, rejected) of preferred and less preferred completions.
        pair_weights: float32 [K].
        margins: float32 [K], how much better the chosen one is (in rewards); NaN where unknown.
        groups: int64 [K], whose preference a pair is, 0..G-1.
        numbers: int64 [K], the pairs' row numbers in the data.
        sampler_token_logps: float32 [N, T], log-probabilities under the distribution that drew them; None for text of
            people.
        reference_token_logps: float32 [N, T] under the reference policy.
        values: float32 [N, T], a critic's values when the completions were drawn (PPO).
        advantages: float32 [N, T], what a policy gradient multiplies log-probabilities with; computed once, when the
            completions are drawn, over all of them.
        born: int64 [N], update step of the weights that drew a completion; -1 for foreign data.
        mismatched: float32 [N], 1 where the completion belongs to another prompt (KTO's estimate of the KL).
        counts: float32 [3], what means are taken over: completions (but mismatched ones), scored tokens and pairs of
            the *whole* batch, divided by its parts, so that losses of parts average to the loss of the whole; None:
            this batch's own.
    """

    prompts: Tensor
    prompt_mask: Tensor
    completions: Tensor
    scored_mask: Tensor
    prompt_of: Tensor
    rewards: Tensor | None = None
    labels: Tensor | None = None
    pairs: Tensor | None = None
    pair_weights: Tensor | None = None
    margins: Tensor | None = None
    groups: Tensor | None = None
    numbers: Tensor | None = None
    sampler_token_logps: Tensor | None = None
    reference_token_logps: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    born: Tensor | None = None
    mismatched: Tensor | None = None
    counts: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of completions N."""
        return len(self.completions)

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each completion, float32 [N]."""
        return self.scored_mask.sum(1)

    def rows(self) -> float:
        """Return the number of completions that means are taken over: all but mismatched ones."""
        return len(self) if self.mismatched is None else len(self) - float(self.mismatched.sum())

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """Return the mean over completions of [N] values; those of mismatched completions must be 0."""
        return values.sum() / (self.rows() if self.counts is None else self.counts[0])

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Return the mean over scored tokens of [N, T] values."""
        return (values * self.scored_mask).sum() / (self.scored_mask.sum() if self.counts is None else self.counts[1])

    def mean_over_pairs(self, values: Tensor) -> Tensor:
        """Return the mean over pairs of [K] values, each with its weight."""
        assert self.pairs is not None
        weighted = values if self.pair_weights is None else values * self.pair_weights
        return weighted.sum() / (len(self.pairs) if self.counts is None else self.counts[2])

    def with_counts(self, parts: int = 1) -> Self:
        """Return the batch with the counts of means over it, for a batch that will be cut into so many parts."""
        pairs = 0 if self.pairs is None else len(self.pairs)
        counts = torch.tensor([self.rows(), float(self.scored_mask.sum()), pairs], device=self.completions.device)
        return replace(self, counts=counts / parts)

    def part(self, number: int, parts: int) -> Self:
        """Return part `number` of `parts`: the prompts number, number + parts, ... with all that hangs on them.

        A group is never torn apart. The mean of the parts' losses is the loss of the whole.
        """
        return self.with_counts(parts)._of_prompts(torch.arange(number, len(self.prompts), parts))

    def of_prompts(self, prompts: Tensor) -> Self:
        """Return a batch of the given prompts (int64 [P'], in that order), with all that hangs on them."""
        return replace(self, counts=None)._of_prompts(prompts)

    def _of_prompts(self, prompts: Tensor) -> Self:
        new_number = torch.full((len(self.prompts),), -1, device=prompts.device)
        new_number[prompts] = torch.arange(len(prompts), device=prompts.device)
        number = new_number[self.prompt_of]
        rows = torch.nonzero(number >= 0).flatten()
        rows = rows[torch.argsort(number[rows], stable=True)]
        return replace(
            self.take_rows(rows),
            prompts=self.prompts[prompts],
            prompt_mask=self.prompt_mask[prompts],
            prompt_of=number[rows],
        )

    def row_fields(self) -> list[str]:
        """Return the names of the fields that are there with one row per completion, but `prompt_of`."""
        return [name for name in _ROWS if getattr(self, name) is not None]

    def take_rows(self, rows: Tensor) -> Self:
        """Return the completions `rows` (int64 [N'], none twice), in that order, and the pairs that are whole."""
        changes: dict[str, Tensor] = {name: getattr(self, name)[rows] for name in (*self.row_fields(), "prompt_of")}
        if self.pairs is not None:
            new_row = torch.full((len(self),), -1, device=rows.device)
            new_row[rows] = torch.arange(len(rows), device=rows.device)
            kept = torch.nonzero((new_row[self.pairs] >= 0).all(1)).flatten()
            changes["pairs"] = new_row[self.pairs[kept]]
            for name in _PAIRS:
                if getattr(self, name) is not None:
                    changes[name] = getattr(self, name)[kept]
        return replace(self, **changes)


_ROWS = (
    "completions",
    "scored_mask",
    "rewards",
    "labels",
    "sampler_token_logps",
    "reference_token_logps",
    "values",
    "advantages",
    "returns",
    "born",
    "mismatched",
)
_PAIRS = ("pair_weights", "margins", "groups", "numbers")


@dataclass(frozen=True)
class Outputs:
    """What a policy says about the completions of a batch.

    Attributes:
        token_logps: float32 [N, T], log pi(token | prompt, earlier tokens); exactly 0 where not scored.
        entropies: float32 [N, T] of the next-token distribution, 0 where not scored; only where asked for.
        values: float32 [N, T] of a value head, 0 where not scored; only where the objective has one.
    """

    token_logps: Tensor
    entropies: Tensor | None = None
    values: Tensor | None = None
