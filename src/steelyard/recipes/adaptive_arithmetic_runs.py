"""Tier 1 of the adaptive-compute study: what one seed does, from the first weight to the rows of its tables.

A transformer learns from careless demonstrations (`envs/arithmetic.py`); its samples train three readers of "would you
do better if you started over?"; test prompts are sampled once at temperature 1 and once annealed, and every rule of
stopping, pruning and choosing is replayed on these pools.

Shapes: P prompts, N samples.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import (
    Backend,
    Budget,
    ComputePolicy,
    PruneRule,
    StopRule,
    TemperatureSchedule,
    Trace,
)
from steelyard.adapt.decoding import ModelBackend
from steelyard.adapt.replay import ReplayBackend
from steelyard.adapt.selection import expected_reward
from steelyard.bench.calibration import auc_across, auc_within
from steelyard.config import Config, require_positive
from steelyard.data.prefixes import PoolTokens, PrefixSource
from steelyard.data.sample_pool import SamplePool
from steelyard.data.sampler import EpochSampler
from steelyard.envs.arithmetic import (
    ASK,
    EOS,
    NO,
    STRATA,
    VOCAB_SIZE,
    YES,
    ArithmeticConfig,
    ArithmeticScorer,
    ArithmeticTokenizer,
    Habits,
    Stratum,
    answer_of,
    demonstrations,
    draw_problems,
    stratum_of,
)
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import ConfigError
from steelyard.data.buffer import trimmed
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig, build_evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import INIT_STD, TransformerConfig
from steelyard.objectives.base import Learner
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner
from steelyard.objectives.self_eval import SelfEvalConfig, SelfEvaluation
from steelyard.recipes.adaptive_statistics import Outcome, averaged, choose_threshold, outcome
from steelyard.recipes.hyre_jobs import Row
from steelyard.rng import derive_seed, numpy_generator, torch_generator
from steelyard.train.guards import FiniteGuard
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.workflows.sample_pool import PoolPrompt, SamplePoolConfig, build_pool
from steelyard.workflows.self_eval import SelfEvalTraining, TrainedSelfEval, train_self_eval
from steelyard.workflows.self_eval_evaluation import score_pool

ReaderName = Literal["suffix", "slot", "probe"]
READERS: dict[ReaderName, SuffixConfig | SlotConfig | ProbeConfig] = {
    "suffix": SuffixConfig(tokens=(ASK,), yes_token=YES, no_token=NO, reserved=(ASK, YES, NO)),
    "slot": SlotConfig(yes_token=YES, no_token=NO),
    "probe": ProbeConfig(hidden=(128, 128)),
}
MIXES: dict[str, dict[Stratum, float]] = {
    "easy-heavy": {"easy": 0.75, "medium": 0.15, "hopeless": 0.10},
    "mixed": {"easy": 0.35, "medium": 0.35, "hopeless": 0.30},
}
"""Shares of the strata among test prompts."""
TRAINING: dict[Stratum, float] = {"easy": 0.4, "medium": 0.4, "hopeless": 0.2}
"""The same of what is trained on."""
VERIFIER = "verifier"
"""Column of P(right) by a model of its own."""
ONE, BEST = "one sample, T = 1", "best of {} by self-evaluation"
GREEDY, ADAPTIVE, BOTH = "greedy", "adaptive, T = 1", "adaptive and annealed"


@dataclass(frozen=True)
class ArithmeticStudy(Config):
    """Tier 1: a small transformer on step-by-step arithmetic."""

    seeds: tuple[int, ...] = (0,)
    """Each trains its own policy and readers, and has test prompts of its own."""
    language: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    """Problems and the people who demonstrate them."""
    width: int = 64
    """Width of the transformer (four heads)."""
    layers: int = 2
    """Its blocks."""
    demonstrations: int = 15_000
    """Problems with an answer each that the policy learns from."""
    policy_steps: int = 400
    """Updates of the policy, 64 demonstrations each."""
    train_prompts: int = 800
    """Prompts whose samples train the readers."""
    validation_prompts: int = 300
    """Prompts of each mix that calibrate readers and choose thresholds."""
    test_prompts: int = 1_000
    """Prompts of each mix in the tables; mixes share prompts."""
    samples: int = 16
    """N: samples of every prompt."""
    reader: ReaderName = "suffix"
    """Which reader the tables are about."""
    readers: tuple[ReaderName, ...] = ("suffix", "slot", "probe")
    """Readers that are compared."""
    reader_steps: int = 400
    """Updates of a reader, 16 prompts with 4 samples each."""
    learning_rate: float = 1e-3
    """Adam's step of suffix, slot and verifier."""
    kl_weight: float = 1.0
    """How firmly the policy is kept while a suffix or slot reader is trained into it."""
    checkpoints: tuple[int, ...] = (5, 10)
    """Tokens after which samples are looked at: about 25% and 50% of the median length."""
    pruned: tuple[float, ...] = (0.5, 0.75)
    """Shares of 16 parallel samples that are given up."""
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.91, 0.93, 0.95, 0.97, 0.98, 0.99)
    """Of the stopping rule."""
    most_samples: tuple[float, ...] = (1.2, 1.5, 2.0)
    """Average samples that a threshold may take on validation prompts."""
    orders: int = 4
    """Orders of the samples at temperature 1 that outcomes are averaged over."""
    live_prompts: int = 24
    """Test prompts that are also sampled live, to compare with the replay."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(
            self, "width", "layers", "demonstrations", "policy_steps", "train_prompts", "validation_prompts",
            "test_prompts", "samples", "reader_steps", "learning_rate", "checkpoints", "thresholds", "most_samples",
            "orders", "live_prompts",
        )  # fmt: skip
        if not self.seeds or self.reader not in self.readers:
            raise ConfigError(f"expected a seed, and the reader {self.reader!r} among {self.readers}")

    @property
    def transformer(self) -> TransformerConfig:
        """Size of the policy; one more position for the question."""
        context = self.language.max_prompt + self.language.max_answer + 1
        return TransformerConfig(VOCAB_SIZE, self.width, self.layers, heads=4, context=context)


@dataclass(frozen=True)
class SeedJob:
    """All of one seed."""

    study: ArithmeticStudy
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"seed {self.seed}"


# ---- policy and samples ----


def train_policy(study: ArithmeticStudy, seed: int) -> TinyLM:
    """Return a transformer that has learned from careless demonstrations."""
    model = TinyLM(study.transformer, torch_generator(seed, "policy"), reference="none")
    with torch.no_grad():
        # the transformer's initial scale suits wide ones; at this width it would spend most updates on growing
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= study.width**-0.5 / INIT_STD
    problems = draw_problems(study.language, counts_of(TRAINING, study.demonstrations), seed, "demonstrations")
    data = demonstrations(study.language, Habits.of(study.language, seed), problems, seed)
    sampler = EpochSampler(len(problems), 64, seed, "policy")
    learner = build_preference_learner(model, PREFERENCE_OBJECTIVES["sft"](learning_rate=3e-3))
    _fit(learner, lambda step: trimmed(data.of_prompts(torch.from_numpy(sampler.indices(step)))),
         study.policy_steps, seed)  # fmt: skip
    return model


def _fit(learner: Learner, draw: Callable[[int], Any], steps: int, seed: int) -> None:
    optimizers, guard = Optimizers(learner, OptimConfig(max_grad_norm=1.0)), FiniteGuard()
    for step in range(steps):
        update(learner, optimizers, draw(step), seed, step, guard)


def counts_of(shares: Mapping[Stratum, float], count: int) -> dict[Stratum, int]:
    """Return how many problems of each stratum a mix of `count` has."""
    found = {stratum: round(share * count) for stratum, share in shares.items()}
    found["easy"] += count - sum(found.values())
    return found


def enough_for(mixes: Mapping[str, Mapping[Stratum, float]], count: int) -> dict[Stratum, int]:
    """Return how many problems of each stratum serve every mix of `count`."""
    return {stratum: max(counts_of(shares, count)[stratum] for shares in mixes.values()) for stratum in STRATA}


def mix_rows(pool: SamplePool, shares: Mapping[Stratum, float], count: int) -> npt.NDArray[np.int64]:
    """Return which prompts of a pool make up a mix: the first so many of each stratum."""
    wanted = counts_of(shares, count)
    strata = np.array([item.stratum for item in pool])
    return np.concatenate([np.flatnonzero(strata == stratum)[: wanted[stratum]] for stratum in STRATA])


class Pools:
    """Samples of a model: one pool at temperature 1 and one annealed, of the same prompts."""

    def __init__(
        self, study: ArithmeticStudy, trained: TrainedSelfEval, problems: Sequence[str], seed: int, stream: str
    ) -> None:
        tokenizer = ArithmeticTokenizer()
        self.study, self.trained, self.seed = study, trained, derive_seed(seed, f"samples/{stream}")
        self.prompts = [PoolPrompt(one, tuple(tokenizer.prompt(one)), stratum_of(one)) for one in problems]
        self.constant = self._draw(TemperatureSchedule("constant"))
        self.annealed = self._draw(TemperatureSchedule("annealed"))

    def _draw(self, temperatures: TemperatureSchedule) -> SamplePool:
        evaluator = self.trained.evaluator
        config = SamplePoolConfig(
            self.study.samples,
            temperatures,
            SamplingConfig(max_new_tokens=self.study.language.max_answer),
            self.study.checkpoints if evaluator is not None else (),
            batch_prompts=len(self.prompts),
            seed=self.seed,
        )
        return build_pool(
            None, self.prompts, self.trained.model, ArithmeticScorer(), config, evaluator=evaluator, answer=answer_of,
            eos=EOS, decode=ArithmeticTokenizer().decode, source="arithmetic", quiet=True,
        )  # fmt: skip

    def live(self, count: int) -> ModelBackend:
        """Return a backend that decodes the first so many prompts."""
        return ModelBackend(
            self.trained.model,
            self.trained.evaluator,
            SamplingConfig(max_new_tokens=self.study.language.max_answer),
            self.seed,
            [prompt.tokens for prompt in self.prompts[:count]],
            eos=EOS,
            decode=ArithmeticTokenizer().decode,
        )


# ---- readers ----


def train_reader(
    study: ArithmeticStudy, name: ReaderName, policy: TinyLM, train: SamplePool, held_out: SamplePool, seed: int
) -> TrainedSelfEval:
    """Return a reader with a policy of its own, trained by the library's workflow."""
    training = SelfEvalTraining(
        SelfEvalConfig(reader=READERS[name], learning_rate=study.learning_rate, kl_weight=study.kl_weight),
        batch_prompts=16,
        steps=study.reader_steps * (4 if name == "probe" else 1),  # a probe's update is a hundredth of the others'
        evaluation_prompts=0,
        checkpoints=study.checkpoints,
        batch_size=256,
        seed=seed,
    )
    return train_self_eval(copy.deepcopy(policy), train, held_out, training)


