"""Baselines that train: the single model's head, its whole network or its LoRA adapters, on the same few labels.

What re-weighting has to beat. How well they do is a matter of tuning, so every comparison shows them twice: chosen from
`EQUAL`, as many settings as HyRe's eta has (`choose.ETA_GRID`), and from `WIDE`; both on held-out tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from steelyard.adapt.base import Combination, Support, SupportPosterior, Task, check_pooled
from steelyard.adapt.losses import Likelihood
from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import LabelledBatch
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.nets.backbones import reads_completions, trainable_of
from steelyard.objectives.hyre import HyRe

Grid = Mapping[str, Sequence[float]]
EQUAL: Grid = {"steps": (30,), "learning_rate": (1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)}
WIDE: Grid = {
    "steps": (3, 10, 30, 100, 300),
    "learning_rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1, 3, 10, 30, 100, 300, 1000),
}
"""Of `FineTuneHead`: plain gradient descent, whose step suits features of some scale; 1 / |phi|^2 is a middling one."""
EQUAL_NETWORK: Grid = {"steps": (30,), "learning_rate": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
WIDE_NETWORK: Grid = {
    "steps": (3, 10, 30, 100, 300),
    "learning_rate": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
"""Of `fine_tune_network`, which uses Adam."""
Parts = Literal["head", "all", "lora"]


@dataclass(frozen=True)
class FineTuneHead:
    """Full-batch gradient descent on the single model's linear head, from where it is; biases stay.

    The mean loss is descended, so counts of examples matter relative to each other only.

    Attributes:
        steps: of gradient descent; what is not fitted after them stays as it was.
        learning_rate: of a step.
        pooled: which member is the single model.
        task: likelihood.
        noise: variance of a regression's targets.
    """

    steps: int = 30
    learning_rate: float = 1.0
    pooled: int = 0
    task: Task = "preference"
    noise: float = 1.0
    name: str = "fine-tune head"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.learning_rate < np.inf:
            raise ConfigError(
                f"steps must be at least 1 and learning_rate above 0, found {self.steps} and {self.learning_rate}"
            )

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the single model."""
        check_pooled(self.pooled, num_members)
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the head after the steps.

        The head's change is a combination of the examples' features, so the steps are taken on its N C coefficients.

        Raises:
            NonFiniteError: the steps are too long and the head runs away.
        """
        single = np.eye(num_members)[self.pooled]
        if support is None:
            return Combination(single), {"loss": np.nan}
        if support.features is None:
            raise DataError("fine-tuning a head needs the examples' features, and none were given")
        likelihood = Likelihood(self.task, self.noise)
        likelihood.check(support.members.shape[2], support.labels)
        kernel = support.features @ support.features.T
        start = support.members[:, self.pooled]
        shares = support.counts / (support.counts.sum() or 1.0)
        change = np.zeros_like(start)
        outputs = start
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(self.steps):
                change = change - self.learning_rate * shares[:, None] * likelihood.gradient(outputs, support.labels)
                outputs = start + kernel @ change
            vector = change.T @ support.features
        if not (np.isfinite(vector).all() and np.isfinite(outputs).all()):
            raise NonFiniteError(f"fine-tuning with a learning rate of {self.learning_rate:g} runs away")
        loss = float(shares @ likelihood.value(outputs, support.labels))
        return Combination(single, vector), {"loss": loss}


def fine_tune_network(
    learner: HyRe, batch: LabelledBatch | ExperienceBatch, steps: int, learning_rate: float, parts: Parts = "all"
) -> HyRe:
    """Return a copy of a learner whose single model (member 0) was trained on a batch; the original is unchanged.

    `members(batch)[:, 0]` of the copy is the fine-tuned model. What is not trained is shared with the original, so a
    large frozen language model is not copied. Batch statistics and scales stay those of pre-training.

    Args:
        learner: trained, with a pooled head.
        batch: the labelled examples; every step sees them all.
        steps: of Adam, with its usual decay rates.
        learning_rate: Adam's.
        parts: "head", the heads alone; "all", the backbone too; "lora", the adapters of a language model's backbone
            and nothing else.

    Raises:
        ConfigError: there is no pooled head, or nothing that could be trained.
        NonFiniteError: the loss is no longer finite.
    """
    if not learner.config.heads.pooled:
        raise ConfigError("fine-tuning trains the single model, and these heads have none; set pooled")
    trained = {id(parameter) for parameter in _parameters(learner, parts)}
    kept = [*learner.parameters(), *learner.buffers()]
    tuned: HyRe = copy.deepcopy(learner, {id(tensor): tensor for tensor in kept if id(tensor) not in trained})
    tuned.config = replace(learner.config, frozen=parts == "head")
    parameters = [own for own, old in zip(tuned.parameters(), learner.parameters(), strict=True) if id(old) in trained]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        examples = tuned.examples(batch)
        losses = tuned.member_losses(examples.members(tuned.head.trained_only), examples.targets)[:, 0]
        loss = losses.mean() if examples.weights is None else (losses * examples.weights).sum() / examples.weights.sum()
        if not loss.isfinite():
            raise NonFiniteError(f"fine-tuning with a learning rate of {learning_rate:g} runs away")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return tuned


def _parameters(learner: HyRe, parts: Parts) -> list[nn.Parameter]:
    """Return what is trained."""
    head, backbone = list(learner.head.parameters()), learner.backbone
    if parts == "head":
        return head
    if parts == "lora":
        if getattr(getattr(backbone, "config", None), "adapter", None) is None:
            raise ConfigError("parts 'lora' needs a language model with adapters as backbone; set its adapter")
        return list(backbone.trainable()["policy"])  # type: ignore[operator]
    of_backbone = trainable_of(backbone) if reads_completions(backbone) else tuple(backbone.parameters())
    if not of_backbone:
        raise ConfigError("the backbone has nothing to train; fine-tune parts 'head'")
    return [*head, *of_backbone]
