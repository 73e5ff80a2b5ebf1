"""E10 of adaptive compute: real samples of other models, evaluators trained on their own text, rules replayed.

Which rule of stopping, choosing and pruning works on real samples? Pools of puzzles, programs, mathematics and chat
with the rewards of verifiers and judges are replayed; nothing is sampled. An evaluator reads the text through a small
frozen encoder (`adaptive_pools_evaluators.py`), so it is far weaker than the model that wrote it: what holds here are
statements about rules, not about the paper's self-evaluation.

Every prompt is tested once (cross-validation over prompts); evaluators, their calibration, and thresholds never see it.
In two pools (gsm8k, alpaca_eval) a prompt's samples come from different systems: a sample is a random system's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from rich.console import Console

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import (
    Budget,
    ComputePolicy,
    PruneRule,
    StopRule,
    TemperatureSchedule,
)
from steelyard.adapt.replay import ReplayBackend
from steelyard.adapt.selection import expected_reward
from steelyard.bench.calibration import auc_across, auc_within, ece
from steelyard.bench.rows import write_rows
from steelyard.config import Config, require_positive, require_range
from steelyard.data.feature_cache import cached_features
from steelyard.data.restart_labels import RestartLabelConfig, margin_of, soft_labels
from steelyard.data.sample_pool import SamplePool
from steelyard.data.sample_pool_imports import alpaca_eval, game24, gsm8k, humaneval, math_best_of_8
from steelyard.errors import ConfigError, DataError
from steelyard.nets.encoder import EncoderConfig, load_encoder
from steelyard.nets.lm import cache_folder
from steelyard.recipes.adaptive_pools_evaluators import (
    Evaluator,
    Split,
    fit_evaluator,
    log_lengths,
    splits,
    texts_of,
    thinned,
    unit_rewards,
)
from steelyard.recipes.adaptive_pools_page import BEST, ONE, ORACLE, PRUNED, RANDOM, findings, sections
from steelyard.recipes.adaptive_statistics import Outcome, averaged, choose_threshold, outcome
from steelyard.recipes.hyre_jobs import Row, begin, carry_out
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]
PoolName = Literal["game24_cot", "game24_standard", "humaneval", "math", "gsm8k", "alpaca_eval"]
POOLS: tuple[PoolName, ...] = get_args(PoolName)
TEXT, LENGTH, ABSOLUTE, REWARD = "text", "length", "correctness", "reward model"
"""Evaluators: P(no better) from text and from length alone, P(correct) from text, P(no better) from a reward model."""


@dataclass(frozen=True)
class PoolsStudy(Config):
    """Replay rules of stopping, choosing and pruning on real samples with rewards."""

    data: str | None = None
    """Folder with the real pools (game24_gpt4_samples, humaneval_codegen_samples, ...)."""
    pools: tuple[PoolName, ...] = POOLS
    """Which of them."""
    samples: int = 16
    """Most samples of a prompt in a replay, N; pools with fewer use all they have."""
    kept: int = 20
    """Samples of a prompt that are read at all; the others of a large pool are left out at random."""
    prompts: int = 300
    """Most prompts of a pool; the first ones."""
    folds: int = 5
    """Parts of the prompts: one is tested, the next one validates, the others train."""
    orders: int = 8
    """Random orders of a prompt's samples that a replay is averaged over."""
    targets: tuple[float, ...] = (1.5, 3.0)
    """Average numbers of samples that thresholds are chosen for, on validation prompts."""
    thresholds: int = 12
    """Candidates for a threshold: quantiles of the validation prompts' scores."""
    prior_strengths: tuple[float, ...] = (1.0, 4.0)
    """a of the rules that shrink the chance of a better sample after every failure."""
    labels: RestartLabelConfig = field(default_factory=lambda: RestartLabelConfig(0.25, "quantile"))
    """When a sample counts as better; a quantile of 0.25 is 0 where rewards are 0 and 1."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(max_prompt_tokens=48, max_tokens=128))
    """What reads the texts."""
    seed: int = 0
    """Of folds and of the samples that are left out."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "samples", "kept", "prompts", "orders", "targets", "prior_strengths")
        require_range(self, 2, 1000, "thresholds")
        require_range(self, 3, 100, "folds")
        if not self.pools:
            raise ConfigError(f"pools must not be empty; there are {', '.join(POOLS)}")


