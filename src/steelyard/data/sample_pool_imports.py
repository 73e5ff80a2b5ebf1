"""Sample pools that others made: read from their files, with rewards, answers, strata and other scores where known.

| reader | prompts x samples | reward | more |
|---|---|---|---|
| `game24` | puzzles x 100 of GPT-4, two prompting styles | exact arithmetic | how many people solve it |
| `humaneval` | problems x 100 of CodeGen-16B | unit tests | |
| `math_best_of_8` | problems x 8 | correct | answers, level, column `rm_score` |
| `gsm8k` | questions x 4 systems | correct | answers, column `systems` |
| `alpaca_eval` | instructions x models | a judge's preference over a baseline | column `models` |

Your own files: `data/sample_pool_jsonl.py`. The samples of `gsm8k` and `alpaca_eval` are those of different models, so
a "fresh sample" means that of a model drawn at random.

Lengths are counted in words and signs, and the end, unless a tokenizer is given; then the pool holds token ids too.
Temperatures are not recorded by any of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.sample_pool_jsonl import as_pool, pieces, prefix, rows_of
from steelyard.data.tokenizer import Tokenizer
from steelyard.errors import DataError

__all__ = ["alpaca_eval", "game24", "gsm8k", "humaneval", "math_best_of_8", "pieces", "prefix"]

Judge = Literal["p_vs_gpt4turbo", "gpt4_vs_davinci003"]


def game24(
    folder: str | Path, prompting: Literal["cot", "standard"] = "cot", tokenizer: Tokenizer | None = None
) -> SamplePool:
    """Read the samples of GPT-4 on the game of 24 (samples.jsonl.gz)."""
    file = _file(folder, "samples.jsonl")
    groups: dict[int, list[dict[str, Any]]] = {}
    for _, row in rows_of(file, ("prompting", "idx", "puzzle", "sample", "output", "correct")):
        if row["prompting"] == prompting:
            groups.setdefault(row["idx"], []).append(row)
    items = []
    for number, rows in sorted(groups.items()):
        rows.sort(key=lambda row: int(row["sample"]))
        people = float(str(rows[0].get("solved_rate_human", "nan")).rstrip("%")) / 100
        columns = {"id": number, "solved_by_people": None if math.isnan(people) else people}
        outputs = [row["output"] for row in rows]
        answers = [_game24_answer(text) for text in outputs]
        correct = [row["correct"] for row in rows]
        items.append(_item(rows[0]["puzzle"], outputs, correct, tokenizer, answers=answers, columns=columns))
    return as_pool(items, f"{file}, {prompting}")


def humaneval(folder: str | Path, tokenizer: Tokenizer | None = None) -> SamplePool:
    """Read the samples of CodeGen-16B on HumanEval (problems_and_samples.jsonl.gz); no code in them is run."""
    file = _file(folder, "problems_and_samples.jsonl")
    return as_pool(
        [
            _item(row["prompt"], row["samples"], row["passed"], tokenizer, columns={"id": row["task_id"]})
            for _, row in rows_of(file, ("task_id", "prompt", "samples", "passed"))
        ],
        str(file),
    )


def math_best_of_8(folder: str | Path, tokenizer: Tokenizer | None = None) -> SamplePool:
    """Read 8 samples per MATH problem with a reward model's scores as column `rm_score` (samples.jsonl.gz)."""
    file = _file(folder, "samples.jsonl")
    items = []
    for _, row in rows_of(file, ("idx", "question", "gt", "level", "samples", "pred", "correct", "rm_score")):
        scores = [float(score[0] if isinstance(score, list) else score) for score in row["rm_score"]]
        columns = {"id": row["idx"], "solution": row["gt"], "rm_score": scores}
        items.append(
            _item(
                row["question"], row["samples"], row["correct"], tokenizer,
                answers=[str(answer) for answer in row["pred"]], stratum=row["level"], columns=columns,
            )
        )  # fmt: skip
    return as_pool(items, str(file))


