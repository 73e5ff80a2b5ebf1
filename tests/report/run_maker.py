"""Synthetic run directories in the row formats that training writes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

GRID = (0, 1000, 2000, 3000, 4000, 5000, 6000, 8000, 10000)
OFFLINE = (2000, 4000)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def logistic(step: float, before: float, after: float, dip: float) -> float:
    rise = 1 / (1 + np.exp(-(step - 4000) / 900))
    return float(np.clip(before + (after - before) * rise - dip * np.exp(-(((step - 1200) / 700) ** 2)), 0, 1))


def make_run(
    root: Path,
    case: str = "cal_ql",
    seed: int = 0,
    *,
    label: str | None = None,
    recipe: str = "cal_ql",
    before: float = 0.3,
    after: float = 0.95,
    dip: float = 0.0,
    episodes: int = 20,
    online: bool = True,
    has_success: bool = True,
    stop_at: int | None = None,
    message: str = "",
    bias: float = -2.0,
    environment: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    picture: str = "none",
) -> Path:
    """Write one run; `stop_at` makes it fail after the online evaluation at that step (-1: before any evaluation)."""
    path = root / f"{case}-seed{seed}"
    path.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(case), ord(case[0])])
    rate = float(np.clip(draw.normal(0, 0.05), -0.1, 0.1))
    failed = stop_at is not None

    def write_json(name: str, value: Any) -> None:
        (path / name).write_text(json.dumps(value))

    default = {
        "objective": {"kind": case, "cql_weight": 5.0},
        "discount": 0.99,
        "online": {"steps": 10000},
        "seed": seed,
    }
    write_json("config.json", default | (config or {}))
    write_json(
        "environment.json",
        environment or {"steelyard": "0.1.0", "torch": "2.13.0", "commit": "84c5cb1", "threads": 1, "matmul": "medium"},
    )
    identity = {"recipe": recipe, "case": case, "label": label or case, "seed": seed}
    write_json("case.json", identity | {"config_hash": f"{seed:016x}", "data_hash": "d" * 16})
    write_json("status.json", {"status": "failed" if failed else "done", "message": message})
    (path / "events.log").write_text("started\n")

    def episode(score_mean: float) -> dict[str, Any]:
        if has_success:
            success = bool(draw.random() < np.clip(score_mean + rate, 0, 1))
            score, length = float(success), int(draw.integers(60, 200))
            return {"return": score - 1.0 * length, "length": length, "success": success, "score": score}
        score = float(score_mean + rate + draw.normal(0, 0.05))
        return {"return": 3000 * score, "length": 1000, "success": None, "score": score}

    rows, training, metrics = [], [], []
    points = [("offline", u, 0) for u in OFFLINE]
    if online:
        points += [("online", OFFLINE[-1] + e, e) for e in GRID]
    if failed:
        points = [p for p in points if stop_at >= 0 and p[2] <= stop_at]
    for phase, update, env_step in points:
        mean = before * update / OFFLINE[-1] if phase == "offline" else logistic(env_step, before, after, dip)
        for number in range(episodes):
            place = {"phase": phase, "update_step": update, "env_step": env_step, "episode": number}
            rows.append(place | {"episode_seed": 1000 * seed + number} | episode(mean))
    write_lines(path / "eval.jsonl", rows)
    last = max((p[2] for p in points), default=0)
    if online:
        for env_step in range(100, last + 1, 100):
            place = {"env_step": env_step, "update_step": OFFLINE[-1] + env_step}
            training.append(place | episode(0.9 * logistic(env_step, before, after, dip)))
        write_lines(path / "train_episodes.jsonl", training)
    for update in range(0, OFFLINE[-1] + last + 1, 20):
        wave = draw.normal(0, 0.1)
        metrics.append(
            {
                "update_step": update,
                "env_step": max(0, update - OFFLINE[-1]),
                "phase": "offline" if update < OFFLINE[-1] else "online",
                "loss/td": 2 * np.exp(-update / 3000) + 0.1 + 0.1 * abs(wave),
                "critic/q_data": -40 + 30 * (1 - np.exp(-update / 5000)) + wave,
                "critic/cql_multiplier": 1 + 0.001 * update,
                "loss/actor": 20 - update / 1000 + wave,
                "actor/temperature": np.exp(-update / 2000),
                "time/steps_per_second": 300 + wave,
            }
        )
    write_lines(path / "metrics.jsonl", metrics)
    sample = []
    for phase in ("offline", "online") if online else ("offline",):
        g = -draw.gamma(2.0, 12.0, 300)
        q = g + bias * (3 if phase == "offline" else 1) + draw.normal(0, 4, 300)
        sample += [{"phase": phase, "q": float(a), "return_to_go": float(b)} for a, b in zip(q, g, strict=True)]
    if not failed:
        write_lines(path / "calibration.jsonl", sample)

    if picture == "maze":
        maze = [[1] * 7, [1, 0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 0, 1], [1, 0, 0, 0, 1, 0, 1], [1] * 7]
        corners = np.array([[-2, -1], [-2, 1], [2, 1], [2, -1]], float)
        path_xy = np.concatenate([np.linspace(a, b, 30) for a, b in pairwise(corners)])
        path_xy += draw.normal(0, 0.06, path_xy.shape)
        write_json(
            "trajectory.json",
            {
                "observations": np.c_[path_xy, np.zeros_like(path_xy)].tolist(),
                "actions": np.zeros((len(path_xy) - 1, 2)).tolist(),
                "success": True,
                "maze": maze,
                "cell_size": 1.0,
                "goal": [2, -1],
            },
        )
    elif picture == "frames":
        frames = np.full((30, 120, 160, 3), 225, np.uint8)
        for t in range(30):
            frames[t, 40:80, 5 * t : 5 * t + 14] = (0, 90, 178)
        np.savez_compressed(path / "frames.npz", frames=frames)
    elif picture == "error":
        (path / "render_error.txt").write_text("no display: the simulator could not create an off-screen context\n")
    return path
