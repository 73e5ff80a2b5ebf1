r"""Profiles: what a few labels of one person say of the members, as a small file.

A profile holds counts, losses and weights and, for methods that go on from their examples, numbers of the examples;
never a text. There are two forms:

| form | HyRe | other methods |
|---|---|---|
| exact, `to_json()` | the members' summed losses: updates go on as if it had never been written | the adapted function, and the examples as numbers: updates go on |
| short, `to_json(top=m)` | the m largest weights, the rest spread evenly; updates go on from those | the adapted function; cannot be updated |

`hash` is the SHA-256 of the canonical JSON (sorted keys, no blanks, 1.0 written as 1) of all else in the file. It finds
damage and careless edits. It is no secret: whoever changes a profile can compute it anew, and nothing is encrypted.

Shapes: H members, C outputs, D features.
"""  # noqa: E501

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steelyard.adapt.base import TASKS, Combination, Floats, Task
from steelyard.adapt.head_set import HeadSet
from steelyard.adapt.losses import BradleyTerry, CrossEntropy, GaussianNLL, MemberLoss, ZeroOne
from steelyard.adapt.profile_values import content_hash, number, packed, plain, unpacked, words
from steelyard.adapt.reweight import HyRe, HyRePosterior
from steelyard.errors import ConfigError, DataError, SteelyardError

VERSION = 1
MAX_BYTES = 64 * 2**20
"""Longest profile that is read."""
MAX_EVIDENCE = 1e15
"""Largest summed loss that is read: beyond it differences of losses are lost in rounding."""
MAX_SEEN = 1000
"""Comparisons that a profile remembers, so that none counts twice; the oldest are forgotten first."""
SEEN_LENGTH = 8
"""Characters of a short hash (48 bits): another comparison is taken for one of 1,000 once in 10^11."""
LEAST_WEIGHT = 1e-9
"""Of a member in a short profile: from 0 it could never come back."""
_LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in (BradleyTerry, CrossEntropy, GaussianNLL, ZeroOne)}
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
_KEYS = {"v", "head_id", "task", "members", "method", "settings", "eta", "loss", "n", "ess", "seen", "hash"}
_STATES = ("evidence", "w", "function", "examples")


class Identity(NamedTuple):
    """What a profile must agree on with a head set, computed once: a head id may be a hash of all weights."""

    head_id: str
    num_members: int
    task: Task
    num_features: int

    @classmethod
    def of(cls, heads: HeadSet) -> Identity:
        """Return that of a head set."""
        return cls(heads.head_id, heads.num_members, heads.task, heads.num_features)


