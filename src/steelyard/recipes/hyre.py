"""HyRe: an ensemble at the price of one model, re-weighted at test time by a handful of labels.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812).

Claim: pooled training data leave it open which of many functions is right; members of an efficient ensemble are
hypotheses, and five labels of the target choose among them better than the uniform mean, the single model and few-shot
fine-tuning, at negligible cost.

Parts of the page, each optional:

- personas: E1, E1b, E4, E6: unseen users, conflicting users, active questions, head sets (`hyre_personas.py`);
- tables: E2, regression and classification under shift (`hyre_tables.py`);
- rewards: E3, real preference distributions (`hyre_rewards.py`);
- cost: E5 (`hyre_cost.py`);
- maze: policies re-weighted in a shifted point maze (`hyre_maze.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from steelyard.config import Config, config_hash, require_positive
from steelyard.errors import ConfigError, require
from steelyard.recipes import hyre_cost, hyre_personas, hyre_rewards, hyre_tables
from steelyard.recipes.hyre_cost import CostStudy
from steelyard.recipes.hyre_personas import PersonaStudy
from steelyard.recipes.hyre_rewards_heads import RewardStudy
from steelyard.recipes.hyre_tables_runs import TableStudy
from steelyard.recipes.parts import write_parts
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

Part = Literal["personas", "tables", "rewards", "cost", "maze"]


@dataclass(frozen=True)
class HyReStudy(Config):
    """Measure what a handful of labels is worth, where, and what it costs."""

    parts: tuple[Part, ...] = ("personas", "tables", "rewards", "cost", "maze")
    """Which parts run; the page holds the sections of these."""
    data: str | None = None
    """Folder with real data (persona_statements, reward_subsets, rm_bench, uci_regression, ...); None: what needs it is
    left out, or generated."""
    workers: int = 2
    """Processes at a time, one thread each."""
    out: str | None = None
    """Directory of the rows and the page; default: runs/hyre-SIZE-HASH. A stopped study goes on there."""
    personas: PersonaStudy = field(default_factory=PersonaStudy)
    """E1, E1b, E4 and E6."""
    tables: TableStudy = field(default_factory=TableStudy)
    """E2."""
    rewards: RewardStudy = field(default_factory=RewardStudy)
    """E3."""
    cost: CostStudy = field(default_factory=CostStudy)
    """E5."""

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.parts:
            raise ConfigError("parts must not be empty; there are personas, tables, rewards, cost and maze")
        require_positive(self, "workers")


def run(config: HyReStudy, size: str) -> Path:
    """Carry out the parts, or go on with them, and write report.html and report.md. Return the former's path."""
    console = Console()
    require("matplotlib", "report")  # the page comes last; nobody should wait for it in vain
    unplaced = replace(config, out=None, workers=1, parts=("personas",))
    out = Path(config.out or f"runs/hyre-{size}-{config_hash(unplaced)[:8]}")
    return write_parts(
        "HyRe: test-time alignment by re-weighting hypotheses",
        f"steelyard run hyre --size {size}",
        "Beside this page, one folder for each part with its rows as CSV. Nothing was left out of a mean.",
        config,
        config.parts,
        lambda part: _part(part, config, out / part, size, console),
        out,
        console,
    )


def _part(part: str, config: HyReStudy, out: Path, size: str, console: Console) -> tuple[list[Section], list[Finding]]:
    match part:
        case "personas":
            study = hyre_personas.with_data(config.personas, config.data)
            return hyre_personas.run(study, out, config.workers, console)
        case "tables":
            return hyre_tables.run(replace(config.tables, data=config.data), out, config.workers, console)
        case "rewards":
            return hyre_rewards.run(replace(config.rewards, data=config.data), out, config.workers, console)
        case "cost":
            return hyre_cost.run(config.cost, out, config.workers, console)
        case _:  # maze
            require("gymnasium_robotics", "sim")
            maze: Any = importlib.import_module("steelyard.recipes.hyre_maze")  # needs the extra sim
            result: tuple[list[Section], list[Finding]] = maze.run(maze.PRESETS[size], out, config.workers, console)
            return result


PRESETS = {
    size: HyReStudy(
        personas=hyre_personas.PRESETS[size],
        tables=hyre_tables.PRESETS[size],
        rewards=hyre_rewards.PRESETS[size],
        cost=hyre_cost.PRESETS[size],
    )
    for size in ("tiny", "small", "paper")
}
"""tiny: generated users and bundled tables, no data needed; small and paper: with `--data`."""
