"""Tables with a shift between training and test rows: regression (UCI, California housing, diabetes) and digits.

| shift | training rows | test rows |
|---|---|---|
| gap | the outer thirds of one column | its middle third (Foong et al., "Between-model uncertainty", 2019) |
| top, bottom | the rest | the highest, or lowest, 20 % of one of the two columns that the target depends on most |
| inland, ocean | districts far from the sea | districts within an hour of it, and the reverse |
| digits | digits as they are, and mildly rotated or noisy | stronger rotations, noise, shifts, other contrast |

Inputs and targets are standardised by the training rows; columns that do not vary there are dropped, inputs are cut
at `LIMIT`. The UCI files are those of the repositories cambridge-mlg/DUN and treforevans/uci_datasets; diabetes and
digits come with scikit-learn.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError, require
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TAIL = 0.2
"""Share of the rows that a top or bottom shift holds out."""
LIMIT = 5.0
"""Standardised inputs are cut at so many deviations: some columns of the tables have tails of a hundred."""
TARGET_COLUMN, PLACE_COLUMN = "median_house_value", "ocean_proximity"


@dataclass(frozen=True)
class TableShift:
    """Training rows, and test rows that are not like them.

    Attributes:
        name: of the shift, unique.
        table: data set; statistics are clustered by it.
        inputs, targets: [N, D] and [N] to train on, standardised; targets of a classification are class numbers.
        groups: [N], where a training row is from; all 0 where nothing is known of it.
        test_inputs, test_targets: [M, D] and [M].
    """

    name: str
    table: str
    inputs: Floats
    targets: Floats
    groups: npt.NDArray[np.int64]
    test_inputs: Floats
    test_targets: Floats


def uci_shifts(
    folder: str | Path, gaps: int = 2, columns: int = 2, train_rows: int = 3000, test_rows: int = 1000
) -> list[TableShift]:
    """Return the shifts of every NAME.npz (X, y, and gap_test_mask where there is one) of a folder.

    Args:
        folder: of the files.
        gaps: how many gap splits of a table: those of the columns that the target depends on most.
        columns: how many columns have their top and bottom held out.
        train_rows: at most so many training rows, drawn at random.
        test_rows: at most so many test rows.

    Raises:
        DataError: no file, or one without X and y.
    """
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise DataError(f"{folder}: expected tables NAME.npz with X and y, found none")
    found = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            if "X" not in arrays or "y" not in arrays:
                raise DataError(f"{file}: expected arrays X and y, found {', '.join(arrays)}")
            inputs, targets = arrays["X"].astype(np.float64), arrays["y"].astype(np.float64).ravel()
            masks = arrays["gap_test_mask"].astype(bool) if "gap_test_mask" in arrays else np.zeros((0, len(inputs)))
        shifts = [(f"gap {column}", masks[column]) for column in important(inputs, targets)[:gaps] if len(masks)]
        found += [
            table_shift(name, file.stem, inputs, targets, mask, train_rows, test_rows)
            for name, mask in [*shifts, *tails(inputs, targets, columns)]
        ]
    return found


def california_shifts(folder: str | Path, train_rows: int = 3000, test_rows: int = 1000) -> list[TableShift]:
    """Return inland -> ocean and ocean -> inland of housing.csv, targets in units of the training rows' deviation.

    Raises:
        DataError: the file or a column is missing.
    """
    file = Path(folder) / "housing.csv"
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if not rows or not {TARGET_COLUMN, PLACE_COLUMN} <= rows[0].keys():
        raise DataError(
            f"{file}: expected columns {TARGET_COLUMN} and {PLACE_COLUMN}, found {', '.join(rows[0] if rows else ())}"
        )
    columns = [name for name in rows[0] if name not in (TARGET_COLUMN, PLACE_COLUMN)]
    inputs = np.array([[float(row[name] or "nan") for name in columns] for row in rows])
    # empty cells (total_bedrooms) get the median of their column
    inputs = np.where(np.isfinite(inputs), inputs, np.nanmedian(inputs, 0))
    targets = np.array([float(row[TARGET_COLUMN]) for row in rows])
    inland = np.array([row[PLACE_COLUMN] == "INLAND" for row in rows])
    ocean = np.array([row[PLACE_COLUMN] == "<1H OCEAN" for row in rows])
    kept = inland | ocean
    return [
        table_shift(name, "california", inputs[kept], targets[kept], mask[kept], train_rows, test_rows)
        for name, mask in (("inland to ocean", ocean), ("ocean to inland", inland))
    ]


def diabetes_shifts() -> list[TableShift]:
    """Return top and bottom shifts of scikit-learn's diabetes table (442 rows).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    table = require("sklearn.datasets", "tables").load_diabetes()
    inputs, targets = np.asarray(table.data, np.float64), np.asarray(table.target, np.float64)
    return [table_shift(name, "diabetes", inputs, targets, mask) for name, mask in tails(inputs, targets, columns=4)]


