"""A running service under stress: many clients, SIGKILL, overload, slow clients, SIGTERM."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from .process import Process, httpx, toy, until
from .toy_service import MEMBERS, toy_heads

REGRESSION = {"task": "regression"}
USERS = ("ann", "bob", "cy")


@dataclass
class Storm:
    """Eight clients that give labels until told to stop, and what was sent and acknowledged: (user, key) -> label."""

    address: str
    sent: dict[tuple[str, str], float] = field(default_factory=dict)
    acknowledged: dict[tuple[str, str], dict] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        with httpx.Client(base_url=self.address, timeout=30) as client:
            for count in range(10_000):
                if self.stop.is_set():
                    return
                user, key = USERS[(number + count) % 3], f"{number}-{count}"
                self.sent[user, key] = float((7 * number + count) % 11)
                try:
                    answer = client.post("/v1/feedback", json=self.body(user, key))
                except httpx.TransportError:
                    return  # killed
                if answer.status_code != 200:
                    self.errors.append(answer.text)
                    return
                self.acknowledged[user, key] = answer.json()

    def body(self, user: str, key: str) -> dict:
        return {"user": user, "key": key, "item": {"completion": "aei"}, "label": self.sent[user, key]}


def expected(labels: list[float]) -> list[float]:
    """Summed losses, in any order: they are whole numbers and halves."""
    heads = toy_heads(**REGRESSION)
    said = heads.members(heads.features([""], ["aei"]))[0, :, 0]
    return sum(((said - label) ** 2 / 2 for label in labels), np.zeros(MEMBERS)).tolist()


def test_no_acknowledged_label_is_lost_by_sigkill(tmp_path):
    """Labels that eight clients give at once all count; those acknowledged before a kill are there after it, the others
    are there whole or not at all, and sending everything again leaves every label counted once.
    """
    store = tmp_path / "p.sqlite"
    with toy(store, REGRESSION) as service:
        storm = Storm(service.address)
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(storm.client, number) for number in range(8)]
            until(lambda: len(storm.acknowledged) >= 100 or storm.errors)
            assert service.signal(signal.SIGKILL) == -signal.SIGKILL
            for client in clients:
                client.result()
    assert storm.errors == []
    open_labels = storm.sent.keys() - storm.acknowledged.keys()
    assert open_labels  # it was killed with labels on the way
    with toy(store, REGRESSION) as service:
        for user in USERS:
            numbers = [answer["n"] for (whose, _), answer in storm.acknowledged.items() if whose == user]
            assert len(set(numbers)) == len(numbers)  # each was the so-manyth label of this user
            kept = service.client.get(f"/v1/profiles/{user}").json()
            mine = [key for key in storm.sent if key[0] == user]
            assert max(numbers) <= kept["n"] <= len(mine)
            assert len(numbers) <= kept["n"]
        counted = {key: service.post("feedback", storm.body(*key)).json() for key in storm.sent}
        assert all(counted[key]["repeated"] for key in storm.acknowledged)
        for user in USERS:
            mine = [key for key in storm.sent if key[0] == user]
            profile = service.client.get(f"/v1/profiles/{user}").json()
            assert profile["n"] == len(mine)
            assert profile["evidence"] == expected([storm.sent[key] for key in mine])
        assert service.client.get("/v1/profiles").json() == {"users": 3}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Four requests at a time, and a backbone that takes 0.4 s."""
    store = tmp_path_factory.mktemp("slow") / "p.sqlite"
    with toy(store, {"seconds": 0.4}, max_pending=4, body_seconds=0.5) as one:
        yield one


def score(service: Process, text: str = "a"):
    return service.post("score", {"items": [{"completion": text}]})


def reads(service: Process) -> list[str]:
    return [line.split()[1] for line in service.log.read_text().splitlines() if line.startswith("backbone")]


def test_concurrent_requests_are_read_together(slow):
    before = len(reads(slow))
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(score, slow)
        until(lambda: len(reads(slow)) == before + 1)
        rest = [pool.submit(score, slow, text) for text in ("e", "i", "o")]
        answers = [job.result() for job in (first, *rest)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert reads(slow)[before:] in (["1", "3"], ["1", "1", "2"], ["1", "2", "1"])  # the last two on a busy machine
    heads = toy_heads()
    said = [answer.json()["scores"][0] for answer in answers]
    np.testing.assert_allclose(said, heads.members(heads.features([""] * 4, list("aeio"))).mean(1)[:, 0])


def test_overload_is_refused_at_once_and_health_answers(slow):
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(score, slow) for _ in range(12)]
        begun = time.monotonic()
        assert slow.client.get("/health").status_code == 200
        waited = time.monotonic() - begun
        answers = [job.result() for job in jobs]
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 4
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert "at work already" in refused.json()["error"]
    assert waited < 10
    assert score(slow).status_code == 200


def half_a_request(service: Process) -> socket.socket:
    host, port = service.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    return connection


def test_slow_and_lost_clients_do_not_hold_places(slow):
    """Four that send half a body, and four that go away: afterwards there is room again."""
    waiting = [half_a_request(slow) for _ in range(4)]
    assert [connection.recv(12) for connection in waiting] == [b"HTTP/1.1 408"] * 4
    for _ in range(4):
        half_a_request(slow).close()
    for connection in waiting:
        connection.close()
    until(lambda: score(slow).status_code == 200)


def test_sigterm_finishes_what_was_accepted(slow):
    """The last test of this service: it ends with status 0, and the answer on its way arrives."""
    before = len(reads(slow))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(score, slow)
        until(lambda: len(reads(slow)) == before + 1)
        assert slow.signal(signal.SIGTERM) == 0
        assert answer.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
        score(slow)
