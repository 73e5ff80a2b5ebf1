"""`benchmarks/serve_reward.py`: mixed requests of eight clients without an error, and no loss by SIGKILL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import process  # skips where the service cannot run

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/serve_reward.py"
assert process


@pytest.mark.parametrize("requests", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_error_and_no_loss(requests, tmp_path):
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        str(BENCHMARK),
        "--requests",
        str(requests),
        "--out",
        str(out),
        "--folder",
        str(tmp_path),
    ]
    work = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert work.returncode == 0, work.stdout + work.stderr
    report = json.loads(out.read_text())
    mixed, killed = report["mixed"], report["killed"]
    assert mixed["requests"] >= requests
    assert mixed["errors"] == killed["errors"] == []
    assert mixed["users_with_exact_sums"] == mixed["users"] == 50
    assert all(mixed["latency_ms"][kind]["count"] for kind in ("score", "feedback", "rank", "profile", "refused"))
    assert killed["acknowledged_before_the_kill"] >= requests // 10
    assert killed["acknowledged_and_lost"] == 0
    assert report["versions"]["fastapi"]
    assert report["machine"]["cores"]
    for said in ("0 errors", "0 lost", "a second", "median", "p99"):
        assert said in work.stdout
