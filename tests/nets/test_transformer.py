"""The transformer: causal, cache-exact, seeded by its generator alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from steelyard.config import from_json, to_json
from steelyard.errors import ConfigError, DataError
from steelyard.nets.transformer import Block, KeyValueCache, Transformer, TransformerConfig, next_tokens, token_logps
from steelyard.rng import torch_generator

CONFIG = TransformerConfig(vocab_size=11, width=16, layers=3, heads=2, context=12)


def make(config: TransformerConfig = CONFIG, spread: float = 10.0) -> Transformer:
    """Return a model whose weights are large enough for every part of it to matter."""
    model = Transformer(config, torch_generator(0, "init"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=torch_generator(seed, "tokens"))


def test_logits_have_one_row_per_token() -> None:
    logits = make()(random_tokens(3, 7))
    assert logits.shape == (3, 7, 11)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("position", [0, 4, 10])
def test_future_tokens_do_not_change_past_logits(position: int) -> None:
    model, tokens = make(), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, position + 1 :] = (tokens[:, position + 1 :] + 3) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, : position + 1], after[:, : position + 1], rtol=0, atol=1e-6)
    assert (before[:, position + 1 :] - after[:, position + 1 :]).abs().max() > 1e-2  # the test can fail


def test_attention_equals_the_fused_kernel() -> None:
    block = make().blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(3, 12, 16, generator=torch_generator(0, "x"))
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    query, key, value = (
        part.unflatten(-1, (2, 8)).transpose(1, 2) for part in block.query_key_value(x).chunk(3, dim=-1)
    )
    fused = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = block.attention_out(fused.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(block.attention(x, visible, None), expected, rtol=1e-5, atol=1e-5)


def test_past_tokens_and_their_order_change_logits() -> None:
    model, tokens = make(), torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [2, 7, 3]])
def test_cached_and_uncached_logits_agree(pieces: list[int]) -> None:
    model, tokens = make(), random_tokens(2, 12)
    cache = KeyValueCache(CONFIG, 2, tokens.device)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache) for piece in torch.split(tokens, pieces, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-5)
    assert cache.length == 12


def test_generate_equals_sampling_without_a_cache() -> None:
    model, prompt = make(), random_tokens(4, 3)
    expected, generator = prompt, torch_generator(0, "sample")
    with torch.no_grad():
        for _ in range(9):
            expected = torch.cat([expected, next_tokens(model(expected)[:, -1], generator, 0.7)], dim=1)
    assert torch.equal(model.generate(prompt, 9, torch_generator(0, "sample"), 0.7), expected)


def test_generation_is_a_function_of_its_generator_and_greedy_at_zero() -> None:
    model, prompt = make(), random_tokens(4, 3)
    global_state = torch.get_rng_state()
    first = model.generate(prompt, 9, torch_generator(0, "sample"))
    assert torch.equal(first, model.generate(prompt, 9, torch_generator(0, "sample")))
    assert not torch.equal(first, model.generate(prompt, 9, torch_generator(1, "sample")))
    greedy = model.generate(prompt, 9, torch_generator(0, "sample"), temperature=0.0)
    assert torch.equal(greedy, model.generate(prompt, 9, torch_generator(1, "sample"), temperature=0.0))
    assert torch.equal(greedy[:, 3], model(prompt)[:, -1].argmax(dim=-1))
    assert torch.equal(global_state, torch.get_rng_state())


def test_sampling_frequencies_follow_the_temperature() -> None:
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(40_000, 3)
    drawn = next_tokens(logits, torch_generator(0, "sample"), temperature=0.5)
    frequencies = torch.bincount(drawn[:, 0], minlength=3) / 40_000
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 4.0, 25.0]) / 30, rtol=0, atol=0.01)


def test_a_finished_row_is_filled_with_the_stop_token() -> None:
    out = make().generate(random_tokens(64, 2), 10, torch_generator(0, "sample"), stop_token=4)[:, 2:]
    stopped = (out == 4).cumsum(dim=1) > 0
    assert stopped.any()
    assert not stopped[:, 0].all()
    assert torch.equal(out == 4, stopped)


def test_too_long_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected at most 12 \(the context\), found 13"):
        make()(random_tokens(1, 13))
    with pytest.raises(DataError, match="prompt of 5 tokens and 8 new ones"):
        make().generate(random_tokens(1, 5), 8, torch_generator(0, "sample"))
    with pytest.raises(DataError, match="prompt of 0 tokens"):
        make().generate(random_tokens(1, 0), 8, torch_generator(0, "sample"))


def test_construction_draws_from_its_generator_only() -> None:
    global_state = torch.get_rng_state()
    first, second = Transformer(CONFIG, torch_generator(3, "init")), Transformer(CONFIG, torch_generator(3, "init"))
    other = Transformer(CONFIG, torch_generator(4, "init"))
    assert torch.equal(global_state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.token_embedding, other.token_embedding)
    assert all(bool(torch.isfinite(p).all()) for p in first.parameters())


def test_initial_predictions_are_close_to_uniform() -> None:
    model = Transformer(TransformerConfig(), torch_generator(0, "init"))
    tokens = torch.randint(259, (4, 64), generator=torch_generator(0, "tokens"))
    nll = -token_logps(model(tokens[:, :-1]), tokens[:, 1:]).mean()
    assert abs(nll.item() - math.log(259)) < 0.1


def test_token_logps_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0, 5.0], [4.0, 2.0, 2.0]]]).log()
    expected = torch.tensor([[5 / 8, 1 / 4]]).log()
    torch.testing.assert_close(token_logps(logits, torch.tensor([[2, 1]])), expected)


def test_the_head_stays_in_float32_under_autocast() -> None:
    model, tokens = make(spread=3.0), random_tokens(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
        cached = model(tokens, KeyValueCache(CONFIG, 2, tokens.device))
    assert logits.dtype == torch.float32
    assert cached.shape == logits.shape
    torch.testing.assert_close(logits, model(tokens), rtol=0.1, atol=0.1)


def test_weights_survive_a_safetensors_file(tmp_path: Path) -> None:
    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = Transformer(CONFIG, torch_generator(9, "init"))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokens = random_tokens(2, 12)
    assert torch.equal(model(tokens), other(tokens))


def test_config_checks_itself_and_round_trips() -> None:
    assert from_json(TransformerConfig, to_json(CONFIG)) == CONFIG
    with pytest.raises(ConfigError, match="width must be a multiple of heads, found 10 and 4"):
        TransformerConfig(width=10, heads=4)
    with pytest.raises(ConfigError, match="layers must be at least 1, found 0"):
        TransformerConfig(layers=0)
