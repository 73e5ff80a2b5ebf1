"""Step-by-step arithmetic with known mistakes."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from steelyard.envs.arithmetic import (
    EOS,
    NUM_SPECIALS,
    STRATA,
    ArithmeticConfig,
    ArithmeticScorer,
    ArithmeticTokenizer,
    Habits,
    answer_of,
    demonstrate,
    demonstrations,
    draw_problems,
    padded,
    result_of,
    solution,
    stratum_of,
)
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator

CONFIG = ArithmeticConfig()


def right(problem: str, answer: str) -> bool:
    return bool(ArithmeticScorer(CONFIG.modulus).score([problem], [answer], [[]], {})[0])


def test_solution_by_hand() -> None:
    assert solution("7+5*3?", 10) == "7;+52;*36;#6"
    assert solution("2-9?", 10) == "2;-93;#3"
    assert solution("3^0*4-5?", 10) == "3;^01;*44;-59;#9"
    assert result_of("^", 0, 0, 10) == 1
    assert solution("3+4?", 5) == "3;+42;#2"


@pytest.mark.parametrize(
    ("text", "answer"), [("7;+52;#2", "2"), ("7;+52;#", ""), ("7;+52;", ""), ("#12", ""), ("#a", ""), ("#3#3", "")]
)
def test_answer_is_one_digit_after_the_mark(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_scorer_wants_every_step_and_the_result_right_and_ignores_remarks() -> None:
    answers = [
        "7;+52;-11;#1",
        "7;+52b-11;#1",
        "7;+5~2;-11;#1",
        "7;+53;-11;#1",
        "7;+52;-11;#2",
        "7;+52;-11;",
        "7;+52;#1",
        "7;+52;-11;#1;",
    ]
    scores = ArithmeticScorer(10).score(["7+5-1?"] * 8, answers, [[]] * 8, {})
    assert scores.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_problems_are_of_their_stratum_and_none_comes_twice() -> None:
    problems = draw_problems(CONFIG, {"easy": 30, "medium": 20, "hopeless": 10}, 0, "x")
    assert len(set(problems)) == 60
    assert [stratum_of(p) for p in problems] == ["easy"] * 30 + ["medium"] * 20 + ["hopeless"] * 10
    assert all(1 <= p.count("*") <= CONFIG.hard_steps for p in problems[30:50])
    assert all(p.count("^") == 1 and "*" not in p for p in problems[50:])
    assert problems == draw_problems(CONFIG, {"easy": 30, "medium": 20, "hopeless": 10}, 0, "x")
    assert problems[0] != draw_problems(CONFIG, {"easy": 1}, 1, "x")[0]
    # how many of one stratum are asked for does not change another
    assert draw_problems(CONFIG, {"easy": 2, "medium": 20}, 0, "x")[2:] == problems[30:50]


def test_without_slips_and_misconceptions_only_the_hopeless_are_wrong() -> None:
    config = ArithmeticConfig(slip=0.0, misconceptions=0.0, easy_misconceptions=0.0)
    habits, generator = Habits.of(config, 0), numpy_generator(0, "test")
    for stratum in STRATA:
        for problem in draw_problems(config, {stratum: 40}, 0, "x"):
            answer = demonstrate(config, habits, problem, generator)
            assert right(problem, answer) == (stratum != "hopeless")


def test_slips_come_at_their_rate() -> None:
    config = ArithmeticConfig(slip=0.2, misconceptions=0.0, easy_misconceptions=0.0, min_steps=3, max_steps=3)
    habits, generator = Habits.of(config, 0), numpy_generator(0, "test")
    problems = draw_problems(config, {"easy": 2000}, 0, "x")
    share = np.mean([right(p, demonstrate(config, habits, p, generator)) for p in problems])
    assert share == pytest.approx(0.8**3, abs=0.04)


def test_doubt_comes_before_wrong_results_far_more_often_than_before_right_ones() -> None:
    config = ArithmeticConfig(slip=0.3, easy_misconceptions=0.0)
    habits, generator = Habits.of(config, 0), numpy_generator(0, "test")
    doubted: dict[bool, list[bool]] = {True: [], False: []}
    for problem in draw_problems(config, {"easy": 300}, 0, "x"):
        steps = re.split("[;a-h]", demonstrate(config, habits, problem, generator))
        for before, step in itertools.pairwise(steps[:-1]):
            wrong = int(step[-1]) != result_of(step[0], int(before[-1]), int(step[1]), config.modulus)
            doubted[wrong].append("~" in step)
    assert np.mean(doubted[True]) == pytest.approx(config.doubt, abs=0.05)
    assert np.mean(doubted[False]) == pytest.approx(config.worry, abs=0.02)


def test_no_sample_of_a_hopeless_step_is_right() -> None:
    config = ArithmeticConfig(slip=0.9, doubt=0.0, worry=0.0, min_steps=2, max_steps=2)
    habits, generator = Habits.of(config, 0), numpy_generator(0, "test")
    for problem in draw_problems(config, {"hopeless": 200}, 0, "x"):
        steps = re.split("[;a-h]", demonstrate(config, habits, problem, generator))
        for before, step in itertools.pairwise(steps[:-1]):
            if step[0] == "^":
                assert int(step[2]) != result_of("^", int(before[-1]), int(step[1]), config.modulus)


def test_demonstrations_are_a_batch_of_problem_and_answer() -> None:
    tokenizer = ArithmeticTokenizer()
    problems = draw_problems(CONFIG, {"easy": 5, "medium": 5}, 0, "x")
    batch = demonstrations(CONFIG, Habits.of(CONFIG, 0), problems, 0)
    for row, problem in enumerate(problems):
        assert tokenizer.decode(batch.prompts[row].tolist()) == problem
        ids = batch.completions[row][batch.scored_mask[row] > 0].tolist()
        assert ids[-1] == EOS
        assert min(ids[:-1]) >= NUM_SPECIALS
        assert answer_of(tokenizer.decode(ids)) in "0123456789"
    assert batch.completions.shape[1] <= CONFIG.max_answer
    assert batch.prompts.shape[1] <= CONFIG.max_prompt


def test_padding_goes_to_the_side_asked_for() -> None:
    assert padded([[7], [8, 9]])[0].tolist() == [[7, 0], [8, 9]]
    tokens, mask = padded([[7], [8, 9]], left=True)
    assert tokens.tolist() == [[0, 7], [8, 9]]
    assert mask.tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_bad_settings_and_texts_are_told() -> None:
    with pytest.raises(ConfigError, match="hard_steps <= min_steps <= max_steps, found 2, 1, 6"):
        ArithmeticConfig(min_steps=1)
    with pytest.raises(ConfigError, match="slip must be between 0 and 1, found 2"):
        ArithmeticConfig(slip=2.0)
    for text, found in (("3+4z?", "z"), ("3++4?", "\\+")):
        with pytest.raises(DataError, match=f"found '{found}'"):
            ArithmeticTokenizer().prompt(text)
