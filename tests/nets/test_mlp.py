import itertools
import math

import pytest
import torch
from torch import nn

from steelyard.nets.mlp import MLP, EnsembleLinear, orthogonal_


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_layers(net: MLP) -> list[nn.Linear]:
    return [layer for layer in net.layers if isinstance(layer, nn.Linear)]


def test_initialisation():
    net = MLP(4, (6, 6), 2, seeded(), last_gain=0.01)
    first, second, last = linear_layers(net)
    for layer in (first, second, last):
        assert not layer.bias.any()
    # orthogonal columns of length sqrt(2); the output layer's rows have length 0.01
    torch.testing.assert_close(first.weight.T @ first.weight, 2 * torch.eye(4))
    torch.testing.assert_close(second.weight.T @ second.weight, 2 * torch.eye(6))
    torch.testing.assert_close(last.weight @ last.weight.T, 0.01**2 * torch.eye(2))


def test_weights_come_from_the_generator_only():
    before = torch.get_rng_state()
    a, b, c = MLP(3, (5,), 2, seeded(1)), MLP(3, (5,), 2, seeded(1)), MLP(3, (5,), 2, seeded(2))
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, r)
    assert torch.equal(torch.get_rng_state(), before)


def test_by_hand():
    net = MLP(2, (2,), 1, seeded())
    hidden, output = linear_layers(net)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
        hidden.bias.copy_(torch.tensor([0.5, 0.0]))
        output.weight.copy_(torch.tensor([[2.0, 10.0]]))
        output.bias.fill_(1.0)
    # x = (1, 1): hidden (3.5, 0) -> 8; x = (-1, 2): hidden (3.5, 3) -> 38; x = (0, -1): relu(-1.5), relu(-1) -> 1
    x = torch.tensor([[1.0, 1.0], [-1.0, 2.0], [0.0, -1.0]])
    assert net(x).flatten().tolist() == [8.0, 38.0, 1.0]
    assert net(x.expand(4, 3, 2)).shape == (4, 3, 1)


def test_without_hidden_layers_it_is_linear():
    net = MLP(3, (), 2, seeded())
    assert len(net.layers) == 1
    x, y = torch.randn(2, 5, 3, generator=seeded())
    torch.testing.assert_close(net(x + y), net(x) + net(y))


def test_layer_norm_comes_before_the_relu():
    plain = MLP(3, (5, 5), 2, seeded())
    assert [type(layer) for layer in plain.layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    full = MLP(3, (5,), 2, seeded(), layer_norm=True)
    assert [type(layer) for layer in full.layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    # normalised hidden units do not see the scale of the input (biases are 0)
    normed = MLP(3, (8,), 2, seeded(), layer_norm=True, last_gain=1.0)
    x = torch.randn(6, 3, generator=seeded()) * 10
    torch.testing.assert_close(normed(5 * x), normed(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain(5 * x), plain(x))


def test_output_is_float32_under_autocast():
    net = MLP(3, (8,), 2, seeded())
    x = torch.randn(4, 3, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, net(x), rtol=0.05, atol=1e-3)


def test_ensemble_linear_is_one_linear_layer_a_member():
    layer = EnsembleLinear(3, 4, 2, 1.0, seeded())
    with torch.no_grad():
        layer.bias.copy_(torch.randn(3, 1, 2, generator=seeded(1)))
    inputs = torch.randn(3, 5, 4, generator=seeded(2))
    outputs = layer(list(inputs))
    assert len(outputs) == 3
    for member in range(3):
        torch.testing.assert_close(outputs[member], inputs[member] @ layer.weight[member] + layer.bias[member])


def test_ensemble_members_start_orthogonal_and_different():
    weight = EnsembleLinear(3, 6, 6, math.sqrt(2), seeded()).weight
    for member in weight:
        torch.testing.assert_close(member @ member.T, 2 * torch.eye(6))
    for a, b in itertools.combinations(weight, 2):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 4, 4)])
def test_orthogonal(shape):
    weight = torch.empty(shape)
    orthogonal_(weight, 3.0, seeded())
    for matrix in weight if weight.ndim == 3 else (weight,):
        small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(small @ small.T, 9 * torch.eye(len(small)))
