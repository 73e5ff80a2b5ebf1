"""Guards: a value that is not finite stops the run with one sentence that names it and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from steelyard.errors import NonFiniteError


class FiniteGuard:
    """Watches named scalars without waiting for the device.

    `watch` keeps, on the device, the first step at which each name was not finite; `check` fetches and raises. The loop
    checks whenever it fetches metrics and always before it writes a checkpoint, so no checkpoint ever holds a NaN that
    a loss or a gradient has shown.
    """

    def __init__(self) -> None:
        self._first_bad: dict[str, Tensor] = {}

    def watch(self, name: str, value: Tensor, step: int) -> None:
        """Note whether `value` (any shape) is finite at `step`; on the CPU, where looking is free, raise at once."""
        if value.device.type == "cpu":
            if not bool(torch.isfinite(value.detach()).all()):
                raise _not_finite(name, step)
            return
        finite = torch.isfinite(value.detach()).all()
        before = self._first_bad.get(name)
        if before is None:
            self._first_bad[name] = torch.where(finite, -1, step)
        else:
            self._first_bad[name] = torch.where(finite | (before >= 0), before, step)

    def check(self) -> None:
        """Raise if anything watched was not finite.

        Raises:
            NonFiniteError: names the tensor that went first and the step.
        """
        bad = {name: int(step) for name, step in self._first_bad.items() if int(step) >= 0}
        if bad:
            name = min(bad, key=lambda key: bad[key])
            raise _not_finite(name, bad[name])


def _not_finite(name: str, step: int) -> NonFiniteError:
    return NonFiniteError(
        f"{name} is not finite at update step {step}; training stopped, the last good checkpoint stays"
    )


def require_finite(name: str, value: Tensor, step: int, unit: str = "environment step") -> None:
    """Raise `NonFiniteError` at once if `value` holds NaN or infinity (for actions and observations)."""
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{name} is not finite at {unit} {step}")
