"""The controller: waves, stopping, pruning, budgets, what is chosen, what it cost, and what it tells on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.best_of_n import ledger, sample, stream
from steelyard.adapt.compute_policy import (
    Budget,
    ComputePolicy,
    Draw,
    PruneRule,
    Request,
    StopRule,
    TemperatureSchedule,
)
from steelyard.errors import ConfigError

LENGTH = 100


class Scripted:
    """Draws samples whose scores and lengths are given."""

    max_new_tokens = LENGTH

    def __init__(self, scores, lengths=None, evaluates: bool = True) -> None:
        self.scores, self.evaluates = np.asarray(scores, dtype=float), evaluates
        self.lengths = np.full(self.scores.shape, LENGTH) if lengths is None else np.asarray(lengths)
        self.asked: list[list[Request]] = []

    def draw(self, requests, checkpoints, keep):
        self.asked.append(list(requests))
        score = {r: self.scores[r.prompt, r.sample] if self.evaluates else math.nan for r in requests}
        length = {r: int(self.lengths[r.prompt, r.sample]) for r in requests}
        live, pruned, seen = list(requests), {}, {r: {} for r in requests}
        for at in checkpoints:
            live = [r for r in live if length[r] > at]
            for r in live:
                seen[r][at] = score[r]
            if keep is not None and live:
                kept = keep(at, live, np.array([score[r] for r in live]))
                pruned |= {r: at for r, stays in zip(live, kept, strict=True) if not stays}
                live = [r for r in live if r not in pruned]
        return [self.drawn(r, score[r], seen[r], pruned.get(r), length[r]) for r in requests]

    def drawn(self, request, score, seen, pruned, length):
        end = length if pruned is None else pruned
        return Draw(request, "", (), score if pruned is None else math.nan, seen, math.nan, math.nan, pruned is None,
                    pruned, end, 3 * (len(seen) + (pruned is None)))  # fmt: skip


def policy(stop=("never", {}), waves=(1,), prune=None, **budget) -> ComputePolicy:
    kind, options = stop
    return ComputePolicy(
        TemperatureSchedule(),
        StopRule(kind, **options),
        prune or PruneRule(),
        Budget(**{"max_samples": 8} | budget),
        waves,
    )


def test_one_by_one_until_the_threshold():
    backend = Scripted([[0.2, 0.5, 0.95, 0.1], [0.9, 0.1, 0.1, 0.1], [0.3, 0.2, 0.6, 0.5]])
    traces = sample(backend, 3, policy(("threshold", {"threshold": 0.9}), max_samples=4))
    assert [trace.samples for trace in traces] == [3, 1, 4]
    assert [trace.chosen for trace in traces] == [2, 0, 2]
    assert [trace.stopped for trace in traces] == ["threshold", "threshold", "max_samples"]
    assert [trace.waves for trace in traces] == [3, 1, 4]
    assert [[r.prompt for r in wave] for wave in backend.asked] == [[0, 1, 2], [0, 2], [0, 2], [2]]
    assert [draw.request.temperature for draw in traces[2].draws] == [0.0, 0.5, 0.75, 0.875]


def test_expected_gain_stops_when_a_sample_costs_more_than_it_brings():
    trace = sample(
        Scripted([[0.5, 0.7, 0.97]]), 1, policy(("expected_gain", {"gain": 2.0, "cost": 0.1}), max_samples=3)
    )[0]
    assert (trace.samples, trace.stopped) == (3, "expected_gain")  # 1.0, 0.6, 0.06 against 0.1


def test_waves_are_finished_before_stopping():
    backend = Scripted([[0.95] + [0.1] * 15])
    trace = sample(backend, 1, policy(("threshold", {}), waves=(4, 8), max_samples=16))[0]
    assert (trace.samples, trace.waves, trace.chosen) == (4, 1, 0)
    whole = sample(backend, 1, policy(waves=(1, 1, 2, 4, 8), max_samples=14))[0]
    assert (whole.samples, whole.waves, whole.stopped) == (14, 5, "max_samples")
    assert [len(wave) for wave in backend.asked[1:]] == [1, 1, 2, 4, 6]


def test_no_wave_is_started_that_could_exceed_the_tokens():
    backend = Scripted([[0.1] * 16], [[100, 30, 100, 60] + [100] * 12])
    trace = sample(backend, 1, policy(waves=(2,), max_samples=16, max_tokens=430))[0]
    # 130 after the first two, 290 after four, then one more fits
    assert [len(wave) for wave in backend.asked] == [2, 2, 1]
    assert (trace.stopped, trace.decoded) == ("max_tokens", 390)
    with pytest.raises(ConfigError, match="max_tokens is 99, but one sample may take 100"):
        sample(backend, 1, policy(max_tokens=99))


def test_the_first_of_equal_scores_is_chosen():
    assert sample(Scripted([[0.5, 0.7, 0.7, 0.7]]), 1, policy(max_samples=4))[0].chosen == 1


def test_without_scores_the_first_is_chosen_and_rules_that_need_them_refuse():
    backend = Scripted(np.zeros((2, 4)), evaluates=False)
    assert [trace.chosen for trace in sample(backend, 2, policy(max_samples=4))] == [0, 0]
    with pytest.raises(ConfigError, match="stop rule 'threshold' reads scores"):
        sample(backend, 2, policy(("threshold", {})))
    with pytest.raises(ConfigError, match="pruning by 'quantile' reads scores"):
        sample(backend, 2, policy(waves=(4,), prune=PruneRule("quantile", (32,))))
    random = sample(backend, 2, policy(waves=(4,), max_samples=4, prune=PruneRule("random", (32,))))
    assert [sum(draw.pruned_at == 32 for draw in trace.draws) for trace in random] == [2, 2]


# pruning


def test_the_lowest_are_dropped_in_equal_steps():
    scores = np.random.default_rng(0).permutation(16)[None] / 16
    rule = PruneRule("quantile", (20, 40), fraction=0.5)
    trace = sample(Scripted(scores), 1, policy(waves=(16,), max_samples=16, prune=rule))[0]
    at = {
        at: {round(16 * scores[0, d.request.sample]) for d in trace.draws if d.pruned_at == at} for at in (20, 40, None)
    }
    assert at == {20: {0, 1, 2, 3}, 40: {4, 5, 6, 7}, None: set(range(8, 16))}
    assert scores[0, trace.chosen] == 15 / 16
    assert trace.decoded == 4 * 20 + 4 * 40 + 8 * 100
    assert trace.evaluated == 3 * (16 + 12 + 8)


def test_samples_that_have_ended_are_not_counted():
    # six of eight are over before the checkpoint: of the two others one goes, not all
    lengths = [[10] * 6 + [100, 100]]
    rule = PruneRule("quantile", (32,), fraction=0.5)
    trace = sample(Scripted([[0.9] * 6 + [0.4, 0.3]], lengths), 1, policy(waves=(8,), prune=rule))[0]
    assert [draw.pruned_at for draw in trace.draws] == [None] * 7 + [32]


@pytest.mark.parametrize(
    ("kind", "dropped"), [("absolute", {0, 1, 2}), ("both", {0, 1, 2, 3}), ("quantile", {0, 1, 2, 3})]
)
def test_absolute_and_both(kind, dropped):
    scores = [[0.05, 0.07, 0.09, 0.3, 0.4, 0.5, 0.6, 0.7]]
    rule = PruneRule(kind, (32,), fraction=0.5, threshold=0.1)
    trace = sample(Scripted(scores), 1, policy(waves=(8,), prune=rule))[0]
    assert {k for k, draw in enumerate(trace.draws) if draw.pruned_at is not None} == dropped


def test_the_last_hope_is_never_dropped_but_a_later_wave_may_be():
    rule = PruneRule("absolute", (32,), threshold=0.9)
    trace = sample(Scripted([[0.1, 0.5, 0.2, 0.3, 0.05, 0.01]]), 1, policy(waves=(4, 2), max_samples=6, prune=rule))[0]
    assert [draw.pruned_at for draw in trace.draws] == [32, None, 32, 32, 32, 32]
    assert trace.chosen == 1


def test_random_pruning_depends_on_seed_and_prompt_only():
    rule = PruneRule("random", (20, 40), fraction=0.5)
    settings_ = policy(waves=(16,), max_samples=16, prune=rule)
    backend = Scripted(np.linspace(0, 1, 16)[None].repeat(40, 0))

    def dropped(prompts, seed):
        return {
            d.request for trace in sample(backend, prompts, settings_, seed=seed) for d in trace.draws if d.pruned_at
        }

    whole = dropped(40, 0)
    assert len(whole) == 40 * 8
    assert dropped([7, 3], 0) == {r for r in whole if r.prompt in (3, 7)}
    assert dropped(40, 1) != whole
    assert abs(np.mean([r.sample for r in whole]) - 7.5) < 0.6, "scores must not matter"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_what_is_decided_about_a_prompt_depends_on_its_own_samples_only(seed, data):
    draw = np.random.default_rng(seed)
    backend = Scripted(draw.random((6, 12)), draw.integers(5, 101, (6, 12)))
    rule = PruneRule(
        data.draw(st.sampled_from(["none", "quantile", "absolute", "both", "random"])),
        (10, 50),
        fraction=data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0])),
        threshold=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    stop = data.draw(
        st.sampled_from([("never", {}), ("threshold", {"threshold": 0.8}), ("expected_gain", {"cost": 0.2})])
    )
    waves = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tokens = data.draw(st.sampled_from([None, 100, 350, 800]))
    chosen = policy(stop, waves, rule, max_samples=12, max_tokens=tokens)
    together = sample(backend, 6, chosen)
    for number, trace in enumerate(together):
        assert repr(sample(backend, [number], chosen)) == repr([trace])
        assert 1 <= trace.samples <= 12
        assert tokens is None or trace.decoded <= tokens
        carried = [d for d in trace.draws if d.pruned_at is None]
        assert trace.draws[trace.chosen].score == max(d.score for d in carried)
        assert [d.request.sample for d in trace.draws] == list(range(trace.samples))


# what is told, what it costs


def test_the_stream_tells_everything_once():
    backend = Scripted([[0.2, 0.5, 0.95, 0.1], [0.9, 0.1, 0.1, 0.1]])
    rules = policy(("threshold", {}), (2,), PruneRule("quantile", (32,)), max_samples=4)
    events = list(stream(backend, 2, rules))
    assert [(e.kind, e.prompt, e.wave) for e in events if e.kind in ("started", "decided")] == [
        ("started", 0, 0), ("started", 1, 0), ("decided", 1, 0), ("started", 0, 1), ("decided", 0, 1),
    ]  # fmt: skip
    traces = sample(backend, 2, rules)
    for number, trace in enumerate(traces):
        mine = [e for e in events if e.prompt == number]
        assert tuple(e.draw for e in mine if e.kind in ("drawn", "pruned")) == trace.draws
        assert repr([e.trace for e in mine if e.kind == "decided"]) == repr([trace])
        assert [r for e in mine for r in e.requests] == [d.request for d in trace.draws]


def test_the_stream_is_told_wave_by_wave():
    backend = Scripted([[0.1] * 4])
    events = stream(backend, 1, policy(max_samples=4))
    next(events), next(events)
    assert len(backend.asked) == 1, "later waves must not have been drawn yet"


def test_a_ledger_sums_up():
    rule = PruneRule("quantile", (20,), fraction=0.5)
    traces = sample(Scripted(np.linspace(0, 1, 8)[None].repeat(3, 0)), 3, policy(waves=(4,), prune=rule))
    found = ledger(traces)
    assert (found.prompts, found.samples, found.pruned, found.waves) == (3, 24, 12, 2)
    assert (found.mean_samples, found.full_length) == (8.0, 100.0)
    assert found.mean_tokens == 4 * 20 + 4 * 100
    assert found.full_samples == pytest.approx(4.8)
    assert found.evaluated == 3 * 3 * (8 + 4)
    with pytest.raises(ConfigError, match="at least one prompt"):
        ledger([])


def test_prompts_are_named_once_and_answered_in_order():
    backend = Scripted([[0.95], [0.95], [0.95]])
    assert [t.draws[0].request.prompt for t in sample(backend, [2, 0], policy(("threshold", {})))] == [2, 0]
    with pytest.raises(ConfigError, match="some twice"):
        sample(backend, [1, 1], policy())
