"""Reading token by token through a language model of `transformers`, with keys and values in slots (`nets/slots.py`).

A model can be read through slots when each layer attends to all earlier tokens or to a window of the last ones, and
takes its masks and positions from outside. Whether it can is found out by trying. Others (recurrent layers, positions
inside the attention) are read through the library's own cache, and can neither look aside nor be forked.

Shapes: R rows, m tokens, S columns, V vocabulary, W width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard.errors import ConfigError, require
from steelyard.nets.completions import prompt_lengths
from steelyard.nets.slots import SlotReader, SlotView

if TYPE_CHECKING:
    from steelyard.nets.lm import CausalLM


class SlotForward:
    """One pass of a `CausalLM` over slots, with the adapters' merged weights as they are when it is made."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self._weights = model, model.merged_weights()
        self._settings = model.network.config.get_text_config()
        self._cache_of = _cache_classes()

    def __call__(self, tokens: Tensor, slots: SlotView, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [R, V], states [R, W]) after the token number `last` of each row."""
        model, network = self.model, self.model.network
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._masks(slots),
            "position_ids": slots.positions,
            "past_key_values": self._cache_of(slots, self._settings.num_hidden_layers),
            "use_cache": True,
        }
        rows = torch.arange(len(tokens), device=tokens.device)
        with model.with_weights(self._weights):
            if model.head_is_plain:
                states = network.base_model(**inputs).last_hidden_state[rows, last]
                return network.get_output_embeddings()(states), states
            seen: list[Tensor] = []
            hook = network.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                logits = network(**inputs).logits[rows, last]
            finally:
                hook.remove()
        return logits, seen[0][rows, last]

    def _masks(self, slots: SlotView) -> Tensor | dict[str, Tensor]:
        kinds, window = layer_kinds(self._settings)
        if len(kinds) == 1:
            return self._mask(slots, window if "sliding_attention" in kinds else None)
        return {kind: self._mask(slots, window if kind == "sliding_attention" else None) for kind in sorted(kinds)}

    def _mask(self, slots: SlotView, window: int | None) -> Tensor:
        visible = slots.visible(window)
        if self._settings._attn_implementation == "sdpa":
            return visible
        dtype = self.model.network.get_input_embeddings().weight.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def layer_kinds(settings: Any) -> tuple[set[str], int | None]:
    """Return the kinds of a model's layers and the window of those that have one."""
    window = getattr(settings, "sliding_window", None)
    kinds = set(getattr(settings, "layer_types", None) or ())
    return kinds or {"sliding_attention" if window else "full_attention"}, window


@functools.cache
def _cache_classes() -> Any:
    """Return a function (slots, layers) -> cache of `transformers` that stores into slots."""
    utils = require("transformers.cache_utils", "lm")

    class SlotLayer(utils.DynamicLayer):  # type: ignore[misc, name-defined]
        def __init__(self, slots: SlotView, number: int) -> None:
            super().__init__()
            self.slots, self.number = slots, number

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return self.slots.write(self.number, key_states, value_states)

        def get_seq_length(self) -> int:
            return int(self.slots.positions[0, 0])

    return lambda slots, layers: utils.Cache(layers=[SlotLayer(slots, number) for number in range(layers)])


def can_use_slots(model: CausalLM) -> bool:
    """Return whether rows of different lengths, read through slots in two pieces, give a plain pass's logits."""
    settings = model.network.config.get_text_config()
    if layer_kinds(settings)[0] - {"full_attention", "sliding_attention"}:
        return False
    if settings._attn_implementation not in ("steelyard_grouped", "eager", "sdpa"):
        return False
    weight = model.network.get_input_embeddings().weight
    tokens = (torch.arange(24, device=weight.device) * 7919 % len(weight)).view(2, 12)
    lengths = torch.tensor([4, 9], device=weight.device)
    try:
        with torch.no_grad():
            reader = SlotReader.of_prompts(SlotForward(model), None, tokens[:, :9], lengths)
            reader.peek(tokens[0, :3])
            rows = torch.arange(2, device=weight.device)
            for _ in range(3):
                reader.read(tokens[rows, reader.lengths])
            for row, length in enumerate(reader.lengths.tolist()):
                expected = model.network(input_ids=tokens[row : row + 1, :length], use_cache=False).logits[0, -1]
                if (reader.logits[row] - expected).abs().max() > 1e-4 * expected.abs().max().clamp(min=1e-6):
                    return False
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):  # other masks, no positions
        return False
    return True


class PlainReader:
    """A language model in the middle of reading rows through the library's own cache; it cannot look aside.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
    """

    def __init__(self, model: CausalLM, prompts: Tensor, mask: Tensor, n: int) -> None:
        lengths = prompt_lengths(mask)
        longest = int(lengths.max())
        self.model, self._weights = model, model.merged_weights()
        tokens, mask = prompts[:, -longest:], mask[:, -longest:].long()
        self._ragged = bool((lengths < longest).any())
        self._cache = require("transformers", "lm").DynamicCache(config=model.network.config)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self._ragged:
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        self.logits = self._forward(inputs).repeat_interleave(n, 0)
        self._cache.batch_repeat_interleave(n)
        self._mask, self.lengths = mask.repeat_interleave(n, 0), lengths.repeat_interleave(n, 0)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        inputs: dict[str, Any] = {"input_ids": tokens[:, None]}
        if self._ragged:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
            inputs |= {"attention_mask": self._mask, "position_ids": self.lengths[:, None]}
        self.lengths = self.lengths + 1
        self.logits = self._forward(inputs)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64)."""
        self._cache.batch_select_indices(rows)
        self.logits, self._mask, self.lengths = self.logits[rows], self._mask[rows], self.lengths[rows]

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        with self.model.with_weights(self._weights):
            found: Tensor = self.model.network(
                **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
        return found


def require_slots(model: CausalLM) -> None:
    """Check that a model can be read through slots.

    Raises:
        ConfigError: it cannot.
    """
    if not model.uses_slots:
        raise ConfigError(
            f"{model.base}: its layers keep more than keys and values of earlier tokens, or take no masks and "
            "positions from outside, so an evaluation could not be taken back; use a plain attention model"
        )
