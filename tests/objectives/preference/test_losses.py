"""Losses and weights computed by hand, limiting cases, and settings that are refused."""

from __future__ import annotations

import dataclasses
import math
from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError
from steelyard.objectives.preference import (
    APOConfig,
    BestOfNConfig,
    CompletionSFTConfig,
    DPOConfig,
    FilteredSFTConfig,
    GRPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    PPOConfig,
    PrefFTConfig,
    REINFORCEConfig,
    RLOOConfig,
    RWRConfig,
    SimPOConfig,
    build_preference_learner,
)

from .toys import close, experience, learner_of, loss_and_gradients, seeded

NAN = float("nan")


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


class Fixed(nn.Module):
    """Log-probs and values that are given."""

    def __init__(self, logps: Tensor, reference: Tensor, values: Tensor) -> None:
        super().__init__()
        self.logps, self.values, self.reference = nn.Parameter(logps), nn.Parameter(values), reference

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        mask = batch.scored_mask
        return Outputs(self.logps * mask, None, self.values * mask if values else None)

    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        return self.reference

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": (self.logps,), "value": (self.values,)}


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# one prompt, three completions of 2, 1 and 2 tokens
LOGPS = tensor([[-1.0, -0.5], [-2.0, 0.0], [-0.2, -0.7]])  # summed: -1.5, -2.0, -0.9
REFERENCE = tensor([[-1.2, -0.9], [-1.5, 0.0], [-0.3, -0.4]])  # delta: 0.6, -0.5, -0.2
SAMPLER = tensor([[-1.1, -0.8], [-1.9, 0.0], [-0.2, -0.6]])  # log-ratios: (.1, .3), -.1, (0, -.1)
VALUES = tensor([[0.5, 0.2], [0.1, 0.0], [-0.3, 0.4]])
MASK = tensor([[1, 1], [1, 0], [1, 1]])
BATCH = ExperienceBatch(
    prompts=torch.zeros(1, 1, dtype=torch.int64),
    prompt_mask=torch.ones(1, 1, dtype=torch.float64),
    completions=torch.zeros(3, 2, dtype=torch.int64),
    scored_mask=MASK,
    prompt_of=torch.zeros(3, dtype=torch.int64),
    rewards=torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
    labels=torch.tensor([1.0, 0.0, NAN], dtype=torch.float64),
    pairs=torch.tensor([[0, 1]]),
    sampler_token_logps=SAMPLER,
)
W, L, Z = 0.6, -0.5, 1.1  # delta of chosen and rejected, and their difference


def found(config, batch: ExperienceBatch = BATCH, memory=None) -> tuple[float, Tensor]:
    """Return the loss and c [N, T], after `complete`."""
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), config)
    batch, _ = learner.complete(batch, memory or {})
    return float(learner.loss_preference(batch, seeded())[0].detach()), learner.token_weights(batch)


PAIRWISE = {
    "pref_ft": (PrefFTConfig(), 1.5),
    "pref_ft mean": (PrefFTConfig(aggregation="sequence_mean"), 0.75),
    "dpo": (DPOConfig(beta=0.5), -log(sigmoid(0.55))),
    "cdpo": (DPOConfig(beta=0.5, label_smoothing=0.1), -0.9 * log(sigmoid(0.55)) - 0.1 * log(sigmoid(-0.55))),
    "robust": (
        DPOConfig(beta=0.5, label_smoothing=0.1, robust=True),
        (-0.9 * log(sigmoid(0.55)) + 0.1 * log(sigmoid(-0.55))) / 0.8,
    ),
    "hinge": (DPOConfig(beta=0.5, loss="hinge"), 0.45),
    "hinge beyond": (DPOConfig(beta=2.0, loss="hinge"), 0.0),
    "exo": (
        DPOConfig(beta=0.5, loss="exo", label_smoothing=0.1),
        sigmoid(0.55) * log(sigmoid(0.55) / 0.9) + sigmoid(-0.55) * log(sigmoid(-0.55) / 0.1),
    ),
    "dpo per token": (DPOConfig(beta=0.5, length_normalised=True), -log(sigmoid(0.5 * (0.3 + 0.5)))),
    "rpo": (DPOConfig(beta=0.5, nll_weight=0.2), -log(sigmoid(0.55)) + 0.2 * 0.75),
    "ipo": (IPOConfig(tau=0.25), (1.1 - 2.0) ** 2),
    "ipo per token": (IPOConfig(tau=0.25, length_norm=True), (0.3 + 0.5 - 2.0) ** 2),
    "simpo": (SimPOConfig(beta=2.0, gamma=0.4), -log(sigmoid(2.0 * (-0.75 + 2.0) - 0.4))),
    "orpo": (
        ORPOConfig(odds_weight=0.3),
        0.75 - 0.3 * log(sigmoid(log(exp(-0.75) / (1 - exp(-0.75))) - log(exp(-2.0) / (1 - exp(-2.0))))),
    ),
    "apo zero": (APOConfig(beta=0.5), 1 - sigmoid(0.3) + sigmoid(-0.25)),
    "apo down": (APOConfig(beta=0.5, variant="down"), sigmoid(0.3) + 1 - sigmoid(0.55)),
}


