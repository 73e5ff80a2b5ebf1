"""What the service keeps in memory of users: the last used ones, never older than the store, none that is deleted."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.errors import DataError
from steelyard.serve.bodies import FeedbackBody, Item
from steelyard.serve.config import ServeConfig
from steelyard.serve.service import RewardService

from .toy_service import toy_heads

ITEM = Item(completion="aei")


def opened(path, **config) -> RewardService:
    return RewardService(toy_heads(), ServeConfig(store=str(path), cached_users=2, batch_wait_ms=0, **config))


@pytest.fixture
def service(tmp_path):
    one = opened(tmp_path / "p.sqlite")
    yield one
    one.close()


def learn(service: RewardService, user: str, key: str = "k", chosen: str = "aaa", rejected: str = "eee") -> None:
    sides = {"chosen": Item(completion=chosen), "rejected": Item(completion=rejected)}
    service.feedback(FeedbackBody(user=user, key=key, **sides))


def test_only_the_last_used_are_kept(service):
    """Two of five, in both caches (the second also holds what nobody in particular gets); all are served rightly."""
    first = {}
    for number, user in enumerate("abcde"):
        learn(service, user, chosen="a" * (number + 1))
        first[user] = service.score([ITEM], [user])
    assert list(service._known) == ["d", "e"]
    assert len(service.personalizer._functions) <= 2
    service.score([ITEM], ["d"])
    service.score([ITEM], ["a"])
    assert list(service._known) == ["d", "a"]
    for user, scores in first.items():
        np.testing.assert_array_equal(service.score([ITEM], [user]), scores)


def test_deletion_and_change_reach_the_memory(service):
    learn(service, "ann")
    one = service.score([ITEM], ["ann"])
    (before,) = service.personalizer._functions
    learn(service, "ann", "l")
    two = service.score([ITEM], ["ann"])
    assert one != two
    assert before not in service.personalizer._functions
    service.delete("ann")
    assert not service._known
    assert not service.personalizer._functions
    np.testing.assert_array_equal(service.score([ITEM], ["ann"]), service.score([ITEM], [None]))


def test_what_another_process_writes_is_seen(service, tmp_path):
    """Two services on one file: neither believes its memory."""
    other = opened(tmp_path / "p.sqlite")
    learn(service, "ann")
    service.score([ITEM], ["ann"])
    learn(other, "ann", "l")
    np.testing.assert_array_equal(service.score([ITEM], ["ann"]), other.score([ITEM], ["ann"]))
    other.delete("ann")
    np.testing.assert_array_equal(service.score([ITEM], ["ann"]), service.score([ITEM], [None]))
    assert not service._known
    other.close()


def test_a_store_belongs_to_its_heads_and_loss(service, tmp_path):
    with pytest.raises(DataError, match="of the head set sha256:"):
        RewardService(toy_heads(seed=1), ServeConfig(store=str(tmp_path / "p.sqlite")))
