"""Settings of the service, and the refusals that clients are told."""

from __future__ import annotations

from dataclasses import dataclass

from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError, SteelyardError


class RefusedError(SteelyardError):
    """A request that is not carried out; the client gets the status and the one sentence.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class ServeConfig(Config):
    """Where to listen, where to keep profiles, and how much to take."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every network this machine is in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    store: str = "profiles.sqlite"
    """SQLite file of the profiles; made where it is missing."""
    token: str | None = None
    """What clients must send as `Authorization: Bearer TOKEN`. Others on this machine can read it among its processes;
    --token-file cannot be read that way."""
    token_file: str | None = None
    """File whose first line is the token."""
    max_body_bytes: int = 2 * 2**20
    """Bytes of a request's body."""
    max_items: int = 64
    """Items, candidates or pairs of one request."""
    max_text: int = 20_000
    """Characters of one text."""
    max_pending: int = 64
    """Requests at work at the same time; further ones are answered with 503 at once."""
    max_users: int | None = None
    """Users whose profiles are kept; without a limit by default."""
    cached_users: int = 10_000
    """Users whose profiles are also kept in memory, the last used ones."""
    max_batch: int = 64
    """Texts that the backbone reads at a time, from several requests together."""
    batch_wait_ms: float = 2.0
    """How long a text waits for others to be read together with."""
    body_seconds: float = 10.0
    """How long a client may take to send a body."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_body_bytes", "max_items", "max_text", "max_pending", "max_users", "cached_users")
        require_positive(self, "max_batch", "body_seconds")
        require_range(self, 0, 65535, "port")
        require_range(self, 0, 1000, "batch_wait_ms")
        if self.token is not None and self.token_file is not None:
            raise ConfigError("--token and --token-file exclude each other")
