"""Sample pools from your own JSONL files, and what readers of such files share.

Lengths are counted in words and signs, and the end, unless the file or a tokenizer knows better.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.tokenizer import Tokenizer
from steelyard.errors import DataError

PIECE = re.compile(r"\w+|[^\w\s]")
"""What is counted where there is no tokenizer."""

NUMBERS = {
    "rewards": "rewards", "lengths": "lengths", "temperatures": "temperatures", "log_probs": "logps",
    "certainty": "certainty", "scores": "scores",
}  # fmt: skip
"""Lists of numbers in a user's row, and the field each fills."""
SINGULAR = {
    "completion": "completions", "reward": "rewards", "length": "lengths", "temperature": "temperatures",
    "log_prob": "log_probs", "score": "scores", "answer": "answers", "token_ids": "token_ids", "finished": "finished",
    "certainty": "certainty",
}  # fmt: skip
"""Keys of a row that holds one sample, and the list each goes into."""


def pieces(text: str) -> int:
    """Return how many words and signs a text has."""
    return sum(1 for _ in PIECE.finditer(text))


def prefix(text: str, count: int) -> str:
    """Return the text up to the end of its first `count` words and signs."""
    end = 0
    for number, found in enumerate(PIECE.finditer(text), 1):
        if number > count:
            break
        end = found.end()
    return text[:end]


def user_jsonl(path: str | Path, samples: int | None = None, tokenizer: Tokenizer | None = None) -> SamplePool:
    """Read your own samples: one row a prompt, or one row a sample (as `steelyard data pairs --pool` writes them).

    A row a prompt: `prompt`, `completions`, and any of `rewards`, `answers`, `temperatures`, `log_probs` (at
    temperature 1), `certainty`, `scores`, `token_ids`, `lengths`, `finished`, `stratum`; other keys become columns. A
    row a sample has `completion`, `reward`, ... instead; rows of equal `prompt_id`, or else of equal `prompt`, belong
    together. A reward that is null is unknown.

    Args:
        path: .jsonl or .jsonl.gz.
        samples: keep the first so many of each prompt and leave out prompts with fewer; None: all must have as many.
        tokenizer: counts tokens where the file has neither `token_ids` nor `lengths`.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    drawn = _pairs_state(file)
    rows = list(rows_of(file, ("prompt",)))
    if rows and "completions" not in rows[0][1]:
        rows = _grouped(file, rows)
    items, fewer = [], 0
    for line, row in rows:
        item = _user_item(file, line, row, tokenizer, drawn)
        if samples is not None and len(item.rewards) < samples:
            fewer += 1
            continue
        items.append(item if samples is None else item.take(range(samples)))
    note = f" ({fewer} prompts with fewer than {samples} samples left out)" if fewer else ""
    return as_pool(items, f"{file}{note}")


def as_pool(items: list[PromptSamples], source: str) -> SamplePool:
    """Return a pool of prompts with equally many samples."""
    if not items:
        raise DataError(f"{source}: expected prompts with samples, found none")
    sizes = {len(item.rewards) for item in items}
    if len(sizes) > 1:
        raise DataError(
            f"{source}: prompts have between {min(sizes)} and {max(sizes)} samples; expected equally many "
            "(keep the first so many of each with samples=K, on the command line --samples K)"
        )
    return SamplePool(tuple(items), source=source)


def _user_item(
    file: Path, line: int, row: dict[str, Any], tokenizer: Tokenizer | None, drawn: dict[str, Any]
) -> PromptSamples:
    where = f"{file}, line {line}"
    row = dict(row)
    prompt, texts = row.pop("prompt"), row.pop("completions", None)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: key 'completions': expected a list of texts, found {texts!r:.60}")
    n = len(texts)
    columns: dict[str, Any] = {}
    if not isinstance(prompt, str):
        if not isinstance(prompt, list) or not all(isinstance(m, dict) and "content" in m for m in prompt):
            raise DataError(f"{where}: key 'prompt': expected a text or messages, found {prompt!r:.60}")
        columns["messages"] = prompt
    words = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    found: dict[str, Any] = {}
    for key, name in NUMBERS.items():
        if key in row:
            found[name] = _numbers(where, key, row.pop(key), n)
    for key in ("answers", "token_ids", "finished"):
        if key in row:
            found[key] = _list(where, key, row.pop(key), n)
    ids = found.pop("token_ids", None)
    tokens: tuple[tuple[int, ...], ...] = ()
    if ids is not None:
        if not all(isinstance(one, list) and all(isinstance(token, int) for token in one) for one in ids):
            raise DataError(f"{where}: key 'token_ids': expected lists of integers, found {ids!r:.60}")
        tokens = tuple(map(tuple, ids))
    elif tokenizer is not None and "lengths" not in found:
        tokens = tuple(tuple(tokenizer.completion(prompt, text)) for text in texts)
        found.setdefault("finished", [True] * n)
    lengths = found.pop("lengths", None)
    if lengths is None:
        lengths = np.array([len(one) for one in tokens] if tokens else [pieces(text) + 1 for text in texts])
    if "answers" in found:
        found["answers"] = tuple("" if answer is None else str(answer) for answer in found["answers"])
    if "finished" in found:
        found["finished"] = np.array(found["finished"], np.bool_)
    if drawn:  # of `steelyard data pairs`: log-probs are those of its sampling distribution
        found.setdefault("temperatures", np.full(n, float(drawn["temperature"])))
        if drawn["temperature"] != 1 or drawn["top_p"] < 1 or drawn["top_k"] > 0:
            found.pop("logps", None)
    stratum = str(row.pop("stratum", ""))
    return PromptSamples(
        words,
        found.pop("rewards", np.full(n, math.nan)),
        lengths.astype(np.int64),
        tuple(texts),
        tokens,
        stratum=stratum,
        columns=columns | row,
        prompt_tokens=() if tokenizer is None else tuple(tokenizer.prompt(prompt)),
        **found,
    )


def _grouped(file: Path, rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Return rows of one prompt each, from rows of one sample each; other keys are taken from a prompt's first row."""
    groups: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, row in rows:
        missing = "completion" not in row
        if missing:
            raise DataError(f"{file}, line {line}: expected a key 'completion' or 'completions', found {sorted(row)}")
        key = json.dumps(row["prompt_id"] if "prompt_id" in row else row["prompt"])
        first, group = groups.setdefault(key, (line, {n: v for n, v in row.items() if n not in SINGULAR}))
        for one, many in SINGULAR.items():
            if (one in row) != (many in group) and first != line:
                raise DataError(f"{file}, line {line}: key {one!r} is in some samples of a prompt only")
            if one in row:
                group.setdefault(many, []).append(row[one])
    for _, group in groups.values():
        group.pop("sample", None)
    return list(groups.values())


