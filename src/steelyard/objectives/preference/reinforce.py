r"""REINFORCE: log-probs multiplied with the reward above a baseline.

Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning" (1992), eq. 4.

Idea: raise the log-prob of completions in proportion to their reward. Subtracting a baseline leaves the expected
gradient as it is and gives worse than usual completions a negative weight: the negative gradient of RL.

    L = - E[ sg[A] \log \pi(y | x) ],   A = (r - \beta KL) - b

| baseline | b |
|---|---|
| none | 0 |
| batch | mean reward of the buffer |
| group | mean reward of the prompt's completions |
| ema | moving average of the buffers' means |
| leave_one_out | mean reward of the prompt's *other* completions (RLOO) |

| symbol | code |
|---|---|
| A | `advantages` [N, T], the same at each token of a completion |
| \beta | `config.beta` |

Where completions are used more than once or drawn by an older policy, `correction` says what is done about it (see
`ratios.py`): nothing, PPO's clip, truncated importance sampling, or leaving out what has drifted.

Differences from the paper: corrections, KL penalties, and advantages divided by a standard deviation are options of
later work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.preference.advantages import Baseline, Scale, centred, scaled, spread
from steelyard.objectives.preference.base import (
    LossParts,
    Memory,
    PreferenceNeeds,
    aggregate,
)
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
class REINFORCEConfig(KLConfig):
    """Settings of REINFORCE."""

    kind: Literal["reinforce"] = "reinforce"
    """Name of the objective."""
    baseline: Baseline = "group"
    """What is subtracted from the reward: nothing, the mean of the buffer or of the group, a moving average over
    buffers, or the mean of the prompt's other completions."""
    baseline_decay: float = 0.9
    """Decay of the moving average."""
    scale: Scale = "none"
    """Divide advantages by the standard deviation of the rewards of the group or of the buffer."""
    reward_clip: float | None = None
    """Clip rewards to [-reward_clip, reward_clip] first; None: as they are."""
    correction: Literal["none", "clip", "tis", "mask"] = "none"
    """What is done about completions of an older policy: nothing, PPO's clip, truncated importance sampling, or leaving
    out ratios outside of a range."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token or of the whole completion."""
    epsilon: float = 0.2
    """Clip: ratios below 1 - epsilon."""
    epsilon_high: float | None = None
    """Clip: ratios above 1 + epsilon_high; None: epsilon."""
    ratio_cap: float = 2.0
    """Truncated importance sampling: the largest ratio."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """Mask: the ratios that are kept."""
    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean"] = "sequence_sum"
    """Sum or mean over a completion's tokens and the mean over completions, or the mean over all tokens."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        require_positive(self, "reward_clip", "ratio_cap")
        require_range(self, 0, 1, "baseline_decay", "epsilon")
        require_range(self, 0, math.inf, "epsilon_high", "ratio_range")
        low, high = self.ratio_range
        if not low <= 1 <= high:
            raise ConfigError(f"ratio_range must hold 1, the ratio of fresh completions; found {self.ratio_range}")

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards, and what baseline, correction and KL read."""
        compares = self.baseline in ("group", "leave_one_out") or self.scale == "group"
        return PreferenceNeeds(
            rewards=True,
            reference=self.beta > 0,
            sampler=self.correction != "none" or self.kl_reads_sampler,
            group=2 if compares else 1,
        )


def reinforce_complete(
    batch: ExperienceBatch, config: REINFORCEConfig, memory: Memory
) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with advantages, and the memory with the moving average."""
    assert batch.rewards is not None
    rewards = batch.rewards
    if config.reward_clip is not None:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    rewards = rewards - kl_in_reward(batch, config).sum(1)
    advantages, memory = centred(rewards, batch, config.baseline, memory, config.baseline_decay)
    advantages = scaled(advantages, rewards, batch, config.scale)
    return replace(batch, advantages=spread(advantages, batch)), memory


def reinforce_loss(outputs: Outputs, batch: ExperienceBatch, config: REINFORCEConfig) -> LossParts:
    """Return the policy gradient's loss with the correction for older completions."""
    log_ratio = log_ratios_to_sampler(outputs, batch, config.ratio) if config.needs.sampler else None
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    values = _corrected(outputs, batch, config, log_ratio, high)
    values = values + kl_in_loss(outputs, batch, config, log_ratio)
    clip = (log_ratio, config.epsilon, high) if log_ratio is not None and config.correction == "clip" else None
    return LossParts(aggregate(values, batch, config.aggregation), metrics=policy_metrics(outputs, batch, clip))


def _corrected(
    outputs: Outputs, batch: ExperienceBatch, config: REINFORCEConfig, log_ratio: Tensor | None, high: float
) -> Tensor:
    """Return the loss of each token [N, T]."""
    if log_ratio is None or config.correction == "none":
        return weighted(outputs, batch)
    if config.correction == "clip":
        return clipped(log_ratio, batch, config.epsilon, high)
    ratio = log_ratio.exp()
    if config.correction == "tis":
        return weighted(outputs, batch, ratio.clamp(max=config.ratio_cap))
    low, upper = config.ratio_range
    return weighted(outputs, batch, ratio * ((ratio >= low) & (ratio <= upper)))
