r"""Best of N: maximum likelihood of the completions with the highest rewards of each prompt.

Tajwar et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024), section 3;
on-policy also known as RAFT (Dong et al., "RAFT: Reward rAnked FineTuning", TMLR 2023) and expert iteration.

Idea: draw N completions of a prompt, keep the best k, imitate them; no negative gradient unless w > 0.

    L = - E_x[ 1/k \sum_{i in top k} \log \pi(y_i | x)  -  w / (N - k) \sum_{the rest} \log \pi(y_i | x) ]

The second sum is an ablation of the released code of Tajwar et al.: it has no lower bound, so keep w and the number of
steps small.

| symbol | code |
|---|---|
| 1(i in top k) / k - w 1(i in the rest) / (N - k) | `best_of_n_complete`: `advantages` [N, T], times the group's size |
| w | `config.rest_weight` |
| \log \pi | `outputs.token_logps` [N, T] |

Differences from the paper: completions that tie for a place share it. Groups of unequal sizes weigh by their size.
Completions without a reward are never chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.objectives.preference.advantages import grouped, spread
from steelyard.objectives.preference.base import Memory, PreferenceNeeds
from steelyard.objectives.preference.weighted import WeightedConfig


@dataclass(frozen=True)
class BestOfNConfig(WeightedConfig):
    """Settings of best-of-N fine-tuning."""

    kind: Literal["best_of_n"] = "best_of_n"
    """Name of the objective."""
    keep: int = 1
    """k: completions of a prompt to imitate."""
    rest_weight: float = 0.0
    """w: weight of pushing down the others, on average as much as the best are lifted at 1; 0: they are left alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "keep")
        require_range(self, 0, math.inf, "rest_weight")

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards of more completions than are kept."""
        return PreferenceNeeds(rewards=True, group=self.keep + 1)


def best_of_n_complete(batch: ExperienceBatch, config: BestOfNConfig, memory: Memory) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with the weight of each completion."""
    assert batch.rewards is not None
    table, column = grouped(batch.rewards, batch)  # [P, G], NaN where there is none
    known = ~table.isnan()
    better = (table[:, None, :] > table[:, :, None]).sum(2)
    tied = (table[:, None, :] == table[:, :, None]).sum(2)
    share = ((config.keep - better) / tied.clamp(min=1)).clamp(0, 1) * known
    size = known.sum(1, keepdim=True)
    best = share / size.clamp(min=1, max=config.keep)
    rest = (1 - share) * known / (size - config.keep).clamp(min=1)
    weights = (size * (best - config.rest_weight * rest)).to(batch.rewards)
    return replace(batch, advantages=spread(weights[batch.prompt_of, column], batch)), dict(memory)
