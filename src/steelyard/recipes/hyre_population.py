"""Users of the HyRe studies: who trains the heads, who chooses settings, who is unseen, and with which pairs.

A user is a `Taste`: judged items as features. Per split users are shuffled into training, validation and target users.
Adaptation pairs of a user come from one half of its items and test pairs from the other (`Taste.halves`).

Shapes: T users, R draws of adaptation pairs, N adaptation pairs of a draw, P test pairs, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console

from steelyard.config import Config, require_positive, require_range
from steelyard.data.feature_cache import cached_features
from steelyard.data.generated_tastes import TastesConfig, generate_tastes
from steelyard.data.pair_tasks import Floats, Ints, Taste, read_personas
from steelyard.errors import ConfigError, DataError
from steelyard.nets.encoder import EncoderConfig, load_encoder
from steelyard.nets.lm import cache_folder
from steelyard.rng import numpy_generator
from steelyard.train.progress import ProgressLine


@dataclass(frozen=True)
class Population(Config):
    """Where the users come from, and how they are split."""

    source: Literal["generated", "personas"] = "generated"
    """Generated users, or the personas of `data`."""
    data: str | None = None
    """Folder that holds persona_statements, or a clone of anthropics/evals; needed for personas."""
    tastes: TastesConfig = field(default_factory=TastesConfig)
    """Of generated users; every split has others."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Frozen encoder of the personas' statements."""
    splits: int = 5
    """How often users are split anew."""
    train: int = 50
    """Users whose pairs train the heads."""
    validation: int = 10
    """Users on whom all settings are chosen."""
    targets: int = 30
    """Unseen users."""
    train_pairs: int = 150
    """Pairs of each training user."""
    test_pairs: int = 150
    """Test pairs of each validation and target user."""
    shots: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    """n: labelled pairs to adapt to; each n takes the first of the largest one's."""
    draws: int = 6
    """Draws of the adaptation pairs of a user."""

    def __post_init__(self) -> None:
        """Check ranges and order."""
        require_positive(self, "splits", "train", "validation", "targets", "train_pairs", "test_pairs", "draws")
        require_range(self, 2, math.inf, "train", "validation", "targets")
        if not self.shots or list(self.shots) != sorted(set(self.shots)) or self.shots[0] < 1:
            raise ConfigError(f"shots must be increasing numbers from 1, found {self.shots}")

    @property
    def users(self) -> int:
        """Users of a split."""
        return self.train + self.validation + self.targets


@dataclass(frozen=True)
class Users:
    """Users with the pairs they adapt to and are tested on. A label is 1 where the first of a pair is preferred.

    Attributes:
        names: of the T users.
        first: float32 [T, R, N, D], and `second`: adaptation pairs.
        labels: [T, R, N], 0 or 1.
        test_first: float32 [T, P, D], and `test_second`: test pairs.
        test_labels: [T, P].
    """

    names: tuple[str, ...]
    first: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]
    labels: Floats
    test_first: npt.NDArray[np.float32]
    test_second: npt.NDArray[np.float32]
    test_labels: Floats

    def both_signs(self) -> Users:
        """Return every user and its opposite, who would answer everything the other way."""
        both = {
            name: np.concatenate([getattr(self, name)] * 2) for name in ("first", "second", "test_first", "test_second")
        }
        names = (*self.names, *(f"not {name}" for name in self.names))
        labels, test_labels = (np.concatenate([part, 1 - part]) for part in (self.labels, self.test_labels))
        return Users(names, labels=labels, test_labels=test_labels, **both)


@dataclass(frozen=True)
class Split:
    """One split of the users.

    Attributes:
        number: of the split.
        first: float32 [M, D] preferred items of the training pairs, and `second` the others.
        groups: [M], the number of the training user of each pair.
        train_names: of the training users.
        validation: users to choose settings on.
        targets: unseen users.
        mean: [D] of the training users' items; subtracted from all features here.
        scale: root of the mean variance of a feature among them; all features here are divided by it.
    """

    number: int
    first: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]
    groups: Ints
    train_names: tuple[str, ...]
    validation: Users
    targets: Users
    mean: Floats
    scale: float

    def with_conflict(self, share: float) -> Split:
        """Return it with a random share of the training users of the opposite taste."""
        users = len(self.train_names)
        generator = numpy_generator(self.number, "hyre/conflict")
        flipped = generator.permutation(users)[: round(share * users)]
        swap = np.isin(self.groups, flipped)[:, None]
        first, second = np.where(swap, self.second, self.first), np.where(swap, self.first, self.second)
        names = tuple(f"not {name}" if user in flipped else name for user, name in enumerate(self.train_names))
        return Split(
            self.number, first, second, self.groups, names, self.validation, self.targets, self.mean, self.scale
        )


