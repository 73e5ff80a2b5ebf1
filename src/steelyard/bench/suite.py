"""Suites: named, frozen sets of cases (task, data, objective, adaptation) x seeds, and one row a finished run.

A suite's directory:

    suite.json            what is the same for all its runs; another suite is refused here
    data/TASK/            prior data that the suite makes itself
    TASK/CASE-seed0/      run directories
    rows.jsonl            one row per ended run: a complete line or nothing, never one run twice
    report.html, report.md, rows.csv (if asked for)

A row is written after its run has ended, and follows from the run directory alone: a row that a kill prevented is
written by the next start, and a line that a kill cut off is dropped and written again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from steelyard.bench.executors import ExecutorName
from steelyard.bench.rows import Run, read_run, write_rows
from steelyard.bench.runner import Job, run_jobs
from steelyard.bench.stats import Estimate, number
from steelyard.config import Config, config_hash, flatten, from_json, plain, read_config, to_json
from steelyard.envs.behaviours import PointMazeDataConfig, point_maze_store, summarize_point_maze
from steelyard.envs.reference import reference_range
from steelyard.envs.tasks import task_named
from steelyard.errors import ConfigError, DataError, near
from steelyard.objectives import OBJECTIVES
from steelyard.report.html import write_report
from steelyard.report.numbers import QUANTITIES, RecipeSummary, evaluation_plan, run_values, summarize
from steelyard.workflows.common import Case
from steelyard.workflows.control import ControlRun, default_run

SHOWN = ("before", "after", "evaluation_regret", "training_regret")
Overrides = dict[str, Any]
"""Fields of `ControlRun` by name, nested as in its JSON; what is not named keeps its default."""


@dataclass(frozen=True)
class Task(Config):
    """What is to be learned: prior data and an environment."""

    run: Overrides = field(default_factory=dict)
    """Fields of the run that belong to the task: data, env, evaluation, ..."""
    generate: PointMazeDataConfig | None = None
    """Prior data that the suite makes; None: `run` names them in data.path."""
    builtin: str | None = None
    """Name in the table of built-in tasks (`steelyard.envs.tasks`): its environment, rewards and prior data, which the
    suite makes; what `run` says wins."""

    def __post_init__(self) -> None:
        """Check that one thing makes the data."""
        if self.generate is not None and self.builtin is not None:
            raise ConfigError("generate and builtin both make the prior data; give one of them")

    @property
    def makes_data(self) -> bool:
        """Whether the suite makes the task's prior data."""
        return self.generate is not None or self.builtin is not None


@dataclass(frozen=True)
class SuiteCase(Config):
    """One method: how to learn and how to adapt."""

    name: str
    """Stable short name; it is part of the directory's and the row's identity."""
    objective: Overrides
    """The objective: its kind, and the fields that differ from the defaults."""
    label: str = ""
    """Name in tables; default: the short name."""
    run: Overrides = field(default_factory=dict)
    """Other fields of the run that belong to the method: online, offline_steps, ..."""
    tasks: tuple[str, ...] | None = None
    """Tasks to run it on; None: all."""


@dataclass(frozen=True)
class Suite(Config):
    """Tasks x cases x seeds."""

    name: str
    """Stable name."""
    tasks: dict[str, Task]
    """By stable name."""
    cases: tuple[SuiteCase, ...]
    """The first one is what the others are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Paired: every case runs with each."""
    run: Overrides = field(default_factory=dict)
    """Fields that all runs share; a task's win over them, and a case's over both."""
    objective: Overrides = field(default_factory=dict)
    """Fields that all objectives share where they have them; a case's own win."""


# ------------------------------------------------------------------------------------------------ from suite to jobs


def merged(base: Overrides, *others: Overrides) -> Overrides:
    """Return `base` with the values of the others put over it, objects key by key."""
    result = dict(base)
    for other in others:
        for key, value in other.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _known_in(defaults: Overrides, values: Overrides) -> Overrides:
    """Return the values whose keys are also in `defaults`, objects key by key."""
    return {
        key: _known_in(defaults[key], value) if isinstance(value, dict) and isinstance(defaults[key], dict) else value
        for key, value in values.items()
        if key in defaults
    }


