r"""Heads as draws from a population of users: the adapted function has a Gaussian prior around them.

    f(x) = \sum_k u_k m_k(x) + v \cdot \phi(x),     u ~ N(c, g S),     v ~ N(0, l I),     \max_{u, v} p(y | f) p(u) p(v)

m_k are the members, \phi the features. What is fitted is f at the examples, not u and v: f is a Gaussian process with

    mean(x) = \sum_k c_k m_k(x),     k(x, x') = g m(x)^T S m(x') + l \phi(x) \cdot \phi(x'),

whose mode is found by Newton's method in the dual (Rasmussen and Williams, "Gaussian Processes for Machine Learning",
MIT Press 2006, section 3.4: f = mean + K a, a = (I + W K)^{-1} (W (f - mean) + d log p / df)), a system of N C
equations however many members and features there are. For squared loss one step is the closed form. Then
u = c + g S m^T a and v = l \phi^T a: a `Combination`, as for every method.

| method | c | S | l |
|---|---|---|---|
| `GaussianHeads` | 1/H: mean of the heads | (I - 11^T / H) / H: their covariance | `feature_weight` |
| `RidgeCombination` | 1/H | I | 0 |
| `HeadMAP` | the pooled member | 0 | `variance` |
| `HyReThenMAP` | HyRe's weights after the same examples | 0 | `variance` |

With linear members the first one is hierarchical logistic regression: a user's vector is drawn from
N(mean of heads, g Cov(heads) + l I). `HeadMAP` is ridge-penalised logistic regression around the single model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steelyard.adapt.base import Combination, Floats, Support, SupportPosterior, Task, check_pooled
from steelyard.adapt.losses import Likelihood
from steelyard.adapt.reweight import HyRe
from steelyard.errors import ConfigError, DataError, NonFiniteError

MAX_STEPS = 200
DECREMENT = 1e-9
"""Newton's decrement below which one more full step is the last: its error is of the order of the square."""


@dataclass(frozen=True)
class GaussianHeads:
    """Gaussian prior with the mean and the covariance of the heads.

    Attributes:
        heads_weight: g, multiplies the covariance of the heads.
        feature_weight: l, variance of what no head says; above 0 it needs features.
        task: likelihood.
        noise: variance of a regression's targets.
    """

    heads_weight: float = 1.0
    feature_weight: float = 0.0
    task: Task = "preference"
    noise: float = 1.0
    name: str = "Gaussian over heads"

    def __post_init__(self) -> None:
        _check(self, "heads_weight", "feature_weight")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the posterior after no example: the mean of the heads."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the posterior mode."""
        return _fit(self.process(num_members), support)

    def process(self, num_members: int) -> GaussianProcess:
        """Return the prior."""
        mean = np.full(num_members, 1 / num_members)
        weight = self.heads_weight / num_members
        return GaussianProcess(Likelihood(self.task, self.noise), mean, weight, True, self.feature_weight)


@dataclass(frozen=True)
class RidgeCombination:
    """Coefficients of the members, N(1/H, weight I): any linear combination, shrunk towards the mean.

    Attributes:
        weight: prior variance of a coefficient.
        task: likelihood.
        noise: variance of a regression's targets.
    """

    weight: float = 1.0
    task: Task = "preference"
    noise: float = 1.0
    name: str = "ridge combination"

    def __post_init__(self) -> None:
        _check(self, "weight")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the posterior after no example: the mean of the members."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the posterior mode."""
        return _fit(self.process(num_members), support)

    def process(self, num_members: int) -> GaussianProcess:
        """Return the prior."""
        mean = np.full(num_members, 1 / num_members)
        return GaussianProcess(Likelihood(self.task, self.noise), mean, self.weight, False, 0.0)


