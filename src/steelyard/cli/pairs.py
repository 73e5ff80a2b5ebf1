"""`steelyard data pairs`: sample from a model, score, pair, and write preference data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.bench.stats import Estimate
from steelyard.data.preferences import Layout, read_text_data, tokenize
from steelyard.data.tokenizer import Tokenizer
from steelyard.envs.samplers import LanguageModelSampler, SamplingConfig
from steelyard.envs.scorers import scorer_from_name
from steelyard.workflows.pairs import Line, PairsConfig, make_pairs, prompts_only, require_target, summary


@dataclass(frozen=True)
class PairsArguments:
    """Sample completions of prompts, score them, pair them and write them as preference data.

    The same command goes on where it was stopped; at most one batch of prompts is drawn again.
    """

    prompts: str
    """Text data with prompts: a file, a folder or a name on the hub; completions in it are not read."""
    scorer: str
    """What judges completions, e.g. length:min, contains:WORD, reward_model:RUN, python:FILE.py:FUNCTION."""
    out: Path
    """What to write: NAME.jsonl, NAME.jsonl.gz or NAME.parquet; must not exist."""
    model: str = "smollm2"
    """Language model: a name on the hub, a folder, a *.gguf file, a preference run, "smollm2" or "tiny"."""
    layout: Layout = "trl"
    """Whose columns."""
    pool: Path | None = None
    """Keep all scored completions in this JSONL file: rows for best-of-N, or for other pairs without new samples."""
    config: Annotated[PairsConfig, tyro.conf.arg(name="")] = field(default_factory=PairsConfig)
    device: str = "cpu"
    """Where the model runs."""


def pairs(argv: list[str]) -> int:
    """Run the command."""
    args = tyro.cli(PairsArguments, prog="steelyard data pairs", args=argv, config=(tyro.conf.OmitArgPrefixes,))
    runtime.prepare(runtime.RuntimeConfig(device=args.device))
    require_target(args.out)
    scorer = scorer_from_name(args.scorer, allow_code=True)
    config = args.config
    everything = prompts_only(read_text_data(args.prompts))
    _, tokenizer, sampler = open_model(args.model, config.sampling, args.device)
    wanted = replace(everything, rows=everything.rows[: config.limit])
    data = tokenize(wanted, tokenizer, config.max_prompt_tokens, truncation=config.truncation)
    for sentence in (*everything.notes, *data.report.sentences()):
        print(f"note: {sentence}", file=sys.stderr)
    identity = {"model": args.model, "prompts": everything.content_hash}
    try:
        pool, pairing = make_pairs(
            args.out, identity, data, sampler, scorer, config, args.layout, args.pool, args.device
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    Console().print(table(summary(pool, pairing, config), f"{args.out}: {args.model} judged by {scorer.name}"))
    return 0


def open_model(name: str, sampling: SamplingConfig, device: str) -> tuple[Any, Tokenizer, LanguageModelSampler]:
    """Return a language model by name, or the policy of a preference run, its tokenizer and its sampler."""
    from steelyard.workflows.preference import load_by_name, tokenizer_of

    model = load_by_name(name, device)
    tokenizer = tokenizer_of(model)
    return model, tokenizer, LanguageModelSampler(model, sampling, tokenizer.eos, tokenizer.pad)


def table(lines: list[Line], title: str) -> Table:
    """Return the summary as a table."""
    found = Table("measure", "value", "95% interval", "", title=title, title_justify="left")
    for line in lines:
        if isinstance(line.value, Estimate):
            digits = 3 if abs(line.value.value) < 10 else 1
            interval = "" if line.value.low is None else line.value.interval(digits)
            found.add_row(line.what, f"{line.value.value:.{digits}f}", interval, line.note)
        elif line.value or line.what in ("prompts", "completions", "pairs"):
            found.add_row(line.what, str(line.value), "", line.note)
    return found
