"""`steelyard adapt hyre`: labels to a profile and honest numbers; the terminal session; mistakes in one sentence."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from steelyard.adapt.artefact import AdaptSettings, HeadsArtefact, build, load_heads, save_heads
from steelyard.adapt.backbones import FeaturesConfig, TableBackboneConfig, WordsConfig
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile, read_profile, write_profile
from steelyard.bench.stats import wilson_interval
from steelyard.data.labelled_files import TableSchema
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.rng import numpy_generator
from steelyard.workflows import adapt as work
from steelyard.workflows.ask import Session, read_candidates

WORDS = ["red", "blue", "fast", "slow", "river", "stone", "quiet", "loud", "kind", "sharp", "warm", "cold"]
MEMBER = 7


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def artefact(**changes):
    return HeadsArtefact(
        EnsembleConfig(heads=HeadsConfig(num_heads=20), task=changes.pop("task", "preference")), **changes
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Heads that read words, and a person who agrees with head 7: labels, test pairs and candidates."""
    out = tmp_path_factory.mktemp("adapt")
    texts = artefact(backbone=WordsConfig(64), width=64, adapt=AdaptSettings(eta=20.0))
    learner = build(texts)
    with torch.no_grad():
        for name, value in (("mean", 0.0), ("spread", 1.0), ("target_mean", 0.0), ("target_spread", 1.0)):
            getattr(learner, name).fill_(value)
    save_heads(out / "heads", texts, learner)
    heads, numbers = load_heads(out / "heads"), numpy_generator(0, "test/adapt")

    def text():
        return " ".join(numbers.choice(WORDS, 5))

    def pairs(count):
        found = []
        while len(found) < count:
            sides = [text(), text()]
            scores = heads.members(heads.features(["Q"] * 2, sides))[:, MEMBER, 0]
            if sides[0] != sides[1]:
                better = int(scores[1] > scores[0])
                found.append({"prompt": "Q", "chosen": sides[better], "rejected": sides[1 - better]})
        return found

    write(out / "labels.jsonl", pairs(30))
    write(out / "test.jsonl", pairs(200))
    pool = [{"prompt": name, "completions": [text() for _ in range(5)]} for name in ("A house.", "A day.")]
    write(out / "pool.jsonl", pool)
    return out


@pytest.fixture(scope="session")
def heads(made):
    return load_heads(made / "heads")