def jobs_of(
    suite: Suite,
    out: Path,
    where: str,
    cases: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[Job]:
    """Return one job per task, seed and case; seeds before cases, so that a stopped suite has whole comparisons.

    Args:
        suite: what to run.
        out: the suite's directory.
        where: the word for the suite in error messages: its name or its file.
        cases: only these, in this order; None: all.
        tasks: only these; None: all.

    Raises:
        ConfigError: an override that no run has, a task that does not exist, or a run that could not be scored.
    """
    used = {key for case in suite.cases for key in flatten(_known_in(_defaults(case, where), suite.objective))}
    if unknown := flatten(suite.objective).keys() - used:
        raise ConfigError(f"{where}: key 'objective.{min(unknown)}': no objective of the suite has such a field")
    named = {case.name: case for case in suite.cases}
    for what, words, known in (("case", cases or (), named), ("task", tasks or (), suite.tasks)):
        for word in words:
            if word not in known:
                raise ConfigError(f"{where}: {what} {word!r} is unknown; {near(word, known)}")
    chosen = suite.cases if cases is None else [named[name] for name in cases]
    for case in suite.cases:
        for task in case.tasks or ():
            if task not in suite.tasks:
                raise ConfigError(f"{where}: case {case.name!r}: unknown task {task!r}; {near(task, suite.tasks)}")
    return [
        Job(
            _config(suite, task, case, seed, out, where),
            Case(f"{suite.name}/{task}", case.name, case.label or case.name),
            out / task / f"{case.name}-seed{seed}",
        )
        for task in (suite.tasks if tasks is None else tasks)
        for seed in suite.seeds
        for case in chosen
        if case.tasks is None or task in case.tasks
    ]


def _defaults(case: SuiteCase, where: str) -> Overrides:
    kind = str(case.objective.get("kind"))
    if kind not in OBJECTIVES:
        raise ConfigError(
            f"{where}: case {case.name!r}: key 'objective.kind': {kind!r} is unknown; {near(kind, OBJECTIVES)}"
        )
    return plain(OBJECTIVES[kind]())


def _config(suite: Suite, name: str, case: SuiteCase, seed: int, out: Path, where: str) -> ControlRun:
    task, defaults = suite.tasks[name], _defaults(case, where)
    own: Overrides = {}
    if task.builtin is not None:
        known = task_named(task.builtin)
        own = {"env": plain(known.env), "data": {"rewards": plain(known.rewards)}}
    values = merged(plain(default_run(defaults["kind"])), suite.run, own, task.run, case.run)
    values["objective"] = merged(defaults, _known_in(defaults, suite.objective), case.objective)
    values["seed"] = seed
    if task.makes_data:
        values["data"] = merged(values["data"], {"path": str(out / "data" / name)})
    place = f"{where}: task {name!r}, case {case.name!r}"
    try:
        config = from_json(ControlRun, json.dumps(values), place)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(place) else f"{place}: {error}") from None
    if config.env is None:
        raise ConfigError(f"{place}: key 'env' is missing; a suite compares scores, which need an environment")
    if (
        config.env.success == "none"
        and config.evaluation.score_range is None
        and reference_range(config.env.id) is None
    ):
        raise ConfigError(
            f"{place}: no score: name a success rule (env.success) or the returns that count as 0 and 1 "
            "(evaluation.score_range)"
        )
    return config


# ------------------------------------------------------------------------------------------------ running


def run_suite(
    suite: Suite,
    out: Path,
    where: str,
    *,
    cases: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    workers: int = 2,
    executor: ExecutorName = "local",
    ray_address: str | None = None,
    to_csv: bool = False,
) -> Path:
    """Run what is missing of a suite, append its rows, write and print the result. Return the report's path.

    Args:
        suite: what to run.
        out: the suite's directory.
        where: the word for the suite in error messages: its name or its file.
        cases: only these, the first of them the reference; None: all.
        tasks: only these; None: all.
        workers: runs at a time.
        executor: see `run_jobs`.
        ray_address: see `run_jobs`.
        to_csv: also write rows.csv.

    Raises:
        ConfigError: the directory holds another suite, or another process is at work in it.
        Interrupted: ctrl-C; every running job wrote a checkpoint first, and the same call goes on.
    """
    console = Console()
    jobs = jobs_of(suite, out, where, cases, tasks)  # whatever is wrong in the suite shows before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        _require_same_suite(suite, out)
        for name, task in suite.tasks.items():
            path = out / "data" / name
            if task.makes_data and not path.exists() and (tasks is None or name in tasks):
                console.print(f"prior data {name}: {_make_data(task, path)}", markup=False, highlight=False)
        log = RowLog(out / "rows.jsonl")
        run_jobs(jobs, workers, suite.name, executor, ray_address, on_end=lambda job: log.add(suite.name, job))
        log.sort([job.folder.relative_to(out).as_posix() for job in jobs])
    if to_csv:
        log.to_csv(out / "rows.csv")
    folders = [job.folder for job in jobs]
    for recipe in summarize([read_run(folder) for folder in folders]).recipes:
        console.print(result_table(recipe))
    page = write_report(folders, out, f"Suite {suite.name}", reference=None)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def _make_data(task: Task, path: Path) -> str:
    """Make the prior data of a task at `path`; return what they are in words."""
    if task.generate is not None:
        return str(summarize_point_maze(point_maze_store(task.generate, path), task.generate))
    assert task.builtin is not None
    store = task_named(task.builtin).make_data(path)
    return f"{store.num_steps} steps in {store.num_episodes} episodes of {task.builtin}"


