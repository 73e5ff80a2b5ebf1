"""A small language model in plain PyTorch with the methods that preference objectives call (`PolicyModel`).

For tests and for problems that a model of a few thousand parameters can learn; `nets/lm.py` is its big brother.

Shapes: P prompts, N completions, L prompt tokens, T completion tokens, W width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.nets.completions import head_entropies, head_logps, plain_rows, spread
from steelyard.nets.slots import SlotReader, SlotView, require_room, right_padded
from steelyard.nets.transformer import Block, Transformer, TransformerConfig


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
    def reader(
        self, prompts: Tensor, prompt_mask: Tensor, n: int, max_new_tokens: int, block: int | None = None
    ) -> SlotReader:
        """Return a reader that has read every prompt, for n completions of each (`envs/samplers.py`).

        Args:
            prompts: int64 [P, L], padded on the left.
            prompt_mask: float32 [P, L].
            n: completions of a prompt.
            max_new_tokens: longest completion.
            block: rows of every pass (`nets/slots.py`); None: as many as there are.

        Raises:
            DataError: a prompt and its completion do not fit into the context.
        """
        tokens, lengths = right_padded(prompts, prompt_mask)
        require_room(tokens.shape[1], max_new_tokens, self.context)
        read = SlotReader.of_prompts(self.slot_forward(), self.context, tokens, lengths, block)
        return read if n == 1 else read.fork(torch.arange(len(read), device=tokens.device).repeat_interleave(n))

    def slot_forward(self) -> SlotForward:
        """Return what a `SlotReader` reads with."""
        return SlotForward(self.transformer)

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


class SlotForward:
    """One pass of a transformer over slots, each row at its own position."""

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer

    def __call__(self, tokens: Tensor, slots: SlotView, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [R, V], states [R, W]) after the token number `last` of each row."""
        transformer, positions = self.transformer, slots.positions
        # idle columns of a padded prompt may lie behind the context; nothing is read from them
        places = transformer.position_embedding[positions.clamp(max=transformer.config.context - 1)]
        x = functional.embedding(tokens, transformer.token_embedding) + places
        hidden = ~slots.visible()
        for block in transformer.blocks:
            assert isinstance(block, Block)
            x = _block(block, x, hidden, slots)
        states = transformer.final_norm(x[torch.arange(len(x), device=x.device), last])
        return states @ transformer.token_embedding.T, states


def _block(block: Block, x: Tensor, hidden: Tensor, slots: SlotView) -> Tensor:
    """Return what `Block.forward` does, with keys and values in slots."""
    rows, length, width = x.shape
    split = block.query_key_value(block.attention_norm(x)).view(rows, length, 3, block.heads, width // block.heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    key, value = slots.write(block.layer, key, value)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    x = x + block.attention_out((weights @ value).transpose(1, 2).reshape(rows, length, width))
    added: Tensor = block.mlp_out(functional.gelu(block.mlp_in(block.mlp_norm(x)), approximate="tanh"))
    return x + added


def _hidden(transformer: Transformer, batch: ExperienceBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states [M, W] that predict the scored tokens, and those tokens [M]."""
    rows = plain_rows(batch)
    features = transformer.features(rows.tokens)
    return features.flatten(0, 1)[rows.sources], rows.targets
