import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from run_maker import GRID, OFFLINE, make_run

from steelyard.bench.rows import find_runs, group_runs, paired, read_lines, read_run
from steelyard.errors import DataError


def edit_line(path, number, **changes):
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1]) | changes
    lines[number - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


def test_a_run_reads_back_as_written(tmp_path):
    run = read_run(make_run(tmp_path, "cql", 3, episodes=4))
    assert (run.recipe, run.case, run.seed, run.status) == ("cal_ql", "cql", 3, "done")
    rows = [json.loads(line) for line in (run.path / "eval.jsonl").read_text().splitlines()]
    assert run.evaluations.score.tolist() == [row["score"] for row in rows]
    assert run.evaluations.returns.tolist() == [row["return"] for row in rows]
    assert run.evaluations.online.tolist() == [row["phase"] == "online" for row in rows]
    online = run.points("online")
    assert tuple(online.step) == GRID
    assert tuple(run.points("offline").step) == OFFLINE
    at_2000 = [row["score"] for row in rows if row["phase"] == "online" and row["env_step"] == 2000]
    assert online.score[2] == np.mean(at_2000)
    assert set(run.metrics) >= {"loss/td", "critic/q_data"}
    assert len(run.calibration.q) == 600


def test_a_run_without_prior_data_has_no_data_hash(tmp_path):
    path = make_run(tmp_path)
    case = json.loads((path / "case.json").read_text())
    (path / "case.json").write_text(json.dumps(case | {"data_hash": None}))
    assert read_run(path).data_hash is None


def test_success_may_be_absent(tmp_path):
    run = read_run(make_run(tmp_path, has_success=False))
    assert np.isnan(run.evaluations.success).all()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("score", "high", r"eval.jsonl, line 2: key 'score': expected a finite number, found 'high'"),
        ("score", float("nan"), r"line 2: key 'score': expected a finite number"),
        (
            "score",
            None,
            r"key 'score': expected a number .a task without a success rule needs a score range., found None",
        ),
        ("score", True, r"line 2: key 'score': expected a finite number"),
        ("score", ..., r"line 2: key 'score' is missing"),
        ("env_step", 1.5, r"line 2: key 'env_step': expected an integer, found 1.5"),
        ("episode_seed", 2**70, r"line 2: key 'episode_seed': expected an integer of 64 bits"),
        ("success", 1, r"line 2: key 'success': expected true, false or null, found 1"),
        ("phase", "later", r"line 2: key 'phase': expected 'offline' or 'online', found 'later'"),
        ("phase", ["x"], r"line 2: key 'phase': expected 'offline' or 'online'"),
        ("episode", 0, r"line 2: repeats the phase, steps and episode of line 1"),
    ],
)
def test_a_bad_value_names_file_and_line(tmp_path, key, value, message):
    path = make_run(tmp_path)
    edit_line(path / "eval.jsonl", 2, **{key: value})
    with pytest.raises(DataError, match=message):
        read_run(path)