@pytest.fixture
def answers(monkeypatch):
    def give(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return give


def value(out, name):
    """The number in a row of a table, with its interval."""
    lines = [line.split(name)[1] for line in out.splitlines() if line.strip().startswith(name)]
    return [float(one) for one in re.findall(r"-?\d+\.\d+", lines[-1])]


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_to_profile(command, made, heads, tmp_path):
    status, out, err = command(
        "adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--test", made / "test.jsonl",
        "--profile", tmp_path / "ann.json",
    )  # fmt: skip
    assert status == 0
    assert err == ""
    assert re.search(r"labels used +30 *\n", out)
    assert "of 21" in out
    assert "best members" in out
    assert f"head {MEMBER} " in out.split("best members")[1].splitlines()[0], "the head that labelled must be first"
    single, uniform, after = (value(out, name) for name in ("single (pooled)", "uniform", "HyRe, 30 labels"))
    assert after[0] > uniform[0] + 0.1
    assert after[0] > single[0] + 0.1
    expected = wilson_interval(round(after[0] * 200), 200)
    assert after[1:] == pytest.approx([expected.low, expected.high], abs=2e-3)
    gain = value(out, "accuracy, adapted minus uniform")
    assert gain[0] == pytest.approx(after[0] - uniform[0], abs=2e-3)
    assert gain[1] > 0
    profile = read_profile(tmp_path / "ann.json")
    assert (profile.n, len(profile.seen)) == (30, 30)
    assert (tmp_path / "ann.json").stat().st_size < 4000


def test_the_profile_is_the_one_of_the_library(command, made, heads, tmp_path):
    command("adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--profile", tmp_path / "p.json")
    people = Personalizer(heads, heads.method())
    labels = work.read_labelled(made / "labels.jsonl", heads, people)
    posterior = heads.method().begin(21).update(labels.support)
    np.testing.assert_allclose(read_profile(tmp_path / "p.json").evidence, posterior.evidence, rtol=1e-9)


def test_leave_one_out_judges_no_label_by_itself(made, heads):
    """By hand, and not the same as judging the labels by what all of them made."""
    people = Personalizer(heads, heads.method())
    support = work.read_labelled(made / "labels.jsonl", heads, people).support.take(range(8))
    begun = heads.method().begin(21)
    found = work.left_out(begun, support)
    for row in range(8):
        others = support.take([other for other in range(8) if other != row])
        expected = begun.update(others).combination().apply(support.members[[row]])
        np.testing.assert_allclose(found[row], expected[0])
    assert not np.allclose(found, begun.update(support).combination().apply(support.members))
    assert work.left_out(begun, support.take([*range(8)] * 20)).shape == (160, 1)


def test_leave_one_out_on_the_command_line(command, made):
    status, out, _ = command("adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl")
    assert status == 0
    assert "judged on 30 labels, each left out in turn" in out
    assert value(out, "HyRe, 30 labels")


def test_one_label_says_so(command, made, tmp_path):
    one = write(tmp_path / "one.jsonl", [json.loads((made / "labels.jsonl").read_text().splitlines()[0])])
    status, out, _ = command("adapt", "hyre", made / "heads", "--labels", one)
    assert status == 0
    assert "too few labels to judge by: give other examples with --test FILE" in out
    assert "accuracy" not in out


def test_when_nothing_changes_it_says_so(command, made, tmp_path):
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--test", made / "test.jsonl", "--eta", "0"
    )
    assert status == 0
    assert "Re-weighting changed no decision on these 200 examples" in out
    assert value(out, "accuracy, adapted minus uniform") == [0, 0, 0]


def test_what_training_said_is_repeated(made, tmp_path, heads):
    run = tmp_path / "run"
    save_heads(run / "checkpoints/step_1", heads.artefact, heads.learner)
    assert work.diversity_sentence(run, None, "preference") is None
    (run / "diversity.json").write_text(json.dumps({"sentence": "The heads say the same: it cannot help."}))
    assert work.diversity_sentence(run, None, "preference") == "after training: The heads say the same: it cannot help."
    (run / "diversity.json").write_text("{")
    assert work.diversity_sentence(run, None, "preference") is None


def test_heads_that_say_the_same_cannot_be_helped(command, made, tmp_path, heads):
    learner = build(heads.artefact)
    weights = heads.learner.state_dict()
    for name, values in weights.items():
        if values.ndim and len(values) == 21:
            weights[name] = values[:1].expand_as(values).clone()
    learner.load_state_dict(weights)
    save_heads(tmp_path / "same", heads.artefact, learner)
    words = ["--labels", made / "labels.jsonl", "--test", made / "test.jsonl"]
    status, out, _ = command("adapt", "hyre", tmp_path / "same", *words)
    assert status == 0
    assert "Re-weighting cannot help" in out
    assert "Re-weighting changed no decision on these 200 examples" in out
    assert "cannot help" not in command("adapt", "hyre", made / "heads", *words)[1]


