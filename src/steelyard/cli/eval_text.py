"""`steelyard eval winrate` and `steelyard eval reward_model`: text policies and scorers, with intervals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.bench import reward_bench, stats, winrate
from steelyard.bench.stats import Estimate
from steelyard.data.preferences import read_text_data
from steelyard.data.tokenizer import Text, Tokenizer, load_tokenizer
from steelyard.envs.model_scorers import FORMAT as REWARD_MODEL
from steelyard.envs.model_scorers import format_of
from steelyard.envs.samplers import LanguageModelSampler, SamplingConfig
from steelyard.envs.scorers import CompletionScorer, SumScorer, checked_scores, scorer_from_name, text_of
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.rng import numpy_generator
from steelyard.workflows.common import read_run_config
from steelyard.workflows.preference import FORMAT as PREFERENCE
from steelyard.workflows.preference import PreferenceRun, load_policy, read_rows, tokenizer_of

REFERENCE = "reference"


@dataclass(frozen=True)
class WinRateArguments:
    """Win rate of a policy's completions against a baseline's under a scorer, also at equal lengths."""

    policy: Annotated[str, tyro.conf.Positional]
    """Preference run, or JSONL file of {"prompt": ..., "completion": ...}."""
    against: str
    """Another run or file, or "reference": what the policy was before training."""
    scorer: str
    """What decides, e.g. reward_model:DIR, length:min:words, python:FILE.py:FUNCTION."""
    prompts: Path | None = None
    """Prompts that runs are sampled for; default: those of the other side's file, or the run's held-out ones."""
    samples: int = 1
    """Completions that a run draws for each prompt."""
    max_prompts: int | None = None
    """Use the first prompts only."""
    temperature: float | None = None
    """Of sampling; default: the run's."""
    max_new_tokens: int | None = None
    """Longest sampled completion; default: the run's."""
    tokenizer: str | None = None
    """For files, where the scorer counts tokens: byte, smollm2, a folder or a name on the hub."""
    batch_size: int = 16
    """Prompts sampled together."""
    seed: int = 1_000
    """Of samples and intervals; training evaluations use the run's seed."""
    device: str = "cpu"
    """Where runs are loaded."""
    out: Path | None = None
    """Write the numbers and every completion with its score to this JSON file."""


@dataclass(frozen=True)
class RewardModelArguments:
    """Accuracy of a scorer on preference pairs in RewardBench's layout, per subset and section."""

    scorer: Annotated[str, tyro.conf.Positional]
    """Run of a reward model or of preferences (its implicit reward), or a scorer such as length:max:words."""
    data: tuple[Path, ...]
    """JSONL files of prompt, chosen, rejected, and where there are subset and id."""
    chat: bool = False
    """Hand plain prompts over as conversations of one user message, as RewardBench does."""
    seed: int = 0
    """Of bootstrap intervals."""
    out: Path | None = None
    """Write the numbers and every row's scores to this JSON file."""


@dataclass
class Side:
    """Completions of one side, a group for each prompt.

    Attributes:
        name: a run, a file or "reference".
        prompts, texts: one of each per completion.
        ids: token ids of each, EOS included; empty where there are none.
        columns: the data's other columns, one value per completion.
    """

    name: str
    prompts: list[Text] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    scores: Sequence[float] = ()

    @property
    def keys(self) -> list[str]:
        """Prompts as text that tells them apart."""
        return [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in self.prompts]

    @property
    def lengths(self) -> list[int]:
        """Characters of each completion."""
        return [len(text_of(text)) for text in self.texts]


