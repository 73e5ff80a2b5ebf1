"""Text data for preference fine-tuning: rows (from `data/text_rows.py`) made into token batches.

What is trained on is decided here: which prompts and completions are cut, which completions and pairs are dropped, and
that every one of them is counted. Token ids lie flat in one array with offsets, so that a batch is a few array
operations.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.experience import FOREIGN, ExperienceBatch
from steelyard.data.text_rows import (
    Kind,
    Layout,
    TextData,
    TextRow,
    is_text_data,
    prompt_key,
    read_text_data,
    split,
    write_text_data,
)
from steelyard.data.tokenizer import Text, Tokenizer, repair_counts, repairs
from steelyard.errors import ConfigError, DataError

__all__ = [
    "Kind",
    "Layout",
    "TextData",
    "TextRow",
    "TokenReport",
    "TokenizedData",
    "Truncation",
    "encode_rows",
    "is_text_data",
    "prompt_key",
    "read_text_data",
    "split",
    "tokenize",
    "write_text_data",
]

Truncation = Literal["error", "keep_start", "keep_end"]
Ids = npt.NDArray[np.int32]
Indices = Sequence[int] | npt.NDArray[np.int64] | Tensor


@dataclass(frozen=True)
class TokenReport:
    """What tokenising cut and dropped.

    Attributes:
        rows, completions, pairs: given.
        prompts_cut, completions_cut: longer than allowed.
        empty: completions without a token besides EOS, dropped.
        identical: pairs of equal completions, dropped.
        identical_after_cut: pairs that differ only behind the cut, dropped.
        ties: pairs of equal reward (margin 0), dropped.
        rows_dropped: rows that had nothing left.
        repairs: `Tokenizer.counts` of these rows.
    """

    rows: int
    completions: int
    pairs: int
    prompts_cut: int = 0
    completions_cut: int = 0
    empty: int = 0
    identical: int = 0
    identical_after_cut: int = 0
    ties: int = 0
    rows_dropped: int = 0
    repairs: Mapping[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return what happened, a sentence each, with counts and shares."""
        found = (
            (self.prompts_cut, self.rows, "prompts were cut to the allowed length"),
            (self.completions_cut, self.completions, "completions were cut and so lost their EOS"),
            (self.empty, self.completions, "completions were empty and were dropped"),
            (self.identical, self.pairs, "pairs had equal chosen and rejected completions and were dropped"),
            (self.identical_after_cut, self.pairs, "pairs were equal after the cut and were dropped"),
            (self.ties, self.pairs, "pairs were ties and were dropped"),
            (self.rows_dropped, self.rows, "rows had nothing left and were dropped"),
        )
        return [
            f"{count} of {total} {words} ({count / total:.1%})" for count, total, words in found if count
        ] + repairs(self.repairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, for a log."""
        return asdict(self)


@dataclass
class _Ragged:
    """Rows of different lengths in one array."""

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: list[npt.NDArray[Any]], empty: npt.NDArray[Any]) -> _Ragged:
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        return cls(np.concatenate([empty, *rows]), np.concatenate([[0], np.cumsum(lengths)]))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def flat(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (positions in `values`, lengths) of the chosen rows, one row after the other."""
        lengths = self.lengths[rows]
        before = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.arange(lengths.sum()) - before + np.repeat(self.offsets[rows], lengths), lengths

    def padded(self, rows: npt.NDArray[np.int64], pad: int, left: bool) -> tuple[Tensor, Tensor]:
        """Return (int64 [R, longest], float32 mask [R, longest])."""
        positions, lengths = self.flat(rows)
        width = int(lengths.max(initial=0))
        mask = np.arange(width)[None] < lengths[:, None]
        if left:
            mask = mask[:, ::-1]
        tokens = np.full(mask.shape, pad, np.int64)
        tokens[mask] = self.values[positions]
        return torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.float32))


