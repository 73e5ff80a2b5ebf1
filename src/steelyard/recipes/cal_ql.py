"""Cal-QL (Nakamoto et al., NeurIPS 2023): calibrated offline pre-training for efficient online fine-tuning.

Claim: a critic that is conservative but calibrated starts fine-tuning from its offline level, without CQL's initial
unlearning, and reaches a lower cumulative regret than CQL and IQL.

What is run here: a point maze with prior data of which few trajectories reach the goal; each method is pre-trained on
the same data, then fine-tuned online from the same initial states with the same seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from steelyard.bench.rows import read_run
from steelyard.bench.runner import Job, run_jobs
from steelyard.config import Config, config_hash, to_json
from steelyard.data.returns import RewardConfig
from steelyard.envs.behaviours import PointMazeDataConfig, point_maze_env, point_maze_store, summarize_point_maze
from steelyard.errors import ConfigError
from steelyard.objectives import CalQLConfig, ControlConfig, CQLConfig, IQLConfig
from steelyard.objectives.actor_critic import NetworkConfig
from steelyard.report.html import write_report
from steelyard.report.numbers import summarize
from steelyard.report.summary import terminal_table
from steelyard.train.loop import LoopConfig
from steelyard.train.online import OnlineConfig
from steelyard.workflows import control
from steelyard.workflows.common import Case
from steelyard.workflows.control import ControlRun, DataConfig, EvaluationConfig

CaseName = Literal["cal_ql", "cql", "iql"]
LABELS = {"cal_ql": "Cal-QL", "cql": "CQL", "iql": "IQL"}


@dataclass(frozen=True)
class CalQLRecipe(Config):
    """Pre-train on maze data with Cal-QL, CQL and IQL, fine-tune online, compare."""

    cases: tuple[CaseName, ...] = ("cal_ql", "cql", "iql")
    """Methods to run; the first is the one that the others are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Paired seeds: every method runs with each."""
    workers: int = 2
    """Runs at a time, one thread each."""
    out: str | None = None
    """Directory of the runs and the report; default: runs/cal_ql-SIZE-HASH. An unfinished one is resumed."""
    prior: PointMazeDataConfig = field(default_factory=PointMazeDataConfig)
    """Prior data: one data set for all methods and seeds."""
    cal_ql: CalQLConfig = field(default_factory=CalQLConfig)
    """Cal-QL's own settings."""
    cql: CQLConfig = field(default_factory=CQLConfig)
    """CQL's own settings."""
    iql: IQLConfig = field(default_factory=IQLConfig)
    """IQL's own settings."""
    run: Annotated[ControlRun, tyro.conf.arg(name="")] = field(default_factory=ControlRun)
    """What all runs share; the recipe sets objective and seed, and data.path and env where they are not given."""


CLAIM = {
    "source": "Nakamoto et al., Cal-QL, NeurIPS 2023",
    "rows": [
        {
            "claim": "Cal-QL keeps improving online and ends high",
            "case": "cal_ql",
            "quantity": "after",
            "differs": "a point maze with a two-dimensional action instead of AntMaze, Kitchen, Adroit; small networks",
        },
        {
            "claim": "fine-tuning Cal-QL has a lower cumulative regret than CQL",
            "case": "cal_ql",
            "quantity": "evaluation_regret",
            "against": "cql",
            "differs": "fewer online steps; fixed conservative weight instead of a Lagrange multiplier",
        },
        {
            "claim": "and a lower one than IQL",
            "case": "cal_ql",
            "quantity": "evaluation_regret",
            "against": "iql",
            "differs": "the same",
        },
        {
            "claim": "CQL first unlearns when it goes online",
            "case": "cql",
            "quantity": "dip",
            "differs": "visible only where CQL's offline policy succeeds at all (see its score before)",
        },
    ],
}


def run(config: CalQLRecipe, size: str) -> Path:
    """Generate the prior data, run all cases with all seeds, write the report. Return the report's path."""
    console = Console()
    unplaced = replace(config, out=None, workers=1)  # where and how many at a time do not change the result
    out = Path(config.out or f"runs/cal_ql-{size}-{config_hash(unplaced)[:8]}")
    out.mkdir(parents=True, exist_ok=True)
    recorded, identity = out / "recipe.json", to_json(replace(unplaced, seeds=(), cases=()))
    if recorded.exists() and recorded.read_text() != identity:
        raise ConfigError(f"{out}: holds runs with other settings (see {recorded}); choose another --out")
    recorded.write_text(identity)
    data = config.run.data.path
    if data is None:
        data = str(out / "data")
        if not Path(data).exists():
            store = point_maze_store(config.prior, data)
            console.print(f"prior data: {summarize_point_maze(store, config.prior)}", markup=False, highlight=False)
    todo = jobs(config, out, data)
    folders = run_jobs(todo, config.workers, f"cal_ql {size}")
    for job, folder in zip(todo, folders, strict=True):
        drawn = (folder / "frames.npz").exists() or (folder / "render_error.txt").exists()
        if job.config.seed == config.seeds[0] and not drawn and (folder / "checkpoints").exists():
            control.draw(folder)  # the report shows one episode of each case
    names = ", ".join(LABELS[case] for case in config.cases)
    title = f"{names} on {todo[0].config.env.id if todo[0].config.env else data}"
    claim = CLAIM if set(config.cases) == set(LABELS) and config.run.online.updates else None
    page = write_report(folders, out, title, claim)
    console.print(terminal_table(summarize([read_run(folder) for folder in folders])))
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def jobs(config: CalQLRecipe, out: Path, data: str) -> list[Job]:
    """Return one job per seed and case; seeds outermost, so that a stopped recipe has whole comparisons."""
    prior, env = config.prior, config.run.env
    if env is None:
        if config.run.data.path is not None:
            raise ConfigError("with data of your own (--data.path), name their environment with --env ID")
        env = point_maze_env(prior.size, prior.start, prior.goal, prior.max_episode_steps, prior.action_repeat)
    objectives: dict[str, ControlConfig] = {"cal_ql": config.cal_ql, "cql": config.cql, "iql": config.iql}
    return [
        Job(
            replace(
                config.run,
                objective=objectives[case],
                data=replace(config.run.data, path=data),
                env=env,
                seed=seed,
            ),
            Case("cal_ql", case, LABELS[case]),
            out / f"{case}-seed{seed}",
        )
        for seed in config.seeds
        for case in config.cases
    ]


