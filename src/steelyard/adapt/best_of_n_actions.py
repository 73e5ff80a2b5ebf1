r"""Adaptive best-of-N actions: a policy draws candidates one after the other, a critic values them, and drawing stops.

After Manvi, Singh, Ermon, "Adaptive Inference-Time Compute" (arXiv 2410.02725), with an agent for the language model:
the prompt is a state s, a sample an action (or a chunk of h actions) a ~ \pi(.|s), and the answer the candidate with
the highest Q(s, a). The same `ComputePolicy` says at which temperatures to draw, in which waves, when to stop and how
many at most; the score, P(no fresh draw would be better), comes from the distribution of the critic's own values in
this state (`adapt/action_values.py`). A temperature multiplies the noise that a draw is made from; 0 is the policy's
mode.

| `ComputePolicy` | what it is here |
|---|---|
| stop "never", max_samples K | fixed best-of-K: QC, BFN, IDQL |
| stop "threshold" | until the best is better than a share `threshold` of the policy's actions in this state |
| stop "expected_gain" | until `gain` E[(Q' - b)^+] < `cost`: `cost` is the price of a draw in units of Q |
| judge `Coins` and "threshold" | stops by chance, as often as the threshold would with perfect knowledge |

Threshold is blind to what is at stake: with known distributions it draws 1 / (1 - threshold) candidates on average in
every state, and only spends them where the first ones were poor. Expected gain also asks how far values lie apart.

Differences from the paper: nothing is pruned, for a candidate is drawn in one piece; the evaluator reads the state and
the value of the best candidate, not the candidate itself; the gain is in units of Q and differs from state to state.

A candidate is a function of (generator, row, number) only: neither the rule nor what other rows do changes it.

Shapes: B states, O observation, K or k candidates, h chunk length, A action size, N = h A + 1 random numbers a draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steelyard.adapt.action_values import Calibration, Judge, ValueQuantilesConfig, fit_value_quantiles
from steelyard.adapt.compute_policy import Budget, ComputePolicy, StopRule, TemperatureSchedule
from steelyard.artefact import load_learner
from steelyard.bench.evaluate import evaluate
from steelyard.data.normalize import BoxScaler
from steelyard.envs.gym import VectorEnv
from steelyard.errors import ConfigError
from steelyard.nets.chunk_policy import ChunkPolicy
from steelyard.nets.critics import Critic
from steelyard.nets.policies import tanh_gaussian_sample
from steelyard.objectives.actor_critic import ActorCritic
from steelyard.objectives.base import Learner, Policy
from steelyard.objectives.bc import BC
from steelyard.objectives.fql import FQL
from steelyard.objectives.qc import QC
from steelyard.rng import torch_generator

PROBE = 4
"""Candidates of the policy whose states the judge learns from."""


@dataclass(frozen=True)
class ActionAgent:
    """A policy that can be drawn from and a critic that values what was drawn.

    Attributes:
        draw: raw observations [B, O], normal noise [B, K, h A] -> actions [B, K, h A] in box units; noise 0: the mode.
        value: raw observations [B, O], actions [B, K, h A] in box units -> values [B, K].
        box: between the environment's actions and box units.
        chunk_length: h.
    """

    draw: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    box: BoxScaler
    chunk_length: int = 1

    @property
    def noise_size(self) -> int:
        """Numbers of a draw, h A."""
        return self.chunk_length * len(self.box.low)

    @torch.no_grad()
    def values(self, observations: Tensor, generator: torch.Generator, count: int) -> Tensor:
        """Return the values [B, count] of fresh draws at temperature 1."""
        noise = torch.randn((len(observations), count, self.noise_size), generator=generator)
        return self.value(observations, self.draw(observations, noise))


@dataclass(frozen=True)
class Choice:
    """What was chosen in B states.

    Attributes:
        actions: [B, h A], in box units.
        values: of them, [B].
        drawn: candidates drawn and valued, int64 [B].
        no_better: P(no fresh draw is better) as the judge had it at the end, [B]; NaN without a judge.
    """

    actions: Tensor
    values: Tensor
    drawn: Tensor
    no_better: Tensor


class BestOfNActions(ChunkPolicy):
    """Plays the best of as many candidates as the rules ask for: a policy like any other (`bench.evaluate`).

    Both modes draw: a deterministic policy is `compute_fixed(1, temperature=0)`. With chunks of one action it looks
    at every step.

    Attributes:
        drawn: candidates drawn by the last call of `act` for every row, int64 [B]; 0 where a chunk was being played.
    """

    def __init__(self, agent: ActionAgent, compute: ComputePolicy, judge: Judge | None = None) -> None:
        """Make the policy.

        Raises:
            ConfigError: a rule that needs a judge without one, or a part of `compute` that actions do not have.
        """
        super().__init__(self._chunks_of, agent.chunk_length)
        if compute.stop.kind != "never" and judge is None:
            raise ConfigError(f"stop rule {compute.stop.kind!r} needs a judge of fresh draws; none was given")
        if compute.prune.kind != "none" or compute.budget.max_tokens is not None:
            raise ConfigError("actions are drawn in one piece: neither prune nor budget.max_tokens applies to them")
        self.agent, self.compute, self.judge = agent, compute, judge
        self.drawn = torch.zeros(0, dtype=torch.int64)
        self._asked = self.drawn

    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        """Return actions [B, A] in the environment's units for raw observations [B, O]."""
        self._asked = torch.zeros(0, dtype=torch.int64)
        actions = super().act(observations, generator, mode)
        self.drawn = torch.zeros(len(observations), dtype=torch.int64)
        self.drawn[self._played == 1] = self._asked  # a chunk's first action: these rows were asked, in this order
        return actions

    def _chunks_of(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        choice = self.choose(observations, generator)
        self._asked = choice.drawn
        chunks: Tensor = self.agent.box.inverse(choice.actions.view(len(observations), self.chunk_length, -1))
        return chunks

    @torch.no_grad()
    def choose(self, observations: Tensor, generator: torch.Generator) -> Choice:
        """Draw candidates for raw observations [B, O] until the rules are content, and return the best."""
        rows, size, compute = len(observations), self.agent.noise_size, self.compute
        best = torch.full((rows,), -torch.inf)
        actions, no_better = torch.zeros(rows, size), torch.full((rows,), torch.nan)
        drawn = torch.zeros(rows, dtype=torch.int64)
        known = None if self.judge is None else self.judge.read(observations)
        values, coins = torch.zeros(rows, 0), torch.zeros(rows, 0)
        live, wave = torch.arange(rows), 0
        while len(live):
            first = values.shape[1]
            count = min(compute.wave(wave), compute.budget.max_samples - first)
            # for all rows and one number after the other, so that a draw does not depend on rules or waves
            noise = torch.stack([torch.randn((rows, size + 1), generator=generator) for _ in range(count)], 1)
            heat = torch.tensor([compute.temperatures.of(first + number) for number in range(count)])
            here = observations[live]
            found = self.agent.draw(here, noise[live, :, :size] * heat[:, None])
            new = torch.full((rows, count), -torch.inf)
            new[live] = self.agent.value(here, found)
            values = torch.cat([values, new], 1)
            coins = torch.cat([coins, torch.special.ndtr(noise[..., size])], 1)
            top, index = new[live].max(1)
            improved = top > best[live]
            better_rows = live[improved]
            best[better_rows] = top[improved]
            actions[better_rows] = found[improved, index[improved]]
            drawn[live] += count
            wave += 1
            done = torch.full((len(live),), first + count >= compute.budget.max_samples)
            if self.judge is not None and known is not None:
                score, gain = self.judge.judge(known[live], values[live], coins[live])
                no_better[live] = score
                done |= stops(compute.stop, score, gain, first + count)
            live = live[~done]
        return Choice(actions, best, drawn, no_better)


def stops(rule: StopRule, no_better: Tensor, gain: Tensor, drawn: int | Tensor) -> Tensor:
    """Return which states [B] are done: `StopRule.stops` for many, with each state's own expected gain.

    Args:
        rule: when enough is enough.
        no_better: P(no fresh draw is better than the best) [B].
        gain: E[(Q' - b)^+] [B], in units of Q: (P(better) times the mean gain of a better one).
        drawn: candidates so far.
    """
    if rule.kind == "never":
        return torch.zeros_like(no_better, dtype=torch.bool)
    shrink = rule.prior_strength / (rule.prior_strength + drawn - 1) if rule.prior_strength else 1.0
    if rule.kind == "expected_gain":
        return gain * shrink * rule.gain < rule.cost
    return 1 - (1 - no_better) * shrink >= rule.threshold


def compute_fixed(count: int, temperature: float = 1.0) -> ComputePolicy:
    """Return best of `count` at once; a single draw at temperature 0 is the policy's mode."""
    never, constant = StopRule("never"), TemperatureSchedule("constant", temperature)
    return ComputePolicy(constant, never, budget=Budget(count), waves=(count,))


def compute_adaptive(stop: StopRule, most: int, waves: tuple[int, ...] = (1,)) -> ComputePolicy:
    """Return drawing at temperature 1 until `stop`, or until there are `most`."""
    return ComputePolicy(TemperatureSchedule("constant"), stop, budget=Budget(most), waves=waves)


@torch.no_grad()
def matched(
    agent: ActionAgent, judge: Judge, compute: ComputePolicy, observations: Tensor, mean: float, seed: int
) -> ComputePolicy:
    """Return `compute` with the threshold, or the cost, at which it draws `mean` candidates a state on average.

    Every state is drawn to the end once; what each threshold would have drawn is read off these draws.

    Args:
        agent: draws and values.
        judge: of fresh draws.
        compute: rules; the number that is searched is replaced.
        observations: raw states [B, O] to average over.
        mean: candidates, between the first wave and the budget.
        seed: of the draws.

    Raises:
        ConfigError: the rule has no such number, or none reaches that mean.
    """
    _check(compute, mean)
    rule, most = compute.stop, compute.budget.max_samples
    noise = torch.randn((len(observations), most, agent.noise_size + 1), generator=torch_generator(seed, "match"))
    heat = torch.tensor([compute.temperatures.of(number) for number in range(most)])
    values = agent.value(observations, agent.draw(observations, noise[..., :-1] * heat[:, None]))
    coins, known = torch.special.ndtr(noise[..., -1]), judge.read(observations)
    ends = [min(most, compute.wave(0))]
    while ends[-1] < most:
        ends.append(min(most, ends[-1] + compute.wave(len(ends))))
    judged = [judge.judge(known, values[:, :end], coins[:, :end]) for end in ends]

    def with_number(number: float) -> StopRule:
        if rule.kind == "threshold":
            return dataclasses.replace(rule, threshold=number)
        return dataclasses.replace(rule, cost=number)

    def average(number: float) -> float:
        tried, drawn = with_number(number), torch.full((len(values),), float(most))
        for end, (score, gain) in zip(reversed(ends), reversed(judged), strict=True):
            drawn[stops(tried, score, gain, end)] = end
        return float(drawn.mean())

    if rule.kind == "threshold":
        low, high = 0.0, 1.01  # draws grow with the threshold
    else:  # and fall with the cost: the largest gain in sight is more than any draw can bring
        low, high = rule.gain * float(judged[0][1].max()) + 1e-9, 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) <= mean else (low, middle)
    reached = average(low)
    if reached < mean / 1.5:  # a judge that is as sure of everything has no number in between
        raise ConfigError(
            f"no {rule.kind} draws about {mean:g} candidates on average: {reached:.2f} or {average(high):.2f}; the "
            "judge does not tell these values apart, train it for longer"
        )
    return dataclasses.replace(compute, stop=with_number(low))


