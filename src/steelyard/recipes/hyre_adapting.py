"""Ways of adapting head sets to users, many users at a time, and the choice of their settings.

Every way is tried with every combination of its grid on validation users; the combination with the highest mean
accuracy after n labels is used on the unseen users, for each n apart, for all ways alike. A combination at the edge of
its grid is counted and shown.

Shapes as in `hyre_heads.Seen`: T users, R draws, N adaptation pairs, P test pairs, H members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from steelyard.adapt.base import Floats, Support
from steelyard.adapt.choose import Auto, Found, search
from steelyard.adapt.finetune import EQUAL, WIDE, fine_tune_users
from steelyard.adapt.losses import BradleyTerry, Likelihood, MemberLoss, ZeroOne
from steelyard.adapt.population import GaussianHeads, HeadMAP, RidgeCombination, gaussian_users
from steelyard.adapt.reweight import HyRe, reweight_users
from steelyard.adapt.simplex import SimplexMAP
from steelyard.errors import NonFiniteError
from steelyard.recipes.hyre_heads import Seen
from steelyard.recipes.hyre_jobs import Row

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
        etas: grid of eta.
        mixes: grid of the share of the uniform mean in the weights; 0 where empty.
        priors: grid of the prior weight of member 0; uniform where empty.
    """

    name: str = "HyRe"
    loss: MemberLoss = BradleyTerry()  # noqa: RUF009 - frozen
    mean: bool = False
    etas: tuple[float, ...] = ETAS
    mixes: tuple[float, ...] = ()
    priors: tuple[float, ...] = ()
    most_draws: int | None = None

    @property
    def grid(self) -> Grid:
        """Of eta, and of what else is chosen."""
        return {"eta": self.etas} | {name: grid for name, grid in (("mix", self.mixes), ("prior", self.priors)) if grid}

    def weights(self, seen: Seen, n: int, eta: float, mix: float = 0.0, prior: float | None = None) -> Floats:
        """Return w [T, R, H]."""
        users, draws, _, heads = seen.members.shape
        members, labels = seen.members[:, :, :n], seen.labels[:, :, :n]
        losses = self.loss(members.reshape(-1, heads, 1), labels.reshape(-1)).reshape(users * draws, n, heads)
        log_prior = None if prior is None else np.log([prior, *[(1 - prior) / (heads - 1)] * (heads - 1)])
        weights = reweight_users(losses, eta=eta / n if self.mean else eta, log_prior=log_prior)
        mixed: Floats = ((1 - mix) * weights + mix / heads).reshape(users, draws, heads)
        return mixed

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return f_w."""
        return mixed(seen, self.weights(seen, n, **settings))


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
    """Gradient descent on the pooled linear head, all users in one call (`adapt.finetune.fine_tune_users`)."""

    name: str
    grid: Grid
    most_draws: int | None = None

    def outputs(self, seen: Seen, n: int, settings: Mapping[str, Any]) -> Floats:
        """Return the fine-tuned head's margins."""
        return next(self.paths(seen, n, settings["learning_rate"], (int(settings["steps"]),)))

    def paths(self, seen: Seen, n: int, learning_rate: float, steps: Sequence[int]) -> Iterator[Floats]:
        """Yield the outputs after each of the increasing numbers of steps.

        Raises:
            NonFiniteError: a head runs away.
        """
        users, draws = seen.labels.shape[:2]
        features, labels = (part[:, :, :n].reshape(users * draws, n, *part.shape[3:]) for part in
                            (seen.features, seen.labels))  # fmt: skip
        start = seen.members[:, :, :n, :1].reshape(users * draws, n, 1)
        for vectors in fine_tune_users(Likelihood(), start, labels, features, learning_rate, steps):
            change = vectors.reshape(users, draws, -1) @ seen.test_features.transpose(0, 2, 1)
            yield seen.test_members[:, None, :, 0] + change


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


class Choice(NamedTuple):
    """What was chosen on validation users.

    Attributes:
        settings: by name.
        edges: settings that lie at an edge of their grid.
        accuracy: mean over validation users with these settings; NaN where there was nothing to choose.
    """

    settings: dict[str, Any]
    edges: tuple[str, ...]
    accuracy: float


