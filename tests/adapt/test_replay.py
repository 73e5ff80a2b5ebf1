"""Replaying a pool: the same samples for every rule, and the same decisions as the live decode loop."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Budget, ComputePolicy, PruneRule, Request, StopRule, TemperatureSchedule
from steelyard.adapt.decoding import ModelBackend
from steelyard.adapt.replay import ReplayBackend
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.envs.samplers import SamplingConfig
from steelyard.envs.scorers import scorer_from_name
from steelyard.errors import DataError
from steelyard.nets.self_eval import SlotEvaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.workflows.sample_pool import PoolPrompt, SamplePoolConfig, build_pool

EOS, N = 3, 6
PROMPTS = [[5, 6, 7], [1, 2, 1, 4], [8, 8, 4, 2, 9], [4], [9, 1]]
SAMPLING = SamplingConfig(max_new_tokens=12)


def item(temperatures=None, lengths=(5, 9, 2, 7), prompt="p") -> PromptSamples:
    n = len(lengths)
    return PromptSamples(
        prompt,
        np.arange(n, dtype=np.float64),
        np.array(lengths),
        tuple(f"text {k}" for k in range(n)),
        tuple(tuple(range(length)) for length in lengths),
        temperatures=None if temperatures is None else np.array(temperatures, np.float64),
        scores=np.arange(n) / 10,
        checkpoint_scores=np.array([[0.5 - k / 10] if length > 4 else [np.nan] for k, length in enumerate(lengths)]),
        answers=tuple(str(k) for k in range(n)),
    )


def one(backend, number, temperature=1.0, prompt=0):
    return backend.draw([Request(prompt, number, temperature)], (), None)[0]


def test_a_replay_is_the_pool():
    backend = ReplayBackend(SamplePool((item(),), (4,)), extra_tokens=3)
    draws = backend.draw([Request(0, k, 1.0) for k in (2, 0)], (4,), None)
    assert [draw.text for draw in draws] == ["text 2", "text 0"]
    assert [draw.checkpoint_scores for draw in draws] == [{}, {4: 0.5}]  # sample 2 has ended before
    assert [draw.evaluated for draw in draws] == [3, 6]
    assert [(draw.decoded, draw.score, draw.reward, draw.answer) for draw in draws] == [
        (2, 0.2, 2, "2"),
        (5, 0, 0, "0"),
    ]
    assert (len(backend), backend.max_new_tokens) == (1, 9)


def test_given_up_samples_end_there():
    asked = []

    def keep(tokens, requests, scores):
        asked.append((tokens, [request.sample for request in requests], scores.tolist()))
        return [request.sample != 1 for request in requests]

    draws = ReplayBackend(SamplePool((item(),), (4,))).draw([Request(0, k, 1.0) for k in range(4)], (4,), keep)
    assert asked == [(4, [0, 1, 3], [0.5, 0.4, 0.2])]
    given_up = draws[1]
    assert (given_up.pruned_at, given_up.decoded, given_up.tokens) == (4, 4, (0, 1, 2, 3))
    assert (given_up.finished, given_up.text) == (False, "")
    assert math.isnan(given_up.score)
    assert [draw.pruned_at for draw in draws] == [None, 4, None, None]


def test_orders_are_permutations():
    pool = SamplePool((item(), item(prompt="q")), (4,))
    found = [
        [one(ReplayBackend(pool, order), k, prompt=p).text for k in range(4)] for order in range(6) for p in (0, 1)
    ]
    assert all(sorted(texts) == [f"text {k}" for k in range(4)] for texts in found)
    assert len({tuple(texts) for texts in found}) > 6, "prompts and orders should differ"


def test_orders_keep_temperatures():
    annealed = item((0, 0.5, 1, 1))
    for order in range(8):
        backend = ReplayBackend(SamplePool((annealed,), (4,)), order)
        assert one(backend, 0, 0.0).text == "text 0"
        assert {one(backend, k, 1.0).text for k in (2, 3)} == {"text 2", "text 3"}


def test_two_pools_serve_every_schedule():
    annealed = SamplePool((item((0, 0.5, 0.75, 0.875)),), (4,), "annealed")
    warm = item((1, 1, 1, 1))
    constant = SamplePool((replace(warm, texts=tuple("abcd")),), (4,), "constant")
    backend = ReplayBackend([annealed, constant])
    texts = {
        kind: [one(backend, k, TemperatureSchedule(kind).of(k)).text for k in range(4)]
        for kind in ("constant", "annealed", "greedy_first")
    }
    assert texts == {
        "constant": list("abcd"),
        "annealed": [f"text {k}" for k in range(4)],
        "greedy_first": ["text 0", *"bcd"],
    }


def test_what_is_not_there_is_said():
    pool = SamplePool((item(),), (4,), "old samples")
    backend = ReplayBackend(pool)
    with pytest.raises(
        DataError, match="old samples: no sample 0 of prompt 0 at temperature 0; that one was drawn at 1"
    ):
        one(backend, 0, 0.0)
    with pytest.raises(DataError, match="a prompt has 4 samples"):
        one(backend, 4)
    with pytest.raises(DataError, match=r"no prompt 1; the pool holds prompts 0\.\.0"):
        one(backend, 0, prompt=1)
    with pytest.raises(DataError, match=r"one of \[4\] tokens, found 5"):
        backend.draw([Request(0, 0, 1.0), Request(0, 1, 1.0)], (5,), None)
    hole = replace(item(), checkpoint_scores=np.full((4, 1), np.nan))
    with pytest.raises(DataError, match="sample 0 was not evaluated at 4 tokens"):
        ReplayBackend(SamplePool((hole,), (4,))).draw([Request(0, 0, 1.0)], (4,), None)
    with pytest.raises(DataError, match="same prompts"):
        ReplayBackend([pool, SamplePool((), ())])
    with pytest.raises(DataError, match="prompt 0 is not the same"):
        ReplayBackend([pool, SamplePool((item(prompt="q"),), (4,))])


def test_random_pruning_needs_no_scores():
    """Its mean reward is that of one sample, whatever the rewards: best of what is left is no choice without scores."""
    bare = replace(item(), scores=None, checkpoint_scores=None)
    pool = SamplePool((bare,) * 400)
    policy = ComputePolicy(
        TemperatureSchedule("constant"), StopRule("never"), PruneRule("random", at=(1,), fraction=0.5), Budget(4), (4,)
    )
    traces = sample(ReplayBackend(pool), len(pool), policy)
    assert {sum(draw.pruned_at is not None for draw in trace.draws) for trace in traces} == {2}
    dropped = np.array([[draw.pruned_at is not None for draw in trace.draws] for trace in traces])
    assert dropped.mean(0) == pytest.approx([0.5] * 4, abs=0.1)


@pytest.fixture(scope="module")
def live():
    """A model, an evaluator that means nothing, and pools of their samples drawn in pieces."""
    model = TinyLM(TransformerConfig(12, 16, 2, 2, 64), torch.Generator().manual_seed(0), reference="none")
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(3.0)
    evaluator = SlotEvaluator(10, 11)
    prompts = [PoolPrompt(str(ids), tuple(ids)) for ids in PROMPTS]
    pools = [
        build_pool(
            None, prompts, model, scorer_from_name("length:max"),
            SamplePoolConfig(N, TemperatureSchedule(kind), SAMPLING, (2, 5), batch_prompts=2, seed=4),
            evaluator=evaluator, eos=EOS, decode=str, quiet=True,
        )
        for kind in ("annealed", "constant")
    ]  # fmt: skip
    return model, evaluator, pools


@pytest.mark.parametrize("stop", [StopRule("threshold", 0.35), StopRule("never"), StopRule("expected_gain", cost=0.6)])
@pytest.mark.parametrize(
    "prune",
    [
        PruneRule(),
        PruneRule("quantile", (2, 5), 0.5),
        PruneRule("both", (5,), 0.4, 0.5),
        PruneRule("random", (2,), 0.5),
    ],
)
@pytest.mark.parametrize("kind", ["annealed", "constant", "greedy_first"])
def test_a_replay_decides_as_the_live_loop(live, stop, prune, kind):
    model, evaluator, pools = live
    policy = ComputePolicy(TemperatureSchedule(kind), stop, prune, Budget(N), (1, 2, 3))
    backend = ModelBackend(model, evaluator, SAMPLING, 4, PROMPTS, eos=EOS, decode=str)
    drawn = sample(backend, len(PROMPTS), policy)
    replayed = sample(ReplayBackend(pools, extra_tokens=evaluator.extra_tokens), len(PROMPTS), policy)
    for one_trace, other in zip(drawn, replayed, strict=True):
        assert (other.chosen, other.stopped, other.waves) == (one_trace.chosen, one_trace.stopped, one_trace.waves)
        for a, b in zip(one_trace.draws, other.draws, strict=True):
            assert (b.request, b.tokens, b.pruned_at) == (a.request, a.tokens, a.pruned_at)
            assert (b.decoded, b.evaluated, b.finished) == (a.decoded, a.evaluated, a.finished)
            assert b.score == pytest.approx(a.score, abs=1e-5, nan_ok=True)
            assert b.checkpoint_scores == pytest.approx(a.checkpoint_scores, abs=1e-5)


def test_the_live_pools_are_worth_testing_with(live):
    lengths = {int(length) for pool in live[2] for found in pool for length in found.lengths}
    scores = np.concatenate([found.scores for pool in live[2] for found in pool])
    assert len(lengths) > 4
    assert 0.2 < (scores > 0.35).mean() < 0.8
