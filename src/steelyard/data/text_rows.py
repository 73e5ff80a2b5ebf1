r"""Rows of prompts and completions from JSONL, JSON, Parquet or `datasets`, and back.

The conventions are TRL's (columns decide what a row is), with the neighbours that people's files are in: ShareGPT's
`conversations` as LLaMA-Factory writes them, Alpaca's `instruction`, OpenRLHF's `input`/`output`, and the two whole
dialogues of HH-RLHF. All become one `TextRow`. docs/text_data.md has an example of each.

Two decisions where others differ:

- an implicit prompt of two plain strings ends before a blank, never inside a word (TRL cuts at the first character
  that differs), so that the completions begin with whole words.
- `messages` are a prompt and the last answer; earlier answers are context and are not trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from steelyard.data.tokenizer import Message, Text, plain
from steelyard.errors import ConfigError, DataError, require

Kind = Literal["preference", "unpaired", "completion", "prompt", "text"]
Layout = Literal["trl", "openrlhf"]
Record = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of roles, in everybody else's."""
PROMPT_COLUMNS = ("prompt", "conversations", "instruction", "input")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class TextRow:
    """A prompt and what is known about completions of it.

    Attributes:
        prompt: a string or messages; "" for text without a prompt.
        completions: strings, or lists of one assistant message; none in prompt data.
        labels: 1 desirable, 0 undesirable, of each completion; None where unknown.
        rewards: of each completion; None where unknown.
        pairs: (chosen, rejected) numbers of completions.
        margin: how much better the chosen one is; None where unknown.
        columns: whatever else the row held, for reward functions.
        where: place in the file, e.g. "line 3".
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    labels: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    margin: float | None = None
    columns: Record = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def margins(self) -> tuple[float, ...]:
        """Return how much better each pair's chosen completion is; NaN where unknown."""
        if self.margin is not None or self.rewards is None:
            return (math.nan if self.margin is None else self.margin,) * len(self.pairs)
        return tuple(self.rewards[chosen] - self.rewards[rejected] for chosen, rejected in self.pairs)


