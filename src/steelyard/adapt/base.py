"""What all ways of adapting an ensemble share: a few labelled examples in, one combination of its members out.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812). Every method here, the paper's and its rivals, ends in the same place: a weighted sum of the
members' outputs plus, where the features are known, a linear function of them,

    f(x) = sum_k c_k f_k(x) + v . phi(x).

So one function predicts for all of them, and with linear members one vector is left to serve.

Numpy in, numpy out, float64. Shapes: N examples, H members (heads), C outputs (1 for rewards and regression, the number
of classes for classification), D features, U users.

For preferences an example is a pair: its members are margins (first minus second), its features differences, and its
label is 1 where the first is preferred (a number between 0 and 1 says how sure that is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from steelyard.errors import ConfigError, DataError

Floats = npt.NDArray[np.float64]
Task = Literal["preference", "regression", "classification"]
TASKS: tuple[Task, ...] = ("preference", "regression", "classification")


@dataclass(frozen=True)
class Support:
    """A few labelled examples as the ensemble sees them.

    Attributes:
        members: [N, H, C], what every member says, standardised (`nets.ensemble.EnsembleHead.standardise`).
        labels: [N]: P(first is preferred), a target, or the number of a class.
        features: [N, D], for methods that need them; differences for pairs.
        weights: [N], how much each example counts; all 1 where None. Forgetting lowers them.

    Raises:
        DataError: shapes that do not fit, or a number that is not finite.
    """

    members: Floats
    labels: Floats
    features: Floats | None = None
    weights: Floats | None = None

    def __post_init__(self) -> None:
        for name in ("members", "labels", "features", "weights"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, np.float64))
        n = len(self.labels)
        if self.members.ndim != 3 or len(self.members) != n or self.labels.ndim != 1:
            raise DataError(
                f"labelled examples: expected members [N, H, C] and labels [N], found {self.members.shape} and "
                f"{self.labels.shape}"
            )
        for name in ("features", "weights"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise DataError(f"labelled examples: {name} has {len(value)} rows, expected {n}")
        for name in ("members", "labels", "features", "weights"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise DataError(f"labelled examples: {name} holds a number that is not finite")
        if self.weights is not None and (self.weights < 0).any():
            raise DataError("labelled examples: weights holds a number below 0")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> Floats:
        """How much each example counts, [N]."""
        return np.ones(len(self)) if self.weights is None else self.weights

    def take(self, rows: npt.ArrayLike) -> Support:
        """Return the given examples, in that order."""
        chosen = np.asarray(rows)
        parts = {
            name: None if (value := getattr(self, name)) is None else value[chosen] for name in ("features", "weights")
        }
        return Support(self.members[chosen], self.labels[chosen], **parts)

    def scaled(self, factor: float) -> Support:
        """Return the examples with their counts times `factor`."""
        return replace(self, weights=self.counts * factor)

    def joined(self, other: Support) -> Support:
        """Return both sets of examples, these first."""
        if (self.features is None) != (other.features is None) or self.members.shape[1:] != other.members.shape[1:]:
            raise DataError("labelled examples of two kinds cannot be joined: their members or features differ")
        return Support(
            np.concatenate([self.members, other.members]),
            np.concatenate([self.labels, other.labels]),
            None if self.features is None else np.concatenate([self.features, other.features]),
            np.concatenate([self.counts, other.counts]),
        )


@dataclass(frozen=True)
class Combination:
    """The adapted function: f(x) = sum_k coefficients_k f_k(x) + vector . phi(x).

    Attributes:
        coefficients: [H].
        vector: [C, D], or None where the features are not used.
    """

    coefficients: Floats
    vector: Floats | None = None

    def apply(self, members: Floats, features: Floats | None = None) -> Floats:
        """Return f [N, C] for members [N, H, C] and features [N, D]."""
        outputs: Floats = np.einsum("nhc,h->nc", members, self.coefficients)
        if self.vector is not None:
            if features is None:
                raise DataError("this adaptation is a function of the features too, and none were given")
            outputs = outputs + features @ self.vector.T
        return outputs

    def collapse(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """Return the one linear function (vector [C, D], bias [C]) that linear members amount to.

        Args:
            weight: [H, C, D], the members' own.
            bias: [H, C].
        """
        vector: Floats = np.einsum("h,hcd->cd", self.coefficients, weight)
        if self.vector is not None:
            vector = vector + self.vector
        return vector, self.coefficients @ bias


class Posterior(Protocol):
    """What is believed of the members after some examples; immutable.

    `update` may be called once with all examples or once for each: the result is the same, in any order.

    Attributes:
        n: labelled examples seen (their counts summed).
    """

    @property
    def n(self) -> float:
        """Labelled examples seen."""
        ...

    def update(self, support: Support) -> Self:
        """Return what is believed after these examples too."""
        ...

    def combination(self) -> Combination:
        """Return the function that predicts."""
        ...

    def diagnostics(self) -> dict[str, float]:
        """Return numbers about it: effective members `ess`, `entropy`, `best` member, what the method adds."""
        ...

    def forget(self, gamma: float) -> Self:
        """Return it with all evidence so far counted gamma times (0..1): for users whose taste drifts."""
        ...

    def merge(self, other: Self) -> Self:
        """Return what is believed after the examples of both, which must have begun from the same prior."""
        ...


class Method(Protocol):
    """A way of adapting, with its settings; `begin` returns what is believed before any label."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def begin(self, num_members: int) -> Posterior:
        """Return the posterior after no example."""
        ...


