"""Ways of adapting head sets to users, many users at a time, and the choice of their settings.

Every way is tried with every combination of its grid on validation users; the combination with the highest mean
accuracy after n labels is used on the unseen users, for each n apart, for all ways alike. A combination at the edge of
its grid is counted and shown.

Shapes as in `hyre_heads.Seen`: T users, R draws, N adaptation pairs, P test pairs, H members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from steelyard.adapt.base import Floats, Support
from steelyard.adapt.choose import search
from steelyard.adapt.finetune import EQUAL, WIDE
from steelyard.adapt.losses import BradleyTerry, MemberLoss, ZeroOne, sigmoid
from steelyard.adapt.population import GaussianHeads, HeadMAP, RidgeCombination, gaussian_users
from steelyard.adapt.reweight import reweight_users
from steelyard.adapt.simplex import SimplexMAP
from steelyard.errors import NonFiniteError
from steelyard.recipes.hyre_heads import Seen

ETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
"""1000 leaves the best member alone after one label."""
GAUSSIAN = {
    "heads_weight": (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0),
    "feature_weight": (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0),
}
VARIANCES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
RIDGE = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e5)
SIMPLEX_ETAS = (0.1, 0.5, 2.0, 10.0, 50.0)

TUNING = {**WIDE, "steps": (1, *WIDE["steps"], 1000)}
"""Of fine-tuning: one step is as few as there can be; 1000 for single models that are of no use to a user."""

Grid = Mapping[str, Sequence[float]]


class Way(Protocol):
    """A way of adapting.

    Attributes:
        name: on the page.
        grid: of its settings; empty where there are none.
        most_draws: more draws of a user would take too long; None: all.
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def grid(self) -> Grid:
        """Ordered values of every setting."""
        ...

    @property
    def most_draws(self) -> int | None:
        """How many draws of a user are tried."""
        ...

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return what is said of the test pairs [T, R, P] after the first n labels."""
        ...


@dataclass(frozen=True)
class Reweighting:
    """HyRe.

    Attributes:
        name: on the page.
        loss: of members.
        mean: weights from the mean loss instead of the sum.
        grid: of eta.
    """

    name: str = "HyRe"
    loss: MemberLoss = BradleyTerry()  # noqa: RUF009 - frozen
    mean: bool = False
    etas: tuple[float, ...] = ETAS
    most_draws: int | None = None

    @property
    def grid(self) -> Grid:
        """Of eta."""
        return {"eta": self.etas}

    def weights(self, seen: Seen, n: int, eta: float) -> Floats:
        """Return w [T, R, H]."""
        users, draws, _, heads = seen.members.shape
        members, labels = seen.members[:, :, :n], seen.labels[:, :, :n]
        losses = self.loss(members.reshape(-1, heads, 1), labels.reshape(-1)).reshape(users * draws, n, heads)
        return reweight_users(losses, eta=eta / n if self.mean else eta).reshape(users, draws, heads)

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return f_w."""
        return mixed(seen, self.weights(seen, n, settings["eta"]))


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian family, all users in one call: over heads, ridge combination or head MAP.

    Attributes:
        name: on the page.
        family: settings -> method.
        grid: of the settings.
    """

    name: str
    family: Callable[..., GaussianHeads | RidgeCombination | HeadMAP]
    grid: Grid
    most_draws: int | None = None

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return the posterior mode."""
        return gaussian_outputs(self.family(**settings), seen, n)


def gaussian_outputs(method: GaussianHeads | RidgeCombination | HeadMAP, seen: Seen, n: int) -> Floats:
    """Return what the posterior mode says of the test pairs [T, R, P] after the first n labels."""
    users, draws, _, heads = seen.members.shape
    coefficients, vectors = gaussian_users(
        method,
        seen.members[:, :, :n].reshape(users * draws, n, heads, 1),
        seen.labels[:, :, :n].reshape(users * draws, n),
        None,
        seen.features[:, :, :n].reshape(users * draws, n, -1),
    )
    outputs = mixed(seen, coefficients.reshape(users, draws, heads))
    if vectors is not None:
        outputs = outputs + vectors.reshape(users, draws, -1) @ seen.test_features.transpose(0, 2, 1)
    return outputs


