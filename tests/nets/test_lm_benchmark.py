"""The benchmark against TRL runs, and what it compares is the same training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.lm, pytest.mark.slow]


def test_quick_benchmark_runs_and_losses_agree(tmp_path):
    for package in ("transformers", "peft", "trl"):
        pytest.importorskip(package)
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "preference_step.py"), "--out", str(out), "--model=tiny"]
    subprocess.run([*command, "--quick", "--repeats=1", "--only=full"], check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    steps = [row for row in rows if not row["task"].startswith("sample")]
    compared = [row for row in steps if row["contender"] != "steelyard"]
    assert {row["task"] for row in steps} == {"dpo full", "sft full"}
    assert {row["contender"] for row in compared} >= {"TRL", "TRL, as it comes"}
    assert all(row["loss_difference"] <= 1e-4 for row in compared)
    assert len({round(loss, 6) for loss in steps[0]["losses"]}) > 1, "the losses must move to mean something"
    assert all(row["speedup_of_steelyard"] > 0 and row["peak_rss_mb"] > 0 for row in rows)
