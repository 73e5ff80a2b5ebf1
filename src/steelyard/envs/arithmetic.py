r"""Step-by-step arithmetic that is partly easy, partly half-learned and partly hopeless, with everything known exactly.

Prior data are written by careless people: every step of a demonstration can slip, some entries of the tables are
misconceptions that most of them share, and one operation nobody gets right. A model trained on them makes the same
mistakes: slips, which another sample (or greedy decoding) repairs; misconceptions, which greedy decoding repeats and
another sample may repair; and what no sample ever solves. So it is known what an adaptive use of compute can gain, and
where.

A problem is `7+5*3?`: digits and operations from left to right, modulo 10 (or less). An answer writes down the value
after every step and then the result: `7;+52b*3~6;#6` (7, plus 5 makes 2, times 3 makes 6). An operation with its digit
is one token. Letters between the steps are remarks without meaning. `~` is doubt: writers often hesitate before a
result that will be wrong, and seldom before a right one. This is what makes self-evaluation learnable here: a model of
this size did not learn, in the updates there is time for, to work out every step again and compare it with what stands
there. So the task is easier in this respect than an answer whose mistakes show nowhere.

| stratum | operations | a demonstration's step is right, slips aside |
|---|---|---|
| easy | + - | but for a few entries of the tables |
| medium | + - and 1 to `hard_steps` times * | for a share of the entries of * with a chance drawn from `right` |
| hopeless | + - and ^ once | never for ^ |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator

Stratum = Literal["easy", "medium", "hopeless"]
STRATA: tuple[Stratum, ...] = get_args(Stratum)

PAD, EOS, ASK, YES, NO = range(5)
"""Padding; the end; a question about the answer so far and its two answers, which no text ever holds."""
NUM_SPECIALS = 5
REMARKS, DOUBT = "abcdefgh", "~"
TOKENS = (*"0123456789;#?", DOUBT, *REMARKS, *(operation + digit for operation in "+-*^" for digit in "0123456789"))
VOCAB_SIZE = NUM_SPECIALS + len(TOKENS)


@dataclass(frozen=True)
class ArithmeticConfig(Config):
    """What problems and their demonstrations look like."""

    modulus: int = 5
    """Numbers are 0 to modulus - 1: tables of modulus^2 entries."""
    min_steps: int = 4
    """Fewest operations of a problem."""
    max_steps: int = 6
    """Most operations of a problem."""
    hard_steps: int = 2
    """Most multiplications of a medium problem."""
    slip: float = 0.04
    """Chance that a step's result is another digit."""
    doubt: float = 0.97
    """Chance of hesitating before a wrong result."""
    worry: float = 0.01
    """The same before a right one."""
    misconceptions: float = 0.6
    """Share of the entries of the multiplication table that are misconceptions."""
    easy_misconceptions: float = 0.03
    """The same of addition and subtraction."""
    right: tuple[float, float] = (0.1, 0.5)
    """Chance that a demonstration gets a misconception right: uniform between these, one number an entry."""
    remarks: float = 0.1
    """Chance of a remark after a step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "min_steps", "hard_steps")
        require_range(self, 3, 10, "modulus")
        require_range(self, 0, 1, "slip", "doubt", "worry", "misconceptions", "easy_misconceptions", "right", "remarks")
        if not self.hard_steps <= self.min_steps <= self.max_steps:
            raise ConfigError(
                "expected hard_steps <= min_steps <= max_steps, found "
                f"{self.hard_steps}, {self.min_steps}, {self.max_steps}"
            )

    @property
    def max_prompt(self) -> int:
        """Tokens of the longest problem."""
        return self.max_steps + 2

    @property
    def max_answer(self) -> int:
        """Tokens of the longest demonstration, its end included."""
        return 4 * self.max_steps + 5


class ArithmeticTokenizer:
    """Characters are tokens, but an operation and its digit are one; the protocol of `data/tokenizer.py`."""

    vocab_size, pad, eos = VOCAB_SIZE, PAD, EOS
    _ids: ClassVar[dict[str, int]] = {token: NUM_SPECIALS + number for number, token in enumerate(TOKENS)}

    def prompt(self, prompt: Any) -> list[int]:
        """Return the ids of a problem."""
        return self.encode(prompt)

    def completion(self, prompt: Any, completion: Any) -> list[int]:
        """Return the ids of an answer and of its end."""
        return [*self.encode(completion), EOS]

    def encode(self, text: Any) -> list[int]:
        """Return the ids of a text.

        Raises:
            DataError: something that no problem and no answer holds.
        """
        found = re.findall(r"[-+*^]\d|.", text, re.DOTALL)
        if unknown := [token for token in found if token not in self._ids]:
            raise DataError(
                f"text {text!r:.40}: expected digits, operations with a digit, any of {';#?~'!r} and remarks "
                f"({REMARKS}), found {unknown[0]!r}"
            )
        return [self._ids[token] for token in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens are left out."""
        return "".join(TOKENS[int(i) - NUM_SPECIALS] for i in ids if int(i) >= NUM_SPECIALS)


def result_of(operation: str, left: int, right: int, modulus: int) -> int:
    """Return the right result of one step, 0..modulus - 1."""
    values: dict[str, int] = {"+": left + right, "-": left - right, "*": left * right, "^": left**right}
    return values[operation] % modulus


def solution(prompt: str, modulus: int) -> str:
    """Return the right answer of a problem without remarks."""
    value, text = int(prompt[0]), f"{prompt[0]};"
    for operation, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        value = result_of(operation, value, int(digit), modulus)
        text += f"{operation}{digit}{value};"
    return f"{text}#{value}"


