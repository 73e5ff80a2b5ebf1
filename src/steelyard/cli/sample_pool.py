"""`steelyard data pool build | import | score | describe`: samples of prompts with rewards, kept for many uses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.bench.stats import Estimate
from steelyard.data import sample_pool_imports as imports
from steelyard.data.preferences import read_text_data, tokenize
from steelyard.data.sample_pool import SamplePool
from steelyard.data.sample_pool_jsonl import user_jsonl
from steelyard.data.tokenizer import load_tokenizer
from steelyard.envs.scorers import scorer_from_name
from steelyard.errors import ConfigError, DataError
from steelyard.nets.self_eval import Evaluator
from steelyard.workflows.pairs import prompts_only
from steelyard.workflows.preference import load_by_name, tokenizer_of
from steelyard.workflows.sample_pool import Answer, SamplePoolConfig, build_pool, prompts_of
from steelyard.workflows.sample_pool_facts import facts, known_rewards, selection_rows
from steelyard.workflows.self_eval import is_self_eval_run, load_self_eval, score_pool

USAGE = """usage: steelyard data pool COMMAND ...

commands:
  build OUT               draw samples of prompts from a language model and score them; goes on where it was stopped
  import KIND SRC OUT     read samples that others made (KIND: jsonl, game24, humaneval, math_best_of_8, gsm8k,
                          alpaca_eval)
  score POOL OUT          add a trained self-evaluation's scores (--model RUN)
  describe POOL           counts, rewards, ties, and what each way of choosing among k samples is worth

`steelyard data pool COMMAND --help` lists the options.
"""


@dataclass(frozen=True)
class Build:
    """Draw N completions of each prompt and score them.

    The same command goes on where it was stopped; at most one piece of prompts is drawn again.
    """

    out: tyro.conf.Positional[Path]
    """Folder of the pool."""
    prompts: str
    """Text data with prompts: a file, a folder or a name on the hub; completions in it are not read. A column `stratum`
    says what kind a prompt is."""
    scorer: str
    """What judges completions, e.g. regex:PATTERN, length:min, reward_model:RUN, python:FILE.py:FUNCTION."""
    model: str = "smollm2"
    """Language model: a name on the hub, a folder, a *.gguf file, a preference run, "smollm2", "tiny", or a run of
    `steelyard train self_eval`, whose scores are kept too."""
    answer: str | None = None
    """Pattern of the answer, for votes: the last match in a completion, its first group if it has one."""
    config: Annotated[SamplePoolConfig, tyro.conf.arg(name="")] = field(default_factory=SamplePoolConfig)
    rows: int | None = None
    """Completions decoded at a time."""
    device: str = "cpu"
    """Where the model runs."""


@dataclass(frozen=True)
class Import:
    """Read samples that others made."""

    kind: tyro.conf.Positional[Literal["jsonl", "game24", "humaneval", "math_best_of_8", "gsm8k", "alpaca_eval"]]
    """jsonl: your own file; the others: folders of published samples (docs/sample_pools.md)."""
    src: tyro.conf.Positional[Path]
    """File or folder to read."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist."""
    tokenizer: str | None = None
    """Counts lengths and gives token ids: "smollm2", "byte", a folder, a *.gguf file or a name on the hub; without it
    words and signs are counted."""
    samples: int | None = None
    """jsonl: keep the first so many of each prompt, leave out prompts with fewer."""
    prompting: Literal["cot", "standard"] = "cot"
    """game24: which of the two prompting styles."""
    judge: imports.Judge = "p_vs_gpt4turbo"
    """alpaca_eval: whose preference is the reward."""


@dataclass(frozen=True)
class Score:
    """Add a trained self-evaluation's scores to a pool's samples."""

    pool: tyro.conf.Positional[Path]
    """Pool to read."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist."""
    model: str
    """Run of `steelyard train self_eval`."""
    checkpoints: tuple[int, ...] = ()
    """Token counts at which unfinished samples are scored too."""
    device: str = "cpu"
    """Where the model runs."""


@dataclass(frozen=True)
class Describe:
    """Show what a pool holds and what choosing among its samples is worth."""

    pool: tyro.conf.Positional[Path]
    """Folder of the pool."""
    strata: bool = False
    """Also for each kind of prompt apart."""


