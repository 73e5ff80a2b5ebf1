r"""Policies and critics as heads: one hypothesis per group of the prior data, at the price of one network.

The ensemble that `adapt/control.py` re-weights, after Lee et al., "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812), whose members are reward models. Here a group is what a robot may meet: dynamics, a goal, a
demonstrator. Head k = 1..K sees group k - 1 alone, head 0 (the pooled one) sees everything; the layers below them, one
stack each for the actor, V and A, see everything.

    L_\pi = (1/H) \sum_k E_k[ |\mu_k(s) - a|^2 ]
    L_V   = (1/H) \sum_k E_k[ |\tau - 1(u < 0)| u^2 ],  u = G - V_k(s)
    L_A   = (1/H) \sum_k E_k[ (r + \gamma m V_k(s') - V_k(s) - A_k(s, a))^2 ],  Q_k = V_k + A_k

| symbol | code |
|---|---|
| E_k | mean over the batch's rows of member k |
| G | the data's return-to-go |
| \tau, \gamma, m | `expectile`, `discount`, the batch's masks |

It is the mean of the members' losses, so that every member stands alone. \mu is not squashed: linear heads over the
same features stay linear, and so does every combination of them; the box is enforced where a combination acts.

Differences from other methods of the library: \mu is BC with a squared error. V regresses on returns that the data
obtained rather than on Q, and Q is one Bellman backup of it: with \tau = 1/2 the value of the demonstrators, one step
of improvement over whom is what acting greedily on Q amounts to. Nothing bootstraps, so nothing diverges. The advantage
has heads of its own, in units of one step's share of a return, which is all that an action changes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steelyard.config import require_positive, require_range
from steelyard.data.episode import Spec
from steelyard.data.grouped import GroupedTransitions
from steelyard.data.normalize import Normalizer
from steelyard.errors import DataError
from steelyard.nets.ensemble import EnsembleHead, HeadsConfig
from steelyard.nets.mlp import MLP
from steelyard.nets.policies import Memoryless
from steelyard.objectives.actor_critic import DataStatistics, action_box, continuous_action_size, observation_size
from steelyard.objectives.base import Group, Learner, Metrics, ObjectiveConfig, Phase
from steelyard.objectives.losses import expectile_loss


@dataclass(frozen=True)
class ControlHeadsConfig(ObjectiveConfig):
    """Policy heads and critic heads, one a group."""

    kind: Literal["control_heads"] = "control_heads"
    """Objective."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the layers that the heads share."""
    heads: Literal["linear", "mlp"] = "linear"
    """What a head is."""
    head_hidden: int = 16
    """Units of the hidden layer of mlp heads."""
    learning_rate: float = 1e-3
    """Adam's rate."""
    discount: float = 0.98
    """gamma, per step."""
    expectile: float = 0.5
    """tau: 0.5 is the mean of the returns, towards 1 the best of them."""
    critics: bool = True
    """Also learn V and A."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "hidden", "head_hidden", "learning_rate")
        require_range(self, 0, 1, "discount", "expectile")


class _Heads(nn.Module):
    """Shared layers and what stands on them: [B, D] -> [B, H, C]."""

    def __init__(self, config: ControlHeadsConfig, inputs: int, outputs: int, groups: int, g: torch.Generator) -> None:
        super().__init__()
        *hidden, width = config.hidden
        self.trunk = MLP(inputs, hidden, width, g, last_gain=math.sqrt(2))
        heads = HeadsConfig(num_heads=groups, kind=config.heads, hidden=config.head_hidden)
        self.head = EnsembleHead(heads, width, outputs, g)

    def features(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.trunk(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        members: Tensor = self.head(self.features(inputs))
        return members


class ControlHeads(Learner):
    """Learns the heads; see the module docstring.

    Args:
        spec: of observations and actions.
        config: of the objective.
        statistics: of the prior data.
        num_groups: K.
        generator: draws the weights.
    """

    return_mean: Tensor
    return_scale: Tensor

    def __init__(
        self,
        spec: Spec,
        config: ControlHeadsConfig,
        statistics: DataStatistics,
        num_groups: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config, self.num_groups = config, num_groups
        observations, actions = observation_size(spec), continuous_action_size(spec)
        self.normalizer = Normalizer(statistics.observation_mean.clone(), statistics.observation_scale.clone())
        self.box = action_box(spec)
        self.actor = _Heads(config, observations, actions, num_groups, generator)
        parts: dict[str, nn.Module] = {"actor": self.actor}
        if config.critics:
            self.value = _Heads(config, observations, 1, num_groups, generator)
            self.critic = _Heads(config, observations + actions, 1, num_groups, generator)
            parts |= {"value": self.value, "critic": self.critic}
        # what V's heads say is in these units, so that one learning rate suits any rewards; A's in those of one step
        self.register_buffer("return_mean", torch.tensor(float(statistics.mean_return)))
        self.register_buffer("return_scale", torch.tensor(abs(float(statistics.mean_return)) or 1.0))
        self.step_scale = (1 - config.discount) or 1.0
        self.groups = {name: Group(tuple(part.parameters()), config.learning_rate) for name, part in parts.items()}
        self.plan = tuple(Phase((name,), (name,)) for name in parts)

    @property
    def num_members(self) -> int:
        """H: the groups, and the pooled head."""
        return self.num_groups + 1

    def prepare(self, batch: GroupedTransitions) -> GroupedTransitions:
        """Normalise observations, scale actions to [-1, 1]."""
        if not isinstance(batch, GroupedTransitions) or batch.groups is None:
            raise DataError("control_heads needs to know the group of every transition")
        return dataclasses.replace(
            batch,
            observations=self.normalizer(batch.observations),
            next_observations=self.normalizer(batch.next_observations),
            actions=self.box(batch.actions).clamp(-1, 1),
        )

    def loss_actor(self, batch: GroupedTransitions, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Squared error of every member at the actions that it sees."""
        errors = (self.actor(batch.observations) - batch.actions[:, None]).square().sum(-1)
        return self._mean_loss(errors, batch, "actor")

    def loss_value(self, batch: GroupedTransitions, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Expectile regression of V on returns-to-go."""
        returns = (batch.returns_to_go - self.return_mean) / self.return_scale
        errors = expectile_loss(returns[:, None] - self.value(batch.observations)[..., 0], self.config.expectile)
        return self._mean_loss(errors, batch, "value")

    def loss_critic(self, batch: GroupedTransitions, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Squared error of A against what one step changes of the same member's V."""
        with torch.no_grad():
            before, after = (self._v(states) for states in (batch.observations, batch.next_observations))
            target = batch.rewards[:, None] + self.config.discount * batch.masks[:, None] * after - before
            target = target / (self.return_scale * self.step_scale)
        said = self.critic(torch.cat([batch.observations, batch.actions], -1))[..., 0]
        return self._mean_loss((said - target).square(), batch, "critic")

    def _mean_loss(self, errors: Tensor, batch: GroupedTransitions, name: str) -> tuple[Tensor, Metrics]:
        """Return the mean over members of the mean error [B, H] over the rows that each sees."""
        assert batch.groups is not None
        seen = torch.nn.functional.one_hot(batch.groups + 1, self.num_members).to(errors.dtype)
        seen[:, 0] = 1
        losses = (errors * seen).sum(0) / seen.sum(0).clamp(min=1)
        return losses.mean(), {f"loss/{name}": losses.mean().detach(), f"loss/{name}_pooled": losses[0].detach()}

    def _v(self, normalized: Tensor) -> Tensor:
        """Return V [B, H] in units of rewards."""
        members: Tensor = self.value(normalized)[..., 0]
        return members * self.return_scale + self.return_mean

    @torch.no_grad()
    def member_actions(self, observations: Tensor) -> Tensor:
        """Return what every policy head would do [B, H, A], in box units, for raw observations [B, O]."""
        members: Tensor = self.actor(self.normalizer(observations))
        return members

    @torch.no_grad()
    def features(self, observations: Tensor) -> Tensor:
        """Return what the policy heads stand on [B, D] for raw observations [B, O]."""
        return self.actor.features(self.normalizer(observations))

    @torch.no_grad()
    def member_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q [B, J, H] of every critic head for raw observations [B, O] and actions [B, J, A] in box units."""
        states = self.normalizer(observations)
        inputs = torch.cat([states[:, None].expand(-1, actions.shape[1], -1), actions], -1)
        advantages: Tensor = self.critic(inputs.flatten(0, 1))[..., 0].view(*actions.shape[:2], -1)
        return self._v(states)[:, None] + advantages * self.return_scale * self.step_scale

    @torch.no_grad()
    def member_v(self, observations: Tensor) -> Tensor:
        """Return V [B, H] of every critic head for raw observations [B, O]."""
        return self._v(self.normalizer(observations))

    def policy(self) -> PooledPolicy:
        """Return the pooled head's policy."""
        return PooledPolicy(self)


class PooledPolicy(Memoryless):
    """Acts as the pooled head does, without noise."""

    def __init__(self, learner: ControlHeads) -> None:
        self.learner = learner

    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        """Return actions [B, A] in the environment's units for raw observations [B, O]."""
        return self.learner.box.inverse(self.learner.member_actions(observations)[:, 0].clamp(-1, 1))