@pytest.mark.parametrize(("config", "expected"), PAIRWISE.values(), ids=PAIRWISE.keys())
def test_pairwise_losses(config, expected):
    assert found(config)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "up", "down"),
    [
        (DPOConfig(beta=0.5), 0.5 * sigmoid(-0.55), -0.5 * sigmoid(-0.55)),
        (IPOConfig(tau=0.25), 2 * 0.9, -2 * 0.9),
        (IPOConfig(tau=0.5), -2 * 0.1, 2 * 0.1),  # past the target the signs change
        (APOConfig(beta=0.5), 0.5 * sigmoid(0.3) * sigmoid(-0.3), -0.5 * sigmoid(0.25) * sigmoid(-0.25)),
    ],
)
def test_weights_of_pairs(config, up, down):
    weights = found(config)[1]
    expected = tensor([[up, up], [down, 0], [0, 0]])
    torch.testing.assert_close(weights, expected)


def test_apo_down_pushes_both_down_the_rejected_one_more():
    weights = found(APOConfig(beta=0.5, variant="down"))[1]
    both = 0.5 * sigmoid(0.55) * sigmoid(-0.55)
    torch.testing.assert_close(weights[0, 0].item(), both - 0.5 * sigmoid(0.3) * sigmoid(-0.3))
    torch.testing.assert_close(weights[1, 0].item(), -both)
    # at the reference: 1/4 - 1/4 and -1/4
    at_reference = dataclasses.replace(BATCH, reference_token_logps=LOGPS)
    torch.testing.assert_close(
        found(APOConfig(beta=1.0, variant="down"), at_reference)[1][:2, 0], tensor([[0.0, -0.25]])[0]
    )


def test_weights_and_margins_of_pairs_are_theirs():
    batch = dataclasses.replace(
        BATCH, pairs=torch.tensor([[0, 1], [0, 2]]), pair_weights=torch.tensor([1.0, 3.0], dtype=torch.float64)
    )
    expected = (-log(sigmoid(0.5 * 1.1)) - 3 * log(sigmoid(0.5 * 0.8))) / 2
    assert found(DPOConfig(beta=0.5), batch)[0] == pytest.approx(expected)


