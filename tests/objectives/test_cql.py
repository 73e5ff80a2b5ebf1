"""Conservative Q-learning: conformance in many settings, penalty and targets by hand, limits, and learning."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from steelyard.errors import ConfigError
from steelyard.objectives.base import Learner
from steelyard.objectives.cql import ActionSamples, CQLConfig
from steelyard.objectives.sac import SACConfig

from .conformance import (
    BATCH,
    BY_ROW,
    CHECKS,
    NETWORK,
    POINT_DISCOUNT,
    POINT_NETWORK,
    builder,
    check_learns,
    check_name,
    check_page,
    hand_batch,
    hand_learner,
    optimizers_of,
    random_batch,
    rows_of,
    seeded,
    set_actor,
    set_critic,
    train,
)

PLAIN = CQLConfig(network=NETWORK, num_samples=3)
THREE = dataclasses.replace(NETWORK, num_critics=3, num_min_critics=2)


def changed(**settings: object) -> CQLConfig:
    return dataclasses.replace(PLAIN, **settings)


CONFIGS = {
    "plain": PLAIN,
    "lagrange_a": changed(mode="lagrange_a"),
    "lagrange_b": changed(mode="lagrange_b", max_target_backup=True, backup_entropy=True),
    "lagrange_c": changed(mode="lagrange_c", penalty_num_critics=1, network=THREE),
    "rho": changed(importance_sampling=False, normalise="count", gap_clip=(-200.0, 5.0), target_bounds=(-1.0, 1.0)),
    "mean": changed(reduction="mean", action_groups=("current",), target_action="mean", backup_entropy=True),
    "max_then_min": changed(max_target_backup=True, backup_order="max_then_min", normalise="count_volume"),
    "own_samples": changed(shares_samples=False, penalty_temperature=0.5, max_target_backup=True, backup_entropy=True),
    "few_states": changed(state_fraction=0.5),
    "few_states_own_samples": changed(state_fraction=0.5, shares_samples=False, mode="lagrange_a"),
    "cloning": changed(bc_steps=5),
    "layer_norm": changed(network=dataclasses.replace(THREE, critic_layer_norm=True)),
}
PICKS_ROWS = {"few_states", "few_states_own_samples"}


# evenly spaced rows belong to their places in the batch, so a permuted batch is another one
CASES = [
    pytest.param(name, check, id=f"{name}-{check_name(check)}")
    for name in CONFIGS
    for check in CHECKS
    if not (name in PICKS_ROWS and check in BY_ROW)
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_conformance(name, check):
    check(builder(CONFIGS[name]), BATCH)


def terms(learner: Learner, batch=None, samples: ActionSamples | None = None):
    """Return TD loss, gap and metrics on a prepared batch, with samples of a fixed seed."""
    batch = learner.prepare(BATCH) if batch is None else batch
    samples = learner.sample_actions(batch, seeded(3)) if samples is None else samples
    return learner.critic_terms(batch, samples, seeded(4))


def twin(learner: Learner, config: CQLConfig) -> Learner:
    other = builder(config)(0)
    other.load_state_dict(learner.state_dict(), strict=False)
    return other


@pytest.fixture
def learner():
    """A learner whose target critics differ from its critics."""
    made = builder(PLAIN)(0)
    train(made, optimizers_of(made), BATCH, 0, 3)
    return made


def test_rows_and_samples_permute_together(learner):
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded(3))
    order = torch.randperm(len(batch), generator=seeded(1))
    turned = ActionSamples(*(getattr(samples, f.name)[order] for f in dataclasses.fields(samples)))
    # the draws of one group may come in any order too; the first next action is the target's
    inner = torch.randperm(3, generator=seeded(2))
    shuffled = dataclasses.replace(
        turned,
        random=turned.random[:, inner],
        current=turned.current[:, inner],
        log_prob_current=turned.log_prob_current[:, inner],
    )
    whole = terms(learner, batch, samples)
    for other in (turned, shuffled):
        for a, b in zip(whole[:2], terms(learner, rows_of(batch, order), other)[:2], strict=True):
            torch.testing.assert_close(a, b)


def test_samples_have_the_density_they_claim(learner):
    samples = learner.sample_actions(learner.prepare(BATCH), seeded())
    ready = learner.prepare(BATCH)
    assert samples.random.abs().max() <= 1
    assert samples.random.min() < -0.5 < 0.5 < samples.random.max()
    pairs = ((ready.observations, samples.current, samples.log_prob_current),)
    pairs += ((ready.next_observations, samples.next, samples.log_prob_next),)
    for observations, actions, log_probs in pairs:
        for k in range(3):
            recomputed = learner.nets.actor.log_prob(observations, actions[:, k])
            torch.testing.assert_close(recomputed, log_probs[:, k], rtol=1e-3, atol=1e-3)


# --- by hand -----------------------------------------------------------------------------------------------------

GAPS = torch.tensor([1.5, 3.0])  # tau 2, w 5: excesses -0.5 and 1


def penalty_of(mode: str, tau: float = 2.0, gaps: Tensor = GAPS) -> tuple[float, float, Tensor, Tensor]:
    """Return penalty, dual, slope of the multiplier's parameter, and the gradient to the gaps."""
    learner = builder(changed(mode=mode, cql_weight=5.0, cql_target_gap=tau))(0)
    gap = gaps.clone().requires_grad_()
    penalty, dual = learner.penalty(gap)
    (to_gap,) = torch.autograd.grad(penalty + dual, gap, retain_graph=True)  # the dual must not reach the critic
    if mode == "fixed":
        return float(penalty.detach()), float(dual), torch.zeros(()), to_gap
    (slope,) = torch.autograd.grad(penalty + dual, learner.multiplier.raw)  # nor the penalty the multiplier
    return float(penalty.detach()), float(dual.detach()), slope, to_gap


