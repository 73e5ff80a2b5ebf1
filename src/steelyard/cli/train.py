"""`steelyard train OBJECTIVE --data PATH [--env ID] [any config field]`, or `steelyard train --resume DIR`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from steelyard.cli import arguments, train_hyre, train_preference, train_self_eval
from steelyard.config import config_hash, read_config
from steelyard.errors import ConfigError, near
from steelyard.objectives import OBJECTIVES
from steelyard.train.distributed import is_main
from steelyard.workflows import control, language
from steelyard.workflows.common import kind_of_run

USAGE = f"""usage: steelyard train OBJECTIVE --data PATH [--env ID] [--out DIR] [--config FILE] [OPTIONS]
       steelyard train --resume DIR

Pre-train on recorded behaviour (or text), fine-tune online where an environment is given, and write a report.

objectives: {", ".join(OBJECTIVES)}, sft
language models: preference, reward_model (steelyard train preference --help)
ensembles to be adapted by a few labels: hyre (steelyard train hyre --help)
language models that judge their own samples: self_eval (steelyard train self_eval --help)

  --data PATH    data set in any known format (see steelyard data --help); for sft, a text file
  --env ID       Gymnasium environment to evaluate and fine-tune in
  --out DIR      run directory; default: runs/OBJECTIVE-HASH
  --config FILE  start from a config written by `steelyard config show` or found in a run directory
  --resume DIR   continue a stopped run, exactly as if it had not been stopped

`steelyard train OBJECTIVE --help` lists every option (with --env ID, the environment's too).
"""


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    directory, rest = arguments.take_option(argv, "--resume", None)
    if directory is not None:
        kind = kind_of_run(directory)
        if kind in ("preference", "reward_model"):
            return train_preference.resume(directory, rest)
        if kind == "hyre":
            return train_hyre.resume(directory, rest)
        if kind == "self_eval":
            return train_self_eval.resume(directory, rest)
        if rest:
            raise ConfigError(
                f"--resume takes no other options (the run's config is in {directory}), found {rest[0]!r}"
            )
        resume = language.resume if kind == "sft" else control.resume
        return finish(*arguments.carry_out(lambda: resume(directory)))
    kind, rest = arguments.required_positional(argv, "the objective", "steelyard train OBJECTIVE --data PATH")
    if kind == "preference":
        return train_preference.main(rest)
    if kind == "reward_model":
        return train_preference.main_reward_model(rest)
    if kind == "hyre":
        return train_hyre.main(rest)
    if kind == "self_eval":
        return train_self_eval.main(rest)
    out, rest = arguments.take_option(rest, "--out", None)
    file, rest = arguments.take_option(rest, "--config", None)
    if kind == "sft":
        data, rest = arguments.take_option(rest, "--data", None)
        text_run = read_config(language.LanguageRun, file) if file else language.LanguageRun()
        if data is not None:
            text_run = dataclasses.replace(text_run, path=data)
        text_run = arguments.parse(language.LanguageRun, text_run, "steelyard train sft", rest)
        folder = out or f"runs/sft-{config_hash(text_run)[:8]}"
        return finish(*arguments.carry_out(lambda: language.start(text_run, folder)))
    if kind not in OBJECTIVES:
        known = [*OBJECTIVES, "sft", "preference", "reward_model", "hyre", "self_eval"]
        raise ConfigError(f"unknown objective {kind!r}; {near(kind, known)}")
    config = read_config(control.ControlRun, file) if file else control.default_run(kind)
    if config.objective.kind != kind:
        raise ConfigError(f"{file}: its objective is {config.objective.kind!r}, but {kind!r} was asked for")
    config, rest = arguments.with_short_options(config, rest)
    config = arguments.parse(control.ControlRun, config, f"steelyard train {kind}", rest)
    if config.env is None:
        config = dataclasses.replace(config, online=dataclasses.replace(config.online, env_steps=0))
    folder = out or f"runs/{kind}-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: control.start(config, folder)))


def finish(folder: Path | None, status: int) -> int:
    """Report on a finished run; return the exit status."""
    if folder is not None and is_main():
        from steelyard.cli.report import show

        show(folder)
    return status
