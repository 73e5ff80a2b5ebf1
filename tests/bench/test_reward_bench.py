"""Accuracy of reward models in RewardBench's layout: by hand, published section scores, real subsets, bad rows."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
import torch

from steelyard.bench import reward_bench, stats
from steelyard.bench.reward_bench import Accuracy, BenchRow, evaluate, read_rows, section_accuracy, write_rows
from steelyard.envs.scorers import FunctionScorer, scorer_from_name
from steelyard.errors import DataError, NonFiniteError

LENGTH = scorer_from_name("length:max:characters")


def row(chosen, rejected, subset="s", prompt="p", **columns):
    chosen, rejected = ((c,) if isinstance(c, str) else tuple(c) for c in (chosen, rejected))
    return BenchRow(prompt, chosen, rejected, subset, "0", columns)


def test_pairs_by_hand():
    """Two right, one wrong, one tie: ties are wrong, and counted."""
    found = evaluate(LENGTH, [row("aaa", "a"), row("aa", ""), row("a", "aa"), row("aa", "bb")])
    accuracy = found.subsets["s"]
    assert accuracy.estimate == stats.wilson_interval(2, 4)
    assert accuracy.ties == 0.25
    assert found.rows[0] == {
        "subset": "s", "id": "0", "scores_chosen": [3.0], "scores_rejected": [1.0], "results": 1.0, "ties": 0.0,
        "unscorable": 0, "easy": None, "normal": None, "hard": None,
    }  # fmt: skip
    assert found.score is None
    assert found.sections == {}


def test_best_of_four():
    rows = [row("aaaa", ["a", "aa", "aaa"]), row("aaaa", ["a", "aaaaa", "aaa"]), row(["aaaa"], ["aaaa", "", ""])]
    found = evaluate(LENGTH, rows)
    assert [r["results"] for r in found.rows] == [1.0, 0.0, 0.0]
    assert found.subsets["s"].ties == pytest.approx(1 / 9)


def test_styles_of_rm_bench():
    """A scorer of length: richer styles win (easy), plainer ones lose (hard), equal lengths tie."""
    found = evaluate(LENGTH, [row(["a", "aa", "aaa"], ["b", "bb", "bbb"])])
    assert {name: a.estimate.value for name, a in found.styles.items()} == {"easy": 1.0, "normal": 0.0, "hard": 0.0}
    assert found.subsets["s"].estimate.value == pytest.approx(3 / 9)


def test_unscorable_rows_are_wrong_and_counted():
    scorer = FunctionScorer(lambda completions, **_: [None if c == "?" else len(c) for c in completions], "f")
    found = evaluate(scorer, [row("aa", "?"), row("aa", "a")])
    assert found.subsets["s"].estimate.value == 0.5
    assert found.subsets["s"].ties == 0.0
    assert [r["unscorable"] for r in found.rows] == [1, 0]


def test_blocks_and_columns():
    """The result does not depend on the block; the scorer gets each row's columns, and None where one has none."""
    seen = []

    def f(completions, level, **_):
        seen.extend(level)
        return [len(c) for c in completions]

    rows = [row("a" * k, "bb", level=k) for k in range(5)] + [row("a", "b")]
    scorer = FunctionScorer(f, "f")
    one, many = evaluate(scorer, rows), evaluate(scorer, rows, block=2)
    assert one == many
    assert seen[:12] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, None, None]


def test_scores_of_a_wrong_number_or_infinite_are_refused():
    class Bad:
        name = "bad"

        def __init__(self, scores):
            self.scores = torch.tensor(scores)

        def score(self, *_):
            return self.scores

    with pytest.raises(DataError, match=r"bad: expected shape \[2\]"):
        evaluate(Bad([1.0]), [row("a", "b")])
    with pytest.raises(NonFiniteError, match="row 1"):
        evaluate(Bad([1.0, float("inf")]), [row("a", "b")])


# ------------------------------------------------------------------------------------------------------ sections


def test_sections_are_those_of_the_benchmark():
    assert [len(members) for members in reward_bench.SECTIONS.values()] == [5, 6, 5, 7]
    assert len({name for members in reward_bench.SECTIONS.values() for name in members}) == 23


def test_math_weighs_as_much_as_code():
    n = 164
    subsets = {name: Accuracy(stats.wilson_interval(n, n), 0.0) for name in reward_bench.SECTIONS["Reasoning"][1:]}
    subsets["math-prm"] = Accuracy(stats.wilson_interval(0, 447), 0.0)
    found = section_accuracy("Reasoning", subsets)
    assert found.estimate.value == pytest.approx(0.5)
    assert found.of == "7/7"


def test_published_section_scores(shared_data):
    """Per-subset accuracies of three published models give their published sections.

    Safety of one model differs by a point in its own README (the data's README says so); 84.5 is what its subsets give.
    """
    file = shared_data / "reward_model_reference_scores/rewardbench_per_subset.csv"
    if not file.is_file():
        pytest.skip("no reference scores")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    model = "GRM-Gemma-2B-rewardmodel-ft"
    key = next(name for name in rows[0] if name.endswith(model))
    subsets = {}
    for found in rows:
        n = int(float(found["n"]))
        share = float(found[key])
        value = share / 100 if share > 1 else share
        subsets[found["subset"]] = Accuracy(stats.Estimate(value, value, value, n), 0.0)
    sections = [section_accuracy(name, subsets).estimate.value * 100 for name in reward_bench.SECTIONS]
    assert sections == pytest.approx([89.4, 75.2, 84.5, 88.8], abs=0.06)


