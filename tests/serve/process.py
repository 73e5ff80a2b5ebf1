"""A service in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .toy_service import toy_heads

for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module)
httpx = pytest.importorskip("httpx")

TOY = Path(__file__).parent / "toy_service.py"
HEADS = toy_heads()


class Process:
    """A running service; as a context it is killed at the end."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )  # fmt: skip
        self.said, self.address = "", ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if "http://" in line:
                self.address = "http://" + line.split("http://")[1].split()[0]
                break
        assert self.address, log.read_text()
        self.client = httpx.Client(base_url=self.address, timeout=30)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json=body, **options)

    def feedback(self, user: str, key: str, chosen: str, rejected: str, **more: Any) -> httpx.Response:
        sides = {"chosen": {"completion": chosen}, "rejected": {"completion": rejected}}
        return self.post("feedback", {"user": user, "key": key, **sides, **more})

    def evidence(self, user: str) -> list[float]:
        return self.client.get(f"/v1/profiles/{user}").json()["evidence"]

    def signal(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def toy(store: Path, heads: dict[str, Any] | None = None, **config: Any) -> Process:
    options = {"port": 0, "store": str(store), **config}
    command = [sys.executable, str(TOY), json.dumps(options), json.dumps(heads or {})]
    return Process(command, store.with_suffix(".log"))


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
