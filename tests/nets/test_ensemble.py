"""Heads: values by hand, limiting cases, priors that nothing moves, scales, directions, identity."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from steelyard.config import from_json, to_json
from steelyard.errors import ConfigError, DataError
from steelyard.nets.ensemble import EnsembleHead, HeadsConfig

D = 6
TRAINED = ("linear", "mlp", "epinet", "vanilla")
FIXED = ("pca", "uniform", "gaussian")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int = 7, seed: int = 5) -> Tensor:
    return torch.randn(rows, D, generator=seeded(seed))


def head(outputs: int = 1, seed: int = 0, **fields) -> EnsembleHead:
    made = EnsembleHead(HeadsConfig(**({"num_heads": 4, "trunk": (5, 3)} | fields)), D, outputs, seeded(seed))
    if made.config.kind == "pca":
        made.set_directions(inputs(40, seed=9))
    return made


# ------------------------------------------------------------------------------------------------------- by hand


def test_linear_heads_by_hand():
    made = EnsembleHead(HeadsConfig(num_heads=2, pooled=False), 2, 1, seeded())
    with torch.no_grad():
        made.trained.weight0.copy_(torch.tensor([[[1.0, 2.0]], [[-1.0, 0.5]]]))
        made.trained.bias0.copy_(torch.tensor([[0.5], [-1.0]]))
    assert made(torch.tensor([[3.0, 1.0]])).tolist() == [[[5.5], [-3.5]]]
    made.scale.copy_(torch.tensor([2.0, 1.0]))
    weight, bias = made.linear()
    assert weight.tolist() == [[[0.5, 1.0]], [[-1.0, 0.5]]]
    assert bias.tolist() == [[0.25], [-1.0]]


def test_one_member_at_a_time_says_the_same():
    """Stacks of MLPs, head by head in plain numpy."""
    for kind in ("mlp", "vanilla"):
        made, x = head(outputs=3, kind=kind), inputs()
        layers = [[value.detach().numpy() for value in made.trained.layer(k)] for k in range(made.trained.depth)]
        assert len(layers) == (2 if kind == "mlp" else 3)
        for member in range(5):
            rows = x.numpy()
            for number, (weight, bias) in enumerate(layers):
                rows = rows @ weight[member].T + bias[member]
                rows = rows if number == len(layers) - 1 else np.maximum(rows, 0)
            np.testing.assert_allclose(made(x)[:, member].detach().numpy(), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prior", ["none", "mlp"])
def test_an_epinet_is_its_formula(prior):
    r"""\mu(\phi) + (s([\phi, z]) + beta s_P([\phi, z])) . z, index by index."""
    made, x = head(outputs=2, kind="epinet", prior=prior, prior_scale=0.7), inputs()

    def s(net, z):
        joined = torch.cat([x, z.expand(len(x), -1)], 1)
        hidden = torch.relu(joined @ torch.cat([net.of_features, net.of_index], 1).T + net.bias)
        return torch.einsum("bg,gcz,z->bc", hidden, net.output, z)

    mu = x @ made.trained.weight0[1].T + made.trained.bias0[1]
    members = made(x)
    torch.testing.assert_close(members[:, 0], x @ made.trained.weight0[0].T + made.trained.bias0[0])
    for k in range(4):
        expected = mu + s(made.epinet, made.epinet.indices[k])
        if prior == "mlp":
            expected = expected + 0.7 * made.prior.output_scale[k] * s(made.prior, made.epinet.indices[k])
        torch.testing.assert_close(members[:, k + 1], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("prior", ["none", "linear", "mlp"])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("outputs", [1, 3])
def test_shapes_linear_form_and_save(kind, prior, outputs):
    made, x = head(outputs, kind=kind, prior=prior), inputs()
    assert made.num_members == 5
    assert made(x).shape == (7, 5, outputs)
    made.fit_scale(made(x))
    found = made.linear()
    assert (found is not None) == (kind == "linear" and prior != "mlp")
    if found is not None:
        weight, bias = found
        torch.testing.assert_close(torch.einsum("bd,hcd->bhc", x, weight) + bias, made.standardise(made(x)))
    other = head(outputs, seed=1, kind=kind, prior=prior)
    assert not torch.equal(other(x), made(x))
    assert other.fingerprint() != made.fingerprint()
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(made.state_dict())), strict=True)
    assert torch.equal(other(x), made(x))
    assert other.fingerprint() == made.fingerprint()
    assert torch.equal(head(outputs, kind=kind, prior=prior)(x), made(x)), "not a function of the generator"


@pytest.mark.parametrize("kind", TRAINED)
def test_rows_and_autocast_change_nothing(kind):
    made, x = head(kind=kind, prior="mlp"), inputs()
    torch.testing.assert_close(torch.cat([made(row[None]) for row in x]), made(x), rtol=1e-4, atol=1e-5)
    expected = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), expected)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for kind in (*TRAINED, *FIXED):
        head(kind=kind, prior="none" if kind in FIXED else "mlp")
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------------- priors


@pytest.mark.parametrize("prior", ["linear", "mlp"])
@pytest.mark.parametrize("kind", TRAINED)
def test_priors_are_buffers_that_nothing_moves(kind, prior):
    made, x = head(kind=kind, prior=prior), inputs().requires_grad_()
    names = {name for name, _ in made.named_parameters()}
    assert not any(name.startswith("prior") for name in names)
    assert any(name.startswith("prior") for name, _ in made.named_buffers())
    trained, fixed = made.parts(x)
    assert not fixed.requires_grad
    assert torch.equal(made(x), trained + fixed)
    # the gradient to the features is that of the heads without priors
    (with_prior,) = torch.autograd.grad(made(x).sum(), x)
    (without,) = torch.autograd.grad(head(kind=kind)(x).sum(), x)
    torch.testing.assert_close(with_prior, without)


@pytest.mark.parametrize("prior", ["linear", "mlp"])
@pytest.mark.parametrize("kind", TRAINED)
def test_prior_scale_0_is_no_prior(kind, prior):
    assert torch.equal(head(kind=kind, prior=prior, prior_scale=0.0)(inputs()), head(kind=kind)(inputs()))


@pytest.mark.parametrize("prior", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["linear", "epinet"])
def test_the_unit_of_beta_is_the_priors_standard_deviation(kind, prior):
    made = head(outputs=2, kind=kind, prior=prior, prior_scale=3.0)
    _, fixed = made.parts(inputs(20_000))
    spread = fixed.std(0).square().mean(1).sqrt()
    assert float(spread[0]) == 0, "the pooled head has a prior"
    np.testing.assert_allclose(spread[1:], 3.0, rtol=0.15)


def test_an_epinet_stops_gradients_to_the_features():
    """What comes back to phi is the gradient of the pooled head and K times that of mu."""
    made, x = head(kind="epinet"), inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(made(x).sum(), x)
    pooled, mu = made.trained.weight0[:, 0].detach()
    torch.testing.assert_close(gradient, (pooled + 4 * mu).expand_as(gradient))


# ---------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("kind", FIXED)
def test_directions_come_with_both_signs(kind):
    made, x = head(kind=kind), inputs()
    members = made(x)
    assert members.shape == (7, 5, 1)
    assert torch.equal(members[:, 1:3], -members[:, 3:5])
    torch.testing.assert_close(made.directions.norm(dim=1), torch.ones(4))
    assert [name for name, _ in made.named_parameters()] == ["trained.weight0", "trained.bias0"]
    weight, bias = made.linear()
    torch.testing.assert_close(torch.einsum("bd,hcd->bhc", x, weight) + bias, members)
    assert made.trained_only(x).shape == (7, 1, 1)


def test_pca_finds_the_planted_axes_whatever_side_comes_first():
    g = seeded(3)
    differences = torch.randn(4_000, D, generator=g) * torch.tensor([0.1, 5.0, 0.1, 0.1, 2.0, 0.1])
    made = head(kind="pca")
    made.set_directions(differences)
    assert made.directions.abs().argmax(1).tolist() == [1, 4, 1, 4]
    assert (made.directions[:2].max(1).values > 0.99).all()
    again = head(kind="pca")
    again.set_directions(differences * torch.where(torch.rand(4_000, 1, generator=g) < 0.5, -1.0, 1.0))
    torch.testing.assert_close(again.directions, made.directions)


def test_directions_that_are_missing_raise():
    made = EnsembleHead(HeadsConfig(num_heads=4, kind="pca"), D, 1, seeded())
    with pytest.raises(ConfigError, match="set_directions"):
        made(inputs())
    with pytest.raises(ConfigError, match="set_directions"):
        made.linear()
    assert made.trained_only(inputs()).shape == (7, 1, 1)
    with pytest.raises(ConfigError, match="fewer than 2 directions"):
        made.set_directions(torch.ones(10, D))
    with pytest.raises(ConfigError, match="are trained"):
        head().set_directions(inputs())
    with pytest.raises(ConfigError, match="one output"):
        head(outputs=2, kind="uniform")


# ------------------------------------------------------------------------------------------------- standardising


def test_scales_by_hand():
    made = EnsembleHead(HeadsConfig(num_heads=3, pooled=False), D, 1, seeded())
    made.fit_scale(torch.tensor([[[3.0], [0.0], [1.0]], [[-4.0], [0.0], [1.0]]]))
    # root mean squares; a member that says nothing keeps 1
    np.testing.assert_allclose(made.scale, [math.sqrt(12.5), 1, 1], rtol=1e-6)
    swapped = replace(made.config)
    other = EnsembleHead(swapped, D, 1, seeded())
    other.fit_scale(torch.tensor([[[-3.0], [0.0], [1.0]], [[-4.0], [0.0], [-1.0]]]))
    assert torch.equal(other.scale, made.scale)
    logits = EnsembleHead(HeadsConfig(num_heads=1, pooled=False), D, 2, seeded())
    logits.fit_scale(torch.tensor([[[101.0, 99.0]], [[-5.0, -3.0]]]))
    assert logits.scale.tolist() == [1.0]
    with pytest.raises(DataError, match=r"\[N, 3, C\]"):
        made.fit_scale(torch.ones(2, 4, 1))


def test_variance_by_hand_leaves_the_scale():
    made = EnsembleHead(HeadsConfig(num_heads=2, pooled=False), D, 1, seeded())
    made.fit_variance(torch.tensor([[[1.0], [0.0]], [[3.0], [0.0]]]), torch.tensor([0.0, 1.0]))
    assert made.variance.tolist() == [2.5, 0.5]
    assert made.scale.tolist() == [1.0, 1.0]


def test_initial_scale_0_begins_at_0():
    for kind in TRAINED:
        assert (head(kind=kind, init_scale=0.0)(inputs()) == 0).all(), kind


def test_faults_are_one_sentence_and_the_config_is_read_back():
    for fields in ({"num_heads": 0}, {"prior_scale": -1.0}, {"kind": "pca", "num_heads": 3}, {"trunk": (4, 0)}):
        with pytest.raises(ConfigError, match=r"num_heads|prior_scale|trunk"):
            HeadsConfig(**fields)
    with pytest.raises(ConfigError, match="take no prior"):
        HeadsConfig(kind="gaussian", prior="linear")
    config = HeadsConfig(kind="vanilla", trunk=(8,), prior="mlp")
    assert from_json(HeadsConfig, to_json(config)) == config
