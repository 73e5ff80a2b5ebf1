"""Scorers of completions: reward functions, reward models, implicit rewards and TRL-style callables behind one method.

A prompt set with a scorer is an environment of one step: the prompt is the observation, the completion the action, the
score the reward. `scorer_from_name` reads what a command line says:

| name | score of a completion |
|---|---|
| `length:min`, `length:max` | minus its tokens; its tokens |
| `length:mode:40` | minus the distance of its tokens from 40 |
| `length:min:words` | the same in `words` or `characters` |
| `contains:WORD` | 1 where the text contains WORD, else 0 |
| `regex:PATTERN` | 1 where the pattern is found, else 0 |
| `reward_model:DIR` | r(x, y) of a Bradley-Terry reward model trained here |
| `hyre:DIR`, `hyre:DIR#profile.json` | a head set's reward, adapted to the profile (without one: its method's prior) |
| `implicit:DIR` | beta (log pi(y|x) - log pi_ref(y|x)) of a preference run |
| `python:FILE.py:FUNCTION` | what the user's function returns, called as TRL calls reward functions |
| `1.0*contains:yes + -0.01*length:max` | weighted sum; every term after the first begins with its weight |

Every score is finite, or NaN for "unscorable", which only a function's None can mean.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from steelyard.data.tokenizer import Text
from steelyard.errors import ConfigError, DataError, NonFiniteError

RewardFunction = Callable[..., Sequence[float | None]]
"""callable(prompts=, completions=, completion_ids=, **columns) -> one number or None per completion, as in TRL."""
Unit = Literal["tokens", "words", "characters"]

REGEX_SECONDS = 10.0
"""Longest time a pattern may take over one call's completions."""
NAMES = "length:, contains:, regex:, reward_model:, hyre:, implicit:, python:"


class CompletionScorer(Protocol):
    """Gives each completion a number."""

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        ...

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N], one score per completion; NaN where it cannot be scored.

        Args:
            prompts: N prompts, repeated for the completions of one group.
            completions: N texts.
            completion_ids: their token ids, EOS included where there was one; may be empty where no tokens are known.
            columns: {name: N values} of the data's other columns.
        """
        ...


def text_of(text: Text) -> str:
    """Return plain text; of a conversation, its messages' contents joined by newlines."""
    return text if isinstance(text, str) else "\n".join(str(message["content"]) for message in text)


def snippet(text: Text) -> str:
    """Return the beginning of a text for an error's sentence."""
    return repr(text_of(text)[:40])


@dataclass(frozen=True)
class LengthScorer:
    """Prefers short, long or medium completions: the synthetic problems of the preference study.

    Attributes:
        goal: "min": -n, "max": n, "mode": -|n - mode|, with n the completion's length.
        mode: the best length of goal "mode".
        unit: what is counted; tokens include EOS.
    """

    goal: Literal["min", "max", "mode"]
    mode: float = 0.0
    unit: Unit = "tokens"

    @property
    def name(self) -> str:
        """As on the command line."""
        mode = f":{self.mode:g}" if self.goal == "mode" else ""
        return f"length:{self.goal}{mode}" + ("" if self.unit == "tokens" else f":{self.unit}")

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        if self.unit == "tokens":
            if len(completion_ids) != len(completions):
                raise DataError(
                    f"scorer {self.name!r} counts tokens, but {len(completion_ids)} lists of token ids came with "
                    f"{len(completions)} completions; count words instead: {self.name}:words"
                )
            counts = [len(ids) for ids in completion_ids]
        else:
            texts = [text_of(text) for text in completions]
            counts = [len(text.split()) if self.unit == "words" else len(text) for text in texts]
        lengths = torch.tensor(counts, dtype=torch.float32)
        if self.goal == "mode":
            return -(lengths - self.mode).abs()
        return lengths if self.goal == "max" else -lengths


@dataclass(frozen=True)
class ContainsScorer:
    """1 where the completion contains the word (case matters), else 0."""

    word: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"contains:{self.word}"

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        return torch.tensor([float(self.word in text_of(text)) for text in completions])


