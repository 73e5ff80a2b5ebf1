"""Pools of samples: prompts x N completions of each, with everything known about them, on disk and resumable.

One pool serves many purposes: labels and training of a self-evaluation, its calibration, and the replay of any stopping
or pruning rule without a model (`adapt/replay.py`). Built once (`workflows/sample_pool.py`) or imported
(`data/sample_pool_imports.py`).

On disk a folder: `pool.json` (how it was made, by content), and pieces `piece-00000.safetensors` of some prompts each,
written whole or not at all (`data/sample_pool_files.py`). Numbers are arrays, texts are bytes with offsets; nothing in
it can run code.

Shapes: P prompts, N samples of each prompt (the same for all), K checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

Floats = npt.NDArray[np.float64]

PER_SAMPLE = (
    "lengths", "texts", "tokens", "temperatures", "logps", "certainty", "answers", "scores", "checkpoint_scores",
    "finished",
)  # fmt: skip
"""Fields of `PromptSamples` with one entry a sample, beside the rewards."""


@dataclass(frozen=True)
class PromptSamples:
    """One prompt with its samples.

    Attributes:
        prompt: text, or "" where only ids are known.
        rewards: [N]; 0/1 where a verifier judged, else a score; NaN where unknown.
        lengths: [N] tokens decoded, EOS included.
        texts: N completions.
        tokens: N lists of token ids; empty lists where only texts are known.
        temperatures: [N] they were drawn at; None where unknown.
        logps: [N] sums of token log-probs under the policy at temperature 1; NaN where unknown.
        certainty: [N] mean over tokens of the distribution's distance from uniform (self-certainty); NaN where unknown.
        answers: N extracted answers for votes; "" where there is none.
        scores: [N] P(no fresh sample would be better) read at the end; NaN where not evaluated.
        checkpoint_scores: [N, K] the same read after `checkpoints[k]` tokens; NaN where the sample had ended before.
        stratum: what kind of prompt it is ("easy", ...), for tables.
        columns: anything else, JSON values; a list of N numbers can serve as a selection criterion.
        prompt_tokens: the prompt's ids; empty where only its text is known.
        finished: bool [N], ended by itself and not by the limit; None where unknown.
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
    prompt_tokens: tuple[int, ...] = ()
    finished: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        n = len(self.rewards)
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is not None and len(value) not in (0, n):
                raise DataError(f"samples of a prompt: {name} has {len(value)} entries, expected {n}")

    def take(self, samples: Sequence[int]) -> PromptSamples:
        """Return the given samples, in that order; lists of N values in `columns` follow."""
        n = len(self.rewards)
        changes: dict[str, Any] = {"rewards": self.rewards[list(samples)]}
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is None or len(value) == 0:
                continue
            changes[name] = (
                value[list(samples)] if isinstance(value, np.ndarray) else tuple(value[row] for row in samples)
            )
        changes["columns"] = {
            name: [value[row] for row in samples] if isinstance(value, list) and len(value) == n else value
            for name, value in self.columns.items()
        }
        return replace(self, **changes)


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
        return self.array("rewards")

    def array(self, name: str) -> Floats:
        """Return a field of the samples, or a column of N numbers, as float64 [P, N] ([P, N, K] of checkpoint scores).

        Raises:
            DataError: a prompt lacks it, or prompts have different numbers of samples.
        """
        found = []
        for number, item in enumerate(self.items):
            value = item.columns.get(name) if name in item.columns else getattr(item, name, None)
            if value is None or np.ndim(value) == 0 or len(value) != len(item.rewards):
                raise DataError(f"{self.source}: prompt {number} has no {name!r} of its samples")
            found.append(np.array([np.nan if x is None else x for x in value], np.float64))
        if len({row.shape for row in found}) > 1:
            raise DataError(f"{self.source}: prompts have different numbers of samples")
        return np.stack(found)

    def with_scores(
        self,
        scores: Floats | Sequence[Floats],
        checkpoint_scores: Floats | Sequence[Floats] | None = None,
        checkpoints: tuple[int, ...] = (),
    ) -> SamplePool:
        """Return the same samples with other scores, e.g. another reader's, calibrated ones or P(correct).

        Args:
            scores: [N] for each prompt.
            checkpoint_scores: [N, K] for each prompt; None: none.
            checkpoints: [K] token counts they were read at.
        """
        k = len(checkpoints)
        items = []
        for number, item in enumerate(self.items):
            read = None if checkpoint_scores is None else np.asarray(checkpoint_scores[number], np.float64)
            if read is not None and read.shape != (len(item.rewards), k):
                raise DataError(
                    f"{self.source}: checkpoint scores of prompt {number}: expected shape "
                    f"{(len(item.rewards), k)}, found {read.shape}"
                )
            items.append(replace(item, scores=np.asarray(scores[number], np.float64), checkpoint_scores=read))
        return SamplePool(tuple(items), tuple(checkpoints), self.source)

    def save(self, path: str | Path, made_by: Mapping[str, Any] | None = None) -> Path:
        """Write the pool to a new folder and return it.

        Args:
            path: must not exist.
            made_by: JSON values that tell how it was made.
        """
        from steelyard.data.sample_pool_files import save_pool

        return save_pool(self, Path(path), made_by or {})

    @staticmethod
    def load(path: str | Path, prompts: int | None = None) -> SamplePool:
        """Read a pool, or its first `prompts` prompts; every piece is checked against its hash."""
        from steelyard.data.sample_pool_files import load_pool

        return load_pool(Path(path), prompts)

    @staticmethod
    def append(path: str | Path, items: Sequence[PromptSamples]) -> None:
        """Add prompts to a pool on disk: one piece, there wholly or not at all."""
        from steelyard.data.sample_pool_files import PoolFolder

        PoolFolder.open(Path(path)).append(items)
