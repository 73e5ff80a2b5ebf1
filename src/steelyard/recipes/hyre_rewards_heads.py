"""Head sets of E3: what is trained on which pairs. The study: `recipes/hyre_rewards.py`.

| heads | what makes them differ |
|---|---|
| `groups` | one a training group: scenario, application, benchmark (the user heads of E1) |
| `clusters` | one a cluster of pairs by what they are about; no group is needed |
| `bootstrap` | each sees a tenth of the groups |
| `shared`, `prior` | a trunk and linear heads on all data, without and with frozen priors (the paper's) |
| `pca` | both signs of principal directions, not trained (Luo et al., arXiv 2502.13131) |
| `groups, length` | as `groups`, on the encoder's features and the logarithm of the completion's length |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import nn

from steelyard.adapt.choose import HeldOutTask
from steelyard.config import Config, require_positive, require_range
from steelyard.data.clusters import k_means
from steelyard.data.labelled import LabelledData
from steelyard.data.pair_tasks_rewards import Features as Vectors
from steelyard.data.pair_tasks_rewards import RewardTask
from steelyard.errors import ConfigError
from steelyard.nets.backbones import Features, Trunk
from steelyard.nets.encoder import EncoderConfig
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig, HyRe
from steelyard.rng import numpy_generator, torch_generator
from steelyard.workflows.heads import fit_heads

HEAD_SETS = ("groups", "clusters", "bootstrap", "shared", "prior", "pca", "groups, length")
MAIN, WITH_LENGTH = "groups", "groups, length"
"""The head set whose numbers answer the claims; fixed before any target was scored."""
SHOTS = 5
"""Labelled pairs in the claims."""
FEATURES = "features.safetensors"
Pair = tuple[Vectors, Vectors]
"""Features [P, D] of chosen and of rejected completions."""


@dataclass(frozen=True)
class RewardStudy(Config):
    """E3: real preference distributions."""

    data: str | None = None
    """Folder with preference sets (data/pair_tasks_rewards.py); without it this part is left out."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Frozen encoder."""
    head_sets: tuple[str, ...] = HEAD_SETS
    """Ways to make heads differ."""
    shots: tuple[int, ...] = (1, 2, 5, 10)
    """n: labelled pairs to adapt to."""
    draws: int = 20
    """Draws of the labelled pairs of a target."""
    tuning_draws: int = 10
    """Draws where settings are chosen; few make the choice of eta, and with it the gain, a matter of luck."""
    target_pairs: int = 400
    """Pairs of a target that are used, at most."""
    group_pairs: int = 200
    """Training pairs of a group, at most."""
    length_weight: float = 1.0
    """Deviation of the logarithm of the length, where it is a feature, relative to that of all others together."""
    least_pairs: int = 10
    """Training pairs a group needs for a head of its own; smaller ones share one."""
    num_heads: int = 100
    """Heads of sets that do not follow from the groups."""
    clusters: int = 40
    """Clusters."""
    trunk: int = 128
    """Width of the trunk of shared bases."""
    prior_scale: float = 3.0
    """beta of the priors."""
    l2: float = 0.3
    """Penalty of linear heads on frozen features."""
    steps: int = 300
    """Updates."""
    batch_size: int = 512
    """Pairs an update."""

    def __post_init__(self) -> None:
        """Check ranges and names."""
        require_positive(self, "draws", "tuning_draws", "target_pairs", "group_pairs", "least_pairs", "num_heads")
        require_positive(self, "clusters", "trunk", "steps", "batch_size")
        require_range(self, 0, np.inf, "l2", "prior_scale", "length_weight")
        if MAIN not in self.head_sets or not set(self.head_sets) <= set(HEAD_SETS):
            raise ConfigError(f"head_sets must hold {MAIN!r} and no others than {HEAD_SETS}, found {self.head_sets}")
        if SHOTS not in self.shots or list(self.shots) != sorted(set(self.shots)) or self.shots[0] < 1:
            raise ConfigError(f"shots must be increasing numbers from 1 and hold {SHOTS}, found {self.shots}")


