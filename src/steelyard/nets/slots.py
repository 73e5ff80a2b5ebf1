"""Rows of tokens in the middle of being read, each in a slot of keys and values of its own.

A row's keys begin at column 0 of its slot, whatever the length of its neighbours, and every query is masked to the
columns that its row has really read. So

- rows of any lengths stand side by side, and a slot can be given to another row,
- to look aside (`peek`) is to write behind the last column and not to count it: taking it back costs nothing and is
  exact, also where a layer sees only a window of the last tokens,
- what a row computes does not depend on padding. It still may, in the last bits, on the *number* of rows in a pass,
  for matrix products choose their order of summation by shape. `block` makes that number constant.

Shapes: R rows, S columns, m tokens at a time, G heads with keys of their own, D size of a head, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from steelyard.errors import DataError
from steelyard.nets.completions import prompt_lengths

SPAN = 32
"""Passes see a multiple of so many columns."""
FEWEST = 4
"""Passes have at least so many rows: with fewer, matrix products sum in another order (measured on AVX2 with MKL)."""


class Slots:
    """Keys and values of all layers; those of a layer are made when it first writes.

    Args:
        rows: how many slots.
        columns: tokens that fit into one; grows when needed.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys, values [rows, G, columns, D]

    def select(self, rows: Tensor, columns: int, room: int = 0) -> Slots:
        """Return a copy of some rows and their first columns, with room for further rows."""
        found = Slots(len(rows) + room, columns)
        for pair in self.layers:
            found.layers.append(tuple(_grown(kept[rows, :, :columns], found.rows, columns) for kept in pair))  # type: ignore[arg-type]
        return found

    def reserve(self, rows: int, columns: int) -> None:
        """Make room."""
        if rows <= self.rows and columns <= self.columns:
            return
        self.rows, self.columns = max(rows, self.rows), max(columns, self.columns)
        self.layers = [(_grown(k, self.rows, self.columns), _grown(v, self.rows, self.columns)) for k, v in self.layers]

    def copy(self, targets: Tensor, source: Slots, rows: Tensor, columns: int) -> None:
        """Put rows of `source` into the slots `targets`."""
        while len(self.layers) < len(source.layers):
            keys, values = source.layers[len(self.layers)]
            self.layers.append((_like(keys, self.rows, self.columns), _like(values, self.rows, self.columns)))
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for kept, given in zip(mine, theirs, strict=True):
                kept[targets, :, :columns] = given[rows, :, :columns]


def _like(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])


def _grown(tensor: Tensor, rows: int, columns: int) -> Tensor:
    if tensor.shape[0] == rows and tensor.shape[2] == columns:
        return tensor
    found = _like(tensor, rows, columns)
    found[: len(tensor), :, : tensor.shape[2]] = tensor
    return found


