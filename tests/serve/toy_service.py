"""A service over a toy head set, in a process of its own: python toy_service.py '{"port": 0}' '{"seconds": 0.4}'."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steelyard.adapt.base import Task
from steelyard.adapt.head_set import LinearHeads
from steelyard.serve.config import ServeConfig
from steelyard.serve.server import serve

MEMBERS, FEATURES = 7, 6


@dataclass(frozen=True)
class ToyHeads(LinearHeads):
    """Linear heads that read texts: features are counts of vowels and the length. May be slow, and says how often."""

    seconds: float = 0.0

    def features(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        if completions != ["warm-up"]:
            print(f"backbone: {len(completions)}", file=sys.stderr, flush=True)
            time.sleep(self.seconds)
        if "raise" in completions:
            raise RuntimeError("the secret text")
        return np.array(
            [[(p + c).count(v) for v in "aeiou"] + [len(c)] for p, c in zip(prompts, completions, strict=True)], float
        )


def toy_heads(seed: int = 0, seconds: float = 0.0, task: Task = "preference", outputs: int = 1) -> ToyHeads:
    """Return toy heads; those of a regression have whole numbers, so that sums of losses are exact in any order."""
    weight = np.random.default_rng(seed).normal(size=(MEMBERS, outputs, FEATURES))
    if task == "regression":
        weight = np.round(2 * weight)
    return ToyHeads(weight, np.zeros((MEMBERS, outputs)), task, seconds)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    heads = toy_heads(**json.loads(sys.argv[2]))
    serve(heads, ServeConfig(**options), on_listening=lambda address, _: print(address, flush=True))
