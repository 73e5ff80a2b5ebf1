"""HyRe beyond the paper: policies and critics of a point maze, re-weighted by a few steps of a changed one.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812) re-weight reward models. Here the members are policy heads and critic heads, one for each world of
the prior data (dynamics or goal), the examples are steps of an unseen world, and the call is the same
(`adapt/control.py`). What is measured is success in that world, against the mean of the heads, the pooled policy, and
that policy fine-tuned on the same steps.

Nothing here reproduces a published number.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from steelyard.bench.rows import write_rows
from steelyard.envs.gym import make
from steelyard.envs.shifted_maze import Shift, shifted_maze_env
from steelyard.errors import MissingExtraError
from steelyard.objectives.control_heads import ControlHeadsConfig
from steelyard.recipes.hyre_jobs import begin, carry_out
from steelyard.recipes.hyre_maze_page import findings, section
from steelyard.recipes.hyre_maze_runs import run_seed
from steelyard.recipes.hyre_maze_worlds import DataJob, MazeStudy, SeedJob, make_data
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

PRESETS: dict[str, MazeStudy] = {
    "tiny": MazeStudy(
        training=("as it was", "turned 90", "turned 180", "turned 270", "exchanged", "wind +x", "wind -x", "wind +y",
                  "wind -y", "goal 1,6", "goal 4,1", "goal 3,3", "goal 6,3"),
        validation=("turned 60", "wind -x+y", "goal 1,2", "goal 5,6"),
        targets=("turned 45", "turned 135", "turned 225", "wind +x+y", "wind +x, strong", "goal 2,6", "goal 4,4",
                 "goal 6,5"),
        prior_steps=600,
        label_steps=120,
        updates=1_200,
        episodes=1,
        seeds=(0, 1, 2),
    ),
    "small": MazeStudy(seeds=(0, 1, 2), episodes=3),
    "paper": MazeStudy(
        prior_steps=4_000,
        heads=ControlHeadsConfig(hidden=(256, 256), expectile=0.7),
        updates=10_000,
        episodes=10,
        seeds=tuple(range(10)),
    ),
}  # fmt: skip
"""Sizes; the paper has no such experiment, and "paper" is only the largest."""


def run(config: MazeStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes data.csv (one row a world) and rows.csv (one row a seed, world, method and n) into `out`. Without the
    simulator there is no section, and the console says so.

    Raises:
        ConfigError: the folder holds a study with other settings.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    try:
        make(shifted_maze_env(config.size, Shift())).close()
    except MissingExtraError as error:
        console.print(f"point maze left out: {error}", markup=False, highlight=False)
        return [], []
    begin(out, config)
    worlds = (*config.training, *config.validation, *config.targets)
    data = carry_out([DataJob(config, str(out), world) for world in worlds], make_data, out, "maze data", workers)
    write_rows(out / "data.csv", data)
    rows = carry_out([SeedJob(config, str(out), seed) for seed in config.seeds], run_seed, out, "maze seeds", workers)
    write_rows(out / "rows.csv", rows)
    return [section(config, rows)], findings(config, rows)
