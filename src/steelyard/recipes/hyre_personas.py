"""E1, E1b, E4 and E6 of HyRe: unseen users, a few labelled pairs of each.

E1: users mostly agree. E1b: a share of the training users has the opposite taste, and both signs of every unseen user
are targets, so that no single model can serve them. E4: which pairs to ask about. E6: which head sets re-weighting
helps at all, and whether the diversity meter says so before a label is spent.

Users are split into those whose pairs train the heads, those on whom every setting is chosen, and the unseen ones
(`recipes/hyre_population.py`); adaptation and test pairs of a user share no item.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from rich.console import Console

from steelyard.adapt.base import Support
from steelyard.adapt.losses import BradleyTerry
from steelyard.adapt.query import How, Pool, acquire, next_query
from steelyard.adapt.reweight import HyRe
from steelyard.bench.diversity import measure
from steelyard.bench.rows import write_rows
from steelyard.config import Config, require_range
from steelyard.data.generated_tastes import generate_tastes
from steelyard.data.pair_tasks import Taste
from steelyard.recipes import hyre_ablations
from steelyard.recipes.hyre_adapting import Reweighting, ThenMAP, Trials, all_ways, auto, best_head, simplex, still
from steelyard.recipes.hyre_heads import HeadSpec, Seen, Training, see, train_heads
from steelyard.recipes.hyre_jobs import Row, begin, carry_out
from steelyard.recipes.hyre_networks import NETWORK, network_rows, network_table
from steelyard.recipes.hyre_personas_page import (
    HYRE,
    MAIN,
    ORACLE,
    SINGLE,
    UNIFORM,
    Scores,
    findings,
    sections,
)
from steelyard.recipes.hyre_population import Population, Split, load_users, make_split
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section
from steelyard.rng import numpy_generator

USERS = "users.safetensors"
QUERIES: tuple[How, ...] = ("random", "entropy", "variance", "bald", "joint_bald")
ASKED = 5


@dataclass(frozen=True)
class PersonaStudy(Config):
    """Unseen users: who they are, and how heads are trained."""

    population: Population = field(default_factory=Population)
    """Users and their split."""
    conflict: float = 0.3
    """Share of training users with the opposite taste in E1b."""
    epochs: int = 20
    """Of training head sets with a trunk."""
    l2: float = 10.0
    """Penalty of heads that are solved exactly."""
    head_counts: tuple[int, ...] = (10, 30, 100, 200)
    """K: numbers of heads that are compared."""
    head_set_splits: int = 3
    """Splits on which head sets other than that of the claims are compared."""
    network_splits: int = 1
    """Splits on which a whole network is fine-tuned, which is slow."""
    network_shots: tuple[int, ...] = (5, 20)
    """n there."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, 1, "conflict")
        require_range(self, 0, 1e9, "l2")


PRESETS: dict[str, PersonaStudy] = {
    "tiny": PersonaStudy(
        Population(splits=3, train=24, validation=8, targets=16, test_pairs=100, draws=3),
        epochs=8,
        head_counts=(10, 30),
        network_splits=1,
        network_shots=(5,),
    ),
    "small": PersonaStudy(Population(source="personas")),
    "paper": PersonaStudy(Population(source="personas", splits=10, train=75, validation=20, targets=40, draws=20)),
}
"""tiny: generated users; small: the personas that were published in part (90); paper: all 135 of them."""


@dataclass(frozen=True)
class PersonaJob:
    """One split in one world with one head set.

    Attributes:
        config: of the study.
        out: its folder.
        split: number.
        spec: the head set.
        conflict: whether users conflict.
    """

    config: PersonaStudy
    out: str
    split: int
    spec: HeadSpec
    conflict: bool

    @property
    def name(self) -> str:
        """What the progress line says."""
        return f"split {self.split}, {self.spec.name}{', conflict' if self.conflict else ''}"


