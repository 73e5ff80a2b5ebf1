"""Training and scoring of E2: ensembles of small networks on tables whose test rows are shifted.

| ensemble | members |
|---|---|
| `shared` | a trunk and linear heads |
| `prior` | the same with frozen priors, beta = 3 |
| `vanilla` | independent networks |
| `groups` | of digits: a trunk, and heads that each see two of the five kinds of training images |

The study: `recipes/hyre_tables.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from steelyard.adapt.base import Floats, Method, Support, rmse
from steelyard.adapt.choose import HeldOutTask, Single, Uniform, draw, scores
from steelyard.adapt.losses import CrossEntropy, GaussianNLL
from steelyard.adapt.population import GaussianHeads, RidgeCombination
from steelyard.adapt.reweight import HyRe as Reweight
from steelyard.config import Config, require_positive, require_range
from steelyard.data.labelled import LabelledData
from steelyard.data.regression_tables import (
    TableShift,
    california_shifts,
    diabetes_shifts,
    digit_shifts,
    uci_shifts,
)
from steelyard.nets.backbones import Features, Trunk
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe
from steelyard.rng import numpy_generator, torch_generator
from steelyard.workflows.heads import fit_heads

Source = Literal["uci", "california", "diabetes", "digits"]
REGRESSION, DIGITS = ("shared", "prior", "vanilla"), ("shared", "prior", "vanilla", "groups")
SINGLE, UNIFORM, BEST, RESIDUAL = "single", "uniform", "best head (oracle)", "add the mean residual"
NO_FLOOR, SPREAD, FLOOR = "HyRe, no floor", "HyRe, floor: members' spread", "HyRe, floor: the labels' residuals"
GAUSSIAN, RIDGE = "Gaussian over heads", "ridge combination"
ETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
WEIGHTS = (0.01, 0.1, 1.0, 10.0, 100.0)
RIDGE_WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Settings are chosen on the other tables."""


