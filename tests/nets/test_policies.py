import math

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from steelyard.data.normalize import BoxScaler, Normalizer
from steelyard.nets.policies import (
    ActorPolicy,
    GaussianActor,
    gaussian_log_prob,
    tanh_gaussian_log_prob,
    tanh_gaussian_sample,
    tanh_log_det,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(size: int = 2, **settings: object) -> GaussianActor:
    """An actor whose weights are large enough to matter."""
    actor = GaussianActor(3, size, (8,), seeded(), **settings)
    with torch.no_grad():
        for p in actor.net.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(1)) * 0.5)
    return actor


OBSERVATIONS = torch.randn(6, 3, generator=seeded(2))


# --- densities ---------------------------------------------------------------------------------------------------


def test_gaussian_log_prob_is_that_of_torch():
    mean, log_std = torch.randn(2, 5, 3, generator=seeded()).double()
    noise = torch.randn(5, 3, generator=seeded(1)).double()
    expected = Normal(mean, log_std.exp()).log_prob(mean + log_std.exp() * noise).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(noise, log_std), expected)


def test_tanh_log_det_by_hand_and_far_out():
    # tanh' = 1 - tanh^2: at 0 it is 1; at ln(3)/2 it is 1 - 0.25, in both of two dimensions
    u = torch.tensor([[0.0, 0.0], [math.log(3) / 2, -math.log(3) / 2]])
    torch.testing.assert_close(tanh_log_det(u), torch.tensor([0.0, 2 * math.log(0.75)]))
    # log(1 - tanh(u)^2) -> log 4 - 2|u|, where 1 - tanh^2 has long been 0 in float32
    far = torch.tensor([[50.0], [-50.0]])
    torch.testing.assert_close(tanh_log_det(far), torch.full((2,), math.log(4) - 100))


def test_tanh_gaussian_is_torchs_transformed_distribution():
    mean, log_std = torch.randn(2, 4, 3, generator=seeded()).double() * 0.5
    noise = torch.randn(4, 3, generator=seeded(1)).double()
    actions, log_probs = tanh_gaussian_sample(mean, log_std, noise)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise))
    torch.testing.assert_close(log_probs, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(tanh_gaussian_log_prob(mean, log_std, actions), log_probs)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -0.5), (-1.5, -1.0), (0.0, -2.0)])
def test_tanh_gaussian_integrates_to_one(mean, log_std):
    a = torch.linspace(-1 + 1e-5, 1 - 1e-5, 400_001).double()
    density = tanh_gaussian_log_prob(torch.tensor(mean).double(), torch.tensor(log_std).double(), a[:, None]).exp()
    assert float(torch.trapezoid(density, a)) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("log_std", [-20.0, -5.0, 0.0, 2.0])
def test_actions_on_the_border_have_finite_density_and_gradient(log_std):
    mean = torch.zeros(3, 1, requires_grad=True)
    log_prob = tanh_gaussian_log_prob(mean, torch.full((3, 1), log_std), torch.tensor([[1.0], [-1.0], [0.0]]))
    assert torch.isfinite(log_prob).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert torch.isfinite(gradient).all()
    assert float(log_prob.detach()[0]) == pytest.approx(float(log_prob.detach()[1]), rel=1e-4)


# --- the actor ---------------------------------------------------------------------------------------------------


def test_log_std_is_scaled_shifted_and_clipped():
    actor = make()
    raw = actor.net(OBSERVATIONS)[:, 2:]
    torch.testing.assert_close(actor(OBSERVATIONS)[1], raw - 1.0)  # multiplier 1, offset -1 at the start
    with torch.no_grad():
        actor.log_std_multiplier.fill_(3.0)
        actor.log_std_offset.fill_(0.25)
    torch.testing.assert_close(actor(OBSERVATIONS)[1], (3 * raw + 0.25).clamp(-20, 2))
    for offset, bound in ((100.0, 2.0), (-100.0, -20.0)):
        with torch.no_grad():
            actor.log_std_offset.fill_(offset)
        assert (actor(OBSERVATIONS)[1] == bound).all()


def test_scale_and_offset_of_the_log_std_learn():
    actor = make()
    loss = actor.sample(OBSERVATIONS, seeded())[1].mean()
    gradients = torch.autograd.grad(loss, [actor.log_std_multiplier, actor.log_std_offset])
    assert all(g != 0 for g in gradients)


def test_shared_log_std():
    actor = make(squash="mean", std="shared", log_std_min=-5.0)
    with torch.no_grad():
        actor.shared_log_std.copy_(torch.tensor([-9.0, 0.5]))
    mean, log_std = actor(OBSERVATIONS)
    assert mean.shape == log_std.shape == (6, 2)
    assert log_std.unique(dim=0).tolist() == [[-5.0, 0.5]]
    torch.testing.assert_close(mean, torch.tanh(actor.net(OBSERVATIONS)))


