r"""Supervised fine-tuning on completions: all of them, good or bad.

Ouyang et al., "Training language models to follow instructions with human feedback" (NeurIPS 2022), section 3.5.

Idea: make every completion more likely given its prompt; the start of every other method, and its control.

    L = - \sum_{n,t} m_{n,t} \log \pi(y_{n,t} | x_n, y_{n,<t}) / \sum_{n,t} m_{n,t}

| symbol | code |
|---|---|
| m_{n,t} | `batch.scored_mask` [N, T] |
| \log \pi | `outputs.token_logps` [N, T] |

Differences from the paper: the mean over tokens (`aggregation` has the other means), no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, aggregate, sequence_logps


@dataclass(frozen=True)
class CompletionSFTConfig(PreferenceConfig):
    """Settings of supervised fine-tuning on completions."""

    kind: Literal["sft"] = "sft"
    """Name of the objective."""
    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean"] = "token_mean"
    """Mean over all tokens, or sum or mean over a completion's tokens and the mean over completions."""


def completion_sft_loss(outputs: Outputs, batch: ExperienceBatch, config: CompletionSFTConfig) -> LossParts:
    """Return the mean negative log-likelihood."""
    loss = aggregate(-outputs.token_logps, batch, config.aggregation)
    return LossParts(loss, metrics={"logps/completions": sequence_logps(outputs, batch).detach()})
