"""Own decoding: samples depend on nothing but (seed, key, number, temperature); evaluations leave no trace."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.compute_policy import Request
from steelyard.adapt.decoding import ModelBackend
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.envs.samplers import SamplingConfig, TinySampler, row_uniforms, uniforms
from steelyard.errors import ConfigError, DataError
from steelyard.nets.self_eval import ProbeConfig, ProbeEvaluator, SuffixEvaluator
from steelyard.nets.slots import SPAN, SlotReader
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.workflows.self_eval import score_pool

EOS, VOCABULARY, LIMIT = 3, 11, 14
PROMPTS = [[5, 6, 7], [1, 2, 1, 4], [8, 8, 4, 2, 9, 5, 5], [4], [9, 1], [6, 6, 6, 2, 1]]
CONFIG = SamplingConfig(max_new_tokens=LIMIT)


def tiny(width: int = 16, context: int = 64, dtype: torch.dtype = torch.float32) -> TinyLM:
    model = TinyLM(
        TransformerConfig(VOCABULARY, width, 2, 2, context), torch.Generator().manual_seed(0), reference="none"
    )
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(3.0)
    return model.to(dtype)


class Suffix:
    """Asks by tokens, as `nets.self_eval.SuffixEvaluator` does."""

    def __init__(self, tokens=(7, 1, 9, 2, 2), reserved=()) -> None:
        self.tokens, self.reserved, self.extra_tokens = torch.tensor(tokens), reserved, len(tokens)

    def score(self, reader, drawn):
        logits, states = reader.peek(self.tokens)
        assert states.shape == reader.states.shape
        return logits[:, [5, 6]].softmax(1)[:, 1]


MODEL = tiny()


def probe() -> ProbeEvaluator:
    found = ProbeEvaluator(16, ProbeConfig(hidden=(8,)), torch.Generator().manual_seed(1))
    found.calibrate(8.0, 0.0)
    return found


def backend(evaluator=None, model=MODEL, **options) -> ModelBackend:
    options = {"eos": EOS, "config": CONFIG, "seed": 7, "prompts": PROMPTS} | options
    return ModelBackend(model, evaluator, **options)


def requests(samples: int = 4, prompts: int = len(PROMPTS), temperatures=(1.0, 0.0, 0.7, 1.3)) -> list[Request]:
    return [Request(p, k, temperatures[k % len(temperatures)]) for p in range(prompts) for k in range(samples)]


def tokens_of(draws) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(draw.request.prompt, draw.request.sample): draw.tokens for draw in draws}


@pytest.fixture(scope="module")
def plain() -> dict[tuple[int, int], tuple[int, ...]]:
    found = tokens_of(backend().draw(requests()))
    assert len({len(tokens) for tokens in found.values()}) > 4, "samples of one length would not test much"
    return found


# exactness


def test_rows_have_the_uniform_numbers_of_their_sample():
    keys, samples = torch.tensor([4, 9, 4]), torch.tensor([2, 0, 1])
    whole = uniforms(3, 0, torch.tensor([4, 9]), 3, 6).view(2, 3, 6)
    assert torch.equal(row_uniforms(3, 0, keys, samples, 6), torch.stack([whole[0, 2], whole[1, 0], whole[0, 1]]))


def test_samples_are_those_of_the_sampler():
    keys = torch.arange(len(PROMPTS))
    longest = max(map(len, PROMPTS))
    prompts = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0.0] * (longest - len(p)) + [1.0] * len(p) for p in PROMPTS])
    found = TinySampler(MODEL, CONFIG, EOS).sample(prompts, mask, 2, seed=7, step=0, keys=keys)
    draws = backend().draw(requests(2, temperatures=(1.0,)))
    for row, draw in enumerate(draws):
        scored = found.scored_mask[row] > 0
        assert draw.tokens == tuple(found.completions[row][scored].tolist())
        assert draw.logp == pytest.approx(found.token_logps[row].sum().item(), abs=1e-4)
        assert draw.finished == bool(found.finished[row])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("checkpoints", [(), tuple(range(1, LIMIT, 2))])
def test_evaluation_leaves_no_trace_in_the_samples(plain, exact, checkpoints):
    found = backend(Suffix(), exact=exact, rows=8).draw(requests(), checkpoints, lambda *given: [True] * len(given[1]))
    assert tokens_of(found) == plain
    for draw in found:
        assert 0 < draw.score < 1
        assert sorted(draw.checkpoint_scores) == [at for at in checkpoints if at < draw.decoded]
        assert draw.evaluated == 5 * (1 + len(draw.checkpoint_scores))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 9),
    exact=st.booleans(),
    evaluated=st.booleans(),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_company_order_batch_size_and_pruning_of_others_change_nothing(seed, rows, exact, evaluated, share, data):
    wanted = tokens_of(backend(seed=seed).draw(requests()))
    some = data.draw(st.lists(st.sampled_from(requests()), min_size=1, unique=True))
    lucky = np.random.default_rng(seed)
    options = {"seed": seed, "rows": rows, "exact": exact, "memory": data.draw(st.sampled_from([0, 1 << 30]))}
    found = backend(Suffix() if evaluated else None, **options).draw(
        some, (2, 5), lambda at, asked, scores: [lucky.random() >= share for _ in asked]
    )
    assert [draw.request for draw in found] == some
    for draw in found:
        whole = wanted[draw.request.prompt, draw.request.sample]
        if draw.pruned_at is None:
            assert draw.tokens == whole
        else:
            assert draw.tokens == whole[: draw.pruned_at]
            assert math.isnan(draw.score)
            assert draw.decoded == draw.pruned_at in (2, 5)


@pytest.mark.parametrize("exact", [False, True])
def test_scores_do_not_depend_on_company(exact):
    together = backend(Suffix(), exact=exact).draw(requests(), (3,))
    for draw in together[::5]:
        alone = backend(Suffix(), exact=exact).draw([draw.request], (3,))[0]
        same = (lambda x: x) if exact else (lambda x: pytest.approx(x, abs=1e-6))
        assert alone.score == same(draw.score)
        assert alone.checkpoint_scores == same(draw.checkpoint_scores)


def test_waves_prefill_each_prompt_once():
    kept = backend()
    first = kept.draw(requests(1))
    assert kept.prefills == len(PROMPTS)
    again = kept.draw(requests(4))
    assert kept.prefills == len(PROMPTS)
    assert tokens_of(first).items() <= tokens_of(again).items()
    forgetful = backend(memory=0)
    for request in requests(1):
        forgetful.draw([request])
    assert tokens_of(forgetful.draw(requests(4))) == tokens_of(again)
    assert forgetful.prefills > len(PROMPTS)


def test_keys_tell_prompts_apart_whatever_their_numbers(plain):
    order = [4, 0, 2]
    found = backend(prompts=[PROMPTS[p] for p in order], keys=order).draw(requests(4, 3))
    assert tokens_of(found) == {(place, k): plain[p, k] for place, p in enumerate(order) for k in range(4)}


@pytest.mark.parametrize("evaluator", [SuffixEvaluator((7, 1, 9), 5, 6), probe()], ids=["suffix", "probe"])
def test_live_scores_are_those_that_a_pool_is_given_afterwards(evaluator):
    draws = backend(evaluator).draw(requests(4), (2, 5))
    items = []
    for number, prompt in enumerate(PROMPTS):
        mine = [draw for draw in draws if draw.request.prompt == number]
        items.append(
            PromptSamples(
                "",
                np.zeros(len(mine)),
                np.array([draw.decoded for draw in mine]),
                tokens=tuple(draw.tokens for draw in mine),
                prompt_tokens=tuple(prompt),
                finished=np.array([draw.finished for draw in mine]),
            )
        )
    scored = score_pool(MODEL, evaluator, SamplePool(tuple(items)), (2, 5))
    found = np.array([draw.score for draw in draws]).reshape(len(PROMPTS), 4)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(np.stack([item.scores for item in scored]), found, atol=1e-5)
    live = np.array([[draw.checkpoint_scores.get(at, math.nan) for at in (2, 5)] for draw in draws])
    np.testing.assert_allclose(np.concatenate([item.checkpoint_scores for item in scored]), live, atol=1e-5)


# the reader


def reference_logits(model: TinyLM, rows: list[list[int]]) -> torch.Tensor:
    network = model.transformer
    with torch.no_grad():
        return torch.stack([network.features(torch.tensor([row]))[0, -1] @ network.token_embedding.T for row in rows])


def reader_of(model: TinyLM, rows: list[list[int]], block: int | None = None) -> SlotReader:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return SlotReader.of_prompts(model.slot_forward(), model.context, tokens, torch.tensor([*map(len, rows)]), block)


@settings(max_examples=12, deadline=None)
@given(block=st.sampled_from([None, 1, 3, 8]), data=st.data())
def test_a_reader_says_what_a_plain_pass_says_after_any_moves(block, data):
    token = st.integers(0, VOCABULARY - 1)
    model = tiny(dtype=torch.float64)
    rows = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=5))
    with torch.no_grad():
        reader = reader_of(model, rows, block)
        for _ in range(data.draw(st.integers(1, 8))):
            move = data.draw(st.sampled_from(["read", "peek", "keep", "fork", "join"]))
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
            if move == "read":
                drawn = data.draw(st.lists(token, min_size=len(rows), max_size=len(rows)))
                reader.read(torch.tensor(drawn))
                rows = [[*row, new] for row, new in zip(rows, drawn, strict=True)]
            elif move == "peek":
                suffix = data.draw(st.lists(token, min_size=1, max_size=6))
                logits, _ = reader.peek(torch.tensor(suffix))
                assert torch.allclose(logits, reference_logits(model, [row + suffix for row in rows]), atol=1e-9)
            elif move == "keep":
                chosen = list(dict.fromkeys(chosen))
                reader.keep(torch.tensor(chosen))
                rows = [rows[place] for place in chosen]
            elif move == "fork":
                old, before = reader, reader.logits.clone()
                reader = reader.fork(torch.tensor(chosen))
                reader.read(torch.zeros(len(chosen), dtype=torch.int64))
                assert torch.equal(old.logits, before)
                rows = [[*rows[place], 0] for place in chosen]
            else:
                reader.join(reader.fork(torch.tensor([chosen[0]])), 2)
                rows = [*rows, rows[chosen[0]], rows[chosen[0]]]
            assert reader.lengths.tolist() == [len(row) for row in rows]
            assert torch.allclose(reader.logits, reference_logits(model, rows), atol=1e-9)
            assert torch.allclose(reader.states @ model.transformer.token_embedding.T, reader.logits)


@pytest.mark.parametrize("block", [None, 4])
def test_logits_before_and_after_a_checkpoint_are_the_same_bits(block):
    evaluated, left_alone = (reader_of(MODEL, PROMPTS, block) for _ in range(2))
    for step in range(SPAN + 4):  # over the end of a span
        evaluated.peek(torch.arange(7))
        assert torch.equal(evaluated.logits, left_alone.logits)
        for reader in (evaluated, left_alone):
            reader.read(torch.full((len(PROMPTS),), step % VOCABULARY))
    assert torch.equal(evaluated.logits, left_alone.logits)


# what is drawn


def test_temperatures_are_those_of_the_rows():
    greedy = tokens_of(backend().draw(requests(3, temperatures=(0.0,))))
    assert all(greedy[p, 0] == greedy[p, 1] == greedy[p, 2] for p in range(len(PROMPTS)))
    mixed = tokens_of(backend().draw(requests(4, temperatures=(0.0, 1.0, 0.5, 1e-4))))
    assert all(mixed[p, 0] == greedy[p, 0] == mixed[p, 3] for p in range(len(PROMPTS)))
    assert len(set(mixed.values())) > len(PROMPTS) + 4


def test_the_distribution_is_the_tempered_softmax():
    many = [Request(0, k, 0.5) for k in range(4000)]
    draws = backend(config=SamplingConfig(max_new_tokens=1)).draw(many)
    found = torch.bincount(torch.tensor([draw.tokens[0] for draw in draws]), minlength=VOCABULARY) / 4000
    expected = (reference_logits(MODEL, PROMPTS[:1])[0] / 0.5).softmax(0)
    assert (found - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()


def test_log_probs_and_certainty_are_those_at_temperature_one():
    for draw in backend().draw(requests(4, 3)):
        row, total, certainty = list(PROMPTS[draw.request.prompt]), 0.0, 0.0
        for token in draw.tokens:
            logps = reference_logits(MODEL, [row])[0].log_softmax(0)
            total += logps[token].item()
            certainty += (-logps.mean() - math.log(VOCABULARY)).item()
            row.append(token)
        assert draw.logp == pytest.approx(total, abs=1e-4)
        assert draw.certainty == pytest.approx(certainty / draw.decoded, abs=1e-4)
        assert certainty > 0


def test_reserved_tokens_are_never_drawn():
    wanted = {token for draw in backend().draw(requests(8)) for token in draw.tokens}
    assert {5, 8} <= wanted
    found = backend(Suffix(reserved=(5, 8))).draw(requests(8))
    assert not {5, 8} & {token for draw in found for token in draw.tokens}
    assert all(math.isfinite(draw.logp) and math.isfinite(draw.certainty) for draw in found)


def test_limit_and_end_of_sequence():
    for draw in backend(Suffix()).draw(requests()):
        assert draw.finished == (draw.tokens[-1] == EOS)
        assert draw.finished or draw.decoded == LIMIT
        assert EOS not in draw.tokens[:-1]
        row = PROMPTS[draw.request.prompt] + list(draw.tokens[:-1] if draw.finished else draw.tokens)
        expected = reference_logits(MODEL, [row + Suffix().tokens.tolist()])[0, [5, 6]].softmax(0)[1]
        assert draw.score == pytest.approx(expected.item(), abs=1e-5)


def test_every_step_is_told_and_may_end_the_draw():
    seen: dict[tuple[int, int], list[int]] = {}

    def on_step(live, tokens):
        for request, token in zip(live, tokens, strict=True):
            seen.setdefault((request.prompt, request.sample), []).append(token)

    draws = backend(on_step=on_step, rows=5).draw(requests())
    assert {key: tuple(tokens) for key, tokens in seen.items()} == tokens_of(draws)

    class CancelledError(Exception):
        pass

    count = itertools.count()

    def cancel(live, tokens):
        if next(count) == 3:
            raise CancelledError

    cancelled = backend(on_step=cancel)
    with pytest.raises(CancelledError):
        cancelled.draw(requests())
    assert tokens_of(cancelled.draw(requests())) == tokens_of(draws)


def test_a_wave_of_a_prompt_is_compared_at_once():
    asked = []

    def keep(at, live, scores):
        asked.append((at, [request.prompt for request in live]))
        return [True] * len(live)

    backend(rows=3).draw(requests(4), (2,), keep)
    whole = {
        p: sum(len(t) > 2 for (q, _), t in tokens_of(backend().draw(requests(4))).items() if q == p) for p in range(6)
    }
    assert sorted(p for _, prompts in asked for p in prompts) == sorted(p for p in whole for _ in range(whole[p]))
    assert all(prompts.count(p) == whole[p] for _, prompts in asked for p in set(prompts))


# errors


def test_errors_name_what_was_expected():
    with pytest.raises(DataError, match="prompt 1: expected at least one token"):
        backend(prompts=[[1], []])
    with pytest.raises(
        DataError, match="prompt 0: 60 tokens, 14 new ones and 5 of the evaluation: expected at most 64"
    ):
        backend(Suffix(), prompts=[[1] * 60])
    with pytest.raises(DataError, match="request for prompt 6: expected a number below 6"):
        backend().draw([Request(6, 0, 1.0)])
    with pytest.raises(DataError, match="found one twice"):
        backend().draw([Request(0, 0, 1.0), Request(0, 0, 0.5)])
    with pytest.raises(ConfigError, match="keys: expected one for each of 6 prompts, found 1"):
        backend(keys=[0])
    with pytest.raises(DataError, match="expected at most 64 in a row"):
        reader_of(MODEL, [[1] * 60]).peek(torch.zeros(5, dtype=torch.int64))
