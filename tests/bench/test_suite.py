"""Suites: rows that follow from the runs, once each; a user's own file; Ctrl-C and other ends."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_suite

from steelyard.bench import runner
from steelyard.bench.rows import read_run
from steelyard.bench.runner import Job, run_jobs
from steelyard.bench.suite import RowLog, Suite, jobs_of, merged, row_of, run_suite
from steelyard.bench.suites import SIZES, SUITES, find_suite
from steelyard.cli.main import main
from steelyard.config import from_json, read_config
from steelyard.errors import ConfigError, DataError, SteelyardError
from steelyard.objectives import OBJECTIVES
from steelyard.workflows.common import Case
from steelyard.workflows.control import ControlRun

FIELDS = {
    "run", "suite", "task", "case", "label", "objective", "seed", "status", "message", "before", "after",
    "evaluation_regret", "training_regret", "updates", "env_steps", "config_hash", "data_hash",
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy_suite.write(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """The suite, run in worker processes; what it printed is in `printed`."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("suites") / "whole"
    work = toy_suite.start(file, "--out", out, "--csv")
    printed, _ = work.communicate(timeout=300)
    assert work.returncode == 0, printed
    (out / "printed").write_text(printed)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def toy(file) -> Suite:
    return read_config(Suite, file)


def reported(file, out):
    return run_suite(toy(file), out, str(file))


# ---------------------------------------------------------------------------------------------- rows


def test_one_row_a_run_in_the_suites_order(finished):
    rows = toy_suite.rows(finished)
    assert [row["run"] for row in rows] == [f"point/{case}-seed{seed}" for seed in (0, 1, 2) for case in ("iql", "cql")]
    assert all(row.keys() == FIELDS for row in rows)
    assert {row["status"] for row in rows} == {"done"}
    assert [row["updates"] for row in rows[:2]] == [40, 30]  # CQL's own utd_ratio: 20 offline, 10 online
    assert all(row["env_steps"] >= 20 for row in rows)
    assert rows[0]["label"] == "IQL"
    assert rows[1]["label"] == "cql"
    assert len({row["config_hash"] for row in rows}) == 6
    assert len({row["data_hash"] for row in rows}) == 1


def test_a_row_says_what_the_run_says(finished):
    row, run = toy_suite.rows(finished)[0], read_run(finished / "point/iql-seed0")
    online = run.points("online")
    assert row["before"] == online.score[0]
    assert row["after"] == online.score[-1]
    assert row["evaluation_regret"] == pytest.approx(1 - online.score.mean())
    assert row["training_regret"] == pytest.approx(1 - run.training.score.mean())
    assert row["data_hash"] == run.data_hash


def test_the_configs_hash_does_not_depend_on_where_the_data_lie(file, finished, tmp_path):
    moved = json.loads(file.read_text())
    moved["tasks"]["point"]["run"]["data"]["path"] = "elsewhere"
    for name, suite in (("here", toy(file)), ("there", from_json(Suite, json.dumps(moved)))):
        job = jobs_of(suite, finished, name)[0]
        assert row_of("toy", job, read_run(job.folder))["config_hash"] == toy_suite.rows(finished)[0]["config_hash"]


