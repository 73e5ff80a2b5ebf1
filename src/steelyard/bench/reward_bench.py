"""Accuracy of reward models on preference sets in RewardBench's layout, per subset and per section, with intervals.

Lambert et al., "RewardBench: Evaluating Reward Models for Language Modeling" (2024). A row is right where the chosen
completion scores strictly more than the rejected one; a tie is wrong, as there. Sections weigh subsets by their rows,
with `math-prm` counted as 984 rows, so that mathematics weighs as much as code. The score is the plain mean of the four
sections; the benchmark's optional "prior sets" are left out.

Three kinds of rows are told apart by their shape:

| `chosen`, `rejected` | kind | right where |
|---|---|---|
| text, text | pair | the chosen one scores more |
| one text or [one], [several] | best of n, as in RewardBench 2 | the chosen one scores more than every other |
| [k], [k] with k > 1 | RM-Bench: k styles, plain to rich | a share: of all k x k comparisons that are won |

RM-Bench (Liu et al. 2024) also reports easy, normal and hard: comparisons in which the chosen style is richer than, the
same as, or plainer than the rejected one. RewardBench 2's Ties subset needs its own rule and is refused.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.bench import stats
from steelyard.bench.stats import Estimate
from steelyard.data.tokenizer import Text
from steelyard.envs.scorers import CompletionScorer, checked_scores
from steelyard.errors import DataError
from steelyard.rng import numpy_generator

SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
"""RewardBench 1: its 23 subsets."""
MATH_PRM_WEIGHT = 984
"""Rows that math-prm counts as, so that it weighs as much as the six subsets of code."""
TIES = "ties"


@dataclass(frozen=True)
class BenchRow:
    """One row: a prompt, completions that should score more and completions that should score less.

    `prompt` may be a conversation; so may each completion.
    """

    prompt: Text
    chosen: tuple[Text, ...]
    rejected: tuple[Text, ...]
    subset: str
    id: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one subset, section or style.

    Attributes:
        estimate: with its interval: Wilson for rows that are right or wrong, bootstrap over rows for shares.
        ties: share of compared pairs that tie.
        of: for sections, "found/all" subsets; else empty.
    """

    estimate: Estimate
    ties: float
    of: str = ""


@dataclass(frozen=True)
class BenchResult:
    """What `evaluate` returns: tables by name, the overall score where it exists, and one record per row."""

    subsets: dict[str, Accuracy]
    sections: dict[str, Accuracy]
    styles: dict[str, Accuracy]
    score: Estimate | None
    rows: list[dict[str, Any]]


def evaluate(scorer: CompletionScorer, rows: Sequence[BenchRow], block: int = 256, seed: int = 0) -> BenchResult:
    """Score every completion and return accuracies.

    Args:
        scorer: any; completions it cannot score make their row wrong, and are counted in the records.
        rows: what `read_rows` returns.
        block: rows scored at a time.
        seed: of bootstrap intervals.
    """
    records: list[dict[str, Any]] = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        prompts = [row.prompt for row in part for _ in (*row.chosen, *row.rejected)]
        texts = [text for row in part for text in (*row.chosen, *row.rejected)]
        names = set().union(*(row.columns for row in part)) if part else set()
        columns = {
            name: [row.columns.get(name) for row in part for _ in (*row.chosen, *row.rejected)]
            for name in sorted(names)
        }
        scores = checked_scores(scorer, scorer.score(prompts, texts, (), columns), prompts).tolist()
        position = 0
        for row in part:
            middle, end = position + len(row.chosen), position + len(row.chosen) + len(row.rejected)
            records.append(_record(row, scores[position:middle], scores[middle:end]))
            position = end
    return _summary(records, seed)


def _record(row: BenchRow, chosen: list[float], rejected: list[float]) -> dict[str, Any]:
    gap = np.subtract.outer(np.array(chosen), np.array(rejected))  # NaN where unscorable: neither won nor tied
    won = gap > 0
    styles = len(chosen) if len(chosen) > 1 else 0
    return {
        "subset": row.subset,
        "id": row.id,
        "scores_chosen": chosen,
        "scores_rejected": rejected,
        "results": float(won.mean()) if styles else float(won.all()),
        "ties": float((gap == 0).mean()),
        "unscorable": int(np.isnan([*chosen, *rejected]).sum()),
        "easy": float(won[np.tril_indices(styles, -1)].mean()) if styles else None,
        "normal": float(np.diag(won).mean()) if styles else None,
        "hard": float(won[np.triu_indices(styles, 1)].mean()) if styles else None,
    }


def _summary(records: list[dict[str, Any]], seed: int) -> BenchResult:
    if not records:
        raise DataError("reward-model accuracy: expected at least one row, found none")
    by_subset: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_subset.setdefault(record["subset"], []).append(record)
    subsets = {
        name: Accuracy(_estimate([r["results"] for r in found], seed, name), _mean([r["ties"] for r in found]))
        for name, found in by_subset.items()
    }
    sections = {
        name: section_accuracy(name, subsets)
        for name, members in SECTIONS.items()
        if any(m in subsets for m in members)
    }
    styled = [record for record in records if record["easy"] is not None]
    styles = {
        name: Accuracy(_estimate([r[name] for r in styled], seed, name), 0.0)
        for name in ("easy", "normal", "hard")
        if styled
    }
    whole = sections if len(sections) == len(SECTIONS) else None
    score = None if whole is None else _mean_of([s.estimate for s in whole.values()], [1.0] * len(whole))
    return BenchResult(subsets, sections, styles, score, records)


