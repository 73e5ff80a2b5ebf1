"""`steelyard advise`: which preference method for this model, this data and this reward?"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.bench.advise import Advice, Names, advise
from steelyard.bench.evidence import Evidence, measure
from steelyard.cli.pairs import open_model
from steelyard.data.preferences import read_text_data, tokenize
from steelyard.envs.scorers import scorer_from_name
from steelyard.errors import ConfigError
from steelyard.workflows.advise import AdviseConfig, observe, some_rows, write_advice

LEARNED = ("reward_model:", "implicit:")


@dataclass(frozen=True)
class AdviseArguments:
    """Measure where a reward's peak lies relative to a model, how distinct and how on-policy pairs are, and say which
    preference method to use, with the numbers and the command.

    Heuristics: the thresholds tell planted cases apart; nobody has calibrated them on real data sets.
    """

    data: str
    """Preference set (or prompts alone, with a scorer): a file, a folder or a name on the hub."""
    model: str = "smollm2"
    """Language model: a name on the hub, a folder, a *.gguf file, a preference run, "smollm2" or "tiny"."""
    scorer: str | None = None
    """The reward, e.g. length:min, python:FILE.py:FUNCTION or reward_model:RUN; None: the data's pairs alone."""
    out: Path | None = None
    """Write everything to this JSON file, and a page beside it."""
    config: Annotated[AdviseConfig, tyro.conf.arg(name="")] = field(default_factory=AdviseConfig)
    device: str = "cpu"
    """Where the model runs."""


def main(argv: list[str]) -> int:
    """Run the command."""
    args = tyro.cli(AdviseArguments, prog="steelyard advise", args=argv, config=(tyro.conf.OmitArgPrefixes,))
    if args.out is not None and args.out.suffix != ".json":
        raise ConfigError(f"--out: expected the name of a .json file, found {args.out}")
    runtime.prepare(runtime.RuntimeConfig(device=args.device))
    scorer = None if args.scorer is None else scorer_from_name(args.scorer, allow_code=True)
    learned = args.scorer is not None and any(kind in args.scorer for kind in LEARNED)
    rows, config = read_text_data(args.data), args.config
    if rows.kind != "preference" and scorer is None:
        raise ConfigError(f"{args.data}: holds no pairs (it is of kind {rows.kind!r}), so a reward is needed: --scorer")
    model, tokenizer, sampler = open_model(args.model, config.sampling, args.device)
    some = some_rows(rows, config)
    data = tokenize(some, tokenizer, config.max_prompt_tokens, config.max_completion_tokens, config.truncation)
    for sentence in (*rows.notes, *data.report.sentences()):
        print(f"note: {sentence}", file=sys.stderr)
    seen, shown = observe(model, sampler, data, scorer, config, learned)
    evidence = measure(seen, config.seed)
    names = Names(args.model, args.data, args.scorer, preferences=rows.kind == "preference")
    found = advise(evidence, names, learned)
    if args.out is not None:  # before anything is printed: a closed pipe must not cost the measurement
        settings = {"model": args.model, "data": args.data, "data_hash": rows.content_hash, "scorer": args.scorer}
        title = f"Advice for {args.model}"
        page = write_advice(args.out, title, evidence, found, shown, settings | {"config": asdict(config)})
        print(f"wrote {args.out} and {page}", file=sys.stderr)
    show(evidence, found)
    return 0


def show(evidence: Evidence, advice: list[Advice]) -> None:
    """Print warnings, measures and advice."""
    console = Console()
    for warning in evidence.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    for question, measures in evidence.questions.items():
        table = Table("measure", "value", "95% interval", "", title=question, title_justify="left", box=None)
        for one in measures:
            table.add_row(one.label, *one.cells(), one.note)
        console.print(table)
        console.print()
    for item in advice:
        console.print(f"[bold]{item.topic}[/bold] ({item.confidence}): {item.verdict}", highlight=False)
        for number in item.numbers:
            console.print(f"  measured: {number}", markup=False, highlight=False)
        console.print(f"  rule: {item.rule}", markup=False, highlight=False)
        for command in item.commands:
            print(f"  $ {command}")  # whole, so that it can be copied
        console.print()