@dataclass(frozen=True)
class RegexScorer:
    """1 where a regular expression is found in the completion, else 0.

    A pattern such as (a+)+$ can take years on a short text and Python's `re` cannot be interrupted, so patterns are
    searched in a process of their own, which is stopped after `REGEX_SECONDS`.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"scorer {self.name!r}: not a regular expression: {error}") from None

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"regex:{self.pattern}"

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N].

        Raises:
            DataError: the search did not end in time.
        """
        request = json.dumps([self.pattern, [text_of(text) for text in completions]])
        code = "import json, re, sys; p, t = json.load(sys.stdin); print([int(bool(re.search(p, x))) for x in t])"
        try:
            answer = subprocess.run(
                [sys.executable, "-I", "-S", "-c", code],
                input=request, capture_output=True, text=True, timeout=REGEX_SECONDS, check=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DataError(
                f"scorer {self.name!r}: searching {len(completions)} completions took longer than {REGEX_SECONDS:g} s; "
                "a repetition inside a repetition, such as (a+)+, is the usual cause"
            ) from None
        return torch.tensor(json.loads(answer.stdout), dtype=torch.float32)


@dataclass(frozen=True)
class FunctionScorer:
    """A reward function of the user, called as TRL calls them.

    It receives prompts, completions and completion_ids by keyword, and the data's other columns, one value per
    completion. Where the prompt is a conversation, so is its completion: one message of the assistant. None means that
    a completion cannot be scored. TRL's trainer_state, log_extra and log_metric are not passed.
    """

    function: RewardFunction
    name: str

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N].

        Raises:
            DataError: the function failed or returned something else than one number per completion.
            NonFiniteError: it returned NaN or an infinity.
        """
        turns = [as_turn(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        passed = {name: list(values) for name, values in columns.items() if name not in _OWN_ARGUMENTS}
        arguments: dict[str, list[Any]] = {
            "prompts": list(prompts),
            "completions": turns,
            "completion_ids": [list(ids) for ids in completion_ids],
            **passed,
        }
        try:
            scores: Any = self.function(**arguments)
        except Exception as error:
            raise DataError(f"scorer {self.name}: {self._where(arguments)} {_said(error)}") from error
        if inspect.iscoroutine(scores):
            scores.close()
            raise DataError(f"scorer {self.name}: expected a plain function, found an async one")
        try:
            values = list(scores)
        except TypeError:
            raise DataError(
                f"scorer {self.name}: expected a list of {len(turns)} numbers, found {type(scores).__name__}"
            ) from None
        if len(values) != len(turns):
            raise DataError(f"scorer {self.name}: expected {len(turns)} numbers, one per completion, got {len(values)}")
        return torch.tensor([self._number(value, row, prompts[row]) for row, value in enumerate(values)])

    def _number(self, value: float | None, row: int, prompt: Text) -> float:
        if value is None:
            return math.nan
        where = f"scorer {self.name}: row {row} (prompt {snippet(prompt)})"
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: expected a number or None, found {value!r:.60}") from None
        if not torch.tensor(number).isfinite():  # in float32
            raise NonFiniteError(f"{where}: expected a finite number, or None for unscorable, found {number}")
        return number

    def _where(self, arguments: dict[str, list[Any]]) -> str:
        """Return "row k (prompt ...):" of the first row on which the function fails alone; only called after it has."""
        for row, prompt in enumerate(arguments["prompts"]):
            try:
                self.function(**{name: values[row : row + 1] for name, values in arguments.items()})
            except Exception:
                return f"row {row} (prompt {snippet(prompt)}):"
        return "all rows together:"


_OWN_ARGUMENTS = ("prompt", "completion", "prompts", "completions", "completion_ids")


def as_turn(prompt: Text, completion: Text) -> Text:
    """Return the completion in the prompt's form: after a conversation, one message of the assistant."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass(frozen=True)
class SumScorer:
    """Weighted sum of scorers.

    As in TRL, a term that cannot score a completion drops out of its sum; where no term can, the score is NaN.
    """

    terms: tuple[tuple[float, CompletionScorer], ...]

    @property
    def name(self) -> str:
        """As on the command line."""
        return " + ".join(f"{weight:g}*{scorer.name}" for weight, scorer in self.terms)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        each = torch.stack([w * s.score(prompts, completions, completion_ids, columns) for w, s in self.terms])
        return each.nansum(0).masked_fill(each.isnan().all(0), math.nan)