@pytest.mark.parametrize("name", ["config.json", "environment.json", "case.json", "status.json", "eval.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    path = make_run(tmp_path)
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        read_run(path)


def test_training_episodes_may_only_be_missing_without_an_online_phase(tmp_path):
    offline = make_run(tmp_path, seed=1, online=False)
    assert len(read_run(offline).training.score) == 0
    online = make_run(tmp_path, seed=2)
    (online / "train_episodes.jsonl").unlink()
    with pytest.raises(DataError, match=r"train_episodes.jsonl: missing"):
        read_run(online)


def test_broken_json_and_wrong_status_are_named(tmp_path):
    path = make_run(tmp_path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"update_step": 1, "loss/cri')
    with pytest.raises(DataError, match=r"metrics.jsonl, line \d+: not valid JSON"):
        read_run(path)
    (path / "status.json").write_text('{"status": "perhaps"}')
    with pytest.raises(DataError, match="expected one of done, failed, running, interrupted, found 'perhaps'"):
        read_run(path)
    (path / "status.json").write_text("[1]")
    with pytest.raises(DataError, match="expected a JSON object, found list"):
        read_run(path)


def test_a_done_run_needs_the_evaluation_before_the_first_online_step(tmp_path):
    path = make_run(tmp_path)
    lines = (path / "eval.jsonl").read_text().splitlines()
    kept = [line for line in lines if not ('"online"' in line and '"env_step": 0,' in line)]
    (path / "eval.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(DataError, match="no online evaluation at env_step 0"):
        read_run(path)


def test_a_failed_run_may_have_stopped_before_its_first_row(tmp_path):
    path = make_run(tmp_path, stop_at=-1)
    for name in ("eval.jsonl", "metrics.jsonl", "train_episodes.jsonl"):
        (path / name).unlink()
    run = read_run(path)
    assert run.status == "failed"
    assert len(run.points("online").step) == 0


def test_grouping_sorts_seeds_keeps_the_order_of_cases_and_refuses_doubles(tmp_path):
    paths = [make_run(tmp_path, case, seed) for case in ("cql", "cal_ql") for seed in (2, 0)]
    groups = group_runs(map(read_run, paths))
    assert list(groups["cal_ql"]) == ["cql", "cal_ql"]
    assert [run.seed for run in groups["cal_ql"]["cql"]] == [0, 2]
    with pytest.raises(DataError, match="case 'cql' seed 2 is also in"):
        group_runs(map(read_run, [*paths, make_run(tmp_path / "again", "cql", 2)]))
    with pytest.raises(DataError, match="is labelled 'Other', but 'cql'"):
        group_runs(map(read_run, [*paths, make_run(tmp_path / "label", "cql", 5, label="Other")]))


def test_pairs_are_the_shared_seeds(tmp_path):
    left = [read_run(make_run(tmp_path, "cal_ql", seed)) for seed in (0, 1, 2)]
    right = [read_run(make_run(tmp_path, "cql", seed)) for seed in (2, 1, 7)]
    assert [(a.seed, b.seed) for a, b in paired(left, right)] == [(1, 1), (2, 2)]


def test_runs_are_found_below_a_directory(tmp_path):
    path = make_run(tmp_path / "suite" / "deep")
    assert find_runs(path) == [path]
    assert find_runs(tmp_path) == [path]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run directory here or below"):
        find_runs(tmp_path / "empty")
    with pytest.raises(DataError, match="no such directory"):
        find_runs(tmp_path / "nowhere")


def test_a_metric_that_was_not_finite_is_null_in_the_file_and_nan_here(tmp_path):
    path = make_run(tmp_path)
    edit_line(path / "metrics.jsonl", 1, **{"loss/td": float("nan")})
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text().replace("NaN", "null"))
    values = read_run(path).metrics["loss/td"].value
    assert np.isnan(values[0])
    assert np.isfinite(values[1:]).all()
    edit_line(path / "metrics.jsonl", 1, **{"loss/td": "high"})
    with pytest.raises(DataError, match=r"line 1: key 'loss/td': expected a number or null"):
        read_run(path)


def test_two_evaluations_at_one_environment_step_stay_apart(tmp_path):
    path = make_run(tmp_path, episodes=2)
    rows = (path / "eval.jsonl").read_text().splitlines()
    again = [json.dumps(json.loads(row) | {"update_step": 99999}) for row in rows[-2:]]
    (path / "eval.jsonl").write_text("\n".join(rows + again) + "\n")
    assert tuple(read_run(path).points("online").step) == (*GRID, GRID[-1])


def test_lines_of_any_keys_are_read_and_a_bad_one_is_named(tmp_path):
    file = tmp_path / "samples.jsonl"
    assert read_lines(file) == []
    file.write_text('{"prompt": "a"}\n{"score": 1.5, "label": null}\n')
    assert read_lines(file) == [{"prompt": "a"}, {"score": 1.5, "label": None}]
    file.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(DataError, match=r"samples.jsonl, line 2: expected a JSON object"):
        read_lines(file)
