import numpy as np
import pytest

from steelyard.adapt.base import Support
from steelyard.bench.diversity import measure
from steelyard.errors import DataError


def _group(margins, labels=None):
    margins = np.asarray(margins, float)
    return Support(margins[:, :, None], np.ones(len(margins)) if labels is None else np.asarray(labels, float))


def test_copies_of_one_head_cannot_help():
    column = np.random.default_rng(0).standard_normal((50, 1))
    found = measure([_group(np.repeat(column, 4, 1))], "preference")
    assert found.disagreement == 0
    assert found.directions == pytest.approx(1)
    assert found.correlation == pytest.approx(1)
    assert found.gain == 0
    assert "cannot help" in found.sentence()


def test_by_hand():
    # member 0 is right on the first group only, member 1 on the second only; member 0's margins are twice as large
    first, second = _group([[2, -1], [2, -1]]), _group([[-2, 1], [-2, 1]])
    found = measure([first, second], "preference")
    assert found.uniform == 0.5
    assert found.best == 1.0
    assert found.gain == 0.5
    assert found.disagreement == 1
    assert found.correlation == pytest.approx(-1)
    assert found.directions == pytest.approx(1)
    assert "can help" in found.sentence()
    assert found.to_dict()["gain"] == 0.5


def test_unrelated_members_are_as_many_directions():
    members = np.random.default_rng(1).standard_normal((40_000, 5))
    found = measure([_group(members)], "preference")
    assert found.directions == pytest.approx(5, rel=0.01)
    assert found.correlation == pytest.approx(0, abs=0.02)
    assert found.disagreement == pytest.approx(0.5, abs=0.01)


def test_regression_and_classification():
    labels = np.array([0.0, 1.0])
    members = np.array([[0.0, 2.0], [1.0, 3.0]])[:, :, None]  # the first member is right, the second two too high
    found = measure([Support(members, labels)], "regression")
    assert found.uniform == pytest.approx(1)
    assert found.gain == pytest.approx(1)
    assert "100.0 % of the error" in found.sentence()
    same = measure([Support(members[:, [1, 1]], labels)], "regression").sentence()
    assert "cannot help" in same
    assert "differ on" not in same
    classes = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    found = measure([Support(classes, np.array([0.0]))], "classification")
    assert found.disagreement == 1
    assert found.best == 1


def test_the_threshold_is_one_point():
    """100 examples: a best member that is right on one more than the mean of both, and on none more."""
    for more, words in ((2, "can help"), (1, "can help"), (0, "cannot help")):
        margins = np.ones((100, 3))
        margins[:more] = [1, -2, -2]
        assert f"Re-weighting {words}" in measure([_group(margins)], "preference").sentence()
    rows = np.ones((201, 3))
    rows[0] = [1, -2, -2]  # half a point
    assert "cannot help" in measure([_group(rows)], "preference").sentence()


def test_no_group_is_an_error():
    with pytest.raises(DataError, match="at least one held-out group"):
        measure([], "preference")
