"""Preference fine-tuning: one file per objective, and the explicit table of them."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from steelyard.errors import ConfigError
from steelyard.objectives.preference.apo import APOConfig, apo_loss
from steelyard.objectives.preference.base import (
    Completion,
    Memory,
    PreferenceConfig,
    PreferenceLearner,
    PreferenceLoss,
    PreferenceNeeds,
)
from steelyard.objectives.preference.best_of_n import BestOfNConfig, best_of_n_complete
from steelyard.objectives.preference.dpo import DPOConfig, dpo_loss
from steelyard.objectives.preference.filtered_sft import FilteredSFTConfig, filtered_sft_complete
from steelyard.objectives.preference.grpo import GRPOConfig, grpo_complete, grpo_loss
from steelyard.objectives.preference.ipo import IPOConfig, ipo_loss
from steelyard.objectives.preference.kto import KTOConfig, kto_loss
from steelyard.objectives.preference.orpo import ORPOConfig, orpo_loss
from steelyard.objectives.preference.ppo import PPOConfig, ppo_complete, ppo_loss
from steelyard.objectives.preference.pref_ft import PrefFTConfig, pref_ft_loss
from steelyard.objectives.preference.reinforce import REINFORCEConfig, reinforce_complete, reinforce_loss
from steelyard.objectives.preference.rloo import RLOOConfig, rloo_complete, rloo_loss
from steelyard.objectives.preference.rwr import RWRConfig, rwr_complete
from steelyard.objectives.preference.sft import CompletionSFTConfig, completion_sft_loss
from steelyard.objectives.preference.simpo import SimPOConfig, simpo_loss
from steelyard.objectives.preference.weighted import weighted_likelihood_loss

AnyPreferenceConfig = Annotated[
    CompletionSFTConfig
    | PrefFTConfig
    | BestOfNConfig
    | FilteredSFTConfig
    | RWRConfig
    | DPOConfig
    | IPOConfig
    | SimPOConfig
    | ORPOConfig
    | KTOConfig
    | APOConfig
    | REINFORCEConfig
    | RLOOConfig
    | GRPOConfig
    | PPOConfig,
    pydantic.Field(discriminator="kind"),
]

# the loss, and what is computed once over a whole buffer for it
_OBJECTIVES: dict[type[Any], tuple[PreferenceLoss, Completion | None]] = {
    CompletionSFTConfig: (completion_sft_loss, None),
    PrefFTConfig: (pref_ft_loss, None),
    BestOfNConfig: (weighted_likelihood_loss, best_of_n_complete),
    FilteredSFTConfig: (weighted_likelihood_loss, filtered_sft_complete),
    RWRConfig: (weighted_likelihood_loss, rwr_complete),
    DPOConfig: (dpo_loss, None),
    IPOConfig: (ipo_loss, None),
    SimPOConfig: (simpo_loss, None),
    ORPOConfig: (orpo_loss, None),
    KTOConfig: (kto_loss, None),
    APOConfig: (apo_loss, None),
    REINFORCEConfig: (reinforce_loss, reinforce_complete),
    RLOOConfig: (rloo_loss, rloo_complete),
    GRPOConfig: (grpo_loss, grpo_complete),
    PPOConfig: (ppo_loss, ppo_complete),
}

PREFERENCE_OBJECTIVES: dict[str, type[Any]] = {config.kind: config for config in _OBJECTIVES}
"""Config classes of the preference objectives, by name."""


def build_preference_learner(
    model: Any, config: AnyPreferenceConfig, negative: float = 1.0, temperature: float = 1.0
) -> PreferenceLearner:
    """Build the learner that trains `model` as `config` says.

    Args:
        model: an `nn.Module` with the methods of `base.PolicyModel`.
        config: of the objective.
        negative: lambda, scale of the negative gradient.
        temperature: of the distribution that is trained; the sampler's.
    """
    if type(config) not in _OBJECTIVES:
        raise ConfigError(f"unknown preference objective {type(config).__name__}")
    loss, complete = _OBJECTIVES[type(config)]
    return PreferenceLearner(model, config, loss, negative, temperature, complete)


__all__ = [
    "PREFERENCE_OBJECTIVES",
    "APOConfig",
    "AnyPreferenceConfig",
    "BestOfNConfig",
    "CompletionSFTConfig",
    "DPOConfig",
    "FilteredSFTConfig",
    "GRPOConfig",
    "IPOConfig",
    "KTOConfig",
    "Memory",
    "ORPOConfig",
    "PPOConfig",
    "PrefFTConfig",
    "PreferenceConfig",
    "PreferenceLearner",
    "PreferenceNeeds",
    "REINFORCEConfig",
    "RLOOConfig",
    "RWRConfig",
    "SimPOConfig",
    "build_preference_learner",
]
