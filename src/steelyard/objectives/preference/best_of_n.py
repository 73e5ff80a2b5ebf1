r"""Best of N: maximum likelihood of the completions with the highest rewards of each prompt.

Tajwar et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024), section 3;
on-policy also known as RAFT (Dong et al., "RAFT: Reward rAnked FineTuning", TMLR 2023) and expert iteration.

Idea: draw N completions of a prompt, keep the best k, imitate them; no negative gradient.

    L = - E_x[ 1/k \sum_{i in top k} \log \pi(y_i | x) ]

| symbol | code |
|---|---|
| 1(i in top k) / k | `best_of_n_complete`: `advantages` [N, T] is this times the size of the group |
| \log \pi | `outputs.token_logps` [N, T] |

Differences from the paper: completions that tie for a place share it. Groups of unequal sizes weigh by their size.
Completions without a reward are never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from steelyard.config import require_positive
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

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "keep")

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
    weights = (share * size / size.clamp(min=1, max=config.keep)).to(batch.rewards)
    return replace(batch, advantages=spread(weights[batch.prompt_of, column], batch)), dict(memory)
