r"""Importance ratios of the policy to the sampler, what is done with them, and the KL to the reference.

With \rho = \pi / \pi_sampler of a token, of a completion (the product over its tokens), or of a completion per token
(its geometric mean), an objective minimises one of

    none:  - A \log \pi                                (as if the completions were the policy's own)
    clip:  - min(\rho A, clip(\rho, 1 - \epsilon_low, 1 + \epsilon_high) A)
    tis:   - sg[min(\rho, cap)] A \log \pi             (truncated importance sampling)
    mask:  - sg[\rho 1(low <= \rho <= high)] A \log \pi

KL to the reference, with \delta = \log \pi - \log \pi_ref of a token, by an estimator from the policy's own samples:

| estimator | value | gradient it has as a loss, in expectation over the policy's samples |
|---|---|---|
| k1 | \delta | zero |
| k2 | \delta^2 / 2 | that of the reverse KL(\pi \|\| \pi_ref) |
| k3 | e^{-\delta} - 1 + \delta | that of the *forward* KL(\pi_ref \|\| \pi) |
| k3_ratio | \rho (e^{-\delta} - 1 + \delta) | that of the reverse KL |

Schulman, "Approximating KL divergence" (2020), for the values; the gradients follow by differentiation. For sequences
these hold token by token: as a loss, the effect of a token on the KL of later ones is left out. In the reward the KL is
a number that a baseline and a policy gradient treat like any other, and nothing is left out.

Shapes: N completions, T completion tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steelyard.config import require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.base import Metrics
from steelyard.objectives.preference.base import PreferenceConfig, sequence_logps

Level = Literal["token", "sequence", "sequence_mean"]
Estimator = Literal["k1", "k2", "k3", "k3_ratio"]


@dataclass(frozen=True)
class KLConfig(PreferenceConfig):
    """Base of the configs of objectives with a penalty on the KL to the reference."""

    beta: float = 0.0
    """Weight of the KL to the reference; 0: no reference is needed."""
    kl_estimator: Estimator = "k1"
    """How the KL is estimated from samples: k1, k2, k3, or k3_ratio (k3 times the importance ratio)."""
    kl_place: Literal["reward", "loss"] = "reward"
    """Where it is paid: subtracted from the reward, or added to the loss."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        require_range(self, 0, math.inf, "beta")
        if self.beta and self.kl_place == "loss" and self.kl_estimator == "k1":
            raise ConfigError("kl_estimator k1 has no gradient on average as a loss: use k2, k3 or k3_ratio there")
        if self.beta and self.kl_place == "reward" and self.kl_estimator == "k3_ratio":
            raise ConfigError("kl_estimator k3_ratio differs from k3 by its gradient only: use it with kl_place loss")

    @property
    def kl_reads_sampler(self) -> bool:
        """Whether the KL reads the sampler's log-probs."""
        return self.beta > 0 and (self.kl_place == "reward" or self.kl_estimator == "k3_ratio")


def kl_values(estimator: Estimator, logps: Tensor, reference: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Return an estimate of the KL to the reference at each token (see the module docstring), any one shape."""
    delta = logps - reference
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta.square() / 2
    k3 = (-delta).expm1() + delta
    if estimator == "k3":
        return k3
    assert ratio is not None
    return ratio * k3


def kl_in_reward(batch: ExperienceBatch, config: KLConfig) -> Tensor:
    """Return the penalty [N, T] on the reward of each token: beta times the KL when the completions were drawn."""
    if not config.beta or config.kl_place == "loss":
        return torch.zeros_like(batch.scored_mask)
    assert batch.sampler_token_logps is not None
    assert batch.reference_token_logps is not None
    values = kl_values(config.kl_estimator, batch.sampler_token_logps, batch.reference_token_logps)
    return config.beta * values * batch.scored_mask


def kl_in_loss(outputs: Outputs, batch: ExperienceBatch, config: KLConfig, log_ratio: Tensor | None) -> Tensor:
    """Return beta times the KL [N, T], to be added to the loss of each token."""
    if not config.beta or config.kl_place == "reward":
        return torch.zeros_like(outputs.token_logps)
    assert batch.reference_token_logps is not None
    ratio = None if log_ratio is None else log_ratio.exp()
    values = kl_values(config.kl_estimator, outputs.token_logps, batch.reference_token_logps, ratio)
    return config.beta * values * batch.scored_mask


def log_ratios_to_sampler(outputs: Outputs, batch: ExperienceBatch, level: Level) -> Tensor:
    r"""Return \log \rho, [N, T] for tokens, [N, 1] for completions."""
    assert batch.sampler_token_logps is not None
    differences = (outputs.token_logps - batch.sampler_token_logps) * batch.scored_mask
    if level == "token":
        return differences
    total = differences.sum(1, keepdim=True)
    return total if level == "sequence" else total / batch.lengths[:, None]


def clipped(log_ratio: Tensor, batch: ExperienceBatch, low: float, high: float) -> Tensor:
    r"""Return - min(\rho A, clip(\rho, 1 - low, 1 + high) A) at each token [N, T].

    Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms" (2017), eq. 7. A completion's
    ratio gives one number a completion: it is dealt out evenly to the tokens, so that their sum is that number.
    """
    assert batch.advantages is not None
    ratio = log_ratio.exp()
    if ratio.shape[1] == 1 and batch.scored_mask.shape[1] > 1:
        advantages = _of_completions(batch)
        values = torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        return -(values / batch.lengths[:, None]) * batch.scored_mask
    return -torch.min(ratio * batch.advantages, ratio.clamp(1 - low, 1 + high) * batch.advantages)


def weighted(outputs: Outputs, batch: ExperienceBatch, weights: Tensor | float = 1.0) -> Tensor:
    r"""Return - sg[w] A \log \pi at each token [N, T], of weights [N, T] or [N, 1]."""
    assert batch.advantages is not None
    weights = weights.detach() if isinstance(weights, Tensor) else weights
    return -weights * batch.advantages * outputs.token_logps


def _of_completions(batch: ExperienceBatch) -> Tensor:
    """Return the advantage of each completion [N, 1], the mean of its tokens'."""
    assert batch.advantages is not None
    return (batch.advantages * batch.scored_mask).sum(1, keepdim=True) / batch.lengths[:, None]


@torch.no_grad()
def policy_metrics(
    outputs: Outputs, batch: ExperienceBatch, clip: tuple[Tensor, float, float] | None = None
) -> Metrics:
    r"""Return what a policy gradient's user watches, as far as the batch shows it.

    Args:
        outputs: of the policy.
        batch: completed.
        clip: (log-ratio [N, T] or [N, 1], low, high) of a clipped ratio.
    """
    metrics: Metrics = {}
    if batch.rewards is not None:
        metrics["rewards/mean"] = batch.rewards.nanmean()
    if batch.advantages is not None:
        metrics["advantages/zero"] = (batch.advantages == 0).all(1).float()
    if batch.reference_token_logps is not None:
        reference = (batch.reference_token_logps * batch.scored_mask).sum(1)
        metrics["kl/reference"] = sequence_logps(outputs, batch) - reference  # k1 on completions, as old as they are
    if clip is not None:
        log_ratio, low, high = clip
        ratio, advantages = log_ratio.exp(), batch.advantages
        assert advantages is not None
        scored = batch.scored_mask.sum()
        below = (ratio < 1 - low) & (advantages < 0)
        above = (ratio > 1 + high) & (advantages > 0)
        metrics["clip_ratio/low_mean"] = (below * batch.scored_mask).sum() / scored
        metrics["clip_ratio/high_mean"] = (above * batch.scored_mask).sum() / scored
    return metrics