@dataclass(frozen=True)
class TextData:
    """Rows of one kind.

    Attributes:
        kind: "preference", "unpaired", "completion", "prompt" or "text".
        rows: the rows, in the order of the file.
        source: where they come from.
        notes: what the reader had to leave out, a sentence each.
    """

    kind: Kind
    rows: list[TextRow]
    source: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the normalised rows, in hex: the same for the same rows in another file format."""
        digest = hashlib.sha256(self.kind.encode())
        for row in self.rows:
            content = [row.prompt, row.completions, row.labels, row.rewards, row.pairs, row.margin, row.columns]
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- reading


def read_text_data(
    path_or_name: str | Path,
    kind: Kind | None = None,
    split: str = "train",
    on_error: Callable[[DataError], None] | None = None,
) -> TextData:
    """Read text data.

    Args:
        path_or_name: a file (.jsonl, .jsonl.gz, .json, .parquet), a folder of such files, a folder that `datasets` has
            saved, or a name on the hub.
        kind: read the rows as this kind; by default the columns of the first row decide. "prompt" takes the prompts of
            any kind.
        split: which split of a `datasets` folder or name.
        on_error: called with the error of a row that cannot be read, which is then left out; by default it is raised.

    Raises:
        DataError: nothing there, damaged, empty, or a row that is not as expected; names the file and the line.
        MissingExtraError: `datasets` or `pyarrow` is needed and not installed.
    """
    source = str(path_or_name)

    refused: list[DataError] = []

    def refuse(error: DataError) -> None:
        if on_error is None:
            raise error
        refused.append(error)
        on_error(error)

    rows: list[TextRow] = []
    skipped: Counter[str] = Counter()
    first_skipped: dict[str, str] = {}
    detected: Kind | None = None
    for place, record in _records(source, split, refuse):
        record = {name: value for name, value in record.items() if value is not None}
        try:
            if detected is None:
                detected = _kind_of(record, kind)
            rows.append(_ROW_OF[detected](record, place))
        except _LeftOutError as reason:
            skipped[str(reason)] += 1
            first_skipped.setdefault(str(reason), place)
        except DataError as error:
            refuse(DataError(f"{source}: {place}: {error}"))
    if detected is None or not rows:
        if refused and detected is not None:
            return TextData(kind or detected, [], source)
        raise refused[0] if refused else DataError(f"{source}: expected rows of text data, found none")
    if kind == "prompt" and detected != "prompt":
        rows = [TextRow(row.prompt, columns=row.columns, where=row.where) for row in rows]
    notes = tuple(
        f"{count} of {len(rows) + skipped.total()} rows were left out, the first at {first_skipped[reason]}: {reason}"
        for reason, count in skipped.items()
    )
    return TextData(kind or detected, rows, source, notes)


class _LeftOutError(Exception):
    """A row that no objective can use; counted, not fatal."""


def is_text_data(path: Path) -> bool:
    """Return whether a file or folder holds text data, as far as its name and its files' names tell."""
    if path.is_dir():
        return _is_saved(path) or any(item.name.endswith(SUFFIXES) for item in _files(path))
    return path.name.endswith(SUFFIXES)


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold rows, not what describes them."""
    own = ("dataset_info.json", "state.json", "dataset_dict.json", "store.json", "config.json")
    return sorted(item for item in folder.iterdir() if item.is_file() and item.name not in own
                  and item.name.endswith(SUFFIXES)
                  and not (folder / "store.json").exists())  # fmt: skip


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _records(source: str, split: str, refuse: Callable[[DataError], None]) -> Iterator[tuple[str, Record]]:
    """Yield (place, columns) of every row, wherever it comes from."""
    path = Path(source)
    if path.is_file():
        yield from _of_file(path, refuse)
    elif path.is_dir() and not _is_saved(path):
        files = _files(path)
        if not files:
            raise DataError(f"{source}: expected files ending in {', '.join(SUFFIXES)}, found none in this folder")
        for file in files:
            yield from ((f"{file.name}, {place}", record) for place, record in _of_file(file, refuse))
    elif path.is_dir():
        yield from _of_datasets(source, split, saved=True)
    elif source.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(source):
        raise DataError(f"{source}: no such file or folder")
    else:
        yield from _of_datasets(source, split, saved=False)


def _of_file(path: Path, refuse: Callable[[DataError], None]) -> Iterator[tuple[str, Record]]:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected text data, found an empty file")
    if path.name.endswith(".parquet"):
        yield from _of_parquet(path)
        return
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a file that can be read, found: {error}") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if not data.strip():
        raise DataError(f"{path}: expected text data, found an empty file")
    if data.lstrip()[:1] == b"[":
        yield from _of_array(path, data)
        return
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            refuse(DataError(f"{path}: {place}: expected UTF-8, found byte 0x{line[error.start]:02x} at {error.start}"))
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
            refuse(DataError(f"{path}: {place}: expected a JSON object, found {_shown(line.decode())} ({reason})"))
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            refuse(DataError(f"{path}: {place}: expected a JSON object, found {_shown(record)}"))


def _of_array(path: Path, data: bytes) -> Iterator[tuple[str, Record]]:
    try:
        records = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}: {line}expected a JSON list of objects, found: {error}") from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: row {number}: expected a JSON object, found {_shown(record)}")
        yield f"row {number}", record


def _of_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file, found: {str(error).splitlines()[0]}") from None


def _of_datasets(source: str, split: str, saved: bool) -> Iterator[tuple[str, Record]]:
    datasets = require("datasets", "lm")
    try:
        found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split=split)
    except Exception as error:  # a hub, a network and a cache: it raises many kinds
        raise DataError(f"{source}: expected a data set that `datasets` can load (split {split!r}), found: "
                        f"{_shown(str(error), 200)}") from None  # fmt: skip
    if isinstance(found, dict):  # DatasetDict
        if split not in found:
            raise DataError(f"{source}: expected the split {split!r}, found {', '.join(map(repr, found))}")
        found = found[split]
    for number, record in enumerate(found):
        yield f"row {number}", dict(record)


# ------------------------------------------------------------------------------------------ columns -> TextRow


def _kind_of(record: Record, kind: Kind | None) -> Kind:
    """Return how to read rows with these columns."""
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"kind: expected {', '.join(map(repr, get_args(Kind)))}, found {kind!r}")
    if kind is not None and kind != "prompt":
        return kind
    names = set(record)
    if names & {"chosen", "rejected"}:
        return "preference"
    if ("label" in names and names & {"completion", "output"}) or "kto_tag" in names:
        return "unpaired"
    if names & {"completion", "completions", "output"}:
        return "completion"
    if names & {"prompt", "input", "instruction"}:
        return "prompt"
    if names & {"text", "messages", "conversations"}:
        return "text"
    raise DataError(
        "expected columns such as prompt, chosen and rejected; prompt, completion and label; prompt and completion; "
        f"prompt; text; or messages; found {', '.join(sorted(names)) or 'none'}"
    )


def _preference(record: Record, place: str) -> TextRow:
    chosen, rejected = (_several(record, name) for name in ("chosen", "rejected"))
    prompt, used = _prompt(record)
    if prompt is None:
        prompt, completions = _implicit(chosen, rejected)
    else:
        aligned = [_answer(prompt, completion) for completion in (*chosen, *rejected)]
        if any(start != aligned[0][0] for start, _ in aligned):
            raise _LeftOutError("chosen and rejected answer different prompts")
        prompt, completions = aligned[0][0], [completion for _, completion in aligned]
    number = len(chosen)
    pairs = tuple((w, number + l) for w in range(number) for l in range(len(rejected)))  # noqa: E741
    rewards = None
    scores = [_number(record, name) for name in ("score_chosen", "score_rejected")]
    if len(completions) == 2 and scores[0] is not None and scores[1] is not None:
        rewards = (scores[0], scores[1])
    margin = _number(record, "margin")
    if margin is None and rewards is not None:
        margin = rewards[0] - rewards[1]
    return TextRow(
        prompt,
        tuple(completions),
        labels=(1.0,) * number + (0.0,) * len(rejected),
        rewards=rewards,
        pairs=pairs,
        margin=margin,
        columns=_others(record, *used, "chosen", "rejected", "margin", "score_chosen", "score_rejected"),
        where=place,
    )


def _unpaired(record: Record, place: str) -> TextRow:
    tag = "kto_tag" if "label" not in record and "kto_tag" in record else "label"
    label = _required(record, tag)
    if label not in (True, False):
        raise DataError(f"{tag}: expected true or false, found {_shown(label)}")
    name, prompt, completion, used = _prompt_and_completion(record)
    return TextRow(prompt, (completion,), (float(label),), columns=_others(record, *used, name, tag), where=place)


def _completion(record: Record, place: str) -> TextRow:
    if "completions" not in record:
        name, prompt, completion, used = _prompt_and_completion(record)
        reward = _number(record, "reward")
        rewards = None if reward is None else (reward,)
        return TextRow(prompt, (completion,), rewards=rewards, columns=_others(record, *used, name, "reward"),
                       where=place)  # fmt: skip
    if "labels" in record:
        raise DataError("completions and labels: expected whole completions, found labels of steps, which no "
                        "objective here reads")  # fmt: skip
    given, used = _prompt(record)
    if given is None:
        raise DataError(_missing("prompt", record))
    aligned = [_answer(given, completion) for completion in _several(record, "completions")]
    values = record.get("rewards")
    if values is not None and not (isinstance(values, list) and len(values) == len(aligned)):
        raise DataError(f"rewards: expected a list of {len(aligned)} numbers, found {_shown(values)}")
    numbers = None if values is None else tuple(_finite("rewards", value) for value in values)
    return TextRow(aligned[0][0], tuple(completion for _, completion in aligned), rewards=numbers,
                   columns=_others(record, *used, "completions", "rewards"), where=place)  # fmt: skip


def _prompt_row(record: Record, place: str) -> TextRow:
    prompt, used = _prompt(record)
    if prompt is None:
        raise DataError(_missing("prompt", record))
    return TextRow(prompt, columns=_others(record, *used), where=place)


def _text_row(record: Record, place: str) -> TextRow:
    name = next((name for name in ("text", "messages", "conversations") if name in record), None)
    if name is None:
        raise DataError(_missing("text or messages", record))
    text = _text(name, record[name])
    if isinstance(text, str):
        return TextRow("", (text,), columns=_others(record, name), where=place)
    prompt, completion = _last_answer(name, text)
    return TextRow(prompt, (completion,), columns=_others(record, name), where=place)


_ROW_OF: dict[Kind, Callable[[Record, str], TextRow]] = {
    "preference": _preference,
    "unpaired": _unpaired,
    "completion": _completion,
    "prompt": _prompt_row,
    "text": _text_row,
}


def _prompt(record: Record) -> tuple[Text | None, tuple[str, ...]]:
    """Return the prompt, None where it is implicit, and the columns that it is made of."""
    if "instruction" in record and "prompt" not in record:  # Alpaca: the input is an optional second part
        parts = [record["instruction"], record.get("input") or ""]
        return _text("instruction", "\n".join(part for part in parts if part)), ("instruction", "input")
    name = next((name for name in PROMPT_COLUMNS if name in record), None)
    return (None, ()) if name is None else (_text(name, record[name]), (name,))


def _prompt_and_completion(record: Record) -> tuple[str, Text, Text, tuple[str, ...]]:
    """Return (completion's column, prompt, completion, prompt's columns)."""
    prompt, used = _prompt(record)
    name = "output" if "completion" not in record and "output" in record else "completion"
    if name not in record and prompt is not None and not isinstance(prompt, str):  # one conversation holds both
        return (name, *_last_answer(used[0], prompt), used)
    completion = _text(name, _required(record, name))
    if prompt is None:
        if isinstance(completion, str) or len(completion) < 2:
            raise DataError(_missing("prompt", record))
        return (name, *_last_answer(name, completion), used)
    return (name, *_answer(prompt, completion), used)


def _implicit(chosen: list[Text], rejected: list[Text]) -> tuple[Text, list[Text]]:
    """Return the shared beginning of chosen and rejected, and how each goes on."""
    w, l = chosen[0], rejected[0]  # noqa: E741
    if len(chosen) > 1 or len(rejected) > 1:
        raise DataError("prompt: expected one beside lists of chosen and rejected, found none")
    if isinstance(w, str) and isinstance(l, str):
        if all(text.lstrip().startswith(("Human:", "Assistant:")) for text in (w, l)) and "\n\nAssistant:" in w:
            w, l = _dialogue(w), _dialogue(l)  # noqa: E741
        else:
            shorter = min(len(w), len(l))
            end = next((place for place in range(shorter) if w[place] != l[place]), shorter)
            if end < max(len(w), len(l)):  # back to the last blank: the completions begin with whole words
                end = max(w.rfind(blank, 0, end) for blank in (" ", "\n"))
            if w == l or end <= 0:
                return "", [w, l]
            return w[:end], [w[end:], l[end:]]
    if isinstance(w, str) or isinstance(l, str):
        raise DataError("chosen and rejected: expected two strings or two conversations, found one of each")
    (prompt, first), (other, second) = _last_answer("chosen", w), _last_answer("rejected", l)
    if prompt != other:
        raise _LeftOutError("chosen and rejected answer different prompts")
    return prompt, [first, second]


def _dialogue(text: str) -> list[Message]:
    """Return the messages of an HH-RLHF dialogue."""
    parts = _HH_TURN.split("\n\n" + text.lstrip())
    return [{"role": _HH_ROLES[role], "content": content.strip()}
            for role, content in zip(parts[1::2], parts[2::2], strict=True)]  # fmt: skip


def _answer(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Return prompt and completion in one form, without the prompt repeated in the completion."""
    if isinstance(completion, str):
        return (prompt, completion) if isinstance(prompt, str) else (prompt, [_assistant(completion)])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if len(completion) == 1:
        if completion[0]["role"] != "assistant":
            raise DataError(f"completion: expected the assistant's message, found one of {completion[0]['role']!r}")
        return prompt, completion
    before, answer = _last_answer("completion", completion)
    if before[-len(prompt) :] != prompt:  # a system message may stand before it
        raise DataError(
            "completion: expected one message of the assistant, or the whole conversation with its prompt, found "
            f"{len(completion)} messages that do not repeat the prompt"
        )
    return before, answer


