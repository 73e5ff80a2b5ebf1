"""Adaptive inference-time compute: the model predicts whether starting over would do better, even in mid-answer.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation"
(arXiv 2410.02725).

Claim: a model that is asked "would you do better if you started over?" knows when another sample is worth its price: a
large part of the gain of best-of-16 for little more than one sample on average, half of the samples given up early at
little loss, and no reward model to choose the answer.

Parts of the page, each optional:

- tier1: a small transformer trained on the spot on step-by-step arithmetic: E7, E8, E9 (`adaptive_arithmetic.py`);
- tier2: SmolLM2-135M on reasoning tasks: E7, E8, E9 (`adaptive_smollm2.py`);
- pools: real samples of other models, evaluators trained on their text: E10 (`adaptive_pools.py`);
- actions: the same for robots, a critic values action chunks (`adaptive_actions.py`);
- cost: what a self-evaluation costs, and that it changes nothing: E11 (`adaptive_cost.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from steelyard.config import Config, config_hash, require_positive
from steelyard.errors import ConfigError, require
from steelyard.recipes import (
    adaptive_actions,
    adaptive_arithmetic,
    adaptive_cost,
    adaptive_pools,
    adaptive_smollm2,
)
from steelyard.recipes.adaptive_actions import ActionStudy
from steelyard.recipes.adaptive_arithmetic_runs import ArithmeticStudy
from steelyard.recipes.adaptive_cost import CostStudy
from steelyard.recipes.adaptive_pools import PoolsStudy
from steelyard.recipes.adaptive_smollm2 import SmolLMStudy
from steelyard.recipes.parts import write_parts
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

Part = Literal["tier1", "tier2", "pools", "actions", "cost"]
MODULES: dict[str, Any] = {
    "tier1": adaptive_arithmetic,
    "tier2": adaptive_smollm2,
    "pools": adaptive_pools,
    "actions": adaptive_actions,
    "cost": adaptive_cost,
}


@dataclass(frozen=True)
class AdaptiveStudy(Config):
    """Measure what adaptive sampling, early pruning and self-evaluation are worth, and what they cost."""

    parts: tuple[Part, ...] = ("tier1", "tier2", "pools", "actions", "cost")
    """Which parts run; the page holds the sections of these."""
    data: str | None = None
    """Folder with real sample pools (game24, humaneval_codegen, math_best_of_8, ...); None: what needs it is left
    out."""
    workers: int = 2
    """Processes at a time, one thread each."""
    out: str | None = None
    """Directory of the rows and the page; default: runs/adaptive_compute-SIZE-HASH. A stopped study goes on there."""

    tier1: ArithmeticStudy = field(default_factory=ArithmeticStudy)
    """E7, E8 and E9 on arithmetic."""
    tier2: SmolLMStudy = field(default_factory=SmolLMStudy)
    """The same of a language model on reasoning tasks."""
    pools: PoolsStudy = field(default_factory=PoolsStudy)
    """E10."""
    actions: ActionStudy = field(default_factory=ActionStudy)
    """Action chunks of a robot."""
    cost: CostStudy = field(default_factory=CostStudy)
    """E11."""

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.parts:
            raise ConfigError(f"parts must not be empty; there are {', '.join(MODULES)}")
        require_positive(self, "workers")


def run(config: AdaptiveStudy, size: str) -> Path:
    """Carry out the parts, or go on with them, and write report.html and report.md. Return the former's path."""
    console = Console()
    require("matplotlib", "report")  # the page comes last; nobody should wait for it in vain
    unplaced = replace(config, out=None, workers=1, parts=("tier1",))
    out = Path(config.out or f"runs/adaptive_compute-{size}-{config_hash(unplaced)[:8]}")
    return write_parts(
        "Adaptive inference-time compute: would starting over do better?",
        f"steelyard run adaptive_compute --size {size}",
        "Beside this page, one folder for each part with its rows. Thresholds are chosen on validation prompts, never "
        "on those of the tables; nothing was left out of a mean.",
        config,
        config.parts,
        lambda part: _part(part, config, out / part, console),
        out,
        console,
    )


def _part(part: str, config: AdaptiveStudy, out: Path, console: Console) -> tuple[list[Section], list[Finding]]:
    if part == "pools" and config.data is None:
        said = "real samples cannot be generated; give the folder that holds them: --data DIR"
        console.print(f"pools: left out: {said}", markup=False, highlight=False)
        return [Section("Left out: pools").text(said)], []
    found: tuple[list[Section], list[Finding]] = MODULES[part].run(_study(part, config), out, config.workers, console)
    return found


def _study(part: str, config: AdaptiveStudy) -> Any:
    """Return the settings of a part; those that read data are told where they are."""
    study = getattr(config, part)
    return replace(study, data=config.data) if "data" in {one.name for one in fields(study)} else study


PRESETS = {
    size: AdaptiveStudy(
        parts=("tier1", "actions", "cost") if size == "tiny" else ("tier1", "tier2", "pools", "actions", "cost"),
        tier1=adaptive_arithmetic.PRESETS[size],
        tier2=adaptive_smollm2.PRESETS[size],
        pools=adaptive_pools.PRESETS[size],
        actions=adaptive_actions.PRESETS[size],
        cost=adaptive_cost.PRESETS[size],
    )
    for size in ("tiny", "small", "paper")
}
"""tiny: no data and no language model needed; small and paper: with the extra `lm`, and `--data` for real pools."""
