"""Text in, token batches out: a byte tokenizer, windows of a text file, and prompt-completion pairs.

A window is BOS followed by `context` bytes, so every byte of it is a target and a sample can start from BOS alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.batch import TokenBatch
from steelyard.data.sampler import Sampler, UniformSampler
from steelyard.errors import ConfigError, DataError

NUM_BYTES = 256


class ByteTokenizer:
    """Token ids 0..255 are bytes; BOS, EOS and PAD follow. Nothing to train, nothing unknown."""

    bos, eos, pad = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2
    vocab_size = NUM_BYTES + 3

    def encode(self, text: str | bytes, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the UTF-8 bytes of `text` as token ids, between the specials asked for."""
        data = text.encode() if isinstance(text, str) else text
        return [self.bos] * bos + list(data) + [self.eos] * eos

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens` without the specials; undoes `encode` exactly."""
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token: expected an id in 0..{self.vocab_size - 1}, found {token}")
        return bytes(token for token in ids if token < NUM_BYTES)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 (a model may write any) become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")


class TextSource:
    """Random windows of a text file; the end of the file is kept apart for validation.

    Args:
        path: any file; read as bytes through a memory map, so it may be larger than RAM.
        context: bytes C in a window.
        batch_size: windows B in a batch.
        seed: batches are a pure function of (seed, step).
        validation_fraction: share of the file, taken from its end, that no training window touches.

    Attributes:
        train_size: bytes that training windows are cut from.
        validation_size: bytes kept apart.
        sampler: where the windows of a step begin; wrap it in a `ShardedSampler` to train in several processes.

    Raises:
        DataError: the file is missing, empty or its training part is shorter than the context.
    """

    def __init__(
        self, path: str | Path, context: int, batch_size: int, seed: int, validation_fraction: float = 0.1
    ) -> None:
        self.path, self.context, self.batch_size = Path(path), context, batch_size
        if context < 1 or batch_size < 1:
            raise ConfigError(f"context and batch_size must be at least 1, found {context} and {batch_size}")
        if not 0 <= validation_fraction < 1:
            raise ConfigError(f"validation_fraction must lie in [0, 1), found {validation_fraction}")
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such text file")
        size = self.path.stat().st_size
        if size == 0:
            raise DataError(f"{self.path}: expected text, found an empty file")
        self.validation_size = int(size * validation_fraction)
        self.train_size = size - self.validation_size
        if self.train_size < context:
            raise DataError(
                f"{self.path}: expected at least {context} bytes of training text (the context), found "
                f"{self.train_size} of {size} bytes"
            )
        self._bytes: npt.NDArray[np.uint8] = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.sampler: Sampler = UniformSampler(self.train_size - context + 1, batch_size, seed, stream="text")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the file, in hex: the identity of the data."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def batch(self, step: int) -> TokenBatch:
        """Return the windows of training step `step`: tokens [B, C + 1]."""
        starts = self.sampler.indices(step)
        windows = self._bytes[starts[:, None] + np.arange(self.context)]
        return _with_bos(windows, np.ones(windows.shape, bool))

    def validation_batches(self, max_batches: int | None = None) -> Iterator[TokenBatch]:
        """Yield the validation text in file order, each byte scored once; the last window is padded.

        Args:
            max_batches: stop after this many batches; None reads all.
        """
        per_batch = self.batch_size * self.context
        starts = range(self.train_size, self.train_size + self.validation_size, per_batch)
        for start in starts[:max_batches]:
            data = self._bytes[start : start + per_batch]
            rows = -(-len(data) // self.context)
            windows = np.full((rows, self.context), ByteTokenizer.pad)
            windows.flat[: len(data)] = data
            yield _with_bos(windows, windows != ByteTokenizer.pad)

    def counters(self) -> dict[str, int]:
        """Return {}: the update step says it all."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return {}: every batch is a pure function of (seed, step)."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def completion_batch(
    pairs: Sequence[tuple[str, str]], tokenizer: ByteTokenizer, length: int | None = None
) -> TokenBatch:
    """Return rows BOS prompt completion EOS PAD..., scored on the completion and its EOS only.

    Args:
        pairs: (prompt, completion) of each row.
        tokenizer: gives the ids.
        length: tokens L of every row; None: the longest row's.

    Raises:
        DataError: a row is longer than `length`; nothing is cut off silently.
    """
    prompts = [tokenizer.encode(prompt, bos=True) for prompt, _ in pairs]
    completions = [tokenizer.encode(completion, eos=True) for _, completion in pairs]
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        row = int(np.argmax(lengths))
        raise DataError(f"text pair {row}: expected at most {length} tokens, found {lengths[row]}")
    tokens = torch.full((len(pairs), length), tokenizer.pad)
    scored_mask = torch.zeros(len(pairs), length)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor(prompt + completion)
        scored_mask[row, len(prompt) : lengths[row]] = 1.0
    return TokenBatch(tokens, scored_mask)


def _with_bos(windows: npt.NDArray[np.integer], scored: npt.NDArray[np.bool_]) -> TokenBatch:
    """Put BOS, which is never a target, in front of windows [B, C]."""
    tokens = np.concatenate([np.full((len(windows), 1), ByteTokenizer.bos), windows], axis=1).astype(np.int64)
    scored_mask = np.concatenate([np.zeros((len(windows), 1)), scored], axis=1).astype(np.float32)
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(scored_mask))
