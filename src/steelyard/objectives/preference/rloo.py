r"""RLOO: REINFORCE in which the other completions of a prompt are the baseline.

Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs"
(ACL 2024), section 2.3, after Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).

Idea: the mean reward of the other N - 1 completions is an unbiased baseline that needs no critic. A completion is one
action; its importance ratio is clipped as in PPO.

    A_i = R_i - 1/(N-1) \sum_{j \ne i} R_j,   R = r - \beta \sum_t [\log \pi_sampler - \log \pi_ref]
    L = - E[ min(\rho_i A_i, clip(\rho_i, 1 - \epsilon, 1 + \epsilon_high) A_i) ],   \rho = \pi(y) / \pi_sampler(y)

| symbol | code |
|---|---|
| A_i | `advantages` [N, T], the same at each token |
| \rho_i | exp of `log_ratio` [N, 1] |
| \beta, \epsilon | `config.beta`, `config.epsilon` |

Differences from the paper: the clip (as in TRL), with which completions may be used more than once; with fresh ones it
does nothing. `correction="none"` leaves it out and needs no log-probs of the sampler (unless the KL does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from steelyard.config import require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.advantages import SMALLEST_STD, centred, require_whole, spread
from steelyard.objectives.preference.base import LossParts, Memory, PreferenceNeeds, aggregate
from steelyard.objectives.preference.ratios import (
    KLConfig,
    clipped,
    kl_in_loss,
    kl_in_reward,
    log_ratios_to_sampler,
    policy_metrics,
    weighted,
)


@dataclass(frozen=True)
class RLOOConfig(KLConfig):
    """Settings of RLOO."""

    kind: Literal["rloo"] = "rloo"
    """Name of the objective."""
    beta: float = 0.05
    """Weight of the KL to the reference; 0: no reference is needed."""
    correction: Literal["clip", "none"] = "clip"
    """Clip the ratio of the policy to the sampler, or take completions as the policy's own."""
    epsilon: float = 0.2
    """Clip ratios below 1 - epsilon."""
    epsilon_high: float | None = None
    """Clip ratios above 1 + epsilon_high; None: epsilon."""
    normalise_advantages: bool = False
    """Subtract the mean and divide by the standard deviation of the buffer's advantages."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_range(self, 0, 1, "epsilon")
        require_range(self, 0, math.inf, "epsilon_high")

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards of several completions of a prompt, and what ratio and KL read."""
        return PreferenceNeeds(
            rewards=True,
            reference=self.beta > 0,
            sampler=self.correction == "clip" or self.kl_reads_sampler,
            group=2,
        )


def rloo_complete(batch: ExperienceBatch, config: RLOOConfig, memory: Memory) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with leave-one-out advantages."""
    assert batch.rewards is not None
    rewards = batch.rewards - kl_in_reward(batch, config).sum(1)
    advantages, memory = centred(rewards, batch, "leave_one_out", memory)
    if config.normalise_advantages:
        require_whole(batch, "the standard deviation of advantages")
        known = ~rewards.isnan()
        mean, deviation = advantages[known].mean(), advantages[known].std()
        advantages = (advantages - mean) / (deviation + SMALLEST_STD) * known
    return replace(batch, advantages=spread(advantages, batch)), memory


def rloo_loss(outputs: Outputs, batch: ExperienceBatch, config: RLOOConfig) -> LossParts:
    """Return the clipped loss of whole completions."""
    log_ratio = log_ratios_to_sampler(outputs, batch, "sequence") if config.needs.sampler else None
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clip = None
    if log_ratio is not None and config.correction == "clip":
        clip = (log_ratio, config.epsilon, high)
        values = clipped(log_ratio, batch, config.epsilon, high)
    else:
        values = weighted(outputs, batch)
    values = values + kl_in_loss(outputs, batch, config, log_ratio)
    return LossParts(aggregate(values, batch, "sequence_sum"), metrics=policy_metrics(outputs, batch, clip))