def _last_answer(name: str, messages: list[Message]) -> tuple[list[Message], list[Message]]:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{name}: expected messages that end with the assistant's answer, found {roles}")
    return messages[:-1], messages[-1:]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _several(record: Record, name: str) -> list[Text]:
    """Return one completion, or the strings of a list, each a completion."""
    value = _required(record, name)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [_text(name, item) for item in value]
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return [_text(name, item) for item in value]
    return [_text(name, value)]


def _text(name: str, value: Any) -> Text:
    """Return a string or messages, in the one form.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(name, value)
        return value
    if isinstance(value, dict):
        return [_message(name, value)]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_message(name, item) for item in value]
    raise DataError(f"{name}: expected a string or a list of messages with role and content, found {_shown(value)}")


def _message(name: str, value: Record) -> Message:
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    role, content = value.get(role_key), value.get(content_key)
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str)
                                         for part in content):  # fmt: skip
        content = "".join(part["text"] for part in content)  # the parts of multimodal chats, all of them text
    for key, item in ((role_key, role), (content_key, content)):
        if not isinstance(item, str):
            raise DataError(f"{name}: expected messages with a string {key!r}, found {_shown(value)}")
        _check_unicode(name, item)
    extra = {key: item for key, item in value.items() if key not in (role_key, content_key) and item is not None}
    return {"role": ROLES.get(role, role), "content": content, **extra}  # type: ignore[arg-type]


def _check_unicode(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: expected Unicode text, found a lone surrogate at {error.start}") from None


def _required(record: Record, name: str) -> Any:
    if name not in record:
        raise DataError(_missing(name, record))
    return record[name]


def _missing(name: str, record: Record) -> str:
    return f"expected the column {name}, found {', '.join(sorted(record)) or 'none'}"


def _number(record: Record, name: str) -> float | None:
    return _finite(name, record[name]) if name in record else None


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name}: expected a finite number, found {_shown(value)}")
    return float(value)


def _others(record: Record, *used: str) -> Record:
    return {name: value for name, value in record.items() if name not in used}


def _shown(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


# ---------------------------------------------------------------------------------------------------- writing


def write_text_data(path: str | Path, rows: TextData | Iterable[TextRow], layout: Layout = "trl") -> int:
    """Write rows in the columns of TRL or OpenRLHF, one line for every pair; an existing file is replaced.

    OpenRLHF lets flags name the columns. Written are those that its examples use: conversations whole in `chosen` and
    `rejected` (no prompt key), otherwise `prompt`; `input`, `output` and `label` for the other kinds.

    Args:
        path: ends in .jsonl, .jsonl.gz or .parquet.
        rows: of one kind.
        layout: whose columns.

    Returns:
        Number of lines written.

    Raises:
        DataError: another suffix, nothing to write, or values that the format cannot hold.
    """
    path = Path(path)
    if layout not in get_args(Layout):
        raise ConfigError(f"layout: expected 'trl' or 'openrlhf', found {layout!r}")
    kind = rows.kind if isinstance(rows, TextData) else None
    columns = _trl_columns if layout == "trl" else _openrlhf_columns
    records = [record for row in (rows.rows if isinstance(rows, TextData) else rows) for record in columns(row, kind)]
    if not records:
        raise DataError(f"{path}: expected rows to write, found none")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        try:
            text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: expected values that JSON can hold, found: {error}") from None
        data = text.encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    elif path.suffix == ".parquet":
        pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
        names = dict.fromkeys(name for record in records for name in record)
        try:
            table = pyarrow.table({name: [record.get(name) for record in records] for name in names})
            parquet.write_table(table, path)
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: expected columns of one type each, as Parquet needs, found: {reason}") from None
    else:
        raise DataError(f"{path}: expected a name ending in .jsonl, .jsonl.gz or .parquet, found {path.suffix!r}")
    return len(records)


def _trl_columns(row: TextRow, kind: Kind | None) -> Iterator[Record]:
    if row.pairs:
        for (chosen, rejected), margin in zip(row.pairs, row.margins(), strict=True):
            record: Record = {"prompt": row.prompt, "chosen": row.completions[chosen],
                              "rejected": row.completions[rejected]}  # fmt: skip
            if row.rewards is not None:
                record |= {"score_chosen": row.rewards[chosen], "score_rejected": row.rewards[rejected]}
            if not math.isnan(margin):
                record["margin"] = margin
            yield record | row.columns
    elif kind == "text":
        whole: Record = {"text": row.completions[0]}
        if not isinstance(row.prompt, str):
            whole = {"messages": [*row.prompt, *row.completions[0]]}
        yield whole | row.columns
    elif len(row.completions) > 1:
        group: Record = {"prompt": row.prompt, "completions": list(row.completions)}
        yield group | ({} if row.rewards is None else {"rewards": list(row.rewards)}) | row.columns
    else:
        single: Record = {"prompt": row.prompt}
        if row.completions:
            single["completion"] = row.completions[0]
            if row.labels is not None:
                single["label"] = bool(row.labels[0])
            if row.rewards is not None:
                single["reward"] = row.rewards[0]
        yield single | row.columns


def _openrlhf_columns(row: TextRow, kind: Kind | None) -> Iterator[Record]:
    for record in _trl_columns(row, kind):
        prompt = record.pop("prompt", None)
        if "chosen" in record and isinstance(prompt, list):
            yield record | {name: prompt + record[name] for name in ("chosen", "rejected")}
        elif "chosen" in record or prompt is None:
            yield record if prompt is None else {"prompt": prompt, **record}
        elif "completion" in record:
            yield {"input": prompt, "output": record.pop("completion"), **record}
        else:
            yield {"input": prompt, **record}


# -------------------------------------------------------------------------------------------------- splitting


def prompt_key(row: TextRow) -> str:
    """Return the normalised text that tells one prompt from another: case and blanks do not matter."""
    parts = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    if not any(parts):  # text without a prompt is told apart by itself
        parts = [plain(completion) for completion in row.completions]
    return "\x00".join(" ".join(part.split()).casefold() for part in parts)


def split(data: TextData, fraction: float, seed: int = 0) -> tuple[TextData, TextData]:
    """Return (training, held-out) rows; all rows of a prompt are on one side.

    Args:
        data: rows of any kind.
        fraction: share of the prompts that is held out.
        seed: which ones; neither the order of the rows nor other rows of the same prompt matter.

    Raises:
        ConfigError: the fraction is not in [0, 1), or leaves one side empty.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"held-out fraction must lie in [0, 1), found {fraction}")
    keys = [prompt_key(row) for row in data.rows]
    order = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest())
    number = round(fraction * len(order))
    if fraction > 0 and not 0 < number < len(order):
        raise ConfigError(
            f"{data.source}: a held-out share of {fraction} of {len(order)} prompts leaves one side empty"
        )
    held = set(order[:number])
    sides: list[TextData] = []
    for wanted in (False, True):
        rows = [row for row, key in zip(data.rows, keys, strict=True) if (key in held) is wanted]
        sides.append(replace(data, rows=rows, notes=data.notes if not wanted else ()))
    return sides[0], sides[1]
