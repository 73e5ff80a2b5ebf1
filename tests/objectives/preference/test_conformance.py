"""What every preference objective must do. A new one is in `PREFERENCE_OBJECTIVES` and so is tested here at once."""

from __future__ import annotations

import dataclasses

import pydantic
import pytest
import torch
from torch import Tensor

from steelyard.config import from_json, to_json
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.errors import ConfigError, DataError
from steelyard.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    AnyPreferenceConfig,
    BestOfNConfig,
    KTOConfig,
    PPOConfig,
    REINFORCEConfig,
    RLOOConfig,
    build_preference_learner,
)
from steelyard.objectives.preference import base as base_module

from .toys import (
    CASES,
    VOCABULARY,
    TablePolicy,
    batch_of,
    close,
    experience,
    learner_of,
    loss_and_gradients,
    seeded,
)

every = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def bits(batch: ExperienceBatch) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in batch.tensors().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(v.nan_to_num(7), right[k].nan_to_num(7)) for k, v in left.items()
    )


def completed(config, batch: ExperienceBatch) -> ExperienceBatch:
    return learner_of(config).complete(batch, {})[0]


@every
def test_it_is_finite_and_pure(config):
    learner, batch = learner_of(config), batch_of(config)
    before, weights = bits(batch), {k: v.clone() for k, v in learner.state_dict().items()}
    once, again = loss_and_gradients(learner, batch), loss_and_gradients(learner, batch)
    assert once[0].isfinite()
    assert all(g.isfinite().all() for g in once[1])
    assert any((g != 0).any() for g in once[1])
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
    memory: dict[str, Tensor] = {"baseline": torch.tensor(0.3), "kl_weight": torch.tensor(0.1)}
    learner.complete(batch, memory)
    assert memory == {"baseline": torch.tensor(0.3), "kl_weight": torch.tensor(0.1)}
    assert same(before, bits(batch))
    assert same(weights, dict(learner.state_dict()))


@every
def test_lambda_one_is_autograd_to_the_last_bit(config):
    """The surrogate's gradient is that of the loss itself, differentiated through the model."""
    learner = learner_of(config)
    batch = completed(config, batch_of(config))
    loss, gradients = loss_and_gradients(learner, batch)
    outputs = learner.model.outputs(batch, values=config.needs.values)
    parts = learner._loss(outputs, batch, config)
    whole = parts.policy if parts.other is None else parts.policy + parts.other
    parameters = [p for group in learner.groups.values() for p in group.parameters]
    expected = torch.autograd.grad(parts.policy, parameters, retain_graph=True, allow_unused=True)
    assert torch.equal(loss, whole.detach())
    for found, wanted, parameter in zip(gradients, expected, parameters, strict=True):
        if wanted is not None:
            assert torch.equal(found, wanted)
        elif parts.other is not None:
            assert torch.equal(found, torch.autograd.grad(parts.other, parameter, retain_graph=True)[0])


@every
def test_lambda_scales_what_is_pushed_down(config):
    """At 0 no token is pushed down; in between the gradient is the straight line between the two."""
    batch = completed(config, batch_of(config))
    weights = learner_of(config).token_weights(batch)
    gradients = {}
    for negative in (0.0, 0.5, 1.0):
        learner = learner_of(config, negative)
        outputs = learner.model.outputs(batch, values=config.needs.values)
        leaf = outputs.token_logps.detach().requires_grad_()
        loss, metrics = learner.surrogate(Outputs(leaf, None, outputs.values), batch)
        (gradients[negative],) = torch.autograd.grad(loss, leaf)
        mass = weights.clamp(max=0).abs().sum() / weights.abs().sum()
        torch.testing.assert_close(metrics["loss/negative_mass"], mass)
    assert (gradients[0.0] <= 0).all()
    assert torch.equal(gradients[0.0], -weights.clamp(min=0))
    assert torch.equal(gradients[1.0], -weights)
    close([gradients[0.5]], [(gradients[0.0] + gradients[1.0]) / 2])


@every
def test_masked_positions_contribute_exactly_nothing(config):
    batch = completed(config, batch_of(config))
    weights = learner_of(config).token_weights(batch)
    assert (weights[batch.scored_mask == 0] == 0).all()
    assert (weights[batch.scored_mask == 1] != 0).any()
    torch.testing.assert_close(learner_of(config).weights(batch), weights.sum(1) / batch.lengths)


