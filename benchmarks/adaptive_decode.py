"""What sampling with self-evaluations costs: decoding against `generate`, looking aside against reading again (E11).

    python benchmarks/adaptive_decode.py --out adaptive_decode.json [--quick] [--model tiny] [--threads 1]

One process, one model in float32, one run:

- decode: `adapt.decoding.ModelBackend` against `transformers`' `generate`, the same prompts, rows and new tokens (no
  end of sequence), pure sampling at temperature 1, prompts read included. Rows "16 x 1" are 16 prompts, "1 x 16" are
  samples of one prompt, which `generate` reads 16 times. `generate` uses fused attention, as models come, and for a
  second row the attention of this library.
- suffix: an evaluation of 16 rows through the cache (`SlotReader.peek`) against reading prompt, completion and suffix
  again, at several lengths. Both read P(No) only; the cached keys are as good as new afterwards.
- identical: samples with and without evaluations at every 16th token, alone and in company, with and without `exact`;
  counted are samples that differ in any token.

Contenders take turns (A B, B A, ...); a ratio is the median over turns of the ratio within a turn. CPU time is given
beside wall time, for machines that do other work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from updates import machine

from steelyard.adapt.compute_policy import Request
from steelyard.adapt.decoding import ModelBackend
from steelyard.envs.samplers import SamplingConfig
from steelyard.nets.lm import CausalLM, LanguageModelConfig, load_language_model
from steelyard.nets.slots import SlotReader

ROWS = 16
NOTHING_ENDS = -1


class Asked:
    """An evaluator of any tokens; its answer means nothing, its cost is that of a trained one."""

    reserved: tuple[int, ...] = ()

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.extra_tokens = tokens, len(tokens)

    def score(self, reader: Any, drawn: Tensor) -> Tensor:
        """Return something between 0 and 1 for every row."""
        logits: Tensor = reader.peek(self.tokens)[0]
        return logits[:, [40, 41]].softmax(1)[:, 1]


def turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Warm up, then time contenders in turns."""
    for run in contenders.values():
        run()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in list(contenders) if repeat % 2 == 0 else list(contenders)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            found[name].append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})
    return found


def row(
    part: str, task: str, ours: str, other: str, found: dict[str, list[dict[str, float]]], **more: Any
) -> dict[str, Any]:
    """Compare one contender with ours."""
    result: dict[str, Any] = {
        "part": part,
        "task": task,
        "contender": other,
        "turns": found[other],
        "our_turns": found[ours],
    }
    for clock in ("seconds", "cpu_seconds"):
        ratios = [b[clock] / a[clock] for a, b in zip(found[ours], found[other], strict=True)]
        result[f"speedup_{clock}"] = statistics.median(ratios)
        result[f"range_{clock}"] = [min(ratios), max(ratios)]
        result[f"our_{clock}"] = statistics.median(turn[clock] for turn in found[ours])
        result[f"their_{clock}"] = statistics.median(turn[clock] for turn in found[other])
    return result | more


def decode(model: CausalLM, prompts: Tensor, new: int, repeats: int) -> list[dict[str, Any]]:
    """Time sampling."""
    import transformers

    network, attention = model.network, model.network.config._attn_implementation
    network.generation_config = transformers.GenerationConfig()
    rows = []
    for count, samples in ((ROWS, 1), (1, ROWS)):
        some = prompts[:count]
        settings = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, num_return_sequences=samples,
            pad_token_id=0,
        )  # fmt: skip

        def theirs(implementation: str, some: Tensor = some, settings: Any = settings) -> None:
            network.set_attn_implementation(implementation)
            try:
                with torch.no_grad():
                    found = network.generate(some, attention_mask=torch.ones_like(some), generation_config=settings)
            finally:
                network.set_attn_implementation(attention)
            assert found.shape == (ROWS, some.shape[1] + new)

        def ours(exact: bool, some: Tensor = some, count: int = count, samples: int = samples) -> None:
            backend = ModelBackend(
                model, None, SamplingConfig(max_new_tokens=new), 0, some.tolist(), eos=NOTHING_ENDS, exact=exact,
                decode=lambda _: "",
            )  # fmt: skip
            draws = backend.draw([Request(p, k, 1.0) for p in range(count) for k in range(samples)])
            assert sum(draw.decoded for draw in draws) == ROWS * new

        contenders: dict[str, Callable[[], None]] = {
            "steelyard": lambda: ours(False),
            "steelyard, exact": lambda: ours(True),
            "generate": lambda: theirs("sdpa"),
        }
        if attention != "sdpa":
            contenders["generate, our attention"] = lambda: theirs(attention)
        found = turns(contenders, repeats)
        rows += [
            row("decode", f"{count} x {samples}", "steelyard", name, found, tokens=ROWS * new)
            for name in contenders
            if name != "steelyard"
        ]
    return rows