def section_accuracy(section: str, subsets: Mapping[str, Accuracy]) -> Accuracy:
    """Return the accuracy of a RewardBench section over those of its subsets that are there."""
    members = [name for name in SECTIONS[section] if name in subsets]
    estimates = [subsets[name].estimate for name in members]
    weights = [float(MATH_PRM_WEIGHT if name == "math-prm" else subsets[name].estimate.n) for name in members]
    ties = float(np.average([subsets[name].ties for name in members], weights=weights))
    return Accuracy(_mean_of(estimates, weights), ties, f"{len(members)}/{len(SECTIONS[section])}")


def _mean_of(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted mean of independent estimates; its half-widths are theirs, added in quadrature."""
    share = np.array(weights) / np.sum(weights)
    values = np.array([e.value for e in estimates])
    below = np.array([e.value - (e.value if e.low is None else e.low) for e in estimates])
    above = np.array([(e.value if e.high is None else e.high) - e.value for e in estimates])
    value = float(share @ values)
    low, high = value - np.sqrt(np.sum((share * below) ** 2)), value + np.sqrt(np.sum((share * above) ** 2))
    return Estimate(value, float(low), float(high), sum(e.n for e in estimates))


def _estimate(results: list[float], seed: int, name: str) -> Estimate:
    if all(result in (0.0, 1.0) for result in results):
        return stats.wilson_interval(int(sum(results)), len(results))
    return stats.mean_estimate(np.array(results), numpy_generator(seed, f"reward bench/{name}"))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def read_rows(path: str | Path) -> list[BenchRow]:
    """Read rows from JSONL, JSONL.gz or a JSON list: prompt, chosen, rejected, and where there are subset and id.

    The subset's default is the file's name, the id's the row's number. Where there is no prompt, it is the turns that
    the chosen and the rejected conversation begin with.

    Raises:
        DataError: a row that cannot be read, by file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of reward-model rows")
    rows = []
    for number, found in _objects(path):
        where = f"{path}, row {number}"
        if not isinstance(found, dict):
            raise DataError(f"{where}: expected an object, found {type(found).__name__}")
        for key in ("chosen", "rejected"):
            if key not in found:
                raise DataError(f"{where}: expected the keys prompt, chosen, rejected; {key!r} is missing")
        chosen, rejected = _texts(found["chosen"], f"{where}: chosen"), _texts(found["rejected"], f"{where}: rejected")
        if "prompt" in found:
            prompt = found["prompt"]
        else:
            prompt, chosen, rejected = _split(chosen, rejected, where)
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise DataError(f"{where}: prompt: expected text or messages, found {prompt!r:.60}")
        subset = str(found.get("subset", path.name.split(".")[0]))
        if subset.lower() == TIES and len(chosen) > 1:
            raise DataError(f"{where}: RewardBench 2's Ties subset needs a rule of its own, which is not implemented")
        if len(chosen) > 1 and len(chosen) != len(rejected):
            raise DataError(
                f"{where}: expected one chosen completion, or as many as rejected ones (styles), found "
                f"{len(chosen)} and {len(rejected)}"
            )
        columns = {k: v for k, v in found.items() if k not in ("prompt", "chosen", "rejected", "subset", "id")}
        rows.append(BenchRow(prompt, chosen, rejected, subset, str(found.get("id", number)), columns))
    return rows


def write_rows(path: str | Path, rows: Sequence[BenchRow]) -> None:
    """Write rows as JSONL (gzipped if the name ends in .gz), readable by `read_rows` and by RewardBench's tools."""
    path = Path(path)
    lines = []
    for row in rows:
        styles = len(row.chosen) > 1
        chosen = list(row.chosen) if styles or len(row.rejected) > 1 else row.chosen[0]
        rejected = list(row.rejected) if len(row.rejected) > 1 else row.rejected[0]
        whole = {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "subset": row.subset, "id": row.id}
        lines.append(json.dumps(whole | dict(row.columns), ensure_ascii=False) + "\n")
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _objects(path: Path) -> list[tuple[int, Any]]:
    """Return (line or position from 1, object) of each row."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as text: {error}") from None
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from None
    return found


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)


def _texts(value: Any, where: str) -> tuple[Text, ...]:
    """One text, one conversation, or a list of either."""
    if isinstance(value, str) or _is_conversation(value):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(v, str) or _is_conversation(v) for v in value):
        return tuple(value)
    raise DataError(f"{where}: expected text, messages or a list of them, found {value!r:.60}")


def _split(
    chosen: tuple[Text, ...], rejected: tuple[Text, ...], where: str
) -> tuple[Text, tuple[Text, ...], tuple[Text, ...]]:
    """Split an implicit prompt off two conversations: the turns that they share."""
    a, b = chosen[0], rejected[0]
    if len(chosen) != 1 or len(rejected) != 1 or isinstance(a, str) or isinstance(b, str):
        raise DataError(f"{where}: expected the keys prompt, chosen, rejected; 'prompt' is missing")
    shared = 0
    while shared < min(len(a), len(b)) - 1 and a[shared] == b[shared]:
        shared += 1
    if shared == 0:
        raise DataError(f"{where}: 'prompt' is missing, and chosen and rejected share no first turn")
    return list(a[:shared]), (list(a[shared:]),), (list(b[shared:]),)
