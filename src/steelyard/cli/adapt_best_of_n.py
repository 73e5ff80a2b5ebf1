"""`steelyard adapt best_of_n PROMPTS`: prompts in, answers and what they cost out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.bench.stats import Estimate
from steelyard.cli import arguments
from steelyard.data.preferences import tokenize
from steelyard.errors import ConfigError, DataError
from steelyard.workflows.best_of_n import (
    AnswersConfig,
    answer,
    default_policy,
    open_answerer,
    read_prompts,
    require_fit,
    scorer_of,
    summary,
)


@dataclass(frozen=True)
class BestOfNArguments:
    """Answer prompts with as many samples as each needs, and say what that cost.

    The same command goes on where it was stopped. Samples are a function of the seed and the prompt's position alone.
    """

    prompts: Annotated[str, tyro.conf.Positional]
    """A .txt file with a prompt a line, or text data with prompts: .jsonl, .json, .parquet, a folder, a hub name."""
    out: Path
    """What to write: a .jsonl file, one row a prompt."""
    model: str
    """Run of `steelyard train self_eval`, a preference run, a name on the hub, a folder, a *.gguf file, "smollm2" or
    "tiny"."""
    scorer: str | None = None
    """What chooses among samples: self (default of a self-evaluation run), logp, certainty, reward_model:DIR,
    hyre:DIR#profile.json, python:FILE.py:FUNCTION and the other scorers."""
    config: Annotated[AnswersConfig, tyro.conf.arg(name="")] = field(default_factory=AnswersConfig)
    device: str = "cpu"
    """Where the model runs."""


def best_of_n(argv: list[str]) -> int:
    """Run the command."""
    model, rest = arguments.take_option(argv, "--model", None)
    named, rest = arguments.take_option(rest, "--scorer", None)
    asks = {"-h", "--help"} & set(rest)
    if model is None and not asks:
        raise ConfigError("--model is missing: whose samples? A run of `steelyard train self_eval`, or a model's name")
    scorer = named or "self" if model is None else scorer_of(model, named)
    usual = replace(AnswersConfig(), policy=default_policy(scorer))
    default = BestOfNArguments(
        prompts=tyro.MISSING, out=tyro.MISSING, model=model or tyro.MISSING, scorer=named, config=usual
    )
    args = tyro.cli(BestOfNArguments, default=default, prog="steelyard adapt best_of_n", args=rest)
    config = args.config
    require_fit(config.policy, scorer)
    if args.out.suffix != ".jsonl":
        raise DataError(f"--out {args.out}: expected a name that ends in .jsonl")
    if not args.out.parent.is_dir():
        raise DataError(f"--out {args.out}: there is no folder {args.out.parent}")
    runtime.prepare(runtime.RuntimeConfig(device=args.device))
    everything = read_prompts(args.prompts)
    answerer = open_answerer(args.model, named, args.device, allow_code=True)
    wanted = replace(everything, rows=everything.rows[: config.limit])
    data = tokenize(wanted, answerer.tokenizer, config.max_prompt_tokens, truncation=config.truncation)
    for sentence in (*everything.notes, *data.report.sentences()):
        print(f"note: {sentence}", file=sys.stderr)
    try:
        rows = answer(args.out, answerer, data, config, {"prompts": everything.content_hash})
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    title = f"{args.out}: {args.model}, chosen by {scorer}"
    table = Table("measure", "value", "95% interval", title=title, title_justify="left")
    for words, value in summary(rows, config.seed):
        if isinstance(value, Estimate):
            table.add_row(words, f"{value.value:.2f}", "" if value.low is None else value.interval())
        else:
            table.add_row(words, value)
    Console().print(table)
    return 0
