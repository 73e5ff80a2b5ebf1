"""E6 and the network that is fine-tuned whole: what is compared, and what tables say of made-up rows."""

import numpy as np
import pytest
import torch

from steelyard.adapt.finetune import fine_tune_network
from steelyard.data.generated_tastes import TastesConfig, generate_tastes
from steelyard.data.labelled import LabelledBatch
from steelyard.recipes import hyre_ablations as ablations
from steelyard.recipes.hyre_adapting import Trials
from steelyard.recipes.hyre_heads import Training, see, train_heads
from steelyard.recipes.hyre_networks import NETWORK, SINGLE_NETWORK, TUNED, network_table, tuned
from steelyard.recipes.hyre_personas_page import MAIN, Scores
from steelyard.recipes.hyre_population import Population, make_split

POPULATION = Population(
    tastes=TastesConfig(users=16, items=80, features=12, axes=3),
    splits=1, train=8, validation=3, targets=4, train_pairs=40, test_pairs=20, shots=(1, 2, 5), draws=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def split():
    return make_split(generate_tastes(POPULATION.tastes, 0), POPULATION, 0)


def rows(heads, method, n, level, splits=2):
    return [
        {"split": split, "world": "agree", "heads": heads, "method": method, "n": n, "target": f"user {user}",
         "accuracy": (level if np.isscalar(level) else level[split]) + 0.01 * user}
        for split in range(splits) for user in range(3)
    ]  # fmt: skip


def table(kinds, title, counts=(10, 30)):
    parts = [part for section in ablations.sections(kinds, counts, 2) for part in section.parts]
    found = [part for part in parts if getattr(part, "title", None) == title]
    return {row[0]: row[1:] for row in found[0].rows} if found else None


def kinds(rows=(), settings=()):
    return {"rows": list(rows), "settings": list(settings), "queries": [], "diversity": []}


def test_head_sets_have_the_sizes_that_were_asked_for():
    sets = ablations.head_sets((10, 30))
    assert sets[0].name == MAIN
    names = [spec.name for spec in sets]
    assert len(set(names)) == len(names)
    for family in ablations.FAMILIES:
        for count in (10, 30):
            found = [spec for spec in sets if spec.name == ablations.sized(family, count)]
            assert [spec.heads.num_heads for spec in found] == ([] if family == ablations.USERS else [count])
    assert {spec.heads.prior_scale for spec in sets if spec.heads.prior == "mlp"} == set(ablations.BETAS)


def test_fewer_users_are_the_first_heads_beside_the_pooled_one(split):
    heads = train_heads(ablations.FAMILIES[ablations.USERS], split, Training(l2=1.0))
    trials = Trials({"heads": MAIN}, see(heads, split.validation), see(heads, split.targets))
    few, more = ablations.fewer_users(trials, (2, 5, 8, 100))
    assert few.common["heads"] == "user heads, 2 heads"
    np.testing.assert_array_equal(few.targets.members, trials.targets.members[..., :3])
    assert more.validation.members.shape[3] == 6
    assert not few.rows


def test_every_switch_leaves_rows_for_every_n(split):
    heads = train_heads(ablations.FAMILIES[ablations.USERS], split, Training(l2=1.0))
    trials = Trials({"heads": MAIN}, see(heads, split.validation), see(heads, split.targets))
    ablations.switch(trials, heads.scale, (1, 5))
    found = {(row["values"]["method"], row["values"]["n"]) for row in trials.rows if row["kind"] == "rows"}
    assert found == {(name, n) for name in ablations.SWITCHES[3:] for n in (1, 5)}
    text = {row["values"]["method"]: row["values"]["settings"] for row in trials.rows if row["kind"] == "settings"}
    assert "mix" in text[ablations.MIXED]
    assert "prior" in text[ablations.PRIOR]


def test_the_priors_scale_is_chosen_on_validation_users_not_on_the_unseen_ones():
    names = ["shared base, 30 heads", *(ablations.beta_name(beta) for beta in ablations.BETAS)]
    levels = {name: (0.5 + 0.1 * place, 0.9 - 0.1 * place) for place, name in enumerate(names)}
    found = [row for name, level in levels.items() for row in rows(name, "HyRe", 5, level)]
    found += [row for name in names for row in rows(name, "uniform mean", 0, 0.5)]
    validation = {names[2]: (0.9, 0.1), names[0]: (0.2, 0.3)}  # split 0 takes beta 5, split 1 beta 0
    settings = [
        {"split": split, "heads": name, "method": "HyRe", "n": 5, "validation": validation.get(name, (0, 0))[split]}
        for name in names for split in range(2)
    ]  # fmt: skip
    chosen = table(kinds(found, settings), "Scale of the frozen priors")["beta chosen on validation users"]
    assert chosen == ("51.0", "81.0", "30.0")  # (0.7 + 0.9) / 2, and 1 point more for the users
    assert table(kinds(found, settings[:-1]), "Scale of the frozen priors") is None


def test_tables_show_gains_and_leave_out_what_was_not_run():
    found = rows(MAIN, "HyRe", 5, 0.9) + rows(MAIN, "uniform mean", 0, 0.8) + rows(MAIN, ablations.ONE_ETA, 5, 0.85)
    found += rows("+-PCA, 10 heads", "HyRe", 5, 0.7) + rows("+-PCA, 10 heads", "uniform mean", 0, 0.75)
    sizes = table(kinds(found), "How many heads")
    assert sizes["+-PCA"] == ("71.0 (-5.0)", "", "")
    assert sizes["user heads"] == ("", "", "91.0 (10.0)")
    switches = table(kinds(found), "The rule's switches, users mostly agree")
    assert switches == {"HyRe": ("91.0", ""), ablations.ONE_ETA: ("86.0", "-5.0 [-5.0, -5.0]")}


def test_networks_are_each_users_own(split):
    learner = train_heads(NETWORK, split, Training(trunk=8, epochs=2, batch_size=64)).learner
    users = split.targets
    (outputs,) = tuned(learner, users, 5, 0.01, (4,))
    assert outputs.shape == (4, 1, 20)
    first, second, labels, *tests = (
        torch.from_numpy(part).float()
        for part in (users.first[2, 0, :5], users.second[2, 0, :5], users.labels[2, 0, :5], users.test_first[2],
                     users.test_second[2])
    )  # fmt: skip
    alone = fine_tune_network(learner, LabelledBatch(first, labels, second), 4, 0.01)
    expected = alone.members(LabelledBatch(tests[0], torch.zeros(20), tests[1]))[:, 0, 0]
    np.testing.assert_allclose(outputs[2, 0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_networks_are_compared_on_their_own_splits_only():
    wide = list(TUNED)[1]
    found = rows(MAIN, "HyRe", 5, (0.9, 0.1)) + rows(MAIN, "Gaussian over heads", 5, (0.92, 0.1))
    found += rows(MAIN, "fine-tune head (wide grid)", 5, (0.8, 0.1))
    found += rows(NETWORK.name, SINGLE_NETWORK, 0, 0.75, splits=1)
    for name in TUNED:
        found += rows(NETWORK.name, name, 5, 0.85, splits=1)
    shown = {row[0]: row[1] for row in network_table(Scores(found), "agree", (5, 20)).rows}
    assert shown["HyRe"] == "91.0"
    assert shown[wide] == "86.0 (5.0 [5.0, 5.0])"
    assert shown[SINGLE_NETWORK] == "76.0 (15.0 [15.0, 15.0])"
    # in the other split the two are equal, which does not count
    assert shown["fine-tune head (wide grid)"] == "81.0 (10.0 [10.0, 10.0])"
    assert network_table(Scores(found), "conflict", (5, 20)) is None
