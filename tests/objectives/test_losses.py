"""The pure formulas of `objectives/losses.py`, on numbers small enough to work out by hand."""

import math

import pytest
import torch
from torch import Tensor

from steelyard.objectives.losses import (
    bellman_target,
    conservative_gap,
    expectile_loss,
    min_over_subset,
    squared_error_per_critic,
)

from .conformance import seeded

LOG2 = math.log(2)


def logs(*values: object) -> Tensor:
    """Return logarithms: Q values whose exponentials are easy to add."""
    return torch.tensor(values).double().log()


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-6)


def test_bellman_target():
    rewards, masks, values = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0]), torch.tensor([10.0, 10.0])
    # 1 + 0.9 * 10 = 10; a terminated step keeps its reward only
    close(bellman_target(rewards, masks, values, 0.9), [10.0, -2.0])
    close(bellman_target(rewards, masks, values, 0.9, (-1.5, 5.0)), [5.0, -1.5])


def test_squared_error_per_critic():
    q, y = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([0.0, 4.0])
    # critic 0: (1^2 + (-2)^2) / 2; critic 1: (3^2 + 1^2) / 2; no factor 1/2 beyond the mean
    close(squared_error_per_critic(q, y), [2.5, 5.0])


def test_expectile_loss():
    # u < 0 weighs 1 - 0.7, u > 0 weighs 0.7: 0.3 * 4, 0.7 * 9
    close(expectile_loss(torch.tensor([-2.0, 3.0, 0.0]), 0.7), [1.2, 6.3, 0.0])
    u = torch.randn(50, generator=seeded())
    close(expectile_loss(u, 0.5), u.square() / 2)


def test_expectile_of_a_sample_minimises_the_loss():
    # 1 of 4 values is 1, the rest 0: tau (1 - v) = (1 - tau) 3 v, so v = tau / (tau + 3 (1 - tau)) = 0.75 for tau 0.9
    samples, v = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor(0.75, requires_grad=True)
    (slope,) = torch.autograd.grad(expectile_loss(samples - v, 0.9).sum(), v)
    close(slope, 0.0)


def test_min_over_subset():
    q = torch.tensor([[1.0, 8.0], [5.0, 2.0], [3.0, 4.0]])
    close(min_over_subset(q, None, seeded()), [1.0, 2.0])
    close(min_over_subset(q, 3, seeded()), [1.0, 2.0])
    seen = {tuple(min_over_subset(q, 2, seeded(s)).tolist()) for s in range(40)}
    # the pairs {0, 1}, {0, 2}, {1, 2}, each for all rows alike
    assert seen == {(1.0, 2.0), (1.0, 4.0), (3.0, 2.0)}
    assert {tuple(min_over_subset(q, 1, seeded(s)).tolist()) for s in range(40)} == {(1, 8), (5, 2), (3, 4)}


