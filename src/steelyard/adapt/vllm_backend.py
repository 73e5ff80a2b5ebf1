"""Samples through vLLM, on a GPU: the backend of `adapt/best_of_n.py` for models that an engine serves.

Thin, and tested with an engine that is made up: no GPU was at hand. A sample is a request with a seed of its own, so it
depends on (seed, key of the prompt, number of the sample) as far as the engine keeps its promises; batch-invariant
kernels are the engine's matter. Its draws are not those of `ModelBackend`. The prompt's cache is shared by the engine
(automatic prefix caching).

A self-evaluation is a further request for one token: prompt, completion so far and suffix, with the log-probs of the
two answers. At a checkpoint all samples pause: they are drawn in pieces that end there, and a sample that is given up
is simply not continued. Continuing it is a new request whose prefix is cached. So here, unlike with `ModelBackend`, a
sample that was paused is not the sample that would have been drawn at once; it is the same whenever it pauses at the
same checkpoints, whatever its company.

Asking for the log-probs of given tokens (`logprob_token_ids`) needs a recent vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steelyard.adapt.compute_policy import Draw, Keep, Request
from steelyard.envs.samplers import SamplingConfig, row_uniforms
from steelyard.errors import ConfigError, DataError, require
from steelyard.nets.self_eval import SuffixEvaluator


@dataclass(frozen=True)
class AskedSuffix:
    """How an engine is asked for a self-evaluation.

    Attributes:
        suffix: token ids of the question.
        yes: token id of "a fresh sample would be better".
        no: token id of "it would not".
        scale: of the difference of log-probs (Platt).
        offset: added to it.
        reserved: token ids that sampling must never draw.
    """

    suffix: tuple[int, ...]
    yes: int
    no: int
    scale: float = 1.0
    offset: float = 0.0
    reserved: tuple[int, ...] = ()

    @classmethod
    def of(cls, evaluator: SuffixEvaluator) -> AskedSuffix:
        """Return what a trained evaluator asks, with its calibration."""
        scale, offset = float(evaluator.scale), float(evaluator.offset)
        return cls(evaluator.suffix, evaluator.yes, evaluator.no, scale, offset, evaluator.reserved)


@dataclass
class _Sample:
    request: Request
    seed: int
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    finished: bool = False
    pruned_at: int | None = None
    score: float = math.nan
    checkpoint_scores: dict[int, float] = field(default_factory=dict)


class VLLMBackend:
    """Draws samples through an engine (`adapt.compute_policy.Backend`).

    Args:
        engine: a `vllm.LLM`, made with `enable_prefix_caching=True` and `logprobs_mode="raw_logprobs"`, so that
            log-probs are those at temperature 1; or anything with its `generate`.
        evaluator: how to ask; None: scores are NaN.
        config: longest sample, top-k and top-p; each request has its own temperature.
        seed: of the samples.
        prompts: token ids.
        eos: ends a sample.
        decode: token ids -> text.
        keys: what tells prompts apart; None: 0, 1, ....
        sampling_params: `vllm.SamplingParams`, or what stands in for it.

    Attributes:
        max_new_tokens: longest sample.
    """

    def __init__(
        self,
        engine: Any,
        evaluator: AskedSuffix | None,
        config: SamplingConfig,
        seed: int,
        prompts: Sequence[Sequence[int]],
        *,
        eos: int,
        decode: Callable[[Sequence[int]], str],
        keys: Sequence[int] | None = None,
        sampling_params: Callable[..., Any] | None = None,
    ) -> None:
        self.engine, self.evaluator, self.config, self.seed = engine, evaluator, config, seed
        self.prompts, self.eos, self.decode = prompts, eos, decode
        self.max_new_tokens = config.max_new_tokens
        self.keys = list(range(len(prompts))) if keys is None else list(keys)
        if len(self.keys) != len(prompts):
            raise ConfigError(f"keys: expected one for each of {len(prompts)} prompts, found {len(self.keys)}")
        self._params = sampling_params or require("vllm", "vllm").SamplingParams

    def draw(
        self, requests: Sequence[Request], checkpoints: Sequence[int] = (), keep: Keep | None = None
    ) -> list[Draw]:
        """Draw a wave (`adapt.compute_policy.Backend.draw`).

        Raises:
            DataError: the engine answers with something else than was asked.
        """
        samples = self._started(requests)
        live = samples
        stops = sorted({at for at in checkpoints if 0 < at < self.max_new_tokens})
        for until in [*stops, self.max_new_tokens]:
            self._continue(live, until)
            ended = [s for s in live if s.finished or len(s.tokens) == self.max_new_tokens]
            for sample, score in zip(ended, self._scores(ended), strict=True):
                sample.score = score
            live = [s for s in live if not s.finished and len(s.tokens) < self.max_new_tokens]
            if not live:
                break
            scores = self._scores(live)
            if self.evaluator is not None:
                for sample, score in zip(live, scores, strict=True):
                    sample.checkpoint_scores[until] = score
            if keep is not None:
                answers = keep(until, [sample.request for sample in live], np.array(scores))
                for sample, kept in zip(live, answers, strict=True):
                    sample.pruned_at = None if kept else until
                live = [sample for sample in live if sample.pruned_at is None]
        return [self._drawn(sample) for sample in samples]

    def _started(self, requests: Sequence[Request]) -> list[_Sample]:
        keys = torch.tensor([self.keys[request.prompt] for request in requests], dtype=torch.int64)
        numbers = torch.tensor([request.sample for request in requests], dtype=torch.int64)
        seeds = (row_uniforms(self.seed, 0, keys, numbers, 1)[:, 0] * 2**31).long().tolist()
        return [_Sample(request, seed) for request, seed in zip(requests, seeds, strict=True)]

    def _continue(self, live: Sequence[_Sample], until: int) -> None:
        """Draw on until so many tokens."""
        if not live:
            return
        config = self.config
        forbidden = dict.fromkeys(self.evaluator.reserved, -100.0) if self.evaluator is not None else {}
        answers = self._ask(
            [[*self.prompts[sample.request.prompt], *sample.tokens] for sample in live],
            [
                self._params(
                    n=1,
                    temperature=sample.request.temperature,
                    top_p=config.top_p,
                    top_k=config.top_k or -1,
                    max_tokens=until - len(sample.tokens),
                    seed=(sample.seed + len(sample.tokens)) % 2**31,  # a piece must not repeat the last one's numbers
                    logprobs=0,
                    stop_token_ids=[self.eos],
                    detokenize=False,
                    logit_bias=forbidden or None,
                )
                for sample in live
            ],
        )
        for sample, found in zip(live, answers, strict=True):
            tokens = list(found.token_ids)
            if not 0 < len(tokens) <= until - len(sample.tokens):
                raise DataError(f"vLLM: expected 1 to {until - len(sample.tokens)} tokens, found {len(tokens)}")
            if found.logprobs is None or len(found.logprobs) != len(tokens):
                raise DataError(f"vLLM: expected a log-probability of each of {len(tokens)} tokens, found none")
            sample.tokens += tokens
            sample.logp += sum(entry[token].logprob for entry, token in zip(found.logprobs, tokens, strict=True))
            sample.finished = tokens[-1] == self.eos
            if not sample.finished and len(sample.tokens) < until:
                raise DataError(f"vLLM: expected {until} tokens or an end, found {len(sample.tokens)}")

    def _scores(self, samples: Sequence[_Sample]) -> list[float]:
        """Return P(no better) of samples as drawn so far, before EOS."""
        asked = self.evaluator
        if asked is None or not samples:
            return [math.nan] * len(samples)
        texts = [
            [*self.prompts[s.request.prompt], *(s.tokens[:-1] if s.finished else s.tokens), *asked.suffix]
            for s in samples
        ]
        parameters = self._params(
            n=1, temperature=0.0, max_tokens=1, logprob_token_ids=[asked.yes, asked.no], detokenize=False
        )
        scores = []
        for found in self._ask(texts, [parameters] * len(texts)):
            entry = found.logprobs[0] if found.logprobs else {}
            if asked.yes not in entry or asked.no not in entry:
                raise DataError(
                    "vLLM: expected the log-probs of both answers, found fewer; it must take logprob_token_ids"
                )
            difference = entry[asked.no].logprob - entry[asked.yes].logprob
            scores.append(1 / (1 + math.exp(-(asked.scale * difference + asked.offset))))
        return scores

    def _ask(self, texts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        answers = self.engine.generate([{"prompt_token_ids": list(text)} for text in texts], list(parameters))
        if len(answers) != len(texts):
            raise DataError(f"vLLM: expected {len(texts)} completions, found {len(answers)}")
        return [answer.outputs[0] for answer in answers]

    def _drawn(self, sample: _Sample) -> Draw:
        evaluations = len(sample.checkpoint_scores) + (not math.isnan(sample.score))
        extra = len(self.evaluator.suffix) if self.evaluator is not None else 0
        return Draw(
            request=sample.request,
            text=self.decode(sample.tokens),
            tokens=tuple(sample.tokens),
            score=sample.score,
            checkpoint_scores=sample.checkpoint_scores,
            logp=sample.logp,
            certainty=math.nan,
            finished=sample.finished,
            pruned_at=sample.pruned_at,
            decoded=len(sample.tokens),
            evaluated=evaluations * extra,
        )
