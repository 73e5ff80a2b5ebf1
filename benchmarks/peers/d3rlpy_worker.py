"""d3rlpy as a contender of `benchmarks/updates.py`. Runs in d3rlpy's own environment."""

from __future__ import annotations

import d3rlpy
import torch
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.torch_utility import TorchMiniBatch
from worker import NUM_BATCHES, batches, parser, prepare, serve


def main() -> None:
    options = parser(__doc__).parse_args()
    prepare(options)
    config = {"cql": d3rlpy.algos.CQLConfig, "cal_ql": d3rlpy.algos.CalQLConfig}[options.algorithm]
    algo = config(
        batch_size=options.batch,
        actor_encoder_factory=VectorEncoderFactory(options.actor_hidden),
        critic_encoder_factory=VectorEncoderFactory(options.critic_hidden),
        n_action_samples=options.samples,
        alpha_threshold=0.8,
        max_q_backup=True,
    ).create(device="cpu:0")
    algo.create_impl((options.observation,), options.action)
    ready = []
    for arrays in batches(options):
        columns = {key: arrays[key][:, None] for key in ("rewards", "terminals", "returns_to_go")}
        ready.append(
            TorchMiniBatch(
                observations=arrays["observations"],
                actions=arrays["actions"],
                next_observations=arrays["next_observations"],
                next_actions=torch.zeros_like(arrays["actions"]),
                intervals=torch.ones_like(columns["rewards"]),
                device="cpu:0",
                **columns,
            )
        )
    # the update that `fit` calls for each batch, after it has made tensors of it
    serve(lambda step: algo.impl.update(ready[step % NUM_BATCHES], step), {"d3rlpy": d3rlpy.__version__})


if __name__ == "__main__":
    main()
