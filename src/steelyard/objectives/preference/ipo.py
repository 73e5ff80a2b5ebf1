r"""Identity preference optimisation: the difference of log-ratios is regressed on a finite target.

Gheshlaghi Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos, "A General Theoretical Paradigm to Understand Learning
from Human Preferences" (AISTATS 2024), eq. 17.

Idea: DPO's pull to the reference vanishes where preferences are certain, for \log \sigma has no finite optimum. A
square has one:

    L = (z - 1 / (2 \tau))^2,   z = \delta_w - \delta_l,   \delta = \log \pi(y|x) - \log \pi_ref(y|x)

Past the target its gradient changes sign: the chosen completion is pushed down.

| symbol | code |
|---|---|
| \delta_w, \delta_l | `chosen`, `rejected` [K] |
| \tau | `config.tau` |
| 1 / (2 \tau) | `target` |

Differences from the paper: none at the default, sums over tokens. With `length_norm` each \delta is divided by its
completion's tokens, which is what TRL's DPO trainer computes (its authors' stated intention); \tau then has another
scale, for the target is one of nats per token. Released code of Tajwar et al. for bandits writes (z - \beta)^2 with
\beta = 10, which is \tau = 0.05 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.config import require_positive
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds
from steelyard.objectives.preference.pairs import log_ratios, of_pairs, pair_metrics


@dataclass(frozen=True)
class IPOConfig(PreferenceConfig):
    """Settings of IPO."""

    kind: Literal["ipo"] = "ipo"
    """Name of the objective."""
    tau: float = 0.1
    """Strength of the pull to the reference; log-ratios of pairs are driven to a difference of 1 / (2 tau)."""
    length_norm: bool = False
    """Divide log-ratios by the completion's length, as TRL does; False: the paper's sums."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "tau")

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs and the reference."""
        return PreferenceNeeds(pairs=True, reference=True)


def ipo_loss(outputs: Outputs, batch: ExperienceBatch, config: IPOConfig) -> LossParts:
    """Return the IPO loss, mean over pairs."""
    ratios = log_ratios(outputs, batch)
    chosen, rejected = of_pairs(ratios / batch.lengths if config.length_norm else ratios, batch)
    target = 1 / (2 * config.tau)
    loss = batch.mean_over_pairs((chosen - rejected - target).square())  # eq. 17
    return LossParts(loss, metrics=pair_metrics(outputs, batch, config.tau * ratios))
