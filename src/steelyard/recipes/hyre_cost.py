r"""E5 of HyRe: what many heads cost to train, and what adapting and serving them costs.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812): an ensemble at the price of one model, less than 1 % more.

Everything is timed in one process, in turns (A B, B A, ...), so that whatever else the machine does hits both alike. A
ratio is the median over turns of the ratio within a turn. Memory needs processes of their own, in
`benchmarks/hyre_cost.py`, which has a language model as backbone, too.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn

from steelyard.adapt.base import Floats, Support
from steelyard.adapt.head_set import LinearHeads
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.population import GaussianHeads
from steelyard.adapt.query import Pool
from steelyard.adapt.reweight import HyRe as Reweight
from steelyard.adapt.reweight import adapt
from steelyard.bench.rows import write_rows
from steelyard.bench.stats import Estimate, number, stratified_estimate
from steelyard.config import Config, require_positive
from steelyard.data.labelled import LabelledBatch
from steelyard.nets.backbones import EncoderBackbone, Trunk
from steelyard.nets.encoder import EncoderConfig, load_encoder
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe
from steelyard.recipes.hyre_jobs import begin
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report.page import Section
from steelyard.report.tables import MISSING, Table
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.progress import ProgressLine

RATIO, MICROSECONDS = 1.05, 100.0
"""Wanted: at most so much of one head's time, and so long for an update with five labels."""


@dataclass(frozen=True)
class CostStudy(Config):
    """E5: costs."""

    backbone: Literal["mlp", "encoder"] = "mlp"
    """What the heads stand on while they are timed, in the loop: an MLP, or an encoder that is trained in full."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Which one."""
    features: int = 384
    """Inputs of the MLP, and D where adapting and serving are timed."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Of the MLP."""
    tokens: int = 64
    """Of a text, for an encoder."""
    pairs: int = 64
    """Of a training step; also the texts of a request."""
    num_heads: int = 100
    """K."""
    labels: int = 5
    """Labelled pairs of an update."""
    pool: int = 1000
    """Pairs that a query is chosen from."""
    users: int = 64
    """Users of a mixed batch of 256 rows."""
    turns: int = 12
    """Turns of each side of a ratio."""
    steps: int = 4
    """Training steps of a turn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "features", "hidden", "tokens", "pairs", "num_heads", "labels", "pool", "users")
        require_positive(self, "turns", "steps")


PRESETS: dict[str, CostStudy] = {
    "tiny": CostStudy(),
    "small": CostStudy(backbone="encoder", pairs=8, steps=1),
    "paper": CostStudy(backbone="encoder", pairs=32, tokens=128, steps=2, turns=20),
}
"""Sizes."""

Row = dict[str, Any]


def run(config: CostStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Measure, and return the part of the page and the findings; writes rows.csv (one row a measure and turn) to `out`.

    Timings are taken anew at every call: they belong to the machine as it is.

    Raises:
        ConfigError: the folder holds a study with other settings.
        MissingExtraError: an encoder is asked for and the extra `lm` is not installed.
    """
    begin(out, config)
    measures = [*training(config), *adapting(config)]
    rows = [
        {"measure": one.name, "unit": one.unit, "turn": turn, "value": value}
        for one in measures
        for turn, value in enumerate(one.values)
    ]
    write_rows(out / "rows.csv", rows)
    found = findings(measures)
    return [section(config, measures)], found


