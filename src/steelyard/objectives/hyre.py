r"""HyRe's ensemble: many heads on one backbone, each trained as a model of its own, to be re-weighted at test time.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812). The re-weighting is `adapt/reweight.py`; this is the training before it.

    L = (1/H) \sum_k E_{(x, y)} [ s_k(x) l(f_k(x), y) ] + (\lambda / 2H) \sum_k |h_k|^2

| symbol | code |
|---|---|
| f_k | `head` on the backbone's features; `nets/ensemble.py` |
| l | Bradley-Terry on margins of pairs, cross-entropy, squared error or Gaussian likelihood: `member_losses` [B, H] |
| s_k(x) | `seen` [B, H]: 0 where member k does not see x, else 1 / (share of the data that it sees) |
| \lambda | `config.l2` |

It is the mean of the members' losses, never the loss of their mean, under which members stop being models of their own.
s_k makes every member's loss an unbiased estimate of the mean loss over what it sees. Who sees what decides whether
re-weighting will help, for heads differ where their data do:

| `shares` | member k sees |
|---|---|
| all | everything; members differ by initial weights and priors alone |
| bootstrap | each example with probability `share` |
| groups | a random `share` of the groups (users, annotators, sources, clusters) |
| one_group | group k: user heads, or cluster heads after `data/clusters.py` |

`loss="mixture"` trains the heads as one mixture of preferences whose gate reads the pair, as in MiCRo (Shen et al.,
arXiv 2505.24846): L = -E log \sum_k g_k(x) p_k(y|x) - c E H(g(x)); the pooled member has a loss of its own beside it.

Differences from the papers: shares, penalty and mixture are not HyRe's, whose members all see everything and differ by
priors. A bootstrap draws without replacement. MiCRo's gate reads the prompt, ours the mean of a pair's features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.adapt.base import Support
from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import LabelledBatch
from steelyard.data.normalize import Normalizer
from steelyard.errors import ConfigError, DataError
from steelyard.nets.backbones import final_states, reads_completions, trainable_of, width_of
from steelyard.nets.ensemble import EnsembleHead, HeadsConfig
from steelyard.nets.mlp import MLP
from steelyard.objectives.base import Group, Learner, Metrics, Phase


@dataclass(frozen=True)
class EnsembleConfig(Config):
    """Ensemble of heads for re-weighting."""

    kind: Literal["hyre"] = "hyre"
    """Name of the objective."""
    task: Literal["preference", "regression", "classification"] = "preference"
    """What is learned: which of two is preferred, a number, or a class."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    """How many heads, and what makes them differ."""
    shares: Literal["all", "bootstrap", "groups", "one_group"] = "all"
    """What each head sees: everything, a share of the examples or of the groups, or one group each."""
    share: float = 0.5
    """Of the examples (bootstrap) or of the groups (groups) that a head sees."""
    loss: Literal["members", "mixture"] = "members"
    """The mean of the members' losses, or the likelihood of their mixture."""
    entropy_weight: float = 0.0
    """c: of the gate's entropy in the mixture; above 0 it keeps all heads in use."""
    noise_model: Literal["squared", "gaussian"] = "squared"
    """Of a regression: squared error, or a likelihood with a variance learned by each member."""
    learning_rate: float = 1e-3
    """Adam's step for the backbone; 1e-5 suits pre-trained transformers, 1e-4 LoRA."""
    head_learning_rate: float = 1e-3
    """Adam's step for the heads."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    l2: float = 0.0
    """lambda: half of it times the squared weights is added to the loss of every head."""
    frozen: bool = False
    """Train the heads alone, on the backbone's features as they are."""
    scaling: Literal["each", "common"] = "each"
    """Scale every feature to unit variance, or all by one number, which keeps their proportions."""

    def __post_init__(self) -> None:
        """Check ranges and what excludes what."""
        require_positive(self, "learning_rate", "head_learning_rate", "share")
        require_range(self, 0, 1, "share")
        require_range(self, 0, math.inf, "weight_decay", "l2", "entropy_weight")
        if self.loss == "mixture" and (self.shares != "all" or self.task == "regression" or self.heads.fixed):
            raise ConfigError(
                "the mixture is of trained heads that all see everything, for preferences or classes; found shares "
                f"{self.shares!r}, task {self.task!r}, heads {self.heads.kind!r}"
            )
        if self.heads.fixed and not self.heads.pooled:
            raise ConfigError(f"heads of kind {self.heads.kind!r} are not trained, and without a pooled one nothing is")
        if self.heads.fixed and self.task != "preference":
            raise ConfigError(f"heads of kind {self.heads.kind!r} are for preferences, found task {self.task!r}")


