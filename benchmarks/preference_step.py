"""Tokens a second and peak memory of preference steps against TRL, and of sampling against `generate`, in one run.

    python benchmarks/preference_step.py --out preference_step.json [--quick] [--model tiny]

DPO and SFT updates of one model at the same sizes, from the same weights and on the same token ids, in float32, full
and with LoRA; then sampling. The first updates' losses must agree before anything is timed. Every contender is a
process of its own. This library and one other at a time take turns (A B, B A, ...), so that whatever else the machine
does hits both alike, and a ratio is the median over turns of the ratio within a turn.

Contenders:

- steelyard: the library as it comes; "cached reference": reference log-probs given, as from the second epoch on.
- TRL: its trainer without gradient checkpointing, which is the faster way; "our settings": also with our allocator
  setting; "as it comes": with gradient checkpointing, its default (but float32, for CPUs emulate bf16).
- generate: `transformers`' sampling; "log-probs": also those of what it drew, which policy gradients need.

Tokens are those of prompts and completions, as TRL reads them: a pair counts its prompt twice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updates import Contender, machine

WORKER = Path(__file__).parent / "peers" / "preference_worker.py"
OURS, TOLERANCE = "steelyard", 1e-4
STEP = {
    OURS: ["--library=steelyard"],
    "steelyard, cached reference": ["--library=steelyard", "--cached-reference"],
    "TRL": ["--library=trl"],
    "TRL, our settings": ["--library=trl", "--keep-memory"],
    "TRL, as it comes": ["--library=trl", "--checkpointing"],
}
SAMPLE = {
    OURS: ["--library=steelyard"],
    "generate": ["--library=generate"],
    "generate, log-probs": ["--library=generate", "--logps"],
}
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True)
class Task:
    """One thing to be timed."""

    name: str
    kind: str
    train: str
    batch: int
    prompt: int
    completion: int
    samples: int = 1

    def arguments(self) -> list[str]:
        """Return the options of every contender."""
        rate = 1e-4 if self.train == "lora" else 1e-6
        found = {"task": self.kind, "train": self.train, "batch": self.batch, "prompt": self.prompt, "rate": rate}
        found |= {"completion": self.completion, "samples": self.samples}
        return [f"--{key}={value}" for key, value in found.items()]

    def tokens(self) -> int:
        """Tokens of one update, or written in one round of sampling."""
        if self.kind == "sample":
            return self.batch * self.samples * self.completion
        return self.batch * (self.prompt + self.completion) * (2 if self.kind == "dpo" else 1)

    def contenders(self) -> dict[str, list[str]]:
        """Return {name: options}."""
        if self.kind == "sample":
            return SAMPLE
        return {name: found for name, found in STEP.items() if self.kind == "dpo" or "reference" not in name}


def tasks(options: argparse.Namespace) -> list[Task]:
    batch, prompt, completion, new = (2, 6, 6, 6) if options.quick else (options.batch, 64, 64, 48)
    steps = [
        Task(f"{kind} {train}", kind, train, batch, prompt, completion)
        for kind in ("dpo", "sft")
        for train in ("lora", "full")
    ]
    rounds = [(2 * batch, 1), (max(1, batch // 2), 4)]
    return steps + [
        Task(f"sample {train} {count}x{samples}", "sample", train, count, prompt, new, samples)
        for train in ("full", "lora")
        for count, samples in rounds
    ]


def run(task: Task, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Check and time one task: this library and each other contender in turns, two processes at a time (memory)."""
    contenders = task.contenders()
    others = [name for name in contenders if name != OURS]
    own_turns: list[dict[str, float]] = []
    rows = []
    for other in others:
        running: list[Contender] = []
        try:
            with tempfile.TemporaryDirectory() as scratch:
                for name in (OURS, other):
                    print(f"{task.name}: loading {name}", file=sys.stderr)
                    command = [sys.executable, str(WORKER), *contenders[name], *task.arguments()]
                    command += [f"--model={options.model}", f"--scratch={scratch}"]
                    running.append(Contender(name, command, options.threads))
                # also the warm-up: the first update is slow
                first = [None if task.kind == "sample" else c.ask("losses", count=3) for c in running]
                if task.kind == "sample":
                    for contender in running:
                        contender.ask("updates", count=1)
                for repeat in range(options.repeats):
                    for contender in running if repeat % 2 == 0 else running[::-1]:
                        contender.turn()
                peaks = [contender.ask("memory")["peak_rss_mb"] for contender in running]
        finally:
            for contender in running:
                contender.close()
        pairs = list(zip(running[1].turns, running[0].turns, strict=True))
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        row = _row(task, running[1], running[1].turns, peaks[1], first[1])
        row |= {"speedup_of_steelyard": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        row["speedup_cpu_time"] = statistics.median(t["cpu_seconds"] / o["cpu_seconds"] for t, o in pairs)
        if first[0] is not None and first[1] is not None:
            row["loss_difference"] = max(abs(a - b) for a, b in zip(*first, strict=True))
            if row["loss_difference"] > TOLERANCE:
                fault = f"{task.name}: losses of {other} differ from ours by {row['loss_difference']:.2g}"
                report["faults"].append(fault)
        own_turns += running[0].turns
        rows.append(row)
    report["rows"] += [_row(task, running[0], own_turns, peaks[0], first[0]), *rows]


def _row(task: Task, contender: Contender, turns: list[dict[str, float]], peak: float, losses: Any) -> dict[str, Any]:
    """Return what is reported of one contender, as if it were compared with itself."""
    seconds = statistics.median(turn["seconds"] for turn in turns)
    return {
        "task": task.name,
        "contender": contender.name,
        "tokens": task.tokens(),
        "seconds": seconds,
        "tokens_per_second": task.tokens() / seconds,
        "peak_rss_mb": peak,
        "losses": losses,
        "loss_difference": None,
        "speedup_of_steelyard": 1.0,
        "least": 1.0,
        "greatest": 1.0,
        "speedup_cpu_time": 1.0,
        "turns": turns,
        "facts": contender.facts,
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as plain text."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {report['settings']['threads']} thread(s) each; {versions}",
        f"model {report['settings']['model']}; load at start {about['load_at_start'][0]:.1f}",
        "",
        f"{'task':<20}{'contender':<29}{'s':>8}{'tokens/s':>10}{'peak MB':>9}{'ours is':>9}{'least':>7}{'loss':>9}",
    ]
    for row in report["rows"]:
        loss = "" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}"
        left = f"{row['task']:<20}{row['contender']:<29}{row['seconds']:>8.3f}{row['tokens_per_second']:>10.0f}"
        ratio = f"{row['speedup_of_steelyard']:>8.2f}x{row['least']:>7.2f}"
        lines.append(f"{left}{row['peak_rss_mb']:>9.0f}{ratio}{loss:>9}")
    return "\n".join(lines + report["faults"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default="smollm2", help="as LanguageModelConfig.name")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each contender, one update each")
    parser.add_argument("--batch", type=int, default=8, help="prompts or pairs of an update")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings = {
        "model": options.model,
        "threads": options.threads,
        "repeats": options.repeats,
        "quick": options.quick,
        "batch": options.batch,
    }
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "rows": [], "faults": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    for task in tasks(options):
        if options.only in task.name:
            run(task, options, report)
    report["machine"]["load_at_end"] = os.getloadavg()
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if report["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
