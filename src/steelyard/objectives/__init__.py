"""How it is learned: one file per method, and the explicit table of them."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch

from steelyard.data.episode import Spec
from steelyard.errors import ConfigError
from steelyard.objectives.actor_critic import DataStatistics
from steelyard.objectives.base import Learner
from steelyard.objectives.bc import BC, BCConfig
from steelyard.objectives.cal_ql import CalQL, CalQLConfig
from steelyard.objectives.cql import CQL, CQLConfig
from steelyard.objectives.iql import IQL, IQLConfig
from steelyard.objectives.sac import SAC, SACConfig

OBJECTIVES: dict[str, type[CalQLConfig] | type[CQLConfig] | type[IQLConfig] | type[SACConfig] | type[BCConfig]] = {
    "cal_ql": CalQLConfig,
    "cql": CQLConfig,
    "iql": IQLConfig,
    "sac": SACConfig,
    "bc": BCConfig,
}
"""Objectives that learn to act, by name."""

# `kind` tells them apart in a file, so that a misspelt key is reported for the objective that was meant
ControlConfig = Annotated[
    CalQLConfig | CQLConfig | IQLConfig | SACConfig | BCConfig, pydantic.Field(discriminator="kind")
]


def build_learner(spec: Spec, config: ControlConfig, statistics: DataStatistics, generator: torch.Generator) -> Learner:
    """Build the learner that `config` describes, with initial weights drawn from `generator`."""
    match config:
        case CalQLConfig():  # before CQLConfig, which it specialises
            return CalQL(spec, config, statistics, generator)
        case CQLConfig():
            return CQL(spec, config, statistics, generator)
        case IQLConfig():
            return IQL(spec, config, statistics, generator)
        case SACConfig():
            return SAC(spec, config, statistics, generator)
        case BCConfig():
            return BC(spec, config, statistics, generator)
    raise ConfigError(f"unknown objective {type(config).__name__}")


__all__ = [
    "OBJECTIVES",
    "BCConfig",
    "CQLConfig",
    "CalQLConfig",
    "ControlConfig",
    "DataStatistics",
    "IQLConfig",
    "Learner",
    "SACConfig",
    "build_learner",
]
