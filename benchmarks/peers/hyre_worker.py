"""A contender of `benchmarks/hyre_cost.py`: training steps of an ensemble with so many heads on one backbone.

The step is the whole `update` of the training loop: both sides of the pairs through the backbone, the heads, the mean
of their losses, gradients and Adam.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from worker import serve

NUM_BATCHES = 4
LOWEST = 2000
"""Smaller ids are left to special tokens."""


def pairs(options: argparse.Namespace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Draw prompts [B, L] and two completions [B, T] of each."""
    draw = torch.Generator().manual_seed(7)

    def some(length: int) -> Tensor:
        return torch.randint(LOWEST, 20_000, (options.batch, length), generator=draw)

    return [(some(options.prompt), some(options.completion), some(options.completion)) for _ in range(NUM_BATCHES)]


def encoder_task(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return an encoder that is trained in full, and batches of its token rows."""
    from steelyard.data.labelled import LabelledBatch
    from steelyard.nets.backbones import EncoderBackbone
    from steelyard.nets.encoder import EncoderConfig, load_encoder

    backbone = EncoderBackbone(load_encoder(EncoderConfig(encoder=options.encoder)).requires_grad_(True))
    begin = torch.full((options.batch, 1), options.prompt)  # where a completion begins in its row
    batches = [
        LabelledBatch(
            torch.cat([begin, prompt, first], 1), torch.ones(options.batch), torch.cat([begin, prompt, second], 1)
        )
        for prompt, first, second in pairs(options)
    ]
    return backbone, batches


def language_task(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return a language model, with LoRA adapters or as it is, and batches of completions with pairs."""
    from steelyard.data.experience import ExperienceBatch
    from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model

    adapter = LoRAConfig(rank=16) if options.backbone == "lora" else None
    config = LanguageModelConfig(options.model, adapter=adapter, reference="none")
    model = load_language_model(config, torch.Generator().manual_seed(0))
    rows = torch.arange(options.batch)
    batches = []
    for prompt, first, second in pairs(options):
        completions = torch.cat([first, second])
        both = torch.stack([rows, rows + options.batch], 1)
        masks = torch.ones(prompt.shape), torch.ones(completions.shape)
        batches.append(ExperienceBatch(prompt, masks[0], completions, masks[1], torch.cat([rows, rows]), pairs=both))
    return model, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=("encoder", "lora", "frozen"), required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--prior", action="store_true", help="frozen MLP priors")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=32)
    options = parser.parse_args()

    from steelyard import runtime
    from steelyard.nets.ensemble import HeadsConfig
    from steelyard.objectives.hyre import EnsembleConfig, HyRe
    from steelyard.train.loop import update
    from steelyard.train.optim import OptimConfig, Optimizers

    runtime.prepare(runtime.RuntimeConfig(threads=options.threads))
    task: Callable[[argparse.Namespace], tuple[Any, list[Any]]]
    task = encoder_task if options.backbone == "encoder" else language_task
    backbone, batches = task(options)
    heads = HeadsConfig(num_heads=options.heads, pooled=False, prior="mlp" if options.prior else "none")
    rate = 1e-4 if options.backbone == "lora" else 1e-5
    ensemble = EnsembleConfig(heads=heads, learning_rate=rate, frozen=options.backbone == "frozen")
    learner = HyRe(ensemble, backbone, torch.Generator().manual_seed(1))
    learner.fit_statistics(batches[:1])
    optimizers = Optimizers(learner, OptimConfig())

    def step(number: int) -> float:
        return float(update(learner, optimizers, batches[number % NUM_BATCHES], 0, number)["loss/heads"])

    def memory() -> dict[str, float]:
        return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def losses(count: int) -> list[float]:
        return [step(number) for number in range(count)]

    facts = {
        "parameters": sum(p.numel() for p in learner.parameters()),
        "head_parameters": sum(p.numel() for p in learner.head.parameters()),
        "width": learner.head.trained.layer(0)[0].shape[2] if learner.head.trained is not None else None,
    }
    serve(step, facts, {"memory": memory, "losses": losses})


if __name__ == "__main__":
    main()
