import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steelyard.bench import stats
from steelyard.rng import numpy_generator

scipy_stats = pytest.importorskip("scipy.stats")

scores = st.floats(0, 1, allow_subnormal=False)
runs = st.integers(1, 12).flatmap(lambda n: arrays(np.float64, n, elements=scores))


def generator(name="test"):
    return numpy_generator(0, f"stats/{name}")


def three_tasks(seed, count=8):
    draw = np.random.default_rng(seed)
    return [draw.beta(2 + task, 2, count) for task in range(3)]


# -- numerical oracles ------------------------------------------------------------------------------------------------


def test_interquartile_mean_equals_rliable_and_scipy():
    metrics = pytest.importorskip("rliable.metrics")
    for count in range(1, 12):
        tasks = three_tasks(count, count)
        ours = stats.interquartile_mean(np.concatenate(tasks))
        assert ours == pytest.approx(metrics.aggregate_iqm(np.stack(tasks, axis=1)), abs=1e-12)
        assert ours == pytest.approx(scipy_stats.trim_mean(np.concatenate(tasks), 0.25), abs=1e-12)


def test_probability_of_improvement_equals_rliable():
    metrics = pytest.importorskip("rliable.metrics")
    x, y = [np.round(t, 1) for t in three_tasks(1, 6)], [np.round(t, 1) for t in three_tasks(2, 9)]  # with ties
    ours = stats.probability_of_improvement(x, y, generator(), resamples=100)
    assert ours.value == pytest.approx(metrics.probability_of_improvement(np.stack(x, 1), np.stack(y, 1)), abs=1e-12)


@pytest.fixture
def fixed_rliable():
    """Rliable draws from NumPy's global generator, whatever `random_state` it is given."""
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


@pytest.mark.usefixtures("fixed_rliable")
def test_stratified_interval_is_close_to_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    tasks = three_tasks(3)
    ours = stats.stratified_estimate(tasks, stats.interquartile_mean, generator(), resamples=20000)
    points, intervals = library.get_interval_estimates(
        {"case": np.stack(tasks, axis=1)},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=4000,
    )
    assert ours.value == pytest.approx(points["case"][0], abs=1e-12)
    assert [ours.low, ours.high] == pytest.approx(intervals["case"][:, 0], abs=0.01)


@pytest.mark.usefixtures("fixed_rliable")
def test_improvement_interval_is_close_to_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    x, y = three_tasks(4, 6), three_tasks(5, 9)
    ours = stats.probability_of_improvement(x, y, generator(), resamples=20000)
    _, intervals = library.get_interval_estimates(
        {"pair": (np.stack(x, axis=1), np.stack(y, axis=1))},
        lambda a, b: np.array([metrics.probability_of_improvement(a, b)]),
        reps=1000,
    )
    assert [ours.low, ours.high] == pytest.approx(intervals["pair"][:, 0], abs=0.02)


def test_mean_interval_is_close_to_scipy():
    sample = three_tasks(6, 20)[0]
    ours = stats.mean_estimate(sample, generator(), resamples=20000)
    theirs = scipy_stats.bootstrap(
        (sample,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours.value == sample.mean()
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.004)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (299, 300), (1, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(successes, episodes, confidence):
    ours = stats.wilson_interval(successes, episodes, confidence)
    theirs = scipy_stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=1e-12)


@given(arrays(np.int64, st.integers(1, 30), elements=st.integers(-2, 2)))
def test_sign_test_equals_scipy(differences):
    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    ours = stats.sign_test(differences.astype(float))
    if positive + negative == 0:
        assert ours == 1.0
    else:
        assert ours == pytest.approx(scipy_stats.binomtest(positive, positive + negative).pvalue, abs=1e-12)


def test_sign_test_of_many_pairs_does_not_overflow():
    assert stats.sign_test(np.ones(1000)) == pytest.approx(2.0**-999)


# -- properties -------------------------------------------------------------------------------------------------------


@given(runs)
@settings(max_examples=50, deadline=None)
def test_mean_interval_lies_within_the_runs_and_holds_the_value(sample):
    estimate = stats.mean_estimate(sample, generator(), resamples=200)
    assert estimate.n == len(sample)
    if len(sample) == 1:
        assert estimate.low is None
        return
    slack = 1e-12
    assert sample.min() - slack <= estimate.low <= estimate.high <= sample.max() + slack


@given(runs)
def test_interquartile_mean_ignores_order_and_stays_between_the_quartiles(sample):
    value = stats.interquartile_mean(sample)
    assert value == pytest.approx(float(stats.interquartile_mean(sample[::-1])))
    assert sample.min() - 1e-12 <= value <= sample.max() + 1e-12


@given(runs, runs)
@settings(max_examples=50, deadline=None)
def test_probability_of_improvement_is_antisymmetric(x, y):
    one = stats.probability_of_improvement([x], [y], generator(), resamples=50).value
    other = stats.probability_of_improvement([y], [x], generator(), resamples=50).value
    assert one + other == pytest.approx(1)


@given(st.integers(0, 200).flatmap(lambda k: st.tuples(st.just(k), st.integers(max(1, k), 200))))
def test_wilson_is_symmetric_and_ordered(counts):
    successes, episodes = counts
    one, other = stats.wilson_interval(successes, episodes), stats.wilson_interval(episodes - successes, episodes)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)