class SlotView:
    """What one pass writes into: some slots, at given positions.

    Args:
        slots: of the reader.
        rows: which of them, first and end.
        positions: int64 [R, m] of the tokens that are read.
    """

    def __init__(self, slots: Slots, rows: tuple[int, int], positions: Tensor) -> None:
        self.slots, self.positions = slots, positions
        self.start, self.stop = rows
        first, last = (int(bound) for bound in positions[:, 0].aminmax())
        length = positions.shape[1]
        self.span = min(-(-(last + length) // SPAN) * SPAN, slots.columns)
        self._rows = torch.arange(self.start, self.stop, device=positions.device)[:, None]
        # rows of one length are written as a block, which costs less than place by place
        block = (slice(self.start, self.stop), slice(None), slice(first, first + length))
        self._block = block if first == last else None

    def visible(self, window: int | None = None) -> Tensor:
        """Return bool [R, 1, m, S]: what each token may attend to, the last `window` ones or all."""
        columns = torch.arange(self.span, device=self.positions.device)
        seen = columns <= self.positions[:, :, None]
        if window is not None:
            seen &= columns > self.positions[:, :, None] - window
        return seen[:, None]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [R, G, m, D] of one layer; return those of all columns [R, G, S, D]."""
        slots = self.slots
        if layer == len(slots.layers):
            slots.layers.append((_like(key, slots.rows, slots.columns), _like(value, slots.rows, slots.columns)))
        keys, values = slots.layers[layer]
        if self._block is not None:
            keys[self._block], values[self._block] = key, value
        else:
            keys[self._rows, :, self.positions] = key.transpose(1, 2)
            values[self._rows, :, self.positions] = value.transpose(1, 2)
        return keys[self.start : self.stop, :, : self.span], values[self.start : self.stop, :, : self.span]


Forward = Callable[[Tensor, SlotView, Tensor], tuple[Tensor, Tensor]]
"""(tokens [R, m], slots, last int64 [R]) -> (logits [R, V], states [R, W]) after token number `last` of each row."""


class SlotReader:
    """Rows of tokens in the middle of being read (`nets.self_eval.EvaluatingReader`).

    Args:
        forward: one pass of the model.
        context: longest row; None: no limit.
        block: rows of every pass, filled up with idle ones; None: as many as there are.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
        states: [R, W], what the output head makes `logits` from.
        lengths: int64 [R], tokens read of each row.
    """

    logits: Tensor
    states: Tensor
    lengths: Tensor

    def __init__(self, forward: Forward, context: int | None, block: int | None = None) -> None:
        self.forward, self.context, self.block = forward, context, block
        self._slots = Slots(0, SPAN)

    @classmethod
    def of_prompts(
        cls, forward: Forward, context: int | None, tokens: Tensor, lengths: Tensor, block: int | None = None
    ) -> Self:
        """Read prompts int64 [R, L], padded on the right: together, or one by one where `block` is set."""
        self = cls(forward, context, block)
        rows, longest = tokens.shape
        self._require_fits(longest)
        self.lengths = torch.zeros_like(lengths)
        self._slots = Slots(self._padded(rows), -(-longest // SPAN) * SPAN)
        if block is None:
            self.logits, self.states = self._pass(tokens, 0, rows, lengths - 1)
        else:
            parts = [
                self._pass(tokens[row : row + 1, :length], row, row + 1, lengths[row : row + 1] - 1, fewest=1)
                for row, length in enumerate(lengths.tolist())
            ]
            self.logits, self.states = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        self.lengths = lengths.clone()
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        self._require_fits(int(self.lengths.max()) + 1)
        self.logits, self.states = self._passes(tokens[:, None], self.block)
        self.lengths = self.lengths + 1

    @torch.no_grad()
    def peek(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [R, V], states [R, W]) after the tokens int64 [m] were read after every row, and forget them.

        With `block` set, every row goes by itself, so that each pass has the same shape without idle rows.
        """
        self._require_fits(int(self.lengths.max()) + len(tokens))
        block = self.block if self.block is None or len(tokens) < FEWEST else 1
        return self._passes(tokens.expand(len(self), -1), block)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64); cheapest if those that stay keep their places."""
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        if len(moved):
            sources = rows[moved]
            columns = int(self.lengths[sources].max())
            if bool((sources < count).any()):  # one would overwrite another
                self._slots = self._slots.select(rows, self._slots.columns, self._padded(count) - count)
            else:
                self._slots.copy(moved, self._slots, sources, columns)
        self.logits, self.states, self.lengths = self.logits[rows], self.states[rows], self.lengths[rows]

    def fork(self, rows: Tensor) -> SlotReader:
        """Return an independent reader of the given rows (int64, repetitions allowed): one prompt, many samples."""
        other = SlotReader(self.forward, self.context, self.block)
        other.logits, other.states, other.lengths = self.logits[rows], self.states[rows], self.lengths[rows]
        columns = -(-int(other.lengths.max()) // SPAN) * SPAN
        room = self._padded(len(rows)) - len(rows) if len(rows) > 1 else 0  # single rows are kept rather than read
        other._slots = self._slots.select(rows, min(columns, self._slots.columns), room)
        return other

    def reserve(self, rows: int) -> None:
        """Make room for so many rows at once, before several readers join."""
        self._slots.reserve(self._padded(rows), self._slots.columns)

    def join(self, other: SlotReader, repeats: int = 1) -> None:
        """Take over every row of another reader, `repeats` times each, behind one's own rows."""
        start, rows = len(self), torch.arange(len(other), device=other.lengths.device).repeat_interleave(repeats)
        columns = min(-(-int(other.lengths.max()) // SPAN) * SPAN, other._slots.columns)
        self._slots.reserve(self._padded(start + len(rows)), columns)
        self._slots.copy(start + torch.arange(len(rows), device=rows.device), other._slots, rows, columns)
        self.logits = torch.cat([self.logits, other.logits[rows]])
        self.states = torch.cat([self.states, other.states[rows]])
        self.lengths = torch.cat([self.lengths, other.lengths[rows]])

    @property
    def bytes(self) -> int:
        """How much memory it holds."""
        slots = [tensor for pair in self._slots.layers for tensor in pair]
        return sum(tensor.numel() * tensor.element_size() for tensor in [self.logits, self.states, *slots])

    def _passes(self, tokens: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
        """Read tokens [R, m] behind every row, in passes of `block` rows; do not count them as read."""
        rows, length = tokens.shape
        last = torch.full((rows,), length - 1, device=tokens.device)
        if block is None:
            return self._pass(tokens, 0, rows, last)
        parts = [
            self._pass(tokens[at : at + block], at, min(at + block, rows), last[at : at + block], fewest=block)
            for at in range(0, rows, block)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _pass(self, tokens: Tensor, start: int, stop: int, last: Tensor, fewest: int = FEWEST) -> tuple[Tensor, Tensor]:
        rows, length = stop - start, tokens.shape[1]
        lengths = self.lengths[start:stop]
        idle = max(0, fewest - rows)
        if idle:  # they write at the beginning of slots that no row has
            tokens = torch.cat([tokens, tokens.new_zeros(idle, length)])
            lengths, last = torch.cat([lengths, lengths.new_zeros(idle)]), torch.cat([last, last.new_zeros(idle)])
        columns = int(lengths.max()) + length
        if columns > self._slots.columns or stop + idle > self._slots.rows:
            grown = max(columns, min(2 * self._slots.columns, columns + 8 * SPAN))
            self._slots.reserve(stop + idle, -(-grown // SPAN) * SPAN)
        positions = lengths[:, None] + torch.arange(length, device=tokens.device)
        logits, states = self.forward(tokens, SlotView(self._slots, (start, stop + idle), positions), last)
        return logits[:rows], states[:rows]

    def _padded(self, rows: int) -> int:
        """Return the number of slots that passes over so many rows need."""
        return max(rows, FEWEST) if self.block is None else -(-rows // self.block) * self.block

    def _require_fits(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise DataError(f"tokens: expected at most {self.context} in a row (the model's context), found {length}")


def right_padded(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts that were padded on the left [P, L] as int64 [P, longest] padded on the right, and lengths."""
    lengths = prompt_lengths(mask)
    longest = int(lengths.max())
    index = torch.arange(longest, device=prompts.device) + (prompts.shape[1] - lengths)[:, None]
    return prompts.gather(1, index.clamp(max=prompts.shape[1] - 1)), lengths


def require_room(longest: int, max_new_tokens: int, context: int | None) -> None:
    """Check that a prompt and its completion fit.

    Raises:
        DataError: they do not.
    """
    if context is not None and longest + max_new_tokens > context:
        raise DataError(
            f"prompt of {longest} tokens and {max_new_tokens} new ones: expected at most {context} in all (the "
            "model's context)"
        )
