"""`steelyard config show NAME | diff LEFT RIGHT`: look at presets and at the configs of runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steelyard.config import diff, plain
from steelyard.errors import ConfigError
from steelyard.objectives import OBJECTIVES
from steelyard.recipes import RECIPES
from steelyard.workflows.control import ControlRun
from steelyard.workflows.language import LanguageRun

USAGE = """usage: steelyard config show WHAT
       steelyard config diff LEFT RIGHT

WHAT, LEFT, RIGHT: a recipe preset ("cal_ql/tiny"), an objective ("cql", "preference/rloo": the defaults of
steelyard train), a run directory, or a config file. `show` prints JSON that `steelyard train --config FILE` reads back.
"""


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    match argv:
        case ["show", what]:
            print(json.dumps(read(what), indent=2, sort_keys=True))
        case ["diff", left, right]:
            _print_difference(left, right)
        case _:
            raise ConfigError(f"expected 'show WHAT' or 'diff LEFT RIGHT', found {' '.join(argv)!r}")
    return 0


def read(what: str) -> dict[str, Any]:
    """Return the config that `what` names, as plain JSON."""
    path = Path(what)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
        return found
    name, _, size = what.partition("/")
    if name in RECIPES:
        presets = importlib.import_module(f"steelyard.recipes.{name}").PRESETS
        if (size or "tiny") in presets:
            return plain(presets[size or "tiny"])
        raise ConfigError(f"recipe {name!r} has no preset {size!r}; there are: {', '.join(presets)}")
    if what in OBJECTIVES:
        return plain(ControlRun(objective=OBJECTIVES[what]()))
    if what == "sft":
        return plain(LanguageRun())
    if name == "preference":
        from steelyard.cli.train_preference import default_run

        return plain(default_run(size or "dpo"))
    if what == "reward_model":
        from steelyard.workflows.reward_model import RewardModelRun

        return plain(RewardModelRun())
    known = [*(f"{recipe}/SIZE" for recipe in RECIPES), *OBJECTIVES, "sft", "preference/OBJECTIVE", "reward_model"]
    raise ConfigError(f"{what!r} is neither a file, a run directory nor one of {', '.join(known)}")


def _print_difference(left: str, right: str) -> None:
    table = Table("key", left, right)
    for key, (a, b) in diff(read(left), read(right)).items():
        table.add_row(key, json.dumps(a), json.dumps(b))
    console = Console()
    console.print(table if table.row_count else "no difference")
