"""From rewards to the signed numbers that multiply log-probabilities: baselines, scales, KL in the reward, GAE.

All of it is computed once, over a whole buffer, when completions are drawn. A completion whose reward is NaN
(unscorable) gets the advantage 0 and is left out of every mean.

Shapes: P prompts, N completions, G completions of the largest group, T completion tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError
from steelyard.objectives.preference.base import Memory

Baseline = Literal["none", "batch", "group", "ema", "leave_one_out"]
Scale = Literal["none", "group", "batch"]

SMALLEST_STD = 1e-4
"""Added to a standard deviation before dividing by it."""


def grouped(values: Tensor, batch: ExperienceBatch) -> tuple[Tensor, Tensor]:
    """Return values [N] by prompt, [P, G] padded with NaN, and each completion's column there, int64 [N]."""
    order = torch.argsort(batch.prompt_of, stable=True)
    sizes = torch.bincount(batch.prompt_of, minlength=len(batch.prompts))
    first = sizes.cumsum(0) - sizes
    column = torch.empty_like(order)
    column[order] = torch.arange(len(order), device=order.device) - first[batch.prompt_of[order]]
    table = values.new_full((len(sizes), int(sizes.max())), float("nan"))
    table[batch.prompt_of, column] = values
    return table, column


def require_whole(batch: ExperienceBatch, what: str) -> None:
    """Check that this is a whole batch.

    Raises:
        ConfigError: it carries the counts of a larger one; its own mean would be another.
    """
    if batch.counts is not None:
        raise ConfigError(f"{what} is taken over a whole batch: call complete() before the batch is cut into parts")


def spread(values: Tensor, batch: ExperienceBatch) -> Tensor:
    """Return values [N] of completions at each of their tokens, [N, T]."""
    return values[:, None] * batch.scored_mask


def centred(
    rewards: Tensor, batch: ExperienceBatch, baseline: Baseline, memory: Memory, decay: float = 0.9
) -> tuple[Tensor, Memory]:
    r"""Return rewards [N] minus a baseline, 0 where the reward is NaN, and the memory for the next buffer.

    - none: b = 0;
    - batch: the mean of the buffer; group: the mean of the completions of the same prompt;
    - leave_one_out: the mean of the *other* completions of the prompt, b_i = \sum_{j \ne i} r_j / (N - 1); a
      completion without others has advantage 0;
    - ema: moving average over buffers, b <- decay b + (1 - decay) mean, begun at the first buffer's mean.
    """
    memory = dict(memory)
    if baseline == "none":
        advantages = rewards
    elif baseline in ("batch", "ema"):
        require_whole(batch, f"the {baseline} baseline")
        mean = rewards.nanmean()
        if baseline == "ema":
            old = memory.get("baseline", mean).to(mean)
            if not bool(mean.isnan()):  # a buffer without any reward says nothing
                memory["baseline"] = decay * old + (1 - decay) * mean
                mean = memory["baseline"]
        advantages = rewards - mean
    else:
        table, column = grouped(rewards, batch)
        if baseline == "group":
            means = table.nanmean(1, keepdim=True)
        else:
            others = (~table.isnan()).sum(1, keepdim=True) - 1
            means = (table.nansum(1, keepdim=True) - table) / others
            means = torch.where(others > 0, means, torch.full_like(means, float("nan")))
        advantages = (table - means)[batch.prompt_of, column]
    return torch.where(advantages.isnan(), torch.zeros_like(advantages), advantages), memory


def scaled(advantages: Tensor, rewards: Tensor, batch: ExperienceBatch, scale: Scale) -> Tensor:
    """Return advantages [N] divided by the standard deviation (with N - 1) of the group's or the batch's rewards."""
    if scale == "none":
        return advantages
    if scale == "batch":
        require_whole(batch, "the standard deviation of the batch")
        return advantages / (_std(rewards[None])[0] + SMALLEST_STD)
    table, _ = grouped(rewards, batch)
    deviations = _std(table)[batch.prompt_of]
    several = (~table.isnan()).sum(1)[batch.prompt_of] > 1  # one reward has no spread to be measured by
    return torch.where(several, advantages / (deviations + SMALLEST_STD), torch.zeros_like(advantages))


def _std(table: Tensor) -> Tensor:
    """Return the standard deviation of each row [P, G] without its NaNs, 0 where there are fewer than two numbers."""
    known = (~table.isnan()).sum(1)
    squares = (table - table.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (known - 1).clamp(min=1)).sqrt()


def gae(
    rewards: Tensor, values: Tensor, batch: ExperienceBatch, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    r"""Return generalised advantages and returns, each [N, T], from rewards and values [N, T] of tokens.

    Schulman, Moritz, Levine, Jordan, Abbeel, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (ICLR 2016), eqs. 11 and 16: A_t = \delta_t + \gamma \lambda A_{t+1} with
    \delta_t = r_t + \gamma V_{t+1} - V_t, where beyond the last token both are 0. Positions that are not scored are
    passed over.
    """
    scored = batch.scored_mask > 0
    advantages = torch.zeros_like(values)
    later, later_value = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        now = scored[:, t]
        change = rewards[:, t] + discount * later_value - values[:, t]
        later = torch.where(now, change + discount * gae_lambda * later, later)
        later_value = torch.where(now, values[:, t], later_value)
        advantages[:, t] = torch.where(now, later, advantages[:, t])
    return advantages, (advantages + values) * batch.scored_mask


def at_last_token(values: Tensor, batch: ExperienceBatch) -> Tensor:
    """Return [N, T] with values [N] at the last scored token of each completion and 0 elsewhere."""
    positions = torch.arange(1, batch.scored_mask.shape[1] + 1, device=values.device)
    last = (batch.scored_mask * positions).argmax(1)
    return torch.zeros_like(batch.scored_mask, dtype=values.dtype).scatter(1, last[:, None], values[:, None])
