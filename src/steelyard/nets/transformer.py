"""A small decoder-only transformer: pre-norm, learned positions, plain attention, tied embeddings.

Shapes: B batch, L tokens, P tokens already in the cache, W width, H heads, D = W / H, V vocabulary. Attention is
written out as matmul, softmax, matmul: for the short sequences this model is meant for, that trains two to four times
faster on a CPU than the fused kernel. There is no dropout, so a forward pass draws no random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.config import Config
from steelyard.errors import ConfigError, DataError

INIT_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The size of a transformer."""

    vocab_size: int = 259
    """Number of token ids V; the default is 256 bytes and three specials."""
    width: int = 128
    """Size W of the residual stream."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads H of a block; they share the width equally."""
    context: int = 128
    """Longest sequence L that the model can read."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"transformer {name} must be at least 1, found {getattr(self, name)}")
        if self.width % self.heads:
            raise ConfigError(f"transformer width must be a multiple of heads, found {self.width} and {self.heads}")


class KeyValueCache:
    """Keys and values of the tokens read so far, so that generation reads each token once.

    Attributes:
        keys: [layers, B, H, context, D]; only the first `length` positions are filled.
        values: as `keys`.
        length: number P of tokens read.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, device: torch.device) -> None:
        shape = (config.layers, batch_size, config.heads, config.context, config.width // config.heads)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `key` and `value` [B, H, L, D] of one layer after position P; return all P + L of them."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def linear(inputs: int, outputs: int, generator: torch.Generator, std: float = INIT_STD) -> nn.Linear:
    """Return a linear layer with normal weights and zero biases, drawn from `generator` and nothing else."""
    # Built on "meta" because the layer's own initialisation would draw from torch's global generator.
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device=generator.device)
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Causal self-attention, then a GELU MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        width, device = config.width, generator.device
        # Each block adds to the residual stream twice; this keeps its variance independent of depth (GPT-2).
        residual_std = INIT_STD / math.sqrt(2 * config.layers)
        self.layer, self.heads = layer, config.heads
        self.attention_norm = nn.LayerNorm(width, device=device)
        self.query_key_value = linear(width, 3 * width, generator)
        self.attention_out = linear(width, width, generator, residual_std)
        self.mlp_norm = nn.LayerNorm(width, device=device)
        self.mlp_in = linear(width, 4 * width, generator)
        self.mlp_out = linear(4 * width, width, generator, residual_std)

    def forward(self, x: Tensor, visible: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Return the residual stream [B, L, W] after this block; `visible` is bool [L, P + L]."""
        x = x + self.attention(self.attention_norm(x), visible, cache)
        added: Tensor = self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + added

    def attention(self, x: Tensor, visible: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Return softmax(Q K^T / sqrt(D)) V [B, L, W] over the visible positions."""
        rows, length, width = x.shape
        split = self.query_key_value(x).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, H, L, D]
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)  # [B, H, L, P + L]
        mixed = (weights @ value).transpose(1, 2).reshape(rows, length, width)
        out: Tensor = self.attention_out(mixed)
        return out


class Transformer(nn.Module):
    """Reads tokens, predicts at each position the next one."""

    causal: Tensor

    def __init__(self, config: TransformerConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        device = generator.device
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.width, device=device))
        self.position_embedding = nn.Parameter(torch.empty(config.context, config.width, device=device))
        nn.init.normal_(self.token_embedding, std=INIT_STD, generator=generator)
        nn.init.normal_(self.position_embedding, std=INIT_STD, generator=generator)
        self.blocks = nn.ModuleList(Block(config, layer, generator) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, device=device)
        causal = torch.ones(config.context, config.context, dtype=torch.bool, device=device).tril()
        self.register_buffer("causal", causal, persistent=False)

    def features(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the last hidden states [B, L, W] of tokens int64 [B, L] (for heads other than the next token).

        Args:
            tokens: the tokens; with a cache, those that follow what the cache has read.
            cache: if given, is extended by these tokens.

        Raises:
            DataError: the sequence is longer than the context.
        """
        past = 0 if cache is None else cache.length
        end = past + tokens.shape[1]
        if end > self.config.context:
            raise DataError(f"tokens: expected at most {self.config.context} (the context), found {end}")
        x = functional.embedding(tokens, self.token_embedding) + self.position_embedding[past:end]
        for block in self.blocks:
            x = block(x, self.causal[past:end, :end], cache)
        if cache is not None:
            cache.length = end  # only now: all layers write at the same position
        out: Tensor = self.final_norm(x)
        return out

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return logits float32 [B, L, V]; position t predicts token t + 1."""
        features = self.features(tokens, cache)
        with torch.autocast(features.device.type, enabled=False):  # the output head stays in float32
            return features.float() @ self.token_embedding.T

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        stop_token: int | None = None,
    ) -> Tensor:
        """Extend prompts token by token with a key-value cache.

        Args:
            tokens: prompts int64 [B, P], all of one length P >= 1.
            steps: number of tokens to add.
            generator: draws the tokens; unused at temperature 0.
            temperature: divides the logits; 0 takes the most likely token.
            stop_token: a row that has produced it is filled up with it.

        Returns:
            Prompts and completions int64 [B, P + steps].
        """
        if tokens.shape[1] < 1 or tokens.shape[1] + steps > self.config.context:
            raise DataError(
                f"prompt of {tokens.shape[1]} tokens and {steps} new ones: expected at least one prompt token and "
                f"at most {self.config.context} in all (the context)"
            )
        cache = KeyValueCache(self.config, len(tokens), tokens.device)
        finished = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        unread = tokens
        for _ in range(steps):
            following = next_tokens(self(unread, cache)[:, -1], generator, temperature)
            if stop_token is not None:
                following = following.masked_fill(finished, stop_token)
                finished = following == stop_token
            tokens, unread = torch.cat([tokens, following], dim=1), following
        return tokens


def next_tokens(logits: Tensor, generator: torch.Generator, temperature: float) -> Tensor:
    """Return int64 [B, 1] drawn from softmax(logits / temperature) for logits [B, V]; the most likely one at 0."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1, generator=generator)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p(target) float32 [B, L] for logits [B, L, V] and targets int64 [B, L]."""
    flat = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return -flat.view(targets.shape)
