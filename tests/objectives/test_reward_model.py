"""Reward models: the loss by hand, limiting cases, TRL, invariances; one learns, is saved and loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steelyard.bench.winrate import logistic_regression
from steelyard.config import from_json, plain, to_json
from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError, NonFiniteError
from steelyard.nets.transformer import Transformer, TransformerConfig
from steelyard.objectives.reward_model import RewardModel, RewardModelConfig
from steelyard.rng import torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

TINY = TransformerConfig(vocab_size=11, width=16, layers=2, heads=2, context=24)
GENERATOR = torch_generator(0, "unused")


def heads() -> torch.Generator:
    return torch_generator(0, "head")


class Table(nn.Module):
    """A backbone whose hidden state at a token is that token's row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.width = table.shape[1]

    def final_states(self, batch: ExperienceBatch) -> Tensor:
        last = batch.lengths.long() - 1
        return self.table[batch.completions[torch.arange(len(batch)), last]]

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": (self.table,)}


def table_model(config: RewardModelConfig | None = None) -> RewardModel:
    """r = 2 for token 0, -1 for token 1, 0.5 for token 2."""
    model = RewardModel(config or RewardModelConfig(), Table(torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])), heads())
    with torch.no_grad():
        model.head.copy_(torch.tensor([2.0, -1.0]))
    return model


def table_batch(**fields: Tensor) -> ExperienceBatch:
    """Two prompts; pairs (token 0 over 1) and (token 1 over 2, after a first token that must not matter)."""
    return ExperienceBatch(
        prompts=torch.zeros(2, 1).long(),
        prompt_mask=torch.ones(2, 1),
        completions=torch.tensor([[0, 9], [1, 9], [0, 1], [0, 2]]),
        scored_mask=torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 1]]),
        prompt_of=torch.tensor([0, 0, 1, 1]),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        **fields,
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def random_batch(prompts: int = 4, group: int = 2, seed: int = 0) -> ExperienceBatch:
    """Ragged prompts and completions of `TINY`'s vocabulary; the first completion of a prompt is chosen."""
    g = torch_generator(seed, "batch")
    rows = prompts * group
    prompt_lengths = torch.randint(1, 6, (prompts, 1), generator=g)
    lengths = torch.randint(1, 8, (rows, 1), generator=g)
    first = torch.arange(0, rows, group)
    others = [torch.stack([first, first + k], 1) for k in range(1, group)]
    return ExperienceBatch(
        prompts=torch.randint(11, (prompts, 5), generator=g),
        prompt_mask=(torch.arange(5) >= 5 - prompt_lengths).float(),
        completions=torch.randint(11, (rows, 7), generator=g),
        scored_mask=(torch.arange(7) < lengths).float(),
        prompt_of=torch.arange(prompts).repeat_interleave(group),
        pairs=torch.cat(others),
        margins=torch.rand(prompts * (group - 1), generator=g),
    )


def tiny_model(config: RewardModelConfig | None = None, seed: int = 0) -> RewardModel:
    model = RewardModel(config or RewardModelConfig(), Transformer(TINY, torch_generator(seed, "init")), heads())
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)  # far from uniform, so that mistakes show
    return model


# ------------------------------------------------------------------------------------------------------- golden


def test_rewards_are_read_at_the_last_scored_token():
    assert table_model().score(table_batch()).tolist() == [2.0, -1.0, -1.0, 0.5]


def test_a_transformer_is_read_after_its_last_token():
    """Row by row without padding: the head on the last column's features."""
    model, batch = tiny_model(), random_batch(3, 2, seed=2)
    for row, reward in enumerate(model.score(batch)):
        prompt = int(batch.prompt_of[row])
        tokens = torch.cat([
            batch.prompts[prompt][batch.prompt_mask[prompt] > 0], batch.completions[row][batch.scored_mask[row] > 0]
        ])  # fmt: skip
        by_hand = model.backbone.features(tokens[None])[0, -1] @ model.head
        assert float(reward) == pytest.approx(float(by_hand.detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        # differences are 3 and -1.5
        ({}, {}, -(log_sigmoid(3) + log_sigmoid(-1.5)) / 2),
        ({"centre_weight": 0.1}, {}, -(log_sigmoid(3) + log_sigmoid(-1.5)) / 2 + 0.1 * (1.0 + 0.25) / 2),
        (
            {"label_smoothing": 0.2},
            {},
            -(0.8 * log_sigmoid(3) + 0.2 * log_sigmoid(-3) + 0.8 * log_sigmoid(-1.5) + 0.2 * log_sigmoid(1.5)) / 2,
        ),
        ({}, {"margins": torch.tensor([1.0, math.nan])}, -(log_sigmoid(2) + log_sigmoid(-1.5)) / 2),
        ({"margins": False}, {"margins": torch.tensor([1.0, 2.0])}, -(log_sigmoid(3) + log_sigmoid(-1.5)) / 2),
        ({}, {"pair_weights": torch.tensor([2.0, 0.0])}, -log_sigmoid(3)),
    ],
)
def test_the_loss_by_hand(config, fields, expected):
    model = table_model(RewardModelConfig(**config))
    loss, metrics = model.loss_reward(table_batch(**fields), GENERATOR)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert metrics["rewards/margins"].tolist() == [3.0, -1.5]
    assert not any(value.requires_grad for value in metrics.values())


