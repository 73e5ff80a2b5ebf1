"""Ensembles for re-weighting: losses and gradients by hand, limiting cases, shares, what conformance asks."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from steelyard.bench.winrate import logistic_regression
from steelyard.config import from_json, to_json
from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import LabelledBatch, LabelledData, token_rows
from steelyard.errors import ConfigError, DataError
from steelyard.nets.backbones import EncoderBackbone, Features, Trunk, trainable_of
from steelyard.nets.ensemble import HeadsConfig
from steelyard.nets.transformer import Transformer, TransformerConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe
from steelyard.objectives.reward_model import RewardModel, RewardModelConfig
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.workflows.heads import fit_heads

D, G, N = 3, 4, 48
UNUSED = torch.Generator()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(task: str = "preference", rows: int = N, seed: int = 0) -> LabelledData:
    """Group k likes feature 0, and by its number more or less of feature 1."""
    g = np.random.default_rng(seed)
    first, second = g.normal(size=(2, rows, D)) * 2 + 1
    groups = np.arange(rows) % G
    value = lambda x: x[:, 0] + (groups - 1.5) * x[:, 1]  # noqa: E731
    if task == "preference":
        return LabelledData(first, (value(first) > value(second)).astype(float), second, groups)
    targets = 10 * value(first) + 50 if task == "regression" else (value(first) > 0) + (value(first) > 2)
    return LabelledData(first, np.asarray(targets, float), groups=groups)


HEADS = HeadsConfig(num_heads=4, trunk=(5,))
CASES = {
    "all": EnsembleConfig(heads=dataclasses.replace(HEADS, prior="mlp")),
    "bootstrap": EnsembleConfig(heads=HEADS, shares="bootstrap"),
    "groups": EnsembleConfig(heads=HEADS, shares="groups"),
    "one_group": EnsembleConfig(heads=HEADS, shares="one_group", l2=0.1),
    "mixture": EnsembleConfig(heads=HEADS, loss="mixture", entropy_weight=0.1),
    "mlp": EnsembleConfig(heads=dataclasses.replace(HEADS, kind="mlp")),
    "epinet": EnsembleConfig(heads=dataclasses.replace(HEADS, kind="epinet", prior="mlp")),
    "vanilla": EnsembleConfig(heads=dataclasses.replace(HEADS, kind="vanilla"), frozen=True),
    "gaussian": EnsembleConfig(heads=dataclasses.replace(HEADS, kind="gaussian")),
    "regression": EnsembleConfig(heads=HEADS, task="regression", shares="groups"),
    "likelihood": EnsembleConfig(heads=HEADS, task="regression", noise_model="gaussian"),
    "classification": EnsembleConfig(heads=HEADS, task="classification"),
    "frozen": EnsembleConfig(heads=HEADS, frozen=True),
}


def build(config: EnsembleConfig, seed: int = 0, trunk: bool = True) -> HyRe:
    g = seeded(seed)
    backbone = Trunk(D, (6, 5), g) if trunk else Features(D)
    learner = HyRe(config, backbone, g, 3 if config.task == "classification" else 1)
    examples = data(config.task)
    learner.fit_statistics(examples.batches(), examples.group_counts)
    return learner


def by_hand(config: EnsembleConfig, weights: list[list[float]], biases: list[float] | None = None) -> HyRe:
    """Linear members with the given weights [H][D] on inputs as they are."""
    learner = HyRe(config, Features(len(weights[0])), seeded())
    for name, value in (("mean", 0.0), ("spread", 1.0), ("target_mean", 0.0), ("target_spread", 1.0)):
        getattr(learner, name).fill_(value)
    with torch.no_grad():
        learner.head.trained.weight0.copy_(torch.tensor(weights)[:, None])
        learner.head.trained.bias0.copy_(torch.tensor(biases or [0.0] * len(weights))[:, None])
    return learner


def loss_and_gradients(learner: HyRe, batch: LabelledBatch | ExperienceBatch) -> tuple[Tensor, list[Tensor]]:
    loss, _ = learner.loss_heads(batch, UNUSED)
    parameters = [p for group in learner.groups.values() for p in group.parameters]
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------------- by hand


def test_preferences_by_hand():
    """Two members, two pairs, one soft label, weights 1 and 3: loss and gradient."""
    learner = by_hand(EnsembleConfig(heads=HeadsConfig(num_heads=2, pooled=False)), [[1.0, 0.0], [-2.0, 1.0]])
    batch = LabelledBatch(
        torch.tensor([[2.0, 1.0], [0.0, 0.0]]),
        torch.tensor([1.0, 0.25]),
        torch.tensor([[1.0, 1.0], [0.5, 2.0]]),
        weights=torch.tensor([1.0, 3.0]),
    )
    margins = [[1.0, -0.5], [-2.0, -1.0]]  # member, pair
    expected, gradient = 0.0, np.zeros((2, 2))
    for k in range(2):
        for m, y, w, d in zip(margins[k], (1, 0.25), (1, 3), ((1.0, 0.0), (-0.5, -2.0)), strict=True):
            expected -= w * (y * math.log(sigmoid(m)) + (1 - y) * math.log(sigmoid(-m))) / 4
            gradient[k] += w * (sigmoid(m) - y) * np.array(d) / 4
    loss, gradients = loss_and_gradients(learner, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradients[0][:, 0], gradient, rtol=1e-4)
    assert float(gradients[1].abs().max()) < 1e-6, "a bias says nothing of pairs"
    assert learner.members(batch)[:, :, 0].tolist() == [[1.0, -2.0], [-0.5, -1.0]]


def test_regression_by_hand():
    config = EnsembleConfig(task="regression", heads=HeadsConfig(num_heads=1))
    batch = LabelledBatch(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0]))
    learner = by_hand(config, [[2.0], [0.0]], [1.0, 4.0])
    assert float(loss_and_gradients(learner, batch)[0]) == pytest.approx((0 + (1 + 1) / 2) / 2)
    # members speak in the targets' units, whatever they were standardised by
    learner.target_mean.fill_(4.0)
    learner.target_spread.fill_(2.0)
    assert float(loss_and_gradients(learner, batch)[0]) == pytest.approx((3.5**2 + 4.5**2 + 4.5**2 + 3.5**2) / 4)
    assert learner.members(batch)[:, :, 0].tolist() == [[10.0, 12.0], [14.0, 12.0]]
    weight, bias = learner.linear()
    torch.testing.assert_close(batch.inputs * weight[:, 0, 0] + bias[:, 0], learner.members(batch)[:, :, 0])
    learner.calibrate([batch])
    assert learner.head.scale.tolist() == [1.0, 1.0]
    assert learner.head.variance.tolist() == [(49 + 81) / 2, (81 + 49) / 2]


def test_a_gaussian_likelihood_by_hand():
    config = EnsembleConfig(task="regression", noise_model="gaussian", heads=HeadsConfig(num_heads=1, pooled=False))
    learner = by_hand(config, [[0.0]])
    with torch.no_grad():
        learner.log_variance.fill_(math.log(2.0))
    loss, gradients = loss_and_gradients(learner, LabelledBatch(torch.tensor([[1.0]]), torch.tensor([3.0])))
    assert float(loss) == pytest.approx(9 / 4 + math.log(2) / 2)
    assert float(gradients[-1]) == pytest.approx(-9 / 4 + 1 / 2)


def test_classification_by_hand():
    learner = HyRe(EnsembleConfig(task="classification", heads=HeadsConfig(num_heads=1)), Features(1), seeded(), 3)
    learner.mean.fill_(0.0)
    learner.spread.fill_(1.0)
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    with torch.no_grad():
        learner.head.trained.weight0.copy_(logits[:, :, None])
    loss, _ = loss_and_gradients(learner, LabelledBatch(torch.tensor([[2.0]]), torch.tensor([1.0])))
    expected = [math.log(sum(math.exp(2 * z) for z in row)) - 2 * row[1] for row in logits.tolist()]
    assert float(loss) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_the_mixture_by_hand():
    config = EnsembleConfig(loss="mixture", entropy_weight=0.2, heads=HeadsConfig(num_heads=2))
    learner = by_hand(config, [[0.5], [1.0], [-2.0]])
    batch = LabelledBatch(torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([[1.0]]))
    pooled, entropy = -math.log(sigmoid(0.5)), math.log(2)
    expected = -math.log((sigmoid(1) + sigmoid(-2)) / 2) - 0.2 * entropy + pooled
    assert float(loss_and_gradients(learner, batch)[0]) == pytest.approx(expected, rel=1e-5)
    # a gate that reads the pair: logits 1.5 and 0 at the middle of 2 and 1
    output = learner.gate.layers[-1]
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[1.0], [0.0]]))
    g = sigmoid(1.5)
    entropy = -g * math.log(g) - (1 - g) * math.log(1 - g)
    expected = -math.log(g * sigmoid(1) + (1 - g) * sigmoid(-2)) - 0.2 * entropy + pooled
    assert float(loss_and_gradients(learner, batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_l2_by_hand():
    plain = EnsembleConfig(heads=HeadsConfig(num_heads=2, pooled=False))
    weights, batch = [[1.0, 0.0], [-2.0, 1.0]], LabelledBatch(torch.ones(1, 2), torch.ones(1), torch.zeros(1, 2))
    bare, _ = loss_and_gradients(by_hand(plain, weights), batch)
    loss, _ = loss_and_gradients(by_hand(dataclasses.replace(plain, l2=0.3), weights), batch)
    assert float(loss - bare) == pytest.approx(0.15 * (1 + 5) / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------- limiting cases


class Table(nn.Module):
    """A language model whose hidden state at a token is that token's row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.width = table.shape[1]

    def final_states(self, batch: ExperienceBatch) -> Tensor:
        return self.table[batch.completions[:, 0]]

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": (self.table,)}


