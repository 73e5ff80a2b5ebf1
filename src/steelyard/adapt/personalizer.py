"""Serving one head set to many people, each with a profile.

Linear members collapse (Lee et al., arXiv 2412.08812): the adapted function of a person is one vector, and scoring for
that person costs what one head costs. `Personalizer` keeps the vectors in use, and scores rows of different people in
one product.

Shapes: N examples, H members, C outputs, D features.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.adapt.base import Floats, Method, Posterior, Support
from steelyard.adapt.head_set import HeadSet
from steelyard.adapt.losses import default_loss
from steelyard.adapt.profile import MAX_SEEN, Identity, Profile, hyre_of, hyre_posterior, seen_hash
from steelyard.adapt.profile_values import settings_of
from steelyard.adapt.reweight import HyRe, HyRePosterior
from steelyard.errors import ConfigError, DataError

_Function = tuple[Floats, Floats | None]
"""(vector [C, D], bias [C]) where members are linear, else (coefficients [H], vector [C, D] or None)."""


class Personalizer:
    """Serves one head set to many people. Threads may share one.

    Args:
        heads: the head set.
        method: for new profiles; HyRe with the task's likelihood by default. A HyRe profile goes on with its own
            settings; one of another method needs that very method here.
        max_users: adapted functions kept; the one not used for longest is dropped, and made again when needed.
    """

    def __init__(self, heads: HeadSet, method: Method | None = None, max_users: int = 10_000) -> None:
        if max_users < 1:
            raise ConfigError(f"max_users must be at least 1, found {max_users}")
        self.heads, self.max_users = heads, max_users
        self.method = HyRe(default_loss(heads.task)) if method is None else method
        self._identity, self._linear, self._settings = Identity.of(heads), heads.linear(), settings_of(self.method)
        self._functions: OrderedDict[str, _Function] = OrderedDict()
        self._lock = threading.Lock()
        self._nothing = self.new()

    def new(self) -> Profile:
        """Return the profile of a person of whom nothing is known."""
        return self.profile(self.method.begin(self.heads.num_members))

    def score(self, features: Floats, profiles: Sequence[Profile | None] | Profile | None) -> Floats:
        """Return scores [N] of features [N, D], each row for its own person.

        Args:
            features: of what is scored.
            profiles: one for each row, or one for all; None: nothing is known.

        Raises:
            DataError: a profile of another head set, or shapes that do not fit.
        """
        outputs = self.outputs(features, profiles)
        if outputs.shape[1] != 1:
            raise DataError(f"a score is one number, and these heads have {outputs.shape[1]} outputs: use `outputs`")
        return outputs[:, 0]

    def outputs(self, features: Floats, profiles: Sequence[Profile | None] | Profile | None) -> Floats:
        """Return outputs [N, C] of features [N, D], each row for its own person; as `score`."""
        features = self._checked(features, 2)
        single = profiles is None or isinstance(profiles, Profile)
        people: Sequence[Profile | None] = [profiles] if single else profiles  # type: ignore[assignment,list-item]
        if not single and len(people) != len(features):
            raise DataError(f"expected a profile for each of {len(features)} rows, found {len(people)}")
        position: dict[str, int] = {}
        functions: list[_Function] = []
        rows = np.zeros(len(people), np.int64)
        for row, profile in enumerate(people):
            one = self._nothing if profile is None else profile
            if one.hash not in position:
                position[one.hash] = len(functions)
                functions.append(self._function(one))
            rows[row] = position[one.hash]
        if single:
            rows = np.zeros(len(features), np.int64)
        if not functions:
            functions = [self._function(self._nothing)]
        if self._linear is not None:
            biases = np.stack([np.asarray(bias) for _, bias in functions])
            outputs: Floats = _products(features, [vector for vector, _ in functions], rows) + biases[rows]
            return _finite(outputs)
        members = self.heads.members(features)
        outputs = np.einsum("nhc,nh->nc", members, np.stack([coefficients for coefficients, _ in functions])[rows])
        if any(vector is not None for _, vector in functions):
            none = np.zeros((members.shape[2], features.shape[1]))
            vectors = [none if vector is None else _of_shape(vector, none.shape) for _, vector in functions]
            outputs += _products(features, vectors, rows)
        return _finite(outputs)

    def feedback(
        self, profile: Profile, key: str, first: npt.ArrayLike, second: npt.ArrayLike | None, label: float
    ) -> Profile:
        """Return the profile after one more label; the same profile where the comparison was counted before.

        Args:
            profile: so far.
            key: names the comparison, so that a repeated click counts once; a short hash of it is kept.
            first: features [D].
            second: features [D] of the other side of a pair; None for regression and classification.
            label: P(first is preferred), a target, or the number of a class.

        Raises:
            DataError: a profile of another head set, a label or features that do not fit the task, or a profile that
                holds only the adapted function.
        """
        profile.require(self._identity)
        short = seen_hash(key)
        if short in profile.seen:
            return profile
        one = self._checked(first, 1)[None]
        other = None if second is None else self._checked(second, 1)[None]
        posterior = self.posterior(profile).update(self.support(one, other, [label]))
        return self.profile(posterior, (*profile.seen, short)[-MAX_SEEN:])

    def support(self, first: Floats, second: Floats | None, labels: npt.ArrayLike) -> Support:
        """Return labelled examples from features [N, D] (of both sides, for preferences) and labels [N].

        Raises:
            DataError: labels, or sides, that the task does not have.
        """
        values, task = np.asarray(labels, np.float64), self.heads.task
        if (second is None) == (task == "preference"):
            raise DataError(f"a label of a {task} is about {'two things' if second is None else 'one thing'}")
        if not np.isfinite(values).all() or (task == "preference" and ((values < 0) | (values > 1)).any()):
            kind = "between 0 and 1" if task == "preference" else "finite"
            raise DataError(f"labels of a {task} must be {kind}, found {values.tolist()[:5]}")
        features = first if second is None else first - second
        members = self._linear_members(features)
        if members is None:
            members = self.heads.members(first)
            if second is not None:
                members = members - self.heads.members(second)
        classes = members.shape[2]
        if not np.isfinite(members).all():
            raise DataError("features hold a number that is not finite")
        if task == "classification" and not np.isin(values, np.arange(classes)).all():
            raise DataError(f"labels must be class numbers from 0 to {classes - 1}, found {values.tolist()[:5]}")
        return Support(members, values, features)

    def posterior(self, profile: Profile) -> Posterior:
        """Return what the profile believes, to go on from.

        Raises:
            DataError: another head set, another method, or a short profile of a method that needs its examples.
        """
        profile.require(self._identity)
        own = profile.settings == self._settings
        if profile.evidence is not None:
            method = self.method if own and isinstance(self.method, HyRe) else hyre_of(profile.settings)
            return hyre_posterior(profile, method)
        if not own:
            raise DataError(
                f"the profile was made with {_listed(profile.settings)} and cannot go on with {_listed(self._settings)}"
            )
        begun = self.method.begin(self.heads.num_members)
        if profile.examples is None:
            if profile.n:
                raise DataError(
                    f"a short profile of {profile.method!r} holds the adapted function only and takes no more labels; "
                    "use the exact form"
                )
            return begun
        found = dict(profile.examples)
        members = found["members"] if "members" in found else self._linear_members(found["features"])
        if members is None:
            raise DataError("the profile lacks what the members said of its examples")
        return begun.update(Support(members, found["labels"], found.get("features"), found["weights"]))

    def profile(self, posterior: Posterior, seen: Sequence[str] = ()) -> Profile:
        """Return what is believed as a profile.

        Args:
            posterior: over this head set's members.
            seen: short hashes of the comparisons counted so far (`seen_hash`).
        """
        about: dict[str, Any] = {"n": float(posterior.n), "ess": posterior.diagnostics()["ess"], "seen": tuple(seen)}
        about |= {"head_id": self._identity.head_id, "task": self.heads.task, "members": self._identity.num_members}
        if isinstance(posterior, HyRePosterior):
            own = posterior.method is self.method
            settings = self._settings if own else settings_of(posterior.method)
            return Profile(settings=settings, evidence=posterior.evidence, **about)
        support: Support | None = getattr(posterior, "support", None)
        examples = None if support is None or not len(support) else self._examples(support)
        return Profile(settings=self._settings, function=posterior.combination(), examples=examples, **about)

    def _examples(self, support: Support) -> dict[str, Floats]:
        """Return what to keep of examples; what linear members say is left out, as the features tell it again."""
        found = {"labels": support.labels, "weights": support.counts}
        again = None
        if support.features is not None:
            found["features"] = support.features
            again = self._linear_members(support.features)
        if again is None or not np.allclose(again, support.members, rtol=1e-6, atol=1e-9):
            found["members"] = support.members
        return found

    def _linear_members(self, features: Floats) -> Floats | None:
        """Return what linear members say [N, H, C] of features (of differences, for preferences), else None."""
        if self._linear is None:
            return None
        weight, bias = self._linear
        outputs: Floats = (features @ weight.reshape(-1, weight.shape[2]).T).reshape(-1, *bias.shape)
        return outputs if self.heads.task == "preference" else outputs + bias

    def drop(self, profile: Profile) -> None:
        """Forget the adapted function of a profile that is deleted or replaced."""
        with self._lock:
            self._functions.pop(profile.hash, None)

    def _function(self, profile: Profile) -> _Function:
        with self._lock:
            found = self._functions.get(profile.hash)
            if found is not None:
                self._functions.move_to_end(profile.hash)
                return found
        profile.require(self._identity)
        function = self.posterior(profile).combination() if profile.function is None else profile.function
        if self._linear is not None:
            if function.vector is not None:
                _of_shape(function.vector, self._linear[0].shape[1:])
            found = function.collapse(*self._linear)
        else:
            found = function.coefficients, function.vector
        with self._lock:
            self._functions[profile.hash] = found
            while len(self._functions) > self.max_users:
                self._functions.popitem(last=False)
        return found

    def _checked(self, features: npt.ArrayLike, dimensions: int) -> Floats:
        values = np.asarray(features, np.float64)
        if values.ndim != dimensions or values.shape[-1] != self.heads.num_features:
            rows = "N, " if dimensions == 2 else ""
            raise DataError(f"expected features [{rows}{self.heads.num_features}], found the shape {values.shape}")
        return values


def _products(features: Floats, vectors: Sequence[Floats], rows: npt.NDArray[np.int64]) -> Floats:
    """Return products [N, C] of features [N, D] with vectors [C, D], of which row i takes number rows[i]."""
    if len(vectors) == 1:
        return np.asarray(features @ vectors[0].T)
    return np.asarray(np.einsum("nd,ncd->nc", features, np.stack(vectors)[rows]))


def _finite(outputs: Floats) -> Floats:
    """Return outputs, which a feature that is not finite has made not finite either."""
    if not np.isfinite(outputs).all():
        raise DataError("features hold a number that is not finite")
    return outputs


def _of_shape(vector: Floats, shape: tuple[int, ...]) -> Floats:
    """Return the vector of a profile, which anyone may have written, if it has the shape [C, D] of these heads."""
    if vector.shape != shape:
        raise DataError(f"a profile's function has the shape {vector.shape}, expected {shape}")
    return vector


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())[:120]
