"""One run of the preference bandits: what it is (`BanditCase`), and what it does (`run_bandit`), in a second or so."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.pairing import PairingRule, pair_up
from steelyard.envs.bandit import FEATURES, BanditProblem, reference_bins
from steelyard.nets.categorical import CategoricalPolicy
from steelyard.objectives.base import Group
from steelyard.objectives.preference import AnyPreferenceConfig, build_preference_learner
from steelyard.rng import torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import Adam, OptimConfig, Optimizers

UNSEEN = 100
"""Contexts of the evaluation, none of which is trained on."""
POINTS = 12
"""Evaluations of a run, at most."""


@dataclass(frozen=True)
class BanditCase(Config):
    """One setting of a bandit run; together with a seed it says everything."""

    objective: AnyPreferenceConfig
    """What is minimised, with its learning rate."""
    negative: float = 1.0
    """lambda: scale of the negative gradient."""
    source: Literal["policy", "dataset"] = "policy"
    """Who draws the completions: the policy as it is at each refresh, or pi_ref."""
    pairing: PairingRule = "all"
    """Which completions of a prompt are compared."""
    target: int = 70
    """a*: the action with the highest reward."""
    width: float = 10.0
    """Width of the reward's bump, in actions."""
    tokens: int = 1
    """Positions of a completion."""
    prompts: int = 10
    """Contexts trained on."""
    completions: int = 10
    """N: completions of each prompt at each refresh."""
    refreshes: int = 30
    """How often completions are drawn; 1 with source dataset is a fixed data set."""
    reuse: int = 10
    """T: updates on the same completions."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "width", "tokens", "prompts", "completions", "refreshes", "reuse")
        require_range(self, 0, math.inf, "negative")
        require_range(self, 0, 99, "target")

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.refreshes * self.reuse

    @property
    def queries(self) -> int:
        """Completions drawn and scored in the whole run."""
        return self.refreshes * self.prompts * self.completions

    @property
    def problem(self) -> BanditProblem:
        """The reward."""
        return BanditProblem(self.target, self.width, self.tokens)


Row = dict[str, Any]


def run_bandit(case: BanditCase, seed: int) -> list[Row]:
    """Train once and return one row per evaluation; nothing is written.

    Runs with the same seed share first weights, contexts and offline completions, whatever the case. A run whose
    gradient becomes NaN or infinite ends there: its later rows repeat the last finite measurement, status "failed".
    """
    problem, due = case.problem, _evaluations(case)
    model = _start(seed, case.tokens, case.objective.needs.values)
    contexts = problem.contexts(case.prompts, torch_generator(seed, "bandit/train"))
    unseen = problem.contexts(UNSEEN, torch_generator(seed, "bandit/unseen"))
    learner = build_preference_learner(model, case.objective, case.negative)
    optimizers = Optimizers(learner, OptimConfig())
    memory: dict[str, Tensor] = {}
    rows: list[Row] = []
    batch: ExperienceBatch | None = None
    skipped, mass = 0, math.nan

    def look(step: int) -> None:
        row: Row = {"step": step, "queries": -(-step // case.reuse) * case.prompts * case.completions}
        row |= problem.measure(model, unseen)
        if step == case.steps:
            assert batch is not None
            row |= displacement(model, batch)
        rows.append(row | {"negative_mass": abs(mass), "skipped": skipped, "status": "ok"})

    look(0)
    for step in range(case.steps):
        if step % case.reuse == 0:
            batch = _draw(case, model, contexts, seed, step)
            batch, memory = learner.complete(batch, memory)
            trains = not (case.objective.needs.pairs and not len(_pairs(batch)))  # all rewards equal: nothing to learn
        assert batch is not None
        if trains:
            metrics = update(learner, optimizers, batch, seed, step)
            ends = step + 1 in due or (step + 1) % case.reuse == 0
            if ends and not math.isfinite(float(metrics["grad/preference"])):
                break
        else:
            skipped += 1
        if step + 1 in due:
            if trains:
                mass = float(metrics["loss/negative_mass"])
            look(step + 1)
            if not math.isfinite(rows[-1]["reward"]):
                rows.pop()
                break
    for step in sorted(due):
        if step > rows[-1]["step"]:
            rows.append(rows[-1] | {"step": step, "status": "failed"})
    return rows


def _evaluations(case: BanditCase) -> frozenset[int]:
    """Return the steps after which a run is measured: whole refreshes where there are enough of them."""
    unit = case.reuse if case.refreshes >= POINTS // 2 else 1
    every = unit * max(1, -(-case.steps // (unit * POINTS)))
    return frozenset([*range(every, case.steps, every), case.steps])


def _start(seed: int, tokens: int, value_head: bool) -> CategoricalPolicy:
    """Return the policy that all runs of a seed begin with: fitted to pi_ref."""
    model = CategoricalPolicy(
        reference_bins(), FEATURES, tokens, torch_generator(seed, "bandit/init"), value_head=value_head
    )
    model.load_state_dict(_fitted(seed, tokens), strict=False)  # the value head, where there is one, begins at zero
    return model


@functools.lru_cache(maxsize=64)
def _fitted(seed: int, tokens: int) -> dict[str, Tensor]:
    model = CategoricalPolicy(reference_bins(), FEATURES, tokens, torch_generator(seed, "bandit/init"))
    fit_reference(model, BanditProblem().contexts(UNSEEN, torch_generator(seed, "bandit/reference")))
    return model.state_dict()


def fit_reference(policy: CategoricalPolicy, contexts: Tensor, steps: int = 100, learning_rate: float = 0.01) -> None:
    """Train the policy towards pi_ref: Adam on KL(pi || pi_ref), as the paper's code does; changes it in place."""
    adam = Adam(Group(policy.trainable()["policy"], learning_rate), OptimConfig())
    for _ in range(steps):
        log_probs = policy.log_probs(contexts)
        loss = (log_probs.exp() * (log_probs - policy.reference_logps)).sum(2).mean()
        adam.step(list(torch.autograd.grad(loss, adam.parameters)))


