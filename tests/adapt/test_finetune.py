"""Baselines that train: by hand, against autograd, what they change and what they leave."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steelyard.adapt.base import Support
from steelyard.adapt.finetune import WIDE, FineTuneHead, NetworkUsers, fine_tune_network, fine_tune_users
from steelyard.adapt.losses import Likelihood
from steelyard.data.labelled import LabelledBatch, LabelledData
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.nets.backbones import Features, Trunk
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe

from .examples import TASKS, adapted


def test_one_step_by_hand():
    """Two pairs, first preferred, margin 0: the gradient is minus half the mean difference of features."""
    support = Support(np.zeros((2, 2, 1)), np.ones(2), np.array([[1.0, 0], [0, 2]]))
    found = adapted(FineTuneHead(1, 0.4), support)
    np.testing.assert_allclose(found.vector, [[0.1, 0.2]])
    np.testing.assert_array_equal(found.coefficients, [1, 0])
    other = adapted(FineTuneHead(1, 0.4, pooled=1), support)
    np.testing.assert_array_equal(other.coefficients, [0, 1])


@pytest.mark.parametrize("task", TASKS)
def test_it_is_gradient_descent_on_the_features_weights(task):
    rng = np.random.default_rng(0)
    c = 3 if task == "classification" else 1
    labels = {"preference": rng.random(6), "regression": rng.normal(size=6), "classification": rng.integers(0, c, 6)}
    support = Support(rng.normal(size=(6, 4, c)), labels[task], rng.normal(size=(6, 5)), rng.random(6))
    vector, likelihood = np.zeros((c, 5)), Likelihood(task)
    for _ in range(7):
        f = support.members[:, 0] + support.features @ vector.T
        slope = support.counts[:, None] * likelihood.gradient(f, support.labels)
        vector = vector - 0.3 * slope.T @ support.features / support.counts.sum()
    np.testing.assert_allclose(adapted(FineTuneHead(7, 0.3, task=task), support).vector, vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_many_users_in_one_pass_equal_one_user_at_a_time(task):
    rng = np.random.default_rng(1)
    c = 3 if task == "classification" else 1
    labels = {"preference": rng.random((4, 6)), "regression": rng.normal(size=(4, 6))}.get(task)
    labels = rng.integers(0, c, (4, 6)) if labels is None else labels
    start, features, counts = rng.normal(size=(4, 6, c)), rng.normal(size=(4, 6, 5)), rng.random((4, 6))
    path = fine_tune_users(Likelihood(task), start, labels, features, 0.3, (1, 7), counts)
    for steps, vectors in zip((1, 7), path, strict=True):
        for user in range(4):
            support = Support(start[user][:, None], labels[user], features[user], counts[user])
            alone = adapted(FineTuneHead(steps, 0.3, task=task), support).vector
            np.testing.assert_allclose(vectors[user], alone, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_is_refused():
    support = Support(np.zeros((2, 2, 1)), np.ones(2))
    with pytest.raises(DataError, match="features"):
        adapted(FineTuneHead(), support)
    with pytest.raises(ConfigError, match="one of 2 members"):
        FineTuneHead(pooled=2).begin(2)
    for values in ((0, 1.0), (1, 0.0), (1, np.inf)):
        with pytest.raises(ConfigError, match="steps must be at least 1 and learning_rate above 0"):
            FineTuneHead(*values)


def test_a_step_that_runs_away_says_so():
    features = np.random.default_rng(0).normal(size=(4, 3))
    support = Support(np.zeros((4, 1, 1)), np.ones(4), features)
    with pytest.raises(NonFiniteError, match="learning rate of 1000 runs away"):
        adapted(FineTuneHead(300, 1000.0, task="regression"), support)
    assert np.isfinite(adapted(FineTuneHead(300, 1000.0), support).vector).all()


def test_the_wide_grid_holds_more_than_the_equal_one():
    assert np.prod([len(values) for values in WIDE.values()]) > 50


def learner_and_batch(backbone=None, **settings):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(24, 4)), rng.normal(size=(24, 4))
    data = LabelledData(first, (first[:, 0] > second[:, 0]).astype(np.float32), other=second)
    generator = torch.Generator().manual_seed(0)
    config = EnsembleConfig(heads=HeadsConfig(num_heads=5, **settings))
    learner = HyRe(config, Trunk(4, (8,), generator) if backbone is None else backbone, generator)
    learner.fit_statistics(data.batches())
    learner.calibrate(data.batches())
    return learner, data.batch(range(5))


def state(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}


def loss_of(learner, batch):
    return float(learner.member_losses(learner.members(batch), batch.targets)[:, 0].mean())


@pytest.mark.parametrize("parts", ["head", "all"])
def test_the_copy_learns_and_the_original_stays(parts):
    learner, batch = learner_and_batch()
    before = state(learner)
    tuned = fine_tune_network(learner, batch, 30, 0.03, parts)
    assert not changed(before, state(learner))
    moved = changed(before, state(tuned))
    assert any(name.startswith("head.") for name in moved)
    assert any(name.startswith("backbone.") for name in moved) == (parts == "all")
    assert all(name.startswith(("head.trained", "backbone.")) for name in moved)
    assert loss_of(tuned, batch) < 0.7 * loss_of(learner, batch)
    others = (learner.head.trained.layer(0)[0][1:], tuned.head.trained.layer(0)[0][1:])
    assert torch.equal(*others)


def test_no_step_is_no_change_and_steps_repeat_themselves():
    learner, batch = learner_and_batch()
    assert not changed(state(learner), state(fine_tune_network(learner, batch, 0, 0.1)))
    one, other = (state(fine_tune_network(learner, batch, 5, 0.1)) for _ in range(2))
    assert not changed(one, other)


def test_networks_of_many_users_equal_one_network_at_a_time():
    learner, _ = learner_and_batch()
    rng = np.random.default_rng(2)
    first, second = (torch.from_numpy(rng.normal(size=(3, 5, 4)).astype(np.float32)) for _ in range(2))
    labels = torch.from_numpy(rng.integers(0, 2, (3, 5)).astype(np.float32))
    before, networks = state(learner), NetworkUsers(learner, 3)
    for steps in networks.steps(LabelledBatch(first, labels, second), 0.03, (1, 8)):
        outputs = networks.outputs(second, first)
        for user in range(3):
            own = LabelledBatch(first[user], labels[user], second[user])
            tuned = fine_tune_network(learner, own, steps, 0.03)
            mirrored = LabelledBatch(second[user], labels[user], first[user])
            torch.testing.assert_close(outputs[user], tuned.members(mirrored)[:, 0], rtol=1e-4, atol=1e-5)
    assert not changed(before, state(learner))
    with pytest.raises(NonFiniteError, match="runs away"):
        list(NetworkUsers(learner, 3).steps(LabelledBatch(first, labels, second), 1e30, (50,)))
    with pytest.raises(ConfigError, match="pooled head"):
        NetworkUsers(learner_and_batch(pooled=False)[0], 3)


def test_weights_of_examples_count():
    learner, batch = learner_and_batch()
    none = dataclasses.replace(batch, weights=torch.tensor([1.0, 1, 0, 0, 0]))
    two = dataclasses.replace(
        batch, inputs=batch.inputs[:2], other=batch.other[:2], targets=batch.targets[:2], numbers=batch.numbers[:2]
    )
    found, expected = (fine_tune_network(learner, b, 5, 0.1).members(batch) for b in (none, two))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_learner_may_be_fine_tuned_whole():
    learner, batch = learner_and_batch()
    learner.config = dataclasses.replace(learner.config, frozen=True)
    learner.backbone.requires_grad_(False)
    tuned = fine_tune_network(learner, batch, 3, 0.03)
    assert any(name.startswith("backbone.") for name in changed(state(learner), state(tuned)))
    assert not any(p.requires_grad for p in learner.backbone.parameters())


def test_what_cannot_be_fine_tuned():
    learner, batch = learner_and_batch(pooled=False)
    with pytest.raises(ConfigError, match="pooled"):
        fine_tune_network(learner, batch, 1, 0.1)
    learner, batch = learner_and_batch(Features(4))
    with pytest.raises(ConfigError, match="nothing to train"):
        fine_tune_network(learner, batch, 1, 0.1, "all")
    with pytest.raises(ConfigError, match="adapters"):
        fine_tune_network(learner, batch, 1, 0.1, "lora")
    with pytest.raises(NonFiniteError, match="runs away"):
        fine_tune_network(learner_and_batch()[0], batch, 50, 1e30)


@pytest.mark.lm
def test_adapters_alone_are_trained_and_the_model_is_shared():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from steelyard.data.experience import ExperienceBatch
    from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model

    generator = torch.Generator().manual_seed(0)
    config = LanguageModelConfig(name="tiny", adapter=LoRAConfig(rank=2), reference="none")
    learner = HyRe(EnsembleConfig(heads=HeadsConfig(num_heads=3)), load_language_model(config, generator), generator)
    tokens = torch.randint(3, 50, (4, 5), generator=generator)
    batch = ExperienceBatch(
        tokens[:2, :3],
        torch.ones(2, 3),
        tokens,
        torch.ones(4, 5),
        torch.tensor([0, 0, 1, 1]),
        pairs=torch.tensor([[0, 1], [2, 3]]),
    )
    learner.fit_statistics([batch])
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    tuned = fine_tune_network(learner, batch, 5, 0.01, "lora")
    after = dict(tuned.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora" in name for name in moved)
    originals = dict(learner.named_parameters())
    assert all(torch.equal(before[name], originals[name]) for name in before)
    assert all(after[name] is originals[name] for name in before if "lora" not in name)
    assert not torch.equal(tuned.members(batch)[:, 0], learner.members(batch)[:, 0])
