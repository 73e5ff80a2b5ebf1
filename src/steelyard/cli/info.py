"""`steelyard info`: what a bug report and a number need."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime


@dataclass(frozen=True)
class InfoArguments:
    """Print versions, threads, matmul precision and hardware."""

    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Run the command."""
    arguments = tyro.cli(InfoArguments, prog="steelyard info", args=argv)
    precision = runtime.prepare(runtime.RuntimeConfig())
    found = runtime.describe() | {"matmul_error": runtime.matmul_error(), "matmul_precision": precision}
    if arguments.json:
        import json

        print(json.dumps(found, indent=2))
        return 0
    table = Table(show_header=False)
    for key, value in found.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else str(value)
        table.add_row(key, shown)
    Console().print(table)
    return 0
