"""`steelyard finetune RUN [--env ID] [--data PATH] [--out DIR] [any config field]`: continue a policy online."""

from __future__ import annotations

import dataclasses

from steelyard.artefact import ControlArtefact, find
from steelyard.cli import arguments
from steelyard.cli.train import finish
from steelyard.config import config_hash, from_json, read_config
from steelyard.errors import ConfigError
from steelyard.workflows import control
from steelyard.workflows.common import Case

USAGE = """usage: steelyard finetune RUN [--env ID] [--data PATH] [--which last|best] [--out DIR] [OPTIONS]

Start from the weights, multipliers and optimiser state of a run or checkpoint and fine-tune online. Data, environment
and settings are those of the run unless given anew; there are no offline updates unless --offline-steps asks for some.
"""


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    source, rest = arguments.required_positional(argv, "the run", "steelyard finetune RUN")
    out, rest = arguments.take_option(rest, "--out", None)
    which, rest = arguments.take_option(rest, "--which", "last")
    if which not in ("last", "best"):
        raise ConfigError(f"--which must be last or best, found {which!r}")
    folder = find(source, "best" if which == "best" else "last")
    artefact = from_json(
        ControlArtefact, (folder / "pretrained/config.json").read_text(), str(folder / "pretrained/config.json")
    )
    file = folder.parent.parent / "config.json"
    base = read_config(control.ControlRun, file) if file.is_file() else control.ControlRun(env=artefact.env)
    base = dataclasses.replace(base, objective=artefact.objective, initial=str(folder), offline_steps=0)
    base, rest = arguments.with_short_options(base, rest)
    if base.env is None and "-h" not in rest and "--help" not in rest:
        raise ConfigError(f"{source} was trained without an environment: say where to fine-tune with --env ID")
    config = arguments.parse(control.ControlRun, base, "steelyard finetune RUN", rest)
    if config.online.updates == 0:
        raise ConfigError(f"nothing to do: online.env_steps is {config.online.env_steps}; set --online.env-steps")
    target = out or f"runs/finetune-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: control.start(config, target, Case("finetune"))))
