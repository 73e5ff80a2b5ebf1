"""A trained set of heads as adaptation and serving see it: features in, what every member says out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from steelyard.adapt.base import Floats, Task
from steelyard.data.tokenizer import Text
from steelyard.errors import ConfigError


class HeadSet(Protocol):
    """Trained heads with their backbone.

    Attributes:
        head_id: "sha256:..." of everything that decides what the members say; profiles refuse another one.
        task: what the members were trained for.
        num_members: H.
        num_features: D.
    """

    @property
    def head_id(self) -> str:
        """Identity of the members."""
        ...

    @property
    def task(self) -> Task:
        """What they were trained for."""
        ...

    @property
    def num_members(self) -> int:
        """H."""
        ...

    @property
    def num_features(self) -> int:
        """D."""
        ...

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Floats:
        """Return the backbone's features [N, D] of completions of prompts.

        Raises:
            ConfigError: the backbone does not read texts.
        """
        ...

    def members(self, features: Floats) -> Floats:
        """Return what every member says of features [N, D]: [N, H, C], standardised.

        For linear members without a bias this also maps differences of features to margins; use `margins` for pairs.
        """
        ...

    def linear(self) -> tuple[Floats, Floats] | None:
        """Return (weight [H, C, D], bias [H, C]) where members are linear in the features, else None."""
        ...


def margins(heads: HeadSet, first: Floats, second: Floats) -> Floats:
    """Return members' margins [N, H, C] of pairs, from the features [N, D] of both sides."""
    return heads.members(first) - heads.members(second)


@dataclass(frozen=True)
class LinearHeads:
    """Linear members over features that someone else computes; a `HeadSet` without a backbone.

    Attributes:
        weight: [H, C, D], standardised.
        bias: [H, C].
        task: what the members are for.
    """

    weight: Floats
    bias: Floats
    task: Task = "preference"

    @property
    def head_id(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256(repr((self.weight.shape, self.task)).encode())
        for array in (self.weight, self.bias):
            digest.update(np.ascontiguousarray(array, np.float64).tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def num_members(self) -> int:
        """H."""
        return len(self.weight)

    @property
    def num_features(self) -> int:
        """D."""
        return int(self.weight.shape[2])

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Floats:
        """Refuse: there is no backbone."""
        raise ConfigError("these heads have no backbone that reads texts; give features")

    def members(self, features: Floats) -> Floats:
        """Return [N, H, C]."""
        outputs: Floats = np.einsum("nd,hcd->nhc", features, self.weight) + self.bias
        return outputs

    def linear(self) -> tuple[Floats, Floats] | None:
        """Return (weight, bias)."""
        return self.weight, self.bias
