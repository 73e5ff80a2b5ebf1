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
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

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
