"""Adapting a trained head set to one person's labels: labels in, profile and honest numbers out.

Examples that are adapted to are never judged on: a labels file and a test file that share an example are refused, with
the lines; so is a test example that a given profile has already counted. Without a test file every label is judged by
what is adapted to the others (leave one out), which says less the fewer there are.

Shapes: N examples, H members, C outputs, D features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from steelyard.adapt.artefact import AdaptSettings, LoadedHeads, MethodName
from steelyard.adapt.backbones import name_of, reads_text
from steelyard.adapt.base import Combination, Floats, Method, Posterior, Support, Task
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile, seen_hash
from steelyard.adapt.profile_values import settings_of
from steelyard.artefact import find
from steelyard.bench import diversity, stats
from steelyard.bench.stats import Estimate
from steelyard.data.labelled_files import ARRAYS, TABLES, LabelledDataConfig, read_examples, table_rows
from steelyard.data.preferences import read_text_data
from steelyard.data.tokenizer import Text
from steelyard.errors import ConfigError, DataError, near
from steelyard.rng import numpy_generator

FOLDS = 100
"""With more labels than this, so many groups of them are left out in turn instead of single ones."""
NAMED = 5
"""Examples that a message names before it says how many more there are."""


@dataclass(frozen=True)
class Labelled:
    """Labelled examples of one person.

    Attributes:
        source: the file.
        support: what the heads say of them.
        keys: what tells examples apart [N]; a pair is equal to its reverse.
        places: where in the file [N], e.g. "line 3".
        notes: what was left out, a sentence each.
    """

    source: str
    support: Support
    keys: tuple[str, ...]
    places: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> Labelled:
        """Return the given examples."""
        keys, places = tuple(self.keys[row] for row in rows), tuple(self.places[row] for row in rows)
        return replace(self, support=self.support.take(np.asarray(rows, np.int64)), keys=keys, places=places)


@dataclass(frozen=True)
class Judged:
    """How well a function does on examples.

    Attributes:
        name: of the function.
        right: [N], 1 right, 0 wrong, 0.5 where a preference's margin is 0; squared errors of a regression.
    """

    name: str
    right: Floats

    def estimate(self, task: Task) -> Estimate:
        """Return the accuracy with its Wilson interval, or the root mean squared error with a bootstrap one."""
        if task != "regression":
            found = stats.wilson_interval(math.floor(self.right.sum()), len(self.right))
            return replace(found, value=float(self.right.mean()))
        mean = stats.mean_estimate(self.right, numpy_generator(0, "adapt/rmse"))
        ends = [None if end is None else math.sqrt(end) for end in (mean.low, mean.high)]
        return Estimate(math.sqrt(mean.value), ends[0], ends[1], mean.n)

    def minus(self, other: Judged) -> Estimate:
        """Return the mean paired difference with its bootstrap interval."""
        return stats.mean_estimate(self.right - other.right, numpy_generator(0, "adapt/difference"))


# ---------------------------------------------------------------------------------------------------------- reading


def read_labelled(path: str | Path, heads: LoadedHeads, people: Personalizer) -> Labelled:
    """Read labelled examples of the kind that the heads were trained on.

    Pairs of texts: columns as for training (prompt, chosen, rejected); a margin of 0 is a tie. Tables: the columns of
    training, the target among them. Features: `inputs`, `targets` and for pairs `other`.

    Raises:
        DataError: nothing there, or a row that is not as expected; it is named.
        ConfigError: another kind of file than the heads read.
    """
    suffix = Path(path).suffix.lower()
    if reads_text(heads.artefact.backbone):
        if suffix in TABLES + ARRAYS:
            raise ConfigError(f"{path}: these heads stand on {name_of(heads.artefact.backbone)}, which reads texts; "
                              "expected pairs in JSON lines")  # fmt: skip
        return _pairs(str(path), heads, people)
    if suffix in TABLES:
        return _table(Path(path), heads, people)
    if suffix in ARRAYS:
        return _arrays(Path(path), heads, people)
    raise ConfigError(f"{path}: these heads read rows of numbers; expected a file {', '.join(TABLES + ARRAYS)}")


def pair_key(prompt: Text, first: Text, second: Text) -> str:
    """Return what tells a comparison of two completions from another; the order of the two does not matter."""
    return json.dumps([prompt, *sorted(json.dumps(side) for side in (first, second))])


def _pairs(path: str, heads: LoadedHeads, people: Personalizer) -> Labelled:
    data = read_text_data(path, "preference")
    prompts, firsts, seconds, labels, places = [], [], [], [], []
    equal = 0
    for row in data.rows:
        for (chosen, rejected), margin in zip(row.pairs, row.margins(), strict=True):
            if row.completions[chosen] == row.completions[rejected]:
                equal += 1
                continue
            prompts.append(row.prompt)
            firsts.append(row.completions[chosen])
            seconds.append(row.completions[rejected])
            labels.append(0.5 if margin == 0 else 1.0)
            places.append(row.where)
    if not prompts:
        raise DataError(f"{path}: expected pairs of two different texts, found none")
    keys = tuple(pair_key(*row) for row in zip(prompts, firsts, seconds, strict=True))
    features = heads.features([*prompts, *prompts], [*firsts, *seconds])
    support = people.support(features[: len(prompts)], features[len(prompts) :], labels)
    notes = (f"{equal} pairs of equal texts were left out",) if equal else ()
    return Labelled(path, support, keys, tuple(places), (*data.notes, *notes))


def _table(path: Path, heads: LoadedHeads, people: Personalizer) -> Labelled:
    schema, classes = heads.artefact.table, heads.artefact.classes
    if schema is None:
        raise ConfigError(f"{path}: these heads were not trained on a table with columns; give features (.npz)")
    header, rows = table_rows(path)
    if schema.target not in header:
        raise DataError(f"{path}: expected the column {schema.target!r} with the labels; {near(schema.target, header)}")
    inputs = np.array([schema.encode(record, f"{path}: {where}") for where, record in rows], np.float32)
    labels = [_target(record[schema.target], classes, f"{path}: {where}: column {schema.target!r}")
              for where, record in rows]  # fmt: skip
    return Labelled(
        str(path), people.support(heads.rows(inputs), None, labels), _row_keys(inputs), tuple(w for w, _ in rows)
    )


def _target(cell: str, classes: Sequence[str], where: str) -> float:
    if classes:
        if cell not in classes:
            raise DataError(f"{where}: expected a class, found {cell!r:.60}; {near(cell, classes)}")
        return float(classes.index(cell))
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, found {cell!r:.60}")
    return value


def _arrays(path: Path, heads: LoadedHeads, people: Personalizer) -> Labelled:
    # classes are numbers here, and a few labels need not hold all of them: those of the heads count
    task: Task = "regression" if heads.task == "classification" else heads.task
    found = read_examples(LabelledDataConfig(str(path)), task)
    assert found.inputs is not None
    labels: Floats = found.targets
    places = tuple(f"row {row}" for row in range(len(labels)))
    if heads.task == "classification":
        numbers = {_number(name): place for place, name in enumerate(heads.artefact.classes)}
        for value, where in zip(labels.tolist(), places, strict=True):
            if value not in numbers:
                known = ", ".join(heads.artefact.classes)
                raise DataError(f"{path}: {where}: expected one of the classes {known}, found {value:g}")
        labels = np.array([numbers[value] for value in labels.tolist()], np.float64)
    other = None if found.other is None else heads.rows(found.other)
    support = people.support(heads.rows(found.inputs), other, labels)
    return Labelled(str(path), support, _row_keys(found.inputs, found.other), places, found.notes)


def _number(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return math.nan


def _row_keys(*sides: np.ndarray | None) -> tuple[str, ...]:
    given = [side for side in sides if side is not None]
    return tuple(
        hashlib.sha256(b"".join(sorted(side[row].tobytes() for side in given))).hexdigest()
        for row in range(len(given[0]))
    )


# ---------------------------------------------------------------------------------------------------------- methods


def method_of(heads: LoadedHeads, settings: AdaptSettings) -> Method:
    """Return the method that the settings say, for these heads."""
    variance: Floats = heads.learner.head.variance.detach().cpu().double().numpy()
    return settings.build(heads.task, variance)


def method_for(heads: LoadedHeads, settings: AdaptSettings, profile: Profile | None, asked: bool) -> Method:
    """Return the method to go on with.

    Args:
        heads: the head set.
        settings: what the command asks for.
        profile: to go on from, whose own method counts.
        asked: whether a method or a setting was named; then it must be the profile's.

    Raises:
        ConfigError: the profile was made with another method than the one asked for, or one that these heads lack.
    """
    method = method_of(heads, settings)
    if profile is None or profile.settings == settings_of(method):
        return method
    if asked:
        raise ConfigError(
            f"the profile was made with {profile.method} (settings {_settings(profile)}), and cannot go on with "
            f"{method.name} (settings {_settings(method)}); leave --method, --eta, --noise and --mix away"
        )
    if profile.evidence is not None:
        return method  # a HyRe profile carries its own settings
    for name in get_args(MethodName):
        other = method_of(heads, replace(heads.settings, method=name))
        if profile.settings == settings_of(other):
            return other
    raise ConfigError(f"the profile was made with {profile.method} (settings {_settings(profile)}), which these heads "
                      "do not have")  # fmt: skip


def _settings(owner: Profile | Method) -> str:
    found = dict(owner.settings if isinstance(owner, Profile) else settings_of(owner))
    found.pop("name", None)
    return ", ".join(f"{name} {value}" for name, value in found.items() if not isinstance(value, list)) or "none"


# --------------------------------------------------------------------------------------------------------- adapting


def new_labels(labels: Labelled, profile: Profile) -> tuple[Labelled, tuple[str, ...]]:
    """Return the labels that the profile has not counted, each comparison once, and what was left out."""
    seen, rows, again, counted = set[str](), [], 0, 0
    for row, key in enumerate(labels.keys):
        if seen_hash(key) in profile.seen:
            counted += 1
        elif key in seen:
            again += 1
        else:
            rows.append(row)
        seen.add(key)
    notes = []
    if counted:
        notes.append(f"{counted} of {len(labels)} labels were counted in the profile before")
    if again:
        notes.append(f"{again} of {len(labels)} labels repeat an earlier comparison and were not counted")
    return labels.take(rows), tuple(notes)


def require_apart(labels: Labelled | None, test: Labelled, profile: Profile | None) -> None:
    """Raise `DataError` if an example is adapted to and tested on."""
    if labels is not None:
        where: dict[str, str] = {}
        for key, place in zip(labels.keys, labels.places, strict=True):
            where.setdefault(key, place)
        both = [(where[key], place) for key, place in zip(test.keys, test.places, strict=True) if key in where]
        if both:
            shown = "; ".join(f"{one} is {other} there" for one, other in both[:NAMED])
            more = f"; and {len(both) - NAMED} more" if len(both) > NAMED else ""
            raise DataError(
                f"{labels.source}: {len(both)} of its examples are in {test.source} too ({shown}{more}); what is "
                "adapted to must not be tested on"
            )
    counted = set() if profile is None else set(profile.seen)
    places = [place for key, place in zip(test.keys, test.places, strict=True) if seen_hash(key) in counted]
    if places:
        more = ", ..." if len(places) > NAMED else ""
        raise DataError(
            f"{test.source}: the profile has counted {len(places)} of its examples before "
            f"({', '.join(places[:NAMED])}{more}); what is adapted to must not be tested on"
        )


def judge(name: str, outputs: Floats, labels: Floats, task: Task) -> Judged:
    """Return how well outputs [N, C] fit labels [N]; ties among preferences are not judged."""
    if task == "regression":
        return Judged(name, (outputs[:, 0] - labels) ** 2)
    if task == "classification":
        return Judged(name, np.asarray(outputs.argmax(1) == labels, np.float64))
    clear = labels != 0.5
    margin = np.where(labels > 0.5, outputs[:, 0], -outputs[:, 0])[clear]
    return Judged(name, np.asarray((margin > 0) + 0.5 * (margin == 0), np.float64))


def left_out(begun: Posterior, labels: Support) -> Floats:
    """Return outputs [N, C] of every example under what is adapted to the others (to the other folds, if many)."""
    fold = np.arange(len(labels)) % FOLDS
    outputs = np.empty((len(labels), labels.members.shape[2]))
    for number in np.unique(fold):
        others, those = labels.take(np.flatnonzero(fold != number)), labels.take(np.flatnonzero(fold == number))
        outputs[fold == number] = begun.update(others).combination().apply(those.members, those.features)
    return outputs


@dataclass(frozen=True)
class Comparison:
    """Functions judged on the same examples.

    Attributes:
        on: which examples, in words.
        before: single (the pooled head, where there is one) and uniform.
        after: the adapted function.
    """

    on: str
    before: tuple[Judged, ...]
    after: Judged

    @property
    def changed(self) -> int:
        """Examples on which the adapted function is right and the plain mean is not, or the other way round."""
        return int((self.before[-1].right != self.after.right).sum())


def compare(
    heads: LoadedHeads, begun: Posterior, after: Posterior, labels: Support | None, test: Labelled | None
) -> Comparison | None:
    """Judge what was there before, and the adapted function; None where there is too little to judge by.

    Args:
        heads: the head set.
        begun: what is believed before the labels.
        after: what is believed after them.
        labels: adapted to.
        test: other examples; None: leave one label out at a time.
    """
    support = labels if test is None else test.support
    if support is None or (test is None and len(support) < 2):
        return None
    if heads.task == "preference" and not (support.labels != 0.5).any():
        return None
    name = after_name(heads, after)
    if test is None:
        on = f"{len(support)} labels, each left out in turn" if len(support) <= FOLDS else f"labels, {FOLDS} folds"
        outputs = left_out(begun, support)
    else:
        on = f"{len(support)} examples of {test.source}"
        outputs = after.combination().apply(support.members, support.features)
    members = support.members.shape[1]
    plain = {
        f"single ({heads.names[0]})": Combination(np.eye(members)[0]),
        "uniform": Combination(np.full(members, 1 / members)),
    }
    before = tuple(judge(label, one.apply(support.members), support.labels, heads.task) for label, one in plain.items())
    return Comparison(on, before, judge(name, outputs, support.labels, heads.task))


def after_name(heads: LoadedHeads, posterior: Posterior) -> str:
    """Return what the adapted function is called, e.g. "HyRe, 5 labels"."""
    method = getattr(posterior, "method", None)
    name = getattr(method, "name", "adapted")
    return f"{name}, {labels_of(posterior.n)}"


def labels_of(n: float) -> str:
    """Return "1 label", "5 labels"."""
    return f"{n:g} label{'' if n == 1 else 's'}"


def best_members(heads: LoadedHeads, posterior: Posterior, count: int = 5) -> list[tuple[str, float]]:
    """Return the members of the largest coefficients, with their names."""
    coefficients = posterior.combination().coefficients
    return [(heads.names[k], float(coefficients[k])) for k in np.argsort(-coefficients, kind="stable")[:count]]


def diversity_sentence(path: str | Path, test: Labelled | None, task: Task) -> str | None:
    """Return what the run's diversity meter said after training.

    For heads without their run it is measured on the test examples, and returned where re-weighting cannot help: what
    the best member gains there is an upper bound, so only that direction is safe.
    """
    file = find(path).parent.parent / "diversity.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("sentence"), str):
        return f"after training: {found['sentence']}"
    if test is None:
        return None
    clear = np.flatnonzero(test.support.labels != 0.5) if task == "preference" else np.arange(len(test))
    measured = diversity.measure([test.support.take(clear)], task) if len(clear) else None
    return measured.sentence() if measured is not None and measured.gain < diversity.LEAST_GAIN else None
