"""The runs of the length study: its settings, the reference and reward models of a seed, and one run of one method."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steelyard.config import Config, require_positive, require_range
from steelyard.data.buffer import trimmed
from steelyard.data.experience import ExperienceBatch
from steelyard.data.pairing import PairingRule
from steelyard.data.sampler import EpochSampler
from steelyard.envs.length import (
    EOS,
    PAD,
    LengthLanguageConfig,
    LengthPairs,
    LengthTask,
    LengthTokenizer,
    contrast_pairs,
    draw_prompts,
    edit_distances,
    experience,
    label_pairs,
    length_rewards,
    recut,
    sft_data,
    skew_pairs,
)
from steelyard.envs.samplers import SamplingConfig, TinySampler
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import Transformer, TransformerConfig
from steelyard.objectives.base import Learner
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner
from steelyard.objectives.preference.base import PreferenceLearner
from steelyard.objectives.reward_model import RewardModel, RewardModelConfig
from steelyard.rng import derive_seed, torch_generator
from steelyard.train.experience import ExperienceConfig, ExperienceSource
from steelyard.train.guards import FiniteGuard
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

TaskName = Literal["min", "mode", "skew_long", "skew_short"]
MethodName = Literal["pref_ft", "dpo", "ipo", "best_of_n", "rwr", "rloo", "ppo", "online_dpo"]
ArmName = Literal["learned", "gold"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
METHODS: tuple[MethodName, ...] = get_args(MethodName)
SCRATCH = "min_scratch"
"""Key of the reward model that does not begin at the reference's weights."""
DISPLACED = 100
"""Pairs whose log-probs are followed."""
GOLD: dict[TaskName, LengthTask] = {"min": "min", "mode": "mode", "skew_long": "skew", "skew_short": "skew"}


@dataclass(frozen=True)
class LengthMethod:
    """One method.

    Attributes:
        label: for people.
        kind: of the objective.
        fields: its settings, but for the learning rate.
        on_policy: whether its completions come from the policy.
        negative: whether it has a negative gradient.
        pairing: rule that makes pairs of fresh completions.
    """

    label: str
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    on_policy: bool = False
    negative: bool = False
    pairing: PairingRule = "best_worst"


LENGTH_METHODS: dict[str, LengthMethod] = {
    "pref_ft": LengthMethod("Pref-FT", "pref_ft"),
    "dpo": LengthMethod("DPO", "dpo", {"beta": 0.1}, negative=True),
    "ipo": LengthMethod("IPO", "ipo", {"tau": 0.05}, negative=True),
    "best_of_n": LengthMethod("on-policy best of N", "best_of_n", on_policy=True),
    "rwr": LengthMethod("on-policy RWR", "rwr", {"tau": 1.0, "standardise": "group"}, on_policy=True),
    "rloo": LengthMethod("RLOO", "rloo", {"beta": 0.0}, on_policy=True, negative=True),
    "ppo": LengthMethod("PPO", "ppo", {"beta": 0.0}, on_policy=True, negative=True),
    "online_dpo": LengthMethod("on-policy DPO", "dpo", {"beta": 0.1}, True, True),
    # of the reuse sweep only
    "ppo_unclipped": LengthMethod(
        "PPO without clipping", "ppo", {"beta": 0.0, "epsilon": 1.0, "epsilon_high": 1e6}, on_policy=True, negative=True
    ),
}


