"""The categorical policy: normalised, exact, and indifferent to order and company."""

from __future__ import annotations

import itertools

import pytest
import torch

from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError
from steelyard.nets.categorical import CategoricalPolicy
from steelyard.rng import torch_generator

REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4])


def policy(tokens: int = 3, value_head: bool = False) -> CategoricalPolicy:
    made = CategoricalPolicy(REFERENCE, 6, tokens, torch_generator(0, "init"), (5, 7, 8), value_head)
    with torch.no_grad():  # large weights, so that contexts matter
        for weight in made.weights:
            weight.mul_(100)
    return made


def batch_of(completions: torch.Tensor, prompts: torch.Tensor, prompt_of: torch.Tensor) -> ExperienceBatch:
    return ExperienceBatch(prompts, torch.ones_like(prompts), completions, torch.ones(completions.shape), prompt_of)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_all_completions_together_have_probability_one(temperature):
    model = policy()
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    prompts = torch.rand(2, 6, generator=torch_generator(0, "contexts"))
    for prompt in (0, 1):
        batch = batch_of(every, prompts, torch.full((64,), prompt))
        logps = model.outputs(batch, temperature=temperature).token_logps.detach().sum(1)
        assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-5)
        assert float(logps.exp().max()) > 0.03  # uniform would be 0.016
        reference = model.reference_token_logps(batch, temperature).sum(1)
        assert float(reference.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_rows_do_not_depend_on_order_or_company():
    model = policy()
    prompts = torch.rand(3, 6, generator=torch_generator(0, "contexts"))
    completions = torch.randint(4, (9, 3), generator=torch_generator(0, "completions"))
    prompt_of = torch.arange(3).repeat_interleave(3)
    whole = model.outputs(batch_of(completions, prompts, prompt_of)).token_logps
    order = torch.randperm(9, generator=torch_generator(0, "order"))
    shuffled = model.outputs(batch_of(completions[order], prompts, prompt_of[order])).token_logps
    torch.testing.assert_close(shuffled, whole[order])
    alone = model.outputs(batch_of(completions[3:6], prompts[1:2], torch.zeros(3, dtype=torch.int64))).token_logps
    torch.testing.assert_close(alone, whole[3:6])


def test_masked_positions_are_exactly_zero():
    model = policy(value_head=True)
    prompts = torch.rand(1, 6, generator=torch_generator(0, "contexts"))
    batch = batch_of(torch.ones(2, 3, dtype=torch.int64), prompts, torch.zeros(2, dtype=torch.int64))
    batch.scored_mask[1, 1:] = 0
    with torch.no_grad():
        assert model.value_head is not None
        model.value_head.fill_(1)
    outputs = model.outputs(batch, entropies=True, values=True)
    assert outputs.entropies is not None
    assert outputs.values is not None
    for found in (outputs.token_logps, outputs.entropies, outputs.values, model.reference_token_logps(batch)):
        assert found[1, 1:].tolist() == [0, 0]
        assert float(found.detach()[0].abs().min()) > 0


def test_entropies_are_those_of_the_distribution():
    model = policy()
    prompts = torch.rand(1, 6, generator=torch_generator(0, "contexts"))
    batch = batch_of(torch.zeros(1, 3, dtype=torch.int64), prompts, torch.zeros(1, dtype=torch.int64))
    expected = torch.distributions.Categorical(logits=model.logits(prompts)[0]).entropy()
    found = model.outputs(batch, entropies=True).entropies
    assert found is not None
    torch.testing.assert_close(found[0], expected)


def test_values_without_a_head_are_refused():
    prompts = torch.rand(1, 6)
    batch = batch_of(torch.zeros(1, 3, dtype=torch.int64), prompts, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no value head"):
        policy().outputs(batch, values=True)
    assert set(policy().trainable()) == {"policy"}
    assert set(policy(value_head=True).trainable()) == {"policy", "value"}
