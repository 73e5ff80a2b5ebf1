"""Tier 2 of the adaptive-compute study: SmolLM2-135M on reasoning-gym tasks, from light fine-tuning to E7, E8 and E9.

Stages, each resumed where it stopped:

1. sft: low-rank adapters learn to write worked solutions (`envs/reasoning.py`); the merged policy is written down;
2. pools: samples of the policy, annealed ones included, for training and for calibrating the readers;
3. readers: suffix, slot and probe learn from them whether a fresh sample would be better;
4. test: the self-evaluating model itself samples validation and test prompts, at temperature 1 and annealed, and reads
   its scores on the way;
5. replay: every rule of tier 1 (`adaptive_arithmetic_runs.py`) on these pools.

Pools and readers are made side by side by worker processes, one thread each. No prompt is in two of the splits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from steelyard.adapt.compute_policy import TemperatureSchedule
from steelyard.artefact import find
from steelyard.bench.rows import write_rows
from steelyard.bench.stats import number
from steelyard.config import Config, require_positive
from steelyard.data.feature_cache import cached_features
from steelyard.data.sample_pool import PER_SAMPLE, SamplePool
from steelyard.envs.reasoning import LEVELS, Problem, ReasoningScorer, Stratum, answer_of, problems
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import ConfigError, require
from steelyard.nets.encoder import EncoderConfig, load_encoder
from steelyard.nets.lm import CausalLM, LanguageModelConfig, LoRAConfig, cache_folder, load_language_model
from steelyard.nets.self_eval import ProbeConfig, SlotConfig, SuffixConfig
from steelyard.objectives.preference.sft import CompletionSFTConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.recipes.adaptive_page import findings, sections
from steelyard.recipes.adaptive_pools_evaluators import fit_evaluator, log_lengths, texts_of
from steelyard.recipes.adaptive_replays import (
    MIXES,
    VERIFIER,
    Replays,
    counts_of,
    enough_for,
    gate_rows,
    means,
    reader_rows,
    rows_of_outcomes,
    strata_rows,
)
from steelyard.recipes.hyre_jobs import Row, begin, carry_out
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section
from steelyard.report.tables import Table
from steelyard.rng import derive_seed, torch_generator
from steelyard.runtime import RuntimeConfig
from steelyard.train.experience import ExperienceConfig
from steelyard.train.loop import LoopConfig
from steelyard.train.optim import OptimConfig
from steelyard.workflows import preference
from steelyard.workflows.common import kind_of_run
from steelyard.workflows.preference import PreferenceEvaluation, PreferenceRun, TextDataConfig
from steelyard.workflows.sample_pool import PoolPrompt, SamplePoolConfig, build_pool
from steelyard.workflows.self_eval import SelfEvalTraining, load_self_eval, train_self_eval

Floats = npt.NDArray[np.float64]
ReaderName = Literal["suffix", "slot", "probe", "state"]
Split = Literal["train", "held_out", "validation", "test"]
TRAINING: dict[Stratum, float] = {"easy": 0.4, "medium": 0.4, "hopeless": 0.2}
"""Shares of the strata in what is trained on."""
DEMONSTRATED: dict[Stratum, float] = {"easy": 0.5, "medium": 0.45, "hopeless": 0.05}
"""The same of the worked solutions: what nobody learns need not be shown often."""
ENCODER = EncoderConfig(max_prompt_tokens=64, max_tokens=128)
"""Reads texts for the external verifier."""
POLICY = "policy"
"""Folder of the merged policy."""


@dataclass(frozen=True)
class SmolLMStudy(Config):
    """Tier 2: a language model of 135 million parameters."""

    model: str = "smollm2"
    """Language model that is fine-tuned, as `LanguageModelConfig.name`."""
    sft_problems: tuple[int, ...] = (2_400, 480)
    """Problems with worked solutions that it learns from, once each, phase by phase; adapters are merged after each."""
    sft_learning_rates: tuple[float, ...] = (1e-3, 1e-4)
    """Adam's step of the adapters in each phase."""
    train_prompts: int = 300
    """Prompts whose annealed samples train the readers."""
    held_out_prompts: int = 80
    """Prompts whose samples calibrate the readers."""
    validation_prompts: int = 100
    """Prompts of each mix that choose thresholds."""
    test_prompts: int = 400
    """Prompts of each mix in the tables; mixes share prompts."""
    samples: int = 16
    """N: samples of every prompt."""
    annealed: int = 6
    """Samples of the annealed schedule that are drawn; its later temperatures are above 0.98, and samples at
    temperature 1 stand for them."""
    max_new_tokens: int = 48
    """Longest sample."""
    question: str = "\nStart over?"
    """What the suffix reader is asked; short, for it is read as often as a sample is."""
    reader: ReaderName = "probe"
    """Which reader the tables are about; the probe leaves the policy alone and learns in minutes."""
    readers: tuple[ReaderName, ...] = ("probe", "state", "slot")
    """Readers that are compared; state: a probe that is not told how likely the tokens were. The suffix reader costs
    twice as much as the slot."""
    reader_steps: int = 60
    """Updates of the slot reader, 8 prompts with 4 samples each."""
    suffix_steps: int = 30
    """The same of the suffix reader, whose updates cost twice as much."""
    probe_steps: int = 1_000
    """Updates of the probe, 256 places each."""
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(dropout=0.3))
    """The probe."""
    weight_decay: float = 0.01
    """Of a reader's weights."""
    prefixes: int = 12
    """Random parts of each sample that slot and probe learn from; the suffix reader, which pays for each, has one."""
    learning_rate: float = 5e-4
    """Adam's step of their adapters."""
    kl_weight: float = 1.0
    """How firmly the policy is kept."""
    checkpoints: tuple[int, ...] = (6, 12)
    """Tokens after which samples are looked at."""
    pruned: tuple[float, ...] = (0.5, 0.75)
    """Shares of parallel samples that are given up."""
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.91, 0.93, 0.95, 0.97, 0.98, 0.99)
    """Of the stopping rule."""
    most_samples: tuple[float, ...] = (1.2, 1.5, 2.0)
    """Average samples that a threshold may take on validation prompts."""
    orders: int = 4
    """Orders of the samples at temperature 1 that outcomes are averaged over."""
    rows: int = 64
    """Samples decoded at a time."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(
            self, "sft_problems", "sft_learning_rates", "train_prompts", "held_out_prompts", "validation_prompts",
            "test_prompts", "samples", "annealed", "max_new_tokens", "reader_steps", "suffix_steps", "probe_steps",
            "learning_rate", "prefixes", "checkpoints", "thresholds", "most_samples", "orders", "rows",
        )  # fmt: skip
        if not self.sft_problems or len(self.sft_problems) != len(self.sft_learning_rates):
            raise ConfigError(
                f"sft_problems and sft_learning_rates: expected one for each phase, found {self.sft_problems} and "
                f"{self.sft_learning_rates}"
            )
        if self.reader not in self.readers:
            raise ConfigError(f"reader must be among readers {self.readers}, found {self.reader!r}")


PRESETS: dict[str, SmolLMStudy] = {
    "tiny": SmolLMStudy(
        sft_problems=(160, 80), train_prompts=32, held_out_prompts=16, validation_prompts=20, test_prompts=40,
        samples=8, readers=("probe",), probe_steps=200,
    ),
    "small": SmolLMStudy(),
    "paper": SmolLMStudy(
        readers=("probe", "state", "slot", "suffix"), annealed=16,
        model="HuggingFaceTB/SmolLM2-135M-Instruct", train_prompts=2_000,
        held_out_prompts=200, validation_prompts=300, test_prompts=1_000, reader_steps=1_000, suffix_steps=1_000,
    ),
}  # fmt: skip
"""Sizes; small: seventy minutes of two quiet cores."""


@dataclass(frozen=True)
class SmolLMJob:
    """One part of a stage.

    Attributes:
        study: what is run.
        out: its folder.
        name: of the part.
        split: of prompts, where it is a pool.
        kind: of its temperatures.
        reader: that is trained, or that reads while the pool is drawn; None: the policy alone.
    """

    study: SmolLMStudy
    out: str
    name: str
    split: Split | None = None
    kind: Literal["constant", "annealed"] = "constant"
    reader: ReaderName | None = None


def run(config: SmolLMStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes replays.csv into `out`, beside the runs of fine-tuning, pools and readers.

    Raises:
        ConfigError: the folder holds a study with other settings.
        MissingExtraError: an extra (`lm`, `reasoning`) is not installed.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    require("transformers", "lm")
    require("reasoning_gym", "reasoning")
    begin(out, config)
    if not (out / POLICY).exists():
        console.print("tier 2: fine-tuning", markup=False, highlight=False)
    fine_tune(config, out, workers)
    base = SmolLMJob(config, str(out), "")
    drawn = [replace(base, name="pool train", split="train", kind="annealed"),
             replace(base, name="pool held out", split="held_out")]  # fmt: skip
    rows = carry_out(drawn, draw, out, "tier 2: samples", workers)
    readers = [replace(base, name=f"reader {one}", reader=one) for one in config.readers]
    rows += carry_out(readers, train_reader, out, "tier 2: readers", workers)
    tests = [
        replace(base, name=f"pool {split} {kind}", split=split, kind=kind, reader=config.reader)
        for split in _TESTS
        for kind in _KINDS
    ]
    rows += carry_out(tests, draw, out, "tier 2: test samples", workers)
    costs = [row for row in rows if row["kind"] == "cost"]
    rows = [row for row in rows if row["kind"] != "cost"]
    rows += carry_out([replace(base, name=REPLAYS)], replay, out, f"tier 2: {REPLAYS}")
    levels = [row for row in rows if row["kind"] == "level"]
    write_rows(out / f"{REPLAYS}.csv", [means(row) if row["kind"] == "outcome" else row for row in rows])
    rest = [row for row in rows if row["kind"] != "level"]
    return [*sections(rest, LABEL), own_section(config, levels, costs)], findings(rest, LABEL, DIFFERS)


REPLAYS = "replays"
LABEL = "tier 2, SmolLM2-135M"
DIFFERS = "135 million parameters, 4-bit weights made float32, three kinds of short problems, light fine-tuning"
_TESTS: tuple[Split, ...] = ("test", "validation")
_KINDS: tuple[Literal["constant", "annealed"], ...] = ("constant", "annealed")


# ---- problems ----


def strata_of(study: SmolLMStudy, split: Split) -> dict[Stratum, int]:
    """Return how many problems of each stratum a split has; those of the tables serve every mix."""
    match split:
        case "train":
            return counts_of(TRAINING, study.train_prompts)
        case "held_out":
            return counts_of(TRAINING, study.held_out_prompts)
        case "validation":
            return enough_for(MIXES, study.validation_prompts)
        case "test":
            return enough_for(MIXES, study.test_prompts)


def all_problems(study: SmolLMStudy) -> dict[str, tuple[Problem, ...]]:
    """Return the problems of the phases of fine-tuning and of every split; none is in two of them.

    Later ones avoid earlier ones, so that the policy does not depend on how much is tested.
    """
    wanted: dict[str, Mapping[Stratum, int]] = {
        _phase(phase): counts_of(DEMONSTRATED, count) for phase, count in enumerate(study.sft_problems)
    }
    splits: tuple[Split, ...] = ("train", "held_out", "validation", "test")
    wanted |= {split: strata_of(study, split) for split in splits}
    found: dict[str, tuple[Problem, ...]] = {}
    seen: set[str] = set()
    for name, strata in wanted.items():
        found[name] = problems(strata, study.seed, name, seen)
        seen |= {problem.question for problem in found[name]}
    return found


def prompt_of(problem: Problem) -> str:
    """Return what the model reads; no chat template, whose words would cost more than the question."""
    return f"{problem.question}\n"


# ---- stages ----


def _phase(number: int) -> str:
    return f"sft_{number}"


def fine_tune(study: SmolLMStudy, out: Path, threads: int) -> None:
    """Train adapters on worked solutions by the library's workflow, phase by phase, and write the merged policy."""
    if (out / POLICY).exists():
        return
    name = study.model
    for phase, rate in enumerate(study.sft_learning_rates):
        target = out / (POLICY if phase + 1 == len(study.sft_learning_rates) else f"{POLICY}_{_phase(phase)}")
        if not target.exists():
            _learn(study, out, phase, PreferenceRun(
                CompletionSFTConfig(learning_rate=rate),
                model=LanguageModelConfig(name, adapter=LoRAConfig(), reference="none"),
                data=TextDataConfig(
                    str(out / f"{_phase(phase)}.jsonl"), held_out_fraction=0, max_prompt_tokens=256,
                    max_completion_tokens=study.max_new_tokens,
                ),
                experience=ExperienceConfig(minibatch_prompts=8),
                evaluation=PreferenceEvaluation(prompts=0, pairs=0),
                loop=LoopConfig(log_every=5, checkpoint_every=20),
                optim=OptimConfig(max_grad_norm=1.0),
                runtime=RuntimeConfig(threads=threads),
                seed=study.seed,
            ), target)  # fmt: skip
        name = str(target)