def _numbers(where: str, key: str, values: Any, n: int) -> Any:
    numbers = _list(where, key, values, n)
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, str)) for value in numbers):
        raise DataError(f"{where}: key {key!r}: expected numbers, found {values!r:.60}")
    return np.array([math.nan if value is None else float(value) for value in numbers])


def _list(where: str, key: str, values: Any, n: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != n:
        found = f"{len(values)} of them" if isinstance(values, list) else repr(values)[:60]
        raise DataError(
            f"{where}: key {key!r}: expected a list with an entry for each of {n} completions, found {found}"
        )
    return values


def _pairs_state(file: Path) -> dict[str, Any]:
    """Return how `steelyard data pairs` drew a pool, {} where it did not."""
    state = file.with_name(file.name + ".state.json")
    if not state.is_file():
        return {}
    try:
        sampling: dict[str, Any] = json.loads(state.read_text())["sampling"]
        return {name: sampling[name] for name in ("temperature", "top_p", "top_k")}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state}: expected the settings of `steelyard data pairs`, found something else") from None


def rows_of(file: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a JSONL file whose rows have these keys."""
    opened: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}, line {number}: not JSON: {error}") from None
                missing = [key for key in keys if not isinstance(row, dict) or key not in row]
                if missing:
                    raise DataError(f"{file}, line {number}: expected a key {missing[0]!r}, found {line.strip()[:60]}")
                yield number, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable: {error}") from None