def test_kto():
    config = KTOConfig(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)
    batch = dataclasses.replace(BATCH, mismatched=torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    # the third completion's delta is -0.2: kappa is clamped to 0
    expected = (1.3 * (1 - sigmoid(0.3)) + 0.7 * (1 - sigmoid(0.25))) / 2
    assert found(config, batch)[0] == pytest.approx(expected)
    better = dataclasses.replace(batch, reference_token_logps=REFERENCE - tensor([[0, 0], [0, 0], [0.5, 0]]))
    loss, weights = found(config, better)  # now 0.3
    expected = (1.3 * (1 - sigmoid(0.5 * (0.6 - 0.3))) + 0.7 * (1 - sigmoid(0.5 * (0.3 + 0.5)))) / 2
    assert loss == pytest.approx(expected)
    assert (weights[2] == 0).all()  # no gradient through kappa
    assert weights[0, 0] > 0 > weights[1, 0]
    # without mismatched completions: all three count, the unlabelled one with 0
    zero = dataclasses.replace(config, reference_point="zero")
    expected = (1.3 * (1 - sigmoid(0.3)) + 0.7 * (1 - sigmoid(0.25))) / 3
    assert found(zero)[0] == pytest.approx(expected)


def test_sft():
    assert found(CompletionSFTConfig())[0] == pytest.approx((1.5 + 2.0 + 0.9) / 5)
    assert found(CompletionSFTConfig(aggregation="sequence_sum"))[0] == pytest.approx((1.5 + 2.0 + 0.9) / 3)
    assert found(CompletionSFTConfig(aggregation="sequence_mean"))[0] == pytest.approx((0.75 + 2.0 + 0.45) / 3)


def rewarded(*rewards: float) -> ExperienceBatch:
    return dataclasses.replace(BATCH, rewards=torch.tensor(rewards, dtype=torch.float64))


def test_best_of_n():
    assert found(BestOfNConfig())[0] == pytest.approx(1.5)
    assert found(BestOfNConfig(keep=2))[0] == pytest.approx((1.5 + 0.9) / 2)
    # ties share a place, an unscored completion is never chosen
    assert found(BestOfNConfig(), rewarded(1, 1, 0))[0] == pytest.approx((1.5 + 2.0) / 2)
    assert found(BestOfNConfig(keep=2), rewarded(1, 0, 0))[0] == pytest.approx((1.5 + (2.0 + 0.9) / 2) / 2)
    assert found(BestOfNConfig(), rewarded(NAN, 0, -1))[0] == pytest.approx(2.0 * 2 / 3)
    assert found(BestOfNConfig(), rewarded(NAN, NAN, NAN))[0] == 0
    # the rest pushed down
    loss, weights = found(BestOfNConfig(rest_weight=0.5))
    assert loss == pytest.approx(1.5 - 0.5 * (2.0 + 0.9) / 2)
    torch.testing.assert_close(weights, tensor([[1, 1], [-0.25, 0], [-0.25, -0.25]]))
    assert found(BestOfNConfig(rest_weight=0.5), rewarded(NAN, 0, -1))[0] == pytest.approx((2.0 - 0.5 * 0.9) * 2 / 3)


def test_filtered_sft():
    assert found(FilteredSFTConfig(threshold=0.5))[0] == pytest.approx((1.5 + 0.9) / 3)
    soft = FilteredSFTConfig(filter="sigmoid", threshold=0.5, tau=0.25)
    assert found(soft)[0] == pytest.approx((1.5 * sigmoid(2) + 2.0 * sigmoid(-2) + 0.9 * 0.5) / 3)


def test_rwr():
    assert found(RWRConfig(tau=0.5))[0] == pytest.approx((1.5 * exp(2) + 2.0 + 0.9 * exp(1)) / 3)
    assert found(RWRConfig(tau=0.1))[0] == pytest.approx((1.5 * 20 + 2.0 + 0.9 * 20) / 3)  # clipped at 20
    assert found(RWRConfig(), rewarded(0, 0, 1e9))[0] == pytest.approx((1.5 + 2.0 + 0.9 * 20) / 3)
    # standardised: mean 1/2, standard deviation 1/2
    for how in ("group", "batch"):
        z = 0.5 / (0.5 + 1e-4)
        expected = (1.5 * exp(z) + 2.0 * exp(-z) + 0.9) / 3
        assert found(RWRConfig(standardise=how))[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "advantages"),
    [
        ({"baseline": "none"}, (1.0, 0.0, 0.5)),
        ({"baseline": "batch"}, (0.5, -0.5, 0.0)),
        ({"baseline": "group"}, (0.5, -0.5, 0.0)),
        ({"baseline": "leave_one_out"}, (0.75, -0.75, 0.0)),
        ({"baseline": "group", "scale": "group"}, (0.5 / 0.5001, -0.5 / 0.5001, 0.0)),
        ({"baseline": "none", "reward_clip": 0.7}, (0.7, 0.0, 0.5)),
        # KL in the reward, k1 at sampling time: (-1.9 + 2.1), (-1.9 + 1.5), (-.8 + .7)
        ({"baseline": "none", "beta": 0.5}, (1 - 0.5 * 0.2, 0 + 0.5 * 0.4, 0.5 + 0.5 * 0.1)),
    ],
)
def test_reinforce(settings, advantages):
    expected = sum(a * nll for a, nll in zip(advantages, (1.5, 2.0, 0.9), strict=True)) / 3
    loss, weights = found(REINFORCEConfig(**settings))
    assert loss == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(weights, tensor([[a / 3] * 2 for a in advantages]) * MASK, atol=1e-9, rtol=1e-9)