def test_table_report_and_csv(finished):
    printed = (finished / "printed").read_text()
    assert "IQL" in printed
    assert "after" in printed
    assert "report: " in printed
    assert (finished / "report.html").is_file()
    with (finished / "rows.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["run"] for row in rows] == [row["run"] for row in toy_suite.rows(finished)]
    assert float(rows[0]["after"]) == toy_suite.rows(finished)[0]["after"]
    assert "toy: " in printed  # plain progress lines without a terminal


def test_again_it_runs_nothing_and_changes_no_row(file, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*/metrics.jsonl")}
    rows = (copy / "rows.jsonl").read_bytes()
    reported(file, copy)
    assert (copy / "rows.jsonl").read_bytes() == rows
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*/metrics.jsonl")} == before


@pytest.mark.parametrize("keep", ["nothing", "half a line", "a whole line without its end", "all but one"])
def test_rows_that_a_kill_prevented_are_written_by_the_next_start(keep, file, copy):
    log = copy / "rows.jsonl"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.write_bytes(
        {
            "nothing": b"",
            "half a line": b"".join(lines[:3]) + lines[3][:40],
            "a whole line without its end": b"".join(lines[:4])[:-1],
            "all but one": b"".join(lines[:2] + lines[3:]),
        }[keep]
    )
    reported(file, copy)
    assert log.read_bytes() == whole


def test_a_damaged_line_that_no_kill_explains_is_an_error(file, copy):
    log = copy / "rows.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: not a row"):
        reported(file, copy)


def test_a_run_added_twice_is_one_row(file, copy):
    log, job = RowLog(copy / "rows.jsonl"), jobs_of(toy(file), copy, "toy")[0]
    before = (copy / "rows.jsonl").read_bytes()
    log.add("toy", job)
    assert (copy / "rows.jsonl").read_bytes() == before


def test_a_failed_run_has_a_row_without_numbers_and_stays_in_the_report(file, copy):
    folder = copy / "point/cql-seed1"
    (folder / "status.json").write_text(json.dumps({"status": "failed", "message": "loss 'critic' is not finite"}))
    rows = [line for line in (copy / "rows.jsonl").read_text().splitlines() if "cql-seed1" not in line]
    (copy / "rows.jsonl").write_text("\n".join(rows) + "\n")
    page = reported(file, copy)
    row = next(row for row in toy_suite.rows(copy) if row["run"] == "point/cql-seed1")
    assert (row["status"], row["message"], row["after"]) == ("failed", "loss 'critic' is not finite", None)
    assert "1 of 6 runs failed" in page.read_text()


def test_a_run_that_was_killed_before_its_config_was_written_begins_anew(file, copy):
    folder = copy / "point/iql-seed2"
    expected = toy_suite.rows(copy)
    for path in folder.iterdir():
        if path.name not in ("status.json", "case.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "status.json").write_text('{"status": "running", "message": ""}')
    (copy / "rows.jsonl").unlink()
    jobs = jobs_of(toy(file), copy, "toy")
    assert not jobs[4].ended
    assert runner._work(jobs[4]) is None
    reported(file, copy)
    assert toy_suite.rows(copy) == expected


# ---------------------------------------------------------------------------------------------- what is refused


def test_two_processes_do_not_work_in_one_directory(file, copy):
    fcntl = pytest.importorskip("fcntl")
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is running this suite"):
            reported(file, copy)


def test_other_settings_in_the_same_directory_are_refused_and_new_cases_are_not(file, copy):
    suite = toy(file)
    with pytest.raises(ConfigError, match="holds runs with other settings"):
        run_suite(dataclasses.replace(suite, run=merged(suite.run, {"batch_size": 16})), copy, "toy")
    other = dataclasses.replace(suite.cases[0], objective={"kind": "iql", "expectile": 0.9})
    with pytest.raises(ConfigError, match="holds a run with another config"):
        run_suite(dataclasses.replace(suite, cases=(other,)), copy, "toy")
    run_suite(dataclasses.replace(suite, seeds=(1,)), copy, "toy", cases=("cql",))  # fewer: nothing to run
    assert len(toy_suite.rows(copy)) == 6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"case": [{"name": "x"}]}, "unknown key 'case'; did you mean 'cases'"),
        ({"run": {"batch_sise": 8}}, "task 'point', case 'iql': unknown key 'batch_sise'; did you mean 'batch_size'"),
        ({"run": {"batch_size": -8}}, "task 'point', case 'iql': batch_size must be above 0"),
        ({"objective": {"expectil": 0.9}}, "key 'objective.expectil': no objective of the suite has such a field"),
        ({"objective": {"network": {"actor": [8]}}}, "key 'objective.network.actor': no objective of the suite"),
        ({"cases": [{"name": "x", "objective": {"kind": "iqll"}}]}, "'iqll' is unknown; did you mean 'iql'"),
        ({"cases": [{"name": "x", "objective": {"kind": "iql"}, "tasks": ["line"]}]}, "unknown task 'line'"),
        ({"tasks": {"point": {"run": {}}}}, "key 'env' is missing"),
        ({"tasks": {"point": {"run": {"env": {"id": "X-v0"}}}}}, "no score: name a success rule"),
    ],
)
def test_mistakes_in_a_file_are_named(change, sentence, file, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(["bench", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["smok"], "did you mean 'smoke'"),
        (["smoke", "--size", "huge"], "--size must be one of tiny, small, paper, found 'huge'"),
        (["smoke", "--cases", "iqll"], "case 'iqll' is unknown"),
        (["smoke", "--workers", "0"], "workers must be above 0"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, sentence, capsys):
    assert main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SUITES)
def test_built_in_suites_make_valid_configs(name, size, tmp_path):
    suite, where = find_suite(name, size)
    jobs = jobs_of(suite, tmp_path, where)
    assert suite.name == name
    assert len({job.folder for job in jobs}) == len(jobs)
    assert {job.config.seed for job in jobs} == set(suite.seeds)
    kinds = {job.config.objective.kind for job in jobs}
    assert {"cal_ql", "cql", "iql"} <= kinds
    if name == "smoke":
        assert kinds == {kind for kind in OBJECTIVES if not kind.startswith("discrete")}
    if name == "offline":
        assert all(job.config.online.updates == 0 for job in jobs)
    elif name == "offline_to_online":
        assert all(job.config.online.updates > 0 for job in jobs)


def test_shared_settings_reach_those_that_have_them_and_own_defaults_stay(tmp_path):
    suite, where = find_suite("offline_to_online", "tiny")
    configs = {job.config.objective.kind: job.config for job in jobs_of(suite, tmp_path, where)}
    for config in configs.values():
        assert config.objective.network.critic_hidden == (64, 64)
        assert config.objective.discount == 0.98
    from steelyard.recipes.cal_ql import PRESETS

    assert configs["cal_ql"].objective == PRESETS["tiny"].cal_ql
    assert configs["iql"].objective == PRESETS["tiny"].iql
    own = OBJECTIVES["edac"]().network.num_critics
    assert configs["edac"].objective.network.num_critics == own != configs["cql"].objective.network.num_critics


def test_names_of_built_in_tasks_are_stable():
    assert {name: list(SUITES[name]("tiny").tasks) for name in ("offline_to_online", "offline", "smoke")} == {
        "offline_to_online": ["point_maze_medium_noisy"],
        "offline": ["point_maze_medium_play", "point_maze_medium_noisy"],
        "smoke": ["point_maze_umaze"],
    }


# ---------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("to_all", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["terminal", "kill -INT"])
def test_ctrl_c_leaves_checkpoints_no_process_and_the_command_to_go_on(to_all, finished, file, tmp_path):
    out = tmp_path / "out"
    suite = json.loads(file.read_text())
    suite["run"] |= {"offline_steps": 100_000}
    long = tmp_path / "long.json"
    long.write_text(json.dumps(suite))
    work = toy_suite.start(long, "--out", out, "--workers", 2)
    try:
        deadline = time.monotonic() + 200
        # both runs are well under way; one alone may have two checkpoints while the other has only begun
        while len({path.parent for path in out.glob("point/*/checkpoints/step_*")}) < 2:
            assert work.poll() is None, work.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (os.killpg if to_all else os.kill)(work.pid, signal.SIGINT)
        printed, _ = work.communicate(timeout=200)
    finally:
        if toy_suite.alive(work.pid):
            os.killpg(work.pid, signal.SIGKILL)
    assert work.returncode == 130, printed
    assert "Go on with: steelyard bench" in printed
    assert "Traceback" not in printed
    begun = sorted(out.glob("point/*/status.json"))
    assert len(begun) == 2  # no other run was begun after it
    assert {json.loads(path.read_text())["status"] for path in begun} == {"interrupted"}
    assert not (out / "rows.jsonl").exists()


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    with pytest.raises(SteelyardError, match="a worker process died"):
        run_jobs([Job(_Lethal(), Case(), tmp_path / "run")], 1, "toy")


class _Lethal:
    """A config whose arrival in a worker ends it, as the kernel does when memory is short."""

    offline_steps = 1
    env = None

    def __reduce__(self):
        return os._exit, (9,)


def test_jobs_are_the_recipes_too(tmp_path):
    """The signature that recipes use: three positional arguments."""
    assert run_jobs([], 2, "nothing") == []
    assert Job(ControlRun(offline_steps=7), Case(), tmp_path).updates == 7
    assert not Job(ControlRun(), Case(), tmp_path).ended


def test_a_built_in_task_brings_its_environment_rewards_and_data(tmp_path):
    text = {
        "name": "own",
        "tasks": {"maze": {"builtin": "point_maze/umaze-play", "run": {"evaluation": {"episodes": 3}}}},
        "cases": [{"name": "bc", "objective": {"kind": "bc"}}],
        "seeds": [0],
    }
    suite = from_json(Suite, json.dumps(text))
    (job,) = jobs_of(suite, tmp_path, "own.json")
    assert job.config.env.id == "PointMaze_UMaze-v3"
    assert job.config.data.path == str(tmp_path / "data/maze")
    assert job.config.data.rewards.bias == -1.0
    assert job.config.evaluation.episodes == 3
    text["tasks"]["maze"]["builtin"] = "point_maze/umaze-plya"
    with pytest.raises(ConfigError, match="did you mean 'point_maze/umaze-play'"):
        jobs_of(from_json(Suite, json.dumps(text)), tmp_path, "own.json")
    text["tasks"]["maze"]["generate"] = {}
    with pytest.raises(ConfigError, match="give one of them"):
        from_json(Suite, json.dumps(text))
