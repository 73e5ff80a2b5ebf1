"""Losses, targets and gradients of CQL, Cal-QL, SAC, IQL and BC equal d3rlpy's, on fixtures made with d3rlpy itself.

How the fixtures were made: tests/golden/README.md. Both libraries get the same weights, batch and noise; the learners
run once in float64, where agreement means that the formulas are the same, and once in float32, as they train.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import ArraySpec, Spec
from steelyard.nets.policies import tanh_gaussian_sample
from steelyard.objectives.actor_critic import DataStatistics, NetworkConfig
from steelyard.objectives.bc import BC, BCConfig
from steelyard.objectives.cal_ql import CalQL, CalQLConfig
from steelyard.objectives.cql import CQL, ActionSamples, CQLConfig
from steelyard.objectives.iql import IQL, IQLConfig
from steelyard.objectives.sac import SAC, SACConfig

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "d3rlpy.json").read_text())
SETTINGS = FACTS["settings"]
# of the largest expected value (at least 1). In float64 the largest difference seen is 2e-15, in float32 6e-7, which is
# also how far d3rlpy's own float32 results lie from its float64 ones
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


class Reference:
    """One fixture in one precision."""

    def __init__(self, case: str, precision: str) -> None:
        self.case, self.precision = FACTS["cases"][case], precision
        self.dtype = getattr(torch, precision)
        with np.load(GOLDEN / f"d3rlpy_{case}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return {name: tensor} of all arrays `group.name`."""
        found = {k.removeprefix(f"{group}."): v for k, v in self.arrays.items() if k.startswith(f"{group}.")}
        return {key: torch.from_numpy(value).to(self.dtype) for key, value in found.items()}

    def expected(self, kind: str) -> dict[str, Tensor]:
        """Return d3rlpy's numbers for one algorithm."""
        return self.tensors(f"{self.precision}.{kind}")

    def gradients(self, kind: str) -> dict[str, Tensor]:
        """Return d3rlpy's gradients for one algorithm, which are kept in float64 only."""
        return self.tensors(f"float64.{kind}.gradient")

    @property
    def batch(self) -> TransitionBatch:
        """The batch; d3rlpy's terminals are 1 - masks."""
        found = self.tensors("batch")
        masks = 1 - found.pop("terminals")
        return TransitionBatch(**found, masks=masks, is_offline=torch.ones_like(masks))

    @property
    def spec(self) -> Spec:
        """Actions in [-1, 1], so that no scaling happens."""
        size = self.case["action"]
        return Spec(
            {"observation": ArraySpec((self.case["observation"],))},
            ArraySpec((size,), low=(-1.0,) * size, high=(1.0,) * size),
        )

    @property
    def network(self) -> NetworkConfig:
        """d3rlpy's nets of the fixture, without normalisation."""
        hidden = tuple(self.case["hidden"])
        return NetworkConfig(actor_hidden=hidden, critic_hidden=hidden, normalizes_observations=False)

    def build(self, cls: Callable[..., nn.Module], config: object) -> nn.Module:
        """Return a learner with the fixture's weights in the fixture's precision."""
        size = self.case["observation"]
        statistics = DataStatistics(torch.zeros(size), torch.ones(size), 0.0)
        learner = cls(self.spec, config, statistics, torch.Generator().manual_seed(0)).to(self.dtype)
        weights = self.tensors("weights")
        if hasattr(learner.nets, "critic"):
            learner.nets.critic.load_state_dict(self.critic_layout(weights, "critic"))
            learner.nets.target_critic.load_state_dict(self.critic_layout(weights, "target_critic"))
        if hasattr(learner, "value"):
            learner.value.load_state_dict(mlp_layout(weights, "value", "output"))
        actor = learner.nets.actor
        if actor.std == "state":
            layout = mlp_layout(weights, "actor", "mean", "log_std")
            # d3rlpy has no learned scale and offset of the log-std
            layout |= {"log_std_multiplier": torch.tensor(1.0), "log_std_offset": torch.tensor(0.0)}
        else:
            layout = mlp_layout(weights, "actor", "mean")
            # d3rlpy stores a logit between the bounds of log_std; the fixture holds the log_std that it means
            layout |= {"shared_log_std": self.expected("iql")["log_std"]}
        actor.load_state_dict(layout)
        return learner

    def critic_layout(self, source: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Linear layers per critic (weight [out, in]) -> our ensemble's stacked [E, in, out]."""

        def stack(layer: str) -> tuple[Tensor, Tensor]:
            weight = torch.stack([source[f"{prefix}{i}.{layer}.weight"].reshape(-1, width(layer)).T for i in range(2)])
            bias = torch.stack([source[f"{prefix}{i}.{layer}.bias"].reshape(-1) for i in range(2)])
            return weight, bias[:, None]

        sizes = [self.case["observation"] + self.case["action"], *self.case["hidden"]]

        def width(layer: str) -> int:
            return sizes[-1] if layer == "output" else sizes[int(layer.removeprefix("hidden"))]

        found = {}
        for index in range(len(self.case["hidden"])):
            found[f"hidden.{index}.weight"], found[f"hidden.{index}.bias"] = stack(f"hidden{index}")
        found["output.weight"], found["output.bias"] = stack("output")
        return found

    def samples(self, learner: CQL) -> ActionSamples:
        """Return the actions that d3rlpy drew; ours come from the same noise, [N, B, k] there and [B, N, k] here."""
        noise = self.tensors("noise")
        batch = self.batch

        def draw(observations: Tensor, name: str) -> tuple[Tensor, Tensor]:
            mean, log_std = learner.nets.actor(observations)
            return tanh_gaussian_sample(mean[:, None], log_std[:, None], noise[name].transpose(0, 1))

        with torch.no_grad():
            current, next_ = draw(batch.observations, "current"), draw(batch.next_observations, "next")
        return ActionSamples(noise["random_actions"], *current, *next_)

    def close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Assert equality relative to the scale of the expected values."""
        expected = expected.to(actual.dtype).reshape(actual.shape)
        scale = max(1.0, float(expected.abs().max()))
        error = float((actual.detach() - expected).abs().max()) / scale
        assert error <= TOLERANCE[self.precision], f"{what}: off by {error:.1e} of its scale {scale:.3g}"


def mlp_layout(source: dict[str, Tensor], name: str, *heads: str) -> dict[str, Tensor]:
    """Linear layers and heads -> our `MLP`: hidden layers at even places of a Sequential, heads joined in the last."""
    key = "net.layers"
    layers = sorted(k.split(".")[1] for k in source if k.startswith(f"{name}.hidden") and k.endswith("weight"))
    found = {}
    for index, layer in enumerate(layers):
        for part in ("weight", "bias"):
            found[f"{key}.{2 * index}.{part}"] = source[f"{name}.{layer}.{part}"]
    last = len(found[f"{key}.{2 * len(layers) - 2}.bias"])
    weight = torch.cat([source[f"{name}.{head}.weight"].reshape(-1, last) for head in heads])
    bias = torch.cat([source[f"{name}.{head}.bias"].reshape(-1) for head in heads])
    return found | {f"{key}.{2 * len(layers)}.weight": weight, f"{key}.{2 * len(layers)}.bias": bias}


def gradients(loss: Tensor, module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return {name: gradient of the loss}."""
    parameters = dict(module.named_parameters())
    chosen = [name for name in names if name in parameters]
    return dict(zip(chosen, torch.autograd.grad(loss, [parameters[name] for name in chosen]), strict=True))


@pytest.fixture(params=["float64", "float32"])
def precision(request, monkeypatch):
    """Run in both precisions; output heads ask for float32, which must not narrow a float64 learner."""
    if request.param == "float64":
        narrow = torch.Tensor.float
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
    return request.param


@pytest.fixture(params=sorted(FACTS["cases"]))
def reference(request, precision):
    return Reference(request.param, precision)


@pytest.fixture
def give_noise(monkeypatch):
    """Hand a queue of noise arrays to the policies' Gaussian draws."""
    queue: list[Tensor] = []

    def draw(shape, **_):
        noise = queue.pop(0)
        assert noise.numel() == np.prod(shape)
        return noise.reshape(shape)

    monkeypatch.setattr(torch, "randn", draw)
    return queue.extend


KINDS = {"cql": (CQL, CQLConfig), "cal_ql": (CalQL, CalQLConfig)}


def conservative_learner(reference: Reference, kind: str, **settings: object) -> CQL:
    cls, config = KINDS[kind]
    return reference.build(
        cls,
        config(
            network=reference.network,
            discount=SETTINGS["discount"],
            initial_temperature=SETTINGS["temperature"],
            cql_weight=SETTINGS["conservative_weight"],
            mode="lagrange_a",
            cql_target_gap=reference.case["threshold"],
            num_samples=reference.case["samples"],
            **{"max_target_backup": True, **settings},
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
class TestConservative:
    def test_terms(self, reference, kind):
        expected = reference.expected(kind)
        learner = conservative_learner(reference, kind)
        td, gap, _ = learner.critic_terms(reference.batch, reference.samples(learner), torch.Generator())
        reference.close(gap, expected["gap"], "gap per critic")
        excess = SETTINGS["conservative_weight"] * (gap - reference.case["threshold"])
        reference.close(excess, expected["conservative_loss"], "conservative loss per critic")
        reference.close(td, expected["td_loss"], "TD loss per critic")
        reference.close(learner.multiplier(), expected["alpha"], "multiplier")
        penalty, dual = learner.penalty(gap)
        reference.close(td.sum() + penalty, expected["critic_loss"], "critic loss")
        reference.close(dual, expected["dual_loss"], "dual loss of the multiplier")

    def test_critic_loss_was_what_d3rlpy_returned(self, reference, kind):
        expected = reference.expected(kind)  # d3rlpy adds up in float32 whatever the precision of its terms
        torch.testing.assert_close(expected["critic_loss"], expected["critic_loss_as_returned"], rtol=1e-6, atol=0)

    def test_gradients(self, reference, kind):
        learner = conservative_learner(reference, kind)
        td, gap, _ = learner.critic_terms(reference.batch, reference.samples(learner), torch.Generator())
        found = gradients(td.sum() + learner.penalty(gap)[0], learner.nets.critic, learner.nets.critic.state_dict())
        expected = reference.critic_layout(reference.gradients(kind), "critic")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            reference.close(value, expected[name], f"gradient of critic.{name}")

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("target_max", {}),
            ("target_mean", {"max_target_backup": False, "target_action": "mean"}),
            ("target_soft", {"max_target_backup": False, "target_action": "sample", "backup_entropy": True}),
        ],
    )
    def test_targets(self, reference, kind, name, settings):
        learner = conservative_learner(reference, kind, **settings)
        target = learner.bellman_targets(reference.batch, reference.samples(learner), torch.Generator())
        reference.close(target, reference.expected(kind)[f"bellman_{name}"], name)


def test_calibration_changes_the_numbers(reference):
    cql, cal_ql = reference.expected("cql"), reference.expected("cal_ql")
    assert (cal_ql["gap"] > cql["gap"]).all()
    torch.testing.assert_close(cal_ql["td_loss"], cql["td_loss"])


def sac(reference: Reference) -> SAC:
    config = SACConfig(
        network=reference.network, discount=SETTINGS["discount"], initial_temperature=SETTINGS["temperature"]
    )
    return reference.build(SAC, config)


class TestSAC:
    def test_critic(self, reference, give_noise):
        expected, learner = reference.expected("sac"), sac(reference)
        give_noise([reference.tensors("noise")["next"][0]])
        loss, metrics = learner.loss_critic(reference.batch, torch.Generator())
        batch = reference.batch
        target = batch.rewards + SETTINGS["discount"] * batch.masks * expected["target"]
        reference.close(metrics["critic/target"], target, "target")
        reference.close(loss, expected["td_loss"].sum(), "critic loss")

    def test_actor_and_temperature(self, reference, give_noise):
        expected, learner = reference.expected("sac"), sac(reference)
        give_noise([reference.tensors("noise")["actor"]])
        loss, metrics = learner.loss_actor(reference.batch, torch.Generator())
        reference.close(metrics["loss/actor"], expected["actor_loss"], "actor loss")
        reference.close(metrics["actor/entropy"], -expected["log_prob"], "log-density of the sampled actions")
        # the temperature's loss is linear in log alpha here, in alpha there; the factor it multiplies is the same
        (slope,) = torch.autograd.grad(loss, learner.temperature.parameters(), retain_graph=True)
        reference.close(-slope, expected["entropy_excess"], "entropy excess")
        layout = mlp_layout(reference.gradients("sac"), "actor", "mean", "log_std")
        found = gradients(loss, learner.nets.actor, layout)
        assert found.keys() == layout.keys()
        for name, value in found.items():
            reference.close(value, layout[name], f"gradient of actor.{name}")


class TestIQL:
    @pytest.fixture
    def learner(self, reference):
        config = IQLConfig(
            network=reference.network,
            discount=SETTINGS["discount"],
            expectile=SETTINGS["expectile"],
            inverse_temperature=SETTINGS["inverse_temperature"],
        )
        return reference.build(IQL, config)

    def test_value_and_critic(self, reference, learner):
        expected = reference.expected("iql")
        value_loss, _ = learner.loss_value(reference.batch, torch.Generator())
        critic_loss, _ = learner.loss_critic(reference.batch, torch.Generator())
        reference.close(value_loss, expected["value_loss"], "value loss")
        reference.close(critic_loss, expected["td_loss"].sum(), "critic loss")

    def test_actor(self, reference, learner):
        expected = reference.expected("iql")
        assert expected["weight"].max() > 2 > 0.5 > expected["weight"].min(), "the fixture must hold both signs"
        loss, metrics = learner.loss_actor(reference.batch, torch.Generator())
        reference.close(metrics["actor/weight"], expected["weight"], "weights")
        reference.close(loss, expected["actor_loss"], "actor loss")
        layout = mlp_layout(reference.gradients("iql"), "actor", "mean")
        for name, value in gradients(loss, learner.nets.actor, layout).items():
            reference.close(value, layout[name], f"gradient of actor.{name}")


def test_bc_squared_error(reference):
    learner = reference.build(BC, BCConfig(network=reference.network, likelihood="mse"))
    loss, _ = learner.loss_actor(reference.batch, torch.Generator())
    # ours sums over action dimensions, d3rlpy's is the mean over them
    reference.close(loss / reference.case["action"], reference.expected("bc")["loss"], "squared error")