@dataclass(frozen=True)
class Examples:
    """What a batch says, after the backbone.

    Attributes:
        first: [B, D] features; of the first of a pair.
        second: [B, D] of the second of a pair, None where examples are no pairs.
        targets: [B].
        count: what means are taken over.
        groups, weights, numbers: [B] or None, as in `LabelledBatch`.
    """

    first: Tensor
    second: Tensor | None
    targets: Tensor
    count: Tensor | float
    groups: Tensor | None
    weights: Tensor | None
    numbers: Tensor | None

    @property
    def features(self) -> Tensor:
        """[B, D]; differences for pairs."""
        return self.first if self.second is None else self.first - self.second

    def members(self, head: Any) -> Tensor:
        """Return what `head` says [B, H, C]; margins for pairs."""
        if self.second is None:
            outputs: Tensor = head(self.first)
            return outputs
        first, second = head(torch.cat([self.first, self.second])).chunk(2)
        return torch.sub(first, second)


class HyRe(Learner):
    """Learns an ensemble; see the module docstring.

    Args:
        config: of the objective.
        backbone: maps inputs of a `LabelledBatch` to features (`nets/backbones.py`), or a language model with
            `final_states(batch)`, which reads an `ExperienceBatch` with pairs.
        generator: draws heads and shares.
        outputs: C, the number of classes; 1 otherwise.

    Attributes:
        head: the members.
    """

    mean: Tensor
    spread: Tensor
    target_mean: Tensor
    target_spread: Tensor
    share_seed: Tensor

    def __init__(
        self, config: EnsembleConfig, backbone: nn.Module, generator: torch.Generator, outputs: int = 1
    ) -> None:
        super().__init__()
        if (outputs > 1) != (config.task == "classification"):
            raise ConfigError(f"a {config.task} has {'classes' if outputs == 1 else 'one output'}, found {outputs}")
        self.config, self.backbone, self.group_counts = config, backbone, torch.zeros(0, dtype=torch.int64)
        self._known_shares: tuple[Any, Tensor] | None = None
        heads, width = config.heads, width_of(backbone)
        self.head = EnsembleHead(heads, width, outputs, generator)
        # all gates are equal at the beginning
        self.gate = MLP(width, (), heads.num_heads, generator, last_gain=0.0) if config.loss == "mixture" else None
        gaussian = config.task == "regression" and config.noise_model == "gaussian"
        self.log_variance = nn.Parameter(torch.zeros(self.head.trained_members)) if gaussian else None
        self.register_buffer("share_seed", torch.randint(1 << 31, (), generator=generator, device=generator.device))
        # NaN until they are fitted or loaded
        self.reads_numbers = hasattr(backbone, "inputs")
        size = int(backbone.inputs) if self.reads_numbers else width  # type: ignore[arg-type]
        for name, shape in (("mean", (size,)), ("spread", (size,)), ("target_mean", ()), ("target_spread", ())):
            self.register_buffer(name, torch.full(shape, math.nan))

        own = [*self.head.parameters(), *([] if self.gate is None else self.gate.parameters())]
        own += [] if self.log_variance is None else [self.log_variance]
        self.groups = {"heads": Group(tuple(own), config.head_learning_rate, config.weight_decay)}
        if config.frozen:
            backbone.requires_grad_(False)
        elif any(True for _ in backbone.parameters()):
            if heads.kind == "vanilla":
                raise ConfigError("the members of a vanilla ensemble share no trained backbone; set frozen")
            parameters = trainable_of(backbone)
            if not parameters:
                raise ConfigError("hyre: the backbone has no trainable parameter; set frozen, or train it")
            self.groups["backbone"] = Group(parameters, config.learning_rate, config.weight_decay)
        self.plan = (Phase(("heads",), tuple(self.groups)),)

    # before training

    @torch.no_grad()
    def fit_statistics(
        self, batches: Iterable[LabelledBatch | ExperienceBatch], group_counts: Tensor | None = None
    ) -> None:
        """Fit the statistics of features (and of a regression's targets) on training batches; told of groups, too."""
        seen = list(batches)
        values = [x.double().cpu() for batch in seen for x in self._unscaled(batch)]
        normalizer = Normalizer.fit(x.numpy() for x in values)
        spread = normalizer.scale
        if self.config.scaling == "common":
            squares = sum(float((x - normalizer.mean).square().sum()) for x in values)
            common = math.sqrt(squares / sum(x.numel() for x in values))
            spread = torch.full_like(spread, common or 1.0)
        self.mean.copy_(normalizer.mean)
        self.spread.copy_(spread)
        self.target_mean.fill_(0.0)
        self.target_spread.fill_(1.0)
        if self.config.task == "regression":
            targets = torch.cat([batch.targets for batch in seen if isinstance(batch, LabelledBatch)]).double()
            self.target_mean.fill_(float(targets.mean()))
            self.target_spread.fill_(float(targets.std(correction=0)) or 1.0)
        if group_counts is not None:
            self.set_groups(group_counts)

    def set_groups(self, counts: Tensor) -> None:
        """Tell how many training examples each group has, int64 [G]; not saved, so to be told again on a resume."""
        if self.config.shares == "one_group" and len(counts) != self.config.heads.num_heads:
            raise ConfigError(
                f"one head for each group: the data have {len(counts)} groups, found num_heads "
                f"{self.config.heads.num_heads}"
            )
        self.group_counts = counts.to(torch.int64)

    # training

    def loss_heads(self, batch: LabelledBatch | ExperienceBatch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Return the mean of the members' losses, or the mixture's."""
        examples = self.examples(batch)
        members = examples.members(self.head.trained_only)
        losses = self.member_losses(members, examples.targets)
        weights = torch.ones_like(examples.targets) if examples.weights is None else examples.weights
        if self.gate is None:
            seen = self.seen(examples)
            each = (losses * (weights[:, None] if seen is None else weights[:, None] * seen)).sum(0) / examples.count
            loss = each.mean()
            pooled = each[0]
        else:
            mixture, pooled = self._mixture(examples, losses)
            mixture, pooled = ((weights * value).sum() / examples.count for value in (mixture, pooled))
            loss = mixture + pooled
        metrics = {"loss/heads": loss, "adapt/spread": members.detach().std(1, correction=0).mean()}
        if self.config.heads.pooled:
            metrics["loss/pooled"] = pooled
        if self.config.l2:
            loss = loss + self.config.l2 / (2 * self.head.trained_members) * self.head.squares()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def member_losses(self, members: Tensor, targets: Tensor) -> Tensor:
        """Return l(f_k(x), y) [B, H] of the trained members [B, H, C]; a regression's are of standardised targets."""
        if self.config.task == "classification":
            flat = members.flatten(0, 1)
            numbers = targets.long()[:, None].expand(members.shape[:2]).flatten()
            return functional.cross_entropy(flat, numbers, reduction="none").view(members.shape[:2])
        members = members[:, :, 0]
        if self.config.task == "preference":
            return functional.binary_cross_entropy_with_logits(
                members, targets[:, None].expand_as(members), reduction="none"
            )
        squares = (members - ((targets - self.target_mean) / self.target_spread)[:, None]) ** 2
        if self.log_variance is None:
            return squares
        return squares / (2 * self.log_variance.exp()) + self.log_variance / 2

    @torch.no_grad()
    def seen(self, examples: Examples) -> Tensor | None:
        """Return s_k(x) [B, H] of the trained members, or None where all see everything."""
        shares, heads = self.config.shares, self.config.heads
        if shares == "all" or heads.fixed:
            return None
        members = torch.arange(heads.num_heads, device=self.mean.device)
        if shares == "bootstrap":
            if examples.numbers is None:
                raise DataError("a bootstrap needs the examples' numbers, which the batch does not have")
            sees = self._uniform(examples.numbers, members) < self.config.share
            seen = sees.float() / self.config.share
        else:
            if examples.groups is None or len(self.group_counts) == 0:
                raise DataError(f"shares {shares!r} need examples with groups, and set_groups with their sizes")
            # once, for weights that were loaded or groups that were told since are others
            key = (self.share_seed._version, id(self.group_counts), members.device)
            if self._known_shares is None or self._known_shares[0] != key:
                self._known_shares = (key, self._of_groups(members))
            seen = self._known_shares[1][examples.groups]
        return functional.pad(seen, (int(heads.pooled), 0), value=1.0)

    def _of_groups(self, members: Tensor) -> Tensor:
        """Return s_k [G, K] of groups: whole numbers of groups, at least one, the same at every step."""
        counts = self.group_counts.to(members.device)
        total = len(counts)
        if self.config.shares == "one_group":
            sees = torch.eye(total, device=members.device)
        else:
            order = self._uniform(torch.arange(total, device=members.device), members).argsort(0).argsort(0)
            sees = (order < max(1, round(self.config.share * total))).float()
        size = (sees * counts[:, None]).sum(0)
        return sees * (counts.sum() / size.clamp(min=1))

    def _uniform(self, numbers: Tensor, members: Tensor) -> Tensor:
        """Return a number in [0, 1) for every row number [B] and member [K]: a hash of both and `share_seed`."""
        rows = _hash(_hash(numbers & _MASK) ^ self.share_seed)
        return _hash((rows[:, None] + members * 0x9E3779B9) & _MASK).double() / (_MASK + 1)

    def _mixture(self, examples: Examples, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return (-log sum_k g_k p_k - c H(g), the pooled member's loss), each [B]."""
        assert self.gate is not None
        pooled = losses[:, 0] if self.config.heads.pooled else torch.zeros_like(losses[:, 0])
        middle = examples.first if examples.second is None else (examples.first + examples.second) / 2
        log_gate = self.gate(middle).log_softmax(1)
        loss = -torch.logsumexp(log_gate - losses[:, int(self.config.heads.pooled) :], 1)
        entropy = -(log_gate.exp() * log_gate).sum(1)
        return loss - self.config.entropy_weight * entropy, pooled

    # after training

    @torch.no_grad()
    def fit_directions(self, batches: Iterable[LabelledBatch | ExperienceBatch]) -> None:
        """Set the directions of heads of kind pca to those of the pairs' feature differences."""
        self.head.set_directions(torch.cat([self.examples(batch).features for batch in batches]))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[LabelledBatch | ExperienceBatch]) -> None:
        """Fit what standardises members: margins or logits of training data; for a regression, of held-out data.

        A regression's members keep scale 1; the mean square of their residuals becomes `head.variance`.
        """
        members, targets = [], []
        for batch in batches:
            examples = self.examples(batch)
            members.append(self._in_data_units(examples.members(self.head)).cpu())
            targets.append(examples.targets.cpu())
        device, everything = self.mean.device, torch.cat(members)
        if self.config.task == "regression":
            self.head.fit_variance(everything.to(device), torch.cat(targets).to(device))
        else:
            self.head.fit_scale(everything.to(device))

    @torch.no_grad()
    def members(self, batch: LabelledBatch | ExperienceBatch) -> Tensor:
        """Return what every member says [B, H, C], not standardised; margins for pairs, else in the targets' units."""
        return self._in_data_units(self.examples(batch).members(self.head))

    @torch.no_grad()
    def of_features(self, features: Tensor) -> Tensor:
        """Return what every member says of features [N, D]: [N, H, C], standardised, in the targets' units."""
        return self.head.standardise(self._in_data_units(self.head(features)))

    @torch.no_grad()
    def features(self, batch: LabelledBatch | ExperienceBatch) -> Tensor:
        """Return the features [N, D] that members are functions of: of inputs (not `other`), or of all completions."""
        if isinstance(batch, ExperienceBatch):
            return self._scaled(self._states(batch))
        return self._of_inputs(batch.inputs)

    @torch.no_grad()
    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight [H, C, D], bias [H, C]) for which `of_features` is linear, else None."""
        found = self.head.linear()
        if found is None or self.config.task != "regression":
            return found
        weight, bias = found
        return weight * self.target_spread, bias * self.target_spread + self.target_mean

    @torch.no_grad()
    def support(self, batch: LabelledBatch | ExperienceBatch) -> Support:
        """Return a batch's examples as adaptation takes them: standardised members, labels, features, weights."""
        examples = self.examples(batch)
        members = self.head.standardise(self._in_data_units(examples.members(self.head)))
        values = (members, examples.targets, examples.features, examples.weights)
        arrays = [None if x is None else x.double().cpu().numpy().astype(np.float64) for x in values]
        return Support(*arrays)  # type: ignore[arg-type]

    # what a batch says

    def examples(self, batch: LabelledBatch | ExperienceBatch) -> Examples:
        """Return a batch's features, with gradients where they are enabled, and its labels."""
        if isinstance(batch, ExperienceBatch):
            return self._examples_of_completions(batch)
        first, second = self._of_inputs(batch.inputs), None
        if self.config.task == "preference":
            if batch.other is None:
                raise DataError("preferences are of pairs, and the examples have no second one (`other`)")
            second = self._of_inputs(batch.other)
        return Examples(first, second, batch.targets, float(len(batch)), batch.groups, batch.weights, batch.numbers)

    def _examples_of_completions(self, batch: ExperienceBatch) -> Examples:
        if batch.pairs is None or self.config.task != "preference":
            raise ConfigError(f"completions teach preferences, from pairs; found task {self.config.task!r}")
        states = self._scaled(self._states(batch))
        return Examples(
            states[batch.pairs[:, 0]],
            states[batch.pairs[:, 1]],
            torch.ones(len(batch.pairs), device=states.device),
            float(len(batch.pairs)) if batch.counts is None else batch.counts[2],
            getattr(batch, "groups", None),
            batch.pair_weights,
            getattr(batch, "numbers", None),
        )

    def _states(self, batch: ExperienceBatch) -> Tensor:
        if not reads_completions(self.backbone):
            raise ConfigError(f"{type(self.backbone).__name__} reads labelled inputs, found a batch of completions")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            return final_states(self.backbone, batch).float()

    def _of_inputs(self, inputs: Tensor) -> Tensor:
        if reads_completions(self.backbone):
            raise ConfigError("a language model reads completions (ExperienceBatch), found a batch of labelled inputs")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            if self.reads_numbers:
                features: Tensor = self.backbone(self._scaled(inputs))
                return features
            return self._scaled(self.backbone(inputs).float())

    def _scaled(self, values: Tensor) -> Tensor:
        if not self._fitted():
            raise ConfigError("hyre: the statistics of the features are missing; call fit_statistics, or load them")
        return (values - self.mean) / self.spread

    def _fitted(self) -> bool:
        return not bool(self.mean[0].isnan())

    def _unscaled(self, batch: LabelledBatch | ExperienceBatch) -> list[Tensor]:
        """Return what statistics are fitted on: inputs of backbones that read numbers, else features."""
        if isinstance(batch, ExperienceBatch):
            return [self._states(batch)]
        sides = [batch.inputs] if batch.other is None else [batch.inputs, batch.other]
        return sides if self.reads_numbers else [self.backbone(side).float() for side in sides]

    def _in_data_units(self, members: Tensor) -> Tensor:
        return members * self.target_spread + self.target_mean if self.config.task == "regression" else members


_MASK = (1 << 32) - 1


def _hash(x: Tensor) -> Tensor:
    """Return a 32-bit mix of non-negative int64 below 2^32 (xor-shift and multiply, twice)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
