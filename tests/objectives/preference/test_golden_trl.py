"""Losses and their gradients with respect to token log-probs, as TRL 1.16 computed them; TRL itself is not needed.

`tests/golden/make_trl_preference.py` wrote the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner

from .toys import TablePolicy

CASES = json.loads((Path(__file__).resolve().parents[2] / "golden" / "trl_preference.json").read_text())["cases"]
TOLERANCE = 1e-5


def close_to_trl(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare by the norm of the difference, relative to TRL's."""
    assert float((found - wanted).norm()) <= TOLERANCE * max(float(wanted.norm()), 1e-3)


def batch_of_case(case: dict[str, Any], prompts: list[list[int]], completions: list[list[int]]) -> ExperienceBatch:
    """Return our batch of a case's rows; a group's completions share their first row's prompt."""
    number = case.get("prompt_of", list(range(len(prompts))))
    first = [number.index(k) for k in range(max(number) + 1)]
    width, longest = max(len(prompts[row]) for row in first), max(map(len, completions))
    tensors = {
        name: torch.tensor(case[name])
        for name in ("rewards", "labels", "pairs", "mismatched", "sampler_token_logps", "reference_token_logps")
        if name in case
    }
    return ExperienceBatch(
        prompts=torch.tensor([[0] * (width - len(prompts[row])) + prompts[row] for row in first]),
        prompt_mask=torch.tensor([[0.0] * (width - len(prompts[r])) + [1.0] * len(prompts[r]) for r in first]),
        completions=torch.tensor([row + [0] * (longest - len(row)) for row in completions]),
        scored_mask=torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in completions]),
        prompt_of=torch.tensor(number),
        **tensors,
    )


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name):
    case = CASES[name]
    kind = name.partition("/")[0]
    config = PREFERENCE_OBJECTIVES[kind](**case["settings"])
    learner = build_preference_learner(TablePolicy(), config)
    rows = [[0] * length for length in case["lengths"]]
    batch, _ = learner.complete(batch_of_case(case, [[0]] * len(rows), rows), {})
    if "trl_advantages" in case:
        close_to_trl(batch.advantages[:, 0], torch.tensor(case["trl_advantages"]))
        assert sum(map(math.isnan, case["rewards"])) == 1
    leaf = torch.tensor(case["token_logps"]).requires_grad_()
    loss, metrics = learner.surrogate(Outputs(leaf), batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=TOLERANCE, abs=TOLERANCE)
    close_to_trl(gradient, torch.tensor(case["gradient"]))
    assert (gradient != 0).any()
    if name == "kto/kto":
        assert metrics["kto/kappa"] > 0


def test_the_cases_are_there():
    assert {name.partition("/")[0] for name in CASES} == {
        "dpo", "ipo", "kto", "apo", "simpo", "orpo", "rloo", "grpo"
    }  # fmt: skip
    clipped = [n for n in CASES if n.startswith(("rloo", "grpo"))]
    assert len(clipped) == 8
    for name in clipped:  # ratios beyond the clip on both sides
        case = CASES[name]
        differences = torch.tensor(case["token_logps"]) - torch.tensor(case["sampler_token_logps"])
        assert float(differences.max()) > 0.02
        assert float(differences.min()) < -0.02
