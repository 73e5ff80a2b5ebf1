"""Scorers that are models trained here: reward models and the rewards that preference-tuned policies imply."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from steelyard.artefact import find
from steelyard.config import Config, from_json, require_positive
from steelyard.data.experience import ExperienceBatch
from steelyard.data.tokenizer import ByteChat, Text, Tokenizer
from steelyard.errors import CheckpointError, ConfigError
from steelyard.nets.lm import LanguageModelConfig, load_language_model
from steelyard.nets.transformer import Transformer, TransformerConfig
from steelyard.objectives.reward_model import RewardModel, RewardModelConfig
from steelyard.rng import torch_generator
from steelyard.train import checkpoint

FORMAT = "steelyard-reward-model-1"
BATCH_SIZE = 16
"""Completions in one forward pass; scores do not depend on it."""


@dataclass(frozen=True)
class RewardModelArtefact(Config):
    """pretrained/config.json of a reward model."""

    objective: RewardModelConfig
    """What was learned, and how."""
    model: LanguageModelConfig | TransformerConfig
    """The backbone; a plain transformer reads bytes (`ByteChat`)."""
    max_tokens: int = 1024
    """Longest prompt and completion together; longer ones are cut, and counted."""
    seed: int = 0
    """Of the first weights: a frozen random backbone ("tiny") is drawn again, not saved."""
    format: Literal["steelyard-reward-model-1"] = "steelyard-reward-model-1"
    """Version of this layout."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_tokens")


class BatchScore(Protocol):
    """[N] scores of a batch."""

    def __call__(self, batch: ExperienceBatch) -> Tensor:
        """Return float32 [N]."""
        ...


