"""Baselines that train: the single model's head, its whole network or its LoRA adapters, on the same few labels.

What re-weighting has to beat. How well they do is a matter of tuning, so every comparison shows them twice: chosen from
`EQUAL`, as many settings as HyRe's eta has (`choose.ETA_GRID`), and from `WIDE`; both on held-out tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from steelyard.adapt.base import Combination, Floats, Support, SupportPosterior, Task, check_pooled
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
        start, counts = support.members[:, self.pooled], support.counts
        path = fine_tune_users(
            likelihood, start[None], support.labels[None], support.features[None], self.learning_rate, (self.steps,),
            counts[None],
        )  # fmt: skip
        vector = next(path)[0]
        losses = likelihood.value(start + support.features @ vector.T, support.labels)
        return Combination(single, vector), {"loss": float(counts @ losses / (counts.sum() or 1.0))}


def fine_tune_users(
    likelihood: Likelihood,
    start: Floats,
    labels: Floats,
    features: Floats,
    learning_rate: float,
    steps: Sequence[int],
    counts: Floats | None = None,
) -> Iterator[Floats]:
    """Yield how far full-batch gradient descent moves the linear head of each of U users, [U, C, D], every user alone.

    The change is a combination of the examples' features, so steps are taken on its N C coefficients; one pass leaves
    the result of every number of steps.

    Args:
        likelihood: of labels; its mean over the examples is descended.
        start: [U, N, C], what the head says before.
        labels: [U, N].
        features: [U, N, D].
        learning_rate: of a step.
        steps: increasing numbers of steps.
        counts: [U, N], how much each example counts; all 1 where None.

    Raises:
        NonFiniteError: the steps are too long and a head runs away.
    """
    counts = np.ones_like(labels) if counts is None else counts
    total = counts.sum(1, keepdims=True)
    rates = learning_rate * (counts / np.where(total == 0, 1.0, total))[..., None]
    kernel = features @ features.transpose(0, 2, 1)
    change, outputs = np.zeros_like(start), start
    for step in range(1, steps[-1] + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            change = change - rates * likelihood.gradient(outputs, labels)
            outputs = start + kernel @ change
        if step in steps:
            with np.errstate(over="ignore", invalid="ignore"):
                vectors = change.transpose(0, 2, 1) @ features
            if not (np.isfinite(vectors).all() and np.isfinite(outputs).all()):
                raise NonFiniteError(f"fine-tuning with a learning rate of {learning_rate:g} runs away")
            yield vectors


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


class NetworkUsers:
    """The single model of a learner on a plain backbone, fine-tuned for U users at once; each user has its own copy.

    As `fine_tune_network` with parts "all", user by user, but all copies take a step in one batched product.

    Args:
        learner: trained, with a pooled head; it stays as it is.
        users: U.
    """

    def __init__(self, learner: HyRe, users: int) -> None:
        if not learner.config.heads.pooled or learner.config.frozen or reads_completions(learner.backbone):
            raise ConfigError(
                "many users at once: fine-tuning needs a pooled head and a backbone of numbers, not frozen"
            )
        self.single = _Single(learner)
        trained = {id(parameter) for parameter in _parameters(learner, "all")}
        self.parameters = {
            name: value.detach().expand(users, *value.shape).clone()
            for name, value in self.single.named_parameters()
            if id(value) in trained
        }

    def steps(self, batch: LabelledBatch, learning_rate: float, steps: Sequence[int]) -> Iterator[int]:
        """Take Adam's steps on users' examples [U, N, ...]; yield each of the increasing numbers when it is reached.

        Raises:
            NonFiniteError: a copy runs away.
        """
        optimizer = torch.optim.Adam(list(self.parameters.values()), lr=learning_rate)
        slope = vmap(grad(self._loss), in_dims=(0, 0, None if batch.other is None else 0, 0))
        for step in range(1, steps[-1] + 1):
            gradients = slope(self.parameters, batch.inputs, batch.other, batch.targets)
            for name, value in self.parameters.items():
                value.grad = gradients[name]
            optimizer.step()
            if step in steps:
                if not all(bool(value.isfinite().all()) for value in self.parameters.values()):
                    raise NonFiniteError(f"fine-tuning with a learning rate of {learning_rate:g} runs away")
                yield step

    @torch.no_grad()
    def outputs(self, inputs: Tensor, other: Tensor | None = None) -> Tensor:
        """Return what each user's copy says of its own examples [U, P, ...]: [U, P, C], margins for pairs."""
        each = vmap(lambda own, *sides: functional_call(self.single, own, sides)[:, 0])
        outputs: Tensor = each(self.parameters, inputs) if other is None else each(self.parameters, inputs, other)
        return outputs

    def _loss(self, own: dict[str, Tensor], inputs: Tensor, other: Tensor | None, targets: Tensor) -> Tensor:
        members = functional_call(self.single, own, (inputs, other))
        return self.single.learner.member_losses(members, targets)[:, 0].mean()


class _Single(nn.Module):
    """The members of a learner [P, H, C] as a function of its parameters and of inputs."""

    def __init__(self, learner: HyRe) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, inputs: Tensor, other: Tensor | None = None) -> Tensor:
        batch = LabelledBatch(inputs, inputs.new_zeros(len(inputs)), other)
        return self.learner.examples(batch).members(self.learner.head.trained_only)
