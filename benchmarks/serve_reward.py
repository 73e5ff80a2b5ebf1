"""Does `steelyard serve reward` answer mixed requests of many clients without error, and lose nothing when killed?

    python benchmarks/serve_reward.py --out serve_reward.json [--requests 10000] [--clients 8] [--heads DIR]

1. Mixed requests from `--clients` threads of one process, each with connections of its own, to a service in another
   process: scores of four items of different users, feedback (a tenth of it sent twice), rankings of four candidates,
   profiles, and requests that must be refused (malformed, oversized, unknown fields, NaN). Latency is what a client
   waits, its own work included. Afterwards every user's number of labels must be right, and the sums must equal those
   worked out here, bit for bit, in the order in which the service says that it counted them.
2. The same clients give labels only; SIGKILL; restart. What was acknowledged must be there, what was not must be there
   whole or not at all, and after everything has been sent again every label must have counted once.
3. What durability costs: single updates of a store in this process, with the write-ahead log flushed at every commit
   (as the service does) and without.

The default head set is 100 random linear heads over 384 hashed words: cheap, so that the service is measured and not a
backbone. `--heads` serves your own (for preferences, with a backbone that reads texts). The exit status is 1 if there
was an error or a loss.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from steelyard import runtime
from steelyard.adapt.artefact import HeadsArtefact, LoadedHeads, load_heads, save_heads
from steelyard.adapt.backbones import WordsConfig
from steelyard.adapt.head_set import margins
from steelyard.adapt.losses import default_loss
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.rng import numpy_generator
from steelyard.serve.store import ProfileStore

USERS = 50
WORDS = ("tea", "coffee", "green", "black", "warm", "cold", "sweet", "bitter", "slow", "quick", "plain", "rich")
MIX = {"score": 0.5, "feedback": 0.25, "rank": 0.15, "profile": 0.08, "refused": 0.02}
REFUSED = (
    (b'{"items": [', 400),
    (b'{"items": [{"completion": "x", "colour": "red"}]}', 422),
    (b'{"items": [{"features": [NaN]}]}', 400),
    (b'{"items": [{"completion": "' + b"x" * 2**22 + b'"}]}', 413),
)
JSON = {"Content-Type": "application/json"}
Key = tuple[str, str]


class Service:
    """The command in a process of its own."""

    def __init__(self, heads: Path, store: Path, threads: int) -> None:
        command = [sys.executable, "-m", "steelyard.cli.main", "serve", "reward", str(heads), "--port", "0"]
        command += ["--store", str(store), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout)
        listening = next((line for line in lines if line.startswith("listening at ")), None)
        if listening is None:
            sys.exit("the service did not start")
        self.address = listening.split()[2]

    def end(self, number: int) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@dataclass
class Labels:
    """What clients sent, and what was acknowledged as counted: (user, key) -> body, (user, key) -> n."""

    sent: dict[Key, dict[str, Any]] = field(default_factory=dict)
    counted: dict[Key, float] = field(default_factory=dict)

    def of(self, user: str) -> list[Key]:
        """Return what was sent of a user."""
        return [key for key in self.sent if key[0] == user]


@dataclass
class Client:
    """One client with its own connections, random numbers and records."""

    number: int
    address: str
    labels: Labels
    phase: str
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)

    def mixed(self, requests: int) -> None:
        """Send so many requests of all kinds."""
        random = numpy_generator(0, f"{self.phase}/{self.number}")
        kinds = random.choice(list(MIX), size=requests, p=list(MIX.values()))
        with httpx.Client(base_url=self.address, timeout=60) as client:
            for count, kind in enumerate(kinds):
                self._one(client, str(kind), count, random)

    def storm(self, stop: threading.Event) -> None:
        """Give labels until the service is gone."""
        random = numpy_generator(0, f"{self.phase}/{self.number}")
        count = 0
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not stop.is_set():
                try:
                    self._feedback(client, count, random)
                except httpx.TransportError:
                    return
                count += 1

    def _one(self, client: httpx.Client, kind: str, count: int, random: np.random.Generator) -> None:
        user = f"user-{random.integers(USERS)}"
        if kind == "feedback":
            repeats = 1 + (random.random() < 0.1)
            self._feedback(client, count, random, repeats)
            return
        if kind == "score":
            items = [{"completion": words(random), "user": f"user-{random.integers(USERS)}"} for _ in range(4)]
            self._timed(kind, lambda: client.post("/v1/score", json={"items": items}))
        elif kind == "rank":
            body = {"user": user, "prompt": words(random), "completions": [words(random) for _ in range(4)]}
            self._timed(kind, lambda: client.post("/v1/rank", json=body))
        elif kind == "profile":
            self._timed(kind, lambda: client.get(f"/v1/profiles/{user}"))
        else:
            content, status = REFUSED[random.integers(len(REFUSED))]
            self._timed(kind, lambda: client.post("/v1/score", content=content, headers=JSON), status)

    def _feedback(self, client: httpx.Client, count: int, random: np.random.Generator, repeats: int = 1) -> None:
        user, key = f"user-{random.integers(USERS)}", f"{self.phase}-{self.number}-{count}"
        sides = {side: {"completion": words(random)} for side in ("chosen", "rejected")}
        body = {"user": user, "key": key, **sides}
        self.labels.sent[user, key] = body
        for repeat in range(repeats):
            answer = self._timed("feedback", lambda: client.post("/v1/feedback", json=body))
            if answer.status_code == 200:
                said = answer.json()
                if said["repeated"] != (repeat > 0):
                    self.errors.append(f"{key}: repeated is {said['repeated']} at sending {repeat + 1}")
                if not said["repeated"]:
                    self.labels.counted[user, key] = said["n"]

    def _timed(self, kind: str, send: Callable[[], httpx.Response], status: int = 200) -> httpx.Response:
        begun = time.perf_counter()
        answer = send()
        self.latencies[kind].append(1e3 * (time.perf_counter() - begun))
        if answer.status_code != status:
            self.errors.append(f"{kind}: expected {status}, found {answer.status_code}: {answer.text[:200]}")
        return answer


def words(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, size=random.integers(3, 9)))


def losses(heads: LoadedHeads, body: dict[str, Any]) -> np.ndarray:
    """Return the members' losses [H] of a label, worked out here."""
    features = heads.features(["", ""], [body[side]["completion"] for side in ("chosen", "rejected")])
    loss = default_loss("preference", heads.settings.noise)
    return loss(margins(heads, features[:1], features[1:]), np.ones(1))[0]