def completions(rows: int = 16, **fields) -> ExperienceBatch:
    tokens = torch.randint(11, (rows, 1), generator=seeded(4))
    number = torch.arange(rows // 2)
    return ExperienceBatch(
        torch.zeros(rows // 2, 1).long(), torch.ones(rows // 2, 1), tokens, torch.ones(rows, 1),
        number.repeat_interleave(2), pairs=torch.arange(rows).view(-1, 2), **fields,
    )  # fmt: skip


@pytest.mark.parametrize("transformer", [False, True])
def test_one_head_without_prior_is_a_reward_model(transformer):
    """Same loss and gradients, of the head and of the backbone."""
    tiny = TransformerConfig(vocab_size=11, width=8, layers=1, heads=2, context=8)
    table = torch.randn(11, 8, generator=seeded(2))
    backbone = Transformer(tiny, seeded()) if transformer else Table(table)
    theirs = RewardModel(RewardModelConfig(margins=False), backbone, seeded(1))
    config = EnsembleConfig(heads=HeadsConfig(num_heads=1, pooled=False))
    ours = HyRe(config, backbone, seeded(1))
    ours.mean.fill_(0.0)
    ours.spread.fill_(1.0)
    with torch.no_grad():
        ours.head.trained.weight0.copy_(theirs.head[None, None])
    batch = completions(pair_weights=torch.rand(8, generator=seeded(3)))
    mine, their = ours.loss_heads(batch, UNUSED)[0], theirs.loss_reward(batch, UNUSED)[0]
    torch.testing.assert_close(mine, their)
    heads = [ours.head.trained.weight0, theirs.head]
    for loss, parameter in ((mine, heads[0]), (their, heads[1])):
        assert torch.autograd.grad(loss, parameter, retain_graph=True)[0].abs().sum() > 0
    gradients = [torch.autograd.grad(loss, [h, *backbone.parameters()], allow_unused=True, retain_graph=True)
                 for loss, h in zip((mine, their), heads, strict=True)]  # fmt: skip
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-4, atol=1e-6)
    # and in parts, as processes share a batch
    parts = [float(ours.loss_heads(batch.part(k, 3), UNUSED)[0].detach()) for k in range(3)]
    assert sum(parts) / 3 == pytest.approx(float(mine.detach()), rel=1e-5)


def test_one_head_on_fixed_features_is_logistic_regression():
    """The optimum of every user head is that of a penalised logistic regression on the user's own pairs."""
    optimize = pytest.importorskip("scipy.optimize")
    g = np.random.default_rng(1)
    first, second = g.normal(size=(2, 80, D))
    groups = np.arange(80) % 2
    margin = (first - second) @ np.array([[1.0, -1, 0], [0, 1, 1]]).T
    wins = (g.random(80) < 1 / (1 + np.exp(-margin[np.arange(80), groups]))).astype(float)
    examples = LabelledData(first, wins, second, groups)
    config = EnsembleConfig(
        heads=HeadsConfig(num_heads=2, init_scale=0.0), shares="one_group", l2=0.2, head_learning_rate=0.03
    )
    learner = HyRe(config, Features(D), seeded())
    learner.fit_statistics(examples.batches(), examples.group_counts)
    optimizers = Optimizers(learner, OptimConfig())
    for step in range(700):
        update(learner, optimizers, examples.batch(), 0, step)
    scale = learner.spread.double().numpy()
    difference = (examples.other - examples.inputs).astype(float) / -scale
    for member, rows in enumerate((groups >= 0, groups == 0, groups == 1)):
        x, y = difference[rows], wins[rows]
        target = lambda w, x=x, y=y: np.mean(np.logaddexp(0, x @ w) - y * (x @ w)) + 0.1 * w @ w  # noqa: E731
        best = optimize.minimize(target, np.zeros(D)).x
        found = learner.head.trained.weight0[member, 0].detach().numpy()
        np.testing.assert_allclose(found, best, atol=5e-3)
        free = logistic_regression(x, y, np.ones((1, len(y))))[0]
        assert np.abs(free - best).max() > 0.05, "the penalty does nothing here"


def test_copies_of_one_head_are_the_head():
    """K equal heads: loss, gradients of the trunk and every update are those of one."""
    one = build(EnsembleConfig(heads=HeadsConfig(num_heads=1, pooled=False)))
    many = build(EnsembleConfig(heads=HeadsConfig(num_heads=5, pooled=False)))
    many.backbone.load_state_dict(one.backbone.state_dict())
    with torch.no_grad():
        many.head.trained.weight0.copy_(one.head.trained.weight0.expand(5, -1, -1))
    optimizers = [Optimizers(x, OptimConfig()) for x in (one, many)]
    for step in range(5):
        for learner, optimizer in zip((one, many), optimizers, strict=True):
            update(learner, optimizer, data().batch(), 0, step)
        batch = data(seed=1).batch()
        torch.testing.assert_close(many.members(batch), one.members(batch).expand(-1, 5, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shares", ["bootstrap", "groups"])
def test_a_share_of_1_is_all(shares):
    config = EnsembleConfig(heads=HEADS)
    loss, gradients = loss_and_gradients(build(config), data().batch())
    other, others = loss_and_gradients(build(dataclasses.replace(config, shares=shares, share=1.0)), data().batch())
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-7)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("task", ["preference", "regression", "classification"])
def test_the_gradient_of_the_mean_loss_is_the_mean_of_gradients(task):
    """Not the loss of the mean, whose gradient in the trunk is another."""
    learner = build(EnsembleConfig(heads=HEADS, task=task))
    batch = data(task).batch()
    examples = learner.examples(batch)
    members = examples.members(learner.head)
    trunk = list(learner.backbone.parameters())
    each = [
        torch.autograd.grad(loss, trunk, retain_graph=True)
        for loss in learner.member_losses(members, examples.targets).mean(0)
    ]
    mean = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
    whole = torch.autograd.grad(learner.loss_heads(batch, UNUSED)[0], trunk)
    of_mean = torch.autograd.grad(
        learner.member_losses(members.mean(1, keepdim=True), examples.targets).mean(), trunk, allow_unused=True
    )
    for a, b, c in zip(whole, mean, of_mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(a, c, rtol=1e-2, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("shares", ["bootstrap", "groups", "one_group"])
def test_members_learn_from_what_they_see_only(shares):
    """The gradient of a member is that of the mean loss over its own rows; the pooled one sees everything."""
    config = EnsembleConfig(heads=HEADS, shares=shares, share=0.5)
    learner = build(config, trunk=False)
    examples = data(rows=40)  # 10 of each group
    learner.set_groups(examples.group_counts)
    seen = learner.seen(learner.examples(examples.batch()))
    assert (seen[:, 0] == 1).all()
    if shares == "one_group":
        assert torch.equal(seen[:, 1:] > 0, torch.arange(4) == torch.from_numpy(examples.groups)[:, None])
    if shares == "groups":
        for row in (seen[:, 1:] > 0).T:
            assert len(set(examples.groups[row.numpy()])) == 2
            assert int(row.sum()) == 20
    plain = build(EnsembleConfig(heads=HEADS), trunk=False)
    plain.load_state_dict(learner.state_dict())
    ours = loss_and_gradients(learner, examples.batch())[1][0]
    for member in range(5):
        rows = (seen[:, member] > 0).numpy()
        theirs = loss_and_gradients(plain, examples.take(rows).batch())[1][0]
        factor = rows.mean() / 0.5 if shares == "bootstrap" and member else 1.0
        torch.testing.assert_close(ours[member], theirs[member] * factor, rtol=1e-4, atol=1e-6)
    # small batches are unbiased: their mean is the whole
    parts = [loss_and_gradients(learner, examples.batch(np.arange(k, 40, 8)))[1][0] for k in range(8)]
    torch.testing.assert_close(torch.stack(parts).mean(0), ours, rtol=1e-4, atol=1e-6)


def test_shares_survive_order_epochs_and_a_resume():
    for shares in ("bootstrap", "groups"):
        first, second = (build(EnsembleConfig(heads=HEADS, shares=shares), seed) for seed in (0, 1))
        batch, order = data().batch(), np.random.default_rng(0).permutation(N)
        seen = first.seen(first.examples(batch))
        shuffled = first.seen(first.examples(data().batch(order)))
        assert torch.equal(shuffled, seen[torch.from_numpy(order)])
        assert not torch.equal(second.seen(second.examples(batch)), seen)
        second.load_state_dict(first.state_dict())
        assert torch.equal(second.seen(second.examples(batch)), seen)


def test_a_bootstrap_has_the_share_that_was_asked_for():
    config = EnsembleConfig(heads=HeadsConfig(num_heads=50), shares="bootstrap", share=0.3)
    learner = build(config)
    seen = learner.seen(SimpleNamespace(numbers=torch.arange(4000), groups=None))[:, 1:] > 0
    assert float(seen.float().mean()) == pytest.approx(0.3, abs=0.01)
    correlation = np.corrcoef(seen.numpy().T)
    assert np.abs(correlation[~np.eye(50, dtype=bool)]).max() < 0.08, "members see the same rows"


# ---------------------------------------------------------------------------------------------------- conformance


@pytest.fixture(params=CASES)
def config(request) -> EnsembleConfig:
    return CASES[request.param]


def test_plan_groups_and_gradients(config):
    """A step changes every group, nothing else, and neither priors nor statistics; metrics are detached."""
    learner, batch = build(config), data(config.task).batch()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    loss, metrics = learner.loss_heads(batch, UNUSED)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert {name.split("/")[0] for name in metrics} == {"loss", "adapt"}
    assert not any(value.requires_grad for value in metrics.values())
    assert ("backbone" in learner.groups) == (not config.frozen)
    update(learner, Optimizers(learner, OptimConfig()), batch, 0, 0)
    after = learner.state_dict()
    changed = {name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
    named = dict(learner.named_parameters())
    own = {id(p) for group in learner.groups.values() for p in group.parameters}
    assert changed <= {name for name, p in named.items() if id(p) in own}
    for group in learner.groups.values():
        assert {id(named[name]) for name in changed} & {id(p) for p in group.parameters}


def test_randomness_resume_and_saving(config):
    """k updates are j, save, load and k - j more, bit for bit; no global random number is drawn."""

    def run(learner, optimizers, first, stop):
        for step in range(first, stop):
            update(learner, optimizers, data(config.task).batch(np.arange(step, N, 3)), 0, step)

    before = torch.get_rng_state()
    whole = build(config)
    run(whole, Optimizers(whole, OptimConfig()), 0, 5)
    assert torch.equal(torch.get_rng_state(), before)
    first = build(config)
    optimizers = Optimizers(first, OptimConfig())
    run(first, optimizers, 0, 2)
    second = build(config, seed=1)
    second.load_state_dict(safetensors.torch.load(safetensors.torch.save(first.state_dict())), strict=True)
    again = Optimizers(second, OptimConfig())
    again.load_state_tensors({name: value.clone() for name, value in optimizers.state_tensors().items()})
    run(second, again, 2, 5)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    batch = data(config.task).batch()
    assert torch.equal(whole.members(batch), second.members(batch))


def test_row_order_and_halves_change_nothing(config):
    learner, examples = build(config), data(config.task)
    loss, gradients = loss_and_gradients(learner, examples.batch())
    order = np.random.default_rng(0).permutation(N)
    halves = [loss_and_gradients(learner, examples.batch(rows)) for rows in np.split(order, 2)]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss, rtol=1e-5, atol=1e-6)
    for a, b, c in zip(gradients, halves[0][1], halves[1][1], strict=True):
        torch.testing.assert_close((b + c) / 2, a, rtol=1e-4, atol=1e-6)


def test_what_adaptation_gets(config):
    """Standardised members, features they are functions of, labels; margins of swapped pairs change their sign."""
    learner, examples = build(config), data(config.task)
    learner.calibrate(examples.batches(10))
    batch = examples.batch()
    support = learner.support(batch)
    assert support.members.shape == (N, 5, 3 if config.task == "classification" else 1)
    assert support.members.dtype == np.float64
    np.testing.assert_array_equal(support.labels, examples.targets)
    if config.task == "preference":
        np.testing.assert_allclose((support.members**2).mean((0, 2)), 1, rtol=1e-4)
        swapped = learner.members(dataclasses.replace(batch, inputs=batch.other, other=batch.inputs))
        torch.testing.assert_close(swapped, -learner.members(batch), rtol=1e-4, atol=1e-5)
        first, second = (learner.of_features(learner.features(LabelledBatch(side, batch.targets)))
                         for side in (batch.inputs, batch.other))  # fmt: skip
        np.testing.assert_allclose(support.members, (first - second).numpy(), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(support.members, learner.of_features(learner.features(batch)).numpy(), rtol=1e-4)
    linear = learner.linear()
    if linear is not None:
        weight, bias = (x.double().numpy() for x in linear)
        constant = 0 if config.task == "preference" else bias
        found = np.einsum("nd,hcd->nhc", support.features, weight) + constant
        np.testing.assert_allclose(found, support.members, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------- backbones and faults


def test_user_heads_learn_what_users_like():
    train, test = data(rows=800), data(rows=400, seed=5)
    config = EnsembleConfig(heads=HeadsConfig(num_heads=G, init_scale=0.0), shares="one_group", head_learning_rate=0.05)
    learner = fit_heads(HyRe(config, Features(D), seeded()), train, 150, 200, seed=0)
    right = (learner.support(test.batch()).members[:, :, 0] > 0) == (test.targets > 0.5)[:, None]
    own = right[np.arange(400), 1 + test.groups].mean()
    assert own > 0.93
    assert right[:, 0].mean() < own - 0.1


def test_pca_heads_after_training():
    config = EnsembleConfig(heads=HeadsConfig(num_heads=6, kind="pca"))
    learner = fit_heads(HyRe(config, Features(D), seeded()), data(), 0, 16, seed=0)
    assert learner.members(data().batch()).shape == (N, 7, 1)


class Words(nn.Module):
    """Stands for an `Encoder`: the mean of the tokens' rows, with a pooler that nothing reads, as BERT has."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.table = nn.Parameter(torch.randn(11, 4, generator=seeded(6)))
        self.network.pooler = nn.Module()
        self.network.pooler.unread = nn.Parameter(torch.zeros(4))
        self.width = 4

    def states(self, rows):
        return torch.stack([self.network.table[ids[begin:]].mean(0) for ids, begin in rows])


@pytest.mark.parametrize("frozen", [True, False])
def test_an_encoder_on_token_rows(frozen):
    rows = [([1, 2, 3], 1), ([4, 5], 0), ([6, 7, 8, 9], 2), ([10], 0)]
    inputs = token_rows(rows)
    examples = LabelledData(inputs[:2], np.array([1.0, 0.0]), inputs[2:])
    config = EnsembleConfig(heads=HEADS, frozen=frozen)
    encoder = Words()
    learner = HyRe(config, EncoderBackbone(encoder), seeded())
    learner.fit_statistics(examples.batches())
    np.testing.assert_allclose(learner.mean, encoder.states(rows).mean(0).detach(), rtol=1e-4, atol=1e-6)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    update(learner, Optimizers(learner, OptimConfig()), examples.batch(), 0, 0)
    moved = not torch.equal(before["backbone.encoder.network.table"], encoder.network.table)
    assert moved is not frozen
    assert len(trainable_of(learner.backbone)) == (0 if frozen else 1)
    single = examples.batch([0])
    assert single.inputs.shape == (1, 4)
    torch.testing.assert_close(learner.members(single), learner.members(examples.batch())[:1])


def test_groups_of_completions():
    config = EnsembleConfig(heads=HeadsConfig(num_heads=4), shares="one_group", frozen=True)
    learner = HyRe(config, Table(torch.randn(11, 3, generator=seeded(2))), seeded())
    groups = torch.arange(8) % 4
    batch = completions(groups=groups)
    learner.fit_statistics([batch], torch.bincount(groups))
    assert torch.equal(learner.seen(learner.examples(batch))[:, 1:] > 0, torch.arange(4) == groups[:, None])
    assert learner.features(batch).shape == (16, 3)
    np.testing.assert_allclose(learner.features(batch).mean(0), 0, atol=1e-5)


def test_common_scaling_keeps_proportions():
    examples = data()
    learner = HyRe(EnsembleConfig(heads=HEADS, scaling="common"), Features(D), seeded())
    learner.fit_statistics(examples.batches())
    both = np.concatenate([examples.inputs, examples.other])
    np.testing.assert_allclose(learner.spread, np.full(D, np.sqrt(both.var(0).mean())), rtol=1e-4)


def test_faults_are_one_sentence():
    batch = data().batch()
    bare = HyRe(EnsembleConfig(heads=HEADS), Features(D), seeded())
    for call in (lambda: bare.loss_heads(batch, UNUSED), lambda: bare.members(batch), lambda: bare.features(batch)):
        with pytest.raises(ConfigError, match="statistics of the features are missing"):
            call()
    ready = build(EnsembleConfig(heads=HEADS, shares="groups"))
    with pytest.raises(DataError, match="groups"):
        ready.loss_heads(dataclasses.replace(batch, groups=None), UNUSED)
    with pytest.raises(DataError, match="numbers"):
        build(CASES["bootstrap"]).loss_heads(dataclasses.replace(batch, numbers=None), UNUSED)
    with pytest.raises(DataError, match="second one"):
        build(CASES["all"]).loss_heads(dataclasses.replace(batch, other=None), UNUSED)
    with pytest.raises(ConfigError, match="4 groups, found num_heads 3"):
        build(EnsembleConfig(heads=HeadsConfig(num_heads=3), shares="one_group"))
    with pytest.raises(ConfigError, match="set frozen"):
        build(dataclasses.replace(CASES["vanilla"], frozen=False))
    with pytest.raises(ConfigError, match="one output"):
        HyRe(EnsembleConfig(), Features(D), seeded(), 3)
    with pytest.raises(ConfigError, match="batch of completions"):
        ready.members(completions())
    with pytest.raises(ConfigError, match="ExperienceBatch"):
        HyRe(EnsembleConfig(heads=HEADS), Table(torch.ones(2, 3)), seeded()).members(batch)
    with pytest.raises(ConfigError, match="mixture"):
        EnsembleConfig(loss="mixture", shares="groups")
    for fields in ({"share": 0.0}, {"share": 1.5}, {"l2": -1.0}):
        with pytest.raises(ConfigError, match=r"share|l2"):
            EnsembleConfig(**fields)
    with pytest.raises(DataError, match="targets of row 1 is not finite"):
        LabelledData(np.zeros((2, 1)), np.array([0.0, np.nan]))
    with pytest.raises(DataError, match="groups has shape"):
        LabelledData(np.zeros((2, 1)), np.zeros(2), groups=np.zeros(3, np.int64))


def test_the_config_is_read_back():
    for config in CASES.values():
        assert from_json(EnsembleConfig, to_json(config)) == config


def test_swapping_the_sides_and_the_label_changes_no_loss():
    for name in ("all", "groups", "mixture"):
        learner, batch = build(CASES[name]), data().batch()
        other = dataclasses.replace(batch, inputs=batch.other, other=batch.inputs, targets=1 - batch.targets)
        torch.testing.assert_close(loss_and_gradients(learner, other)[0], loss_and_gradients(learner, batch)[0])


def test_a_likelihood_is_stable_at_large_margins():
    learner = by_hand(EnsembleConfig(heads=HeadsConfig(num_heads=1, pooled=False)), [[1e4]])
    for target, expected in ((1.0, 0.0), (0.0, 1e4)):
        batch = LabelledBatch(torch.ones(1, 1), torch.tensor([target]), torch.zeros(1, 1))
        loss, gradients = loss_and_gradients(learner, batch)
        assert float(loss) == pytest.approx(expected)
        assert torch.isfinite(gradients[0]).all()
