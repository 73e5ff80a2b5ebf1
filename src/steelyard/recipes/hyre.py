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

from steelyard import runtime
from steelyard.config import Config, config_hash, flatten, plain, require_positive, to_json
from steelyard.errors import ConfigError, MissingExtraError, require
from steelyard.recipes import hyre_cost, hyre_personas, hyre_rewards, hyre_tables
from steelyard.recipes.hyre_cost import CostStudy
from steelyard.recipes.hyre_personas import PersonaStudy
from steelyard.recipes.hyre_rewards_heads import RewardStudy
from steelyard.recipes.hyre_tables_runs import TableStudy
from steelyard.recipes.preference_findings import Finding, claims_table, tally
from steelyard.report.page import Page, Section, write_page
from steelyard.report.tables import Table

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
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(to_json(config), encoding="utf-8")
    sections: list[Section] = []
    found: list[tuple[str, Finding]] = []
    for part in config.parts:
        try:
            more, says = _part(part, config, out / part, size, console)
        except MissingExtraError as error:
            console.print(f"{part}: left out: {error}", markup=False, highlight=False)
            more, says = [Section(f"Left out: {part}").text(str(error))], []
        sections += more
        found += [(part, one) for one in says]
    claims = [one for _, one in found]
    page = Page("HyRe: test-time alignment by re-weighting hypotheses", _lead(claims, config))
    if claims:
        section = page.section("The claims")
        section.notes([f"Does not hold here: {one.claim}" for one in claims if one.verdict == "does not hold"])
        section.table(claims_table(claims))
    page.sections += sections
    page.sections.append(_provenance(config, size))
    path = write_page(page, out)
    for one in claims:
        console.print(f"{one.verdict}: {one.claim}: {one.measured}", markup=False, highlight=False)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path


def _part(part: Part, config: HyReStudy, out: Path, size: str, console: Console) -> tuple[list[Section], list[Finding]]:
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
        case "maze":
            require("gymnasium_robotics", "sim")
            maze: Any = importlib.import_module("steelyard.recipes.hyre_maze")  # needs the extra sim
            result: tuple[list[Section], list[Finding]] = maze.run(maze.PRESETS[size], out, config.workers, console)
            return result


def _lead(found: list[Finding], config: HyReStudy) -> str:
    parts = f"Parts on this page: {', '.join(config.parts)}."
    return f"Of {len(found)} claims, {tally(found)}. {parts}" if found else parts


def _provenance(config: HyReStudy, size: str) -> Section:
    """Return where the numbers come from: files, settings and machine."""
    section = Section("Where the numbers come from")
    section.text(
        f"steelyard run hyre --size {size}. Beside this page, one folder for each part with its rows as CSV. Nothing "
        "was left out of a mean."
    )
    settings = tuple((key, str(value)) for key, value in flatten(plain(config)).items())
    machine = tuple((key, str(value)) for key, value in flatten(runtime.describe()).items())
    return section.table(
        Table("Settings", "The whole config of this call.", ("key", "value"), settings),
        Table("Environment", "Where the page was written.", ("key", "value"), machine),
    )


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
