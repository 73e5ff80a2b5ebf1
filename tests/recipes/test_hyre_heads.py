"""Users, head sets and ways of adapting of the HyRe studies."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from steelyard.adapt.base import Support
from steelyard.adapt.choose import Auto
from steelyard.adapt.finetune import FineTuneHead
from steelyard.adapt.population import GaussianHeads, HeadMAP, HyReThenMAP
from steelyard.adapt.reweight import HyRe
from steelyard.data.generated_tastes import TastesConfig, generate_tastes
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.nets.ensemble import HeadsConfig
from steelyard.recipes import hyre_adapting as ways
from steelyard.recipes.hyre_heads import HeadSpec, Training, logistic_head, see, train_heads
from steelyard.recipes.hyre_population import Population, load_users, make_split

POPULATION = Population(
    tastes=TastesConfig(users=26, items=120, features=12, axes=3),
    splits=1,
    train=12,
    validation=6,
    targets=8,
    train_pairs=60,
    test_pairs=30,
    shots=(1, 2, 5, 10),
    draws=3,
)
TRAINING = Training(trunk=16, epochs=3, batch_size=256)


@pytest.fixture(scope="module")
def tastes():
    return generate_tastes(POPULATION.tastes, 0)


@pytest.fixture(scope="module")
def split(tastes):
    return make_split(tastes, POPULATION, 0)


@pytest.fixture(scope="module")
def seen(split):
    heads = train_heads(HeadSpec("users"), split, TRAINING)
    return see(heads, split.validation), see(heads, split.targets)


# -- users ------------------------------------------------------------------------------------------------------------


def test_adaptation_and_training_items_are_never_tested(tastes, split):
    """The promise of the study: what a user is tested on it never adapts to, and no user is in two parts."""

    def items(first, second):
        return {row.tobytes() for row in np.concatenate([first, second]).reshape(-1, first.shape[-1])}

    names = [*split.train_names, *split.validation.names, *split.targets.names]
    assert len(set(names)) == len(names) == POPULATION.users
    for users in (split.validation, split.targets):
        for user in range(len(users.names)):
            adapting = items(users.first[user], users.second[user])
            testing = items(users.test_first[user], users.test_second[user])
            assert adapting
            assert testing
            assert not adapting & testing


def test_labels_say_which_item_the_user_likes(tastes, split):
    by_name = {taste.name: taste for taste in tastes}
    users = split.targets
    assert 0.3 < users.labels.mean() < 0.7
    for user, name in enumerate(users.names):
        taste = by_name[name]
        scaled = ((taste.features - split.mean) / split.scale).astype(np.float32)
        liked = {row.tobytes() for row in scaled[taste.liked]}
        first = np.array([row.tobytes() in liked for row in users.test_first[user]])
        second = np.array([row.tobytes() in liked for row in users.test_second[user]])
        np.testing.assert_array_equal(first, users.test_labels[user] == 1)
        np.testing.assert_array_equal(second, users.test_labels[user] == 0)


def test_a_split_is_a_function_of_its_number(tastes, split):
    again, other = make_split(tastes, POPULATION, 0), make_split(tastes, POPULATION, 1)
    np.testing.assert_array_equal(split.first, again.first)
    np.testing.assert_array_equal(split.targets.first, again.targets.first)
    assert split.targets.names != other.targets.names
    # smaller shots take the first pairs of larger ones, whatever their number: draws do not move
    fewer = make_split(tastes, dataclasses.replace(POPULATION, test_pairs=10), 0)
    np.testing.assert_array_equal(split.targets.first, fewer.targets.first)


def test_conflict_swaps_both_sides_of_some_users_and_touches_no_target(split):
    other = split.with_conflict(0.25)
    swapped = np.array([name.startswith("not ") for name in other.train_names])
    assert swapped.sum() == 3
    of_swapped = swapped[split.groups]
    np.testing.assert_array_equal(other.first[of_swapped], split.second[of_swapped])
    np.testing.assert_array_equal(other.second[of_swapped], split.first[of_swapped])
    np.testing.assert_array_equal(other.first[~of_swapped], split.first[~of_swapped])
    assert other.targets is split.targets


def test_wrong_populations_are_named(tastes):
    with pytest.raises(ConfigError, match="personas need --data"):
        load_users(Population(source="personas"), Console())
    with pytest.raises(DataError, match=r"a split needs 90 users .* found 26"):
        make_split(tastes, Population(), 0)
    with pytest.raises(ConfigError, match="shots must be increasing"):
        Population(shots=(2, 1))


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [15, 20, 60])
def test_logistic_head_equals_scipy(rows):
    """Below, at and above as many pairs as features: both spaces of Newton's method."""
    optimize = pytest.importorskip("scipy.optimize")
    differences = np.random.default_rng(rows).normal(size=(rows, 20))
    differences[1] = differences[0]  # repeated pairs make the dual singular

    def objective(w):
        f = differences @ w
        return np.logaddexp(0, -f).sum() + 0.35 * w @ w, -differences.T @ (1 / (1 + np.exp(f))) + 0.7 * w

    found = optimize.minimize(
        objective, np.zeros(20), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    np.testing.assert_allclose(logistic_head(differences, 0.7), found.x, atol=2e-5)


SPECS = (
    HeadSpec("users"),
    HeadSpec("clusters", sees="one cluster", heads=HeadsConfig(num_heads=4)),
    HeadSpec("some", sees="some users", share=0.2, heads=HeadsConfig(num_heads=7, pooled=False)),
    HeadSpec("pca", heads=HeadsConfig(kind="pca", num_heads=8)),
    HeadSpec("shared", "trunk", "everything", HeadsConfig(num_heads=5, prior="mlp")),
    HeadSpec("trunk users", "trunk", "one user"),
)


@pytest.mark.parametrize(
    ("spec", "members"), list(zip(SPECS, (13, 5, 7, 9, 6, 13), strict=True)), ids=lambda x: getattr(x, "name", str(x))
)
def test_head_sets_are_antisymmetric_standardised_and_reproducible(split, spec, members):
    heads = train_heads(spec, split, TRAINING)
    assert heads.num_members == members
    ours, features = heads.sees(split.first, split.second)
    theirs, opposite = heads.sees(split.second, split.first)
    assert ours.shape == (len(split.first), members)
    np.testing.assert_allclose(ours, -theirs, atol=1e-5)
    np.testing.assert_allclose(features, -opposite, atol=1e-5)
    np.testing.assert_allclose(np.sqrt((ours**2).mean(0)), 1, rtol=1e-3)
    again, _ = train_heads(spec, split, TRAINING).sees(split.first[:9], split.second[:9])
    np.testing.assert_allclose(again, ours[:9], atol=1e-5)


def test_members_without_standardisation_are_the_plain_logistic_heads(split):
    heads = train_heads(HeadSpec("users"), split, TRAINING)
    raw = see(heads, split.targets).of_members(slice(None), heads.scale)
    differences = split.first.astype(np.float64) - split.second
    pooled = logistic_head(differences, TRAINING.l2)
    tests = split.targets.test_first.astype(np.float64) - split.targets.test_second
    np.testing.assert_allclose(raw.test_members[..., 0], tests @ pooled, rtol=1e-6, atol=1e-9)


def test_user_heads_know_their_own_user_best(split):
    margins, _ = train_heads(HeadSpec("users", heads=HeadsConfig(pooled=False)), split, TRAINING).sees(
        split.first, split.second
    )
    right = np.stack([(margins[split.groups == user] > 0).mean(0) for user in range(12)])
    assert (np.diag(right) >= right.max(1) - 0.05).all()
    assert np.diag(right).mean() > right[~np.eye(12, dtype=bool)].mean() + 0.2


def test_unsolvable_specs_are_refused():
    with pytest.raises(ValueError, match="solved exactly"):
        HeadSpec("no", heads=HeadsConfig(kind="mlp"))


# -- adapting ---------------------------------------------------------------------------------------------------------


def by_hand(method, seen, n, user=2, draw=1):
    """Return the test outputs of one user by the library's own call."""
    rows = (user, draw, slice(0, n))
    support = Support(seen.members[rows][..., None], seen.labels[rows], seen.features[rows])
    combination = method.begin(seen.members.shape[3]).update(support).combination()
    return combination.apply(seen.test_members[user][..., None], seen.test_features[user])[:, 0]


BOTH = {
    "Gaussian over heads": {5: {"heads_weight": 4.0, "feature_weight": 0.1}},
    "HyRe": {5: {"eta": 2.0}},
    "head MAP": {5: {"variance": 0.3}},
}


@pytest.mark.parametrize(
    ("way", "settings", "method"),
    [
        (ways.Reweighting(), {"eta": 2.0}, HyRe(eta=2.0)),
        (ways.Reweighting(mean=True), {"eta": 5.0}, HyRe(eta=1.0)),
        (ways.Reweighting(mixes=(0.3,)), {"eta": 2.0, "mix": 0.3}, HyRe(eta=2.0, mix=0.3)),
        (ways.Reweighting(priors=(0.4,)), {"eta": 2.0, "prior": 0.4}, HyRe(eta=2.0, prior=[0.4] + [0.05] * 12)),
        (ways.auto(BOTH), {}, Auto((GaussianHeads(4.0, 0.1), HyRe(eta=2.0), HeadMAP(0.3)))),
        (
            ways.Gaussian("g", GaussianHeads, ways.GAUSSIAN),
            {"heads_weight": 4.0, "feature_weight": 0.1},
            GaussianHeads(4.0, 0.1),
        ),
        (ways.Gaussian("m", HeadMAP, {}), {"variance": 0.3}, HeadMAP(0.3)),
        (ways.ThenMAP({5: 2.0}), {"variance": 0.3}, HyReThenMAP(HyRe(eta=2.0), 0.3)),
        (ways.FineTuning("f", ways.TUNING), {"steps": 10, "learning_rate": 0.1}, FineTuneHead(10, 0.1)),
        (ways.OneByOne("one", lambda n, variance: HeadMAP(variance), {}), {"variance": 0.3}, HeadMAP(0.3)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_many_users_at_once_equal_one_by_one(seen, way, settings, method):
    outputs = way.outputs(seen[1].draws(2), 5, settings)
    assert outputs.shape == (8, 2, 30)
    np.testing.assert_allclose(outputs[2, 1], by_hand(method, seen[1], 5), rtol=1e-6, atol=1e-8)


def test_one_pass_of_fine_tuning_leaves_every_number_of_steps(seen):
    way = ways.FineTuning("f", ways.TUNING)
    steps = (1, 3, 30)
    for count, outputs in zip(steps, way.paths(seen[1], 5, 0.1, steps), strict=True):
        np.testing.assert_allclose(outputs[2, 1], by_hand(FineTuneHead(count, 0.1), seen[1], 5), rtol=1e-6)


def test_settings_are_chosen_by_accuracy_and_a_run_away_is_no_choice(seen):
    validation, _ = seen
    settings, _, accuracy = ways.choose(ways.Reweighting(), validation, 5)
    scores = {
        eta: validation.accuracy(ways.Reweighting().outputs(validation, 5, {"eta": eta})).mean() for eta in ways.ETAS
    }
    assert scores[settings["eta"]] == accuracy == max(scores.values())
    wild = ways.FineTuning("f", {"steps": (1, 300), "learning_rate": (0.1, 1e308)})
    with pytest.raises(NonFiniteError, match="runs away"):
        wild.outputs(validation, 5, {"steps": 300, "learning_rate": 1e308})
    assert ways.choose(wild, validation, 5)[0]["learning_rate"] == 0.1


def test_an_edge_of_the_grid_is_named_and_one_step_is_none(seen):
    narrow = ways.Reweighting(etas=(1e-6, 1e-5))
    assert ways.choose(narrow, seen[0], 5)[1] == ("eta",)
    few = ways.FineTuning("f", {"steps": (1, 2), "learning_rate": (1e-9,)})
    assert ways.choose(few, seen[0], 5)[:2] == ({"steps": 1, "learning_rate": 1e-9}, ())


def test_one_eta_for_every_n_is_the_best_on_their_mean(seen):
    validation, _ = seen
    for way in (ways.Reweighting(), ways.Reweighting(mean=True)):
        scores = {
            eta: np.mean([validation.accuracy(way.outputs(validation, n, {"eta": eta})).mean() for n in (1, 10)])
            for eta in ways.ETAS
        }
        choice = ways.choose(way, validation, 1, 10)
        assert scores[choice.settings["eta"]] == choice.accuracy == max(scores.values())
    # with one eta the sum trusts more labels more, and the mean does not
    total, mean = (ways.Reweighting(mean=mean).weights(validation, 10, 2.0) for mean in (False, True))
    assert (total.max(2) >= mean.max(2) - 1e-12).all()
    assert total.max(2).mean() > mean.max(2).mean() + 0.05


def test_rows_hold_what_was_chosen_and_how_targets_fare(seen):
    trials = ways.Trials({"split": 0}, *seen)
    trials.tune(ways.Reweighting(), 2, 5)
    (choice,) = (row["values"] for row in trials.rows if row["kind"] == "settings")
    assert choice["n"] == 0
    assert 0 < choice["validation"] <= 1
    eta = float(choice["settings"].split()[1])
    tested = seen[1].accuracy(ways.Reweighting().outputs(seen[1], 5, {"eta": eta})).mean(1)
    rows = [row["values"]["accuracy"] for row in trials.rows if row["kind"] == "rows" and row["values"]["n"] == 5]
    np.testing.assert_allclose(rows, tested)


def test_both_signs_mirror_everything(split):
    targets = split.targets
    both = see(train_heads(HeadSpec("users"), split, TRAINING), targets.both_signs())
    users = len(targets.names)
    assert both.names[users:] == tuple(f"not {name}" for name in targets.names)
    np.testing.assert_array_equal(both.labels[users:], 1 - targets.labels)
    np.testing.assert_allclose(ways.still(both, "single").mean(), 0.5)
    right = ways.still(both, "uniform")
    np.testing.assert_allclose(right[:users] + right[users:], 1)


def test_still_methods_and_the_oracle(seen):
    _, targets = seen
    right = (np.sign(targets.test_members) == (2 * targets.test_labels - 1)[..., None]).mean(1)
    np.testing.assert_allclose(ways.still(targets, "single")[:, 0], right[:, 0])
    np.testing.assert_allclose(ways.best_head(targets)[:, 0], right.max(1))
    assert (ways.best_head(targets) >= ways.still(targets, "single")).all()
    scaled = targets.of_members(slice(1, None), np.full(13, 2.0))
    np.testing.assert_allclose(scaled.test_members, 2 * targets.test_members[..., 1:])
    assert targets.draws(1).members.shape[1] == 1


def test_five_labels_help_users_of_a_minority(split):
    """The claim of the study in small: users take sides, and re-weighting finds which."""
    other = split.with_conflict(0.3)
    heads = train_heads(HeadSpec("users"), other, TRAINING)
    validation, targets = (see(heads, users.both_signs()) for users in (other.validation, other.targets))
    settings, *_ = ways.choose(ways.Reweighting(), validation, 10)
    accuracy = targets.accuracy(ways.Reweighting().outputs(targets, 10, settings)).mean()
    assert accuracy > ways.still(targets, "single").mean() + 0.1