@dataclass(frozen=True, eq=False)
class Profile:
    """What is known of one person.

    Attributes:
        head_id: of the head set it belongs to.
        task: of that head set.
        members: H.
        settings: of the method, plain values; `name` is what tables call it.
        n: labels counted.
        ess: effective number of members.
        evidence: [H], summed losses (HyRe only).
        function: the adapted function (other methods).
        examples: arrays from which the method goes on (other methods), or None.
        seen: short hashes of the comparisons that were counted.
    """

    head_id: str
    task: Task
    members: int
    settings: Mapping[str, Any]
    n: float = 0.0
    ess: float = 0.0
    evidence: Floats | None = None
    function: Combination | None = None
    examples: Mapping[str, Floats] | None = field(default=None, repr=False)
    seen: tuple[str, ...] = field(default=(), repr=False)

    @property
    def method(self) -> str:
        """What tables call the method."""
        return str(self.settings["name"])

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the exact form, "sha256:...": another one after every update."""
        return content_hash(self._content(None))

    def to_json(self, top: int | None = None) -> str:
        """Return the profile as one line of JSON: exact, or short with the `top` largest weights."""
        if top is not None and top < 1:
            raise ConfigError(f"a short profile keeps at least 1 weight, found {top}")
        content = self._content(top)
        return json.dumps(content | {"hash": content_hash(content)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Read a profile; `where` names it in messages.

        Raises:
            DataError: not a profile, damaged, changed since it was written, or of a later version.
        """
        if len(text) > MAX_BYTES:
            raise DataError(f"{where}: expected a profile of at most {MAX_BYTES} characters, found {len(text)}")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: expected a profile in JSON, found {text[:40]!r}") from None
        if not isinstance(content, dict) or "head_id" not in content or "hash" not in content:
            raise DataError(f"{where}: expected a profile, a JSON object with head_id and hash, found {text[:40]!r}")
        if content.get("v") != VERSION:
            raise DataError(f"{where}: expected a profile of version {VERSION}, found version {content.get('v')!r:.20}")
        said = content.pop("hash")
        try:
            intact = said == content_hash(content)
            profile = _read(content) if intact else None
        except (*_BROKEN, SteelyardError) as error:
            raise DataError(f"{where}: not a profile that this version reads: {words(error)}") from None
        if profile is None:
            raise DataError(f"{where}: its hash does not fit its content: it was damaged or changed by hand")
        return profile

    def require(self, heads: HeadSet | Identity, where: str = "profile") -> None:
        """Raise `DataError` unless the profile belongs to these heads."""
        if self.head_id != heads.head_id:
            raise DataError(
                f"{where}: belongs to another head set ({self.head_id[:23]}...); its weights mean nothing for this one "
                f"({heads.head_id[:23]}...)"
            )
        if self.members != heads.num_members or self.task != heads.task:
            raise DataError(
                f"{where}: is for {self.members} members of a {self.task}, and this head set has {heads.num_members} "
                f"of a {heads.task}"
            )
        vector = None if self.function is None else self.function.vector
        features = None if self.examples is None else self.examples.get("features")
        for found in (vector, features):
            if found is not None and (found.ndim != 2 or found.shape[1] != heads.num_features):
                raise DataError(f"{where}: expected {heads.num_features} features, found the shape {found.shape}")

    def _content(self, top: int | None) -> dict[str, Any]:
        settings = dict(self.settings)
        content: dict[str, Any] = {"v": VERSION, "head_id": self.head_id, "task": self.task, "members": self.members}
        content["method"] = settings.pop("name")
        content |= {name: settings.pop(name) for name in ("eta", "loss") if name in settings}
        content |= {"settings": settings, "n": self.n, "ess": float(f"{self.ess:.6g}")}
        if self.evidence is not None and top is None:
            content["evidence"] = self.evidence.tolist()
        elif self.evidence is not None:
            weights = hyre_posterior(self, hyre_of(self.settings)).weights(mix=0)
            largest = np.argsort(-weights, kind="stable")[:top]
            content["w"] = {str(member): float(f"{weights[member]:.4g}") for member in sorted(largest.tolist())}
        else:
            assert self.function is not None
            content["function"] = {"coefficients": packed(self.function.coefficients)}
            if self.function.vector is not None:
                content["function"]["vector"] = packed(self.function.vector)
            if self.examples is not None and top is None:
                content["examples"] = {name: packed(values) for name, values in self.examples.items()}
        if self.seen:
            content["seen"] = "".join(self.seen)
        found: dict[str, Any] = plain(content)
        return found


# ---------------------------------------------------------------------------------------------------------- files


def read_profile(path: str | Path) -> Profile:
    """Read a profile from a file.

    Raises:
        DataError: no such file, or not a profile.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such profile")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: expected a profile of at most {MAX_BYTES} bytes, found {path.stat().st_size}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a profile in JSON, found a file that is no text") from None
    return Profile.from_json(text, str(path))


def write_profile(path: str | Path, profile: Profile, top: int | None = None) -> None:
    """Write a profile; whoever reads the file meanwhile finds the old one or the new one, whole."""
    path = Path(path)
    text = profile.to_json(top)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def seen_hash(key: str) -> str:
    """Return the short hash that a profile keeps of a comparison's key."""
    if not key:
        raise DataError("a comparison needs a key, so that a repeated click counts once; found an empty one")
    return base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()[:6]).decode()


# ----------------------------------------------------------------------------------------------------------- HyRe


def hyre_of(settings: Mapping[str, Any]) -> HyRe:
    """Return HyRe with the settings of a profile.

    Raises:
        DataError: a loss that profiles do not know, or settings that it does not have.
    """
    name, given = settings.get("loss"), dict(settings)
    if name not in _LOSSES:
        raise DataError(f"loss: expected one of {', '.join(_LOSSES)}, found {name!r:.40}")
    options = {key.removeprefix("loss_"): given.pop(key) for key in settings if key.startswith("loss_")}
    if isinstance(options.get("variance"), list):
        options["variance"] = np.array(options["variance"], np.float64)
    del given["loss"]
    if "prior" in given:
        given["prior"] = np.array(given["prior"], np.float64)
    try:
        loss: MemberLoss = _LOSSES[name](**options)
        return HyRe(loss, **given)
    except TypeError:
        raise DataError(f"settings of {settings['name']!r}: expected those of HyRe, found {sorted(settings)}") from None


def hyre_posterior(profile: Profile, method: HyRe) -> HyRePosterior:
    """Return the posterior of a HyRe profile."""
    assert profile.evidence is not None
    return replace(method.begin(profile.members), evidence=profile.evidence, n=profile.n)


# ------------------------------------------------------------------------------------------------------------ JSON


