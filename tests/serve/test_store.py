"""The SQLite store and the batching thread, without HTTP."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.errors import DataError
from steelyard.serve.batching import Batcher
from steelyard.serve.config import RefusedError
from steelyard.serve.store import Kept, ProfileStore

MADE_FOR = {"head set": "sha256:one", "loss": "bt"}
MEMBERS = 3


def opened(path, made_for=MADE_FOR, members=MEMBERS, **options) -> ProfileStore:
    return ProfileStore(path, made_for, members, **options)


def test_sums_are_exact_and_survive_closing(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, MEMBERS)) * 10.0 ** np.arange(-10, 10)[:, None]
    store = opened(tmp_path / "p.sqlite")
    for number, losses in enumerate(rows):
        kept, repeated = store.add("ann", f"{number}", f"{losses}", losses)
        assert (kept.n, repeated) == (number + 1, False)
    store.close()
    store = opened(tmp_path / "p.sqlite")
    total = np.zeros(MEMBERS)
    for losses in rows:
        total = total + losses
    found = store.read("ann")
    assert found.n == 20
    assert found.evidence.tobytes() == total.tobytes()
    assert store.add("ann", "7", f"{rows[7]}", rows[7])[1]  # known also after the restart
    assert store.read("ann").evidence.tobytes() == total.tobytes()
    assert store.read("bob") is None
    assert store.count() == 1
    store.close()


def test_updates_of_many_threads_are_none_lost(tmp_path):
    """Eight threads, two connections of two 'processes', one user: every update once."""
    stores = [opened(tmp_path / "p.sqlite"), opened(tmp_path / "p.sqlite")]

    def work(thread: int) -> None:
        for number in range(25):
            for _ in range(2):  # each label twice
                stores[thread % 2].add("ann", f"{thread}-{number}", "x", np.full(MEMBERS, 2.0**-number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for store in stores:
        kept = store.read("ann")
        assert kept.n == 200
        assert kept.evidence.tolist() == [8 * (2 - 2.0**-24)] * MEMBERS  # dyadic: exact in any order
        store.close()


def test_a_refused_change_leaves_nothing_and_spoils_no_other(tmp_path):
    store = opened(tmp_path / "p.sqlite", max_users=1)
    one = np.ones(MEMBERS)
    store.add("ann", "k", "x", one)
    with pytest.raises(RefusedError, match="another label") as caught:
        store.add("ann", "k", "y", one)
    assert caught.value.status == 409
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(store.add, user, f"{number}", "x", one) for number in range(10) for user in ("ann", "bob")]
    refused = [job for job in jobs if job.exception() is not None]
    assert [job.exception().status for job in refused] == [507] * 10
    assert store.read("ann").n == 11
    assert store.read("bob") is None
    store.delete("ann")
    assert store.add("bob", "0", "x", one)[0].n == 1  # a refused label's key was not kept
    store.close()


def test_what_is_deleted_is_in_no_file(tmp_path):
    """Not in the database, its free pages or its log: neither the user's hash, the keys' nor the numbers."""
    store = opened(tmp_path / "p.sqlite", members=200)
    evidence = np.random.default_rng(0).normal(size=200)
    marks = [hashlib.sha256(word.encode()).digest() for word in ("ann", "key", "content")] + [evidence.tobytes()[:64]]

    def present() -> list[bool]:
        files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        return [mark in files for mark in marks]

    for number in range(50):
        store.add(f"other-{number}", "k", "x", np.ones(200))
    store.add("ann", "key", "content", evidence)
    assert present() == [True] * 4
    assert store.delete("ann")
    assert present() == [False] * 4
    assert not store.delete("ann")
    assert store.count() == 50
    store.close()
    assert present() == [False] * 4


def test_texts_and_names_are_not_stored(tmp_path):
    store = opened(tmp_path / "p.sqlite")
    store.add("ann@example.org", "a-key-of-hers", "what she preferred", np.ones(MEMBERS))
    store.put("bob@example.org", Kept(2.0, np.ones(MEMBERS)))
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for word in (b"ann", b"bob", b"example", b"hers", b"preferred"):
        assert word not in files
    assert (tmp_path / "p.sqlite").stat().st_mode & 0o077 == 0
    store.close()


def test_durability_settings(tmp_path):
    store = opened(tmp_path / "p.sqlite")
    pragma = {name: store._writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "secure_delete")}  # noqa: E501  # fmt: skip
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
    store.close()


def test_import_replaces_and_keeps_keys(tmp_path):
    store = opened(tmp_path / "p.sqlite")
    store.add("ann", "k", "x", np.ones(MEMBERS))
    store.put("ann", Kept(5.0, np.arange(3.0)))
    assert store.add("ann", "k", "x", np.ones(MEMBERS))[1]
    assert store.add("ann", "l", "x", np.ones(MEMBERS))[0].n == 6
    assert store.read("ann").evidence.tolist() == [1, 2, 3]
    store.close()


def foreign(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (title TEXT)")
    connection.commit()
    connection.close()


def changed(path, sql):
    opened(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(sql)
    connection.close()


def damaged(path):
    store = opened(path)
    for number in range(200):
        store.add(f"{number}", "k", "x", np.ones(MEMBERS))
    store.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 5] = bytes(range(256)) * 32
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("profiles, one a line\n" * 99), "not an SQLite database, or a damaged one"),
        (foreign, "expected profiles of this service, found another program's database"),
        (lambda path: changed(path, "PRAGMA user_version = 7"), "expected layout 1, found 7"),
        (lambda path: changed(path, "UPDATE made_for SET value = 'sha256:two' WHERE name = 'head set'"),
         "of the head set sha256:two, expected sha256:one"),
        (lambda path: changed(path, "UPDATE made_for SET value = 'ce' WHERE name = 'loss'"), "of the loss ce"),
        (damaged, "damaged"),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
    ids=["text", "foreign", "layout", "heads", "loss", "damaged", "folder"],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, make, said):
    path = tmp_path / "p.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(DataError, match=f"^store .*p.sqlite: .*{said}") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert not before or path.read_bytes() == before  # and they are left as they were


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        opened(tmp_path / "nowhere" / "p.sqlite")


def test_a_store_that_cannot_be_written_refuses_with_503(tmp_path, monkeypatch):
    """Another process holds the lock for too long: not acknowledged, and later it works."""
    monkeypatch.setattr("steelyard.serve.store.BUSY_SECONDS", 0.05)
    store = opened(tmp_path / "p.sqlite")
    other = sqlite3.connect(tmp_path / "p.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RefusedError, match="locked") as caught:
        store.add("ann", "k", "x", np.ones(MEMBERS))
    assert caught.value.status == 503
    other.execute("ROLLBACK")
    other.close()
    assert store.add("ann", "k", "x", np.ones(MEMBERS))[0].n == 1
    store.close()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.sampled_from(["add", "delete"])), max_size=30))
def test_store_equals_a_dictionary(tmp_path_factory, steps):
    """Any sequence of labels, repeats, deletions and restarts leaves what a plain dictionary would hold."""
    path, model = tmp_path_factory.mktemp("model") / "p.sqlite", {}
    store = opened(path)
    for number, (user, key, what) in enumerate(steps):
        if what == "delete":
            assert store.delete(user) == (model.pop(user, None) is not None)
        else:
            keys = model.setdefault(user, set())
            assert store.add(user, str(key), "x", np.full(MEMBERS, 2.0**key))[1] == (key in keys)
            keys.add(key)
        if number % 11 == 10:
            store.close()
            store = opened(path)
    assert store.count() == len(model)
    for user, keys in model.items():
        assert store.read(user).evidence.tolist() == [sum(2.0**key for key in keys)] * MEMBERS
    store.close()


def test_jobs_are_worked_together():
    """What arrives while one batch is at work shares the next, up to the size; results come back to their jobs."""
    batches, release = [], threading.Event()

    def work(jobs):
        batches.append(list(jobs))
        if len(batches) == 1:
            release.wait(10)
        return [-job for job in jobs]

    batcher = Batcher("test", work, max_size=4)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher, 0)
        while not batches:
            time.sleep(0.001)
        rest = [pool.submit(batcher, job) for job in range(1, 7)]
        while len(batcher._queue) < 6:
            time.sleep(0.001)
        release.set()
        assert first.result() == 0
        assert [job.result() for job in rest] == [-1, -2, -3, -4, -5, -6]
    assert [len(batch) for batch in batches] == [1, 4, 2]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher(1)


def test_waiting_collects_and_a_full_batch_does_not_wait():
    batches = []

    def work(jobs):
        batches.append(len(jobs))
        return jobs

    batcher = Batcher("test", work, max_size=4, wait=5.0)
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(batcher, range(4))) == [0, 1, 2, 3]
    assert batches == [4]
    assert time.monotonic() - begun < 5
    batcher.close()


def test_one_bad_job_does_not_spoil_its_batch():
    def work(jobs):
        if "bad" in jobs:
            raise ValueError("bad")
        return jobs

    batcher = Batcher("test", work, max_size=9, wait=0.05, retry=True)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(batcher, job) for job in ("one", "bad", "two")]
    assert [job.exception() is None for job in jobs] == [True, False, True]
    batcher.close()


def test_closing_finishes_what_was_submitted():
    batcher = Batcher("test", lambda jobs: [time.sleep(0.02) or job for job in jobs], max_size=1)
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(batcher, job) for job in range(5)]
        while len(batcher._queue) + sum(job.done() for job in jobs) < 4:
            time.sleep(0.001)
        batcher.close()
        finished = [job for job in jobs if job.exception() is None]
    assert len(finished) >= 4
