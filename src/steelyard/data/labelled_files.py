"""Labelled examples from files: preference pairs of texts, tables, or features; with the group each one comes from.

| file | an example is |
|---|---|
| .jsonl, .json, .parquet, a folder, a hub name | a pair, columns as in docs/text_data.md; `group_column` says whose |
| .csv, .tsv | a row of a table: `target` is learned from all other columns |
| .npz, .safetensors | a row of `inputs` [N, X] with `targets` [N]; pairs have `other` [N, X]; `groups` [N] |

Groups (users, annotators, sources) that are held out are never trained on: the way from the others to them is what
adaptation has to be good at. Nothing missing is filled in silently.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from steelyard.config import Config, require_range
from steelyard.data.preferences import TextData, read_text_data
from steelyard.data.tokenizer import Text
from steelyard.errors import ConfigError, DataError, near

Task = Literal["preference", "regression", "classification"]
Texts = list[tuple[Text, Text]]
TABLES, ARRAYS = (".csv", ".tsv"), (".npz", ".safetensors")


@dataclass(frozen=True)
class LabelledDataConfig(Config):
    """Labelled examples, and which of them are kept apart."""

    path: str | None = None
    """Pairs of texts (.jsonl, .json, .parquet, a folder, a name on the hub), a table (.csv, .tsv) or features (.npz,
    .safetensors)."""
    split: str = "train"
    """Split of a `datasets` folder or name."""
    group_column: str | None = None
    """Column that names the user, annotator or source of an example; features have the array `groups` instead."""
    target: str | None = None
    """Column of a table that is learned."""
    categorical: tuple[str, ...] = ()
    """Columns of a table that hold names: each becomes one column of 0 and 1 per name."""
    ignore: tuple[str, ...] = ()
    """Columns of a table that are left out."""
    held_out: tuple[str, ...] = ()
    """Groups that are kept apart, by name; empty: a share of them."""
    held_out_fraction: float = 0.2
    """Share of the groups that is kept apart, or of the examples where there are no groups; 0: none."""
    clusters: int = 0
    """Without groups: so many, found by k-means on the training examples' features; 0: none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, 0.9, "held_out_fraction")
        require_range(self, 0, math.inf, "clusters")
        if self.clusters == 1:
            raise ConfigError("clusters must be 0 or at least 2, found 1")
        if self.clusters and self.group_column is not None:
            raise ConfigError(f"clusters stand in for groups, and group_column names some: {self.group_column!r}")


@dataclass(frozen=True)
class TableSchema(Config):
    """How a row of a table becomes numbers."""

    columns: tuple[str, ...]
    """Columns that are read, in order."""
    categories: dict[str, tuple[str, ...]]
    """Names that a column may hold, each of which becomes one number, 0 or 1."""
    target: str
    """The column that was learned."""

    def encode(self, record: Mapping[str, Any], where: str = "row") -> list[float]:
        """Return a row's numbers.

        Raises:
            DataError: a column that is missing, or a cell that cannot be read.
        """
        numbers: list[float] = []
        for name in self.columns:
            cell = record.get(name)
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                raise DataError(f"{where}: column {name!r} is empty; fill it in, or leave the row out")
            if name in self.categories:
                known = self.categories[name]
                if str(cell) not in known:
                    raise DataError(
                        f"{where}: column {name!r} holds {str(cell)!r}, which is new; {near(str(cell), known)}"
                    )
                numbers += [float(str(cell) == one) for one in known]
            else:
                numbers.append(_number(cell, f"{where}: column {name!r}"))
        return numbers