@dataclass(frozen=True)
class HeadMAP:
    """Ridge-penalised fit of a linear function of the features around the single model.

    Attributes:
        variance: prior variance of every coefficient of the features.
        pooled: which member is the single model.
        task: likelihood.
        noise: variance of a regression's targets.
    """

    variance: float = 1.0
    pooled: int = 0
    task: Task = "preference"
    noise: float = 1.0
    name: str = "head MAP"

    def __post_init__(self) -> None:
        _check(self, "variance")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the posterior after no example: the single model."""
        check_pooled(self.pooled, num_members)
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the posterior mode."""
        return _fit(self.process(num_members), support)

    def process(self, num_members: int) -> GaussianProcess:
        """Return the prior."""
        mean = np.zeros(num_members)
        mean[self.pooled] = 1
        return GaussianProcess(Likelihood(self.task, self.noise), mean, 0.0, False, self.variance)


@dataclass(frozen=True)
class HyReThenMAP:
    """HyRe, then a ridge-penalised fit of a linear function of the features around what it found.

    The same examples are used twice, so with many of them it trusts HyRe's choice too much; `GaussianHeads` does not.

    Attributes:
        hyre: the method of the first part.
        variance: prior variance of every coefficient of the features.
        task: likelihood of the second part.
        noise: variance of a regression's targets.
    """

    hyre: HyRe = field(default_factory=HyRe)
    variance: float = 1.0
    task: Task = "preference"
    noise: float = 1.0
    name: str = "HyRe, then MAP"

    def __post_init__(self) -> None:
        _check(self, "variance")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the posterior after no example: HyRe's prior."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the mode around HyRe's function."""
        posterior = self.hyre.begin(num_members)
        weights = (posterior if support is None else posterior.update(support)).weights()
        likelihood = Likelihood(self.task, self.noise)
        return _fit(GaussianProcess(likelihood, weights, 0.0, False, self.variance), support)


@dataclass(frozen=True)
class GaussianProcess:
    """The prior over f.

    Attributes:
        likelihood: of labels.
        mean: c [H].
        heads_weight: multiplies m^T m.
        centred: whether members are taken relative to their mean, which makes m^T m a covariance.
        feature_weight: l.
    """

    likelihood: Likelihood
    mean: Floats
    heads_weight: float
    centred: bool
    feature_weight: float

    def solve(
        self, members: Floats, labels: Floats, counts: Floats, features: Floats | None
    ) -> tuple[Floats, Floats | None, Floats, int]:
        """Return coefficients [U, H], vectors [U, C, D] or None, departures [U] and Newton steps for U users at once.

        Args:
            members: [U, N, H, C].
            labels: [U, N].
            counts: [U, N]; 0 for padding.
            features: [U, N, D].
        """
        users, n, heads, outputs = members.shape
        self.likelihood.check(outputs, labels[counts > 0])
        mean = np.einsum("unhc,h->unc", members, self.mean)
        rows = members - members.mean(2, keepdims=True) if self.centred else members
        rows = rows.transpose(0, 1, 3, 2).reshape(users, n * outputs, heads)
        kernel = self.heads_weight * (rows @ rows.transpose(0, 2, 1))
        if self.feature_weight:
            if features is None:
                raise DataError("this method is a function of the features too, and none were given")
            inner = self.feature_weight * (features @ features.transpose(0, 2, 1))
            kernel = kernel + (inner if outputs == 1 else np.kron(inner, np.eye(outputs)[None]))
        dual, fitted, steps = newton(kernel, mean, labels, counts, self.likelihood)
        departure = np.sqrt(np.maximum(np.einsum("unc,unc->u", dual, fitted - mean), 0))
        coefficients = self.mean + self.heads_weight * np.einsum("um,umh->uh", dual.reshape(users, -1), rows)
        vectors = None
        if self.feature_weight and features is not None:
            vectors = self.feature_weight * (dual.transpose(0, 2, 1) @ features)
        return coefficients, vectors, departure, steps


def newton(
    kernel: Floats, mean: Floats, labels: Floats, counts: Floats, likelihood: Likelihood
) -> tuple[Floats, Floats, int]:
    r"""Minimise \sum_i count_i l(f_i, y_i) + a^T K a / 2 over a, f = mean + K a, for U users at once.

    Args:
        kernel: K [U, N C, N C], positive semi-definite, maybe singular.
        mean: [U, N, C].
        labels: [U, N].
        counts: [U, N]; an example that counts 0 changes nothing.
        likelihood: convex in f.

    Returns:
        The dual variables a [U, N, C], f [U, N, C], and the steps taken.
    """
    users, n, outputs = mean.shape
    size = n * outputs
    weight, eye = counts[..., None], np.eye(size)
    dual, outer = np.zeros_like(mean), mean

    def apply(a: Floats) -> Floats:
        return np.asarray((kernel @ a.reshape(users, size, 1)).reshape(mean.shape))

    def objective(a: Floats, f: Floats) -> Floats:
        return np.asarray((counts * likelihood.value(f, labels)).sum(1) + 0.5 * ((f - mean) * a).sum((1, 2)))

    value = objective(dual, outer)
    for step in range(1, MAX_STEPS + 1):
        pull = -weight * likelihood.gradient(outer, labels)
        curvature = weight[..., None] * likelihood.curvature(outer)
        system = eye + (curvature @ kernel.reshape(users, n, outputs, size)).reshape(users, size, size)
        target = (curvature @ (outer - mean)[..., None])[..., 0] + pull
        direction = np.linalg.solve(system, target.reshape(users, size, 1)).reshape(mean.shape) - dual
        moved = apply(direction)
        decrement = ((pull - dual) * moved).sum((1, 2))
        if (decrement <= DECREMENT * (1 + np.abs(value))).all():
            return dual + direction, outer + moved, step
        length = np.ones((users, 1, 1))
        for _ in range(60):
            tried = objective(dual + length * direction, outer + length * moved)
            fails = tried > value - 1e-4 * length[:, 0, 0] * decrement + 1e-12 * (1 + np.abs(value))
            if not fails.any():
                break
            length[fails] /= 2
        dual, outer, value = dual + length * direction, outer + length * moved, tried
    raise NonFiniteError(
        f"Newton's method did not converge in {MAX_STEPS} steps; largest kernel {np.abs(kernel).max()}"
    )


def gaussian_users(
    method: GaussianHeads | RidgeCombination | HeadMAP,
    members: Floats,
    labels: Floats,
    mask: npt.ArrayLike | None = None,
    features: Floats | None = None,
) -> tuple[Floats, Floats | None]:
    """Return the coefficients [U, H] and vectors [U, C, D] (or None) of many users at once.

    Args:
        method: one for all.
        members: [U, N, H, C] of every user's examples.
        labels: [U, N]; of padding, any valid label.
        mask: [U, N], 1 (or a weight) for examples that count; all where None.
        features: [U, N, D].
    """
    counts = np.ones(labels.shape) if mask is None else np.asarray(mask, np.float64)
    coefficients, vectors, _, _ = method.process(members.shape[2]).solve(members, labels, counts, features)
    return coefficients, vectors


def _fit(process: GaussianProcess, support: Support | None) -> tuple[Combination, dict[str, float]]:
    if support is None:
        return Combination(process.mean), {"departure": 0.0, "steps": 0.0}
    features = None if support.features is None else support.features[None]
    coefficients, vectors, departure, steps = process.solve(
        support.members[None], support.labels[None], support.counts[None], features
    )
    combination = Combination(coefficients[0], None if vectors is None else vectors[0])
    return combination, {"departure": float(departure[0]), "steps": float(steps)}


def _check(method: GaussianHeads | RidgeCombination | HeadMAP | HyReThenMAP, *names: str) -> None:
    Likelihood(method.task, method.noise)
    for name in names:
        value = getattr(method, name)
        if not 0 <= value < np.inf:
            raise ConfigError(f"{name} must be finite and at least 0, found {value}")