@every
def test_padding_changes_nothing(config):
    learner, batch = learner_of(config), batch_of(config)
    g = seeded(5)

    def wider(value: Tensor, left: int, right: int, tokens: bool = False) -> Tensor:
        def more(columns: int) -> Tensor:
            if tokens:
                return torch.randint(0, VOCABULARY, (len(value), columns), generator=g)
            return torch.zeros(len(value), columns, dtype=value.dtype)

        return torch.cat([more(left), value, more(right)], 1)

    padded = dataclasses.replace(
        batch,
        prompts=wider(batch.prompts, 2, 0, tokens=True),
        prompt_mask=wider(batch.prompt_mask, 2, 0),
        completions=wider(batch.completions, 0, 3, tokens=True),
        scored_mask=wider(batch.scored_mask, 0, 3),
        sampler_token_logps=wider(batch.sampler_token_logps, 0, 3),
    )
    for prepare in (lambda b: b, lambda b: completed(config, b)):
        expected, found = loss_and_gradients(learner, prepare(batch)), loss_and_gradients(learner, prepare(padded))
        close([expected[0], *expected[1]], [found[0], *found[1]])


@every
def test_the_order_of_prompts_and_completions_changes_nothing(config):
    learner, batch = learner_of(config), batch_of(config)
    expected = loss_and_gradients(learner, batch)
    new_of_prompt = torch.randperm(len(batch.prompts), generator=seeded(1))
    rows = torch.randperm(len(batch), generator=seeded(2))
    names = ("completions", "scored_mask", "rewards", "labels", "sampler_token_logps", "born", "mismatched")
    changes = {name: getattr(batch, name)[rows] for name in names if getattr(batch, name) is not None}
    shuffled = dataclasses.replace(
        batch,
        prompts=batch.prompts[torch.argsort(new_of_prompt)],
        prompt_mask=batch.prompt_mask[torch.argsort(new_of_prompt)],
        prompt_of=new_of_prompt[batch.prompt_of][rows],
        pairs=torch.argsort(rows)[batch.pairs],
        **changes,
    )
    found = loss_and_gradients(learner, shuffled)
    close([expected[0], *expected[1]], [found[0], *found[1]])


@every
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_average_to_the_whole(config, parts):
    """Gradient accumulation and processes: ragged lengths, groups that are never torn."""
    if isinstance(config, KTOConfig) and config.reference_point == "kl":
        pytest.skip("kappa is a mean inside a nonlinear function: test_kto_parts")
    learner, batch = learner_of(config), completed(config, batch_of(config))
    expected = loss_and_gradients(learner, batch)
    pieces = [loss_and_gradients(learner, batch.part(k, parts)) for k in range(parts)]
    close([expected[0]], [torch.stack([loss for loss, _ in pieces]).mean()])
    means = [torch.stack(found).mean(0) for found in zip(*(gradients for _, gradients in pieces), strict=True)]
    close(expected[1], means)


def test_kto_parts():
    """With kappa clamped to 0 in each part they average to the whole, also where mismatched ones are unequally many."""
    config = KTOConfig()
    batch = experience(mismatched=True)
    assert len({float(batch.part(k, 2).mismatched.mean()) for k in range(2)}) == 2
    # a reference that likes everything better: kappa is 0 everywhere
    learner = learner_of(config)
    logps = learner.model.outputs(batch).token_logps.detach()
    batch = dataclasses.replace(batch, reference_token_logps=logps + 0.1 * batch.scored_mask)
    expected = loss_and_gradients(learner, batch)
    pieces = [loss_and_gradients(learner, batch.part(k, 2)) for k in range(2)]
    close([expected[0]], [torch.stack([loss for loss, _ in pieces]).mean()])
    means = [torch.stack(found).mean(0) for found in zip(*(gradients for _, gradients in pieces), strict=True)]
    close(expected[1], means)


@every
def test_what_it_needs_it_asks_for(config):
    """A missing field is one sentence; a field that is not needed may be missing."""
    batch, learner = batch_of(config), learner_of(config)
    fields = {
        "pairs": "pairs",
        "rewards": "rewards",
        "labels": "labels",
        "sampler": "sampler_token_logps",
        "mismatched": "mismatched",
    }
    unneeded = {name: None for need, name in fields.items() if not getattr(config.needs, need)}
    lean = dataclasses.replace(batch, **unneeded, born=None, margins=None)
    done, _ = learner.complete(lean, {})
    assert loss_and_gradients(learner, done)[0].isfinite()
    assert (done.reference_token_logps is not None) == config.needs.reference
    assert (done.values is not None) == config.needs.values
    for need, name in fields.items():
        if getattr(config.needs, need):
            for attempt in (learner.complete, lambda b, _: learner.loss_preference(b, seeded())):
                with pytest.raises(DataError, match=rf"objective '{config.kind}' needs"):
                    attempt(dataclasses.replace(batch, **{name: None}), {})
    if config.needs.group > 1:
        with pytest.raises(DataError, match="completions of a prompt, found 1"):
            learner.complete(experience(prompts=6, completions=1), {})


