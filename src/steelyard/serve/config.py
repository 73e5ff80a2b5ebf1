"""Settings of the service, and the refusals that clients are told."""

from __future__ import annotations

from dataclasses import dataclass

from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError, SteelyardError

LOCAL = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches."""


class RefusedError(SteelyardError):
    """A request that is not carried out; the client gets the status and the one sentence.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class HttpConfig(Config):
    """Where a service listens, who may ask, and how much it takes."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every network this machine is in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    token: str | None = None
    """What clients must send as `Authorization: Bearer TOKEN`. Others on this machine can read it among its processes;
    --token-file cannot be read that way."""
    token_file: str | None = None
    """File whose first line is the token."""
    max_body_bytes: int = 2 * 2**20
    """Bytes of a request's body."""
    max_pending: int = 64
    """Requests at work at the same time; further ones are answered with 503 at once."""
    body_seconds: float = 10.0
    """How long a client may take to send a body."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_body_bytes", "max_pending", "body_seconds")
        require_range(self, 0, 65535, "port")
        if self.token is not None and self.token_file is not None:
            raise ConfigError("--token and --token-file exclude each other")


@dataclass(frozen=True)
class ServeConfig(HttpConfig):
    """Where to listen, where to keep profiles, and how much to take."""

    store: str = "profiles.sqlite"
    """SQLite file of the profiles; made where it is missing."""
    max_items: int = 64
    """Items, candidates or pairs of one request."""
    max_text: int = 20_000
    """Characters of one text."""
    max_users: int | None = None
    """Users whose profiles are kept; without a limit by default."""
    cached_users: int = 10_000
    """Users whose profiles are also kept in memory, the last used ones."""
    max_batch: int = 64
    """Texts that the backbone reads at a time, from several requests together."""
    batch_wait_ms: float = 2.0
    """How long a text waits for others to be read together with."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(self, "max_items", "max_text", "max_users", "cached_users", "max_batch")
        require_range(self, 0, 1000, "batch_wait_ms")
