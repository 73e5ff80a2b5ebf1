"""Completions as rows of tokens for a language model, and the log-probabilities of their tokens.

A row holds real tokens first and padding last, so causal attention needs no padding mask and positions count from 0:
what a completion scores cannot depend on how it was padded. Only the hidden states that predict a scored token reach
the output head.

Shapes: P prompts, N completions, L prompt tokens, T completion tokens, R rows, C columns, M scored tokens, W width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steelyard.data.experience import ExperienceBatch
from steelyard.errors import DataError

KEPT = 1 << 26
"""Probabilities of at most so many (token, vocabulary) entries are kept for the backward pass; more are recomputed."""
BLOCK = 1 << 22
"""Entries of one block of logits."""


@dataclass(frozen=True)
class Rows:
    """Tokens for one forward pass and where in it the completions are.

    Attributes:
        tokens: int64 [R, C].
        positions: int64 [R, C].
        sources: int64 [M], flat index (row * C + column) of the hidden state that predicts each scored token.
        targets: int64 [M], the scored tokens, in the order of `scored_mask`.
        ends: int64 [N], flat index of the last token of each completion.
        units: int64 [R, C] of packed rows: which prompt's block a column belongs to, -1 padding; None: one completion
            a row.
        segments: int64 [R, C] of packed rows: 0 prompt, k its k-th completion.
    """

    tokens: Tensor
    positions: Tensor
    sources: Tensor
    targets: Tensor
    ends: Tensor
    units: Tensor | None = None
    segments: Tensor | None = None

    def visible(self) -> Tensor | None:
        """Return bool [R, C, C], which column a column may attend to; None: plain causal attention.

        A completion sees its prompt and itself; padding sees itself only, for attention over nothing is NaN.
        """
        if self.units is None or self.segments is None:
            return None
        columns = self.tokens.shape[1]
        same = (self.units[:, :, None] == self.units[:, None, :]) & (self.units >= 0)[:, :, None]
        own, other = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(columns, columns, dtype=torch.bool, device=own.device).tril()
        diagonal = torch.eye(columns, dtype=torch.bool, device=own.device)
        return same & ((own == other) | (other == 0)) & causal | diagonal


def prompt_lengths(mask: Tensor) -> Tensor:
    """Return int64 [P], the tokens of each left-padded prompt.

    Raises:
        DataError: a prompt is empty, so that nothing predicts the first token, or is not padded on the left.
    """
    lengths = mask.sum(1).long()
    if bool((lengths < 1).any()):
        row = int((lengths < 1).nonzero()[0])
        raise DataError(f"prompt {row}: expected at least one token (a BOS will do), found none")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise DataError("prompt_mask: expected zeros on the left only; prompts are padded on the left")
    return lengths


def _spans(batch: ExperienceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompt lengths [P], used columns [N] and the scored mask bool [N, T]."""
    scored = batch.scored_mask > 0
    columns = torch.arange(1, scored.shape[1] + 1, device=scored.device)
    return prompt_lengths(batch.prompt_mask), (scored * columns).amax(1), scored


def plain_rows(batch: ExperienceBatch) -> Rows:
    """Return one row [prompt, completion] for each completion."""
    lengths, used, scored = _spans(batch)
    lengths = lengths[batch.prompt_of]
    width = batch.prompts.shape[1]
    both = torch.cat([batch.prompts[batch.prompt_of], batch.completions], 1)
    ends = lengths + used
    columns = torch.arange(int(ends.max()), device=both.device)
    index = (columns + (width - lengths)[:, None]).clamp(max=both.shape[1] - 1)
    tokens = both.gather(1, index)
    rows, offsets = scored.nonzero(as_tuple=True)
    sources = rows * len(columns) + lengths[rows] + offsets - 1
    last = torch.arange(len(ends), device=ends.device) * len(columns) + ends - 1
    return Rows(tokens, columns.expand_as(tokens), sources, batch.completions[scored], last)


def packed_rows(batch: ExperienceBatch, most: int) -> Rows:
    """Return blocks [prompt, completion, completion, ...] put together into rows, for models that take `visible`.

    A prompt is computed once for its completions, and short blocks share a row, so that there is little padding.

    Args:
        batch: prompts and completions.
        most: completions of a block; the further ones of a group repeat the prompt in a block of their own.
    """
    lengths, used, scored = _spans(batch)
    device, total = used.device, len(used)
    # blocks: completions in the order of prompts, `most` together
    order = torch.argsort(batch.prompt_of, stable=True)
    prompt_of = batch.prompt_of[order]
    counts = torch.bincount(prompt_of, minlength=len(lengths))
    number = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[prompt_of]  # in its group, from 0
    opens = number % most == 0
    unit = opens.cumsum(0) - 1
    unit_prompt = prompt_of[opens]
    spans = used[order]
    before = spans.cumsum(0) - spans
    inner = lengths[prompt_of] + before - before[opens][unit]  # where a completion begins in its block
    sizes = lengths[unit_prompt].index_add(0, unit, spans)
    width, row, column = _first_fit(sizes.tolist())
    base = torch.tensor(row, device=device) * width + torch.tensor(column, device=device)
    shape = (max(row) + 1, width)

    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    positions, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    units = torch.full_like(tokens, -1)

    prompts, mask = batch.prompts[unit_prompt], batch.prompt_mask[unit_prompt] > 0
    which, old = mask.nonzero(as_tuple=True)
    position = old - (mask.shape[1] - lengths[unit_prompt])[which]
    places = base[which] + position
    tokens.view(-1)[places] = prompts[which, old]
    positions.view(-1)[places] = position
    units.view(-1)[places] = which

    begins, first = torch.empty_like(used), torch.empty_like(used)  # of each completion, flat, in the batch's order
    begins[order] = base[unit] + inner
    first[order] = base[unit] + lengths[prompt_of] - 1  # the prompt's last token predicts its first one
    inside = torch.arange(scored.shape[1], device=device) < used[:, None]
    which, offset = inside.nonzero(as_tuple=True)
    places = begins[which] + offset
    tokens.view(-1)[places] = batch.completions[which, offset]
    positions.view(-1)[places] = lengths[batch.prompt_of[which]] + offset
    of_unit, of_number = torch.empty_like(used), torch.empty_like(used)
    of_unit[order], of_number[order] = unit, number + 1
    units.view(-1)[places], segments.view(-1)[places] = of_unit[which], of_number[which]

    which, offset = scored.nonzero(as_tuple=True)
    sources = torch.where(offset == 0, first[which], begins[which] + offset - 1)
    ends = torch.where(used == 0, first, begins + used - 1)
    return Rows(tokens, positions, sources, batch.completions[scored], ends, units, segments)


