"""Pools of samples: prompts x N completions of each, with everything known about them, on disk and resumable.

One pool serves many purposes: labels and training of a self-evaluation, its calibration, and the replay of any stopping
or pruning rule without a model. Built once (`workflows/sample_pool.py`) or imported.

On disk a folder: `pool.json` (how it was made, by content), and pieces `piece-00000.safetensors` of some prompts each,
written whole or not at all. Numbers are arrays, texts are bytes with offsets; nothing in it can run code.

Shapes: P prompts, N samples of each prompt (the same for all), K checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PromptSamples:
    """One prompt with its samples.

    Attributes:
        prompt: text, or "" where only ids are known.
        rewards: [N]; 0/1 where a verifier judged, else a score; NaN where unknown.
        lengths: [N] tokens decoded, EOS included.
        texts: N completions.
        tokens: N lists of token ids; empty lists where only texts are known.
        temperatures: [N] they were drawn at.
        logps: [N] sums of token log-probs under the policy at temperature 1; NaN where unknown.
        certainty: [N] mean over tokens of the distribution's distance from uniform (self-certainty); NaN where unknown.
        answers: N extracted answers for votes; "" where there is none.
        scores: [N] P(no fresh sample would be better) read at the end; NaN where not evaluated.
        checkpoint_scores: [N, K] the same read after `checkpoints[k]` tokens; NaN where the sample had ended before.
        stratum: what kind of prompt it is ("easy", ...), for tables.
        columns: anything else, JSON values.
    """

    prompt: str
    rewards: Floats
    lengths: npt.NDArray[np.int64]
    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    temperatures: Floats | None = None
    logps: Floats | None = None
    certainty: Floats | None = None
    answers: tuple[str, ...] = ()
    scores: Floats | None = None
    checkpoint_scores: Floats | None = None
    stratum: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.rewards)
        for name in ("lengths", "texts", "tokens", "temperatures", "logps", "certainty", "answers", "scores"):
            value = getattr(self, name)
            if value is not None and len(value) not in (0, n):
                raise DataError(f"samples of a prompt: {name} has {len(value)} entries, expected {n}")


@dataclass(frozen=True)
class SamplePool:
    """Prompts with their samples.

    Attributes:
        items: one per prompt.
        checkpoints: [K] token counts at which `checkpoint_scores` were read.
        source: where the samples come from, for messages and reports.
    """

    items: tuple[PromptSamples, ...]
    checkpoints: tuple[int, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[PromptSamples]:
        return iter(self.items)

    def take(self, rows: Sequence[int]) -> SamplePool:
        """Return the given prompts, in that order."""
        return SamplePool(tuple(self.items[row] for row in rows), self.checkpoints, self.source)

    def rewards(self) -> Floats:
        """Return rewards [P, N].

        Raises:
            DataError: prompts with different numbers of samples.
        """
        if len({len(item.rewards) for item in self.items}) > 1:
            raise DataError(f"{self.source}: prompts have different numbers of samples")
        return np.stack([item.rewards for item in self.items])
