"""Text data: every layout in, one row out; tokens, masks and batches exact; every bad input one sentence."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.experience import FOREIGN
from steelyard.data.preferences import (
    TextData,
    TextRow,
    is_text_data,
    prompt_key,
    read_text_data,
    split,
    tokenize,
    write_text_data,
)
from steelyard.data.tokenizer import ByteChat
from steelyard.errors import ConfigError, DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_one(tmp_path, record, **options):
    data = read_text_data(write(tmp_path / "one.jsonl", record), **options)
    assert len(data) == 1
    return data.kind, data.rows[0]


# ----------------------------------------------------------------------------------------------------- layouts

PAIR = {"labels": (1.0, 0.0), "pairs": ((0, 1),)}
LAYOUTS = {
    "standard": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "id": 7},
        "preference",
        TextRow("Q", ("good", "bad"), columns={"id": 7}, **PAIR),
    ),
    "conversational": (
        {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        "preference",
        TextRow([user("Q")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "implicit, conversational": (
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        "preference",
        TextRow([user("Q")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "implicit, strings end at a word": (
        {"chosen": "The sky is black.", "rejected": "The sky is blue."},
        "preference",
        TextRow("The sky is", (" black.", " blue."), **PAIR),
    ),
    "implicit, one continues the other": (
        {"chosen": "The sky", "rejected": "The sky is"},
        "preference",
        TextRow("The", (" sky", " sky is"), **PAIR),
    ),
    "implicit, nothing shared": (
        {"chosen": "yes", "rejected": "no"},
        "preference",
        TextRow("", ("yes", "no"), **PAIR),
    ),
    "prompt repeated in the conversations, with scores": (
        {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")],
         "score_chosen": 8, "score_rejected": 5.5, "messages": [user("Q"), assistant("good")]},
        "preference",
        TextRow([user("Q")], ([assistant("good")], [assistant("bad")]), rewards=(8.0, 5.5), margin=2.5,
                columns={"messages": [user("Q"), assistant("good")]}, **PAIR),
    ),
    "prompt repeated after a system message": (
        {"prompt": "Q", "chosen": [{"role": "system", "content": "S"}, user("Q"), assistant("good")],
         "rejected": [{"role": "system", "content": "S"}, user("Q"), assistant("bad")]},
        "preference",
        TextRow([{"role": "system", "content": "S"}, user("Q")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "margin": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 3},
        "preference",
        TextRow("Q", ("good", "bad"), margin=3.0, **PAIR),
    ),
    "messages prompt, string completions": (
        {"prompt": [user("Q")], "chosen": "good", "rejected": "bad"},
        "preference",
        TextRow([user("Q")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "several rejected": (
        {"prompt": "Q", "chosen": ["good"], "rejected": ["bad", "worse"]},
        "preference",
        TextRow("Q", ("good", "bad", "worse"), labels=(1.0, 0.0, 0.0), pairs=((0, 1), (0, 2))),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
         "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        "preference",
        TextRow([{"role": "system", "content": "S"}, user("Q")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: good",
         "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: bad"},
        "preference",
        TextRow([user("Q"), assistant("A"), user("R")], ([assistant("good")], [assistant("bad")]), **PAIR),
    ),
    "unpaired": (
        {"prompt": "Q", "completion": "good", "label": True},
        "unpaired",
        TextRow("Q", ("good",), labels=(1.0,)),
    ),
    "unpaired, conversational": (
        {"prompt": [user("Q")], "completion": [assistant("bad")], "label": False},
        "unpaired",
        TextRow([user("Q")], ([assistant("bad")],), labels=(0.0,)),
    ),
    "unpaired, LLaMA-Factory": (
        {"messages": 1, "conversations": [user("Q"), assistant("good")], "kto_tag": True},
        "unpaired",
        TextRow([user("Q")], ([assistant("good")],), labels=(1.0,), columns={"messages": 1}),
    ),
    "prompt-completion": (
        {"prompt": "Q", "completion": "A"},
        "completion",
        TextRow("Q", ("A",)),
    ),
    "prompt-completion with a reward": (
        {"prompt": "Q", "completion": "A", "reward": 0.5},
        "completion",
        TextRow("Q", ("A",), rewards=(0.5,)),
    ),
    "a scored group": (
        {"prompt": "Q", "completions": ["A", "B", "C"], "rewards": [1, 0, 2]},
        "completion",
        TextRow("Q", ("A", "B", "C"), rewards=(1.0, 0.0, 2.0)),
    ),
    "Alpaca": (
        {"instruction": "Do", "input": "this", "output": "A"},
        "completion",
        TextRow("Do\nthis", ("A",)),
    ),
    "OpenRLHF": (
        {"input": "Q", "output": "A"},
        "completion",
        TextRow("Q", ("A",)),
    ),
    "prompts": (
        {"prompt": "Q", "answer": "42"},
        "prompt",
        TextRow("Q", columns={"answer": "42"}),
    ),
    "prompts, conversational": (
        {"prompt": [user("Q")]},
        "prompt",
        TextRow([user("Q")]),
    ),
    "text": (
        {"text": "words"},
        "text",
        TextRow("", ("words",)),
    ),
    "messages": (
        {"messages": [user("Q"), assistant("A"), user("R"), assistant("B")]},
        "text",
        TextRow([user("Q"), assistant("A"), user("R")], ([assistant("B")],)),
    ),
    "parts of a message": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, assistant("A")]},
        "text",
        TextRow([user("Q")], ([assistant("A")],)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    record, kind, row = LAYOUTS[name]
    assert read_one(tmp_path, record) == (kind, row)
    assert read_one(tmp_path, record | {"extra": None}) == (kind, row)  # null columns are no columns


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_of_any_kind(tmp_path, name):
    record, _, row = LAYOUTS[name]
    kind, found = read_one(tmp_path, record, kind="prompt")
    assert kind == "prompt"
    assert found.completions == ()
    assert found.prompt == row.prompt


def test_files_and_folders(tmp_path):
    records = [{"prompt": f"Q{i}", "chosen": "good", "rejected": "bad"} for i in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text("\ufeff" + lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    hashes = {read_text_data(tmp_path / name).content_hash for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz")}
    assert len(hashes) == 1
    folder = read_text_data(tmp_path)
    assert len(folder) == 12
    assert folder.rows[0].where == "a.jsonl, line 1"
    assert is_text_data(tmp_path)
    assert is_text_data(tmp_path / "a.jsonl")
    assert not is_text_data(tmp_path / "a.npz")
    records[0]["prompt"] = "other"
    assert read_text_data(write(tmp_path / "e.jsonl", *records)).content_hash not in hashes


def test_hh_pairs_that_answer_different_prompts_are_left_out_and_said(tmp_path):
    same = {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
    other = {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"}
    data = read_text_data(write(tmp_path / "hh.jsonl", same, other))
    assert len(data) == 1
    assert data.notes == (
        "1 of 2 rows were left out, the first at line 2: chosen and rejected answer different prompts",
    )


# ---------------------------------------------------------------------------------------------------- bad input

BAD_ROWS = {
    "missing column": ({"prompt": "Q", "chosen": "a"}, "expected the column rejected, found chosen, prompt"),
    "unknown columns": ({"question": "Q"}, "expected columns such as prompt.* found question"),
    "no columns": ({}, "expected columns such as prompt.* found none"),
    "wrong type": ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "chosen: expected a string or a list .* found 3"),
    "empty list": ({"prompt": [], "chosen": "a", "rejected": "b"}, r"prompt: expected a string .* found \[\]"),
    "message without content": ({"prompt": [{"role": "user"}]}, "prompt: expected messages with a string 'content'"),
    "message without role": ({"prompt": [{"content": "a"}]}, "prompt: expected messages with a string 'role'"),
    "label": ({"prompt": "Q", "completion": "a", "label": "yes"}, "label: expected true or false, found yes"),
    "margin": ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "2"}, "margin: expected a finite number"),
    "NaN": ({"prompt": "Q", "completion": "a", "reward": math.nan}, "reward: expected a finite number, found NaN"),
    "number of rewards": ({"prompt": "Q", "completions": ["a"], "rewards": [1, 2]}, "expected a list of 1 numbers"),
    "steps": ({"prompt": "Q", "completions": ["a"], "labels": [True]}, "found labels of steps"),
    "ends with the user": ({"messages": [assistant("a"), user("Q")]}, "end with the assistant's answer"),
    "one of each": ({"chosen": "a", "rejected": [user("Q"), assistant("b")]}, "two strings or two conversations"),
    "user as completion": ({"prompt": "Q", "chosen": [user("a")], "rejected": "b"}, "found one of 'user'"),
    "foreign conversation": (
        {"prompt": "Q", "chosen": [user("R"), assistant("a")], "rejected": "b"},
        "found 2 messages that do not repeat the prompt",
    ),
    "surrogate": ({"prompt": "\ud800"}, "prompt: expected Unicode text, found a lone surrogate at 0"),
    "no prompt": ({"completion": "a"}, "expected the column prompt, found completion"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_one_sentence(tmp_path, name):
    record, sentence = BAD_ROWS[name]
    path = write(tmp_path / "bad.jsonl", record)
    with pytest.raises(DataError, match=sentence) as error:
        read_text_data(path)
    assert str(error.value).startswith(f"{path}: line 1: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected text data, found an empty file"),
        (b" \n\n", "expected text data, found an empty file"),
        (b'{"prompt": "a"}\n{"prompt"\n', r"line 2: expected a JSON object, found \{\"prompt\""),
        (b'{"prompt": "a"}\n["b"]\n', r"line 2: expected a JSON object, found \[\"b\"\]"),
        (b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n', "line 3: expected UTF-8, found byte 0xff at 12"),
        (b'[{"prompt": "a"},\n', "line 2: expected a JSON list of objects"),
        (b'[{"prompt": "a"}, 3]', "row 1: expected a JSON object, found 3"),
        (b"[]", "expected rows of text data, found none"),
        (b"[" * 100_000, "expected a JSON list of objects"),
        (b'{"a":' * 100_000, "line 1: expected a JSON object, found .*too deep"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as error:
        read_text_data(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_later_rows_must_be_of_the_first_ones_kind(tmp_path):
    path = write(tmp_path / "mixed.jsonl", {"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q"})
    with pytest.raises(DataError, match=r"line 2: expected the column chosen, found prompt"):
        read_text_data(path)
    found = []
    assert len(read_text_data(path, on_error=found.append)) == 1
    assert len(found) == 1


def test_bad_places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])
    for path, sentence in (
        (tmp_path / "absent.jsonl", "no such file or folder"),
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path / "folder", "found none in this folder"),
        (tmp_path / "bad.jsonl.gz", "expected a file that can be read"),
        (tmp_path / "cut.jsonl.gz", "expected a file that can be read"),
    ):
        with pytest.raises(DataError, match=sentence) as error:
            read_text_data(path)
        assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ConfigError, match="kind: expected 'preference'"):
        read_text_data(write(tmp_path / "a.jsonl", {"prompt": "a"}), kind="pairs")


def test_bad_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad.parquet: expected a Parquet file, found"):
        read_text_data(tmp_path / "bad.parquet")


# ------------------------------------------------------------------------------------------------------ writing

WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
NUMBERS = st.floats(-5, 5).map(lambda x: round(x, 3))
MESSAGES = st.lists(WORDS, min_size=1, max_size=3).map(
    lambda texts: [[user, assistant][i % 2](text) for i, text in enumerate(texts[: len(texts) // 2 * 2 + 1][:3])][
        : 1 if len(texts) < 3 else 3
    ]
)


@st.composite
def rows(draw, kind, chat):
    def completion():
        text = draw(WORDS)
        return [assistant(text)] if chat else text

    prompt = draw(MESSAGES) if chat else draw(WORDS)
    columns = {"note": draw(WORDS)}
    if kind == "preference":
        rewards = (draw(NUMBERS), draw(NUMBERS)) if draw(st.booleans()) else None
        margin = rewards[0] - rewards[1] if rewards else draw(st.none() | NUMBERS)
        return TextRow(prompt, (completion(), completion()), (1.0, 0.0), rewards, ((0, 1),), margin, columns)
    if kind == "unpaired":
        return TextRow(prompt, (completion(),), (draw(st.sampled_from([0.0, 1.0])),), columns=columns)
    if kind == "completion":
        number = draw(st.integers(1, 3))
        rewards = tuple(draw(NUMBERS) for _ in range(number)) if draw(st.booleans()) else None
        return TextRow(prompt, tuple(completion() for _ in range(number)), rewards=rewards, columns=columns)
    if kind == "text":
        return TextRow(prompt if chat else "", (completion(),), columns=columns)
    return TextRow(prompt, columns=columns)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["preference", "unpaired", "completion", "prompt", "text"])
def test_round_trip(tmp_path_factory, kind, chat, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("trip") / f"rows.{suffix}"

    @settings(max_examples=15, deadline=None)
    @given(st.lists(rows(kind, chat), min_size=1, max_size=4))
    def check(given_rows):
        data = TextData(kind, given_rows)
        assert write_text_data(path, data) == len(given_rows)
        back = read_text_data(path, kind)
        assert back.rows == given_rows
        assert back.content_hash == data.content_hash

    check()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["preference", "completion", "prompt"])
def test_openrlhf_round_trip(tmp_path, kind, chat):
    @settings(max_examples=15, deadline=None)
    @given(rows(kind, chat).filter(lambda row: len(row.completions) < 2 or row.pairs))
    def check(row):
        write_text_data(tmp_path / "o.jsonl", [row], "openrlhf")
        assert read_text_data(tmp_path / "o.jsonl", kind).rows == [row]

    check()


def test_openrlhf_columns(tmp_path):
    row = TextRow([user("Q")], ([assistant("a")], [assistant("b")]), margin=1.0, **PAIR)
    write_text_data(tmp_path / "o.jsonl", [row], "openrlhf")
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {
        "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")], "margin": 1.0,
    }  # fmt: skip


def test_one_line_for_every_pair(tmp_path):
    row = TextRow("Q", ("a", "b", "c"), rewards=(3.0, 2.0, 0.0), pairs=((0, 1), (0, 2)))
    assert write_text_data(tmp_path / "p.jsonl", [row]) == 2
    back = read_text_data(tmp_path / "p.jsonl")
    assert [(r.completions, r.rewards, r.margin) for r in back.rows] == [
        (("a", "b"), (3.0, 2.0), 1.0), (("a", "c"), (3.0, 0.0), 3.0),
    ]  # fmt: skip


def test_writer_refuses(tmp_path):
    row = TextRow("Q", ("a",), rewards=(math.nan,))
    for path, given_rows, sentence in (
        ("a.csv", [row], "expected a name ending in"),
        ("a.jsonl", [], "expected rows to write, found none"),
        ("a.jsonl", [row], "expected values that JSON can hold"),
    ):
        with pytest.raises(DataError, match=sentence):
            write_text_data(tmp_path / path, given_rows)
    with pytest.raises(ConfigError, match="layout: expected 'trl' or 'openrlhf', found 'verl'"):
        write_text_data(tmp_path / "a.jsonl", [row], "verl")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="expected columns of one type each"):
        write_text_data(tmp_path / "a.parquet", [TextRow("Q"), TextRow([user("Q")])])


@pytest.mark.lm
def test_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": "Q", "chosen": "good", "rejected": "bad"}, {"prompt": "R", "chosen": "x", "rejected": "y"}]
    table = datasets.Dataset.from_list(records)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    plain = read_text_data(write(tmp_path / "a.jsonl", *records))
    assert is_text_data(tmp_path / "one")
    assert read_text_data(tmp_path / "one").content_hash == plain.content_hash
    assert read_text_data(tmp_path / "two").content_hash == plain.content_hash
    assert [row.prompt for row in read_text_data(tmp_path / "two", split="test").rows] == ["R"]
    with pytest.raises(DataError, match="expected the split 'dev', found 'train', 'test'"):
        read_text_data(tmp_path / "two", split="dev")


@pytest.mark.lm
def test_hub_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "owner/absent":
            raise ConnectionError("no network\nat all")
        return datasets.Dataset.from_list([{"prompt": "Q", "completion": "A", "label": True}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text_data("owner/name", split="test").kind == "unpaired"
    with pytest.raises(DataError, match=r"owner/absent: expected a data set .* found: no network at all$"):
        read_text_data("owner/absent")
    assert asked == [("owner/name", "test"), ("owner/absent", "train")]


# ---------------------------------------------------------------------------------------------------- splitting


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40), st.integers(0, 5))
@settings(max_examples=40)
def test_split_keeps_prompts_apart(numbers, seed):
    data = TextData("prompt", [TextRow(f"Prompt {i}" if k % 2 else f"prompt  {i}", where=str(k))
                               for k, i in enumerate(numbers)])  # fmt: skip
    different = len(set(numbers))
    if different < 2:
        with pytest.raises(ConfigError, match="leaves one side empty"):
            split(data, 0.3, seed)
        return
    train, held = split(data, 0.5, seed)
    assert not {prompt_key(row) for row in train.rows} & {prompt_key(row) for row in held.rows}
    assert sorted([*train.rows, *held.rows], key=lambda r: int(r.where)) == data.rows
    assert len({prompt_key(row) for row in held.rows}) == round(different / 2)
    shuffled = TextData("prompt", data.rows[::-1])
    assert split(shuffled, 0.5, seed)[1].rows == held.rows[::-1]


def test_split_of_nothing_and_other_seeds():
    data = TextData("prompt", [TextRow(str(i)) for i in range(50)])
    assert split(data, 0.0)[0].rows == data.rows
    assert split(data, 0.2, 0)[1].rows != split(data, 0.2, 1)[1].rows
    with pytest.raises(ConfigError, match="must lie in"):
        split(data, 1.0)


def test_text_without_prompts_is_split_by_itself():
    data = TextData("text", [TextRow("", (f"text {i}",)) for i in range(10)])
    assert len(split(data, 0.2)[1]) == 2


# --------------------------------------------------------------------------------------------------- tokenising

PREFERENCES = TextData(
    "preference",
    [
        TextRow("Q", ("good", "bad!!"), margin=2.0, columns={"id": 1}, **PAIR),
        TextRow([user("longer")], ([assistant("yes")], [assistant("n")]), columns={"id": 2, "x": "y"}, **PAIR),
        TextRow("", ("a", "b", "c"), labels=(1.0, 0.0, 0.0), pairs=((0, 1), (0, 2))),
    ],
    "made.jsonl",
)


def rows_of(batch):
    """Return (prompt ids, completion ids) of every completion, without padding."""
    found = []
    for n, p in enumerate(batch.prompt_of.tolist()):
        prompt = batch.prompts[p][batch.prompt_mask[p] > 0].tolist()
        found.append((prompt, batch.completions[n][batch.scored_mask[n] > 0].tolist()))
    return found


def test_batch_by_hand():
    tokenizer = ByteChat()
    data = tokenize(PREFERENCES, tokenizer)
    assert len(data) == 3
    assert data.report.sentences() == []
    batch = data.batch([2, 0, 2])
    assert batch.prompt_of.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.pairs.tolist() == [[0, 1], [0, 2], [3, 4], [5, 6], [5, 7]]
    assert batch.labels.tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
    assert batch.rewards is None
    torch.testing.assert_close(batch.margins, torch.tensor([math.nan, math.nan, 2, math.nan, math.nan]), equal_nan=True)
    assert batch.born.tolist() == [FOREIGN] * 8
    expected = [(row.prompt, text) for row in (PREFERENCES.rows[2], PREFERENCES.rows[0], PREFERENCES.rows[2])
                for text in row.completions]  # fmt: skip
    assert rows_of(batch) == [(tokenizer.prompt(p), tokenizer.completion(p, c)) for p, c in expected]
    assert batch.prompts.dtype == batch.completions.dtype == batch.pairs.dtype == torch.int64
    assert batch.prompt_mask.dtype == batch.scored_mask.dtype == torch.float32
    assert batch.prompts.shape == batch.prompt_mask.shape == (3, 2)
    assert batch.prompts.tolist() == [[tokenizer.pad, tokenizer.bos], [tokenizer.bos, ord("Q")],
                                      [tokenizer.pad, tokenizer.bos]]  # fmt: skip
    prompts, mask = data.prompts([2, 0, 2])
    assert torch.equal(prompts, batch.prompts)
    assert torch.equal(mask, batch.prompt_mask)
    assert data.texts([1, 0]) == [[user("longer")], "Q"]
    assert data.completion_texts(np.array([2, 0])) == ["a", "b", "c", "good", "bad!!"]
    assert data.columns(torch.tensor([0, 1, 2])) == {"id": [1, 2, None], "x": [None, "y", None]}


def test_parts_of_a_batch_are_batches():
    data = tokenize(PREFERENCES, ByteChat())
    batch = data.batch([0, 1, 2])
    chosen = data.batch([2, 1])
    same = batch.of_prompts(torch.tensor([2, 1]))
    assert rows_of(same) == rows_of(chosen)
    assert sorted(same.pairs.tolist()) == chosen.pairs.tolist()


@given(st.lists(rows("completion", False), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_batches_undo_to_the_rows(given_rows, draws):
    tokenizer = ByteChat()
    data = tokenize(TextData("completion", given_rows), tokenizer, truncation="keep_end")
    indices = draws.draw(st.lists(st.integers(0, len(given_rows) - 1), min_size=1, max_size=8))
    batch = data.batch(indices)
    expected = [(tokenizer.prompt(given_rows[i].prompt), tokenizer.completion("", c))
                for i in indices for c in given_rows[i].completions]  # fmt: skip
    assert rows_of(batch) == expected
    # padding is on the left of prompts and on the right of completions, and holds the padding token
    assert (batch.prompt_mask.diff(dim=1) >= 0).all()
    assert (batch.scored_mask.diff(dim=1) <= 0).all()
    assert (batch.prompts[batch.prompt_mask == 0] == tokenizer.pad).all()
    assert (batch.completions[batch.scored_mask == 0] == tokenizer.pad).all()


def test_what_kinds_fill():
    tokenizer = ByteChat()
    unpaired = tokenize(TextData("unpaired", [TextRow("Q", ("a",), (0.0,))]), tokenizer).batch([0])
    assert unpaired.labels.tolist() == [0]
    assert unpaired.pairs is None
    group = tokenize(TextData("completion", [TextRow("Q", ("a", "b"), rewards=(1.0, 2.0)), TextRow("R", ("c",))]),
                     tokenizer).batch([0, 1])  # fmt: skip
    assert group.rewards[:2].tolist() == [1, 2]
    assert group.rewards[2].isnan()
    assert group.labels is None
    prompts = tokenize(TextData("prompt", [TextRow("Q"), TextRow("R")]), tokenizer).batch([1, 0])
    assert prompts.completions.shape[0] == 0
    assert prompts.prompts.shape == (2, 2)


def test_truncation():
    tokenizer = ByteChat()
    data = TextData("completion", [TextRow("Q", ("abc",)), TextRow("abcdef", ("xyz",), where="line 2")], "f.jsonl")
    with pytest.raises(DataError, match=r"^f.jsonl: line 2: expected a prompt of at most 4 tokens, found 7; raise"):
        tokenize(data, tokenizer, 4, 9)
    for rule, left in (("keep_start", b"abc"), ("keep_end", b"def")):
        cut = tokenize(data, tokenizer, 4, 3, rule)
        prompt, completion = rows_of(cut.batch([1]))[0]
        assert prompt == [tokenizer.bos, *left]  # BOS stays in front
        assert completion == list(b"xyz")  # and EOS is lost: it did not end here
        assert cut.report.sentences() == [
            "1 of 2 prompts were cut to the allowed length (50.0%)",
            "2 of 2 completions were cut and so lost their EOS (100.0%)",
        ]
    assert rows_of(tokenize(data, tokenizer, 1, 9, "keep_end").batch([1]))[0][0] == list(b"f")
    with pytest.raises(ConfigError, match="at least 1"):
        tokenize(data, tokenizer, 0, 3)
    with pytest.raises(ConfigError, match="truncation: expected 'error'"):
        tokenize(data, tokenizer, 4, 3, "middle")


def test_what_is_dropped_is_counted():
    rows = [
        TextRow("Q", ("good", "bad"), **PAIR),
        TextRow("Q", ("same", "same"), **PAIR),
        TextRow("Q", ("", "bad"), **PAIR),
        TextRow("Q", ("longer one", "longer two"), **PAIR),
        TextRow("Q", ("good", "bad"), rewards=(1.0, 1.0), margin=0.0, **PAIR),
        TextRow("Q", ("good", "", "bad"), rewards=(3.0, 2.0, 1.0), labels=(1.0, 0.0, 0.0), pairs=((0, 1), (0, 2))),
    ]
    data = tokenize(TextData("preference", rows), ByteChat(), max_completion_tokens=7)
    report = data.report
    assert (report.empty, report.identical, report.identical_after_cut, report.ties, report.rows_dropped) == (
        2, 1, 1, 1, 4,
    )  # fmt: skip
    assert len(data) == 2
    assert data.batch([1]).pairs.tolist() == [[0, 1]]
    assert data.batch([1]).rewards.tolist() == [3, 1]
    assert data.batch([1]).margins.tolist() == [2]
    assert "4 of 6 rows had nothing left and were dropped (66.7%)" in report.sentences()
    assert report.to_dict()["ties"] == 1
    with pytest.raises(DataError, match=r"found none after tokenising: 1 of 1 pairs had equal"):
        tokenize(TextData("preference", rows[1:2], "f"), ByteChat())
    unpaired = [TextRow("Q", ("",), (1.0,)), TextRow("Q", ("a",), (1.0,))]
    assert len(tokenize(TextData("unpaired", unpaired), ByteChat())) == 1


def test_token_hash_knows_the_limits():
    whole, cut = (tokenize(PREFERENCES, ByteChat(), max_completion_tokens=n) for n in (9, 4))
    assert whole.content_hash == tokenize(PREFERENCES, ByteChat()).content_hash
    assert whole.content_hash != cut.content_hash


# ---------------------------------------------------------------------------------------------------- real sets


@pytest.mark.parametrize(
    ("path", "kind", "count"),
    [
        ("dpo_en_demo/dpo_en_demo.jsonl.gz", "preference", 300),
        ("hh_rlhf_harmless/test.jsonl.gz", "preference", 1540),
        ("reward_subsets/llmbar-natural.jsonl.gz", "preference", 100),
        ("reward_subsets", "preference", None),
        ("alpaca_eval_prefs_nc/derived_alpacaeval-easy-like.jsonl.gz", "preference", 505),
        ("alpaca_eval_prefs_nc/prompts.jsonl.gz", "prompt", 537),
    ],
)
def test_real_sets(shared_data, tmp_path, path, kind, count):
    data = read_text_data(shared_data / path)
    assert data.kind == kind
    assert count in (None, len(data))
    write_text_data(tmp_path / "back.jsonl.gz", data)
    assert read_text_data(tmp_path / "back.jsonl.gz").content_hash == data.content_hash
    held = split(data, 0.1, 0)[1]
    tokens = tokenize(held, ByteChat(), 256, 256, "keep_end")
    assert len(tokens) > 0.85 * len(held)  # programs with a late bug are equal after the cut
    batch = tokens.batch(range(8))
    assert batch.prompt_mask.sum(1).min() >= 1
    if kind == "preference":
        assert len(batch.pairs) == 8
        assert (batch.lengths >= 2).all()


def test_hh_dialogues(shared_data):
    data = read_text_data(shared_data / "hh_rlhf_harmless" / "test.jsonl.gz")
    assert len(data.notes) == 1
    assert data.notes[0].startswith("2 of 1542 rows were left out, the first at line 837")
    for row in data.rows:
        assert row.prompt[-1]["role"] == "user"
        assert "\n\nAssistant:" not in row.completions[0][0]["content"]
