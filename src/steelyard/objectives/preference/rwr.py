r"""Reward-weighted regression: maximum likelihood with exponential weights.

Peters, Schaal, "Reinforcement Learning by Reward-Weighted Regression for Operational Space Control" (ICML 2007); as
used for language models in Tajwar et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data"
(ICML 2024).

Idea: the best policy near the one that drew the completions is proportional to it times e^{r / \tau}; fit that by
weighted likelihood. AWAC is the same with a learned advantage.

    L = - E[ min(e^{r / \tau}, w_max) \log \pi(y | x) ]

| symbol | code |
|---|---|
| min(e^{r / \tau}, w_max) | `rwr_complete`: `advantages` [N, T] |
| \tau | `config.tau` |
| w_max | `config.max_weight` |

Differences from the paper: rewards may be standardised in their group or in the buffer first; weights are clipped to
[0, 20] as in the released code of Tajwar et al. Completions without a reward have weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from steelyard.config import require_positive
from steelyard.data.experience import ExperienceBatch
from steelyard.objectives.preference.advantages import Scale, centred, scaled, spread
from steelyard.objectives.preference.base import Memory, PreferenceNeeds
from steelyard.objectives.preference.weighted import WeightedConfig


@dataclass(frozen=True)
class RWRConfig(WeightedConfig):
    """Settings of reward-weighted regression."""

    kind: Literal["rwr"] = "rwr"
    """Name of the objective."""
    tau: float = 1.0
    """Temperature of the weights, in rewards (in standard deviations where rewards are standardised)."""
    max_weight: float = 20.0
    """Largest weight."""
    standardise: Scale = "none"
    """Subtract the mean and divide by the standard deviation of the rewards of the group or the buffer first."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "tau", "max_weight")

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards, of several completions of a prompt where they are compared."""
        return PreferenceNeeds(rewards=True, group=2 if self.standardise == "group" else 1)


def rwr_complete(batch: ExperienceBatch, config: RWRConfig, memory: Memory) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with the weight of each completion."""
    assert batch.rewards is not None
    rewards = batch.rewards
    if config.standardise != "none":
        differences, _ = centred(rewards, batch, config.standardise, {})
        rewards = torch.where(rewards.isnan(), rewards, scaled(differences, rewards, batch, config.standardise))
    weights = (rewards / config.tau).exp().clamp(max=config.max_weight)
    weights = torch.where(weights.isnan(), torch.zeros_like(weights), weights)
    return replace(batch, advantages=spread(weights, batch)), dict(memory)