class Fit(Protocol):
    """A method that looks at all examples at once; `SupportPosterior` makes a posterior of it."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the function after these examples (None: none yet), and numbers about the fit."""
        ...


@dataclass(frozen=True)
class SupportPosterior:
    """What is believed by a method without a short summary of its evidence: the examples themselves.

    They are fitted together when the function is asked for, so one update with all of them and one for each are the
    same up to the order of sums.

    Attributes:
        method: that fits.
        num_members: H.
        support: the examples seen; None before the first.
    """

    method: Fit
    num_members: int
    support: Support | None = None

    @property
    def n(self) -> float:
        """Labelled examples seen."""
        return 0.0 if self.support is None else float(self.support.counts.sum())

    def update(self, support: Support) -> SupportPosterior:
        """Return what is believed after these examples too."""
        if support.members.shape[1] != self.num_members:
            raise DataError(f"expected {self.num_members} members, found {support.members.shape[1]}")
        if not len(support):
            return self
        return replace(self, support=support if self.support is None else self.support.joined(support))

    @cached_property
    def _fitted(self) -> tuple[Combination, dict[str, float]]:
        return self.method.fit(self.support, self.num_members)

    def combination(self) -> Combination:
        """Return the function that predicts."""
        return self._fitted[0]

    def diagnostics(self) -> dict[str, float]:
        """Return what `describe` says of the coefficients, and what the method adds."""
        combination, numbers = self._fitted
        return describe(combination.coefficients) | numbers

    def forget(self, gamma: float) -> SupportPosterior:
        """Return it with all examples so far counted gamma times."""
        check_gamma(gamma)
        return self if self.support is None else replace(self, support=self.support.scaled(gamma))

    def merge(self, other: SupportPosterior) -> SupportPosterior:
        """Return what is believed after the examples of both."""
        if self.num_members != other.num_members or not same_settings(self.method, other.method):
            raise DataError("posteriors over different members or of different settings cannot be merged")
        return self if other.support is None else self.update(other.support)


def describe(coefficients: Floats) -> dict[str, float]:
    """Return `ess`, the effective number of members, `entropy` in nats, the `best` member and its `best_weight`.

    For weights that sum to 1 these are 1 / sum w^2 and -sum w log w; coefficients below 0 count with their size.
    """
    size = np.abs(coefficients)
    total = size.sum()
    best = int(coefficients.argmax())
    if total == 0:
        return {"ess": 0.0, "entropy": 0.0, "best": float(best), "best_weight": 0.0}
    shares = size / total
    positive = shares[shares > 0]
    return {
        "ess": float(1 / (shares @ shares)),
        "entropy": -float(positive @ np.log(positive)),
        "best": float(best),
        "best_weight": float(coefficients[best]),
    }


def check_gamma(gamma: float) -> None:
    """Raise unless 0 <= gamma <= 1."""
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma must be between 0 and 1, found {gamma}")


def check_pooled(pooled: int, num_members: int) -> None:
    """Raise unless `pooled` is the number of one of the members."""
    if not 0 <= pooled < num_members:
        raise ConfigError(f"pooled must name one of {num_members} members, found {pooled}")


def same_settings(first: Any, second: Any) -> bool:
    """Whether two methods are the same, arrays among their settings included."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if is_dataclass(first):
        return all(same_settings(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same_settings, first, second))
    return bool(np.array_equal(first, second))


@dataclass(frozen=True)
class Adapted:
    """The result of `adapt`.

    Attributes:
        posterior: to go on from.
        combination: the adapted function.
        cost: labels used and seconds taken.
        diagnostics: of the posterior.
    """

    posterior: Posterior
    combination: Combination
    cost: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)


def accuracy(outputs: Floats, labels: Floats, task: Task) -> float:
    """Return the share of examples [N] that outputs [N, C] get right; a tie of a preference counts half.

    Raises:
        DataError: a regression has no accuracy.
    """
    if task == "regression":
        raise DataError("a regression has no accuracy; use rmse")
    if task == "classification":
        return float(np.mean(outputs.argmax(1) == labels))
    margin = np.where(labels >= 0.5, outputs[:, 0], -outputs[:, 0])
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def rmse(outputs: Floats, labels: Floats) -> float:
    """Return the root of the mean squared error of outputs [N, 1]."""
    return float(np.sqrt(np.mean((outputs[:, 0] - labels) ** 2)))
