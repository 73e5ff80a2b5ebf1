"""Adaptive actions on the maze: paired numbers, comparisons at equal cost, and the study runs and resumes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steelyard.adapt.action_values import ValueQuantilesConfig
from steelyard.errors import ConfigError, MissingExtraError
from steelyard.objectives import QCConfig
from steelyard.objectives.fql import FlowNetworkConfig
from steelyard.recipes import adaptive_actions
from steelyard.recipes.adaptive_actions import PRESETS, ActionStudy, SeedJob, run, run_seed
from steelyard.recipes.adaptive_actions_page import (
    BOUND,
    CHANCE,
    FIXED,
    GAIN,
    MODE,
    THRESHOLD,
    Numbers,
    findings,
    section,
)
from steelyard.report.tables import Table

STUDY = ActionStudy(
    size="UMaze",
    max_episode_steps=60,
    data_steps=80,
    objective=QCConfig(
        network=FlowNetworkConfig(actor_hidden=(8,), critic_hidden=(8,), critic_layer_norm=False),
        chunk_length=3, num_samples=2, flow_steps=2, discount=0.98, chunk_ends="terminal",
    ),
    updates=3,
    batch_size=16,
    judge=ValueQuantilesConfig((8,), draws=8, updates=100, batch_size=16, learning_rate=1e-2),
    probe_episodes=3,
    fixed=(1, 2, 4),
    means=(2.0,),
    episodes=2,
    seeds=(0,),
)  # fmt: skip


def made(lengths: dict[tuple[str, float], float], evaluations: dict[tuple[str, float], float] | None = None):
    """Rows of two seeds and five episodes; episode e of seed s is e + s steps longer than what `lengths` says."""
    spent = evaluations or {}
    ways = [(MODE, 1.0), *((FIXED, float(k)) for k in STUDY.fixed),
            *((method, mean) for mean in STUDY.means for method in (THRESHOLD, GAIN, CHANCE))]  # fmt: skip
    episodes: list[dict[str, Any]] = []
    states: list[dict[str, Any]] = []
    for seed in (0, 1):
        for method, mean in ways:
            for episode in range(5):
                length = lengths.get((method, mean), 30) + episode + seed
                drawn = 10 * spent.get((method, mean), mean)
                episodes.append({"seed": seed, "method": method, "mean": mean, "episode": episode, "success": True,
                                 "length": length, "decisions": 10, "evaluations": drawn})  # fmt: skip
        for method, mean in [*ways, *((BOUND, m) for m in STUDY.means)]:
            value = {FIXED: mean, THRESHOLD: 2.6, GAIN: 3.1, CHANCE: 1.9}.get(method, 3.4) + seed
            states.append({"seed": seed, "method": method, "mean": mean, "value": value, "evaluations": mean,
                           "calibration_error": 0.02, "within_states": 0.1})  # fmt: skip
    return episodes, states


def test_fixed_best_of_k_is_compared_at_the_same_evaluations():
    rows, _ = made({(FIXED, 1.0): 40, (FIXED, 2.0): 20, (FIXED, 4.0): 10}, {(THRESHOLD, 2.0): 2 * 2**0.5})
    numbers = Numbers(rows)
    assert numbers.per_decision(THRESHOLD, 2) == pytest.approx(2 * 2**0.5)
    at = {evaluations: np.concatenate(numbers.fixed_at(STUDY.fixed, evaluations, "length"))[0]
          for evaluations in (1, 2**0.5, 2, 2 * 2**0.5, 4, 9)}  # fmt: skip
    assert list(at.values()) == pytest.approx([40, 30, 20, 15, 10, 10])
    assert numbers.of(FIXED, 2, "return")[1][3] == -(20 + 3 + 1)


def test_verdicts_follow_from_intervals():
    rows, states = made({(FIXED, 1.0): 40, (FIXED, 4.0): 10, (THRESHOLD, 2.0): 20, (GAIN, 2.0): 35, (CHANCE, 2.0): 35})
    found = {one.claim.removeprefix("Ours: "): one for one in findings(STUDY, rows, states)}
    assert found["best of 4 actions returns more than one draw"].verdict == "holds"
    at_equal = "2 evaluations on average: more than fixed best-of-K at as many"
    assert found[f"threshold, {at_equal}"].verdict == "holds"
    assert "10.0 [10.0, 10.0] in return; above 0 in 2 of 2 seeds (2.00 eval" in found[f"threshold, {at_equal}"].measured
    assert found[f"expected gain, {at_equal}"].verdict == "does not hold"
    by_chance = "2 evaluations on average: more than stopping by chance"
    assert found[f"expected gain, {by_chance}"].verdict == "not clear"
    higher = "2 evaluations on average: chooses actions of higher Q than stopping by chance, in the same states"
    assert found[f"threshold, {higher}"].measured.startswith("0.23 [0.23, 0.23] of the gain of best of 4; 2 of 2")


def test_the_page_shows_every_method_and_says_what_does_not_hold():
    rows, states = made({(FIXED, 1.0): 40, (FIXED, 4.0): 10, (GAIN, 2.0): 35})
    page = section(STUDY, rows, states)
    table, values = (part for part in page.parts if isinstance(part, Table))
    names = [row[0] for row in table.rows]
    assert names == [
        "mode",
        "fixed, 1",
        "fixed, 2",
        "fixed, 4",
        "threshold, 2",
        "expected gain, 2",
        "stop by chance, 2",
    ]
    fractions = dict(zip(names, (row[5] for row in table.rows), strict=True))
    assert (fractions["fixed, 1"].value, fractions["fixed, 4"].value) == (0, 1)
    assert fractions["expected gain, 2"].value == pytest.approx(1 / 6)
    assert values.rows[-1][0] == "expected gain, known, 2"
    notes = [part for part in page.parts if isinstance(part, tuple)]
    assert any("Does not hold here: Ours: expected gain" in note for note in notes[0])


def test_presets_and_ranges():
    for config in PRESETS.values():
        assert len(config.seeds) >= 3
        assert config.fixed[0] == 1
        assert config.fixed[-1] == 32
    for change, said in (({"fixed": (2, 4)}, "begin with 1"), ({"means": (64.0,)}, "between 1 and 4"),
                         ({"means": ()}, "between 1 and 4"), ({"episodes": 0}, "episodes")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(STUDY, **change)


def test_without_the_simulator_nothing_is_written(tmp_path, monkeypatch):
    def absent(*_: Any) -> None:
        raise MissingExtraError("gymnasium_robotics is not installed; pip install 'steelyard[sim]'")

    monkeypatch.setattr(adaptive_actions, "make", absent)
    with pytest.raises(MissingExtraError, match="gymnasium_robotics"):
        run(STUDY, tmp_path / "out", 1, Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.sim
def test_the_study_runs_resumes_and_a_seed_repeats(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics")
    out = tmp_path / "out"
    sections, found = run(STUDY, out, 1, Console(quiet=True))
    assert len(sections) == 1
    assert len(found) == 2 + 2 * 3
    before = (out / "rows.csv").read_bytes()
    assert before.count(b"\n") == 1 + 2 * (1 + 3 + 3)
    kept = (out / "jobs" / "seed_0.json").read_text()
    again = run_seed(SeedJob(STUDY, 0))
    assert json.loads(kept) == json.loads(json.dumps(again))
    monkeypatch.setattr(adaptive_actions, "run_seed", None)  # whoever calls it again fails
    assert run(STUDY, out, 1, Console(quiet=True))[1] == found
    assert (out / "rows.csv").read_bytes() == before
    with pytest.raises(ConfigError, match="other settings"):
        run(dataclasses.replace(STUDY, updates=4), out, 1, Console(quiet=True))
