"""Pools that others made: small files of the same shape, the real ones where they are, and your own JSONL."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from steelyard.adapt.selection import expected_reward
from steelyard.data.sample_pool_imports import alpaca_eval, game24, gsm8k, humaneval, math_best_of_8
from steelyard.data.sample_pool_jsonl import pieces, prefix, user_jsonl
from steelyard.data.tokenizer import ByteChat
from steelyard.errors import DataError


def written(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# ---------------------------------------------------------------------------------------------- published


def test_game24(tmp_path):
    base = {"prompting": "cot", "idx": 9, "puzzle": "1 2 3 4", "solved_rate_human": "90.30%"}
    outputs = ["Steps:\n1 + 2 = 3\nAnswer: (1 + 3) * (2 + 4) = 24", "Answer: None", "no answer"]
    rows = [base | {"sample": 2 - k, "output": text, "correct": int(k == 0)} for k, text in enumerate(outputs)]
    rows.append(base | {"prompting": "standard", "sample": 0, "output": "Answer: 1 = 24", "correct": 0})
    written(tmp_path / "samples.jsonl.gz", rows)
    pool = game24(tmp_path)
    item = pool.items[0]
    assert item.answers == ("", "", "(1+3)*(2+4)")  # in the order of their numbers
    assert item.rewards.tolist() == [0, 0, 1]
    assert item.columns == {"id": 9, "solved_by_people": 0.903}
    assert item.lengths.tolist() == [3, 4, 23]
    assert len(game24(tmp_path, "standard").items[0].rewards) == 1


def test_math_and_gsm8k(tmp_path):
    row = {"idx": 0, "question": "1+1?", "gt": "2", "level": "Level 1", "samples": ["2", "3"], "pred": ["2", 3],
           "correct": [1, 0], "rm_score": [[0.5], [-1.5]]}  # fmt: skip
    written(tmp_path / "m/samples.jsonl.gz", [row])
    item = math_best_of_8(tmp_path / "m").items[0]
    assert (item.answers, item.stratum) == (("2", "3"), "Level 1")
    assert item.columns["rm_score"] == [0.5, -1.5]
    system = {"solution": "so 1,000\nA: 1,000", "is_correct": True}
    written(
        tmp_path / "g/example_model_solutions.jsonl",  # not packed is fine, too
        [{"id": 1, "question": "q", "small": system, "large": {"solution": "no idea", "is_correct": False}}],
    )
    item = gsm8k(tmp_path / "g").items[0]
    assert (item.answers, item.rewards.tolist()) == (("1000", ""), [1, 0])
    assert item.columns["systems"] == ["small", "large"]


def test_alpaca_eval(tmp_path):
    written(tmp_path / "prompts.jsonl.gz", [{"id": k, "source": "koala", "prompt": f"p{k}"} for k in range(2)])
    rows = [
        {"model": model, "id": k, "output": f"{model} {k}", "p_vs_gpt4turbo": 0.1 * k + 0.2}
        for model in ("b", "a", "NullModel")
        for k in range(3)  # the third prompt is not among them
    ]
    rows.append({"model": "half", "id": 0, "output": "x", "p_vs_gpt4turbo": 1.0})
    rows.append({"model": "a", "id": 0, "output": "other judge", "gpt4_vs_davinci003": 1.0})
    written(tmp_path / "outputs.jsonl.gz", rows)
    pool = alpaca_eval(tmp_path)
    assert [item.columns["models"] for item in pool] == [["a", "b"]] * 2
    assert pool.items[1].texts == ("a 1", "b 1")
    assert pool.rewards() == pytest.approx(np.array([[0.2, 0.2], [0.3, 0.3]]))
    with pytest.raises(DataError, match="'half': expected p_vs_gpt4turbo on 2 prompts, found 1"):
        alpaca_eval(tmp_path, models=["half"])
    with pytest.raises(DataError, match="found none"):
        alpaca_eval(tmp_path, "gpt4_vs_davinci003")


def test_humaneval_runs_nothing(tmp_path):
    trap = f"    open({str(tmp_path / 'ran')!r}, 'w')\n"
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "samples": [trap], "passed": [1]}
    written(tmp_path / "problems_and_samples.jsonl.gz", [row])
    assert humaneval(tmp_path).items[0].texts == (trap,)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"question": "q"}], "line 1: expected a key 'id'"), ([], "found none"), ([3], "line 1: expected a key 'id'"),
     ([{"id": 1, "question": "q"}], "line 1: expected systems")],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, rows, said):
    written(tmp_path / "example_model_solutions.jsonl.gz", rows)
    with pytest.raises(DataError, match=said):
        gsm8k(tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match=r"expected samples.jsonl.gz or samples.jsonl in it"):
        game24(tmp_path)
    (tmp_path / "samples.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not readable"):
        game24(tmp_path)


def test_the_real_pools(shared_data):
    """Figures of their READMEs, as far as the parts that are here allow."""
    pool = math_best_of_8(shared_data / "math_best_of_8_rm_scored")
    assert pool.rewards().shape == (67, 8)
    by_model, oracle = (expected_reward(pool, rule, 8).mean() for rule in ("rm_score", "oracle"))
    assert pool.rewards().mean() < by_model < oracle
    cot = game24(shared_data / "game24_gpt4_samples")
    assert cot.rewards().shape == (67, 100)
    assert 0.03 < cot.rewards().mean() < 0.06
    code = humaneval(shared_data / "humaneval_codegen_samples")
    assert code.rewards().shape == (110, 100)
    assert 0.2 < code.rewards().mean() < 0.25
    solutions = gsm8k(shared_data / "gsm8k")
    assert solutions.rewards().shape == (880, 4)
    assert solutions.rewards().mean(0) == pytest.approx([0.217, 0.390, 0.347, 0.563], abs=0.02)


@pytest.mark.slow
def test_the_real_alpaca_pool(shared_data):
    pool = alpaca_eval(shared_data / "alpaca_eval_prefs_nc")
    assert pool.rewards().shape == (537, 53)
    assert "NullModel" not in pool.items[0].columns["models"]


# ------------------------------------------------------------------------------------------------ your own


def test_pieces_and_prefixes():
    text = "Two + two, it's 4.\n"
    assert pieces(text) == 9
    assert prefix(text, 3) == "Two + two"
    assert prefix(text, 0) == ""
    assert prefix(text, 99) == "Two + two, it's 4."


def test_a_row_a_prompt(tmp_path):
    row = {
        "prompt": "p", "completions": ["a b", "c"], "rewards": [1, None], "answers": ["x", None], "stratum": "hard",
        "temperatures": [0, 1], "log_probs": [-1, -2], "scores": [0.5, 0.25], "finished": [True, False],
        "extra": [7, 8],
    }  # fmt: skip
    item = user_jsonl(written(tmp_path / "a.jsonl", [row])).items[0]
    np.testing.assert_equal(item.rewards, [1, np.nan])
    assert (item.answers, item.stratum, item.columns) == (("x", ""), "hard", {"extra": [7, 8]})
    assert item.lengths.tolist() == [3, 2]
    assert (item.logps.tolist(), item.temperatures.tolist(), item.finished.tolist()) == (
        [-1, -2],
        [0, 1],
        [True, False],
    )


def test_a_row_a_sample(tmp_path):
    rows = [{"prompt": p, "completion": f"{p} {k}", "reward": k, "source": p} for k in range(2) for p in ("x", "y")]
    pool = user_jsonl(written(tmp_path / "a.jsonl.gz", rows))
    assert [item.texts for item in pool] == [("x 0", "x 1"), ("y 0", "y 1")]
    assert pool.rewards().tolist() == [[0, 1], [0, 1]]
    assert [item.columns for item in pool] == [{"source": "x"}, {"source": "y"}]


def test_a_pool_of_data_pairs(tmp_path):
    rows = [
        {"prompt_id": p, "sample": k, "prompt": "same", "completion": "ab", "token_ids": [1, 2, k], "reward": 0.5,
         "log_prob": -3.0, "finished": True}
        for p in range(2)
        for k in range(3)
    ]  # fmt: skip
    file = written(tmp_path / "pool.jsonl", rows)
    state = {"sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 0}}
    (tmp_path / "pool.jsonl.state.json").write_text(json.dumps(state))
    pool = user_jsonl(file)
    assert len(pool) == 2
    assert pool.items[1].tokens == ((1, 2, 0), (1, 2, 1), (1, 2, 2))
    assert pool.items[1].temperatures.tolist() == [0.7] * 3
    assert pool.items[1].logps is None, "log-probs of another distribution than the policy's"
    state["sampling"]["temperature"] = 1.0
    (tmp_path / "pool.jsonl.state.json").write_text(json.dumps(state))
    assert user_jsonl(file).items[0].logps.tolist() == [-3] * 3


def test_messages_and_a_tokenizer(tmp_path):
    row = {"prompt": [{"role": "user", "content": "hi"}], "completions": ["é"], "rewards": [1]}
    item = user_jsonl(written(tmp_path / "a.jsonl", [row]), tokenizer=ByteChat()).items[0]
    assert (item.prompt, item.columns["messages"]) == ("hi", row["prompt"])
    assert item.prompt_tokens == tuple(ByteChat().prompt(row["prompt"]))
    assert item.tokens[0][-1] == ByteChat.eos
    assert item.lengths.tolist() == [3]


def test_first_samples_only(tmp_path):
    rows = [{"prompt": str(n), "completions": ["a"] * n, "rewards": list(range(n))} for n in (1, 2, 3)]
    file = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="between 1 and 3 samples"):
        user_jsonl(file)
    pool = user_jsonl(file, samples=2)
    assert pool.rewards().tolist() == [[0, 1], [0, 1]]
    assert "1 prompts with fewer than 2 samples left out" in pool.source


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p"}, "line 2: expected a key 'completion' or 'completions'"),
        ({"prompt": "p", "completions": "a"}, "line 2: key 'completions': expected a list of texts"),
        ({"prompt": "p", "completions": ["a"], "rewards": [1, 2]}, "each of 1 completions, found 2 of them"),
        ({"prompt": "p", "completions": ["a"], "rewards": ["1"]}, "key 'rewards': expected numbers"),
        ({"prompt": "p", "completions": ["a"], "token_ids": [[0.5]]}, "key 'token_ids': expected lists of integers"),
        ({"prompt": 3, "completions": ["a"]}, "key 'prompt': expected a text or messages"),
        ({"text": "p"}, "line 2: expected a key 'prompt'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, said):
    first = {"prompt": "0", "completions": ["a"]} if "completions" in row else {"prompt": "0", "completion": "a"}
    with pytest.raises(DataError, match=said):
        user_jsonl(written(tmp_path / "a.jsonl", [first, row]))
    with pytest.raises(DataError, match="no such file"):
        user_jsonl(tmp_path / "b.jsonl")


def test_a_key_of_some_samples_only(tmp_path):
    rows = [{"prompt": "p", "completion": "a", "reward": 1}, {"prompt": "p", "completion": "b"}]
    with pytest.raises(DataError, match="line 2: key 'reward' is in some samples of a prompt only"):
        user_jsonl(written(tmp_path / "a.jsonl", rows))
