r"""Anchored preference optimisation: says of each completion whether it should become more or less likely.

D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
Alignment" (TACL 2025), eqs. 7 and 8.

Idea: a pairwise loss fixes the difference of two log-ratios and leaves their level free. An anchor fixes it:

    zero: L = 1 - \sigma(\beta \delta_w) + \sigma(\beta \delta_l)                (chosen up, rejected down)
    down: L = \sigma(\beta \delta_w) + 1 - \sigma(\beta (\delta_w - \delta_l))    (both down, the rejected one more)

`zero` is for chosen completions better than what the model writes, `down` for worse ones.

| symbol | code |
|---|---|
| \delta_w, \delta_l | `chosen`, `rejected` [K] |
| \beta | `config.beta` |

Differences from the paper: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.config import require_positive
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds
from steelyard.objectives.preference.pairs import log_ratios, of_pairs, pair_metrics


@dataclass(frozen=True)
class APOConfig(PreferenceConfig):
    """Settings of APO."""

    kind: Literal["apo"] = "apo"
    """Name of the objective."""
    variant: Literal["zero", "down"] = "zero"
    """Anchor: `zero` lifts chosen completions, `down` lowers them, less than rejected ones."""
    beta: float = 0.1
    """Strength of the pull to the reference."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "beta")

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs and the reference."""
        return PreferenceNeeds(pairs=True, reference=True)


def apo_loss(outputs: Outputs, batch: ExperienceBatch, config: APOConfig) -> LossParts:
    """Return the APO loss, mean over pairs."""
    rewards = config.beta * log_ratios(outputs, batch)
    chosen, rejected = of_pairs(rewards, batch)
    if config.variant == "zero":
        losses = 1 - chosen.sigmoid() + rejected.sigmoid()  # eq. 7
    else:
        losses = chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()  # eq. 8
    return LossParts(batch.mean_over_pairs(losses), metrics=pair_metrics(outputs, batch, rewards))
