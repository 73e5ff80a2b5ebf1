"""What theory says, by enumeration in double precision: expected gradients, optima, and the loop's parts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference import (
    BestOfNConfig,
    DPOConfig,
    IPOConfig,
    PPOConfig,
    PreferenceConfig,
    PrefFTConfig,
    REINFORCEConfig,
    RLOOConfig,
    RWRConfig,
    build_preference_learner,
)
from steelyard.objectives.preference.ratios import kl_values
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

from .toys import VOCABULARY, TablePolicy, close, experience, learner_of, seeded

EOS = 0
ACTIONS = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Categorical(nn.Module):
    """A bandit's policy: one distribution over actions, completions are one token."""

    def __init__(self, logits: Tensor, reference: Tensor) -> None:
        super().__init__()
        self.logits, self.reference = nn.Parameter(logits.clone()), reference.log_softmax(0)

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        return Outputs(self.logits.log_softmax(0)[batch.completions])

    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        return self.reference[batch.completions]

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": (self.logits,)}


def every_action(actions: int = ACTIONS) -> ExperienceBatch:
    return ExperienceBatch(
        prompts=torch.zeros(1, 1),
        prompt_mask=torch.ones(1, 1, dtype=torch.float64),
        completions=torch.arange(actions)[:, None],
        scored_mask=torch.ones(actions, 1, dtype=torch.float64),
        prompt_of=torch.zeros(actions, dtype=torch.int64),
    )


def every_completion(longest: int = 3) -> ExperienceBatch:
    """All completions of one prompt that end with EOS or at the cut, each once."""
    rows = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == longest):
                rows.append(tokens)
    completions = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.float64)
    for n, tokens in enumerate(rows):
        completions[n, : len(tokens)] = torch.tensor(tokens)
        mask[n, : len(tokens)] = 1
    return ExperienceBatch(
        prompts=torch.tensor([[1, 2]]),
        prompt_mask=torch.ones(1, 2, dtype=torch.float64),
        completions=completions,
        scored_mask=mask,
        prompt_of=torch.zeros(len(rows), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("estimator", "gradient"), [("k1", "none"), ("k2", "reverse"), ("k3", "forward"), ("k3_ratio", "reverse")]
)
def test_kl_estimators_as_losses(estimator, gradient):
    """Expected over the policy's own samples; k3 in the loss, as in classic GRPO, covers modes."""
    logits, reference = random(ACTIONS).requires_grad_(), random(ACTIONS, seed=1).log_softmax(0)
    logps = logits.log_softmax(0)
    chances = logps.exp().detach()
    values = kl_values(estimator, logps, reference, (logps - logps.detach()).exp())
    (found,) = torch.autograd.grad((chances * values).sum(), logits, retain_graph=True)
    reverse = (logps.exp() * (logps - reference)).sum()
    forward = (reference.exp() * (reference - logps)).sum()
    wanted = {"none": 0 * reverse, "reverse": reverse, "forward": forward}[gradient]
    close([found], torch.autograd.grad(wanted, logits))
    if estimator != "k2":  # k2 is biased as a value
        close([(chances * values).sum().detach()], [reverse.detach()])


def test_policy_gradients_are_those_of_what_is_maximised():
    """REINFORCE with the KL in the reward: expected over all completions, the gradient of E[r] - beta KL.

    And so it is -beta times the gradient of KL(pi || pi*), pi* proportional to pi_ref exp(r / beta).
    """
    beta, batch = 0.3, every_completion()
    model = TablePolicy()
    rewards = random(len(batch), seed=7)
    logps = model.outputs(batch).token_logps.sum(1)
    assert float(logps.exp().sum().detach()) == pytest.approx(1.0)  # else nothing below means anything
    reference = model.reference_token_logps(batch).sum(1)
    parameters = [model.bigram, model.embedding]
    objective = (logps.exp() * (rewards - beta * (logps - reference))).sum()
    wanted = torch.autograd.grad(objective, parameters, retain_graph=True)
    best = (reference + rewards / beta).log_softmax(0)
    reverse = (logps.exp() * (logps - best)).sum()
    close([-beta * g for g in torch.autograd.grad(reverse, parameters)], wanted)

    sampled = dataclasses.replace(batch, rewards=rewards, sampler_token_logps=model.outputs(batch).token_logps.detach())
    chances = logps.detach().exp()[:, None] * len(batch)  # each completion once: weigh it by its probability
    for config in (
        REINFORCEConfig(baseline="none", beta=beta),
        REINFORCEConfig(baseline="none", beta=beta, correction="clip"),
        REINFORCEConfig(baseline="none", beta=beta, correction="tis", ratio="sequence"),
    ):
        learner = build_preference_learner(model, config)
        done, _ = learner.complete(sampled, {})
        done = dataclasses.replace(done, advantages=done.advantages * chances)
        loss, _ = learner.loss_preference(done, seeded())
        close([-g for g in torch.autograd.grad(loss, parameters)], wanted, 1e-10)


def test_weighted_likelihood_has_no_negative_gradient():
    batch = experience()
    for config in (BestOfNConfig(), RWRConfig(), PrefFTConfig()):
        assert (learner_of(config).token_weights(batch) >= 0).all()
        _, metrics = learner_of(config).loss_preference(batch, seeded())
        assert metrics["loss/negative_mass"] == 0


def test_without_the_negative_gradient():
    """DPO at lambda = 0 is weighted likelihood of chosen completions; RLOO keeps what is above average."""
    batch = experience()
    learner = learner_of(DPOConfig(beta=0.4), negative=0.0)
    loss, _ = learner.loss_preference(batch, seeded())
    parameters = learner.groups["policy"].parameters
    outputs = learner.model.outputs(batch)
    logps, reference = outputs.token_logps.sum(1), learner.model.reference_token_logps(batch).sum(1)
    chosen, rejected = batch.pairs.T
    z = (logps - reference)[chosen] - (logps - reference)[rejected]
    weights = torch.zeros(len(batch), dtype=torch.float64)
    weights.index_add_(0, chosen, 0.4 * (-0.4 * z.detach()).sigmoid() * batch.pair_weights)
    weights.index_add_(0, rejected, -0.4 * (-0.4 * z.detach()).sigmoid() * batch.pair_weights)
    # a completion that is chosen in one pair and rejected in another has one weight, whose sign decides
    expected = -(weights.clamp(min=0) * logps).sum() / len(batch.pairs)
    close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))

    config = RLOOConfig(beta=0.0, correction="none")
    positive = learner_of(config, negative=0.0)
    done, _ = positive.complete(batch, {})
    kept = dataclasses.replace(done, advantages=done.advantages.clamp(min=0))
    left, _ = positive.loss_preference(done, seeded())
    right, _ = learner_of(config).loss_preference(kept, seeded())
    close(
        torch.autograd.grad(left, positive.groups["policy"].parameters),
        learner_gradients(config, kept),
    )
    assert right.isfinite()


