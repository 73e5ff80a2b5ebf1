"""Samples of a language model, drawn with an own decode loop: the backend of `adapt/best_of_n.py` that needs a model.

A prompt is read once and kept for later waves; its samples are copies of that row. Every row has its own temperature
and its own random numbers, keyed by (seed, key of the prompt, number of the sample), one uniform number a token. When
a row ends or is given up, another takes its place.

A self-evaluation looks aside and is forgotten (`nets/slots.py`): a sample is the same with and without it. After the
last token the evaluation is made before EOS is read, as its training did (`objectives/self_eval.py`).

What a sample is does not depend on its company up to the rounding of logits: how many rows a matrix product has can
change the last bits of each, and so decide a tie between neighbours. Passes of at least four rows were bit for bit
alike where it was measured (`docs/best_of_n.md`). `exact` needs no such luck: every pass has the same shape.

Shapes: R rows being decoded, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steelyard.adapt.compute_policy import Draw, Keep, Request
from steelyard.envs.samplers import SamplingConfig, draw, row_uniforms
from steelyard.errors import ConfigError, DataError
from steelyard.nets.self_eval import Evaluator
from steelyard.nets.slots import SlotReader
from steelyard.nets.tiny_lm import TinyLM

OnStep = Callable[[Sequence[Request], Sequence[int]], None]
"""(requests being decoded, the token just drawn for each)."""


class _Row:
    """A sample being drawn."""

    def __init__(self, number: int, request: Request, draws: Tensor) -> None:
        self.number, self.request, self.draws = number, request, draws
        self.tokens: list[int] = []
        self.score, self.checkpoint_scores = math.nan, dict[int, float]()
        self.logp = self.certainty = 0.0
        self.before_eos = (0.0, 0.0, 0.0)  # tokens, the sum of their log-probs, the lowest of them
        self.finished, self.evaluations = False, 0
        self.pruned_at: int | None = None


class ModelBackend:
    """Draws samples of prompts from a model of this library (`adapt.compute_policy.Backend`).

    Args:
        model: a `nets.lm.CausalLM` or `nets.tiny_lm.TinyLM`; its weights must not change while this is in use.
        evaluator: scores samples; None: scores are NaN.
        config: longest sample, top-k and top-p; its temperature is not read, for each request has its own.
        seed: of the random numbers.
        prompts: token ids.
        keys: what tells prompts apart for the random numbers; None: 0, 1, ....
        eos: ends a sample; by default the tokenizer's; a TinyLM has none.
        decode: token ids -> text; by default the tokenizer's; "" for a TinyLM.
        rows: samples decoded at a time; a wave of one prompt is never split. By default 16; 256 for a TinyLM.
        exact: every pass has `rows` rows, idle ones included, prompts and evaluations go one by one.
        on_step: called after every step; what it raises ends the draw.
        memory: bytes of prompts that are kept for later waves; those used least recently are read again.

    Attributes:
        max_new_tokens: longest sample.
        prefills: prompts read so far.

    Raises:
        ConfigError: the model cannot be read through slots.
        DataError: a prompt is empty, or does not fit with its sample and the evaluation into the context.
    """

    def __init__(
        self,
        model: Any,
        evaluator: Evaluator | None,
        config: SamplingConfig,
        seed: int,
        prompts: Sequence[Sequence[int]],
        *,
        keys: Sequence[int] | None = None,
        eos: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        rows: int | None = None,
        exact: bool = False,
        on_step: OnStep | None = None,
        memory: int = 1 << 30,
    ) -> None:
        tokenizer = getattr(model, "tokenizer", None)
        self.evaluator, self.seed, self.prompts, self.on_step = evaluator, seed, prompts, on_step
        self.config = dataclasses.replace(config, temperature=1.0)
        self.max_new_tokens, self.memory = config.max_new_tokens, memory
        self.rows = rows or (256 if isinstance(model, TinyLM) else 16)
        self.keys = list(range(len(prompts))) if keys is None else list(keys)
        self.eos = eos if eos is not None or tokenizer is None else tokenizer.eos
        self.decode = decode or (tokenizer.decode if tokenizer is not None else lambda _: "")
        self.block = self.rows if exact else None
        self.prefills = 0
        self._context: int | None = model.context
        self._forward = model.slot_forward()
        self._device = next(model.parameters()).device
        self._reserved = list(evaluator.reserved) if evaluator is not None else []
        self._kept: OrderedDict[int, SlotReader] = OrderedDict()
        self._require_prompts()

    @torch.no_grad()
    def draw(
        self, requests: Sequence[Request], checkpoints: Sequence[int] = (), keep: Keep | None = None
    ) -> list[Draw]:
        """Draw a wave (`adapt.compute_policy.Backend.draw`).

        Raises:
            DataError: a request for a prompt that is not there, or two of the same sample.
        """
        rows = self._started(requests)
        waiting = deque(_groups(rows, together=keep is not None))
        live: list[_Row] = []
        reader: SlotReader | None = None
        while live or waiting:
            reader = self._admit(waiting, live, reader)
            tokens = self._step(live, reader)
            if self.on_step is not None:
                self.on_step([row.request for row in live], tokens)
            # EOS is not read: an evaluation closes the turn in its own words
            ended = [place for place, row in enumerate(live) if row.finished]
            self._score(live, reader, ended, None)
            # without an evaluator nobody asks what follows the last token either
            ended += [
                place
                for place, row in enumerate(live)
                if not row.finished and self.evaluator is None and len(row.tokens) == self.max_new_tokens
            ]
            going = self._drop(live, reader, set(ended))
            if not live:
                continue
            reader.read(torch.tensor([tokens[place] for place in going], device=self._device))
            self._look(live, reader, checkpoints, keep)
        return [self._drawn(row) for row in rows]

    def _started(self, requests: Sequence[Request]) -> list[_Row]:
        for request in requests:
            if not 0 <= request.prompt < len(self.prompts):
                raise DataError(f"request for prompt {request.prompt}: expected a number below {len(self.prompts)}")
        if len({(request.prompt, request.sample) for request in requests}) < len(requests):
            raise DataError("requests: expected every sample of a prompt once, found one twice")
        keys = torch.tensor([self.keys[request.prompt] for request in requests], dtype=torch.int64)
        samples = torch.tensor([request.sample for request in requests], dtype=torch.int64)
        draws = row_uniforms(self.seed, 0, keys, samples, self.max_new_tokens)
        return [_Row(number, request, draws[number]) for number, request in enumerate(requests)]

    # prompts

    def _admit(self, waiting: deque[list[_Row]], live: list[_Row], reader: SlotReader | None) -> SlotReader:
        """Give free rows to those that wait."""
        entering: list[list[_Row]] = []
        count = len(live)
        while waiting and (count == 0 or count + len(waiting[0]) <= self.rows):
            group = waiting.popleft()
            count += len(group)
            if entering and entering[-1][0].request.prompt == group[0].request.prompt:
                entering[-1] += group
            else:
                entering.append(group)
        if not entering:  # as at most steps
            assert reader is not None
            return reader
        self._read_prompts([group[0].request.prompt for group in entering])
        for group in entering:
            prompt = self._kept[group[0].request.prompt]
            if reader is None or not live:
                reader = prompt.fork(torch.zeros(len(group), dtype=torch.int64, device=self._device))
                reader.reserve(count)
            else:
                reader.join(prompt, len(group))
            live += group
        assert reader is not None
        # those in use are safe; of the others the oldest go first
        held = sum(kept.bytes for kept in self._kept.values())
        while len(self._kept) > 1 and held > self.memory:
            held -= self._kept.popitem(last=False)[1].bytes
        return reader

    def _read_prompts(self, numbers: Sequence[int]) -> None:
        missing = list(dict.fromkeys(number for number in numbers if number not in self._kept))
        if missing:
            lengths = torch.tensor([len(self.prompts[number]) for number in missing], device=self._device)
            tokens = torch.zeros(len(missing), int(lengths.max()), dtype=torch.int64, device=self._device)
            for row, number in enumerate(missing):
                tokens[row, : int(lengths[row])] = torch.tensor(list(self.prompts[number]), device=self._device)
            found = SlotReader.of_prompts(self._forward, self._context, tokens, lengths, self.block)
            for row, number in enumerate(missing):
                self._kept[number] = found.fork(torch.tensor([row], device=self._device))
            self.prefills += len(missing)
        for number in numbers:
            self._kept.move_to_end(number)

    # steps

    def _step(self, live: list[_Row], reader: SlotReader) -> list[int]:
        """Draw the next token of every row."""
        logits = reader.logits
        total = logits.sum(1)
        if self._reserved:
            total = total - logits[:, self._reserved].sum(1)
            logits = logits.clone()
            logits[:, self._reserved] = -math.inf
        count = logits.shape[1] - len(self._reserved)
        temperatures = torch.tensor([row.request.temperature for row in live], device=self._device)
        draws = torch.stack([row.draws[len(row.tokens)] for row in live]).to(self._device)
        tokens, logps = _drawn_tokens(logits, draws, temperatures, self.config)
        own = logits.gather(1, tokens[:, None])[:, 0]
        if bool((temperatures == 1).all()) and not self.config.truncated:
            normaliser = own - logps
        else:
            normaliser = logits.logsumexp(1)
        found = torch.stack([own - normaliser, normaliser - total / count - math.log(count)]).tolist()
        drawn: list[int] = tokens.tolist()
        for place, row in enumerate(live):
            row.tokens.append(drawn[place])
            row.logp += found[0][place]
            row.certainty += found[1][place]
            row.finished = drawn[place] == self.eos
            if not row.finished:
                row.before_eos = len(row.tokens), row.logp, min(row.before_eos[2], found[0][place])
        return drawn

    def _look(self, live: list[_Row], reader: SlotReader, checkpoints: Sequence[int], keep: Keep | None) -> None:
        """Score rows at a checkpoint or at the limit; drop those at the limit and those that are given up."""
        ended = [place for place, row in enumerate(live) if len(row.tokens) == self.max_new_tokens]
        self._score(live, reader, ended, None)
        gone = set(ended)
        for at in sorted({len(row.tokens) for row in live} & set(checkpoints)):
            places = [place for place, row in enumerate(live) if len(row.tokens) == at and place not in gone]
            if not places:
                continue
            self._score(live, reader, places, at)
            if keep is not None:
                scores = np.array([live[place].checkpoint_scores.get(at, math.nan) for place in places])
                answers = keep(at, [live[place].request for place in places], scores)
                for place, kept in zip(places, answers, strict=True):
                    if not kept:
                        live[place].pruned_at = at
                        gone.add(place)
        self._drop(live, reader, gone)

    def _score(self, live: list[_Row], reader: SlotReader, places: list[int], at: int | None) -> None:
        """Evaluate some rows as read so far; at: the checkpoint, None: the end."""
        if not places or self.evaluator is None:
            return
        parts = [places] if self.block is None else [[place] for place in places]
        scores: list[float] = []
        for part in parts:
            whole = len(part) == len(live)
            some = reader if whole else reader.fork(torch.tensor(part, device=self._device))
            drawn = torch.tensor([live[place].before_eos for place in part], device=self._device)
            scores += self.evaluator.score(some, drawn).tolist()
        for place, score in zip(places, scores, strict=True):
            live[place].evaluations += 1
            if at is None:
                live[place].score = score
            else:
                live[place].checkpoint_scores[at] = score

    def _drop(self, live: list[_Row], reader: SlotReader, gone: set[int]) -> list[int]:
        """Drop rows; return the old places of those that stay. The last ones fill the holes."""
        stay = [place for place in range(len(live)) if place not in gone]
        if gone:
            behind = [place for place in stay if place >= len(stay)]
            stay = [place if place not in gone else behind.pop() for place in range(len(stay))]
            live[:] = [live[place] for place in stay]
            if live:
                reader.keep(torch.tensor(stay, device=self._device))
        return stay

    def _drawn(self, row: _Row) -> Draw:
        extra = self.evaluator.extra_tokens if self.evaluator is not None else 0
        return Draw(
            request=row.request,
            text=self.decode(row.tokens),
            tokens=tuple(row.tokens),
            score=row.score,
            checkpoint_scores=row.checkpoint_scores,
            logp=row.logp,
            certainty=row.certainty / len(row.tokens),
            finished=row.finished,
            pruned_at=row.pruned_at,
            decoded=len(row.tokens),
            evaluated=row.evaluations * extra,
        )

    def _require_prompts(self) -> None:
        if len(self.keys) != len(self.prompts):
            raise ConfigError(f"keys: expected one for each of {len(self.prompts)} prompts, found {len(self.keys)}")
        extra = self.evaluator.extra_tokens if self.evaluator is not None else 0
        for number, prompt in enumerate(self.prompts):
            if not len(prompt):
                raise DataError(f"prompt {number}: expected at least one token (a BOS will do), found none")
            needed = len(prompt) + self.max_new_tokens + extra
            if self._context is not None and needed > self._context:
                raise DataError(
                    f"prompt {number}: {len(prompt)} tokens, {self.max_new_tokens} new ones and {extra} of the "
                    f"evaluation: expected at most {self._context} in all (the model's context)"
                )


def _groups(rows: Sequence[_Row], together: bool) -> list[list[_Row]]:
    """Return rows in groups that enter at once: those of a prompt, where they are compared at checkpoints."""
    if not together:
        return [[row] for row in rows]
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.request.prompt, []).append(row)
    return list(groups.values())


def _drawn_tokens(logits: Tensor, draws: Tensor, temperatures: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and their log-probs [R] for logits [R, V], each row at its temperature."""
    warm = temperatures > 0
    if bool((temperatures == 1).all()):
        return draw(logits, draws, config)
    tokens, logps = logits.argmax(1), torch.zeros(len(logits), dtype=logits.dtype, device=logits.device)
    if bool(warm.any()):
        tokens[warm], logps[warm] = draw(logits[warm] / temperatures[warm, None], draws[warm], config)
    return tokens, logps
