"""Samplers: prompts in, completions out, with the log-probabilities of the distribution that really drew them.

The random numbers of a completion are a function of (seed, step, key of the prompt, number of the sample) only: one
uniform number a token, turned into a token by the inverse of the cumulative distribution. So a completion does not
depend on what else is in the batch, on the order of prompts or on how they are split (up to the rounding of logits,
which can decide a tie between neighbours).

Shapes: P prompts, n samples of each, N = P n completions (those of a prompt side by side), L prompt tokens,
T completion tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError, DataError, require
from steelyard.rng import derive_seed


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How completions are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens that together have this probability; 1 keeps all."""
    top_k: int = 0
    """Keep so many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 64
    """Longest completion, EOS included."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "top_p", "max_new_tokens")
        require_range(self, 0, math.inf, "temperature", "top_k")
        require_range(self, 0, 1, "top_p")

    @property
    def truncated(self) -> bool:
        """Whether tokens that the policy may write are never drawn, so that no temperature makes ratios exact."""
        return self.top_p < 1 or self.top_k > 0 or self.temperature == 0


@dataclass(frozen=True)
class Samples:
    """Drawn completions.

    Attributes:
        completions: int64 [N, T], padded on the right.
        scored_mask: float32 [N, T], 1 on the completion's tokens, EOS included.
        token_logps: float32 [N, T] under the distribution they were drawn from, after temperature, top-k and top-p; 0
            where not scored.
        prompt_of: int64 [N].
        finished: bool [N], whether the completion ended with EOS before the limit.
        config: how they were drawn.
    """

    completions: Tensor
    scored_mask: Tensor
    token_logps: Tensor
    prompt_of: Tensor
    finished: Tensor
    config: SamplingConfig

    @property
    def tempered(self) -> bool:
        """Whether they were drawn from anything but the policy itself.

        Ratios of policy to sampler are still exact when the policy's log-probs are taken at the same temperature, and
        never exact when the distribution was truncated (`config.truncated`).
        """
        return self.config.truncated or self.config.temperature != 1


class Sampler(Protocol):
    """Draws completions of prompts."""

    def sample(self, prompts: Tensor, prompt_mask: Tensor, n: int, *, seed: int, step: int, keys: Tensor) -> Samples:
        """Return n completions of each prompt.

        Args:
            prompts: int64 [P, L], padded on the left (features [P, D] in a bandit).
            prompt_mask: float32 [P, L].
            n: completions per prompt.
            seed: of the run.
            step: update step of the weights.
            keys: int64 [P], what tells prompts apart, e.g. their row in the data.
        """
        ...