class TokenizedData:
    """Token ids of text data; index i is a row, that is a prompt with its completions.

    Attributes:
        data: the rows that were kept, in order.
        tokenizer: which made the ids.
        report: what was cut and dropped.
        row_offsets: int64 [R + 1]; row i has the completions row_offsets[i] ... row_offsets[i + 1] - 1.
    """

    def __init__(
        self,
        data: TextData,
        tokenizer: Tokenizer,
        report: TokenReport,
        prompts: list[Ids],
        completions: list[list[Ids]],
    ) -> None:
        self.data, self.tokenizer, self.report = data, tokenizer, report
        self._prompts = _Ragged.of(prompts, np.zeros(0, np.int32))
        self._completions = _Ragged.of([ids for row in completions for ids in row], np.zeros(0, np.int32))
        self.row_offsets = np.concatenate([[0], np.cumsum([len(row) for row in completions])]).astype(np.int64)
        self._pairs = _Ragged.of(
            [np.array(row.pairs, np.int64).reshape(-1, 2) for row in data.rows], np.zeros((0, 2), np.int64)
        )
        self._margins = np.array([margin for row in data.rows for margin in row.margins()], np.float32)
        self._labels = self._per_completion("labels")
        self._rewards = self._per_completion("rewards")

    def _per_completion(self, name: str) -> npt.NDArray[np.float32] | None:
        values = [getattr(row, name) for row in self.data.rows]
        if all(value is None for value in values):
            return None
        filled = [(math.nan,) * len(row.completions) if value is None else value
                  for row, value in zip(self.data.rows, values, strict=True)]  # fmt: skip
        return np.array([number for row in filled for number in row], np.float32)

    @property
    def kind(self) -> Kind:
        """Kind of the rows."""
        return self.data.kind

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the token ids and of how they belong together, e.g. to key a cache of reference log-probs."""
        digest = hashlib.sha256(self.row_offsets.tobytes())
        for ragged in (self._prompts, self._completions, self._pairs):
            digest.update(ragged.offsets.tobytes() + np.ascontiguousarray(ragged.values).tobytes())
        return digest.hexdigest()

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt, int64 [R]."""
        return self._prompts.lengths

    @property
    def completion_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each completion, EOS included, int64 [N]."""
        return self._completions.lengths

    def __len__(self) -> int:
        """Return the number of rows kept."""
        return len(self.data.rows)

    def batch(self, indices: Indices) -> ExperienceBatch:
        """Return rows as a batch; padding is as long as the longest row asks for.

        Args:
            indices: of rows; a row may come twice and is then two prompts.
        """
        rows = _rows(indices)
        prompts, prompt_mask = self._prompts.padded(rows, self.tokenizer.pad, left=True)
        numbers, sizes = _Ragged(np.arange(self.row_offsets[-1]), self.row_offsets).flat(rows)
        completions, scored_mask = self._completions.padded(numbers, self.tokenizer.pad, left=False)
        pairs = margins = None
        if self.kind == "preference":
            positions, pair_counts = self._pairs.flat(rows)
            first = np.repeat(np.cumsum(sizes) - sizes, pair_counts)  # number in the batch of a row's first completion
            pairs = torch.from_numpy(self._pairs.values[positions] + first[:, None])
            known = self._margins[positions]
            margins = None if np.isnan(self._margins).all() else torch.from_numpy(known)
        return ExperienceBatch(
            prompts,
            prompt_mask,
            completions,
            scored_mask,
            torch.from_numpy(np.repeat(np.arange(len(rows)), sizes)),
            rewards=None if self._rewards is None else torch.from_numpy(self._rewards[numbers]),
            labels=None if self._labels is None else torch.from_numpy(self._labels[numbers]),
            pairs=pairs,
            margins=margins,
            born=torch.full((len(numbers),), FOREIGN),
        )

    def prompts(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (prompts int64 [P, L], padded on the left, and their mask float32 [P, L])."""
        return self._prompts.padded(_rows(indices), self.tokenizer.pad, left=True)

    def texts(self, indices: Indices) -> list[Text]:
        """Return the prompts as they were given: strings or messages [P]."""
        return [self.data.rows[row].prompt for row in _rows(indices)]

    def completion_texts(self, indices: Indices) -> list[str]:
        """Return the completions of these rows in the batch's order [N], as they are after any cut."""
        return [self.tokenizer.decode(ids) for ids in self.completion_ids(indices)]

    def completion_ids(self, indices: Indices) -> list[list[int]]:
        """Return the token ids of the completions of these rows in the batch's order [N]."""
        numbers = [
            number for row in _rows(indices) for number in range(self.row_offsets[row], self.row_offsets[row + 1])
        ]
        offsets = self._completions.offsets
        return [self._completions.values[offsets[number] : offsets[number + 1]].tolist() for number in numbers]

    def columns(self, indices: Indices) -> dict[str, list[Any]]:
        """Return {column: values [P]} of all other columns; None where a row has none."""
        rows = [self.data.rows[row].columns for row in _rows(indices)]
        return {name: [row.get(name) for row in rows] for name in self._column_names}

    @cached_property
    def _column_names(self) -> list[str]:
        return sorted({name for row in self.data.rows for name in row.columns})


def _rows(indices: Indices) -> npt.NDArray[np.int64]:
    return np.asarray(indices, np.int64).reshape(-1)


