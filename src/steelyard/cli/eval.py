"""`steelyard eval RUN [--episodes N] [--env ID] [--best-of N]`: evaluate a trained policy, with intervals.

`steelyard eval winrate` and `steelyard eval reward_model` evaluate policies and scorers of text (`cli/eval_text.py`).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.artefact import ControlArtefact, find, load_learner
from steelyard.bench import stats
from steelyard.bench.evaluate import evaluate
from steelyard.cli.arguments import environment
from steelyard.envs.gym import VectorEnv
from steelyard.envs.model_scorers import format_of
from steelyard.envs.reference import normalized_score, reference_range
from steelyard.errors import ConfigError
from steelyard.objectives.base import Learner
from steelyard.rng import numpy_generator

_TEXT = {
    "steelyard-preference": "steelyard eval winrate {} --against reference --scorer NAME",
    "steelyard-reward-model": "steelyard eval reward_model {} --data FILE",
}


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """Evaluate a trained policy and print success and return with 95% intervals.

    For text: steelyard eval winrate --help, and steelyard eval reward_model --help.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, checkpoint or pretrained/ directory."""
    episodes: int = 50
    """Episodes to play."""
    env: str | None = None
    """Gymnasium id; default: the environment that the policy was trained for."""
    which: Literal["last", "best"] = "last"
    """Which checkpoint of a run; "best" was chosen by its own evaluations, so its score is optimistic there."""
    mode: Literal["mean", "sample"] = "mean"
    """Act with the policy's mode or with samples."""
    seed: int = 1_000
    """Of the initial states; training evaluations use the run's seed."""
    parallel: int = 10
    """Environments stepped together."""
    rows: Path | None = None
    """Write one JSON row per episode to this file."""
    best_of: int | None = None
    """Draw so many action candidates a decision and play the one that the critic values most; with --evaluations: at
    most so many."""
    evaluations: float | None = None
    """With --best-of: candidates a decision on average. Drawing stops where a further one would bring little; how much
    it would bring is learned in a few episodes of its own, before the evaluation."""
    stop: Literal["expected_gain", "threshold"] = "expected_gain"
    """How --evaluations stops: by the expected gain in Q of a fresh draw, or by the chance that one is better."""
    critic: str | None = None
    """With --best-of: the run whose critic values the candidates; default: the policy's own."""


def main(argv: list[str]) -> int:
    """Run the command."""
    if argv and argv[0] in ("winrate", "reward_model"):
        from steelyard.cli import eval_text  # imports language models

        return (eval_text.win_rate if argv[0] == "winrate" else eval_text.reward_model)(argv[1:])
    arguments = tyro.cli(EvalArguments, prog="steelyard eval", args=argv)
    runtime.prepare(runtime.RuntimeConfig())
    folder = find(arguments.run, arguments.which)
    for known, command in _TEXT.items():
        if format_of(folder).startswith(known):
            raise ConfigError(f"{arguments.run}: is evaluated on text: {command.format(shlex.quote(arguments.run))}")
    learner, artefact = load_learner(folder)
    config = environment(arguments.env) if arguments.env else artefact.env
    if config is None:
        raise ConfigError(f"{arguments.run} was trained without an environment: name one with --env ID")
    if arguments.episodes < 1:
        raise ConfigError(f"--episodes must be at least 1, found {arguments.episodes}")
    if arguments.rows is not None and not arguments.rows.parent.is_dir():
        raise ConfigError(f"--rows {arguments.rows}: there is no folder {arguments.rows.parent}")
    env = VectorEnv(config, min(arguments.parallel, arguments.episodes), arguments.seed, "eval")
    artefact.spec.require_match(env.spec, f"policy {arguments.run}", f"environment {config.id!r}")
    if arguments.best_of is None:
        if arguments.evaluations is not None or arguments.critic is not None:
            raise ConfigError("--evaluations and --critic are about candidates: say how many at most with --best-of N")
        rows = evaluate(learner.policy(), env, arguments.episodes, arguments.seed, arguments.mode)
    else:
        rows = _best_of(arguments, learner, artefact, env)
    env.close()
    if arguments.rows is not None:
        arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Console().print(_table(rows, str(folder), config.id))
    return 0


def _best_of(
    arguments: EvalArguments, learner: Learner, artefact: ControlArtefact, env: VectorEnv
) -> list[dict[str, Any]]:
    from steelyard.adapt import best_of_n_actions as best
    from steelyard.adapt.compute_policy import StopRule

    assert arguments.best_of is not None
    if arguments.best_of < 1:
        raise ConfigError(f"--best-of must be at least 1, found {arguments.best_of}")
    critic = None
    if arguments.critic is not None:
        critic, theirs = load_learner(arguments.critic)
        artefact.spec.require_match(theirs.spec, f"policy {arguments.run}", f"critic {arguments.critic}")
    agent = best.action_agent(learner, critic)
    if arguments.evaluations is None:
        policy = best.BestOfNActions(agent, best.compute_fixed(arguments.best_of))
    else:
        looking = VectorEnv(env.config, env.num_envs, arguments.seed, "probe")
        compute = best.compute_adaptive(StopRule(arguments.stop), arguments.best_of)
        policy, _ = best.adaptive_policy(agent, looking, compute, arguments.evaluations, seed=arguments.seed)
        looking.close()
    return best.evaluate_counted(policy, env, arguments.episodes, arguments.seed)[0]


def _table(rows: list[dict[str, Any]], policy: str, env_id: str) -> Table:
    table = Table("measure", "value", "95% interval", title=f"{policy} in {env_id}, {len(rows)} episodes")
    returns = np.array([row["return"] for row in rows], np.float64)
    estimate = stats.mean_estimate(returns, numpy_generator(0, "eval/return"))
    table.add_row("return (mean)", f"{estimate.value:.2f}", _interval(estimate.low, estimate.high))
    if reference_range(env_id) is not None:
        low, value, high = (
            None if x is None else normalized_score(env_id, x) for x in (estimate.low, estimate.value, estimate.high)
        )
        table.add_row("D4RL score (0 random, 100 expert)", f"{value:.1f}", _interval(low, high))
    won = [row["success"] for row in rows]
    if None not in won:
        count = sum(map(bool, won))
        success = stats.wilson_interval(count, len(won))
        table.add_row("success (Wilson)", f"{success.value:.3f}", _interval(success.low, success.high))
    lengths = np.array([row["length"] for row in rows], np.float64)
    table.add_row("length (median)", f"{np.median(lengths):.0f}", "")
    if "evaluations" in rows[0]:
        drawn, decisions = (float(np.sum([row[key] for row in rows])) for key in ("evaluations", "decisions"))
        table.add_row("candidates a decision", f"{drawn / decisions:.2f}", "")
        table.add_row("candidates a step", f"{drawn / lengths.sum():.2f}", "")
    return table


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"
