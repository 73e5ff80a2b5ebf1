"""Preference sets that reward models are judged on, as target distributions of pairs, read from gzipped JSON lines.

| folder | what | targets |
|---|---|---|
| `reward_subsets` | LLMBar, HumanEvalPack, XSTest, HHH, MT-Bench and FairEval with human labels | one a file |
| `rm_bench` | RM-Bench: three styles of each answer | same style; richer style rejected ("hard") |
| `judgebench` | JudgeBench: answers that are objectively right or wrong | two, and three groups of subjects |
| `autoj_scenarios` | Auto-J: human preferences in everyday scenarios | groups of scenarios |
| `pandalm_human` | PandaLM: three annotators of the same pairs | one an annotator |
| `hh_rlhf_harmless` | Anthropic's harmless dialogues | one |

Ties are dropped. `family` names targets that share prompts or a way of labelling: heads for a target are never trained
on anything of its family.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.data.feature_cache import Compute, cached_features
from steelyard.data.pair_tasks import Floats, PairTask, PreferencePair, json_rows
from steelyard.errors import DataError
from steelyard.train.progress import ProgressLine

Features = npt.NDArray[np.float32]

FOLDERS = ("reward_subsets", "rm_bench", "judgebench", "autoj_scenarios", "pandalm_human", "hh_rlhf_harmless")

FAMILIES = {
    "hep": "humaneval",
    "hhh": "hhh",
    "human": "human",
    "llmbar": "llmbar",
    "xstest": "xstest",
    "code": "humaneval",
    "chat": "alpacaeval",
    "safety-response": "xstest",
}
"""First word of a file of `reward_subsets`, or file of `rm_bench`, whose prompts come from the others -> family."""

SUBJECTS = {
    "exact": ("math", "physics", "computer science"),
    "life": ("biology", "health", "psychology"),
    "society": ("business", "economics", "other"),
}
"""JudgeBench has 22 rows of each subject of MMLU-Pro, too few to adapt and to test: they are grouped."""

SCENARIOS = {
    "code": ("code_correction_rewriting", "code_generation", "code_to_code_translation", "explaining_code"),
    "communication": ("brainstorming", "chitchat", "open_question", "planning", "recommendation", "roleplay"),
    "knowledge": (
        "analyzing_general", "counterfactual", "solving_exam_question_with_math", "solving_exam_question_without_math",
        "verifying_fact",
    ),
    "creative writing": (
        "writing_advertisement", "writing_blog_post", "writing_personal_essay", "writing_product_description",
        "writing_song_lyrics",
    ),
    "functional writing": (
        "functional_writing", "writing_cooking_recipe", "writing_job_application", "writing_legal_document",
        "writing_news_article", "writing_scientific_paper", "writing_technical_document",
    ),
    "rewriting": (
        "language_polishing", "note_summarization", "paraphrasing", "text_simplification", "text_summarization",
    ),
    "language tasks": (
        "data_analysis", "information_extraction", "keywords_extraction", "question_generation", "ranking",
        "title_generation", "topic_modeling",
    ),
}  # fmt: skip
"""Auto-J's scenarios have at most 24 pairs each: as targets they are grouped; other scenarios go to "other"."""


@dataclass(frozen=True)
class RewardTask(PairTask):
    """One target distribution, and what keeps it apart from others.

    Attributes:
        family: of targets that share prompts or labels; see the module.
        groups: [P], finer names of where each pair is from (scenario, application), for heads of groups.
    """

    family: str
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def length_differences(self) -> Floats:
        """How much longer the chosen completion is, [P]: log of the ratio of characters."""
        return np.array([np.log((1 + len(pair.chosen)) / (1 + len(pair.rejected))) for pair in self.pairs])


def read_reward_tasks(folder: str | Path) -> list[RewardTask]:
    """Return the targets of all folders that are in `folder`, in a fixed order.

    Raises:
        DataError: none of the folders is there, or a row lacks a field.
    """
    folder = Path(folder)
    readers = (_subsets, _rm_bench, _judgebench, _autoj, _pandalm, _hh)
    tasks = [
        task
        for name, reader in zip(FOLDERS, readers, strict=True)
        if (folder / name).is_dir()
        for task in reader(folder / name)
    ]
    if not tasks:
        raise DataError(f"{folder}: expected at least one of the folders {', '.join(FOLDERS)}, found none of them")
    return tasks


