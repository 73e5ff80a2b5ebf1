r"""How a model says whether it would do better if it started over: three readers behind one interface.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute" (arXiv 2410.02725) ask in words and read one token
(`SuffixEvaluator`).
Their successor ZIP-RC (arXiv 2512.01457) reads reserved entries of the vocabulary in the same forward pass
(`SlotEvaluator`).
A small network on the hidden state leaves the policy untouched by construction (`ProbeEvaluator`).

All return P(no fresh sample would be better) of every row as far as it has been read, in the middle of a completion or
at its end.

Shapes: R rows, V vocabulary, W width, m suffix tokens.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class EvaluatingReader(Protocol):
    """A language model in the middle of reading rows (`envs.samplers.Reader`) that can also look aside.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
        states: [R, W], what the output head makes `logits` from.
        lengths: int64 [R], tokens read of each row, prompt included.
    """

    logits: Tensor
    states: Tensor
    lengths: Tensor

    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64)."""
        ...

    def peek(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [R, V], states [R, W]) after the tokens int64 [m] were read after every row, and forget them.

        What follows is exactly as if it had not been called.
        """
        ...

    def fork(self, rows: Tensor) -> EvaluatingReader:
        """Return an independent reader of the given rows (int64, repetitions allowed): one prompt, many samples."""
        ...


class Evaluator(Protocol):
    """Reads P(no better) off a model.

    Attributes:
        extra_tokens: tokens read for one evaluation of one row.
        reserved: token ids that sampling must never draw.
    """

    extra_tokens: int
    reserved: tuple[int, ...]

    def score(self, reader: EvaluatingReader) -> Tensor:
        """Return P(no fresh sample would be better) float32 [R] of every row as read so far."""
        ...