def _learn(study: SmolLMStudy, out: Path, phase: int, config: PreferenceRun, target: Path) -> None:
    """Carry out a phase, or go on with it, and write the merged model."""
    folder = out / _phase(phase)
    if kind_of_run(folder):
        preference.resume(folder)
    else:
        assert config.data.path is not None
        rows = [{"prompt": prompt_of(one), "completion": one.solution} for one in all_problems(study)[_phase(phase)]]
        Path(config.data.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        preference.start(config, folder)
    model = preference.load_policy(find(folder))[0].model
    unfinished = out / f"{target.name}.part"
    model.save_pretrained(unfinished, merged=True)
    unfinished.rename(target)


def load(job: SmolLMJob) -> tuple[CausalLM, Any]:
    """Return what draws the samples of a job: the policy, or the model of a reader with its evaluator."""
    torch.set_num_threads(1)
    out = Path(job.out)
    if job.reader is not None:
        trained = load_self_eval(out / f"reader_{job.reader}")
        return trained.model, trained.evaluator
    settings = LanguageModelConfig(str(out / POLICY), reference="none")
    return load_language_model(settings, torch_generator(job.study.seed, "policy")).eval(), None


def draw(job: SmolLMJob) -> list[Row]:
    """Draw and judge the samples of a split; with a reader, its scores are read on the way."""
    assert job.split is not None
    study, began = job.study, time.process_time()
    model, evaluator = load(job)
    prompts = [
        PoolPrompt(
            prompt_of(one), tuple(model.tokenizer.prompt(prompt_of(one))), one.stratum,
            {"task": one.task, "answer": one.answer, "level": one.level},
        )
        for one in all_problems(study)[job.split]
    ]  # fmt: skip
    config = SamplePoolConfig(
        study.samples if job.kind == "constant" or evaluator is None else min(study.annealed, study.samples),
        TemperatureSchedule(job.kind),
        SamplingConfig(max_new_tokens=study.max_new_tokens),
        study.checkpoints if evaluator is not None else (),
        batch_prompts=max(1, study.rows // study.samples) * 2,
        seed=derive_seed(study.seed, f"samples/{job.split}") % 2**31,
    )
    pool = build_pool(
        Path(job.out) / job.name.replace(" ", "_"), prompts, model, ReasoningScorer(), config,
        {"reader": job.reader or "none"}, evaluator=evaluator, answer=stated, rows=study.rows, source=job.name,
    )  # fmt: skip
    tokens = sum(int(item.lengths.sum()) for item in pool)
    return [_cost(job, began, tokens)]


def stated(completion: str) -> str:
    """Return the answer of a completion for votes, whatever its task: sums end in "=", words do not."""
    return answer_of("chain_sum" if "=" in completion else "spell_backward", completion)


def reader_config(study: SmolLMStudy, name: ReaderName, model: CausalLM) -> SuffixConfig | SlotConfig | ProbeConfig:
    """Return a reader's settings; the suffix as plain text, for the policy's prompts have no chat template."""
    match name:
        case "slot":
            return SlotConfig()
        case "probe":
            return study.probe
        case "state":
            return replace(study.probe, confidence=False)
        case "suffix":
            ids = model.tokenizer.completion("", study.question)
            return SuffixConfig(question=study.question, tokens=tuple(ids[:-1]))


def train_reader(job: SmolLMJob) -> list[Row]:
    """Train one reader by the library's workflow."""
    assert job.reader is not None
    study, began, out = job.study, time.process_time(), Path(job.out)
    torch.set_num_threads(1)
    alone = job.reader in ("probe", "state")  # beside a frozen model
    adapter = None if alone else LoRAConfig()
    reference: Literal["none", "adapter_off"] = "none" if adapter is None else "adapter_off"
    settings = LanguageModelConfig(str(out / POLICY), adapter=adapter, reference=reference)
    model = load_language_model(settings, torch_generator(study.seed, "reader"))
    training = SelfEvalTraining(
        SelfEvalConfig(
            reader=reader_config(study, job.reader, model), learning_rate=study.learning_rate,
            weight_decay=study.weight_decay, kl_weight=study.kl_weight,
        ),
        prefixes=1 if job.reader == "suffix" else study.prefixes,
        steps=study.probe_steps if alone else {"slot": study.reader_steps, "suffix": study.suffix_steps}[job.reader],
        evaluation_prompts=study.held_out_prompts // 2,
        checkpoints=study.checkpoints,
        loop=LoopConfig(log_every=10, checkpoint_every=25),
        seed=study.seed,
    )  # fmt: skip
    train, held_out = (SamplePool.load(out / f"pool_{name}") for name in ("train", "held_out"))
    trained = train_self_eval(model, train, held_out, training, out / f"reader_{job.reader}", quiet=False)
    return [_cost(job, began, 0), *reader_rows(job.reader, trained, study.seed)]


def _cost(job: SmolLMJob, began: float, tokens: int) -> Row:
    return {"kind": "cost", "step": job.name, "cpu_seconds": time.process_time() - began, "tokens": tokens}


# ---- replay ----


def replay(job: SmolLMJob) -> list[Row]:
    """Replay every rule on the pools that the self-evaluating model drew."""
    study, out = job.study, Path(job.out)

    def pool(name: str) -> SamplePool:
        return SamplePool.load(out / f"pool_{name}")

    train, held_out, encoder = pool("train"), pool("held_out"), load_encoder(ENCODER)
    constant = with_verifier(encoder, train, held_out, [pool(f"{split}_constant") for split in _TESTS])
    annealed = [completed(pool(f"{split}_annealed"), drawn) for split, drawn in zip(_TESTS, constant, strict=True)]
    extra = load_self_eval(out / f"reader_{study.reader}").evaluator.extra_tokens
    test, validation = (Replays(study, one, other, extra) for one, other in zip(constant, annealed, strict=True))
    rows = rows_of_outcomes(study, validation, test, study.seed)
    return [
        *rows, *strata_rows(test, study.seed), *gate_rows(test, study, study.seed), *level_rows(test.constant)
    ]  # fmt: skip


def completed(annealed: SamplePool, constant: SamplePool) -> SamplePool:
    """Return the annealed pool with as many samples as the one at temperature 1, whose last ones stand for its own."""
    schedule = TemperatureSchedule("annealed")
    items = []
    for own, other in zip(annealed, constant, strict=True):
        first, n = len(own.rewards), len(other.rewards)
        rest = other.take(range(first, n))
        found: dict[str, Any] = {"rewards": np.concatenate([own.rewards, rest.rewards])}
        for name in PER_SAMPLE:
            one, two = getattr(own, name), getattr(rest, name)
            if one is not None and two is not None:
                found[name] = np.concatenate([one, two]) if isinstance(one, np.ndarray) else (*one, *two)
        found["temperatures"] = np.array([schedule.of(sample) for sample in range(n)])
        items.append(replace(own, **found))
    return SamplePool(tuple(items), annealed.checkpoints, annealed.source)


def vectors(encoder: Any, pool: SamplePool) -> Floats:
    """Return what an encoder says of every sample, and its length: [P, N, F]."""
    found = cached_features(cache_folder() / "features", encoder.key, texts_of(pool), encoder.encode)
    shaped = found.astype(np.float64).reshape(*pool.rewards().shape, -1)
    return np.concatenate([shaped, log_lengths(pool)], 2)


def with_verifier(
    encoder: Any, train: SamplePool, held_out: SamplePool, pools: Sequence[SamplePool]
) -> list[SamplePool]:
    """Return pools with a column of P(right), by a small encoder that reads the text and has seen the training samples.

    The external verifier of the table, and with it the rule that stops at an absolute correctness.
    """
    seen, held = ((vectors(encoder, pool), pool.rewards()) for pool in (train, held_out))
    verifier = fit_evaluator(seen, held)
    found = []
    for pool in pools:
        right = verifier.probabilities(vectors(encoder, pool))
        items = tuple(
            replace(item, columns=item.columns | {VERIFIER: row.tolist()})
            for item, row in zip(pool, right, strict=True)
        )
        found.append(replace(pool, items=items))
    return found


def level_rows(pool: SamplePool) -> list[Row]:
    """Return what each level of the problems turned out to be."""
    rewards, levels = pool.rewards(), np.array([item.columns["level"] for item in pool])
    lengths = pool.array("lengths")
    return [
        {"kind": "level", "level": name, "stratum": level.stratum, "prompts": int((levels == name).sum()),
         "one": float(rewards[levels == name].mean()), "any": float(rewards[levels == name].max(1).mean()),
         "tokens": float(lengths[levels == name].mean())}
        for name, level in LEVELS.items()
        if (levels == name).any()
    ]  # fmt: skip


def own_section(config: SmolLMStudy, levels: Sequence[Row], costs: Sequence[Row]) -> Section:
    """Return what tier 1 has no table for: the levels of the problems, and what each stage cost."""
    found = tuple(
        (row["level"], row["stratum"], str(row["prompts"]), number(row["one"]), number(row["any"]),
         number(row["tokens"], 1))
        for row in levels
    )  # fmt: skip
    spent = tuple(
        (row["step"], number(row["cpu_seconds"] / 60, 1), str(row["tokens"] or "-"),
         number(row["tokens"] / row["cpu_seconds"], 0) if row["tokens"] else "-")
        for row in costs
    )  # fmt: skip
    own = Section(f"{LABEL}: problems and cost").text(
        f"{config.model} learned from {sum(config.sft_problems)} worked solutions of reasoning-gym problems once. The "
        "external verifier of the tables is a small text encoder with a logistic regression on correctness; it is weak "
        "at arithmetic. The suffix reader is asked "
        f"{config.question.strip()!r} in plain text, not the paper's sentence. Of the annealed schedule "
        f"{min(config.annealed, config.samples)} samples are drawn; those at temperature 1 stand for the later ones."
    )
    own.table(
        Table(
            "Levels, at temperature 1",
            "Strata are what was expected before the run; pass@1 and pass@N are what came out, for the model that also "
            "evaluates itself.",
            ("level", "meant to be", "prompts", "pass@1", f"pass@{config.samples}", "tokens"),
            found,
        ),
        Table("Cost", "CPU-minutes of each part after fine-tuning; tokens drawn, and drawn per CPU-second.",
              ("part", "CPU-minutes", "tokens", "tokens a second"), spent),
    )  # fmt: skip
    return own