@dataclass(frozen=True)
class Measure:
    """One quantity, measured in several turns.

    Attributes:
        name: what.
        unit: of the values; "x" for ratios.
        values: one a turn; one alone for what does not vary.
        limit: at most so much is wanted.
        claim: the sentence that the limit stands for.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    limit: float | None = None
    claim: str = ""

    @property
    def estimate(self) -> Estimate:
        """The median over turns, with its bootstrap interval."""
        return stratified_estimate([np.array(self.values)], _median, numpy_generator(0, f"cost/{self.name}"))


def _median(values: Floats) -> Floats:
    return np.asarray(np.median(values, axis=-1))


def in_turns(first: Callable[[], Any], second: Callable[[], Any], turns: int, calls: int = 1) -> tuple[Floats, Floats]:
    """Return seconds a call of both, [turns], taken in turns after one call of each that is not counted."""
    found: tuple[list[float], list[float]] = ([], [])
    for one in (first, second):
        one()
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            work = (first, second)[side]
            begun = time.perf_counter()
            for _ in range(calls):
                work()
            found[side].append((time.perf_counter() - begun) / calls)
    return np.array(found[0]), np.array(found[1])


def microseconds(work: Callable[[], Any], turns: int, seconds: float = 0.02) -> tuple[float, ...]:
    """Return microseconds a call, one for each turn of about so many seconds."""
    work()
    begun = time.perf_counter()
    work()
    calls = max(1, int(seconds / max(time.perf_counter() - begun, 1e-7)))
    return tuple((1e6 * in_turns(work, lambda: None, turns, calls)[0]).tolist())


# ---- training ----


def training(config: CostStudy) -> list[Measure]:
    """Time steps of K heads against steps of one on equal backbones, and count parameters."""
    single, many = (learner_of(config, heads) for heads in (1, config.num_heads))
    batch = batch_of(config)
    one, all_heads = (stepper(learner, batch) for learner in (single, many))
    with ProgressLine("training steps", config.turns) as line:
        seconds = in_turns(one, all_heads, config.turns, config.steps)
        line.advance_to(config.turns)
    ratio = tuple((seconds[1] / seconds[0]).tolist())
    own, total = (sum(p.numel() for p in part.parameters()) for part in (many.head, many))
    claim = f"Training {config.num_heads} heads costs at most {RATIO} x one head on the same backbone ({_name(config)})"
    return [
        Measure(f"training step of 1 head, {_name(config)}", "ms", tuple((1e3 * seconds[0]).tolist())),
        Measure(f"training step of {config.num_heads} heads", "ms", tuple((1e3 * seconds[1]).tolist())),
        Measure(f"training step, {config.num_heads} heads / 1 head", "x", ratio, RATIO, claim),
        Measure("heads' share of all parameters", "%", (100 * own / total,)),
    ]


def _name(config: CostStudy) -> str:
    if config.backbone == "mlp":
        return f"MLP {config.features}-{'-'.join(map(str, config.hidden))}"
    return f"{config.encoder.encoder}, trained in full"


def learner_of(config: CostStudy, heads: int) -> HyRe:
    """Return a preference learner with so many heads, its statistics fitted; equal backbones for any number of them."""
    generator = torch_generator(0, "cost/backbone")
    backbone: nn.Module
    if config.backbone == "mlp":
        backbone = Trunk(config.features, config.hidden, generator)
    else:
        encoder = load_encoder(config.encoder)
        backbone = EncoderBackbone(encoder.requires_grad_(True))
    ensemble = EnsembleConfig(heads=HeadsConfig(num_heads=heads, pooled=False), learning_rate=1e-5)
    learner = HyRe(ensemble, backbone, torch_generator(0, "cost/heads"))
    learner.fit_statistics([batch_of(config)])
    return learner


def batch_of(config: CostStudy) -> LabelledBatch:
    """Return pairs of random numbers, or of random tokens."""
    generator = torch_generator(0, "cost/batch")
    if config.backbone == "mlp":
        first, second = (torch.randn(config.pairs, config.features, generator=generator) for _ in range(2))
    else:
        # [begin, ids]: a text without a prompt begins behind its first token; small ids are left to special tokens
        first, second = (
            torch.randint(2000, 20000, (config.pairs, 1 + config.tokens), generator=generator) for _ in range(2)
        )
        first[:, 0] = second[:, 0] = 1
    return LabelledBatch(first, torch.ones(config.pairs), second)


def stepper(learner: HyRe, batch: LabelledBatch) -> Callable[[], None]:
    """Return what carries out one update of the training loop."""
    optimizers, count = Optimizers(learner, OptimConfig()), 0

    def step() -> None:
        nonlocal count
        update(learner, optimizers, batch, 0, count)
        count += 1

    return step


# ---- adapting and serving ----


def adapting(config: CostStudy) -> list[Measure]:
    """Time updates, collapse, scores and queries of linear heads, and measure profiles."""
    draw, turns = numpy_generator(0, "cost/adapting"), config.turns
    size, heads = config.features, config.num_heads
    head_set = LinearHeads(draw.normal(size=(heads, 1, size)) / math.sqrt(size), np.zeros((heads, 1)))
    first, second = draw.normal(size=(2, config.labels, size))
    pairs = first - second
    support = Support(head_set.members(pairs), np.ones(config.labels), pairs)
    hyre, gaussian = Reweight(), GaussianHeads()
    blank, posterior = hyre.begin(heads), adapt(hyre, support).posterior
    combination = posterior.combination()
    personalizer = Personalizer(head_set)
    profile = personalizer.profile(posterior)
    weights = posterior.combination().coefficients
    pool = Pool(head_set.members(draw.normal(size=(config.pool, size))), "preference")

    claim = f"An update with {config.labels} labels and {heads} heads takes at most {MICROSECONDS:g} us"
    found = [
        Measure(
            "HyRe: update and new weights", "us", microseconds(lambda: blank.update(support).weights(), turns),
            MICROSECONDS, claim,
        ),
        Measure("HyRe: with diagnostics (`adapt`)", "us", microseconds(lambda: adapt(hyre, support), turns)),
        Measure("Gaussian over heads (`adapt`)", "us", microseconds(lambda: adapt(gaussian, support), turns)),
        Measure(
            "collapse to one vector", "us",
            microseconds(lambda: combination.collapse(head_set.weight, head_set.bias), turns),
        ),
        Measure(f"BALD over {config.pool} pairs", "us", microseconds(lambda: pool.bald(weights), turns)),
        Measure("profile, exact", "bytes", (float(len(profile.to_json().encode())),)),
        Measure("profile, ten largest weights", "bytes", (float(len(profile.to_json(top=10).encode())),)),
    ]  # fmt: skip
    return found + scoring(config, head_set, personalizer, support)


def scoring(config: CostStudy, head_set: LinearHeads, personalizer: Personalizer, support: Support) -> list[Measure]:
    """Time scores for a user against one plain head: with the backbone in the loop, and of features that are there."""
    draw = numpy_generator(1, "cost/scoring")
    profiles = [
        personalizer.profile(
            adapt(Reweight(), Support(draw.normal(size=support.members.shape), support.labels)).posterior
        )
        for _ in range(config.users)
    ]
    vector, bias = head_set.weight[0, 0], float(head_set.bias[0, 0])
    single = Personalizer(LinearHeads(head_set.weight[:1], head_set.bias[:1]))
    rows = draw.normal(size=(256, config.features))
    mixed = [profiles[row % len(profiles)] for row in range(len(rows))]
    turns = config.turns
    own, plain = in_turns(lambda: personalizer.score(rows, profiles[0]), lambda: single.score(rows, None), turns, 50)
    product = microseconds(lambda: rows @ vector + bias, turns)
    many = microseconds(lambda: personalizer.score(rows, mixed), turns)

    learner, batch = copy.deepcopy(learner_of(config, 1)).eval(), batch_of(config)
    width = learner.head.linear()
    assert width is not None
    own_width = width[0].shape[2]
    wide = LinearHeads(draw.normal(size=(config.num_heads, 1, own_width)), np.zeros((config.num_heads, 1)))
    served = Personalizer(wide)
    members = wide.members(draw.normal(size=(config.labels, own_width)))
    user = served.profile(adapt(Reweight(), Support(members, support.labels)).posterior)

    def features() -> Floats:
        return np.asarray(learner.features(batch).double().numpy(), np.float64)

    head = wide.weight[0, 0]
    personal, ordinary = in_turns(
        lambda: served.score(features(), user), lambda: features() @ head + bias, turns, config.steps
    )
    claim = f"Scoring {config.pairs} texts for a user costs at most {RATIO} x one plain head, backbone included"
    return [
        Measure("score 256 rows of features for a user", "us", tuple((1e6 * own).tolist())),
        Measure("the same, one head served the same way", "us", tuple((1e6 * plain).tolist())),
        Measure("the same, a bare product", "us", product),
        Measure(f"score 256 rows of {len(profiles)} users in one batch", "us", many),
        Measure("score for a user / one head served the same way", "x", tuple((own / plain).tolist())),
        Measure(
            "score texts for a user / one plain head, backbone included", "x", tuple((personal / ordinary).tolist()),
            RATIO, claim,
        ),
    ]  # fmt: skip


# ---- the page ----


def findings(measures: list[Measure]) -> list[Finding]:
    """Return whether the limits were kept: verdicts from the interval of the median over turns."""
    found = []
    for one in measures:
        if one.limit is None:
            continue
        room = np.array([one.limit - value for value in one.values])
        estimate = stratified_estimate([room], _median, numpy_generator(0, f"cost/{one.name}"))
        measured = f"{_cell(one)} {one.unit}, median of {len(one.values)} turns"
        found.append(Finding(one.claim, above(estimate), measured, "this machine; a small backbone"))
    return found


def section(config: CostStudy, measures: list[Measure]) -> Section:
    """Return the part of the page."""
    rows = tuple(
        (one.name, one.unit, _cell(one), number(min(one.values), 3), number(max(one.values), 3),
         MISSING if one.limit is None else f"{one.limit:g}")
        for one in measures
    )  # fmt: skip
    caption = (
        "Median over turns with its interval, least and greatest turn. D = "
        f"{config.features}, {config.num_heads} heads, {config.labels} labels; {torch.get_num_threads()} thread(s). "
        "Backbones are in the loop; the smaller a backbone, the more its heads weigh beside it."
    )
    return Section("E5: cost").table(
        Table("E5: cost", caption, ("measure", "unit", "median", "least", "greatest", "wanted: at most"), rows)
    )


def _cell(one: Measure) -> str:
    return one.estimate.text(3) if len(one.values) > 1 else number(one.values[0], 3)