@pytest.mark.parametrize("method", ["gaussian", "ridge", "simplex", "best", "uniform", "auto", "map"])
def test_other_methods_go_on_from_their_profile(command, made, tmp_path, method):
    rows = (made / "labels.jsonl").read_text().splitlines()
    first, rest = tmp_path / "first.jsonl", tmp_path / "rest.jsonl"
    first.write_text("\n".join(rows[:4]))
    rest.write_text("\n".join(rows[4:10]))
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(rows[:10]))
    start = ["adapt", "hyre", made / "heads"]
    assert command(*start, "--labels", first, "--method", method, "--profile", tmp_path / "a.json")[0] == 0
    status, _, err = command(
        *start, "--labels", rest, "--profile-in", tmp_path / "a.json", "--profile", tmp_path / "b.json"
    )
    assert (status, err) == (0, "")
    assert command(*start, "--labels", both, "--method", method, "--profile", tmp_path / "c.json")[0] == 0
    parts, whole = read_profile(tmp_path / "b.json"), read_profile(tmp_path / "c.json")
    assert parts.n == whole.n == 10
    np.testing.assert_allclose(parts.function.coefficients, whole.function.coefficients, rtol=1e-9, atol=1e-12)


def test_labels_that_were_counted_are_not_counted_again(command, made, tmp_path):
    start = ["adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl"]
    command(*start, "--profile", tmp_path / "p.json")
    before = read_profile(tmp_path / "p.json")
    status, out, err = command(*start, "--profile-in", tmp_path / "p.json", "--profile", tmp_path / "p.json")
    assert status == 0
    assert err == "note: 30 of 30 labels were counted in the profile before\n"
    assert "labels used" in out
    assert "0 (30 with those before)" in out
    assert read_profile(tmp_path / "p.json").hash == before.hash
    rows = (made / "labels.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*rows[:3], rows[0]]))
    _, _, err = command("adapt", "hyre", made / "heads", "--labels", tmp_path / "twice.jsonl")
    assert "1 of 4 labels repeat an earlier comparison" in err


def test_a_margin_of_0_is_a_tie(made, heads, tmp_path):
    rows = [{"prompt": "Q", "chosen": "red blue", "rejected": "cold", "margin": 0},
            {"prompt": "Q", "chosen": "red", "rejected": "cold", "margin": 2}]  # fmt: skip
    people = Personalizer(heads)
    labels = work.read_labelled(write(tmp_path / "ties.jsonl", rows), heads, people)
    assert labels.support.labels.tolist() == [0.5, 1.0]
    outputs = np.array([[3.0], [0.0]])
    assert work.judge("x", outputs, labels.support.labels, "preference").right.tolist() == [0.5]


def test_ranking_of_candidates(command, made, heads, tmp_path):
    command("adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--profile", tmp_path / "p.json")
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--profile-in", tmp_path / "p.json", "--candidates", made / "pool.jsonl"
    )
    assert status == 0
    candidates = read_candidates(made / "pool.jsonl", heads)
    people = Personalizer(heads)
    best = int(people.score(candidates.features[0], read_profile(tmp_path / "p.json")).argmax())
    first = next(line for line in out.splitlines() if line.strip().startswith("1 "))
    assert first.strip().endswith(candidates.completions[0][best])
    assert "ranking: A house." in out
    assert "ranking: A day." in out


def test_short_profiles(command, made, tmp_path):
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--profile", tmp_path / "p.json",
        "--top", "5",
    )  # fmt: skip
    assert status == 0
    assert "(short, " in out
    assert len(json.loads((tmp_path / "p.json").read_text())["w"]) == 5


def test_a_short_profile_of_another_method_ranks_but_does_not_go_on(command, made, tmp_path):
    start = ["adapt", "hyre", made / "heads"]
    words = ["--labels", made / "labels.jsonl", "--method", "gaussian", "--profile", tmp_path / "p.json"]
    command(*start, *words, "--top", "9")
    status, out, _ = command(*start, "--profile-in", tmp_path / "p.json", "--candidates", made / "pool.jsonl")
    assert status == 0
    assert "ranking: A house." in out
    status, out, err = command(*start, "--profile-in", tmp_path / "p.json", "--labels", made / "test.jsonl")
    assert (status, out) == (2, "")
    assert "holds the adapted function only" in err


