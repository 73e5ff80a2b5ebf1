"""Text data, a language model of a few thousand parameters, and sources over them."""

from __future__ import annotations

from typing import Any

import torch

from steelyard.data.preferences import TextData, TextRow, TokenizedData, tokenize
from steelyard.data.tokenizer import ByteChat
from steelyard.envs.samplers import SamplingConfig, TinySampler
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner
from steelyard.rng import torch_generator
from steelyard.train.experience import ExperienceConfig, ExperienceSource

TRANSFORMER = TransformerConfig(width=16, layers=1, heads=2, context=48)
CHAT = ByteChat()


def preferences(rows: int = 12) -> TokenizedData:
    """Each prompt has a longer chosen completion and a shorter rejected one, all different."""
    made = [TextRow(f"p{i}", (f"good {i}" + "!" * (i % 3), f"bad{i}"), pairs=((0, 1),)) for i in range(rows)]
    return tokenize(TextData("preference", made, "made"), CHAT)


def prompts(rows: int = 12) -> TokenizedData:
    return tokenize(TextData("prompt", [TextRow(f"p{i}", columns={"answer": i}) for i in range(rows)], "made"), CHAT)


class Rewards:
    """A reward of each completion's tokens that hardly ever ties; counts its calls."""

    name = "made"

    def __init__(self, values: Any = None) -> None:
        self.values, self.seen = values, []

    def score(self, prompts, completions, completion_ids, columns):
        self.seen.append((list(prompts), list(completions), [list(ids) for ids in completion_ids], dict(columns)))
        if self.values is not None:
            return torch.as_tensor([self.values(n) for n in range(len(prompts))], dtype=torch.float32)
        return torch.tensor([sum((k + 1) * i for k, i in enumerate(ids)) % 101 / 10 for ids in completion_ids])


def learner(kind: str = "dpo", seed: int = 0, **settings: Any):
    config = PREFERENCE_OBJECTIVES[kind](**{"learning_rate": 1e-2} | settings)
    model = TinyLM(TRANSFORMER, torch_generator(seed, "weights"), value_head=config.needs.values)
    return build_preference_learner(model, config)


def source(kind: str = "dpo", data: Any = None, scorer: Any = None, made: Any = None, shards: int = 1,
           sampling: SamplingConfig | None = None, **config: Any) -> ExperienceSource:  # fmt: skip
    """A source of B = 8, M = 4 and N = 4 over a fresh learner, or over `made`."""
    made = made or learner(kind)
    sampler = TinySampler(made.model, sampling or SamplingConfig(max_new_tokens=6), CHAT.eos, CHAT.pad)
    settings = {"minibatch_prompts": 4, "prompts_per_refresh": 8, "num_generations": 4} | config
    return ExperienceSource(
        made, data or preferences(), sampler, scorer, None, ExperienceConfig(**settings), 7,
        decode=CHAT.decode, shards=shards,
    )  # fmt: skip
