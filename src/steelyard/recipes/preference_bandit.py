"""Level 1 of the preference study: bandits, in full.

One run (`run_bandit`) takes a second: a small network, exact expectations, the same objectives, learner and update as
language models. What varies is what the paper varies: who draws the completions, how often they are used (T), the
negative gradient (lambda), the objective, the pairing, the number of prompts. Every arm chooses its learning rate on
the tuning seeds, all arms from the same list, and is reported on seeds that the choice has never seen.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from steelyard.bench.executors import LocalExecutor, work_off
from steelyard.bench.rows import write_rows
from steelyard.bench.stats import Floats
from steelyard.config import Config, config_hash, require_positive
from steelyard.data.pairing import PairingRule
from steelyard.envs.bandit import TARGETS
from steelyard.errors import ConfigError
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, AnyPreferenceConfig
from steelyard.recipes.preference_bandit_runs import BanditCase, run_bandit
from steelyard.train.progress import ProgressLine

Target = Literal["aligned", "misaligned"]
MethodName = Literal[
    "offline pref-ft",
    "offline best-of-n",
    "offline rwr",
    "offline dpo",
    "offline ipo",
    "on-policy best-of-n",
    "on-policy rwr",
    "on-policy rloo",
    "on-policy ppo",
    "on-policy dpo",
    "on-policy ipo",
]
ArmGroup = Literal["main", "matched", "negative", "pairing", "reuse", "prompts", "tokens"]


@dataclass(frozen=True)
class BanditStudy(Config):
    """Level 1: which arms run, and how much of each."""

    arms: tuple[ArmGroup, ...] = ("main", "matched", "negative", "pairing", "reuse", "prompts", "tokens")
    """Groups of arms: all methods; offline methods with as many samples and steps as on-policy ones; lambda; pairing
    rules; reuse T; number of prompts (fig. 16); completions of ten positions."""
    targets: tuple[Target, ...] = ("misaligned", "aligned")
    """Where the reward peaks: in the tail of the reference or near its mode."""
    matched_targets: tuple[Target, ...] = ("misaligned",)
    """Targets of the group "matched"."""
    seeds: tuple[int, ...] = tuple(range(5, 15))
    """Reporting seeds, paired over all arms."""
    tuning_seeds: tuple[int, ...] = tuple(range(5))
    """Seeds on which every arm chooses its learning rate."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """The list that every arm chooses from."""
    fixed_rates: tuple[float, ...] = (1e-3, 1e-2)
    """Rates of the reuse arms with fixed samples and steps, which choose nothing."""
    prompts: int = 10
    """Contexts trained on."""
    completions: int = 10
    """N: completions a context and refresh."""
    refreshes: int = 20
    """Refreshes of on-policy arms."""
    short_refreshes: int = 10
    """Refreshes of the lambda and pairing arms, short so that not everything is solved."""
    reuse: int = 10
    """T of on-policy arms."""
    offline_steps: int = 100
    """Updates of offline arms on their fixed data."""
    negative_methods: tuple[MethodName, ...] = (
        "on-policy rloo",
        "on-policy dpo",
        "on-policy ipo",
        "offline dpo",
        "offline ipo",
    )
    """Methods of the group "negative"."""
    negatives: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """lambda of the group "negative"."""
    reuse_methods: tuple[MethodName, ...] = ("on-policy best-of-n", "on-policy ppo", "on-policy ipo")
    """Methods of the group "reuse"."""
    reuse_samples: tuple[int, ...] = (1, 2, 5, 10, 20)
    """T at a fixed number of samples: steps grow with T."""
    reuse_refreshes: int = 20
    """Refreshes of these arms."""
    reuse_steps: tuple[int, ...] = (1, 5, 20, 100)
    """T at a fixed number of samples and of steps: N grows with T, refreshes fall."""
    reuse_updates: int = 100
    """Steps of these arms; a multiple of every T."""
    prompt_grid: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Numbers of prompts of the group "prompts"."""
    token_methods: tuple[MethodName, ...] = (
        "offline best-of-n",
        "offline ipo",
        "on-policy best-of-n",
        "on-policy ipo",
    )
    """Methods of the group "tokens"; offline ones with as many samples and steps as on-policy ones."""
    tokens: int = 10
    """Positions of the group "tokens"."""

    def __post_init__(self) -> None:
        """Check that the reported seeds are unseen and the grids can be carried out."""
        if both := set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError(f"seeds {sorted(both)} are in both seeds and tuning_seeds; the table's must be unseen")
        require_positive(self, "learning_rates", "fixed_rates", "refreshes", "short_refreshes", "reuse")
        for name in ("seeds", "tuning_seeds", "learning_rates", "targets", "arms"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        if any(self.reuse_updates % t for t in self.reuse_steps):
            raise ConfigError(f"reuse_steps must divide reuse_updates {self.reuse_updates}, found {self.reuse_steps}")


@dataclass(frozen=True)
class Arm:
    """One line of the study.

    Attributes:
        group: which question it belongs to.
        method: key of `METHODS`.
        target: aligned or misaligned.
        variant: what else distinguishes it within the group, e.g. "lambda 0.5".
        case: its run, at any learning rate.
        rates: learning rates it chooses from; a single one is taken as it is.
    """

    group: str
    method: str
    target: Target
    variant: str
    case: BanditCase
    rates: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies it in a study."""
        return self.group, self.method, self.target, self.variant

    def at(self, rate: float) -> BanditCase:
        """Return the case at one learning rate."""
        return replace(self.case, objective=replace(self.case.objective, learning_rate=rate))


@dataclass(frozen=True)
class Method:
    """An objective and who draws its completions."""

    label: str
    objective: AnyPreferenceConfig
    on_policy: bool

    @property
    def source(self) -> Literal["policy", "dataset"]:
        """In the words of `BanditCase`."""
        return "policy" if self.on_policy else "dataset"


def _method(label: str, kind: str, on_policy: bool, **settings: Any) -> Method:
    return Method(label, PREFERENCE_OBJECTIVES[kind](**settings), on_policy)


_RWR = {"standardise": "group", "tau": 1.0}
_IPO = {"tau": 0.05}  # a gap of 10, as in the released bandit code
_PPO = {"baseline": "group", "scale": "batch", "correction": "clip", "beta": 0.0}  # no critic, as there
METHODS = {
    "offline pref-ft": _method("offline Pref-FT", "pref_ft", False),
    "offline best-of-n": _method("offline best-of-N", "best_of_n", False),
    "offline rwr": _method("offline RWR", "rwr", False, **_RWR),
    "offline dpo": _method("offline DPO", "dpo", False, beta=0.1),
    "offline ipo": _method("offline IPO", "ipo", False, **_IPO),
    "on-policy best-of-n": _method("on-policy best-of-N", "best_of_n", True),
    "on-policy rwr": _method("on-policy RWR", "rwr", True, **_RWR),
    "on-policy rloo": _method("on-policy RLOO", "rloo", True, beta=0.0, correction="none"),
    "on-policy ppo": _method("on-policy PPO", "reinforce", True, **_PPO),
    "on-policy dpo": _method("on-policy DPO", "dpo", True, beta=0.1),
    "on-policy ipo": _method("on-policy IPO", "ipo", True, **_IPO),
}
"""The paper's methods. RLOO is REINFORCE with the other completions' mean as baseline, without a correction for reuse;
PPO clips ratios and has a group baseline."""


def arms_of(study: BanditStudy) -> list[Arm]:
    """Return all arms of a study."""
    found: list[Arm] = []

    def add(
        group: str, method: str, target: Target, variant: str = "", rates: Sequence[float] = (), **case: Any
    ) -> None:
        chosen = METHODS[method]
        base = BanditCase(
            chosen.objective,
            source=chosen.source,
            target=TARGETS[target],
            prompts=study.prompts,
            completions=study.completions,
            refreshes=study.refreshes if chosen.on_policy else 1,
            reuse=study.reuse if chosen.on_policy else study.offline_steps,
        )
        found.append(Arm(group, method, target, variant, replace(base, **case), tuple(rates) or study.learning_rates))

    more: dict[str, Any]
    short: dict[str, Any] = {"refreshes": study.short_refreshes}
    whole: dict[str, Any] = {
        "refreshes": 1,
        "completions": study.refreshes * study.completions,
        "reuse": study.refreshes * study.reuse,
    }
    if "main" in study.arms:
        for target in study.targets:
            for method in METHODS:
                add("main", method, target)
    if "matched" in study.arms:
        for target in study.matched_targets:
            for method in ("offline best-of-n", "offline rwr", "offline dpo", "offline ipo"):
                add("matched", method, target, "refreshed", refreshes=study.refreshes, reuse=study.reuse)
            add("matched", "offline best-of-n", target, "one set", pairing="best_rest", **whole)
    if "negative" in study.arms:
        for method in study.negative_methods:
            for value in study.negatives:
                more = short if METHODS[method].on_policy else {}
                add("negative", method, "misaligned", f"{value:g}", negative=value, **more)
    if "pairing" in study.arms:
        rules: tuple[PairingRule, ...] = ("all", "best_worst", "best_rest")
        for method in ("offline dpo", "offline ipo", "on-policy ipo"):
            for rule in rules:
                more = short if METHODS[method].on_policy else {}
                add("pairing", method, "misaligned", rule, pairing=rule, **more)
    if "reuse" in study.arms:
        for method in study.reuse_methods:
            for t in study.reuse_samples:
                one: dict[str, Any] = {"refreshes": study.reuse_refreshes, "reuse": t, "pairing": "best_rest"}
                add("reuse", method, "misaligned", f"samples/{t}", (study.fixed_rates[0],), **one)
            for t in study.reuse_steps:
                both: dict[str, Any] = {"refreshes": study.reuse_updates // t, "reuse": t, "pairing": "best_rest"}
                for rate in study.fixed_rates:
                    add(
                        "reuse", method, "misaligned", f"steps/{rate:g}/{t}", (rate,),
                        completions=study.completions * t, **both,
                    )  # fmt: skip
    if "prompts" in study.arms:
        for count in study.prompt_grid:
            for rate in study.fixed_rates:
                add("prompts", "offline ipo", "misaligned", f"{rate:g}/{count}", (rate,), prompts=count)
    if "tokens" in study.arms:
        for method in study.token_methods:
            more = {} if METHODS[method].on_policy else {"refreshes": study.refreshes, "reuse": study.reuse}
            add("tokens", method, "misaligned", tokens=study.tokens, **more)
    return found


Columns = dict[str, list[Any]]
"""{name: one value per evaluation} of a run."""


@dataclass(frozen=True)
class ArmResult:
    """An arm with its runs.

    Attributes:
        arm: what ran.
        tuning: {rate: runs on the tuning seeds}; empty for an arm with one rate.
        rate: chosen by the final reward on the tuning seeds.
        area_rate: chosen by the area under the reward-query curve.
        runs: on the reporting seeds, in their order, at `rate`.
        area_runs: the same at `area_rate`; where that was not run, `runs`.
    """

    arm: Arm
    tuning: dict[float, list[Columns]]
    rate: float
    area_rate: float
    runs: list[Columns]
    area_runs: list[Columns]

    def final(self, name: str = "reward") -> Floats:
        """Return the last value of each reporting run, [S]."""
        return final(self.runs, name)

    @property
    def failed(self) -> int:
        """Reporting runs that became NaN."""
        return sum(run["status"][-1] == "failed" for run in self.runs)


def final(runs: Sequence[Columns], name: str = "reward") -> Floats:
    """Return the last value of each run, [S]."""
    values = (run.get(name, [None])[-1] for run in runs)  # a failed run has no displacement
    return np.array([math.nan if value is None else value for value in values])


def areas(runs: Sequence[Columns]) -> Floats:
    """Return the mean height of each run's reward-query curve (trapezoids), [S]."""
    heights = []
    for run in runs:
        # several evaluations within one refresh share their queries: the last counts
        points = dict(zip(run["queries"], run["reward"], strict=True))
        x, y = np.array(list(points)), np.array(list(points.values()))
        heights.append(float(np.trapezoid(y, x) / (x[-1] - x[0])))
    return np.array(heights)


Results = dict[tuple[str, str, str, str], ArmResult]


def carry_out(study: BanditStudy, out: Path, workers: int) -> Results:
    """Run everything that is missing in out/bandit_runs.jsonl and return the arms with their runs.

    Raises:
        Interrupted: ctrl-C; the same command goes on where it stopped.
    """
    file = out / "bandit_runs.jsonl"
    arms = arms_of(study)
    tuned = [arm for arm in arms if len(arm.rates) > 1]
    wanted = [(arm.at(rate), seed) for arm in tuned for rate in arm.rates for seed in study.tuning_seeds]
    records = run_all(wanted, file, workers, "bandits, tuning")
    choices: dict[tuple[str, str, str, str], tuple[dict[float, list[Columns]], float, float]] = {}
    for arm in arms:
        tuning = {
            rate: [records[run_key(arm.at(rate), seed)] for seed in study.tuning_seeds]
            for rate in (arm.rates if len(arm.rates) > 1 else ())
        }
        # the smallest of equals: max returns the first
        best = max(arm.rates, key=lambda rate: final(tuning[rate]).mean()) if tuning else arm.rates[0]
        fastest = max(arm.rates, key=lambda rate: areas(tuning[rate]).mean()) if _has_area(arm) else best
        choices[arm.key] = tuning, best, fastest
    wanted = [(arm.at(rate), seed) for arm in arms for rate in set(choices[arm.key][1:]) for seed in study.seeds]
    records |= run_all(wanted, file, workers, "bandits, reporting seeds")
    results: Results = {}
    for arm in arms:
        tuning, best, fastest = choices[arm.key]
        runs, quick = ([records[run_key(arm.at(rate), seed)] for seed in study.seeds] for rate in (best, fastest))
        results[arm.key] = ArmResult(arm, tuning, best, fastest, runs, quick)
    write_csv(results, study, out)
    return results


def _has_area(arm: Arm) -> bool:
    return arm.group == "main" and arm.target == "misaligned" and arm.case.source == "policy" and len(arm.rates) > 1


def run_key(case: BanditCase, seed: int) -> str:
    """Return what identifies a run in the file."""
    return f"{_hash(case)}-{seed}"


_hash = functools.lru_cache(maxsize=None)(config_hash)


def run_all(wanted: Sequence[tuple[BanditCase, int]], file: Path, workers: int, label: str) -> dict[str, Columns]:
    """Carry out what `file` does not hold yet, and return all its records.

    Args:
        wanted: runs, each once or several times.
        file: one JSON line a run; appended to.
        workers: processes, one thread each; 0 runs everything in this one.
        label: of the progress line.
    """
    records = read_records(file)
    missing: dict[BanditCase, list[int]] = {}
    for case, seed in dict.fromkeys(wanted):
        if run_key(case, seed) not in records:
            missing.setdefault(case, []).append(seed)
    total, done = sum(case.steps * len(seeds) for case, seeds in missing.items()), 0
    if not missing:
        return records

    def keep(task: tuple[BanditCase, list[int]], lines: str | None) -> None:
        nonlocal done
        assert lines is not None
        with file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
        records.update(_parsed(lines))
        done += task[0].steps * len(task[1])
        progress.advance_to(done, f"{len(records)} runs on disk")

    with ProgressLine(label, total) as progress:
        work_off(missing.items(), work, LocalExecutor(workers) if workers else None, keep)
    return records


def work(task: tuple[BanditCase, list[int]]) -> str:
    """Run a case with several seeds; return one JSON line a run."""
    torch.set_num_threads(1)
    case, seeds = task
    lines = []
    for seed in seeds:
        rows = run_bandit(case, seed)
        columns = {name: [_plain(row.get(name)) for row in rows] for name in rows[-1]}
        lines.append(json.dumps({"run": run_key(case, seed), "seed": seed, "columns": columns}) + "\n")
    return "".join(lines)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NaN becomes null, floats keep seven digits."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def read_records(file: Path) -> dict[str, Columns]:
    """Return {run: columns} of a file of runs; a last line that a kill cut short is cut off."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, encoding="utf-8")
    return _parsed(text)


def _parsed(lines: str) -> dict[str, Columns]:
    records = (json.loads(line) for line in lines.splitlines())
    return {record["run"]: record["columns"] for record in records}


def write_csv(results: Results, study: BanditStudy, out: Path) -> None:
    """Write one row per run: bandit_tuning.csv and bandit_rows.csv."""
    names = ("group", "target", "method", "variant", "learning_rate", "chosen", "seed")
    values = (
        "reward", "reverse_kl", "forward_kl", "entropy", "near", "delta_chosen", "delta_rejected", "mass_best",
        "mass_rest", "mass_unseen", "negative_mass", "queries", "step", "skipped", "status",
    )  # fmt: skip

    def row(result: ArmResult, rate: float, chosen: str, seed: int, run: Columns) -> dict[str, Any]:
        arm = result.arm
        which = (arm.group, arm.target, arm.method, arm.variant, rate, chosen, seed)
        ends = {name: run[name][-1] for name in values if name in run}
        return dict(zip(names, which, strict=True)) | ends | {"area": areas([run])[0]}

    tuning = [
        row(result, rate, "final" if rate == result.rate else "", seed, run)
        for result in results.values()
        for rate, runs in result.tuning.items()
        for seed, run in zip(study.tuning_seeds, runs, strict=True)
    ]
    reported = [
        row(result, rate, chosen, seed, run)
        for result in results.values()
        for chosen, rate, runs in (
            ("final", result.rate, result.runs),
            ("area", result.area_rate, result.area_runs),
        )
        if chosen == "final" or rate != result.rate
        for seed, run in zip(study.seeds, runs, strict=True)
    ]
    for name, rows in (("bandit_tuning.csv", tuning), ("bandit_rows.csv", reported)):
        write_rows(out / name, rows, [*names, *values, "area"])


PRESETS = {
    # about 265,000 updates: some 10 CPU-minutes
    "tiny": BanditStudy(),
    "small": BanditStudy(
        refreshes=30,
        seeds=tuple(range(5, 25)),
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        matched_targets=("misaligned", "aligned"),
        fixed_rates=(1e-3, 3e-3, 1e-2),
        negative_methods=(*BanditStudy.negative_methods, "on-policy ppo"),
        negatives=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        reuse_methods=(*BanditStudy.reuse_methods, "on-policy rloo"),
        reuse_samples=(1, 2, 5, 10, 20, 50),
        reuse_steps=(1, 2, 5, 10, 20, 50, 100),
        token_methods=(
            *("offline best-of-n", "offline rwr", "offline dpo", "offline ipo"),
            *("on-policy best-of-n", "on-policy rwr", "on-policy rloo", "on-policy ppo", "on-policy dpo"),
            "on-policy ipo",
        ),
    ),
    # the released scripts' lengths and rates: hours
    "paper": BanditStudy(
        seeds=tuple(range(5, 25)),
        learning_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        matched_targets=("misaligned", "aligned"),
        fixed_rates=(1e-3, 3e-3, 1e-2),
        refreshes=100,
        short_refreshes=30,
        reuse=15,
        offline_steps=200,
        negative_methods=(*BanditStudy.negative_methods, "on-policy ppo"),
        negatives=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        reuse_methods=(*BanditStudy.reuse_methods, "on-policy rloo"),
        reuse_samples=(1, 2, 5, 10, 20, 50),
        reuse_steps=(1, 2, 5, 10, 20, 50, 100),
        token_methods=(
            *("offline best-of-n", "offline rwr", "offline dpo", "offline ipo"),
            *("on-policy best-of-n", "on-policy rwr", "on-policy rloo", "on-policy ppo", "on-policy dpo"),
            "on-policy ipo",
        ),
        prompt_grid=(5, 10, 20, 50, 100, 200, 500, 1000),
    ),
}
