"""Fair comparisons: every method may choose among as many settings, on seeds that the reported table never sees.

A recipe names methods. Each has a run and a list of candidate settings; the candidates are carried out on the tuning
seeds, the one with the lowest regret (offline: the highest late average) is chosen, and only then the reporting seeds
run, paired over methods. Everything is on disk: every tuning run, what was chosen and why (`tuning.csv`), and one row
for each run of the table (`rows.csv`). A comparison that was stopped goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from steelyard.bench.executors import ExecutorName
from steelyard.bench.rows import Run, read_run, write_rows
from steelyard.bench.runner import Job, run_jobs
from steelyard.config import config_hash, to_json, with_fields
from steelyard.envs.behaviours import PointMazeDataConfig, point_maze_env, point_maze_store, summarize_point_maze
from steelyard.envs.config import EnvConfig
from steelyard.errors import ConfigError
from steelyard.report.html import write_report
from steelyard.report.numbers import evaluation_plan, run_values, summarize
from steelyard.report.summary import terminal_table
from steelyard.workflows import control
from steelyard.workflows.common import Case
from steelyard.workflows.control import ControlRun


@dataclass(frozen=True)
class Method:
    """One column of a comparison.

    Attributes:
        name: of the case.
        label: for people.
        run: objective and run settings; data, environment and seed are set by the comparison.
        candidates: {label: {dotted field of the run: value}}; empty where there is nothing to choose.
        follows: name of another method whose chosen run, changed by `derive`, is this one: a control.
        derive: see `follows`.
    """

    name: str
    label: str
    run: ControlRun
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    follows: str | None = None
    derive: Callable[[ControlRun], ControlRun] | None = None


@dataclass(frozen=True)
class Chosen:
    """What the tuning seeds decided for one method."""

    setting: str
    run: ControlRun


def begin(config: Any, name: str, size: str) -> Path:
    """Make the directory of a recipe, or find it again. `config` has out, workers, executor, seeds and cases.

    Raises:
        ConfigError: the directory holds runs with other settings.
    """
    unplaced = replace(config, out=None, workers=1, executor="local")  # where it runs does not change the result
    out = Path(config.out or f"runs/{name}-{size}-{config_hash(unplaced)[:8]}")
    out.mkdir(parents=True, exist_ok=True)
    recorded, identity = out / "recipe.json", to_json(replace(unplaced, seeds=(), cases=()))
    if recorded.exists() and recorded.read_text() != identity:
        raise ConfigError(f"{out}: holds runs with other settings (see {recorded}); choose another --out")
    recorded.write_text(identity)
    return out


def maze_data(prior: PointMazeDataConfig, given: str | None, out: Path, console: Console, name: str = "data") -> str:
    """Return the path of the prior data: those given, or maze data that are generated once into out/NAME."""
    if given is not None:
        return given
    path = out / name
    if not path.exists():
        store = point_maze_store(prior, path)
        console.print(f"prior data: {summarize_point_maze(store, prior)}", markup=False, highlight=False)
    return str(path)


def maze_env(prior: PointMazeDataConfig, run: ControlRun) -> EnvConfig:
    """Return the environment that is given, or the one of the maze data.

    Raises:
        ConfigError: data of the user's own without an environment.
    """
    if run.env is not None:
        return run.env
    if run.data.path is not None:
        raise ConfigError("with data of your own (--data.path), name their environment with --env ID")
    return point_maze_env(prior.size, prior.start, prior.goal, prior.max_episode_steps, prior.action_repeat)


def carry_out(
    recipe: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    out: Path,
    workers: int,
    executor: ExecutorName,
    console: Console,
) -> list[Path]:
    """Tune on the tuning seeds, then run the reporting seeds of one task. Return the run directories of the latter.

    Raises:
        ConfigError: a seed serves both for tuning and for the table.
    """
    if both := set(seeds) & set(tuning_seeds):
        raise ConfigError(f"seeds {sorted(both)} are in both seeds and tuning_seeds; the table's must be unseen")
    out.mkdir(parents=True, exist_ok=True)
    chosen = tune(recipe, methods, tuning_seeds, out, workers, executor)
    if tuning_seeds:
        for method in methods:
            console.print(f"{recipe}, {method.label}: {chosen[method.name].setting}", markup=False, highlight=False)
    folders = report_runs(reporting_jobs(recipe, methods, chosen, seeds, out), chosen, out, workers, executor)
    for folder in folders[: len(methods)]:  # the report shows one episode of each method
        drawn = (folder / "frames.npz").exists() or (folder / "render_error.txt").exists()
        if not drawn and (folder / "checkpoints").exists():
            control.draw(folder)
    return folders


def finish(folders: Sequence[Path], out: Path, title: str, claim: dict[str, Any] | None, console: Console) -> Path:
    """Write the report of all runs and print its table. Return the report's path.

    Rows of the claim about methods that were not run are left out.
    """
    runs = [read_run(folder) for folder in folders]
    if claim is not None:
        names = {run.case for run in runs}
        rows = [row for row in claim["rows"] if {row.get("case", ""), row.get("against", "")} - {""} <= names]
        claim = claim | {"rows": rows} if rows else None
    page = write_report(folders, out, title, claim)
    console.print(terminal_table(summarize(runs)))
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def tune(
    recipe: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    out: Path,
    workers: int,
    executor: ExecutorName = "local",
) -> dict[str, Chosen]:
    """Carry out every candidate of every method on the tuning seeds, choose, and write out/tuning.csv.

    Without tuning seeds each method keeps its run as it is ("as given").

    Raises:
        ConfigError: methods with different numbers of candidates: an unequal budget is no comparison.
    """
    own = [method for method in methods if method.follows is None]
    chosen: dict[str, Chosen] = {}
    if seeds:
        sizes = {method.name: len(method.candidates) for method in own}
        if len(set(sizes.values()) - {0}) > 1:
            raise ConfigError(f"tuning budgets differ: {sizes}; give every method as many candidates, or none")
        jobs = {
            (method.name, label, seed): Job(
                replace(with_fields(method.run, fields), seed=seed),
                Case(f"{recipe}/tuning", f"{method.name}/{label}", f"{method.label}, {label}"),
                out / "tuning" / f"{method.name}-{number}-seed{seed}",
            )
            for method in own
            for number, (label, fields) in enumerate(method.candidates.items())
            for seed in seeds
        }
        run_jobs(list(jobs.values()), workers, f"{recipe} tuning", executor)
        rows: list[dict[str, Any]] = []
        for method in own:
            scores: dict[str, tuple[float, float]] = {}
            for label in method.candidates:
                runs = [read_run(jobs[method.name, label, seed].folder) for seed in seeds]
                rows += rows_of(runs, method.name, label)
                scores[label] = _merit(runs)
            if scores:
                best = max(scores, key=lambda label: scores[label])  # the first of equals
                chosen[method.name] = Chosen(best, with_fields(method.run, method.candidates[best]))
        write_rows(out / "tuning.csv", [row | {"chosen": _is_chosen(row, chosen)} for row in rows])
    for method in own:
        chosen.setdefault(method.name, Chosen("as given", method.run))
    for method in methods:
        if method.follows is not None:
            assert method.derive is not None
            leader = chosen[method.follows]
            chosen[method.name] = Chosen(f"from {method.follows}: {leader.setting}", method.derive(leader.run))
    return chosen


def reporting_jobs(
    recipe: str, methods: Sequence[Method], chosen: dict[str, Chosen], seeds: Sequence[int], out: Path
) -> list[Job]:
    """Return one job per seed and method; seeds outermost, so that a comparison that is stopped holds whole pairs."""
    return [
        Job(
            replace(chosen[method.name].run, seed=seed),
            Case(recipe, method.name, method.label),
            out / f"{method.name}-seed{seed}",
        )
        for seed in seeds
        for method in methods
    ]


def report_runs(
    jobs: Sequence[Job],
    chosen: dict[str, Chosen],
    out: Path,
    workers: int,
    executor: ExecutorName = "local",
) -> list[Path]:
    """Carry out the jobs, write out/rows.csv, and return the run directories."""
    folders = run_jobs(jobs, workers, jobs[0].case.recipe, executor)
    by_method: dict[str, list[Run]] = {}
    for job, folder in zip(jobs, folders, strict=True):
        by_method.setdefault(job.case.case, []).append(read_run(folder))
    rows = [row for name, runs in by_method.items() for row in rows_of(runs, name, chosen[name].setting)]
    write_rows(out / "rows.csv", rows)
    return folders


def rows_of(runs: Sequence[Run], method: str, setting: str) -> list[dict[str, Any]]:
    """Return the numbers of runs of one method as flat rows; a quantity that a run does not have is empty.

    Evaluations that a failed run did not reach count as 0, as in every table.
    """
    plan = evaluation_plan(runs)
    planned = len(plan.steps["offline"]) + len(plan.steps["online"]) > 0
    names = ("before", "dip", "after", "late", "best", "evaluation_regret", "training_regret")
    rows = []
    for run in runs:
        values = run_values(run, plan) if planned else {}
        rows.append(
            {
                "recipe": run.recipe,
                "method": method,
                "setting": setting,
                "seed": run.seed,
                "status": run.status,
                **{name: round(values[name], 6) if name in values else "" for name in names},
                "config_hash": run.config_hash,
                "data_hash": (run.data_hash or "")[:16],
            }
        )
    return rows


def _merit(runs: Sequence[Run]) -> tuple[float, float]:
    """Return (minus mean evaluation regret, mean late score); offline runs have the late score for both."""
    plan = evaluation_plan(runs)
    values = [run_values(run, plan) for run in runs]
    late = float(np.mean([row["late"] for row in values]))
    if all("evaluation_regret" in row for row in values):
        return -float(np.mean([row["evaluation_regret"] for row in values])), late
    return late, late


def _is_chosen(row: dict[str, Any], chosen: dict[str, Chosen]) -> bool:
    return row["method"] in chosen and chosen[row["method"]].setting == row["setting"]
