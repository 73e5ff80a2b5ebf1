"""The bandits: facts of the reference, rewards, exact expectations against samples and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from steelyard.envs.bandit import BINS, TARGETS, BanditProblem, reference_bins
from steelyard.nets.categorical import CategoricalPolicy
from steelyard.rng import torch_generator


def start(tokens: int = 1, seed: int = 0) -> CategoricalPolicy:
    return CategoricalPolicy(reference_bins(), 100, tokens, torch_generator(seed, "init"))


def test_the_reference_is_the_exact_distribution():
    bins = reference_bins()
    assert len(bins) == BINS
    assert float(bins.sum()) == pytest.approx(1, abs=1e-12)
    assert float(bins.min()) > 0
    # published facts of tanh(Cauchy(-0.7, 0.4)): mode near bin 20, most mass of one bin in bin 0
    assert float(bins[20]) == pytest.approx(0.0243, abs=5e-5)
    assert float(bins[70]) == pytest.approx(0.0021, abs=5e-5)
    assert float(bins[10:31].sum()) == pytest.approx(0.454, abs=5e-4)
    assert float(bins[60:81].sum()) == pytest.approx(0.046, abs=5e-4)
    assert int(bins.argmax()) == 0
    # the median of the Cauchy is its location: half of the mass lies below tanh(-0.7)
    below = (math.tanh(-0.7) + 1) / 2 * BINS
    whole = int(below)
    assert float(bins[:whole].sum()) < 0.5 < float(bins[: whole + 1].sum())


@pytest.mark.parametrize(("scenario", "expected"), [("misaligned", 0.039), ("aligned", 0.377)])
def test_rewards(scenario, expected):
    problem = BanditProblem(TARGETS[scenario])
    rewards = problem.action_rewards
    assert float(rewards[problem.target]) == 1
    assert float(rewards[problem.target + 10]) == pytest.approx(math.exp(-1))
    assert float(reference_bins() @ rewards) == pytest.approx(expected, abs=5e-4)
    both = BanditProblem(problem.target, tokens=2).rewards(torch.tensor([[problem.target, problem.target + 10]]))
    assert float(both) == pytest.approx((1 + math.exp(-1)) / 2)


@pytest.mark.parametrize("tokens", [1, 3])
def test_measurements_of_the_reference_itself(tokens):
    policy = start(tokens)
    with torch.no_grad():  # make the policy exactly the reference
        policy.weights[-1].zero_()
        policy.biases[-1].copy_(reference_bins().log().float().repeat(tokens))
    problem = BanditProblem(20, tokens=tokens)
    found = problem.measure(policy, problem.contexts(3, torch_generator(0, "contexts")))
    entropy = -float(reference_bins() @ reference_bins().log())
    assert found["reward"] == pytest.approx(0.3772, abs=1e-4)
    assert found["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert found["forward_kl"] == pytest.approx(0, abs=1e-5)
    assert found["entropy"] == pytest.approx(tokens * entropy, abs=1e-4)
    assert found["near"] == pytest.approx(0.454, abs=5e-4)


def test_measurements_agree_with_samples():
    policy = start(tokens=2, seed=3)
    problem = BanditProblem(70, tokens=2)
    with torch.no_grad():
        policy.biases[-1].copy_(torch.randn(2 * BINS, generator=torch_generator(1, "bias")) * 0.5)
    contexts = problem.contexts(2, torch_generator(0, "contexts"))
    batch = problem.experience(policy, contexts, 20_000, torch_generator(0, "sample"), born=4)
    found = problem.measure(policy, contexts)
    assert batch.rewards is not None
    assert batch.sampler_token_logps is not None
    assert batch.born is not None
    ratios = (batch.sampler_token_logps - policy.reference_token_logps(batch)).sum(1)
    assert float(batch.rewards.mean()) == pytest.approx(found["reward"], abs=0.005)
    assert float(ratios.mean()) == pytest.approx(found["reverse_kl"], abs=0.05)
    assert float(-batch.sampler_token_logps.sum(1).mean()) == pytest.approx(found["entropy"], abs=0.05)
    # what was drawn is what is scored: completions lie in the order of prompt_of, and log-probs belong to them
    torch.testing.assert_close(policy.outputs(batch).token_logps, batch.sampler_token_logps)
    assert batch.prompt_of.tolist() == [0] * 20_000 + [1] * 20_000
    assert batch.born.unique().tolist() == [4]


def test_foreign_completions_come_from_the_reference():
    problem = BanditProblem(70, tokens=2)
    contexts = problem.contexts(4, torch_generator(0, "contexts"))
    batch = problem.foreign_experience(contexts, 10_000, torch_generator(0, "data"))
    counts = torch.bincount(batch.completions.flatten(), minlength=BINS).double()
    expected = reference_bins() * counts.sum()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    assert batch.born is not None
    assert batch.born.unique().tolist() == [-1]
