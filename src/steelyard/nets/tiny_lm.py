"""A small language model in plain PyTorch with the methods that preference objectives call (`PolicyModel`).

For tests and for problems that a model of a few thousand parameters can learn; `nets/lm.py` is its big brother.

Shapes: P prompts, N completions, L prompt tokens, T completion tokens, W width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError, DataError
from steelyard.nets.completions import head_entropies, head_logps, plain_rows, prompt_lengths, spread
from steelyard.nets.transformer import KeyValueCache, Transformer, TransformerConfig


class TinyLM(nn.Module):
    """A transformer as a policy over completions, with its frozen reference.

    Args:
        config: size of the transformer.
        generator: of the first weights.
        value_head: also learn a value of every token's state (PPO).
        reference: "copy": keep the first weights, frozen, as the reference; "none".
    """

    def __init__(
        self,
        config: TransformerConfig,
        generator: torch.Generator,
        *,
        value_head: bool = False,
        reference: Literal["copy", "none"] = "copy",
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, generator)
        # zeros: before it has learned anything a critic says nothing
        self.value_head = nn.Parameter(torch.zeros(config.width, device=generator.device)) if value_head else None
        self.reference: Transformer | None = None
        if reference == "copy":
            self.renew_reference()

    @property
    def context(self) -> int:
        """Longest prompt and completion together."""
        return self.config.context

    def renew_reference(self) -> Self:
        """Make the present weights the reference, e.g. after supervised training; return the model itself."""
        self.reference = copy.deepcopy(self.transformer).requires_grad_(False)
        return self

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        """Return log-probs [N, T] of the completions' tokens under softmax(logits / temperature).

        Args:
            batch: what to score; no field but prompts, completions and their masks is read.
            entropies: also the entropies of the distributions that the tokens were drawn from.
            values: also the value head's opinion before each token.
            temperature: divides the logits.
        """
        hidden, targets = _hidden(self.transformer, batch)
        weight = self.transformer.token_embedding
        cooled = hidden / temperature
        return Outputs(
            spread(head_logps(cooled, weight, targets), batch),
            spread(head_entropies(cooled, weight), batch) if entropies else None,
            spread(self._values(hidden), batch) if values else None,
        )

    def _values(self, hidden: Tensor) -> Tensor:
        if self.value_head is None:
            raise ConfigError("the model has no value head; build it with value_head=True")
        return hidden @ self.value_head

    @torch.no_grad()
    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, T] under the frozen reference.

        Raises:
            ConfigError: the model was built without one.
        """
        if self.reference is None:
            raise ConfigError("the model has no reference; build it with reference='copy'")
        hidden, targets = _hidden(self.reference, batch)
        return spread(head_logps(hidden / temperature, self.reference.token_embedding, targets), batch)

    def reference_state(self) -> dict[str, Tensor]:
        """Return the reference's weights by name: its identity, e.g. for `nets/reference_cache.py`."""
        if self.reference is None:
            raise ConfigError("the model has no reference; build it with reference='copy'")
        return dict(self.reference.state_dict())

    @torch.no_grad()
    def reader(self, prompts: Tensor, prompt_mask: Tensor, n: int, max_new_tokens: int) -> TinyReader:
        """Return a reader that has read every prompt, for n completions of each (`envs/samplers.py`).

        Raises:
            DataError: a prompt and its completion do not fit into the context.
        """
        return TinyReader(self.transformer, prompts, prompt_mask, n, max_new_tokens)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Let the model be its reference for a while, e.g. to sample from it; without gradients."""
        if self.reference is None:
            raise ConfigError("the model has no reference; build it with reference='copy'")
        own, reference = self.transformer, self.reference
        try:
            self.transformer = reference
            with torch.no_grad():
                yield
        finally:
            self.transformer = own

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return the transformer's parameters as "policy" and the value head, where there is one, as "value"."""
        groups: dict[str, tuple[nn.Parameter, ...]] = {"policy": tuple(self.transformer.parameters())}
        return groups if self.value_head is None else groups | {"value": (self.value_head,)}


class TinyReader:
    """A transformer in the middle of reading rows of tokens; rows whose prompts are of one length go together.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
    """

    def __init__(self, transformer: Transformer, prompts: Tensor, mask: Tensor, n: int, max_new_tokens: int) -> None:
        self.transformer = transformer
        lengths = prompt_lengths(mask)
        context, longest = transformer.config.context, int(lengths.max())
        if longest + max_new_tokens > context:
            raise DataError(
                f"prompt of {longest} tokens and {max_new_tokens} new ones: expected at most {context} in all (the "
                "model's context)"
            )
        self.logits = prompts.new_empty(
            len(prompts) * n, transformer.config.vocab_size, dtype=transformer.token_embedding.dtype
        )
        self._parts: list[tuple[Tensor, KeyValueCache]] = []
        for length in sorted(set(lengths.tolist())):
            group = (lengths == length).nonzero()[:, 0]
            cache = KeyValueCache(transformer.config, len(group), prompts.device)
            cache.keys, cache.values = cache.keys.to(self.logits.dtype), cache.values.to(self.logits.dtype)
            logits = self._read(prompts[group, -length:], cache)
            rows = (group[:, None] * n + torch.arange(n, device=group.device)).flatten()
            self.logits[rows] = logits.repeat_interleave(n, 0)
            cache.keys = cache.keys.repeat_interleave(n, 1)
            cache.values = cache.values.repeat_interleave(n, 1)
            self._parts.append((rows, cache))

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        for rows, cache in self._parts:
            self.logits[rows] = self._read(tokens[rows, None], cache)

    def _read(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        return self.transformer.features(tokens, cache)[:, -1] @ self.transformer.token_embedding.T

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64)."""
        number = torch.full((len(self.logits),), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        parts = []
        for old, cache in self._parts:
            kept = (number[old] >= 0).nonzero()[:, 0]
            if len(kept):
                cache.keys, cache.values = cache.keys[:, kept], cache.values[:, kept]
                parts.append((number[old[kept]], cache))
        self._parts = parts
        self.logits = self.logits[rows]


def _hidden(transformer: Transformer, batch: ExperienceBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states [M, W] that predict the scored tokens, and those tokens [M]."""
    rows = plain_rows(batch)
    features = transformer.features(rows.tokens)
    return features.flatten(0, 1)[rows.sources], rows.targets
