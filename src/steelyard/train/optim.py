"""Optimisers: one Adam per group of a learner, gradients that reach only the groups of a phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from steelyard.config import Config, require_positive, require_range
from steelyard.objectives.base import Group, Learner, Phase


@dataclass(frozen=True)
class OptimConfig(Config):
    """How gradients become steps; learning rates belong to the objective."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = None
    """Clip the gradient of a phase to this global norm; None: no clipping."""
    autocast: Literal["off", "bf16"] = "off"
    """bf16 autocast of the forward passes; output heads and losses stay in float32."""
    shards: int = 1
    """Work each batch in so many equal parts, each with random numbers of its own, and average the gradients: less
    memory in one process, or the parts of several (`torchrun`), which 1 gives one part each."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "eps", "max_grad_norm", "shards")
        require_range(self, 0, 1, "betas")


class Adam:
    """AdamW of one group, through torch's functional form: an update of a small network is mostly overhead.

    Args:
        group: what is stepped.
        config: decay rates and epsilon.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, group: Group, config: OptimConfig) -> None:
        self.group, self.config = group, config
        self.parameters = list(group.parameters)
        zeros = {"step": [torch.zeros((), device=p.device) for p in self.parameters]}
        zeros |= {name: [torch.zeros_like(p) for p in self.parameters] for name in self.STATE[1:]}
        self.state: dict[str, list[Tensor]] = zeros

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """Change the parameters, in place."""
        beta1, beta2 = self.config.betas
        adamw(
            self.parameters,  # type: ignore[arg-type]
            gradients,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            [],
            self.state["step"],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.group.learning_rate,
            weight_decay=self.group.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )


class Optimizers:
    """The optimisers of all groups of a learner."""

    def __init__(self, learner: Learner, config: OptimConfig) -> None:
        self.config = config
        self.adams = {name: Adam(group, config) for name, group in learner.groups.items()}

    def step(self, phase: Phase, loss: Tensor) -> Tensor:
        """Differentiate `loss` with respect to the phase's groups only, clip, and step. Return the gradient's norm."""
        return self.apply(phase, self.gradients(phase, loss))

    def gradients(self, phase: Phase, loss: Tensor) -> list[Tensor]:
        """Return the gradients of `loss` with respect to the parameters of the phase's groups.

        Nothing but the named groups receives a gradient, so a loss may run through frozen or target networks freely.
        """
        parameters = [parameter for name in phase.groups for parameter in self.adams[name].parameters]
        return list(torch.autograd.grad(loss, parameters))

    def apply(self, phase: Phase, gradients: list[Tensor]) -> Tensor:
        """Clip the gradients of a phase, in place, and step its groups. Return their norm before clipping."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.config.max_grad_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0))
        first = 0
        for name in phase.groups:
            adam = self.adams[name]
            adam.step(gradients[first : first + len(adam.parameters)])
            first += len(adam.parameters)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimiser state as flat tensors, keyed `group/index/name`."""
        return {
            f"{name}/{index}/{key}": value
            for name, adam in self.adams.items()
            for key, values in adam.state.items()
            for index, value in enumerate(values)
        }

    def load_state_tensors(self, flat: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned; optimisers keep pointing at the learner's own parameters.

        A group that has none in `flat` has not stepped yet.
        """
        for key, value in self.state_tensors().items():
            if key in flat:
                value.copy_(flat[key])
