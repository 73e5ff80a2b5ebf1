"""Two layers of language models as the same functions with fewer temporaries, which `nets/lm.py` puts in place:
attention for heads that share keys and values, and a linear layer with a low-rank adapter.

Shapes: B rows, H heads, G groups of heads that share keys and values, L queries, S keys, D size of a head; I inputs,
O outputs, r rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


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


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return x (W + scale B A)^T + bias for a frozen W [O, I] with an adapter A [r, I], B [O, r].

    Adding the adapter to the weight first costs as much as r more rows of input and saves four passes over the output.
    """
    result: Tensor = _AdaptedLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dy, flat = gradients[0].reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (dy @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(x.shape)
        of_a = (dy @ b).mul_(ctx.scale).T @ flat
        of_b = dy.T @ (flat @ a.T).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None