PRESETS: dict[str, PoolsStudy] = {
    "tiny": PoolsStudy(pools=("math",), orders=2, kept=8),
    "small": PoolsStudy(),
    "paper": PoolsStudy(kept=100, prompts=1_000, orders=32, encoder=EncoderConfig()),
}
"""Sizes; "paper" reads every sample, uncut up to 256 tokens."""


@dataclass(frozen=True)
class PoolJob:
    """One pool.

    Attributes:
        config: of the study.
        pool: its name.
        out: folder of the study, where the features are.
        stage: "texts" are read before rules are tried.
    """

    config: PoolsStudy
    pool: PoolName
    out: str
    stage: Literal["texts", "rules"]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.pool} {self.stage}"


def run(config: PoolsStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes prompts.csv (one row a pool, way of spending compute and prompt), evaluators.csv, settings.csv and pools.csv
    into `out`.

    Raises:
        DataError: no folder was given, or a pool is not in it.
        ConfigError: the folder holds a study with other settings.
        MissingExtraError: the extra `lm` is not installed.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    if config.data is None:
        raise DataError("real sample pools cannot be generated; give the folder that holds them: --data DIR")
    begin(out, replace(config, data=None))  # where the data lie is no setting
    jobs = [PoolJob(config, name, str(out), "texts") for name in config.pools]
    carry_out(jobs, see, out, "real pools: texts", workers)
    rows = carry_out([replace(job, stage="rules") for job in jobs], work, out, "real pools: rules", workers)
    kinds = {
        kind: [row["values"] for row in rows if row["kind"] == kind]
        for kind in ("prompts", "evaluators", "settings", "pools")
    }
    for kind, found in kinds.items():
        write_rows(out / f"{kind}.csv", found)
    return sections(kinds), findings(kinds)


def read_pool(name: PoolName, data: str) -> SamplePool:
    """Return a pool as it is imported."""
    folder = Path(data)
    match name:
        case "game24_cot":
            return game24(folder / "game24_gpt4_samples", "cot")
        case "game24_standard":
            return game24(folder / "game24_gpt4_samples", "standard")
        case "humaneval":
            return humaneval(folder / "humaneval_codegen_samples")
        case "math":
            return math_best_of_8(folder / "math_best_of_8_rm_scored")
        case "gsm8k":
            return gsm8k(folder / "gsm8k")
        case "alpaca_eval":
            return alpaca_eval(folder / "alpaca_eval_prefs_nc")


@dataclass(frozen=True)
class Prepared:
    """A pool with features of its texts.

    Attributes:
        pool: P prompts, N samples of each.
        features: {evaluator: [P, N, F]} of whole answers.
        cut: [P, N, F] of their first words, for `TEXT`.
        words: how many words those are.
    """

    pool: SamplePool
    features: Mapping[str, Floats]
    cut: Floats
    words: int


def samples_of(job: PoolJob) -> tuple[SamplePool, int]:
    """Return the samples that are used, and after how many words half of them are given up."""
    config = job.config
    assert config.data is not None
    pool = thinned(read_pool(job.pool, config.data), config.kept, config.seed)
    pool = pool.take(range(min(len(pool), config.prompts)))
    return pool, max(1, int(np.median(pool.array("lengths")) / 2))


def _features(job: PoolJob) -> Path:
    return Path(job.out) / f"{job.pool}.safetensors"


def see(job: PoolJob) -> list[Row]:
    """Write the vectors of a pool's texts, whole and cut, into the study's folder; the cache spares doing it again."""
    pool, words = samples_of(job)
    encoder = load_encoder(job.config.encoder)
    vectors = {
        name: cached_features(cache_folder() / "features", encoder.key, texts_of(pool, limit), encoder.encode)
        for name, limit in (("whole", None), ("cut", words))
    }
    unfinished = _features(job).with_suffix(".part")
    safetensors.numpy.save_file(vectors, unfinished)
    unfinished.rename(_features(job))
    return []


def prepare(job: PoolJob) -> Prepared:
    """Return a pool with the features of its texts."""
    pool, words = samples_of(job)
    vectors = safetensors.numpy.load_file(_features(job))
    shape = pool.rewards().shape

    def seen(name: str, limit: int | None) -> Floats:
        return np.concatenate([vectors[name].astype(np.float64).reshape(*shape, -1), log_lengths(pool, limit)], 2)

    whole = seen("whole", None)
    features = {TEXT: whole, LENGTH: log_lengths(pool), ABSOLUTE: whole}
    if all("rm_score" in item.columns for item in pool):
        features[REWARD] = pool.array("rm_score")[..., None]
    return Prepared(pool, features, seen("cut", words), words)


_NUMBERS = ("rewards", "samples", "decoded", "evaluated")


def work(job: PoolJob) -> list[Row]:
    """Train evaluators in every fold and replay every rule on its test prompts."""
    config, ready = job.config, prepare(job)
    rewards, rows = ready.pool.rewards(), []
    folds = splits(len(rewards), config.folds, config.seed)
    outcomes: dict[str, list[tuple[npt.NDArray[np.int64], Outcome]]] = {}
    scores = {name: np.full(rewards.shape, np.nan) for name in ready.features}
    margin = 0.0
    for number, split in enumerate(folds):
        margin = margin_of(list(rewards[split.train]), config.labels)
        fitted = {name: evaluator_of(name, ready, split, margin) for name in ready.features}
        read = {name: one.probabilities(ready.features[name]) for name, one in fitted.items()}
        for name, values in read.items():
            scores[name][split.test] = values[split.test]
        early = fit_of(ready.cut, rewards, split, margin)
        found, chosen = ways(ready, split, read, early.probabilities(ready.cut), config)
        for name, one in found.items():
            outcomes.setdefault(name, []).append((split.test, one))
        rows += [{"kind": "settings", "values": {"pool": job.pool, "fold": number, **row}} for row in chosen]
    for name, parts in outcomes.items():
        for tested, one in parts:
            for place, prompt in enumerate(tested):
                numbers = {key: float(getattr(one, key)[place]) for key in _NUMBERS}
                row = {"pool": job.pool, "way": name, "prompt": int(prompt), **numbers}
                rows.append({"kind": "prompts", "values": row})
    rows += [{"kind": "evaluators", "values": {"pool": job.pool, **row}} for row in judged(scores, rewards, margin)]
    about = {"prompts": len(rewards), "samples": rewards.shape[1], "reward": float(rewards.mean()),
             "varied": float(np.mean(rewards.max(1) > rewards.min(1) + margin)), "margin": margin,
             "words": float(ready.pool.array("lengths").mean()), "cut": ready.words}  # fmt: skip
    return [*rows, {"kind": "pools", "values": {"pool": job.pool, **about}}]


def evaluator_of(name: str, ready: Prepared, split: Split, margin: float) -> Evaluator:
    """Fit one of the evaluators in a fold; `ABSOLUTE` learns the reward, the others whether a restart is better."""
    rewards = ready.pool.rewards()
    if name != ABSOLUTE:
        return fit_of(ready.features[name], rewards, split, margin)
    x, y = ready.features[name], unit_rewards(rewards, split.train)
    return fit_evaluator((x[split.train], y[split.train]), (x[split.validation], y[split.validation]))


def fit_of(x: Floats, rewards: Floats, split: Split, margin: float) -> Evaluator:
    """Fit P(no fresh sample would be better) in a fold."""
    y = 1 - soft_labels(rewards, margin)
    return fit_evaluator((x[split.train], y[split.train]), (x[split.validation], y[split.validation]))


def judged(scores: Mapping[str, Floats], rewards: Floats, margin: float) -> list[Row]:
    """Return what every evaluator's scores of unseen prompts are worth."""
    better, everyone = 1 - soft_labels(rewards, margin), np.arange(len(rewards))
    rows = []
    for name, values in scores.items():
        generator = numpy_generator(0, f"adaptive/pools/{name}")
        within, across = auc_within(values, rewards, generator, margin), auc_across(values, rewards, generator, margin)
        targets = unit_rewards(rewards, everyone) if name == ABSOLUTE else better
        row: Row = {"evaluator": name, "ece": ece(values.ravel(), targets.ravel())}
        for where, found in (("within", within), ("across", across)):
            row |= {f"auc_{where}": found and found.value, f"auc_{where}_low": found and found.low,
                    f"auc_{where}_high": found and found.high}  # fmt: skip
        rows.append(row)
    return rows


def ways(
    ready: Prepared, split: Split, read: Mapping[str, Floats], early: Floats, config: PoolsStudy
) -> tuple[dict[str, Outcome], list[Row]]:
    """Return every way of spending compute on the test prompts of a fold, and the thresholds that were chosen."""
    pools = {
        name: ready.pool.with_scores(list(values), list(early[..., None]), (ready.words,))
        for name, values in read.items()
    }
    most = min(config.samples, ready.pool.rewards().shape[1])
    test = {name: pool.take(split.test.tolist()) for name, pool in pools.items()}
    found = {ONE: fixed(test[TEXT], ONE, "first", 1)}
    for k in sorted({k for k in (2, 4, 8) if k < most} | {most}):
        for name in read:
            label = BEST.format(name) if k == most else f"best of {k} by {name}"
            found[label] = fixed(test[name], label, "score", k)
    if any(any(item.answers) for item in test[TEXT]):
        found["majority vote"] = fixed(test[TEXT], "majority vote", "majority", most)
    found[ORACLE] = fixed(test[TEXT], ORACLE, "oracle", most)
    settings: list[Row] = []
    rules = [(name, 0.0) for name in read] + [(TEXT, strength) for strength in config.prior_strengths]
    for name, strength in rules:
        curve = thresholds(pools[name].take(split.validation.tolist()), read[name][split.validation], strength, config)
        for target in config.targets:
            if target >= most:
                continue
            theta = choose_threshold(curve, target)
            label = adaptive_name(name, strength, target)
            found[label] = replayed(test[name], label, stopping(theta, strength, most), config.orders)
            settings.append({"way": label, "threshold": theta})
    if most > 2:
        for label, kind in ((PRUNED, "quantile"), (RANDOM, "random")):
            rule = PruneRule("quantile" if kind == "quantile" else "random", (ready.words,), 0.5)
            found[label] = replayed(test[TEXT], label, at_once(rule, most), config.orders)
    return found, settings


def adaptive_name(evaluator: str, strength: float, target: float) -> str:
    """Return what tables call a stopping rule."""
    shrunk = f", shrunk (a = {strength:g})" if strength else ""
    return f"adaptive by {evaluator}{shrunk}, for {target:g} samples"


def fixed(pool: SamplePool, label: str, rule: str, k: int) -> Outcome:
    """Return what choosing among k samples comes to, over all subsets."""
    words = pool.array("lengths").mean(1) * k
    spent = np.full(len(pool), float(k))
    return Outcome(label, expected_reward(pool, rule, k), spent, words, np.zeros(len(pool)))


def thresholds(pool: SamplePool, scores: Floats, strength: float, config: PoolsStudy) -> list[tuple[float, Outcome]]:
    """Return candidates with what they come to on validation prompts."""
    most = min(config.samples, scores.shape[1])
    candidates = np.unique(np.quantile(scores, np.linspace(0, 1, config.thresholds)))
    return [
        (float(theta), replayed(pool, "validation", stopping(float(theta), strength, most), config.orders))
        for theta in candidates
    ]


def stopping(theta: float, strength: float, most: int) -> ComputePolicy:
    """Return a policy that stops at a threshold; temperature 1 stands for "as they were drawn"."""
    rule = StopRule("threshold", theta, strength)
    return ComputePolicy(TemperatureSchedule("constant"), rule, PruneRule(), Budget(most))


def at_once(prune: PruneRule, most: int) -> ComputePolicy:
    """Return a policy that starts all samples together and gives some up."""
    return ComputePolicy(TemperatureSchedule("constant"), StopRule("never"), prune, Budget(most), (most,))


def replayed(pool: SamplePool, label: str, policy: ComputePolicy, orders: int) -> Outcome:
    """Return what a policy comes to on a pool, averaged over orders of its samples."""
    tried: Sequence[Outcome] = [
        outcome(label, sample(ReplayBackend(pool, order), len(pool), policy, seed=order)) for order in range(orders)
    ]
    return averaged(tried)