def tokenize(
    data: TextData,
    tokenizer: Tokenizer,
    max_prompt_tokens: int = 512,
    max_completion_tokens: int = 512,
    truncation: Truncation = "error",
) -> TokenizedData:
    """Turn text data into token ids; `report` of the result says what was cut and dropped.

    Args:
        data: rows of any kind.
        tokenizer: makes the ids.
        max_prompt_tokens: limit of a prompt.
        max_completion_tokens: limit of a completion with its EOS; a longer one keeps its start and loses EOS, for it
            did not end there.
        truncation: of longer prompts: "error", "keep_start" or "keep_end" (BOS stays in front).

    Raises:
        DataError: a prompt is too long under "error" (names the row), or nothing is left.
        ConfigError: a limit below 1, or an unknown rule.
    """
    if min(max_prompt_tokens, max_completion_tokens) < 1:
        raise ConfigError(
            f"max_prompt_tokens and max_completion_tokens must be at least 1, found {max_prompt_tokens} and "
            f"{max_completion_tokens}"
        )
    if truncation not in get_args(Truncation):
        raise ConfigError(f"truncation: expected 'error', 'keep_start' or 'keep_end', found {truncation!r}")
    tokenized = encode_rows(data, tokenizer, max_prompt_tokens, max_completion_tokens, truncation)
    if not len(tokenized):
        reasons = "; ".join(tokenized.report.sentences()) or "no rows"
        raise DataError(f"{data.source}: expected rows to train on, found none after tokenising: {reasons}")
    return tokenized


def encode_rows(
    data: TextData, tokenizer: Tokenizer, max_prompt_tokens: int, max_completion_tokens: int, truncation: Truncation
) -> TokenizedData:
    """As `tokenize`, but nothing may be left: for the doctor."""
    counts: Counter[str] = Counter()
    repaired = repair_counts(tokenizer)
    rows: list[TextRow] = []
    prompts: list[Ids] = []
    completions: list[list[Ids]] = []
    for row in data.rows:
        try:
            prompt = tokenizer.prompt(row.prompt)
            encoded = [tokenizer.completion(row.prompt, completion) for completion in row.completions]
        except DataError as error:
            raise DataError(f"{data.source}: {row.where}: {error}") from None
        if len(prompt) > max_prompt_tokens:
            counts["prompts_cut"] += 1
            prompt = _cut_prompt(prompt, tokenizer, max_prompt_tokens, truncation, f"{data.source}: {row.where}")
        cut = [ids[:max_completion_tokens] for ids in encoded]
        counts["completions_cut"] += sum(len(ids) > max_completion_tokens for ids in encoded)
        kept = [number for number, ids in enumerate(cut) if ids != [tokenizer.eos]]
        counts["empty"] += len(cut) - len(kept)
        pairs = []
        for pair, margin in zip(row.pairs, row.margins(), strict=True):
            chosen, rejected = pair
            if chosen not in kept or rejected not in kept:
                continue
            if cut[chosen] == cut[rejected]:
                counts["identical" if encoded[chosen] == encoded[rejected] else "identical_after_cut"] += 1
            elif margin == 0:
                counts["ties"] += 1
            else:
                pairs.append(pair)
        if (row.completions and not kept) or (row.pairs and not pairs):
            counts["rows_dropped"] += 1
            continue
        rows.append(row if len(kept) == len(cut) and len(pairs) == len(row.pairs) else _reduced(row, kept, pairs))
        prompts.append(np.array(prompt, np.int32))  # at once: lists of Python integers are nine times as large
        completions.append([np.array(cut[number], np.int32) for number in kept])
    report = TokenReport(
        rows=len(data.rows),
        completions=sum(len(row.completions) for row in data.rows),
        pairs=sum(len(row.pairs) for row in data.rows),
        repairs=dict(repair_counts(tokenizer) - repaired),
        **counts,
    )
    return TokenizedData(replace(data, rows=rows), tokenizer, report, prompts, completions)


def _cut_prompt(prompt: list[int], tokenizer: Tokenizer, limit: int, truncation: Truncation, where: str) -> list[int]:
    if truncation == "error":
        raise DataError(
            f"{where}: expected a prompt of at most {limit} tokens, found {len(prompt)}; raise max_prompt_tokens or "
            "choose the truncation keep_start or keep_end"
        )
    if truncation == "keep_start":
        return prompt[:limit]
    head = prompt[:1] if limit > 1 and prompt[0] == getattr(tokenizer, "bos", None) else []
    return head + prompt[len(prompt) - limit + len(head) :]


def _reduced(row: TextRow, kept: list[int], pairs: list[tuple[int, int]]) -> TextRow:
    """Return the row with these completions and pairs only."""
    new = {number: position for position, number in enumerate(kept)}
    return replace(
        row,
        completions=tuple(row.completions[number] for number in kept),
        labels=None if row.labels is None else tuple(row.labels[number] for number in kept),
        rewards=None if row.rewards is None else tuple(row.rewards[number] for number in kept),
        pairs=tuple((new[chosen], new[rejected]) for chosen, rejected in pairs),
    )
