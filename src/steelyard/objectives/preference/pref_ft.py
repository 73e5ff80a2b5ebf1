r"""Preferred fine-tuning: maximum likelihood of the chosen completions of pairs.

Rafailov et al., "Direct Preference Optimization" (NeurIPS 2023), section 6, as a baseline; Pref-FT in Tajwar et al.,
"Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024).

Idea: imitate what was preferred and ignore what was not; no negative gradient.

    L = - E[\log \pi(y_w | x)]

| symbol | code |
|---|---|
| \log \pi(y_w|x) | `chosen` [K] |

Differences from the paper: none at the default; `aggregation` may divide by the completion's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds, sequence_logps
from steelyard.objectives.preference.pairs import of_pairs, pair_metrics


@dataclass(frozen=True)
class PrefFTConfig(PreferenceConfig):
    """Settings of Pref-FT."""

    kind: Literal["pref_ft"] = "pref_ft"
    """Name of the objective."""
    aggregation: Literal["sequence_sum", "sequence_mean"] = "sequence_sum"
    """Sum or mean over the chosen completion's tokens."""

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs."""
        return PreferenceNeeds(pairs=True)


def pref_ft_loss(outputs: Outputs, batch: ExperienceBatch, config: PrefFTConfig) -> LossParts:
    """Return the negative log-likelihood of chosen completions, mean over pairs."""
    logps = sequence_logps(outputs, batch)
    chosen, _ = of_pairs(logps / batch.lengths if config.aggregation == "sequence_mean" else logps, batch)
    return LossParts(-batch.mean_over_pairs(chosen), metrics=pair_metrics(outputs, batch))
