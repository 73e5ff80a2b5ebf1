"""Profiles: round trips, sizes, refusals; and serving many people: mixed batches, idempotent feedback, collapsing."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.base import Support
from steelyard.adapt.choose import Auto, BestHead, Uniform
from steelyard.adapt.head_set import LinearHeads, margins
from steelyard.adapt.losses import BradleyTerry, CrossEntropy, GaussianNLL, ZeroOne
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.population import GaussianHeads, HeadMAP, HyReThenMAP, RidgeCombination
from steelyard.adapt.profile import MAX_SEEN, Profile, read_profile, seen_hash, write_profile
from steelyard.adapt.profile_values import content_hash
from steelyard.adapt.reweight import HyRe
from steelyard.adapt.simplex import SimplexMAP
from steelyard.errors import ConfigError, DataError

H, D = 100, 12


def generator(seed=0):
    return np.random.default_rng(seed)


def linear(seed=0, task="preference", outputs=1, members=H, bias=True):
    g = generator(seed)
    offset = g.normal(size=(members, outputs)) if bias else np.zeros((members, outputs))
    return LinearHeads(g.normal(size=(members, outputs, D)), offset, task)


class CurvedHeads(LinearHeads):
    """Members that are not linear: no vector to collapse to."""

    def members(self, features):
        return np.tanh(super().members(features))

    def linear(self):
        return None


def curved(seed=0):
    found = linear(seed)
    return CurvedHeads(found.weight, found.bias)


def labelled(people, seed, n=5, profile=None):
    """A person of random taste who has labelled n pairs."""
    g = generator(seed)
    profile = people.new() if profile is None else profile
    taste = g.normal(size=D)
    for number in range(n):
        first, second = g.normal(size=(2, D))
        profile = people.feedback(profile, f"{seed}/{number}", first, second, float((first - second) @ taste > 0))
    return profile


METHODS = [
    HyRe(),
    HyRe(BradleyTerry(0.1), eta=2.5, mix=0.05),
    HyRe(ZeroOne(), name="HyRe 0-1"),
    HyRe(prior=np.arange(1, H + 1) / (H * (H + 1) / 2)),
    GaussianHeads(),
    GaussianHeads(feature_weight=0.3),
    RidgeCombination(2.0),
    HeadMAP(),
    HyReThenMAP(HyRe(eta=2.0)),
    SimplexMAP(),
    BestHead(),
    Uniform(),
    Auto((HyRe(), GaussianHeads(feature_weight=0.1))),
]


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}")
@pytest.mark.parametrize("heads", [linear(), curved()], ids=["linear", "curved"])
def test_exact_profiles_go_on_as_if_never_written(method, heads):
    people = Personalizer(heads, method)
    before = labelled(people, 1)
    after = Profile.from_json(before.to_json())
    assert after.hash == before.hash
    assert after.to_json() == before.to_json()
    items = generator(9).normal(size=(20, D))
    np.testing.assert_array_equal(people.score(items, before), people.score(items, after))
    np.testing.assert_array_equal(Personalizer(heads, method).score(items, after), people.score(items, before))
    first, second = generator(10).normal(size=(2, D))
    on = [people.feedback(profile, "one more", first, second, 1.0) for profile in (before, after)]
    assert on[0].to_json() == on[1].to_json()
    assert on[0].n == 6
    assert on[0].hash != before.hash


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}")
def test_a_profile_is_what_adapting_by_hand_gives(method):
    heads, g = linear(), generator(2)
    people = Personalizer(heads, method)
    first, second, labels = g.normal(size=(7, D)), g.normal(size=(7, D)), g.integers(0, 2, 7).astype(float)
    profile = people.new()
    for row in range(7):
        profile = people.feedback(profile, str(row), first[row], second[row], labels[row])
    posterior = method.begin(H).update(Support(margins(heads, first, second), labels, first - second))
    items = g.normal(size=(9, D))
    expected = posterior.combination().apply(heads.members(items), items)[:, 0]
    np.testing.assert_allclose(people.score(items, profile), expected, rtol=1e-6, atol=1e-6)
    assert profile.n == 7
    assert profile.ess == pytest.approx(posterior.diagnostics()["ess"], rel=1e-6)


def test_one_at_a_time_equals_all_at_once():
    heads, g = linear(), generator(3)
    people = Personalizer(heads)
    first, second, labels = g.normal(size=(7, D)), g.normal(size=(7, D)), g.integers(0, 2, 7).astype(float)
    steps = people.new()
    for row in range(7):
        steps = people.feedback(steps, str(row), first[row], second[row], labels[row])
    once = people.profile(people.method.begin(H).update(people.support(first, second, labels)))
    np.testing.assert_allclose(steps.evidence, once.evidence, rtol=1e-12)


def test_nothing_known_is_the_prior():
    heads = linear()
    items = generator(4).normal(size=(6, D))
    people = Personalizer(heads)
    uniform = heads.members(items).mean(1)[:, 0]
    for profile in (None, people.new(), [None] * 6, [people.new(), None] * 3):
        np.testing.assert_allclose(people.score(items, profile), uniform, atol=1e-12)
    assert people.new().n == 0
    assert people.new().ess == pytest.approx(H)
    assert Profile.from_json(people.new().to_json()).to_json() == people.new().to_json()
    for method in METHODS:
        assert Profile.from_json(Personalizer(heads, method).new().to_json()).n == 0


# ---------------------------------------------------------------------------------------------------- the short form


@pytest.mark.parametrize("top", [10, 25, 40])
def test_short_profiles_are_below_a_kilobyte(top):
    people = Personalizer(linear(), HyRe(BradleyTerry(0.05), eta=1.5, mix=0.05))
    profile = labelled(people, 1)
    text = profile.to_json(top=top)
    assert len(text.encode()) < 1000
    content = json.loads(text)
    assert len(content["w"]) == top
    assert {"v", "head_id", "method", "eta", "loss", "n", "ess", "w", "hash"} <= content.keys()
    assert (content["v"], content["n"], content["eta"], content["loss"]) == (1, 5, 1.5, "bt")


SHARP = HyRe(eta=2.5, mix=0.2)


@pytest.mark.parametrize("method", [HyRe(), SHARP], ids=["plain", "sharp and mixed"])
def test_a_short_profile_keeps_the_largest_and_spreads_the_rest(method):
    """Of the weights before mixing: mixing twice would flatten them."""
    people = Personalizer(linear(), method)
    profile = labelled(people, 1)
    exact = people.posterior(profile).weights(mix=0)
    back = people.posterior(Profile.from_json(profile.to_json(top=10)))
    expected = people.posterior(profile).weights(mix=0, top=10)
    np.testing.assert_allclose(back.weights(mix=0), expected, rtol=5e-3, atol=1e-8)
    largest = np.argsort(-exact)[:10]
    np.testing.assert_allclose(back.weights(mix=0)[largest], exact[largest], rtol=1e-3)
    assert back.n == 5


@pytest.mark.parametrize("method", [HyRe(), SHARP], ids=["plain", "sharp and mixed"])
def test_short_with_all_members_is_nearly_exact_and_goes_on(method):
    people = Personalizer(linear(), method)
    profile = labelled(people, 1)
    short = Profile.from_json(profile.to_json(top=H))
    first, second = generator(10).normal(size=(2, D))
    on = [people.posterior(people.feedback(p, "x", first, second, 1.0)).weights() for p in (profile, short)]
    # weights below the least one that short profiles keep come back as that
    np.testing.assert_allclose(on[0], on[1], rtol=5e-3, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0.05, 10), st.integers(0, 10_000))
def test_short_profiles_hold_a_distribution_whatever_the_evidence(top, eta, seed):
    people = Personalizer(linear(), HyRe(eta=eta))
    posterior = people.method.begin(H).update_losses(generator(seed).exponential(size=(5, H)) * 20)
    text = people.profile(posterior).to_json(top=top)
    weights = people.posterior(Profile.from_json(text)).weights()
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    assert weights.argmax() == posterior.weights().argmax()


def test_a_member_of_weight_0_can_come_back():
    """One label too many against it must not silence a member for ever."""
    people = Personalizer(linear(members=3))
    posterior = people.method.begin(3).update_losses(np.array([[0.0, 900.0, 900.0]]))
    short = Profile.from_json(people.profile(posterior).to_json(top=1))
    again = people.posterior(short).update_losses(np.array([[100.0, 0.0, 100.0]]))
    assert again.weights().argmax() == 1


def test_eta_0_survives():
    people = Personalizer(linear(), HyRe(eta=0.0))
    short = Profile.from_json(labelled(people, 1).to_json(top=10))
    np.testing.assert_allclose(people.posterior(short).weights(), 1 / H)


def test_a_short_profile_of_another_method_scores_but_does_not_learn():
    people = Personalizer(linear(), GaussianHeads(feature_weight=0.5))
    profile = labelled(people, 1)
    short = Profile.from_json(profile.to_json(top=10))
    items = generator(5).normal(size=(4, D))
    np.testing.assert_array_equal(people.score(items, short), people.score(items, profile))
    with pytest.raises(DataError, match="holds the adapted function only and takes no more labels; use the exact form"):
        people.feedback(short, "x", items[0], items[1], 1.0)


# --------------------------------------------------------------------------------------------------------- refusals


def test_another_head_set_is_refused_in_one_sentence():
    profile = labelled(Personalizer(linear(0)), 1)
    people = Personalizer(linear(1))
    for use in (
        lambda: profile.require(linear(1), "ann.json"),
        lambda: people.score(np.zeros((1, D)), profile),
        lambda: people.score(np.zeros((2, D)), [None, profile]),
        lambda: people.feedback(profile, "x", np.zeros(D), np.ones(D), 1.0),
        lambda: people.posterior(profile),
    ):
        with pytest.raises(DataError, match="belongs to another head set") as caught:
            use()
        assert "\n" not in str(caught.value)


def _change(change):
    content = json.loads(labelled(Personalizer(linear()), 1).to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a profile in JSON"),
        ("{", "expected a profile in JSON"),
        ("[" * 100_000, "expected a profile in JSON"),
        ("[1]", "a JSON object with head_id and hash"),
        ('{"v": 1}', "a JSON object with head_id and hash"),
        (_change(lambda c: c.update(v=2)), "of version 1, found version 2"),
        (_change(lambda c: c.update(n=6)), "damaged or changed by hand"),
        (_change(lambda c: c.update(extra=1)), "damaged or changed by hand"),
        (_change(lambda c: c["evidence"].__setitem__(3, 0.0)), "damaged or changed by hand"),
        (_change(lambda c: c.update(hash="sha256:0")), "damaged or changed by hand"),
        (_change(lambda c: c.update(hash=None)), "damaged or changed by hand"),
        (_change(lambda c: c["evidence"].__setitem__(3, float("nan"))), "a number that is not finite"),
        (_change(lambda c: c["evidence"].__setitem__(3, float("inf"))), "a number that is not finite"),
        (_change(lambda c: c.pop("seen")), "damaged or changed by hand"),
    ],
)
def test_damaged_profiles_are_refused_in_one_sentence(text, said):
    with pytest.raises(DataError, match=said) as caught:
        Profile.from_json(text, "ann.json")
    assert str(caught.value).startswith("ann.json: ")
    assert "\n" not in str(caught.value)


def test_every_changed_character_is_found():
    text = labelled(Personalizer(linear(members=3)), 1).to_json()
    for place in range(0, len(text), 3):
        changed = text[:place] + ("7" if text[place] != "7" else "3") + text[place + 1 :]
        try:
            read = Profile.from_json(changed)
        except DataError:
            continue
        assert read.to_json() == text  # the last digit of a number, which is the same number


def _forged(change):
    """A profile changed by someone who computes the hash anew."""
    content = json.loads(labelled(Personalizer(linear()), 1).to_json())
    content.pop("hash")
    change(content)
    return json.dumps(content | {"hash": content_hash(content)})


def _forged_gaussian(change):
    content = json.loads(labelled(Personalizer(linear(), GaussianHeads(feature_weight=1.0)), 1).to_json())
    content.pop("hash")
    change(content)
    return json.dumps(content | {"hash": content_hash(content)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_forged(lambda c: c.pop("members")), "'members' is missing"),
        (_forged(lambda c: c.update(members=10**9)), "members is 1000000000"),
        (_forged(lambda c: c.update(members="3")), "members is '3'"),
        (_forged(lambda c: c.update(members=True)), "members is True"),
        (_forged(lambda c: c.update(members=99)), "evidence has 100 numbers for 99 members"),
        (_forged(lambda c: c.update(evidence=5)), "not a profile that this version reads"),
        (_forged(lambda c: c.update(evidence=["a"] * H)), "evidence is 'a'"),
        (_forged(lambda c: c.update(evidence=[1e300] * H)), "too large"),
        (_forged(lambda c: c.update(evidence=[10**400] * H)), "not a profile that this version reads"),
        (_forged(lambda c: c.update(n=-1)), "n is -1"),
        (_forged(lambda c: c.update(n=True)), "n is True"),
        (_forged(lambda c: c.update(task="poetry")), "task 'poetry'"),
        (_forged(lambda c: c.update(loss="zzz")), "loss: expected one of bt, ce, gaussian, zero_one, found 'zzz'"),
        (_forged(lambda c: c.update(loss=["bt"])), "not a profile that this version reads"),
        (_forged(lambda c: c.update(eta="high")), "expected those of HyRe"),
        (_forged(lambda c: c.update(eta=-1)), "eta must be"),
        (_forged(lambda c: c["settings"].update(loss_noise=2)), "noise must be"),
        (_forged(lambda c: c["settings"].update(temperature=2)), "expected those of HyRe"),
        (_forged(lambda c: c["settings"].update(prior=[1.0])), "the prior must be 100 weights"),
        (_forged(lambda c: c.update(settings=[])), "settings must be an object"),
        (_forged(lambda c: c.update(seen="abc")), "short hashes of 8 characters"),
        (_forged(lambda c: c.update(seen="a" * 8 * (MAX_SEEN + 1))), "at most 1000 short hashes"),
        (_forged(lambda c: c.update(w={"1": 1.0})), "unexpected evidence, w"),
        (_forged(lambda c: (c.pop("evidence"), c.update(w={"100": 1.0}))), "there is no member 100"),
        (_forged(lambda c: (c.pop("evidence"), c.update(w={"-1": 1.0}))), "there is no member -1"),
        (_forged(lambda c: (c.pop("evidence"), c.update(w={"1": 3.0}))), "the weights sum to 3"),
        (_forged(lambda c: (c.pop("evidence"), c.update(w={"1": -0.5}))), "1 is -0.5"),
        (_forged(lambda c: (c.pop("evidence"), c.update(w={}))), "w must hold weights"),
        (_forged(lambda c: c.pop("evidence")), "unexpected emptiness"),
        (_forged(lambda c: c.update(zzz=1)), "unexpected zzz"),
        (_forged_gaussian(lambda c: c.update(function=[1])), "not a profile that this version reads"),
        (_forged_gaussian(lambda c: c["function"]["coefficients"].update(shape=[99])), "do not fit the shape"),
        (_forged_gaussian(lambda c: c["function"]["coefficients"].update(f8="!!")), "not a profile that this"),
        (_forged_gaussian(lambda c: c["function"].pop("coefficients")), "'coefficients' is missing"),
        (_forged_gaussian(lambda c: c["function"].update(zzz=c["function"]["coefficients"])), "function must hold"),
        (_forged_gaussian(lambda c: c["examples"].pop("labels")), "'labels' is missing"),
        (_forged_gaussian(lambda c: c["examples"].pop("features")), "examples hold"),
        (_forged_gaussian(lambda c: c["examples"]["labels"].update(shape=[5, 1])), "examples of different number"),
    ],
)  # fmt: skip
def test_forged_profiles_do_no_harm(text, said):
    with pytest.raises(DataError, match=said) as caught:
        Profile.from_json(text, "ann.json")
    assert str(caught.value).startswith("ann.json: ")
    assert "\n" not in str(caught.value)


def test_a_function_of_other_features_is_refused_when_used():
    import base64

    narrow = {"shape": [1, 3], "f8": base64.b64encode(np.zeros(3).tobytes()).decode()}
    profile = Profile.from_json(_forged_gaussian(lambda c: c["function"].update(vector=narrow)))
    for heads in (linear(), curved()):
        with pytest.raises(DataError, match="expected 12 features"):
            Personalizer(heads, GaussianHeads(feature_weight=1.0)).score(np.zeros((1, D)), profile)
    wide = {"shape": [2, D], "f8": base64.b64encode(np.zeros(2 * D).tobytes()).decode()}
    profile = Profile.from_json(_forged_gaussian(lambda c: c["function"].update(vector=wide)))
    for heads in (linear(), curved()):
        with pytest.raises(DataError, match=r"has the shape \(2, 12\), expected \(1, 12\)"):
            Personalizer(heads, GaussianHeads(feature_weight=1.0)).score(np.zeros((1, D)), profile)


def test_profiles_hold_no_texts_and_whole_numbers_may_be_rewritten():
    """A JavaScript client writes 1.0 as 1: the same profile."""
    text = labelled(Personalizer(linear(), HyRe(eta=1.0)), 1).to_json()
    as_floats = json.dumps(
        json.loads(text, parse_int=lambda digits: float(digits) if len(digits) < 2 else int(digits)), indent=2
    )
    content = json.loads(as_floats)
    content["v"], content["members"] = 1, H
    assert Profile.from_json(json.dumps(content)).to_json() == text
    allowed = {"head_id", "task", "method", "loss", "seen", "hash"}
    assert {name for name, value in json.loads(text).items() if isinstance(value, str)} == allowed


def test_another_method_is_refused_but_hyre_keeps_its_own_settings():
    heads, items = linear(), generator(1).normal(size=(3, D))
    gaussian = labelled(Personalizer(heads, GaussianHeads(2.0)), 1)
    with pytest.raises(DataError, match=r"was made with name Gaussian over heads, heads_weight 2.* cannot go on with"):
        Personalizer(heads, GaussianHeads(1.0)).feedback(gaussian, "x", items[0], items[1], 1.0)
    np.testing.assert_array_equal(  # serving needs no method
        Personalizer(heads).score(items, gaussian), Personalizer(heads, GaussianHeads(2.0)).score(items, gaussian)
    )
    sharp = labelled(Personalizer(heads, HyRe(eta=5.0)), 1)
    np.testing.assert_array_equal(
        Personalizer(heads, HyRe(eta=1.0)).score(items, sharp), Personalizer(heads, HyRe(eta=5.0)).score(items, sharp)
    )
    assert Personalizer(heads, HyRe(eta=1.0)).feedback(sharp, "x", items[0], items[1], 1.0).settings["eta"] == 5


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_other_tasks(task):
    outputs = 3 if task == "classification" else 1
    heads, g = linear(task=task, outputs=outputs), generator(6)
    variance = g.uniform(0.5, 2, H)
    method = HyRe(CrossEntropy(0.1) if task == "classification" else GaussianNLL(variance, 0.1))
    people = Personalizer(heads, method)
    inputs, profile = g.normal(size=(4, D)), people.new()
    for row in range(4):
        profile = people.feedback(profile, str(row), inputs[row], None, float(row % 3))
    again = Profile.from_json(profile.to_json())
    expected = method.begin(H).update(Support(heads.members(inputs), np.arange(4) % 3))
    np.testing.assert_allclose(again.evidence, expected.evidence, rtol=1e-12)
    other = Personalizer(heads)  # which knows the method from the profile alone
    np.testing.assert_allclose(
        other.outputs(inputs, again), expected.combination().apply(heads.members(inputs)), atol=1e-9
    )
    with pytest.raises(DataError, match=f"a label of a {task} is about one thing"):
        people.feedback(profile, "x", inputs[0], inputs[1], 1.0)
    if task == "classification":
        with pytest.raises(DataError, match="these heads have 3 outputs"):
            people.score(inputs, profile)
        with pytest.raises(DataError, match="class numbers from 0 to 2"):
            people.feedback(profile, "x", inputs[0], None, 3.0)


# ----------------------------------------------------------------------------------------------------- many people


@pytest.mark.parametrize("method", [HyRe(), GaussianHeads(feature_weight=0.3)], ids=lambda method: method.name)
@pytest.mark.parametrize("heads", [linear(), curved()], ids=["linear", "curved"])
def test_mixed_people_score_as_each_alone(heads, method):
    people = Personalizer(heads, method)
    profiles = [labelled(people, seed, n=seed % 4) for seed in range(6)] + [None]
    g = generator(7)
    items, whose = g.normal(size=(50, D)), g.integers(0, 7, 50)
    mixed = people.score(items, [profiles[one] for one in whose])
    for row in range(50):
        alone = Personalizer(heads, method).score(items[row : row + 1], profiles[whose[row]])
        assert abs(mixed[row] - alone[0]) < 1e-9
    assert (
        len(np.unique(np.round(people.score(items[:1].repeat(7, 0), profiles), 9))) == 5
    )  # two have no label, as None


def test_collapsing_equals_the_mixture_of_members():
    heads = linear()
    people = Personalizer(heads)
    profile = labelled(people, 1)
    items = generator(8).normal(size=(40, D))
    explicit = heads.members(items)[:, :, 0] @ people.posterior(profile).weights()
    np.testing.assert_allclose(people.score(items, profile), explicit, atol=1e-9)


def test_the_least_recently_used_is_dropped_and_nothing_changes():
    heads, items = linear(), generator(8).normal(size=(12, D))
    small, large = Personalizer(heads, max_users=2), Personalizer(heads)
    profiles = [labelled(large, seed) for seed in range(5)]
    order = [0, 1, 2, 0, 3, 4, 1, 0, 2, 2, 3, 4]
    np.testing.assert_allclose(
        small.score(items, [profiles[one] for one in order]), large.score(items, [profiles[one] for one in order])
    )
    assert len(small._functions) == 2
    assert len(large._functions) == 5
    small.score(items[:1], profiles[0])
    small.score(items[:1], profiles[1])
    small.score(items[:1], profiles[0])
    small.score(items[:1], profiles[2])
    assert set(small._functions) == {profiles[0].hash, profiles[2].hash}


def test_a_repeated_click_counts_once():
    people = Personalizer(linear())
    first, second = generator(1).normal(size=(2, D))
    once = people.feedback(people.new(), "comparison 7", first, second, 1.0)
    assert people.feedback(once, "comparison 7", first, second, 1.0) is once
    assert people.feedback(once, "comparison 7", second, first, 0.0) is once
    assert Profile.from_json(once.to_json()).seen == (seen_hash("comparison 7"),)
    assert people.feedback(Profile.from_json(once.to_json(top=5)), "comparison 7", first, second, 1.0).n == 1
    twice = people.feedback(once, "comparison 8", first, second, 1.0)
    assert twice.n == 2
    with pytest.raises(DataError, match="needs a key"):
        people.feedback(once, "", first, second, 1.0)


def test_what_was_seen_is_bounded():
    people = Personalizer(linear(members=2))
    profile = people.profile(people.method.begin(2), [seen_hash(str(number)) for number in range(MAX_SEEN)])
    g = generator(1)
    profile = people.feedback(profile, "new", *g.normal(size=(2, D)), 1.0)
    assert len(profile.seen) == MAX_SEEN
    assert seen_hash("0") not in profile.seen
    assert seen_hash("1") in profile.seen
    assert seen_hash("new") in profile.seen


def test_mirrored_labels_and_sides_agree():
    people = Personalizer(linear())
    first, second = generator(1).normal(size=(2, D))
    one = people.feedback(people.new(), "x", first, second, 1.0)
    other = people.feedback(people.new(), "x", second, first, 0.0)
    np.testing.assert_allclose(one.evidence, other.evidence, rtol=1e-12)
    tie = people.feedback(people.new(), "x", first, second, 0.5)
    np.testing.assert_allclose(
        tie.evidence,
        0.5 * (one.evidence + people.feedback(people.new(), "x", first, second, 0.0).evidence),
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("first", "second", "label", "said"),
    [
        (np.zeros(D - 1), np.zeros(D), 1.0, r"expected features \[12\], found the shape \(11,\)"),
        (np.full(D, np.nan), np.zeros(D), 1.0, "features hold a number that is not finite"),
        (np.zeros(D), np.zeros(D), 1.5, "between 0 and 1"),
        (np.zeros(D), np.zeros(D), np.nan, "between 0 and 1"),
        (np.zeros(D), None, 1.0, "a label of a preference is about two things"),
    ],
)
def test_feedback_that_cannot_be_used(first, second, label, said):
    people = Personalizer(linear())
    with pytest.raises(DataError, match=said):
        people.feedback(people.new(), "x", first, second, label)


def test_shapes_of_scoring():
    people = Personalizer(linear())
    assert people.score(np.zeros((0, D)), None).shape == (0,)
    assert people.score(np.zeros((0, D)), []).shape == (0,)
    assert people.outputs(np.zeros((3, D)), None).shape == (3, 1)
    with pytest.raises(DataError, match="a profile for each of 3 rows, found 2"):
        people.score(np.zeros((3, D)), [None, None])
    with pytest.raises(DataError, match=r"expected features \[N, 12\]"):
        people.score(np.zeros(D), None)
    with pytest.raises(ConfigError, match="max_users must be at least 1"):
        Personalizer(linear(), max_users=0)
    with pytest.raises(ConfigError, match="at least 1 weight"):
        people.new().to_json(top=0)


def test_threads_may_share_one():
    heads = linear()
    people = Personalizer(heads, max_users=3)
    profiles = [labelled(people, seed) for seed in range(8)]
    items = generator(1).normal(size=(8, D))
    expected = Personalizer(heads).score(items, profiles)
    wrong: list[int] = []

    def work():
        for _ in range(50):
            if not np.allclose(people.score(items, profiles), expected, atol=1e-9):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(people._functions) == 3


# ---------------------------------------------------------------------------------------------------------- files


def test_files(tmp_path):
    people = Personalizer(linear())
    profile = labelled(people, 1)
    write_profile(tmp_path / "ann.json", profile)
    assert read_profile(tmp_path / "ann.json").hash == profile.hash
    write_profile(tmp_path / "ann.json", people.new())
    assert read_profile(tmp_path / "ann.json").n == 0
    assert [file.name for file in tmp_path.iterdir()] == ["ann.json"]
    with pytest.raises(DataError, match=r"nobody\.json: no such profile"):
        read_profile(tmp_path / "nobody.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes\.json: expected a profile in JSON"):
        read_profile(tmp_path / "bytes.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    people = Personalizer(linear())
    write_profile(tmp_path / "ann.json", people.new())
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_profile(tmp_path / "ann.json", labelled(people, 1))
    assert read_profile(tmp_path / "ann.json").n == 0
    assert [file.name for file in tmp_path.iterdir()] == ["ann.json"]