@dataclass(frozen=True)
class TableStudy(Config):
    """E2: tables under shift."""

    data: str | None = None
    """Folder with uci_regression and california_housing_shift; without it, scikit-learn's diabetes alone."""
    shots: tuple[int, ...] = (5, 20)
    """n: labelled rows to adapt to."""
    draws: int = 20
    """Draws of the labelled rows of a shift."""
    gaps: int = 1
    """Gap splits of a table."""
    columns: int = 1
    """Columns whose top and bottom are held out."""
    train_rows: int = 3000
    """Training rows of a shift, at most."""
    num_heads: int = 100
    """Heads on a shared trunk."""
    vanilla: int = 20
    """Independent networks."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of trunk and networks."""
    prior_scale: float = 3.0
    """beta of the priors."""
    steps: int = 600
    """Updates."""
    batch_size: int = 256
    """Rows an update."""
    learning_rate: float = 1e-3
    """Adam's step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "shots", "draws", "gaps", "columns", "train_rows", "num_heads", "vanilla", "hidden")
        require_positive(self, "steps", "batch_size", "learning_rate")
        require_range(self, 0, np.inf, "prior_scale")


@dataclass(frozen=True)
class TableJob:
    """One ensemble on one shift, or on all changes of the digits."""

    study: TableStudy
    source: Source
    shift: str
    ensemble: str

    @property
    def name(self) -> str:
        """Ensemble and shift."""
        return f"{self.ensemble} {self.shift}"


def shifts_of(config: TableStudy, source: Source) -> list[TableShift]:
    """Return the shifts of a source.

    Raises:
        DataError: its folder is not there.
        MissingExtraError: scikit-learn is not installed.
    """
    if source == "diabetes":
        return diabetes_shifts()
    if source == "digits":
        return digit_shifts()
    assert config.data is not None
    if source == "california":
        return california_shifts(f"{config.data}/california_housing_shift", config.train_rows)
    return uci_shifts(f"{config.data}/uci_regression", config.gaps, config.columns, config.train_rows)


def work(job: TableJob) -> list[dict[str, Any]]:
    """Train one ensemble and score it."""
    shifts = shifts_of(job.study, job.source)
    if job.source == "digits":
        return digits(shifts, job.ensemble, job.study)
    shift = next(one for one in shifts if one.name == job.shift)
    identity = {"task": "regression", "ensemble": job.ensemble, "table": shift.table, "shift": shift.name}
    return [identity | row for row in regression(shift, job.ensemble, job.study)]


def ensemble(kind: str, shift: TableShift, config: TableStudy) -> HyRe:
    """Return an ensemble that is not trained yet."""
    classes = int(shift.targets.max()) + 1 if shift.table == "digits" else 1
    width, generator = shift.inputs.shape[1], torch_generator(0, f"tables/{shift.name}/{kind}")
    heads, backbone = HeadsConfig(num_heads=config.num_heads), None
    if kind == "vanilla":
        heads, backbone = HeadsConfig(num_heads=config.vanilla, kind="vanilla", trunk=config.hidden), Features(width)
    elif kind == "prior":
        heads = replace(heads, prior="mlp", prior_scale=config.prior_scale)
    learner = EnsembleConfig(
        task="classification" if classes > 1 else "regression",
        heads=heads,
        shares="groups" if kind == "groups" else "all",
        share=0.4,
        learning_rate=config.learning_rate,
        head_learning_rate=config.learning_rate,
    )
    trunk: nn.Module = Trunk(width, config.hidden, generator) if backbone is None else backbone
    return HyRe(learner, trunk, generator, classes)


def fitted(kind: str, shift: TableShift, config: TableStudy) -> HyRe:
    """Return a trained ensemble; a sixth of the training rows is held out for the residual variance of its members."""
    order = numpy_generator(0, f"tables/{shift.name}").permutation(len(shift.targets))
    data, kept = LabelledData(shift.inputs, shift.targets, groups=shift.groups), len(order) - len(order) // 6
    learner = ensemble(kind, shift, config)
    rows, rest = data.take(order[:kept]), data.take(order[kept:])
    return fit_heads(learner, rows, config.steps, config.batch_size, seed=0, held_out=rest)


def regression(shift: TableShift, kind: str, config: TableStudy) -> list[dict[str, Any]]:
    """Return one row a method, setting and n: RMSE over that of the uniform mean, on the same rows; mean over draws."""
    learner = fitted(kind, shift, config)
    support = learner.support(LabelledData(shift.test_inputs, shift.test_targets).batch())
    variance = learner.head.variance.double().numpy().astype(np.float64)
    target = HeldOutTask(support, name=shift.name)
    ratios: dict[tuple[str, float, int], list[float]] = {}
    effective: dict[tuple[str, float, int], list[float]] = {}
    uniform: list[float] = []
    for number in range(config.draws):
        for n in config.shots:
            chosen, rest = draw(target, n, numpy_generator(0, f"tables/draw/{shift.name}", number))
            labels, test = support.take(chosen), support.take(rest)
            mean = test.members.mean(1)
            level = rmse(mean, test.labels)
            uniform.append(level)
            outputs = {(BEST, 0.0): mean, (RESIDUAL, 0.0): mean + residuals(labels).mean()}
            best = np.sqrt(((test.members[:, :, 0] - test.labels[:, None]) ** 2).mean(0)).min()
            for (name, setting), method in methods(labels, variance).items():
                posterior = method.begin(support.members.shape[1]).update(labels)
                outputs[name, setting] = posterior.combination().apply(test.members)
                effective.setdefault((name, setting, n), []).append(posterior.diagnostics().get("ess", np.nan))
            for (name, setting), found in outputs.items():
                error = best if name == BEST else rmse(found, test.labels)
                ratios.setdefault((name, setting, n), []).append(float(error) / level)
    return [
        {
            "method": name, "setting": setting, "n": n, "ratio": float(np.exp(np.mean(np.log(values)))),
            "worst_draw": float(max(values)), "uniform_rmse": float(np.mean(uniform)),
            "ess": float(np.mean(effective.get((name, setting, n), [np.nan]))),
        }
        for (name, setting, n), values in ratios.items()
    ]  # fmt: skip


def residuals(labels: Support) -> Floats:
    """Return labels minus the uniform mean, [N]."""
    return np.asarray(labels.labels - labels.members[:, :, 0].mean(1))


def methods(labels: Support, variance: Floats) -> dict[tuple[str, float], Method]:
    """Return the methods by name and setting.

    Residuals of members on held-out training rows (`variance`) are far too small under a shift. What floors them is
    either the members' spread at the labelled inputs, or the mean square of the uniform mean's residuals there.
    """
    spread = float(labels.members[:, :, 0].var(1).mean())
    noise = float(np.mean(residuals(labels) ** 2)) or 1e-12
    found: dict[tuple[str, float], Method] = {(SINGLE, 0.0): Single()}
    for eta in ETAS:
        for name, floor in ((NO_FLOOR, 0.0), (SPREAD, spread), (FLOOR, noise)):
            found[name, eta] = Reweight(GaussianNLL(variance, floor), eta)
    for weight in WEIGHTS:
        found[GAUSSIAN, weight] = GaussianHeads(weight, task="regression", noise=noise)
    for weight in RIDGE_WEIGHTS:
        found[RIDGE, weight] = RidgeCombination(weight, task="regression", noise=noise)
    return found


def digits(shifts: Sequence[TableShift], kind: str, config: TableStudy) -> list[dict[str, Any]]:
    """Return one row a change, method and n; eta is chosen on the other changes, of other images."""
    learner = fitted(kind, shifts[0], config)
    half = len(shifts[0].test_targets) // 2
    tasks = [
        (
            HeldOutTask(support.take(np.arange(half)), name=f"{shift.name} validation"),
            HeldOutTask(support.take(np.arange(half, len(support))), name=shift.name),
        )
        for shift in shifts
        for support in [learner.support(LabelledData(shift.test_inputs, shift.test_targets).batch())]
    ]
    rows: list[dict[str, Any]] = []
    for n in config.shots:
        tuning = np.array(
            [
                [
                    scores(Reweight(CrossEntropy(), eta), validation, n, "classification", "accuracy", draws=5).mean()
                    for eta in ETAS
                ]
                for validation, _ in tasks
            ]
        )
        for place, (shift, (_, target)) in enumerate(zip(shifts, tasks, strict=True)):
            eta = ETAS[int((tuning.sum(0) - tuning[place]).argmax())]
            right = target.examples.members.argmax(2) == target.examples.labels[:, None]
            found = {
                name: float(scores(method, target, n, "classification", "accuracy", config.draws).mean())
                for name, method in (
                    (SINGLE, Single()),
                    (UNIFORM, Uniform()),
                    ("HyRe", Reweight(CrossEntropy(), eta)),
                )
            } | {BEST: float(right.mean(0).max())}
            rows += [
                {"task": "classification", "ensemble": kind, "table": "digits", "shift": shift.name, "method": name,
                 "setting": eta if name == "HyRe" else 0.0, "n": n, "accuracy": value}
                for name, value in found.items()
            ]  # fmt: skip
    return rows
