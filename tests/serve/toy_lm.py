"""A service over a tiny random language model: python toy_lm.py '{"port": 0}' '{"seconds": 0.01}'.

The second argument: arguments of `toy_answerer`. Every decode step is said in the log.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steelyard.adapt.compute_policy import Request
from steelyard.config import from_json
from steelyard.data.tokenizer import ByteChat
from steelyard.nets.lm import LanguageModelConfig, load_language_model
from steelyard.nets.self_eval import SuffixEvaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.rng import torch_generator
from steelyard.serve.lm import serve_lm
from steelyard.serve.lm_engine import LMServeConfig
from steelyard.workflows.best_of_n import Answerer


@dataclass(frozen=True)
class ToyAnswerer(Answerer):
    """May be slow, says its steps, and fails at a prompt that asks for it."""

    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)

    def backend(self, prompts: Any, tokens: Any, *rest: Any, on_step: Any, **options: Any) -> Any:
        if "raise the secr" in str(prompts[0]):
            raise RuntimeError(str(prompts))

        def after_step(requests: Sequence[Request], drawn: Sequence[int]) -> None:
            self.steps.append(len(requests))
            print(f"step {len(tokens[0])}", file=sys.stderr, flush=True)
            time.sleep(self.seconds)
            if "raise later" in str(prompts[0]) and len(self.steps) > 3:
                raise RuntimeError(str(prompts))
            on_step(requests, drawn)

        return super().backend(prompts, tokens, *rest, on_step=after_step, **options)


def toy_model(kind: str) -> Any:
    """Return "hf": a random model of transformers; "tiny": one of plain PyTorch that writes letters and then ends."""
    if kind == "hf":
        return load_language_model(LanguageModelConfig(name="tiny", reference="none"), torch_generator(0, "toy")).eval()
    config = TransformerConfig(width=16, layers=1, heads=2, context=1200)
    model = TinyLM(config, torch_generator(0, "toy"), reference="none")
    with torch.no_grad():
        direction = torch.full((16,), 0.25)
        model.transformer.token_embedding[97:123] += direction
        model.transformer.token_embedding[ByteChat.eos] = 0.7 * direction
        model.transformer.final_norm.bias.copy_(6 * direction)
    return model


@functools.cache
def toy_answerer(seconds: float = 0.0, scorer: str = "self", kind: str = "tiny") -> ToyAnswerer:
    """Return a model with bytes as tokens, and a question that it was never taught to answer."""
    evaluator = SuffixEvaluator((63,), 89, 78) if scorer == "self" else None
    return ToyAnswerer("toy", toy_model(kind), ByteChat(), scorer, evaluator, seconds=seconds)


if __name__ == "__main__":
    config = from_json(LMServeConfig, sys.argv[1])
    answerer = toy_answerer(**json.loads(sys.argv[2]))
    serve_lm(lambda: answerer, config, lambda address, _: print(address, flush=True))
