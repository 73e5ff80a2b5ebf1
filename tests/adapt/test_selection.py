"""Choosing among samples: estimates against all subsets, one by one, and the words for what is missing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.selection import available, best_of_k, choose, criterion, curves, expected_reward, pass_at_k
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError, DataError

REWARDS = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
ITEM = PromptSamples(
    "p",
    REWARDS,
    np.array([4, 2, 8, 2, 1]),
    logps=np.array([-4.0, -3.0, -4.0, -2.0, -5.0]),
    certainty=np.array([0.1, 0.5, 0.2, 0.3, 0.4]),
    answers=("7", "8", "7", "8", ""),
    scores=np.array([0.9, 0.2, 0.8, 0.3, 0.95]),
    columns={"rm_score": [1.0, 5.0, 2.0, 3.0, 4.0], "id": 3},
)


def brute(criteria, rewards, k):
    """The mean over all subsets; equal criteria share."""
    found = []
    for rows in itertools.combinations(range(len(criteria)), k):
        most = max(criteria[row] for row in rows)
        found.append(np.mean([rewards[row] for row in rows if criteria[row] == most]))
    return np.mean(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_subsets(rows, data):
    criteria, rewards = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    k = data.draw(st.integers(1, len(rows)))
    assert best_of_k(criteria, rewards, k) == pytest.approx(brute(criteria, rewards, k), abs=1e-9)


def test_oracle_of_verified_rewards_is_pass_at_k():
    rng = np.random.default_rng(0)
    correct = (rng.random((6, 20)) < 0.3).astype(float)
    pool = SamplePool(tuple(PromptSamples("", row, np.ones(20, np.int64)) for row in correct))
    for k in (1, 3, 20):
        expected = [1 - math.comb(20 - int(c), k) / math.comb(20, k) for c in correct.sum(1)]
        assert pass_at_k(correct, k) == pytest.approx(expected)
        assert expected_reward(pool, "oracle", k) == pytest.approx(expected)


def test_pass_at_k_is_unbiased():
    """c of 100 samples of chance p: the mean estimate is 1 - (1 - p)^k."""
    outcomes = np.random.default_rng(1).random((20_000, 10)) < 0.2
    assert pass_at_k(outcomes, 4).mean() == pytest.approx(1 - 0.8**4, abs=0.01)


@pytest.mark.parametrize(
    ("rule", "best"),
    [("first", 0), ("score", 4), ("logp", 2), ("certainty", 1), ("rm_score", 1), ("oracle", 1), ("majority", 0),
     ("weighted", 0)],
)  # fmt: skip
def test_choices(rule, best):
    assert choose(ITEM, rule) == best


def test_choice_among_some():
    assert choose(ITEM, "score", [1, 3]) == 3
    assert choose(ITEM, "majority", [4, 3, 0, 1]) == 3
    assert choose(ITEM, "majority", [4]) == 4  # no answer at all: any sample is as good
    with pytest.raises(DataError, match="at least one sample"):
        choose(ITEM, "score", [])


def test_weights_can_outvote_the_majority():
    item = PromptSamples(
        "", np.zeros(3), np.ones(3, np.int64), answers=("a", "a", "b"), scores=np.array([0.1, 0.2, 0.9])
    )
    assert (choose(item, "majority"), choose(item, "weighted")) == (0, 2)


def vote_brute(answers, weights, rewards, k):
    found = []
    for rows in itertools.combinations(range(len(answers)), k):
        stated = {a: sum(weights[r] for r in rows if answers[r] == a) for a in {answers[r] for r in rows} - {""}}
        winners = [a for a in stated if stated[a] == max(stated.values())] or [""]
        found.append(np.mean([np.mean([rewards[r] for r in rows if answers[r] == a]) for a in winners]))
    return np.mean(found)


@pytest.mark.parametrize("rule", ["majority", "weighted"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_votes(rule, k):
    weights = np.ones(5) if rule == "majority" else ITEM.scores
    found = expected_reward(SamplePool((ITEM,)), rule, k, subsets=4000)[0]
    exact = k in (1, 5)
    assert found == pytest.approx(vote_brute(ITEM.answers, weights, REWARDS, k), abs=1e-12 if exact else 0.03)


def test_votes_are_reproducible():
    pool = SamplePool((ITEM, ITEM))
    assert (expected_reward(pool, "majority", 3, seed=1) == expected_reward(pool, "majority", 3, seed=1)).all()


def test_curves_and_what_is_available():
    pool = SamplePool((ITEM, ITEM))
    rules = available(pool, ("first", "score", "logp", "certainty", "majority", "weighted", "oracle", "rm_score", "id"))
    assert rules == ("first", "score", "logp", "certainty", "majority", "weighted", "oracle", "rm_score")
    found = curves(pool, rules, (1, 5))
    assert all(value.shape == (2, 2) for value in found.values())
    assert all(value[0] == pytest.approx(0.4) for value in found.values())  # one sample is one sample
    assert found["oracle"][1].tolist() == [1, 1]
    assert found["score"][1].tolist() == [0, 0]
    bare = SamplePool((PromptSamples("", REWARDS, np.ones(5, np.int64)),))
    assert available(bare) == ("first", "oracle")


def test_what_is_missing_is_said():
    bare = PromptSamples("seven?", REWARDS, np.ones(5, np.int64))
    with pytest.raises(DataError, match=r"'score'.*each of 5 samples of prompt 'seven\?', found none"):
        criterion(bare, "score")
    with pytest.raises(DataError, match="an answer of each of 5"):
        choose(bare, "majority")
    with pytest.raises(ConfigError, match="expected one of first, score"):
        criterion(bare, "best")
    with pytest.raises(ConfigError, match="votes for answers"):
        criterion(ITEM, "majority")
    with pytest.raises(DataError, match="between 1 and the 5 samples"):
        expected_reward(SamplePool((ITEM,)), "score", 6)
    with pytest.raises(DataError, match="0 and 1 only"):
        pass_at_k(np.array([[0.5, 1]]), 1)
    unknown = PromptSamples("", np.array([np.nan, 1]), np.ones(2, np.int64))
    with pytest.raises(DataError, match="1 rewards of prompt 0 are unknown"):
        expected_reward(SamplePool((unknown,)), "first", 1)
    half = PromptSamples("", np.ones(2), np.ones(2, np.int64), scores=np.array([np.nan, 1]))
    with pytest.raises(DataError, match="found 1 NaN"):
        choose(half, "score")
