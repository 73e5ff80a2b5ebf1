"""E2: settings come from other tables, a floor keeps weights from collapsing, and what is absent is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steelyard.adapt.base import Support
from steelyard.data.regression_tables import TableShift
from steelyard.errors import MissingExtraError
from steelyard.recipes import hyre_tables
from steelyard.recipes.hyre_tables_page import UNTUNED, Ratios, findings
from steelyard.recipes.hyre_tables_runs import (
    BEST,
    DIGITS,
    NO_FLOOR,
    REGRESSION,
    RESIDUAL,
    SINGLE,
    SPREAD,
    TableStudy,
    digits,
    methods,
    regression,
)

TINY = TableStudy(steps=30, num_heads=6, vanilla=3, hidden=(8,), draws=3, batch_size=32, shots=(2, 6))


@pytest.fixture(scope="module")
def shift() -> TableShift:
    generator = np.random.default_rng(0)
    inputs, test = generator.normal(size=(150, 3)), generator.normal(size=(40, 3)) + 3
    targets, there = np.tanh(inputs).sum(1), np.tanh(test).sum(1) + 2
    return TableShift("made top", "made", inputs, targets, np.zeros(150, np.int64), test, there)


def row(table: str, shift: str, setting: float, ratio: float, method: str = NO_FLOOR) -> dict[str, Any]:
    return {"ensemble": "shared", "method": method, "n": 5, "table": table, "shift": shift, "setting": setting,
            "ratio": ratio, "ess": 1.0, "worst_draw": ratio}  # fmt: skip


def test_settings_of_a_table_come_from_the_others() -> None:
    rows = [
        row("a", "a top", 1.0, 0.5), row("a", "a top", 3.0, 0.9),
        row("b", "b top", 1.0, 0.9), row("b", "b top", 3.0, 0.5),
        row("c", "c top", 1.0, 0.9), row("c", "c top", 3.0, 0.8),
    ]  # fmt: skip
    ratios = Ratios(rows)
    # a alone likes 1, so that a itself gets 3; without b, a and c together like 1
    assert ratios.of("shared", NO_FLOOR, 5).tolist() == [0.9, 0.9, 0.9]
    assert ratios.of("shared", NO_FLOOR + UNTUNED, 5).tolist() == [0.5, 0.9, 0.9]
    assert np.allclose(ratios.gain("shared", NO_FLOOR, 5), -100 * np.log(0.9))


def test_one_table_has_nothing_to_choose_on() -> None:
    rows = [row("a", "a top", setting, ratio) for setting, ratio in ((0.1, 0.2), (1.0, 0.6), (10.0, 0.1))]
    assert Ratios(rows).of("shared", NO_FLOOR, 5).tolist() == [0.6], "the middle of the grid, not the best"


def test_a_floor_keeps_weights_from_collapsing() -> None:
    generator = np.random.default_rng(1)
    members = 3 + generator.normal(size=(5, 50, 1))  # far off under the shift, and far apart
    labels = Support(members, np.zeros(5))
    found = methods(labels, np.full(50, 1e-3))
    ess = {name: found[name, 1.0].begin(50).update(labels).diagnostics()["ess"] for name in (NO_FLOOR, SPREAD)}
    assert ess[NO_FLOOR] < 1.01
    assert ess[SPREAD] > 1.3


def test_regression_is_relative_to_the_uniform_mean(shift: TableShift) -> None:
    for kind in REGRESSION:
        rows = regression(shift, kind, TINY)
        found = {(r["method"], r["setting"], r["n"]): r["ratio"] for r in rows}
        assert all(np.isfinite(value) and value > 0 for value in found.values())
        assert found[BEST, 0.0, 6] <= found[SINGLE, 0.0, 6] + 1e-9
        # an offset of the targets is all that the correction needs
        assert found[RESIDUAL, 0.0, 6] < 1


def test_digits_choose_eta_on_other_changes() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(90, 4))
    labels = (inputs[:, 0] > 0) + 2.0 * (inputs[:, 1] > 0)
    shifts = [
        TableShift(f"digits {name}", "digits", inputs, labels, np.arange(90) % 5, factor * inputs[:60], labels[:60])
        for name, factor in (("a", 1.0), ("b", 0.5), ("c", -1.0))
    ]
    for kind in DIGITS:
        rows = digits(shifts, kind, TINY)
        assert len(rows) == 3 * 2 * 4
        assert all(0 <= r["accuracy"] <= 1 for r in rows)


def test_what_is_absent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise MissingExtraError("sklearn is not installed; install it with: pip install 'steelyard[tables]'")

    monkeypatch.setattr(hyre_tables, "shifts_of", absent)
    sections, found = hyre_tables.run(TINY, tmp_path, 1, Console(quiet=True))
    assert found == []
    assert any("pip install" in note for part in sections[0].parts if isinstance(part, tuple) for note in part)


@pytest.mark.slow
def test_study_of_bundled_tables(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = TableStudy(steps=5, num_heads=4, vanilla=2, hidden=(8,), draws=2)
    sections, found = hyre_tables.run(config, tmp_path, 1, Console(quiet=True))
    assert len(found) == 5
    assert {one.verdict for one in found} <= {"holds", "does not hold", "not clear"}
    assert len(sections) == 1
    assert len((tmp_path / "digits.csv").read_text().splitlines()) == 1 + 18 * 4 * 2 * 4
    assert (tmp_path / "regression.csv").exists()
    assert findings([], []) == []
