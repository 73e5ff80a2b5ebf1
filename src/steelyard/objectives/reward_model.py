r"""Bradley-Terry reward models: a number for every completion, fitted to which of two people preferred.

Christiano et al., "Deep Reinforcement Learning from Human Preferences" (NeurIPS 2017), eq. 1; for language models
Stiennon et al., "Learning to Summarize from Human Feedback" (NeurIPS 2020), section 3.4. The margin is that of Touvron
et al., "Llama 2" (2023), eq. 2; the centring term that of Eisenstein et al., "Helping or Herding?" (2023).

Idea: if P(y_w > y_l | x) = \sigma(r(x, y_w) - r(x, y_l)), preferences are a logistic regression on differences of
rewards. r is a linear function of a language model's hidden state at the completion's last token, which has seen all
of it.

    L = (1 - \epsilon) [- \log \sigma(\Delta)] + \epsilon [- \log \sigma(-\Delta)] + c (r_w + r_l)^2,
    \Delta = r_w - r_l - m,                                                         mean over pairs

| symbol | code |
|---|---|
| r_w, r_l | `chosen`, `rejected` [K] |
| m | `batch.margins` [K], where `config.margins` |
| \epsilon | `config.label_smoothing` |
| c | `config.centre_weight` |
| r(x, y) | `reward`: `head` on the backbone's hidden state at the last scored token |

Only differences of rewards are fitted, so r has no zero of its own; with c > 0 its mean over the data is drawn to 0.

Differences from the papers: the head has no bias (a bias cancels in \Delta). Rewards are not normalised after training.
Pairs count alike; Stiennon et al. weigh all pairs of one prompt as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError, NonFiniteError
from steelyard.nets.backbones import final_states, trainable_of, width_of
from steelyard.objectives.base import Group, Learner, Metrics, Phase
from steelyard.objectives.preference.pairs import of_pairs


@dataclass(frozen=True)
class RewardModelConfig(Config):
    """Bradley-Terry reward model."""

    kind: Literal["reward_model"] = "reward_model"
    """Name of the objective."""
    learning_rate: float = 1e-5
    """Adam's step for the backbone; 1e-4 suits LoRA."""
    head_learning_rate: float = 1e-3
    """Adam's step for the head, which begins at random."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    frozen: bool = False
    """Train the head alone, on the backbone's features as they are."""
    margins: bool = True
    """Subtract the pairs' margins where the data give them."""
    label_smoothing: float = 0.0
    """epsilon: assumed share of flipped preferences."""
    centre_weight: float = 0.0
    """c: draws the mean of r_w + r_l to 0; 0.01 is usual where rewards must be comparable between prompts."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "learning_rate", "head_learning_rate")
        require_range(self, 0, math.inf, "weight_decay", "centre_weight")
        require_range(self, 0, 0.499, "label_smoothing")


class RewardModel(Learner):
    """Learns what is preferred; see the module docstring.

    Args:
        config: of the objective.
        backbone: a `Transformer`, or a language model (`nets.lm.CausalLM`): anything with `final_states(batch)`
            [N, W], `width` and `trainable()`.
        generator: draws the head.
    """

    def __init__(self, config: RewardModelConfig, backbone: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        width = width_of(backbone)
        head = torch.randn(width, generator=generator, device=generator.device) / math.sqrt(width + 1)
        self.head = nn.Parameter(head.to(next(backbone.parameters()).device))
        self.groups = {"head": Group((self.head,), config.head_learning_rate, config.weight_decay)}
        if config.frozen:
            backbone.requires_grad_(False)
        else:
            parameters = trainable_of(backbone)
            if not parameters:
                raise ConfigError("reward model: the backbone has no trainable parameter; set frozen, or train it")
            self.groups["backbone"] = Group(parameters, config.learning_rate, config.weight_decay)
        self.plan = (Phase(("reward",), tuple(self.groups)),)

    def reward(self, batch: ExperienceBatch) -> Tensor:
        """Return r(x, y) float32 [N] of each completion, with gradients where they are enabled."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            features = final_states(self.backbone, batch)
        return (features.float() * self.head).sum(1)

    def loss_reward(self, batch: ExperienceBatch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return the negative log-likelihood of the preferences, smoothed and centred as the config says."""
        if batch.pairs is None:
            raise ConfigError("a reward model learns from pairs (chosen, rejected), and the data have none")
        chosen, rejected = of_pairs(self.reward(batch), batch)
        difference = chosen - rejected
        if self.config.margins and batch.margins is not None:
            difference = difference - batch.margins.nan_to_num(0.0)
        epsilon, c = self.config.label_smoothing, self.config.centre_weight
        loss = batch.mean_over_pairs(
            -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference) + c * (chosen + rejected) ** 2
        )
        metrics = {
            "loss/reward_model": loss,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def score(self, batch: ExperienceBatch) -> Tensor:
        """Return r(x, y) float32 [N]; what else is in the batch changes nothing.

        Raises:
            NonFiniteError: a reward is NaN or infinite.
        """
        rewards = self.reward(batch)
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            raise NonFiniteError(f"reward model: completion {row} of the batch has reward {float(rewards[row])}")
        return rewards

    def rows(self, batches: Iterable[ExperienceBatch]) -> list[dict[str, Any]]:
        """Return one row per pair, with the words that evaluation episodes use.

        `return` is r_w - r_l, `length` the chosen completion's tokens, `success` whether r_w > r_l, `score` 1, or 1/2
        for a tie; beside them both rewards and `length_difference`, chosen minus rejected.
        """
        rows: list[dict[str, Any]] = []
        for batch in batches:
            batch = batch.to(self.head.device)
            of_chosen, of_rejected = of_pairs(torch.stack([self.score(batch), batch.lengths], 1), batch)
            for (chosen, length), (rejected, other) in zip(of_chosen.tolist(), of_rejected.tolist(), strict=True):
                rows.append(
                    {
                        "episode": len(rows),
                        "return": chosen - rejected,
                        "length": int(length),
                        "success": chosen > rejected,
                        "score": float(chosen > rejected) + 0.5 * (chosen == rejected),
                        "chosen_reward": chosen,
                        "rejected_reward": rejected,
                        "length_difference": int(length - other),
                    }
                )
        return rows
