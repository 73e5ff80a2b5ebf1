"""`steelyard run RECIPE [--size tiny|small|paper] [--seeds 0 1 2] [any config field]`."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from typing import Any

from steelyard.cli.arguments import environment, parse, take_option
from steelyard.errors import ConfigError, near
from steelyard.recipes import RECIPES
from steelyard.train.loop import Interrupted


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: steelyard run RECIPE [--size tiny|small|paper] [OPTIONS]\n\nrecipes:")
        print("\n".join(f"  {name:16s} {text}" for name, text in RECIPES.items()))
        print("\nsteelyard run RECIPE --help lists every option of one.")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; {near(name, RECIPES)}")
    recipe = importlib.import_module(f"steelyard.recipes.{name}")
    size, rest = take_option(rest, "--size", "tiny")
    if size not in recipe.PRESETS:
        raise ConfigError(f"--size must be one of {', '.join(recipe.PRESETS)}, found {size!r}")
    preset: Any = recipe.PRESETS[size]
    env, rest = take_option(rest, "--env", None)
    if env is not None:
        if not hasattr(preset, "run"):
            raise ConfigError(f"recipe {name!r} has no environment; leave --env out")
        preset = dataclasses.replace(preset, run=dataclasses.replace(preset.run, env=environment(env)))
    config = parse(type(preset), preset, f"steelyard run {name} --size {size}", rest)
    try:
        recipe.run(config, size)
    except Interrupted:
        print(f"interrupted; a checkpoint was written. Go on with: steelyard run {shlex.join(argv)}", file=sys.stderr)
        return 130
    return 0