def _first_fit(sizes: list[int]) -> tuple[int, list[int], list[int]]:
    """Return the rows' width and (row, column) of blocks, the longest first, each in the first row with room."""
    width = max(sizes)
    filled: list[int] = []
    row, column = [0] * len(sizes), [0] * len(sizes)
    for block in sorted(range(len(sizes)), key=lambda block: -sizes[block]):
        found = next((k for k, used in enumerate(filled) if used + sizes[block] <= width), len(filled))
        if found == len(filled):
            filled.append(0)
        row[block], column[block] = found, filled[found]
        filled[found] += sizes[block]
    return width, row, column


def spread(values: Tensor, batch: ExperienceBatch) -> Tensor:
    """Return [N, T] with `values` [M] at the scored tokens and exactly 0 elsewhere."""
    zeros = values.new_zeros(batch.scored_mask.shape)
    return zeros.masked_scatter(batch.scored_mask > 0, values)


def head_logps(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return log-softmax(hidden weight^T + bias) at the targets, float32 [M] (float64 for float64 input).

    Works in blocks of rows, so that the logits [M, V] never exist at once. The gradient with respect to `hidden` is
    d log p(t) / dh = W_t - sum_v p_v W_v, which is finished in the forward pass; only a head that is trained itself
    needs the probabilities again, kept while they are small (`KEPT`) and recomputed otherwise.
    """
    with torch.autocast(hidden.device.type, enabled=False):  # the output head stays in float32
        logps: Tensor = _HeadLogps.apply(hidden.to(weight.dtype), weight, bias, targets)  # type: ignore[no-untyped-call]
    return logps


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        trained = wants_weight or wants_bias
        keeps = trained and len(hidden) * len(weight) <= KEPT
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = hidden.new_empty(len(hidden), dtype=exact)
        slope = torch.empty_like(hidden) if wants_hidden else None
        kept: list[Tensor] = []
        for rows in _blocks(len(hidden), len(weight)):
            probabilities, logps[rows] = _softmax(hidden[rows], weight, bias, targets[rows], exact)
            if slope is not None:
                slope[rows] = weight[targets[rows]] - probabilities.to(weight.dtype) @ weight
            if keeps:
                kept.append(probabilities)
        ctx.keeps, ctx.exact, ctx.has_bias = keeps, exact, bias is not None
        saved = [hidden, weight, targets] + ([] if bias is None else [bias])
        ctx.save_for_backward(*saved, *([] if slope is None else [slope]), *kept)
        ctx.counts = (len(saved), 0 if slope is None else 1)
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        saved, slopes = ctx.counts
        hidden, weight, targets = ctx.saved_tensors[:3]
        bias = ctx.saved_tensors[3] if ctx.has_bias else None
        kept = ctx.saved_tensors[saved + slopes :]
        of_hidden = ctx.saved_tensors[saved] * gradient[:, None].to(hidden.dtype) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        if wants_weight or wants_bias:
            for number, rows in enumerate(_blocks(len(hidden), len(weight))):
                if ctx.keeps:
                    probabilities = kept[number]
                else:
                    probabilities, _ = _softmax(hidden[rows], weight, bias, targets[rows], ctx.exact)
                scale = gradient[rows, None]
                if of_weight is not None:
                    of_weight.addmm_(probabilities.T.to(weight.dtype), hidden[rows] * scale.to(weight.dtype), alpha=-1)
                if of_bias is not None:
                    of_bias -= (probabilities * scale).sum(0).to(of_bias.dtype)
            if of_weight is not None:
                of_weight.index_add_(0, targets, hidden * gradient[:, None].to(weight.dtype))
            if of_bias is not None:
                of_bias.index_add_(0, targets, gradient.to(of_bias.dtype))
        return of_hidden, of_weight, of_bias, None


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, BLOCK // vocabulary)
    return [slice(first, first + size) for first in range(0, rows, size)]


def _softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return probabilities [B, V] and the targets' log-probabilities [B] of one block."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(exact)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    top = logits.amax(1, keepdim=True)
    probabilities = logits.sub_(top).exp_()
    total = probabilities.sum(1, keepdim=True)
    return probabilities.div_(total), chosen - top[:, 0] - total[:, 0].log()


def head_entropies(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the entropies [M] of softmax(hidden weight^T + bias), with gradients by recomputation, in blocks."""
    return torch.cat(
        [
            torch.utils.checkpoint.checkpoint(_entropies, hidden[rows], weight, bias, use_reentrant=False)
            for rows in _blocks(len(hidden), len(weight))
        ]
        or [hidden.new_zeros(0)]
    )


def _entropies(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logps = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)
