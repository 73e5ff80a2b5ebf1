"""Make the reference numbers of `tests/objectives/test_parity_d3rlpy.py` with d3rlpy.

d3rlpy pins an older Gymnasium than the simulators need, so it cannot live in the library's own environment. Run this
with the Python of an environment that holds d3rlpy 2.8.1; it needs nothing of this library:

    python tests/golden/make_d3rlpy.py tests/golden

It writes one `d3rlpy_CASE.npz` (plain arrays, no pickle) per case and `d3rlpy.json` (versions, sizes, settings). What
the arrays are is described in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import torch
import torch.distributions.normal as torch_normal
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.torch_utility import TorchMiniBatch

DISCOUNT = 0.99
CASES: dict[str, dict[str, Any]] = {
    # threshold 0.8 is AntMaze's, 10.0 is d3rlpy's default; the sizes differ so that no axis can be mistaken for another
    "small": {
        "observation": 5,
        "action": 2,
        "hidden": [32, 32],
        "batch": 16,
        "samples": 4,
        "threshold": 10.0,
        "seed": 1,
    },
    "wide": {
        "observation": 11,
        "action": 3,
        "hidden": [32, 32],
        "batch": 12,
        "samples": 10,
        "threshold": 0.8,
        "seed": 2,
    },
}
WEIGHT, ALPHA, TEMPERATURE, EXPECTILE, INVERSE_TEMPERATURE = 5.0, math.e, 0.3, 0.7, 3.0


class Noise:
    """Hands a queue of arrays to torch's Gaussian sampler, so that any implementation can be given the same noise."""

    def __init__(self) -> None:
        self.queue: list[torch.Tensor] = []

    def give(self, *arrays: torch.Tensor) -> None:
        """Use these arrays, in order, for the next draws."""
        assert not self.queue, "noise left over from the draw before"
        self.queue = list(arrays)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Noise]:
        """Replace torch's sampler for a while."""
        before = torch_normal._standard_normal
        torch_normal._standard_normal = self._draw
        try:
            yield self
        finally:
            torch_normal._standard_normal = before

    def _draw(self, shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        noise = self.queue.pop(0)
        assert tuple(shape) == tuple(noise.shape), (shape, noise.shape)
        return noise.to(dtype)


def weights(case: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw all weights as float32. Layout: torch.nn.Linear's, weight [out, in]."""
    found: dict[str, np.ndarray] = {}

    def net(name: str, inputs: int, heads: dict[str, tuple[int, float]]) -> None:
        sizes = [inputs, *case["hidden"]]
        for index, (a, b) in enumerate(itertools.pairwise(sizes)):
            found[f"{name}.hidden{index}.weight"] = rng.normal(0, math.sqrt(2 / a), (b, a))
            found[f"{name}.hidden{index}.bias"] = rng.normal(0, 0.1, b)
        for head, (outputs, scale) in heads.items():
            found[f"{name}.{head}.weight"] = rng.normal(0, scale / math.sqrt(sizes[-1]), (outputs, sizes[-1]))
            found[f"{name}.{head}.bias"] = rng.normal(0, 0.3, outputs)

    joint, action = case["observation"] + case["action"], case["action"]
    for index in range(2):
        net(f"critic{index}", joint, {"output": (1, 2.0)})
        net(f"target_critic{index}", joint, {"output": (1, 2.0)})
    net("value", case["observation"], {"output": (1, 1.0)})
    net("actor", case["observation"], {"mean": (action, 0.7), "log_std": (action, 0.5)})
    # V about as low as the minimum over two critics, so that some advantages are positive and some weights are clipped
    found["value.output.bias"][:] = -2.0
    # the last action dimension's log_std lies near the upper clip of 2, so that the clip is exercised on some rows
    found["actor.log_std.bias"][-1] = 1.9
    # IQL's policy: one log_std per dimension, kept by d3rlpy as a logit between its bounds -5 and 2
    found["iql_actor.log_std_logit"] = rng.normal(0.5, 0.3, action)
    return {key: value.astype(np.float32) for key, value in found.items()}


def batch(case: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a batch; a quarter of its steps are terminal, returns-to-go straddle the critics' values."""
    rows, k = case["batch"], case["action"]
    found = {
        "observations": rng.normal(0, 1, (rows, case["observation"])),
        "next_observations": rng.normal(0, 1, (rows, case["observation"])),
        "actions": rng.uniform(-0.97, 0.97, (rows, k)),
        "rewards": rng.normal(0, 1, rows),
        "terminals": (np.arange(rows) % 4 == 1).astype(float),
        "returns_to_go": rng.normal(0, 2, rows),
    }
    return {key: value.astype(np.float32) for key, value in found.items()}


def noise(case: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw Gaussian noise [N, B, k] at s and at s' (the latter also serves the target) and for the actor's step."""
    shape = (case["samples"], case["batch"], case["action"])
    found = {"current": rng.normal(size=shape), "next": rng.normal(size=shape), "actor": rng.normal(size=shape[1:])}
    return {key: value.astype(np.float32) for key, value in found.items()}


def load(layers: torch.nn.Module, name: str, source: dict[str, np.ndarray]) -> None:
    """Copy hidden layers `name.hiddenI` into the linear layers of an encoder."""
    linear = [layer for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
    for index, layer in enumerate(linear):
        load_linear(layer, f"{name}.hidden{index}", source)


def load_linear(layer: torch.nn.Linear, name: str, source: dict[str, np.ndarray]) -> None:
    """Copy one linear layer."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(source[f"{name}.weight"]))
        layer.bias.copy_(torch.from_numpy(source[f"{name}.bias"]))


def build(algo: Any, case: dict[str, Any], source: dict[str, np.ndarray], dtype: torch.dtype) -> Any:
    """Create d3rlpy's implementation of `algo` and give it the case's weights in `dtype`."""
    algo.create_impl((case["observation"],), case["action"])
    impl = algo.impl
    modules = impl._modules
    if hasattr(modules, "q_funcs"):
        for index in range(2):
            for prefix, nets in (("critic", modules.q_funcs), ("target_critic", modules.targ_q_funcs)):
                load(nets[index]._encoder, f"{prefix}{index}", source)
                load_linear(nets[index]._fc, f"{prefix}{index}.output", source)
    if hasattr(modules, "value_func"):
        load(modules.value_func._encoder, "value", source)
        load_linear(modules.value_func._fc, "value.output", source)
    policy = getattr(modules, "policy", None) or modules.imitator
    load(policy._encoder, "actor", source)
    load_linear(policy._mu if hasattr(policy, "_mu") else policy._fc, "actor.mean", source)
    if isinstance(getattr(policy, "_logstd", None), torch.nn.Linear):
        load_linear(policy._logstd, "actor.log_std", source)
    elif hasattr(policy, "_logstd"):
        with torch.no_grad():
            policy._logstd.copy_(torch.from_numpy(source["iql_actor.log_std_logit"])[None])
    for field in vars(modules).values():
        if isinstance(field, torch.nn.Module):
            field.to(dtype)
    return impl


def mini_batch(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> TorchMiniBatch:
    """Turn a batch into d3rlpy's; scalars per step become columns there."""
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in arrays.items()}
    column = {key: tensors[key][:, None] for key in ("rewards", "terminals", "returns_to_go")}
    return TorchMiniBatch(
        observations=tensors["observations"],
        actions=tensors["actions"],
        rewards=column["rewards"],
        next_observations=tensors["next_observations"],
        next_actions=torch.zeros_like(tensors["actions"]),
        returns_to_go=column["returns_to_go"],
        terminals=column["terminals"],
        intervals=torch.ones_like(column["rewards"]),
        device="cpu:0",
    )


def td_per_critic(impl: Any, step: TorchMiniBatch, target: torch.Tensor) -> torch.Tensor:
    """Mean squared Bellman error of each critic, without d3rlpy's float32 accumulator."""
    arguments = (step.observations, step.actions, step.rewards, target, step.terminals, impl._gamma)
    return torch.stack([member.compute_error(*arguments) for member in impl._q_func_forwarder._forwarders])


def gradients(impl: Any, which: str) -> dict[str, torch.Tensor]:
    """Return {our name: gradient} of the critics or of the actor."""
    found: dict[str, torch.Tensor] = {}

    def take(layer: torch.nn.Linear, name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = layer.weight.grad, layer.bias.grad

    if which == "critic":
        for member, net in enumerate(impl._modules.q_funcs):
            for index, layer in enumerate(m for m in net._encoder.modules() if isinstance(m, torch.nn.Linear)):
                take(layer, f"critic{member}.hidden{index}")
            take(net._fc, f"critic{member}.output")
    else:
        policy = impl._modules.policy
        for index, layer in enumerate(m for m in policy._encoder.modules() if isinstance(m, torch.nn.Linear)):
            take(layer, f"actor.hidden{index}")
        take(policy._mu, "actor.mean")
        if isinstance(policy._logstd, torch.nn.Linear):
            take(policy._logstd, "actor.log_std")
    return {key: value.detach().clone() for key, value in found.items()}


def conservative(
    kind: str, case: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], dtype: torch.dtype, source: Noise
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the expected numbers of CQL or Cal-QL, and the random actions [B, N, k] that were drawn."""
    config = {"cql": d3rlpy.algos.CQLConfig, "cal_ql": d3rlpy.algos.CalQLConfig}[kind]
    factory = VectorEncoderFactory(case["hidden"])

    def make(**backup: bool) -> Any:
        algo = config(
            actor_encoder_factory=factory,
            critic_encoder_factory=factory,
            gamma=DISCOUNT,
            initial_alpha=ALPHA,
            initial_temperature=TEMPERATURE,
            alpha_learning_rate=0.0,
            temp_learning_rate=0.0,
            alpha_threshold=case["threshold"],
            conservative_weight=WEIGHT,
            n_action_samples=case["samples"],
            **backup,
        ).create(device="cpu:0")
        return build(algo, case, arrays["weights"], dtype)

    impl = make(soft_q_backup=False, max_q_backup=True)
    step = mini_batch(arrays["batch"], dtype)
    draws = {key: torch.from_numpy(value) for key, value in arrays["noise"].items()}
    rows, count, k = case["batch"], case["samples"], case["action"]
    # the same generator state gives the actions that d3rlpy's uniform draw makes (always in float32)
    torch.manual_seed(case["seed"])
    random = torch.zeros(rows * count, k).uniform_(-1.0, 1.0).view(rows, count, k)

    source.give(draws["next"])
    target = impl.compute_target(step)
    source.give(draws["current"], draws["next"])
    torch.manual_seed(case["seed"])
    scaled_gap = impl._compute_conservative_loss(
        step.observations, step.actions, step.next_observations, step.returns_to_go
    )
    source.give(draws["current"], draws["next"])
    torch.manual_seed(case["seed"])
    loss = impl.compute_critic_loss(step, target)
    impl._modules.critic_optim.zero_grad()
    loss.critic_loss.backward()
    alpha = impl._modules.log_alpha._parameter.detach().exp().item()
    found = {
        "conservative_loss": scaled_gap,  # weight * (gap - threshold), per critic
        "gap": scaled_gap / WEIGHT + case["threshold"],
        "target_max": target,
        "td_loss": td_per_critic(impl, step, target),
        "critic_loss": td_per_critic(impl, step, target).sum() + (alpha * scaled_gap).sum(),
        "critic_loss_as_returned": loss.critic_loss,
        "dual_loss": -(alpha * scaled_gap).mean(),
        "alpha": torch.tensor(alpha, dtype=torch.float64),
        **{f"gradient.{key}": value for key, value in gradients(impl, "critic").items()},
    }
    found["target_mean"] = make(soft_q_backup=False, max_q_backup=False).compute_target(step)
    source.give(draws["next"][0])
    found["target_soft"] = make(soft_q_backup=True, max_q_backup=False).compute_target(step)
    for key in ("target_max", "target_mean", "target_soft"):
        found[f"bellman_{key}"] = step.rewards + DISCOUNT * (1 - step.terminals) * found[key]
    return found, random


def soft_actor_critic(
    case: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], dtype: torch.dtype, source: Noise
) -> dict[str, torch.Tensor]:
    """Return the expected numbers of SAC."""
    factory = VectorEncoderFactory(case["hidden"])
    algo = d3rlpy.algos.SACConfig(
        actor_encoder_factory=factory,
        critic_encoder_factory=factory,
        gamma=DISCOUNT,
        initial_temperature=TEMPERATURE,
        temp_learning_rate=0.0,
    ).create(device="cpu:0")
    impl = build(algo, case, arrays["weights"], dtype)
    step = mini_batch(arrays["batch"], dtype)
    draws = {key: torch.from_numpy(value) for key, value in arrays["noise"].items()}
    source.give(draws["next"][0])
    target = impl.compute_target(step)
    source.give(draws["actor"])
    impl._modules.actor_optim.zero_grad()
    loss = impl.compute_actor_loss(step, impl._modules.policy(step.observations)).actor_loss
    loss.backward()
    source.give(draws["actor"])
    dist = d3rlpy.models.torch.build_squashed_gaussian_distribution(impl._modules.policy(step.observations))
    actions, log_prob = dist.sample_with_log_prob()
    return {
        "target": target,
        "td_loss": td_per_critic(impl, step, target),
        "actor_loss": loss,
        "actions": actions,
        "log_prob": log_prob,
        # d3rlpy's temperature loss is minus exp(log temperature) times this; ours is minus log temperature times this
        "entropy_excess": (log_prob - case["action"]).mean(),
        **{f"gradient.{key}": value for key, value in gradients(impl, "actor").items()},
    }


def implicit(
    case: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the expected numbers of IQL."""
    factory = VectorEncoderFactory(case["hidden"])
    algo = d3rlpy.algos.IQLConfig(
        actor_encoder_factory=factory,
        critic_encoder_factory=factory,
        value_encoder_factory=factory,
        gamma=DISCOUNT,
        expectile=EXPECTILE,
        weight_temp=INVERSE_TEMPERATURE,
        max_weight=100.0,
    ).create(device="cpu:0")
    impl = build(algo, case, arrays["weights"], dtype)
    step = mini_batch(arrays["batch"], dtype)
    target = impl.compute_target(step)
    action = impl._modules.policy(step.observations)
    impl._modules.actor_optim.zero_grad()
    actor_loss = impl.compute_actor_loss(step, action).actor_loss
    actor_loss.backward()
    return {
        "target": target,
        "value_loss": impl.compute_value_loss(step),
        "td_loss": td_per_critic(impl, step, target),
        "weight": impl._compute_weight(step),
        "actor_loss": actor_loss,
        "log_std": action.logstd[0],
        **{f"gradient.{key}": value for key, value in gradients(impl, "actor").items()},
    }


def cloning(
    case: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the expected loss of deterministic behaviour cloning (squared error, mean over dimensions too)."""
    algo = d3rlpy.algos.BCConfig(encoder_factory=VectorEncoderFactory(case["hidden"])).create(device="cpu:0")
    impl = build(algo, case, arrays["weights"], dtype)
    step = mini_batch(arrays["batch"], dtype)
    return {"loss": impl.compute_loss(step.observations, step.actions).loss}


def make_case(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return all arrays of one case, inputs in float32, expected numbers in float64 and float32."""
    rng = np.random.default_rng(case["seed"])
    arrays = {"weights": weights(case, rng), "batch": batch(case, rng), "noise": noise(case, rng)}
    flat = {}
    for precision, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        with Noise().installed() as source:
            expected = {"sac": soft_actor_critic(case, arrays, dtype, source)}
            for kind in ("cql", "cal_ql"):
                expected[kind], random = conservative(kind, case, arrays, dtype, source)
        expected["iql"], expected["bc"] = implicit(case, arrays, dtype), cloning(case, arrays, dtype)
        arrays["noise"]["random_actions"] = random.numpy()
        for kind, values in expected.items():
            for key, value in values.items():
                # float32 gradients would add bytes but test nothing that the float64 ones do not
                if precision == "float64" or not key.startswith("gradient."):
                    flat[f"{precision}.{kind}.{key}"] = value.detach().numpy().squeeze()
    for group, values in arrays.items():
        flat |= {f"{group}.{key}": value for key, value in values.items()}
    return flat


def main() -> None:
    """Write all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the fixtures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, case in CASES.items():
        np.savez_compressed(out / f"d3rlpy_{name}.npz", **make_case(case))
    facts = {
        "made_by": "tests/golden/make_d3rlpy.py",
        "versions": {
            "d3rlpy": d3rlpy.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "settings": {
            "discount": DISCOUNT,
            "conservative_weight": WEIGHT,
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "expectile": EXPECTILE,
            "inverse_temperature": INVERSE_TEMPERATURE,
        },
        "cases": CASES,
    }
    (out / "d3rlpy.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