def with_verifier(
    study: ArithmeticStudy, policy: TinyLM, train: SamplePool, pools: Sequence[SamplePool], seed: int
) -> list[SamplePool]:
    """Return pools with a column of P(right), by a model of the policy's size that has learned nothing else.

    The external reward model of the table, and with it the rule that stops at an absolute correctness.
    """
    model = copy.deepcopy(policy)
    evaluator = build_evaluator(READERS["suffix"], model, torch_generator(seed, "verifier"))
    source = PrefixSource(PoolTokens(train), SelfEvalTraining().labels, 16, 4, 0, False, seed)
    source.better = [1 - rewards for rewards in source.tokens.rewards]  # better than it is only what is right
    config = SelfEvalConfig(reader=READERS["suffix"], learning_rate=study.learning_rate, kl_weight=0.0)
    _fit(SelfEvaluation(config, model, evaluator), source.batch, study.reader_steps, seed)
    found = []
    for pool in pools:
        scores = score_pool(model, evaluator, pool, (), batch_size=256).array("scores")
        items = [
            dataclasses.replace(item, columns=item.columns | {VERIFIER: row.tolist()})
            for item, row in zip(pool, scores, strict=True)
        ]
        found.append(dataclasses.replace(pool, items=tuple(items)))
    return found


# ---- what is replayed ----