def run(config: PersonaStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes rows.csv (one row a split, world, head set, method, n and target), settings.csv, queries.csv and
    diversity.csv into `out`.

    Raises:
        ConfigError: the folder holds a study with other settings; personas without a folder.
        DataError: too few users.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    if config.population.source == "personas" and config.population.data is None:
        text = "Not run: this size needs persona statements; give their folder: --data DIR. Size tiny generates users."
        return [Section("E1: unseen users").text(text)], []
    begin(out, config)
    if config.population.source == "personas" and not (out / USERS).exists():
        _keep_users(load_users(config.population, console), out)
    main, *others = hyre_ablations.head_sets(config.head_counts)
    splits = range(config.population.splits)
    wanted = [
        *((split, main, conflict) for split in splits for conflict in (False, True)),
        *((split, spec, False) for split in splits[: config.head_set_splits] for spec in others),
        *((split, NETWORK, conflict) for split in splits[: config.network_splits] for conflict in (False, True)),
    ]
    jobs = [PersonaJob(config, str(out), split, spec, conflict) for split, spec, conflict in wanted]
    found = carry_out(jobs, work, out, "unseen users", workers)
    kinds = {
        kind: [row["values"] for row in found if row["kind"] == kind]
        for kind in ("rows", "settings", "queries", "diversity")
    }
    for kind, rows in kinds.items():
        write_rows(out / f"{kind}.csv", rows)
    page = [
        *sections(config.population, kinds),
        *hyre_ablations.sections(kinds, config.head_counts, config.head_set_splits),
    ]
    for place, world in enumerate(("agree", "conflict")):
        table = network_table(Scores(kinds["rows"]), world, config.network_shots)
        if table is not None:
            page[place].table(table)
    return page, findings(kinds)


def _keep_users(tastes: list[Taste], out: Path) -> None:
    arrays: dict[str, Any] = {}
    for number, taste in enumerate(tastes):
        arrays[f"{number:04d}/{taste.name}/features"] = taste.features
        arrays[f"{number:04d}/{taste.name}/liked"] = taste.liked
    safetensors.numpy.save_file(arrays, out / f"{USERS}.part")
    (out / f"{USERS}.part").rename(out / USERS)


def _users(config: PersonaStudy, out: Path, split: int) -> list[Taste]:
    if config.population.source == "generated":
        return generate_tastes(config.population.tastes, split)
    arrays = safetensors.numpy.load_file(out / USERS)
    names = sorted({name.rsplit("/", 1)[0] for name in arrays})
    return [Taste(name.split("/", 1)[1], arrays[f"{name}/features"], arrays[f"{name}/liked"]) for name in names]


@functools.lru_cache(maxsize=1)
def _split(config: PersonaStudy, out: str, number: int) -> Split:
    """Return a split, and keep it: the next job of this process is most often of the same one."""
    return make_split(_users(config, Path(out), number), config.population, number)


def work(job: PersonaJob) -> list[Row]:
    """Train one head set, choose settings on validation users, and try the ways of adapting on unseen users."""
    config = job.config
    split = _split(config, job.out, job.split)
    users = split.validation, split.targets
    if job.conflict:
        split, users = split.with_conflict(config.conflict), (users[0].both_signs(), users[1].both_signs())
    training = Training(epochs=config.epochs, l2=config.l2)
    common = {"split": job.split, "world": "conflict" if job.conflict else "agree"}
    if job.spec == NETWORK:
        return network_rows(split, training, users, config.network_shots, common)
    heads = train_heads(job.spec, split, training)
    trials = Trials({**common, "heads": job.spec.name}, see(heads, users[0]), see(heads, users[1]))
    if job.spec.heads.pooled:
        trials.add(SINGLE, 0, still(trials.targets, "single"))
    found = _reweight(trials, config.population.shots)
    if job.spec.name != MAIN:
        return [*trials.rows, _meter(trials)]
    shots = config.population.shots
    settings = {HYRE: found} | {way.name: {n: trials.tune(way, n) for n in shots} for way in [*all_ways(), simplex()]}
    etas = {n: float(found[n]["eta"]) for n in shots}
    for way in (ThenMAP(etas), auto(settings), auto(settings, 0.0)):
        for n in shots:
            trials.tune(way, n)
    hyre_ablations.switch(trials, heads.scale, shots)
    if job.conflict:
        return trials.rows
    rows = [*trials.rows, _meter(trials), *_queries(job, trials.targets, etas)]
    for fewer in hyre_ablations.fewer_users(trials, config.head_counts):
        _reweight(fewer, shots)
        rows += [*fewer.rows, _meter(fewer)]
    return rows


def _reweight(trials: Trials, shots: Sequence[int]) -> dict[int, dict[str, float]]:
    """Add what every head set has: its mean, its best head, HyRe. Return HyRe's settings for every n."""
    trials.add(UNIFORM, 0, still(trials.targets, "uniform"))
    trials.add(ORACLE, 0, best_head(trials.targets))
    for n in shots:
        trials.test(Reweighting(), n, {"eta": 1.0}, "HyRe, eta 1")
    return {n: trials.tune(Reweighting(), n) for n in shots}


def _meter(trials: Trials) -> Row:
    """Return the diversity meter, read on validation users."""
    numbers = measure(_groups(trials.validation), "preference").to_dict()
    return {"kind": "diversity", "values": {**trials.common, **numbers}}


def _groups(seen: Seen) -> list[Support]:
    """Return the test pairs of every user as examples."""
    return [
        Support(members[..., None], labels) for members, labels in zip(seen.test_members, seen.test_labels, strict=True)
    ]


def _queries(job: PersonaJob, seen: Seen, etas: Mapping[int, float]) -> list[Row]:
    """Return the accuracy after each of a few answers, for every criterion; each answer re-weights before the next."""
    eta = etas.get(ASKED, next(iter(etas.values())))
    rows: list[Row] = []
    for user, name in enumerate(seen.names):
        for draw in range(min(2, seen.labels.shape[1])):
            pool = Pool(seen.members[user, draw][..., None], "preference")
            for how in QUERIES:
                generator = numpy_generator(job.split, f"hyre/queries/{how}", 2 * user + draw)
                posterior = HyRe(BradleyTerry(), eta=eta).begin(seen.members.shape[3])
                asked = np.zeros(seen.labels.shape[2], bool)
                most = min(ASKED, len(asked))
                # of one question joint BALD is BALD: it chooses all questions before the first answer
                batch = (
                    acquire(pool, posterior.weights(), most, how, "preference", generator)
                    if how == "joint_bald"
                    else None
                )
                for n in range(1, most + 1):
                    weights = posterior.weights()
                    row = (
                        next_query(pool, weights, asked, how, "preference", generator)
                        if batch is None
                        else int(batch[n - 1])
                    )
                    asked[row] = True
                    example = Support(seen.members[user, draw, row][None, :, None], seen.labels[user, draw, row][None])
                    posterior = posterior.update(example)
                    outputs = seen.test_members[user] @ posterior.weights()
                    right = np.sign(outputs) * (2 * seen.test_labels[user] - 1)
                    accuracy = float((right > 0).mean() + 0.5 * (right == 0).mean())
                    values = {
                        "split": job.split,
                        "how": how,
                        "n": n,
                        "target": name,
                        "draw": draw,
                        "accuracy": accuracy,
                    }
                    rows.append({"kind": "queries", "values": values})
    return rows


def with_data(config: PersonaStudy, data: str | None) -> PersonaStudy:
    """Return the study with its folder of personas."""
    return replace(config, population=replace(config.population, data=data))