def with_length(tasks: Sequence[RewardTask], features: Mapping[str, Pair], weight: float) -> dict[str, Pair]:
    """Return features with one more: the logarithm of a completion's length, whose labels nobody needs to know."""
    everything = np.concatenate([side for pair in features.values() for side in pair]).astype(np.float64)
    spread = float(np.sqrt(everything.var(0).sum()))
    lengths = {
        task.name: [
            np.log([1 + len(text) for text in texts])
            for texts in zip(*((p.chosen, p.rejected) for p in task.pairs), strict=True)
        ]
        for task in tasks
    }
    flat = np.concatenate([side for pair in lengths.values() for side in pair])
    factor, middle = weight * spread / float(flat.std()), float(flat.mean())
    return {
        name: (
            np.concatenate([first, (factor * (lengths[name][0] - middle))[:, None]], 1).astype(np.float32),
            np.concatenate([second, (factor * (lengths[name][1] - middle))[:, None]], 1).astype(np.float32),
        )
        for name, (first, second) in features.items()
    }


def prompt_key(text: str) -> str:
    """Return a prompt without differences of case and space."""
    return " ".join(text.lower().split())


def training_data(
    training: Sequence[RewardTask], held: Sequence[RewardTask], features: Mapping[str, Pair], config: RewardStudy
) -> tuple[LabelledData, int]:
    """Return training pairs with their groups, and how many were dropped: a held-out target has their prompt."""
    closed = {prompt_key(pair.prompt) for task in held for pair in task.pairs}
    found: dict[str, list[tuple[str, int]]] = {}
    dropped = 0
    for task in training:
        for row, (pair, group) in enumerate(zip(task.pairs, task.groups, strict=True)):
            if prompt_key(pair.prompt) in closed:
                dropped += 1
            else:
                found.setdefault(group, []).append((task.name, row))
    groups: list[list[tuple[str, int]]] = []
    small: list[tuple[str, int]] = []
    for name, rows in found.items():
        order = numpy_generator(0, f"rewards/{name}").permutation(len(rows))[: config.group_pairs]
        if len(order) < config.least_pairs:
            small += [rows[i] for i in order]
        else:
            groups.append([rows[i] for i in order])
    groups += [small] if small else []
    first, second = (np.stack([features[name][side][row] for rows in groups for name, row in rows]) for side in (0, 1))
    numbers = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    # what heads say of a pair is odd in its order, so that the preferred one may always come first
    return LabelledData(first, np.ones(len(first), np.float32), second, numbers), dropped


def train(head_set: str, data: LabelledData, config: RewardStudy) -> HyRe:
    """Train one head set."""
    assert data.other is not None
    width, generator = data.inputs.shape[1], torch_generator(0, f"rewards/{head_set}")
    backbone: nn.Module = Features(width)
    own = HeadsConfig(num_heads=config.num_heads, init_scale=0.0)
    linear = EnsembleConfig(heads=own, l2=config.l2, head_learning_rate=3e-3, scaling="common", shares="all")
    if head_set == "clusters":
        middle = (data.inputs + data.other).astype(np.float64) / 2
        labels = k_means(middle, config.clusters, numpy_generator(0, "rewards/clusters"))
        data = data.with_groups(np.unique(labels, return_inverse=True)[1].astype(np.int64))
    if head_set in (MAIN, WITH_LENGTH, "clusters"):
        ensemble = replace(linear, shares="one_group", heads=replace(own, num_heads=data.num_groups))
    elif head_set == "bootstrap":
        ensemble = replace(linear, shares="groups", share=0.1)
    elif head_set == "pca":
        ensemble = replace(linear, heads=HeadsConfig(num_heads=config.num_heads, kind="pca", init_scale=0.0))
    else:
        backbone = Trunk(width, (config.trunk,), generator)
        heads = HeadsConfig(num_heads=config.num_heads)
        if head_set == "prior":
            heads = replace(heads, prior="mlp", prior_scale=config.prior_scale)
        ensemble = EnsembleConfig(heads=heads, scaling="common")
    return fit_heads(HyRe(ensemble, backbone, generator), data, config.steps, config.batch_size, seed=0)


def held_out(task: RewardTask, pair: Pair, learner: HyRe, config: RewardStudy) -> HeldOutTask:
    """Return a target as the heads see it; pairs with the same prompt are never both labelled and scored."""
    rows = rows_of(task, config)
    ones = np.ones(len(rows), np.float32)
    examples = learner.support(LabelledData(pair[0][rows], ones, pair[1][rows]).batch())
    return HeldOutTask(examples, sources=prompts_of(task)[rows], name=task.name)


def rows_of(task: RewardTask, config: RewardStudy) -> npt.NDArray[np.int64]:
    """Return the pairs of a target that are used."""
    return numpy_generator(0, f"rewards/rows/{task.name}").permutation(len(task))[: config.target_pairs]


def prompts_of(task: RewardTask) -> npt.NDArray[np.int64]:
    """Return a number for the prompt of each pair, [P]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt_key(pair.prompt), len(numbers)) for pair in task.pairs])
