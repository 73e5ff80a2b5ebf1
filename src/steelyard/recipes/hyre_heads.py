r"""Head sets of the HyRe studies: how each is trained, and what it says of pairs.

Two bases:

- trunk: features -> an MLP trained jointly with all heads, by the library's learner (`objectives/hyre.py`);
- features: no trunk; a head is an L2-penalised logistic regression on the frozen features, solved exactly
  (`logistic_head`), or a fixed direction (+- eigenvectors, random).

What the heads see decides whether they differ where users do: everything, a share of the users, one user or cluster.

Shapes: M training pairs, N pairs, H members, D features of an item, F features that members are functions of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from steelyard.data.clusters import k_means
from steelyard.data.labelled import LabelledData
from steelyard.data.pair_tasks import Floats, Ints
from steelyard.nets.backbones import Trunk
from steelyard.nets.ensemble import EnsembleHead, HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe
from steelyard.recipes.hyre_population import Split, Users
from steelyard.rng import numpy_generator, torch_generator
from steelyard.workflows.heads import fit_heads

Side = npt.NDArray[np.float32]
Sees = Callable[[Side, Side], tuple[Floats, Floats]]
"""Both sides of pairs [N, D] -> members' margins [N, H], standardised, and feature differences [N, F]."""


@dataclass(frozen=True)
class HeadSpec:
    """How a head set is made.

    Attributes:
        name: on the page.
        base: trunk or features.
        sees: what a head is trained on.
        heads: how many, priors, whether the pooled head is a member.
        share: of the users that a head sees, for "some users".
    """

    name: str
    base: Literal["trunk", "features"] = "features"
    sees: Literal["everything", "some users", "one user", "one cluster"] = "one user"
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    share: float = 0.05

    def __post_init__(self) -> None:
        plain = self.heads.kind == "linear" and self.heads.prior == "none"
        if self.base == "features" and not self.heads.fixed and not (plain and self.sees != "everything"):
            raise ValueError(f"{self.name}: heads on features are solved exactly, or are fixed directions")


@dataclass(frozen=True)
class Training:
    """Settings of training that all head sets share.

    Attributes:
        trunk: units of the trunk's layer.
        epochs: of training a trunk.
        batch_size: pairs of an update.
        learning_rate: Adam's.
        l2: penalty of exact heads; the pooled one has it too.
    """

    trunk: int = 128
    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 1e-3
    l2: float = 10.0


@dataclass(frozen=True)
class TrainedHeads:
    """A head set.

    Attributes:
        name: of its spec.
        sees: what it says of pairs.
        scale: [H], what the members were divided by to be standardised.
        learner: with a trunk; None without.
    """

    name: str
    sees: Sees
    scale: Floats
    learner: HyRe | None = None

    @property
    def num_members(self) -> int:
        """H."""
        return len(self.scale)


@dataclass(frozen=True)
class Seen:
    """Users as a head set sees them; T users, R draws, N adaptation pairs, P test pairs.

    Attributes:
        names: [T].
        members: [T, R, N, H] margins of adaptation pairs.
        features: [T, R, N, F].
        labels: [T, R, N], 1 where the first is preferred.
        test_members: [T, P, H].
        test_features: [T, P, F].
        test_labels: [T, P].
    """

    names: tuple[str, ...]
    members: Floats
    features: Floats
    labels: Floats
    test_members: Floats
    test_features: Floats
    test_labels: Floats

    def draws(self, count: int) -> Seen:
        """Return it with the first draws only."""
        members, features, labels = (part[:, :count] for part in (self.members, self.features, self.labels))
        return replace(self, members=members, features=features, labels=labels)

    def of_members(self, chosen: Ints | slice, factor: Floats | None = None) -> Seen:
        """Return it with some of the members only, and each times its factor [H] (before choosing)."""
        by = 1.0 if factor is None else factor
        return replace(
            self, members=(self.members * by)[..., chosen], test_members=(self.test_members * by)[..., chosen]
        )

    def accuracy(self, outputs: Floats) -> Floats:
        """Return the share of test pairs that outputs [T, R, P] get right, [T, R]; a tie counts half."""
        right = np.sign(outputs) * (2 * self.test_labels - 1)[:, None]
        return np.asarray((right > 0).mean(2) + 0.5 * (right == 0).mean(2))


def see(heads: TrainedHeads, users: Users) -> Seen:
    """Return what a head set says of users' pairs."""
    shape = users.labels.shape
    width = users.first.shape[-1]
    members, features = heads.sees(users.first.reshape(-1, width), users.second.reshape(-1, width))
    test_members, test_features = heads.sees(users.test_first.reshape(-1, width), users.test_second.reshape(-1, width))
    tests = users.test_labels.shape
    return Seen(
        users.names,
        members.reshape(*shape, -1),
        features.reshape(*shape, -1),
        users.labels,
        test_members.reshape(*tests, -1),
        test_features.reshape(*tests, -1),
        users.test_labels,
    )


