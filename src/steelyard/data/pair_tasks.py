"""Target distributions of preferences: each is one user, taste or domain, with pairs of texts or judged texts.

- `PairTask`: pairs as they were compared, each with its prompt (`data/pair_tasks_rewards.py` reads reward benchmarks).
- `JudgedTexts`: texts that a persona would say or would not say; a pair is one of each. Read here from the
  model-written evaluations of Perez et al., "Discovering Language Model Behaviors with Model-Written Evaluations"
  (arXiv 2212.09251), repository anthropics/evals, folder persona.
- `Taste`: the same as features, which is all that experiments over frozen features see.

Shapes: N items, P pairs, D features.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: of two completions of a prompt, `chosen` was preferred."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairTask:
    """One target distribution of compared completions.

    Attributes:
        name: unique among the targets.
        source: the data set it comes from.
        pairs: P comparisons.
    """

    name: str
    source: str
    pairs: tuple[PreferencePair, ...]


@dataclass(frozen=True)
class JudgedTexts:
    """One target distribution of texts judged one by one.

    Attributes:
        name: of the persona.
        texts: N statements, in file order.
        liked: [N], whether the persona would say it.
    """

    name: str
    texts: tuple[str, ...]
    liked: Bools


@dataclass(frozen=True)
class Taste:
    """Judged items as features: a user, as an experiment over a frozen backbone sees it.

    Attributes:
        name: of the user.
        features: [N, D].
        liked: [N].
    """

    name: str
    features: npt.NDArray[np.float32]
    liked: Bools

    def __post_init__(self) -> None:
        """Check shapes."""
        if self.features.ndim != 2 or self.liked.shape != (len(self.features),):
            raise DataError(
                f"taste {self.name!r}: expected features [N, D] and liked [N], found {self.features.shape} and "
                f"{self.liked.shape}"
            )

    def flipped(self) -> Taste:
        """Return the opposite taste."""
        return Taste(self.name, self.features, ~self.liked)

    def halves(self, generator: np.random.Generator) -> tuple[Ints, Ints]:
        """Return two disjoint sets of items, each with half of the liked and half of the disliked ones.

        Pairs for adaptation come from the first and pairs for the test from the second, so that no item, let alone a
        pair, is ever in both.
        """
        first, second = [], []
        for kind in (True, False):
            items = generator.permutation(np.flatnonzero(self.liked == kind))
            first.append(items[: len(items) // 2])
            second.append(items[len(items) // 2 :])
        return np.concatenate(first), np.concatenate(second)

    def pairs(self, items: Ints, count: int, generator: np.random.Generator) -> Ints:
        """Return `count` pairs [P, 2] of rows, a liked and a disliked item among `items`.

        An item comes twice only where there are fewer of its kind than pairs.

        Raises:
            DataError: `items` lack liked or disliked ones.
        """
        sides = []
        for kind in (True, False):
            of_kind = items[self.liked[items] == kind]
            if not len(of_kind):
                raise DataError(f"taste {self.name!r}: no {'liked' if kind else 'disliked'} item to make pairs of")
            rounds = [generator.permutation(of_kind) for _ in range(-(-count // len(of_kind)))]
            sides.append(np.concatenate(rounds)[:count])
        return np.stack(sides, 1)

    def differences(self, pairs: Ints) -> Floats:
        """Return features of the first minus features of the second, [P, D]."""
        return np.asarray(self.features[pairs[:, 0]] - self.features[pairs[:, 1]], np.float64)


STATEMENTS = "persona_statements/statements.jsonl.gz"


def read_personas(folder: str | Path) -> list[JudgedTexts]:
    """Return the personas of a folder, in the order of its files, statements in file order.

    Args:
        folder: holds persona_statements/statements.jsonl.gz (rows with persona, statement, match), or is a clone of
            anthropics/evals, with persona/NAME.jsonl.

    Raises:
        DataError: neither is there, or a row that cannot be read.
    """
    folder = Path(folder)
    packed, original = folder / STATEMENTS, sorted((folder / "persona").glob("*.jsonl"))
    found: dict[str, tuple[list[str], list[bool]]] = {}
    if packed.is_file():
        for row, where in json_rows(packed):
            _add(found, row, where, ("persona", "statement", "match"))
    elif original:
        for path in original:
            for row, where in json_rows(path):
                _add(found, row | {"persona": path.stem}, where, ("persona", "statement", "answer_matching_behavior"))
    else:
        raise DataError(f"{folder}: expected {STATEMENTS}, or persona/NAME.jsonl of a clone of anthropics/evals")
    return [JudgedTexts(name, tuple(texts), np.array(liked)) for name, (texts, liked) in found.items()]


def _add(
    found: dict[str, tuple[list[str], list[bool]]], row: dict[str, Any], where: str, keys: tuple[str, str, str]
) -> None:
    persona, statement, answer = (row.get(key) for key in keys)
    if not isinstance(persona, str) or not isinstance(statement, str) or not isinstance(answer, str):
        raise DataError(f"{where}: expected texts {', '.join(keys)}, found keys {', '.join(row)}")
    if answer.strip() not in ("Yes", "No"):
        raise DataError(f"{where}: {keys[2]} must be Yes or No, found {answer!r}")
    texts, liked = found.setdefault(persona, ([], []))
    texts.append(statement)
    liked.append(answer.strip() == "Yes")


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a JSONL file, which may be compressed, each with where it stands."""
    lines: Iterable[str]
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: expected a JSON object: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield row, where
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
