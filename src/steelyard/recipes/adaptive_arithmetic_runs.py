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
import torch

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import PruneRule, TemperatureSchedule, Trace
from steelyard.adapt.decoding import ModelBackend
from steelyard.adapt.replay import ReplayBackend
from steelyard.config import Config, require_positive
from steelyard.data.buffer import trimmed
from steelyard.data.prefixes import PoolTokens, PrefixSource
from steelyard.data.sample_pool import SamplePool
from steelyard.data.sampler import EpochSampler
from steelyard.envs.arithmetic import (
    ASK,
    EOS,
    NO,
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
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig, build_evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import INIT_STD, TransformerConfig
from steelyard.objectives.base import Learner
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner
from steelyard.objectives.self_eval import SelfEvalConfig, SelfEvaluation
from steelyard.recipes.adaptive_replays import (
    ADAPTIVE,
    BOTH,
    MIXES,
    VERIFIER,
    Replays,
    counts_of,
    enough_for,
    gate_rows,
    policy_of,
    reader_rows,
    rows_of_outcomes,
    strata_rows,
)
from steelyard.recipes.hyre_jobs import Row
from steelyard.rng import derive_seed, torch_generator
from steelyard.train.guards import FiniteGuard
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.workflows.sample_pool import PoolPrompt, SamplePoolConfig, build_pool
from steelyard.workflows.self_eval import SelfEvalTraining, TrainedSelfEval, train_self_eval
from steelyard.workflows.self_eval_evaluation import score_pool

ReaderName = Literal["suffix", "slot", "probe", "state"]
READERS: dict[ReaderName, SuffixConfig | SlotConfig | ProbeConfig] = {
    "suffix": SuffixConfig(tokens=(ASK,), yes_token=YES, no_token=NO, reserved=(ASK, YES, NO)),
    "slot": SlotConfig(yes_token=YES, no_token=NO),
    "probe": ProbeConfig(hidden=(128, 128)),
    "state": ProbeConfig(hidden=(128, 128), confidence=False),
}
TRAINING: dict[Stratum, float] = {"easy": 0.4, "medium": 0.4, "hopeless": 0.2}
"""The same of what is trained on."""


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
    demonstrations: int = 24_000
    """Problems with an answer each that the policy learns from."""
    policy_steps: int = 1_600
    """Updates of the policy, 64 demonstrations each."""
    train_prompts: int = 800
    """Prompts whose samples train the readers."""
    validation_prompts: int = 300
    """Prompts of each mix that calibrate readers and choose thresholds."""
    test_prompts: int = 1_000
    """Prompts of each mix in the tables; mixes share prompts."""
    samples: int = 16
    """N: samples of every prompt."""
    reader: ReaderName = "slot"
    """Which reader the tables are about."""
    readers: tuple[ReaderName, ...] = ("suffix", "slot", "probe", "state")
    """Readers that are compared; state: a probe that is not told how likely the tokens were."""
    reader_steps: int = 300
    """Updates of a reader, 24 prompts with 8 samples each."""
    learning_rate: float = 1e-3
    """Adam's step of suffix, slot and verifier."""
    kl_weight: float = 3.0
    """How firmly the policy is kept while a suffix or slot reader is trained into it."""
    checkpoints: tuple[int, ...] = (6, 12)
    """Tokens after which samples are looked at: about 25% and 50% of the median length."""
    pruned: tuple[float, ...] = (0.5, 0.75)
    """Shares of 16 parallel samples that are given up."""
    thresholds: tuple[float, ...] = (
        0.1,
        0.2,
        0.3,
        0.5,
        0.6,
        0.7,
        0.75,
        0.8,
        0.85,
        0.88,
        0.91,
        0.93,
        0.95,
        0.97,
        0.98,
        0.99,
    )
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
                parameter.mul_(study.width**-0.5 / INIT_STD)
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
            None,
            self.prompts,
            self.trained.model,
            ArithmeticScorer(self.study.language.modulus),
            config,
            evaluator=evaluator,
            answer=answer_of,
            eos=EOS,
            decode=ArithmeticTokenizer().decode,
            source="arithmetic",
            quiet=True,
        )

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
    alone = isinstance(READERS[name], ProbeConfig)  # beside a frozen model
    training = SelfEvalTraining(
        SelfEvalConfig(reader=READERS[name], learning_rate=study.learning_rate, kl_weight=study.kl_weight),
        batch_prompts=24,
        samples_per_prompt=8,
        prefixes=2 if name == "suffix" else 12,  # each is another row to read for a suffix, and free for the others
        steps=study.reader_steps * (4 if alone else 1),  # a probe's update is a hundredth of the others'
        evaluation_prompts=study.validation_prompts,
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
    source = PrefixSource(PoolTokens(train), SelfEvalTraining().labels, 24, 8, 0, False, seed)
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


# ---- the job ----


def work(job: SeedJob) -> list[Row]:
    """Carry out everything of one seed."""
    torch.set_num_threads(1)
    study, seed, clock = job.study, job.seed, _Clock()
    policy = train_policy(study, seed)
    clock("policy")
    unread = TrainedSelfEval(policy, None, None)  # type: ignore[arg-type]
    problems = {
        stream: _problems(study, stream, counts_of(TRAINING, count), seed)
        for stream, count in (("train", study.train_prompts), ("held out", study.validation_prompts))
    }
    drawn = Pools(study, unread, problems["train"], seed, "train")
    # both pools: readers will meet annealed samples, too
    train = SamplePool(drawn.constant.items + drawn.annealed.items, source="arithmetic")
    held = Pools(study, unread, problems["held out"], seed, "held out").constant
    clock("samples")
    rows: list[Row] = []
    readers = {}
    for name in study.readers:
        readers[name] = train_reader(study, name, policy, train, held, seed)
        clock(f"reader {name}")
        rows += reader_rows(name, readers[name], seed)
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
    rows += strata_rows(test, seed) + gate_rows(test, study, seed) + _live_rows(study, found["test"], seed)
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