def test_rows_by_hand():
    first, second = table_model().rows([table_batch()])
    assert first == {
        "episode": 0, "return": 3.0, "length": 1, "success": True, "score": 1.0,
        "chosen_reward": 2.0, "rejected_reward": -1.0, "length_difference": 0,
    }  # fmt: skip
    assert (second["return"], second["success"], second["length"]) == (-1.5, False, 2)
    ties = table_batch()
    tie = dataclasses.replace(ties, pairs=torch.tensor([[1, 2]]))
    assert [row["score"] for row in table_model().rows([tie])] == [0.5]


# ----------------------------------------------------------------------------------------------- limiting cases


def test_on_fixed_features_it_is_logistic_regression():
    """Frozen, without margin and centring: the optimum is that of logistic regression on feature differences."""
    g = torch_generator(1, "features")
    table = torch.randn(11, 3, generator=g)
    model = RewardModel(RewardModelConfig(frozen=True, head_learning_rate=0.05, margins=False), Table(table), g)
    batch = random_batch(40, 2, seed=3)
    states = model.backbone.final_states(batch)
    difference = (states[batch.pairs[:, 0]] - states[batch.pairs[:, 1]]).double().detach().numpy()
    optimizers = Optimizers(model, OptimConfig())
    for step in range(800):
        update(model, optimizers, batch, 0, step)
    # every row says "chosen wins": y = 1; the features are the differences, no intercept
    best = logistic_regression(difference, np.ones(40), np.ones((1, 40)))[0]
    np.testing.assert_allclose(model.head.detach().numpy(), best, atol=2e-3)
    assert not torch.equal(model.head, torch.zeros(3))


