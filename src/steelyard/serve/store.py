"""Profiles on disk: one SQLite file that an acknowledged update survives whatever happens to the process.

Of a user it holds the number of labels, the members' summed losses (exact float64) and, for every label, the hash of
its idempotency key and of its content. No name, no text: users and keys are SHA-256 hashes. (Whoever has the file and
guesses a name can check the guess.)

An update is acknowledged after its commit, and a commit returns after the write-ahead log is on the disk
(`synchronous=FULL`): it survives SIGKILL, and a power cut if the disk keeps its word. That costs one flush of the disk
per commit; updates that arrive while one is under way share the next one.

Several processes may use one file: every update reads and writes in one `BEGIN IMMEDIATE` transaction, and nothing that
is read from it is believed later without being read again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from steelyard.adapt.base import Floats
from steelyard.errors import DataError
from steelyard.serve.batching import Batcher
from steelyard.serve.config import RefusedError

APPLICATION = 0x53544C59
"""SQLite's number for whose file it is: "STLY"."""
LAYOUT = 1
BUSY_SECONDS = 10
"""How long another process that writes is waited for."""
_TABLES = (
    "CREATE TABLE made_for (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE users (user BLOB PRIMARY KEY, n REAL NOT NULL, evidence BLOB NOT NULL)",
    "CREATE TABLE keys (user BLOB NOT NULL, key BLOB NOT NULL, content BLOB NOT NULL, PRIMARY KEY (user, key)) "
    "WITHOUT ROWID",
)
ResultT = TypeVar("ResultT")
Change = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True)
class Kept:
    """What is kept of a user.

    Attributes:
        n: labels.
        evidence: [H], the members' summed losses.
    """

    n: float
    evidence: Floats


