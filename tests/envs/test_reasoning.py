"""Problems of reasoning-gym: splits share none, worked solutions are right, and the verifier is strict."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("reasoning_gym")

from steelyard.envs.reasoning import LEVELS, ReasoningScorer, answer_of, by_level, problems, worked
from steelyard.errors import DataError

STRATA = {"easy": 7, "medium": 8, "hopeless": 3}


def _score(texts: list[str], tasks: list[str], answers: list[str]) -> list[float]:
    columns = {"task": tasks, "answer": answers}
    return ReasoningScorer().score([""] * len(texts), texts, [], columns).tolist()


def test_levels_share_a_stratum_as_equally_as_possible() -> None:
    found = by_level({"easy": 7, "medium": 8, "hopeless": 0})
    assert [found[name] for name, level in LEVELS.items() if level.stratum == "easy"] == [3, 2, 2]
    assert [found[name] for name, level in LEVELS.items() if level.stratum == "medium"] == [3, 3, 2]
    assert found["product of 3 digits"] == 0


def test_problems_are_a_function_of_seed_and_stream_and_avoid_what_they_are_told_to() -> None:
    first = problems(STRATA, 0, "train")
    assert problems(STRATA, 0, "train") == first
    questions = [problem.question for problem in first]
    assert len(set(questions)) == sum(STRATA.values())
    assert {stratum: sum(one.stratum == stratum for one in first) for stratum in STRATA} == STRATA
    assert not set(questions) & {one.question for one in problems(STRATA, 0, "test", questions)}
    # the same stream again, told to avoid what it gave, finds others
    assert not set(questions) & {one.question for one in problems(STRATA, 0, "train", questions)}


def test_streams_of_neighbouring_items_do_not_overlap() -> None:
    many = {"hopeless": 40}
    one, other = ({p.question for p in problems(many, 0, name)} for name in ("a", "b"))
    assert len(one & other) <= 1


def test_the_verifier_accepts_every_worked_solution_and_nothing_else() -> None:
    found = problems(STRATA, 1, "test")
    tasks, answers = [one.task for one in found], [one.answer for one in found]
    assert _score([one.solution for one in found], tasks, answers) == [1.0] * len(found)
    assert _score(["" for _ in found], tasks, answers) == [0.0] * len(found)
    assert _score([one.solution + "7" for one in found], tasks, answers) == [0.0] * len(found)


@pytest.mark.parametrize(
    ("task", "metadata", "solution"),
    [
        ("chain_sum", {"expression": "48 + 13 - 75"}, "48+13=61, 61-75=-14"),
        ("products", {"expression": "431 * 172"}, "431*172=74132"),
        ("spell_backward", {"word": "Weigh"}, "W e i g h, h g i e W"),
    ],
)
def test_worked_solutions(task: str, metadata: dict[str, str], solution: str) -> None:
    assert worked(task, metadata) == solution  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("chain_sum", "48+13=61, 61-75=-14", "-14"),
        ("chain_sum", "61", ""),
        ("spell_backward", "w o r d, d r o w", "drow"),
        ("spell_backward", "drow", "drow"),
        ("products", "43*7=301 or so", "301 or so"),
    ],
)
def test_answers(task: str, text: str, answer: str) -> None:
    assert answer_of(task, text) == answer


def test_only_full_marks_count() -> None:
    # reasoning-gym gives part of the marks where the answer is inside a longer text, or some letters are right
    assert _score(["1+1=12", "w o r d, d r o x"], ["chain_sum", "spell_backward"], ["2", "drow"]) == [0.0, 0.0]


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(DataError, match="needs the column 'answer'"):
        ReasoningScorer().score(["q"], ["a"], [], {"task": ["products"]})
    with pytest.raises(DataError, match="no task 'chess'"):
        _score(["a"], ["chess"], ["b"])
    assert torch.is_tensor(ReasoningScorer().score([], [], [], {"task": [], "answer": []}))
