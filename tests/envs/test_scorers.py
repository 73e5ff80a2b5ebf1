"""Scorers: what each name means, TRL-style callables, and the sentences for functions that misbehave."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch

from steelyard.envs import scorers
from steelyard.envs.scorers import FunctionScorer, SumScorer, checked_scores, scorer_from_name
from steelyard.errors import ConfigError, DataError, NonFiniteError, SteelyardError

PROMPTS = ["a", "a", "b"]
TEXTS = ["one two", "yes", "yes, yes 42"]
IDS = [[1, 2, 3], [1], [1, 2, 3, 4, 5]]


def score(name, **options):
    return scorer_from_name(name, **options).score(PROMPTS, TEXTS, IDS, {}).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length:min", [-3, -1, -5]),
        ("length:max", [3, 1, 5]),
        ("length:mode:4", [-1, -3, -1]),
        ("length:max:words", [2, 1, 3]),
        ("length:mode:7:characters", [0, -4, -4]),
        ("contains:yes", [0, 1, 1]),
        ("contains:a:b", [0, 0, 0]),
        ("regex:^y", [0, 1, 1]),
        (r"regex:\d+$", [0, 0, 1]),
        ("2*length:min", [-6, -2, -10]),
        ("1*contains:yes + -0.5*length:max", [-1.5, 0.5, -1.5]),
        ("contains:yes + 1e-1*length:max", [0.3, 1.1, 1.5]),
        ("contains:+ 2", [0, 0, 0]),
    ],
)
def test_values(name, expected):
    assert score(name) == pytest.approx(expected)


def test_names_are_read_back():
    for name in ("length:min", "length:mode:40", "length:max:words", "contains:a b", "regex:a|b"):
        assert scorer_from_name(name).name == name
        assert scorer_from_name(scorer_from_name(name).name) == scorer_from_name(name)
    total = scorer_from_name("contains:x + 0.5*length:min")
    assert total.name == "1*contains:x + 0.5*length:min"
    assert scorer_from_name(total.name) == total


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lenght:min", "found 'lenght'"),
        ("length", "length:min"),
        ("length:mode", "length:mode:40"),
        ("length:mode:x", "length:mode:40"),
        ("length:mode:-1", "length:mode:M"),
        ("length:shortest", "length:max"),
        ("length:min:bytes", ":characters"),
        ("contains:", "contains:yes"),
        ("regex:(", "not a regular expression"),
        ("contains:x + 2*nothing:y", "found 'nothing'"),
        ("python:rewards.py:f", "command line"),
    ],
)
def test_bad_names_are_one_sentence(name, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        scorer_from_name(name)
    assert "\n" not in str(caught.value)


def test_tokens_are_not_guessed():
    with pytest.raises(DataError, match=r"counts tokens.*length:min:words"):
        scorer_from_name("length:min").score(PROMPTS, TEXTS, [], {})


def test_a_pattern_that_would_take_years_is_stopped(monkeypatch):
    monkeypatch.setattr(scorers, "REGEX_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(DataError, match="took longer than"):
        scorer_from_name(r"regex:(a+)+$").score(["p"], ["a" * 60 + "b"], [[]], {})
    assert time.perf_counter() - start < 60  # years, without the stop


# ----------------------------------------------------------------------------------------- functions of the user


def function(f):
    return FunctionScorer(f, "f")


def test_functions_are_called_as_trl_calls_them():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **rest):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, rest=rest)
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    columns = {"answer": ["one", "no", "42"], "source": [1, 2, 3], "prompt": PROMPTS}
    found = function(reward).score(PROMPTS, TEXTS, IDS, columns)
    assert found.tolist() == [1.0, 0.0, 1.0]
    assert found.dtype == torch.float32
    assert seen == {"prompts": PROMPTS, "completions": TEXTS, "ids": IDS, "rest": {"source": [1, 2, 3]}}


def test_conversations_are_answered_by_one_message():
    seen = []
    prompt = [{"role": "user", "content": "hi"}]
    function(lambda prompts, completions, **_: seen.extend(completions) or [0.0]).score([prompt], ["ho"], [[1]], {})
    assert seen == [[{"role": "assistant", "content": "ho"}]]


def test_none_is_unscorable_and_nan_is_an_error():
    found = function(lambda **_: [1, None, 2.5]).score(PROMPTS, TEXTS, IDS, {})
    assert found[0] == 1
    assert math.isnan(found[1])
    assert found[2] == 2.5


def fails_on_42(completions, **_):
    return [1 / (text != "yes, yes 42") for text in completions]


@pytest.mark.parametrize(
    ("f", "error", "said"),
    [
        (lambda **_: [0.0, math.nan, 1.0], NonFiniteError, r"f: row 1 \(prompt 'a'\).*found nan"),
        (lambda **_: [0.0, 1.0, -math.inf], NonFiniteError, r"f: row 2 \(prompt 'b'\).*found -inf"),
        (lambda **_: [0.0, 1e300, 0.0], NonFiniteError, r"f: row 1 \(prompt 'a'\)"),
        (lambda **_: [0.0, "good", 0.0], DataError, r"f: row 1 .*found 'good'"),
        (lambda **_: [0.0], DataError, "f: expected 3 numbers, one per completion, got 1"),
        (lambda **_: 0.5, DataError, "f: expected a list of 3 numbers, found float"),
        (lambda **_: None, DataError, "f: expected a list of 3 numbers, found NoneType"),
        (fails_on_42, DataError, r"f: row 2 \(prompt 'b'\): ZeroDivisionError"),
        (lambda completions: [0.0], DataError, "f: row 0 .*TypeError"),
    ],
)
def test_a_function_that_misbehaves_is_one_sentence(f, error, said):
    with pytest.raises(error, match=said) as caught:
        function(f).score(PROMPTS, TEXTS, IDS, {})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SteelyardError)


def test_an_async_function_is_refused():
    async def later(**_):
        return [0.0] * 3

    with pytest.raises(DataError, match="async"):
        function(later).score(PROMPTS, TEXTS, IDS, {})


def test_a_failure_of_all_rows_together_says_so():
    def needs_one(completions, **_):
        if len(completions) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(DataError, match="all rows together: ValueError: too many"):
        function(needs_one).score(PROMPTS, TEXTS, IDS, {})


def test_python_file(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "def polite(completions, **_):\n    return [float(t.count('yes')) for t in completions]\n"
    )
    name = f"python:{file}:polite"
    assert score(name, allow_code=True) == [0, 1, 2]
    assert score(f"0.5*{name} + 1*length:min", allow_code=True) == [-3, -0.5, -4]
    for bad, said in [
        (f"python:{file}:rude", "no function 'rude'.*polite"),
        (f"python:{tmp_path}/none.py:polite", "there is no file"),
        (f"python:{file}", "FILE.py:FUNCTION"),
    ]:
        with pytest.raises(ConfigError, match=said):
            scorer_from_name(bad, allow_code=True)
    file.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        scorer_from_name(name, allow_code=True)


# ------------------------------------------------------------------------------------------------------- sums


def test_a_sum_leaves_out_what_cannot_be_scored():
    """As TRL's weighted sum of several reward functions."""
    some = FunctionScorer(lambda **_: [1.0, None, None], "some")
    other = FunctionScorer(lambda **_: [1.0, 2.0, None], "other")
    found = SumScorer(((2.0, some), (3.0, other))).score(PROMPTS, TEXTS, IDS, {})
    assert found[:2].tolist() == [5.0, 6.0]
    assert math.isnan(found[2])


def test_checked_scores():
    scorer = scorer_from_name("length:min")
    fine = torch.tensor([0.0, math.nan, 1.0])
    assert checked_scores(scorer, fine, PROMPTS) is fine
    with pytest.raises(DataError, match=r"length:min: expected shape \[3\], found \[2\]"):
        checked_scores(scorer, fine[:2], PROMPTS)
    with pytest.raises(NonFiniteError, match=r"row 2 \(prompt 'b'\)"):
        checked_scores(scorer, torch.tensor([0.0, 0.0, math.inf]), PROMPTS)
