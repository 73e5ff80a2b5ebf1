r"""Self-evaluation: a language model learns whether it would do better if it started over, at any point of an answer.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation"
(arXiv 2410.02725). The divergence that keeps the policy follows the code of its successor ZIP-RC (arXiv 2512.01457).

Idea: draw N samples of every prompt, judge them, and label each by how many of the others are better; ties are no
reason to start over. The model learns to say so at the sample's end and after any part of it, in one token. Since the
comparison is with its own samples, both hopeless and trivial prompts are "no better": that is the worth of one more
sample, which an absolute reward does not give.

    L = E[ - (1 - \hat q) \log \sigma(l) - \hat q \log \sigma(-l) ] + w E[ D(\pi_ref || \pi) ]

| symbol | code |
|---|---|
| \hat q | 1 - `batch.targets` [N, K], `data/restart_labels.py`; the first mean is over all of them |
| l | `nets.self_eval.read(...).log_odds` [N, K], log-odds of "no better" |
| \sigma(l) | `score` [N] |
| w | `config.kl_weight` |
| D | `divergence` [M], at the completions' tokens; the second mean |
| \pi_ref | the model's frozen reference |

D compares the `kl_tokens` likeliest tokens of the reference one by one and all the others as one, so it is at most
D_KL(\pi_ref || \pi), equal to it where the vocabulary is no larger, and has no gradient at \pi = \pi_ref. Reserved
tokens are left out on both sides, for sampling never draws them.

Differences from the papers: soft labels in place of sampled pairs (the same optimum, less noise). The answer's
probability is taken among Yes and No alone. Hyper-parameters are ours: the first paper's code is not public. ZIP-RC
predicts the joint distribution of final reward and remaining length, and restricts its divergence to the top tokens
without the rest. A probe trains nothing but itself, so there is no policy to keep and w does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear
from torch.utils.checkpoint import checkpoint

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.prefixes import PrefixBatch, StateBatch
from steelyard.errors import ConfigError
from steelyard.nets.self_eval import (
    AnyEvaluator,
    AnyReaderConfig,
    ProbeEvaluator,
    SuffixConfig,
    head,
    hidden_states,
    lengths_and_drawn,
    places,
    read,
)
from steelyard.nets.tiny_lm import TinyLM
from steelyard.objectives.base import Group, Learner, Metrics, Phase

BLOCK = 1 << 22
"""Entries of one block of logits."""
KEPT = 1 << 26
"""At most so many logits are kept for the backward pass; more are recomputed."""
Teacher = tuple[Tensor, Tensor, Tensor]
"""What `likeliest` returns."""


@dataclass(frozen=True)
class SelfEvalConfig(Config):
    """Self-evaluation."""

    kind: Literal["self_eval"] = "self_eval"
    """Name of the objective."""
    reader: AnyReaderConfig = field(default_factory=SuffixConfig)
    """How the model says it: suffix (a question, then Yes or No), slot (reserved tokens) or probe (a small network)."""
    learning_rate: float = 1e-5
    """Adam's step for the model; 1e-4 suits LoRA, 1e-3 transformers of less than a million parameters."""
    probe_learning_rate: float = 1e-3
    """Adam's step for a probe."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    kl_weight: float = 1.0
    """w: how firmly the policy is kept what it was; 0: not at all, and the reference is never computed."""
    kl_tokens: int = 32
    """Likeliest tokens of the reference that are compared one by one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "learning_rate", "probe_learning_rate", "kl_tokens")
        require_range(self, 0, math.inf, "weight_decay", "kl_weight")


