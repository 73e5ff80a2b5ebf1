"""`steelyard export RUN --out DIR`: a policy as ONNX graphs, or a language model as safetensors, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from steelyard import runtime
from steelyard.errors import ConfigError


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained policy with a model card.

    Control policies (and their critics) become ONNX graphs, checked against torch, with spec.json. Language models
    become safetensors in the hub's layout: with the adapter merged, for transformers, or the adapter alone, for peft.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, checkpoint or pretrained/ directory."""
    out: Path
    """Directory to write; it must not exist."""
    which: Literal["last", "best"] = "last"
    """Which checkpoint of a run; "best" was chosen by its own evaluations."""
    merged: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Language models: adapters added to the weights (the default)."""
    adapter: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Language models: the adapter alone."""


def main(argv: list[str]) -> int:
    """Run the command."""
    arguments = tyro.cli(ExportArguments, prog="steelyard export", args=argv)
    runtime.prepare(runtime.RuntimeConfig())
    say = Console(soft_wrap=True, markup=False, highlight=False).print
    from steelyard.export_language import export_language, is_language_artefact

    if is_language_artefact(arguments.run):
        if arguments.merged and arguments.adapter:
            raise ConfigError("--merged and --adapter exclude each other")
        say(f"exported: {export_language(arguments.run, arguments.out, not arguments.adapter, arguments.which)}")
        return 0
    if arguments.merged or arguments.adapter:
        raise ConfigError(f"--merged and --adapter are for language models; {arguments.run} holds none")
    from steelyard.export import export

    made = export(arguments.run, arguments.out, arguments.which)
    found = ", ".join(f"{name} {difference:.2g}" for name, difference in made.differences.items())
    say(f"exported: {made.path}")
    say(f"greatest difference between torch and onnxruntime: {found}")
    return 0