@dataclass(frozen=True)
class LengthStudy(Config):
    """Fine-tune a small transformer on length problems by eight methods, with learned and gold rewards; compare."""

    tasks: tuple[TaskName, ...] = TASKS
    """Length problems to run."""
    methods: tuple[MethodName, ...] = METHODS
    """Methods to compare."""
    arms: tuple[ArmName, ...] = ("learned", "gold")
    """Rewards of on-policy methods: a model learned from the pairs, or the gold reward itself."""
    seeds: tuple[int, ...] = (10, 11, 12)
    """Paired seeds: every method runs with each, on the same reference, pairs and reward model."""
    tuning_seeds: tuple[int, ...] = (0,)
    """Seeds on which every method chooses its learning rate; none of them is in the tables."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Adam's steps that every method may choose among; the first is used where there are no tuning seeds."""
    language: LengthLanguageConfig = field(default_factory=LengthLanguageConfig)
    """The language."""
    width: int = 48
    """Width of the transformer (two layers, four heads)."""
    sft_examples: int = 4_000
    """Prompts with answers that the reference learns from."""
    sft_steps: int = 300
    """Updates of the reference."""
    train_prompts: int = 1_500
    """Prompts with two completions of the reference each; ties are dropped from them."""
    held_out_prompts: int = 200
    """The same for pairs that nothing is trained on, and for the reference's side of KL(reference, policy)."""
    evaluation_prompts: int = 64
    """Unseen prompts to evaluate on: with one completion each during a run, with four at its end."""
    reward_model_steps: int = 120
    """Updates of a reward model."""
    skew_rate: float = 0.2
    """Rate of the truncated exponential; skew_long has this sign, skew_short the other."""
    steps: int = 60
    """Updates of every run."""
    prompts_per_step: int = 8
    """Prompts of an update, M; offline methods see as many completions: N / 2 pairs for each."""
    num_generations: int = 4
    """Completions of a prompt, N."""
    evaluate_every: int = 6
    """Updates between evaluations."""
    reuse: tuple[int, ...] = (1, 8)
    """Sweep: passes T over each draw; as many updates, so fewer completions."""
    refresh: tuple[int, ...] = (8,)
    """Sweep: minibatches of each draw B / M, with one pass; as many updates and completions, only older ones."""
    contrasts: bool = True
    """Also train DPO and Pref-FT on pairs of similar and of distinct answers."""
    contrast_learning_rates: tuple[float, ...] = (1e-4, 3e-4)
    """Adam's steps of those runs, the same for all of them: with large ones everything is pushed down far."""
    scratch: bool = True
    """Also run on-policy methods on Min Length with a reward model that does not begin at the reference's weights."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(
            self, "learning_rates", "width", "sft_examples", "sft_steps", "train_prompts", "held_out_prompts",
            "evaluation_prompts", "reward_model_steps", "skew_rate", "steps", "prompts_per_step", "evaluate_every",
            "reuse", "refresh", "contrast_learning_rates",
        )  # fmt: skip
        require_range(self, 2, 64, "num_generations")
        if not self.learning_rates or not self.seeds:
            raise ConfigError("a length study needs at least one seed and one learning rate")
        if both := set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError(f"seeds {sorted(both)} are in both seeds and tuning_seeds; the table's must be unseen")

    @property
    def transformer(self) -> TransformerConfig:
        """Size of the model."""
        length = self.language.prompt_length + self.language.cap
        return TransformerConfig(self.language.vocab_size, self.width, layers=2, heads=4, context=length)


@dataclass(frozen=True)
class Job:
    """One run, or (without a method) what all runs of a seed share."""

    study: LengthStudy
    folder: str
    seed: int
    task: TaskName = "min"
    method: str = ""
    arm: Literal["learned", "gold", "scratch", "pairs"] = "pairs"
    learning_rate: float = 1e-3
    pairs: Literal["independent", "similar", "distinct"] = "independent"
    reuse: int = 1
    refresh: int = 1
    stage: Literal["tuning", "main", "reuse", "contrast", "scratch"] = "main"

    @property
    def name(self) -> str:
        """Of its files."""
        if not self.method:
            return f"seed{self.seed}"
        return (
            f"{self.task}-{self.method}-{self.arm}-{self.pairs}-lr{self.learning_rate:g}-T{self.reuse}-B{self.refresh}"
            f"-seed{self.seed}"
        )

    @property
    def result(self) -> Path:
        """File that holds the result; it is there when the job has ended."""
        return Path(self.folder) / ("runs" if self.method else "foundations") / f"{self.name}.json"

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that tell rows apart."""
        names = (
            "stage",
            "task",
            "method",
            "arm",
            "learning_rate",
            "pairs",
            "reuse",
            "refresh",
            "seed",
        )
        return {name: getattr(self, name) for name in names}


# ---- what all runs of a seed share ----


