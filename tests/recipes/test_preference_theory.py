r"""What the study rests on, by enumeration in double precision on its own policy, objectives and learner.

Forward and reverse KL move a softmax differently (specified in closed form); weighted likelihood on fixed samples is
the one, the same on the policy's own samples the other. A batch that holds every action in proportion to its
probability is an expectation.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steelyard.data.experience import ExperienceBatch
from steelyard.nets.categorical import CategoricalPolicy
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner
from steelyard.rng import torch_generator

COUNTS = torch.tensor([6, 3, 1, 10])  # the policy, in twentieths
REFERENCE = torch.tensor([2.0, 5, 8, 5], dtype=torch.float64) / 20
REWARDS = torch.tensor([0.3, 1.0, -0.5, 0.1], dtype=torch.float64)


def policy(probabilities: Tensor) -> CategoricalPolicy:
    """Return a policy with these probabilities in the context of zeros, where its network says nothing."""
    made = CategoricalPolicy(REFERENCE, 3, 1, torch_generator(0, "init"), (4, 5)).double()
    with torch.no_grad():
        made.reference_logps.copy_(REFERENCE.log())
        made.weights[-1].zero_()
        made.biases[-1].copy_(probabilities.log())
    return made


def drawn(counts: Tensor, values: Tensor = REWARDS) -> ExperienceBatch:
    """Return a batch that holds each action so many times: a sample without noise."""
    completions = torch.arange(4).repeat_interleave(counts)[:, None]
    p = counts / counts.sum()
    return ExperienceBatch(
        prompts=torch.zeros(1, 3, dtype=torch.float64),
        prompt_mask=torch.ones(1, 3, dtype=torch.float64),
        completions=completions,
        scored_mask=torch.ones(completions.shape, dtype=torch.float64),
        prompt_of=torch.zeros(len(completions), dtype=torch.int64),
        rewards=values[completions[:, 0]],
        sampler_token_logps=p.double().log()[completions],
    )


def logit_gradient(model: CategoricalPolicy, batch: ExperienceBatch, kind: str, **settings: Any) -> Tensor:
    """Return the gradient of an objective with respect to the logits: that of the last bias."""
    learner = build_preference_learner(model, PREFERENCE_OBJECTIVES[kind](**settings))
    batch, _ = learner.complete(batch, {})
    loss, _ = learner.loss_preference(batch, torch.Generator())
    return torch.autograd.grad(loss, model.biases[-1])[0]


def kl_gradient(model: CategoricalPolicy, target: Tensor, *, reverse: bool) -> Tensor:
    log_probs = model.log_probs(torch.zeros(1, 3, dtype=torch.float64))[0, 0]
    p = log_probs.exp()
    kl = (p * (log_probs - target.log())).sum() if reverse else (target * (target.log() - log_probs)).sum()
    return torch.autograd.grad(kl, model.biases[-1])[0]


def test_closed_forms_of_both_gradients():
    """Forward: p - q. Reverse: p (log(p / q) - KL), which vanishes where the policy has no mass."""
    p, q = COUNTS / 20.0, REFERENCE
    model = policy(p)
    torch.testing.assert_close(kl_gradient(model, q, reverse=False), p.double() - q)
    kl = float((p * (p / q).log()).sum())
    torch.testing.assert_close(kl_gradient(model, q, reverse=True), p * ((p / q).log() - kl))
    rare = torch.tensor([1e-9, 0.4, 0.3, 0.3], dtype=torch.float64)
    rare = rare / rare.sum()
    assert float(kl_gradient(policy(rare), q, reverse=False)[0]) == pytest.approx(-float(q[0]), rel=1e-6)
    assert abs(float(kl_gradient(policy(rare), q, reverse=True)[0])) < 1e-7


def test_weighted_likelihood_on_fixed_samples_covers_modes():
    """RWR on samples of the reference descends KL(q || pi), q the weighted data distribution, wherever pi is."""
    weights = (REWARDS / 0.5).exp()
    counts = (REFERENCE * 20).round().long()
    q = REFERENCE * weights
    for p in (COUNTS / 20.0, torch.tensor([1e-9, 0.4, 0.3, 0.3])):
        model = policy((p / p.sum()).double())
        found = logit_gradient(model, drawn(counts), "rwr", tau=0.5)
        torch.testing.assert_close(
            found, q.sum() * kl_gradient(model, q / q.sum(), reverse=False), atol=1e-6, rtol=1e-5
        )


def test_weighted_likelihood_on_own_samples_is_a_policy_gradient():
    """The same RWR on the policy's samples climbs E_pi[w], whose gradient is p (w - E[w]) (lemma 6.1's content)."""
    weights = (REWARDS / 0.5).exp()
    p = COUNTS.double() / 20
    found = logit_gradient(policy(p), drawn(COUNTS), "rwr", tau=0.5)
    torch.testing.assert_close(-found, p * (weights - p @ weights), atol=1e-6, rtol=1e-5)


def test_rl_with_a_kl_descends_the_reverse_kl_to_its_optimum():
    """grad J = - beta grad KL(pi || pi*), pi* proportional to pi_ref exp(r / beta); through REINFORCE as it is."""
    beta = 0.7
    optimum = REFERENCE * (REWARDS / beta).exp()
    model = policy(COUNTS.double() / 20)
    found = logit_gradient(model, drawn(COUNTS), "reinforce", beta=beta, baseline="batch")
    expected = beta * kl_gradient(model, optimum / optimum.sum(), reverse=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "reverse"), [("k2", True), ("k3", False), ("k3_ratio", True)], ids=["k2", "k3", "k3_ratio"]
)
def test_what_a_kl_in_the_loss_descends(estimator, reverse):
    """k2 and k3 times the ratio: KL(pi || ref). Plain k3, as in classic GRPO: KL(ref || pi), which covers modes."""
    model = policy(COUNTS.double() / 20)
    batch = drawn(COUNTS, torch.zeros(4, dtype=torch.float64))
    found = logit_gradient(model, batch, "reinforce", beta=0.3, kl_estimator=estimator, kl_place="loss")
    torch.testing.assert_close(found, 0.3 * kl_gradient(model, REFERENCE, reverse=reverse), atol=1e-6, rtol=1e-5)


def test_kl_in_the_loss_by_k1_has_no_gradient_on_average():
    """Why that setting is refused: the expected gradient of log pi is zero."""
    model = policy(COUNTS.double() / 20)
    loss = model.outputs(drawn(COUNTS)).token_logps.mean()
    assert float(torch.autograd.grad(loss, model.biases[-1])[0].abs().max()) < 1e-12


def test_dpo_begins_as_rloo_with_two_completions():
    """At pi = pi_ref the gradient of DPO is (beta / 2) (grad l_w - grad l_l): beta times RLOO's, rewards 1 and 0."""
    model = policy(REFERENCE)
    batch = drawn(torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    pairs = ExperienceBatch(**batch.tensors() | {"pairs": torch.tensor([[0, 1]])})
    contrastive = logit_gradient(model, pairs, "dpo", beta=0.1)
    policy_gradient = logit_gradient(model, batch, "rloo", beta=0.0, correction="none")
    torch.testing.assert_close(contrastive, 0.1 * policy_gradient, atol=1e-8, rtol=1e-6)
    assert float(contrastive.abs().max()) > 0.01


def step(probabilities: Tensor, target: Tensor, rate: float, *, reverse: bool) -> float:
    """Return by how much one gradient step on the logits changes the gap between the first two of them."""
    gradient = kl_gradient(policy(probabilities), target, reverse=reverse)
    return float(rate * (gradient[1] - gradient[0]))


@given(
    p=st.floats(0.01, 0.45),
    q1=st.floats(0.01, 0.45),
    q2=st.floats(0.01, 0.45),
)
@settings(max_examples=60, deadline=None)
def test_the_mode_seeking_step_is_faster_above_the_logarithmic_mean(p, q1, q2):
    """Two bins with equal mass p, targets q1 > q2: reverse KL is faster iff p > (q1 - q2) / log(q1 / q2)."""
    q1, q2 = max(q1, q2), min(q1, q2)
    if q1 - q2 < 1e-3:
        return
    current = torch.tensor([p, p, (1 - 2 * p) / 2, (1 - 2 * p) / 2], dtype=torch.float64)
    target = torch.tensor([q1, q2, (1 - q1 - q2) / 2, (1 - q1 - q2) / 2], dtype=torch.float64)
    forward, backward = (step(current, target, 0.1, reverse=reverse) for reverse in (False, True))
    assert forward == pytest.approx(0.1 * (q1 - q2), rel=1e-6)
    assert backward == pytest.approx(0.1 * p * math.log(q1 / q2), rel=1e-6)
    threshold = (q1 - q2) / math.log(q1 / q2)
    if abs(p - threshold) > 1e-6:
        assert (backward > forward) == (p > threshold)