# ---------------------------------------------------------------------------------------------- tables and features


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_tables(command, tmp_path, task):
    """The schema and the classes are those of training: a labels file need hold neither all names nor all classes."""
    schema = TableSchema(("size", "colour"), {"colour": ("blue", "red")}, "price")
    classes = ("cheap", "dear", "fair") if task == "classification" else ()
    save_heads(
        tmp_path / "heads",
        artefact(task=task, backbone=TableBackboneConfig((8,)), width=3, table=schema, classes=classes),
    )
    cells = ["dear", "dear", "fair"] if classes else ["1.5", "2", "0.25"]
    (tmp_path / "labels.csv").write_text("price,colour,size\n" + "".join(f"{c},red,{n}\n" for n, c in enumerate(cells)))
    (tmp_path / "test.csv").write_text("colour,size,price\n" + "".join(f"blue,{n},{c}\n" for n, c in enumerate(cells)))
    status, out, _ = command(
        "adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "labels.csv", "--test", tmp_path / "test.csv",
        "--profile", tmp_path / "p.json",
    )  # fmt: skip
    assert status == 0
    assert ("rmse" if task == "regression" else "accuracy") in out
    assert read_profile(tmp_path / "p.json").n == 3
    loaded = load_heads(tmp_path / "heads")
    labels = work.read_labelled(tmp_path / "labels.csv", loaded, Personalizer(loaded))
    assert labels.support.labels.tolist() == ([1, 1, 2] if classes else [1.5, 2, 0.25])
    expected = loaded.members(loaded.rows(np.array([[n, 0, 1] for n in range(3)], np.float32)))
    np.testing.assert_allclose(labels.support.members, expected, rtol=1e-6)
    (tmp_path / "bad.csv").write_text("price,colour,size\nhuge,red,1\n")
    status, _, err = command("adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "bad.csv")
    assert status == 2
    assert "bad.csv: line 2: column 'price': expected a " in err
    (tmp_path / "none.csv").write_text("pric,colour,size\n1,red,1\n")
    status, _, err = command("adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "none.csv")
    assert "expected the column 'price' with the labels; did you mean 'pric'?" in err


def test_features(command, tmp_path):
    save_heads(tmp_path / "heads", artefact(backbone=FeaturesConfig(), width=6))
    numbers = numpy_generator(0, "test/features")
    first, second = numbers.normal(size=(2, 9, 6))
    targets = np.array([1, 0, 0.5] * 3)
    np.savez(tmp_path / "labels.npz", inputs=first, other=second, targets=targets)
    np.savez(tmp_path / "test.npz", inputs=second[3:6], other=first[3:6], targets=targets[3:6])
    status, out, _ = command("adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "labels.npz")
    assert status == 0
    assert "labels used" in out
    loaded = load_heads(tmp_path / "heads")
    labels = work.read_labelled(tmp_path / "labels.npz", loaded, Personalizer(loaded))
    expected = loaded.members(loaded.rows(first)) - loaded.members(loaded.rows(second))
    np.testing.assert_allclose(labels.support.members, expected, atol=1e-6)
    status, _, err = command(
        "adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "labels.npz", "--test", tmp_path / "test.npz"
    )
    assert status == 2
    assert "3 of its examples are in" in err
    assert "row 3 is row 0 there" in err


def test_classes_of_features(tmp_path):
    """Labels of one class only are fine: the classes are those of training."""
    save_heads(
        tmp_path / "heads",
        artefact(task="classification", backbone=FeaturesConfig(), width=6, classes=("3", "5", "9")),
    )
    loaded = load_heads(tmp_path / "heads")
    np.savez(tmp_path / "labels.npz", inputs=np.ones((2, 6)), targets=np.array([9, 9]))
    labels = work.read_labelled(tmp_path / "labels.npz", loaded, Personalizer(loaded))
    assert labels.support.labels.tolist() == [2, 2]
    np.savez(tmp_path / "bad.npz", inputs=np.ones((2, 6)), targets=np.array([9, 4]))
    with pytest.raises(Exception, match="row 1: expected one of the classes 3, 5, 9, found 4"):
        work.read_labelled(tmp_path / "bad.npz", loaded, Personalizer(loaded))


# --------------------------------------------------------------------------------------- never adapted to and tested


def test_an_example_in_both_files_is_an_error_with_its_lines(command, made, tmp_path):
    rows = [json.loads(line) for line in (made / "labels.jsonl").read_text().splitlines()[:6]]
    other = [json.loads(line) for line in (made / "test.jsonl").read_text().splitlines()[:4]]
    turned = {"prompt": "Q", "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    labels = write(tmp_path / "labels.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [*other, rows[4], turned])
    status, out, err = command("adapt", "hyre", made / "heads", "--labels", labels, "--test", test)
    assert status == 2
    assert out == ""
    assert f"{labels}: 2 of its examples are in {test} too (line 5 is line 5 there; line 3 is line 6 there)" in err
    assert err.count("\n") == 1


def test_an_example_that_the_profile_has_counted_is_an_error(command, made, tmp_path):
    rows = (made / "labels.jsonl").read_text().splitlines()
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(rows[:5]))
    second.write_text("\n".join(rows[5:8]))
    command("adapt", "hyre", made / "heads", "--labels", first, "--profile", tmp_path / "p.json")
    status, _, err = command(
        "adapt", "hyre", made / "heads", "--labels", second, "--profile-in", tmp_path / "p.json", "--test", first
    )
    assert status == 2
    assert f"{first}: the profile has counted 5 of its examples before (line 1, line 2" in err


# ------------------------------------------------------------------------------------------------------- the session


def session(made, heads, how="bald", profile=None, seed=0):
    people = Personalizer(heads, heads.method())
    candidates = read_candidates(made / "pool.jsonl", heads)
    return Session(heads, people, people.new() if profile is None else profile, candidates, how, seed)


def taste(one, question):
    """What the person who is head 7 answers."""
    features = one.candidates.features[question.prompt]
    scores = one.people.heads.members(features)[:, MEMBER, 0]
    return float(scores[question.first] > scores[question.second])


@pytest.mark.parametrize("how", ["bald", "random", "entropy", "variance", "joint_bald"])
def test_a_session_asks_every_pair_once(made, heads, how):
    one = session(made, heads, how)
    assert len(one.questions) == 20  # two prompts with ten pairs each
    asked = []
    while (question := one.next()) is not None:
        assert one.next() == question
        asked.append(question.key)
        one.answer(question, taste(one, question))
    assert len(set(asked)) == len(asked) == 20
    assert one.profile.n == 20
    assert one.information().questions == 0


def test_a_session_chooses_what_tells_most(made, heads):
    one = session(made, heads)
    for _ in range(4):
        question = one.next()
        information = one._pool.bald(one.weights())
        assert information[question.row] == information[~one._asked].max()
        left = one.information()
        assert left.following == pytest.approx(information[question.row] / np.log(2))
        assert left.following <= left.together <= left.questions * left.following + 1e-12
        assert left.together <= left.unknown + 1e-9
        one.answer(question, taste(one, question))


def test_undo_takes_back_exactly(made, heads):
    one = session(made, heads)
    states = []
    for _ in range(4):
        states.append((one.profile.hash, one.next()))
        one.answer(states[-1][1], 1.0)
    for before, question in reversed(states):
        assert one.undo() == question
        assert one.profile.hash == before
        assert one.next() == question
    assert one.undo() is None


def test_a_session_resumes_where_it_was(made, heads):
    one, asked = session(made, heads), []
    for _ in range(3):
        asked.append(one.next())
        one.answer(asked[-1], taste(one, asked[-1]))
    again = session(made, heads, profile=Profile.from_json(one.profile.to_json()))
    assert again.next() == one.next()
    assert again.open == 17
    assert again.answers == 0


@pytest.mark.parametrize("method", ["gaussian", "auto"])
def test_a_session_with_another_method(made, heads, method):
    from dataclasses import replace

    people = Personalizer(heads, work.method_of(heads, replace(heads.settings, method=method)))
    one = Session(heads, people, people.new(), read_candidates(made / "pool.jsonl", heads), "bald", 0)
    assert one.weights() == pytest.approx(np.full(21, 1 / 21))
    question = one.next()
    one.answer(question, 1.0)
    assert one.weights().max() > 1.5 / 21, "asks by what HyRe believes after the same answers"
    places = one.ranking(question.prompt, people.new())
    assert sorted(place.now for place in places) == [1, 2, 3, 4, 5]
    assert sorted(place.before for place in places) == [1, 2, 3, 4, 5]


def test_which_side_comes_first_depends_on_neither_file_nor_taste(made, heads, tmp_path):
    row = {"prompt": "P", "completions": [f"text {number}" for number in range(12)]}
    found = []
    for completions in (row["completions"], row["completions"][::-1]):
        candidates = read_candidates(write(tmp_path / "pool.jsonl", [row | {"completions": completions}]), heads)
        people = Personalizer(heads)
        one = Session(heads, people, people.new(), candidates, "bald", 0)
        found.append({q.key: completions[q.first] for q in one.questions})
    assert found[0] == found[1]
    ahead = sum(json.dumps(first) == json.loads(key)[1] for key, first in found[0].items())
    assert 15 < ahead < 51  # of 66: about half have the earlier text in front


def test_a_terminal_session(command, made, heads, tmp_path, answers):
    answers("a", "what", "b", "u", "=", "s", "q")
    profile = tmp_path / "ann.json"
    status, out, err = command(
        "adapt", "hyre", made / "heads", "--ask", "--pool", made / "pool.jsonl", "--profile", profile
    )
    assert (status, err) == (0, "")
    assert "expected one of a, b, =, u, s, q, found 'what'" in out
    assert "took the last answer back; 1 label\n" in out
    assert out.count("ranking: ") == 5  # after a, b and =, and both prompts for s
    assert "2 labels; " in out
    assert "expected information left: " in out
    assert re.search("[\N{UPWARDS ARROW}\N{DOWNWARDS ARROW}]\\d", out)
    assert out.endswith(f"saved {profile} (2 labels); the same command goes on\n")
    one = session(made, heads)
    first = one.next()
    one.answer(first, 1.0)
    one.answer(one.next(), 0.5)
    assert read_profile(profile).to_json() == one.profile.to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["ann.json"]
    answers("a")  # the input ends
    status, out, err = command(
        "adapt", "hyre", made / "heads", "--ask", "--pool", made / "pool.jsonl", "--profile", profile
    )
    assert status == 0
    assert err == f"going on from {profile} (2 labels)\n"
    assert read_profile(profile).n == 3


def test_a_terminal_session_to_the_end(command, made, heads, tmp_path, answers):
    answers("u", *"ab" * 20)
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--ask", "--pool", made / "pool.jsonl", "--profile", tmp_path / "p.json"
    )
    assert status == 0
    assert "nothing to undo" in out
    assert "every pair of these candidates has been asked" in out
    assert read_profile(tmp_path / "p.json").n == 20


def test_labels_and_then_questions(command, made, tmp_path, answers):
    answers("a", "q")
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--labels", made / "labels.jsonl", "--ask", "--pool", made / "pool.jsonl",
        "--profile", tmp_path / "p.json",
    )  # fmt: skip
    assert status == 0
    assert "judged on 30 labels" in out
    assert read_profile(tmp_path / "p.json").n == 31