@dataclass(frozen=True)
class Foundation:
    """The reference, its samples and the reward models of one seed.

    Attributes:
        policy: weights of the reference's transformer.
        rewards: weights of each task's reward model, and of Min Length's from scratch (`SCRATCH`).
        prompts: int64 [P, L], of the pairs; the last `held_out_prompts` are held out.
        completions: int64 [P, 2, T] of the reference.
        lengths: int64 [P, 2].
        evaluation: int64 [E, L], prompts to evaluate on.
    """

    policy: dict[str, Tensor]
    rewards: dict[str, dict[str, Tensor]]
    prompts: Tensor
    completions: Tensor
    lengths: Tensor
    evaluation: Tensor


def lay_foundation(job: Job) -> dict[str, Any]:
    """Train the reference and the reward models of a seed; save them and return what they are like."""
    study, seed, began = job.study, job.seed, time.process_time()
    language = study.language
    model = TinyLM(study.transformer, torch_generator(seed, "reference"), reference="none")
    data = sft_data(language, study.sft_examples, torch_generator(seed, "sft data"))
    learner = build_preference_learner(model, PREFERENCE_OBJECTIVES["sft"](learning_rate=3e-3))
    _fit(learner, _draws(data.of_prompts, len(data.prompts), 64, seed, "sft"), study.sft_steps, seed)

    count = study.train_prompts + study.held_out_prompts
    prompts = draw_prompts(language, count, torch_generator(seed, "prompts"))
    samples = sample(model, study, prompts, 2, derive_seed(seed, "pairs"))
    width = samples.completions.shape[1]
    completions = torch.full((2 * count, language.cap), PAD)
    completions[:, :width] = samples.completions
    lengths = samples.lengths.long().view(count, 2)
    foundation = Foundation(
        dict(model.transformer.state_dict()),
        {},
        prompts,
        completions.view(count, 2, -1),
        lengths,
        draw_prompts(language, study.evaluation_prompts, torch_generator(seed, "evaluation prompts")),
    )
    sft_seconds = time.process_time() - began

    pair_rows: list[dict[str, Any]] = []
    proxy_rows: list[dict[str, Any]] = []
    models: list[tuple[TaskName, str]] = [(task, task) for task in study.tasks]
    if study.scratch and "min" in study.tasks:
        models.append(("min", SCRATCH))
    for task, key in models:
        began = time.process_time()
        train_pairs, held_out = task_pairs(study, foundation, task, seed)
        reward_model = _reward_model(study, seed, None if key == SCRATCH else foundation.policy)
        draw = _draws(train_pairs.batch, len(train_pairs), 32, seed, f"reward/{task}")
        _fit(reward_model, draw, study.reward_model_steps, seed)
        foundation.rewards[key] = dict(reward_model.state_dict())
        pair_rows.append(
            {"seed": seed, "task": task, "model": key, "pairs": "independent"}
            | describe_pairs(train_pairs)
            | {
                "reward_model_train_accuracy": _accuracy(reward_model, train_pairs),
                "reward_model_accuracy": _accuracy(reward_model, held_out),
                "reward_model_reference_accuracy": _accuracy(
                    reward_model, task_pairs(study, foundation, task, seed, skew=False)[1]
                ),
                "cpu_seconds": time.process_time() - began,
            }
        )
        proxy_rows += proxy_by_length(study, foundation, reward_model, task, key, seed)
    if study.contrasts:
        for kind in ("similar", "distinct"):
            pairs = task_pairs(study, foundation, "min", seed, kind)[0]
            pair_rows.append({"seed": seed, "task": "min", "pairs": kind} | describe_pairs(pairs))

    tensors = {f"policy/{name}": value for name, value in foundation.policy.items()}
    tensors |= {f"reward/{t}/{name}": value for t, rm in foundation.rewards.items() for name, value in rm.items()}
    for name in ("prompts", "completions", "lengths", "evaluation"):
        tensors[f"data/{name}"] = getattr(foundation, name)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, _weights(job.folder, seed))
    return {
        "seed": seed,
        "sft_cpu_seconds": sft_seconds,
        "reference_length": float(lengths.float().mean()),
        "reference_length_std": float(lengths.float().std()),
        "pairs": pair_rows,
        "proxy": proxy_rows,
    }


def _weights(folder: str, seed: int) -> Path:
    return Path(folder) / "foundations" / f"seed{seed}.safetensors"