def train_heads(spec: HeadSpec, split: Split, training: Training) -> TrainedHeads:
    """Train one head set on the training pairs of a split; a function of its arguments only."""
    groups = split.groups
    if spec.sees == "one cluster":
        # what a pair is about, whichever side is preferred: no user id is needed
        topics = (split.first + split.second).astype(np.float64) / 2
        found = k_means(topics, spec.heads.num_heads, numpy_generator(split.number, "hyre/clusters"))
        groups = np.unique(found, return_inverse=True)[1].astype(np.int64)
    if spec.sees in ("one user", "one cluster") and not spec.heads.fixed:
        spec = replace(spec, heads=replace(spec.heads, num_heads=int(groups.max()) + 1))
    return (
        _on_trunk(spec, split, groups, training)
        if spec.base == "trunk"
        else _on_features(spec, split, groups, training)
    )


def _on_features(spec: HeadSpec, split: Split, groups: Ints, training: Training) -> TrainedHeads:
    differences = split.first.astype(np.float64) - split.second
    weights = [logistic_head(differences, training.l2)[None]] if spec.heads.pooled else []
    if spec.heads.fixed:
        weights.append(_directions(spec.heads, differences, split.number))
    elif spec.sees == "some users":
        users, draw = np.unique(groups), numpy_generator(split.number, "hyre/some users")
        size = max(1, round(spec.share * len(users)))
        for _ in range(spec.heads.num_heads):
            chosen = np.isin(groups, draw.permutation(users)[:size])
            weights.append(logistic_head(differences[chosen], training.l2)[None])
    else:
        for group in range(spec.heads.num_heads):
            weights.append(logistic_head(differences[groups == group], training.l2)[None])
    weight = np.concatenate(weights)
    scale = np.sqrt(((differences @ weight.T) ** 2).mean(0))

    def sees(first: Side, second: Side) -> tuple[Floats, Floats]:
        differences = first.astype(np.float64) - second
        return differences @ weight.T / scale, differences

    return TrainedHeads(spec.name, sees, scale)


def _directions(config: HeadsConfig, differences: Floats, number: int) -> Floats:
    """Return fixed directions [K, D] of both signs."""
    generator = torch_generator(number, "hyre/directions")
    head = EnsembleHead(replace(config, pooled=False), differences.shape[1], 1, generator)
    head.set_directions(torch.from_numpy(differences.astype(np.float32)))
    found = head.linear()
    assert found is not None
    return found[0][:, 0].double().numpy()


def _on_trunk(spec: HeadSpec, split: Split, groups: Ints, training: Training) -> TrainedHeads:
    shares: dict[str, Literal["all", "groups", "one_group"]] = {"everything": "all", "some users": "groups"}
    config = EnsembleConfig(
        heads=spec.heads,
        shares=shares.get(spec.sees, "one_group"),
        share=spec.share,
        learning_rate=training.learning_rate,
        head_learning_rate=training.learning_rate,
        scaling="common",
    )
    generator = torch_generator(split.number, "hyre/heads")
    learner = HyRe(config, Trunk(split.first.shape[1], (training.trunk,), generator), generator)
    data = LabelledData(split.first, np.ones(len(groups), np.float32), split.second, groups)
    steps = training.epochs * max(1, len(data) // training.batch_size)
    fit_heads(learner, data, steps, training.batch_size, split.number)

    def sees(first: Side, second: Side) -> tuple[Floats, Floats]:
        pairs = LabelledData(first, np.ones(len(first), np.float32), second)
        parts = [learner.support(batch) for batch in pairs.batches(4096)]
        features = np.concatenate([part.features for part in parts if part.features is not None])
        return np.concatenate([part.members[:, :, 0] for part in parts]), features

    return TrainedHeads(spec.name, sees, learner.head.scale.double().numpy(), learner)


def logistic_head(differences: Floats, l2: float, tolerance: float = 1e-8) -> Floats:
    r"""Return argmin_w \sum_i log(1 + exp(-w . d_i)) + l2 / 2 |w|^2 [D] for differences d [M, D], preferred side first.

    Newton's method with halved steps, in the smaller of two spaces: w, or the M weights a with w = d^T a.
    """
    rows, width = differences.shape
    if rows >= width:
        gram, basis = l2 * np.eye(width), differences
    else:
        gram, basis = l2 * (differences @ differences.T), differences @ differences.T

    def objective(x: Floats) -> float:
        return float(np.logaddexp(0, -basis @ x).sum() + x @ gram @ x / 2)

    x = np.zeros(basis.shape[1])
    value = objective(x)
    for _ in range(100):
        wrong = np.exp(-np.logaddexp(0, basis @ x))  # sigma(-f)
        gradient = basis.T @ wrong - gram @ x
        hessian = (basis * (wrong * (1 - wrong))[:, None]).T @ basis + gram
        # the dual Hessian is singular where pairs repeat; there any solution will do
        step = np.linalg.solve(hessian + 1e-12 * np.trace(hessian) / len(hessian) * np.eye(len(hessian)), gradient)
        length = 1.0
        while (found := objective(x + length * step)) > value and length > 1e-6:
            length /= 2
        x, value = x + length * step, min(value, found)
        if gradient @ step < tolerance * (1 + value):
            break
    return x if rows >= width else differences.T @ x