def _check(compute: ComputePolicy, mean: float) -> None:
    most = compute.budget.max_samples
    if compute.stop.kind == "never":
        raise ConfigError("stop rule 'never' draws the whole budget: there is nothing to match")
    if not min(compute.wave(0), most) <= mean <= most:
        raise ConfigError(f"mean draws must lie between the first wave and the budget of {most}, found {mean:g}")


def adaptive_policy(
    agent: ActionAgent,
    env: VectorEnv,
    compute: ComputePolicy,
    mean: float,
    episodes: int = 10,
    seed: int = 0,
    config: ValueQuantilesConfig | None = None,
) -> tuple[BestOfNActions, Calibration]:
    """Return a policy that draws `mean` candidates a decision on average, and how well its judge is calibrated.

    Plays best of 4 to see states, learns the distribution of values there, matches the rule, plays with it, and matches
    once more on the states that the rule itself visits.

    Args:
        agent: draws and values.
        env: to look around in; its stream should not be that of the evaluation.
        compute: rules; the threshold, or the cost, is searched.
        mean: candidates a decision.
        episodes: for each of the two looks.
        seed: of draws, weights and batches.
        config: of the judge's training.
    """
    _check(compute, mean)  # before anything is played
    look = compute_fixed(min(PROBE, compute.budget.max_samples))
    _, states = evaluate_counted(BestOfNActions(agent, look), env, episodes, seed)
    judge, calibration = fit_value_quantiles(agent.values, states, config or ValueQuantilesConfig(), seed)
    compute = rematched(agent, judge, matched(agent, judge, compute, states, mean, seed), env, mean, episodes, seed)
    return BestOfNActions(agent, compute, judge), calibration