def result_table(recipe: RecipeSummary) -> RichTable:
    """Return one task's table: a line a case, means with 95% bootstrap intervals as in the report."""
    shown = [q for q in QUANTITIES if q.name in SHOWN and any(q.name in case.values for case in recipe.cases)]
    table = RichTable(title=Text(recipe.recipe), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case")
    table.add_column("runs", justify="right")
    for quantity in shown:
        table.add_column(quantity.title, justify="right")
    for case in recipe.cases:
        failed = sum(run.status == "failed" for run in case.runs)
        count = f"{len(case.runs)}" + (f", {failed} failed" if failed else "")
        cells = [case.estimates.get(quantity.name) for quantity in shown]
        table.add_row(Text(case.label), count, *(_short(cell) for cell in cells))
    return table


def _short(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return number(estimate.value) if estimate.low is None else estimate.text()


def suite_hash(suite: Suite) -> str:
    """Return the hash of what all runs share; seeds and cases may be added later."""
    return config_hash(_identity(suite))


def _identity(suite: Suite) -> Suite:
    return replace(suite, seeds=(), cases=())


def _require_same_suite(suite: Suite, out: Path) -> None:
    recorded, text = out / "suite.json", to_json(_identity(suite))
    if not recorded.is_file():
        partial = out / ".suite.json.partial"
        partial.write_text(text)
        os.replace(partial, recorded)
    elif to_json(read_config(Suite, recorded)) != text:
        raise ConfigError(f"{out}: holds runs with other settings (see {recorded}); choose another --out")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Refuse to work in a directory in which another process does; the lock dies with its process."""
    with (out / ".lock").open("w") as file:
        if sys.platform == "win32":  # has no such lock
            yield
            return
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is running this suite; wait for it or stop it") from None
        yield


# ------------------------------------------------------------------------------------------------ rows


class RowLog:
    """rows.jsonl: one line per ended run; opened, it holds complete lines only, and adding a run twice adds it once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # a kill cut the last line off; its run is there and will be asked again
            os.truncate(path, len(whole))
        for place, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.rows[row["run"]] = row
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {place}: not a row of a suite; altered or damaged") from None

    def add(self, suite: str, job: Job) -> None:
        """Append the row of a run that has ended, unless it is there."""
        name = job.folder.relative_to(self.path.parent).as_posix()
        if name in self.rows:
            return
        self.rows[name] = row = {"run": name, **row_of(suite, job, read_run(job.folder))}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def sort(self, names: Sequence[str]) -> None:
        """Put the rows into the order of `names`, others after them, so that equal suites leave equal files."""
        order = [*names, *(name for name in self.rows if name not in names)]
        self.rows = {name: self.rows[name] for name in order}
        partial = self.path.with_name(".rows.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        os.replace(partial, self.path)

    def to_csv(self, path: Path) -> None:
        """Write the rows as a table."""
        write_rows(path, self.rows.values())


def row_of(suite: str, job: Job, run: Run) -> dict[str, Any]:
    """Return the row of an ended run: numbers of its own only, so that it never depends on what else has ended.

    The numbers of a failed run are null; the report, which knows the other runs, counts what it missed as score 0. The
    config's hash leaves out where the data lie, for their own hash says what they are. `seconds` is the time in updates
    and data collection, without evaluations and checkpoints.
    """
    values = run_values(run, evaluation_plan([run])) if run.status == "done" else {}
    rates = run.metrics.get("time/updates_per_second")
    seconds = 0.0
    if rates is not None:
        last = 0
        for step, rate in zip(rates.update_step.tolist(), rates.value.tolist(), strict=True):
            seconds, last = seconds + (step - last) / rate, step
    steps = [int(column.max()) for column in (run.evaluations.env_step, run.training.env_step) if len(column)]
    placeless = replace(job.config, data=replace(job.config.data, path=None))
    return {
        "suite": suite,
        "task": run.recipe.removeprefix(f"{suite}/"),
        "case": run.case,
        "label": run.label,
        "objective": job.config.objective.kind,
        "seed": run.seed,
        "status": run.status,
        "message": run.message,
        **{name: values.get(name) for name in SHOWN},
        "updates": int(rates.update_step[-1]) if rates is not None and len(rates.update_step) else 0,
        "env_steps": max(steps, default=0),
        "config_hash": config_hash(placeless),
        "data_hash": run.data_hash,
        "seconds": round(seconds, 3),
    }