def test_frozen_trains_the_head_alone():
    model = tiny_model(RewardModelConfig(frozen=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(model.groups) == ["head"]
    update(model, Optimizers(model, OptimConfig()), random_batch(), 0, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head"}


def test_a_constant_shift_changes_the_loss_only_with_centring():
    batch = table_batch()
    for c, same in ((0.0, True), (0.1, False)):
        model = table_model(RewardModelConfig(centre_weight=c))
        first = float(model.loss_reward(batch, GENERATOR)[0].detach())
        with torch.no_grad():
            model.backbone.table += 3.0  # adds 3 (2 - 1) to every reward
        assert (float(model.loss_reward(batch, GENERATOR)[0].detach()) == pytest.approx(first)) is same


# -------------------------------------------------------------------------------------------------- invariances


@settings(max_examples=15, deadline=None)
@given(left=st.integers(0, 4), right=st.integers(0, 4), seed=st.integers(0, 50))
def test_padding_order_and_company_change_nothing(left, right, seed):
    model, batch = tiny_model(), random_batch(seed=seed)
    expected = model.score(batch)
    padded = dataclasses.replace(
        batch,
        prompts=nn.functional.pad(batch.prompts, (left, 0), value=7),
        prompt_mask=nn.functional.pad(batch.prompt_mask, (left, 0)),
        completions=nn.functional.pad(batch.completions, (0, right), value=3),
        scored_mask=nn.functional.pad(batch.scored_mask, (0, right)),
    )
    torch.testing.assert_close(model.score(padded), expected, atol=1e-5, rtol=1e-5)
    order = torch.randperm(4, generator=torch_generator(seed, "order"))
    shuffled = model.score(batch.of_prompts(order)).view(4, 2)
    torch.testing.assert_close(shuffled, expected.view(4, 2)[order], atol=1e-5, rtol=1e-5)
    alone = torch.cat([model.score(batch.of_prompts(torch.tensor([k]))) for k in range(4)])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_losses_of_parts_average_to_the_loss_of_the_whole(parts):
    model, batch = tiny_model(RewardModelConfig(centre_weight=0.05, label_smoothing=0.1)), random_batch(5, 3)
    whole = float(model.loss_reward(batch, GENERATOR)[0].detach())
    means = [float(model.loss_reward(batch.part(k, parts), GENERATOR)[0].detach()) for k in range(parts)]
    assert sum(means) / parts == pytest.approx(whole, rel=1e-5)


def test_what_is_behind_the_last_scored_token_changes_nothing():
    model, batch = tiny_model(), random_batch()
    noise = torch.where(batch.scored_mask > 0, batch.completions, 5)
    torch.testing.assert_close(model.score(dataclasses.replace(batch, completions=noise)), model.score(batch))


# ------------------------------------------------------------------------------------------------------ trained


def test_it_learns_what_is_preferred():
    """Chosen completions hold more of token 1; other prompts and completions are judged right, too."""

    def batch(seed):
        g = torch_generator(seed, "planted")
        completions = torch.randint(11, (64, 6), generator=g)
        count = (completions == 1).sum(1)
        pairs = torch.arange(64).view(32, 2)
        better = count[pairs[:, 0]] > count[pairs[:, 1]]
        pairs = torch.where(better[:, None], pairs, pairs.flip(1))[count[pairs[:, 0]] != count[pairs[:, 1]]]
        return ExperienceBatch(
            torch.randint(11, (32, 3), generator=g), torch.ones(32, 3), completions, torch.ones(64, 6),
            torch.arange(32).repeat_interleave(2), pairs=pairs,
        )  # fmt: skip

    model = RewardModel(RewardModelConfig(learning_rate=3e-3), Transformer(TINY, torch_generator(0, "init")), heads())
    held_out = [batch(seed) for seed in range(1000, 1005)]
    untrained = np.mean([row["success"] for row in model.rows(held_out)])
    optimizers = Optimizers(model, OptimConfig())
    for step in range(150):
        update(model, optimizers, batch(step), 0, step)
    assert untrained < 0.8
    assert np.mean([row["success"] for row in model.rows(held_out)]) > 0.95


def test_faults_are_one_sentence():
    with pytest.raises(ConfigError, match="pairs"):
        table_model().loss_reward(dataclasses.replace(table_batch(), pairs=None), GENERATOR)
    with pytest.raises(ConfigError, match="label_smoothing"):
        RewardModelConfig(label_smoothing=0.5)
    model = table_model()
    with torch.no_grad():
        model.head[0] = math.nan
    with pytest.raises(NonFiniteError, match="completion 0"):
        model.score(table_batch())
    fixed = Table(torch.ones(2, 2))
    fixed.trainable = dict
    with pytest.raises(ConfigError, match="frozen"):
        RewardModel(RewardModelConfig(), fixed, heads())


def test_the_config_is_read_back():
    config = RewardModelConfig(centre_weight=0.01, frozen=True)
    assert from_json(RewardModelConfig, to_json(config)) == config
    assert plain(config)["kind"] == "reward_model"


def test_the_page_runs():
    text = (Path(__file__).parents[2] / "docs/objectives/reward_model.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "range(200)" in code
    exec(compile(code.replace("range(200)", "range(3)"), "reward_model.md", "exec"), {"__name__": "page"})


# ---------------------------------------------------------------------------------------------------------- TRL


class Llama(nn.Module):
    """The body of a Hugging Face model as a backbone, rows padded on the right."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.width = body, body.config.hidden_size

    def final_states(self, batch: ExperienceBatch) -> Tensor:
        tokens = torch.cat([batch.prompts[batch.prompt_of], batch.completions], 1)
        hidden = self.body(input_ids=tokens).last_hidden_state
        return hidden[torch.arange(len(batch)), batch.prompts.shape[1] + batch.lengths.long() - 1]

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": tuple(self.body.parameters())}


@pytest.mark.lm
@pytest.mark.parametrize(("margins", "centre"), [(False, None), (True, 0.05)])
def test_loss_and_gradients_are_those_of_trl(margins, centre):
    pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from trl import RewardTrainer

    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=10, max_position_embeddings=32,
    )  # fmt: skip
    theirs = transformers.LlamaForSequenceClassification(settings).train()
    batch = random_batch(5, 2, seed=4)
    batch = dataclasses.replace(
        batch,
        prompts=batch.prompts.clamp(max=9),
        prompt_mask=torch.ones(5, 5),
        completions=torch.where(batch.scored_mask > 0, batch.completions.clamp(max=9), 10),
    )
    ours = RewardModel(RewardModelConfig(margins=margins, centre_weight=centre or 0.0), Llama(theirs.model), heads())
    with torch.no_grad():
        ours.head.copy_(theirs.score.weight[0])
    loss, _ = ours.loss_reward(batch, GENERATOR)
    ours_gradients = torch.autograd.grad(loss, [ours.head, *theirs.model.parameters()], allow_unused=True)

    order = torch.cat([batch.pairs[:, 0], batch.pairs[:, 1]])
    inputs = {
        "input_ids": torch.cat([batch.prompts[batch.prompt_of], batch.completions], 1)[order],
        "attention_mask": torch.cat([torch.ones(10, 5), batch.scored_mask], 1)[order].long(),
    }
    if margins:
        inputs["margin"] = batch.margins
    same = SimpleNamespace(
        model=theirs, args=SimpleNamespace(center_rewards_coefficient=centre), _tp_size=1, _total_train_tokens=0,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": {"num_tokens": [], **{k: [] for k in (
            "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}}},
    )  # fmt: skip
    trl_loss = RewardTrainer.compute_loss(same, theirs, inputs)
    trl_gradients = torch.autograd.grad(trl_loss, [theirs.score.weight, *theirs.model.parameters()], allow_unused=True)
    assert abs(float((loss - trl_loss).detach())) < 1e-6
    for mine, other in zip(ours_gradients, trl_gradients, strict=True):
        torch.testing.assert_close(mine, other.reshape(mine.shape), atol=1e-6, rtol=1e-5)