def choose(way: Way, validation: Seen, *shots: int) -> Choice:
    """Return the settings of the highest mean accuracy on validation users after n labels; of several n, their mean."""
    if not way.grid:
        return Choice({}, (), float("nan"))
    seen = validation if way.most_draws is None else validation.draws(way.most_draws)
    if isinstance(way, FineTuning):
        (n,) = shots
        table = path_scores(way.grid, lambda rate, steps: way.paths(seen, n, rate, steps), seen.accuracy)
        found = search(way.grid, lambda steps, learning_rate: table.get((steps, learning_rate), -np.inf))
    else:
        found = search(
            way.grid,
            lambda **settings: float(np.mean([seen.accuracy(way.outputs(seen, n, settings)).mean() for n in shots])),
        )
    return chosen(found)


def path_scores(
    grid: Grid, paths: Callable[[float, Sequence[int]], Iterator[Floats]], accuracy: Callable[[Floats], Floats]
) -> dict[tuple[float, float], float]:
    """Return the mean accuracy by (steps, learning rate), one pass for all steps of a rate; run-aways are left out."""
    table: dict[tuple[float, float], float] = {}
    steps = sorted(int(step) for step in grid["steps"])
    for rate in grid["learning_rate"]:
        try:
            for step, outputs in zip(steps, paths(rate, steps), strict=True):
                table[step, rate] = float(accuracy(outputs).mean())
        except NonFiniteError:
            continue
    return table


def chosen(found: Found) -> Choice:
    """Return what a search found; a single step is no edge, for there are no fewer."""
    edges = tuple(name for name in found.edges if (name, found.settings[name]) != ("steps", 1))
    return Choice(dict(found.settings), edges, max(score for _, score in found.table))


def all_ways() -> list[Way]:
    """Return HyRe's rivals that need nothing but a linear head set, but those that build on others' settings."""
    return [
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


def auto(settings: Mapping[str, Mapping[int, Mapping[str, Any]]], margin: float = 2.0) -> Way:
    """Return the choice of a Gaussian over heads, HyRe or head MAP by the leave-one-out score of a user's labels.

    Args:
        settings: of the three by their names on the page, for every n, as they were chosen on validation users.
        margin: as in `Auto`; 0 takes the highest score as it is.
    """

    def family(n: int) -> Auto:
        gaussian, hyre, around = (settings[name][n] for name in ("Gaussian over heads", "HyRe", "head MAP"))
        return Auto((GaussianHeads(**gaussian), HyRe(eta=hyre["eta"]), HeadMAP(**around)), margin=margin)

    name = "auto (leave one out)" if margin else "auto, highest score as it is"
    return OneByOne(name, family, {}, most_draws=1)


@dataclass
class Trials:
    """Ways of adapting one head set, tried: settings chosen on some users, rows of how others fare.

    Attributes:
        common: split, world and heads of every row.
        validation: users on whom settings are chosen.
        targets: unseen users.
        rows: so far, of kinds "rows" (one a method, n and target) and "settings".
    """

    common: Mapping[str, Any]
    validation: Seen
    targets: Seen
    rows: list[Row] = field(default_factory=list)

    def add(self, method: str, n: int, accuracy: Floats) -> None:
        """Add the accuracies [T, R] of a method after n labels."""
        for user, values in zip(self.targets.names, accuracy, strict=True):
            row = {**self.common, "method": method, "n": n, "target": user, "accuracy": float(values.mean())}
            self.rows.append({"kind": "rows", "values": row})

    def add_choice(self, method: str, n: int, choice: Choice) -> None:
        """Add what was chosen; n is 0 where it is for every n."""
        text = ", ".join(f"{name} {value:g}" for name, value in choice.settings.items())
        row = {"settings": text, "edges": " ".join(choice.edges), "validation": choice.accuracy}
        self.rows.append({"kind": "settings", "values": {**self.common, "method": method, "n": n, **row}})

    def test(self, way: Way, n: int, settings: Mapping[str, Any], name: str | None = None) -> None:
        """Add how the targets fare."""
        few = self.targets if way.most_draws is None else self.targets.draws(way.most_draws)
        self.add(name or way.name, n, few.accuracy(way.outputs(few, n, settings)))

    def tune(self, way: Way, *shots: int) -> dict[str, Any]:
        """Choose settings, one for all of these n, and add how the targets fare with them. Return them."""
        choice = choose(way, self.validation, *shots)
        if way.grid:
            self.add_choice(way.name, shots[0] if len(shots) == 1 else 0, choice)
        for n in shots:
            self.test(way, n, choice.settings)
        return choice.settings
