"""E1, E1b, E4 and E6 of HyRe: unseen users, a few labelled pairs of each.

E1: users mostly agree. E1b: a share of the training users has the opposite taste, and both signs of every unseen user
are targets, so that no single model can serve them. E4: which pairs to ask about. E6: which head sets re-weighting
helps at all, and whether the diversity meter says so before a label is spent.

Users are split into those whose pairs train the heads, those on whom every setting is chosen, and the unseen ones
(`recipes/hyre_population.py`); adaptation and test pairs of a user share no item.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from steelyard.nets.ensemble import HeadsConfig
from steelyard.recipes.hyre_adapting import Reweighting, ThenMAP, all_ways, best_head, choose, simplex, still
from steelyard.recipes.hyre_heads import HeadSpec, Seen, Training, see, train_heads
from steelyard.recipes.hyre_jobs import Row, begin, carry_out
from steelyard.recipes.hyre_personas_page import MAIN, findings, sections
from steelyard.recipes.hyre_population import Population, load_users, make_split
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

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, 1, "conflict")
        require_range(self, 0, 1e9, "l2")


def head_sets() -> tuple[HeadSpec, ...]:
    """Return the head sets that are compared; the first is the one of the claims."""
    return (
        HeadSpec(MAIN),
        HeadSpec("user heads", heads=HeadsConfig(pooled=False)),
        HeadSpec("cluster heads, pooled", sees="one cluster", heads=HeadsConfig(num_heads=50)),
        HeadSpec("some users each, pooled", sees="some users"),
        HeadSpec("some users each, 25 heads", sees="some users", heads=HeadsConfig(num_heads=25)),
        HeadSpec("some users each, 10 heads", sees="some users", heads=HeadsConfig(num_heads=10)),
        HeadSpec("+-PCA, pooled", heads=HeadsConfig(kind="pca", num_heads=64)),
        HeadSpec("random directions, pooled", heads=HeadsConfig(kind="gaussian")),
        HeadSpec("shared base", "trunk", "everything"),
        HeadSpec("shared base, prior 1", "trunk", "everything", HeadsConfig(prior="mlp", prior_scale=1.0)),
        HeadSpec("shared base, prior 5", "trunk", "everything", HeadsConfig(prior="mlp", prior_scale=5.0)),
        HeadSpec("shared base, user heads", "trunk", "one user", HeadsConfig(init_scale=0.0)),
    )


PRESETS: dict[str, PersonaStudy] = {
    "tiny": PersonaStudy(Population(splits=3, train=24, validation=8, targets=16, test_pairs=100, draws=3), epochs=8),
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
    main, *others = head_sets()
    jobs = [
        PersonaJob(config, str(out), split, spec, conflict)
        for split in range(config.population.splits)
        for spec, conflict in [(main, False), (main, True), *((spec, False) for spec in others)]
    ]
    found = carry_out(jobs, work, out, "unseen users", workers)
    kinds = {
        kind: [row["values"] for row in found if row["kind"] == kind]
        for kind in ("rows", "settings", "queries", "diversity")
    }
    for kind, rows in kinds.items():
        write_rows(out / f"{kind}.csv", rows)
    return sections(config.population, kinds), findings(kinds)


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


def work(job: PersonaJob) -> list[Row]:
    """Train one head set, choose settings on validation users, and try the ways of adapting on unseen users."""
    config = job.config
    split = make_split(_users(config, Path(job.out), job.split), config.population, job.split)
    if job.conflict:
        split = split.with_conflict(config.conflict)
    heads = train_heads(job.spec, split, Training(epochs=config.epochs, l2=config.l2))
    validation, targets = see(heads, split.validation), see(heads, split.targets)
    if job.conflict:
        validation, targets = validation.both_signs(), targets.both_signs()
    common = {"split": job.split, "world": "conflict" if job.conflict else "agree", "heads": job.spec.name}
    result: list[Row] = []

    def add(method: str, n: int, accuracy: Any) -> None:
        for user, values in zip(targets.names, accuracy, strict=True):
            row = {**common, "method": method, "n": n, "target": user, "accuracy": float(values.mean())}
            result.append({"kind": "rows", "values": row})

    if job.spec.heads.pooled:
        add("single model", 0, still(targets, "single"))
    add("uniform mean", 0, still(targets, "uniform"))
    add("best head (oracle)", 0, best_head(targets))
    ways: list[Any] = [*all_ways(), simplex()] if job.spec.name == MAIN else [Reweighting()]
    if job.spec.name == MAIN and not job.conflict:
        ways.append(Reweighting("HyRe, mean loss", mean=True))
    etas: dict[int, float] = {}
    for way in ways:
        for n in config.population.shots:
            settings, edges = choose(way, validation, n)
            if way.name == "HyRe":
                etas[n] = float(settings["eta"])
            add(way.name, n, _tested(way, targets, n, settings))
            _add_setting(result, common, way.name, n, settings, edges)
    for n in config.population.shots:
        add("HyRe, eta 1", n, _tested(Reweighting(), targets, n, {"eta": 1.0}))
    if job.spec.name == MAIN:
        then = ThenMAP(etas)
        for n in config.population.shots:
            settings, edges = choose(then, validation, n)
            add(then.name, n, _tested(then, targets, n, settings))
            _add_setting(result, common, then.name, n, settings, edges)
        if not job.conflict:
            result += _queries(job, targets, etas)
    if not job.conflict:
        meter = measure(_groups(validation), "preference").to_dict()
        result.append({"kind": "diversity", "values": {**common, **meter}})
    return result


def _tested(way: Any, seen: Seen, n: int, settings: Mapping[str, Any]) -> Any:
    few = seen if way.most_draws is None else seen.draws(way.most_draws)
    return few.accuracy(way.outputs(few, n, settings))


def _add_setting(
    result: list[Row], common: Row, method: str, n: int, settings: Mapping[str, Any], edges: tuple[str, ...]
) -> None:
    text = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    row = {**common, "method": method, "n": n, "settings": text, "edges": " ".join(edges)}
    result.append({"kind": "settings", "values": row})


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
