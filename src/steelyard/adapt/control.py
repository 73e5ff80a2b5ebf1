r"""HyRe for agents: policies or critics as hypotheses, re-weighted by a few steps of an environment that has changed.

After Lee et al., "Test-Time Alignment via Hypothesis Reweighting" (arXiv 2412.08812), who re-weight reward models. An
agent's ensemble becomes a `Support` here, the call is the same `adapt(method, support)`, and its `Combination` acts:

| members | a labelled example | member k says | the label |
|---|---|---|---|
| `PolicyHeads` | one number of a demonstrated action | \mu_k(s) | a |
| `CriticHeads`, by "td" | one rewarded step | Q_k(s, a) - \gamma m V_k(s') | r |
| `CriticHeads`, by "return" | one step and the return that followed | Q_k(s, a) | G |

The second row reads the Bellman equation as a prediction of the reward: its squared error is the squared TD error of
member k, and it is linear in the critics, so every method that ends in a combination applies. It needs no
demonstrator. It says little where hypotheses agree on every single step: critics for different goals do, away from
the goals. The third row tells those apart, but needs returns of a behaviour like the one that the critics value.

An action of A numbers is A examples, so that a member's loss is the likelihood of the whole action: N steps of a policy
give a support of N A examples, step after step.

Members come from one learner with heads (`objectives/control_heads.py`), from the critics of one run (EDAC's ten, say),
or from several ordinary runs: `reweight_policies(["runs/a", "runs/b"], steps)`.

Shapes: B or N steps, H members, A action size, J candidate actions, D features. Box units: actions in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steelyard.adapt.base import Adapted, Combination, Floats, Method, Support
from steelyard.adapt.losses import GaussianNLL
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.artefact import ControlArtefact, load_learner
from steelyard.data.batch import TransitionBatch
from steelyard.data.normalize import BoxScaler
from steelyard.data.returns import RewardConfig
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store
from steelyard.errors import ConfigError
from steelyard.nets.critics import Critic
from steelyard.nets.policies import Memoryless
from steelyard.objectives.actor_critic import ActorCritic, action_box, observation_size
from steelyard.objectives.base import Learner
from steelyard.objectives.control_heads import ControlHeads
from steelyard.rng import torch_generator

Judge = Literal["td", "return"]
CANDIDATES = 32
"""Actions that a critic chooses from."""


@dataclass(frozen=True)
class PolicyHeads:
    """An ensemble of policies over one action box.

    Attributes:
        actions: raw observations [B, O] -> what every member would do [B, H, A], in box units.
        box: between the environment's actions and box units.
        names: of the members [H].
        features: raw observations [B, O] -> [B, D], for methods that use them; None: those refuse.
    """

    actions: Callable[[Tensor], Tensor]
    box: BoxScaler
    names: tuple[str, ...]
    features: Callable[[Tensor], Tensor] | None = None

    def members(self, observations: Tensor) -> Floats:
        """Return [B A, H, 1]: what every member says of every number of an action."""
        return _flat(self.actions(observations))

    def support(self, steps: TransitionBatch) -> Support:
        """Return labelled examples [N A] of steps whose actions a demonstrator chose."""
        labels = self.box(steps.actions).clamp(-1, 1).flatten()
        features = self._features(steps.observations)
        return Support(self.members(steps.observations), _numpy(labels), features)

    def policy(self, combination: Combination) -> CombinedPolicy:
        """Return the policy that acts by a combination of the members."""
        return CombinedPolicy(self, combination)

    def _features(self, observations: Tensor) -> Floats | None:
        """Return [N A, A D]: the features of each number of an action stand in a block of its own."""
        if self.features is None:
            return None
        found, size = _numpy(self.features(observations)), len(self.box.low)
        blocks: Floats = np.einsum("nd,ab->nabd", found, np.eye(size)).reshape(len(found) * size, found.shape[1] * size)
        return blocks


class CombinedPolicy(Memoryless):
    """Acts by a combination of policies, moved into the action box; deterministic in both modes."""

    def __init__(self, heads: PolicyHeads, combination: Combination) -> None:
        self.heads, vector = heads, combination.vector
        self.coefficients = torch.from_numpy(combination.coefficients).float()
        # [1, A D] with the numbers of an action in blocks (`PolicyHeads.support`) -> [D, A]
        self.vector = None if vector is None else torch.from_numpy(vector).float().view(len(heads.box.low), -1).mT

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        """Return actions [B, A] in the environment's units for raw observations [B, O]."""
        members = self.heads.actions(observations)
        actions = torch.einsum("bha,h->ba", members, self.coefficients)
        if self.vector is not None:
            if self.heads.features is None:
                raise ConfigError("this adaptation is a function of features too, and these policies have none")
            actions = actions + self.heads.features(observations) @ self.vector
        return self.heads.box.inverse(actions.clamp(-1, 1))