class TestConservativeGap:
    """Two critics, two rows, A = 1, N = 2. Tables of exp(Q), and of the densities p that drew the policy actions."""

    data = logs([3.0, 13.0], [1.0, 2.0])
    random = logs([[1.0, 2.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]])
    current = logs([[3.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]])
    next = logs([[2.0, 4.0], [1.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]])
    p_current = logs([0.5, 2.0], [1.0, 0.25])
    p_next = logs([1.0, 0.8], [1.0, 1.0])

    def gap(self, **settings: object) -> tuple[Tensor, Tensor]:
        arguments = (self.data, self.random, self.current, self.next, self.p_current, self.p_next, 1)
        return conservative_gap(*arguments, **settings)

    # sum of exp(Q)/p; a random action has p = 1/2
    # critic 0, row 0: 2(1+2) + (3/0.5 + 1/2) + (2/1 + 4/0.8) = 6 + 6.5 + 7   = 19.5,  data 3
    # critic 0, row 1: 2(1+1) + (1/1 + 1/0.25) + (1 + 3)       = 4 + 5 + 4     = 13,    data 13
    # critic 1, row 0: 2(1+1) + (1/0.5 + 1/2) + (1/1 + 1/0.8)  = 4 + 2.5 + 2.25 = 8.75, data 1
    # critic 1, row 1: 2(2+2) + (2/1 + 2/0.25) + (2 + 2)       = 8 + 10 + 4    = 22,    data 2
    ratio = torch.tensor([[6.5, 1.0], [8.75, 11.0]]).double()

    def test_importance_sampled(self):
        gap, normalised = self.gap()
        close(gap, self.ratio.log())
        close(normalised, self.ratio.log() - math.log(6) - LOG2)

    def test_without_importance_sampling_the_data_action_joins(self):
        gap, normalised = self.gap(importance_sampling=False)
        # critic 0, row 0: 1+2 + 3+1 + 2+4 + data 3 = 16; row 1: 2 + 2 + 4 + 13 = 21
        # critic 1, row 0: 6 * 1 + 1 = 7;                 row 1: 6 * 2 + 2 = 14
        expected = torch.tensor([[16 / 3, 21 / 13], [7.0, 7.0]]).double().log()
        close(gap, expected)
        close(normalised, expected - math.log(7))  # seven entries, no volume: critic 1 is flat
        close(normalised[1], [0.0, 0.0])

    def test_temperature_divides_the_correction_too(self):
        gap, _ = self.gap(temperature=2.0)
        root = math.sqrt  # exp(x / 2)
        total = root(2) + root(4) + root(6) + root(0.5) + root(2) + root(5)
        close(gap[0, 0], 2 * math.log(total) - math.log(3))

    def test_clip_is_element_wise(self):
        gap, normalised = self.gap(clip=(0.5, 2.0))
        # logs of 6.5, 1, 8.75, 11 are 1.87, 0, 2.17, 2.40
        close(gap, [[math.log(6.5), 0.5], [2.0, 2.0]])
        close(normalised, self.ratio.log() - math.log(12))  # the log shows the gap itself

    def test_normalise(self):
        for temperature in (1.0, 2.0):
            plain, flat = self.gap(temperature=temperature)
            count, count_flat = self.gap(normalise="count", temperature=temperature)
            volume, volume_flat = self.gap(normalise="count_volume", temperature=temperature)
            close(plain - count, torch.full((2, 2), temperature * math.log(6)))
            close(count - volume, torch.full((2, 2), LOG2))
            close(count_flat, flat)
            close(volume_flat, flat)
            close(volume, flat)
        count, _ = self.gap(normalise="count", importance_sampling=False)
        close(count[1], [0.0, 0.0])
        volume, _ = self.gap(normalise="count_volume", importance_sampling=False)
        close(volume, count)  # no correction, no volume

    def test_mean_reduction(self):
        gap, normalised = self.gap(reduction="mean")
        # the logarithm of the geometric mean of the six, uncorrected
        expected = [[math.log(48) / 6 - math.log(3), math.log(3) / 6 - math.log(13)], [0.0, 0.0]]
        close(gap, expected)
        close(normalised, expected)

    def test_lower_bound(self):
        bound = logs(4.0, 0.5)
        # critic 0, row 0: policy Q below log 4 rise to it: 6 + (4/0.5 + 4/2) + (4/1 + 4/0.8) = 6 + 10 + 9 = 25
        # critic 1, row 0: 4 + 10 + 9 = 23; in row 1 all lie above log 0.5
        gap, _ = self.gap(lower_bound=bound)
        close(gap, torch.tensor([[25 / 3, 1.0], [23.0, 11.0]]).log())
        # random actions too: 2(4 + 4) = 16 in place of 6 and of 4
        gap, _ = self.gap(lower_bound=bound, bound_random=True)
        close(gap, torch.tensor([[35 / 3, 1.0], [35.0, 11.0]]).log())

    def test_lower_bound_comes_before_the_correction(self):
        # bounded after the correction, the entry 3 / 0.5 = 6 would not change and 1 / 2 would become 4
        gap, _ = self.gap(lower_bound=logs(4.0, 0.5))
        assert not math.isclose(float(gap[0, 0].exp()) * 3, 6 + (6 + 4) + (4 + 5))

    def test_groups_can_be_left_out(self):
        gap, normalised = conservative_gap(self.data, None, self.current, None, self.p_current, None, 1)
        close(gap[0], torch.tensor([6.5 / 3, 5 / 13]).log())
        close(normalised[0], torch.tensor([6.5 / 3 / 4, 5 / 13 / 4]).log())  # N = 2 entries, volume 2
        with pytest.raises(ValueError, match="at least one group"):
            conservative_gap(self.data, None, None, None, None, None, 1)

    def test_densities_for_each_critic(self):
        """Densities [E, B, N] where every critic has samples of its own."""
        per_critic = torch.stack([self.p_current, self.p_current - LOG2])
        gap, _ = conservative_gap(self.data, self.random, self.current, self.next, per_critic, self.p_next, 1)
        # critic 1 halves its p: row 0: 8.75 + 2.5, row 1: 22 + 10
        close(gap, torch.tensor([[6.5, 1.0], [11.25, 16.0]]).log())

    def test_adding_a_constant_to_q_changes_nothing_without_a_bound(self):
        shift = torch.tensor([[3.0, -100.0], [7.0, 50.0]]).double()
        shifted = [q + shift[..., None] for q in (self.random, self.current, self.next)]
        gap, _ = conservative_gap(self.data + shift, *shifted, self.p_current, self.p_next, 1)
        close(gap, self.ratio.log())


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("importance_sampling", [True, False])
@pytest.mark.parametrize("normalise", ["none", "count", "count_volume"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_flat_critic(count, size, importance_sampling, normalise, temperature):
    """Q flat in the action: LSE - Q = log(3N) + A log 2, and the normalised gap is 0, whatever N and A are."""
    q = torch.tensor([[2.0, -300.0]]).double()
    sampled = q[..., None].expand(1, 2, count)
    uniform = torch.full((2, count), -size * LOG2).double()  # a policy that has spread over the whole box
    gap, normalised = conservative_gap(
        q,
        sampled,
        sampled,
        sampled,
        uniform,
        uniform,
        size,
        importance_sampling=importance_sampling,
        normalise=normalise,
        temperature=temperature,
    )
    close(normalised, [[0.0, 0.0]])
    entries = 3 * count if importance_sampling else 3 * count + 1
    volume = size * LOG2 if importance_sampling else 0.0
    removed = {"none": 0.0, "count": temperature * math.log(entries)}
    removed["count_volume"] = removed["count"] + volume
    close(gap, torch.full((1, 2), temperature * math.log(entries) + volume - removed[normalise]))


class TestBoundGradient:
    def gradients(self, bound: float) -> tuple[Tensor, ...]:
        q = [torch.tensor([[[1.0, 2.0]]], requires_grad=True) for _ in range(3)]
        zero = torch.zeros(1, 2)
        gap, _ = conservative_gap(torch.zeros(1, 1), *q, zero, zero, 1, lower_bound=torch.tensor([bound]))
        return torch.autograd.grad(gap.sum(), q)

    def test_push_down_is_masked_below_the_bound(self):
        random, current, following = self.gradients(1.5)
        assert (random > 0).all()
        for policy in (current, following):
            assert policy[0, 0, 0] == 0
            assert policy[0, 0, 1] > 0

    def test_a_very_large_bound_removes_the_policy_groups(self):
        random, current, following = self.gradients(80.0)
        assert not current.any()
        assert not following.any()
        assert torch.isfinite(random).all()

    def test_minus_infinity_is_no_bound(self):
        q = torch.randn(3, 2, 5, 4, generator=seeded())
        p = torch.randn(2, 5, 4, generator=seeded(1))
        args = (q[0, :, :, 0], q[0], q[1], q[2], p[0], p[1], 3)
        bounded = conservative_gap(*args, lower_bound=torch.full((5,), -math.inf), bound_random=True)
        for a, b in zip(bounded, conservative_gap(*args), strict=True):
            assert torch.equal(a, b)

    def test_ties_split_the_gradient_in_half(self):
        at, above = self.gradients(2.0), self.gradients(1.999)
        for tied, free in zip(at[1:], above[1:], strict=True):
            torch.testing.assert_close(tied[0, 0, 1], free[0, 0, 1] / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["lse", "mean"])
def test_scaling_values_and_temperature_scales_the_penalty(reduction):
    """Without importance sampling the gap is homogeneous: Q, bound and T times c make the gap times c."""
    c = 3.7
    q = torch.randn(3, 2, 5, 4, generator=seeded()).double()
    data, bound = torch.randn(2, 5, generator=seeded(1)).double(), torch.zeros(5).double()
    p = torch.randn(5, 4, generator=seeded(2)).double()

    def gap(scale: float) -> Tensor:
        return conservative_gap(
            data * scale,
            *(q * scale),
            p,
            p,
            2,
            lower_bound=bound * scale,
            importance_sampling=False,
            temperature=0.8 * scale,
            reduction=reduction,
        )[0]

    close(gap(c), c * gap(1.0))


def test_scaling_values_scales_the_td_loss_by_the_square():
    c, g = 3.7, seeded()
    q, rewards, values = torch.randn(2, 6, generator=g), torch.randn(6, generator=g), torch.randn(6, generator=g)
    masks = torch.tensor([1.0, 0, 1, 1, 0, 1])

    def loss(scale: float) -> Tensor:
        target = bellman_target(rewards * scale, masks, values * scale, 0.9, (-1 * scale, 1 * scale))
        return squared_error_per_critic(q * scale, target)

    torch.testing.assert_close(loss(c), c**2 * loss(1.0))
