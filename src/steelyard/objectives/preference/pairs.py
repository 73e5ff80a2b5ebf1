"""What pairwise objectives share: log-ratios to the reference, chosen and rejected rows, and their metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.base import Metrics
from steelyard.objectives.preference.base import sequence_logps


def log_ratios(outputs: Outputs, batch: ExperienceBatch) -> Tensor:
    """Return delta = log pi(y|x) - log pi_ref(y|x) [N], summed over scored tokens."""
    assert batch.reference_token_logps is not None
    return ((outputs.token_logps - batch.reference_token_logps) * batch.scored_mask).sum(1)


def of_pairs(values: Tensor, batch: ExperienceBatch) -> tuple[Tensor, Tensor]:
    """Return (chosen [K], rejected [K]) of values per completion [N]."""
    assert batch.pairs is not None
    return values[batch.pairs[:, 0]], values[batch.pairs[:, 1]]


@torch.no_grad()
def pair_metrics(outputs: Outputs, batch: ExperienceBatch, rewards: Tensor | None = None) -> Metrics:
    """Return TRL's familiar names: log-probs and implicit rewards [N] of chosen and rejected completions, each [K].

    Both are logged apart, for a growing margin hides whether the chosen one falls (displacement); the means over
    tokens beside the sums, which grow with length.
    """
    logps = sequence_logps(outputs, batch)
    chosen, rejected = of_pairs(logps, batch)
    metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
    chosen, rejected = of_pairs(logps / batch.lengths, batch)
    metrics |= {"logps/chosen_per_token": chosen, "logps/rejected_per_token": rejected}
    if rewards is not None:
        chosen, rejected = of_pairs(rewards, batch)
        metrics |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        }
    return {name: value.detach() for name, value in metrics.items()}