def _preset(
    prior: PointMazeDataConfig,
    conservative: CQLConfig,
    run: ControlRun,
    seeds: tuple[int, ...],
    expectile: float,
    inverse_temperature: float,
) -> CalQLRecipe:
    """Build a preset in which all methods share networks, discount, rates and target bounds."""
    shared = {f.name: getattr(conservative, f.name) for f in fields(CQLConfig) if f.name not in ("kind", "lower_bound")}
    iql = IQLConfig(
        network=conservative.network,
        discount=conservative.discount,
        target_update_rate=conservative.target_update_rate,
        learning_rate=conservative.critic_lr,
        expectile=expectile,
        inverse_temperature=inverse_temperature,
        target_bounds=conservative.target_bounds,
    )
    return CalQLRecipe(seeds=seeds, prior=prior, cal_ql=CalQLConfig(**shared), cql=conservative, iql=iql, run=run)


_SPARSE = DataConfig(rewards=RewardConfig(scale=1.0, bias=-1.0, horizon="sparse", step_reward=0.0))

PRESETS = {
    # Each action is held for four simulator steps, so that an episode has 75 decisions and a run takes a minute.
    "tiny": _preset(
        prior=PointMazeDataConfig(size="Medium", kind="noisy", action_repeat=4, steps=10_000, goal_fraction=0.12),
        conservative=CQLConfig(
            network=NetworkConfig(actor_hidden=(64, 64), critic_hidden=(64, 64), critic_init="mean_return"),
            discount=0.98,
            target_update_rate=0.02,
            actor_lr=1e-3,
            critic_lr=1e-3,
            temperature_lr=1e-3,
            target_entropy=0.0,
            cql_weight=5.0,
            num_samples=4,
            target_bounds=(-50.0, 0.0),
        ),
        run=ControlRun(
            data=_SPARSE,
            offline_steps=2_500,
            batch_size=64,
            online=OnlineConfig(env_steps=2_500, utd_ratio=0.5),
            evaluation=EvaluationConfig(every_offline=1_250, every_online=250),
            loop=LoopConfig(log_every=250, checkpoint_every=1_250),
        ),
        seeds=(10, 11, 12),  # 0 and 1 served to choose the settings
        expectile=0.7,
        inverse_temperature=10.0,
    ),
    # The same maze at the simulator's own rate, twice the width, ten seeds: an hour or two on two cores.
    "small": _preset(
        prior=PointMazeDataConfig(size="Medium", kind="noisy", steps=40_000, goal_fraction=0.12),
        conservative=CQLConfig(
            network=NetworkConfig(actor_hidden=(128, 128), critic_hidden=(128, 128), critic_init="mean_return"),
            discount=0.99,
            target_update_rate=0.01,
            actor_lr=3e-4,
            critic_lr=3e-4,
            temperature_lr=3e-4,
            target_entropy=0.0,
            cql_weight=5.0,
            num_samples=4,
            target_bounds=(-100.0, 0.0),
        ),
        run=ControlRun(
            data=_SPARSE,
            offline_steps=20_000,
            batch_size=128,
            online=OnlineConfig(env_steps=20_000, utd_ratio=0.5),
            evaluation=EvaluationConfig(every_offline=5_000, every_online=1_000, episodes=20),
        ),
        seeds=tuple(range(10, 20)),
        expectile=0.7,
        inverse_temperature=10.0,
    ),
    # The authors' AntMaze settings (networks, multiplier, rewards, steps); bring the data with --data and --env.
    "paper": _preset(
        prior=PointMazeDataConfig(size="Large", kind="diverse", steps=1_000_000, goal_fraction=0.12),
        conservative=CQLConfig(
            network=NetworkConfig(
                actor_hidden=(256, 256), critic_hidden=(256, 256, 256, 256), normalizes_observations=False
            ),
            cql_weight=5.0,
            mode="lagrange_a",
            cql_target_gap=0.8,
            max_target_backup=True,
        ),
        run=ControlRun(
            data=DataConfig(rewards=RewardConfig(scale=10.0, bias=-5.0, horizon="sparse", step_reward=0.0)),
            offline_steps=1_000_000,
            online=OnlineConfig(env_steps=1_000_000),
            evaluation=EvaluationConfig(every_offline=50_000, every_online=2_000, episodes=20),
            loop=LoopConfig(log_every=1_000, checkpoint_every=50_000),
        ),
        seeds=tuple(range(10, 15)),
        expectile=0.9,
        inverse_temperature=10.0,
    ),
}