class ModelScorer:
    """Scores texts with a model that scores token batches.

    Args:
        name: what messages and reports call it.
        score_batch: the model; must not depend on padding or on other rows.
        tokenizer: the model's own; the token ids that a policy wrote are not used.
        max_tokens: longest prompt and completion together.
        device: where the model is.

    Attributes:
        cut: how many completions were scored so far after they or their prompts had been cut.
    """

    def __init__(
        self, name: str, score_batch: BatchScore, tokenizer: Tokenizer, max_tokens: int, device: torch.device | str
    ) -> None:
        self.name, self.score_batch, self.tokenizer, self.max_tokens = name, score_batch, tokenizer, max_tokens
        self.device = device
        self.cut = 0

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        rows = [
            (self.tokenizer.prompt(prompt), self.tokenizer.completion(prompt, completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        self.cut += sum(len(prompt) + len(completion) > self.max_tokens for prompt, completion in rows)
        rows = [_cut(prompt, completion, self.max_tokens) for prompt, completion in rows]
        # completions of one prompt together, and prompts of like length: less padding, and prompts can be shared
        longest: dict[tuple[int, ...], int] = {}
        for prompt, completion in rows:
            key = tuple(prompt)
            longest[key] = max(longest.get(key, 0), len(prompt) + len(completion))
        order = sorted(range(len(rows)), key=lambda row: (longest[tuple(rows[row][0])], rows[row][0]))
        scores = torch.zeros(len(rows))
        for start in range(0, len(rows), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = token_batch([rows[row] for row in chosen], self.tokenizer.pad).to(self.device)
            scores[chosen] = self.score_batch(batch).detach().float().cpu()
        return scores


def _cut(prompt: list[int], completion: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut the prompt's beginning first, but leave its last token; then the completion's end."""
    completion = completion[: limit - 1]
    return prompt[-(limit - len(completion)) :], completion


def token_batch(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> ExperienceBatch:
    """Return a batch of (prompt ids, completion ids); equal prompts are one."""
    number: dict[tuple[int, ...], int] = {}
    prompt_of = torch.tensor([number.setdefault(tuple(prompt), len(number)) for prompt, _ in rows])
    length, width = max(map(len, number)), max(len(completion) for _, completion in rows)
    prompts, completions = torch.full((len(number), length), pad), torch.full((len(rows), width), pad)
    prompt_mask, scored_mask = torch.zeros(len(number), length), torch.zeros(len(rows), width)
    for row, prompt in enumerate(number):
        prompts[row, length - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, length - len(prompt) :] = 1
    for row, (_, completion) in enumerate(rows):
        completions[row, : len(completion)] = torch.tensor(completion, dtype=torch.int64)
        scored_mask[row, : len(completion)] = 1
    return ExperienceBatch(prompts, prompt_mask, completions, scored_mask, prompt_of)


def build_reward_model(artefact: RewardModelArtefact) -> tuple[RewardModel, Tokenizer]:
    """Build an untrained reward model and its tokenizer."""
    backbone: nn.Module
    tokenizer: Tokenizer
    if isinstance(artefact.model, TransformerConfig):
        backbone, tokenizer = Transformer(artefact.model, torch_generator(artefact.seed, "initial weights")), ByteChat()
        if artefact.model.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"reward model: a transformer reads bytes and needs vocab_size {tokenizer.vocab_size}, found "
                f"{artefact.model.vocab_size}"
            )
        if artefact.model.context < artefact.max_tokens:
            raise ConfigError(
                f"reward model: max_tokens is {artefact.max_tokens}, more than the context {artefact.model.context}"
            )
    else:
        model = load_language_model(artefact.model, torch_generator(artefact.seed, "initial weights"))
        backbone, tokenizer = model, model.tokenizer
    return RewardModel(artefact.objective, backbone, torch_generator(artefact.seed, "reward head")), tokenizer


def format_of(path: str | Path) -> str:
    """Return what a run, a checkpoint or its pretrained/ directory holds, e.g. "steelyard-preference-1"."""
    file = find(path) / "pretrained/config.json"
    try:
        return str(json.loads(file.read_text())["format"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: missing or damaged") from None


def read_reward_model(path: str | Path) -> tuple[RewardModel, Tokenizer, RewardModelArtefact]:
    """Read a trained reward model from a run, a checkpoint or its pretrained/ directory; files are checked."""
    folder = find(path)
    checkpoint.verify(folder)
    file = folder / "pretrained/config.json"
    found = format_of(folder)
    if found != FORMAT:
        raise CheckpointError(f"{path}: expected a reward model ({FORMAT}), found format {found!r}")
    artefact = from_json(RewardModelArtefact, file.read_text(), where=str(file))
    model, tokenizer = build_reward_model(artefact)
    checkpoint.load_into(model, safetensors.torch.load_file(folder / "pretrained/model.safetensors"), str(folder))
    return model.eval(), tokenizer, artefact


def load_reward_model(path: str | Path) -> ModelScorer:
    """Return a trained reward model as a scorer of texts (`reward_model:DIR`)."""
    model, tokenizer, artefact = read_reward_model(path)
    return ModelScorer(f"reward_model:{path}", model.score, tokenizer, artefact.max_tokens, model.head.device)


def implicit_scorer(name: str, model: Any, tokenizer: Tokenizer, beta: float, max_tokens: int) -> ModelScorer:
    """Return the reward that a policy implies: beta (log pi(y|x) - log pi_ref(y|x)), summed over tokens.

    Args:
        name: what messages and reports call it.
        model: a policy with a reference (`PolicyModel`, an `nn.Module`).
        tokenizer: the model's.
        beta: of the objective it was trained with; scales all rewards alike.
        max_tokens: longest prompt and completion together.
    """

    @torch.no_grad()
    def score_batch(batch: ExperienceBatch) -> Tensor:
        difference: Tensor = model.outputs(batch).token_logps - model.reference_token_logps(batch)
        return beta * difference.sum(1)

    return ModelScorer(name, score_batch, tokenizer, max_tokens, next(model.parameters()).device)


def load_implicit(path: str | Path) -> ModelScorer:
    """Return the reward that a preference run's policy implies, as a scorer of texts (`implicit:DIR`).

    beta is that of the run's objective, or 1 where it has none; it changes neither order nor accuracy.

    Raises:
        ConfigError: the run kept no reference.
    """
    from steelyard.workflows.preference import load_policy, tokenizer_of

    learner, artefact = load_policy(path)
    model: Any = learner.model
    if getattr(model, "reference_kind", "copy") == "none":
        raise ConfigError(f"implicit:{path}: the run kept no reference (model.reference is 'none')")
    beta = float(getattr(artefact.objective, "beta", 1.0) or 1.0)
    limit = artefact.max_prompt_tokens + artefact.max_completion_tokens
    if isinstance(artefact.model, TransformerConfig):
        limit = min(limit, artefact.model.context)
    return implicit_scorer(f"implicit:{path}", model, tokenizer_of(model), beta, limit)


class HeadScorer:
    """Scores texts with a head set, adapted to one profile.

    Args:
        name: what messages and reports call it.
        heads: `adapt.artefact.LoadedHeads`.
        profile: `adapt.profile.Profile`; None: what the heads' way of adapting says before any label.
    """

    def __init__(self, name: str, heads: Any, profile: Any = None) -> None:
        from steelyard.adapt.personalizer import Personalizer

        self.name, self.heads, self.profile = name, heads, profile
        self._personalizer = Personalizer(heads, heads.method())

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return float32 [N]."""
        scores = self._personalizer.score(self.heads.features(prompts, completions), self.profile)
        return torch.from_numpy(scores).float()


def load_head_scorer(rest: str) -> HeadScorer:
    """Return a head set as a scorer of texts (`hyre:DIR`, or `hyre:DIR#profile.json` for one user).

    Raises:
        ConfigError: the head set is for another task, or does not read texts.
        DataError: the profile belongs to another head set.
    """
    from steelyard.adapt.artefact import load_heads
    from steelyard.adapt.backbones import reads_text
    from steelyard.adapt.profile import read_profile

    folder, _, file = rest.partition("#")
    heads = load_heads(folder)
    if heads.task != "preference" or not reads_text(heads.artefact.backbone):
        raise ConfigError(f"hyre:{rest}: expected a head set of preferences that reads texts, found a {heads.task}")
    profile = None
    if file:
        profile = read_profile(file)
        profile.require(heads, file)
    return HeadScorer(f"hyre:{rest}", heads, profile)
