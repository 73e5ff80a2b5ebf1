"""Active queries: golden values by hand, limits of information, exact joint BALD against enumeration, ties, speed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steelyard.adapt.losses import BradleyTerry
from steelyard.adapt.query import MAX_OUTCOMES, Pool, acquire, next_query
from steelyard.adapt.reweight import HyRe
from steelyard.errors import ConfigError, DataError

LN2 = np.log(2)


def logit(p):
    p = np.asarray(p, np.float64)
    return np.log(p / (1 - p))


def h(*p):
    return -sum(x * np.log(x) for x in p if x > 0)


def generator(seed=0):
    return np.random.default_rng(seed)


def margins_of(p):
    """Members [N, H, 1] with the given probabilities [N, H]."""
    return logit(p)[:, :, None]


@st.composite
def pools(draw, classes=1, limit=700.0):
    n, heads = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    members = draw(arrays(np.float64, (n, heads, classes), elements=st.floats(-limit, limit)))
    weights = draw(arrays(np.float64, heads, elements=st.floats(0.0, 1))) + 1e-3
    return members, weights / weights.sum()


# ------------------------------------------------------------------------------------------------------- by hand


def test_golden_preferences():
    """Two members that say 0.9 and 0.2, weights 3/4 and 1/4: mean 0.725."""
    pool = Pool(margins_of([[0.9, 0.2]]), "preference")
    weights = np.array([0.75, 0.25])
    together = h(0.725, 0.275)
    own = 0.75 * h(0.9, 0.1) + 0.25 * h(0.2, 0.8)
    np.testing.assert_allclose(pool.entropy(weights), together, rtol=1e-12)
    np.testing.assert_allclose(pool.bald(weights), together - own, rtol=1e-12)
    a, b = logit([0.9, 0.2])
    np.testing.assert_allclose(pool.variance(weights), 0.75 * 0.25 * (a - b) ** 2, rtol=1e-12)
    assert round(together, 4) == 0.5882  # by calculator
    assert round(together - own, 4) == 0.2193


def test_golden_classes():
    """Three classes, two members sure of different ones: one bit; of the same one: nothing."""
    sure = np.array([[[60.0, 0, 0], [0, 60.0, 0]], [[60.0, 0, 0], [60.0, 0, 0]]])
    pool, half = Pool(sure, "classification"), np.array([0.5, 0.5])
    np.testing.assert_allclose(pool.bald(half), [LN2, 0], atol=1e-12)
    np.testing.assert_allclose(pool.entropy(half), [LN2, 0], atol=1e-12)
    some = np.log(np.array([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]))
    expected = h(0.3, 0.2, 0.5) - 0.5 * (h(0.5, 0.3, 0.2) + h(0.1, 0.1, 0.8))
    np.testing.assert_allclose(Pool(some, "classification").bald(half), expected, rtol=1e-10)


def test_golden_variance_of_a_regression():
    pool = Pool(np.array([[[1.0], [3.0]], [[2.0], [2.0]]]), "regression")
    np.testing.assert_allclose(pool.variance(np.array([0.5, 0.5])), [1.0, 0.0])


def test_what_is_unsure_in_itself_is_not_worth_asking():
    """Entropy prefers the coin flip that all members agree on; BALD the one on which they differ."""
    members = margins_of([[0.5, 0.5], [0.8, 0.3]])
    half = np.array([0.5, 0.5])
    assert acquire(members, half, 1, "entropy", "preference", generator()) == [0]
    assert acquire(members, half, 1, "bald", "preference", generator()) == [1]
    assert acquire(members, half, 1, "variance", "preference", generator()) == [1]


# ----------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(pools())
def test_bald_of_preferences_lies_between_0_and_ln_2(case):
    members, weights = case
    found = Pool(members, "preference").bald(weights)
    assert (found >= 0).all()
    assert (found <= LN2).all()
    entropy = Pool(members, "preference").entropy(weights)
    assert (found <= entropy + 1e-12).all()
    # a label cannot tell more than is unknown of the member
    assert (found <= h(*weights) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(pools(classes=3))
def test_bald_of_classes_lies_between_0_and_ln_c(case):
    members, weights = case
    found = Pool(members, "classification").bald(weights)
    assert (found >= 0).all()
    assert (found <= np.log(3)).all()


@settings(max_examples=40, deadline=None)
@given(pools(limit=30.0))
def test_joint_bald_of_one_is_bald(case):
    members, weights = case
    pool = Pool(members, "preference")
    alone = [pool.joint_bald(weights, [row]) for row in range(len(pool))]
    np.testing.assert_allclose(alone, pool.bald(weights), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(pools(limit=30.0))
def test_clipping_hides_nothing(case):
    """The unclipped information must be within rounding of [0, ln 2]: the clip is for the last digit only."""
    members, weights = case
    pool = Pool(members, "preference")
    raw = pool.entropy(weights) - pool.own_entropy @ weights
    assert raw.min() > -1e-12
    assert raw.max() < LN2 + 1e-12


@settings(max_examples=30, deadline=None)
@given(pools(limit=20.0), st.permutations(range(6)))
def test_the_order_of_members_does_not_matter(case, order):
    members, weights = case
    order = [k for k in order if k < len(weights)]
    first, second = Pool(members, "preference"), Pool(members[:, order], "preference")
    for name in ("bald", "entropy", "variance"):
        np.testing.assert_allclose(
            getattr(first, name)(weights), getattr(second, name)(weights[order]), rtol=1e-9, atol=1e-12
        )


def test_two_classes_are_a_preference():
    margins = generator(1).normal(size=(9, 4, 1)) * 3
    logits = np.concatenate([np.zeros_like(margins), margins], 2)
    weights = np.full(4, 0.25)
    for name in ("bald", "entropy"):
        found = [getattr(Pool(m, t), name)(weights) for m, t in ((margins, "preference"), (logits, "classification"))]
        np.testing.assert_allclose(found[0], found[1], atol=1e-12)


def test_swapping_the_sides_of_a_pair_changes_nothing():
    margins = generator(2).normal(size=(9, 4, 1)) * 3
    weights = generator(3).dirichlet(np.ones(4))
    for name in ("bald", "entropy", "variance"):
        found = [getattr(Pool(sign * margins, "preference"), name)(weights) for sign in (1, -1)]
        np.testing.assert_allclose(found[0], found[1], atol=1e-12)


def test_extreme_margins_are_fine():
    members = np.array([[[1e4], [-1e4]], [[1e300], [1e300]], [[0.0], [-800.0]]])
    pool = Pool(members, "preference")
    half = np.array([0.5, 0.5])
    np.testing.assert_allclose(pool.bald(half), [LN2, 0, h(0.25, 0.75) - 0.5 * LN2], atol=1e-12)


def test_copies_of_one_member_leave_nothing_to_ask():
    members = np.repeat(generator(4).normal(size=(5, 1, 1)), 7, 1)
    assert Pool(members, "preference").bald(np.full(7, 1 / 7)).max() < 1e-14


# ------------------------------------------------------------------------------------------------------ joint BALD


def enumerated(p, weights, rows):
    """I(y; k) of rows, by the definition: over all members and outcomes. p [N, H, C]."""
    rows = list(rows)
    information = 0.0
    for outcome in itertools.product(range(p.shape[2]), repeat=len(rows)):
        given_member = [
            np.prod([p[row, k, y] for row, y in zip(rows, outcome, strict=True)]) for k in range(p.shape[1])
        ]
        joint = sum(w * q for w, q in zip(weights, given_member, strict=True))
        for w, q in zip(weights, given_member, strict=True):
            if w * q > 0:
                information += w * q * np.log(q / joint)
    return information


@pytest.mark.parametrize("seed", range(4))
def test_joint_information_equals_enumeration(seed):
    g = generator(seed)
    margins = g.normal(size=(6, 3, 1)) * 2
    weights = g.dirichlet(np.ones(3))
    pool = Pool(margins, "preference")
    for rows in ([0], [1, 4], [5, 2, 3], [0, 1, 2, 3]):
        np.testing.assert_allclose(pool.joint_bald(weights, rows), enumerated(pool.outcomes, weights, rows), atol=1e-12)
    logits = g.normal(size=(4, 3, 3)) * 2
    pool = Pool(logits, "classification")
    np.testing.assert_allclose(
        pool.joint_bald(weights, [0, 2, 3]), enumerated(pool.outcomes, weights, [0, 2, 3]), atol=1e-12
    )


@pytest.mark.parametrize("task", ["preference", "classification"])
@pytest.mark.parametrize("seed", range(3))
def test_joint_choice_is_the_greedy_one_of_enumeration(seed, task):
    g = generator(10 + seed)
    members = g.normal(size=(7, 4, 1 if task == "preference" else 3)) * 2
    weights = g.dirichlet(np.ones(4))
    p = Pool(members, task).outcomes
    expected: list[int] = []
    for _ in range(3):
        left = [row for row in range(7) if row not in expected]
        expected.append(max(left, key=lambda row: enumerated(p, weights, [*expected, row])))
    assert acquire(members, weights, 3, "joint_bald", task, generator()).tolist() == expected


def test_joint_choice_does_not_ask_the_same_thing_twice():
    """Two equal questions that tell most, and another that tells a little: BALD takes the copy, joint BALD does not.

    Four members: questions 0 and 1 separate {0, 1} from {2, 3}; question 2 separates {0, 2} from {1, 3}, less clearly.
    """
    members = margins_of([[0.99, 0.99, 0.01, 0.01], [0.99, 0.99, 0.01, 0.01], [0.9, 0.1, 0.9, 0.1]])
    weights = np.full(4, 0.25)
    assert sorted(acquire(members, weights, 2, "bald", "preference", generator())) == [0, 1]
    assert 2 in acquire(members, weights, 2, "joint_bald", "preference", generator())


def test_too_many_outcomes_are_refused():
    members = generator().normal(size=(20, 3, 1))
    with pytest.raises(ConfigError, match=rf"13 questions with 2 outcomes each, 8192 in all .* {MAX_OUTCOMES}"):
        acquire(members, np.full(3, 1 / 3), 13, "joint_bald", "preference", generator())
    with pytest.raises(ConfigError, match="5 questions with 10 outcomes"):
        acquire(generator().normal(size=(9, 3, 10)), np.full(3, 1 / 3), 5, "joint_bald", "classification", generator())
    assert len(acquire(members, np.full(3, 1 / 3), 12, "joint_bald", "preference", generator())) == 12


# ----------------------------------------------------------------------------------------------- choices and ties


@pytest.mark.parametrize("how", ["random", "entropy", "variance", "bald", "joint_bald"])
def test_choices_are_distinct_reproducible_and_respect_what_is_excluded(how):
    members = generator(5).normal(size=(30, 8, 1))
    weights = np.full(8, 1 / 8)
    exclude = np.arange(30) % 2 == 0
    first, again = (acquire(members, weights, 5, how, "preference", generator(7), exclude) for _ in range(2))
    assert first.dtype == np.int64
    assert first.tolist() == again.tolist()
    assert len(set(first.tolist())) == 5
    assert not exclude[first].any()


@pytest.mark.parametrize("how", ["random", "entropy", "variance", "bald", "joint_bald"])
def test_ties_are_broken_by_the_seed_and_evenly(how):
    members = np.repeat(generator(6).normal(size=(1, 5, 1)), 4, 0)
    first = [int(acquire(members, np.full(5, 0.2), 1, how, "preference", generator(s))[0]) for s in range(400)]
    counts = np.bincount(first, minlength=4)
    assert counts.min() > 60  # 100 expected; below 60 once in 10^5


@pytest.mark.parametrize("how", ["entropy", "variance", "bald"])
def test_the_best_are_chosen_in_order(how):
    members, weights = generator(8).normal(size=(40, 6, 1)), np.full(6, 1 / 6)
    scores = getattr(Pool(members, "preference"), how)(weights)
    chosen = acquire(members, weights, 4, how, "preference", generator())
    assert scores[chosen].tolist() == sorted(scores, reverse=True)[:4]


def test_a_sequence_finds_the_member_that_answers():
    """Ask, answer as member 11 would, re-weight: after few answers it has the most weight; and no row comes twice."""
    members = 4 * generator(9).normal(size=(200, 32, 1))
    pool, posterior, asked = Pool(members, "preference"), HyRe().begin(32), np.zeros(200, bool)
    for step in range(8):
        row = next_query(pool, posterior.weights(), asked, "bald", "preference", generator(step))
        assert not asked[row]
        asked[row] = True
        label = float(members[row, 11, 0] > 0)
        posterior = posterior.update_losses(BradleyTerry()(members[[row]], np.array([label])))
    assert posterior.weights().argmax() == 11
    random = HyRe().begin(32)
    rows = generator(1).permutation(200)[:8]
    random = random.update_losses(BradleyTerry()(members[rows], (members[rows, 11, 0] > 0).astype(float)))
    assert posterior.weights()[11] > random.weights()[11]


def test_a_pool_asked_again_is_the_same_as_its_members():
    members = generator(10).normal(size=(50, 6, 1))
    pool = Pool(members, "preference")
    for seed in range(3):
        weights = generator(seed).dirichlet(np.ones(6))
        found = [acquire(one, weights, 3, "bald", "preference", generator(2)).tolist() for one in (members, pool)]
        assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"how": "balf"}, ConfigError, "expected one of random, entropy, variance, bald, joint_bald, found 'balf'"),
        ({"task": "regression"}, ConfigError, "use variance or random"),
        ({"task": "regression", "how": "joint_bald"}, ConfigError, "use variance or random"),
        ({"k": 11}, ConfigError, "asked for 11 examples, but there are 10"),
        ({"k": 0}, ConfigError, "asked for 0 examples"),
        ({"exclude": np.arange(10) != 3, "k": 2}, ConfigError, "but there are 1 to choose from"),
        ({"weights": np.full(4, 0.25)}, DataError, "expected weights of 3 members"),
        ({"weights": np.array([1.0, 1.0, -1.0])}, DataError, "expected weights of 3 members"),
        ({"weights": np.array([1.0, 1.0, 1.0])}, DataError, "of sum 1"),
        ({"members": np.full((10, 3, 1), np.nan)}, DataError, "not finite"),
        ({"members": np.zeros((10, 3, 2))}, DataError, r"\[N, H, 1\], found the shape \(10, 3, 2\)"),
        ({"members": np.zeros((10, 3))}, DataError, r"found the shape \(10, 3\)"),
    ],
)
def test_mistakes(change, error, said):
    right = {"members": np.zeros((10, 3, 1)), "weights": np.full(3, 1 / 3), "k": 1, "how": "bald", "task": "preference",
             "generator": generator()}  # fmt: skip
    with pytest.raises(error, match=said) as caught:
        acquire(**(right | change))
    assert "\n" not in str(caught.value)


def test_random_and_variance_serve_a_regression():
    members = np.array([[[0.0], [0.0]], [[1.0], [-1.0]]])
    half = np.array([0.5, 0.5])
    assert acquire(members, half, 1, "variance", "regression", generator()) == [1]
    assert acquire(members, half, 2, "random", "regression", generator()).tolist() in ([0, 1], [1, 0])
