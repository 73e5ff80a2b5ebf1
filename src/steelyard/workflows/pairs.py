"""Preference pairs of a model's own completions: sample, score, pair, export.

The completions lie in a *pool*, a JSONL file with one row each, to which every batch of prompts is appended. A run that
was stopped goes on after its last whole batch; samples are a pure function of (seed, prompt, number) and batches are
always the same ones, so what comes out is what an undisturbed run gives. Beside the pool `POOL.state.json` says what
made it; a pool of other settings is refused, never mixed in. Pairs are made from the whole pool at the end, so another
rule or gap needs no new samples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from steelyard.bench.evidence import Floats, Ints, share_estimate
from steelyard.bench.stats import Estimate, mean_estimate
from steelyard.config import Config, plain, require_positive, require_range
from steelyard.data.pairing import Pairing, PairingRule, pair_up
from steelyard.data.preferences import Layout, TextData, TextRow, TokenizedData, Truncation, write_text_data
from steelyard.envs.samplers import Sampler, SamplingConfig, texts
from steelyard.envs.scorers import CompletionScorer, as_turn, checked_scores
from steelyard.errors import DataError
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train.progress import ProgressLine

WRITTEN = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin")
"""Columns of the pairs; columns of the data with such names are left out."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class PairsConfig(Config):
    """What decides a pool and the pairs made from it."""

    num_generations: int = 4
    """N: completions per prompt."""
    rule: PairingRule = "best_worst"
    """Which completions of a prompt are compared."""
    min_gap: float = 0.0
    """Drop pairs whose rewards differ by less; equal rewards never make a pair."""
    noise: float = 0.0
    """Scale of Bradley-Terry noise in the labels; 0: the higher reward is always chosen."""
    drop_unfinished: bool = False
    """Leave completions out of the pairs that were cut at the limit of new tokens."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    """How completions are drawn."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    truncation: Truncation = "error"
    """What happens to a longer one."""
    batch_prompts: int = 8
    """Prompts sampled together; what a kill can cost."""
    limit: int | None = None
    """Use the first so many prompts only."""
    seed: int = 0
    """Of the samples and of the noise."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_prompt_tokens", "batch_prompts", "limit")
        require_range(self, 2, math.inf, "num_generations")
        require_range(self, 0, math.inf, "min_gap", "noise")

    def of_pool(self) -> dict[str, Any]:
        """Return the settings that decide the pool: all but those of pairing, and not how many prompts are wanted."""
        later = ("rule", "min_gap", "noise", "drop_unfinished", "limit")
        return {name: value for name, value in plain(self).items() if name not in later}


@dataclass(frozen=True)
class Pool:
    """Completions, row by row; those of a prompt stand together.

    Attributes:
        prompt_of: int64 [N], number of the prompt in the data.
        prompts: [N], text or messages.
        completions: [N], text.
        lengths: float64 [N] tokens, EOS included.
        rewards: float64 [N], NaN where unscorable.
        finished: bool [N], ended by itself.
    """

    prompt_of: Ints
    prompts: list[Any]
    completions: list[str]
    lengths: Floats
    rewards: Floats
    finished: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        """Return the number of completions."""
        return len(self.completions)


def prompts_only(data: TextData) -> TextData:
    """Return the different prompts of any text data, in order, without their completions.

    Raises:
        DataError: text without prompts.
    """
    if data.kind == "text":
        raise DataError(f"{data.source}: expected rows with a prompt, found plain text")
    rows: dict[str, TextRow] = {}
    for row in data.rows:
        key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, sort_keys=True)
        rows.setdefault(key, TextRow(row.prompt, columns=row.columns, where=row.where))
    return TextData("prompt", list(rows.values()), data.source, data.notes)


def fill_pool(
    path: Path,
    identity: dict[str, str],
    data: TokenizedData,
    sampler: Sampler,
    scorer: CompletionScorer,
    config: PairsConfig,
    device: str = "cpu",
    quiet: bool = False,
) -> None:
    """Sample and score what the pool does not hold yet.

    Args:
        path: of the pool.
        identity: what tells this model and these prompts from others; a pool of others is refused.
        data: prompts.
        sampler: draws completions.
        scorer: gives rewards.
        config: sizes and seed.
        device: of the sampler's model.
        quiet: no progress.

    Raises:
        DataError: the pool was made by other settings.
    """
    made_by = {**identity, "scorer": scorer.name, **config.of_pool()}
    total, size = len(data), config.batch_prompts
    done = begin_rows(path, made_by, config.num_generations, size, total)
    n = config.num_generations
    with ProgressLine("completions", total * n, done * n, quiet) as line, path.open("ab") as file:
        for first in range(done, total, size):
            indices = np.arange(first, min(first + size, total))
            rows = _sampled(indices, data, sampler, scorer, config, device)
            append_rows(file, rows)
            scored = [row["reward"] for row in rows if row["reward"] is not None]
            note = f"reward {np.mean(scored):.3g}" if scored else "nothing scorable"
            line.advance_to((int(indices[-1]) + 1) * n, note)


def begin_rows(path: Path, made_by: dict[str, Any], each: int, size: int, total: int) -> int:
    """Begin a JSONL file of rows, or go on with one after its last whole batch; return how many prompts it holds.

    Args:
        path: of the file; what made it is kept beside it, in PATH.state.json.
        made_by: settings that decide the rows; a file of others is refused.
        each: rows of a prompt.
        size: prompts of a batch.
        total: prompts wanted.

    Raises:
        DataError: the file was made by other settings, or by something else.
    """
    state = path.with_name(path.name + ".state.json")
    if path.exists() and not state.is_file():
        raise DataError(f"{path}: already exists and is no file of this command (no {state.name} beside it)")
    if state.is_file():
        _require_same(path, json.loads(state.read_text()), made_by)
    else:
        _write_whole(state, json.dumps(made_by, indent=2) + "\n")
    return _rewind(path, each, size, total)


def append_rows(file: BinaryIO, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to the end of a file and to the disk."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    file.flush()
    os.fsync(file.fileno())


def _sampled(
    indices: Ints, data: TokenizedData, sampler: Sampler, scorer: CompletionScorer, config: PairsConfig, device: str
) -> list[dict[str, Any]]:
    """Return the pool's rows of some prompts."""
    n = config.num_generations
    prompts, mask = (tensor.to(device) for tensor in data.prompts(indices))
    samples = sampler.sample(prompts, mask, n, seed=config.seed, step=0, keys=torch.from_numpy(indices))
    written = texts(samples, data.tokenizer.decode)
    lengths = samples.scored_mask.sum(1).long().tolist()
    ids = [row[:length].tolist() for row, length in zip(samples.completions, lengths, strict=True)]
    asked = [prompt for prompt in data.texts(indices) for _ in range(n)]
    columns = {name: [value for value in values for _ in range(n)] for name, values in data.columns(indices).items()}
    rewards = checked_scores(scorer, scorer.score(asked, written, ids, columns), asked).tolist()
    logps = samples.token_logps.double().sum(1).tolist()
    return [
        {
            "prompt_id": int(indices[row // n]),
            "sample": row % n,
            "prompt": asked[row],
            "completion": written[row],
            "token_ids": ids[row],
            "reward": None if math.isnan(rewards[row]) else rewards[row],
            "log_prob": logps[row],
            "finished": bool(samples.finished[row]),
        }
        for row in range(len(written))
    ]


def read_pool(path: Path, prompts: int | None = None) -> Pool:
    """Read a pool's first `prompts` prompts."""
    rows = [row for row in json_rows(path) if prompts is None or row["prompt_id"] < prompts]
    return Pool(
        np.array([row["prompt_id"] for row in rows], np.int64),
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        np.array([len(row["token_ids"]) for row in rows], np.float64),
        np.array([math.nan if row["reward"] is None else row["reward"] for row in rows], np.float64),
        np.array([row["finished"] for row in rows], bool),
    )


def pair_pool(pool: Pool, config: PairsConfig) -> Pairing:
    """Return the pairs of a pool; empty completions, and unfinished ones where the config says so, join none."""
    rewards = torch.from_numpy(pool.rewards.copy())
    usable = torch.tensor([bool(text) for text in pool.completions])
    if config.drop_unfinished:
        usable &= torch.from_numpy(pool.finished)
    left_out = int((~usable & ~rewards.isnan()).sum())
    rewards[~usable] = math.nan
    generator = torch_generator(config.seed, "pairs/noise")
    found = pair_up(rewards, torch.from_numpy(pool.prompt_of), config.rule, config.min_gap, generator, config.noise)
    return replace(found, unscorable=found.unscorable - left_out)


def rows_of_pairs(pool: Pool, pairing: Pairing, data: TokenizedData) -> list[TextRow]:
    """Return one preference row for each pair, with the rewards, the margin and the data's other columns."""
    found = []
    for (chosen, rejected), margin in zip(pairing.pairs.tolist(), pairing.margins.tolist(), strict=True):
        prompt = pool.prompts[chosen]
        number = int(pool.prompt_of[chosen])
        columns = {name: values[0] for name, values in data.columns([number]).items() if name not in WRITTEN}
        turns = tuple(as_turn(prompt, pool.completions[row]) for row in (chosen, rejected))
        rewards = (float(pool.rewards[chosen]), float(pool.rewards[rejected]))
        found.append(TextRow(prompt, turns, None, rewards, ((0, 1),), margin, columns))
    return found


@dataclass(frozen=True)
class Line:
    """One line of the summary: what, the number, and how to read it."""

    what: str
    value: int | Estimate
    note: str = ""


def summary(pool: Pool, pairing: Pairing, config: PairsConfig) -> list[Line]:
    """Return what a user should know before training on the pairs."""
    empty = sum(not text for text in pool.completions)
    chosen, rejected = pairing.pairs.numpy().T
    with_pairs = len(np.unique(pool.prompt_of[chosen]))
    prompts = len(np.unique(pool.prompt_of))
    lines = [
        Line("prompts", prompts),
        Line("completions", len(pool)),
        Line("unscorable", pairing.unscorable, "the scorer gave no reward"),
        Line("empty", empty, "in no pair"),
        Line("unfinished", int((~pool.finished).sum()),
             "cut at the limit of new tokens; " + ("in no pair" if config.drop_unfinished else "kept in the pairs")),
        Line("pairs", len(pairing), f"of {with_pairs} prompts"),
        Line("ties", pairing.ties, "pairs dropped, equal rewards"),
        Line("too close", pairing.too_close, f"pairs dropped, rewards differ by less than {config.min_gap:g}"),
    ]  # fmt: skip
    if pairing.flipped:
        lines.append(Line("flipped", pairing.flipped, "labels turned round by the noise"))
    generator = numpy_generator(config.seed, "pairs/intervals")
    groups = [pool.rewards[pool.prompt_of == p] for p in np.unique(pool.prompt_of)]
    groups = [group[~np.isnan(group)] for group in groups]
    means = np.array([group.mean() for group in groups if len(group)])
    if len(means):
        spreads = np.array([group.std(ddof=1) for group in groups if len(group) > 1])
        lines.append(Line("reward", mean_estimate(means, generator), "mean over prompts"))
        if len(spreads):
            lines.append(Line("reward spread", mean_estimate(spreads, generator), "standard deviation within a prompt"))
    if len(pairing):
        longer = np.sign(pool.lengths[chosen] - pool.lengths[rejected]) / 2 + 0.5
        lines.append(Line("longer chosen", share_estimate(longer, pool.prompt_of[chosen]),
                          "share of pairs; 0.5 is no length bias"))  # fmt: skip
        lines.append(
            Line(
                "length gap",
                mean_estimate(pool.lengths[chosen] - pool.lengths[rejected], generator),
                "tokens of the chosen less those of the rejected",
            )
        )
    return lines


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: not JSON; the pool was altered or damaged") from None


def _rewind(path: Path, generations: int, size: int, total: int) -> int:
    """Cut the pool back to whole batches; return how many prompts it holds then.

    A batch is whole with `size` prompts, or fewer where the data end with it: a longer limit draws the short one anew.
    """
    if not path.exists():
        path.touch()
        return 0
    ends, position = [0], 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                break  # the kill came in the middle of this one
            ends.append(position)
    prompts = (len(ends) - 1) // generations
    if prompts < total:
        prompts -= prompts % size
    os.truncate(path, ends[prompts * generations])
    return prompts


def _require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DataError(
                f"{path}: holds samples of other settings ({name} was {found.get(name)!r}, now {wanted.get(name)!r}); "
                "choose another path or remove it with its .state.json"
            )


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def make_pairs(
    out: Path,
    identity: dict[str, str],
    data: TokenizedData,
    sampler: Sampler,
    scorer: CompletionScorer,
    config: PairsConfig,
    layout: Layout = "trl",
    pool: Path | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> tuple[Pool, Pairing]:
    """Fill the pool, write the pairs to `out` and return both.

    Without a `pool` the completions lie in OUT.pool.jsonl until the pairs are written.

    Raises:
        DataError: `out` exists, or no pair came out.
    """
    require_target(out)
    kept = out.with_name(out.name + ".pool.jsonl") if pool is None else pool
    for path in (out, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
    fill_pool(kept, identity, data, sampler, scorer, config, device, quiet)
    drawn = read_pool(kept, len(data))
    pairing = pair_pool(drawn, config)
    if not len(pairing):
        unfinished = int((~drawn.finished).sum())
        raise DataError(
            f"{kept}: no pair came out of {len(drawn)} completions ({pairing.ties} ties, {pairing.too_close} too "
            f"close, {pairing.unscorable} unscorable, {unfinished} cut before they ended); the samples are kept there"
        )
    partial = out.with_name(f".partial.{out.name}")
    write_text_data(partial, rows_of_pairs(drawn, pairing, data), layout)
    os.replace(partial, out)
    if pool is None:
        for path in (kept, kept.with_name(kept.name + ".state.json")):
            path.unlink()
    return drawn, pairing


def require_target(out: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse a target before any work is done.

    Raises:
        DataError: it exists or its suffix is unknown.
    """
    if not out.name.endswith(tuple(suffixes)):
        raise DataError(f"{out}: expected a name that ends in {', '.join(suffixes)}")
    if out.exists():
        raise DataError(f"{out}: already exists; choose another path or remove it")