@given(runs)
def test_regret_is_one_minus_the_mean_score(sample):
    assert stats.evaluation_regret(sample) == pytest.approx(1 - sample.mean())
    assert stats.training_regret(sample) == pytest.approx(1 - sample.mean())


@given(arrays(np.float64, (5, 8), elements=scores), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_selection_lies_between_worst_and_best_held_out_episodes(episode_scores, budget):
    value = stats.budgeted_selection(episode_scores, budget, generator(), repeats=50)
    assert episode_scores.min() - 1e-12 <= value <= episode_scores.max() + 1e-12


def test_same_generator_same_interval_and_other_stream_another():
    sample = three_tasks(7)[0]
    assert stats.mean_estimate(sample, generator("a")) == stats.mean_estimate(sample, generator("a"))
    assert stats.mean_estimate(sample, generator("a")) != stats.mean_estimate(sample, generator("b"))


def test_strata_are_resampled_within_their_task():
    # two tasks without any spread between runs: resampling within tasks changes nothing, across tasks it would
    estimate = stats.stratified_estimate([np.zeros(5), np.ones(5)], stats.mean, generator())
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 10)


def test_band_is_the_interval_at_each_point():
    curves = np.stack(three_tasks(8, 6), axis=1)
    low, high = stats.bootstrap_band(curves, generator(), resamples=20000)
    for point in range(curves.shape[1]):
        expected = stats.mean_estimate(curves[:, point], generator("other"), resamples=20000)
        assert [low[point], high[point]] == pytest.approx([expected.low, expected.high], abs=0.01)


# -- small cases by hand ----------------------------------------------------------------------------------------------


def test_a_bare_mean_is_refused():
    with pytest.raises(ValueError, match="needs its interval"):
        stats.Estimate(0.5, None, None, 3)
    assert stats.Estimate(0.5, None, None, 1).text() == "0.50 (one run)"
    assert stats.Estimate(-0.001, -0.2, 0.25, 4).text() == "0.00 [-0.20, 0.25]"


def test_dip_looks_at_a_tenth_of_the_steps_but_at_two_points_at_least():
    steps = np.array([0, 100, 200, 300, 1000])
    assert stats.initial_dip(steps, np.array([0.8, 0.6, 0.3, 0.0, 1.0])) == pytest.approx(0.5)
    steps = np.arange(0, 1001, 10)
    falling = np.linspace(1, 0, 101)
    assert stats.initial_dip(steps, falling) == pytest.approx(0.1)
    assert stats.initial_dip(np.array([0, 5, 10]), np.array([0.2, 0.5, 0.4])) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="step 0"):
        stats.initial_dip(np.array([1, 2]), np.array([0.0, 0.0]))


def test_training_regret_counts_what_was_not_taken_as_failure():
    assert stats.training_regret(np.array([1.0, 0.5]), completed=0.5) == pytest.approx(0.5 * 0.25 + 0.5)
    assert stats.training_regret(np.zeros(0), completed=0.0) == 1.0
    with pytest.raises(ValueError, match="expected training episodes"):
        stats.training_regret(np.zeros(0))


def test_selection_finds_the_good_checkpoint_with_enough_budget_and_not_with_one_episode():
    episode_scores = np.stack([np.zeros(20), np.ones(20), np.zeros(20)])
    assert stats.budgeted_selection(episode_scores, 3, generator()) == 1.0
    assert stats.budgeted_selection(episode_scores, 1, generator()) == pytest.approx(1 / 3, abs=0.08)
    assert stats.budgeted_selection(episode_scores, 200, generator()) == 1.0