def policy_of(
    threshold: float | None,
    kind: Literal["constant", "annealed"],
    samples: int,
    prune: PruneRule | None = None,
    prior_strength: float = 0.0,
) -> ComputePolicy:
    """Return a policy that stops at a threshold; None: all samples at once."""
    if threshold is None:
        stop, waves = StopRule("never"), (samples,)
    else:
        stop, waves = StopRule("threshold", threshold, prior_strength), (1,)
    return ComputePolicy(TemperatureSchedule(kind), stop, prune or PruneRule(), Budget(samples), waves)


class Replays:
    """Rules replayed on the pools of some prompts."""

    def __init__(self, study: ArithmeticStudy, constant: SamplePool, annealed: SamplePool, extra_tokens: int) -> None:
        self.study, self.constant, self.annealed, self.extra = study, constant, annealed, extra_tokens
        self._orders = [ReplayBackend(constant, order, extra_tokens) for order in range(study.orders)]
        self._annealed = ReplayBackend(annealed, extra_tokens=extra_tokens)
        self._absolute = [
            ReplayBackend(constant.with_scores(constant.array(VERIFIER), None), order, extra_tokens)
            for order in range(study.orders)
        ]

    def adaptive(self, name: str, threshold: float, prior_strength: float = 0.0) -> Outcome:
        """Return what stopping at a threshold comes to."""
        kind: Literal["constant", "annealed"] = "annealed" if name.startswith(BOTH) else "constant"
        policy = policy_of(threshold, kind, self.study.samples, prior_strength=prior_strength)
        backends: Sequence[Backend] = [self._annealed] if kind == "annealed" else self._orders
        if name.startswith("absolute"):
            backends = self._absolute
        return self._mean(name, backends, policy)

    def pruned(self, name: str, prune: PruneRule) -> Outcome:
        """Return what giving up a part of N parallel samples comes to."""
        policy = policy_of(None, "constant", self.study.samples, prune)
        # scores decide the same in every order; random pruning does not
        return self._mean(name, self._orders if prune.kind == "random" else self._orders[:1], policy)

    def _mean(self, name: str, backends: Sequence[Backend], policy: ComputePolicy) -> Outcome:
        count = len(self.constant)
        return averaged([outcome(name, sample(one, count, policy, seed=k)) for k, one in enumerate(backends)])

    def one(self) -> Outcome:
        """Return one sample at temperature 1, the mean over all N."""
        return self._fixed(ONE, self.constant.array("rewards").mean(1), 1, 0)

    def greedy(self) -> Outcome:
        """Return the greedy sample."""
        lengths = self.annealed.array("lengths")[:, 0]
        ones = np.ones(len(lengths))
        return Outcome(GREEDY, self.annealed.array("rewards")[:, 0], ones, lengths, 0 * ones)

    def best(self, rule: str, name: str, k: int) -> Outcome:
        """Return best-of-k by a rule, the mean over all subsets."""
        return self._fixed(name, expected_reward(self.constant, rule, k), k, self.extra if rule == "score" else 0)

    def _fixed(self, name: str, rewards: npt.NDArray[np.float64], k: int, extra: int) -> Outcome:
        lengths = self.constant.array("lengths").mean(1)
        return Outcome(name, rewards, np.full(len(rewards), float(k)), k * lengths, np.full(len(rewards), k * extra))