@pytest.mark.parametrize("squash", ["tanh", "mean"])
def test_samples(squash):
    actor = make(squash=squash)
    actions, log_probs = actor.sample(OBSERVATIONS, seeded(), count=50)
    assert actions.shape == (6, 50, 2)
    assert log_probs.shape == (6, 50)
    assert actions.abs().max() <= 1
    again = actor.sample(OBSERVATIONS, seeded(), count=50)[0]
    assert torch.equal(actions, again)
    inside = (actions.abs() < 0.999).all(-1)
    assert inside.float().mean() > 0.25
    for k in range(50):  # a clipped sample has the density of what was drawn, so only samples inside can be recomputed
        recomputed = actor.log_prob(OBSERVATIONS, actions[:, k])
        torch.testing.assert_close(log_probs[:, k][inside[:, k]], recomputed[inside[:, k]], rtol=1e-3, atol=1e-3)


def test_samples_have_the_mean_and_spread_that_the_net_says():
    actor = make(squash="mean", std="shared")
    with torch.no_grad():
        actor.shared_log_std.fill_(math.log(0.05))
        for p in actor.net.parameters():
            p.mul_(0.2)  # means far enough from the border that clipping does not matter
    mean, _ = actor(OBSERVATIONS)
    actions, _ = actor.sample(OBSERVATIONS, seeded(), count=4000)
    torch.testing.assert_close(actions.mean(1), mean, rtol=0, atol=0.005)
    torch.testing.assert_close(actions.std(1), torch.full((6, 2), 0.05), rtol=0.05, atol=0)


def test_sample_is_reparameterised():
    actor = make()
    actions, _ = actor.sample(OBSERVATIONS, seeded())
    assert any(g.any() for g in torch.autograd.grad(actions.sum(), list(actor.net.parameters())))


def test_mode():
    torch.testing.assert_close(make().mode(OBSERVATIONS), torch.tanh(make()(OBSERVATIONS)[0]))
    actor = make(squash="mean")
    torch.testing.assert_close(actor.mode(OBSERVATIONS), torch.tanh(actor.net(OBSERVATIONS)[:, :2]))


# --- the policy --------------------------------------------------------------------------------------------------


def policy_of(actor: GaussianActor) -> ActorPolicy:
    normalizer = Normalizer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 4.0]))
    return ActorPolicy(actor, normalizer, BoxScaler(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])))


def test_policy_normalises_and_unscales():
    """Raw observations in, raw actions out: the box is [-2, 2] x [0, 1]."""
    actor = make()
    policy = policy_of(actor)
    raw = OBSERVATIONS * torch.tensor([0.5, 1.0, 4.0]) + torch.tensor([1.0, 2.0, 3.0])
    unit = actor.mode(OBSERVATIONS)
    expected = torch.stack([unit[:, 0] * 2, unit[:, 1] / 2 + 0.5], dim=1)
    torch.testing.assert_close(policy.act(raw, seeded(), "mean"), expected)
    unit = actor.sample(OBSERVATIONS, seeded(7))[0][:, 0]
    expected = torch.stack([unit[:, 0] * 2, unit[:, 1] / 2 + 0.5], dim=1)
    torch.testing.assert_close(policy.act(raw, seeded(7), "sample"), expected)


def test_actions_stay_in_any_box():
    """Up to rounding: centre + half width may exceed the bound by one unit in the last place of float32."""
    g = seeded()
    low = torch.randn(200, generator=g) * 3
    high = low + torch.rand(200, generator=g) * 5 + 1e-2
    box = BoxScaler(low, high)
    slack = 4e-7 * torch.maximum(low.abs(), high.abs()).clamp(min=1)
    for unit in (-1.0, 1.0):
        actions = box.inverse(torch.full((200,), unit))
        assert (actions >= low - slack).all()
        assert (actions <= high + slack).all()


def test_dropout_rests_while_acting():
    actor = make(dropout=0.5)
    policy = policy_of(actor)
    before = torch.get_rng_state()
    for mode in ("mean", "sample"):
        first, second = (policy.act(OBSERVATIONS, seeded(), mode) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert actor.training, "learning goes on with dropout"
    actor.eval()
    policy.act(OBSERVATIONS, seeded(), "mean")
    assert not actor.training


def test_acting_on_one_state_or_on_many_is_the_same():
    policy = policy_of(make())
    whole = policy.act(OBSERVATIONS, seeded(), "mean")
    rows = torch.cat([policy.act(row[None], seeded(), "mean") for row in OBSERVATIONS])
    torch.testing.assert_close(whole, rows)
    policy.reset()
    torch.testing.assert_close(policy.act(OBSERVATIONS, seeded(), "mean"), whole)


def test_nan_observations_do_not_become_actions_that_look_fine():
    policy = policy_of(make())
    bad = OBSERVATIONS.clone()
    bad[2] = math.nan
    for mode in ("mean", "sample"):
        actions = policy.act(bad, seeded(), mode)
        assert actions[2].isnan().all()
        assert torch.isfinite(actions[[0, 1, 3, 4, 5]]).all()