def rematched(
    agent: ActionAgent, judge: Judge, compute: ComputePolicy, env: VectorEnv, mean: float, episodes: int, seed: int
) -> ComputePolicy:
    """Return `compute` matched on states that it visits itself; see `matched`."""
    _, visited = evaluate_counted(BestOfNActions(agent, compute, judge), env, episodes, seed)
    return matched(agent, judge, compute, visited, mean, seed)


def action_agent(policy: Learner, critic: Learner | None = None) -> ActionAgent:
    """Return the agent of a learner, or of one learner's policy and another's critic (cloning has none).

    The critics are reduced as the objective's own targets are (`fql`, `qc`: `target_reduction`), else to their
    minimum, as in `score`.

    Raises:
        ConfigError: a policy that cannot be drawn from, no critic, or a critic of chunks of another length.
    """
    draw, box, length = _drawing(policy)
    value, critic_length = _valuing(policy if critic is None else critic)
    if critic_length != length:
        raise ConfigError(
            f"the policy draws chunks of {length} actions, but the critic values chunks of {critic_length}"
        )
    return ActionAgent(draw, value, box, length)


def load_action_agent(path: str | Path, critic: str | Path | None = None) -> ActionAgent:
    """Return the agent of a run, checkpoint or pretrained/ directory, with the critic of another one if it is given.

    Raises:
        DataError: the two know different observations or actions.
        ConfigError: see `action_agent`.
    """
    learner, artefact = load_learner(path)
    if critic is None:
        return action_agent(learner)
    other, theirs = load_learner(critic)
    artefact.spec.require_match(theirs.spec, f"policy {path}", f"critic {critic}")
    return action_agent(learner, other)