PRUNING: dict[str, PruneRule] = {
    "lowest scores": PruneRule("quantile"),
    "scores below 0.1": PruneRule("absolute"),
    "at random": PruneRule("random"),
}


def rows_of_outcomes(study: ArithmeticStudy, validation: Replays, test: Replays, seed: int) -> list[Row]:
    """Return one row a mix and way of spending compute, with its outcome prompt by prompt."""
    n = study.samples
    fixed = [test.one(), test.greedy()]
    fixed += [test.best("score", BEST.format(k), k) for k in (2, 4, 8, 16) if k < n]
    best = test.best("score", BEST.format(n), n)
    fixed += [
        best,
        test.best(VERIFIER, f"best of {n} by an external verifier", n),
        test.best("logp", f"best of {n} by mean log-probability", n),
        test.best("certainty", f"best of {n} by self-certainty", n),
        test.best("majority", f"majority of {n}", n),
        test.best("oracle", f"best of {n} by an oracle", n),
    ]
    ways = {ADAPTIVE: 0.0, BOTH: 0.0, f"{BOTH}, shrunk": 2.0, "absolute correctness, T = 1": 0.0}
    curves = {
        name: [
            (threshold, validation.adaptive(name, threshold, prior), test.adaptive(name, threshold, prior))
            for threshold in study.thresholds
        ]
        for name, prior in ways.items()
    }
    pruned = [
        test.pruned(f"{name}, {share:.0%}", dataclasses.replace(rule, at=study.checkpoints, fraction=share))
        for share in study.pruned
        for name, rule in PRUNING.items()
        if rule.kind != "absolute" or share == study.pruned[0]
    ]
    rows: list[Row] = []
    for mix, shares in MIXES.items():
        here = mix_rows(test.constant, shares, study.test_prompts)
        there = mix_rows(validation.constant, shares, study.validation_prompts)

        def row(group: str, found: Outcome, threshold: float | None = None, most: float | None = None) -> Row:
            kept = found.take(here)  # noqa: B023 - called in this very turn
            numbers = {name: getattr(kept, name).tolist() for name in ("rewards", "samples", "decoded", "evaluated")}
            identity = {"kind": "outcome", "seed": seed, "mix": mix, "group": group, "name": found.name}  # noqa: B023
            return identity | {"threshold": threshold, "most": most} | numbers

        rows += [row("fixed", found) for found in fixed] + [row("pruned", found) for found in pruned]
        for name, curve in curves.items():
            seen = [(threshold, held_out.take(there)) for threshold, held_out, _ in curve]
            by_threshold = {threshold: found for threshold, _, found in curve}
            rows += [row("curve", found, threshold) for threshold, found in by_threshold.items()]
            for most in study.most_samples:
                chosen = choose_threshold(seen, most)
                rows.append(row("chosen", by_threshold[chosen], chosen, most))
    return rows


