"""Pairs from rewards: golden cases, properties, and the labels that noise turns round."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.pairing import RULES, pair_up, pairs_from_rewards
from steelyard.errors import ConfigError, DataError

NAN = float("nan")


def made(rewards, prompts, rule, **options):
    return pair_up(torch.tensor(rewards), torch.tensor(prompts), rule, **options)


# two prompts, mixed: prompt 7 holds rewards 1, 4, 2 (rows 0, 2, 3), prompt 3 holds 5, 5, 0 (rows 1, 4, 5)
REWARDS, PROMPTS = [1.0, 5.0, 4.0, 2.0, 5.0, 0.0], [7, 3, 7, 7, 3, 3]


@pytest.mark.parametrize(
    ("rule", "pairs", "margins", "ties"),
    [
        ("all", [[1, 5], [4, 5], [2, 3], [2, 0], [3, 0]], [5, 5, 2, 3, 1], 1),
        ("best_worst", [[1, 5], [2, 0]], [5, 3], 0),
        ("adjacent", [[4, 5], [2, 3], [3, 0]], [5, 2, 1], 1),
        ("best_rest", [[1, 5], [2, 3], [2, 0]], [5, 2, 3], 1),
    ],
)
def test_golden(rule, pairs, margins, ties):
    found = made(REWARDS, PROMPTS, rule)
    assert found.pairs.tolist() == pairs
    assert found.margins.tolist() == margins
    assert (found.ties, found.too_close, found.unscorable, found.flipped) == (ties, 0, 0, 0)
    assert len(found) == len(pairs)
    for got, wanted in zip(
        pairs_from_rewards(torch.tensor(REWARDS), torch.tensor(PROMPTS), rule),
        (found.pairs, found.margins),
        strict=True,
    ):
        assert torch.equal(got, wanted)
    assert found.pairs.dtype == torch.int64
    assert found.margins.dtype == torch.float32


def test_a_gap_drops_and_counts():
    found = made(REWARDS, PROMPTS, "all", min_gap=2.0)  # a gap of exactly 2 stays
    assert found.pairs.tolist() == [[1, 5], [4, 5], [2, 3], [2, 0]]
    assert (found.ties, found.too_close) == (1, 1)


def test_unscorable_completions_join_no_pair():
    found = made([NAN, 2.0, 1.0, NAN, 3.0], [0, 0, 0, 1, 1], "all")
    assert found.pairs.tolist() == [[1, 2]]
    assert found.unscorable == 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rewards", "ties"), [([], 0), ([NAN], 0), ([1.0], 0), ([2.0, 2.0], 1)])
def test_nothing_to_compare(rule, rewards, ties):
    found = pair_up(torch.tensor(rewards, dtype=torch.float32), torch.zeros(len(rewards), dtype=torch.int64), rule)
    assert tuple(found.pairs.shape) == (0, 2)
    assert tuple(found.margins.shape) == (0,)
    assert found.ties == ties


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rule": "every"}, ConfigError, "expected one of all, best_worst, adjacent, best_rest, found 'every'"),
        ({"min_gap": -1.0}, ConfigError, "min_gap must be at least 0, found -1.0"),
        ({"min_gap": NAN}, ConfigError, "min_gap must be at least 0"),
        ({"noise": 1.0}, ConfigError, "label noise needs a generator"),
        ({"noise": -1.0}, ConfigError, "label noise must be at least 0"),
        ({"rewards": torch.tensor([1.0, math.inf])}, DataError, "reward of completion 1: expected a finite number"),
        ({"rewards": torch.ones(3)}, DataError, r"expected one number per completion, found \[3\] and \[2\]"),
    ],
)
def test_bad_input_is_one_sentence(options, error, said):
    arguments = {"rewards": torch.tensor([1.0, 2.0]), "prompt_of": torch.tensor([0, 0]), "rule": "all"} | options
    with pytest.raises(error, match=said):
        pair_up(**arguments)


groups = st.lists(
    st.tuples(st.integers(0, 4), st.one_of(st.integers(-3, 3).map(float), st.just(NAN))), min_size=0, max_size=24
)


@given(groups, st.sampled_from(RULES), st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=200, deadline=None)
def test_pairs_stay_in_their_group_and_the_winner_is_strictly_better(rows, rule, min_gap):
    prompts = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    rewards = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    found = pair_up(rewards, prompts, rule, min_gap)
    chosen, rejected = found.pairs.T
    assert torch.equal(prompts[chosen], prompts[rejected])
    assert bool((rewards[chosen] > rewards[rejected]).all())
    assert torch.equal(rewards[chosen] - rewards[rejected], found.margins)
    assert bool((found.margins >= min_gap).all())
    assert found.unscorable == int(rewards.isnan().sum())
    assert len({tuple(pair) for pair in found.pairs.tolist()}) == len(found)
    sizes = [int(((prompts == p) & ~rewards.isnan()).sum()) for p in prompts.unique()]
    per_group = {
        "all": lambda n: n * (n - 1) // 2, "best_worst": lambda n: int(n > 1),
        "adjacent": lambda n: max(n - 1, 0), "best_rest": lambda n: max(n - 1, 0),
    }[rule]  # fmt: skip
    assert len(found) + found.ties + found.too_close == sum(map(per_group, sizes))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=16), st.sampled_from(RULES), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_permuting_the_completions_permutes_the_pairs(prompts, rule, random):
    rewards = [float(x) for x in range(len(prompts))]  # distinct: the order of equals is their position by definition
    random.shuffle(rewards)
    permutation = list(range(len(prompts)))
    random.shuffle(permutation)
    plain = made(rewards, prompts, rule).pairs
    moved = made([rewards[k] for k in permutation], [prompts[k] for k in permutation], rule).pairs
    assert {(permutation[a], permutation[b]) for a, b in moved.tolist()} == {tuple(pair) for pair in plain.tolist()}


def test_equal_to_a_loop_over_groups():
    """The vectorised code against the definition, on groups of different sizes."""
    generator = np.random.default_rng(0)
    prompts, rewards = generator.integers(0, 40, 300), generator.normal(size=300).round(1)
    wanted: dict[str, set] = {rule: set() for rule in RULES}
    for prompt in range(40):
        ranked = sorted(np.flatnonzero(prompts == prompt), key=lambda row: -rewards[row])
        for i, winner in enumerate(ranked):
            for j, loser in enumerate(ranked):
                if rewards[winner] > rewards[loser]:
                    wanted["all"].add((winner, loser))
                    if i == 0:
                        wanted["best_rest"].add((winner, loser))
                        if j == len(ranked) - 1:
                            wanted["best_worst"].add((winner, loser))
                    if j == i + 1:
                        wanted["adjacent"].add((winner, loser))
    for rule in RULES:
        pairs = pair_up(torch.from_numpy(rewards), torch.from_numpy(prompts), rule).pairs
        assert {tuple(pair) for pair in pairs.tolist()} == wanted[rule]


def test_noise_follows_bradley_terry():
    """With a gap of 1 and scale 2, labels are kept with probability sigmoid(1/2) = 0.622."""
    count = 20_000
    rewards, prompts = torch.tensor([0.0, 1.0]).repeat(count), torch.arange(count).repeat_interleave(2)
    found = pair_up(rewards, prompts, "all", 0.0, torch.Generator().manual_seed(0), 2.0)
    kept = (found.margins > 0).float().mean()
    assert abs(float(kept) - 1 / (1 + math.exp(-0.5))) < 4 * 0.5 / math.sqrt(count)
    assert torch.equal(rewards[found.pairs[:, 0]] - rewards[found.pairs[:, 1]], found.margins)
    assert found.flipped == int((found.margins < 0).sum())


def test_noise_is_a_function_of_the_generator_alone():
    rewards, prompts = torch.randn(64, generator=torch.Generator().manual_seed(1)), torch.arange(8).repeat(8)
    draw = [pair_up(rewards, prompts, "all", 0.0, torch.Generator().manual_seed(s), 1.0).pairs for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert pair_up(rewards, prompts, "all", noise=0.0).flipped == 0


def test_thousands_of_groups_take_no_loop():
    """20,000 groups of 8: a loop over groups of torch operations would take a hundred times as many kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    rewards, prompts = torch.randn(160_000), torch.arange(20_000).repeat_interleave(8)
    with Count():
        assert len(pair_up(rewards, prompts, "all")) > 500_000
    assert Count.calls < 200
