"""Self-evaluation from end to end: a pool of judged samples -> a model that says whether a fresh one would be better.

`train_self_eval` is a plain function of a model and pools; `start` and `resume` are the same as a run of its own, from
files. Beside the files of every run (`train/rundir.py`):

    eval.jsonl        one row per held-out prompt: `return` minus the cross-entropy of its samples and their parts,
                      `score` 1 - the mean squared error
    self_eval.jsonl   one row per held-out sample and place, of the best checkpoint: score, reward, label
    self_eval.json    what these say: AUC within and across prompts, calibration, drift of the policy

Every evaluation calibrates the evaluator on the held-out prompts (Platt), so a checkpoint holds its own calibration.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn

from steelyard import runtime
from steelyard.artefact import find
from steelyard.config import Config, config_hash, from_json, plain, require_positive, require_range
from steelyard.data.prefixes import PLACES, PoolTokens, PrefixSource, StateBatch, StateSource
from steelyard.data.restart_labels import RestartLabelConfig
from steelyard.data.sample_pool import SamplePool
from steelyard.data.tokenizer import Tokenizer
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.nets.lm import LanguageModelConfig, load_language_model
from steelyard.nets.self_eval import (
    AnyEvaluator,
    AnyReaderConfig,
    ProbeConfig,
    ProbeEvaluator,
    SlotConfig,
    SuffixConfig,
    SuffixEvaluator,
    build_evaluator,
)
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.self_eval import SelfEvalConfig, SelfEvaluation, states_of
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train import checkpoint
from steelyard.train.loop import LoopConfig, Stage, fit
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir
from steelyard.workflows.common import Case, begin, carry_out, read_run_config, rewind
from steelyard.workflows.self_eval_evaluation import (
    Drift,
    Examiner,
    PositionReport,
    SelfEvalReport,
    chunks,
    drift,
    read_report,
    score_pool,
    write_report,
)

FORMAT = "steelyard-self-eval-1"
LOGS = ("self_eval.jsonl",)


@dataclass(frozen=True)
class SelfEvalTraining(Config):
    """How a self-evaluation is trained, whatever the model and the pool."""

    objective: SelfEvalConfig = field(default_factory=SelfEvalConfig)
    """What is learned, and how."""
    labels: RestartLabelConfig = field(default_factory=RestartLabelConfig)
    """When another sample counts as better."""
    prefixes: int = 2
    """Random parts of each sample that are read beside the whole."""
    prompt_only: bool = True
    """Also read prompts before their first token."""
    batch_prompts: int = 8
    """Prompts per update."""
    samples_per_prompt: int = 4
    """Samples of each prompt per update; another choice each time."""
    probe_batch: int = 256
    """Places per update of a probe, whose states are computed once."""
    epochs: float = 2.0
    """Passes over the prompts (of a probe: over all places), where `steps` is not given."""
    steps: int | None = None
    """Updates."""
    evaluate_every: int = 0
    """Updates between evaluations; the best checkpoint counts; 0: at the beginning and at the end."""
    evaluation_prompts: int = 200
    """Held-out prompts per evaluation; the last report takes all."""
    checkpoints: tuple[int, ...] = (32, 64)
    """Token counts at which the report looks into samples."""
    calibration: Literal["platt", "none"] = "platt"
    """Scale and shift log-odds so that held-out scores are true probabilities."""
    batch_size: int = 32
    """Samples in one forward pass without gradients."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=10, checkpoint_every=200))
    """Log and checkpoint intervals."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(max_grad_norm=1.0))
    """Optimiser; `shards` is gradient accumulation."""
    seed: int = 0
    """Of everything random in the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "batch_prompts", "samples_per_prompt", "probe_batch", "epochs", "steps", "batch_size")
        require_positive(self, "checkpoints")
        require_range(self, 0, math.inf, "prefixes", "evaluate_every", "evaluation_prompts")


@dataclass(frozen=True)
class TrainedSelfEval:
    """A model, what reads P(no better) off it, and how good that is.

    Attributes:
        model: a `TinyLM` or a `CausalLM`, as trained.
        evaluator: calibrated.
        report: None where nothing was held out.
        tokenizer: of the model, where it has one.
    """

    model: Any
    evaluator: AnyEvaluator
    report: SelfEvalReport | None
    tokenizer: Tokenizer | None = None


# ----------------------------------------------------------------------------------------------- training