def suffix(model: CausalLM, prompts: Tensor, lengths: list[int], tokens: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time evaluations."""
    rows = []
    for length in lengths:
        text = prompts.repeat(1, -(-length // prompts.shape[1]))[:, :length]
        whole = torch.cat([text, tokens.expand(len(text), -1)], 1)
        full = torch.full((len(text),), length)
        with torch.no_grad():
            reader = SlotReader.of_prompts(model.slot_forward(), None, text, full)
        before = reader.logits.clone()

        def cached(reader: SlotReader = reader) -> Tensor:
            return reader.peek(tokens)[0]

        def again(whole: Tensor = whole) -> Tensor:
            with torch.no_grad():
                logits: Tensor = model.network(input_ids=whole, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits

        difference = (cached() - again()).abs().max().item()
        found = turns({"cache": cached, "again": again}, repeats)
        changed = (reader.logits - before).abs().max().item()
        rows.append(
            row("suffix", f"{length} tokens", "cache", "again", found, extra_tokens=len(tokens),
                logit_difference=difference, changed_by_looking=changed)
        )  # fmt: skip
    return rows


def identical(model: CausalLM, prompts: Tensor, new: int, tokens: Tensor) -> list[dict[str, Any]]:
    """Count samples that anything but their own number changes."""
    asked = [Request(p, k, (1.0, 0.0, 0.7)[k % 3]) for p in range(len(prompts)) for k in range(3)]
    checkpoints = range(16, new, 16)
    drawn: dict[str, list[tuple[int, ...]]] = {}
    prefixes = [prompt[: 3 + 2 * number].tolist() for number, prompt in enumerate(prompts)]
    for exact in (False, True):
        for evaluated in (False, True):
            for rows in (ROWS, 5):
                backend = ModelBackend(
                    model, Asked(tokens) if evaluated else None, SamplingConfig(max_new_tokens=new), 3, prefixes,
                    eos=NOTHING_ENDS, exact=exact, rows=rows, decode=lambda _: "",
                )  # fmt: skip
                name = f"exact={exact} evaluated={evaluated} rows={rows}"
                drawn[name] = [draw.tokens for draw in backend.draw(asked, tuple(checkpoints) if evaluated else ())]
    (reference, expected), *others = drawn.items()
    return [
        {
            "part": "identical",
            "task": name,
            "against": reference,
            "samples": len(found),
            "tokens": len(found) * new,
            "differing": sum(a != b for a, b in zip(found, expected, strict=True)),
        }
        for name, found in others
    ]


def text(report: dict[str, Any]) -> str:
    """Return the report as plain text."""
    about = report["machine"]
    lines = [f"{about['cpu']}, {report['threads']} threads, load {about['load_at_start'][0]:.1f}", ""]
    lines.append(f"{'':<9}{'task':<14}{'contender':<26}{'ours s':>9}{'theirs s':>10}{'speed-up':>10}{'CPU time':>10}")
    for found in report["rows"]:
        if found["part"] == "identical":
            lines.append(f"identical {found['task']}: {found['differing']} of {found['samples']} samples differ")
        else:
            lines.append(
                f"{found['part']:<9}{found['task']:<14}{found['contender']:<26}{found['our_seconds']:>9.3f}"
                f"{found['their_seconds']:>10.3f}{found['speedup_seconds']:>9.2f}x{found['speedup_cpu_seconds']:>9.2f}x"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", choices=("decode", "suffix", "identical"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_language_model(LanguageModelConfig(options.model, reference="none"), torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(7)
    length, new, lengths = (8, 6, [16]) if options.quick else (64, 48, [64, 128, 256])
    prompts = torch.randint(32, min(250, model.tokenizer.vocab_size), (ROWS, length), generator=draw)
    tokens = torch.randint(32, 250, (20,), generator=draw)
    report: dict[str, Any] = {"machine": machine(), "threads": options.threads, "model": options.model, "rows": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "decode": lambda: decode(model, prompts, new, options.repeats),
        "suffix": lambda: suffix(model, prompts, lengths, tokens, options.repeats),
        "identical": lambda: identical(model, prompts[:4] if options.quick else prompts, new, tokens),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            print(f"{name} ...", file=sys.stderr)
            report["rows"] += part()
            report["machine"]["load_at_end"] = os.getloadavg()
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(text(report))


if __name__ == "__main__":
    main()