def digit_shifts(seed: int = 0) -> list[TableShift]:
    """Return classification under 18 changes of scikit-learn's digits (8 x 8 pixels, 1,797 images).

    Training images are two thirds as they are, and a quarter of these under each of four mild changes (groups 0 to 4:
    as they are, turned left, turned right, noisy, paler). Test images are the other third, changed more.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    table = require("sklearn.datasets", "tables").load_digits()
    images, labels = np.asarray(table.images, np.float64) / 16, np.asarray(table.target, np.float64)
    generator = numpy_generator(seed, "digits")
    order = generator.permutation(len(images))
    train, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    mild = [images[train], turned(images[train], 20), turned(images[train], -20),
            noisy(images[train], 0.2, generator), 0.6 * images[train]]  # fmt: skip
    share = [np.arange(len(train))] + [np.flatnonzero(generator.random(len(train)) < 0.25) for _ in mild[1:]]
    inputs = np.concatenate([part[rows] for part, rows in zip(mild, share, strict=True)])
    targets = np.concatenate([labels[train][rows] for rows in share])
    groups = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(share)])
    flat = inputs.reshape(len(inputs), -1)
    centre = flat.mean(0)
    return [
        TableShift(
            f"digits {name}",
            "digits",
            flat - centre,
            targets,
            groups,
            changed.reshape(len(test), -1) - centre,
            labels[test],
        )
        for name, changed in _changes(images[test], generator)
    ]


def _changes(images: Floats, generator: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """Yield 18 changes of images [N, 8, 8]."""
    for degrees in (-60, -45, -30, 30, 45, 60):
        yield f"turned {degrees}", turned(images, degrees)
    for deviation in (0.3, 0.4, 0.5):
        yield f"noise {deviation}", noisy(images, deviation, generator)
    for name, rows, columns in (("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1)):
        yield f"moved {name}", np.roll(images, (rows, columns), (1, 2))
    for contrast in (0.25, 0.4):
        yield f"contrast {contrast}", contrast * images
    yield "negative", 1 - images
    yield "mirrored", images[:, :, ::-1]
    yield "upper half only", np.where(np.arange(8)[:, None] < 4, images, 0.0)


def turned(images: Floats, degrees: float) -> Floats:
    """Return images [N, S, S] turned about their centre, bilinear, black outside."""
    size = images.shape[1]
    angle = np.deg2rad(degrees)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    y = np.cos(angle) * rows - np.sin(angle) * columns + (size - 1) / 2
    x = np.sin(angle) * rows + np.cos(angle) * columns + (size - 1) / 2
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    y, x = np.clip(y, -1, size) + 1, np.clip(x, -1, size) + 1
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = y - top, x - left
    return np.asarray(
        (1 - down) * (1 - right) * padded[:, top, left] + (1 - down) * right * padded[:, top, left + 1]
        + down * (1 - right) * padded[:, top + 1, left] + down * right * padded[:, top + 1, left + 1]
    )  # fmt: skip


def noisy(images: Floats, deviation: float, generator: np.random.Generator) -> Floats:
    """Return images with Gaussian noise."""
    return np.asarray(images + deviation * generator.normal(size=images.shape))


def important(inputs: Floats, targets: Floats) -> list[int]:
    """Return the columns of inputs [N, D] by their absolute correlation with targets [N], highest first."""
    centred = inputs - inputs.mean(0)
    deviation = np.sqrt((centred**2).mean(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = centred.T @ (targets - targets.mean()) / deviation
    return [int(column) for column in np.argsort(-np.abs(np.where(deviation > 1e-9, correlation, 0)), kind="stable")]


def tails(inputs: Floats, targets: Floats, columns: int = 2) -> list[tuple[str, Bools]]:
    """Return (name, test rows [N]) of the top and the bottom of the most important columns.

    Where a column has few values, all rows of its extreme ones are held out, as long as a fifth to a half is left out.
    """
    found = []
    for column in important(inputs, targets)[:columns]:
        values = inputs[:, column]
        low, high = np.quantile(values, (TAIL, 1 - TAIL))
        for name, mask in ((f"top {column}", values >= high), (f"bottom {column}", values <= low)):
            if 0.5 * TAIL <= mask.mean() <= 0.5:
                found.append((name, mask))
    return found


def table_shift(
    name: str,
    table: str,
    inputs: Floats,
    targets: Floats,
    held_out: Bools,
    train_rows: int = 3000,
    test_rows: int = 1000,
) -> TableShift:
    """Return a shift whose test rows are `held_out` [N], standardised by the rest, at most so many rows of either."""
    generator = numpy_generator(0, f"tables/{table}/{name}")
    train = generator.permutation(np.flatnonzero(~held_out))[:train_rows]
    test = generator.permutation(np.flatnonzero(held_out))[:test_rows]
    centre, deviation = inputs[train].mean(0), inputs[train].std(0)
    kept = deviation > 1e-9 * np.maximum(1, np.abs(centre))
    middle, spread = targets[train].mean(), targets[train].std()
    if not kept.any() or not spread > 0 or not len(test):
        raise DataError(f"table {table!r}, shift {name!r}: expected inputs and targets that vary, and test rows")

    def scaled(rows: npt.NDArray[np.int64]) -> Floats:
        return np.asarray(np.clip((inputs[rows][:, kept] - centre[kept]) / deviation[kept], -LIMIT, LIMIT))

    return TableShift(
        f"{table} {name}", table, scaled(train), (targets[train] - middle) / spread, np.zeros(len(train), np.int64),
        scaled(test), (targets[test] - middle) / spread,
    )  # fmt: skip
