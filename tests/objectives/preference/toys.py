"""A policy small enough to enumerate, batches for it, and the cases that every objective is tested with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    APOConfig,
    BestOfNConfig,
    DPOConfig,
    FilteredSFTConfig,
    GRPOConfig,
    IPOConfig,
    KTOConfig,
    PPOConfig,
    PreferenceConfig,
    PreferenceLearner,
    PrefFTConfig,
    REINFORCEConfig,
    RLOOConfig,
    RWRConfig,
    build_preference_learner,
)

VOCABULARY = 6
PAD = 5  # a token like any other to the model: only masks tell


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TablePolicy(nn.Module):
    """A bigram model whose logits also depend on the prompt's tokens; in double precision. A `PolicyModel`."""

    def __init__(self, seed: int = 0, value_head: bool = True) -> None:
        super().__init__()
        g = seeded(seed)

        def table(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.bigram = nn.Parameter(table(VOCABULARY + 1, VOCABULARY))  # the last row: the first token
        self.embedding = nn.Parameter(table(VOCABULARY, VOCABULARY))
        self.reference = (table(VOCABULARY + 1, VOCABULARY), table(VOCABULARY, VOCABULARY))
        self.value = nn.Parameter(table(VOCABULARY + 1)) if value_head else None

    def _logps(self, batch: ExperienceBatch, bigram: Tensor, embedding: Tensor, temperature: float) -> Tensor:
        prompt = (embedding[batch.prompts] * batch.prompt_mask[:, :, None]).sum(1)
        logits = (bigram[self._before(batch)] + prompt[batch.prompt_of][:, None]) / temperature
        logps = logits.log_softmax(-1).gather(2, batch.completions[:, :, None])[:, :, 0]
        return logps * batch.scored_mask

    def _before(self, batch: ExperienceBatch) -> Tensor:
        first = torch.full_like(batch.completions[:, :1], VOCABULARY)
        return torch.cat([first, batch.completions[:, :-1]], 1)

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        logps = self._logps(batch, self.bigram, self.embedding, temperature)
        return Outputs(logps, None, self.value[self._before(batch)] * batch.scored_mask if values else None)

    @torch.no_grad()
    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        return self._logps(batch, *self.reference, temperature)

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        found = {"policy": (self.bigram, self.embedding)}
        return found if self.value is None else found | {"value": (self.value,)}


def experience(
    prompts: int = 4, completions: int = 3, columns: int = 5, seed: int = 0, mismatched: bool = False
) -> ExperienceBatch:
    """Return a ragged batch in double precision with every field that people and samplers give."""
    g = seeded(seed)
    n = prompts * completions
    number = torch.arange(prompts).repeat_interleave(completions)[torch.randperm(n, generator=g)]
    prompt_lengths = torch.randint(1, 4, (prompts,), generator=g)
    lengths = torch.randint(1, columns + 1, (n,), generator=g)
    lengths[0], lengths[1] = columns, 1
    prompt_mask = (torch.arange(3) >= 3 - prompt_lengths[:, None]).double()
    scored_mask = (torch.arange(columns) < lengths[:, None]).double()
    rewards = torch.randn(n, generator=g, dtype=torch.float64)
    pairs = [
        (int(a), int(b))
        for prompt in range(prompts)
        for a in torch.nonzero(number == prompt).flatten()
        for b in torch.nonzero(number == prompt).flatten()
        if rewards[a] > rewards[b]
    ]
    batch = ExperienceBatch(
        prompts=torch.randint(0, VOCABULARY, (prompts, 3), generator=g),
        prompt_mask=prompt_mask,
        completions=torch.randint(0, VOCABULARY, (n, columns), generator=g),
        scored_mask=scored_mask,
        prompt_of=number,
        rewards=rewards,
        labels=(rewards > 0).double(),
        pairs=torch.tensor(pairs),
        pair_weights=torch.rand(len(pairs), generator=g, dtype=torch.float64),
        margins=torch.tensor([float(rewards[a] - rewards[b]) for a, b in pairs]),
        born=torch.zeros(n, dtype=torch.int64),
    )
    sampler = TablePolicy(seed=1).outputs(batch).token_logps.detach()
    noise = 0.3 * torch.randn(n, columns, generator=g, dtype=torch.float64)
    flags = (torch.rand(n, generator=g) < 0.5).double()
    return dataclasses.replace(
        batch, sampler_token_logps=sampler + noise * scored_mask, mismatched=flags if mismatched else None
    )


CASES: dict[str, PreferenceConfig] = {kind: config() for kind, config in PREFERENCE_OBJECTIVES.items()} | {
    "pref_ft/mean": PrefFTConfig(aggregation="sequence_mean"),
    "best_of_n/2": BestOfNConfig(keep=2, aggregation="token_mean"),
    "best_of_n/rest": BestOfNConfig(rest_weight=0.5),
    "filtered_sft/sigmoid": FilteredSFTConfig(filter="sigmoid", threshold=0.2),
    "rwr/group": RWRConfig(standardise="group", tau=0.5),
    "rwr/batch": RWRConfig(standardise="batch"),
    "dpo/smoothing": DPOConfig(label_smoothing=0.1, beta=0.5),
    "dpo/robust": DPOConfig(label_smoothing=0.1, robust=True, beta=0.5),
    "dpo/hinge": DPOConfig(loss="hinge"),
    "dpo/exo": DPOConfig(loss="exo", label_smoothing=0.01),
    "dpo/length": DPOConfig(length_normalised=True, nll_weight=0.3),
    "ipo/length": IPOConfig(length_norm=True),
    "kto/zero": KTOConfig(reference_point="zero", desirable_weight=1.3),
    "apo/down": APOConfig(variant="down"),
    "reinforce/none": REINFORCEConfig(baseline="none", reward_clip=0.8, aggregation="token_mean"),
    "reinforce/batch": REINFORCEConfig(baseline="batch", scale="batch", beta=0.1),
    "reinforce/ema": REINFORCEConfig(baseline="ema", correction="clip", beta=0.1, kl_estimator="k3"),
    "reinforce/loo": REINFORCEConfig(baseline="leave_one_out", correction="tis", ratio="sequence", ratio_cap=1.1),
    "reinforce/mask": REINFORCEConfig(correction="mask", beta=0.1, kl_estimator="k3_ratio", kl_place="loss"),
    "reinforce/sequence": REINFORCEConfig(correction="clip", ratio="sequence", scale="group", epsilon_high=0.4),
    "rloo/plain": RLOOConfig(beta=0, correction="none", normalise_advantages=True),
    "rloo/k2": RLOOConfig(kl_place="loss", kl_estimator="k2"),
    "grpo/dapo": GRPOConfig(variant="dapo", beta=0.1),
    "grpo/dr": GRPOConfig(variant="dr_grpo", beta=0.1, kl_estimator="k3"),
    "grpo/gspo": GRPOConfig(variant="gspo", epsilon=0.1, epsilon_high=0.1, beta=0.1),
    "grpo/cispo": GRPOConfig(variant="cispo", epsilon_high=1.2, scale_rewards="batch"),
    "ppo/adaptive": PPOConfig(target_kl=1.0, value_clip=None, discount=0.9),
    "ppo/loss": PPOConfig(kl_place="loss", kl_estimator="k2", normalise_advantages=False),
}


def learner_of(config: Any, negative: float = 1.0, seed: int = 0, temperature: float = 1.0) -> PreferenceLearner:
    return build_preference_learner(TablePolicy(seed), config, negative, temperature)


def batch_of(config: Any, seed: int = 0) -> ExperienceBatch:
    return experience(seed=seed, mismatched=config.needs.mismatched)


def loss_and_gradients(learner: PreferenceLearner, batch: ExperienceBatch) -> tuple[Tensor, list[Tensor]]:
    loss, _ = learner.loss_preference(batch, seeded())
    parameters = [p for group in learner.groups.values() for p in group.parameters]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach(), found


def close(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