def test_penalty_fixed():
    penalty, dual, _, to_gap = penalty_of("fixed")
    assert penalty == pytest.approx(5 * 4.5)
    assert dual == 0
    assert to_gap.tolist() == [5, 5]


def test_penalty_lagrange_a():
    penalty, dual, slope, to_gap = penalty_of("lagrange_a")
    assert penalty == pytest.approx(math.e * 5 * (-0.5 + 1))
    assert dual == pytest.approx(-math.e * 5 * 0.5 / 2)  # averaged over critics
    assert float(slope) == pytest.approx(dual, rel=1e-6)  # d exp(x) = exp(x)
    assert to_gap.tolist() == pytest.approx([5 * math.e] * 2)


def test_penalty_lagrange_b():
    penalty, dual, slope, to_gap = penalty_of("lagrange_b")
    # the weight is inside: 5 * 1.5 - 2 = 5.5, 5 * 3 - 2 = 13
    assert penalty == pytest.approx(math.e * 18.5)
    assert dual == pytest.approx(-math.e * 9.25)
    assert float(slope) == pytest.approx(dual, rel=1e-6)
    assert to_gap.tolist() == pytest.approx([5 * math.e] * 2)


def test_penalty_lagrange_c():
    penalty, dual, slope, to_gap = penalty_of("lagrange_c")
    assert penalty == pytest.approx(0.5)  # softplus starts at 1; no weight
    assert dual == pytest.approx(-0.25)
    assert float(slope) == pytest.approx(-0.25 * (math.e - 1) / math.e)  # sigmoid(log(e - 1)) = 1 - 1/e
    assert to_gap.tolist() == pytest.approx([1, 1])


def test_tau_of_b_is_weight_times_tau_of_a():
    a, b = penalty_of("lagrange_a", tau=2.0), penalty_of("lagrange_b", tau=10.0)
    assert a[:2] == pytest.approx(b[:2])
    torch.testing.assert_close(a[2], b[2])
    torch.testing.assert_close(a[3], b[3])


@pytest.mark.parametrize("mode", ["lagrange_a", "lagrange_b", "lagrange_c"])
def test_multiplier_rises_exactly_while_the_gap_is_above_tau(mode):
    inner = 5.0 if mode == "lagrange_b" else 1.0
    for distance in (-3.0, -0.01, 0.01, 3.0):
        _, _, slope, _ = penalty_of(mode, tau=2.0, gaps=torch.full((2,), 2.0 / inner + distance))
        assert bool(slope < 0) == (distance > 0), "descent raises the multiplier where its slope is negative"


def test_multiplier_is_clipped():
    multiplier = builder(changed(mode="lagrange_a"))(0).multiplier
    with torch.no_grad():
        assert float(multiplier()) == pytest.approx(math.e)
        multiplier.raw.fill_(20.0)
        assert float(multiplier()) == 1e6