def _drawing(learner: Learner) -> tuple[Callable[[Tensor, Tensor], Tensor], BoxScaler, int]:
    nets: Any = getattr(learner, "nets", None)
    if isinstance(learner, FQL):
        flows = isinstance(learner, QC) and learner.config.extraction == "best_of_n"

        def flow(observations: Tensor, noise: Tensor) -> Tensor:
            states = nets.normalizer(observations)
            if flows:
                return nets.flow.integrate(states, noise, learner.config.flow_steps)  # type: ignore[no-any-return]
            return nets.one_step(states, noise).clamp(-1, 1)  # type: ignore[no-any-return]

        return flow, nets.box, learner.chunk_length
    if isinstance(learner, BC) and learner.config.likelihood == "mse":
        raise ConfigError("a policy cloned with likelihood 'mse' has no spread to draw candidates from")
    if not isinstance(nets, ActorCritic):
        raise ConfigError(f"{type(learner).__name__} has no policy over continuous actions to draw candidates from")

    def gaussian(observations: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = (x.unsqueeze(1) for x in nets.actor(nets.normalizer(observations)))
        if nets.actor.squash == "tanh":
            return tanh_gaussian_sample(mean, log_std, noise)[0]
        actions: Tensor = (mean + log_std.exp() * noise).clamp(-1, 1)
        return actions

    return gaussian, nets.box, 1


def _valuing(learner: Learner) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    nets: Any = getattr(learner, "nets", None)
    critic = getattr(nets, "critic", None)
    if not isinstance(critic, Critic):
        raise ConfigError(f"{type(learner).__name__} has no critic of continuous actions; name a run that has one")
    length = learner.chunk_length if isinstance(learner, FQL) else 1
    means = isinstance(learner, FQL) and learner.config.target_reduction == "mean"

    def value(observations: Tensor, actions: Tensor) -> Tensor:
        q = critic(nets.normalizer(observations), actions)
        return q.mean(0) if means else q.amin(0)  # type: ignore[no-any-return]

    return value, length


class _Watched:
    """A policy that notes what it is asked and how many candidates it draws."""

    def __init__(self, policy: BestOfNActions) -> None:
        self.policy = policy
        self.blocks: list[list[tuple[Tensor, Tensor]]] = []

    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        actions = self.policy.act(observations, generator, mode)
        self.blocks[-1].append((observations.clone(), self.policy.drawn))
        return actions

    def reset(self, rows: Tensor | None = None) -> None:
        self.policy.reset(rows)
        if rows is None:
            self.blocks.append([])

    def state_tensors(self) -> dict[str, Tensor]:
        return self.policy.state_tensors()

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self.policy.load_state_tensors(state)


def evaluate_counted(
    policy: BestOfNActions, env: VectorEnv, episodes: int, seed: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Play episodes as `bench.evaluate.evaluate` does.

    Returns:
        Its rows with `decisions` and `evaluations` (candidates drawn and valued) of each episode, and the raw
        observations [N, O] of all decisions.
    """
    watched: Policy = _Watched(policy)
    assert isinstance(watched, _Watched)
    rows = evaluate(watched, env, episodes, seed)
    states: list[Tensor] = []
    for number, row in enumerate(rows):
        block, place = divmod(number, env.num_envs)
        steps = watched.blocks[block][: row["length"]]  # later ones are of an episode that has ended
        drawn = torch.stack([counts[place] for _, counts in steps])
        row |= {"decisions": int((drawn > 0).sum()), "evaluations": int(drawn.sum())}
        states += [seen[place] for (seen, _), count in zip(steps, drawn.tolist(), strict=True) if count]
    return rows, torch.stack(states)
