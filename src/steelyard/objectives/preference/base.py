r"""Preference fine-tuning with three switches: on-policy sampling, reuse of samples, and the negative gradient.

Tajwar, Singh et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024).

Idea: supervised, contrastive and reinforcement objectives all multiply log-probabilities of completions with a signed
weight. Where the completions come from and how often they are used is the business of the source of batches
(`train/experience.py`); the sign is decided here. An objective is a pure function of the policy's token log-probs and
the batch; it knows no model, tokenizer, device or loop.

The negative gradient is one number \lambda for every objective. With c_{n,t} = - dL / d log \pi_{n,t}, the learner
differentiates in place of L

    L_\lambda = - \sum_{n,t} sg[ max(c_{n,t}, 0) + \lambda min(c_{n,t}, 0) ] \log \pi_{n,t}

so that \lambda = 1 has exactly the gradient of L, \lambda = 0 never pushes a token down, and values between scale it.

| symbol | code |
|---|---|
| \log \pi_{n,t} | `outputs.token_logps` [N, T] |
| c_{n,t} | `weights` [N, T] |
| \lambda | `negative` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError, DataError
from steelyard.objectives.base import Group, Learner, Metrics, Phase

CHUNK = 64
"""Completions in one forward pass without gradients (reference, values of a whole buffer)."""

Aggregation = Literal["sequence_sum", "sequence_mean", "token_mean", "constant"]
"""How values of tokens become one number; see `aggregate`."""


@dataclass(frozen=True)
class PreferenceNeeds:
    """What an objective reads beyond completions.

    Attributes:
        pairs: chosen and rejected completions.
        rewards: a reward of every completion.
        labels: desirable or not.
        reference: log-probs under the reference policy.
        sampler: log-probs under the distribution that drew the completions.
        values: a value head on the policy.
        mismatched: completions of other prompts (KTO).
        group: least number of completions of a prompt.
        on_policy: makes sense only with completions of the policy itself.
    """

    pairs: bool = False
    rewards: bool = False
    labels: bool = False
    reference: bool = False
    sampler: bool = False
    values: bool = False
    mismatched: bool = False
    group: int = 1
    on_policy: bool = False

    def require(self, batch: ExperienceBatch, objective: str) -> None:
        """Check that the data hold what the objective reads; what a learner can compute itself is not asked for.

        Raises:
            DataError: a field is missing, or every prompt has too few completions.
        """
        wanted = (
            (self.pairs, batch.pairs, "pairs of chosen and rejected completions"),
            (self.rewards, batch.rewards, "a reward of every completion"),
            (self.labels, batch.labels, "labels (desirable or not)"),
            (self.sampler, batch.sampler_token_logps, "log-probs under the distribution that drew the completions"),
            (self.mismatched, batch.mismatched, "mismatched completions, for its estimate of the KL"),
        )
        for needed, value, what in wanted:
            if needed and value is None:
                raise DataError(f"objective {objective!r} needs {what}; the batch has none")
        if self.group > 1:
            # one group may have lost members (empty completions); all of them too small is a mistake
            largest = int(torch.bincount(batch.prompt_of).max()) if len(batch) else self.group
            if largest < self.group:
                raise DataError(
                    f"objective {objective!r} needs at least {self.group} completions of a prompt, found {largest}"
                )


@dataclass(frozen=True)
class PreferenceConfig(Config):
    """Base of the configs of preference objectives."""

    learning_rate: float = 1e-6
    """Adam's step; the most important number of a preference run: try a few."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "learning_rate")
        require_range(self, 0, math.inf, "weight_decay")

    @property
    def needs(self) -> PreferenceNeeds:
        """What the batches must hold."""
        return PreferenceNeeds()

    def group_learning_rate(self, group: str) -> float:
        """Return the learning rate of a group of parameters of the model, "policy" or "value"."""
        return self.learning_rate


@dataclass(frozen=True)
class LossParts:
    """A loss, split by what the negative gradient's switch reaches.

    Attributes:
        policy: scalar; a function of the token log-probs, whose gradient is split by sign.
        other: scalar or None: the value loss; left alone by the switch.
        metrics: for the log, detached.
    """

    policy: Tensor
    other: Tensor | None = None
    metrics: Metrics = field(default_factory=dict)


Memory = dict[str, Tensor]
"""What an objective remembers from one buffer of completions to the next (moving averages, a KL controller)."""

PreferenceLoss = Callable[[Outputs, ExperienceBatch, Any], LossParts]
"""(outputs, batch, config) -> parts; pure."""

