"""Soft labels by hand: ties, margins, unknown rewards, two samples; margins as quantiles; where samples are cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from steelyard.data.restart_labels import RestartLabelConfig, cuts, margin_of, soft_labels
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "margin", "expected"),
    [
        # one success among four: a failure is beaten by one of three others, the success by none
        ([1, 0, 0, 0], 0.0, [0, 1 / 3, 1 / 3, 1 / 3]),
        # hopeless and trivial prompts tie: nobody would do better by starting over
        ([0, 0, 0], 0.0, [0, 0, 0]),
        ([1, 1, 1], 0.0, [0, 0, 0]),
        # graded: 0.3 is beaten by 0.9 and by neither 0.3
        ([0.3, 0.9, 0.3, 0.1], 0.0, [1 / 3, 0, 1 / 3, 1]),
        # a margin makes 0.9 against 0.5 a tie, not 0.9 against 0.1
        ([0.9, 0.5, 0.1], 0.5, [0, 0, 0.5]),
        # what differs by exactly the margin is a tie
        ([1.0, 0.5], 0.5, [0, 0]),
        # two samples: a hard label
        ([2.0, 7.0], 0.0, [1, 0]),
        # unknown rewards are compared with nothing
        ([1, 0, NAN, 0], 0.0, [0, 0.5, NAN, 0.5]),
        # one sample alone says nothing
        ([1.0], 0.0, [NAN]),
        ([1.0, NAN], 0.0, [NAN, NAN]),
    ],
)
def test_soft_labels_by_hand(rewards, margin, expected):
    np.testing.assert_allclose(soft_labels(np.array(rewards, float), margin), expected)


def test_a_soft_label_is_the_mean_over_pairs():
    """The Rao-Blackwellised pair loss: the mean of hard labels against each other sample, ties being no."""
    rewards = numpy_generator(0, "rewards").integers(0, 4, (5, 7)).astype(float)
    found = soft_labels(rewards, 1.0)
    for prompt, i in itertools.product(range(5), range(7)):
        others = [rewards[prompt, j] > rewards[prompt, i] + 1.0 for j in range(7) if j != i]
        assert found[prompt, i] == pytest.approx(np.mean(others))


def test_margins_are_absolute_or_a_quantile_of_the_gaps_within_prompts():
    rewards = [np.array([0.0, 1.0, 3.0]), np.array([10.0, NAN, 10.5])]  # gaps 1, 3, 2 and 0.5
    assert margin_of(rewards, RestartLabelConfig(margin=0.7)) == 0.7
    assert margin_of(rewards, RestartLabelConfig(margin=0.0, margin_kind="quantile")) == 0.5
    assert margin_of(rewards, RestartLabelConfig(margin=0.5, margin_kind="quantile")) == 1.5
    with pytest.raises(ConfigError, match="below 1"):
        RestartLabelConfig(margin=1.0, margin_kind="quantile")
    with pytest.raises(DataError, match="two rewards"):
        margin_of([np.array([1.0])], RestartLabelConfig(margin=0.5, margin_kind="quantile"))


def test_cuts_are_the_end_random_parts_and_once_the_prompt():
    ends = np.array([5, 1, 0, 3])
    found = cuts(ends, 200, True, numpy_generator(0, "cuts"))
    assert found.shape == (4, 202)
    assert found[:, 0].tolist() == [5, 1, 0, 3]
    assert found[:, -1].tolist() == [0, -1, -1, -1]
    assert set(found[0, 1:-1].tolist()) == {1, 2, 3, 4}
    assert set(found[3, 1:-1].tolist()) == {1, 2}
    assert set(found[1:3, 1:-1].ravel().tolist()) == {-1}  # too short to be cut
    counts = np.bincount(cuts(np.full(2000, 5), 1, False, numpy_generator(1, "cuts"))[:, 1])[1:]
    assert counts.min() > 430  # uniform: 500 each
    assert cuts(ends, 0, False, numpy_generator(0, "cuts")).tolist() == [[5, -1], [1, -1], [0, -1], [3, -1]]