def pool(argv: list[str]) -> int:
    """Run the command."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "build": _build, "import": _import, "score": _score, "describe": _describe,
    }  # fmt: skip
    if not argv or argv[0] not in commands:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return commands[argv[0]](argv[1:])


ArgsT = TypeVar("ArgsT")


def _parse(cls: type[ArgsT], name: str, argv: list[str]) -> ArgsT:
    return tyro.cli(cls, prog=f"steelyard data pool {name}", args=argv, config=(tyro.conf.OmitArgPrefixes,))


def _build(argv: list[str]) -> int:
    args = _parse(Build, "build", argv)
    runtime.prepare(runtime.RuntimeConfig(device=args.device))
    scorer = scorer_from_name(args.scorer, allow_code=True)
    answer = None if args.answer is None else answer_of_pattern(args.answer)
    config = args.config
    everything = prompts_only(read_text_data(args.prompts))
    evaluator: Evaluator | None = None
    if is_self_eval_run(args.model):
        trained = load_self_eval(args.model, device=args.device)
        model, evaluator = trained.model, trained.evaluator
    else:
        model = load_by_name(args.model, args.device)
    tokenizer = tokenizer_of(model)
    wanted = replace(everything, rows=everything.rows[: config.limit])
    data = tokenize(wanted, tokenizer, config.max_prompt_tokens, truncation=config.truncation)
    for sentence in (*everything.notes, *data.report.sentences()):
        print(f"note: {sentence}", file=sys.stderr)
    identity = {"model": args.model, "prompts": everything.content_hash, "answer": args.answer}
    try:
        built = build_pool(
            args.out, prompts_of(data), model, scorer, config, identity,
            evaluator=evaluator, answer=answer, eos=tokenizer.eos, decode=tokenizer.decode, rows=args.rows,
            source=f"{args.prompts}, {args.model}, {scorer.name}",
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    _print(built, str(args.out))
    return 0


def _import(argv: list[str]) -> int:
    args = _parse(Import, "import", argv)
    if args.out.exists():
        raise DataError(f"{args.out}: already exists; choose another path or remove it")
    if args.samples is not None and (args.kind != "jsonl" or args.samples < 1):
        raise ConfigError(f"samples: expected a number above 0, and of jsonl only; found {args.samples}, {args.kind}")
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    readers: dict[str, Callable[[], SamplePool]] = {
        "jsonl": lambda: user_jsonl(args.src, args.samples, tokenizer),
        "game24": lambda: imports.game24(args.src, args.prompting, tokenizer),
        "humaneval": lambda: imports.humaneval(args.src, tokenizer),
        "math_best_of_8": lambda: imports.math_best_of_8(args.src, tokenizer),
        "gsm8k": lambda: imports.gsm8k(args.src, tokenizer),
        "alpaca_eval": lambda: imports.alpaca_eval(args.src, args.judge, tokenizer=tokenizer),
    }
    found = readers[args.kind]()
    found.save(args.out, {"import": args.kind, "tokenizer": args.tokenizer})
    _print(found, str(args.out))
    return 0


def _score(argv: list[str]) -> int:
    args = _parse(Score, "score", argv)
    if args.out.exists():
        raise DataError(f"{args.out}: already exists; choose another path or remove it")
    runtime.prepare(runtime.RuntimeConfig(device=args.device))
    if not is_self_eval_run(args.model):
        raise ConfigError(f"{args.model}: expected a run of `steelyard train self_eval`, found none")
    trained = load_self_eval(args.model, device=args.device)
    found, tokenizer = SamplePool.load(args.pool), tokenizer_of(trained.model)
    scored = score_pool(trained.model, trained.evaluator, found, args.checkpoints, tokenizer=tokenizer)
    scored.save(args.out, {"pool": str(args.pool), "scores": args.model})
    _print(scored, str(args.out))
    return 0


def _describe(argv: list[str]) -> int:
    args = _parse(Describe, "describe", argv)
    found = SamplePool.load(args.pool)
    _print(found, f"{args.pool}: {found.source}")
    for stratum in sorted({item.stratum for item in found if item.stratum}) if args.strata else ():
        rows = [row for row, item in enumerate(found.items) if item.stratum == stratum]
        _print(found.take(rows), f"{args.pool}, {stratum}")
    return 0


def answer_of_pattern(pattern: str) -> Answer:
    """Return what finds the last match of a pattern in a completion, "" if there is none.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"answer: {pattern!r} is not a regular expression: {error}") from None

    def answer(text: str) -> str:
        last = ""
        for found in compiled.finditer(text):
            last = found.group(1 if compiled.groups else 0) or ""
        return last.strip()

    return answer


def _print(found: SamplePool, title: str) -> None:
    console = Console()
    table = Table("measure", "value", "95% interval", "", title=title, title_justify="left")
    for fact in facts(found):
        if isinstance(fact.value, Estimate):
            interval = "" if fact.value.low is None else fact.value.interval(3)
            table.add_row(fact.what, f"{fact.value.value:.3f}", interval, fact.note)
        elif fact.value or fact.what in ("prompts", "samples"):
            table.add_row(fact.what, f"{fact.value:g}", "", fact.note)
    console.print(table)
    known = known_rewards(found)
    if not len(known):
        return
    rows = selection_rows(known)
    ks = list(dict.fromkeys(k for _, k, _ in rows))
    worth = Table("chosen by", *(f"of {k}" for k in ks), title="mean reward of what is chosen", title_justify="left")
    for rule in dict.fromkeys(rule for rule, _, _ in rows):
        values = [value for name, _, value in rows if name == rule]
        last = values[-1]
        cells = [f"{value.value:.3f}" for value in values]
        cells[-1] += "" if last.low is None else f" {last.interval(3)}"
        worth.add_row(rule, *cells)
    console.print(worth)
