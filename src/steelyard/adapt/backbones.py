r"""Backbones under a head set: texts, rows of tables or precomputed features in, features [N, D] out.

    raw = what a frozen source says of an example [N, X]     (computed once, kept on disk where it is dear)
    \phi(x) = trunk((raw - mean) / scale)                    (D numbers; trained with the heads)

| config | raw | reads |
|---|---|---|
| `FeaturesConfig` | the data's own numbers | features |
| `TableBackboneConfig` | the row; its hidden layers are the trunk | tables |
| `WordsConfig` | hashed words of the completion: numpy alone, no model | texts |
| `AgentConfig` | the last hidden layer of a critic or an actor trained here | tables of observations (and actions) |
| `nets.encoder.EncoderConfig` | a text encoder's vector | texts |
| `nets.lm.LanguageModelConfig` | a causal language model's state at the completion's last token | texts |

A text source may be trained too (LoRA or all weights); then nothing is kept on disk and there are no statistics.

Shapes: N examples, X raw numbers, D features.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steelyard.config import Config, require_positive, to_json
from steelyard.data.feature_cache import cached_features
from steelyard.data.tokenizer import Text
from steelyard.envs.model_scorers import token_batch
from steelyard.envs.scorers import text_of
from steelyard.errors import ConfigError, DataError
from steelyard.nets.critics import Critic
from steelyard.nets.discrete import ActionNet, DiscreteCritic
from steelyard.nets.encoder import Encoder, EncoderConfig, load_encoder
from steelyard.nets.lm import CausalLM, LanguageModelConfig, cache_folder, load_language_model
from steelyard.nets.policies import GaussianActor
from steelyard.rng import torch_generator

Arrays = npt.NDArray[np.float32]
Row = tuple[list[int], int]
"""Token ids of a prompt and its completion, and where the completion begins."""


@dataclass(frozen=True)
class FeaturesConfig(Config):
    """No backbone: the data are features already."""

    kind: Literal["features"] = "features"
    """Name of the backbone."""


@dataclass(frozen=True)
class TableBackboneConfig(Config):
    """A small network over the rows of a table, trained with the heads."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of its hidden layers, GELU after each; the last are the features."""
    kind: Literal["table"] = "table"
    """Name of the backbone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "hidden")
        if not self.hidden:
            raise ConfigError("hidden: expected at least one width; without a network use the backbone 'features'")


@dataclass(frozen=True)
class WordsConfig(Config):
    """Hashed words of the completion, with its length: no model and nothing to install."""

    width: int = 512
    """Numbers that the words are hashed to, one of which is the length."""
    kind: Literal["words"] = "words"
    """Name of the backbone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.width < 2:
            raise ConfigError(f"width must be at least 2, found {self.width}")


@dataclass(frozen=True)
class AgentConfig(Config):
    """What a critic or an actor trained here has computed before its output layer."""

    run: str
    """Run directory, checkpoint or pretrained/ directory of a control run."""
    part: Literal["critic", "actor"] = "critic"
    """Critics read observations and actions (one after the other), actors and discrete critics observations."""
    kind: Literal["agent"] = "agent"
    """Name of the backbone."""


BackboneConfig = FeaturesConfig | TableBackboneConfig | WordsConfig | AgentConfig | EncoderConfig | LanguageModelConfig
TextConfig = WordsConfig | EncoderConfig | LanguageModelConfig


def reads_text(config: BackboneConfig) -> bool:
    """Return whether a backbone reads prompts and completions, rather than numbers."""
    return isinstance(config, TextConfig)


def name_of(config: BackboneConfig) -> str:
    """Return what a terminal calls a backbone."""
    match config:
        case EncoderConfig():
            return f"encoder {config.encoder}"
        case LanguageModelConfig():
            return f"language model {config.name}"
        case AgentConfig():
            return f"{config.part} of {config.run}"
    return config.kind