def _draw(case: BanditCase, model: CategoricalPolicy, contexts: Tensor, seed: int, step: int) -> ExperienceBatch:
    """Return one refresh of scored and paired completions."""
    refresh = step // case.reuse
    if case.source == "policy":
        generator = torch_generator(seed, "bandit/sample", refresh)
        batch = case.problem.experience(model, contexts, case.completions, generator, step)
    else:
        generator = torch_generator(seed, "bandit/data", refresh)
        batch = case.problem.foreign_experience(contexts, case.completions, generator)
    assert batch.rewards is not None
    found = pair_up(batch.rewards, batch.prompt_of, case.pairing)
    return replace(batch, pairs=found.pairs, margins=found.margins, pair_weights=torch.ones(len(found)))


def _pairs(batch: ExperienceBatch) -> Tensor:
    assert batch.pairs is not None
    return batch.pairs


@torch.no_grad()
def displacement(model: CategoricalPolicy, batch: ExperienceBatch) -> Row:
    """Return what became of the completions trained on.

    Returns:
        delta_chosen, delta_rejected: mean of log pi / pi_ref over the chosen and the rejected of all pairs.
        mass_best, mass_rest, mass_unseen: probability of each prompt's best completion, of its other completions, and
            of all that was never drawn (one position only).
    """
    assert batch.rewards is not None
    token_logps = model.outputs(batch).token_logps
    deltas = (token_logps - model.reference_token_logps(batch)).sum(1)
    pairs = _pairs(batch)
    chosen, rejected = deltas[pairs].mean(0).tolist() if len(pairs) else (math.nan, math.nan)
    row: Row = {"delta_chosen": chosen, "delta_rejected": rejected}
    if model.tokens == 1:
        actions = batch.completions.view(len(batch.prompts), -1)
        best = actions.gather(1, batch.rewards.view(len(actions), -1).argmax(1, keepdim=True))
        probs = model.log_probs(batch.prompts)[:, 0].exp()
        seen = torch.zeros_like(probs).scatter_(1, actions, 1.0)
        mass_best = probs.gather(1, best).mean()
        mass_seen = (probs * seen).sum(1).mean()
        row |= {
            "mass_best": float(mass_best),
            "mass_rest": float(mass_seen - mass_best),
            "mass_unseen": float(1 - mass_seen),
        }
    return row
