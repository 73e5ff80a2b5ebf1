r"""Direct preference optimisation: the reward that a policy implies is fitted to pairs.

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn, "Direct Preference Optimization: Your Language Model is Secretly a
Reward Model" (NeurIPS 2023), eq. 7.

Idea: the optimum of E[r] - \beta KL(\pi || \pi_ref) satisfies r = \beta \log(\pi / \pi_ref) + const, so the
Bradley-Terry likelihood of preferences is a function of the policy alone. With \delta = \log \pi(y|x) -
\log \pi_ref(y|x), summed over tokens, and z = \delta_w - \delta_l:

    L = - \log \sigma(\beta z)                                                        (sigmoid; DPO)

Options, each of which is the plain loss at its default:

    smoothing: L = - (1 - \epsilon) \log \sigma(\beta z) - \epsilon \log \sigma(-\beta z)           (cDPO)
    robust:    L = [- (1 - \epsilon) \log \sigma(\beta z) + \epsilon \log \sigma(-\beta z)] / (1 - 2 \epsilon)
    hinge:     L = max(0, 1 - \beta z)                                                   (SLiC, RSO)
    exo:       L = KL((q, 1 - q) || (1 - \epsilon, \epsilon)), q = \sigma(\beta z)           (EXO)
    length_normalised: \delta divided by the completion's tokens                        (as in Tulu 3)
    nll_weight: plus \alpha NLL(y_w) / |y_w|                                             (RPO)

cDPO: Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023). Robust: Ray Chowdhury, Kini,
Natarajan, "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (ICML 2024). Hinge: Zhao et al.,
"SLiC-HF: Sequence Likelihood Calibration with Human Feedback" (2023), with the scaling of Liu et al., "Statistical
Rejection Sampling Improves Preference Optimization" (ICLR 2024). EXO: Ji et al., "Towards Efficient Exact Optimization
of Language Model Alignment" (ICML 2024), eq. 16. RPO: Pang et al., "Iterative Reasoning Preference Optimization"
(NeurIPS 2024).

| symbol | code |
|---|---|
| \delta_w, \delta_l | `chosen`, `rejected` [K] |
| \beta z | `logits` [K] |
| \beta | `config.beta` |
| \epsilon | `config.label_smoothing` |
| \alpha | `config.nll_weight` |

Differences from the paper: none at the defaults; the reference log-probs may come from a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.preference.base import LossParts, PreferenceConfig, PreferenceNeeds, sequence_logps
from steelyard.objectives.preference.pairs import log_ratios, of_pairs, pair_metrics


@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Settings of DPO, cDPO, robust DPO, length-normalised DPO, RPO, hinge and EXO."""

    kind: Literal["dpo"] = "dpo"
    """Name of the objective."""
    beta: float = 0.1
    """Strength of the pull to the reference; rewards are beta times log-ratios."""
    loss: Literal["sigmoid", "hinge", "exo"] = "sigmoid"
    """Function of the scaled difference of log-ratios."""
    label_smoothing: float = 0.0
    """epsilon: assumed share of flipped preferences."""
    robust: bool = False
    """Correct for flips without bias (needs label_smoothing above 0) instead of smoothing."""
    length_normalised: bool = False
    """Divide log-ratios by the completion's length."""
    nll_weight: float = 0.0
    """alpha: weight of the chosen completions' mean negative log-likelihood."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        require_positive(self, "beta")
        require_range(self, 0, 0.499, "label_smoothing")
        require_range(self, 0, math.inf, "nll_weight")
        if self.robust and self.loss != "sigmoid":
            raise ConfigError(f"robust corrects the sigmoid loss; it has no meaning for loss {self.loss!r}")
        if self.robust and not self.label_smoothing:
            raise ConfigError("robust needs label_smoothing, the share of flipped preferences, above 0")
        if self.loss == "hinge" and self.label_smoothing:
            raise ConfigError("loss 'hinge' has no label_smoothing: use 'sigmoid' or 'exo'")
        if self.loss == "exo" and not self.label_smoothing:
            raise ConfigError("loss 'exo' needs label_smoothing above 0 (1e-3 is usual): at 0 its target is infinite")

    @property
    def needs(self) -> PreferenceNeeds:
        """Pairs and the reference."""
        return PreferenceNeeds(pairs=True, reference=True)


def dpo_loss(outputs: Outputs, batch: ExperienceBatch, config: DPOConfig) -> LossParts:
    """Return the DPO loss, mean over pairs."""
    ratios = log_ratios(outputs, batch)  # delta [N]
    scores = ratios / batch.lengths if config.length_normalised else ratios
    chosen, rejected = of_pairs(scores, batch)
    loss = batch.mean_over_pairs(pair_loss(config.beta * (chosen - rejected), config))
    if config.nll_weight:
        mean_nll = -sequence_logps(outputs, batch) / batch.lengths
        loss = loss + config.nll_weight * batch.mean_over_pairs(of_pairs(mean_nll, batch)[0])
    return LossParts(loss, metrics=pair_metrics(outputs, batch, config.beta * ratios))


def pair_loss(logits: Tensor, config: DPOConfig) -> Tensor:
    """Return the loss [K] of logits beta z [K] (eq. 7 and its relatives in the module docstring)."""
    epsilon = config.label_smoothing
    right, wrong = logsigmoid(logits), logsigmoid(-logits)
    if config.loss == "hinge":
        return torch.relu(1 - logits)
    if config.loss == "exo":
        return right.exp() * (right - math.log1p(-epsilon)) + wrong.exp() * (wrong - math.log(epsilon))
    if config.robust:
        return (-(1 - epsilon) * right + epsilon * wrong) / (1 - 2 * epsilon)
    return -(1 - epsilon) * right - epsilon * wrong