def test_the_moving_average_is_remembered():
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), REINFORCEConfig(baseline="ema"))
    first, memory = learner.complete(BATCH, {})
    assert float(memory["baseline"]) == 0.5
    second, later = learner.complete(rewarded(2, 2, 2), memory)
    assert float(memory["baseline"]) == 0.5  # the old memory is not changed
    assert float(later["baseline"]) == pytest.approx(0.9 * 0.5 + 0.1 * 2)
    torch.testing.assert_close(second.advantages, (2 - later["baseline"]) * MASK)
    torch.testing.assert_close(first.advantages[:, 0], torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64))
    silent, kept = learner.complete(rewarded(NAN, NAN, NAN), later)
    assert kept["baseline"] == later["baseline"]
    assert (silent.advantages == 0).all()


def test_corrections_of_reinforce():
    """Advantages 1, 0, .5; log-ratios (.1, .3), -.1, (0, -.1)."""
    clip = REINFORCEConfig(baseline="none", correction="clip")
    expected = -(exp(0.1) + 1.2 + 0.5 * (1 + exp(-0.1))) / 3
    assert found(clip)[0] == pytest.approx(expected)
    assert found(clip)[1][0, 1] == 0  # past the clip
    sequence = dataclasses.replace(clip, ratio="sequence", epsilon_high=0.6)
    assert found(sequence)[0] == pytest.approx(-(exp(0.4) + 0.5 * exp(-0.1)) / 3)
    tis = REINFORCEConfig(baseline="none", correction="tis", ratio_cap=1.2)
    expected = (exp(0.1) * 1.0 + 1.2 * 0.5 + 0.5 * (0.2 + exp(-0.1) * 0.7)) / 3
    assert found(tis)[0] == pytest.approx(expected)
    mask = REINFORCEConfig(baseline="none", correction="mask", ratio_range=(0.95, 1.2))
    assert found(mask)[0] == pytest.approx((exp(0.1) * 1.0 + 0.5 * 0.2) / 3)


def test_rloo_and_its_clip():
    config = RLOOConfig(beta=0.5)
    rewards = (0.9, 0.2, 0.55)
    a = [r - (sum(rewards) - r) / 2 for r in rewards]
    expected = -(min(exp(0.4) * a[0], 1.2 * a[0]) + min(exp(-0.1) * a[1], a[1] * exp(-0.1)) + exp(-0.1) * a[2]) / 3
    assert found(config)[0] == pytest.approx(expected)


def test_grpo_variants():
    """Advantages (1, -1, 0) / (1 + 2e-4) where divided by the deviation."""
    a = 0.5 / 0.5001
    kl = [exp(-x) - 1 + x for x in (0.2, 0.4, -0.5, 0.1, -0.3)]
    rho = [exp(x) for x in (0.1, 0.3, -0.1, 0.0, -0.1)]
    assert found(GRPOConfig())[0] == pytest.approx(-((rho[0] + 1.2) / 2 * a - rho[2] * a) / 3)
    with_kl = -((rho[0] + 1.2) / 2 * a - rho[2] * a) / 3
    means = [(kl[0] + kl[1]) / 2, kl[2], (kl[3] + kl[4]) / 2]
    assert found(GRPOConfig(beta=0.5, kl_estimator="k3"))[0] == pytest.approx(with_kl + 0.5 * sum(means) / 3)
    corrected = [(rho[0] * kl[0] + rho[1] * kl[1]) / 2, rho[2] * kl[2], (rho[3] * kl[3] + rho[4] * kl[4]) / 2]
    assert found(GRPOConfig(beta=0.5))[0] == pytest.approx(with_kl + 0.5 * sum(corrected) / 3)
    assert found(GRPOConfig(variant="dapo"))[0] == pytest.approx(-a * (rho[0] + 1.28 - rho[2]) / 5)
    dr = GRPOConfig(variant="dr_grpo", max_completion_tokens=10)
    assert found(dr)[0] == pytest.approx(-0.5 * (rho[0] + 1.2 - rho[2]) / 30)
    gspo = GRPOConfig(variant="gspo", epsilon=0.3, epsilon_high=0.3)
    assert found(gspo)[0] == pytest.approx(-a * (exp(0.2) - rho[2]) / 3)
    assert found(GRPOConfig(variant="gspo"))[0] == pytest.approx(-a * (1.0004 - max(rho[2], 1 - 3e-4)) / 3)
    cispo = GRPOConfig(variant="cispo", epsilon_high=1.2)
    assert found(cispo)[0] == pytest.approx(a * (rho[0] * 1.0 + 1.2 * 0.5 - rho[2] * 2.0) / 5)