@dataclass(frozen=True)
class Examples:
    """Labelled examples as they were read; N of them.

    Attributes:
        source: where they come from.
        targets: float64 [N]: P(first is preferred), a number, or the number of a class.
        items: [N] what an example was made from: equal numbers are equal examples, which must not be on both sides of
            a split.
        inputs: float32 [N, X], where examples are numbers; of the first of a pair.
        other: float32 [N, X], of the second of a pair.
        texts: (prompt, completion) [N], where examples are texts; of the first of a pair.
        other_texts: of the second of a pair.
        groups: int64 [N], into `names`.
        names: of groups, in the order of their first example.
        classes: what the numbers of classes mean.
        schema: of a table.
        notes: what was left out, a sentence each.
    """

    source: str
    targets: npt.NDArray[np.float64]
    items: npt.NDArray[np.int64]
    inputs: npt.NDArray[np.float32] | None = None
    other: npt.NDArray[np.float32] | None = None
    texts: Texts | None = None
    other_texts: Texts | None = None
    groups: npt.NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    schema: TableSchema | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def content_hash(self) -> str:
        """SHA-256 of all of it but where it came from."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("source", "schema", "notes") and value is not None:
                plain = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
                digest.update(f"{field.name} {len(plain)}".encode() + plain)
        return digest.hexdigest()

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Return the given examples; group numbers stay as they are."""
        changes: dict[str, Any] = {}
        for name in ("targets", "items", "inputs", "other", "groups"):
            value = getattr(self, name)
            changes[name] = None if value is None else value[rows]
        for name in ("texts", "other_texts"):
            value = getattr(self, name)
            changes[name] = None if value is None else [value[row] for row in rows]
        return replace(self, **changes)

    def renumbered(self) -> Examples:
        """Return the examples with groups 0..G-1: only those that have an example."""
        if self.groups is None:
            return self
        present, groups = np.unique(self.groups, return_inverse=True)
        return replace(self, groups=groups.astype(np.int64), names=tuple(self.names[group] for group in present))


def read_examples(config: LabelledDataConfig, task: Task) -> Examples:
    """Read labelled examples.

    Raises:
        DataError: nothing there, or a row, column or cell that is not as expected; it is named.
        ConfigError: what was asked for does not fit the file.
    """
    if config.path is None:
        raise ConfigError("no data: give pairs, a table or features with --data PATH (config key 'data.path')")
    suffix = Path(config.path).suffix.lower()
    if suffix in TABLES:
        examples = _table(Path(config.path), config, task)
    elif suffix in ARRAYS:
        examples = _arrays(Path(config.path), task)
    else:
        examples = _pairs(config, task)
    if examples.groups is not None and len(examples.names) < 2:
        raise DataError(
            f"{examples.source}: expected examples of at least 2 groups, found one only ({examples.names[0]!r}); leave "
            "the group column unset to train without groups"
        )
    return examples


def hold_out(examples: Examples, config: LabelledDataConfig, seed: int) -> tuple[Examples, Examples | None]:
    """Return (training, held-out) examples: whole groups where there are any, else whole items.

    Which groups is a function of the seed and of their names, not of their order in the file.

    Raises:
        ConfigError: a group that is not there, or nothing left to train on.
    """
    if config.held_out and examples.groups is None:
        raise ConfigError(f"held_out names groups, and {examples.source} has none")
    if examples.groups is not None:
        unknown = [name for name in config.held_out if name not in examples.names]
        if unknown:
            raise ConfigError(
                f"held_out: {examples.source} has no group {unknown[0]!r}; {near(unknown[0], examples.names)}"
            )
        labels, keys = examples.groups, list(examples.names)
    else:
        labels = np.unique(examples.items, return_inverse=True)[1].astype(np.int64)
        keys = [str(number) for number in range(int(labels.max()) + 1)]
    if config.held_out:
        chosen = {keys.index(name) for name in config.held_out}
    else:
        count = round(config.held_out_fraction * len(keys))
        count = max(1, count) if config.held_out_fraction > 0 else 0
        order = sorted(range(len(keys)), key=lambda one: hashlib.blake2b(f"{seed}/{keys[one]}".encode()).digest())
        chosen = set(order[:count])
    if len(chosen) >= len(keys):
        what = "groups" if examples.groups is not None else "examples"
        raise ConfigError(f"{examples.source}: all {len(keys)} {what} would be held out and none be trained on")
    held = np.isin(labels, sorted(chosen))
    train = examples.take(np.flatnonzero(~held)).renumbered()
    return train, examples.take(np.flatnonzero(held)).renumbered() if chosen else None


# ------------------------------------------------------------------------------------------------ pairs of texts