class Reader(Protocol):
    """A language model in the middle of reading rows of tokens, each token once.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
    """

    logits: Tensor

    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64)."""
        ...


class LanguageModelSampler:
    """Samples from a language model of this library: one pass over each prompt, then all its completions together.

    Args:
        model: has `reader(prompts, prompt_mask, n, max_new_tokens) -> Reader`; its present weights are used.
        config: temperature and limits.
        eos: ends a completion; None: nothing does.
        pad: fills up completions.
    """

    COMPACT = 0.75
    """Finished rows are dropped when no more than this share is still being written."""

    def __init__(self, model: Any, config: SamplingConfig, eos: int | None, pad: int = 0) -> None:
        self.model, self.config, self.eos, self.pad = model, config, eos, pad

    @torch.no_grad()
    def sample(self, prompts: Tensor, prompt_mask: Tensor, n: int, *, seed: int, step: int, keys: Tensor) -> Samples:
        """Return n completions of each prompt."""
        require_prompts(prompts, n, keys)
        limit = self.config.max_new_tokens
        reader: Reader = self.model.reader(prompts, prompt_mask, n, limit)
        device = reader.logits.device
        draws = uniforms(seed, step, keys, n, limit).to(device)
        total = len(prompts) * n
        completions = torch.full((total, limit), self.pad, device=device)
        token_logps = torch.zeros(total, limit, device=device)
        lengths = torch.zeros(total, dtype=torch.int64, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        rows = torch.arange(total, device=device)  # which completion each row of the reader writes
        for position in range(limit):
            tokens, logps = draw(reader.logits, draws[rows, position], self.config)
            alive = ~finished[rows]
            written = rows[alive]
            completions[written, position] = tokens[alive]
            token_logps[written, position] = logps[alive].float()
            lengths[written] = position + 1
            if self.eos is not None:
                finished[written] = tokens[alive] == self.eos
                alive = ~finished[rows]
            if position + 1 == limit or not bool(alive.any()):
                break
            if int(alive.sum()) <= self.COMPACT * len(rows):
                kept = alive.nonzero()[:, 0]
                reader.keep(kept)
                rows, tokens = rows[kept], tokens[kept]
            reader.read(tokens)
        longest = int(lengths.max())
        scored = torch.arange(longest, device=device) < lengths[:, None]
        return Samples(
            completions[:, :longest],
            scored.float(),
            token_logps[:, :longest],
            torch.arange(len(prompts), device=device).repeat_interleave(n),
            finished,
            self.config,
        )


class TinySampler(LanguageModelSampler):
    """Samples from a `nets.tiny_lm.TinyLM`."""


class CausalLMSampler(LanguageModelSampler):
    """Samples from a `nets.lm.CausalLM`, whose tokenizer says how completions end.

    Args:
        model: a `nets.lm.CausalLM`; its present weights are used.
        config: temperature and limits.
    """

    def __init__(self, model: Any, config: SamplingConfig) -> None:
        super().__init__(model, config, model.tokenizer.eos, model.tokenizer.pad)


class CategoricalSampler:
    """Samples from categorical distributions that are independent given the prompt (bandits).

    Args:
        logits: prompts -> logits [P, A] or [P, T, A]; called at every sampling, so that present weights count.
        config: temperature, top-k and top-p; completions are as long as the logits say.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], config: SamplingConfig | None = None) -> None:
        self.logits, self.config = logits, config or SamplingConfig(max_new_tokens=1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, prompt_mask: Tensor, n: int, *, seed: int, step: int, keys: Tensor) -> Samples:
        """Return n completions of each prompt, one action a position."""
        require_prompts(prompts, n, keys)
        logits = self.logits(prompts)
        logits = logits[:, None] if logits.ndim == 2 else logits
        length = logits.shape[1]
        draws = uniforms(seed, step, keys, n, length).to(logits.device)
        actions, logps = draw(logits.repeat_interleave(n, 0).flatten(0, 1), draws.flatten(), self.config)
        prompt_of = torch.arange(len(prompts), device=logits.device).repeat_interleave(n)
        ones = torch.ones(draws.shape, device=logits.device)
        return Samples(
            actions.view(draws.shape), ones, logps.float().view(draws.shape), prompt_of, ones[:, 0] > 0, self.config
        )


