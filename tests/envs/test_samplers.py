"""Samplers: right distribution, right log-probs, and completions that do not depend on their company."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from steelyard.data.experience import ExperienceBatch
from steelyard.envs import samplers
from steelyard.envs.samplers import (
    CategoricalSampler,
    SamplingConfig,
    TinySampler,
    VLLMSampler,
    draw,
    texts,
    uniforms,
)
from steelyard.errors import ConfigError, DataError, MissingExtraError
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig

EOS, PAD = 3, 0
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [0, 1, 2, 1, 4], [8, 8, 4, 2, 9], [0, 0, 0, 0, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1.0]])
KEYS = torch.tensor([10, 11, 12, 13])


def tiny() -> TinyLM:
    model = TinyLM(TransformerConfig(10, 16, 2, 2, 24), torch.Generator().manual_seed(0), reference="none")
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(3.0)
    return model.double()  # so that rounding decides no tie between neighbours


def rows_of(found: samplers.Samples) -> list[list[int]]:
    lengths = found.scored_mask.sum(1).int().tolist()
    return [row[:length].tolist() for row, length in zip(found.completions, lengths, strict=True)]


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(max_new_tokens=9), SamplingConfig(temperature=0.6, top_p=0.9, top_k=6, max_new_tokens=9)],
    ids=["plain", "tempered"],
)
def test_completions_do_not_depend_on_their_company(config):
    sampler = TinySampler(tiny(), config, EOS, PAD)
    whole = sampler.sample(PROMPTS, MASK, 3, seed=1, step=2, keys=KEYS)
    assert len({len(row) for row in rows_of(whole)}) > 2, "rows of one length would not test much"
    order = torch.tensor([2, 0, 3, 1])
    for part in ([0], [1, 2], [3, 0, 2], order.tolist()):
        prompts, mask = pad(PROMPTS[part], (2, 0), value=9), pad(MASK[part], (2, 0))
        some = sampler.sample(prompts, mask, 3, seed=1, step=2, keys=KEYS[part])
        for place, prompt in enumerate(part):
            assert rows_of(some)[3 * place : 3 * place + 3] == rows_of(whole)[3 * prompt : 3 * prompt + 3]
    more = sampler.sample(PROMPTS, MASK, 5, seed=1, step=2, keys=KEYS)
    assert [row for k, row in enumerate(rows_of(more)) if k % 5 < 3] == rows_of(whole)
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert rows_of(sampler.sample(PROMPTS, MASK, 3, keys=KEYS, **other)) != rows_of(whole)


def test_dropping_finished_rows_changes_nothing(monkeypatch):
    sampler = TinySampler(tiny(), SamplingConfig(max_new_tokens=12), EOS, PAD)
    found = sampler.sample(PROMPTS, MASK, 4, seed=0, step=0, keys=KEYS)
    monkeypatch.setattr(samplers.LanguageModelSampler, "COMPACT", -1.0)
    kept = sampler.sample(PROMPTS, MASK, 4, seed=0, step=0, keys=KEYS)
    assert torch.equal(found.completions, kept.completions)
    assert torch.equal(found.finished, kept.finished)
    assert torch.allclose(found.token_logps, kept.token_logps, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_policy(temperature):
    model = tiny()
    config = SamplingConfig(temperature=temperature, max_new_tokens=9)
    found = TinySampler(model, config, EOS, PAD).sample(PROMPTS, MASK, 3, seed=0, step=0, keys=KEYS)
    assert found.tempered == (temperature != 1)
    batch = ExperienceBatch(PROMPTS, MASK, found.completions, found.scored_mask, found.prompt_of)
    again = model.outputs(batch, temperature=temperature).token_logps
    assert torch.allclose(again.float(), found.token_logps, atol=1e-5)
    assert (found.token_logps[found.scored_mask == 0] == 0).all()


def test_eos_is_the_last_token_and_stands_once():
    found = TinySampler(tiny(), SamplingConfig(max_new_tokens=6), EOS, PAD).sample(
        PROMPTS, MASK, 8, seed=0, step=0, keys=KEYS
    )
    assert 0 < found.finished.sum() < len(found.finished), "both kinds are needed to test"
    for row, finished in zip(rows_of(found), found.finished, strict=True):
        assert row.count(EOS) == int(finished)
        assert row[-1] == EOS if finished else len(row) == 6
    assert (found.completions[found.scored_mask == 0] == PAD).all()
    assert found.prompt_of.tolist() == [p for p in range(4) for _ in range(8)]
    assert texts(found, lambda ids: "-".join(map(str, ids)))[0].startswith(str(found.completions[0, 0].item()))


def test_tokens_come_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    count = 40_000
    draws = uniforms(0, 0, torch.arange(count), 1, 1)[:, 0]
    for config in (SamplingConfig(), SamplingConfig(temperature=2.0), SamplingConfig(top_k=2)):
        tokens, logps = draw(logits.expand(count, 4), draws, config)
        scaled = logits[0] / config.temperature
        if config.top_k:
            scaled[[0, 2]] = -math.inf
        expected = scaled.softmax(0)
        share = torch.bincount(tokens, minlength=4) / count
        assert torch.allclose(share, expected, atol=4 * math.sqrt(0.25 / count))
        assert torch.allclose(logps, expected.log()[tokens], atol=1e-6)


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        draws = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
        tokens, logps = draw(logits.expand(200, 4), draws, SamplingConfig(top_p=top_p))
        assert sorted(set(tokens.tolist())) == list(range(kept))
        total = logits[0, :kept].exp().sum()
        assert torch.allclose(logps, (logits[0].exp() / total).log()[tokens], atol=1e-6)


def test_the_ends_of_the_distribution_are_safe():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, 4)
    tokens, logps = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), SamplingConfig())
    assert tokens.tolist() == [1, 2]
    assert torch.allclose(logps, torch.tensor(0.5).log())
    greedy, logps = draw(logits, torch.zeros(2, dtype=torch.float64), SamplingConfig(temperature=0))
    assert greedy.tolist() == [1, 1]
    assert logps.tolist() == [0, 0]
    assert SamplingConfig(temperature=0).truncated


def test_random_numbers_are_uniform_and_their_own():
    numbers = uniforms(3, 7, torch.arange(500), 4, 20)
    assert numbers.shape == (2000, 20)
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12 / numbers.numel())
    assert len(set(numbers.flatten().tolist())) == numbers.numel()
    columns = torch.corrcoef(numbers.T) - torch.eye(20)
    assert columns.abs().max() < 0.12
    assert torch.equal(uniforms(3, 7, torch.tensor([42]), 2, 5), numbers.view(500, 4, 20)[42, :2, :5])


def test_categorical_sampler_draws_actions():
    policy = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    sampler = CategoricalSampler(lambda prompts: policy.log()[prompts[:, 0].long()])
    prompts = torch.tensor([[0.0], [1.0]])
    found = sampler.sample(prompts, torch.ones(2, 1), 3000, seed=0, step=0, keys=torch.arange(2))
    share = torch.bincount(found.completions[:3000, 0], minlength=3) / 3000
    assert torch.allclose(share, policy[0], atol=0.04)
    assert (found.completions[3000:] == 2).all()
    assert torch.allclose(found.token_logps[:3000, 0], policy[0].log()[found.completions[:3000, 0]], atol=1e-6)
    assert found.finished.all()
    positions = CategoricalSampler(lambda prompts: torch.zeros(len(prompts), 4, 3))
    assert positions.sample(prompts, torch.ones(2, 1), 2, seed=0, step=0, keys=torch.arange(2)).completions.shape == (
        4,
        4,
    )


def test_bad_questions_are_refused():
    sampler = TinySampler(tiny(), SamplingConfig(max_new_tokens=30), EOS, PAD)
    with pytest.raises(DataError, match="at most 24 in all"):
        sampler.sample(PROMPTS, MASK, 1, seed=0, step=0, keys=KEYS)
    sampler = TinySampler(tiny(), SamplingConfig(max_new_tokens=3), EOS, PAD)
    with pytest.raises(ConfigError, match="at least 1"):
        sampler.sample(PROMPTS, MASK, 0, seed=0, step=0, keys=KEYS)
    with pytest.raises(DataError, match="one key for each"):
        sampler.sample(PROMPTS, MASK, 1, seed=0, step=0, keys=KEYS[:2])
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SamplingConfig(**wrong)


class FakeEngine:
    """Answers as `vllm.LLM.generate` does: the prompt's tokens reversed and EOS, cut at the limit."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, requests, parameters):
        answers = []
        for request, wanted in zip(requests, parameters, strict=True):
            self.seeds.append(wanted.seed)
            tokens = [*request["prompt_token_ids"][::-1], EOS][: wanted.max_tokens]
            logprobs = [{token: SimpleNamespace(logprob=-0.5 - k)} for k, token in enumerate(tokens)]
            reason = "stop" if tokens[-1] == EOS else "length"
            found = SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs, finish_reason=reason)
            answers.append(SimpleNamespace(outputs=[found]))
        return answers


