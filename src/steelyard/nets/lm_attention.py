"""Attention written out for models whose heads share keys and values; `nets/lm.py` hands it to `transformers`.

Shapes: B rows, H heads, G groups of heads that share keys and values, L queries, S keys, D size of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, L, H, D] of queries [B, H, L, D] over keys and values [B, G, S, D].

    The heads of a group read the same keys in one matrix product, so keys and values are never repeated. With one
    query at a time that is faster on a CPU than repeating them, and than the fused kernel.

    Args:
        module: unused; part of the interface of `transformers`.
        query: of all heads.
        key: of all groups.
        value: of all groups.
        attention_mask: [B or 1, 1, L, S], added to the scores.
        scaling: of the scores; None: 1 / sqrt(D).
        dropout: must be 0.
        options: other wishes of a model; those that would change the result are refused.
    """
    unknown = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if options.get(name) is not None]
    if unknown or dropout:
        raise ValueError(f"grouped attention knows no {', '.join(unknown) or 'dropout'}")
    rows, heads, length, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scaled = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows, groups, -1, size)
    scores = scaled @ key.transpose(2, 3)
    if attention_mask is not None:
        scores.view(rows, groups, -1, length, keys).add_(attention_mask[:, :, None, :, :keys])
    mixed = scores.softmax(-1) @ value
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None