def test_the_score_needs_all_sections():
    rows = [row("aa", "a", members[0]) for members in reward_bench.SECTIONS.values()]
    found = evaluate(LENGTH, rows)
    assert found.score is not None
    assert found.score.value == 1.0
    assert found.score.low < 1
    assert found.sections["Chat"].of == "1/5"
    assert evaluate(LENGTH, rows[:3]).score is None


# ------------------------------------------------------------------------------------------------------- reading


def test_rows_round_trip(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        BenchRow("p", ("a",), ("b",), "s", "1", {"model": "x"}),
        BenchRow(chat, ("a",), ("b",), "s", "2", {}),
        BenchRow("p", ("a",), ("b", "c", "d"), "best", "3", {}),
        BenchRow("p", ("a", "b", "c"), ("d", "e", "f"), "styles", "4", {}),
        BenchRow("p", ([{"role": "assistant", "content": "a"}],), ("b",), "s", "5", {}),
    ]  # fmt: skip
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    (only,) = read_rows(tmp_path / "rows.json")
    assert (only.subset, only.id) == ("rows", "1")


def test_an_implicit_prompt_is_split_off(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    other = [turns[0], {"role": "assistant", "content": "no"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"chosen": turns, "rejected": other}))
    (found,) = read_rows(tmp_path / "x.jsonl")
    assert found.prompt == turns[:1]
    assert (found.chosen, found.rejected) == ((turns[1:],), (other[1:],))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "p", "chosen": "a"}', "row 1: .*'rejected' is missing"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\nnope', "line 2: not JSON"),
        ('{"prompt": "p", "chosen": 3, "rejected": "b"}', "row 1: chosen: expected text"),
        ('{"prompt": 3, "chosen": "a", "rejected": "b"}', "row 1: prompt: expected text"),
        ('{"chosen": "a", "rejected": "b"}', "'prompt' is missing"),
        ('{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}', "found 2 and 1"),
        ('{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"}', "Ties subset"),
        ("[1]", "row 1: expected an object, found int"),
        ("[1", "not JSON"),
        ("", "at least one row"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, text, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        evaluate(LENGTH, read_rows(path))
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="not readable"):
        read_rows(tmp_path / "x.jsonl.gz")


# ---------------------------------------------------------------------------------------------------- real sets


def test_length_on_real_subsets(shared_data):
    """The longest answer: worse than chance where bad answers were made elaborate, better where people chose."""
    folder = shared_data / "reward_subsets"
    if not folder.is_dir():
        pytest.skip("no reward_subsets")
    files = sorted(folder.glob("*.jsonl.gz"))
    found = evaluate(LENGTH, [r for file in files for r in read_rows(file)])
    assert found.subsets.keys() == {file.name.removesuffix(".jsonl.gz") for file in files}
    assert found.subsets["llmbar-adver-neighbor"].estimate.high < 0.5
    assert found.subsets["human-mtbench"].estimate.low > 0.5
    # from a human's label: a full answer to a harmless question against a refusal
    assert found.subsets["xstest-should-respond"].estimate.n == 113
    assert found.sections["Reasoning"].of == "4/7"
    assert found.sections.keys() == {"Chat Hard", "Safety", "Reasoning"}


def test_rm_bench_styles(shared_data):
    folder = shared_data / "rm_bench"
    if not folder.is_dir():
        pytest.skip("no rm_bench")
    found = evaluate(LENGTH, read_rows(folder / "chat.jsonl.gz"))
    assert found.styles["easy"].estimate.low > 0.7  # richer is longer
    assert found.styles["hard"].estimate.high < 0.3


def test_published_scores_of_judgebench(shared_data):
    """Scores of published reward models, given as a scorer, have the accuracies that their authors report."""
    folder = shared_data / "judgebench"
    if not folder.is_dir():
        pytest.skip("no judgebench")
    with gzip.open(folder / "pairs.jsonl.gz", "rt") as file:
        raw = [json.loads(line) for line in file]
    raw = [r for r in raw if r["published_rm_scores"]]
    model = sorted(raw[0]["published_rm_scores"])[0]
    rows, right = [], 0
    for r in raw:
        a, b = r["published_rm_scores"][model]
        better = r["label"] == "A>B"
        right += (a > b) if better else (b > a)
        texts = (r["response_A"], r["response_B"]) if better else (r["response_B"], r["response_A"])
        scores = {r["response_A"]: a, r["response_B"]: b}
        rows.append(BenchRow(r["question"], texts[:1], texts[1:], r["source"], r["pair_id"], {"scores": scores}))
    scorer = FunctionScorer(
        lambda completions, scores, **_: [s[c] for s, c in zip(scores, completions, strict=True)], "p"
    )
    found = evaluate(scorer, rows)
    assert sum(r["results"] for r in found.rows) == right
    assert found.subsets.keys() == {r["source"] for r in raw}
