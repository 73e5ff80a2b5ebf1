r"""PPO with a value head: clipped ratios of tokens and advantages from a learned critic.

Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms" (2017), eqs. 7 and 9; for
language models Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section 2.2 (adaptive KL),
and Stiennon et al., "Learning to Summarize from Human Feedback" (NeurIPS 2020).

Idea: a completion is an episode whose actions are tokens. The reward comes with the last one, the KL to the reference
is paid at each; a critic says at which tokens things went better than expected.

    R_t = r 1(t = last) - \beta KL_t
    A_t = \sum_l (\gamma \lambda)^l [R_{t+l} + \gamma V_{t+l+1} - V_{t+l}]                       (GAE)
    L_policy = - E_t[ min(\rho_t A_t, clip(\rho_t, 1 - \epsilon, 1 + \epsilon_high) A_t) ]
    L_value = 1/2 E_t[ max((V - G_t)^2, (clip(V, V_old - \epsilon_v, V_old + \epsilon_v) - G_t)^2) ],  G = A + V_old

With `target_kl`, \beta is a controller's: after each buffer, e = clip(KL / target_kl - 1, -.2, .2) and
\beta <- \beta (1 + e n / horizon) for n completions.

| symbol | code |
|---|---|
| \rho_t | exp of `log_ratio` [N, T], the policy over the sampler |
| A_t, G_t | `batch.advantages`, `batch.returns` [N, T] |
| V, V_old | `outputs.values`, `batch.values` [N, T], value of the state in which a token is chosen |
| \epsilon, \epsilon_v | `config.epsilon`, `config.value_clip` |
| \gamma, \lambda | `config.discount`, `config.gae_lambda` |
| \beta | `config.beta`, or `memory["kl_weight"]` |

Differences from the papers: advantages are standardised over the buffer (as most implementations do); no entropy bonus.
The switch of the negative gradient reaches the policy loss, not the critic. A completion that was cut off counts as one
that ended. A completion without a reward has advantage 0 and teaches the critic nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.preference.advantages import at_last_token, gae, require_whole
from steelyard.objectives.preference.base import LossParts, Memory, PreferenceNeeds, aggregate
from steelyard.objectives.preference.ratios import (
    KLConfig,
    clipped,
    kl_in_loss,
    kl_in_reward,
    log_ratios_to_sampler,
    policy_metrics,
)

_MOST_CHANGE = 0.2
"""Largest relative error that the KL controller answers to (Ziegler et al.)."""


@dataclass(frozen=True)
class PPOConfig(KLConfig):
    """Settings of PPO."""

    kind: Literal["ppo"] = "ppo"
    """Name of the objective."""
    beta: float = 0.05
    """Weight of the KL to the reference (its first value with target_kl); 0: no reference is needed."""
    target_kl: float | None = None
    """Adapt beta so that completions have this KL to the reference, in nats; None: beta is fixed."""
    kl_horizon: int = 10_000
    """Completions over which the controller of beta acts."""
    epsilon: float = 0.2
    """Clip ratios below 1 - epsilon."""
    epsilon_high: float | None = None
    """Clip ratios above 1 + epsilon_high; None: epsilon."""
    discount: float = 1.0
    """gamma, from token to token."""
    gae_lambda: float = 0.95
    """lambda of the advantages: 1 trusts rewards, 0 the critic."""
    normalise_advantages: bool = True
    """Subtract the mean and divide by the standard deviation of the buffer's advantages."""
    value_weight: float = 0.1
    """Weight of the value loss beside the policy's."""
    value_clip: float | None = 0.2
    """How far values may move from those at sampling time for free; None: no clip."""
    value_learning_rate: float | None = None
    """Adam's step of the value head; None: learning_rate."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        require_positive(self, "target_kl", "kl_horizon", "value_clip", "value_learning_rate")
        require_range(self, 0, 1, "epsilon", "discount", "gae_lambda")
        require_range(self, 0, math.inf, "epsilon_high", "value_weight")
        if self.target_kl is not None and not self.beta:
            raise ConfigError("target_kl adapts beta, which must then begin above 0")
        if self.target_kl is not None and self.kl_place == "loss":
            raise ConfigError("target_kl adapts the KL in the reward: set kl_place to reward")

    @property
    def needs(self) -> PreferenceNeeds:
        """Rewards, the sampler's log-probs, a value head, and the reference for the KL."""
        return PreferenceNeeds(rewards=True, reference=self.beta > 0, sampler=True, values=True, on_policy=True)

    def group_learning_rate(self, group: str) -> float:
        """Return the learning rate of "policy" or "value"."""
        own = self.value_learning_rate if group == "value" else None
        return self.learning_rate if own is None else own


def ppo_complete(batch: ExperienceBatch, config: PPOConfig, memory: Memory) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with advantages and returns, and the memory with the next beta."""
    assert batch.rewards is not None
    assert batch.values is not None
    memory = dict(memory)
    penalty = kl_in_reward(batch, config)
    if config.target_kl is not None:
        require_whole(batch, "the KL that target_kl is compared with")
        weight = memory.get("kl_weight", torch.tensor(config.beta)).to(penalty)
        kl = penalty.sum(1).mean() / config.beta
        penalty = penalty * (weight / config.beta)
        error = (kl / config.target_kl - 1).clamp(-_MOST_CHANGE, _MOST_CHANGE)
        memory["kl_weight"] = weight * (1 + error * len(batch) / config.kl_horizon)
    known = ~batch.rewards.isnan()
    rewards = at_last_token(torch.where(known, batch.rewards, torch.zeros_like(batch.rewards)), batch) - penalty
    advantages, returns = gae(rewards, batch.values, batch, config.discount, config.gae_lambda)
    taught = batch.scored_mask * known[:, None]
    if config.normalise_advantages:
        require_whole(batch, "the standard deviation of advantages")
        count = taught.sum()
        mean = (advantages * taught).sum() / count
        variance = ((advantages - mean).square() * taught).sum() / (count - 1).clamp(min=1)
        advantages = (advantages - mean) * (variance + 1e-8).rsqrt()
    advantages = advantages * taught
    returns = torch.where(known[:, None], returns, torch.full_like(returns, float("nan")))
    return replace(batch, advantages=advantages, returns=returns), memory


def ppo_loss(outputs: Outputs, batch: ExperienceBatch, config: PPOConfig) -> LossParts:
    """Return the clipped policy loss and the clipped value loss, means over tokens."""
    assert outputs.values is not None
    assert batch.values is not None
    assert batch.returns is not None
    log_ratio = log_ratios_to_sampler(outputs, batch, "token")
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    values = clipped(log_ratio, batch, config.epsilon, high) + kl_in_loss(outputs, batch, config, log_ratio)
    policy = aggregate(values, batch, "token_mean")

    known = ~batch.returns.isnan()
    returns = torch.where(known, batch.returns, torch.zeros_like(batch.returns))
    error = (outputs.values - returns).square()
    if config.value_clip is not None:
        near = batch.values + (outputs.values - batch.values).clamp(-config.value_clip, config.value_clip)
        error = torch.max(error, (near - returns).square())
    value_loss = aggregate(error * known, batch, "token_mean") / 2
    metrics = policy_metrics(outputs, batch, (log_ratio, config.epsilon, high)) | {"loss/value": value_loss.detach()}
    return LossParts(policy, config.value_weight * value_loss, metrics)
