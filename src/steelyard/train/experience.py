r"""Where the batches of preference fine-tuning come from, how often they are used, and how stale they grow.

Tajwar, Singh et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024),
section 3: two of the three axes that methods differ in are properties of the data, not of the loss.

    repeat:  D <- B prompts with completions: of the data set, of the policy (N each, scored), or a mixture
             repeat T times (sample reuse): in a new order, cut D into minibatches of M prompts, one update on each

| symbol | code |
|---|---|
| B | `prompts_per_refresh`, drawn together; B / M updates per pass |
| M | `minibatch_prompts` |
| N | `num_generations` |
| T | `reuse` |
| s | `sync_every`: the sampler gets the policy's weights at every s-th refresh (semi-online) |

Update u belongs to refresh u // (T B / M). Rows, order and samples are pure functions of (seed, step, weights), so a
checkpoint holds the buffer, the objective's memory and, for semi-online sampling, the sampler's weights.

Differences from the paper's released code: ties are dropped instead of broken by position; completions without a token
are dropped; the order is shuffled in every pass; a prompt's samples do not depend on which prompts are drawn with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from steelyard.config import Config, require_positive, require_range
from steelyard.data.buffer import joined, labelled, of_rows, trimmed, with_mismatched
from steelyard.data.experience import FOREIGN, ExperienceBatch
from steelyard.data.mixture import mixture_counts
from steelyard.data.pairing import PairingRule, pairs_from_rewards
from steelyard.data.sampler import EpochSampler, Indices
from steelyard.errors import ConfigError, DataError
from steelyard.objectives.preference.base import PreferenceLearner, PreferenceNeeds
from steelyard.rng import derive_seed, numpy_generator, torch_generator
from steelyard.train import distributed

ATTEMPTS = 10
"""Buffers drawn in a row, from other prompts, before a run in which nothing can be learned from is given up."""


@dataclass(frozen=True)
class ExperienceConfig(Config):
    """Where completions come from and how often they are used."""

    source: Literal["dataset", "policy", "mixture"] = "dataset"
    """Completions of the data set, fresh ones of the policy itself (on-policy), or both in each buffer."""
    offline_share: float = 0.5
    """Share of prompts whose completions come from the data set; only read by the source "mixture"."""
    minibatch_prompts: int = 8
    """M: prompts per update."""
    prompts_per_refresh: int | None = None
    """B: prompts drawn at a time, a multiple of M; B / M is how many updates a fresh sample waits for at most, times
    reuse. None: M, purely on-policy."""
    num_generations: int = 4
    """N: completions that the policy writes for each prompt."""
    reuse: int = 1
    """T: passes over each buffer, every one in a new order."""
    epochs: float = 1.0
    """Passes over the prompts of the data set, where the run does not state its steps."""
    sync_every: int = 1
    """s: the sampler gets the policy's weights at every s-th refresh; above 1 is semi-online."""
    pairing: PairingRule = "best_worst"
    """Which of a prompt's completions are compared, where pairs are made from rewards."""
    min_gap: float = 0.0
    """Pairs whose rewards differ by less are dropped; equal rewards always are."""
    pair_noise: float = 0.0
    """Scale of Bradley-Terry noise in the labels of pairs made from rewards; 0: none."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a fresh completion that was cut before it ended."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "minibatch_prompts", "prompts_per_refresh", "num_generations", "reuse", "epochs")
        require_positive(self, "sync_every")
        require_range(self, 0, math.inf, "min_gap", "pair_noise", "missing_eos_penalty")
        if self.prompts % self.minibatch_prompts:
            raise ConfigError(
                f"prompts_per_refresh ({self.prompts}) must be a multiple of minibatch_prompts "
                f"({self.minibatch_prompts})"
            )
        if self.source == "mixture" and not 0 < self.offline_share < 1:
            raise ConfigError(
                f"offline_share must lie strictly between 0 and 1 for the source 'mixture', found {self.offline_share}"
            )

    @property
    def prompts(self) -> int:
        """B."""
        return self.minibatch_prompts if self.prompts_per_refresh is None else self.prompts_per_refresh

    @property
    def updates_per_refresh(self) -> int:
        """T B / M."""
        return self.reuse * self.prompts // self.minibatch_prompts

    def updates(self, rows: int) -> int:
        """Return the updates that `epochs` passes over so many prompts make, whole refreshes."""
        return max(1, math.ceil(self.epochs * rows / self.prompts)) * self.updates_per_refresh


class ExperienceData(Protocol):
    """Prompts, and completions of them where there are any; `data/preferences.TokenizedData` is one."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        ...

    def batch(self, indices: Indices) -> ExperienceBatch:
        """Return prompts with the data's own completions."""
        ...

    def prompts(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (prompts [P, L], prompt_mask [P, L])."""
        ...

    def texts(self, indices: Indices) -> Sequence[Any]:
        """Return the prompts as text or messages, for the scorer."""
        ...

    def columns(self, indices: Indices) -> Mapping[str, Sequence[Any]]:
        """Return the other columns of the rows, for the scorer."""
        ...


Pairing = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(rewards [N], prompt_of [N], generator) -> (pairs [K, 2], margins [K])."""

_TOTALS = (
    "data/generated_tokens", "data/reward_queries", "data/dropped_empty", "data/dropped_unscorable",
    "data/dropped_ties", "data/dropped_unlabelled", "data/dropped_small_groups", "data/redraws",
)  # fmt: skip
_LATEST = (
    "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "data/prompts", "data/pairs",
)  # fmt: skip


def ids_as_text(ids: Sequence[int]) -> str:
    """Return token ids in digits: what scorers get as text where there is no tokenizer."""
    return " ".join(map(str, ids))


class ExperienceSource:
    """Draws, scores, pairs and re-serves experience; exact to resume in the middle of a buffer.

    Args:
        learner: its policy draws the samples; its objective says what batches need.
        data: prompts, and completions of people for the sources "dataset" and "mixture".
        sampler: draws completions (`envs/samplers.Sampler`); None: no fresh samples.
        scorer: gives rewards (`envs/scorers.CompletionScorer`); None: the data's own rewards, labels and pairs.
        pairing: makes pairs of rewards; None: the config's rule.
        config: source, sizes and reuse.
        seed: of everything random.
        decode: turns token ids into the text that the scorer reads.
        shards: parts that an update is cut into; samples are drawn in as many parts, so that several processes do
            what one does.

    Raises:
        ConfigError: the combination of objective, source, sampler, scorer and data makes no sense.
    """

    def __init__(
        self,
        learner: PreferenceLearner,
        data: ExperienceData,
        sampler: Any | None,
        scorer: Any | None,
        pairing: Pairing | None,
        config: ExperienceConfig,
        seed: int,
        *,
        decode: Callable[[Sequence[int]], str] = ids_as_text,
        shards: int = 1,
    ) -> None:
        self.learner, self.data, self.sampler, self.scorer = learner, data, sampler, scorer
        self.config, self.seed, self.decode, self.shards = config, seed, decode, shards
        self.needs: PreferenceNeeds = learner.config.needs
        self._pairing = pairing or self._pairs_by_rule
        require_legal(self.needs, config, learner.config, data, sampler, scorer, shards)
        self._parameters = {
            f"{group}.{number}": parameter
            for group, parameters in learner.model.trainable().items()
            for number, parameter in enumerate(parameters)
        }
        self._buffer: ExperienceBatch | None = None
        self._refresh = -1
        self._memory: dict[str, Tensor] = {}
        self._synced: dict[str, Tensor] = {}
        self._born = 0
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._latest = dict.fromkeys(_LATEST, math.nan)
        self._staleness = 0.0

    # ------------------------------------------------------------------------------------------ what the loop asks

    def batch(self, step: int) -> ExperienceBatch:
        """Return the minibatch of update `step`; fill the buffer first where it is the first of a refresh."""
        refresh, within = divmod(step, self.config.updates_per_refresh)
        if refresh != self._refresh:
            self._fill(refresh, step)
            self._refresh = refresh
        assert self._buffer is not None
        minibatches = self.config.prompts // self.config.minibatch_prompts
        number_of_pass, minibatch = divmod(within, minibatches)
        order = self.order(refresh, number_of_pass, len(self._buffer.prompts))
        batch = trimmed(self._buffer.of_prompts(torch.from_numpy(_share(order, minibatch, minibatches, self.shards))))
        assert batch.born is not None
        fresh = batch.born[batch.born != FOREIGN]
        self._staleness = float((step - fresh).float().mean()) if len(fresh) else 0.0
        return batch

    def order(self, refresh: int, number_of_pass: int, prompts: int) -> Indices:
        """Return the order of a buffer's prompts in one pass: a pure function of its arguments and the seed."""
        return numpy_generator(self.seed, f"experience/order/{refresh}", number_of_pass).permutation(prompts)

    def counters(self) -> dict[str, Any]:
        """Return totals since the run began and what the present buffer looks like, for the log."""
        latest = {name: value for name, value in self._latest.items() if not math.isnan(value)}
        return {"refresh": self._refresh, "data/staleness": self._staleness, **self._totals, **latest}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the buffer, the objective's memory, the sampler's weights and the counts."""
        state = {f"memory.{name}": value for name, value in self._memory.items()}
        state |= {f"synced.{name}": value for name, value in self._synced.items()}
        if self._buffer is not None:
            state |= {f"buffer.{name}": value for name, value in self._buffer.tensors().items()}
        state["clock"] = torch.tensor([self._refresh, self._born])
        state["totals"] = torch.tensor([self._totals[name] for name in _TOTALS], dtype=torch.float64)
        state["latest"] = torch.tensor([*self._latest.values(), self._staleness], dtype=torch.float64)
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        device = self._device
        self._memory = {name: value.to(device) for name, value in part("memory.").items()}
        self._synced = {name: value.to(device) for name, value in part("synced.").items()}
        buffer = part("buffer.")
        self._buffer = ExperienceBatch(**buffer) if buffer else None
        self._refresh, self._born = (int(value) for value in state["clock"])
        self._totals = dict(zip(_TOTALS, state["totals"].tolist(), strict=True))
        *latest, self._staleness = state["latest"].tolist()
        self._latest = dict(zip(_LATEST, latest, strict=True))

    # ------------------------------------------------------------------------------------------ one refresh

    def _fill(self, refresh: int, step: int) -> None:
        """Draw the buffer of a refresh: the part of the algorithm that stands above the minibatches."""
        if self.config.sync_every > 1 and self.config.source != "dataset":
            if refresh % self.config.sync_every == 0 or not self._synced:
                self._synced = {name: value.detach().clone() for name, value in self._parameters.items()}
                self._born = step
        else:
            self._born = step
        for attempt in range(ATTEMPTS):
            drawn = self._drawn(refresh, attempt)
            self._describe(drawn)
            buffer = self._usable(drawn, refresh, attempt)
            if len(buffer.prompts) >= max(self.shards, 2 if self.needs.mismatched else 1):
                break
            self._totals["data/redraws"] += 1
        else:
            raise DataError(
                f"refresh {refresh}: {ATTEMPTS} buffers of {self.config.prompts} prompts in a row had nothing to learn "
                f"from ({self._why()})"
            )
        if self.needs.mismatched:
            buffer = with_mismatched(buffer)
        complete, self._memory = self.learner.complete(self._judged(buffer).to(self._device), self._memory)
        self._buffer = complete.to("cpu")
        sizes = {"prompts": len(buffer.prompts), "pairs": 0 if buffer.pairs is None else len(buffer.pairs)}
        self._latest |= {f"data/{name}": float(size) for name, size in sizes.items()}

    def _drawn(self, refresh: int, attempt: int) -> ExperienceBatch:
        """Return B prompts with scored completions; processes share the drawing and the scoring."""
        config = self.config
        rows = EpochSampler(len(self.data), config.prompts, self.seed, _stream("rows", attempt)).indices(refresh)
        # the same prompt twice in a buffer must not get the same samples
        keys = rows + len(self.data) * np.array([np.sum(rows[:place] == row) for place, row in enumerate(rows)])
        offline = {"dataset": config.prompts, "policy": 0}.get(config.source)
        if offline is None:
            shares = (config.offline_share, 1 - config.offline_share)
            offline = int(mixture_counts(shares, config.prompts, refresh)[0])
        from_data = np.arange(config.prompts) < offline  # rows are in random order already
        parts, cut = [], []
        for number in range(distributed.rank(), self.shards, distributed.world()):
            mine = np.arange(number, config.prompts, self.shards)
            part, unfinished = self._part(rows[mine], keys[mine], from_data[mine], refresh, attempt)
            parts.append(part)
            cut.append(unfinished)
        every = joined(_exchanged(parts, self.shards))
        fresh = every.born != FOREIGN if every.born is not None else torch.zeros(len(every), dtype=torch.bool)
        if fresh.any():
            total = sum(float(found["cut"].sum()) for found in distributed.exchange({"cut": torch.tensor(cut)}))
            self._latest["completions/clipped_ratio"] = total / int(fresh.sum())
            self._totals["data/generated_tokens"] += float(every.scored_mask[fresh].sum())
        order = np.argsort(np.concatenate([np.arange(k, config.prompts, self.shards) for k in range(self.shards)]))
        return every.of_prompts(torch.from_numpy(order))

    def _part(
        self, rows: Indices, keys: Indices, from_data: npt.NDArray[np.bool_], refresh: int, attempt: int
    ) -> tuple[ExperienceBatch, int]:
        """Return the given prompts, in their order, with completions and rewards, and how many were cut short."""
        parts, cut = [], 0
        if from_data.any():
            parts.append(self._foreign(rows[from_data]))
        if not from_data.all():
            fresh, cut = self._sampled(rows[~from_data], keys[~from_data], refresh, attempt)
            parts.append(fresh)
        order = np.argsort(np.concatenate([np.flatnonzero(from_data), np.flatnonzero(~from_data)]))
        return joined(parts).of_prompts(torch.from_numpy(order)), cut

    def _foreign(self, rows: Indices) -> ExperienceBatch:
        """Return the data's own completions, scored where the objective needs what the data do not say."""
        batch = self.data.batch(rows)
        born = torch.full((len(batch),), FOREIGN) if batch.born is None else batch.born
        batch = replace(batch, born=born, mismatched=None, sampler_token_logps=None)
        needs = self.needs
        lacks = batch.pairs is None and (needs.pairs or (needs.labels and batch.labels is None))
        return self._scored(batch, rows) if needs.rewards or lacks else batch

    def _sampled(self, rows: Indices, keys: Indices, refresh: int, attempt: int) -> tuple[ExperienceBatch, int]:
        """Return N fresh completions of each prompt, scored, and how many were cut before they ended."""
        assert self.sampler is not None
        prompts, mask = self.data.prompts(rows)
        device = self._device
        with self._sampler_weights(), torch.no_grad():
            samples = self.sampler.sample(
                prompts.to(device),
                mask.to(device),
                self.config.num_generations,
                seed=derive_seed(self.seed, _stream("sample", attempt)),
                step=refresh,
                keys=torch.from_numpy(keys).to(device),
            )
        batch = ExperienceBatch(
            prompts=prompts,
            prompt_mask=mask,
            completions=samples.completions.cpu(),
            scored_mask=samples.scored_mask.cpu(),
            prompt_of=samples.prompt_of.cpu(),
            sampler_token_logps=samples.token_logps.float().cpu(),
            born=torch.full((len(samples.completions),), self._born),
        )
        cut = ~samples.finished.cpu()
        batch = self._scored(batch, rows)
        if self.config.missing_eos_penalty and batch.rewards is not None:
            batch = replace(batch, rewards=batch.rewards - self.config.missing_eos_penalty * cut.float())
        return batch, int(cut.sum())

    def _scored(self, batch: ExperienceBatch, rows: Indices) -> ExperienceBatch:
        """Return the batch with rewards, where there is a scorer."""
        if self.scorer is None:
            return batch
        rewards = score(self.scorer, batch, self.data.texts(rows), self.data.columns(rows), self.decode)
        return replace(batch, rewards=rewards)

    def _usable(self, batch: ExperienceBatch, refresh: int, attempt: int) -> ExperienceBatch:
        """Return the prompts that the objective can learn from, with pairs and labels; count what is dropped."""
        needs = self.needs
        kept = self._without("empty", batch.lengths > 0)
        if needs.rewards:
            assert batch.rewards is not None
            kept &= self._without("unscorable", ~batch.rewards.isnan() | ~kept)
        batch = of_rows(batch, kept)
        if needs.pairs:
            batch = self._paired(batch, torch_generator(self.seed, _stream("pairs", attempt), refresh))
            assert batch.pairs is not None
            batch = batch.of_prompts(torch.nonzero(self._without("ties", _has(batch, batch.pairs[:, 0]))).flatten())
            if not needs.rewards:  # what is compared with nothing would only cost time
                assert batch.pairs is not None
                batch = of_rows(batch, torch.isin(torch.arange(len(batch)), batch.pairs))
        if needs.labels:
            batch = labelled(batch)
            assert batch.labels is not None
            batch = of_rows(batch, self._without("unlabelled", ~batch.labels.isnan()))
        sizes = torch.bincount(batch.prompt_of, minlength=len(batch.prompts))
        enough = self._without("small_groups", sizes >= max(1, needs.group))
        return batch.of_prompts(torch.nonzero(enough).flatten())

    def _without(self, reason: str, kept: Tensor) -> Tensor:
        """Count what is not kept (bool [N] or [P]) and return `kept`."""
        self._totals[f"data/dropped_{reason}"] += int((~kept).sum())
        return kept

    def _paired(self, batch: ExperienceBatch, generator: torch.Generator) -> ExperienceBatch:
        """Return the batch with pairs: the data's own for prompts that have some, else made from rewards."""
        if batch.rewards is None:
            return batch
        rewards = batch.rewards.clone()
        if batch.pairs is not None:
            rewards[torch.isin(batch.prompt_of, batch.prompt_of[batch.pairs[:, 0]])] = math.nan
        pairs, margins = self._pairing(rewards, batch.prompt_of, generator)
        weights = None
        if batch.pairs is not None:
            known = torch.full((len(batch.pairs),), math.nan) if batch.margins is None else batch.margins
            if batch.pair_weights is not None:
                weights = torch.cat([batch.pair_weights, torch.ones(len(pairs))])
            pairs, margins = torch.cat([batch.pairs, pairs]), torch.cat([known, margins])
        return replace(batch, pairs=pairs, margins=margins, pair_weights=weights)

    def _pairs_by_rule(self, rewards: Tensor, prompt_of: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        return pairs_from_rewards(
            rewards, prompt_of, config.pairing, config.min_gap, generator, config.pair_noise or None
        )

    def _judged(self, batch: ExperienceBatch) -> ExperienceBatch:
        """Return the buffer with reference log-probs and values, worked in parts, which processes share.

        `learner.complete` fills in what else the objective needs.
        """
        if not (self.needs.reference or self.needs.values):
            return batch
        size = max(1, self.config.minibatch_prompts // self.shards)
        chunks = torch.split(torch.arange(len(batch.prompts)), size)
        mine = {
            f"{number}.{name}": value
            for number in range(distributed.rank(), len(chunks), distributed.world())
            for name, value in self._judgement(batch.of_prompts(chunks[number])).items()
        }
        every = {name: value for found in distributed.exchange(mine) for name, value in found.items()}
        names = {name.partition(".")[2] for name in every}
        judged = {name: torch.cat([every[f"{k}.{name}"] for k in range(len(chunks))]) for name in sorted(names)}
        return replace(batch, **judged)  # rows stand by prompt, in the batch as in the parts

    @torch.no_grad()
    def _judgement(self, batch: ExperienceBatch) -> dict[str, Tensor]:
        whole, batch = batch.completions.shape[1], trimmed(batch).to(self._device)
        found: dict[str, Tensor | None] = {}
        if self.needs.reference:
            found["reference_token_logps"] = self.learner.with_reference(batch).reference_token_logps
        if self.needs.values:
            found["values"] = self.learner.model.outputs(batch, values=True).values
        return {
            name: functional.pad(value.float().cpu(), (0, whole - value.shape[1]))
            for name, value in found.items()
            if value is not None
        }

    def _describe(self, batch: ExperienceBatch) -> None:
        """Note what the log says about a buffer as it was drawn, before anything is dropped."""
        lengths = batch.lengths
        self._latest |= {
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
        }
        if batch.rewards is None or bool(batch.rewards.isnan().all()):
            return
        if self.scorer is not None:
            self._totals["data/reward_queries"] += len(batch)
        rewards = batch.rewards.double()
        groups = [rewards[batch.prompt_of == prompt] for prompt in range(len(batch.prompts))]
        spreads = torch.stack([known.std(correction=0) for one in groups if len(known := one[~one.isnan()])])
        self._latest |= {
            "reward": float(rewards.nanmean()),
            "reward_std": float(spreads.mean()),
            "frac_reward_zero_std": float((spreads == 0).double().mean()),
        }

    def _why(self) -> str:
        found = [
            f"{int(self._totals[f'data/dropped_{name}'])} {words}"
            for name, words in (
                ("empty", "empty completions"),
                ("unscorable", "completions that the scorer could not score"),
                ("ties", "prompts whose completions all have the same reward or a smaller gap than min_gap"),
                ("unlabelled", "completions that are neither good nor bad"),
                ("small_groups", "prompts with fewer completions than the objective needs"),
            )
            if self._totals[f"data/dropped_{name}"]
        ]
        return "; ".join(found) or "fewer prompts than parts of an update"

    @contextmanager
    def _sampler_weights(self) -> Iterator[None]:
        """Sample with the weights of the last synchronisation, where that is not now."""
        if not self._synced:
            yield
            return
        now = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._put(self._synced)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(iter(self._parameters.values())).device
        return device


# ---------------------------------------------------------------------------------------------- what is legal


def require_legal(
    needs: PreferenceNeeds,
    config: ExperienceConfig,
    objective: Any,
    data: ExperienceData,
    sampler: Any | None,
    scorer: Any | None,
    shards: int = 1,
) -> None:
    """Compare what an objective needs with what the source can give.

    Raises:
        ConfigError: the first thing that is missing, and what to set.
    """
    kind, source = getattr(objective, "kind", type(objective).__name__), config.source
    if len(data) == 0:
        raise ConfigError("the data hold no prompt that can be used")
    if config.minibatch_prompts % shards:
        raise ConfigError(
            f"experience.minibatch_prompts ({config.minibatch_prompts}) must be a multiple of optim.shards ({shards})"
        )
    if needs.on_policy and source == "dataset":
        raise ConfigError(f"objective {kind!r} needs completions of the policy itself; use the source 'policy'")
    if needs.sampler and source != "policy":
        raise ConfigError(
            f"objective {kind!r} corrects by the ratio to the distribution that drew the completions, which is not "
            f"known for completions of a data set; use the source 'policy', or switch the correction off"
        )
    if source != "dataset":
        _require_samples(needs, config, kind, sampler, scorer)
    if source != "policy":
        _require_rows(needs, kind, data, scorer)
    if needs.mismatched and config.prompts < 2:
        raise ConfigError(f"objective {kind!r} compares completions with other prompts: it needs prompts_per_refresh "
                          f"of at least 2, found {config.prompts}")  # fmt: skip


def _require_samples(
    needs: PreferenceNeeds, config: ExperienceConfig, kind: str, sampler: Any | None, scorer: Any | None
) -> None:
    if sampler is None:
        raise ConfigError(f"the source {config.source!r} draws completions, but there is no sampler")
    asked = [name for name in ("pairs", "rewards", "labels") if getattr(needs, name)]
    if asked and scorer is None:
        raise ConfigError(
            f"objective {kind!r} needs {' and '.join(asked)}, and completions of the policy get them from a scorer; "
            "there is none: name one with --scorer, e.g. length:min"
        )
    least = max(needs.group, 2 if needs.pairs or needs.labels else 1)
    if config.num_generations < least:
        raise ConfigError(
            f"objective {kind!r} compares at least {least} completions of a prompt, but num_generations is "
            f"{config.num_generations}"
        )
    sampling = getattr(sampler, "config", None)
    top_p, top_k = getattr(sampling, "top_p", 1.0), getattr(sampling, "top_k", 0)
    if needs.sampler and (top_p < 1 or top_k):
        raise ConfigError(
            f"objective {kind!r} corrects by the ratio to the sampling distribution, which top_p {top_p:g} and top_k "
            f"{top_k} cut off: set sampling.top_p to 1 and sampling.top_k to 0, or switch the correction off"
        )
    if getattr(sampling, "temperature", 1.0) == 0 and config.num_generations > 1:
        raise ConfigError(
            f"sampling.temperature is 0, so the {config.num_generations} completions of a prompt would all be the same"
        )


def _require_rows(needs: PreferenceNeeds, kind: str, data: ExperienceData, scorer: Any | None) -> None:
    if getattr(data, "kind", None) == "prompt":
        raise ConfigError("the data hold prompts without completions; use the source 'policy'")
    some = data.batch(np.arange(min(len(data), 8)))
    scored = scorer is not None or (some.rewards is not None and not bool(some.rewards.isnan().all()))
    several = len(some) > len(some.prompts)
    if needs.pairs and some.pairs is None and not (scored and several):
        raise ConfigError(
            f"objective {kind!r} needs pairs, but the data's rows have none (expected chosen and rejected, or several "
            "completions with rewards or a scorer)"
        )
    if needs.labels and some.labels is None and some.pairs is None and not (scored and several):
        raise ConfigError(
            f"objective {kind!r} needs completions labelled good or bad, but the data's rows have no label"
        )
    if needs.rewards and not scored:
        raise ConfigError(
            f"objective {kind!r} needs rewards, but the data hold none and there is no scorer; name one with --scorer"
        )
    if needs.group > 1 and int(torch.bincount(some.prompt_of).max()) < needs.group:
        raise ConfigError(
            f"objective {kind!r} compares at least {needs.group} completions of a prompt, but the data's rows "
            "have fewer"
        )


# ---------------------------------------------------------------------------------------------- batches


def score(
    scorer: Any,
    batch: ExperienceBatch,
    texts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    decode: Callable[[Sequence[int]], str],
) -> Tensor:
    """Return rewards float32 [N] of a batch's completions.

    Args:
        scorer: an `envs/scorers.CompletionScorer`.
        batch: prompts and completions.
        texts: the P prompts.
        columns: {name: P values}.
        decode: turns token ids into text.
    """
    owners = batch.prompt_of.tolist()
    ids = [row[mask > 0].tolist() for row, mask in zip(batch.completions.cpu(), batch.scored_mask.cpu(), strict=True)]
    prompts = [texts[owner] for owner in owners]
    found: Tensor = scorer.score(
        prompts,
        [decode(row) for row in ids],
        ids,
        {name: [values[owner] for owner in owners] for name, values in columns.items()},
    )
    if found.shape != (len(batch),) or bool(found.isinf().any()):
        raise DataError(
            f"scorer {getattr(scorer, 'name', type(scorer).__name__)}: expected {len(batch)} finite scores, found "
            f"shape {list(found.shape)}, {int(found.isinf().sum())} of them infinite"
        )
    return found.detach().float().cpu()


def _has(batch: ExperienceBatch, rows: Tensor) -> Tensor:
    """Return bool [P]: which prompts own one of the completions `rows`."""
    return torch.bincount(batch.prompt_of[rows], minlength=len(batch.prompts)) > 0


def _share(order: Indices, minibatch: int, minibatches: int, least: int) -> Indices:
    """Return the prompts of a minibatch: equal shares of what is left after drops, at least `least` each."""
    first, end = minibatch * len(order) // minibatches, (minibatch + 1) * len(order) // minibatches
    return order[(first + np.arange(max(least, end - first))) % len(order)]


def _exchanged(parts: list[ExperienceBatch], count: int) -> list[ExperienceBatch]:
    """Return all parts in order: this process has those numbered rank, rank + world, ..."""
    if distributed.world() == 1:
        return parts
    packed = {f"{place}.{name}": value for place, part in enumerate(parts) for name, value in part.tensors().items()}
    every = distributed.exchange(packed)
    found = []
    for number in range(count):
        place, process = divmod(number, distributed.world())
        prefix = f"{place}."
        tensors = {name.removeprefix(prefix): v for name, v in every[process].items() if name.startswith(prefix)}
        found.append(ExperienceBatch(**tensors))
    return found


def _stream(name: str, attempt: int) -> str:
    return f"experience/{name}" if attempt == 0 else f"experience/{name}/{attempt}"