class TextSource(Protocol):
    """Reads texts.

    Attributes:
        width: X.
        key: names all that decides the numbers.
    """

    width: int
    key: str

    def read(self, texts: Sequence[tuple[str, str]]) -> Arrays:
        """Return float32 [N, X] of (prompt, completion) texts as `packed` writes them; without gradients."""
        ...


class HashedWords:
    """Signed hashes of words (Weinberger et al., "Feature Hashing", 2009), log(1 + count), and log(1 + length)."""

    def __init__(self, config: WordsConfig) -> None:
        self.width, self.key = config.width, f"words/{config.width}"

    def read(self, texts: Sequence[tuple[str, str]]) -> Arrays:
        """Return float32 [N, X]; only completions are read."""
        found = np.zeros((len(texts), self.width), np.float32)
        for row, (_, completion) in enumerate(texts):
            words = _WORD.findall(text_of(unpacked(completion)).casefold())
            for word in words:
                place, sign = _hashed(word)
                found[row, 1 + place % (self.width - 1)] += sign
            found[row] = np.sign(found[row]) * np.log1p(np.abs(found[row]))
            found[row, 0] = math.log1p(len(words))
        return found


_WORD = re.compile(r"\w+|[^\w\s]")


@functools.lru_cache(maxsize=1 << 16)
def _hashed(word: str) -> tuple[int, int]:
    number = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return number >> 1, 1 if number & 1 else -1