@functools.lru_cache(maxsize=4)
def load_foundation(folder: str, seed: int) -> Foundation:
    """Read what `lay_foundation` saved."""
    policy: dict[str, Tensor] = {}
    rewards: dict[str, dict[str, Tensor]] = {}
    data: dict[str, Tensor] = {}
    for name, value in load_file(_weights(folder, seed)).items():
        kind, _, rest = name.partition("/")
        if kind == "reward":
            task, _, rest = rest.partition("/")
            rewards.setdefault(task, {})[rest] = value
        else:
            (policy if kind == "policy" else data)[rest] = value
    return Foundation(policy, rewards, **data)


def task_pairs(
    study: LengthStudy,
    foundation: Foundation,
    task: TaskName,
    seed: int,
    kind: str = "independent",
    skew: bool = True,
) -> tuple[LengthPairs, LengthPairs]:
    """Return (training, held-out) pairs of a task.

    Args:
        study: sizes and the language.
        foundation: whose samples become pairs.
        task: which reward labels them.
        seed: of the skewed lengths and the cuts.
        kind: independent samples, or similar or distinct ones.
        skew: False: the reference's own lengths also in a skewed task.
    """
    parts = []
    for name, rows in (("train", slice(study.train_prompts)), ("held out", slice(study.train_prompts, None))):
        drawn = foundation.prompts[rows], foundation.completions[rows], foundation.lengths[rows]
        generator = torch_generator(seed, f"pairs/{task}/{name}")
        if kind != "independent":
            # one stream for both kinds: the same lengths
            pairs = contrast_pairs(study.language, kind == "similar", *drawn, generator)
        elif task.startswith("skew") and skew:
            rate = study.skew_rate if task == "skew_long" else -study.skew_rate
            pairs = skew_pairs(study.language, rate, *drawn, generator)
        else:
            pairs = label_pairs(study.language, GOLD[task], *drawn)
        parts.append(pairs)
    return parts[0], parts[1]


def describe_pairs(pairs: LengthPairs) -> dict[str, float]:
    """Return how many, how long and how far apart."""
    distance = edit_distances(pairs.completions[:, 0], pairs.completions[:, 1], *pairs.lengths.T)
    chosen, rejected = pairs.lengths.float().mean(0).tolist()
    return {
        "count": len(pairs),
        "chosen_length": chosen,
        "rejected_length": rejected,
        "edit_distance": float(distance.float().mean()),
    }


def _reward_model(study: LengthStudy, seed: int, policy: Mapping[str, Tensor] | None) -> RewardModel:
    backbone = Transformer(study.transformer, torch_generator(seed, "reward model"))
    if policy is not None:
        backbone.load_state_dict(policy)
    # margins would tell the model by how much the gold rewards differ; people's labels do not
    config = RewardModelConfig(learning_rate=1e-3, head_learning_rate=1e-3, margins=False)
    return RewardModel(config, backbone, torch_generator(seed, "reward head"))


def _accuracy(model: RewardModel, pairs: LengthPairs) -> float:
    rewards = model.score(pairs.batch()).view(-1, 2)
    return float((rewards[:, 0] > rewards[:, 1]).float().mean())


def proxy_by_length(
    study: LengthStudy, foundation: Foundation, model: RewardModel, task: TaskName, key: str, seed: int
) -> list[dict[str, Any]]:
    """Return the learned reward's mean over the reference's answers cut to each length, in its standard deviations."""
    language = study.language
    prompts, completions = foundation.prompts[-64:], foundation.completions[-64:, 0]
    own = foundation.lengths[-64:, 0]
    standard = Standard.of(model.score(_reference_batch(study, foundation)))
    rows = []
    for length in range(1, language.cap + 1):
        lengths = torch.full_like(own, length)
        cut = recut(language, prompts, completions, own, lengths, torch_generator(seed, "proxy"))
        rewards = standard(model.score(experience(prompts, torch.arange(len(prompts)), cut, lengths)))
        gold = float(length_rewards(GOLD[task], torch.tensor(length), language.mode))
        rows.append(
            {"seed": seed, "task": task, "model": key, "length": length, "proxy": float(rewards.mean()), "gold": gold}
        )
    return rows


