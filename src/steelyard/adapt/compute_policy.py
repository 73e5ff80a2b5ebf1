"""How much to sample: temperatures, when to stop, what to prune, budgets, and the record of what was done.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation"
(arXiv 2410.02725). A score is P(no fresh sample would be better), the model's own estimate: `objectives/self_eval.py`.

Rules are pure functions of scores; they know no model. `adapt/best_of_n.py` carries them out over a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TemperatureSchedule(Config):
    """The temperature of the k-th sample of a prompt."""

    kind: Literal["constant", "annealed", "greedy_first"] = "annealed"
    """constant: always `high`; annealed: high (1 - 2^-(k-1)), so greedy, then 0.5, 0.75, ...; greedy_first: 0, then
    `high`."""
    high: float = 1.0
    """The (final) temperature."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, math.inf, "high")

    def of(self, sample: int) -> float:
        """Return the temperature of sample number `sample`, counted from 0."""
        if self.kind == "constant":
            return self.high
        if self.kind == "greedy_first":
            return 0.0 if sample == 0 else self.high
        return self.high * (1 - 2.0**-sample)


@dataclass(frozen=True)
class StopRule(Config):
    """When a prompt has been sampled enough, from the scores of its finished samples."""

    kind: Literal["threshold", "expected_gain", "never"] = "threshold"
    """threshold: when the best score reaches `threshold`; expected_gain: when the chance that one more sample is better
    times `gain` falls below `cost` (Weitzman's rule with equal boxes); never: the budget alone ends it."""
    threshold: float = 0.9
    """Of the best score (after shrinking)."""
    prior_strength: float = 0.0
    """a: after j samples without success the chance of a better one is multiplied by a / (a + j), the mean of a Beta
    posterior; 0: not at all, as in the paper."""
    gain: float = 1.0
    """What a better sample is worth."""
    cost: float = 0.05
    """What a sample costs, in the same units."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, 1.01, "threshold")
        require_range(self, 0, math.inf, "prior_strength", "gain", "cost")

    def stops(self, scores: Floats) -> bool:
        """Return whether to stop after finished samples with these scores [k], k >= 1, in the order drawn."""
        if self.kind == "never":
            return False
        better = 1 - float(np.max(scores))
        if self.prior_strength:
            better *= self.prior_strength / (self.prior_strength + len(scores) - 1)
        if self.kind == "expected_gain":
            return better * self.gain < self.cost
        return 1 - better >= self.threshold


@dataclass(frozen=True)
class PruneRule(Config):
    """Which unfinished samples are given up at a checkpoint."""

    kind: Literal["none", "quantile", "absolute", "both", "random"] = "none"
    """quantile: the lowest `fraction` of a prompt's live samples; absolute: scores below `threshold`; both: samples
    that either would drop; random: `fraction`, whatever the scores (a baseline)."""
    at: tuple[int, ...] = (32, 64)
    """Token counts of the checkpoints."""
    fraction: float = 0.5
    """Of the samples that were started, in all: dropped in equal steps over the checkpoints."""
    threshold: float = 0.1
    """For absolute."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "at")
        require_range(self, 0, 1, "fraction", "threshold")
        if list(self.at) != sorted(set(self.at)):
            raise ConfigError(f"at must be increasing token counts, found {self.at}")


@dataclass(frozen=True)
class Budget(Config):
    """Limits per prompt."""

    max_samples: int = 16
    """Samples started."""
    max_tokens: int | None = None
    """Tokens decoded for a prompt; no wave is started that could exceed it. None: no limit."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_samples", "max_tokens")


@dataclass(frozen=True)
class ComputePolicy(Config):
    """How a prompt is sampled."""

    temperatures: TemperatureSchedule = field(default_factory=TemperatureSchedule)
    """Of the samples in turn."""
    stop: StopRule = field(default_factory=StopRule)
    """When enough is enough."""
    prune: PruneRule = field(default_factory=PruneRule)
    """What is given up early."""
    budget: Budget = field(default_factory=Budget)
    """Limits."""
    waves: tuple[int, ...] = (1,)
    """Samples started together in each wave; the last number repeats. (1,) saves most tokens, (1, 1, 2, 4, 8) bounds
    the latency at five rounds for 16 samples, (16,) is best of 16 at once."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.waves:
            raise ConfigError("waves must not be empty")
        require_positive(self, "waves")

    def wave(self, number: int) -> int:
        """Return how many samples wave `number` (from 0) starts."""
        return self.waves[min(number, len(self.waves) - 1)]


@dataclass(frozen=True)
class Request:
    """One sample to draw: sample number `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    temperature: float


@dataclass(frozen=True)
class Draw:
    """A sample that was drawn, or given up.

    Attributes:
        request: what was asked.
        text: the completion (so far).
        tokens: its ids; empty in a replay of texts.
        score: P(no fresh sample would be better) at the end; NaN if given up or not evaluated.
        checkpoint_scores: {tokens read: score} on the way.
        logp: sum of token log-probs at temperature 1; NaN where unknown.
        certainty: mean self-certainty of its tokens; NaN where unknown.
        finished: ended by itself (not by the limit).
        pruned_at: tokens after which it was given up; None: it was carried to its end.
        decoded: tokens decoded.
        evaluated: extra tokens read for self-evaluations.
        reward: where it is known (replay); NaN otherwise.
        answer: extracted for votes; "" where there is none.
    """

    request: Request
    text: str
    tokens: tuple[int, ...]
    score: float
    checkpoint_scores: dict[int, float]
    logp: float
    certainty: float
    finished: bool
    pruned_at: int | None
    decoded: int
    evaluated: int
    reward: float = math.nan
    answer: str = ""


Keep = Callable[[int, Sequence[Request], Floats], Sequence[bool]]
"""(tokens read, live requests, their scores) -> which to carry on."""


class Backend(Protocol):
    """Draws samples; a language model, an engine, or a pool of old samples.

    What a sample is depends on (seed, prompt, sample number, temperature) only: not on which others are drawn beside
    it, in which wave, or which of them are given up.

    Attributes:
        max_new_tokens: tokens of the longest sample it can draw.
    """

    max_new_tokens: int

    def draw(self, requests: Sequence[Request], checkpoints: Sequence[int], keep: Keep | None) -> list[Draw]:
        """Draw a wave.

        Args:
            requests: of any prompts given to the backend before.
            checkpoints: token counts at which scores of live samples are read; empty: never before the end.
            keep: asked at each checkpoint; None: all are carried on.

        Returns:
            One per request, in their order.
        """
        ...


@dataclass(frozen=True)
class Trace:
    """What was done for one prompt.

    Attributes:
        draws: in the order of their sample numbers.
        chosen: position in `draws` of the answer: the highest score among those carried to their end.
        stopped: "threshold", "expected_gain", "max_samples", "max_tokens".
        waves: rounds it took.
    """

    draws: tuple[Draw, ...]
    chosen: int
    stopped: str
    waves: int

    @property
    def samples(self) -> int:
        """Samples started."""
        return len(self.draws)

    @property
    def decoded(self) -> int:
        """Tokens decoded."""
        return sum(draw.decoded for draw in self.draws)

    @property
    def evaluated(self) -> int:
        """Tokens read for self-evaluations."""
        return sum(draw.evaluated for draw in self.draws)
