"""A language run: a text file -> updates of a byte-level transformer -> validation, in one run directory.

The loop, the checkpoints, the logs and the report are those of control runs: a validation text is an episode whose
return is its log-likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from steelyard import runtime
from steelyard.bench.evaluate import mean_score
from steelyard.config import Config, plain, require_positive, require_range
from steelyard.data.text import TextSource
from steelyard.errors import ConfigError
from steelyard.objectives.sft import SFT, SFTConfig
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.loop import LoopConfig, Stage, fit
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir
from steelyard.workflows.common import Case, begin, carry_out, read_run_config, rewind


@dataclass(frozen=True)
class LanguageRun(Config):
    """One run on text: everything that decides its result."""

    objective: SFTConfig = field(default_factory=SFTConfig)
    """What is learned, and how."""
    path: str | None = None
    """Text file; its end is kept apart for validation."""
    validation_fraction: float = 0.1
    """Share of the file for validation."""
    validation_batches: int = 4
    """Batches of validation text per evaluation."""
    steps: int = 1_000
    """Updates."""
    batch_size: int = 32
    """Windows per update, each as long as the transformer's context."""
    evaluate_every: int = 250
    """Updates between evaluations."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50, checkpoint_every=500))
    """Log and checkpoint intervals."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(max_grad_norm=1.0))
    """Optimiser."""
    runtime: runtime.RuntimeConfig = field(default_factory=runtime.RuntimeConfig)
    """Threads, precision, device."""
    seed: int = 0
    """Of everything random in the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "batch_size", "steps", "validation_batches")
        require_range(self, 0, math.inf, "evaluate_every")


def start(config: LanguageRun, run_dir: str | Path, case: Case | None = None, quiet: bool = False) -> Path:
    """Begin a run in a new directory and carry it to its end. Return the directory."""
    run = RunDir(run_dir)
    source = _source(config)
    begin(run, config, case or Case(), source.content_hash)
    return carry_out(run, lambda: _train(config, run, source, None, quiet))


def resume(run_dir: str | Path, quiet: bool = False) -> Path:
    """Continue a stopped run exactly. Return its directory."""
    run = RunDir(run_dir)
    config = read_run_config(run, LanguageRun)
    if run.read_status() == "done":
        return run.path
    source = _source(config)
    found = rewind(run, config.path, source.content_hash)
    return carry_out(run, lambda: _train(config, run, source, found, quiet))


def _source(config: LanguageRun) -> TextSource:
    if config.path is None:
        raise ConfigError("no text: give a file with --data PATH (config key 'path')")
    context = config.objective.transformer.context
    return TextSource(config.path, context, config.batch_size, config.seed, config.validation_fraction)


def _train(
    config: LanguageRun, run: RunDir, source: TextSource, found: checkpoint.Checkpoint | None, quiet: bool
) -> None:
    runtime.prepare(config.runtime)
    if config.optim.autocast == "bf16":
        runtime.require_bf16(config.runtime.device)
    learner = SFT(config.objective, torch_generator(config.seed, "initial weights")).to(config.runtime.device)
    optimizers = Optimizers(learner, config.optim)
    if found is not None:
        checkpoint.load_into(learner, found.model, str(found.path))
        optimizers.load_state_tensors(found.optimizers)

    def evaluate(step: int) -> float | None:
        rows = learner.evaluation_rows(source.validation_batches(config.validation_batches))
        fixed = {"phase": "offline", "update_step": step, "env_step": 0, "episode_seed": config.seed}
        run.append("eval.jsonl", [fixed | row for row in rows])
        return mean_score(rows)

    fit(
        learner,
        source,
        optimizers,
        Stage("offline", 0, config.steps, config.evaluate_every),
        config.loop,
        run,
        seed=config.seed,
        start=found.step if found else 0,
        artefact={"format": "steelyard-language-1", "objective": plain(config.objective)},
        evaluate=evaluate,
        quiet=quiet,
        label=f"sft seed {config.seed}",
    )
