"""What objectives share that imitate completions with weights of at least 0 (best of N may subtract the rest).

The weights are the batch's `advantages`, computed once over a whole buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds, aggregate
from steelyard.objectives.preference.ratios import policy_metrics, weighted


@dataclass(frozen=True)
class WeightedConfig(PreferenceConfig):
    """Base of the configs of weighted maximum likelihood."""

    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean"] = "sequence_sum"
    """Sum or mean over a completion's tokens and the mean over completions, or the mean over all tokens."""

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards."""
        return PreferenceNeeds(rewards=True)


def weighted_likelihood_loss(outputs: Outputs, batch: ExperienceBatch, config: WeightedConfig) -> LossParts:
    """Return the weighted negative log-likelihood, over all completions, those of weight 0 included."""
    loss = aggregate(weighted(outputs, batch), batch, config.aggregation)
    return LossParts(loss, metrics=policy_metrics(outputs, batch))
