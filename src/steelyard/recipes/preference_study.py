"""Preference fine-tuning of language models: which property of a method matters, and when.

Tajwar, Singh, Sharma, Rafailov, Schneider, Xie, Ermon, Finn, Kumar, "Preference Fine-Tuning of LLMs Should Leverage
Suboptimal, On-Policy Data" (ICML 2024).

Claim: on-policy sampling and negative gradients beat offline maximum likelihood, most where the reward peaks where the
reference has little mass; some reuse of samples can replace some sampling; both together are best.

Three levels, each optional:

- bandit: one decision, everything known exactly, every arm with its own learning rate (`preference_bandit.py`);
- length: a small transformer and rewards of the completion's length, learned and gold (`preference_length.py`);
- full: language models of billions of parameters, as configs that are tried on a few rows here
  (`preference_full.py`).

The three axes are switches, not trainers: the objective is the same function at every level, who draws the completions
and how often they are used is the source's business, and lambda scales the negative gradient of any objective.
"""

from __future__ import annotations

import importlib
import json
import resource
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from steelyard import runtime
from steelyard.bench.rows import read_lines
from steelyard.bench.stats import number
from steelyard.config import Config, config_hash, flatten, plain, to_json
from steelyard.errors import ConfigError, require
from steelyard.recipes import preference_bandit, preference_bandit_page, preference_length
from steelyard.recipes.preference_bandit import BanditStudy
from steelyard.recipes.preference_findings import Finding, claims_table, tally
from steelyard.recipes.preference_length_runs import LengthStudy
from steelyard.report.page import Page, Section, write_page
from steelyard.report.tables import Table

Level = Literal["bandit", "length", "full"]


@dataclass(frozen=True)
class PreferenceStudy(Config):
    """Measure what on-policy sampling, reuse and the negative gradient are worth, at three scales."""

    levels: tuple[Level, ...] = ("bandit", "length", "full")
    """Which levels run; the page holds the sections of these."""
    seeds: tuple[int, ...] = ()
    """Reporting seeds of bandit and length; empty: those of each level's own settings."""
    workers: int = 2
    """Processes at a time, one thread each; 0 runs the bandits in this process."""
    out: str | None = None
    """Directory of the rows and the page; default: runs/preference_study-SIZE-HASH. A stopped study goes on there."""
    bandit: BanditStudy = field(default_factory=BanditStudy)
    """Level 1."""
    length: LengthStudy = field(default_factory=LengthStudy)
    """Level 2."""

    def __post_init__(self) -> None:
        """Check that there is something to do, and that seeds are not given twice."""
        if not self.levels:
            raise ConfigError("levels must not be empty; there are bandit, length and full")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must differ, found {self.seeds}")
        if self.workers < 0:
            raise ConfigError(f"workers must be at least 0, found {self.workers}")


def run(config: PreferenceStudy, size: str) -> Path:
    """Carry out the levels, or go on with them, and write report.html and report.md. Return the former's path."""
    console = Console()
    require("matplotlib", "report")  # the page comes last; nobody should wait for it in vain
    bandit, length = config.bandit, config.length
    if config.seeds:
        bandit, length = replace(bandit, seeds=config.seeds), replace(length, seeds=config.seeds)
    unplaced = replace(config, out=None, workers=1, seeds=(), levels=("bandit",))
    out = Path(config.out or f"runs/preference_study-{size}-{config_hash(unplaced)[:8]}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(to_json(config), encoding="utf-8")
    sections: list[Section] = []
    found: list[Finding] = []
    if "bandit" in config.levels:
        results = preference_bandit.carry_out(bandit, out, config.workers)
        found = preference_bandit_page.findings(results, bandit)
        sections += preference_bandit_page.sections(results, bandit)
    if "length" in config.levels:
        sections += preference_length.run(length, out / "length", max(1, config.workers), console)
    if "full" in config.levels:
        full = importlib.import_module("steelyard.recipes.preference_full")  # needs the extra lm
        sections += full.run(out / "full", console)
    page = Page("Preference fine-tuning: on-policy sampling, reuse and the negative gradient", _lead(found, config))
    if found:
        section = page.section("The claims in the bandits")
        failing = [finding.claim for finding in found if finding.verdict == "does not hold"]
        section.notes([f"Does not hold here: {claim}" for claim in failing])
        section.table(claims_table(found, "Claims, level 1"))
    page.sections += sections
    page.sections.append(_provenance(config, out, size))
    path = write_page(page, out)
    for finding in found:
        console.print(f"{finding.verdict}: {finding.claim}", markup=False, highlight=False)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path


def _lead(found: list[Finding], config: PreferenceStudy) -> str:
    """Return the result in words."""
    levels = f"Levels on this page: {', '.join(config.levels)}."
    if not found:
        return levels
    return f"Of {len(found)} claims tried in bandits, {tally(found)}. {levels}"


def _provenance(config: PreferenceStudy, out: Path, size: str) -> Section:
    """Return where the numbers come from: files, cost, settings and machine."""
    with (out / "costs.jsonl").open("a", encoding="utf-8") as file:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        file.write(json.dumps({"cpu_seconds": sum(one.ru_utime + one.ru_stime for one in used)}) + "\n")
    minutes = [row["cpu_seconds"] / 60 for row in read_lines(out / "costs.jsonl")]
    section = Section("Where the numbers come from")
    section.text(
        f"steelyard run preference_study --size {size}: {number(sum(minutes), 1)} CPU-minutes in {len(minutes)} "
        f"call{'s' if len(minutes) > 1 else ''}. Beside this page: bandit_runs.jsonl (every evaluation of every run), "
        "bandit_rows.csv (one row a reporting run), bandit_tuning.csv (one row a tuning run), and the folder length "
        "with the rows of level 2. Nothing was left out; failed runs count with their value at collapse."
    )
    settings = tuple((key, _text(value)) for key, value in flatten(plain(config)).items())
    machine = tuple((key, _text(value)) for key, value in flatten(runtime.describe()).items())
    return section.table(
        Table("Settings", "The whole config of this call.", ("key", "value"), settings),
        Table("Environment", "Where the page was written.", ("key", "value"), machine),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


PRESETS = {
    # a quarter of an hour on two cores: at most 25 CPU-minutes
    size: PreferenceStudy(bandit=preference_bandit.PRESETS[size], length=preference_length.PRESETS[size])
    for size in ("tiny", "small", "paper")
}
