"""The one loop. It knows no algorithm, no environment and no file format.

One update: batch -> prepare -> for each phase of the learner's plan: losses -> gradients of the phase's groups -> step
-> target networks. Everything random in it is a pure function of (seed, step), so that resuming needs the step only.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from steelyard.config import Config, require_positive
from steelyard.data.source import Source
from steelyard.objectives.base import Learner, Metrics
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.guards import FiniteGuard
from steelyard.train.optim import Optimizers
from steelyard.train.progress import ProgressLine
from steelyard.train.rundir import RunDir

Evaluate = Callable[[int], float | None]
"""Evaluates after so many updates, writes its rows, and returns a score (higher is better) or None."""


@dataclass(frozen=True)
class LoopConfig(Config):
    """How often the loop looks up from its work; all in update steps."""

    log_every: int = 500
    """Fetch and write metrics."""
    checkpoint_every: int = 5_000
    """Write a checkpoint (one is always written at the end)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "log_every", "checkpoint_every")


@dataclass(frozen=True)
class Stage:
    """A stretch of updates with one source.

    Attributes:
        name: "offline", "online", ...: the `phase` of its rows.
        first: update step at which the stage begins.
        stop: update step at which it ends.
        evaluate_every: evaluate at `first` and after every so many updates, and at the end; 0: never.
    """

    name: str
    first: int
    stop: int
    evaluate_every: int = 0


class Interrupted(Exception):  # noqa: N818 - not an error: the run can go on
    """The user pressed ctrl-C; a checkpoint was written."""


def update(
    learner: Learner, optimizers: Optimizers, batch: Any, seed: int, step: int, guard: FiniteGuard | None = None
) -> Metrics:
    """Carry out update `step` (counted from 0) and return its metrics, unreduced and on the device."""
    device = next(learner.parameters()).device
    generator = torch_generator(seed, "update", step, device)
    batch = learner.prepare(batch.to(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=optimizers.config.autocast == "bf16")
    metrics: Metrics = {}
    for phase in learner.plan:
        if (step + 1) % phase.every:
            continue
        total = None
        with autocast:
            for name in phase.losses:
                loss, found = learner.loss(name)(batch, generator)
                if guard is not None:
                    guard.watch(f"loss {name!r}", loss, step)
                total = loss if total is None else total + loss
                metrics |= found
        assert total is not None
        norm = optimizers.step(phase, total)
        label = "+".join(phase.losses)
        if guard is not None:
            guard.watch(f"gradient of {label!r}", norm, step)
        metrics[f"grad/{label}"] = norm
    learner.after_update(step)
    return metrics


def fit(
    learner: Learner,
    source: Source,
    optimizers: Optimizers,
    stage: Stage,
    config: LoopConfig,
    run: RunDir,
    *,
    seed: int,
    start: int,
    artefact: dict[str, Any],
    evaluate: Evaluate | None = None,
    quiet: bool = False,
    label: str | None = None,
) -> None:
    """Carry out updates start..stage.stop - 1 of a stage, with logs, evaluations and checkpoints.

    Args:
        learner: what learns; changed in place.
        optimizers: how; changed in place.
        source: gives the batch of each step.
        stage: where the stage begins and ends.
        config: logging and checkpoint intervals.
        run: where to write.
        seed: of all randomness in the updates.
        start: first update to carry out: `stage.first`, or the step of the checkpoint that is resumed.
        artefact: pretrained/config.json of every checkpoint.
        evaluate: called on the stage's schedule.
        quiet: no progress on the terminal.
        label: of the progress line; default is the stage's name.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the last good checkpoint stays.
        Interrupted: ctrl-C; a checkpoint was written first.
    """
    guard = FiniteGuard()
    score: float | None = None
    note = ""

    def save(step: int) -> None:
        guard.check()
        run.sync_logs()  # the checkpoint remembers their lengths
        checkpoint.save(
            run.checkpoints,
            step,
            config=artefact,
            model=learner.state_dict(),
            optimizers=optimizers.state_tensors(),
            source=source.state_tensors(),
            state={"update_step": step, "stage": stage.name, "logs": run.log_sizes()},
            score=score,
        )

    def look(step: int) -> None:
        nonlocal score, note
        assert evaluate is not None
        score = evaluate(step)
        note = "" if score is None else f"score {score:.2f}"

    evaluates = evaluate is not None and stage.evaluate_every > 0
    with _CatchInterrupt() as interrupt, ProgressLine(label or stage.name, stage.stop, start, quiet) as progress:
        if evaluates and start == stage.first:
            look(start)
            score = None
        clock, clock_step = time.perf_counter(), start
        for step in range(start, stage.stop):
            batch = source.batch(step)
            metrics = update(learner, optimizers, batch, seed, step, guard)
            done = step + 1
            ends = done == stage.stop
            if ends or done % config.log_every == 0:
                guard.check()
                rate = (done - clock_step) / max(time.perf_counter() - clock, 1e-9)
                row = {"phase": stage.name, "update_step": done, **source.counters(), **reduce(metrics)}
                run.append("metrics.jsonl", [row | {"time/updates_per_second": rate}])
            if evaluates and (ends or (done - stage.first) % stage.evaluate_every == 0):
                guard.check()
                look(done)
            if ends or done % config.log_every == 0:
                progress.advance_to(done, note)
            saves = ends or done % config.checkpoint_every == 0 or interrupt.asked
            if saves:
                save(done)
            score = None
            if ends or done % config.log_every == 0:
                clock, clock_step = time.perf_counter(), done  # rates exclude evaluation and checkpoints
            if saves and interrupt.asked:  # a ctrl-C since then waits for the next update's checkpoint
                break
        if interrupt.asked:
            raise Interrupted


def reduce(metrics: Metrics) -> dict[str, float]:
    """Fetch the mean of each metric; NaN or infinity stays as it is for the guard and the log."""
    return {name: float(value.float().mean()) for name, value in metrics.items()}


class _CatchInterrupt:
    """Turns the first ctrl-C into a flag, so that the loop can finish its update and write a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _CatchInterrupt:
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        except ValueError:  # not in the main thread: whoever started it handles ctrl-C
            self._installed = False
        return self

    def __exit__(self, *exit_info: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt  # a second ctrl-C stops at once
        self.asked = True