@dataclass(frozen=True)
class Standard:
    """Rewards in standard deviations of the reference's, so that both arms have one unit."""

    mean: float
    std: float

    @classmethod
    def of(cls, rewards: Tensor) -> Standard:
        """Fit to rewards of the reference's completions."""
        return cls(float(rewards.mean()), max(float(rewards.std()), 1e-6))

    def __call__(self, rewards: Tensor) -> Tensor:
        """Standardise."""
        return (rewards - self.mean) / self.std


def _reference_batch(study: LengthStudy, foundation: Foundation) -> ExperienceBatch:
    """Return the reference's completions of the held-out prompts."""
    rows = slice(study.train_prompts, None)
    count = study.held_out_prompts
    completions, lengths = foundation.completions[rows].flatten(0, 1), foundation.lengths[rows].flatten()
    return experience(foundation.prompts[rows], torch.arange(count).repeat_interleave(2), completions, lengths)


def sample(model: TinyLM, study: LengthStudy, prompts: Tensor, n: int, seed: int) -> ExperienceBatch:
    """Return n completions of each prompt [P, L] at temperature 1."""
    sampler = TinySampler(model, SamplingConfig(max_new_tokens=study.language.cap), EOS, PAD)
    keys = torch.arange(len(prompts))
    found = sampler.sample(prompts, torch.ones(prompts.shape), n, seed=seed, step=0, keys=keys)
    batch = experience(prompts, found.prompt_of, found.completions, found.scored_mask.sum(1).long())
    return replace(batch, sampler_token_logps=found.token_logps)


# ---- one run ----


