"""What the service does, without HTTP: score, rank, count feedback, choose questions, export and import profiles.

The rule is HyRe (Lee et al., arXiv 2412.08812; `adapt.reweight`), whatever else a head set's settings name: of all
methods it alone goes on from sums of losses, so that no features of a user's texts need to be kept.

Shapes: N items, H members, C outputs, D features.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steelyard.adapt.base import Floats
from steelyard.adapt.head_set import HeadSet, margins
from steelyard.adapt.losses import default_loss
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile
from steelyard.adapt.profile_values import settings_of
from steelyard.adapt.query import acquire
from steelyard.adapt.reweight import HyRe, HyRePosterior
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator
from steelyard.serve.batching import Batcher
from steelyard.serve.bodies import FeedbackBody, Item, QueryBody
from steelyard.serve.config import RefusedError, ServeConfig
from steelyard.serve.store import Kept, ProfileStore

Texts = Sequence[tuple[str, str]]


class RewardService:
    """Head set, store and backbone thread; every method may be called from many threads at once.

    Args:
        heads: the trained head set.
        config: limits, and where the store is.
        method: settings of HyRe; the task's default loss with eta 1 where None.
        rows: for heads over numbers: how many numbers an item has, and what makes features [N, D] of them. Where None,
            an item's numbers are its features.

    Raises:
        DataError: the store is of another head set or loss, another program's, or damaged.
    """

    def __init__(
        self,
        heads: HeadSet,
        config: ServeConfig,
        method: HyRe | None = None,
        rows: tuple[int, Callable[[Floats], Floats]] | None = None,
    ) -> None:
        self.heads, self.config = heads, config
        self.width = heads.num_features if rows is None else rows[0]
        self._rows = None if rows is None else rows[1]
        self.method = HyRe(default_loss(heads.task)) if method is None else method
        self.head_id, self.members = heads.head_id, heads.num_members
        self.reads_texts = _reads_texts(heads)
        self.prior = self.method.begin(self.members)
        self.personalizer = Personalizer(heads, self.method, config.cached_users)
        losses = {name: value for name, value in settings_of(self.method).items() if name.startswith("loss")}
        self.store = ProfileStore(
            config.store,
            {"head set": self.head_id, "loss": json.dumps(losses, sort_keys=True)},
            self.members,
            config.max_users,
        )
        self._backbone: Batcher[Texts, Floats] = Batcher(
            "backbone", self._read, config.max_batch, config.batch_wait_ms / 1000, retry=True
        )
        self._known: OrderedDict[str, tuple[bytes, Profile]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Finish what was begun and close the store."""
        self._backbone.close()
        self.store.close()

    def score(self, items: Sequence[Item], users: Sequence[str | None]) -> Floats:
        """Return outputs [N, C] of items, each for its user; nobody, and users without labels, get the prior's."""
        self._check_count(items)
        features = self._features(items)
        profiles = {user: None if user is None else self._profile(user) for user in set(users)}
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = self.personalizer.outputs(features, [profiles[user] for user in users])
        _require_finite(outputs)
        return outputs

    def rank(self, items: Sequence[Item], user: str | None) -> tuple[list[int], Floats]:
        """Return the candidates' numbers, best first, and their scores [N]."""
        if self.heads.task == "classification":
            raise RefusedError(422, "a classification has no ranking; ask for scores")
        scores = self.score(items, [user] * len(items))[:, 0]
        return [int(row) for row in np.argsort(-scores, kind="stable")], scores

    def feedback(self, body: FeedbackBody) -> tuple[HyRePosterior, bool]:
        """Count a label once; return what is believed now, on the disk, and whether it had been counted before."""
        if (body.item is None) != (self.heads.task == "preference"):
            expected = "chosen and rejected" if self.heads.task == "preference" else "item and label"
            raise RefusedError(422, f"these heads were trained for {self.heads.task}: expected {expected}")
        if body.chosen is not None and body.rejected is not None:
            features = self._features([body.chosen, body.rejected])
            seen = margins(self.heads, features[:1], features[1:])
        elif body.item is not None:
            seen = self.heads.members(self._features([body.item]))
        label = 1.0 if body.label is None else body.label
        losses = self.method.loss(seen, np.array([label]))[0]
        _require_finite(losses)
        content = body.model_dump_json(exclude={"user", "key"})
        kept, repeated = self.store.add(body.user, body.key, content, losses)
        return self._posterior(kept), repeated

    def query(self, body: QueryBody) -> list[int]:
        """Return numbers of the offered pairs or items, those first whose answers say most about the members."""
        if (body.pairs is None) == (self.heads.task == "preference"):
            expected = "pairs" if self.heads.task == "preference" else "items"
            raise RefusedError(422, f"these heads were trained for {self.heads.task}: expected {expected}")
        if body.pairs is not None:
            self._check_count(body.pairs)
            features = self._features([item for pair in body.pairs for item in (pair.first, pair.second)])
            seen = margins(self.heads, features[::2], features[1::2])
        else:
            self._check_count(body.items or [])
            seen = self.heads.members(self._features(body.items or []))
        posterior = self._posterior(None if body.user is None else self.store.read(body.user))
        generator = numpy_generator(0, "query", int(posterior.n))
        chosen = acquire(seen, posterior.weights(), body.count, body.how, self.heads.task, generator)
        return [int(row) for row in chosen]

    def export(self, user: str, top: int | None = None) -> str:
        """Return a user's profile as JSON: exact, or short with the `top` largest weights."""
        kept = self.store.read(user)
        if kept is None:
            raise RefusedError(404, f"there is no profile of user {user!r}")
        return self.personalizer.profile(self._posterior(kept)).to_json(top)

    def restore(self, user: str, text: str) -> HyRePosterior:
        """Replace a user's profile by one in JSON."""
        profile = Profile.from_json(text)
        try:
            profile.require(self.heads)
        except DataError as error:
            raise RefusedError(409, str(error)) from None
        posterior = self.personalizer.posterior(profile)
        if not isinstance(posterior, HyRePosterior) or posterior.method is not self.method:
            raise RefusedError(409, f"profile: made with {dict(profile.settings)}, expected {settings_of(self.method)}")
        self.store.put(user, Kept(posterior.n, posterior.evidence))
        return posterior

    def delete(self, user: str) -> bool:
        """Delete all there is of a user, on disk and in memory; say if there was any."""
        deleted = self.store.delete(user)
        self._forget(user)
        return deleted

    def _forget(self, user: str) -> None:
        with self._lock:
            known = self._known.pop(user, None)
        if known is not None:
            self.personalizer.drop(known[1])

    def _posterior(self, kept: Kept | None) -> HyRePosterior:
        return self.prior if kept is None else dataclasses.replace(self.prior, evidence=kept.evidence, n=kept.n)

    def _profile(self, user: str) -> Profile | None:
        """Return a user's profile as it is in the store now; made anew only where that has changed."""
        kept = self.store.read(user)
        if kept is None:
            self._forget(user)
            return None
        state = kept.evidence.tobytes()
        with self._lock:
            known = self._known.get(user)
            if known is not None and known[0] == state:
                self._known.move_to_end(user)
                return known[1]
        profile = self.personalizer.profile(self._posterior(kept))
        with self._lock:
            self._known[user] = (state, profile)
            self._known.move_to_end(user)
            oldest = self._known.popitem(last=False)[1] if len(self._known) > self.config.cached_users else None
        for gone in (known, oldest):
            if gone is not None:
                self.personalizer.drop(gone[1])
        return profile

    def _check_count(self, items: Sequence[Any]) -> None:
        if len(items) > self.config.max_items:
            raise RefusedError(413, f"expected at most {self.config.max_items} items in a request, found {len(items)}")

    def _features(self, items: Sequence[Item]) -> Floats:
        """Return features [N, D] of items: those that were sent, and the backbone's of texts."""
        features = np.zeros((len(items), self.heads.num_features))
        texts = {row: self._text(row, item) for row, item in enumerate(items) if item.completion is not None}
        numbers = {
            row: self._numbers(row, item.features) for row, item in enumerate(items) if item.features is not None
        }
        if numbers:
            given = np.array(list(numbers.values()), np.float64)
            features[list(numbers)] = given if self._rows is None else self._rows(given)
        if texts:
            features[list(texts)] = self._backbone(list(texts.values()), len(texts))
        return features

    def _text(self, row: int, item: Item) -> tuple[str, str]:
        if not self.reads_texts:
            raise RefusedError(422, f"item {row}: these heads read no texts; send features")
        text = item.prompt, item.completion or ""
        longest = max(map(len, text))
        if longest > self.config.max_text:
            raise RefusedError(413, f"item {row}: expected at most {self.config.max_text} characters, found {longest}")
        return text

    def _numbers(self, row: int, numbers: list[float]) -> list[float]:
        if len(numbers) != self.width:
            raise RefusedError(422, f"item {row}: expected {self.width} features, found {len(numbers)}")
        return numbers

    def _read(self, jobs: Sequence[Texts]) -> list[Floats | Exception]:
        """Return the backbone's features of several requests' texts."""
        texts = [text for job in jobs for text in job]
        features = self.heads.features([prompt for prompt, _ in texts], [completion for _, completion in texts])
        ends = np.cumsum([len(job) for job in jobs])[:-1]
        return list(np.split(np.asarray(features, np.float64), ends))


def _reads_texts(heads: HeadSet) -> bool:
    """Return whether heads read texts; this also warms the backbone up."""
    try:
        heads.features([""], ["warm-up"])
    except ConfigError:
        return False
    return True


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise RefusedError(422, "with these numbers the heads' outputs are not finite")
