"""Old samples as a backend: any stopping and pruning rule is tried on a pool, without a model and in milliseconds.

A replay answers a request for sample number k of a prompt with a sample of the pool that was drawn at the temperature
asked for. The order of samples that were drawn at the same temperature is arbitrary; another `order` tries another one,
and the mean over orders has less noise than any of them.

Huggingface's search-and-learn and Brown et al., "Large Language Monkeys" (arXiv 2407.21787) sample once and evaluate
smaller budgets from the same samples; this does it for adaptive ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from steelyard.adapt.compute_policy import Draw, Keep, Request
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import DataError
from steelyard.rng import numpy_generator


class ReplayBackend:
    """Draws from one pool, or from several pools of the same prompts (`adapt.compute_policy.Backend`).

    Sample number k at temperature T is sample number k of the first pool whose k-th sample was drawn at T. So a pool at
    temperature 1 and an annealed one together serve constant, annealed and greedy-first schedules. Where a pool does
    not know its temperatures (imported ones), T = 1 stands for "as they were drawn".

    Args:
        pools: the same prompts in the same order.
        order: permutes, prompt by prompt, the samples of one temperature; None: the order of the pool.
        extra_tokens: what the evaluator behind the pool's scores reads each time (`Evaluator.extra_tokens`).

    Attributes:
        max_new_tokens: of the longest sample there is.
    """

    def __init__(
        self, pools: SamplePool | Sequence[SamplePool], order: int | None = None, extra_tokens: int = 0
    ) -> None:
        self.pools = (pools,) if isinstance(pools, SamplePool) else tuple(pools)
        self.extra_tokens = extra_tokens
        if not self.pools or len({len(pool) for pool in self.pools}) > 1:
            raise DataError(f"replay: expected pools of the same prompts, found {[len(pool) for pool in self.pools]}")
        for number, items in enumerate(zip(*self.pools, strict=True)):
            if any(item.prompt != items[0].prompt for item in items):
                raise DataError(f"replay: prompt {number} is not the same in all pools")
        lengths = [int(item.lengths.max()) for pool in self.pools for item in pool if len(item.lengths)]
        self.max_new_tokens = max(lengths, default=0)
        self._temperatures = [[_temperatures(item) for item in pool] for pool in self.pools]
        self._positions = [
            [_positions(temperatures, order, pool, prompt) for prompt, temperatures in enumerate(found)]
            for pool, found in enumerate(self._temperatures)
        ]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.pools[0])

    def draw(self, requests: Sequence[Request], checkpoints: Sequence[int], keep: Keep | None) -> list[Draw]:
        """Return old samples; those that `keep` gives up end at that checkpoint.

        Raises:
            DataError: no pool holds such a sample, or it was not evaluated at a checkpoint.
        """
        found = [self._find(request) for request in requests]
        read: list[dict[int, float]] = [{} for _ in requests]
        pruned: dict[int, int] = {}
        for tokens in checkpoints:
            live = [row for row, (_, item, at) in enumerate(found) if row not in pruned and item.lengths[at] > tokens]
            if not live:
                continue
            for row in live:
                pool, item, at = found[row]
                if item.checkpoint_scores is not None:
                    read[row][tokens] = self._read(requests[row], pool, item, at, tokens)
            if keep is not None:
                scores = np.array([read[row].get(tokens, math.nan) for row in live])
                kept = keep(tokens, [requests[row] for row in live], scores)
                pruned |= {row: tokens for row, stays in zip(live, kept, strict=True) if not stays}
        return [
            self._drawn(requests[row], item, at, read[row], pruned.get(row)) for row, (_, item, at) in enumerate(found)
        ]

    def _find(self, request: Request) -> tuple[SamplePool, PromptSamples, int]:
        """Return the pool, the prompt's samples and the position among them."""
        if not 0 <= request.prompt < len(self):
            raise DataError(f"replay: no prompt {request.prompt}; the pool holds prompts 0..{len(self) - 1}")
        drawn_at = []
        for pool, temperatures, positions in zip(self.pools, self._temperatures, self._positions, strict=True):
            own = temperatures[request.prompt]
            if request.sample < len(own):
                if math.isclose(own[request.sample], request.temperature, abs_tol=1e-9):
                    return pool, pool.items[request.prompt], int(positions[request.prompt][request.sample])
                drawn_at.append(f"{own[request.sample]:g}")
        raise DataError(
            f"{self.pools[0].source or 'replay'}: no sample {request.sample} of prompt {request.prompt} at temperature "
            f"{request.temperature:g}; " + (f"that one was drawn at {' and '.join(drawn_at)}" if drawn_at else
            f"a prompt has {len(self.pools[0].items[request.prompt].rewards)} samples")
        )  # fmt: skip

    def _read(self, request: Request, pool: SamplePool, item: PromptSamples, at: int, tokens: int) -> float:
        if tokens not in pool.checkpoints or item.checkpoint_scores is None:
            raise DataError(f"{pool.source or 'replay'}: expected a checkpoint at one of {list(pool.checkpoints)} "
                            f"tokens, found {tokens}")  # fmt: skip
        score = float(item.checkpoint_scores[at, pool.checkpoints.index(tokens)])
        if math.isnan(score):
            raise DataError(
                f"{pool.source or 'replay'}: prompt {request.prompt}, sample {at} was not evaluated at {tokens} tokens"
            )
        return score

    def _drawn(
        self, request: Request, item: PromptSamples, at: int, read: dict[int, float], pruned: int | None
    ) -> Draw:
        ended = pruned is None
        length = int(item.lengths[at]) if pruned is None else pruned
        score = float(item.scores[at]) if ended and item.scores is not None else math.nan
        return Draw(
            request,
            item.texts[at] if ended and item.texts else "",  # texts are not cut: where, only their tokenizer knows
            item.tokens[at][:length] if item.tokens else (),
            score,
            read,
            float(item.logps[at]) if ended and item.logps is not None else math.nan,
            float(item.certainty[at]) if ended and item.certainty is not None else math.nan,
            ended and (item.finished is None or bool(item.finished[at])),
            pruned,
            length,
            self.extra_tokens * (len(read) + int(not math.isnan(score))),
            float(item.rewards[at]),
            item.answers[at] if item.answers else "",
        )


def _temperatures(item: PromptSamples) -> npt.NDArray[np.float64]:
    return np.ones(len(item.rewards)) if item.temperatures is None else item.temperatures


def _positions(
    temperatures: npt.NDArray[np.float64], order: int | None, pool: int, prompt: int
) -> npt.NDArray[np.int64]:
    """Return [N], which sample comes as the k-th: a permutation within each temperature."""
    positions = np.arange(len(temperatures))
    if order is not None:
        generator = numpy_generator(order, f"replay/{pool}", prompt)
        for temperature in np.unique(temperatures):
            same = np.flatnonzero(temperatures == temperature)
            positions[same] = generator.permutation(same)
    return positions