def learner_gradients(config: PreferenceConfig, batch: ExperienceBatch) -> list[Tensor]:
    learner = learner_of(config)
    return list(torch.autograd.grad(learner.loss_preference(batch, seeded())[0], learner.groups["policy"].parameters))


def all_pairs(chances: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs both ways round and their probabilities, of P(i preferred to j) [A, A]."""
    pairs = [(i, j) for i in range(len(chances)) for j in range(len(chances)) if i != j]
    return torch.tensor(pairs), torch.stack([chances[i, j] for i, j in pairs])


def minimised(learner, batch: ExperienceBatch) -> None:
    parameters = list(learner.groups["policy"].parameters)
    solver = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss, _ = learner.loss_preference(batch, seeded())
        loss.backward()
        return loss

    solver.step(closure)


def test_the_optimum_of_dpo_is_the_optimum_of_rl_with_a_kl():
    beta, rewards, reference = 0.5, random(ACTIONS, seed=2), random(ACTIONS, seed=3)
    pairs, weights = all_pairs((rewards[:, None] - rewards[None]).sigmoid())
    batch = dataclasses.replace(every_action(), pairs=pairs, pair_weights=weights)
    learner = build_preference_learner(Categorical(reference, reference), DPOConfig(beta=beta))
    minimised(learner, batch)
    best = (reference.log_softmax(0) + rewards / beta).softmax(0)
    assert float((learner.model.logits.detach().softmax(0) - best).abs().sum()) / 2 < 1e-3


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.95, 1.0])
def test_the_optimum_of_ipo_is_a_finite_gap(chance):
    tau, reference = 0.4, random(2, seed=3)
    batch = dataclasses.replace(
        every_action(2),
        pairs=torch.tensor([[0, 1], [1, 0]]),
        pair_weights=torch.tensor([chance, 1 - chance], dtype=torch.float64),
    )
    learner = build_preference_learner(Categorical(reference, reference), IPOConfig(tau=tau))
    minimised(learner, batch)
    change = (learner.model.logits - reference).detach()
    assert float(change[0] - change[1]) == pytest.approx((2 * chance - 1) / (2 * tau), abs=1e-6)


def test_robust_dpo_is_unbiased_under_flips():
    batch = experience()
    flipped = dataclasses.replace(batch, pairs=batch.pairs.flip(1))
    config = DPOConfig(robust=True, label_smoothing=0.2, beta=0.6)
    right, wrong = (learner_gradients(config, b) for b in (batch, flipped))
    close([0.8 * r + 0.2 * w for r, w in zip(right, wrong, strict=True)], learner_gradients(DPOConfig(beta=0.6), batch))


@pytest.mark.parametrize("config", [DPOConfig(), RLOOConfig(), PPOConfig(), BestOfNConfig()], ids=lambda c: c.kind)
def test_the_loop_updates_alike_with_any_number_of_parts(config):
    """1 x 8 prompts = 2 x 4 = 8 x 1, ragged lengths, through the loop's own update."""
    after = []
    for shards in (1, 2, 8):
        learner = learner_of(dataclasses.replace(config, learning_rate=0.01))
        batch, _ = learner.complete(experience(prompts=8), {})
        optimizers = Optimizers(learner, OptimConfig(shards=shards))
        for step in range(3):
            update(learner, optimizers, batch, seed=0, step=step)
        after.append([p.detach() for group in learner.groups.values() for p in group.parameters])
    close(after[0], after[1], 1e-9)
    close(after[0], after[2], 1e-9)
    assert not torch.equal(after[0][0], learner_of(config).model.bigram)


def test_a_few_steps_of_each_kind_raise_the_reward():
    """On-policy on a bandit; all actions weighed by their probability, so nothing is random."""
    rewards = random(ACTIONS, seed=4)
    for config in (REINFORCEConfig(baseline="batch"), RWRConfig(tau=0.5)):
        model = Categorical(torch.zeros(ACTIONS, dtype=torch.float64), torch.zeros(ACTIONS))
        learner = build_preference_learner(model, dataclasses.replace(config, learning_rate=0.05))
        optimizers = Optimizers(learner, OptimConfig())
        before = float((model.logits.softmax(0) * rewards).sum().detach())
        for step in range(60):
            done, _ = learner.complete(dataclasses.replace(every_action(), rewards=rewards), {})
            chances = model.logits.detach().softmax(0)[:, None] * ACTIONS
            update(
                learner, optimizers, dataclasses.replace(done, advantages=done.advantages * chances), seed=0, step=step
            )
        assert float((model.logits.detach().softmax(0) * rewards).sum()) > before + 0.3