class ModelSource(nn.Module):
    """A text encoder or a causal language model, frozen or trained.

    Args:
        model: which reads.
        max_tokens: longest prompt and completion together, of language models; encoders have limits of their own.
    """

    def __init__(self, model: Encoder | CausalLM, max_tokens: int) -> None:
        super().__init__()
        self.model, self.max_tokens = model, max_tokens
        self.width = int(model.width)

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of all that decides the numbers."""
        if isinstance(self.model, Encoder):
            return self.model.key
        digest = hashlib.sha256(f"{to_json(self.model.config)}{self.max_tokens}".encode())
        for name, value in sorted(self.model.network.named_parameters()):
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tokens(self, prompt: Text, completion: Text) -> Row:
        """Return token ids, cut to the limits, and where the completion begins."""
        if isinstance(self.model, Encoder):
            return self.model.tokens(text_of(prompt), text_of(completion))
        ids = self.model.tokenizer.prompt(prompt)[-(self.max_tokens // 2) :]
        answer = self.model.tokenizer.completion(prompt, completion)
        return ids + answer[: self.max_tokens - len(ids)], len(ids)

    def states(self, rows: Sequence[Row]) -> Tensor:
        """Return float32 [N, X], with gradients where they are enabled."""
        if isinstance(self.model, Encoder):
            return self.model.states(rows)
        device = next(self.model.parameters()).device
        batch = token_batch([(ids[:begin], ids[begin:]) for ids, begin in rows], self.model.tokenizer.pad)
        return self.model.final_states(batch.to(device)).float()

    @torch.no_grad()
    def read(self, texts: Sequence[tuple[str, str]], batch_size: int = 32) -> Arrays:
        """Return float32 [N, X]; what a text gets does not depend on the others."""
        rows = [self.tokens(unpacked(prompt), unpacked(completion)) for prompt, completion in texts]
        # texts of one prompt together, and of like length
        order = sorted(range(len(rows)), key=lambda row: (len(rows[row][0]), rows[row][0][: rows[row][1]]))
        found = np.zeros((len(rows), self.width), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found[chosen] = self.states([rows[row] for row in chosen]).cpu().numpy()
        return found


class AgentSource:
    """The last hidden layers of a trained critic (all members side by side) or actor."""

    def __init__(self, config: AgentConfig) -> None:
        from steelyard.artefact import find, load_learner

        learner, artefact = load_learner(config.run)
        nets: Any = getattr(learner, "nets", nn.Module())
        inside = dict(nets.named_children())
        network = inside.get(config.part)
        if not isinstance(network, Critic | DiscreteCritic | GaussianActor | ActionNet):
            raise ConfigError(
                f"backbone {config.run}: {artefact.objective.kind} has no {config.part} with hidden layers"
            )
        self.nets, self.network, self.where = nets, network, f"{config.part} of {config.run}"
        digest = hashlib.sha256((find(config.run) / "pretrained/model.safetensors").read_bytes())
        self.key = f"{config.part}/{digest.hexdigest()}"
        observation = sum(math.prod(entry.shape) for entry in artefact.spec.observations.values())
        self.sizes = (observation, math.prod(artefact.spec.actions.shape) if isinstance(network, Critic) else 0)
        self.width = self.read(np.zeros((1, sum(self.sizes)), np.float32)).shape[1]

    @torch.no_grad()
    def read(self, inputs: Arrays) -> Arrays:
        """Return float32 [N, X] of raw observations, followed by raw actions for a critic of continuous actions.

        Raises:
            DataError: rows of another width.
        """
        if inputs.shape[1] != sum(self.sizes):
            parts = f"{self.sizes[0]} of the observation" + (
                f" and {self.sizes[1]} of the action" * (self.sizes[1] > 0)
            )
            raise DataError(
                f"{self.where}: expected rows of {sum(self.sizes)} numbers, {parts}; found {inputs.shape[1]}"
            )
        rows = torch.from_numpy(inputs)
        found: list[Tensor]
        match self.network:
            case Critic() as critic:
                states = self.nets.normalizer(rows[:, : self.sizes[0]])
                clip = self.nets.action_clip
                actions = self.nets.box(rows[:, self.sizes[0] :]).clamp(-clip, clip)
                found = [torch.cat([states, actions], 1)] * critic.num_critics
                for number, layer in enumerate(critic.hidden):
                    found = layer(found)
                    if critic.norms is not None:
                        found = critic.norms[number](found)
                    found = [torch.relu(x) for x in found]
            case GaussianActor() as actor:
                found = [actor.net.layers[:-1](self.nets.normalizer(rows))]
            case DiscreteCritic() as critic:
                found = [_hidden(member, rows) for member in critic.members]  # type: ignore[arg-type]
            case ActionNet() as actor:
                found = [_hidden(actor, rows)]
        result: Arrays = torch.cat(found, 1).numpy()
        return result


def _hidden(network: ActionNet, rows: Tensor) -> Tensor:
    result: Tensor = network.head.layers[:-1](network.encoder(rows))
    return result


def load_text_source(config: TextConfig, max_tokens: int, seed: int, device: str = "cpu") -> HashedWords | ModelSource:
    """Load what reads texts; a model is frozen, but for the adapter that its config may ask for."""
    if isinstance(config, WordsConfig):
        return HashedWords(config)
    if isinstance(config, EncoderConfig):
        return ModelSource(load_encoder(config).to(device), max_tokens)
    model = load_language_model(config, torch_generator(seed, "initial weights", device=device))
    if config.adapter is None:
        model.requires_grad_(False)
    return ModelSource(model, max_tokens)


def packed(text: Text) -> str:
    """Return a text as one string, as caches need it; undone by `unpacked`."""
    return text if isinstance(text, str) else "\x00" + json.dumps(text)


def unpacked(text: str) -> Text:
    """Undo `packed`."""
    found: Text = json.loads(text[1:]) if text.startswith("\x00") else text
    return found


def read_texts(
    source: HashedWords | ModelSource,
    texts: Sequence[tuple[Text, Text]],
    on_progress: Callable[[int], None] | None = None,
    folder: str | Path | None = None,
) -> Arrays:
    """Return what a frozen source says of (prompt, completion) texts [N, X], from the cache where it is dear.

    Every number goes through float16, as the cache stores it: a text has the same features in training and serving.
    """
    pairs = [(packed(prompt), packed(completion)) for prompt, completion in texts]
    if isinstance(source, HashedWords):
        return through_half(source.read(pairs))
    return cached_features(folder or cache_folder() / "features", source.key, pairs, source.read, on_progress)


def through_half(raw: Arrays) -> Arrays:
    """Return numbers as float16 keeps them."""
    return raw.astype(np.float16).astype(np.float32)
