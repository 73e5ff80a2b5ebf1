r"""ORPO: supervised fine-tuning with an odds-ratio penalty, without a reference.

Hong, Lee, Thorne, "ORPO: Monolithic Preference Optimization without Reference Model" (EMNLP 2024), eqs. 4, 6 and 7.

Idea: fit the chosen completion and, gently, make its odds exceed those of the rejected one:

    L = NLL(y_w) + \lambda [- \log \sigma(o_w - o_l)],   o = \log(p / (1 - p)),   \log p = \log \pi(y|x) / |y|

| symbol | code |
|---|---|
| \log p | `mean_logps` [N] |
| o | `log_odds(mean_logps)` |
| \lambda | `config.odds_weight` |

Differences from the paper: \log p is kept below -1e-6, for certainty has infinite odds. NLL(y_w) is the mean over the
chosen completion's tokens; TRL's trainer takes it over the prompt's tokens too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from steelyard.config import require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds, sequence_logps
from steelyard.objectives.preference.pairs import of_pairs, pair_metrics


@dataclass(frozen=True)
class ORPOConfig(PreferenceConfig):
    """Settings of ORPO."""

    kind: Literal["orpo"] = "orpo"
    """Name of the objective."""
    odds_weight: float = 0.1
    """lambda: weight of the odds ratio beside the likelihood (beta in TRL)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_range(self, 0, math.inf, "odds_weight")

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs."""
        return PreferenceNeeds(pairs=True)


def log_odds(mean_logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p (eq. 4)."""
    mean_logps = mean_logps.clamp(max=-1e-6)
    return mean_logps - (-mean_logps.expm1()).log()


def orpo_loss(outputs: Outputs, batch: ExperienceBatch, config: ORPOConfig) -> LossParts:
    """Return the ORPO loss, mean over pairs."""
    mean_logps = sequence_logps(outputs, batch) / batch.lengths
    chosen, _ = of_pairs(mean_logps, batch)
    chosen_odds, rejected_odds = of_pairs(log_odds(mean_logps), batch)
    penalty = -logsigmoid(chosen_odds - rejected_odds)  # eq. 7
    loss = batch.mean_over_pairs(config.odds_weight * penalty - chosen)  # eq. 6
    return LossParts(loss, metrics=pair_metrics(outputs, batch, config.odds_weight * mean_logps))