def train_self_eval(
    model: nn.Module,
    train: SamplePool,
    held_out: SamplePool | None,
    config: SelfEvalTraining,
    out: Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    quiet: bool = True,
) -> TrainedSelfEval:
    """Train a model to evaluate its own samples.

    The model as given is the policy that wrote the samples: it becomes the reference that `kl_weight` keeps it near. It
    is trained in place, for a probe left untouched.

    Args:
        model: a `nets.tiny_lm.TinyLM` or a `nets.lm.CausalLM`.
        train: its samples, judged.
        held_out: samples of other prompts: choose the checkpoint, calibrate and report; None: the last update counts,
            uncalibrated.
        config: how.
        out: folder of the run; one that was stopped is resumed, one that is done is read back. None: nothing is kept.
        tokenizer: turns texts and the suffix into ids; default: the model's own.
        quiet: no progress on the terminal.

    Raises:
        DataError: the pools hold nothing to learn from, or the run in `out` had others.
        ConfigError: the run in `out` had another config.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return train_self_eval(model, train, held_out, config, Path(folder) / "run", tokenizer=tokenizer)
    parts = Parts(config, model, train, held_out, tokenizer)
    run = RunDir(out, LOGS)
    return carry_on(run, config, parts, None, quiet)


def carry_on(run: RunDir, config: SelfEvalTraining, parts: Parts, case: Case | None, quiet: bool) -> TrainedSelfEval:
    """Begin, resume or read back the run of a directory, as it stands. Return what was trained."""
    if (run.path / "config.json").is_file():
        if config_hash(read_run_config(run, type(config))) != config_hash(config):
            raise ConfigError(f"{run.path}: holds a run with another config; choose another directory")
        if run.read_status() == "done":
            recorded = json.loads((run.path / "case.json").read_text())["data_hash"]
            if recorded != parts.data_hash:
                raise DataError(f"{run.path}: was trained on other samples; choose another directory")
            parts.load_best(run)
            return parts.trained(read_report(run.path))
        found = rewind(run, parts.tokens.source, parts.data_hash)
    else:
        begin(run, config, case or Case(), parts.data_hash)
        found = None
    carry_out(run, lambda: _train(config, run, parts, found, quiet))
    return parts.trained(read_report(run.path))


class Parts:
    """Model, evaluator, learner and samples of a config.

    Args:
        config: how to train.
        model: as `train_self_eval`.
        train: samples.
        held_out: samples of other prompts, or None.
        tokenizer: of the model.
    """

    def __init__(
        self,
        config: SelfEvalTraining,
        model: Any,
        train: SamplePool,
        held_out: SamplePool | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config, self.model = config, model
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        device = next(model.parameters()).device
        generator = torch_generator(config.seed, "self_eval/evaluator")
        self.evaluator = build_evaluator(config.objective.reader, model, generator, self.tokenizer).to(device)
        if not isinstance(self.evaluator, ProbeEvaluator):
            keep_as_reference(model)
        self.learner = SelfEvaluation(config.objective, model, self.evaluator)
        self.tokens = PoolTokens(train, self.tokenizer)
        given = config.batch_prompts, config.samples_per_prompt, config.prefixes, config.prompt_only, config.seed
        self.source = PrefixSource(self.tokens, config.labels, *given)
        self.held_out: PoolTokens | None = None
        if held_out is not None and len(held_out):
            self.held_out = PoolTokens(held_out, self.tokenizer)
        self.data_hash = content_hash(self.tokens, self.held_out)
        self.optimizers = Optimizers(self.learner, config.optim)
        self.artefact = artefact_of(config.objective, model, self.evaluator)

    def batches(self) -> Any:
        """Return the source of batches, for a probe with all states computed."""
        if not isinstance(self.evaluator, ProbeEvaluator):
            return self.source
        found = []
        generator = numpy_generator(self.config.seed, "self_eval/places")
        for prompts in chunks(self.source.prompts.tolist(), self.tokens, self.config.batch_size):
            batch = self.source.of(prompts, [self.source.known[prompt] for prompt in prompts], generator)
            found.append(states_of(self.model, batch.to(self.device)).to("cpu"))
        states = StateBatch(*(torch.cat([getattr(one, name) for one in found]) for name in PLACES))
        return StateSource(states, self.config.probe_batch, self.config.seed)

    @property
    def has_reference(self) -> bool:
        """Whether drift can be measured."""
        return isinstance(self.model, TinyLM) or bool(self.model.reference_kind != "none")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def load_best(self, run: RunDir) -> int:
        """Load the best checkpoint (without evaluations the last one) into the learner. Return its step."""
        scored = any(checkpoint.read_manifest(path)["score"] is not None for path in checkpoint.steps(run.checkpoints))
        path = checkpoint.best(run.checkpoints) if scored else checkpoint.last(run.checkpoints)
        found = checkpoint.load(path)
        checkpoint.load_into(self.learner, found.model, str(path))
        return found.step

    def trained(self, report: SelfEvalReport | None) -> TrainedSelfEval:
        """Return the result."""
        self.evaluator.eval()
        return TrainedSelfEval(self.model, self.evaluator, report, self.tokenizer)


def _train(
    config: SelfEvalTraining, run: RunDir, parts: Parts, found: checkpoint.Checkpoint | None, quiet: bool
) -> None:
    first = 0
    if found is not None:
        checkpoint.load_into(parts.learner, found.model, str(found.path))
        parts.optimizers.load_state_tensors(found.optimizers)
        first = found.step
    source = parts.batches()
    size, per_update = len(parts.source.prompts), config.batch_prompts
    if isinstance(source, StateSource):
        size, per_update = len(source.states), source.sampler.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * size / per_update))
    examiner = None if parts.held_out is None else Examiner(parts, run)
    if first < steps:
        fit(
            parts.learner,
            source,
            parts.optimizers,
            Stage("offline", 0, steps, 0 if examiner is None else config.evaluate_every or steps),
            config.loop,
            run,
            seed=config.seed,
            start=first,
            artefact=plain(parts.artefact),
            evaluate=None if examiner is None else examiner.look,
            quiet=quiet,
            label=f"self_eval seed {config.seed}",
        )
    step = parts.load_best(run)
    if examiner is not None:
        write_report(run.path, examiner.report(step))


def keep_as_reference(model: Any) -> None:
    """Make a policy as it is now the reference of its training."""
    if isinstance(model, TinyLM):
        model.renew_reference()
        return
    trained = model._trained()
    fresh = model.reference_kind == "adapter_off" and not any(
        bool(parameter.any()) for name, parameter in trained.items() if "lora_B" in name
    )  # an adapter that adds nothing yet: without it the model is the same
    if model.reference_kind != "none" and not fresh:
        model.reference_kind = "copy"
        model._reference = {name: parameter.detach().clone() for name, parameter in trained.items()}


def content_hash(*pools: PoolTokens | None) -> str:
    """Return the identity of tokens and rewards."""
    digest = hashlib.sha256()
    for pool in pools:
        for prompt, completions, rewards in (
            () if pool is None else zip(pool.prompts, pool.completions, pool.rewards, strict=True)
        ):
            digest.update(json.dumps([prompt, completions]).encode() + rewards.tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- artefacts


@dataclass(frozen=True)
class SelfEvalArtefact(Config):
    """pretrained/config.json: how to build the model and the evaluator that the weights belong to."""

    objective: SelfEvalConfig
    """What was learned, and how."""
    reader: AnyReaderConfig
    """The evaluator, with its token ids."""
    model: LanguageModelConfig | TransformerConfig
    """The language model. A probe of a hub's model is saved alone: its model is the one of that name."""
    format: Literal["steelyard-self-eval-1"] = "steelyard-self-eval-1"
    """Version of this layout."""


