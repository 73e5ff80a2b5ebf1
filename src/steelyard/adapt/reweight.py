r"""HyRe: members of an ensemble as hypotheses, re-weighted by what a few labels say of each.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812).

    L_k = \sum_{(x, y) \in D} l(f_k(x), y),
    w_k \propto \pi_k \exp(-\eta L_k),                      f_w(x) = \sum_k w_k f_k(x)

| symbol | code |
|---|---|
| L_k | `evidence` [H]: a sum, not a mean; only the sum is a Bayesian update |
| \pi_k | `prior`, uniform where None |
| \eta | `eta`: 1 is Bayes' rule for a likelihood; chosen on held-out tasks by `adapt.choose.fit_eta` |

It is the exact minimiser of <w, L> + KL(w || \pi) / \eta over the simplex; one label at a time it is Hedge (Freund and
Schapire 1997). No gradients, some microseconds.

Differences from the paper: \eta, the guards (mixing with the prior, forgetting, losses robust to wrong labels), and
standardised members; the paper has \eta = 1.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from steelyard.adapt.base import Adapted, Combination, Floats, Method, Support, check_gamma, describe, same_settings
from steelyard.adapt.losses import BradleyTerry, MemberLoss, softmax
from steelyard.errors import ConfigError, DataError


@dataclass(frozen=True)
class HyRe:
    """The method and its settings.

    Attributes:
        loss: of members.
        eta: how fast evidence sharpens the weights.
        mix: share of the prior that stays in the weights that predict; a guard against a wrong click.
        prior: [H], summing to 1; uniform where None.
    """

    loss: MemberLoss = field(default_factory=BradleyTerry)
    eta: float = 1.0
    mix: float = 0.0
    prior: Floats | None = None
    name: str = "HyRe"

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ConfigError(f"eta must be finite and at least 0, found {self.eta}")
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"mix must be between 0 and 1, found {self.mix}")

    def begin(self, num_members: int) -> HyRePosterior:
        """Return the prior as a posterior after no example."""
        prior = np.full(num_members, 1 / num_members) if self.prior is None else np.asarray(self.prior, np.float64)
        if prior.shape != (num_members,) or (prior < 0).any() or not np.isclose(prior.sum(), 1):
            raise ConfigError(f"the prior must be {num_members} weights that sum to 1")
        with np.errstate(divide="ignore"):
            return HyRePosterior(self, np.log(prior), np.zeros(num_members), 0.0)


@dataclass(frozen=True)
class HyRePosterior:
    """Weights over members, in logarithms.

    Attributes:
        method: loss, eta and guards.
        log_prior: [H].
        evidence: [H], the members' summed losses.
        n: labelled examples seen.
    """

    method: HyRe
    log_prior: Floats
    evidence: Floats
    n: float

    def update(self, support: Support) -> HyRePosterior:
        """Return the posterior after these examples too."""
        if support.members.shape[1] != len(self.evidence):
            raise DataError(f"expected {len(self.evidence)} members, found {support.members.shape[1]}")
        return self.update_losses(self.method.loss(support.members, support.labels), support.weights)

    def update_losses(self, losses: Floats, counts: Floats | None = None) -> HyRePosterior:
        """Return the posterior after losses [N, H] of any kind, of examples that count `counts` [N]."""
        if counts is None:
            evidence, n = losses.sum(0), float(len(losses))
        else:
            evidence, n = counts @ losses, float(counts.sum())
        return HyRePosterior(self.method, self.log_prior, self.evidence + evidence, self.n + n)

    @property
    def log_weights(self) -> Floats:
        """Logarithms of w [H], before mixing."""
        logits = scores(self.evidence, self.method.eta, self.log_prior)
        result: Floats = logits - np.logaddexp.reduce(logits)
        return result

    def weights(self, mix: float | None = None, top: int | None = None) -> Floats:
        """Return w [H], which sum to 1.

        Args:
            mix: share of the prior in them; None: the method's.
            top: keep the so many largest and spread the rest evenly over the others, as short profiles do.
        """
        share = self.method.mix if mix is None else mix
        weights = softmax(scores(self.evidence, self.method.eta, self.log_prior))
        if share:
            weights = (1 - share) * weights + share * np.exp(self.log_prior)
        if top is not None and top < len(weights):
            others = np.argsort(-weights, kind="stable")[top:]
            weights[others] = weights[others].mean()
        return weights

    def combination(self) -> Combination:
        """Return f_w."""
        return Combination(self.weights())

    @property
    def ess(self) -> float:
        """Effective number of members, 1 / sum w^2."""
        return float(1 / np.sum(self.weights() ** 2))

    def diagnostics(self) -> dict[str, float]:
        """Return the effective number of members, the entropy of the weights in nats, and the best member."""
        return describe(self.weights())

    def forget(self, gamma: float) -> HyRePosterior:
        """Return it with all evidence so far counted gamma times."""
        check_gamma(gamma)
        return replace(self, evidence=gamma * self.evidence, n=gamma * self.n)

    def merge(self, other: HyRePosterior) -> HyRePosterior:
        """Return the posterior after the examples of both: losses add."""
        same = np.array_equal(self.log_prior, other.log_prior) and same_settings(self.method, other.method)
        if not same:
            raise DataError("posteriors over different members or of different settings cannot be merged")
        return replace(self, evidence=self.evidence + other.evidence, n=self.n + other.n)


def scores(evidence: Floats, eta: float, log_prior: Floats) -> Floats:
    """Return log w [..., H] up to a constant; the least evidence is taken off first, so losses of 1e4 are fine."""
    result: Floats = log_prior - eta * (evidence - evidence.min(-1, keepdims=True))
    return result


def reweight_users(
    losses: Floats, mask: npt.ArrayLike | None = None, eta: float = 1.0, log_prior: Floats | None = None
) -> Floats:
    """Return the weights [U, H] of many users at once.

    Args:
        losses: [U, N, H] of every user's examples.
        mask: [U, N], 1 (or a weight) for examples that count; all where None.
        eta: as in `HyRe`.
        log_prior: [H] or [U, H]; uniform where None.
    """
    evidence = losses.sum(1) if mask is None else np.einsum("unh,un->uh", losses, np.asarray(mask, np.float64))
    prior = np.zeros(losses.shape[2]) if log_prior is None else log_prior
    return softmax(scores(evidence, eta, prior))


def adapt(method: Method, support: Support) -> Adapted:
    """Adapt to a few labelled examples; any method of this package."""
    begun = time.perf_counter()
    posterior = method.begin(support.members.shape[1]).update(support)
    combination = posterior.combination()
    seconds = time.perf_counter() - begun
    return Adapted(posterior, combination, {"labels": len(support), "seconds": seconds}, posterior.diagnostics())
