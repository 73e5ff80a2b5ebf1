"""Trackers get what the logs hold: no more, no less, and the same at a second time."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from steelyard.errors import DataError, MissingExtraError
from steelyard.train.track import points, to_tensorboard, to_trackio


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = [
        {"phase": "offline", "update_step": 10, "env_step": 0, "loss/td": 2.5, "critic/q_data": None},
        {"phase": "offline", "update_step": 20, "env_step": 0, "loss/td": 1.5, "critic/q_data": -3.0},
        {"phase": "online", "update_step": 30, "env_step": 10, "loss/td": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    rows = [
        {"phase": phase, "update_step": step, "return": total, "length": 4, "success": won, "score": None}
        for phase, step, total, won in (
            ("offline", 20, 1.0, True), ("offline", 20, 0.0, False), ("online", 20, 1.0, True),
            ("online", 20, 1.0, True), ("online", 30, 3.0, False), ("online", 30, 4.0, True),
        )
    ]  # fmt: skip
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text('{"seed": 0}')
    return folder


EXPECTED = [
    (10, {"env_step": 0, "loss/td": 2.5}),
    (20, {"env_step": 0, "loss/td": 1.5, "critic/q_data": -3.0, "eval/return": 1, "eval/length": 4, "eval/success": 1}),
    (30, {"env_step": 10, "loss/td": 1.0, "eval/return": 3.5, "eval/length": 4, "eval/success": 0.5}),
]


def test_points(run):
    assert points(run) == EXPECTED


def test_a_line_that_is_being_written_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "online", "update_st')
    assert points(run) == EXPECTED


def test_damage_is_named(run, tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        points(tmp_path)
    with (run / "eval.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(DataError, match=r"eval\.jsonl, line 7: expected a JSON object with an update_step"):
        points(run)


def test_tensorboard_reads_it_back(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder))
        events.Reload()
        return {
            name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
        }

    expected: dict[str, list[tuple[int, float]]] = {}
    for step, values in EXPECTED:
        for name, value in values.items():
            expected.setdefault(name, []).append((step, value))
    assert to_tensorboard(run) == run / "tensorboard"
    assert read(run / "tensorboard") == expected
    (run / "tensorboard/events.out.tfevents.1.of.somebody.else").touch()
    to_tensorboard(run)
    assert read(run / "tensorboard") == expected, "a second export replaces the first"
    assert (run / "tensorboard/events.out.tfevents.1.of.somebody.else").exists()
    assert read(to_tensorboard(str(run), tmp_path / "elsewhere")) == expected


def test_trackio(run, monkeypatch):
    calls: list[tuple] = []
    fake = ModuleType("trackio")
    fake.init = lambda **given: calls.append(("init", given))
    fake.log = lambda values, step: calls.append(("log", step, values))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert to_trackio(run, "door") == "run"
    assert calls == [
        ("init", {"project": "door", "name": "run", "config": {"seed": 0}}),
        *(("log", *point) for point in EXPECTED),
        ("finish",),
    ]


@pytest.mark.parametrize(("export", "module"), [(to_tensorboard, "tensorboard"), (to_trackio, "trackio")])
def test_an_absent_tracker_is_one_sentence(run, monkeypatch, export, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        export(run, "door")
    assert str(caught.value) == f"{module} is not installed; install it with: pip install 'steelyard[track]'"