def test_every_answer_is_saved_before_the_next_question(command, made, tmp_path, monkeypatch):
    """And after ctrl-C too."""
    saved = []

    def read(self, *args, **kwargs):
        saved.append(read_profile(tmp_path / "p.json").n)
        if len(saved) == 4:
            raise KeyboardInterrupt
        return "a"

    monkeypatch.setattr(Console, "input", read)
    status, _, err = command(
        "adapt", "hyre", made / "heads", "--ask", "--pool", made / "pool.jsonl", "--profile", tmp_path / "p.json"
    )
    assert status == 130
    assert saved == [0, 1, 2, 3]
    assert read_profile(tmp_path / "p.json").n == 3
    assert err == f"saved {tmp_path / 'p.json'} (3 labels); the same command goes on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-C", "kill"])
def test_a_session_that_is_stopped_from_outside_keeps_its_answers(made, tmp_path, number):
    profile = tmp_path / "p.json"
    words = ["adapt", "hyre", made / "heads", "--ask", "--pool", made / "pool.jsonl", "--profile", profile]
    work = subprocess.Popen(
        [sys.executable, "-m", "steelyard.cli.main", *map(str, words)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        work.stdin.write("a\nb\n")
        work.stdin.flush()
        until = time.monotonic() + 60
        while time.monotonic() < until and not (profile.exists() and read_profile(profile).n == 2):
            time.sleep(0.05)
        time.sleep(0.3)  # now it waits for the third answer
        work.send_signal(number)
        _, err = work.communicate(timeout=60)
    finally:
        work.kill()
    assert read_profile(profile).n == 2
    if number == signal.SIGINT:
        assert work.returncode == 130
        assert err == f"saved {profile} (2 labels); the same command goes on\n"


def test_texts_cannot_steer_the_terminal(command, made, tmp_path, answers):
    row = {"prompt": "\x1b[2J[bold]P[/bold]", "completions": ["one \x1b]0;title\x07 [red]x[/red]", "two [/] \u202e"]}
    answers("q")
    status, out, _ = command(
        "adapt", "hyre", made / "heads", "--ask", "--pool", write(tmp_path / "pool.jsonl", [row]),
        "--profile", tmp_path / "p.json",
    )  # fmt: skip
    assert status == 0
    assert not set(out) & {"\x1b", "\x07", "\u202e"}
    assert "[bold]P[/bold]" in out
    assert "[red]x[/red]" in out


def test_rows_of_one_prompt_are_put_together(heads, tmp_path):
    rows = [{"prompt": "P", "completion": "one"}, {"prompt": "P", "completion": "two"},
            {"prompt": "P", "completion": "one"}, {"prompt": "R", "completion": "three"}]  # fmt: skip
    found = read_candidates(write(tmp_path / "pool.jsonl", rows), heads)
    assert found.prompts == ("P", "R")
    assert found.completions == (("one", "two"), ("three",))
    assert [len(one) for one in found.features] == [2, 1]


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hyer"], "Expected 'hyre' or 'best_of_n', found 'hyer'; did you mean 'hyre'?"),
        (["hyre", "HEADS"], "no labels: give a file with --labels FILE, or --ask"),
        (["hyre", "nowhere", "--labels", "LABELS"], "nowhere: neither a run nor a checkpoint"),
        (["hyre", "HEADS", "--labels", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["hyre", "HEADS", "--labels", "POOL"], "expected the column chosen, found completions, prompt"),
        (["hyre", "HEADS", "--labels", "LABELS", "--test", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["hyre", "HEADS", "--labels", "x.csv"], "reads texts; expected pairs in JSON lines"),
        (["hyre", "HEADS", "--labels", "LABELS", "--eta", "-1"], "eta must be at least 0"),
        (["hyre", "HEADS", "--labels", "LABELS", "--noise", "1"], "noise must be at least 0 and below 1"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile", "no/p.json"], "there is no folder no"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile", "LABELS"], "exists; go on from it with --profile-in"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile-in", "no.json"], "no.json: no such profile"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile-in", "LABELS"], "expected a profile in JSON"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile-in", "OTHER"], "belongs to another head set"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile-in", "MINE", "--eta", "3"], "cannot go on with HyRe"),
        (["hyre", "HEADS", "--labels", "LABELS", "--profile-in", "MINE", "--method", "map"], "cannot go on with head"),
        (["hyre", "HEADS", "--labels", "LABELS", "--top", "0"], "--top must be at least 1"),
        (["hyre", "HEADS", "--labels", "LABELS", "--pool", "POOL"], "--pool is what --ask asks about"),
        (["hyre", "HEADS", "--test", "TEST", "--ask", "--pool", "POOL", "--profile", "p.json"], "--test judges what"),
        (["hyre", "HEADS", "--ask", "--pool", "POOL"], "--ask saves after every answer: say where with --profile"),
        (["hyre", "HEADS", "--ask", "--profile", "p.json"], "give them with --pool FILE"),
        (["hyre", "HEADS", "--ask", "--pool", "POOL", "--profile", "p.json", "--top", "4"], "--top writes a short"),
        (["hyre", "HEADS", "--ask", "--pool", "POOL", "--profile", "OTHER"], "OTHER: belongs to another head set"),
        (["hyre", "HEADS", "--ask", "--pool", "nowhere.jsonl", "--profile", "p.json"], "nowhere.jsonl: no such file"),
        (["hyre", "HEADS", "--ask", "--pool", "PROMPTS", "--profile", "p.json"], "line 1: expected completions of"),
        (
            ["hyre", "HEADS", "--ask", "--pool", "SINGLE", "--profile", "p.json"],
            "two different completions, found none",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(command, made, heads, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    people = Personalizer(heads, heads.method())
    write_profile(tmp_path / "MINE", people.new())
    content = json.loads(people.new().to_json())
    content.pop("hash")
    content["head_id"] = "sha256:" + "0" * 64
    from steelyard.adapt.profile_values import content_hash

    (tmp_path / "OTHER").write_text(json.dumps(content | {"hash": content_hash(content)}))
    write(tmp_path / "PROMPTS.jsonl", [{"prompt": "P"}])
    write(tmp_path / "SINGLE.jsonl", [{"prompt": "P", "completions": ["one", "one"]}])
    there = {"HEADS": made / "heads", "LABELS": made / "labels.jsonl", "TEST": made / "test.jsonl",
             "POOL": made / "pool.jsonl", "PROMPTS": tmp_path / "PROMPTS.jsonl",
             "SINGLE": tmp_path / "SINGLE.jsonl"}  # fmt: skip
    before = sorted(tmp_path.iterdir())
    status, _, err = command("adapt", *(there.get(word, word) for word in words))
    assert status == 2, err
    assert said in err
    assert [line for line in err.splitlines() if not line.startswith("going on from")] == [err.splitlines()[-1]]
    assert sorted(tmp_path.iterdir()) == before


def test_heads_of_another_kind_are_refused(command, tmp_path):
    save_heads(tmp_path / "heads", artefact(backbone=FeaturesConfig(), width=6))
    write(tmp_path / "labels.jsonl", [{"prompt": "P", "chosen": "a", "rejected": "b"}])
    status, _, err = command("adapt", "hyre", tmp_path / "heads", "--labels", tmp_path / "labels.jsonl")
    assert status == 2
    assert "these heads read rows of numbers" in err
    status, _, err = command(
        "adapt", "hyre", tmp_path / "heads", "--ask", "--pool", tmp_path / "labels.jsonl",
        "--profile", tmp_path / "p.json",
    )  # fmt: skip
    assert status == 2
    assert "completions can be ranked by heads for preferences that read texts" in err
    status, _, err = command("adapt", "hyre", tmp_path, "--labels", tmp_path / "labels.jsonl")
    assert status == 2


def test_help(command):
    status, out, _ = command("adapt", "hyre", "--help")
    assert status == 0
    for option in ("--labels", "--test", "--method", "--profile-in", "--candidates", "--ask", "--pool", "--how"):
        assert option in out
    status, out, _ = command("adapt")
    assert status == 0
    assert "usage: steelyard adapt hyre DIR --labels FILE" in out
