"""The one loop. It knows no algorithm, no environment and no file format.

One update: batch -> prepare -> for each phase of the learner's plan: losses -> gradients of the phase's groups -> step
-> target networks. Everything random in it is a pure function of (seed, step), so that resuming needs the step only.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from steelyard.config import Config, require_positive
from steelyard.data.source import Source
from steelyard.objectives.base import Learner, Metrics, Phase
from steelyard.rng import torch_generator
from steelyard.train import checkpoint, distributed
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
    """Carry out update `step` (counted from 0) and return its metrics, unreduced and on the device.

    With `OptimConfig.shards` above 1 the metrics are those of this process's parts of the batch: their means, [parts].
    """
    device = next(learner.parameters()).device
    shards = optimizers.config.shards
    if shards == 1:
        shares = [(torch_generator(seed, "update", step, device), learner.prepare(batch.to(device)))]
    else:
        shares = [
            (torch_generator(seed, f"update/{number}", step, device), learner.prepare(part.to(device)))
            for number, part in distributed.parts(batch, shards)
        ]
    metrics: list[Metrics] = [{} for _ in shares]
    for phase in learner.plan:
        if (step + 1) % phase.every:
            continue
        # gradients and losses of a part in one flat buffer, summed over parts: what processes exchange
        total: Tensor | None = None
        for (generator, part), found in zip(shares, metrics, strict=True):
            losses, new = _losses(learner, phase, part, generator, optimizers.config.autocast)
            found |= new
            if shards == 1 and guard is not None:
                for name, loss in losses.items():
                    guard.watch(f"loss {name!r}", loss, step)
            gradients = optimizers.gradients(phase, sum(list(losses.values())[1:], next(iter(losses.values()))))
            if shards > 1:
                flat = torch.cat([x.detach().reshape(-1) for x in (*gradients, *losses.values())])
                total = flat if total is None else total + flat
        if total is not None:
            sizes = [x.numel() for x in (*gradients, *losses.values())]
            pieces = torch.split(distributed.add_up(total) / shards, sizes)
            gradients = [x.view_as(old) for x, old in zip(pieces[: len(gradients)], gradients, strict=True)]
            if guard is not None:
                for name, loss in zip(losses, pieces[len(gradients) :], strict=True):
                    guard.watch(f"loss {name!r}", loss, step)
        norm = optimizers.apply(phase, gradients)
        label = "+".join(phase.losses)
        if guard is not None:
            guard.watch(f"gradient of {label!r}", norm, step)
        for found in metrics:
            found[f"grad/{label}"] = norm
    learner.after_update(step)
    if shards == 1:
        return metrics[0]
    names = dict.fromkeys(name for found in metrics for name in found)
    return {name: torch.stack([_mean(found[name]) for found in metrics if name in found]) for name in names}


def _losses(
    learner: Learner, phase: Phase, batch: Any, generator: torch.Generator, autocast: str
) -> tuple[Metrics, Metrics]:
    """Return the losses of a phase by name, and their metrics."""
    losses: Metrics = {}
    metrics: Metrics = {}
    with torch.autocast(generator.device.type, torch.bfloat16, enabled=autocast == "bf16"):
        for name in phase.losses:
            losses[name], found = learner.loss(name)(batch, generator)
            metrics |= found
    return losses, metrics


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
    also: Callable[[Path], None] | None = None,
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
        also: writes further files into pretrained/ of every checkpoint.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the last good checkpoint stays.
        Interrupted: ctrl-C; a checkpoint was written first.
    """
    guard = FiniteGuard()
    score: float | None = None
    note = ""

    def save(step: int) -> None:
        guard.check()
        distributed.require_same(learner, step)
        if not distributed.is_main():
            return
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
            also=also,
        )

    def look(step: int) -> None:
        nonlocal score, note
        assert evaluate is not None
        if not distributed.is_main():
            return
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
                means = reduce(metrics) if optimizers.config.shards == 1 else reduce_parts(metrics)
                row = {"phase": stage.name, "update_step": done, **source.counters(), **means}
                run.append("metrics.jsonl", [row | {"time/updates_per_second": rate}])
            if evaluates and (ends or (done - stage.first) % stage.evaluate_every == 0):
                guard.check()
                look(done)
            if ends or done % config.log_every == 0:
                progress.advance_to(done, note)
            saves = ends or done % config.checkpoint_every == 0 or distributed.any_of(interrupt.asked)
            if saves:
                save(done)
            score = None
            if ends or done % config.log_every == 0:
                clock, clock_step = time.perf_counter(), done  # rates exclude evaluation and checkpoints
            # one that came since the question above, with nothing saved, waits for the next update's checkpoint
            if saves and distributed.any_of(interrupt.asked):
                break
        if distributed.any_of(interrupt.asked):
            raise Interrupted


def reduce(metrics: Metrics) -> dict[str, float]:
    """Fetch the mean of each metric; NaN or infinity stays as it is for the guard and the log."""
    return {name: float(_mean(value)) for name, value in metrics.items()}


def reduce_parts(metrics: Metrics) -> dict[str, float]:
    """Fetch the mean of each metric over the parts of all processes."""
    parts: dict[str, list[float]] = {}
    for found in distributed.gather({name: value.tolist() for name, value in metrics.items()}):
        for name, values in found.items():
            parts.setdefault(name, []).extend(values)
    return {name: sum(sorted(values)) / len(values) for name, values in parts.items()}  # in an order that all share


def _mean(value: Tensor) -> Tensor:
    return value.float().mean()


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
