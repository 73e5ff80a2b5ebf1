"""Level 1 of the preference study: bandits, in full.

One run (`run_bandit`) takes a second: a small network, exact expectations, the same objectives, learner and update as
language models. What varies is what the paper varies: who draws the completions, how often they are used (T), the
negative gradient (lambda), the objective, the pairing, the number of prompts. Every arm chooses its learning rate on
the tuning seeds, all arms from the same list, and is reported on seeds that the choice has never seen.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steelyard.bench.executors import LocalExecutor
from steelyard.bench.stats import Floats
from steelyard.config import Config, config_hash, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.pairing import PairingRule, pair_up
from steelyard.envs.bandit import TARGETS, BanditProblem, fit_reference, reference_bins
from steelyard.errors import ConfigError, SteelyardError
from steelyard.nets.categorical import CategoricalPolicy
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, AnyPreferenceConfig, build_preference_learner
from steelyard.rng import torch_generator
from steelyard.train.loop import Interrupted, update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.progress import ProgressLine

UNSEEN = 100
"""Contexts of the evaluation, none of which is trained on."""
POINTS = 20
"""Evaluations of a run, at most."""


@dataclass(frozen=True)
class BanditCase(Config):
    """One setting of a bandit run; together with a seed it says everything."""

    objective: AnyPreferenceConfig
    """What is minimised, with its learning rate."""
    negative: float = 1.0
    """lambda: scale of the negative gradient."""
    source: Literal["policy", "dataset"] = "policy"
    """Who draws the completions: the policy as it is at each refresh, or pi_ref."""
    pairing: PairingRule = "all"
    """Which completions of a prompt are compared."""
    target: int = 70
    """a*: the action with the highest reward."""
    width: float = 10.0
    """Width of the reward's bump, in actions."""
    tokens: int = 1
    """Positions of a completion."""
    prompts: int = 10
    """Contexts trained on."""
    completions: int = 10
    """N: completions of each prompt at each refresh."""
    refreshes: int = 30
    """How often completions are drawn; 1 with source dataset is a fixed data set."""
    reuse: int = 10
    """T: updates on the same completions."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "width", "tokens", "prompts", "completions", "refreshes", "reuse")
        require_range(self, 0, math.inf, "negative")
        require_range(self, 0, 99, "target")

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.refreshes * self.reuse

    @property
    def queries(self) -> int:
        """Completions drawn and scored in the whole run."""
        return self.refreshes * self.prompts * self.completions

    @property
    def problem(self) -> BanditProblem:
        """The reward."""
        return BanditProblem(self.target, self.width, self.tokens)


Row = dict[str, Any]


def run_bandit(case: BanditCase, seed: int) -> list[Row]:
    """Train once and return one row per evaluation; nothing is written.

    Runs with the same seed share first weights, contexts and offline completions, whatever the case. A run whose
    gradient becomes NaN or infinite ends there: its later rows repeat the last finite measurement, status "failed".
    """
    problem, due = case.problem, _evaluations(case)
    model = _start(seed, case.tokens, case.objective.needs.values)
    contexts = problem.contexts(case.prompts, torch_generator(seed, "bandit/train"))
    unseen = problem.contexts(UNSEEN, torch_generator(seed, "bandit/unseen"))
    learner = build_preference_learner(model, case.objective, case.negative)
    optimizers = Optimizers(learner, OptimConfig())
    memory: dict[str, Tensor] = {}
    rows: list[Row] = []
    batch: ExperienceBatch | None = None
    skipped, mass = 0, math.nan

    def look(step: int) -> None:
        row: Row = {"step": step, "queries": -(-step // case.reuse) * case.prompts * case.completions}
        row |= problem.measure(model, unseen)
        if batch is not None:
            row |= displacement(model, batch)
        rows.append(row | {"negative_mass": abs(mass), "skipped": skipped, "status": "ok"})

    look(0)
    for step in range(case.steps):
        if step % case.reuse == 0:
            batch = _draw(case, model, contexts, seed, step)
            batch, memory = learner.complete(batch, memory)
            trains = not (case.objective.needs.pairs and not len(_pairs(batch)))  # all rewards equal: nothing to learn
        assert batch is not None
        if trains:
            metrics = update(learner, optimizers, batch, seed, step)
            ends = step + 1 in due or (step + 1) % case.reuse == 0
            if ends and not math.isfinite(float(metrics["grad/preference"])):
                break
        else:
            skipped += 1
        if step + 1 in due:
            if trains:
                mass = float(metrics["loss/negative_mass"])
            look(step + 1)
            if not math.isfinite(rows[-1]["reward"]):
                rows.pop()
                break
    for step in sorted(due):
        if step > rows[-1]["step"]:
            rows.append(rows[-1] | {"step": step, "status": "failed"})
    return rows


def _evaluations(case: BanditCase) -> frozenset[int]:
    """Return the steps after which a run is measured: whole refreshes where there are enough of them."""
    unit = case.reuse if case.refreshes >= POINTS // 4 else 1
    every = unit * max(1, -(-case.steps // (unit * POINTS)))
    return frozenset([*range(every, case.steps, every), case.steps])


def _start(seed: int, tokens: int, value_head: bool) -> CategoricalPolicy:
    """Return the policy that all runs of a seed begin with: fitted to pi_ref."""
    model = CategoricalPolicy(
        reference_bins(), 100, tokens, torch_generator(seed, "bandit/init"), value_head=value_head
    )
    model.load_state_dict(_fitted(seed, tokens), strict=False)  # the value head, where there is one, begins at zero
    return model


@functools.lru_cache(maxsize=64)
def _fitted(seed: int, tokens: int) -> dict[str, Tensor]:
    model = CategoricalPolicy(reference_bins(), 100, tokens, torch_generator(seed, "bandit/init"))
    fit_reference(model, BanditProblem().contexts(UNSEEN, torch_generator(seed, "bandit/reference")))
    return model.state_dict()


def _draw(case: BanditCase, model: CategoricalPolicy, contexts: Tensor, seed: int, step: int) -> ExperienceBatch:
    """Return one refresh of scored and paired completions."""
    refresh = step // case.reuse
    if case.source == "policy":
        generator = torch_generator(seed, "bandit/sample", refresh)
        batch = case.problem.experience(model, contexts, case.completions, generator, step)
    else:
        generator = torch_generator(seed, "bandit/data", refresh)
        batch = case.problem.foreign_experience(contexts, case.completions, generator)
    assert batch.rewards is not None
    found = pair_up(batch.rewards, batch.prompt_of, case.pairing)
    return replace(batch, pairs=found.pairs, margins=found.margins, pair_weights=torch.ones(len(found)))


def _pairs(batch: ExperienceBatch) -> Tensor:
    assert batch.pairs is not None
    return batch.pairs


@torch.no_grad()
def displacement(model: CategoricalPolicy, batch: ExperienceBatch) -> Row:
    """Return what became of the completions trained on.

    Returns:
        delta_chosen, delta_rejected: mean of log pi / pi_ref over the chosen and the rejected of all pairs.
        mass_best, mass_rest, mass_unseen: probability of each prompt's best completion, of its other completions, and
            of all that was never drawn (one position only).
    """
    assert batch.rewards is not None
    token_logps = model.outputs(batch).token_logps
    deltas = (token_logps - model.reference_token_logps(batch)).sum(1)
    pairs = _pairs(batch)
    chosen, rejected = deltas[pairs].mean(0).tolist() if len(pairs) else (math.nan, math.nan)
    row: Row = {"delta_chosen": chosen, "delta_rejected": rejected}
    if model.tokens == 1:
        actions = batch.completions.view(len(batch.prompts), -1)
        best = actions.gather(1, batch.rewards.view(len(actions), -1).argmax(1, keepdim=True))
        probs = model.log_probs(batch.prompts)[:, 0].exp()
        seen = torch.zeros_like(probs).scatter_(1, actions, 1.0)
        mass_best = probs.gather(1, best).mean()
        mass_seen = (probs * seen).sum(1).mean()
        row |= {
            "mass_best": float(mass_best),
            "mass_rest": float(mass_seen - mass_best),
            "mass_unseen": float(1 - mass_seen),
        }
    return row


Target = Literal["aligned", "misaligned"]
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
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """The list that every arm chooses from."""
    fixed_rates: tuple[float, ...] = (1e-3, 1e-2)
    """Rates of the reuse arms with fixed samples and steps, which choose nothing."""
    prompts: int = 10
    """Contexts trained on."""
    completions: int = 10
    """N: completions a context and refresh."""
    refreshes: int = 30
    """Refreshes of on-policy arms."""
    short_refreshes: int = 10
    """Refreshes of the lambda and pairing arms, short so that not everything is solved."""
    reuse: int = 10
    """T of on-policy arms."""
    offline_steps: int = 100
    """Updates of offline arms on their fixed data."""
    negatives: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """lambda of the group "negative"."""
    reuse_samples: tuple[int, ...] = (1, 2, 5, 10, 20)
    """T at a fixed number of samples (20 refreshes): steps grow with T."""
    reuse_steps: tuple[int, ...] = (1, 5, 10, 25, 100)
    """T at a fixed number of samples and of steps (100): N grows with T, refreshes fall."""
    prompt_grid: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Numbers of prompts of the group "prompts"."""
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
        if any(100 % t for t in self.reuse_steps):
            raise ConfigError(f"reuse_steps must divide 100 updates, found {self.reuse_steps}")


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
OFFLINE = tuple(name for name, method in METHODS.items() if not method.on_policy)
REUSED = ("on-policy best-of-n", "on-policy rloo", "on-policy ppo", "on-policy ipo")
TOKENS = ("offline best-of-n", "offline ipo", "on-policy best-of-n", "on-policy rloo", "on-policy ipo")


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

    short = {"refreshes": study.short_refreshes}
    total = {"refreshes": 1, "completions": study.refreshes * study.completions, "reuse": study.refreshes * study.reuse}
    if "main" in study.arms:
        for target in study.targets:
            for method in METHODS:
                add("main", method, target)
    if "matched" in study.arms:
        for target in study.matched_targets:
            for method in OFFLINE:
                add("matched", method, target, "refreshed", refreshes=study.refreshes, reuse=study.reuse)
            add("matched", "offline best-of-n", target, "one set", pairing="best_rest", **total)
            add("matched", "offline ipo", target, "one set", pairing="best_rest", **total)
    if "negative" in study.arms:
        for method in (
            "offline dpo",
            "offline ipo",
            "on-policy rloo",
            "on-policy ppo",
            "on-policy dpo",
            "on-policy ipo",
        ):
            for value in study.negatives:
                more = short if METHODS[method].on_policy else {}
                add("negative", method, "misaligned", f"{value:g}", negative=value, **more)
    if "pairing" in study.arms:
        rules: tuple[PairingRule, ...] = ("all", "best_worst", "best_rest")
        for method in ("offline dpo", "offline ipo", "on-policy dpo", "on-policy ipo"):
            for rule in rules:
                more = short if METHODS[method].on_policy else {}
                add("pairing", method, "misaligned", rule, pairing=rule, **more)
    if "reuse" in study.arms:
        for method in REUSED:
            for t in study.reuse_samples:
                one: dict[str, Any] = {"refreshes": 20, "reuse": t, "pairing": "best_rest"}
                add("reuse", method, "misaligned", f"samples/{t}", (study.fixed_rates[0],), **one)
            for t in study.reuse_steps:
                both: dict[str, Any] = {"refreshes": 100 // t, "reuse": t, "pairing": "best_rest"}
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
        for method in TOKENS:
            add("tokens", method, "misaligned", tokens=study.tokens)
            if not METHODS[method].on_policy:
                refreshed = {"refreshes": study.refreshes, "reuse": study.reuse}
                add("tokens", method, "misaligned", "refreshed", tokens=study.tokens, **refreshed)
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
    return np.array([math.nan if run[name][-1] is None else run[name][-1] for run in runs])


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
    return arm.group in ("main", "tokens") and arm.case.source == "policy" and len(arm.rates) > 1


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

    def keep(task: tuple[BanditCase, list[int]], lines: str) -> None:
        nonlocal done
        with file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
        records.update(_parsed(lines))
        done += task[0].steps * len(task[1])
        progress.advance_to(done, f"{len(records)} runs on disk")

    try:
        with ProgressLine(label, total) as progress:
            if workers == 0:
                for task in missing.items():
                    keep(task, work(task))
                return records
            with LocalExecutor(workers) as pool:
                waiting = {pool.submit(work, task): task for task in missing.items()}
                while waiting:
                    for future in wait(waiting, 1.0, FIRST_COMPLETED).done:
                        keep(waiting.pop(future), future.result() or "")
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted from None
    except BrokenExecutor:
        raise SteelyardError(
            "a worker process died (killed, or out of memory); the same command goes on where it stopped"
        ) from None
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

    def row(result: ArmResult, rate: float, chosen: str, seed: int, run: Columns) -> list[Any]:
        arm = result.arm
        ends = [run[name][-1] if name in run else None for name in values]
        return [arm.group, arm.target, arm.method, arm.variant, rate, chosen, seed, *ends, areas([run])[0]]

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
        with (out / name).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([[*names, *values, "area"], *rows])


PRESETS = {
    # about 390,000 updates: some 12 CPU-minutes
    "tiny": BanditStudy(),
    "small": BanditStudy(
        seeds=tuple(range(5, 25)),
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        matched_targets=("misaligned", "aligned"),
        fixed_rates=(1e-3, 3e-3, 1e-2),
        negatives=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        reuse_samples=(1, 2, 5, 10, 20, 50),
        reuse_steps=(1, 2, 5, 10, 20, 50, 100),
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
        negatives=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        reuse_samples=(1, 2, 5, 10, 20, 50),
        reuse_steps=(1, 2, 5, 10, 20, 50, 100),
        prompt_grid=(5, 10, 20, 50, 100, 200, 500, 1000),
    ),
}