def profiles(address: str) -> dict[str, dict[str, Any]]:
    with httpx.Client(base_url=address, timeout=60) as client:
        answers = {user: client.get(f"/v1/profiles/{user}") for user in (f"user-{i}" for i in range(USERS))}
    return {user: answer.json() for user, answer in answers.items() if answer.status_code == 200}


def mixed(options: argparse.Namespace, heads: LoadedHeads, service: Service) -> dict[str, Any]:
    labels, errors = Labels(), []
    with httpx.Client(base_url=service.address, timeout=60) as client:
        floor = [_seconds(lambda: client.get("/health")) * 1e3 for _ in range(200)]
        first = Client(-1, service.address, labels, "first")
        random = numpy_generator(0, "first")
        while len({user for user, _ in labels.sent}) < USERS:  # everyone has a profile from now on
            first._feedback(client, len(labels.sent), random)
    clients = [Client(number, service.address, labels, "mixed") for number in range(options.clients)]
    shares = [len(part) for part in np.array_split(np.arange(options.requests), options.clients)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        list(pool.map(Client.mixed, clients, shares))
    seconds = time.perf_counter() - begun
    kept, exact, worst = profiles(service.address), 0, 0.0
    for user in sorted({user for user, _ in labels.sent}):
        mine = sorted(labels.of(user), key=lambda key: labels.counted.get(key, np.inf))
        numbers = [labels.counted.get(key) for key in mine]
        if numbers != list(range(1, len(mine) + 1)) or kept.get(user, {}).get("n") != len(mine):
            errors.append(f"{user}: {len(mine)} labels, found {kept.get(user, {}).get('n')}, counted as {numbers}")
            continue
        total = losses(heads, labels.sent[mine[0]])
        for key in mine[1:]:
            total = total + losses(heads, labels.sent[key])
        exact += total.tolist() == kept[user]["evidence"]
        worst = max(worst, float(np.abs(total - kept[user]["evidence"]).max()))
    if worst > options.tolerance:
        errors.append(f"sums of losses differ by {worst:.2g}")
    errors += first.errors + [error for client in clients for error in client.errors]
    latencies = {kind: [ms for client in clients for ms in client.latencies[kind]] for kind in MIX}
    latencies["all"] = [ms for kind in MIX for ms in latencies[kind]]
    return {
        "requests": len(latencies["all"]),
        "seconds": seconds,
        "requests_per_second": len(latencies["all"]) / seconds,
        "labels": len(labels.sent),
        "users_with_exact_sums": exact,
        "users": len(kept),
        "largest_difference_of_sums": worst,
        "health_alone_ms": quantiles(floor),
        "latency_ms": {kind: quantiles(found) for kind, found in latencies.items()},
        "errors": errors,
    }


def killed(options: argparse.Namespace, heads: LoadedHeads, folder: Path) -> dict[str, Any]:
    labels, errors, stop = Labels(), [], threading.Event()
    service = Service(folder / "heads", folder / "killed.sqlite", options.threads)
    clients = [Client(number, service.address, labels, "storm") for number in range(options.clients)]
    with ThreadPoolExecutor(options.clients) as pool:
        jobs = [pool.submit(client.storm, stop) for client in clients]
        wanted = max(50, options.requests // 10)
        while len(labels.counted) < wanted and not all(job.done() for job in jobs):
            time.sleep(0.001)
        service.end(signal.SIGKILL)
        stop.set()
        for job in jobs:
            job.result()
    errors += [error for client in clients for error in client.errors]
    service = Service(folder / "heads", folder / "killed.sqlite", options.threads)
    try:
        kept = profiles(service.address)
        with httpx.Client(base_url=service.address, timeout=60) as client:
            again = {key: client.post("/v1/feedback", json=body).json() for key, body in labels.sent.items()}
        lost = sum(not again[key].get("repeated") for key in labels.counted)
        there = sum(bool(answer.get("repeated")) for answer in again.values())
        if there != sum(profile["n"] for profile in kept.values()):
            errors.append("numbers of labels after the restart do not fit the keys that were known")
        for user, profile in profiles(service.address).items():
            mine = labels.of(user)
            total = sum(losses(heads, labels.sent[key]) for key in mine)
            if profile["n"] != len(mine) or not np.allclose(total, profile["evidence"], 0, options.tolerance):
                errors.append(f"{user}: expected {len(mine)} labels, found {profile['n']}, or other sums")
    finally:
        service.end(signal.SIGTERM)
    return {
        "sent": len(labels.sent),
        "acknowledged_before_the_kill": len(labels.counted),
        "acknowledged_and_lost": lost,
        "not_acknowledged_but_there": there - len(labels.counted) + lost,
        "errors": errors,
    }


def durability(folder: Path, members: int, updates: int = 200) -> dict[str, Any]:
    """Return how long single updates take with and without flushing the log at every commit."""
    found = {}
    for mode in ("FULL", "NORMAL"):
        store = ProfileStore(folder / f"{mode}.sqlite", {}, members)
        store._writer.execute(f"PRAGMA synchronous = {mode}")
        times = [
            _seconds(lambda n=n, s=store: s.add("user", f"{n}", "x", np.ones(members))) * 1e3 for n in range(updates)
        ]
        found[f"synchronous_{mode.lower()}_ms"] = quantiles(times)
        store.close()
    return found


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {"count": 0}
    p99 = float(np.quantile(values, 0.99))
    return {"count": len(values), "median": statistics.median(values), "p99": p99, "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("serve_reward.json"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the service's backbone")
    parser.add_argument("--heads", type=Path, help="head set to serve; random ones by default")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="of sums; a real backbone rounds with the batch")
    parser.add_argument("--folder", type=Path, help="where the stores lie: the disk that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        if options.heads is None:
            objective = EnsembleConfig(heads=HeadsConfig(num_heads=100))
            save_heads(folder / "heads", HeadsArtefact(objective, WordsConfig(384), width=384))
        else:
            (folder / "heads").symlink_to(options.heads.resolve(), target_is_directory=True)
        heads = load_heads(folder / "heads")
        service = Service(folder / "heads", folder / "mixed.sqlite", options.threads)
        try:
            report: dict[str, Any] = {"mixed": mixed(options, heads, service)}
        finally:
            status = service.end(signal.SIGTERM)
        if status != 0:
            report["mixed"]["errors"].append(f"the service ended with status {status}")
        report["killed"] = killed(options, heads, folder)
        report["durability"] = durability(folder, heads.num_members)
        store_bytes = (folder / "mixed.sqlite").stat().st_size
    report["settings"] = {"clients": options.clients, "threads": options.threads, "members": heads.num_members}
    report["settings"] |= {"features": heads.num_features, "heads": str(options.heads or "random")}
    report["store_bytes_per_label"] = store_bytes / report["mixed"]["labels"]
    packages = ("fastapi", "starlette", "uvicorn", "h11", "httpx", "pydantic")
    report["versions"] = {name: importlib.metadata.version(name) for name in packages}
    report["machine"] = runtime.describe()
    options.out.write_text(json.dumps(report, indent=2) + "\n")

    show, kill = report["mixed"], report["killed"]
    for kind, found in {"health": show["health_alone_ms"], **show["latency_ms"]}.items():
        if found["count"]:
            print(
                f"{kind:9s} {found['count']:6d} requests  median {found['median']:7.1f} ms  p99 {found['p99']:7.1f} ms"
            )
    print(f"{show['requests']} requests of {options.clients} clients in {show['seconds']:.1f} s", end=": ")
    print(f"{show['requests_per_second']:.0f} a second, {len(show['errors'])} errors")
    print(f"sums equal bit for bit: {show['users_with_exact_sums']} of {show['users']} users, {show['labels']} labels")
    print(f"SIGKILL after {kill['acknowledged_before_the_kill']} acknowledged labels ({kill['sent']} sent)", end=": ")
    print(f"{kill['acknowledged_and_lost']} lost, {len(kill['errors'])} errors")
    flushed, not_flushed = (report["durability"][f"synchronous_{mode}_ms"]["median"] for mode in ("full", "normal"))
    print(f"one update of the store: {flushed:.2f} ms flushed, {not_flushed:.2f} ms not flushed (medians)")
    faults = show["errors"] + kill["errors"]
    for kind, count in Counter(faults).most_common(10):
        print(f"  {count} x {kind}", file=sys.stderr)
    return 1 if faults or kill["acknowledged_and_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