def checked_scores(scorer: CompletionScorer, scores: Tensor, prompts: Sequence[Text]) -> Tensor:
    """Return the scores [N], or raise a sentence if there are too few or too many, or one is infinite."""
    if scores.shape != (len(prompts),):
        raise DataError(f"scorer {scorer.name}: expected shape [{len(prompts)}], found {list(scores.shape)}")
    if scores.isinf().any():
        row = int(scores.isinf().nonzero()[0])
        raise NonFiniteError(f"scorer {scorer.name}: row {row} (prompt {snippet(prompts[row])}): infinite score")
    return scores


def scorer_from_name(name: str, allow_code: bool = False) -> CompletionScorer:
    """Return the scorer that a name describes; see the module docstring.

    Args:
        name: one scorer, or a weighted sum of several.
        allow_code: whether `python:` is allowed: only for names that the user has typed, never for names read from a
            config file.

    Raises:
        ConfigError: no such scorer, or one that cannot be built.
    """
    parts = re.split(rf"\s+\+\s+(?={_WEIGHT})", name.strip())
    terms = []
    for part in parts:
        weight = re.match(_WEIGHT, part)
        rest = part[weight.end() :] if weight else part
        terms.append((float(weight.group().rstrip(" *")) if weight else 1.0, _one_scorer(rest.strip(), allow_code)))
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else SumScorer(tuple(terms))


_WEIGHT = r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?\s*\*"


def _one_scorer(name: str, allow_code: bool) -> CompletionScorer:
    kind, _, rest = name.partition(":")
    if kind == "python" and not allow_code:
        raise ConfigError(
            f"scorer {name!r} runs code, so it is never taken from a file: state it on the command line (--scorer)"
        )
    if kind not in _BUILDERS:
        raise ConfigError(f"scorer {name!r}: expected one of {NAMES}; found {kind!r}")
    if not rest:
        raise ConfigError(f"scorer {name!r}: expected something after the colon, e.g. {_EXAMPLES[kind]}")
    return _BUILDERS[kind](rest)


def _length(rest: str) -> LengthScorer:
    goal, *words = rest.split(":")
    name = f"length:{rest}"
    mode = 0.0
    if goal == "mode":
        try:
            mode = float(words.pop(0))
        except (IndexError, ValueError):
            raise ConfigError(f"scorer {name!r}: expected the best length, as in length:mode:40") from None
    unit = words.pop(0) if words else "tokens"
    if goal not in ("min", "max", "mode") or unit not in get_args(Unit) or words or not (mode >= 0 and mode < math.inf):
        raise ConfigError(
            f"scorer {name!r}: expected length:min, length:max or length:mode:M, then :words or :characters"
        )
    return LengthScorer(goal, mode, unit)  # type: ignore[arg-type]


def _reward_model(rest: str) -> CompletionScorer:
    from steelyard.envs.model_scorers import load_reward_model

    return load_reward_model(rest)


def _hyre(rest: str) -> CompletionScorer:
    from steelyard.envs.model_scorers import load_head_scorer

    return load_head_scorer(rest)


def _implicit(rest: str) -> CompletionScorer:
    from steelyard.envs.model_scorers import load_implicit

    return load_implicit(rest)


def _python(rest: str) -> FunctionScorer:
    file, _, function = rest.rpartition(":")
    name = f"python:{rest}"
    path = Path(file)
    if not file or not function or path.suffix != ".py":
        raise ConfigError(f"scorer {name!r}: expected python:FILE.py:FUNCTION")
    if not path.is_file():
        raise ConfigError(f"scorer {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_scorer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the user's file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"scorer {name!r}: importing {path} failed: {_said(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(
            f"scorer {name!r}: no function {function!r} in {path}; there are: {', '.join(there) or 'none'}"
        )
    return FunctionScorer(found, name)


_BUILDERS: dict[str, Callable[[str], CompletionScorer]] = {
    "length": _length,
    "contains": ContainsScorer,
    "regex": RegexScorer,
    "reward_model": _reward_model,
    "hyre": _hyre,
    "implicit": _implicit,
    "python": _python,
}
_EXAMPLES = {
    "length": "length:min",
    "contains": "contains:yes",
    "regex": "regex:[0-9]+",
    "reward_model": "reward_model:runs/reward",
    "hyre": "hyre:runs/taste#ann.json",
    "implicit": "implicit:runs/dpo",
    "python": "python:rewards.py:polite",
}