@pytest.mark.parametrize(("tau", "rises"), [(-100.0, True), (100.0, False)])
@pytest.mark.parametrize("mode", ["lagrange_a", "lagrange_b", "lagrange_c"])
def test_multiplier_trains(mode, tau, rises):
    learner = builder(changed(mode=mode, cql_target_gap=tau))(0)
    before = float(learner.multiplier().detach())
    train(learner, optimizers_of(learner), BATCH, 0, 3)
    assert (float(learner.multiplier().detach()) > before) == rises


ROWS = hand_batch([1.0, 0.0], [0.5, -0.5], rewards=[1.0, -1.0], next_observations=[1.0, 2.0])


def hand_samples() -> ActionSamples:
    """N = 2 at A = 1; the same for both rows; densities 1/2 everywhere but for the last next action (density 1)."""

    def twice(values: list[float]) -> Tensor:
        return torch.tensor([values, values])

    half = -math.log(2)
    return ActionSamples(
        random=twice([-1.0, 1.0])[..., None],
        current=twice([0.0, 0.5])[..., None],
        log_prob_current=twice([half, half]),
        next=twice([-1.0, 1.0])[..., None],
        log_prob_next=twice([half, 0.0]),
    )


def hand_cql(**settings: object) -> Learner:
    """Q_0 = a ln 2, Q_1 = s; Qbar_0 = 2.5 + 1.5 a, Qbar_1 = 2.5 - 0.5 a, at any s."""
    made = hand_learner(CQLConfig(discount=0.9, num_samples=2, initial_temperature=0.5, **settings))
    set_critic(made.nets.critic, (0, math.log(2), 0), (1, 0, 0))
    set_critic(made.nets.target_critic, (0, 1.5, 2.5), (0, -0.5, 2.5))
    set_actor(made.nets.actor, slope=0.0, offset=math.log(3) / 2, log_std=0.0)
    return made


def test_gap_by_hand():
    _, gap, metrics = hand_cql().critic_terms(ROWS, hand_samples(), seeded())
    # critic 0: exp(Q) = 2^a. random 2(1/2 + 2) = 5; current 2(1 + sqrt 2); next 2/2 + 2/1 = 3: 10 + 2 sqrt 2
    #   minus Q of the data: row 0 ln(2)/2, row 1 -ln(2)/2, whose mean is 0
    # critic 1 is flat: log(2 * 5 + 1) = log 11
    torch.testing.assert_close(gap, torch.tensor([math.log(10 + 2 * math.sqrt(2)), math.log(11)]))
    torch.testing.assert_close(metrics["critic/normalised_gap"][1], torch.full((2,), math.log(11 / 12)))


def test_loss_is_td_plus_penalty_summed_over_critics(learner):
    td, gap, _ = terms(learner)
    loss, _ = learner.loss_critic(learner.prepare(BATCH), seeded(3))
    torch.testing.assert_close(loss, td.sum() + PLAIN.cql_weight * gap.sum())


@pytest.mark.parametrize(
    ("settings", "values", "log_probs"),
    [
        # one action, the first: a = -1: min(1, 3) = 1
        ({}, 1.0, -math.log(2)),
        # max backup over a = -1, 1: Qbar_0 = 1, 4 and Qbar_1 = 3, 2. min first: max(1, 2) = 2, at the second action
        ({"max_target_backup": True}, 2.0, 0.0),
        # max first: min(4, 3) = 3; the mean critic's best action is the second
        ({"max_target_backup": True, "backup_order": "max_then_min"}, 3.0, 0.0),
        # the mode tanh(ln(3)/2) = 0.5: min(3.25, 2.25) = 2.25; its density under N(u) / (1 - a^2) with u = mean
        ({"target_action": "mean"}, 2.25, -0.918939 - math.log(0.75)),
    ],
)
@pytest.mark.parametrize("entropy", [False, True])
def test_targets_by_hand(settings, values, log_probs, entropy):
    learner = hand_cql(backup_entropy=entropy, **settings)
    target = learner.bellman_targets(ROWS, hand_samples(), seeded())
    value = values - 0.5 * log_probs * entropy
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * value, -1 + 0.9 * value]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["min_then_max", "max_then_min"])
def test_max_backup_looks_at_every_sampled_action(order):
    learner = hand_cql(max_target_backup=True, backup_order=order)
    samples = hand_samples()
    one = ActionSamples(*(getattr(samples, f.name)[:, :1] for f in dataclasses.fields(samples)))
    assert (learner.bellman_targets(ROWS, samples, seeded()) > learner.bellman_targets(ROWS, one, seeded())).all()