def test_generalised_advantages_and_values_of_ppo():
    config = PPOConfig(beta=0.5, discount=0.9, gae_lambda=0.8, normalise_advantages=False, value_clip=None)
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), config)
    batch, memory = learner.complete(BATCH, {})
    assert memory == {}
    # KL of tokens at sampling time, k1: (.1, .1), -.4, (.1, -.2)
    last = 1.0 - 0.5 * 0.1 - 0.2
    first = -0.5 * 0.1 + 0.9 * 0.2 - 0.5 + 0.72 * last
    one = 0.0 + 0.5 * 0.4 - 0.1
    late = 0.5 + 0.5 * 0.2 - 0.4
    early = -0.5 * 0.1 + 0.9 * 0.4 + 0.3 + 0.72 * late
    expected = tensor([[first, last], [one, 0], [early, late]])
    torch.testing.assert_close(batch.advantages, expected)
    torch.testing.assert_close(batch.returns, (expected + VALUES) * MASK)
    rho = [exp(x) for x in (0.1, 0.3, -0.1, 0.0, -0.1)]
    flat = [first, last, one, early, late]
    policy = -sum(min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(rho, flat, strict=True)) / 5
    value = sum(a * a for a in flat) / 5 / 2
    assert float(learner.loss_preference(batch, seeded())[0].detach()) == pytest.approx(policy + 0.1 * value)
    # whitened over scored tokens
    white = build_preference_learner(learner.model, dataclasses.replace(config, normalise_advantages=True))
    normal = white.complete(BATCH, {})[0].advantages[MASK > 0]
    torch.testing.assert_close(normal.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(normal.std(), torch.ones((), dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_value_clip_keeps_the_larger_error():
    config = PPOConfig(beta=0, value_clip=0.1, value_weight=1.0, normalise_advantages=False)
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), config)
    batch, _ = learner.complete(BATCH, {})
    returns, old = tensor([[1.0, 1.0], [1.0, 0], [1.0, 1.0]]), VALUES - tensor([[0.3, 0.05], [-0.3, 0], [0, 0]])
    batch = dataclasses.replace(batch, returns=returns, values=old, advantages=torch.zeros_like(MASK))
    # moved by .3, .05, -.3, 0, 0: the first counts as if moved by .1, the third as it is (it is the larger error)
    errors = [(0.3 - 1) ** 2, (0.2 - 1) ** 2, (0.1 - 1) ** 2, (-0.3 - 1) ** 2, (0.4 - 1) ** 2]
    loss, gradients = loss_and_gradients(learner, batch)
    assert float(loss) == pytest.approx(sum(errors) / 5 / 2)
    assert gradients[1][0, 0] == 0
    assert gradients[1][1, 0] != 0


def test_the_kl_controller():
    config = PPOConfig(beta=0.5, target_kl=0.1, kl_horizon=30)
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), config)
    _, memory = learner.complete(BATCH, {})
    assert float(memory["kl_weight"]) == pytest.approx(0.5 * (1 - 0.2 * 3 / 30))  # the KL was -.1: error clamped
    near = dataclasses.replace(BATCH, reference_token_logps=SAMPLER - 0.055 * MASK * 3 / 5)
    _, memory = learner.complete(near, memory)  # KL .055: error clamped again
    assert float(memory["kl_weight"]) == pytest.approx(0.49 * 0.98)
    close_by = dataclasses.replace(BATCH, reference_token_logps=SAMPLER - 0.11 * MASK * 3 / 5)
    done, after = learner.complete(close_by, memory)
    assert float(after["kl_weight"]) == pytest.approx(float(memory["kl_weight"]) * (1 + 0.1 * 3 / 30))
    fixed = build_preference_learner(learner.model, PPOConfig(beta=float(memory["kl_weight"])))
    torch.testing.assert_close(done.advantages, fixed.complete(close_by, {})[0].advantages)


