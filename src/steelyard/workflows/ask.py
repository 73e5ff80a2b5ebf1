"""Asking one person which of two completions is better: the pool of questions, what to ask next, and the ranking.

Shapes: Q questions, H members, D features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steelyard.adapt.artefact import LoadedHeads
from steelyard.adapt.backbones import name_of, reads_text
from steelyard.adapt.base import Floats, Method
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile, seen_hash
from steelyard.adapt.query import How, Pool, acquire, next_query
from steelyard.adapt.reweight import HyRe, HyRePosterior
from steelyard.data.preferences import read_text_data
from steelyard.data.tokenizer import Text
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator
from steelyard.workflows.adapt import method_of, pair_key

MAX_QUESTIONS = 5000
"""Pairs of completions that are considered; of more, a random share."""
AHEAD = 5
"""Questions whose answers together are weighed for the display."""


@dataclass(frozen=True)
class Candidates:
    """Completions of prompts, to rank or to ask about.

    Attributes:
        source: the file.
        prompts: each once.
        completions: of every prompt, each once.
        features: [completions, D] of every prompt.
    """

    source: str
    prompts: tuple[Text, ...]
    completions: tuple[tuple[Text, ...], ...]
    features: tuple[Floats, ...]


def read_candidates(path: str | Path, heads: LoadedHeads) -> Candidates:
    """Read prompts with completions, one or several a row; rows of the same prompt are put together.

    Raises:
        DataError: rows without completions, or none.
        ConfigError: the heads are not for preferences, or do not read texts.
    """
    if heads.task != "preference" or not reads_text(heads.artefact.backbone):
        raise ConfigError(
            f"{path}: completions can be ranked by heads for preferences that read texts; these are for a {heads.task} "
            f"and stand on {name_of(heads.artefact.backbone)}"
        )
    data = read_text_data(path)
    found: dict[str, tuple[Text, dict[str, Text]]] = {}
    for row in data.rows:
        if not row.completions:
            raise DataError(f"{path}: {row.where}: expected completions of the prompt, found none")
        _, own = found.setdefault(json.dumps(row.prompt), (row.prompt, {}))
        for completion in row.completions:
            own.setdefault(json.dumps(completion), completion)
    prompts = tuple(prompt for prompt, _ in found.values())
    completions = tuple(tuple(own.values()) for _, own in found.values())
    flat = [(prompt, one) for prompt, own in zip(prompts, completions, strict=True) for one in own]
    features = heads.features([prompt for prompt, _ in flat], [one for _, one in flat])
    ends = np.cumsum([len(own) for own in completions])[:-1]
    return Candidates(str(path), prompts, completions, tuple(np.split(features, ends)))


@dataclass(frozen=True)
class Question:
    """Which is better, the first or the second?

    Attributes:
        row: in the pool.
        prompt: number of the prompt.
        first, second: numbers of its completions; which comes first does not depend on the file's order.
        key: names the comparison.
    """

    row: int
    prompt: int
    first: int
    second: int
    key: str


@dataclass(frozen=True)
class Information:
    """What is left to learn, in bits.

    Attributes:
        following: expected from the next answer; at most 1.
        together: expected from the `questions` best next answers together.
        questions: how many those are.
        unknown: entropy of the members' weights: no answers can tell more.
    """

    following: float
    together: float
    questions: int
    unknown: float


@dataclass(frozen=True)
class Place:
    """A completion in a ranking; positions count from 1."""

    completion: int
    before: int
    now: int
    score: float
    score_before: float


class Session:
    """One person's session: asks, counts answers, takes them back, ranks.

    Args:
        heads: the head set.
        people: adapts and scores.
        profile: what is known already; comparisons that it has counted are not asked.
        candidates: to ask about.
        how: criterion of what to ask.
        seed: of ties, and of the questions considered where there are too many pairs.

    Attributes:
        profile: what is known now.
        notes: what was left out, a sentence each.
    """

    def __init__(
        self, heads: LoadedHeads, people: Personalizer, profile: Profile, candidates: Candidates, how: How, seed: int
    ) -> None:
        self.people, self.profile, self.candidates, self.how, self.seed = people, profile, candidates, how, seed
        # methods that are no distribution over members ask as HyRe with the heads' own settings would
        asking: Method = method_of(heads, replace(heads.settings, method="hyre"))
        assert isinstance(asking, HyRe)
        self._asking = asking
        self.questions, self.notes = _questions(candidates, seed)
        features = candidates.features
        first = np.stack([features[one.prompt][one.first] for one in self.questions])
        second = np.stack([features[one.prompt][one.second] for one in self.questions])
        self._pool = Pool(people.support(first, second, np.ones(len(first))).members, "preference")
        self._asked = np.array([seen_hash(one.key) in profile.seen for one in self.questions])
        self._history: list[tuple[Profile, Question]] = []

    @property
    def answers(self) -> int:
        """Answers given in this session and not taken back."""
        return len(self._history)

    @property
    def open(self) -> int:
        """Questions that can still be asked."""
        return int((~self._asked).sum())

    def weights(self) -> Floats:
        """Return the members' weights [H] that questions are chosen by."""
        posterior = self.people.posterior(self.profile)
        if isinstance(posterior, HyRePosterior):
            return posterior.weights()
        begun, support = self._asking.begin(self.profile.members), getattr(posterior, "support", None)
        return (begun if support is None else begun.update(support)).weights()

    def next(self) -> Question | None:
        """Return what to ask now; None when every pair has been asked. Asking again without an answer is the same."""
        if not self.open:
            return None
        generator = numpy_generator(self.seed, "adapt/ask", int(self._asked.sum()))
        row = next_query(self._pool, self.weights(), self._asked, self.how, "preference", generator)
        return self.questions[row]

    def answer(self, question: Question, label: float) -> None:
        """Count an answer: 1 the first is better, 0 the second, 0.5 neither."""
        features = self.candidates.features[question.prompt]
        before = self.profile
        self.profile = self.people.feedback(
            before, question.key, features[question.first], features[question.second], label
        )
        self._history.append((before, question))
        self._asked[question.row] = True

    def undo(self) -> Question | None:
        """Take the last answer of this session back and return its question; None where there is none."""
        if not self._history:
            return None
        self.profile, question = self._history.pop()
        self._asked[question.row] = False
        return question

    def information(self) -> Information:
        """Return what answers are expected to tell."""
        weights = self.weights()
        positive = weights[weights > 0]
        unknown = -float(positive @ np.log2(positive))
        count = min(AHEAD, self.open)
        if not count:
            return Information(0.0, 0.0, 0, unknown)
        generator = numpy_generator(self.seed, "adapt/ahead")
        rows = acquire(self._pool, weights, count, "joint_bald", "preference", generator, self._asked)
        best = float(self._pool.bald(weights)[~self._asked].max() / np.log(2))
        return Information(best, self._pool.joint_bald(weights, rows) / float(np.log(2)), count, unknown)

    def ranking(self, prompt: int, before: Profile) -> list[Place]:
        """Return the completions of a prompt, best first, with their places under an earlier profile."""
        return rank(self.people, self.candidates, prompt, before, self.profile)


