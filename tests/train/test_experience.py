"""The source of preference training: order, reuse, freshness, what is dropped, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steelyard.data import experience
from steelyard.data.buffer import joined, labelled, of_rows, trimmed, with_mismatched
from steelyard.data.experience import FOREIGN, ExperienceBatch
from steelyard.data.preferences import TextData, TextRow, tokenize
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import ConfigError, DataError
from steelyard.rng import torch_generator
from steelyard.train import distributed
from steelyard.train.experience import ATTEMPTS, ExperienceConfig
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

from .tiny_text import CHAT, Rewards, learner, preferences, prompts, source


def texts(batch) -> list[str]:
    return [CHAT.decode(ids[mask > 0].tolist()) for ids, mask in zip(batch.prompts, batch.prompt_mask, strict=True)]


def same(left, right) -> bool:
    return alike(left.tensors(), right.tensors())


def alike(a: dict, b: dict) -> bool:
    """Whether tensors are the same bits, NaN like NaN."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and bool(((a[name] == b[name]) | (a[name].isnan() & b[name].isnan())).all())
        for name in a
    )


# ---------------------------------------------------------------------------------------------- order and reuse


def test_each_pass_serves_each_prompt_once_in_a_new_order():
    made = source(reuse=3)
    passes = [[*texts(made.batch(step)), *texts(made.batch(step + 1))] for step in (0, 2, 4)]
    assert len({tuple(one) for one in passes}) == 3
    assert len({frozenset(one) for one in passes}) == 1
    assert len(set(passes[0])) == 8


def test_an_epoch_serves_each_row_once():
    made = source(prompts_per_refresh=None)
    assert sorted(text for step in range(3) for text in texts(made.batch(step))) == sorted(f"p{i}" for i in range(12))
    assert ExperienceConfig(minibatch_prompts=4, reuse=2, epochs=2).updates(12) == 12
    assert ExperienceConfig(minibatch_prompts=4, prompts_per_refresh=8).updates(12) == 4


def test_a_data_set_is_a_pure_function_of_seed_and_step():
    forwards, backwards = source(reuse=2), source(reuse=2)
    batches = [forwards.batch(step) for step in range(8)]
    for step in (5, 0, 7, 2):
        assert same(backwards.batch(step), batches[step])
    assert not same(batches[0], batches[1])


@pytest.mark.parametrize("config", [{"source": "policy"}, {"source": "mixture"}])
def test_fresh_samples_are_a_pure_function_of_seed_step_and_weights(config):
    a, b = (source(scorer=Rewards(), reuse=2, **config) for _ in range(2))
    assert all(same(a.batch(step), b.batch(step)) for step in range(5))


def test_staleness_runs_from_zero_to_the_last_update_of_a_refresh():
    made = source("rloo", scorer=Rewards(), source="policy", reuse=2)
    seen = []
    for step in range(8):
        batch = made.batch(step)
        assert batch.born.unique().tolist() == [step // 4 * 4]
        seen.append(made.counters()["data/staleness"])
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_same_prompt_twice_gets_other_samples():
    made = source("rloo", data=prompts(2), scorer=Rewards(), source="policy")
    made.batch(0)
    buffer = made._buffer
    assert len(buffer.prompts) == 8
    rows = [tuple(map(tuple, buffer.completions[buffer.prompt_of == p].tolist())) for p in range(8)]
    assert len(set(rows)) == 8


# ---------------------------------------------------------------------------------------------- the policy's own


def test_fresh_samples_are_the_policys_own():
    made = source("rloo", scorer=Rewards(), source="policy", sampling=SamplingConfig(temperature=0.7, max_new_tokens=6))
    made.learner.temperature = 0.7
    batch = made.batch(0)
    outputs = made.learner.model.outputs(batch, temperature=0.7)
    torch.testing.assert_close(outputs.token_logps, batch.sampler_token_logps, atol=1e-4, rtol=0)
    assert torch.bincount(batch.prompt_of).tolist() == [4] * 4


def test_the_scorer_gets_text_ids_and_columns():
    scorer = Rewards()
    source("rloo", data=prompts(), scorer=scorer, source="policy").batch(0)
    ((asked, written, ids, columns),) = scorer.seen
    assert len(asked) == len(written) == len(ids) == 32
    assert [f"p{number}" for number in columns["answer"]] == asked
    assert [CHAT.decode(row) for row in ids] == written


def test_semi_online_samples_with_old_weights_and_puts_new_ones_back():
    moved, still = (source("rloo", scorer=Rewards(), source="policy", sync_every=2) for _ in range(2))
    assert same(moved.batch(0), still.batch(0))
    with torch.no_grad():
        for parameter in moved.learner.model.parameters():
            parameter.add_(0.3)
    before = [parameter.clone() for parameter in moved.learner.model.parameters()]
    second, expected = moved.batch(2), still.batch(2)
    assert torch.equal(second.completions, expected.completions)
    assert torch.equal(second.sampler_token_logps, expected.sampler_token_logps)
    assert second.born.unique().tolist() == [0]
    assert moved.counters()["data/staleness"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, moved.learner.model.parameters(), strict=True))
    assert not torch.equal(moved.batch(4).completions, still.batch(4).completions)
    assert moved.batch(4).born.unique().tolist() == [4]


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_mixture_keeps_its_share(share):
    made = source(scorer=Rewards(), source="mixture", offline_share=share)
    offline = 0
    for refresh in range(10):
        made.batch(2 * refresh)
        buffer = made._buffer
        owners = buffer.prompt_of[buffer.born == FOREIGN].unique()
        offline += len(owners)
        assert buffer.sampler_token_logps is None
    assert offline == round(share * 80)