def artefact_of(objective: SelfEvalConfig, model: Any, evaluator: AnyEvaluator) -> SelfEvalArtefact:
    """Return the record of a model and its evaluator."""
    reader: SuffixConfig | SlotConfig | ProbeConfig = objective.reader
    if isinstance(evaluator, SuffixEvaluator):
        assert isinstance(reader, SuffixConfig)
        reader = replace(reader, tokens=evaluator.suffix, yes_token=evaluator.yes, no_token=evaluator.no)
    elif not isinstance(evaluator, ProbeEvaluator):
        reader = SlotConfig(yes_token=evaluator.yes, no_token=evaluator.no)
    return SelfEvalArtefact(objective, reader, model.config)


def save_self_eval(folder: str | Path, model: nn.Module, evaluator: AnyEvaluator, objective: SelfEvalConfig) -> Path:
    """Write a model and its evaluator as an artefact without a run. Return the folder.

    Args:
        folder: where; made if it is not there.
        model: a `TinyLM`, or a `CausalLM`, whose `config` says what it was loaded from.
        evaluator: of this model.
        objective: how it was trained; its reader is the evaluator's.
    """
    learner = SelfEvaluation(replace(objective, kl_weight=0.0), model, evaluator)
    folder = Path(folder)
    checkpoint.write_files(
        folder,
        {
            "pretrained/config.json": plain(artefact_of(objective, model, evaluator)),
            "pretrained/model.safetensors": learner.state_dict(),
        },
        {"step": 0, "score": None},
    )
    return folder