def test_equalities():
    """cDPO(0) = robust(0) = DPO; SimPO(0) = length-normalised DPO of a uniform reference; Dr. GRPO is RLOO, scaled."""
    batch = experience()

    def at(config, changed: ExperienceBatch = batch):
        learner = learner_of(config)
        loss, gradients = loss_and_gradients(learner, learner.complete(changed, {})[0])
        return [loss, *gradients]

    close(at(DPOConfig(label_smoothing=1e-13, robust=True)), at(DPOConfig()), 1e-10)
    close(at(DPOConfig(label_smoothing=1e-13)), at(DPOConfig()), 1e-10)
    uniform = dataclasses.replace(batch, reference_token_logps=-math.log(6) * batch.scored_mask)
    close(at(SimPOConfig(beta=0.7, gamma=0.0)), at(DPOConfig(beta=0.7, length_normalised=True), uniform))
    # RLOO is REINFORCE with the leave-one-out baseline, as long as completions are fresh
    fresh = dataclasses.replace(
        batch, sampler_token_logps=learner_of(DPOConfig()).model.outputs(batch).token_logps.detach()
    )
    rloo = at(RLOOConfig(beta=0.0), fresh)
    close(rloo[1:], at(REINFORCEConfig(baseline="leave_one_out"), fresh)[1:])
    # the mean with oneself instead of the others shrinks the advantage by (N - 1) / N
    group = at(REINFORCEConfig(baseline="group"), fresh)
    close(rloo[1:], [g * 3 / 2 for g in group[1:]])
    dr = at(GRPOConfig(variant="dr_grpo", max_completion_tokens=1), fresh)
    close(rloo[1:], [g * 3 / 2 for g in dr[1:]])


def test_ppo_at_a_ratio_of_one_is_reinforce():
    batch = experience()
    model = learner_of(PPOConfig()).model
    fresh = dataclasses.replace(
        batch,
        sampler_token_logps=model.outputs(batch).token_logps.detach(),
        advantages=torch.randn(batch.scored_mask.shape, generator=seeded(3), dtype=torch.float64) * batch.scored_mask,
        returns=batch.scored_mask,
        values=batch.scored_mask,
    )
    ppo = learner_of(PPOConfig(beta=0.0, value_weight=0.0))
    reinforce = learner_of(REINFORCEConfig(baseline="none", aggregation="token_mean"))
    close(loss_and_gradients(ppo, fresh)[1][:2], loss_and_gradients(reinforce, fresh)[1])  # without the critic's


def test_dpo_at_the_reference_is_rloo_of_two():
    """Gradient (beta / 2) (grad log pi_w - grad log pi_l) a pair: beta times that of RLOO with rewards 1 and 0."""
    batch = experience(completions=2)
    model = learner_of(DPOConfig()).model
    logps = model.outputs(batch).token_logps.detach()
    rewards = torch.zeros(len(batch), dtype=torch.float64)
    rewards[batch.pairs[:, 0]] = 1.0
    batch = dataclasses.replace(
        batch, rewards=rewards, reference_token_logps=logps, sampler_token_logps=logps, pair_weights=None
    )
    dpo = loss_and_gradients(learner_of(DPOConfig(beta=0.3)), batch)[1]
    rloo = loss_and_gradients(learner_of(RLOOConfig(beta=0.0)), batch)[1]
    close(dpo, [0.3 * g for g in rloo])


REFUSED = [
    (lambda: DPOConfig(robust=True), "robust needs label_smoothing"),
    (lambda: DPOConfig(robust=True, label_smoothing=0.1, loss="hinge"), "robust corrects the sigmoid loss"),
    (lambda: DPOConfig(loss="hinge", label_smoothing=0.1), "has no label_smoothing"),
    (lambda: DPOConfig(loss="exo"), "needs label_smoothing above 0"),
    (lambda: DPOConfig(label_smoothing=0.5), "label_smoothing must be between"),
    (lambda: DPOConfig(beta=0.0), "beta must be above 0"),
    (lambda: IPOConfig(tau=-1.0), "tau must be above 0"),
    (lambda: RLOOConfig(kl_place="loss"), "k1 has no gradient on average as a loss"),
    (lambda: REINFORCEConfig(beta=0.1, kl_estimator="k3_ratio"), "differs from k3 by its gradient only"),
    (lambda: REINFORCEConfig(ratio_range=(1.1, 2.0)), "ratio_range must hold 1"),
    (lambda: GRPOConfig(variant="cispo", epsilon=0.2), "caps ratios from above only"),
    (lambda: GRPOConfig(variant="cispo", epsilon_high=0.2), "the largest ratio, at least 1"),
    (lambda: PPOConfig(target_kl=1.0, beta=0.0), "target_kl adapts beta"),
    (lambda: PPOConfig(target_kl=1.0, kl_place="loss", kl_estimator="k3"), "set kl_place to reward"),
    (lambda: BestOfNConfig(keep=0), "keep must be above 0"),
    (lambda: FilteredSFTConfig(threshold=float("nan")), "threshold must be between"),
    (lambda: SimPOConfig(learning_rate=0.0), "learning_rate must be above 0"),
]