def test_vllm_speaks_the_same_protocol():
    engine = FakeEngine()
    sampler = VLLMSampler(engine, SamplingConfig(max_new_tokens=4), EOS, PAD, SimpleNamespace)
    found = sampler.sample(PROMPTS, MASK, 2, seed=0, step=0, keys=KEYS)
    assert rows_of(found)[0] == [7, 6, 5, EOS]
    assert rows_of(found)[4] == [9, 2, 4, 8]
    assert found.finished.tolist() == [True, True, False, False, False, False, True, True]
    assert found.token_logps[6, :3].tolist() == [-0.5, -1.5, 0.0]
    assert len(set(engine.seeds)) == 8
    some = FakeEngine()
    VLLMSampler(some, SamplingConfig(), EOS, PAD, SimpleNamespace).sample(
        PROMPTS[2:3], MASK[2:3], 2, seed=0, step=0, keys=KEYS[2:3]
    )
    assert some.seeds == engine.seeds[4:6]


def test_vllm_without_log_probs_is_an_error():
    engine = FakeEngine()
    honest = engine.generate

    def silent(requests, parameters):
        answers = honest(requests, parameters)
        answers[0].outputs[0].logprobs = None
        return answers

    engine.generate = silent
    sampler = VLLMSampler(engine, SamplingConfig(), EOS, PAD, SimpleNamespace)
    with pytest.raises(DataError, match="expected a log-probability of each"):
        sampler.sample(PROMPTS, MASK, 1, seed=0, step=0, keys=KEYS)


def test_absent_vllm_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        MissingExtraError, match=r"vllm is not installed; install it with: pip install 'steelyard\[vllm\]'"
    ):
        VLLMSampler(FakeEngine(), SamplingConfig(), EOS)