class VLLMSampler:
    """Samples through vLLM, on a GPU, with the same protocol.

    Each completion is a request with its own seed, so it does not depend on the batch; the engine shares the prompt's
    cache between them. Its draws are its own: they are not those of `CausalLMSampler`.

    Args:
        engine: a `vllm.LLM` made with `logprobs_mode="processed_logprobs"` (after temperature, top-k and top-p), as
            `of_folder` does, or anything with its `generate`.
        config: temperature and limits.
        eos: ends a completion.
        pad: fills up completions.
        sampling_params: `vllm.SamplingParams`, or what stands in for it.
    """

    def __init__(
        self,
        engine: Any,
        config: SamplingConfig,
        eos: int,
        pad: int = 0,
        sampling_params: Callable[..., Any] | None = None,
    ) -> None:
        self.engine, self.config, self.eos, self.pad = engine, config, eos, pad
        self._params = sampling_params or require("vllm", "vllm").SamplingParams

    @classmethod
    def of_folder(cls, folder: str, config: SamplingConfig, eos: int, pad: int = 0, **options: Any) -> VLLMSampler:
        """Start an engine on the weights of a folder (`CausalLM.save_pretrained(folder, merged=True)`)."""
        engine = require("vllm", "vllm").LLM(model=folder, logprobs_mode="processed_logprobs", **options)
        return cls(engine, config, eos, pad)

    def sample(self, prompts: Tensor, prompt_mask: Tensor, n: int, *, seed: int, step: int, keys: Tensor) -> Samples:
        """Return n completions of each prompt.

        Raises:
            DataError: the engine answers with another number of completions, or without log-probs.
        """
        require_prompts(prompts, n, keys)
        config = self.config
        requests, parameters = [], []
        for prompt, mask, seeds in zip(prompts, prompt_mask, _seeds(seed, step, keys, n), strict=True):
            for own in seeds:
                requests.append({"prompt_token_ids": prompt[mask > 0].tolist()})
                parameters.append(
                    self._params(
                        n=1,
                        temperature=config.temperature,
                        top_p=config.top_p,
                        top_k=config.top_k or -1,
                        max_tokens=config.max_new_tokens,
                        seed=int(own >> np.uint64(33)),
                        logprobs=0,
                        stop_token_ids=[self.eos],
                        detokenize=False,
                    )
                )
        answers = self.engine.generate(requests, parameters)
        if len(answers) != len(requests):
            raise DataError(f"vLLM: expected {len(requests)} completions, found {len(answers)}")
        written = [answer.outputs[0] for answer in answers]
        longest = max(1, *(len(found.token_ids) for found in written))
        completions = torch.full((len(written), longest), self.pad)
        token_logps, scored_mask = torch.zeros(len(written), longest), torch.zeros(len(written), longest)
        for row, found in enumerate(written):
            tokens = list(found.token_ids)
            if found.logprobs is None or len(found.logprobs) != len(tokens):
                raise DataError(f"vLLM: expected a log-probability of each of {len(tokens)} tokens, found none")
            completions[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            scored_mask[row, : len(tokens)] = 1.0
            pairs = zip(found.logprobs, tokens, strict=True)
            token_logps[row, : len(tokens)] = torch.tensor([entry[token].logprob for entry, token in pairs])
        finished = torch.tensor([found.finish_reason == "stop" for found in written])
        prompt_of = torch.arange(len(prompts)).repeat_interleave(n)
        return Samples(completions, scored_mask, token_logps, prompt_of, finished, config)


def draw(logits: Tensor, draws: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and their log-probs [R] under the distribution that `config` makes of logits [R, V].

    Args:
        logits: the policy's.
        draws: float64 [R], uniform in [0, 1).
        config: temperature, top-k and top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if config.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), dtype=logits.dtype, device=logits.device)
    scaled = logits / config.temperature
    if config.top_k and config.top_k < scaled.shape[1]:
        least = scaled.topk(config.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    if config.top_p < 1:
        ordered, order = scaled.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        dropped = probabilities.cumsum(1) - probabilities >= config.top_p  # the token that reaches top_p stays
        scaled = scaled.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -math.inf)
    top = scaled.amax(1, keepdim=True)
    cumulative = (scaled - top).exp_().cumsum(1)
    total = cumulative[:, -1:]
    wanted = (draws[:, None] * total).to(cumulative.dtype)
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))  # rounding may have reached it
    tokens = torch.searchsorted(cumulative, wanted, right=True)
    return tokens[:, 0], (scaled.gather(1, tokens) - top - total.log())[:, 0]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the output of SplitMix64 (Steele, Lea, Flood 2014) at each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _seeds(seed: int, step: int, keys: Tensor, n: int) -> npt.NDArray[np.uint64]:
    """Return uint64 [P, n], the seed of each completion."""
    start = np.uint64(derive_seed(seed, "samples", step))
    of_prompt = _mix(start + _GOLDEN * (keys.cpu().numpy().astype(np.uint64) + np.uint64(1)))
    return _mix(of_prompt[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


def uniforms(seed: int, step: int, keys: Tensor, n: int, length: int) -> Tensor:
    """Return float64 [P * n, length], uniform in [0, 1): number t of sample j of the prompt with key k.

    Each completion has a SplitMix64 stream of its own, so a longer limit changes no earlier number.
    """
    seeds = _seeds(seed, step, keys, n).reshape(-1, 1)
    words = _mix(seeds + _GOLDEN * np.arange(1, length + 1, dtype=np.uint64))
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def row_uniforms(seed: int, step: int, keys: Tensor, samples: Tensor, length: int) -> Tensor:
    """Return float64 [R, length]: what `uniforms` gives sample `samples[r]` of key `keys[r]`."""
    start = np.uint64(derive_seed(seed, "samples", step))
    of_prompt = _mix(start + _GOLDEN * (keys.cpu().numpy().astype(np.uint64) + np.uint64(1)))
    seeds = _mix(of_prompt + _GOLDEN * (samples.cpu().numpy().astype(np.uint64) + np.uint64(1)))
    words = _mix(seeds[:, None] + _GOLDEN * np.arange(1, length + 1, dtype=np.uint64))
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def require_prompts(prompts: Tensor, n: int, keys: Tensor) -> None:
    """Check what a sampler was asked.

    Raises:
        ConfigError: fewer than one completion asked for.
        DataError: no prompts, or not one key each.
    """
    if n < 1:
        raise ConfigError(f"completions per prompt must be at least 1, found {n}")
    if len(prompts) < 1 or keys.shape != (len(prompts),):
        raise DataError(f"prompts to sample: expected one key for each, found {len(prompts)} and {list(keys.shape)}")


def texts(samples: Samples, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return the completions as text.

    Args:
        samples: what was drawn.
        decode: token ids -> text; drops EOS itself.
    """
    lengths = samples.scored_mask.sum(1).int().tolist()
    return [decode(row[:end].tolist()) for row, end in zip(samples.completions, lengths, strict=True)]