def _pairs(config: LabelledDataConfig, task: Task) -> Examples:
    if task != "preference":
        raise ConfigError(f"{config.path}: pairs of texts are for preferences; a {task} needs a table or features")
    assert config.path is not None
    data = read_text_data(config.path, "preference", config.split)
    first: Texts = []
    second: Texts = []
    owners: list[str] = []
    for row in data.rows:
        if config.group_column is not None:
            owners += [_owner(row.columns, config.group_column, data, row.where)] * len(row.pairs)
        first += [(row.prompt, row.completions[chosen]) for chosen, _ in row.pairs]
        second += [(row.prompt, row.completions[rejected]) for _, rejected in row.pairs]
    different = [place for place in range(len(first)) if first[place] != second[place]]
    notes = list(data.notes)
    if len(different) < len(first):
        notes.append(f"{len(first) - len(different)} of {len(first)} pairs were equal texts and were dropped")
        first, second = [first[place] for place in different], [second[place] for place in different]
        owners = [owners[place] for place in different] if owners else owners
    if not first:
        raise DataError(f"{data.source}: expected pairs of two different texts, found none")
    keys = [json.dumps([one[0], *sorted((json.dumps(one[1]), json.dumps(two[1])))])
            for one, two in zip(first, second, strict=True)]  # fmt: skip
    groups, names = _numbered(owners) if config.group_column is not None else (None, ())
    return Examples(
        data.source,
        np.ones(len(first)),
        _numbered(keys)[0],
        texts=first,
        other_texts=second,
        groups=groups,
        names=names,
        notes=tuple(notes),
    )


def _owner(columns: Mapping[str, Any], name: str, data: TextData, where: str) -> str:
    if columns.get(name) is None:
        hint = near(name, columns) if columns else "there is no other column"
        raise DataError(f"{data.source}: {where}: expected the group column {name!r}; {hint}")
    return str(columns[name])


# ------------------------------------------------------------------------------------------------------- tables


def _table(path: Path, config: LabelledDataConfig, task: Task) -> Examples:
    if task == "preference":
        raise ConfigError(f"{path}: a table is for regression or classification; preferences are pairs")
    header, rows = table_rows(path)
    if config.target is None:
        raise ConfigError(f"{path}: say which column is learned with --target ({', '.join(header)})")
    for name in (config.target, *config.categorical, *config.ignore, *filter(None, [config.group_column])):
        if name not in header:
            raise DataError(f"{path}: expected a column {name!r}; {near(name, header)}")
    apart = {config.target, config.group_column, *config.ignore}
    columns = tuple(name for name in header if name not in apart)
    if not columns:
        raise DataError(f"{path}: no column is left to learn from")
    categories = {
        name: tuple(dict.fromkeys(sorted(record[name] for _, record in rows if record[name])))
        for name in columns
        if name in config.categorical
    }
    schema = TableSchema(columns, categories, config.target)
    inputs = np.array([schema.encode(record, f"{path}: {where}") for where, record in rows], np.float32)
    cells = []
    for where, record in rows:
        for name in filter(None, (config.target, config.group_column)):
            if not record[name]:
                raise DataError(f"{path}: {where}: column {name!r} is empty; fill it in, or leave the row out")
        cells.append(record[config.target])
    classes: tuple[str, ...] = ()
    if task == "classification":
        classes = tuple(sorted(set(cells), key=_class_order))
        if len(classes) < 2:
            raise DataError(f"{path}: column {config.target!r} holds one class only ({classes[0]!r})")
        targets = np.array([classes.index(cell) for cell in cells], np.float64)
    else:
        targets = np.array(
            [_number(cell, f"{path}: {where}: column {config.target!r}")
             for cell, (where, _) in zip(cells, rows, strict=True)]
        )  # fmt: skip
    groups, names = None, ()
    if config.group_column is not None:
        groups, names = _numbered([record[config.group_column] for _, record in rows])
    return Examples(
        str(path), targets, _items(inputs, None), inputs, groups=groups, names=names, classes=classes, schema=schema
    )


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers in their own order, then words."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)


