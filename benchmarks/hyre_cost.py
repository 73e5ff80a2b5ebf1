"""What 100 heads cost to train beside one, and what adapting and serving them costs, on this machine and in one run.

    python benchmarks/hyre_cost.py --out hyre_cost.json [--quick] [--only encoder]

Training: whole updates of pairs with the backbone in the loop: an encoder trained in full, a language model with LoRA
adapters, and one that is frozen. Every contender is a process of its own, which is how memory is measured. One head and
one ensemble at a time take turns (A B, B A, ...), so that whatever else the machine does hits both alike, and a ratio
is the median over turns of the ratio within a turn. Wanted: at most 1.05.

Adapting and serving: the measures of `steelyard.recipes.hyre_cost`, whose page says what each is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from updates import Contender, machine

WORKER = Path(__file__).parent / "peers" / "hyre_worker.py"
BACKBONES = ("encoder", "lora", "frozen")
ENSEMBLES = {"100 heads": ["--heads=100"], "100 heads with priors": ["--heads=100", "--prior"]}
PACKAGES = ("torch", "transformers", "peft", "numpy")


def train(backbone: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one ensemble against one head."""
    common = [f"--backbone={backbone}", f"--encoder={options.encoder}", f"--model={options.model}"]
    common += [f"--batch={options.batch}", f"--prompt={options.prompt}", f"--completion={options.completion}"]
    running: list[Contender] = []
    try:
        for label, own in (("1 head", ["--heads=1"]), (name, ENSEMBLES[name])):
            print(f"{backbone}: loading {label}", file=sys.stderr)
            running.append(Contender(label, [sys.executable, str(WORKER), *common, *own], options.threads))
        # also the warm-up: the first update is slow
        losses = [contender.ask("losses", count=2) for contender in running]
        for repeat in range(options.repeats):
            for contender in running if repeat % 2 == 0 else running[::-1]:
                contender.turn()
        peaks = [contender.ask("memory")["peak_rss_mb"] for contender in running]
    finally:
        for contender in running:
            contender.close()
    one, many = running
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(one.turns, many.turns, strict=True)]
    return {
        "backbone": backbone,
        "contender": name,
        "steps_per_second_of_1": 1 / statistics.median(turn["seconds"] for turn in one.turns),
        "steps_per_second": 1 / statistics.median(turn["seconds"] for turn in many.turns),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
        "ratio_cpu_time": statistics.median(
            b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(one.turns, many.turns, strict=True)
        ),
        "peak_rss_mb_of_1": peaks[0],
        "peak_rss_mb": peaks[1],
        "memory_ratio": peaks[1] / peaks[0],
        "head_share_of_parameters": many.facts["head_parameters"] / many.facts["parameters"],
        "losses": losses,
        "turns": {"1 head": one.turns, name: many.turns},
        "facts": many.facts,
    }


def serve(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the measures of adapting and serving, in this process."""
    import torch

    from steelyard.recipes.hyre_cost import CostStudy, adapting

    torch.set_num_threads(options.threads)
    turns = 3 if options.quick else 20
    pairs = 2 if options.quick else 8
    config = CostStudy(backbone="mlp" if options.quick else "encoder", pairs=pairs, turns=turns, steps=1)
    return [
        {
            "measure": one.name,
            "unit": one.unit,
            "median": statistics.median(one.values),
            "least": min(one.values),
            "greatest": max(one.values),
            "wanted_at_most": one.limit,
            "values": one.values,
        }
        for one in adapting(config)
    ]


def table(report: dict[str, Any]) -> str:
    """Return the report as plain text."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {report['settings']['threads']} thread(s) each; {versions}",
        f"load at start {about['load_at_start'][0]:.1f}",
        "",
        f"{'backbone':<10}{'heads':<24}{'steps/s of 1':>13}{'steps/s':>9}{'ratio':>8}{'least':>7}{'most':>7}{'CPU':>7}"
        f"{'peak MB':>9}{'ratio':>7}{'share':>8}",
    ]
    for row in report["training"]:
        left = f"{row['backbone']:<10}{row['contender']:<24}{row['steps_per_second_of_1']:>13.2f}"
        middle = f"{row['steps_per_second']:>9.2f}{row['ratio']:>8.3f}{row['least']:>7.2f}{row['greatest']:>7.2f}"
        middle += f"{row['ratio_cpu_time']:>7.3f}"
        right = f"{row['peak_rss_mb']:>9.0f}{row['memory_ratio']:>7.3f}{row['head_share_of_parameters']:>8.3%}"
        lines.append(left + middle + right)
    lines += ["", f"{'measure':<62}{'unit':>6}{'median':>10}{'least':>10}{'most':>10}"]
    for row in report["adapting"]:
        values = f"{row['median']:>10.2f}{row['least']:>10.2f}{row['greatest']:>10.2f}"
        lines.append(f"{row['measure']:<62}{row['unit']:>6}{values}")
    return "\n".join(lines + report["faults"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--encoder", default="minilm", help="as EncoderConfig.encoder")
    parser.add_argument("--model", default="smollm2", help="as LanguageModelConfig.name")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender")
    parser.add_argument("--repeats", type=int, default=12, help="turns of each contender, one update each")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an update")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", default="", help="backbones whose name contains this; 'none' for no training")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.batch, options.prompt, options.completion = 2, 2, 6, 6
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keys = ("encoder", "model", "threads", "repeats", "batch", "prompt", "completion", "quick")
    settings = {key: getattr(options, key) for key in keys}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "training": [], "faults": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    for backbone in BACKBONES:
        for name in ENSEMBLES:
            if options.only in backbone:
                row = train(backbone, name, options)
                report["training"].append(row)
                if not all(math.isfinite(loss) for one in row["losses"] for loss in one):
                    report["faults"].append(f"{backbone}, {name}: a loss is not finite: {row['losses']}")
    report["adapting"] = serve(options)
    report["machine"]["load_at_end"] = os.getloadavg()
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if report["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
