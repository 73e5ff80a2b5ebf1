"""`steelyard eval --best-of`: candidates valued by the critic, fixed or adaptive, on a trained run."""

from __future__ import annotations

import json
import re

import pytest

from steelyard.adapt import best_of_n_actions
from steelyard.adapt.action_values import ValueQuantilesConfig

from .conftest import OFTEN
from .toy_point import ENV_ID

WHERE = ("--env", ENV_ID, "--episodes", 4, "--parallel", 4)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_best_of_n_counts_candidates(command, offline_run, tmp_path):
    status, out, _ = command("eval", offline_run, *WHERE, "--best-of", 5, "--rows", tmp_path / "rows.jsonl")
    assert status == 0
    assert re.search(r"candidates a decision.*5\.00", out)
    played = rows(tmp_path / "rows.jsonl")
    assert all(row["evaluations"] == 5 * row["decisions"] == 5 * row["length"] for row in played)
    command("eval", offline_run, *WHERE, "--rows", tmp_path / "plain.jsonl")
    plain = rows(tmp_path / "plain.jsonl")
    assert [row["episode_seed"] for row in plain] == [row["episode_seed"] for row in played]  # paired starts
    assert "evaluations" not in plain[0]


@pytest.mark.parametrize("stop", ["expected_gain", "threshold"])
def test_the_mean_is_what_was_asked_for(command, offline_run, stop, monkeypatch):
    small = ValueQuantilesConfig((16,), draws=8, updates=150, batch_size=32, learning_rate=1e-2)
    monkeypatch.setattr(best_of_n_actions, "ValueQuantilesConfig", lambda: small)
    words = ("--best-of", 12, "--evaluations", 3, "--stop", stop)
    status, out, _ = command("eval", offline_run, *WHERE, *words)
    assert status == 0
    found = re.search(r"candidates a decision\D*([0-9.]+)", out)
    assert found is not None
    assert float(found[1]) == pytest.approx(3, rel=0.4)  # four episodes


def test_a_cloned_policy_borrows_a_critic(command, prior, offline_run, tmp_path):
    small = ("--objective.network.actor-hidden", "8")
    words = ("train", "bc", "--data", prior, "--out", tmp_path / "bc", "--offline-steps", 5, *small, *OFTEN)
    assert command(*words)[0] == 0
    status, _, err = command("eval", tmp_path / "bc", *WHERE, "--best-of", 3)
    assert status == 2
    assert "BC has no critic of continuous actions; name a run that has one" in err
    assert command("eval", tmp_path / "bc", *WHERE, "--best-of", 3, "--critic", offline_run)[0] == 0


def test_mistakes_are_told_in_one_sentence(command, offline_run):
    for words, said in (
        (("--evaluations", 3), "say how many at most with --best-of N"),
        (("--best-of", 0), "--best-of must be at least 1, found 0"),
        (("--best-of", 4, "--evaluations", 5), "must lie between the first wave and the budget of 4, found 5"),
    ):
        status, _, err = command("eval", offline_run, *WHERE, *words)
        assert status == 2
        assert said in err
