"""E1's baseline that trains everything: a network of a trunk and one head, fine-tuned whole on a user's few labels.

It is another single model than that of E1, whose head stands on the frozen features: pooled pairs train its trunk too.
Equal and wide tuning (`adapt.finetune.EQUAL_NETWORK`, `WIDE_NETWORK`), all users in one batched call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from steelyard.adapt.choose import search
from steelyard.adapt.finetune import EQUAL_NETWORK, WIDE_NETWORK, NetworkUsers
from steelyard.bench.stats import number
from steelyard.data.labelled import LabelledBatch
from steelyard.data.pair_tasks import Floats
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import HyRe
from steelyard.recipes.hyre_adapting import Trials, chosen, path_scores, still
from steelyard.recipes.hyre_heads import HeadSpec, Training, see, train_heads
from steelyard.recipes.hyre_jobs import Row
from steelyard.recipes.hyre_personas_page import GAUSSIAN, HYRE, WIDE, Scores, difference_text
from steelyard.recipes.hyre_population import Split, Users
from steelyard.report.tables import Table

NETWORK = HeadSpec("one network", "trunk", "everything", HeadsConfig(num_heads=1))
"""Member 0 is fine-tuned; a head set has at least one more."""
SINGLE_NETWORK = "single network"
TUNED = {
    "fine-tune network (equal grid)": EQUAL_NETWORK,
    "fine-tune network (wide grid)": WIDE_NETWORK,
}
DRAWS = 1
"""Draws of a user's labels that are tried; all would take too long."""


def network_rows(
    split: Split, training: Training, users: tuple[Users, Users], shots: Sequence[int], common: Mapping[str, Any]
) -> list[Row]:
    """Train the network, choose steps and learning rate on validation users, and fine-tune it for the unseen ones.

    Args:
        split: its training pairs are used.
        training: of the network.
        users: validation and unseen.
        shots: n.
        common: split and world of every row.
    """
    heads = train_heads(NETWORK, split, training)
    assert heads.learner is not None
    validation, targets = users
    trials = Trials({**common, "heads": NETWORK.name}, see(heads, validation), see(heads, targets))
    trials.add(SINGLE_NETWORK, 0, still(trials.targets, "single"))
    for n in shots:
        # the equal grid is part of the wide one
        scores = path_scores(
            WIDE_NETWORK,
            lambda rate, steps, n=n: tuned(heads.learner, validation, n, rate, steps),  # type: ignore[misc]
            trials.validation.accuracy,
        )
        for name, grid in TUNED.items():
            found = search(grid, lambda steps, learning_rate, s=scores: s.get((steps, learning_rate), -np.inf))
            choice = chosen(found)
            trials.add_choice(name, n, choice)
            steps, rate = int(choice.settings["steps"]), choice.settings["learning_rate"]
            trials.add(name, n, trials.targets.accuracy(next(tuned(heads.learner, targets, n, rate, (steps,)))))
    return trials.rows


def tuned(learner: HyRe, users: Users, n: int, learning_rate: float, steps: Sequence[int]) -> Iterator[Floats]:
    """Yield the margins [T, R, P] of every user's own network after each of the increasing numbers of steps.

    Raises:
        NonFiniteError: a network runs away.
    """
    draws = min(DRAWS, users.labels.shape[1])
    count = len(users.names) * draws
    first, second, labels = (
        torch.from_numpy(np.ascontiguousarray(part[:, :draws, :n]).reshape(count, n, *part.shape[3:])).float()
        for part in (users.first, users.second, users.labels)
    )
    tests = [torch.from_numpy(part).repeat_interleave(draws, 0) for part in (users.test_first, users.test_second)]
    networks = NetworkUsers(learner, count)
    for _ in networks.steps(LabelledBatch(first, labels, second), learning_rate, steps):
        outputs = networks.outputs(*tests)[..., 0]
        yield outputs.double().numpy().reshape(len(users.names), draws, -1)


def network_table(scores: Scores, world: str, shots: Sequence[int]) -> Table | None:
    """Return E1's methods on the splits where the network was fine-tuned, too; None where it was not."""
    base = scores.cells(world, SINGLE_NETWORK, 0, NETWORK.name)
    found = [n for n in shots if scores.cells(world, next(iter(TUNED)), n, NETWORK.name)]
    if not base or not found:
        return None
    rows = []
    for name in (SINGLE_NETWORK, *TUNED, WIDE, HYRE, GAUSSIAN):
        means, leads = [], []
        for n in found:
            every = scores.cells(world, name, n, NETWORK.name) or scores.cells(world, name, n)
            own = base if name == SINGLE_NETWORK else {key: every[key] for key in base}
            means.append(number(100 * float(np.mean(list(own.values()))), 1))
            leads.append("" if name == HYRE else difference_text(scores.cells(world, HYRE, n), own))
        rows.append((name, *(f"{mean} ({text})" if text else mean for mean, text in zip(means, leads, strict=True))))
    splits = len({split for split, _ in base})
    return Table(
        "A whole network fine-tuned",
        f"Accuracy in % after n labels on {splits} of the splits ({len(base)} cells, {DRAWS} draw of labels each for "
        "the networks), and HyRe's lead in points with its interval. A trunk and one head, trained on all pairs, then "
        "fine-tuned whole for each user.",
        ("method", *(f"n = {n}" for n in found)),
        tuple(rows),
    )