def load_self_eval(path: str | Path, device: str = "cpu") -> TrainedSelfEval:
    """Read a self-evaluating model from a run, a checkpoint or its pretrained/ directory; files are checked.

    Of a run, the checkpoint with the least held-out cross-entropy is read.

    Raises:
        CheckpointError: it holds something else, or its files are damaged.
    """
    folder = find(path)
    if folder.parent.name == "checkpoints" and Path(path) == folder.parent.parent:
        scored = [one for one in checkpoint.steps(folder.parent) if checkpoint.read_manifest(one)["score"] is not None]
        folder = checkpoint.best(folder.parent) if scored else folder
    checkpoint.verify(folder)
    file = folder / "pretrained/config.json"
    found = json.loads(file.read_text())
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a self-evaluation ({FORMAT}), found format {found.get('format')!r}")
    artefact = from_json(SelfEvalArtefact, file.read_text(), where=str(file))
    weights = safetensors.torch.load_file(folder / "pretrained/model.safetensors")
    generator = torch_generator(0, "initial weights", device=device)
    model: Any
    if isinstance(artefact.model, TransformerConfig):
        has_reference = any(name.startswith("model.reference.") for name in weights)
        model = TinyLM(artefact.model, generator, reference="copy" if has_reference else "none")
    else:
        model = load_language_model(artefact.model, generator)
    evaluator = build_evaluator(artefact.reader, model, torch_generator(0, "load")).to(device)
    learner = SelfEvaluation(replace(artefact.objective, kl_weight=0.0), model, evaluator)
    checkpoint.load_into(learner, weights, str(folder))
    model.requires_grad_(False)
    return TrainedSelfEval(model, learner.eval().evaluator, read_report(Path(path)), getattr(model, "tokenizer", None))


def is_self_eval_run(path: str | Path) -> bool:
    """Return whether a run, a checkpoint or its pretrained/ directory holds a self-evaluation."""
    path = Path(path)
    for file in (path / "config.json", path / "pretrained/config.json"):
        if file.is_file():
            found = json.loads(file.read_text())
            return bool(found.get("format") == FORMAT or found.get("objective", {}).get("kind") == "self_eval")
    return False


# ---------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class PoolDataConfig(Config):
    """Pools of samples."""

    path: str | None = None
    """Folder of a pool (steelyard data pool), drawn by the model that is trained."""
    held_out: str | None = None
    """Folder of a pool of other prompts; None: a share of `path`."""
    held_out_fraction: float = 0.2
    """Share of the prompts kept apart; 0: none, and neither report nor calibration."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, 0.99, "held_out_fraction")


@dataclass(frozen=True)
class SelfEvalRun(SelfEvalTraining):
    """One self-evaluation from files: everything that decides its result."""

    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The language model that drew the samples, and what of it is trained."""
    data: PoolDataConfig = field(default_factory=PoolDataConfig)
    """Its samples."""
    runtime: runtime.RuntimeConfig = field(default_factory=runtime.RuntimeConfig)
    """Threads, precision, device."""


def start(config: SelfEvalRun, run_dir: str | Path, case: Case | None = None, quiet: bool = False) -> Path:
    """Begin a run in a new directory and carry it to its end. Return the directory."""
    run = RunDir(run_dir, LOGS)
    if (run.path / "config.json").exists():
        run.create()  # says that it holds a run already
    parts = _read(config)
    carry_on(run, config, parts, case, quiet)
    return run.path


def resume(run_dir: str | Path, quiet: bool = False) -> Path:
    """Continue a stopped run exactly. Return its directory."""
    run = RunDir(run_dir, LOGS)
    config = read_run_config(run, SelfEvalRun)
    if run.read_status() != "done":
        carry_on(run, config, _read(config), None, quiet)
    return run.path


def _read(config: SelfEvalRun) -> Parts:
    runtime.prepare(config.runtime)
    if config.optim.autocast == "bf16":
        runtime.require_bf16(config.runtime.device)
    train, held_out = read_pools(config.data, config.seed)
    generator = torch_generator(config.seed, "initial weights", device=config.runtime.device)
    return Parts(config, load_language_model(config.model, generator), train, held_out, None)


def read_pools(config: PoolDataConfig, seed: int) -> tuple[SamplePool, SamplePool | None]:
    """Return training and held-out samples, of different prompts."""
    if config.path is None:
        raise ConfigError(
            "no samples: give a pool with --pool DIR (config key 'data.path'; steelyard data pool --help)"
        )
    pool = SamplePool.load(config.path)
    if config.held_out is not None:
        return pool, SamplePool.load(config.held_out)
    if config.held_out_fraction == 0:
        return pool, None
    if len(pool) < 2:
        raise DataError(f"{config.path}: expected at least two prompts, one to be held out, found {len(pool)}")
    count = min(len(pool) - 1, max(1, round(config.held_out_fraction * len(pool))))
    order = numpy_generator(seed, "self_eval/split").permutation(len(pool))
    return pool.take(sorted(order[count:].tolist())), pool.take(sorted(order[:count].tolist()))


__all__ = [
    "Drift",
    "PoolDataConfig",
    "PositionReport",
    "SelfEvalArtefact",
    "SelfEvalReport",
    "SelfEvalRun",
    "SelfEvalTraining",
    "TrainedSelfEval",
    "drift",
    "is_self_eval_run",
    "load_self_eval",
    "read_pools",
    "resume",
    "save_self_eval",
    "score_pool",
    "start",
    "train_self_eval",
]