class SelfEvaluation(Learner):
    """Learns to say whether a fresh sample would be better; see the module docstring.

    Args:
        config: of the objective.
        model: a `nets.tiny_lm.TinyLM` or a `nets.lm.CausalLM`; with a reference where `kl_weight` is above 0. A probe
            leaves it untouched, and a `CausalLM` out of its state dict.
        evaluator: made by `nets.self_eval.build_evaluator`.

    Raises:
        ConfigError: the model has nothing to train, or no reference to be kept near.
    """

    def __init__(self, config: SelfEvalConfig, model: nn.Module, evaluator: AnyEvaluator) -> None:
        super().__init__()
        self.config, self.evaluator = config, evaluator
        head(model)  # refuses what cannot be read
        if isinstance(evaluator, ProbeEvaluator) and not isinstance(model, TinyLM):
            self.__dict__["model"] = model  # not a part of the learner: a model with a name is not saved with a probe
        else:
            self.model = model
        if isinstance(evaluator, ProbeEvaluator):
            self.groups = {
                "probe": Group(tuple(evaluator.net.parameters()), config.probe_learning_rate, config.weight_decay)
            }
        else:
            trained: dict[str, tuple[nn.Parameter, ...]] = model.trainable()  # type: ignore[operator]
            if not trained.get("policy"):
                raise ConfigError("self-evaluation: the model has no trainable parameter")
            if config.kl_weight and not _has_reference(model):
                raise ConfigError(
                    "self-evaluation: the model has no reference to be kept near; load it with one, or set kl_weight 0"
                )
            self.groups = {"policy": Group(trained["policy"], config.learning_rate, config.weight_decay)}
        self.plan = (Phase(("self_eval",), tuple(self.groups)),)

    def prepare(self, batch: Any) -> Any:
        """Return the batch, for a probe with the frozen model's states in place of tokens."""
        if not isinstance(self.evaluator, ProbeEvaluator) or isinstance(batch, StateBatch):
            return batch
        return states_of(self.model, batch)

    def loss_self_eval(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return the cross-entropy against soft labels, plus the divergence from the reference."""
        if isinstance(batch, StateBatch):
            assert isinstance(self.evaluator, ProbeEvaluator)
            dropout = generator if self.training and self.evaluator.net.dropout else None
            found = self.evaluator.log_odds(batch.states, batch.lengths, batch.drawn, dropout)
            count = len(batch.states) if batch.count is None else batch.count[0]
            return _cross_entropy(found, batch.targets, count)
        teacher = self._teacher(batch) if self.config.kl_weight else None
        reading = read(self.model, self.evaluator, batch, batch.cuts)
        wanted = batch.cuts >= 0
        targets = wanted.sum() if batch.counts is None else batch.counts[2]
        loss, metrics = _cross_entropy(reading.log_odds[wanted], batch.targets[wanted], targets)
        if teacher is not None:
            weight, bias = head(self.model)
            apart = divergence(reading.states[reading.predicting], weight, bias, teacher, self.evaluator.reserved)
            kl = apart.sum() / (len(apart) if batch.counts is None else batch.counts[1])
            loss = loss + self.config.kl_weight * kl
            metrics["loss/kl"] = kl.detach()
        return loss, metrics

    @torch.no_grad()
    def _teacher(self, batch: ExperienceBatch) -> Teacher:
        with self.model.as_reference():  # type: ignore[operator]
            states, rows = hidden_states(self.model, batch)
            return likeliest(states[rows.sources], *head(self.model), self.config.kl_tokens, self.evaluator.reserved)

    @torch.no_grad()
    def score(self, batch: ExperienceBatch) -> Tensor:
        """Return P(no fresh sample would be better) float32 [N], calibrated, after all tokens (leave EOS out)."""
        where = batch.lengths.long()[:, None]
        return self.evaluator.probability(read(self.model, self.evaluator, batch, where).log_odds[:, 0])


def _has_reference(model: Any) -> bool:
    if hasattr(model, "reference_kind"):
        return bool(model.reference_kind != "none")
    return getattr(model, "reference", None) is not None


def _cross_entropy(log_odds: Tensor, targets: Tensor, count: Tensor | int) -> tuple[Tensor, Metrics]:
    loss = binary_cross_entropy_with_logits(log_odds, targets, reduction="sum") / count
    apart = (log_odds.detach().sigmoid() - targets) ** 2
    # against labels the least possible loss is their own entropy, so the error beside it tells more
    return loss, {"loss/self_eval": loss.detach(), "loss/squared_error": apart, "data/no_better": targets}


@torch.no_grad()
def states_of(model: Any, batch: PrefixBatch) -> StateBatch:
    """Return the states of a model at the cuts of a batch."""
    assert batch.cuts is not None
    assert batch.targets is not None
    states, rows = hidden_states(model, batch)
    wanted = batch.cuts >= 0
    index = places(rows, batch.scored_mask, batch.cuts)[wanted]
    return StateBatch(
        states[index].float(),
        *lengths_and_drawn(model, batch, states, rows, batch.cuts),
        batch.targets[wanted],
        None if batch.counts is None else batch.counts[2:],
    )


# -------------------------------------------------------------------------------------- keeping the policy


def likeliest(
    states: Tensor, weight: Tensor, bias: Tensor | None, count: int, reserved: tuple[int, ...] = ()
) -> Teacher:
    """Return ids int64 [M, k] and log-probs [M, k] of the likeliest tokens, and the log-prob [M] of all others.

    Reserved tokens are none of them; -inf where there are no others.
    """
    count = min(count, len(weight) - len(reserved))
    found = []
    for rows in _blocks(states, weight):
        logps = _logits(states[rows], weight, bias, reserved).log_softmax(1)
        top = logps.topk(count, dim=1)
        found.append((top.indices, top.values, logps.scatter(1, top.indices, -torch.inf).logsumexp(1)))
    tokens, values, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tokens, values, others


def divergence(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Teacher,
    reserved: tuple[int, ...] = (),
) -> Tensor:
    """Return D [M] of a teacher from softmax(states weight^T + bias); all but its likeliest tokens are one outcome.

    The logits [M, V] are computed in blocks; where they are many, again in the backward pass.

    Args:
        states: [M, W].
        weight: [V, W].
        bias: [V] or None.
        teacher: what `likeliest` returned.
        reserved: ids that neither distribution can draw.
    """
    parts = []
    for rows in _blocks(states, weight):
        tokens, logps, others = (part[rows] for part in teacher)
        inputs = (states[rows], weight, bias, tokens, logps, others, reserved)
        if len(states) * len(weight) > KEPT:
            parts.append(checkpoint(_divergence, *inputs, use_reentrant=False))
        else:
            parts.append(_divergence(*inputs))
    return torch.cat(parts) if parts else states.new_zeros(0)


def _divergence(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    teacher: Tensor,
    teacher_others: Tensor,
    reserved: tuple[int, ...],
) -> Tensor:
    logps = _logits(states, weight, bias, reserved).log_softmax(1)
    total = (teacher.exp() * (teacher - logps.gather(1, tokens))).sum(1)
    if tokens.shape[1] + len(reserved) == len(weight):
        return total  # nothing is left over
    others = logps.scatter(1, tokens, -torch.inf).logsumexp(1)
    return total + teacher_others.exp() * (teacher_others - others)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, reserved: tuple[int, ...]) -> Tensor:
    logits = linear(states, weight, bias).float()
    if not reserved:
        return logits
    return logits.index_fill(1, torch.tensor(reserved, device=logits.device), -torch.inf)


def _blocks(states: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, BLOCK // len(weight))
    return [slice(first, first + size) for first in range(0, len(states), size)]