def table_rows(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Return the header, and (place, {column: stripped cell}) of every row."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table in UTF-8, found: {error}") from None
    if len(lines) < 2:
        raise DataError(f"{path}: expected a line of column names and rows below it, found {len(lines)} lines")
    header = [name.strip() for name in lines[0][1]]
    twice = [name for name in header if header.count(name) > 1 or not name]
    if twice:
        raise DataError(f"{path}: line 1: expected column names, all different, found {twice[0]!r}")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(f"{path}: line {number}: expected {len(header)} cells, found {len(cells)}")
        rows.append((f"line {number}", dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return header, rows


def _number(cell: Any, where: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: expected a number, found {str(cell)!r:.60}; list a column of names under --data.categorical"
        ) from None
    if not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, found {cell}")
    return value


# ------------------------------------------------------------------------------------------------------- arrays


def _arrays(path: Path, task: Task) -> Examples:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        else:
            found = safetensors.numpy.load_file(path)
    except (OSError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: expected arrays, found: {str(error).splitlines()[0]}") from None
    needed = ("inputs", "other") if task == "preference" else ("inputs", "targets")
    for name in needed:
        if name not in found:
            raise DataError(f"{path}: expected the array {name!r}, found {', '.join(sorted(found)) or 'none'}")
    if task != "preference" and "other" in found:
        raise DataError(f"{path}: the array 'other' makes its rows pairs, and a {task} has none")
    count = len(found["inputs"])
    for name in ("inputs", "other"):
        if name in found:
            value = found[name]
            if value.ndim != 2 or value.shape != found["inputs"].shape or not count:
                raise DataError(f"{path}: {name}: expected shape [rows, features], as inputs, found {value.shape}")
            _finite(path, name, value)
    inputs = found["inputs"].astype(np.float32)
    other = found["other"].astype(np.float32) if "other" in found else None
    raw = found.get("targets", np.ones(count))
    if raw.shape != (count,):
        raise DataError(f"{path}: targets: expected {count} of them, found shape {raw.shape}")
    classes: tuple[str, ...] = ()
    targets: npt.NDArray[np.float64]
    if task == "classification":
        kinds, numbers = np.unique(raw, return_inverse=True)
        classes, targets = tuple(str(kind) for kind in kinds.tolist()), numbers.astype(np.float64)
        if len(classes) < 2:
            raise DataError(f"{path}: targets hold one class only ({classes[0]!r})")
    else:
        if raw.dtype.kind not in "fiub":
            raise DataError(f"{path}: targets: expected numbers, found {raw.dtype}")
        targets = raw.astype(np.float64)
        _finite(path, "targets", targets[:, None])
        if task == "preference" and ((targets < 0) | (targets > 1)).any():
            row = int(np.flatnonzero((targets < 0) | (targets > 1))[0])
            raise DataError(
                f"{path}: targets, row {row}: expected P(first is preferred) in 0..1, found {targets[row]:g}"
            )
    groups, names = None, ()
    if "groups" in found:
        if found["groups"].shape != (count,):
            raise DataError(f"{path}: groups: expected {count} of them, found shape {found['groups'].shape}")
        groups, names = _numbered([str(one) for one in found["groups"].tolist()])
    return Examples(
        str(path), targets, _items(inputs, other), inputs, other, groups=groups, names=names, classes=classes
    )


def _finite(path: Path, name: str, value: npt.NDArray[Any]) -> None:
    if value.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name}: expected numbers, found {value.dtype}")
    if not np.isfinite(value).all():
        row, column = np.argwhere(~np.isfinite(value))[0]
        raise DataError(
            f"{path}: {name}, row {row}, column {column}: expected a finite number, found {value[row, column]}"
        )


def _items(inputs: npt.NDArray[np.float32], other: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int64]:
    """Return a number for each example, the same for equal ones; a pair is equal to its reverse."""
    keys = []
    for row in range(len(inputs)):
        parts = [inputs[row].tobytes()] + ([] if other is None else [other[row].tobytes()])
        keys.append(b"".join(sorted(parts)))
    return _numbered(keys)[0]


def _numbered(values: Sequence[Any]) -> tuple[npt.NDArray[np.int64], tuple[Any, ...]]:
    """Return numbers [N] and the different values, in the order of their first place."""
    number: dict[Any, int] = {}
    found = np.array([number.setdefault(value, len(number)) for value in values], np.int64)
    return found, tuple(number)
