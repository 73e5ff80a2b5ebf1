"""HyRe's maze: labels are never tested on, verdicts come from intervals, and the whole thing runs and resumes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from steelyard.adapt.base import Support
from steelyard.data.batch import TransitionBatch
from steelyard.errors import ConfigError, MissingExtraError
from steelyard.objectives.control_heads import ControlHeadsConfig
from steelyard.recipes import hyre_maze, hyre_maze_runs
from steelyard.recipes.hyre_maze import PRESETS, run
from steelyard.recipes.hyre_maze_page import SHOWN, Numbers, findings, section
from steelyard.recipes.hyre_maze_runs import Agent, fine_tuned, ways
from steelyard.recipes.hyre_maze_worlds import GOAL, KINDS, TRAINED, WORLDS, MazeStudy, SeedJob, Steps, worlds_of
from steelyard.report.tables import Table

STUDY = MazeStudy(
    training=("as it was", "turned 180"),
    validation=("turned 60",),
    targets=("turned 135", "goal 4,4"),
    prior_steps=60,
    label_steps=80,
    heads=ControlHeadsConfig(hidden=(8, 8)),
    updates=5,
    group_batch=4,
    shots=(1, 3),
    episodes=1,
    seeds=(0,),
)
ALWAYS = ("HyRe", "Gaussian over heads", "fine-tuning", "HyRe by TD")


def steps(count: int, first: int = 0) -> TransitionBatch:
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return TransitionBatch(numbers[:, None], numbers[:, None].expand(-1, 2), numbers, numbers[:, None], numbers,
                           numbers, numbers)  # fmt: skip


def test_every_preset_has_unseen_targets_enough():
    for config in PRESETS.values():
        assert len(config.training) >= 8
        assert len(config.targets) >= 8
        assert len(config.seeds) >= 3
        assert set(config.shots) == {1, 2, 5, 20}
        assert not {*config.training} & {*config.targets, *config.validation}
        assert not {*config.targets} & {*config.validation}
        # also not under another name
        worlds = {(WORLDS[name].shift, WORLDS[name].goal) for name in (*config.training, *config.validation)}
        assert not worlds & {(WORLDS[name].shift, WORLDS[name].goal) for name in config.targets}
        assert {WORLDS[name].kind for name in config.training} == {TRAINED}
        assert {WORLDS[name].kind for name in config.targets} <= {*KINDS}


def test_worlds_must_be_known_and_different():
    with pytest.raises(ConfigError, match="no world is named 'upside down'"):
        dataclasses.replace(STUDY, targets=("upside down",))
    with pytest.raises(ConfigError, match="named twice"):
        dataclasses.replace(STUDY, targets=("turned 60",))
    assert worlds_of(GOAL) and all(name.startswith("goal") for name in worlds_of(GOAL))  # noqa: PT018


def test_fewer_labels_are_among_more_and_draws_differ():
    world = Steps("x", steps(40), steps(40, 100), steps(40, 200))
    few, few_random = world.drawn(3, 0)
    many, many_random = world.drawn(10, 0)
    assert many.rewards[:3].tolist() == few.rewards.tolist()
    assert many_random.rewards[:3].tolist() == few_random.rewards.tolist()
    assert len(set(many.rewards.tolist())) == 10
    assert many.rewards.max() < 40  # none of the held-out ones
    assert world.drawn(10, 1)[0].rewards.tolist() != many.rewards.tolist()
    assert world.drawn(10, 0, 1)[0].rewards.tolist() != many.rewards.tolist()


def rows(success: dict[str, float], seeds: int = 3) -> list[dict[str, Any]]:
    """Return rows of all targets in which a method succeeds as often as `success` says, 0.2 where it does not."""
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for number, name in enumerate(PRESETS["tiny"].targets):
            for method in SHOWN:
                fixed = method in ("uniform", "single", "best head, known", "uniform, greedy")
                for n in (0,) if fixed else (1, 2, 5, 20):
                    level = success.get(method, 0.2) + 0.01 * number
                    row = {"seed": seed, "world": name, "kind": WORLDS[name].kind, "method": method, "n": n,
                           "error": 0.5, "ess": 3.0}  # fmt: skip
                    if fixed or method in ALWAYS or n == 20:
                        row |= {"success": level, "return": -75 * (1 - level)}
                    found.append(row)
        for method in ("own head", "own critic, greedy"):
            found.append({"seed": seed, "world": "as it was", "kind": TRAINED, "method": method, "n": 0,
                          "success": 0.5, "return": -40.0})  # fmt: skip
    return found


def test_verdicts_follow_from_intervals_alone():
    better = findings(PRESETS["tiny"], rows({"HyRe": 0.7, "HyRe by TD": 0.1}))
    verdicts = {finding.claim: finding.verdict for finding in better}
    assert verdicts["Ours: 5 labelled steps: HyRe over policy heads succeeds more often than their mean"] == "holds"
    assert verdicts["Ours: 20 labelled steps: a Gaussian over heads succeeds more often than HyRe"] == "does not hold"
    tells = [claim for claim in verdicts if "TD errors of critic heads tell which goal" in claim]
    assert [verdicts[claim] for claim in tells] == ["does not hold"]
    assert "50.0 [50.0, 50.0] points of success; 8 of 8 worlds above 0" in better[0].measured
    equal = findings(PRESETS["tiny"], rows({}))
    assert {finding.verdict for finding in equal} == {"not clear"}


def test_what_needs_no_steps_is_the_same_for_every_n():
    numbers = Numbers(rows({"uniform": 0.4}))
    for n in (1, 20):
        assert numbers.estimate("uniform", n, "success").value == pytest.approx(0.435)
    assert len(numbers.of("HyRe", 5, "success", (GOAL,))[0]) == 3 * 3
    # worlds are resampled, not seeds: equal seeds make no interval narrower
    once, often = (Numbers(rows({}, seeds)).estimate("HyRe", 5, "success") for seeds in (1, 9))
    assert (once.low, once.high) == (pytest.approx(often.low), pytest.approx(often.high))


def test_the_section_shows_every_method_and_what_does_not_work():
    page = section(PRESETS["tiny"], rows({"HyRe": 0.7}))
    table = next(part for part in page.parts if isinstance(part, Table) and "Success in unseen" in part.title)
    assert [row[0] for row in table.rows] == list(SHOWN)
    assert not any("does not work" in part for part in page.parts if isinstance(part, str))  # 0.5 is no less than 0.5
    worse = [row | {"success": 0.2} if row["method"] == "own critic, greedy" else row for row in rows({})]
    told = [part for part in section(PRESETS["tiny"], worse).parts if isinstance(part, str)]
    assert any("does not work" in part and "20%" in part and "50%" in part for part in told)


def test_without_the_simulator_the_section_is_left_out_in_one_sentence(tmp_path, monkeypatch, capsys):
    def absent(*_: Any) -> None:
        raise MissingExtraError("gymnasium_robotics is not installed; pip install 'steelyard[sim]'")

    monkeypatch.setattr(hyre_maze, "make", absent)
    assert run(STUDY, tmp_path / "out", 1, Console(width=300)) == ([], [])
    assert "point maze left out: gymnasium_robotics is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    pytest.importorskip("gymnasium_robotics")
    out = tmp_path_factory.mktemp("maze") / "out"
    return out, run(STUDY, out, 1, Console(quiet=True))


@pytest.mark.sim
def test_the_study_runs_and_goes_on_where_it_stopped(done, monkeypatch):
    out, (sections, found) = done
    assert len(sections) == 1
    assert {finding.verdict for finding in found} <= {"holds", "does not hold", "not clear"}
    before = (out / "rows.csv").read_bytes()
    monkeypatch.setattr(hyre_maze, "make_data", None)  # whoever calls them again fails
    monkeypatch.setattr(hyre_maze, "run_seed", None)
    again = run(STUDY, out, 1, Console(quiet=True))
    assert (out / "rows.csv").read_bytes() == before
    assert again[1] == found
    with pytest.raises(ConfigError, match="other settings"):
        run(dataclasses.replace(STUDY, updates=6), out, 1, Console(quiet=True))


@pytest.mark.sim
def test_a_seed_repeats_and_settings_never_see_the_targets(done, monkeypatch):
    out, _ = done
    asked = []
    original = hyre_maze_runs.choose

    def watched(agent, way, validation, n, seed):
        asked.append({world.name for world in validation})
        return original(agent, way, validation, n, seed)

    monkeypatch.setattr(hyre_maze_runs, "choose", watched)
    first = hyre_maze_runs.run_seed(SeedJob(STUDY, str(out), 0))
    assert {tuple(sorted(names)) for names in asked} == {STUDY.validation}
    kept = json.loads((out / "jobs" / "seed_0.json").read_text())
    assert json.loads(json.dumps(first)) == kept


@pytest.mark.sim
def test_labels_and_held_out_steps_are_of_different_episodes(done):
    out, _ = done
    world = hyre_maze_runs.read_steps(STUDY, str(out), "goal 4,4")
    parts = (world.labelled, world.held_out)
    labelled, held_out = ({tuple(row) for row in part.observations.tolist()} for part in parts)
    assert labelled
    assert held_out
    assert not labelled & held_out
    assert world.labelled.masks[-1] == 0  # the cut is at an episode's end


@pytest.mark.sim
def test_variances_are_of_each_member_at_its_own_group(done):
    out, _ = done
    learner = hyre_maze_runs.train_heads(STUDY, str(out), 0)
    groups = [hyre_maze_runs.read_prior(STUDY, str(out), name) for name in STUDY.training]
    agent = Agent(learner, groups)
    supports: list[Support] = [agent.policies.support(group) for group in groups]
    for member in (1, 2):
        one = supports[member - 1]
        expected = np.mean((one.members[:, member, 0] - one.labels) ** 2)
        assert agent.variances["labels"][member] == pytest.approx(expected)
    assert len(ways(agent)) == 7
    before = [parameter.clone() for parameter in learner.parameters()]
    stages = [(count, policy.act(groups[0].observations, torch.Generator(), "mean"))
              for count, policy in fine_tuned(agent, groups[0], 1e-2)]  # fmt: skip
    assert [count for count, _ in stages] == [1, 3, 10, 30]
    errors = [float((acts - groups[0].actions).square().mean()) for _, acts in stages]
    assert errors[-1] < errors[0]
    for parameter, kept in zip(learner.parameters(), before, strict=True):  # a copy was trained
        assert torch.equal(parameter, kept)