def test_a_longer_answer_needs_an_end():
    plain, fined = (source("rloo", scorer=Rewards(), source="policy", missing_eos_penalty=fine) for fine in (0.0, 9.0))
    a, b = plain.batch(0), fined.batch(0)
    ended = (a.completions == CHAT.eos).any(1)
    torch.testing.assert_close(b.rewards, a.rewards - 9.0 * (~ended).float())
    assert plain.counters()["completions/clipped_ratio"] == pytest.approx(
        1 - float((plain._buffer.completions == CHAT.eos).any(1).float().mean())
    )


# ---------------------------------------------------------------------------------------------- pairs and labels


def test_pairs_are_made_of_rewards_and_ties_are_dropped():
    made = source(scorer=Rewards(lambda row: float(row % 4 == 1 and row < 20)), source="policy")
    for step in range(2):
        batch = made.batch(step)
        assert (batch.rewards[batch.pairs[:, 0]] > batch.rewards[batch.pairs[:, 1]]).all()
        assert (batch.margins == 1).all()
        assert len(batch) == 2 * len(batch.pairs)  # what is compared with nothing is left out
    counters = made.counters()
    assert counters["data/dropped_ties"] == 3
    assert counters["data/prompts"] == 5
    assert counters["frac_reward_zero_std"] == 3 / 8
    assert counters["reward"] == pytest.approx(5 / 32)


def test_other_prompts_are_tried_before_giving_up():
    calls = []
    scorer = Rewards(lambda row: row * (len(calls) > 2))
    inner = scorer.score
    scorer.score = lambda *args: (calls.append(1), inner(*args))[1]
    made = source(scorer=scorer, source="policy")
    made.batch(0)
    assert made.counters()["data/redraws"] == 2
    stuck = source(scorer=Rewards(lambda row: 1.0), source="policy")
    with pytest.raises(DataError, match=f"refresh 0: {ATTEMPTS} buffers of 8 prompts in a row had nothing to learn from"
                       " .80 prompts whose completions all have the same reward"):  # fmt: skip
        stuck.batch(0)


def test_unscorable_completions_are_left_out_and_counted():
    made = source("rloo", scorer=Rewards(lambda row: math.nan if row % 4 == 0 else float(row)), source="policy")
    assert torch.bincount(made.batch(0).prompt_of).tolist() == [3] * 4
    assert made.counters()["data/dropped_unscorable"] == 8
    lonely = source("rloo", scorer=Rewards(lambda row: math.nan if row % 4 else 1.0), source="policy")
    with pytest.raises(DataError, match="fewer completions than the objective needs"):
        lonely.batch(0)


def test_an_infinite_reward_is_an_error():
    with pytest.raises(DataError, match=r"expected 32 finite scores, found shape \[32\], 1 of them infinite"):
        source("rloo", scorer=Rewards(lambda row: math.inf if row == 5 else 1.0), source="policy").batch(0)


def test_labels_come_from_pairs_or_from_the_mean_of_the_group():
    batch = preferences(3).batch(np.arange(3))
    assert labelled(replace(batch, labels=None)).labels.tolist() == [1, 0] * 3
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, math.nan])
    found = labelled(replace(batch, labels=None, pairs=None, rewards=rewards)).labels
    assert found[:2].tolist() == [0, 1]
    assert found[2:].isnan().all()
    assert labelled(replace(batch, labels=torch.tensor([0.0] + [math.nan] * 5))).labels.tolist() == [0, 0, 1, 0, 1, 0]