def test_selection_prefers_the_latest_of_equals():
    # the later checkpoint ties with the first when its good episode is seen; then its bad one is held out
    value = stats.budgeted_selection(np.array([[1.0, 1.0], [1.0, 0.0]]), 2, generator(), repeats=4000)
    assert value == pytest.approx(0.5, abs=0.04)


def test_selection_is_not_optimistic():
    draw = np.random.default_rng(0)
    coins = (draw.random((40, 10, 20)) < 0.5).astype(float)  # no checkpoint is better than another
    chosen = [stats.budgeted_selection(coin, 50, generator(str(i)), repeats=50) for i, coin in enumerate(coins)]
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.06)
    assert coins.mean(axis=2).max(axis=1).mean() > 0.6  # the hindsight best says otherwise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.stratified_estimate([], stats.mean, generator()), "at least one run"),
        (lambda: stats.wilson_interval(3, 2), "successes <= episodes"),
        (lambda: stats.budgeted_selection(np.ones((3, 1)), 5, generator()), "two episodes"),
        (lambda: stats.training_regret(np.ones(2), completed=1.5), "completed share"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- do the intervals hold what they say? -----------------------------------------------------------------------------


def coverage_of_the_mean(count, trials=600):
    draw = np.random.default_rng(count)
    hits = 0
    for trial in range(trials):
        estimate = stats.mean_estimate(draw.normal(0.5, 0.1, count), generator(f"coverage/{count}/{trial}"), 500)
        hits += estimate.low <= 0.5 <= estimate.high
    return hits / trials


def test_coverage_of_the_bootstrap_is_what_the_documentation_says():
    assert coverage_of_the_mean(30) == pytest.approx(0.93, abs=0.03)
    assert coverage_of_the_mean(10) == pytest.approx(0.90, abs=0.035)
    assert coverage_of_the_mean(4) == pytest.approx(0.80, abs=0.05)
    assert coverage_of_the_mean(3) == pytest.approx(0.74, abs=0.06)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_coverage_of_wilson(rate):
    episodes = 40
    counts = np.arange(episodes + 1)
    chance = np.array([math.comb(episodes, k) * rate**k * (1 - rate) ** (episodes - k) for k in counts])
    inside = [stats.wilson_interval(int(k), episodes) for k in counts]
    covered = sum(p for p, e in zip(chance, inside, strict=True) if e.low <= rate <= e.high)
    assert covered == pytest.approx(0.95, abs=0.03)


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_of_one_value_give_the_interval_of_the_mean():
    sample = np.random.default_rng(0).normal(size=40)
    ours = stats.cluster_estimate(sample, list(range(40)), generator("clusters"), 20000)
    plain = stats.mean_estimate(sample, generator("clusters"), 20000)
    assert ours.value == pytest.approx(plain.value) == pytest.approx(sample.mean())
    assert ours.low == pytest.approx(plain.low, abs=0.02)
    assert ours.high == pytest.approx(plain.high, abs=0.02)
    assert ours.n == 40


def test_repeating_a_value_within_its_cluster_adds_no_certainty():
    sample = np.random.default_rng(1).normal(size=20)
    names = [f"user {i}" for i in range(20)]
    once = stats.cluster_estimate(sample, names, generator("repeat"))
    often = stats.cluster_estimate(np.repeat(sample, 9), list(np.repeat(names, 9)), generator("repeat"))
    assert (often.value, often.low, often.high, often.n) == pytest.approx((once.value, once.low, once.high, 20))
    naive = stats.mean_estimate(np.repeat(sample, 9), generator("repeat"))
    assert naive.high - naive.low < 0.5 * (often.high - often.low)


def test_large_clusters_weigh_more_and_order_does_not_matter():
    values, names = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"]
    first = stats.cluster_estimate(values, names, generator("order"))
    assert (first.value, first.low, first.high, first.n) == (0.25, 0.0, 1.0, 2)


def test_one_cluster_has_no_interval_and_mismatches_are_refused():
    assert stats.cluster_estimate(np.ones(3), ["a"] * 3, generator()).low is None
    with pytest.raises(ValueError, match="as many clusters as values"):
        stats.cluster_estimate(np.ones(3), ["a"] * 2, generator())
    with pytest.raises(ValueError, match="at least one"):
        stats.cluster_estimate(np.ones(0), [], generator())