def rank(people: Personalizer, candidates: Candidates, prompt: int, before: Profile, now: Profile) -> list[Place]:
    """Return the completions of a prompt, best first, and where each stood under another profile."""
    features = candidates.features[prompt]
    old, new = people.score(features, before), people.score(features, now)
    place_before = {int(one): place for place, one in enumerate(np.argsort(-old, kind="stable"), 1)}
    return [
        Place(int(one), place_before[int(one)], place, float(new[one]), float(old[one]))
        for place, one in enumerate(np.argsort(-new, kind="stable"), 1)
    ]


def _questions(candidates: Candidates, seed: int) -> tuple[list[Question], tuple[str, ...]]:
    pairs = [
        (number, one, other)
        for number, own in enumerate(candidates.completions)
        for one, other in itertools.combinations(range(len(own)), 2)
    ]
    if not pairs:
        raise DataError(f"{candidates.source}: expected a prompt with at least two different completions, found none")
    notes: tuple[str, ...] = ()
    if len(pairs) > MAX_QUESTIONS:
        notes = (f"{candidates.source}: of {len(pairs)} pairs of completions, {MAX_QUESTIONS} are considered",)
        kept = np.sort(numpy_generator(seed, "adapt/questions").permutation(len(pairs))[:MAX_QUESTIONS])
        pairs = [pairs[row] for row in kept]
    found = []
    for row, (number, one, other) in enumerate(pairs):
        own = candidates.completions[number]
        key = pair_key(candidates.prompts[number], own[one], own[other])
        # people favour what they read first, and files put the better one first: the key decides
        swapped = hashlib.sha256(key.encode()).digest()[0] % 2 == (json.dumps(own[one]) < json.dumps(own[other]))
        found.append(Question(row, number, other if swapped else one, one if swapped else other, key))
    return found, notes