def test_kto_gets_completions_of_other_prompts():
    made = source("kto")
    batch = made.batch(0)
    own, other = batch.mismatched == 0, batch.mismatched == 1
    assert own.sum() == other.sum() == 8
    assert batch.labels[other].isnan().all()
    assert batch.reference_token_logps[other].abs().sum() > 0
    written = texts(batch)
    for row in torch.nonzero(other).flatten():
        completion = CHAT.decode(batch.completions[row][batch.scored_mask[row] > 0].tolist())
        number = written[int(batch.prompt_of[row])][1:]
        assert number not in completion.replace("good ", "").replace("bad", "").split("!")
    learner_ = made.learner
    update(learner_, Optimizers(learner_, OptimConfig()), batch, 0, 0)


def test_advantages_are_computed_once_for_a_buffer():
    made = source("ppo", scorer=Rewards(), source="policy", reuse=2)
    optimizers = Optimizers(made.learner, OptimConfig())
    seen = {}
    for step in range(4):
        batch = made.batch(step)
        assert batch.values.shape == batch.advantages.shape == batch.scored_mask.shape
        for prompt, text in enumerate(texts(batch)):
            rows = batch.prompt_of == prompt
            seen.setdefault(text, []).append(batch.advantages[rows][batch.scored_mask[rows] > 0])
        update(made.learner, optimizers, batch, 0, step)
    assert all(torch.equal(first, second) for first, second in seen.values())


# ---------------------------------------------------------------------------------------------- batches


def test_joining_and_trimming_change_no_log_probability():
    made = learner()
    data = preferences()
    short, long = data.batch(np.arange(3)), data.batch(np.array([10, 11]))
    both = joined([short, long])
    wide = replace(
        both,
        completions=torch.nn.functional.pad(both.completions, (0, 3)),
        scored_mask=torch.nn.functional.pad(both.scored_mask, (0, 3)),
        prompts=torch.nn.functional.pad(both.prompts, (2, 0)),
        prompt_mask=torch.nn.functional.pad(both.prompt_mask, (2, 0)),
    )
    assert same(trimmed(wide), both)
    expected = torch.cat([made.model.outputs(part).token_logps.sum(1) for part in (short, long)])
    torch.testing.assert_close(made.model.outputs(both).token_logps.sum(1), expected)
    assert both.pairs.tolist() == [[2 * i, 2 * i + 1] for i in range(5)]
    assert same(both.of_prompts(torch.tensor([3, 4])), both.of_prompts(torch.tensor([3, 4])))


def test_dropping_rows_keeps_pairs_of_the_others():
    batch = preferences(3).batch(np.arange(3))
    kept = of_rows(batch, torch.tensor([True, False, True, True, True, True]))
    assert kept.pairs.tolist() == [[1, 2], [3, 4]]
    assert kept.prompt_of.tolist() == [0, 1, 1, 2, 2]


def test_one_prompt_has_no_other():
    with pytest.raises(DataError, match="need at least 2 prompts"):
        with_mismatched(preferences(1).batch(np.arange(1)))


# ---------------------------------------------------------------------------------------------- resume and parts


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (lambda: learner("ppo"), {"source": "policy"}),
        (lambda: learner("dpo"), {"source": "mixture", "sync_every": 2}),
        (lambda: learner("kto"), {}),
        (lambda: learner("reinforce"), {"source": "policy", "sync_every": 3}),
        (lambda: learner("reinforce", baseline="ema"), {"source": "policy"}),  # has a memory
    ],
)
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resume_in_the_middle_of_a_buffer_is_exact(made, config, stop):
    """Everything that is no function of the step is in the state, bit for bit: also the counters."""

    def run(first, last, begin=None):
        batches, counters = [], []
        served = source(made=made(), scorer=Rewards(), reuse=2, **config)
        optimizers = Optimizers(served.learner, OptimConfig())
        if begin:
            served.learner.load_state_dict(begin[0])
            optimizers.load_state_tensors(begin[1])
            served.load_state_tensors(begin[2])
        for step in range(first, last):
            batch = served.batch(step)
            update(served.learner, optimizers, batch, 0, step)
            batches.append(batch)
            counters.append(served.counters())
        states = (served.learner.state_dict(), optimizers.state_tensors(), served.state_tensors())
        copies = [{name: value.clone() for name, value in part.items()} for part in states]
        return batches, counters, copies

    whole, half = run(0, 9), run(0, stop)
    rest = run(stop, 9, half[2])
    assert all(same(a, b) for a, b in zip(whole[0][stop:], rest[0], strict=True))
    assert whole[1][stop:] == rest[1]
    assert all(alike(a, b) for a, b in zip(whole[2], rest[2], strict=True))


