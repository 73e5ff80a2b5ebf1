r"""GRPO and its relatives: advantages from a prompt's own group, clipped ratios, no critic.

Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (2024), eqs. 3 and 4.

Idea: draw G completions of a prompt and let their mean reward be the baseline and their standard deviation the scale:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

What is minimised, with \rho the ratio of the policy to the sampler:

| variant | ratio | loss of a token | divided by | A divided by std |
|---|---|---|---|---|
| grpo | token | - min(\rho A, clip(\rho, 1 - .2, 1 + .2) A) | its completion's tokens, then completions | yes |
| dapo | token | the same with 1 + .28 above ("clip higher") | all tokens | yes |
| dr_grpo | token | as grpo | completions x `max_completion_tokens` | no |
| gspo | geometric mean of a completion's | the same with 1 - 3e-4, 1 + 4e-4 | completions | yes |
| cispo | token | - sg[min(\rho, 5)] A \log \pi | all tokens | yes |

dapo: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (2025), eq. 8. dr_grpo: Liu et al.,
"Understanding R1-Zero-Like Training: A Critical Perspective" (2025). gspo: Zheng et al., "Group Sequence Policy
Optimization" (2025), eqs. 5 and 7. cispo: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning
Attention" (2025), eqs. 4 and 5.

| symbol | code |
|---|---|
| A | `advantages` [N, T], the same at each token |
| \rho | exp of `log_ratio`, [N, T] or [N, 1] |
| clip, std | `config.bounds`, `config.scaled_by` |

Differences from the papers: the KL is off by default and, where it is on, `k3_ratio`, whose gradient is that of the
reverse KL (as in TRL); the papers' is `k3`. DAPO also draws again until no group has equal rewards, and punishes
overlong completions: the first is here an advantage of 0, the second belongs to the reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.preference.advantages import Scale, centred, scaled, spread
from steelyard.objectives.preference.base import Aggregation, LossParts, Memory, PreferenceNeeds, aggregate
from steelyard.objectives.preference.ratios import (
    Estimator,
    KLConfig,
    clipped,
    kl_in_loss,
    kl_in_reward,
    log_ratios_to_sampler,
    policy_metrics,
    weighted,
)

_BOUNDS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (1.0, 5.0)}
_AGGREGATION: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "dapo": "token_mean",
    "dr_grpo": "constant",
    "gspo": "sequence_sum",  # its one number a completion is dealt out to the tokens
    "cispo": "token_mean",
}


@dataclass(frozen=True)
class GRPOConfig(KLConfig):
    """Settings of GRPO, DAPO, Dr. GRPO, GSPO and CISPO."""

    kind: Literal["grpo"] = "grpo"
    """Name of the objective."""
    variant: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """Which ratio, clip, mean and scale."""
    beta: float = 0.0
    """Weight of the KL to the reference; 0: no reference is needed."""
    kl_estimator: Estimator = "k3_ratio"
    """How the KL is estimated from samples: k1, k2, k3 (the paper's), or k3_ratio (k3 times the importance ratio)."""
    kl_place: Literal["reward", "loss"] = "loss"
    """Where it is paid: subtracted from the reward, or added to the loss."""
    epsilon: float | None = None
    """Clip ratios below 1 - epsilon; None: the variant's own. CISPO has none."""
    epsilon_high: float | None = None
    """Clip ratios above 1 + epsilon_high (CISPO: above epsilon_high itself); None: the variant's own."""
    scale_rewards: Scale | None = None
    """Divide advantages by the standard deviation of the rewards of the group or buffer; None: as the variant does."""
    max_completion_tokens: int = 256
    """Dr. GRPO's divisor: the most tokens that the sampler draws."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        require_range(self, 0, 1, "epsilon")
        require_range(self, 0, math.inf, "epsilon_high")
        require_positive(self, "max_completion_tokens")
        if self.variant == "cispo" and self.epsilon is not None:
            raise ConfigError("variant 'cispo' caps ratios from above only: set epsilon_high, not epsilon")
        if self.variant == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise ConfigError(
                f"epsilon_high of variant 'cispo' is the largest ratio, at least 1; found {self.epsilon_high}"
            )

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards of several completions of a prompt, the sampler's log-probs, and the reference for the KL."""
        return PreferenceNeeds(rewards=True, reference=self.beta > 0, sampler=True, group=2)

    @property
    def bounds(self) -> tuple[float, float]:
        """How far ratios go below and above 1 (CISPO: the second is the largest ratio)."""
        low, high = _BOUNDS[self.variant]
        return (
            low if self.epsilon is None else self.epsilon,
            high if self.epsilon_high is None else self.epsilon_high,
        )

    @property
    def scaled_by(self) -> Scale:
        """What advantages are divided by."""
        if self.scale_rewards is not None:
            return self.scale_rewards
        return "none" if self.variant == "dr_grpo" else "group"


def grpo_complete(batch: ExperienceBatch, config: GRPOConfig, memory: Memory) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with group advantages (section 4.1.2)."""
    assert batch.rewards is not None
    rewards = batch.rewards - kl_in_reward(batch, config).sum(1)
    advantages, memory = centred(rewards, batch, "group", memory)
    return replace(batch, advantages=spread(scaled(advantages, rewards, batch, config.scaled_by), batch)), memory


def grpo_loss(outputs: Outputs, batch: ExperienceBatch, config: GRPOConfig) -> LossParts:
    """Return the loss of the variant."""
    low, high = config.bounds
    log_ratio = log_ratios_to_sampler(outputs, batch, "sequence_mean" if config.variant == "gspo" else "token")
    clip = None
    if config.variant == "cispo":
        values = weighted(outputs, batch, log_ratio.exp().clamp(max=high))
    else:
        clip = (log_ratio, low, high)
        values = clipped(log_ratio, batch, low, high)
    kl = kl_in_loss(outputs, batch, config, log_ratio)
    if config.variant == "gspo":
        kl = kl / batch.lengths[:, None]  # a mean over tokens, as the policy's term is
    loss = aggregate(values + kl, batch, _AGGREGATION[config.variant], float(config.max_completion_tokens))
    return LossParts(loss, metrics=policy_metrics(outputs, batch, clip))
