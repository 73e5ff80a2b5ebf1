"""Ragged batches of prompts and completions for tests of language models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from steelyard.data.experience import ExperienceBatch


def ragged(prompts: int, completions: int, vocabulary: int, seed: int, longest: int = 6) -> ExperienceBatch:
    """Return a random batch with prompts of 1.. and completions of 1..`longest` tokens; garbage on the padding."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, longest + 1, (prompts,), generator=generator)
    lengths = torch.randint(1, longest + 1, (completions,), generator=generator)
    columns = torch.arange(longest)
    return ExperienceBatch(
        prompts=torch.randint(0, vocabulary, (prompts, longest), generator=generator),
        prompt_mask=(columns >= longest - prompt_lengths[:, None]).float(),
        completions=torch.randint(0, vocabulary, (completions, longest), generator=generator),
        scored_mask=(columns < lengths[:, None]).float(),
        prompt_of=torch.randint(0, prompts, (completions,), generator=generator),
    )


def padded(batch: ExperienceBatch, left: int, right: int, token: int) -> ExperienceBatch:
    """Return the batch with more padding, made of `token`."""
    return replace(
        batch,
        prompts=pad(batch.prompts, (left, 0), value=token),
        prompt_mask=pad(batch.prompt_mask, (left, 0)),
        completions=pad(batch.completions, (0, right), value=token),
        scored_mask=pad(batch.scored_mask, (0, right)),
    )


def shuffled(batch: ExperienceBatch, order: torch.Tensor, prompt_order: torch.Tensor) -> ExperienceBatch:
    """Return the batch with completions and prompts in other orders."""
    new_number = torch.empty_like(prompt_order)
    new_number[prompt_order] = torch.arange(len(prompt_order))
    return ExperienceBatch(
        batch.prompts[prompt_order],
        batch.prompt_mask[prompt_order],
        batch.completions[order],
        batch.scored_mask[order],
        new_number[batch.prompt_of[order]],
    )