@dataclass(frozen=True)
class ThenMAP:
    """HyRe, then a ridge-penalised fit around its function on the same labels."""

    eta: Mapping[int, float]
    """HyRe's, for every n."""
    name: str = "HyRe, then MAP"
    most_draws: int | None = None

    @property
    def grid(self) -> Grid:
        """Of the variance; 0 is HyRe."""
        return {"variance": (0.0, *VARIANCES)}

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return the mode."""
        weights = Reweighting().weights(seen, n, self.eta[n])
        around = np.einsum("trnh,trh->trn", seen.members, weights)
        found = mixed(seen, weights)
        # HyRe's function becomes the one member: the mean of the prior, for each user its own
        alone = Seen(
            seen.names,
            around[..., None],
            seen.features,
            seen.labels,
            np.zeros((*seen.test_labels.shape, 1)),
            seen.test_features,
            seen.test_labels,
        )
        return found + gaussian_outputs(HeadMAP(settings["variance"]), alone, n)


@dataclass
class FineTuning:
    """Gradient descent on the pooled linear head (`adapt.finetune.FineTuneHead`), all users in one call.

    The change is a combination of the examples' features, so steps are taken on its n coefficients; one pass leaves
    the result of every number of steps.
    """

    name: str
    grid: Grid
    most_draws: int | None = None

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return the fine-tuned head's margins."""
        return next(self.paths(seen, n, settings["learning_rate"], (int(settings["steps"]),)))

    def paths(self, seen: Seen, n: int, learning_rate: float, steps: Sequence[int]) -> Iterator[Floats]:
        """Yield the outputs after each of the increasing numbers of steps.

        Raises:
            NonFiniteError: the head runs away.
        """
        features, labels = seen.features[:, :, :n], seen.labels[:, :, :n]
        kernel = features @ features.transpose(0, 1, 3, 2)
        start = seen.members[:, :, :n, 0]
        change, outputs = np.zeros_like(start), start
        with np.errstate(over="ignore", invalid="ignore"):
            for step in range(1, steps[-1] + 1):
                change = change + learning_rate / n * (labels - sigmoid(outputs))
                outputs = start + (kernel @ change[..., None])[..., 0]
                if step in steps:
                    vectors = (change[:, :, None] @ features)[:, :, 0]
                    if not np.isfinite(vectors).all():
                        raise NonFiniteError(f"fine-tuning with a learning rate of {learning_rate:g} runs away")
                    yield seen.test_members[:, None, :, 0] + vectors @ seen.test_features.transpose(0, 2, 1)


@dataclass(frozen=True)
class OneByOne:
    """Any method of `adapt`, user by user.

    Attributes:
        name: on the page.
        family: (n, settings) -> method.
        grid: of the settings.
        most_draws: of a user.
    """

    name: str
    family: Callable[..., Any]
    grid: Grid
    most_draws: int | None = 2

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return the adapted functions' margins."""
        method = self.family(n, **settings)
        users, draws, _, heads = seen.members.shape
        outputs = np.empty((users, draws, seen.test_labels.shape[1]))
        for user in range(users):
            for number in range(draws):
                rows = (user, number, slice(0, n))
                support = Support(seen.members[rows][..., None], seen.labels[rows], seen.features[rows])
                combination = method.begin(heads).update(support).combination()
                tests = seen.test_members[user][..., None], seen.test_features[user]
                outputs[user, number] = combination.apply(*tests)[:, 0]
        return outputs


def mixed(seen: Seen, coefficients: Floats) -> Floats:
    """Return [T, R, P] of coefficients [T, R, H]."""
    return coefficients @ seen.test_members.transpose(0, 2, 1)


def still(seen: Seen, which: Literal["single", "uniform"]) -> Floats:
    """Return the accuracies [T, 1] of what needs no label: member 0, or the mean of all members."""
    outputs = seen.test_members[..., 0] if which == "single" else seen.test_members.mean(2)
    return seen.accuracy(outputs[:, None])


def best_head(seen: Seen) -> Floats:
    """Return the accuracy [T, 1] of every user's best member, chosen on the test pairs: an oracle."""
    return np.asarray(seen.accuracy(seen.test_members.transpose(0, 2, 1)).max(1, keepdims=True))


def choose(way: Way, validation: Seen, n: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings of the highest mean accuracy on validation users after n labels, and those at an edge."""
    if not way.grid:
        return {}, ()
    seen = validation if way.most_draws is None else validation.draws(way.most_draws)
    if isinstance(way, FineTuning):
        table: dict[tuple[float, float], float] = {}
        steps = sorted(int(step) for step in way.grid["steps"])
        for rate in way.grid["learning_rate"]:
            try:
                for step, outputs in zip(steps, way.paths(seen, n, rate, steps), strict=True):
                    table[step, rate] = float(seen.accuracy(outputs).mean())
            except NonFiniteError:
                continue
        found = search(way.grid, lambda steps, learning_rate: table.get((steps, learning_rate), -np.inf))
    else:
        found = search(way.grid, lambda **settings: float(seen.accuracy(way.outputs(seen, n, settings)).mean()))
    edges = tuple(name for name in found.edges if (name, found.settings[name]) != ("steps", 1))
    return dict(found.settings), edges


def all_ways() -> list[Way]:
    """Return every way that needs nothing but a linear head set, but those that build on others' settings."""
    return [
        Reweighting(),
        Reweighting("HyRe, 0-1 loss", ZeroOne()),
        Gaussian("Gaussian over heads", GaussianHeads, GAUSSIAN),
        Gaussian("head MAP", HeadMAP, {"variance": VARIANCES}),
        Gaussian("ridge combination", RidgeCombination, {"weight": RIDGE}),
        FineTuning("fine-tune head (equal grid)", EQUAL),
        FineTuning("fine-tune head (wide grid)", TUNING),
    ]


def simplex() -> Way:
    """Return the best weighted mean."""
    return OneByOne("simplex MAP", lambda n, eta: SimplexMAP(eta), {"eta": SIMPLEX_ETAS})
