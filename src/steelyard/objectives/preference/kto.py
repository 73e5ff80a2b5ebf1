r"""KTO: completions judged one by one, with losses that weigh more than gains.

Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, "KTO: Model Alignment as Prospect Theoretic Optimization" (ICML 2024),
eq. 7.

Idea: the value of an outcome is judged against a reference point \kappa, what the policy gains on average:

    L = \lambda_D (1 - \sigma(\beta (\delta - \kappa)))   of a desirable completion
    L = \lambda_U (1 - \sigma(\beta (\kappa - \delta)))   of an undesirable one
    \kappa = max(0, mean of \delta over mismatched prompts and completions), without gradient

with \delta = \log \pi(y|x) - \log \pi_ref(y|x). Needs no pairs, only labels.

| symbol | code |
|---|---|
| \delta | `ratios` [N] |
| \kappa | `kappa` |
| \lambda_D, \lambda_U | `config.desirable_weight`, `config.undesirable_weight` |

Differences from the paper: none at the default. `reference_point="zero"` fixes \kappa = 0, which needs no mismatched
completions and is the unpaired form of APO-zero. \kappa is a mean inside a nonlinear function: where an update works
its batch in parts, each part estimates \kappa from its own mismatched completions, so this is the one objective whose
parts do not average exactly to the whole (with \kappa = 0 they do). Completions without a label add nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds
from steelyard.objectives.preference.pairs import log_ratios


@dataclass(frozen=True)
class KTOConfig(PreferenceConfig):
    """Settings of KTO."""

    kind: Literal["kto"] = "kto"
    """Name of the objective."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """lambda_D; times the number of desirable completions it should be 1 to 4/3 times the other product."""
    undesirable_weight: float = 1.0
    """lambda_U."""
    reference_point: Literal["kl", "zero"] = "kl"
    """kappa: estimated from mismatched completions, or 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "beta")
        require_range(self, 0, math.inf, "desirable_weight", "undesirable_weight")

    @property
    def needs(self) -> PreferenceNeeds:
        """Labels, the reference and, for kappa, mismatched completions."""
        return PreferenceNeeds(labels=True, reference=True, mismatched=self.reference_point == "kl")


def kto_loss(outputs: Outputs, batch: ExperienceBatch, config: KTOConfig) -> LossParts:
    """Return the KTO loss, mean over completions that are not mismatched."""
    assert batch.labels is not None
    ratios = log_ratios(outputs, batch)
    mismatched = torch.zeros_like(ratios) if batch.mismatched is None else batch.mismatched
    kappa = ratios.new_zeros(())
    if config.reference_point == "kl":
        kappa = ((ratios.detach() * mismatched).sum() / mismatched.sum().clamp(min=1)).clamp(min=0)
    desirable = (batch.labels == 1) * (1 - mismatched)
    undesirable = (batch.labels == 0) * (1 - mismatched)
    gains = 1 - (config.beta * (ratios - kappa)).sigmoid()
    losses = 1 - (config.beta * (kappa - ratios)).sigmoid()
    value = config.desirable_weight * desirable * gains + config.undesirable_weight * undesirable * losses  # eq. 7
    rewards = (config.beta * ratios).detach()
    metrics = {
        "kto/kappa": kappa,
        "rewards/desirable": (rewards * desirable).sum() / desirable.sum().clamp(min=1),
        "rewards/undesirable": (rewards * undesirable).sum() / undesirable.sum().clamp(min=1),
    }
    return LossParts(batch.mean_over_rows(value), metrics=metrics)
