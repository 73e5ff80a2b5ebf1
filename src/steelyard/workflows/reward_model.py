"""A reward model's run: pairs -> updates of a backbone with a head -> accuracy on held-out pairs.

The loop, checkpoints and logs are those of every run; an evaluation row is one held-out pair (`return` the margin,
`score` 1 where the chosen completion gets the higher reward). `--scorer reward_model:DIR` reads the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steelyard import runtime
from steelyard.bench.evaluate import mean_score
from steelyard.config import Config, plain, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.preferences import TokenizedData, tokenize
from steelyard.data.sampler import EpochSampler
from steelyard.envs.model_scorers import RewardModelArtefact, build_reward_model
from steelyard.errors import ConfigError
from steelyard.nets.lm import LanguageModelConfig
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.reward_model import RewardModelConfig
from steelyard.train import checkpoint, distributed
from steelyard.train.loop import LoopConfig, Stage, fit
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir
from steelyard.workflows.common import Case, begin, carry_out, read_run_config, rewind
from steelyard.workflows.preference import TextDataConfig, read_rows


@dataclass(frozen=True)
class RewardModelRun(Config):
    """One reward model: everything that decides its result."""

    objective: RewardModelConfig = field(default_factory=RewardModelConfig)
    """How rewards are learned."""
    model: LanguageModelConfig | TransformerConfig = field(
        default_factory=lambda: LanguageModelConfig(reference="none")
    )
    """The backbone, and what of it is trained."""
    data: TextDataConfig = field(default_factory=TextDataConfig)
    """Preferences."""
    batch_size: int = 8
    """Prompts per update."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is not given."""
    steps: int | None = None
    """Updates."""
    evaluate_every: int = 0
    """Updates between evaluations; 0: at the beginning and at the end."""
    evaluation_pairs: int = 256
    """Held-out rows per evaluation."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=10, checkpoint_every=200))
    """Log and checkpoint intervals."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(max_grad_norm=1.0))
    """Optimiser; `shards` is gradient accumulation."""
    runtime: runtime.RuntimeConfig = field(default_factory=runtime.RuntimeConfig)
    """Threads, precision, device."""
    seed: int = 0
    """Of everything random in the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "batch_size", "epochs", "steps")
        require_range(self, 0, math.inf, "evaluate_every", "evaluation_pairs")


class PairSource:
    """Batches of pairs, every row once per epoch; a pure function of (seed, step)."""

    def __init__(self, data: TokenizedData, batch_size: int, seed: int) -> None:
        self.data = data
        self.sampler = EpochSampler(len(data), batch_size, seed, "reward_model/rows")

    def batch(self, step: int) -> ExperienceBatch:
        """Return the batch of update `step`."""
        return self.data.batch(self.sampler.indices(step))

    def counters(self) -> dict[str, Any]:
        """Return nothing: the update step says it all."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


@distributed.launched
def start(config: RewardModelRun, run_dir: str | Path, case: Case | None = None, quiet: bool = False) -> Path:
    """Begin a run in a new directory and carry it to its end. Return the directory."""
    run, quiet = distributed.run_dir(run_dir), quiet or not distributed.is_main()
    shards = distributed.shards_of(config.optim.shards, config.batch_size)
    config = replace(config, optim=replace(config.optim, shards=shards))
    parts = _Parts(config)
    begin(run, config, case or Case(), parts.data.content_hash)
    for sentence in parts.notes:
        run.event(sentence)
    return carry_out(run, lambda: _train(config, run, parts, None, quiet))


@distributed.launched
def resume(run_dir: str | Path, quiet: bool = False) -> Path:
    """Continue a stopped run exactly. Return its directory."""
    run, quiet = distributed.run_dir(run_dir), quiet or not distributed.is_main()
    config = read_run_config(run, RewardModelRun)
    distributed.shards_of(config.optim.shards, config.batch_size, begun=True)
    if run.read_status() == "done":
        return run.path
    parts = _Parts(config)
    found = rewind(run, config.data.path, parts.data.content_hash) if distributed.is_main() else None
    return carry_out(run, lambda: _train(config, run, parts, found, quiet))


class _Parts:
    """Data and learner of a config."""

    def __init__(self, config: RewardModelRun) -> None:
        runtime.prepare(config.runtime)
        if config.optim.autocast == "bf16":
            runtime.require_bf16(config.runtime.device)
        train, held_out = read_rows(config.data, config.seed)
        if train.kind != "preference":
            raise ConfigError(f"{train.source}: a reward model learns from chosen and rejected; these are {train.kind}")
        data = config.data
        self.artefact = RewardModelArtefact(
            config.objective, config.model, data.max_prompt_tokens + data.max_completion_tokens, config.seed
        )
        learner, tokenizer = build_reward_model(self.artefact)
        self.learner = learner.to(config.runtime.device)
        limits = (data.max_prompt_tokens, data.max_completion_tokens, data.truncation)
        self.data = tokenize(train, tokenizer, *limits)
        self.held_out = None if held_out is None else tokenize(held_out, tokenizer, *limits)
        self.notes = [*train.notes, *self.data.report.sentences()]
        self.optimizers = Optimizers(self.learner, config.optim)


def _train(
    config: RewardModelRun, run: RunDir, parts: _Parts, found: checkpoint.Checkpoint | None, quiet: bool
) -> None:
    learner, optimizers, held_out = parts.learner, parts.optimizers, parts.held_out
    first = 0
    if found is not None:
        checkpoint.load_into(learner, found.model, str(found.path))
        optimizers.load_state_tensors(found.optimizers)
        first = found.step
    first = distributed.share_state(learner, optimizers, first)
    steps = config.steps or max(1, math.ceil(config.epochs * len(parts.data) / config.batch_size))
    count = 0 if held_out is None else min(config.evaluation_pairs, len(held_out))

    def evaluate(step: int) -> float | None:
        assert held_out is not None
        starts = range(0, count, config.batch_size)
        batches = (held_out.batch(np.arange(first, min(first + config.batch_size, count))) for first in starts)
        with torch.no_grad():
            rows = learner.rows(batches)
        fixed = {"phase": "offline", "update_step": step, "env_step": 0, "episode_seed": config.seed}
        run.append("eval.jsonl", [fixed | row for row in rows])
        return mean_score(rows)

    fit(
        learner,
        PairSource(parts.data, config.batch_size, config.seed),
        optimizers,
        Stage("offline", 0, steps, (config.evaluate_every or steps) if count else 0),
        config.loop,
        run,
        seed=config.seed,
        start=first,
        artefact=plain(parts.artefact),
        evaluate=evaluate,
        quiet=quiet,
        label=f"reward_model seed {config.seed}",
    )