def gsm8k(folder: str | Path, tokenizer: Tokenizer | None = None) -> SamplePool:
    """Read one solution of each of four systems per GSM8K question (example_model_solutions.jsonl.gz)."""
    file = _file(folder, "example_model_solutions.jsonl")
    items = []
    for line, row in rows_of(file, ("id", "question")):
        systems = [name for name, value in row.items() if isinstance(value, dict) and "solution" in value]
        if not systems:
            raise DataError(f"{file}, line {line}: expected systems with a 'solution' each, found {sorted(row)}")
        texts = [row[name]["solution"] for name in systems]
        columns = {"id": row["id"], "systems": systems}
        items.append(
            _item(
                row["question"], texts, [row[name]["is_correct"] for name in systems], tokenizer,
                answers=[_last_line_answer(text) for text in texts], columns=columns,
            )
        )  # fmt: skip
    return as_pool(items, str(file))


def alpaca_eval(
    folder: str | Path,
    judge: Judge = "p_vs_gpt4turbo",
    models: Sequence[str] | None = None,
    exclude: Sequence[str] = ("NullModel",),
    tokenizer: Tokenizer | None = None,
) -> SamplePool:
    """Read the outputs of many models on AlpacaEval prompts with a judge's preference as reward.

    Args:
        folder: prompts.jsonl.gz and outputs.jsonl.gz.
        judge: column of the reward; each has a baseline of its own.
        models: whose outputs; None: all that this judge compared on every prompt.
        exclude: models to leave out; by default a constant text that was made to deceive the judge.
        tokenizer: counts tokens.

    Raises:
        DataError: a model that was asked for was not judged on every prompt.
    """
    file = _file(folder, "outputs.jsonl")
    prompts = {row["id"]: row for _, row in rows_of(_file(folder, "prompts.jsonl"), ("id", "source", "prompt"))}
    judged: dict[str, dict[int, tuple[str, float]]] = {}
    for _, row in rows_of(file, ("model", "id", "output")):
        if row.get(judge) is not None and row["id"] in prompts:
            judged.setdefault(row["model"], {})[row["id"]] = (row["output"], float(row[judge]))
    whole = sorted(name for name, found in judged.items() if len(found) == len(prompts) and name not in exclude)
    for name in models or ():
        if name not in whole:
            found = len(judged.get(name, {}))
            raise DataError(f"{file}: model {name!r}: expected {judge} on {len(prompts)} prompts, found {found}")
    names = list(models or whole)
    if not names:
        raise DataError(f"{file}: expected models with {judge} on all {len(prompts)} prompts, found none")
    items = []
    for number, prompt in prompts.items():
        outputs, rewards = zip(*(judged[name][number] for name in names), strict=True)
        columns = {"id": number, "models": names}
        items.append(_item(prompt["prompt"], outputs, rewards, tokenizer, stratum=prompt["source"], columns=columns))
    return as_pool(items, f"{file}, {judge}")


def _item(
    prompt: str,
    texts: Sequence[str],
    rewards: Sequence[Any],
    tokenizer: Tokenizer | None,
    **known: Any,
) -> PromptSamples:
    tokens = () if tokenizer is None else tuple(tuple(tokenizer.completion(prompt, text)) for text in texts)
    lengths = [len(ids) for ids in tokens] if tokens else [pieces(text) + 1 for text in texts]
    if "answers" in known:
        known["answers"] = tuple(known["answers"])
    return PromptSamples(
        prompt,
        np.array([math.nan if reward is None else float(reward) for reward in rewards]),
        np.array(lengths, np.int64),
        tuple(texts),
        tokens,
        prompt_tokens=() if tokenizer is None else tuple(tokenizer.prompt(prompt)),
        finished=np.ones(len(tokens), np.bool_) if tokens else None,
        **known,
    )


def _file(folder: str | Path, name: str) -> Path:
    for file in (Path(folder) / f"{name}.gz", Path(folder) / name):
        if file.is_file():
            return file
    raise DataError(f"{folder}: expected {name}.gz or {name} in it, found neither")


def _game24_answer(text: str) -> str:
    """Return the expression after "Answer:", without spaces and result; "" for none."""
    _, found, answer = text.rpartition("Answer:")
    expression = answer.partition("=")[0].replace(" ", "").strip() if found else ""
    return "" if expression.lower() == "none" else expression


def _last_line_answer(text: str) -> str:
    """Return what stands after "A:" in the last line; "" for none."""
    found = re.match(r"A:\s*(.+)", text.strip().rpartition("\n")[2])
    return found[1].strip().replace(",", "") if found else ""
