"""Verifiable problems of the package reasoning-gym (extra `reasoning`), with worked solutions and difficulty strata.

Three of its families, whose mistakes can be seen in the middle of an answer: sums of several terms, products, and words
spelt backward. The package generates the question and judges the answer; the worked solutions that a small model is
taught to write are made here.

| task | question | solution |
|---|---|---|
| chain_sum | ... problem: 48 + 13 - 5 = | 48+13=61, 61-5=56 |
| products | ... multiplication: 431 * 172. ... | 431*172=74132 |
| spell_backward | ... backward (example: sun -> nus): word | w o r d, d r o w |
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steelyard.data.tokenizer import Text
from steelyard.envs.scorers import text_of
from steelyard.errors import DataError, require
from steelyard.rng import derive_seed

Task = Literal["chain_sum", "products", "spell_backward"]
Stratum = Literal["easy", "medium", "hopeless"]


@dataclass(frozen=True)
class Level:
    """One difficulty of one family.

    Attributes:
        task: name of the family in reasoning-gym.
        settings: of its generator.
        stratum: how hard it is meant to be for a small model; what it turned out to be is measured.
    """

    task: Task
    settings: Mapping[str, int]
    stratum: Stratum


def _sums(terms: int, digits: int) -> dict[str, int]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}


LEVELS: Mapping[str, Level] = {
    "sum of 3, 1 digit": Level("chain_sum", _sums(3, 1), "easy"),
    "sum of 4, 1 digit": Level("chain_sum", _sums(4, 1), "easy"),
    "word of 3": Level("spell_backward", {"min_word_len": 3, "max_word_len": 3}, "easy"),
    "sum of 2, 2 digits": Level("chain_sum", _sums(2, 2), "medium"),
    "sum of 5, 1 digit": Level("chain_sum", _sums(5, 1), "medium"),
    "word of 4": Level("spell_backward", {"min_word_len": 4, "max_word_len": 4}, "medium"),
    "product of 3 digits": Level("products", _sums(2, 3), "hopeless"),
}
"""Name -> level."""


@dataclass(frozen=True)
class Problem:
    """A question with its solution.

    Attributes:
        question: as reasoning-gym asks it.
        answer: what its verifier compares with.
        solution: worked, the answer at its end.
        task: family.
        level: name in `LEVELS`.
    """

    question: str
    answer: str
    solution: str
    task: Task
    level: str

    @property
    def stratum(self) -> Stratum:
        """How hard it is meant to be."""
        return LEVELS[self.level].stratum


def by_level(strata: Mapping[Stratum, int]) -> dict[str, int]:
    """Return how many problems of each level make so many of each stratum: as equally many as possible."""
    found = {}
    for stratum, count in strata.items():
        levels = [name for name, level in LEVELS.items() if level.stratum == stratum]
        for number, name in enumerate(levels):
            found[name] = count // len(levels) + (number < count % len(levels))
    return found


def problems(strata: Mapping[Stratum, int], seed: int, stream: str, avoid: Collection[str] = ()) -> tuple[Problem, ...]:
    """Return different problems in a mixed order, a function of (seed, stream) and of what is avoided.

    Args:
        strata: how many of each.
        seed: of the study.
        stream: "train", "test", ...; names the purpose.
        avoid: questions that must not come again, e.g. those of other splits.

    Raises:
        DataError: a level has too few different questions.
        MissingExtraError: reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", "reasoning")
    seen, rows = set(avoid), []
    for level, wanted in by_level(strata).items():
        one = LEVELS[level]
        attempts = 40 * wanted + 100
        # the generator adds the item's number to its seed, so streams must lie further apart than their lengths
        start = derive_seed(seed, f"reasoning/{stream}/{level}") % 2**62
        source, found = gym.create_dataset(one.task, seed=start, size=attempts, **one.settings), 0
        for number in range(attempts):
            if found == wanted:
                break
            item = source[number]
            if item["question"] in seen:
                continue
            seen.add(item["question"])
            solution = worked(one.task, item["metadata"])
            key = derive_seed(seed, f"reasoning/{stream}/{level}/order", number)
            rows.append((key, Problem(item["question"], item["answer"], solution, one.task, level)))
            found += 1
        if found < wanted:
            raise DataError(f"level {level!r}: expected {wanted} different questions for {stream}, found {found}")
    return tuple(problem for _, problem in sorted(rows, key=lambda row: row[0]))


def worked(task: Task, metadata: Mapping[str, Any]) -> str:
    """Return a solution with its steps, the answer at the end."""
    if task == "spell_backward":
        word = str(metadata["word"])
        return f"{' '.join(word)}, {' '.join(reversed(word))}"
    terms = str(metadata["expression"]).split()
    numbers, signs = [int(term) for term in terms[::2]], terms[1::2]
    if task == "products":
        # in one step: what makes a level hopeless must not cost many tokens
        return f"{metadata['expression']}={math.prod(numbers)}".replace(" ", "")
    steps, total = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        after = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={after}")
        total = after
    return ", ".join(steps)


def answer_of(task: str, completion: str) -> str:
    """Return the final answer of a solution, "" where it has none."""
    last = completion.strip().rsplit(",", 1)[-1]
    if task == "spell_backward":
        return re.sub(r"\s", "", last)
    return last.rsplit("=", 1)[-1].strip() if "=" in last else ""


class ReasoningScorer:
    """1 where reasoning-gym gives an answer full marks, else 0 (a `CompletionScorer`).

    Reads the columns "task" and "answer".

    Raises:
        MissingExtraError: reasoning-gym is not installed.
    """

    name = "reasoning"

    def __init__(self) -> None:
        gym = require("reasoning_gym", "reasoning")
        self._judges = {level.task: gym.get_score_answer_fn(level.task) for level in LEVELS.values()}

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N].

        Raises:
            DataError: the columns are missing, or a task is unknown.
        """
        for name in ("task", "answer"):
            if name not in columns:
                raise DataError(f"scorer 'reasoning' needs the column {name!r} of the prompts; there is none")
        scores = []
        for text, task, answer in zip(completions, columns["task"], columns["answer"], strict=True):
            if task not in self._judges:
                raise DataError(f"scorer 'reasoning': no task {task!r}; there are: {', '.join(self._judges)}")
            given = self._judges[task](answer_of(task, text_of(text)), {"answer": answer})
            scores.append(float(given >= 1))
        return torch.tensor(scores)
