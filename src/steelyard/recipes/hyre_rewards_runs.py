"""Scoring of E3: one head set for the targets of a block of families. The study: `recipes/hyre_rewards.py`.

Families come in blocks of two. Heads for the targets of a block are trained on all other blocks. Their settings are the
best ones for the targets of those other blocks, each scored with heads that saw neither its own block nor the block
they are chosen for (nested cross-validation).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from steelyard.adapt.base import Floats, Method, Support
from steelyard.adapt.choose import ETA_GRID, HeldOutTask, Single, Uniform, draw, scores
from steelyard.adapt.finetune import EQUAL, WIDE, FineTuneHead
from steelyard.adapt.losses import ZeroOne
from steelyard.adapt.population import GaussianHeads, HeadMAP
from steelyard.adapt.reweight import HyRe as Reweight
from steelyard.data.labelled import LabelledData
from steelyard.data.pair_tasks_rewards import RewardTask, read_reward_tasks
from steelyard.errors import ConfigError
from steelyard.recipes.hyre_rewards_heads import (
    FEATURES,
    MAIN,
    SHOTS,
    WITH_LENGTH,
    RewardStudy,
    held_out,
    prompts_of,
    rows_of,
    train,
    training_data,
    with_length,
)
from steelyard.rng import numpy_generator

SINGLE, UNIFORM, HYRE, GAUSSIAN, MAP = "single", "uniform", "HyRe", "Gaussian over heads", "head MAP"
LONGER, LENGTH = "longer wins", "length, sign from labels"
TUNED, TUNED_EQUAL = "fine-tune head, wide tuning", "fine-tune head, as many settings as HyRe"
BEST = "best head (oracle)"
BLOCK = 2
"""Families in a block."""

Grid = Mapping[str, Sequence[float]]
GAUSSIAN_GRID: Grid = {"heads_weight": (0.1, 1, 10, 100), "feature_weight": (0, 1e-3, 1e-2, 1e-1, 1, 10)}
MAP_GRID: Grid = {"variance": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)}
ADAPTED: Mapping[str, tuple[Callable[..., Method], Grid]] = {
    HYRE: (Reweight, {"eta": ETA_GRID}),
    GAUSSIAN: (GaussianHeads, GAUSSIAN_GRID),
    TUNED: (FineTuneHead, WIDE),
    TUNED_EQUAL: (FineTuneHead, EQUAL),
    MAP: (HeadMAP, MAP_GRID),
}
"""Methods that adapt, and the settings among which they choose."""
OF_ALL = (HYRE, GAUSSIAN)
"""The ones that are run on every head set; the others do not depend on the heads."""


@dataclass(frozen=True)
class RewardJob:
    """One head set, trained without one block (to test on it), or without two (to choose settings).

    Attributes:
        study: what is run.
        out: its folder.
        head_set: which heads.
        blocks: numbers of the blocks left out.
        settings: JSON of the chosen settings of each method, where the block is tested.
    """

    study: RewardStudy
    out: str
    head_set: str
    blocks: tuple[int, ...]
    settings: str = ""

    @property
    def name(self) -> str:
        """Head set and blocks."""
        return f"{self.head_set} without {' '.join(map(str, self.blocks))}"


def blocks_of(tasks: Sequence[RewardTask]) -> list[list[str]]:
    """Return the families in blocks, in their order.

    Raises:
        ConfigError: there are fewer than three blocks: two are left out, and something must be left to train on.
    """
    families = list(dict.fromkeys(task.family for task in tasks))
    blocks = [families[i : i + BLOCK] for i in range(0, len(families), BLOCK)]
    if len(blocks) < 3:
        raise ConfigError(f"expected at least {2 * BLOCK + 1} families of targets, found {', '.join(families)}")
    return blocks


def jobs_of(config: RewardStudy, out: Path, tasks: Sequence[RewardTask]) -> list[RewardJob]:
    """Return the jobs that choose settings: one a head set and two blocks."""
    numbers = range(len(blocks_of(tasks)))
    return [
        RewardJob(config, str(out), heads, both)
        for heads in config.head_sets
        for both in itertools.combinations(numbers, 2)
    ]


def evaluation_jobs(config: RewardStudy, out: Path, rows: Sequence[Mapping[str, Any]]) -> list[RewardJob]:
    """Return the jobs that test, one a head set and block, with the settings that were best on other blocks."""
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for row in rows:
        settings = found.setdefault((row["heads"], row["for"], row["method"]), {})
        settings.setdefault(row["settings"], []).append(row["accuracy"])
    best: dict[tuple[str, int], dict[str, str]] = {}
    for (heads, block, method), settings in found.items():
        chosen = max(settings, key=lambda one: float(np.mean(settings[one])))
        best.setdefault((heads, block), {})[method] = chosen
    return [RewardJob(config, str(out), heads, (block,), json.dumps(chosen)) for (heads, block), chosen in best.items()]


def tune(job: RewardJob) -> list[dict[str, Any]]:
    """Train without two blocks and score every setting on both: on one of them to choose for the other."""
    targets, examples, _, _ = prepare(job)
    assert job.study.data is not None
    blocks = blocks_of(read(job.study.data))
    rows = []
    for task in targets:
        own = next(number for number in job.blocks if task.family in blocks[number])
        other = next(number for number in job.blocks if number != own)
        for name in methods_of(job.head_set):
            for settings, method in candidates(name):
                found = scores(method, examples[task.name], SHOTS, "preference", "accuracy", job.study.tuning_draws)
                rows.append(
                    {"heads": job.head_set, "for": other, "target": task.name, "method": name, "settings": settings,
                     "accuracy": float(found.mean())}
                )  # fmt: skip
    return rows


def methods_of(head_set: str) -> tuple[str, ...]:
    """Return the methods that adapt which are run on a head set."""
    return tuple(ADAPTED) if head_set == MAIN else OF_ALL


def candidates(name: str) -> Iterator[tuple[str, Method]]:
    """Yield every setting of a method, as JSON, and the method with it."""
    family, grid = ADAPTED[name]
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        yield json.dumps(settings), family(**settings)


def at_edge(name: str, settings: str) -> list[str]:
    """Return which of the chosen settings lie at an edge of their grid; 0 is none, for nothing lies below it."""
    grid, chosen = ADAPTED[name][1], json.loads(settings)
    return [
        key for key, value in chosen.items() if len(grid[key]) > 1 and value and value in (grid[key][0], grid[key][-1])
    ]


def evaluate(job: RewardJob) -> list[dict[str, Any]]:
    """Train without one block and score its targets."""
    targets, examples, data, dropped = prepare(job)
    config, chosen = job.study, json.loads(job.settings)
    methods: dict[str, Method] = {SINGLE: Single(), UNIFORM: Uniform()}
    methods |= {name: ADAPTED[name][0](**json.loads(settings)) for name, settings in chosen.items()}
    rows: list[dict[str, Any]] = []
    for name, settings in chosen.items():
        edge = " ".join(at_edge(name, settings))
        values = {"heads": job.head_set, "block": job.blocks[0], "method": name, "settings": settings, "at_edge": edge}
        rows.append({"kind": "setting", "values": values})
    for task in targets:
        identity = {"heads": job.head_set, "family": task.family, "target": task.name}
        found = score(examples[task.name], methods, config)
        if job.head_set in (MAIN, WITH_LENGTH):
            facts, of_length = surface(task, examples[task.name], methods[HYRE], config)
            facts |= {"training_pairs": len(data), "training_groups": data.num_groups, "dropped": dropped}
            rows.append({"kind": "target", "values": identity | facts})
            found += of_length
        rows += [{"kind": "score", "values": identity | values} for values in found]
    return rows


@functools.lru_cache(maxsize=1)
def read(folder: str) -> tuple[RewardTask, ...]:
    """Return all tasks; every job of a process needs the same ones."""
    return tuple(read_reward_tasks(folder))


def prepare(job: RewardJob) -> tuple[list[RewardTask], dict[str, HeldOutTask], LabelledData, int]:
    """Train without the blocks of a job; return its targets, what heads say of them, training data, pairs dropped."""
    config = job.study
    assert config.data is not None
    tasks = read(config.data)
    arrays = safetensors.numpy.load_file(Path(job.out) / FEATURES)
    features = {task.name: (arrays[f"{task.name}/a"], arrays[f"{task.name}/b"]) for task in tasks}
    if job.head_set == WITH_LENGTH:
        features = with_length(tasks, features, config.length_weight)
    left = {family for number in job.blocks for family in blocks_of(tasks)[number]}
    targets = [task for task in tasks if task.family in left]
    data, dropped = training_data([task for task in tasks if task.family not in left], targets, features, config)
    learner = train(job.head_set, data, config)
    examples = {task.name: held_out(task, features[task.name], learner, config) for task in targets}
    return targets, examples, data, dropped


def score(target: HeldOutTask, methods: Mapping[str, Method], config: RewardStudy) -> list[dict[str, Any]]:
    """Return one row a method and n: mean accuracy over draws, its deviation, and how many pairs were scored."""
    rows = []
    for name, method in methods.items():
        for n in config.shots:
            found = scores(method, target, n, "preference", "accuracy", config.draws)
            rows.append({"method": name, "n": n, "accuracy": float(found.mean()), "deviation": float(found.std())})
    members = target.examples.members[:, :, 0]
    best = float(((members > 0) + 0.5 * (members == 0)).mean(0).max())
    return [*rows, {"method": BEST, "n": 0, "accuracy": best, "deviation": 0.0}]


def surface(
    task: RewardTask, target: HeldOutTask, hyre: Method, config: RewardStudy
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what length alone explains: facts of a target, and rows of the rule "longer wins" and of its sign learned.

    The correlations are about 0, for the order of a pair means nothing: of what a function says of pairs with how much
    longer their first is.
    """
    rows = rows_of(task, config)
    length = task.length_differences[rows]
    rule = HeldOutTask(
        Support(np.stack([length, -length], 1)[:, :, None], target.examples.labels),
        sources=target.sources,
        name=task.name,
    )
    found = score(rule, {LONGER: Single(), LENGTH: Reweight(loss=ZeroOne())}, config)[:-1]
    members = target.examples.members
    of_length, effective = [], []
    for number in range(config.draws):
        support, test = draw(target, SHOTS, numpy_generator(0, f"adapt/draw/{target.name}", number))
        posterior = hyre.begin(members.shape[1]).update(target.examples.take(support))
        outputs = posterior.combination().apply(members[test])[:, 0]
        of_length.append(alignment(outputs, length[test]))
        effective.append(posterior.diagnostics()["ess"])
    facts = {
        "pairs": len(task),
        "scored_pairs": len(rows),
        "prompts": len(np.unique(prompts_of(task))),
        "longer_chosen": float(np.mean((length > 0) + 0.5 * (length == 0))),
        "length_in_single": alignment(members[:, 0, 0], length),
        "length_in_uniform": alignment(members[:, :, 0].mean(1), length),
        "length_in_hyre": float(np.mean(of_length)),
        "effective_heads": float(np.mean(effective)),
    }
    return facts, found


def alignment(a: Floats, b: Floats) -> float:
    """Return the correlation about 0 of a and b [N]; 0 where one says nothing."""
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0