def _read(content: dict[str, Any]) -> Profile:
    """Return the profile of JSON content; a forged one with a right hash must do no harm either."""
    unknown = sorted(content.keys() - _KEYS - set(_STATES))
    states = [name for name in _STATES if name in content]
    if unknown or states not in (["evidence"], ["w"], ["function"], ["function", "examples"]):
        raise ValueError(f"unexpected {', '.join(unknown or states) or 'emptiness'}")
    members, head_id, seen = content["members"], content["head_id"], content.get("seen", "")
    if not isinstance(members, int) or isinstance(members, bool) or not 1 <= members <= 10**6:
        raise ValueError(f"members is {members!r:.40}")
    if content["task"] not in TASKS or not isinstance(content["method"], str) or not isinstance(head_id, str):
        raise ValueError(f"task {content['task']!r:.40}, method {content['method']!r:.40}")
    if not isinstance(seen, str) or len(seen) % SEEN_LENGTH or len(seen) > MAX_SEEN * SEEN_LENGTH:
        raise ValueError(f"seen must hold at most {MAX_SEEN} short hashes of {SEEN_LENGTH} characters")
    if not isinstance(content["settings"], dict):
        raise ValueError("settings must be an object")
    settings: dict[str, Any] = content["settings"] | {"name": content["method"]}
    settings |= {name: content[name] for name in ("eta", "loss") if name in content}
    profile = Profile(
        head_id, content["task"], members, settings, n=number(content, "n"), ess=number(content, "ess"),
        seen=tuple(seen[start : start + SEEN_LENGTH] for start in range(0, len(seen), SEEN_LENGTH)),
    )  # fmt: skip
    if "function" in content:
        function = {name: unpacked(value, name) for name, value in content["function"].items()}
        if set(function) - {"coefficients", "vector"} or function["coefficients"].shape != (members,):
            raise ValueError("function must hold coefficients of all members")
        examples = content.get("examples")
        kept = None if examples is None else {name: unpacked(value, name) for name, value in examples.items()}
        if kept is not None:
            _check_examples(kept, members)
        return replace(profile, function=Combination(function["coefficients"], function.get("vector")), examples=kept)
    method = hyre_of(profile.settings)
    prior = np.exp(method.begin(members).log_prior)
    if "evidence" in content:
        evidence = np.array([number({"evidence": one}, "evidence", -MAX_EVIDENCE) for one in content["evidence"]])
        if evidence.shape != (members,) or evidence.max() > MAX_EVIDENCE:
            raise ValueError(f"evidence has {len(evidence)} numbers for {members} members, or one that is too large")
        return replace(profile, evidence=evidence)
    return replace(profile, evidence=_evidence(_weights(content["w"], members), prior, method.eta))


def _weights(sparse: Any, members: int) -> Floats:
    """Return weights [H] of {member: weight}; what is missing to 1 is spread evenly over the others."""
    if not isinstance(sparse, dict) or not sparse:
        raise ValueError("w must hold weights by member")
    weights = np.full(members, np.nan)
    for name in sparse:
        if not (name.isascii() and name.isdigit() and int(name) < members):
            raise ValueError(f"w: there is no member {name:.20}")
        weights[int(name)] = number(sparse, name)
    rest, others = 1 - np.nansum(weights), np.isnan(weights)
    if rest < -1e-2:
        raise ValueError(f"w: the weights sum to {1 - rest:g}")
    weights[others] = max(rest, 0.0) / max(int(others.sum()), 1)
    weights = np.maximum(weights, LEAST_WEIGHT)
    return np.asarray(weights / weights.sum())


def _evidence(weights: Floats, prior: Floats, eta: float) -> Floats:
    """Return summed losses [H] that lead to these weights; their sum over members is free, the least is 0."""
    possible = prior > 0
    losses = np.zeros(len(weights))
    if eta > 0:
        losses[possible] = np.log(prior[possible] / weights[possible]) / eta
    return np.asarray(losses - losses[possible].min())


def _check_examples(kept: dict[str, Floats], members: int) -> None:
    n = len(kept["labels"])
    if set(kept) - {"labels", "weights", "features", "members"} or not {"features", "members"} & set(kept):
        raise ValueError(f"examples hold {', '.join(sorted(kept))}")
    if any(len(values) != n for values in kept.values()) or kept["labels"].ndim != 1 or kept["weights"].ndim != 1:
        raise ValueError("examples of different number")
    said = kept.get("members")
    if said is not None and (said.ndim != 3 or said.shape[1] != members):
        raise ValueError("examples of other members")
    if (kept["weights"] < 0).any():
        raise ValueError("examples of weight below 0")
