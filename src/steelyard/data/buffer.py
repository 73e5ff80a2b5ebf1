"""Operations on experience: join batches, drop completions, label them, lend them to other prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from steelyard.data.experience import ExperienceBatch
from steelyard.errors import DataError


def labelled(batch: ExperienceBatch) -> ExperienceBatch:
    """Return the batch with labels where they are unknown.

    Chosen completions are good and rejected ones bad; without pairs, those whose reward is above the mean of their
    prompt's are good and those below it bad. What is both or neither stays unknown (NaN).
    """
    good, bad = (torch.zeros(len(batch), dtype=torch.bool) for _ in range(2))
    if batch.pairs is not None:
        good[batch.pairs[:, 0]], bad[batch.pairs[:, 1]] = True, True
    elif batch.rewards is not None:
        rewards = batch.rewards.double()
        known = (~rewards.isnan()).double()
        sums = torch.zeros(len(batch.prompts), 2, dtype=torch.float64)
        sums.index_add_(0, batch.prompt_of, torch.stack([rewards.nan_to_num(0.0), known], 1))
        mean = (sums[:, 0] / sums[:, 1])[batch.prompt_of]
        good, bad = rewards > mean, rewards < mean
    labels = torch.full((len(batch),), math.nan) if batch.labels is None else batch.labels.clone()
    unknown = labels.isnan()
    labels[unknown & good & ~bad], labels[unknown & bad & ~good] = 1.0, 0.0
    return replace(batch, labels=labels)


def with_mismatched(batch: ExperienceBatch) -> ExperienceBatch:
    """Return the batch with one more row for each row: its prompt with a completion of the next prompt.

    They estimate how far the policy has moved where nothing was preferred (KTO's reference point). Reference log-probs
    are dropped: those of the new rows are others, and a batch has them for all rows or for none.
    """
    batch = replace(batch, reference_token_logps=None)
    count = len(batch.prompts)
    if count < 2:
        raise DataError("completions of other prompts need at least 2 prompts that can be used, found 1")
    of = [torch.nonzero(batch.prompt_of == prompt).flatten() for prompt in range(count)]
    rows, owners = [], []
    for prompt in range(count):
        others = of[(prompt + 1) % count]
        rows.append(others[torch.arange(len(of[prompt])) % len(others)])
        owners.append(torch.full((len(of[prompt]),), prompt))
    taken, prompt_of = torch.cat(rows), torch.cat(owners)
    twins = {name: getattr(batch, name)[taken] for name in batch.row_fields()}
    unknown = torch.full((len(taken),), math.nan)
    twins |= {name: unknown for name in ("rewards", "labels") if name in twins}
    if "sampler_token_logps" in twins:  # they were drawn for another prompt
        twins["sampler_token_logps"] = torch.zeros_like(twins["sampler_token_logps"])
    changes = {name: torch.cat([getattr(batch, name), value]) for name, value in twins.items()}
    changes["prompt_of"] = torch.cat([batch.prompt_of, prompt_of])
    changes["mismatched"] = torch.cat([torch.zeros(len(batch)), torch.ones(len(taken))])
    return replace(batch, **changes).of_prompts(torch.arange(count))


def joined(parts: Sequence[ExperienceBatch]) -> ExperienceBatch:
    """Return one batch of several, padded to the longest.

    A field that one of them lacks: NaN for rewards, labels and margins, weight 1 for pairs; anything else is left out.
    """
    if len(parts) == 1:
        return parts[0]
    fields: dict[str, list[Tensor]] = {}
    prompts = rows = 0
    length = max(part.prompts.shape[1] for part in parts)
    width = max(part.completions.shape[1] for part in parts)
    for part in parts:
        tensors = part.tensors()
        if part.prompts.shape[1] < length:
            for name in ("prompts", "prompt_mask"):
                tensors[name] = functional.pad(tensors[name], (length - part.prompts.shape[1], 0))
        for name in part.row_fields():
            if tensors[name].ndim == 2:
                tensors[name] = functional.pad(tensors[name], (0, width - part.completions.shape[1]))
        tensors["prompt_of"] = part.prompt_of + prompts
        pairs = 0
        if part.pairs is not None:
            tensors["pairs"], pairs = part.pairs + rows, len(part.pairs)
        defaults = {
            "rewards": torch.full((len(part),), math.nan),
            "labels": torch.full((len(part),), math.nan),
            "pairs": torch.zeros(0, 2, dtype=torch.int64),
            "pair_weights": torch.ones(pairs),
            "margins": torch.full((pairs,), math.nan),
        }
        for name, value in {**defaults, **tensors}.items():
            fields.setdefault(name, []).append(value)
        prompts, rows = prompts + len(part.prompts), rows + len(part)
    known = {name for part in parts for name in part.tensors()}
    return ExperienceBatch(
        **{name: torch.cat(values) for name, values in fields.items() if name in known and len(values) == len(parts)}
    )


def trimmed(batch: ExperienceBatch) -> ExperienceBatch:
    """Return the batch without columns that are padding in every row."""
    width = max(1, int(batch.lengths.max())) if len(batch) else 1
    changes = {name: getattr(batch, name)[:, :width] for name in batch.row_fields() if getattr(batch, name).ndim == 2}
    if not batch.prompts.is_floating_point():
        length = max(1, int(batch.prompt_mask.sum(1).max()))
        changes |= {name: getattr(batch, name)[:, -length:] for name in ("prompts", "prompt_mask")}
    return replace(batch, **changes)


def of_rows(batch: ExperienceBatch, kept: Tensor) -> ExperienceBatch:
    """Return the batch with the completions where `kept` (bool [N]) is set, and the pairs of such completions."""
    return batch if bool(kept.all()) else batch.take_rows(torch.nonzero(kept).flatten())