def win_rate(argv: list[str]) -> int:
    """Run `steelyard eval winrate`."""
    arguments = tyro.cli(WinRateArguments, prog="steelyard eval winrate", args=argv)
    runtime.prepare(runtime.RuntimeConfig(device=arguments.device))
    _require_folder(arguments.out)
    for name in ("samples", "batch_size", "max_prompts"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, found {value}")
    scorer = scorer_from_name(arguments.scorer, allow_code=True)
    policy, baseline = _sides(arguments)
    for side in (policy, baseline):
        scores = scorer.score(side.prompts, side.texts, side.ids, side.columns)
        side.scores = checked_scores(scorer, scores, side.prompts).tolist()
    numbers = winrate.prompt_numbers(policy.keys, baseline.keys)
    found = winrate.compare(
        _floats(policy.scores), _floats(baseline.scores), *numbers, numpy_generator(arguments.seed, "eval/winrate"),
        _floats(policy.lengths), _floats(baseline.lengths),
    )  # fmt: skip
    alone = len(np.setxor1d(*numbers))
    means = [
        _mean_score(side, number, arguments.seed) for side, number in zip((policy, baseline), numbers, strict=True)
    ]
    if arguments.out is not None:
        _write(arguments.out, _win_rate_json(arguments, scorer, found, policy, baseline, means, alone))
    Console().print(_win_rate_table(scorer, found, policy, baseline, means, alone))
    _tell_cut(scorer)
    return 0


def reward_model(argv: list[str]) -> int:
    """Run `steelyard eval reward_model`."""
    arguments = tyro.cli(RewardModelArguments, prog="steelyard eval reward_model", args=argv)
    runtime.prepare(runtime.RuntimeConfig())
    _require_folder(arguments.out)
    if not arguments.data:
        raise ConfigError("--data needs at least one file")
    rows = [row for path in arguments.data for row in reward_bench.read_rows(path)]
    if arguments.chat:
        rows = [
            replace(row, prompt=[{"role": "user", "content": row.prompt}]) if isinstance(row.prompt, str) else row
            for row in rows
        ]
    scorer = _scorer(arguments.scorer)
    result = reward_bench.evaluate(scorer, rows, seed=arguments.seed)
    tables = {"subsets": result.subsets, "sections": result.sections, "styles": result.styles}
    if arguments.out is not None:
        accuracies = {
            kind: {name: _estimate(a.estimate) | {"ties": a.ties, "of": a.of} for name, a in found.items()}
            for kind, found in tables.items()
        }
        score = None if result.score is None else _estimate(result.score)
        _write(arguments.out, {"scorer": scorer.name, **accuracies, "score": score, "rows": result.rows})
    table = Table("", "rows", "accuracy", "95% interval", "ties", title=f"{scorer.name}, {len(rows)} rows")
    for number, found in enumerate(tables.values()):
        if number and found:
            table.add_section()
        for name, accuracy in found.items():
            value = accuracy.estimate
            label = f"{name} ({accuracy.of} subsets)" if accuracy.of else name
            table.add_row(label, str(value.n), f"{value.value:.3f}", value.interval(3), f"{accuracy.ties:.3f}")
    if result.score is not None:
        table.add_section()
        table.add_row("score", str(result.score.n), f"{result.score.value:.3f}", result.score.interval(3), "")
    Console().print(table)
    unscorable = sum(row["unscorable"] for row in result.rows)
    if unscorable:
        Console().print(f"{unscorable} completions could not be scored; their rows count as wrong")
    _tell_cut(scorer)
    return 0


def _scorer(name: str) -> CompletionScorer:
    """Return the scorer that a run's folder or a scorer's name means."""
    if not Path(name).is_dir():
        return scorer_from_name(name, allow_code=True)
    kind = format_of(name)
    prefixes = {REWARD_MODEL: "reward_model", PREFERENCE: "implicit"}
    if kind not in prefixes:
        raise CheckpointError(f"{name}: expected a reward model or a preference run, found format {kind!r}")
    return scorer_from_name(f"{prefixes[kind]}:{name}")


# ---------------------------------------------------------------------------------------------------- completions


def _sides(arguments: WinRateArguments) -> tuple[Side, Side]:
    names = (arguments.policy, arguments.against)
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    files = {name: _from_file(name, tokenizer) for name in names if name != REFERENCE and not Path(name).is_dir()}
    if arguments.policy in files and arguments.against == REFERENCE:
        raise ConfigError(f"--against reference needs a run, and {arguments.policy} is a file of completions")
    if len(files) == len(set(names)):
        policy, baseline = (_first_prompts(files[name], arguments.max_prompts) for name in names)
        return policy, replace(baseline)
    prompts, columns = _prompts(arguments, files)
    sampled: dict[str, Side] = {}
    for name in names:
        if name in files or name in sampled or name == REFERENCE:
            continue
        learner, artefact = load_policy(name, device=arguments.device)
        given: dict[str, Any] = {"temperature": arguments.temperature, "max_new_tokens": arguments.max_new_tokens}
        config = replace(artefact.sampling, **{key: value for key, value in given.items() if value is not None})
        model: Any = learner.model
        sampled[name] = _sample(name, model, config, prompts, columns, arguments)
        if REFERENCE in names:
            with model.as_reference():
                sampled[REFERENCE] = _sample(REFERENCE, model, config, prompts, columns, arguments)
    policy, baseline = (sampled[name] if name in sampled else files[name] for name in names)
    return policy, replace(baseline)


def _from_file(name: str, tokenizer: Tokenizer | None) -> Side:
    """Read completions, several of a prompt in one row or in several."""
    if not Path(name).is_file():
        raise ConfigError(f"{name}: expected a preference run or a file of prompts and completions, found neither")
    side = Side(name)
    data = read_text_data(name, "completion")
    for row in data.rows:
        for text in row.completions:
            side.prompts.append(row.prompt)
            side.texts.append(text)
            if tokenizer is not None:
                side.ids.append(tokenizer.completion(row.prompt, text))
    names = sorted({key for row in data.rows for key in row.columns})
    side.columns = {key: [row.columns.get(key) for row in data.rows for _ in row.completions] for key in names}
    return side


def _first_prompts(side: Side, count: int | None) -> Side:
    if count is None:
        return side
    kept = set(list(dict.fromkeys(side.keys))[:count])
    rows = [row for row, key in enumerate(side.keys) if key in kept]

    def some(values: list[Any]) -> list[Any]:
        return [values[row] for row in rows] if values else []

    columns = {key: some(values) for key, values in side.columns.items()}
    return Side(side.name, some(side.prompts), some(side.texts), some(side.ids), columns)


def _prompts(arguments: WinRateArguments, files: dict[str, Side]) -> tuple[list[Text], list[dict[str, Any]]]:
    """Return the prompts to sample for, each once, with their columns."""
    if arguments.prompts is not None:
        rows = read_text_data(arguments.prompts, "prompt").rows
        found = [(row.prompt, row.columns) for row in rows]
    elif files:
        (side,) = files.values()
        found = [(prompt, {key: values[row] for key, values in side.columns.items()})
                 for row, prompt in enumerate(side.prompts)]  # fmt: skip
    else:
        try:
            held_out = read_rows(*_data_of(arguments.policy))[1]
        except DataError as error:
            raise ConfigError(f"which prompts? Give --prompts FILE; those of the run cannot be read: {error}") from None
        if held_out is None:
            raise ConfigError(f"which prompts? Give --prompts FILE; {arguments.policy} kept none apart")
        found = [(row.prompt, row.columns) for row in held_out.rows]
    once: dict[str, tuple[Text, dict[str, Any]]] = {}
    for prompt, columns in found:
        once.setdefault(json.dumps(prompt), (prompt, columns))
    kept = list(once.values())[: arguments.max_prompts]
    return [prompt for prompt, _ in kept], [columns for _, columns in kept]


def _data_of(run: str) -> tuple[Any, int]:
    from steelyard.train.rundir import RunDir

    config = read_run_config(RunDir(run), PreferenceRun)
    return config.data, config.seed


@torch.no_grad()
def _sample(
    name: str,
    model: Any,
    config: SamplingConfig,
    prompts: list[Text],
    columns: list[dict[str, Any]],
    arguments: WinRateArguments,
) -> Side:
    """Draw completions; the numbers behind sample j of a prompt are the same for every policy."""
    tokenizer, side = tokenizer_of(model), Side(name)
    sampler = LanguageModelSampler(model, config, tokenizer.eos, tokenizer.pad)
    for start in range(0, len(prompts), arguments.batch_size):
        part = [tokenizer.prompt(prompt) for prompt in prompts[start : start + arguments.batch_size]]
        width = max(map(len, part))
        tokens = torch.tensor([[tokenizer.pad] * (width - len(ids)) + ids for ids in part], device=arguments.device)
        mask = torch.tensor([[0.0] * (width - len(ids)) + [1.0] * len(ids) for ids in part], device=arguments.device)
        keys = torch.arange(start, start + len(part), device=arguments.device)
        samples = sampler.sample(tokens, mask, arguments.samples, seed=arguments.seed, step=0, keys=keys)
        for ids, scored in zip(samples.completions.tolist(), samples.scored_mask.sum(1).int().tolist(), strict=True):
            side.ids.append(ids[:scored])
            side.texts.append(tokenizer.decode(ids[:scored]))
    side.prompts = [prompt for prompt in prompts for _ in range(arguments.samples)]
    names = sorted({key for row in columns for key in row})
    side.columns = {key: [row.get(key) for row in columns for _ in range(arguments.samples)] for key in names}
    return side


# --------------------------------------------------------------------------------------------------------- output


def _mean_score(side: Side, prompt_of: Any, seed: int) -> Estimate:
    """Return the mean score over prompts, without what could not be scored."""
    scores = _floats(side.scores)
    fine = ~np.isnan(scores)
    return winrate.win_rate(scores[fine], prompt_of[fine], numpy_generator(seed, "eval/score"))


def _win_rate_table(
    scorer: CompletionScorer, found: winrate.WinRate, policy: Side, baseline: Side, means: list[Estimate], alone: int
) -> Table:
    title = f"{policy.name} against {baseline.name} under {scorer.name}, {found.prompts} prompts"
    table = Table("measure", "value", "95% interval", title=title)
    table.add_row("win rate (ties half)", f"{found.rate.value:.3f}", found.rate.interval(3))
    if found.length_controlled is not None and found.length_effect is not None:
        controlled = found.length_controlled
        table.add_row("win rate at equal lengths", f"{controlled.value:.3f}", controlled.interval(3))
        table.add_row("effect of length", f"{found.length_effect:.2f}", "")
    table.add_row("ties", f"{found.ties:.3f}", "")
    for side, mean in zip((policy, baseline), means, strict=True):
        table.add_row(f"mean score, {side.name}", f"{mean.value:.3f}", mean.interval(3))
    for side in (policy, baseline):
        table.add_row(f"characters (median), {side.name}", f"{np.median(side.lengths):.0f}", "")
    if found.unscorable:
        table.add_row("prompts left out, unscorable", str(found.unscorable), "")
    if alone:
        table.add_row("prompts left out, on one side only", str(alone), "")
    return table


def _win_rate_json(
    arguments: WinRateArguments,
    scorer: CompletionScorer,
    found: winrate.WinRate,
    policy: Side,
    baseline: Side,
    means: list[Estimate],
    alone: int,
) -> dict[str, Any]:
    controlled = found.length_controlled
    rows = [
        {"side": side.name, "prompt": prompt, "completion": text, "score": None if score != score else score}
        for side in (policy, baseline)
        for prompt, text, score in zip(side.prompts, side.texts, side.scores, strict=True)
    ]
    return {
        "policy": policy.name,
        "against": baseline.name,
        "scorer": scorer.name,
        "seed": arguments.seed,
        "win_rate": _estimate(found.rate),
        "length_controlled_win_rate": None if controlled is None else _estimate(controlled),
        "length_effect": found.length_effect,
        "ties": found.ties,
        "mean_scores": [_estimate(mean) for mean in means],
        "prompts": found.prompts,
        "prompts_unscorable": found.unscorable,
        "prompts_on_one_side": alone,
        "rows": rows,
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _floats(values: Sequence[float]) -> stats.Floats:
    return np.array(values, np.float64)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _require_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")


def _tell_cut(scorer: CompletionScorer) -> None:
    parts = [one for _, one in scorer.terms] if isinstance(scorer, SumScorer) else [scorer]
    for part in parts:
        with contextlib.suppress(AttributeError):
            if part.cut:  # type: ignore[attr-defined]
                print(f"{part.name}: {part.cut} texts were cut to {part.max_tokens} tokens")  # type: ignore[attr-defined]