def plain(completion: str) -> str:
    """Return an answer without remarks and doubts, as `solution` writes it."""
    return re.sub(f"[{REMARKS}]", ";", completion.replace(DOUBT, ""))


def answer_of(completion: str) -> str:
    """Return the digit that an answer states as its result; "" if it states none."""
    _, mark, answer = completion.partition("#")
    return answer if mark and len(answer) == 1 and answer.isdigit() else ""


@dataclass(frozen=True)
class ArithmeticScorer:
    """1 where every step and the result are right, else 0 (`envs.scorers.CompletionScorer`).

    Steps count, for two mistakes that undo each other are luck: one slip in ten would make hopeless problems solvable.
    """

    modulus: int
    name: str = "arithmetic"

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        pairs = zip(prompts, completions, strict=True)
        return torch.tensor([float(plain(text) == solution(prompt, self.modulus)) for prompt, text in pairs])


@dataclass(frozen=True)
class Habits:
    """What the writers of demonstrations believe.

    Attributes:
        right: {operation: [modulus, modulus]} chance that they write the right result, slips left aside.
        instead: {operation: int64 [modulus, modulus]} what they write otherwise.
    """

    right: dict[str, npt.NDArray[np.float64]]
    instead: dict[str, npt.NDArray[np.int64]]

    @classmethod
    def of(cls, config: ArithmeticConfig, seed: int) -> Habits:
        """Draw them."""
        generator = numpy_generator(seed, "arithmetic/habits")
        right, instead, m = {}, {}, config.modulus
        for operation, share in (
            ("+", config.easy_misconceptions),
            ("-", config.easy_misconceptions),
            ("*", config.misconceptions),
            ("^", 1.0),
        ):
            chances = generator.uniform(*config.right, (m, m)) if operation != "^" else np.zeros((m, m))
            right[operation] = np.where(generator.random((m, m)) < share, chances, 1.0)
            truth = np.array([[result_of(operation, a, b, m) for b in range(m)] for a in range(m)])
            instead[operation] = (truth + generator.integers(1, m, (m, m))) % m
        return cls(right, instead)


def draw_problem(config: ArithmeticConfig, stratum: Stratum, generator: np.random.Generator) -> str:
    """Return a problem of a stratum."""
    steps = int(generator.integers(config.min_steps, config.max_steps + 1))
    operations = ["+-"[k] for k in generator.integers(0, 2, steps)]
    hard = {"easy": 0, "medium": int(generator.integers(1, config.hard_steps + 1)), "hopeless": 1}[stratum]
    for place in generator.permutation(steps)[:hard]:
        operations[place] = "^" if stratum == "hopeless" else "*"
    digits = generator.integers(0, config.modulus, steps + 1)
    return f"{digits[0]}" + "".join(f"{o}{d}" for o, d in zip(operations, digits[1:], strict=True)) + "?"


def draw_problems(config: ArithmeticConfig, counts: Mapping[Stratum, int], seed: int, stream: str) -> list[str]:
    """Return as many problems of each stratum as `counts` says, strata in turn, none twice."""
    found: dict[str, None] = {}
    for stratum, count in counts.items():
        generator = numpy_generator(seed, f"arithmetic/{stream}/{stratum}")
        aim = len(found) + count
        while len(found) < aim:
            found.setdefault(draw_problem(config, stratum, generator))
    return list(found)


def stratum_of(prompt: str) -> Stratum:
    """Return the stratum that a problem belongs to."""
    return "hopeless" if "^" in prompt else "medium" if "*" in prompt else "easy"


def demonstrate(config: ArithmeticConfig, habits: Habits, prompt: str, generator: np.random.Generator) -> str:
    """Return an answer as the writers of the prior data give it, slips, misconceptions and doubts included."""
    value, text = int(prompt[0]), f"{prompt[0]};"
    for operation, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        believed, slip, doubt, remark = generator.random(4)
        other, letter = int(generator.integers(1, config.modulus)), int(generator.integers(0, len(REMARKS)))
        operand = int(digit)
        truth = result_of(operation, value, operand, config.modulus)
        chance, instead = habits.right[operation][value, operand], habits.instead[operation][value, operand]
        result = truth if believed < chance else int(instead)
        if slip < config.slip and chance > 0:  # where nobody is right (^), not by a slip either
            result = (result + other) % config.modulus
        doubted = DOUBT if doubt < (config.doubt if result != truth else config.worry) else ""
        text += f"{operation}{operand}{doubted}{result}{REMARKS[letter] if remark < config.remarks else ';'}"
        value = result
    return f"{text}#{value}"


def demonstrations(config: ArithmeticConfig, habits: Habits, prompts: Sequence[str], seed: int) -> ExperienceBatch:
    """Return a demonstration of each problem as a batch for supervised training."""
    generator, tokenizer = numpy_generator(seed, "arithmetic/demonstrations"), ArithmeticTokenizer()
    answers = [tokenizer.completion(p, demonstrate(config, habits, p, generator)) for p in prompts]
    problems, prompt_mask = padded([tokenizer.prompt(p) for p in prompts], left=True)
    completions, scored_mask = padded(answers)
    return ExperienceBatch(problems, prompt_mask, completions, scored_mask, torch.arange(len(prompts)))


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Return rows of ids as int64 [N, T], padded on the right (or left), and their mask float32 [N, T]."""
    width = max(map(len, rows))
    tokens, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[number, place], mask[number, place] = torch.tensor(row), 1.0
    return tokens, mask