# ---- the job ----


def work(job: SeedJob) -> list[Row]:
    """Carry out everything of one seed."""
    torch.set_num_threads(1)
    study, seed, clock = job.study, job.seed, _Clock()
    policy = train_policy(study, seed)
    clock("policy")
    unread = TrainedSelfEval(policy, None, None)  # type: ignore[arg-type]
    drawn = Pools(study, unread, _problems(study, "train", counts_of(TRAINING, study.train_prompts), seed), seed, "train")
    train = SamplePool(drawn.constant.items + drawn.annealed.items, source="arithmetic")
    held = Pools(study, unread, _problems(study, "held out", counts_of(TRAINING, study.validation_prompts), seed), seed,
                 "held out")  # fmt: skip
    clock("samples")
    rows: list[Row] = []
    readers = {}
    for name in study.readers:
        readers[name] = train_reader(study, name, policy, train, held.constant, seed)
        clock(f"reader {name}")
        rows += _reader_rows(name, readers[name], held.constant, study, seed)
    main = readers[study.reader]
    problems = {
        stream: _problems(study, stream, enough_for(MIXES, count), seed)
        for stream, count in (("validation", study.validation_prompts), ("test", study.test_prompts))
    }
    found = {stream: Pools(study, main, problems[stream], seed, stream) for stream in problems}
    clock("test samples")
    verified = with_verifier(study, policy, train, [found["validation"].constant, found["test"].constant], seed)
    clock("verifier")
    extra = main.evaluator.extra_tokens
    validation = Replays(study, verified[0], found["validation"].annealed, extra)
    test = Replays(study, verified[1], found["test"].annealed, extra)
    rows += rows_of_outcomes(study, validation, test, seed)
    rows += _strata_rows(test, seed) + _gate_rows(test, study, seed) + _live_rows(study, found["test"], seed)
    clock("replays")
    return rows + [{"kind": "cost", "seed": seed, "step": step, "cpu_seconds": s} for step, s in clock.seconds.items()]