@pytest.mark.parametrize(
    ("kind", "config"), [("dpo", {}), ("rloo", {"source": "policy"}), ("grpo", {"source": "policy"})]
)
def test_parts_of_an_update_do_what_the_whole_does(kind, config):
    """Shards: the same buffer, and gradients and losses whose mean is the whole's, up to rounding."""
    losses = {}
    for shards in (1, 2, 4):
        made = source(kind, scorer=Rewards(), shards=shards, reuse=2, **config)
        optimizers = Optimizers(made.learner, OptimConfig(shards=shards))
        losses[shards] = []
        for step in range(4):
            found = update(made.learner, optimizers, made.batch(step), 0, step)
            losses[shards].append((float(found["loss/preference"].mean()), float(found["grad/preference"].mean())))
    for shards in (2, 4):
        np.testing.assert_allclose(losses[shards], losses[1], rtol=2e-4, atol=2e-6)


def test_dropped_prompts_leave_no_part_empty():
    scorer = Rewards(lambda row: float(row % 4 == 1 and row < 12))
    made = source(scorer=scorer, shards=2, source="policy")
    made.batch(0)
    assert len(made._buffer.prompts) >= 2
    for step in range(2):
        for _, part in distributed.parts(made.batch(step), 2):
            assert len(part.pairs)


# ---------------------------------------------------------------------------------------------- what is refused

SCORED = {"scorer": Rewards()}
REFUSED = [
    ("rloo", {"source": "dataset"} | SCORED, "objective 'rloo' (needs completions of the policy itself|corrects by)"),
    ("ppo", {"source": "mixture"} | SCORED, "'ppo' corrects by the ratio to the distribution that drew"),
    ("dpo", {"source": "policy"}, "'dpo' needs pairs, and completions of the policy get them from a scorer; there is"),
    ("rloo", {"source": "policy"}, "'rloo' needs rewards, and completions of the policy get them from a scorer"),
    ("dpo", {"source": "policy", "num_generations": 1} | SCORED, "'dpo' compares at least 2 completions of a prompt"),
    ("rloo", {"source": "policy", "num_generations": 1} | SCORED, "at least 2 completions of a prompt, but num"),
    ("rloo", {"source": "policy", "sampling": SamplingConfig(top_p=0.9)} | SCORED, "top_p 0.9 and top_k 0 cut off"),
    ("rloo", {"source": "policy", "sampling": SamplingConfig(temperature=0)} | SCORED, "temperature is 0"),
    ("dpo", {"data": prompts()}, "the data hold prompts without completions; use the source 'policy'"),
    ("best_of_n", {}, "'best_of_n' needs rewards, but the data hold none and there is no scorer"),
    ("kto", {"minibatch_prompts": 1, "prompts_per_refresh": 1}, "needs prompts_per_refresh of at least 2, found 1"),
    ("dpo", {"shards": 3}, r"minibatch_prompts \(4\) must be a multiple of optim.shards \(3\)"),
    ("dpo", {"prompts_per_refresh": 6}, r"prompts_per_refresh \(6\) must be a multiple of minibatch_prompts \(4\)"),
    ("dpo", {"source": "mixture", "offline_share": 1.0} | SCORED, "offline_share must lie strictly between 0 and 1"),
    ("dpo", {"reuse": 0}, "reuse must be above 0, found 0"),
    ("dpo", {"min_gap": -1.0}, "min_gap must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused_at_once(kind, config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        source(kind, **config)


@pytest.mark.parametrize(("kind", "sentence"), [("dpo", "'dpo' needs pairs, but the data's rows have none"),
                                                ("kto", "'kto' needs completions labelled good or bad")])  # fmt: skip
def test_completions_alone_make_no_pairs(kind, sentence):
    rows = [TextRow(f"p{i}", ("fine",)) for i in range(8)]
    with pytest.raises(ConfigError, match=sentence):
        source(kind, data=tokenize(TextData("completion", rows, "made"), CHAT))


def test_there_is_nothing_random_in_the_source_but_its_seed():
    torch.manual_seed(0)
    a = source("rloo", scorer=Rewards(), source="policy").batch(0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(a, source("rloo", scorer=Rewards(), source="policy").batch(0))
    assert torch.equal(state, torch.get_rng_state())
    assert torch_generator(0, "x").initial_seed() != 0


def test_every_field_of_a_batch_is_of_prompts_rows_or_pairs():
    """A new field must be listed, or choosing rows would leave it as it was."""
    others = ("prompts", "prompt_mask", "prompt_of", "pairs", "counts")
    names = {field.name for field in dataclasses.fields(ExperienceBatch)}
    listed = (*others, *experience._ROWS, *experience._PAIRS)
    assert names == set(listed)
    assert len(listed) == len(set(listed))