def load_users(config: Population, console: Console, split: int = 0) -> list[Taste]:
    """Return all users of a split; personas are the same for every split, and encoded once.

    Raises:
        ConfigError: personas without a folder.
        DataError: too few of them.
    """
    if config.source == "generated":
        return generate_tastes(config.tastes, split)
    if config.data is None:
        raise ConfigError(
            "personas need --data DIR: a folder that holds persona_statements/statements.jsonl.gz, or a clone of "
            "https://github.com/anthropics/evals"
        )
    personas = read_personas(config.data)
    encoder = load_encoder(config.encoder)
    folder = cache_folder() / "features"
    tastes = []
    with ProgressLine("statements encoded", sum(len(persona.texts) for persona in personas)) as line:
        for persona in personas:
            features = cached_features(folder, encoder.key, [("", text) for text in persona.texts], encoder.encode)
            tastes.append(Taste(persona.name, features, persona.liked))
            line.advance_to(sum(len(taste.liked) for taste in tastes), persona.name)
    return tastes


def make_split(tastes: list[Taste], config: Population, number: int) -> Split:
    """Return one split; a function of the users, the config and the number only.

    Raises:
        DataError: there are fewer users than the split needs.
    """
    if len(tastes) < config.users:
        raise DataError(f"a split needs {config.users} users (train + validation + targets), found {len(tastes)}")
    order = numpy_generator(number, "hyre/users").permutation(len(tastes))[: config.users]
    chosen = [tastes[user] for user in order]
    training = chosen[: config.train]
    everything = np.concatenate([taste.features for taste in training]).astype(np.float64)
    mean, scale = everything.mean(0), float(np.sqrt(everything.var(0).mean())) or 1.0
    first, second, groups = [], [], []
    for user, taste in enumerate(training):
        generator = numpy_generator(number, "hyre/train pairs", user)
        pairs = taste.pairs(np.arange(len(taste.liked)), config.train_pairs, generator)
        features = _scaled(taste.features, mean, scale)
        first.append(features[pairs[:, 0]])
        second.append(features[pairs[:, 1]])
        groups.append(np.full(len(pairs), user))
    ends = config.train + config.validation
    return Split(
        number,
        np.concatenate(first),
        np.concatenate(second),
        np.concatenate(groups),
        tuple(taste.name for taste in training),
        _users(chosen[config.train : ends], config, number, "validation", mean, scale),
        _users(chosen[ends:], config, number, "targets", mean, scale),
        mean,
        scale,
    )


def _users(tastes: list[Taste], config: Population, number: int, part: str, mean: Floats, scale: float) -> Users:
    most = config.shots[-1]
    adapting, testing = [], []
    for user, taste in enumerate(tastes):
        generator = numpy_generator(number, f"hyre/{part}", user)
        ours, theirs = taste.halves(generator)
        features = _scaled(taste.features, mean, scale)
        draws = np.stack([taste.pairs(ours, most, generator) for _ in range(config.draws)])  # [R, N, 2]
        adapting.append(_oriented(features, draws, generator))
        testing.append(_oriented(features, taste.pairs(theirs, config.test_pairs, generator), generator))
    first, second, labels = (np.stack(part) for part in zip(*adapting, strict=True))
    test_first, test_second, test_labels = (np.stack(part) for part in zip(*testing, strict=True))
    names = tuple(taste.name for taste in tastes)
    return Users(names, first, second, labels, test_first, test_second, test_labels)


def _oriented(
    features: npt.NDArray[np.float32], pairs: Ints, generator: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Floats]:
    """Return both sides and labels of pairs [..., 2] (liked, disliked) in random order: always 1 would be a hint."""
    labels = generator.integers(2, size=pairs.shape[:-1])
    liked, disliked = features[pairs[..., 0]], features[pairs[..., 1]]
    keep = labels[..., None] == 1
    return np.where(keep, liked, disliked), np.where(keep, disliked, liked), labels.astype(np.float64)


def _scaled(features: npt.NDArray[np.float32], mean: Floats, scale: float) -> npt.NDArray[np.float32]:
    return ((features - mean) / scale).astype(np.float32)
