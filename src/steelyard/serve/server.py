"""The process: a socket, signals, and uvicorn until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from steelyard.adapt.base import Floats
from steelyard.adapt.head_set import HeadSet
from steelyard.adapt.reweight import HyRe
from steelyard.errors import ConfigError, require
from steelyard.serve.app import build_app
from steelyard.serve.config import HttpConfig, ServeConfig
from steelyard.serve.service import RewardService

if TYPE_CHECKING:
    from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 30
BACKLOG = 256
"""Connections that may wait to be taken."""


def serve(
    heads: HeadSet,
    config: ServeConfig,
    method: HyRe | None = None,
    rows: tuple[int, Callable[[Floats], Floats]] | None = None,
    on_listening: Callable[[str, RewardService], None] | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; those that were accepted are finished first.

    Args:
        heads: what is served.
        config: where, and how much.
        method: settings of HyRe.
        rows: what makes features of numbers, as `RewardService` has it.
        on_listening: told the address and the service, once requests are taken.

    Raises:
        ConfigError: the port is in use, or the token cannot be read.
        MissingExtraError: the extra `serve` is not installed.
    """
    for module in ("fastapi", "uvicorn"):  # before there is a store
        require(module, "serve")
    token = read_token(config)
    with listen(config) as listening:
        service = RewardService(heads, config, method, rows)

        def say(address: str) -> None:
            if on_listening is not None:
                on_listening(address, service)

        run(build_app(service, token), config, listening, say)


def run(app: FastAPI, config: HttpConfig, listening: socket.socket, say: Callable[[str], None]) -> None:
    """Run an application until SIGTERM or SIGINT.

    Args:
        app: what answers.
        config: of the socket.
        listening: taken before anything slow was loaded, so that a port in use is said at once.
        say: told the address, once requests are taken.
    """
    uvicorn = require("uvicorn", "serve")
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # paths name users
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        lifespan="on",
    )
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    say(f"http://{host}:{port}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # uvicorn takes them over, and raises them again when it has finished
    uvicorn.Server(options).run(sockets=[listening])


def _stop(*_: object) -> None:
    sys.exit(0)


def listen(config: HttpConfig) -> socket.socket:
    """Return a socket that listens; requests that arrive before the server runs wait in it."""
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small answers at once only on sockets that name their protocol; else each waits 40 ms
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(f"cannot listen at {config.host} port {config.port}: {error.strerror}") from None
    return listening


def read_token(config: HttpConfig) -> str | None:
    """Return the token that clients must send, if any."""
    token = config.token
    if config.token_file is not None:
        try:
            lines = Path(config.token_file).read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"--token-file {config.token_file}: {os.strerror(error.errno or 0)}") from None
        token = lines[0].strip() if lines else ""
    if token is not None and (len(token.strip()) < 8 or not token.isascii() or not token.isprintable()):
        raise ConfigError("the token: expected at least 8 printable characters of ASCII, found fewer or others")
    return token