class ProfileStore:
    """The file, open.

    Args:
        path: of the file; made, readable by its owner only, where it is missing.
        made_for: what the sums mean: the head set, the loss. A file made for something else is refused.
        members: H.
        max_users: refuse further users beyond so many.

    Raises:
        DataError: another program's file, another head set's, or a damaged one.
    """

    def __init__(self, path: str | Path, made_for: dict[str, str], members: int, max_users: int | None = None) -> None:
        self.path, self._members, self._max_users = Path(path), members, max_users
        if not self.path.parent.is_dir():
            raise DataError(f"store {self.path}: there is no folder {self.path.parent}")
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._writer, self._reader = self._connect(), self._connect()
            self._open(made_for)
        except OSError as error:
            raise DataError(f"store {self.path}: cannot be opened: {error.strerror}") from None
        except sqlite3.OperationalError as error:  # locked, read-only, disk full
            raise DataError(f"store {self.path}: cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"store {self.path}: not an SQLite database, or a damaged one: {error}") from None
        self._reading, self._purge = threading.Lock(), True
        self._truncate()
        self._changes: Batcher[Change, Any] = Batcher("store", self._commit, max_size=256)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _open(self, made_for: dict[str, str]) -> None:
        def number(sql: str) -> int:
            return int(self._writer.execute(sql).fetchone()[0])

        self._writer.execute("BEGIN IMMEDIATE")
        application, layout = number("PRAGMA application_id"), number("PRAGMA user_version")
        if application == layout == 0 and number("SELECT count(*) FROM sqlite_master") == 0:
            for table in _TABLES:
                self._writer.execute(table)
            self._writer.executemany("INSERT INTO made_for VALUES (?, ?)", made_for.items())
            self._writer.execute(f"PRAGMA application_id = {APPLICATION}")
            self._writer.execute(f"PRAGMA user_version = {LAYOUT}")
        elif application != APPLICATION:
            raise DataError(f"store {self.path}: expected profiles of this service, found another program's database")
        elif layout != LAYOUT:
            raise DataError(f"store {self.path}: expected layout {LAYOUT}, found {layout}, of another version")
        self._writer.execute("COMMIT")
        damage = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise DataError(f"store {self.path}: damaged: {damage.splitlines()[-1]}")
        found = dict(self._writer.execute("SELECT name, value FROM made_for").fetchall())
        for name, value in made_for.items():
            if found.get(name) != value:
                raise DataError(
                    f"store {self.path}: its profiles are of the {name} {found.get(name)}, expected {value}; give each "
                    "head set a store of its own"
                )
        # the mode outlives the connection; a file system without shared memory answers with another one
        mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise DataError(f"store {self.path}: its file system cannot keep a write-ahead log (mode {mode})")

    def read(self, user: str) -> Kept | None:
        """Return what is kept of a user as it is now, or None."""
        with self._reading:
            row = self._refusing(lambda: self._select(self._reader, _hash(user)))
        return row

    def count(self) -> int:
        """Return the number of users."""
        with self._reading:
            return int(self._refusing(lambda: self._reader.execute("SELECT count(*) FROM users").fetchone()[0]))

    def add(self, user: str, key: str, content: str, losses: Floats) -> tuple[Kept, bool]:
        """Count the losses [H] of a label, once for each (user, key).

        Args:
            user: whose label.
            key: names the label; the same one again changes nothing.
            content: the label, of which a hash is kept.
            losses: of every member.

        Returns:
            What is kept now, on the disk, and whether the label had been counted before.

        Raises:
            RefusedError: the key came with another content before, or there are too many users.
        """
        user_hash, key_hash, content_hash = _hash(user), _hash(key), _hash(content)

        def change(connection: sqlite3.Connection) -> tuple[Kept, bool]:
            kept = self._select(connection, user_hash)
            before = connection.execute(
                "SELECT content FROM keys WHERE user = ? AND key = ?", (user_hash, key_hash)
            ).fetchone()
            if before is not None:
                if before[0] != content_hash:
                    raise RefusedError(409, f"key {key!r} of this user came with another label before")
                return kept or Kept(0.0, np.zeros(self._members)), True
            kept = Kept(1.0, losses) if kept is None else Kept(kept.n + 1, kept.evidence + losses)
            self._write(connection, user_hash, kept)
            connection.execute("INSERT INTO keys VALUES (?, ?, ?)", (user_hash, key_hash, content_hash))
            return kept, False

        added: tuple[Kept, bool] = self._changes(change)
        return added

    def put(self, user: str, kept: Kept) -> None:
        """Replace what is kept of a user; keys that were counted stay counted."""
        self._changes(lambda connection: self._write(connection, _hash(user), kept))

    def delete(self, user: str) -> bool:
        """Delete all there is of a user, overwritten with zeros, and empty the log; return whether there was any."""
        user_hash = _hash(user)

        def change(connection: sqlite3.Connection) -> bool:
            gone = [
                connection.execute(f"DELETE FROM {table} WHERE user = ?", (user_hash,)).rowcount
                for table in ("users", "keys")
            ]
            self._purge = True
            return any(gone)

        return bool(self._changes(change))

    def close(self) -> None:
        """Finish all changes and close the file."""
        self._changes.close()
        for connection in (self._reader, self._writer):
            connection.close()

    def _select(self, connection: sqlite3.Connection, user_hash: bytes) -> Kept | None:
        row = connection.execute("SELECT n, evidence FROM users WHERE user = ?", (user_hash,)).fetchone()
        if row is None:
            return None
        if len(row[1]) != 8 * self._members:
            raise sqlite3.DatabaseError(f"a profile has {len(row[1])} bytes, expected {8 * self._members}")
        return Kept(row[0], np.frombuffer(row[1], "<f8"))

    def _write(self, connection: sqlite3.Connection, user_hash: bytes, kept: Kept) -> None:
        row = (kept.n, np.ascontiguousarray(kept.evidence, "<f8").tobytes(), user_hash)
        if connection.execute("UPDATE users SET n = ?, evidence = ? WHERE user = ?", row).rowcount:
            return
        if self._max_users is not None:
            users = connection.execute("SELECT count(*) FROM users").fetchone()[0]
            if users >= self._max_users:
                raise RefusedError(507, f"there are profiles of {users} users already, and no more are kept")
        connection.execute("INSERT INTO users (n, evidence, user) VALUES (?, ?, ?)", row)

    def _commit(self, changes: Sequence[Change]) -> list[Any]:
        """Carry out changes in one transaction; a change that refuses does so before it writes, and spoils no other."""
        results: list[Any] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for change in changes:
                try:
                    results.append(change(self._writer))
                except RefusedError as refusal:
                    results.append(refusal)
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            if self._writer.in_transaction:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
            raise self._unavailable(error) from None
        self._truncate()
        return results

    def _truncate(self) -> None:
        """Move the log into the file and empty it, so that what was deleted is in neither; tried again if in use."""
        if self._purge:
            with suppress(sqlite3.OperationalError):
                self._purge = bool(self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])

    def _refusing(self, read: Callable[[], ResultT]) -> ResultT:
        try:
            return read()
        except sqlite3.Error as error:
            raise self._unavailable(error) from None

    def _unavailable(self, error: sqlite3.Error) -> RefusedError:
        return RefusedError(503, f"the store cannot be used now: {error}")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