Completion = Callable[[ExperienceBatch, Any, Memory], tuple[ExperienceBatch, Memory]]
"""(whole batch, config, memory) -> (batch with `advantages`, new memory); pure."""


class PolicyModel(Protocol):
    """A policy over completions: a language model, or a categorical distribution in a bandit. Also an `nn.Module`."""

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        """Return what the policy says about the completions, with gradients where they are enabled.

        Log-probs are those of softmax(logits / temperature).
        """
        ...

    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, T] under the frozen reference, without gradients.

        Raises:
            ConfigError: the model was built without one.
        """
        ...

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return {group name: parameters} of what is trained: "policy", and "value" for a value head."""
        ...


class PreferenceLearner(Learner):
    """Trains a policy model by one of the preference objectives; see the module docstring.

    Args:
        model: the policy; an `nn.Module` with the methods of `PolicyModel`.
        config: of the objective.
        loss: the objective.
        negative: lambda, scale of the negative gradient.
        temperature: of the distribution that is trained; that of the sampler, so that ratios are exact.
        complete: computes advantages over a whole buffer; None: the loss reads none.
    """

    def __init__(
        self,
        model: Any,
        config: PreferenceConfig,
        loss: PreferenceLoss,
        negative: float = 1.0,
        temperature: float = 1.0,
        complete: Completion | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(negative) and negative >= 0):
            raise ConfigError(f"negative must be at least 0, found {negative}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature must be above 0, found {temperature}")
        self.model, self.config, self.negative, self.temperature = model, config, negative, temperature
        self._loss, self._complete = loss, complete
        self._name = str(getattr(config, "kind", type(config).__name__))
        trainable = model.trainable()
        if config.needs.values and "value" not in trainable:
            raise ConfigError(f"objective {self._name!r} needs a value head; the model has none")
        self.groups = {
            name: Group(parameters, config.group_learning_rate(name), config.weight_decay)
            for name, parameters in trainable.items()
            if name != "value" or config.needs.values
        }
        self.plan = (Phase(("preference",), tuple(self.groups)),)

    def loss_preference(self, batch: ExperienceBatch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return the objective's value with the gradient of its lambda-scaled surrogate."""
        batch = self.with_reference(batch)  # before the graph of the policy is in memory
        outputs = self.model.outputs(batch, values=self.config.needs.values, temperature=self.temperature)
        return self.surrogate(outputs, batch)

    @torch.no_grad()
    def complete(self, batch: ExperienceBatch, memory: Memory) -> tuple[ExperienceBatch, Memory]:
        """Return a freshly drawn whole buffer with all that is computed once, and the memory for the next one.

        Fills `reference_token_logps`, `values`, `advantages` and `returns` as the objective needs them. Neither
        argument is changed.

        Raises:
            DataError: the buffer lacks what the objective needs, or holds a completion without a scored token.
        """
        self.config.needs.require(batch, self._name)
        if bool((batch.lengths == 0).any()):
            row = int((batch.lengths == 0).nonzero()[0])
            raise DataError(f"completion {row}: expected at least one scored token, found none")
        batch = self.with_reference(batch)
        if self.config.needs.values and batch.values is None:
            batch = replace(batch, values=_in_chunks(self._values, batch))
        if self._complete is None:
            return batch, dict(memory)
        return self._complete(batch, self.config, memory)

    @torch.no_grad()
    def with_reference(self, batch: ExperienceBatch) -> ExperienceBatch:
        """Return the batch with the reference's log-probs, computed now if needed and not there."""
        if not self.config.needs.reference or batch.reference_token_logps is not None:
            return batch
        return replace(batch, reference_token_logps=_in_chunks(self._reference, batch))

    def surrogate(self, outputs: Outputs, batch: ExperienceBatch) -> tuple[Tensor, Metrics]:
        """Return L with the gradient of L_lambda, and metrics, from outputs with gradients."""
        parts, weights = self._split(outputs, batch)
        up, down = weights.clamp(min=0), weights.clamp(max=0)
        pushed = ((up + self.negative * down) * outputs.token_logps).sum()
        loss = parts.policy.detach() - (pushed - pushed.detach())
        if parts.other is not None:
            loss = loss + parts.other
        mass = up.sum() - down.sum()
        own = {
            "loss/preference": parts.policy.detach(),
            "loss/negative_mass": -down.sum() / mass.clamp(min=1e-12),
        }
        return loss, parts.metrics | staleness(outputs, batch) | own

    def token_weights(self, batch: ExperienceBatch) -> Tensor:
        """Return c [N, T], by which the objective multiplies the gradient of each token's log-prob (at lambda = 1)."""
        with torch.no_grad():
            batch = self.with_reference(batch)
            outputs = self.model.outputs(batch, values=self.config.needs.values, temperature=self.temperature)
        with torch.enable_grad():
            return self._split(outputs, batch)[1]

    def weights(self, batch: ExperienceBatch) -> Tensor:
        """Return c [N] of each completion, the mean of its tokens': negative where the objective pushes it down."""
        return self.token_weights(batch).sum(1) / batch.lengths

    def _split(self, outputs: Outputs, batch: ExperienceBatch) -> tuple[LossParts, Tensor]:
        """Return the loss as a function of log-probs that are leaves, and c [N, T]."""
        self.config.needs.require(batch, self._name)
        if self._complete is not None and batch.advantages is None:
            with torch.no_grad():
                if batch.values is None and outputs.values is not None:
                    batch = replace(batch, values=outputs.values.detach())
                batch, _ = self._complete(batch, self.config, {})
        leaf = outputs.token_logps.detach().requires_grad_()
        parts = self._loss(Outputs(leaf, outputs.entropies, outputs.values), batch, self.config)
        (gradient,) = torch.autograd.grad(parts.policy, leaf, retain_graph=parts.other is not None)
        return parts, -gradient

    def _reference(self, batch: ExperienceBatch) -> Tensor:
        found: Tensor = self.model.reference_token_logps(batch, temperature=self.temperature)
        return found

    def _values(self, batch: ExperienceBatch) -> Tensor:
        found: Tensor | None = self.model.outputs(batch, values=True, temperature=self.temperature).values
        assert found is not None
        return found


def aggregate(values: Tensor, batch: ExperienceBatch, how: Aggregation, constant: float = 1.0) -> Tensor:
    """Return one number from values [N, T] of tokens; masked ones contribute nothing.

    - "sequence_sum": sum over a completion's tokens, mean over completions;
    - "sequence_mean": mean over a completion's tokens, mean over completions;
    - "token_mean": mean over all tokens, so that long completions weigh more;
    - "constant": sum over a completion's tokens divided by `constant`, mean over completions.

    Means over completions and tokens are those of the whole batch, also where this is a part of it.
    """
    if how == "token_mean":
        return batch.mean_over_tokens(values)
    sums = (values * batch.scored_mask).sum(1)
    if how == "sequence_mean":
        sums = sums / batch.lengths
    elif how == "constant":
        sums = sums / constant
    return batch.mean_over_rows(sums)


def sequence_logps(outputs: Outputs, batch: ExperienceBatch) -> Tensor:
    """Return log pi(y|x) [N], summed over scored tokens."""
    return (outputs.token_logps * batch.scored_mask).sum(1)


@torch.no_grad()
def staleness(outputs: Outputs, batch: ExperienceBatch) -> Metrics:
    r"""Return how far the policy has moved since it drew its completions; {} for text of people.

    `sampler/kl` estimates KL(sampler || policy), the mean of \log \pi_sampler - \log \pi; `sampler/ess` is the share of
    the completions that importance weights \rho leave, (\sum \rho)^2 / (n \sum \rho^2). Both over completions that this
    run has drawn.
    """
    if batch.sampler_token_logps is None:
        return {}
    own = torch.ones_like(batch.prompt_of, dtype=torch.bool) if batch.born is None else batch.born >= 0
    if batch.mismatched is not None:
        own = own & (batch.mismatched == 0)
    moved = ((outputs.token_logps - batch.sampler_token_logps) * batch.scored_mask).sum(1)
    count = own.sum()
    log_ratio = moved.masked_fill(~own, -math.inf)
    return {
        "sampler/kl": -moved.masked_fill(~own, 0.0).sum() / count,
        "sampler/ess": (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp() / count,
    }


def _in_chunks(function: Callable[[ExperienceBatch], Tensor], batch: ExperienceBatch) -> Tensor:
    """Return function(batch) [N, T], worked in groups of prompts with about `CHUNK` completions."""
    parts = -(-len(batch) // CHUNK)
    if parts == 1:
        return function(batch)
    order, found = [], []
    for prompts in torch.arange(len(batch.prompts), device=batch.prompt_of.device).tensor_split(parts):
        if len(prompts) == 0:
            continue
        rows = torch.nonzero((batch.prompt_of >= prompts[0]) & (batch.prompt_of <= prompts[-1])).flatten()
        order.append(rows[torch.argsort(batch.prompt_of[rows], stable=True)])  # as `of_prompts` orders them
        found.append(function(batch.of_prompts(prompts)))
    result = torch.empty_like(torch.cat(found))
    result[torch.cat(order)] = torch.cat(found)
    return result
