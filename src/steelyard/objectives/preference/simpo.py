r"""SimPO: preferences fitted by mean log-probs, without a reference.

Meng, Xia, Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (NeurIPS 2024), eq. 6.

Idea: rank completions by what generation maximises, the mean log-prob of their tokens, and ask for a margin:

    L = - \log \sigma(\beta [\log \pi(y_w|x) / |y_w| - \log \pi(y_l|x) / |y_l|] - \gamma)

| symbol | code |
|---|---|
| \log \pi(y|x) / |y| | `mean_logps` [N] |
| \beta, \gamma | `config.beta`, `config.gamma` |

Differences from the paper: none. Nothing holds the policy near where it began but the step size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import logsigmoid

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds, sequence_logps
from steelyard.objectives.preference.pairs import of_pairs, pair_metrics


@dataclass(frozen=True)
class SimPOConfig(PreferenceConfig):
    """Settings of SimPO."""

    kind: Literal["simpo"] = "simpo"
    """Name of the objective."""
    beta: float = 2.0
    """Scale of the reward beta * mean log-prob; 2 to 10 are usual."""
    gamma: float = 1.0
    """Margin by which the chosen reward should exceed the rejected one; 0.1 to 0.8 times beta are usual."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "beta")
        require_range(self, 0, math.inf, "gamma")

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs."""
        return PreferenceNeeds(pairs=True)


def simpo_loss(outputs: Outputs, batch: ExperienceBatch, config: SimPOConfig) -> LossParts:
    """Return the SimPO loss, mean over pairs."""
    mean_logps = sequence_logps(outputs, batch) / batch.lengths
    chosen, rejected = of_pairs(mean_logps, batch)
    loss = batch.mean_over_pairs(-logsigmoid(config.beta * (chosen - rejected) - config.gamma))  # eq. 6
    return LossParts(loss, metrics=pair_metrics(outputs, batch, config.beta * mean_logps))
