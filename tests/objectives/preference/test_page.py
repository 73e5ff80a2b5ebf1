"""The page of the preference objectives: its code runs and its table is complete."""

from __future__ import annotations

import re
from pathlib import Path

from steelyard.objectives.preference import PREFERENCE_OBJECTIVES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "objectives" / "preference.md"


def test_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), space)
    assert "learner" in space


def test_every_objective_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \| .*\| .* \| .* \|$", PAGE.read_text(), re.MULTILINE)
    assert [kind for kind in rows if kind in PREFERENCE_OBJECTIVES] == list(PREFERENCE_OBJECTIVES)
