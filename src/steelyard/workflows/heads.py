"""Heads trained in memory: labelled data in, a calibrated ensemble out. No run directory; recipes and tests use it."""

from __future__ import annotations

from steelyard.data.labelled import LabelledData, LabelledSource
from steelyard.objectives.hyre import HyRe
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers


def fit_heads(
    learner: HyRe,
    data: LabelledData,
    steps: int,
    batch_size: int,
    seed: int,
    held_out: LabelledData | None = None,
    optim: OptimConfig | None = None,
) -> HyRe:
    """Train an ensemble in place and return it.

    Statistics are fitted first, directions of fixed heads and the members' scales last.

    Args:
        learner: not trained yet.
        data: to train on.
        steps: updates; 0 where nothing but fixed directions is wanted.
        batch_size: examples an update, at most all.
        seed: of their order.
        held_out: for the residual variance of a regression's members; the training data where None.
        optim: Adam's settings.
    """
    learner.fit_statistics(data.batches(), data.group_counts)
    source, optimizers = (
        LabelledSource(data, min(batch_size, len(data)), seed),
        Optimizers(learner, optim or OptimConfig()),
    )
    for step in range(steps):
        update(learner, optimizers, source.batch(step), seed, step)
    if learner.config.heads.fixed:
        learner.fit_directions(data.batches())
    learner.calibrate((held_out if held_out is not None and learner.config.task == "regression" else data).batches())
    return learner
