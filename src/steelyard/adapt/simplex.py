r"""The best weighted mean of the members: what HyRe becomes when the combination is judged instead of its members.

    w = argmin_{w in simplex} F(w),     F(w) = \sum_i l(f_i, y_i) + KL(w || uniform) / \eta,     f = M w

HyRe minimises \sum_k w_k L_k + KL / \eta, an upper bound on F (the losses are convex), and ends at the best single
member as labels grow; this ends at the best mean of members.

At the optimum w = softmax(\eta M^T a) with a = -dl/df, so there are as many unknowns as there are labels, whatever the
number of members. Exponentiated gradient (Kivinen and Warmuth 1997) moves a towards -dl/df, which is linear in log w.
The steps here solve (I + l'' K) d = -dl/df - a with K = df/da = \eta Cov_w(M) first: Newton's method in the same
geometry, some steps instead of thousands. With q = softmax(-\eta M^T dl/df), convexity gives

    F(w) - min F <= KL(w || q) / \eta,

the certificate that ends the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from steelyard.adapt.base import Combination, Floats, Support, SupportPosterior, Task
from steelyard.adapt.losses import Likelihood
from steelyard.errors import ConfigError, NonFiniteError

MAX_STEPS = 300
NEAR, FACTOR, ROUGH = 10.0, 8.0, 0.1
"""Stages of eta: log-weights that differ by so much can be reached at once; growth; KL(w || q) that ends a stage."""
FLOOR = 1e-14
"""Newton's decrement, relative to 1 + F, that rounding hides."""


@dataclass(frozen=True)
class SimplexMAP:
    """Weights on the simplex that are best together.

    Attributes:
        eta: how fast evidence sharpens the weights, as for HyRe.
        task: likelihood.
        noise: variance of a regression's targets.
        tolerance: F at the weights is at most so far above its least value, relative to 1 + F. Where members of a size
            far above what `noise` expects make the certificate itself inexact, as near as rounding allows; `gap` in
            the diagnostics is what is certified.
    """

    eta: float = 1.0
    task: Task = "preference"
    noise: float = 1.0
    tolerance: float = 1e-10
    name: str = "simplex MAP"

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ConfigError(f"eta must be finite and at least 0, found {self.eta}")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance must be above 0, found {self.tolerance}")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the mean of all members."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the weights, and `gap`: how far F is above its least value at most."""
        if support is None or self.eta == 0:
            return Combination(np.full(num_members, 1 / num_members)), {"gap": 0.0, "steps": 0.0}
        problem = _Problem(support, Likelihood(self.task, self.noise))
        b, steps = np.zeros(len(problem.matrix)), 0
        for eta in problem.stages(self.eta):
            b, gap, taken = self._minimise(problem, b, eta, last=eta == self.eta)
            steps += taken
        w = np.exp(problem.log_weights(b))
        return Combination(w), {"gap": gap, "steps": float(steps)}

    def _minimise(self, problem: _Problem, b: Floats, eta: float, last: bool) -> tuple[Floats, float, int]:
        """Return b = eta a of the optimum, the gap and the steps; on the way to the last eta roughly."""
        value, log_w, f = problem.at(b, eta)
        for step in range(MAX_STEPS):
            w, pull = np.exp(log_w), problem.pull(f)
            divergence = max(float(w @ (log_w - problem.log_weights(eta * pull))), 0.0)
            if divergence <= (eta * self.tolerance * (1 + abs(value)) if last else ROUGH):
                return b, divergence / eta, step
            centred = problem.matrix - f[:, None]
            kernel = (centred * w) @ centred.T
            rest = eta * pull - b
            direction = np.linalg.solve(np.eye(len(b)) + eta * problem.curved(f, kernel), rest)
            slope, length = float(rest @ kernel @ direction) / eta, 1.0
            if slope <= FLOOR * (1 + abs(value)):
                return b, divergence / eta, step
            for _ in range(60):
                found, log_w, f = problem.at(b + length * direction, eta)
                if found <= value - 1e-4 * length * slope + 1e-13 * (1 + abs(value)):
                    break
                length /= 2
            b, value = b + length * direction, found
        gap = divergence / eta
        raise NonFiniteError(f"the weights did not converge in {MAX_STEPS} steps; the gap is still {gap:.3g}")


class _Problem:
    """F and its parts as functions of b = eta a [N C]; `matrix` is M [N C, H]."""

    def __init__(self, support: Support, likelihood: Likelihood) -> None:
        n, heads, outputs = support.members.shape
        likelihood.check(outputs, support.labels)
        self.matrix = support.members.transpose(0, 2, 1).reshape(n * outputs, heads)
        self.shape, self.labels, self.counts, self.likelihood = (n, outputs), support.labels, support.counts, likelihood

    def stages(self, eta: float) -> list[float]:
        """Return values of eta that lead from where the weights are near uniform up to `eta`, the last.

        From uniform weights straight to a large eta the search would pass corners of the simplex, where K is 0.
        """
        scores = self.pull(self.matrix.mean(1)) @ self.matrix
        first = NEAR / max(float(np.ptp(scores)), 1e-300)
        count = max(0, math.ceil(math.log(eta / first, FACTOR)))
        return [eta / FACTOR**k for k in range(count, -1, -1)]

    def log_weights(self, b: Floats) -> Floats:
        scores = b @ self.matrix
        scores -= scores.max()
        result: Floats = scores - np.log(np.exp(scores).sum())
        return result

    def at(self, b: Floats, eta: float) -> tuple[float, Floats, Floats]:
        """Return F, log w and f."""
        log_w = self.log_weights(b)
        w = np.exp(log_w)
        f = self.matrix @ w
        loss = self.counts @ self.likelihood.value(f.reshape(self.shape), self.labels)
        return float(loss + (w @ log_w + math.log(len(w))) / eta), log_w, f

    def pull(self, f: Floats) -> Floats:
        """Return -dl/df."""
        gradient = self.likelihood.gradient(f.reshape(self.shape), self.labels)
        return np.asarray(-self.counts[:, None] * gradient).reshape(-1)

    def curved(self, f: Floats, kernel: Floats) -> Floats:
        """Return l'' K."""
        n, outputs = self.shape
        curvature = self.counts[:, None, None] * self.likelihood.curvature(f.reshape(self.shape))
        return np.asarray(curvature @ kernel.reshape(n, outputs, -1)).reshape(kernel.shape)