@every
def test_unscorable_completions_have_no_weight(config):
    """A reward of NaN: advantage 0, and the others' are as if it were not there."""
    if not config.needs.rewards:
        pytest.skip("reads no rewards")
    batch = experience(completions=4)
    row = 4
    rewards = batch.rewards.clone()
    rewards[row] = float("nan")
    done = completed(config, dataclasses.replace(batch, rewards=rewards))
    assert done.advantages.isfinite().all()
    assert (done.advantages[row] == 0).all()
    loss, gradients = loss_and_gradients(learner_of(config), done)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)

    kept = torch.arange(len(batch)) != row
    names = ("completions", "scored_mask", "rewards", "sampler_token_logps", "prompt_of", "labels", "born")
    less = dataclasses.replace(
        batch, **{name: getattr(batch, name)[kept] for name in names}, pairs=None, pair_weights=None, margins=None
    )
    close([completed(config, less).advantages], [done.advantages[kept]])


@every
def test_its_config_survives_a_file(config):
    adapter = pydantic.TypeAdapter(AnyPreferenceConfig)
    assert adapter.validate_json(to_json(config)) == config
    assert from_json(type(config), to_json(config)) == config


def test_every_objective_is_a_case_and_unknown_ones_are_refused():
    assert {config.kind for config in CASES.values()} == set(PREFERENCE_OBJECTIVES)
    with pytest.raises(ConfigError, match="unknown preference objective"):
        build_preference_learner(None, object())  # type: ignore[arg-type]


@every
def test_temperature_reaches_the_model(config):
    batch = batch_of(config)
    tempered, plain = learner_of(config, temperature=2.0), learner_of(config)
    calls = []
    original = tempered.model._logps
    tempered.model._logps = lambda b, w, e, temperature: calls.append(temperature) or original(b, w, e, temperature)
    assert not torch.equal(loss_and_gradients(tempered, batch)[0], loss_and_gradients(plain, batch)[0])
    assert set(calls) == {2.0}


def test_the_switches_are_checked():
    for negative in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="negative must be at least 0"):
            learner_of(CASES["dpo"], negative)
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        learner_of(CASES["dpo"], temperature=0.0)


def test_a_value_head_is_asked_for_and_has_its_own_rate():
    with pytest.raises(ConfigError, match="needs a value head"):
        build_preference_learner(TablePolicy(value_head=False), PPOConfig())
    learner = learner_of(PPOConfig(learning_rate=1e-3, value_learning_rate=1e-2))
    assert {name: group.learning_rate for name, group in learner.groups.items()} == {"policy": 1e-3, "value": 1e-2}


@pytest.mark.parametrize("case", ["reinforce/batch", "reinforce/ema", "rwr/batch", "rloo/plain", "ppo", "grpo/cispo"])
def test_statistics_of_a_batch_are_not_taken_over_a_part(case):
    config = CASES[case]
    with pytest.raises(ConfigError, match="over a whole batch"):
        learner_of(config).loss_preference(batch_of(config).part(0, 2), seeded())


def test_advantages_of_groups_may_be_computed_late():
    """Without `complete`, the loss computes them from what it sees; groups are never torn, so parts still agree."""
    for config in (RLOOConfig(), BestOfNConfig(), REINFORCEConfig()):
        learner, batch = learner_of(config), batch_of(config)
        expected, found = loss_and_gradients(learner, completed(config, batch)), loss_and_gradients(learner, batch)
        close([expected[0], *expected[1]], [found[0], *found[1]])
        pieces = [loss_and_gradients(learner, batch.part(k, 2))[0] for k in range(2)]
        close([expected[0]], [torch.stack(pieces).mean()])


def test_an_empty_completion_is_refused_when_the_buffer_is_drawn():
    batch = batch_of(CASES["dpo"])
    mask = batch.scored_mask.clone()
    mask[3] = 0
    with pytest.raises(DataError, match="completion 3: expected at least one scored token"):
        learner_of(CASES["dpo"]).complete(dataclasses.replace(batch, scored_mask=mask), {})


@every
def test_long_buffers_are_worked_in_chunks(config, monkeypatch):
    batch = batch_of(config)
    whole = bits(completed(config, batch))
    monkeypatch.setattr(base_module, "CHUNK", 4)
    chunked = bits(completed(config, batch))
    assert whole.keys() == chunked.keys()
    close([v.nan_to_num(7) for v in whole.values()], [v.nan_to_num(7) for v in chunked.values()])
