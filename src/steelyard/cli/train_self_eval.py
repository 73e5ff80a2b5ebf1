"""`steelyard train self_eval`: a language model learns whether it would do better if it started over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steelyard.bench.stats import Estimate
from steelyard.cli import arguments
from steelyard.cli.train_preference import with_model
from steelyard.config import config_hash, read_config, with_fields
from steelyard.errors import ConfigError, near
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig
from steelyard.workflows import self_eval
from steelyard.workflows.self_eval_evaluation import read_report

READERS: dict[str, Any] = {"suffix": SuffixConfig, "slot": SlotConfig, "probe": ProbeConfig}
USAGE = f"""usage: steelyard train self_eval --pool DIR [--reader NAME] [--model NAME] [--lora RANK] [OPTIONS]
       steelyard train --resume DIR

Train a language model to say, at any point of an answer, whether a fresh sample of its own would be better. The answer
decides how often to sample, what to give up early, and which sample to keep: steelyard adapt best_of_n, steelyard serve
lm.

  --pool DIR      judged samples of this model (steelyard data pool --help); a share of the prompts is held out
  --held-out DIR  samples of other prompts in place of that share
  --reader NAME   {", ".join(READERS)}: a question and its answer, two reserved tokens, or a small network beside a
                  frozen model
  --model NAME    a name on the hub, a folder, a *.gguf file, smollm2 (packaged, default), or tiny (random)
  --lora RANK     train low-rank adapters instead of all weights
  --kl-weight W   how firmly the policy is kept what it was
  --config FILE   start from the config of another run, or one written by hand
  --out DIR       run directory; default: runs/self_eval-HASH
"""


def main(argv: list[str]) -> int:
    """Run `steelyard train self_eval`."""
    out, rest = arguments.take_option(argv, "--out", None)
    config = read(rest)
    folder = out or f"runs/self_eval-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: self_eval.start(config, folder)))


def read(argv: list[str]) -> self_eval.SelfEvalRun:
    """Return the config that the options describe."""
    file, rest = arguments.take_option(argv, "--config", None)
    config = read_config(self_eval.SelfEvalRun, file) if file else self_eval.SelfEvalRun()
    name, rest = arguments.take_option(rest, "--reader", None)
    fields: dict[str, Any] = {}
    if name is not None:
        if name not in READERS:
            raise ConfigError(f"--reader: unknown {name!r}; {near(name, READERS)}")
        if config.objective.reader.kind != name:
            fields["objective.reader"] = READERS[name]()
    adapted = "--lora" in rest or any(word.startswith("--lora=") for word in rest)
    model, rest = with_model(config.model, rest)
    config = replace(config, model=model)
    if adapted:
        fields["objective.learning_rate"] = 1e-4
    for option, key in (("--pool", "data.path"), ("--held-out", "data.held_out")):
        value, rest = arguments.take_option(rest, option, None)
        fields |= {} if value is None else {key: value}
    weight, rest = arguments.take_option(rest, "--kl-weight", None)
    if weight is not None:
        try:
            fields["objective.kl_weight"] = float(weight)
        except ValueError:
            raise ConfigError(f"--kl-weight: expected a number, found {weight!r}") from None
    config = with_fields(config, fields)
    found: self_eval.SelfEvalRun = arguments.parse(
        self_eval.SelfEvalRun, config, "steelyard train self_eval", rest, USAGE
    )
    return found


def resume(directory: str, rest: list[str]) -> int:
    """Continue a self-evaluation's run."""
    if rest:
        raise ConfigError(f"--resume takes no other options (the run's config is in {directory}), found {rest[0]!r}")
    return finish(*arguments.carry_out(lambda: self_eval.resume(directory)))


def finish(folder: Path | None, status: int) -> int:
    """Print what held-out prompts say; return the exit status."""
    if folder is not None:
        show(folder)
    return status


def show(folder: Path) -> None:
    """Print the report of a finished run."""
    console = Console()
    report = read_report(folder)
    if report is None:
        console.print(f"{folder}: nothing was held out, so nothing is known of how good the scores are")
        return
    table = Table(title="P(no fresh sample would be better) on held-out prompts")
    for name in ("read", "samples", "AUC within prompts", "AUC across prompts", "ECE", "before calibration"):
        table.add_column(name)
    for row in report.rows:
        where = row.where if not row.where.isdigit() else f"after {row.where} tokens"
        table.add_row(
            where, str(row.samples), _text(row.within), _text(row.across), f"{row.ece:.3f}", f"{row.ece_raw:.3f}"
        )
    console.print(table)
    if report.drift is not None:
        console.print(
            f"policy: KL from what it was {report.drift.kl:.4f} nats a token, the same likeliest token at "
            f"{report.drift.greedy_match:.1%} of {report.drift.tokens}"
        )
    console.print(f"kept update {report.step}; {folder / 'self_eval.json'}, {folder / 'self_eval.jsonl'}")


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else estimate.text()
