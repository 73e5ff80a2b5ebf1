"""The backend over an engine, with an engine that is made up: what it asks, and what it makes of the answers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Budget, ComputePolicy, PruneRule, Request, StopRule
from steelyard.adapt.vllm_backend import AskedSuffix, VLLMBackend
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import ConfigError, DataError, MissingExtraError
from steelyard.nets.self_eval import SuffixEvaluator

EOS, YES, NO, LIMIT = 3, 40, 41, 12
PROMPTS = [[1, 5], [1, 6, 6]]
ASKED = AskedSuffix((30, 31), YES, NO, scale=2.0, offset=0.5, reserved=(38,))


class Engine:
    """Writes tokens that its seed says, and answers questions by the number of tokens before them."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.asked = fault, []

    def generate(self, requests, parameters):
        self.asked.append(list(zip(requests, parameters, strict=True)))
        answers = [self.answer(r["prompt_token_ids"], p) for r, p in zip(requests, parameters, strict=True)]
        return answers[1:] if self.fault == "few" else answers

    def answer(self, prompt, p):
        if hasattr(p, "logprob_token_ids"):
            assert prompt[-2:] == [30, 31]
            assert prompt[-3] != EOS, "the question closes the turn itself"
            entry = {NO: SimpleNamespace(logprob=-0.1), YES: SimpleNamespace(logprob=-0.01 * sum(prompt))}
            if self.fault == "answers":
                del entry[YES]
            return output([NO], [entry])
        draw = torch.Generator().manual_seed(p.seed)
        tokens = []
        while len(tokens) < p.max_tokens and EOS not in tokens:
            tokens.append(int(torch.randint(2, 16, (), generator=draw)))
        if self.fault == "short" and p.max_tokens > 1:
            tokens = [7]
        logprobs = None if self.fault == "logprobs" else [{t: SimpleNamespace(logprob=-0.5)} for t in tokens]
        return output(tokens, logprobs)


def output(tokens, logprobs):
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)])


def backend(engine=None, evaluator=ASKED, **options) -> VLLMBackend:
    config = SamplingConfig(max_new_tokens=LIMIT, top_k=5)
    options = {"eos": EOS, "decode": str, "sampling_params": SimpleNamespace} | options
    return VLLMBackend(engine or Engine(), evaluator, config, 1, PROMPTS, **options)


REQUESTS = [Request(p, k, 0.5 * k) for p in range(2) for k in range(6)]


def test_samples_are_asked_for_as_they_should_be():
    engine = Engine()
    draws = backend(engine, evaluator=None).draw(REQUESTS)
    (asked,) = engine.asked
    for (request, parameters), wanted, draw in zip(asked, REQUESTS, draws, strict=True):
        assert request == {"prompt_token_ids": PROMPTS[wanted.prompt]}
        assert parameters.temperature == wanted.temperature
        assert (parameters.max_tokens, parameters.top_k, parameters.stop_token_ids) == (LIMIT, 5, [EOS])
        assert draw.request == wanted
        assert draw.finished == (draw.tokens[-1] == EOS)
        assert draw.logp == -0.5 * draw.decoded
        assert math.isnan(draw.score)
    assert len({parameters.seed for _, parameters in asked}) == len(REQUESTS)
    alone = backend(evaluator=None).draw(REQUESTS[7:8])
    assert alone[0].tokens == draws[7].tokens


def test_scores_are_read_after_the_suffix_and_calibrated():
    for draw in backend().draw(REQUESTS, (4,)):
        read = draw.tokens[:-1] if draw.finished else draw.tokens
        places = {"end": (read, draw.score)}
        if draw.decoded > 4:
            places["4"] = (draw.tokens[:4], draw.checkpoint_scores[4])
        assert sorted(draw.checkpoint_scores) == ([4] if draw.decoded > 4 else [])
        for tokens, score in places.values():
            text = [*PROMPTS[draw.request.prompt], *tokens, 30, 31]
            odds = 2.0 * (-0.1 + 0.01 * sum(text)) + 0.5
            assert score == pytest.approx(1 / (1 + math.exp(-odds)))
        assert draw.evaluated == 2 * len(places)


def test_a_sample_that_is_given_up_is_not_continued():
    engine = Engine()
    draws = backend(engine).draw(REQUESTS, (4, 8), lambda at, live, scores: [r.sample % 2 == 0 for r in live])
    later = [request["prompt_token_ids"] for request, p in engine.asked[-3] if hasattr(p, "seed")]
    for draw in draws:
        if draw.request.sample % 2 and draw.decoded == 4 and not draw.finished:
            assert draw.pruned_at == 4
            assert math.isnan(draw.score)
            assert [*PROMPTS[draw.request.prompt], *draw.tokens] not in later
    assert any(draw.pruned_at == 4 for draw in draws)
    kept = [draw for draw in draws if draw.request.sample % 2 == 0]
    whole = backend().draw([draw.request for draw in kept], (4, 8))
    assert [draw.tokens for draw in whole] == [draw.tokens for draw in kept]


def test_reserved_tokens_are_forbidden():
    engine = Engine()
    backend(engine).draw(REQUESTS[:1])
    assert engine.asked[0][0][1].logit_bias == {38: -100.0}


def test_the_controller_runs_over_it():
    rules = ComputePolicy(stop=StopRule(threshold=0.8), prune=PruneRule("quantile", (4,)), budget=Budget(6), waves=(2,))
    traces = sample(backend(), 2, rules)
    assert all(trace.draws[trace.chosen].pruned_at is None for trace in traces)
    assert all(2 <= trace.samples <= 6 for trace in traces)


def test_a_trained_evaluator_says_what_to_ask():
    evaluator = SuffixEvaluator((30, 31), YES, NO, reserved=(38,))
    evaluator.calibrate(2.0, 0.5)
    assert AskedSuffix.of(evaluator) == ASKED


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("few", "expected 6 completions, found 5"),
        ("answers", "expected the log-probs of both answers"),
        ("short", "expected 12 tokens or an end, found 1"),
        ("logprobs", "expected a log-probability of each"),
    ],
)
def test_wrong_answers_are_errors(fault, sentence):
    with pytest.raises(DataError, match=sentence):
        backend(Engine(fault)).draw(REQUESTS[:6])


def test_without_vllm_one_sentence_says_what_to_install():
    with pytest.raises(MissingExtraError, match=r"pip install 'steelyard\[vllm\]'"):
        backend(sampling_params=None)
    with pytest.raises(ConfigError, match="keys: expected one for each of 2 prompts, found 1"):
        backend(keys=[3])
