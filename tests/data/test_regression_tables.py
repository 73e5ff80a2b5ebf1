"""Shifted tables: test rows are the ones that were held out, and nothing of them is in the standardisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steelyard.data.regression_tables import (
    LIMIT,
    california_shifts,
    diabetes_shifts,
    digit_shifts,
    important,
    table_shift,
    tails,
    turned,
    uci_shifts,
)
from steelyard.errors import DataError


@pytest.fixture
def table() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(200, 3))
    return inputs, inputs @ np.array([0.1, 3.0, 1.0]) + 5


def test_tails_hold_out_the_extremes_of_what_matters(table: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, targets = table
    assert important(inputs, targets)[:2] == [1, 2]
    shifts = dict(tails(inputs, targets))
    assert list(shifts) == ["top 1", "bottom 1", "top 2", "bottom 2"]
    top = shifts["top 1"]
    assert inputs[top, 1].min() >= inputs[~top, 1].max()
    assert 0.19 < top.mean() < 0.21


def test_standardised_by_training_rows_alone(table: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, targets = table
    mask = dict(tails(inputs, targets))["top 1"]
    wide = np.concatenate([inputs, np.ones((200, 1))], 1)
    shift = table_shift("top", "made", wide, targets, mask)
    assert shift.inputs.shape == (int((~mask).sum()), 3), "a constant column is dropped"
    np.testing.assert_allclose(shift.inputs.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(shift.targets.std(), 1)
    assert shift.test_targets.mean() > 1.2
    assert abs(shift.test_inputs).max() <= LIMIT
    # the same rows, changed only where they are tested: training numbers do not move
    moved = table_shift("top", "made", np.where(mask[:, None], 100 * wide, wide), targets + 7.0 * mask, mask)
    np.testing.assert_array_equal(moved.inputs, shift.inputs)
    np.testing.assert_array_equal(moved.targets, shift.targets)


def test_train_and_test_rows_are_different(table: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, targets = table
    mask = dict(tails(inputs, targets))["bottom 2"]
    shift = table_shift("bottom", "made", inputs, targets, mask, train_rows=50, test_rows=20)
    assert len(shift.inputs) == 50
    assert len(shift.test_inputs) == 20
    # back in the table's units the rows are those of the mask
    centre = targets[~mask]
    assert set(np.round(shift.test_targets * 1e6)).isdisjoint(np.round(shift.targets * 1e6)), centre


def test_reads_gap_splits(tmp_path: Path, table: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, targets = table
    masks = np.zeros((3, 200), bool)
    masks[1, :40] = masks[2, 40:90] = True
    np.savez(tmp_path / "made.npz", X=inputs, y=targets, gap_test_mask=masks)
    shifts = {shift.name: shift for shift in uci_shifts(tmp_path)}
    assert list(shifts)[:2] == ["made gap 1", "made gap 2"]
    assert len(shifts["made gap 2"].test_targets) == 50
    with pytest.raises(DataError, match=r"expected tables NAME\.npz"):
        uci_shifts(tmp_path / "none")
    np.savez(tmp_path / "other.npz", X=inputs)
    with pytest.raises(DataError, match="expected arrays X and y, found X"):
        uci_shifts(tmp_path)


def test_california(tmp_path: Path) -> None:
    lines = ["total_bedrooms,median_income,median_house_value,ocean_proximity"]
    lines += [f"{'' if i == 3 else i},{i % 7},{1000 * i},{'INLAND' if i < 40 else '<1H OCEAN'}" for i in range(90)]
    (tmp_path / "housing.csv").write_text("\n".join(lines) + "\n")
    there, back = california_shifts(tmp_path)
    assert len(there.inputs) == 40
    assert len(there.test_inputs) == 50
    assert len(back.inputs) == 50
    assert there.test_targets.min() > there.targets.max()
    assert np.isfinite(there.inputs).all()
    with pytest.raises(DataError, match="cannot be read"):
        california_shifts(tmp_path / "none")


def test_turned_images() -> None:
    image = np.zeros((1, 8, 8))
    image[0, 1, 3] = 1
    np.testing.assert_allclose(turned(turned(image, 90), -90), image, atol=1e-9)
    np.testing.assert_allclose(turned(image, 0), image, atol=1e-12)
    np.testing.assert_allclose(turned(image, 180)[0], image[0, ::-1, ::-1], atol=1e-9)


def test_bundled_tables() -> None:
    pytest.importorskip("sklearn")
    shifts = digit_shifts()
    assert len(shifts) == 18
    assert len({shift.name for shift in shifts}) == 18
    assert set(shifts[0].groups) == set(range(5))
    assert shifts[0].inputs.shape[1] == 64
    assert len(diabetes_shifts()) >= 6


def test_real_tables(shared_data: Path) -> None:
    shifts = [*uci_shifts(shared_data / "uci_regression"), *california_shifts(shared_data / "california_housing_shift")]
    assert len({shift.table for shift in shifts}) >= 10
    assert len(shifts) > 40
    assert all(np.isfinite(shift.inputs).all() and len(shift.test_inputs) >= 60 for shift in shifts)