class _Clock:
    """CPU seconds of the steps of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def __call__(self, step: str) -> None:
        now = time.process_time()
        self.seconds[step], self._last = now - self._last, now


def _problems(study: ArithmeticStudy, stream: str, counts: Mapping[Stratum, int], seed: int) -> list[str]:
    return draw_problems(study.language, counts, seed, stream)


def _reader_rows(
    name: str, trained: TrainedSelfEval, held_out: SamplePool, study: ArithmeticStudy, seed: int
) -> list[Row]:
    report = trained.report
    assert report is not None
    drift = report.drift
    rows = []
    for one in report.rows:
        rows.append(
            {
                "kind": "reader",
                "seed": seed,
                "reader": name,
                "where": one.where,
                "within": None if one.within is None else one.within.value,
                "across": None if one.across is None else one.across.value,
                "ece": one.ece,
                "brier": one.brier,
                "extra_tokens": trained.evaluator.extra_tokens,
                "kl": 0.0 if drift is None else drift.kl,
                "greedy_match": 1.0 if drift is None else drift.greedy_match,
            }
        )
    return rows


def _strata_rows(test: Replays, seed: int) -> list[Row]:
    strata = np.array([item.stratum for item in test.constant])
    rewards = test.constant.array("rewards")
    greedy, best = test.greedy().rewards, expected_reward(test.constant, "score", rewards.shape[1])
    return [
        {
            "kind": "stratum",
            "seed": seed,
            "stratum": stratum,
            "prompts": int((strata == stratum).sum()),
            "one": float(rewards[strata == stratum].mean()),
            "greedy": float(greedy[strata == stratum].mean()),
            "best": float(best[strata == stratum].mean()),
            "oracle": float(rewards[strata == stratum].max(1).mean()),
        }
        for stratum in STRATA
    ]


def _gate_rows(test: Replays, study: ArithmeticStudy, seed: int) -> list[Row]:
    """Return the AUCs of the scores on test prompts, whose samples the trained model itself drew."""
    rows = []
    for mix, shares in MIXES.items():
        pool = test.constant.take(mix_rows(test.constant, shares, study.test_prompts).tolist())
        scores, rewards = pool.array("scores"), pool.array("rewards")
        within = auc_within(scores, rewards, numpy_generator(seed, "auc"))
        across = auc_across(scores, rewards, numpy_generator(seed, "auc"), resamples=100)
        for name, one in (("within", within), ("across", across)):
            if one is not None:
                rows.append({"kind": "auc", "seed": seed, "mix": mix, "name": name, "value": one.value, "low": one.low,
                             "high": one.high, "prompts": one.n})  # fmt: skip
    return rows


def _live_rows(study: ArithmeticStudy, pools: Pools, seed: int) -> list[Row]:
    """Return whether decoding live comes to the same as the replay."""
    count = min(study.live_prompts, len(pools.prompts))
    numbers = np.linspace(0, len(pools.prompts) - 1, count).astype(int).tolist()
    live = pools.live(len(pools.prompts))
    rows = []
    for name, policy in (
        (BOTH, policy_of(0.9, "annealed", study.samples)),
        (ADAPTIVE, policy_of(0.9, "constant", study.samples)),
        ("pruned", policy_of(None, "constant", study.samples, PruneRule("quantile", study.checkpoints))),
    ):
        pool = pools.annealed if name == BOTH else pools.constant
        extra = pools.trained.evaluator.extra_tokens
        replayed = sample(ReplayBackend(pool, extra_tokens=extra), numbers, policy)
        decoded = sample(live, numbers, policy)
        same = [_same(a, b) for a, b in zip(replayed, decoded, strict=True)]
        apart = [
            abs(x.score - y.score)
            for a, b in zip(replayed, decoded, strict=True)
            for x, y in zip(a.draws, b.draws, strict=False)
            if x.tokens == y.tokens and np.isfinite(x.score) and np.isfinite(y.score)
        ]
        rows.append({"kind": "live", "seed": seed, "policy": name, "prompts": count, "same": int(sum(same)),
                     "score_difference": float(max(apart, default=0.0))})  # fmt: skip
    return rows


def _same(a: Trace, b: Trace) -> bool:
    """Return whether two traces drew the same tokens, gave up the same samples and chose the same one."""
    tokens = [[(draw.tokens, draw.pruned_at, draw.decoded) for draw in trace.draws] for trace in (a, b)]
    return tokens[0] == tokens[1] and (a.chosen, a.stopped) == (b.chosen, b.stopped)
