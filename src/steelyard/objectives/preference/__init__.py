"""Preference fine-tuning: one file per objective, and the explicit table of them."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from steelyard.objectives.preference.base import PreferenceLearner, PreferenceLoss
from steelyard.objectives.preference.dpo import DPOConfig, dpo_loss

AnyPreferenceConfig = Annotated[DPOConfig, pydantic.Field()]

_LOSSES: dict[type[Any], PreferenceLoss] = {
    DPOConfig: dpo_loss,
}

PREFERENCE_OBJECTIVES: dict[str, type[Any]] = {config.kind: config for config in _LOSSES}
"""Config classes of the preference objectives, by name."""


def build_preference_learner(model: Any, config: AnyPreferenceConfig, negative: float = 1.0) -> PreferenceLearner:
    """Build the learner that trains `model` as `config` says."""
    return PreferenceLearner(model, config, _LOSSES[type(config)], negative)


__all__ = ["PREFERENCE_OBJECTIVES", "AnyPreferenceConfig", "DPOConfig", "build_preference_learner"]