def texts_of(tasks: Iterable[RewardTask]) -> dict[str, list[tuple[str, str]]]:
    """Return the (prompt, completion) texts of each source, once each, in the order in which they come."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for task in tasks:
        texts = found.setdefault(task.source, {})
        for pair in task.pairs:
            texts[(pair.prompt, pair.chosen)] = texts[(pair.prompt, pair.rejected)] = None
    return {source: list(texts) for source, texts in found.items()}


def pair_features(
    tasks: Sequence[RewardTask], cache: str | Path, key: str, compute: Compute, quiet: bool = False
) -> dict[str, tuple[Features, Features]]:
    """Return features [P, D] of the chosen and of the rejected completions of each target, by its name.

    Args:
        tasks: all that `read_reward_tasks` returned: the texts of a source are cached together.
        cache: folder of `cached_features`.
        key: names the encoder and its limits.
        compute: features of some texts.
        quiet: show no progress.
    """
    texts = texts_of(tasks)
    features: dict[str, dict[tuple[str, str], Features]] = {}
    done = 0
    with ProgressLine("texts encoded", sum(map(len, texts.values())), quiet=quiet) as line:
        for source, rows in texts.items():
            told = functools.partial(_tell, line, done, source)
            features[source] = dict(zip(rows, cached_features(cache, key, rows, compute, told), strict=True))
            done += len(rows)
    return {
        task.name: (
            np.stack([features[task.source][pair.prompt, pair.chosen] for pair in task.pairs]),
            np.stack([features[task.source][pair.prompt, pair.rejected] for pair in task.pairs]),
        )
        for task in tasks
    }


def _tell(line: ProgressLine, before: int, source: str, done: int) -> None:
    line.advance_to(before + done, source)


def encode(data_dir: str | Path, encoder: str = "minilm") -> int:
    """Cache the features of every preference set in a folder and return how many texts they are.

    Args:
        data_dir: folder with the folders of this module.
        encoder: as in `nets.encoder.EncoderConfig`.
    """
    from steelyard.nets.encoder import EncoderConfig, load_encoder
    from steelyard.nets.lm import cache_folder

    tasks = read_reward_tasks(data_dir)
    network = load_encoder(EncoderConfig(encoder=encoder))
    pair_features(tasks, cache_folder() / "features", network.key, network.encode)
    return sum(map(len, texts_of(tasks).values()))


def published_scores(folder: str | Path) -> dict[str, tuple[str, float]]:
    """Return the published accuracies of a reward model of 2B parameters: name of the target -> (model, accuracy).

    Args:
        folder: the one given to `read_reward_tasks`. RewardBench's own figures are in `reward_model_reference_scores`;
            on JudgeBench they are counted from the scores that its authors published, on the rows that have them.
    """
    folder, found = Path(folder), {}
    scores = folder / "reward_model_reference_scores/rewardbench_per_subset.csv"
    model = "GRM-Gemma-2B-rewardmodel-ft"
    if scores.is_file():
        with scores.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found[row["subset"]] = (model, float(row[f"Ray2333/{model}"]))
    if (folder / "judgebench").is_dir():
        right: dict[str, list[float]] = {}
        for row in _rows(folder / "judgebench/pairs.jsonl.gz", "published_rm_scores", "source", "label"):
            pair = (row["published_rm_scores"] or {}).get(f"Ray2333_{model}")
            if pair is not None:
                margin = (pair[0] - pair[1]) * (1 if row["label"] == "A>B" else -1)
                right.setdefault(_judgebench_name(row["source"]), []).append(float(margin > 0) + 0.5 * (margin == 0))
        found.update({name: (model, float(np.mean(values))) for name, values in right.items()})
    return found


def _subsets(folder: Path) -> list[RewardTask]:
    tasks = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        name = file.name.removesuffix(".jsonl.gz")
        rows = [
            (row["prompt"], row["chosen"], row["rejected"], name) for row in _rows(file, "prompt", "chosen", "rejected")
        ]
        tasks.append(_task(name, FAMILIES.get(name.split("-")[0], name), f"reward_subsets/{name}", rows))
    return tasks


def _rm_bench(folder: Path) -> list[RewardTask]:
    tasks = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        name = file.name.removesuffix(".jsonl.gz")
        styles = {"": [(0, 0), (1, 1), (2, 2)], " hard": [(0, 1), (0, 2), (1, 2)]}
        for kind, pairs in styles.items():
            target = f"rm-bench {name}{kind}"
            rows = [
                (row["prompt"], row["chosen"][i], row["rejected"][j], target)
                for row in _rows(file, "prompt", "chosen", "rejected")
                for i, j in pairs
            ]
            tasks.append(_task(target, FAMILIES.get(name, name), f"rm_bench/{name}", rows))
    return tasks


def _judgebench(folder: Path) -> list[RewardTask]:
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in _rows(folder / "pairs.jsonl.gz", "source", "question", "response_A", "response_B", "label"):
        first, second = row["response_A"], row["response_B"]
        chosen, rejected = (first, second) if row["label"] == "A>B" else (second, first)
        rows = found.setdefault(_judgebench_name(row["source"]), [])
        rows.append((row["question"], chosen, rejected, f"judgebench {row['source']}"))
    return [_task(name, "judgebench", "judgebench", rows) for name, rows in sorted(found.items())]


def _judgebench_name(source: str) -> str:
    subject = source.removeprefix("mmlu-pro-")
    if subject == source:
        return f"judgebench {source}"
    return f"judgebench mmlu-pro {_group(subject, SUBJECTS)}"


def _autoj(folder: Path) -> list[RewardTask]:
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in _rows(folder / "pairs.jsonl.gz", "scenario", "prompt", "response_1", "response_2", "label"):
        if row["label"] == "tie":
            continue
        chosen, rejected = (row["response_1"], row["response_2"])[:: 1 if row["label"] == "1" else -1]
        rows = found.setdefault(f"auto-j {_group(row['scenario'], SCENARIOS)}", [])
        rows.append((row["prompt"], chosen, rejected, f"auto-j {row['scenario']}"))
    return [_task(name, "auto-j", "auto-j", rows) for name, rows in sorted(found.items())]


def _pandalm(folder: Path) -> list[RewardTask]:
    found: dict[str, list[tuple[str, str, str, str]]] = {f"pandalm annotator {k}": [] for k in (1, 2, 3)}
    for row in _rows(folder / "testset.jsonl.gz", "motivation_app", "instruction", "input", "response1", "response2"):
        prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        for k, rows in enumerate(found.values(), start=1):
            label = row[f"annotator{k}"]
            if label != 0:
                chosen, rejected = (row["response1"], row["response2"])[:: 1 if label == 1 else -1]
                rows.append((prompt, chosen, rejected, f"pandalm {row['motivation_app']}"))
    return [_task(name, "pandalm", "pandalm", rows) for name, rows in found.items()]


def _hh(folder: Path) -> list[RewardTask]:
    rows, turn = [], "\n\nAssistant:"
    for row in _rows(folder / "test.jsonl.gz", "chosen", "rejected"):
        shared = _shared_prefix(row["chosen"], row["rejected"])
        begin = row["chosen"].rfind(turn, 0, shared + 1) + len(turn)
        if begin >= len(turn):
            texts = (row["chosen"][:begin], row["chosen"][begin:].strip(), row["rejected"][begin:].strip())
            rows.append((*texts, "hh harmless"))
    return [_task("hh harmless", "hh", "hh_rlhf_harmless", rows)]


def _shared_prefix(first: str, second: str) -> int:
    """Return how many characters two texts share at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _group(name: str, groups: Mapping[str, Sequence[str]]) -> str:
    return next((group for group, names in groups.items() if name in names), "other")


def _task(name: str, family: str, source: str, rows: Sequence[tuple[str, str, str, str]]) -> RewardTask:
    """Return a target of (prompt, chosen, rejected, group) rows; pairs of equal or empty completions are dropped."""
    # a completion of PandaLM is the value false, not a text
    pairs = [(PreferencePair(row[0], str(row[1]), str(row[2])), row[3]) for row in rows]
    kept = [(p, group) for p, group in pairs if p.chosen != p.rejected and p.chosen.strip() and p.rejected.strip()]
    if not kept:
        raise DataError(f"{source}: expected pairs of {name!r}, found none")
    return RewardTask(name, source, tuple(p for p, _ in kept), family, tuple(group for _, group in kept))


def _rows(file: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, which must have these keys."""
    for row, where in json_rows(file):
        for key in keys:
            if key not in row:
                raise DataError(f"{where}: expected {key!r}, found {', '.join(row)}")
        yield row