@pytest.mark.parametrize(("build", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_combinations_that_make_no_sense_are_refused(build, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build()


def test_metrics_have_the_familiar_names():
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), DPOConfig(beta=0.5))
    _, metrics = learner.loss_preference(BATCH, seeded())
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.3)
    assert float(metrics["rewards/rejected"]) == pytest.approx(-0.25)
    assert float(metrics["rewards/accuracies"]) == 1
    assert float(metrics["logps/chosen_per_token"]) == pytest.approx(-0.75)
    assert float(metrics["loss/negative_mass"]) == pytest.approx(1 / 3)  # one token down, two up, by as much each
    learner = build_preference_learner(learner.model, RLOOConfig())
    _, metrics = learner.loss_preference(BATCH, seeded())
    assert metrics["kl/reference"].mean() == pytest.approx((0.6 - 0.5 - 0.2) / 3)
    assert float(metrics["clip_ratio/high_mean"]) == pytest.approx(2 / 5)
    assert float(metrics["sampler/kl"]) == pytest.approx(-(0.4 - 0.1 - 0.1) / 3)
    ratios = [exp(0.4), exp(-0.1), exp(-0.1)]
    assert float(metrics["sampler/ess"]) == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 3)
    # completions of others do not count, whatever stands in their place
    foreign = SAMPLER.clone()
    foreign[1] = NAN
    mixed = dataclasses.replace(BATCH, born=torch.tensor([3, -1, 4]), sampler_token_logps=foreign)
    _, metrics = build_preference_learner(learner.model, DPOConfig()).loss_preference(mixed, seeded())
    assert float(metrics["sampler/kl"]) == pytest.approx(-(0.4 - 0.1) / 2)
    ratios = ratios[:2]
    assert float(metrics["sampler/ess"]) == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 2)


def test_advantages_pass_over_what_is_not_scored():
    """A completion with a hole (text of a tool) has the advantages of the one without it."""
    config = PPOConfig(beta=0.5, discount=0.9, gae_lambda=0.8, normalise_advantages=False)

    def with_hole(rows: Tensor) -> Tensor:
        return torch.stack([rows[:, 0], torch.full_like(rows[:, 0], 7.0), rows[:, 1]], 1)

    holed = dataclasses.replace(
        BATCH,
        completions=torch.zeros(3, 3, dtype=torch.int64),
        scored_mask=tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1]]),
        sampler_token_logps=with_hole(SAMPLER),
        values=with_hole(VALUES),
    )
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), config)
    expected, _ = learner.complete(BATCH, {})
    found, _ = build_preference_learner(Fixed(LOGPS, with_hole(REFERENCE), VALUES), config).complete(holed, {})
    torch.testing.assert_close(found.advantages[:, [0, 2]], expected.advantages)
    torch.testing.assert_close(found.returns[:, [0, 2]], expected.returns)
    assert (found.advantages[:, 1] == 0).all()


def test_an_unscorable_completion_teaches_the_critic_nothing():
    learner = build_preference_learner(Fixed(LOGPS, REFERENCE, VALUES), PPOConfig(value_weight=1.0))
    batch, _ = learner.complete(rewarded(1, NAN, 0), {})
    assert batch.returns.isnan().all(1).tolist() == [False, True, False]
    loss, (policy, values) = loss_and_gradients(learner, batch)
    assert loss.isfinite()
    assert (policy[1] == 0).all()
    assert (values[1] == 0).all()
    assert (values[0] != 0).all()


def test_one_reward_has_no_spread():
    """Where a group's other rewards are unknown, nothing can be divided by their deviation: no advantage."""
    for baseline in ("none", "batch", "group", "leave_one_out"):
        learner = build_preference_learner(
            Fixed(LOGPS, REFERENCE, VALUES), REINFORCEConfig(baseline=baseline, scale="group")
        )
        batch, _ = learner.complete(rewarded(NAN, 2.0, NAN), {})
        assert (batch.advantages == 0).all()