@dataclass(frozen=True)
class CriticHeads:
    """An ensemble of critics over one action box.

    Attributes:
        q: raw observations [B, O], actions [B, J, A] in box units -> Q [B, J, H].
        v: raw observations [B, O] -> V [B, H], the value of going on from there.
        box: between the environment's actions and box units.
        discount: gamma.
        names: of the members [H].
        proposals: raw observations [B, O] -> further candidate actions [B, J', A] in box units, besides random ones.
    """

    q: Callable[[Tensor, Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    box: BoxScaler
    discount: float
    names: tuple[str, ...]
    proposals: Callable[[Tensor], Tensor] | None = None

    def support(self, steps: TransitionBatch, by: Judge = "td") -> Support:
        """Return examples [N] of rewarded steps: each is judged by its reward, or by the return that followed.

        Args:
            steps: rewards and returns in the units of training (scale and bias included).
            by: what members are judged by.
        """
        actions = self.box(steps.actions).clamp(-1, 1)[:, None]
        said = self.q(steps.observations, actions)[:, 0]
        if by == "return":
            return Support(_numpy(said)[..., None], _numpy(steps.returns_to_go))
        said = said - self.discount * steps.masks[:, None] * self.v(steps.next_observations)
        return Support(_numpy(said)[..., None], _numpy(steps.rewards))

    def policy(self, combination: Combination, candidates: int = CANDIDATES) -> GreedyPolicy:
        """Return the policy that takes the best of `candidates` random actions and the proposals.

        Raises:
            ConfigError: the combination is one of features too, which critics have none of.
        """
        if combination.vector is not None:
            raise ConfigError("critics are combined by coefficients alone; this adaptation is one of features too")
        return GreedyPolicy(self, combination, candidates)


class GreedyPolicy(Memoryless):
    """Takes the candidate action that the combined critic values most; both modes draw the same candidates."""

    def __init__(self, heads: CriticHeads, combination: Combination, candidates: int) -> None:
        self.heads, self.candidates = heads, candidates
        self.coefficients = torch.from_numpy(combination.coefficients).float()

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        """Return actions [B, A] in the environment's units for raw observations [B, O]."""
        shape = (len(observations), self.candidates, len(self.heads.box.low))
        actions = torch.rand(shape, generator=generator) * 2 - 1
        if self.heads.proposals is not None:
            actions = torch.cat([actions, self.heads.proposals(observations).clamp(-1, 1)], 1)
        best = (self.heads.q(observations, actions) @ self.coefficients).argmax(1)
        return self.heads.box.inverse(actions[torch.arange(len(best)), best])


def policy_heads(learner: ControlHeads) -> PolicyHeads:
    """Return the policies of a learner with heads; member 0 is the pooled one."""
    return PolicyHeads(learner.member_actions, learner.box, _names(learner), learner.features)


def critic_heads(learner: ControlHeads) -> CriticHeads:
    """Return the critics of a learner with heads; what its policy heads would do is among the candidates."""
    if not learner.config.critics:
        raise ConfigError("this learner was trained without critics")
    config = learner.config
    return CriticHeads(
        learner.member_q, learner.member_v, learner.box, config.discount, _names(learner), learner.member_actions
    )


def load_policies(paths: Sequence[str | Path]) -> PolicyHeads:
    """Read an ensemble of policies, one a run, checkpoint or pretrained/ directory.

    Raises:
        ConfigError: a policy that remembers its last steps, or discrete actions.
        DataError: runs with different observations or actions.
    """
    found = _load(paths)
    policies = [learner.policy() for learner, _ in found]
    for path, policy in zip(paths, policies, strict=True):
        if not isinstance(policy, Memoryless):
            raise ConfigError(f"{path}: a policy that remembers its last steps cannot be re-weighted step by step")
    box = action_box(found[0][1].spec)

    def actions(observations: Tensor) -> Tensor:
        generator = torch_generator(0, "members")
        return torch.stack([box(policy.act(observations, generator, "mean")) for policy in policies], 1)

    return PolicyHeads(actions, box, tuple(map(str, paths)))


def load_critics(paths: Sequence[str | Path]) -> CriticHeads:
    """Read an ensemble of critics: the members of one run's critic, or one a run (its least Q) where there are several.

    V is the run's own value function, where it has one, else Q of the action that its policy takes. What the policies
    would do is among the candidates.

    Raises:
        ConfigError: a run without a critic of single actions, or runs with different discounts.
        DataError: runs with different observations or actions.
    """
    found = _load(paths)
    agents = [_Agent(learner, artefact, path) for (learner, artefact), path in zip(found, paths, strict=True)]
    if len({agent.discount for agent in agents}) > 1:
        raise ConfigError(f"critics of different discounts: {[agent.discount for agent in agents]}")
    box = action_box(found[0][1].spec)
    several = len(agents) > 1

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        members = [agent.q(observations, box.inverse(actions)) for agent in agents]
        return torch.stack([one.amin(0) for one in members], -1) if several else members[0].movedim(0, -1)

    def v(observations: Tensor) -> Tensor:
        members = [agent.v(observations) for agent in agents]
        return torch.stack([one.amin(0) for one in members], -1) if several else members[0].mT

    def proposals(observations: Tensor) -> Tensor:
        return torch.stack([box(agent.actions(observations)) for agent in agents], 1)

    one = agents[0].critic.num_critics
    names = tuple(map(str, paths)) if several else tuple(f"critic {number}" for number in range(one))
    return CriticHeads(q, v, box, agents[0].discount, names, proposals)


def reweight_policies(
    paths: Sequence[str | Path], steps: TransitionBatch, method: Method | None = None
) -> tuple[CombinedPolicy, Adapted]:
    """Combine the policies of several runs by a few demonstrated steps of the environment to act in.

    Args:
        paths: run directories, checkpoints or pretrained/ directories.
        steps: what the demonstrator saw and did (`transitions`).
        method: of adaptation; None: `default_method`.
    """
    heads = load_policies(paths)
    support = heads.support(steps)
    adapted = adapt(method or default_method(support), support)
    return heads.policy(adapted.combination), adapted


def reweight_critics(
    paths: Sequence[str | Path], steps: TransitionBatch, by: Judge = "td", method: Method | None = None
) -> tuple[GreedyPolicy, Adapted]:
    """Combine critics by a few rewarded steps of the environment to act in; the policy acts greedily on the result.

    Args:
        paths: one run, whose critics are the members, or several.
        steps: rewarded steps (`transitions`).
        by: what critics are judged by.
        method: of adaptation; None: `default_method`.
    """
    heads = load_critics(paths)
    support = heads.support(steps, by)
    adapted = adapt(method or default_method(support), support)
    return heads.policy(adapted.combination), adapted


def default_method(support: Support) -> HyRe:
    """Return HyRe with the members' own disagreement as the variance of labels: a scale where no other is known.

    A variance of the environment's or the demonstrator's noise, or an eta chosen on held-out shifts, is better.
    """
    spread = float(support.members.var(1).mean())
    return HyRe(GaussianNLL(spread or 1.0))


def transitions(store: Store, rewards: RewardConfig | None = None, discount: float = 0.99) -> TransitionBatch:
    """Return all steps of a small store, with rewards and returns as a run with these settings sees them."""
    source = OfflineSource(store, rewards or RewardConfig(), discount, 1, 0)
    return source.gather(np.arange(store.num_steps))


class _Agent:
    """Critic, V and policy of a loaded run, on raw observations and actions."""

    def __init__(self, learner: Learner, artefact: ControlArtefact, path: str | Path) -> None:
        nets: Any = getattr(learner, "nets", None)
        critic = getattr(nets, "critic", None)
        size = observation_size(artefact.spec) + len(artefact.spec.actions.low or ())
        if not isinstance(nets, ActorCritic) or not isinstance(critic, Critic) or _inputs(critic) != size:
            raise ConfigError(f"{path}: objective {artefact.objective.kind!r} has no critic of single actions")
        self.nets, self.critic, self.discount = nets, critic, float(artefact.objective.discount)
        self.value: Any = getattr(learner, "value", None)
        self._policy = learner.policy()

    @torch.no_grad()
    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q [E, B, J] of raw actions [B, J, A]."""
        q: Tensor = self.critic(self.nets.normalizer(observations), self.nets.box(actions))
        return q

    @torch.no_grad()
    def v(self, observations: Tensor) -> Tensor:
        """Return V [E, B]."""
        if self.value is None:
            return self.q(observations, self.actions(observations)[:, None])[..., 0]
        value: Tensor = self.value(self.nets.normalizer(observations))
        return value.expand(self.critic.num_critics, -1)

    def actions(self, observations: Tensor) -> Tensor:
        """Return what the policy does [B, A]."""
        return self._policy.act(observations, torch_generator(0, "members"), "mean")


def _load(paths: Sequence[str | Path]) -> list[tuple[Learner, ControlArtefact]]:
    """Read learners and check that they see and do the same."""
    if not paths:
        raise ConfigError("an ensemble needs at least one run")
    found = [load_learner(path) for path in paths]
    for (_, artefact), path in zip(found, paths, strict=True):
        if artefact.spec.num_actions is not None:
            raise ConfigError(f"{path}: re-weighting agents is for continuous actions; these are discrete")
        found[0][1].spec.require_match(artefact.spec, str(paths[0]), str(path))
    return found


def _inputs(critic: Critic) -> int:
    first = next(critic.parameters())
    return int(first.shape[1])


def _names(learner: ControlHeads) -> tuple[str, ...]:
    return ("pooled", *(f"group {number}" for number in range(learner.num_groups)))


def _flat(members: Tensor) -> Floats:
    """[B, H, A] -> [B A, H, 1], step after step."""
    return _numpy(members.mT.reshape(-1, members.shape[1], 1))


def _numpy(values: Tensor) -> Floats:
    found: Floats = values.detach().cpu().double().numpy()
    return found
