"""Adaptive best of N: draw in waves, stop when no better sample is to be expected, give up unpromising ones early.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute" (arXiv 2410.02725). The rules are those of
`adapt/compute_policy.py`; the samples come from any `Backend`: a language model (`adapt/decoding.py`), an engine
(`adapt/vllm_backend.py`) or a pool of old samples (`adapt/replay.py`).

A wave goes over all undecided prompts together, but what is decided about a prompt depends on its own samples only.

Differences from the paper: its samples come one at a time or all at once, here in waves of any size; what a checkpoint
drops is counted among the samples that have not ended by themselves, and the last hope of a prompt is never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steelyard.adapt.compute_policy import Backend, ComputePolicy, Draw, Floats, PruneRule, Request, Trace
from steelyard.errors import ConfigError
from steelyard.rng import numpy_generator


@dataclass(frozen=True)
class Event:
    """Something that was decided.

    Attributes:
        kind: started: a wave of a prompt begins; pruned: one of its samples was given up; drawn: one was carried to its
            end; decided: the prompt is done.
        prompt: number of the prompt.
        wave: of the prompt, from 0.
        requests: of what was started.
        draw: the sample that was drawn or given up.
        trace: everything about a prompt that is decided.
    """

    kind: Literal["started", "pruned", "drawn", "decided"]
    prompt: int
    wave: int
    requests: tuple[Request, ...] = ()
    draw: Draw | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Ledger:
    """What a number of prompts cost.

    Attributes:
        prompts: number of prompts.
        samples: started.
        pruned: of these, given up.
        decoded: tokens.
        evaluated: tokens read for self-evaluations.
        waves: rounds of the prompt that took most.
        full_length: mean tokens of the samples that were carried to their end.
    """

    prompts: int
    samples: int
    pruned: int
    decoded: int
    evaluated: int
    waves: int
    full_length: float

    @property
    def mean_samples(self) -> float:
        """Samples started per prompt."""
        return self.samples / self.prompts

    @property
    def mean_tokens(self) -> float:
        """Tokens decoded per prompt."""
        return self.decoded / self.prompts

    @property
    def full_samples(self) -> float:
        """Tokens decoded per prompt in units of whole samples."""
        return self.mean_tokens / self.full_length


def ledger(traces: Sequence[Trace]) -> Ledger:
    """Return what prompts cost together.

    Raises:
        ConfigError: there are none.
    """
    if not traces:
        raise ConfigError("a ledger needs at least one prompt, found none")
    whole = [draw.decoded for trace in traces for draw in trace.draws if draw.pruned_at is None]
    samples = sum(trace.samples for trace in traces)
    return Ledger(
        prompts=len(traces),
        samples=samples,
        pruned=samples - len(whole),
        decoded=sum(trace.decoded for trace in traces),
        evaluated=sum(trace.evaluated for trace in traces),
        waves=max(trace.waves for trace in traces),
        full_length=float(np.mean(whole)),
    )


def sample(backend: Backend, prompts: int | Sequence[int], policy: ComputePolicy, *, seed: int = 0) -> list[Trace]:
    """Sample prompts until each is decided.

    Args:
        backend: draws samples.
        prompts: their numbers in the backend, or how many there are.
        policy: temperatures, stopping, pruning, budget, waves.
        seed: of random pruning.

    Returns:
        One trace per prompt, in their order.

    Raises:
        ConfigError: a rule reads scores that the backend does not give, or the budget is less than one sample.
    """
    numbers = _numbers(prompts)
    traces = {event.prompt: event.trace for event in stream(backend, numbers, policy, seed=seed) if event.trace}
    return [traces[number] for number in numbers]


def stream(backend: Backend, prompts: int | Sequence[int], policy: ComputePolicy, *, seed: int = 0) -> Iterator[Event]:
    """Do the same, and tell what is decided, wave by wave; arguments and errors as of `sample`."""
    numbers = _numbers(prompts)
    limit, longest = policy.budget.max_tokens, backend.max_new_tokens
    if limit is not None and limit < longest:
        raise ConfigError(f"max_tokens is {limit}, but one sample may take {longest}; raise it or shorten samples")
    checkpoints = () if policy.prune.kind == "none" else policy.prune.at
    undecided = {number: _Prompt(number, policy) for number in numbers}
    while undecided:
        waves = {number: prompt.start(longest) for number, prompt in undecided.items()}
        for number, wave in waves.items():
            yield Event("started", number, undecided[number].waves - 1, wave)
        pruner = _Pruner(policy.prune, seed, waves, {n for n, prompt in undecided.items() if prompt.carried})
        requests = [request for wave in waves.values() for request in wave]
        draws = backend.draw(requests, checkpoints, pruner.keep if checkpoints else None)
        for draw in draws:
            undecided[draw.request.prompt].add(draw)
            kind: Literal["drawn", "pruned"] = "drawn" if draw.pruned_at is None else "pruned"
            yield Event(kind, draw.request.prompt, undecided[draw.request.prompt].waves - 1, draw=draw)
        for number in list(undecided):
            stopped = undecided[number].stopped(longest)
            if stopped:
                prompt = undecided.pop(number)
                yield Event("decided", number, prompt.waves - 1, trace=prompt.trace(stopped))


def _numbers(prompts: int | Sequence[int]) -> list[int]:
    numbers = list(range(prompts)) if isinstance(prompts, int) else list(prompts)
    if len(set(numbers)) < len(numbers):
        raise ConfigError("prompts: expected every number once, found some twice")
    return numbers


class _Prompt:
    """One prompt on its way to a decision."""

    def __init__(self, number: int, policy: ComputePolicy) -> None:
        self.number, self.policy, self.waves = number, policy, 0
        self.draws: list[Draw] = []

    @property
    def carried(self) -> list[Draw]:
        return [draw for draw in self.draws if draw.pruned_at is None]

    def start(self, longest: int) -> tuple[Request, ...]:
        """Return the next wave."""
        first = len(self.draws)
        count = min(self.policy.wave(self.waves), self._room(longest))
        self.waves += 1
        return tuple(Request(self.number, k, self.policy.temperatures.of(k)) for k in range(first, first + count))

    def add(self, draw: Draw) -> None:
        self.draws.append(draw)

    def _room(self, longest: int) -> int:
        """Return how many samples the budget still allows."""
        budget = self.policy.budget
        room = budget.max_samples - len(self.draws)
        if budget.max_tokens is None:
            return room
        return min(room, (budget.max_tokens - sum(draw.decoded for draw in self.draws)) // longest)

    def stopped(self, longest: int) -> str:
        """Return why it is decided; "": it is not."""
        stop = self.policy.stop
        scores = np.array([draw.score for draw in self.carried])
        if stop.kind != "never":
            if np.isnan(scores).any():
                raise ConfigError(
                    f"stop rule {stop.kind!r} reads scores, but sample {self.draws[0].request.sample} of prompt "
                    f"{self.number} and its like have none; give the backend an evaluator, or stop by 'never'"
                )
            if len(scores) and stop.stops(scores):
                return stop.kind
        if len(self.draws) >= self.policy.budget.max_samples:
            return "max_samples"
        return "max_tokens" if self._room(longest) < 1 else ""

    def trace(self, stopped: str) -> Trace:
        draws = sorted(self.draws, key=lambda draw: draw.request.sample)
        carried = [place for place, draw in enumerate(draws) if draw.pruned_at is None]
        # the first of equals: the coolest one where temperatures rise
        chosen = max(carried, key=lambda place: (_or_least(draws[place].score), -place))
        return Trace(tuple(draws), chosen, stopped, self.waves)


def _or_least(score: float) -> float:
    return -math.inf if math.isnan(score) else score


class _Pruner:
    """Which live samples of a wave are carried on, prompt by prompt."""

    def __init__(self, rule: PruneRule, seed: int, waves: dict[int, tuple[Request, ...]], safe: set[int]) -> None:
        self.rule, self.seed, self.safe = rule, seed, safe
        self.started = {number: len(wave) for number, wave in waves.items()}
        self.dropped = dict.fromkeys(waves, 0)

    def keep(self, tokens: int, requests: Sequence[Request], scores: Floats) -> list[bool]:
        """Answer a backend's question (`compute_policy.Keep`)."""
        if self.rule.kind != "random" and np.isnan(scores).any():
            raise ConfigError(
                f"pruning by {self.rule.kind!r} reads scores, but the backend gives none; give it an evaluator, or "
                "prune by 'random'"
            )
        kept = [True] * len(requests)
        rows_of: dict[int, list[int]] = {}
        for row, request in enumerate(requests):
            rows_of.setdefault(request.prompt, []).append(row)
        for number, rows in rows_of.items():
            for row in self._drop(number, tokens, rows, requests, scores):
                kept[row] = False
                self.dropped[number] += 1
        return kept

    def _drop(
        self, number: int, tokens: int, rows: list[int], requests: Sequence[Request], scores: Floats
    ) -> Iterable[int]:
        rule = self.rule
        ended = self.started[number] - self.dropped[number] - len(rows)  # by themselves
        if rule.kind == "random":
            worth = {row: self._luck(requests[row]) for row in rows}
        else:
            worth = {row: float(scores[row]) for row in rows}
        # the worst first; of equals the later sample
        order = sorted(rows, key=lambda row: (worth[row], -requests[row].sample))
        passed = sum(at <= tokens for at in rule.at)
        # `fraction` of those that have not ended, in equal steps over the checkpoints
        quota = math.floor(rule.fraction * passed / len(rule.at) * (self.started[number] - ended) + 1e-9)
        below = sum(worth[row] < rule.threshold for row in rows)
        count = 0 if rule.kind == "absolute" else max(0, quota - self.dropped[number])
        if rule.kind in ("absolute", "both"):
            count = max(count, below)
        least = 0 if ended or number in self.safe else 1
        return order[: min(count, len(rows) - least)]

    def _luck(self, request: Request) -> float:
        return float(numpy_generator(self.seed, f"prune/{request.prompt}", request.sample).random())
