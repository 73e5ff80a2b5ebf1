"""This library as a contender of `benchmarks/updates.py`."""

from __future__ import annotations

from typing import Any

import torch
from worker import NUM_BATCHES, batches, parser, prepare, serve

import steelyard
from steelyard import runtime
from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import ArraySpec, Spec
from steelyard.objectives.actor_critic import DataStatistics, NetworkConfig
from steelyard.objectives.cal_ql import CalQL, CalQLConfig
from steelyard.objectives.cql import CQL, CQLConfig
from steelyard.rng import torch_generator
from steelyard.train.guards import FiniteGuard
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

Q_SPREAD = 30.0
"""Standard deviation of Q at which the error of bf16 is measured."""


def build(options: Any) -> CQL:
    """Return the learner: importance sampling, max backup, learned multiplier and temperature."""
    sizes = NetworkConfig(actor_hidden=tuple(options.actor_hidden), critic_hidden=tuple(options.critic_hidden))
    cls, config = {"cql": (CQL, CQLConfig), "cal_ql": (CalQL, CalQLConfig)}[options.algorithm]
    size = options.action
    spec = Spec(
        {"observation": ArraySpec((options.observation,))}, ArraySpec((size,), low=(-1.0,) * size, high=(1.0,) * size)
    )
    statistics = DataStatistics(torch.zeros(options.observation), torch.ones(options.observation), 0.0)
    settings = config(network=sizes, num_samples=options.samples, mode="lagrange_a", max_target_backup=True)
    return cls(spec, settings, statistics, torch.Generator().manual_seed(0))


def gradient(learner: CQL, batch: TransitionBatch, autocast: bool) -> torch.Tensor:
    """Return the gradient of the critic loss as one vector; the random draws are the same on every call."""
    ready = learner.prepare(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = learner.loss_critic(ready, torch_generator(0, "benchmark"))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(learner.nets.critic.parameters()))])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--autocast", choices=("off", "bf16"), default="off")
    options = arguments.parse_args()
    prepare(options)
    runtime.prepare(runtime.RuntimeConfig(threads=options.threads, matmul_precision=options.precision))
    learner = build(options)
    optimizers = Optimizers(learner, OptimConfig(autocast=options.autocast))
    ready = []
    for arrays in batches(options):
        masks = 1 - arrays.pop("terminals")
        ready.append(TransitionBatch(**arrays, masks=masks, is_offline=torch.ones_like(masks)))
    guard = FiniteGuard()

    def autocast_error() -> dict[str, float]:
        with torch.no_grad():  # stretch Q, which is almost flat after a few updates, to the spread of a trained critic
            prepared = learner.prepare(ready[0])
            spread = learner.nets.critic(prepared.observations, prepared.actions).std()
            learner.nets.critic.output.weight.mul_(Q_SPREAD / spread)
        exact, rounded = (gradient(learner, ready[0], autocast) for autocast in (False, True))
        cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=0)
        with torch.no_grad():
            q = learner.nets.critic(prepared.observations, prepared.actions)
            with torch.autocast("cpu", torch.bfloat16):
                q_rounded = learner.nets.critic(prepared.observations, prepared.actions)
        return {
            "relative_gradient_error": float((rounded - exact).norm() / exact.norm()),
            "cosine": float(cosine),
            "mean_abs_q": float(q.abs().mean()),
            "largest_q_error": float((q_rounded - q).abs().max()),
        }

    serve(
        lambda step: update(learner, optimizers, ready[step % NUM_BATCHES], 0, step, guard),
        {"steelyard": steelyard.__version__},
        {"autocast_error": autocast_error},
    )


if __name__ == "__main__":
    main()