class LengthData:
    """Pairs with the methods of `train.experience.ExperienceData`; index i is a pair and its prompt."""

    kind = "preference"

    def __init__(self, language: LengthLanguageConfig, pairs: LengthPairs) -> None:
        self.tokenizer, self._pairs = LengthTokenizer(language), pairs

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._pairs)

    def batch(self, indices: Any) -> ExperienceBatch:
        """Return pairs as a batch."""
        return self._pairs.batch(torch.as_tensor(indices))

    def prompts(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Return prompts and their mask."""
        prompts = self._pairs.prompts[torch.as_tensor(indices)]
        return prompts, torch.ones(prompts.shape)

    def texts(self, indices: Any) -> list[str]:
        """Return the prompts as text."""
        return [self.tokenizer.decode(row.tolist()) for row in self.prompts(indices)[0]]

    def columns(self, indices: Any) -> dict[str, list[Any]]:
        """Return {}: there are none."""
        return {}


class TaskScorer:
    """The learned or the gold reward as a `CompletionScorer`, in standard deviations of the reference's rewards."""

    def __init__(self, study: LengthStudy, foundation: Foundation, task: TaskName, arm: str, seed: int) -> None:
        self.name = f"{task}, {arm}"
        self._study, self._task = study, task
        self._tokenizer = LengthTokenizer(study.language)
        self.model: RewardModel | None = None
        if arm != "gold":
            self.model = _reward_model(study, seed, None)
            self.model.load_state_dict(foundation.rewards[SCRATCH if arm == "scratch" else task])
        self._standard = Standard.of(self._raw(_reference_batch(study, foundation)))

    def _raw(self, batch: ExperienceBatch) -> Tensor:
        if self.model is None:
            return length_rewards(GOLD[self._task], batch.lengths, self._study.language.mode)
        return self.model.score(batch)

    def of_batch(self, batch: ExperienceBatch) -> Tensor:
        """Return rewards float32 [N]."""
        return self._standard(self._raw(batch))

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return rewards float32 [N] of completions given as token ids."""
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        ids = torch.full((len(lengths), int(lengths.max())), PAD)
        for row, found in enumerate(completion_ids):
            ids[row, : len(found)] = torch.tensor(list(found))
        prompt_ids = torch.tensor([self._tokenizer.prompt(prompt) for prompt in prompts])
        return self.of_batch(experience(prompt_ids, torch.arange(len(prompts)), ids, lengths))


class Judge:
    """Measures a policy of one task and seed, always on the same prompts, pairs and random numbers."""

    def __init__(self, study: LengthStudy, foundation: Foundation, job: Job) -> None:
        self._study, self._foundation, self._seed = study, foundation, derive_seed(job.seed, "judge")
        self._task = job.task
        self.train_pairs, self._held_out = task_pairs(study, foundation, job.task, job.seed, job.pairs)
        self._proxy = TaskScorer(
            study, foundation, job.task, "scratch" if job.arm == "scratch" else "learned", job.seed
        )
        self._reference = _reference_batch(study, foundation)

    @torch.no_grad()
    def short(self, model: TinyLM) -> dict[str, float]:
        """Return gold and proxy reward, length and KL(policy || reference) of fresh completions."""
        return self._fresh(model, 1)[0]

    def _fresh(self, model: TinyLM, n: int) -> tuple[dict[str, float], ExperienceBatch, Tensor]:
        batch = sample(model, self._study, self._foundation.evaluation, n, self._seed)
        assert batch.sampler_token_logps is not None
        deltas = (batch.sampler_token_logps - model.reference_token_logps(batch)).sum(1)
        gold = length_rewards(GOLD[self._task], batch.lengths, self._study.language.mode)
        means = {
            "gold": float(gold.mean()),
            "proxy": float(self._proxy.of_batch(batch).mean()),
            "length": float(batch.lengths.mean()),
            "kl": float(deltas.mean()),
        }
        return means, batch, deltas

    @torch.no_grad()
    def whole(self, model: TinyLM) -> dict[str, Any]:
        """Return everything that a table of results shows."""
        means, batch, deltas = self._fresh(model, 4)
        lengths, cap = batch.lengths, self._study.language.cap
        outputs = model.outputs(batch, entropies=True)
        assert outputs.entropies is not None
        bigrams = batch.completions[:, :-1] * self._study.language.vocab_size + batch.completions[:, 1:]
        inside = batch.scored_mask[:, 1:] > 0
        backward = (model.reference_token_logps(self._reference) - model.outputs(self._reference).token_logps).sum(1)
        histogram = torch.bincount(lengths.long(), minlength=cap + 1)[1:].float() / len(lengths)
        found = {
            **means,
            "length_std": float(lengths.std()),
            "unfinished": float(((lengths == cap) & ~(batch.completions == EOS).any(1)).float().mean()),
            # k3: pi_ref / pi - 1 - log(pi_ref / pi); never negative, and less noisy where the two are close
            "kl_k3": float(((-deltas).exp() - 1 + deltas).mean()),
            "reverse_kl": float(backward.mean()),
            "entropy": float(outputs.entropies.sum() / batch.scored_mask.sum()),
            "distinct_bigrams": len(torch.unique(bigrams[inside])) / max(1, int(inside.sum())),
            "histogram": " ".join(f"{share:.4f}" for share in histogram.tolist()),
        }
        return found | self._displacement(model, "train", self.train_pairs) | self._displacement(
            model, "held", self._held_out
        )  # fmt: skip

    def _displacement(self, model: TinyLM, name: str, pairs: LengthPairs) -> dict[str, float]:
        """Return how far the log-probs of chosen and rejected completions moved, summed and per token."""
        batch = pairs[:DISPLACED].batch()
        moved = (model.outputs(batch).token_logps - model.reference_token_logps(batch)).sum(1)
        chosen, rejected = moved.view(-1, 2).T
        per_token = (moved / batch.lengths).view(-1, 2).mean(0).tolist()
        return {
            f"{name}_delta_w": float(chosen.mean()),
            f"{name}_delta_l": float(rejected.mean()),
            f"{name}_delta_w_token": per_token[0],
            f"{name}_delta_l_token": per_token[1],
            f"{name}_accuracy": float((chosen > rejected).float().mean()),
        }


_KEPT = ("loss/negative_mass", "sampler/kl", "sampler/ess", "clip_ratio/low_mean", "clip_ratio/high_mean")
_COUNTED = {"generated_tokens": "data/generated_tokens", "reward_queries": "data/reward_queries"}


def experience_source(
    job: Job, learner: PreferenceLearner, pairs: LengthPairs, scorer: TaskScorer | None
) -> ExperienceSource:
    """Return the pairs as they are, or the policy's own completions of their prompts with rewards."""
    study, method = job.study, LENGTH_METHODS[job.method]
    data = LengthData(study.language, pairs)
    if scorer is None:
        # as many completions in an update as on-policy methods have
        config = ExperienceConfig("dataset", minibatch_prompts=study.prompts_per_step * study.num_generations // 2)
        return ExperienceSource(learner, data, None, None, None, config, job.seed)
    config = ExperienceConfig(
        "policy",
        minibatch_prompts=study.prompts_per_step,
        prompts_per_refresh=study.prompts_per_step * job.refresh,
        num_generations=study.num_generations,
        reuse=job.reuse,
        pairing=method.pairing,
    )
    sampler = TinySampler(learner.model, SamplingConfig(max_new_tokens=study.language.cap), EOS, PAD)
    return ExperienceSource(learner, data, sampler, scorer, None, config, job.seed)


def train(job: Job) -> dict[str, Any]:
    """Carry out one run. Return its row: {"name", "values", "curve"}."""
    study, method = job.study, LENGTH_METHODS[job.method]
    foundation = load_foundation(job.folder, job.seed)
    objective = PREFERENCE_OBJECTIVES[method.kind](learning_rate=job.learning_rate, **method.fields)
    generator = torch_generator(job.seed, "policy")
    model = TinyLM(study.transformer, generator, value_head=objective.needs.values, reference="none")
    model.transformer.load_state_dict(foundation.policy)
    model.renew_reference()
    learner = build_preference_learner(model, objective)
    judge = Judge(study, foundation, job)
    scorer = TaskScorer(study, foundation, job.task, job.arm, job.seed) if method.on_policy else None
    source = experience_source(job, learner, judge.train_pairs, scorer)

    costs = dict.fromkeys(_COUNTED, 0)
    curve: list[dict[str, float]] = [judge.short(model) | {"step": 0, **costs}]
    totals: dict[str, list[float]] = {"staleness": []}
    status, message, updates, began, judging = "done", "", 0, time.process_time(), 0.0
    optimizers, guard = Optimizers(learner, OptimConfig(max_grad_norm=1.0)), FiniteGuard()
    try:
        for step in range(study.steps):
            metrics = update(learner, optimizers, source.batch(step), job.seed, step, guard)
            updates = step + 1
            counted = source.counters()
            costs = {name: int(counted[key]) for name, key in _COUNTED.items()}
            totals["staleness"].append(counted["data/staleness"])
            for name in _KEPT:
                if name in metrics:
                    totals.setdefault(name.replace("/", "_"), []).append(float(metrics[name].float().mean()))
            if updates % study.evaluate_every == 0 or updates == study.steps:
                before = time.process_time()
                curve.append(judge.short(model) | {"step": updates, **costs})
                judging += time.process_time() - before
    except NonFiniteError as error:
        status, message = "failed", str(error)
    except DataError as error:  # all completions of every prompt have one reward: nothing is left to learn
        status, message = "converged", str(error)
    seconds = time.process_time() - began - judging
    final = judge.whole(model) if status != "failed" else {k: v for k, v in curve[-1].items() if k not in costs}
    final.pop("step", None)
    golds = [point["gold"] for point in curve]
    planned = 1 + math.ceil(study.steps / study.evaluate_every)
    golds += [final["gold"]] * (planned - len(golds))  # a run that stopped early stays where it stopped
    values = {
        "status": status,
        "message": message,
        "updates": updates,
        **final,
        "start_gold": golds[0],
        "mean_gold": sum(golds) / len(golds),
        **{name: sum(x) / len(x) for name, x in totals.items() if x},
        **costs,
        "cpu_seconds": round(seconds, 3),
    }
    return {"name": job.name, "values": values, "curve": curve}


def _draws(
    of_rows: Callable[[Tensor], ExperienceBatch], count: int, size: int, seed: int, stream: str
) -> Callable[[int], ExperienceBatch]:
    """Return step -> batch of `size` rows, each row once an epoch."""
    sampler = EpochSampler(count, min(size, count), seed, stream)
    return lambda step: trimmed(of_rows(torch.from_numpy(sampler.indices(step))))


def _fit(learner: Learner, draw: Callable[[int], ExperienceBatch], steps: int, seed: int) -> None:
    """Carry out supervised updates."""
    optimizers, guard = Optimizers(learner, OptimConfig(max_grad_norm=1.0)), FiniteGuard()
    for step in range(steps):
        update(learner, optimizers, draw(step), seed, step, guard)