def test_max_backup_draws_n_actions():
    for count in (1, 7):
        learner = builder(changed(num_samples=count, max_target_backup=True))(0)
        samples = learner.sample_actions(learner.prepare(BATCH), seeded())
        assert samples.next.shape == (len(BATCH), count, 2)


# --- limits ------------------------------------------------------------------------------------------------------


def test_weight_zero_is_sac(learner):
    """Without a penalty the critic's loss is SAC's (no entropy in the target), on the same next actions."""
    plain = twin(learner, changed(cql_weight=0.0))
    sac = builder(SACConfig(network=NETWORK, backup_entropy=False))(0)
    sac.load_state_dict({k: v for k, v in plain.state_dict().items() if k in sac.state_dict()})
    batch = plain.prepare(BATCH)
    samples = plain.sample_actions(batch, seeded())
    td, gap, metrics = plain.critic_terms(batch, samples, seeded())
    first = (samples.next[:, :1], samples.log_prob_next[:, :1])
    sac.nets.actor.sample = lambda *_: first
    loss, sac_metrics = sac.loss_critic(batch, seeded())
    torch.testing.assert_close(metrics["critic/target"], sac_metrics["critic/target"])
    torch.testing.assert_close(td.sum() + plain.penalty(gap)[0], loss)


def test_same_samples_for_all_critics_or_copies_of_them_are_equal(learner):
    own = twin(learner, changed(shares_samples=False))
    batch = learner.prepare(BATCH)
    shared = learner.sample_actions(batch, seeded())
    copies = ActionSamples(
        *(getattr(shared, f.name).expand(2, *getattr(shared, f.name).shape) for f in dataclasses.fields(shared))
    )
    for a, b in zip(terms(learner, batch, shared)[:2], terms(own, batch, copies)[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_own_samples_differ_between_critics():
    own = builder(changed(shares_samples=False))(0)
    samples = own.sample_actions(own.prepare(BATCH), seeded())
    assert samples.random.shape == samples.current.shape == (2, len(BATCH), 3, 2)
    assert samples.log_prob_next.shape == (2, len(BATCH), 3)
    assert not torch.equal(samples.random[0], samples.random[1])
    batch = own.prepare(BATCH)
    for e in range(2):  # densities stay with their actions
        recomputed = own.nets.actor.log_prob(batch.next_observations, samples.next[e, :, 1])
        torch.testing.assert_close(recomputed, samples.log_prob_next[e, :, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_target_backup", [False, True])
def test_own_samples_of_one_critic(max_target_backup):
    one = dataclasses.replace(NETWORK, num_critics=1)
    shared = builder(changed(network=one, max_target_backup=max_target_backup))(0)
    own = twin(shared, changed(network=one, shares_samples=False, max_target_backup=max_target_backup))
    batch = own.prepare(random_batch(3))  # as many rows as samples: a wrong axis would pass unnoticed
    found = [x.bellman_targets(batch, x.sample_actions(batch, seeded()), seeded()) for x in (shared, own)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shares_samples", [True, False])
@pytest.mark.parametrize(("fraction", "rows"), [(0.5, [0, 2, 4, 6]), (0.25, [0, 4]), (0.375, [0, 2, 5]), (1e-6, [0])])
def test_state_fraction_is_the_penalty_on_evenly_spaced_rows(learner, fraction, rows, shares_samples):
    few = twin(learner, changed(state_fraction=fraction, shares_samples=shares_samples, lower_bound="returns"))
    every = twin(learner, changed(shares_samples=shares_samples, lower_bound="returns"))
    batch = few.prepare(BATCH)
    samples = few.sample_actions(batch, seeded())
    batch_axis = 0 if shares_samples else 1
    chosen = ActionSamples(
        *(getattr(samples, f.name).index_select(batch_axis, torch.tensor(rows)) for f in dataclasses.fields(samples))
    )
    td, gap, metrics = terms(few, batch, samples)
    whole_td, _, whole = terms(every, batch, samples)
    _, part_gap, part = terms(every, rows_of(batch, torch.tensor(rows)), chosen)
    torch.testing.assert_close(td, whole_td)  # the Bellman error keeps all rows
    torch.testing.assert_close(gap, part_gap)
    assert metrics["critic/bound_rate"].shape == (2, len(rows), 3)
    for name in ("critic/normalised_gap", "critic/bound_rate"):
        torch.testing.assert_close(metrics[name], part[name])
    assert whole["critic/q_data"].shape == metrics["critic/q_data"].shape == (2, len(BATCH))


def test_mixed_batches_keep_their_shares():
    """A batch that holds prior data first and online data after: evenly spaced rows take equal parts of both."""
    learner = builder(changed(state_fraction=0.5))(0)
    returns = torch.cat([torch.full((4,), -1e6), torch.full((4,), 1e6)])
    config = changed(state_fraction=0.5, lower_bound="returns")
    mixed = twin(learner, config)
    batch = dataclasses.replace(mixed.prepare(BATCH), returns_to_go=returns)
    assert float(terms(mixed, batch)[2]["critic/bound_rate"].mean()) == 0.5


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_state_fraction_must_be_a_share(fraction):
    with pytest.raises(ConfigError, match="state_fraction"):
        builder(changed(state_fraction=fraction))(0)


def test_penalty_on_a_subset_of_critics():
    some = changed(network=THREE, penalty_num_critics=2)
    learner = builder(some)(0)
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded())
    full = terms(twin(learner, changed(network=THREE)), batch, samples)[1]
    seen = set()
    for seed in range(30):
        td, gap, _ = learner.critic_terms(batch, samples, seeded(seed))
        assert td.shape == (3,)
        assert gap.shape == (2,)
        index = tuple(sorted(int((full - value).abs().argmin()) for value in gap))
        torch.testing.assert_close(gap.sort().values, full[list(index)].sort().values)
        seen.add(index)
    assert seen == {(0, 1), (0, 2), (1, 2)}


def test_groups_of_actions(learner):
    batch = learner.prepare(BATCH)
    samples = learner.sample_actions(batch, seeded())
    full = float(terms(learner, batch, samples)[1].detach().exp().sum())
    for groups in (("random",), ("current",), ("next",), ("random", "next")):
        part = twin(learner, changed(action_groups=groups))
        assert float(terms(part, batch, samples)[1].detach().exp().sum()) < full, (
            "fewer entries, a smaller soft maximum"
        )
    order = twin(learner, changed(action_groups=("next", "random", "current")))
    torch.testing.assert_close(terms(order, batch, samples)[1], terms(learner, batch, samples)[1])


def flat(learner: Learner) -> Learner:
    with torch.no_grad():
        learner.nets.critic.output.weight.zero_()
        learner.nets.critic.output.bias.fill_(-7.0)
    return learner


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("normalise", ["none", "count", "count_volume"])
def test_flat_critic_has_normalised_gap_zero(count, normalise):
    learner = flat(builder(changed(num_samples=count, normalise=normalise, action_groups=("random",)))(0))
    _, gap, metrics = terms(learner)
    torch.testing.assert_close(metrics["critic/normalised_gap"], torch.zeros(2, len(BATCH)), atol=1e-5, rtol=0)
    # log N + A log 2 for one group
    removed = {"none": 0.0, "count": math.log(count), "count_volume": math.log(count) + 2 * math.log(2)}[normalise]
    torch.testing.assert_close(gap, torch.full((2,), math.log(count) + 2 * math.log(2) - removed))


def test_many_samples_estimate_the_integral():
    """LSE - log(3N) tends to log of the integral of exp(Q) over the box: all three groups are unbiased estimators."""
    count = 20_000
    line = hand_learner(CQLConfig(num_samples=count))
    with torch.no_grad():
        set_critic(line.nets.critic, (0.3, 1.7, 0.2), (-1.0, -0.6, 0.0))
        set_actor(line.nets.actor, slope=0.2, offset=0.1, log_std=-0.2)
    batch = hand_batch([0.5], [0.25], next_observations=[-1.0])
    samples = line.sample_actions(batch, seeded())
    a = torch.linspace(-1, 1, 20_001)
    grid = line.nets.critic(torch.full((len(a), 1), 0.5), a[:, None]).detach()
    integral = torch.trapezoid(grid.exp(), a).log()
    q_data = line.nets.critic(batch.observations, batch.actions).detach()[:, 0]
    for groups in (("random",), ("current",), ("next",), ("random", "current", "next")):
        config = CQLConfig(num_samples=count, action_groups=groups)
        one = hand_learner(config)
        one.load_state_dict(line.state_dict())
        _, gap, metrics = one.critic_terms(batch, samples, seeded())
        expected = integral - q_data
        torch.testing.assert_close(gap - math.log(len(groups) * count), expected, rtol=0, atol=0.03)
        normalised = metrics["critic/normalised_gap"][:, 0]
        torch.testing.assert_close(normalised, expected - math.log(2), rtol=0, atol=0.03)


def test_changing_the_number_of_samples_shifts_the_gap_by_its_logarithm():
    """So that N and tau change together: tau(40) = tau(10) + log 4 asks for the same critic."""
    batch = random_batch(600)
    found = {}
    for count in (10, 40):
        learner = builder(changed(num_samples=count))(0)
        ready = learner.prepare(batch)
        _, gap, metrics = learner.critic_terms(ready, learner.sample_actions(ready, seeded()), seeded())
        found[count] = gap.detach(), metrics["critic/normalised_gap"].mean(1)
    # the soft maximum of few samples lies a little low (Jensen), hence the tolerance
    torch.testing.assert_close(found[40][0] - found[10][0], torch.full((2,), math.log(4)), rtol=0, atol=0.1)
    torch.testing.assert_close(found[40][1], found[10][1], rtol=0, atol=0.1)


def test_scaling_all_values():
    """r, Q, G and T times c: the TD loss times c^2, the penalty without importance sampling times c."""
    c = 3.0
    results = []
    for scale in (1.0, c):
        config = changed(importance_sampling=False, penalty_temperature=scale, lower_bound="returns")
        learner = builder(config)(0)
        with torch.no_grad():
            for critic in (learner.nets.critic, learner.nets.target_critic):
                for p in critic.output.parameters():
                    p.mul_(scale)
        batch = learner.prepare(BATCH)
        batch = dataclasses.replace(batch, rewards=batch.rewards * scale, returns_to_go=batch.returns_to_go * scale)
        results.append(terms(learner, batch)[:2])
    (td, gap), (scaled_td, scaled_gap) = results
    torch.testing.assert_close(scaled_td, c**2 * td)
    torch.testing.assert_close(scaled_gap, c * gap)


def test_swapping_the_critics_changes_nothing(learner):
    swapped = twin(learner, PLAIN)
    with torch.no_grad():
        for p in (*swapped.nets.critic.parameters(), *swapped.nets.target_critic.parameters()):
            p.copy_(p.flip(0))
    for a, b in zip(terms(learner)[:2], terms(swapped)[:2], strict=True):
        torch.testing.assert_close(a, b.flip(0))


def test_terminal_steps_do_not_bootstrap(learner):
    batch = learner.prepare(BATCH)
    target = terms(learner, batch)[2]["critic/target"]
    ended = batch.masks == 0
    assert 0 < ended.sum() < len(batch)
    assert torch.equal(target[ended], batch.rewards[ended])
    assert (target[~ended] != batch.rewards[~ended]).all()


def test_cloning_ends_after_its_steps():
    learner = builder(changed(bc_steps=2))(0)
    optimizers = optimizers_of(learner)
    logged = [
        "actor/data_log_prob" in metrics
        for step in range(4)
        for metrics in train(learner, optimizers, BATCH, step, step + 1)
    ]
    assert logged == [True, True, False, False]
    other = builder(changed(bc_steps=2))(1)
    other.load_state_dict(learner.state_dict())  # the count is part of the state: a resume does not clone again
    assert "actor/data_log_prob" not in train(other, optimizers_of(other), BATCH, 4, 5)[0]


def test_cloning_uses_the_actions_of_the_data():
    """alpha log pi(a_new|s) - log pi(a|s): one public implementation scores a fresh sample in place of a."""
    learner = builder(changed(bc_steps=2))(0)
    batch = learner.prepare(BATCH)
    loss, metrics = learner.loss_actor(batch, seeded())
    torch.testing.assert_close(
        metrics["actor/data_log_prob"], learner.nets.actor.log_prob(batch.observations, batch.actions).detach()
    )
    moved = dataclasses.replace(batch, actions=batch.actions * 0.5)
    assert not torch.allclose(learner.loss_actor(moved, seeded())[0], loss)


def test_learns():
    config = CQLConfig(
        network=POINT_NETWORK,
        discount=POINT_DISCOUNT,
        target_update_rate=0.05,
        actor_lr=3e-3,
        critic_lr=3e-3,
        initial_temperature=0.05,
        cql_weight=0.2,
        num_samples=4,
    )
    check_learns(config)


def test_the_example_of_the_page_runs():
    check_page("cql")
