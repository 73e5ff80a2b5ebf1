"""The policy of the didactic bandits: a categorical distribution per position over V actions, from context features.

Small enough that all probabilities are known: expectations, entropies and both KL divergences are sums, not samples.
It has the methods that preference objectives call (`PolicyModel`), so that bandits and language models share them.

With several positions they are independent given the context: pi(y | s) = prod_t pi_t(y_t | s). (The paper's
multi-token bandit uses a small GPT, for which expectations must be sampled.)

Shapes: P prompts (contexts), D features, N completions, T positions, V actions.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError

GAIN = 0.01
"""Of the Xavier-uniform weights: the first policy hardly depends on its context."""


class CategoricalPolicy(nn.Module):
    """D -> 50, LayerNorm, ReLU -> 256 -> 256 -> T V logits, with a fixed reference distribution.

    Args:
        reference: float [V], the distribution pi_ref of every position, the same for all contexts.
        features: D.
        tokens: T.
        generator: of the first weights.
        hidden: widths of the hidden layers; the first is the normalised one.
        value_head: also learn a value of each position's state, linear in the context (PPO).
    """

    reference_logps: Tensor

    def __init__(
        self,
        reference: Tensor,
        features: int,
        tokens: int,
        generator: torch.Generator,
        hidden: tuple[int, ...] = (50, 256, 256),
        value_head: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.actions = tokens, len(reference)
        sizes = (features, *hidden, tokens * self.actions)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(o, i)) for i, o in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(o)) for o in sizes[1:])
        self.scale, self.shift = nn.Parameter(torch.ones(hidden[0])), nn.Parameter(torch.zeros(hidden[0]))
        for weight in self.weights:
            nn.init.xavier_uniform_(weight, GAIN, generator)
        # zeros: before it has learned anything a critic says nothing
        self.value_head = nn.Parameter(torch.zeros(tokens, features)) if value_head else None
        self.register_buffer("reference_logps", reference.double().log().float())

    def logits(self, prompts: Tensor) -> Tensor:
        """Return [P, T, V] for contexts [P, D]."""
        x = layer_norm(linear(prompts, self.weights[0], self.biases[0]), self.scale.shape, self.scale, self.shift)
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            x = linear(x.relu(), weight, bias)
        return x.view(len(prompts), self.tokens, self.actions)

    def log_probs(self, prompts: Tensor, temperature: float = 1.0) -> Tensor:
        """Return [P, T, V], normalised over actions."""
        return (self.logits(prompts) / temperature).log_softmax(2)

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        """Return what the policy says about the completions [N, T]; see `PolicyModel`."""
        log_probs = self.log_probs(batch.prompts, temperature)
        value = None
        if values:
            if self.value_head is None:
                raise ConfigError("the model has no value head; build it with value_head=True")
            value = (batch.prompts @ self.value_head.T)[batch.prompt_of] * batch.scored_mask
        entropy = None
        if entropies:
            entropy = -(log_probs.exp() * log_probs).sum(2)[batch.prompt_of] * batch.scored_mask
        return Outputs(self._chosen(log_probs, batch), entropy, value)

    @torch.no_grad()
    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, T] of the completions under pi_ref."""
        log_probs = (self.reference_logps / temperature).log_softmax(0)
        return log_probs[batch.completions] * batch.scored_mask

    def _chosen(self, log_probs: Tensor, batch: ExperienceBatch) -> Tensor:
        """Return [N, T] of [P, T, V]: one gather from a flat view, for a batch here is mostly overhead."""
        rows = batch.prompt_of[:, None] * self.tokens + torch.arange(self.tokens, device=log_probs.device)
        return log_probs.flatten().take(rows * self.actions + batch.completions) * batch.scored_mask

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return the network's parameters as "policy" and the value head, where there is one, as "value"."""
        network = (*self.weights, *self.biases, self.scale, self.shift)
        groups: dict[str, tuple[nn.Parameter, ...]] = {"policy": network}
        return groups if self.value_head is None else groups | {"value": (self.value_head,)}

    @torch.no_grad()
    def sample(self, prompts: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n completions of each context: ([P n, T] int64, their log-probs [P n, T])."""
        log_probs = self.log_probs(prompts)  # [P, T, V]
        drawn = torch.multinomial(log_probs.exp().flatten(0, 1), n, replacement=True, generator=generator)  # [P T, n]
        logps = log_probs.flatten(0, 1).gather(1, drawn)
        shape = (len(prompts), self.tokens, n)
        return tuple(x.view(shape).transpose(1, 2).flatten(0, 1) for x in (drawn, logps))  # type: ignore[return-value]
